//! Images that were made to do harm: as a source and as a target that is there, each costs little time and memory, and ends in
//! a copy or in one line.

use crate::support::cost::cost;
use crate::support::{folder, qemu_img, text};
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;

const L1_AT: u64 = 40;
const L2_OF_FIRST_CLUSTERS: u64 = 0;

/// A folder where images are made.
struct Workshop {
    folder: tempfile::TempDir,
}

impl Workshop {
    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// An empty image of `size`, as qemu-img makes it with `options`, and then changed.
    fn image(&self, name: &str, options: &str, size: &str, change: impl FnOnce(&Patched)) -> PathBuf {
        let path = self.path(name);
        let out = qemu_img(&format!("create -q -f qcow2 -o {options}"), &[&path, Path::new(size)]);
        assert_eq!(out, "");
        change(&Patched::open(&path));
        path
    }
}

/// An image whose numbers are changed.
struct Patched(File);

impl Patched {
    fn open(path: &Path) -> Self {
        Self(File::options().read(true).write(true).open(path).unwrap())
    }

    fn get(&self, at: u64) -> u64 {
        let mut bytes = [0; 8];
        self.0.read_exact_at(&mut bytes, at).unwrap();
        u64::from_be_bytes(bytes)
    }

    fn put(&self, at: u64, bytes: &[u8]) {
        self.0.write_all_at(bytes, at).unwrap();
    }

    fn put64(&self, at: u64, value: u64) {
        self.put(at, &value.to_be_bytes());
    }

    fn put32(&self, at: u64, value: u32) {
        self.put(at, &value.to_be_bytes());
    }

    /// So many times the same word.
    fn fill64(&self, at: u64, value: u64, count: usize) {
        self.put(at, &value.to_be_bytes().repeat(count));
    }

    fn end(&self, alignment: u64) -> u64 {
        self.0.metadata().unwrap().len().next_multiple_of(alignment)
    }
}

/// L2 tables that say of every cluster that its compressed bytes are `bytes`, for a disk of so many clusters of 2 MiB.
fn compressed_everywhere(image: &Patched, bytes: &[u8], clusters: u64) {
    const CLUSTER_BITS: u32 = 21;
    let cluster = 1 << CLUSTER_BITS;
    let data = image.end(cluster);
    image.put(data, bytes);
    let sectors = (bytes.len() as u64).div_ceil(512) - 1;
    let entry = 1 << 62 | sectors << (62 - (CLUSTER_BITS - 8)) | data;
    let l2 = data + cluster;
    image.fill64(l2, entry, clusters as usize);
    image.put(l2 + cluster - 1, &[0]);
    image.put64(image.get(L1_AT) + L2_OF_FIRST_CLUSTERS, l2 | 1 << 63);
}

/// Zstandard: a frame that wants a window of `bits`, then a run of 2 MiB in blocks of 128 KiB.
fn zstd_with_window(bits: u8) -> Vec<u8> {
    let mut frame = vec![0x28, 0xb5, 0x2f, 0xfd, 0, (bits - 10) << 3];
    for block in 0..16_u32 {
        let header = u32::from(block == 15) | 1 << 1 | (128 << 10) << 3;
        frame.extend(&header.to_le_bytes()[..3]);
        frame.push(0);
    }
    frame
}

/// Raw deflate of so many zero bytes, by the tool that everybody has.
fn deflated_zeroes(length: usize) -> Vec<u8> {
    let program = format!(
        "import sys, zlib; c = zlib.compressobj(9, zlib.DEFLATED, -12); \
         sys.stdout.buffer.write(c.compress(bytes({length})) + c.flush())"
    );
    Command::new("python3").args(["-c", &program]).output().unwrap().stdout
}

/// What an image may be made to do, and the image.
fn images(shop: &Workshop) -> Vec<PathBuf> {
    let mut images = tables(shop).to_vec();
    images.extend(headers(shop));
    images.extend(bombs(shop));
    images.extend(chains(shop));
    images
}

fn tables(shop: &Workshop) -> [PathBuf; 7] {
    let giant = |l1_size: u32| move |image: &Patched| image.put32(36, l1_size);
    let of_512 = "cluster_size=512";
    [
        shop.image("giant-l1", of_512, "1G", giant(u32::MAX)),
        // As large as it may be, and no entry is a table's place.
        shop.image("l1-of-garbage", of_512, "128G", |image| {
            let entries = 4 << 20;
            let l1 = image.end(512);
            image.fill64(l1, 0x1234_5678_9abc_def1, entries);
            image.put32(36, entries as u32);
            image.put64(L1_AT, l1);
        }),
        // Each table is the table of tables.
        shop.image("l1-into-itself", of_512, "16M", |image| {
            let l1 = image.get(L1_AT);
            image.fill64(l1, l1 | 1 << 63, 512);
        }),
        // All clusters of the disk are one cluster of the file, which is their table.
        shop.image("overlapping-clusters", "cluster_size=64k", "64M", |image| {
            let l2 = image.end(64 << 10);
            image.fill64(l2, l2 | 1 << 63, 8192);
            image.put64(image.get(L1_AT), l2 | 1 << 63);
        }),
        shop.image("refcount-loop", "cluster_size=512", "1G", |image| {
            let table = image.get(48);
            image.fill64(table, table, 64);
        }),
        shop.image("refcounts-of-everything", "cluster_size=2M,refcount_bits=1", "1G", |image| {
            image.put32(56, 4);
            let table = image.get(48);
            image.fill64(table, 0x7fff_ffff_ffe0_0000, 4 << 18);
        }),
        shop.image("snapshots-of-garbage", "cluster_size=4k", "1G", |image| {
            let snapshots = image.end(4096);
            image.put(snapshots, &[0xff; 1 << 16]);
            image.put32(60, 65536);
            image.put64(64, snapshots);
        }),
    ]
}

