//! docs/OPERATIONS.md as written: its commands run, in order, in a mount namespace where its paths are scratch folders.

mod support;

use std::fs;
use std::path::Path;
use std::process::Command;
use support::{run, text};

const BINARY: &str = env!("CARGO_BIN_EXE_drive-backup");

/// The blocks of one language.
fn blocks(language: &str) -> Vec<String> {
    let document = fs::read_to_string("docs/OPERATIONS.md").unwrap();
    let fence = format!("\n```{language}\n");
    let blocks: Vec<String> =
        document.split(&fence).skip(1).map(|rest| rest.split("\n```").next().unwrap().to_owned()).collect();
    assert!(!blocks.is_empty(), "{language}");
    blocks
}

/// What cron hands to the shell: the line from its sixth field on, in which a percent sign is escaped.
fn command_of(line: &str) -> String {
    let fields = line.splitn(6, |c: char| c.is_whitespace()).last().unwrap();
    fields.trim_start().replace("\\%", "%")
}

/// Everything in one shell, which stops at the first command that fails.
fn script(folder: &Path) -> String {
    let scratch = ["/var/lib/vm", "/backup", "/etc/drive-backup", "/var/lib/prometheus/node-exporter", "/mnt/xfs"];
    let mut script = format!("set -eux\nexport PATH={}:$PATH TMPDIR={}\n", text(folder), text(folder));
    // The namespace ends with the shell, and its mounts with it; empty folders that were made stay.
    for path in scratch {
        script += &format!("mkdir -p {path} && mount -t tmpfs tmpfs {path}\n");
    }
    script += "mount -t tmpfs tmpfs /run\n";
    script += "qemu-img create -q -f qcow2 /var/lib/vm/disk.qcow2 64M\n";
    script += "qemu-io -c 'write -P 5 1M 8M' /var/lib/vm/disk.qcow2 > /dev/null\n";
    script += "truncate -s 64M /var/lib/vm/live.raw\n";
    script +=
        &format!("truncate -s 400M {0}/xfs && mkfs.xfs -q {0}/xfs && mount -o loop {0}/xfs /mnt/xfs\n", text(folder));
    script += "dd if=/dev/urandom of=/mnt/xfs/disk.raw bs=1M count=8 status=none\n";
    for block in blocks("sh") {
        script += &format!("{block}\n");
    }
    for line in blocks("cron").iter().flat_map(|block| block.lines()) {
        // The one that takes until the morning is told to hurry, when it has begun to copy.
        script += &format!("bash -c '{}' &\n", command_of(line));
        script += "until compgen -G '/backup/.*-partial' > /dev/null || ! kill -0 $!; do sleep 0.1; done\n";
        script += "kill -USR2 $! || true\nwait $!\n";
    }
    script += "qemu-img compare /var/lib/vm/disk.qcow2 /backup/disk.qcow2\n";
    script += "cmp /mnt/xfs/disk.raw /backup/from-clone.raw\n";
    script += "test \"$(tail -n 1 /backup/log)\" = '/var/lib/vm/disk.qcow2 is safe'\n";
    script + "umount /mnt/xfs\n"
}

#[test]
fn every_recipe_runs_as_written() {
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    std::os::unix::fs::symlink(BINARY, folder.path().join("drive-backup")).unwrap();
    let path = folder.path().join("recipes.sh");
    fs::write(&path, script(folder.path())).unwrap();
    let mut shell = Command::new("unshare");
    shell.args(["--mount", "timeout", "600", "bash"]).arg(&path).env_remove("DRIVE_BACKUP_DIR");
    let output = shell.output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

#[test]
fn the_units_are_sound() {
    let folder = tempfile::tempdir().unwrap();
    let mut units = Vec::new();
    for unit in fs::read_dir("docs/systemd").unwrap().map(|unit| unit.unwrap().path()) {
        let text = fs::read_to_string(&unit).unwrap().replace("/usr/bin/drive-backup", BINARY);
        let copy = folder.path().join(unit.file_name().unwrap());
        fs::write(&copy, text).unwrap();
        units.push(copy);
    }
    assert_eq!(units.len(), 3);
    let mut verify = Command::new("systemd-analyze");
    verify.args(["verify", "--man=no"]).args(&units).env("SYSTEMD_UNIT_PATH", format!("{}:", text(folder.path())));
    let output = verify.output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    // What other units of this machine do is theirs.
    let ours: Vec<&str> = said.lines().filter(|line| line.contains("drive-backup")).collect();
    assert!(output.status.success() && ours.is_empty(), "{said}");
}

#[test]
fn the_configuration_of_the_service_is_read() {
    let folder = tempfile::tempdir().unwrap();
    let disk = folder.path().join("disk.raw");
    fs::write(&disk, vec![3; 1 << 20]).unwrap();
    let block = blocks("sh").into_iter().find(|block| block.contains("disk.conf")).unwrap();
    let lines = block.lines().filter_map(|line| line.split_once('=')).map(|(name, value)| {
        let value = value.replace("/var/lib/vm/disk.qcow2", text(&disk)).replace("/backup", text(folder.path()));
        (name.to_owned(), value.replace("/var/lib/prometheus/node-exporter", text(folder.path())))
    });
    let output = Command::new(BINARY).envs(lines).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    run("qemu-img", &["compare", "-f", "raw", text(&disk), text(&folder.path().join("disk.qcow2"))]);
    assert!(folder.path().join("drive-backup-disk.prom").exists());
}
