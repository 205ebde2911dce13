//! The recipe for LVM in docs/OPERATIONS.md, as written, on a file system that is written meanwhile.

use crate::machine::Machine;
use crate::support::{BINARY, folder, sparse_file, text};

const BEFORE: &str = "
set -eux
export DM_DISABLE_UDEV=1
pvcreate -q /dev/vda
vgcreate -q vg /dev/vda
lvcreate -q -L 64M -n data vg
mkdir /mnt /backup /copy
mkfs.ext4 -q /dev/vg/data
mount /dev/vg/data /mnt
head -c 10M /dev/urandom > /mnt/before
set +x
while [ ! -e /enough ]; do
    head -c 100K /dev/urandom > /mnt/meanwhile
    sync
done &
set -x
";
const AFTER: &str = "
> /enough
wait
[ -z \"$(lvs --noheadings -o name vg/data-backup 2> /dev/null)\" ]
e2fsck -fn /backup/data.raw
mount -o loop,ro /backup/data.raw /copy
cmp /mnt/before /copy/before
[ ! -e /copy/later ]
[ -e /mnt/later ]
";

/// The commands of the block that takes a snapshot.
fn recipe() -> Vec<String> {
    let document = std::fs::read_to_string("docs/OPERATIONS.md").unwrap();
    let blocks = document.split("\n```console\n").skip(1).map(|rest| rest.split("\n```").next().unwrap());
    let block = blocks.into_iter().find(|block| block.contains("lvcreate")).expect("a recipe");
    block.lines().map(|line| line.strip_prefix("# ").expect("a command of root's").to_owned()).collect()
}

#[test]
fn the_recipe_for_lvm_copies_the_moment_of_the_snapshot() {
    let folder = folder();
    let disk = folder.path().join("disk.raw");
    sparse_file(&disk, 128 << 20);
    let recipe = recipe();
    // Writes go on between the snapshot and the copy.
    let script = format!("{BEFORE}{}\n> /mnt/later\n{}\n{AFTER}", recipe[0], recipe[1..].join("\n"));
    let drive = format!("file={},format=raw,if=virtio", text(&disk));
    let arguments = ["-m", "768M", "-drive", &drive].map(str::to_owned);
    Machine::run(&script, BINARY, folder.path(), &arguments).hear("DONE");
}