fn headers(shop: &Workshop) -> [PathBuf; 5] {
    let extension = |kind: u32, length: u32| {
        move |image: &Patched| {
            image.put32(104, 112);
            image.put32(112, kind);
            image.put32(116, length);
        }
    };
    [
        shop.image("huge-extension", "cluster_size=64k", "1G", extension(0xe279_2aca, u32::MAX)),
        shop.image("extension-of-a-gigabyte", "cluster_size=2M", "1G", extension(0x1234_5678, 1 << 30)),
        // A quarter of a million of them.
        shop.image("many-extensions", "cluster_size=2M", "1G", |image| image.fill64(112, 0x1234_5678 << 32, 262_130)),
        shop.image("bitmaps-of-garbage", "cluster_size=64k", "1G", |image| {
            extension(0x2385_2875, 24)(image);
            image.put(120, &[0xff; 24]);
        }),
        shop.image("a-disk-of-exabytes", "cluster_size=2M", "1G", |image| {
            image.put64(24, 1 << 61);
            image.put32(36, 4 << 20);
        }),
    ]
}

fn bombs(shop: &Workshop) -> [PathBuf; 4] {
    let zlib = deflated_zeroes(2 << 20);
    let too_much = deflated_zeroes(64 << 20);
    let everywhere = |bytes: Vec<u8>| move |image: &Patched| compressed_everywhere(image, &bytes, 64);
    [
        shop.image("bomb", "cluster_size=2M", "128M", everywhere(zlib)),
        shop.image("bomb-of-64-mib", "cluster_size=2M", "128M", everywhere(too_much)),
        shop.image("bomb-zstd", "cluster_size=2M,compression_type=zstd", "128M", everywhere(zstd_with_window(21))),
        shop.image(
            "window-of-2-gib",
            "cluster_size=2M,compression_type=zstd",
            "128M",
            everywhere(zstd_with_window(31)),
        ),
    ]
}

fn chains(shop: &Workshop) -> [PathBuf; 3] {
    let over = |name: &str, backing: &str| {
        let path = shop.path(name);
        qemu_img("create -q -u -f qcow2 -F qcow2 -b", &[Path::new(backing), &path, Path::new("1G")]);
        path
    };
    over("loop-b", "loop-a");
    // Its own folder is another way to it.
    let around = over("around", "./../around-link");
    std::os::unix::fs::symlink(&around, shop.folder.path().parent().unwrap().join("around-link")).unwrap();
    [over("loop-a", "loop-b"), over("loop-self", "loop-self"), around]
}

/// A disk of `length` bytes, if there can be such a file here, that has data at its beginning and at its end.
fn disk_of(shop: &Workshop, length: u64) -> PathBuf {
    let disk = shop.path("disk.raw");
    let file = File::create(&disk).unwrap();
    file.set_len(length.min(1 << 40)).unwrap();
    let end = file.metadata().unwrap().len();
    for at in [0, end - (1 << 20)] {
        file.write_all_at(&[1; 1 << 20], at).unwrap();
    }
    disk
}

#[test]
fn hostile_images_cost_little_time_and_memory() {
    let shop = Workshop { folder: folder() };
    fs::create_dir(shop.path("images")).unwrap();
    let inner = Workshop { folder: tempfile::tempdir_in(shop.path("images")).unwrap() };
    for image in images(&inner) {
        let name = image.file_name().unwrap().to_str().unwrap();
        let target = shop.path("target.qcow2");
        let image = text(&image);
        let arguments = ["--device", image, "--source-format", "qcow2", "--no-fsync", "--target", text(&target)];
        // A copy, or the source's fault; or the copy is larger than a file can be.
        cost(shop.folder.path(), &arguments).assert_cheap(&[0, 4, 5], name);
        let _ = fs::remove_file(&target);
        let disk = disk_of(&shop, Patched::open(Path::new(image)).get(24));
        let existing = ["--mode", "existing", "--format", "qcow2"];
        let arguments = [&["--device", text(&disk), "--no-fsync", "--target", image][..], &existing].concat();
        cost(shop.folder.path(), &arguments).assert_cheap(&[0, 4, 5], name);
    }
}
