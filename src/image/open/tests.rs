//! Images made by qemu-img and qemu-io, read by both sides.

use super::*;
use crate::ground::range::{Allocation, ByteRange};
use crate::image::fixture::{run, text};
use std::fs;
use tempfile::TempDir;

const ANY: SourceOptions = SourceOptions { format: None, backing: true, direct: false, secret: None, shared: false };
const RAW: SourceOptions =
    SourceOptions { format: Some(Format::Raw), backing: true, direct: false, secret: None, shared: false };
const QCOW2: SourceOptions =
    SourceOptions { format: Some(Format::Qcow2), backing: true, direct: false, secret: None, shared: false };

/// A folder of images.
struct Folder(TempDir);

impl Folder {
    fn new() -> Self {
        Self(tempfile::tempdir().expect("a temporary folder"))
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn write(&self, name: &str, bytes: &[u8]) -> PathBuf {
        fs::write(self.path(name), bytes).expect("writes");
        self.path(name)
    }

    /// `qemu-img create` with `arguments`, the last of which is the size.
    fn create(&self, name: &str, options: &str, arguments: &[&str]) -> PathBuf {
        let path = self.path(name);
        let (before, size) = arguments.split_at(arguments.len() - 1);
        run("qemu-img", &[&["create", "-q", "-f", "qcow2", "-o", options], before, &[text(&path)], size].concat());
        path
    }

    /// Runs qemu-io's `commands` on an image.
    fn io(&self, path: &Path, commands: &[&str]) {
        let commands: Vec<_> = commands.iter().flat_map(|command| ["-c", command]).collect();
        let output = run("qemu-io", &[&["-f", "qcow2"], &commands[..], &[text(path)]].concat());
        assert!(!output.contains("failed"), "{output}");
    }

    /// What qemu-img says the image contains.
    fn qemu_contents(&self, path: &Path) -> Vec<u8> {
        let raw = self.path("contents");
        run("qemu-img", &["convert", "-f", "qcow2", "-O", "raw", text(path), text(&raw)]);
        fs::read(&raw).expect("reads")
    }
}

fn extents(image: &dyn Image, step: u64) -> Vec<(ByteRange, Allocation)> {
    let mut found = Vec::new();
    let mut at = 0;
    while at < image.length() {
        let asked = ByteRange::new(at, (image.length() - at).min(step));
        let extent = image.block_status(asked).expect("asks");
        assert_eq!(extent.range.offset, at);
        assert!(!extent.range.is_empty() && extent.range.end() <= asked.end());
        assert_ne!(extent.allocation, Allocation::Unallocated);
        found.push((extent.range, extent.allocation));
        at = extent.range.end();
    }
    found
}

fn contents(image: &dyn Image, step: usize) -> Vec<u8> {
    let mut bytes = vec![0xee; image.length() as usize];
    for (index, piece) in bytes.chunks_mut(step).enumerate() {
        image.read_at(piece, (index * step) as u64).expect("reads");
    }
    bytes
}

/// Byte ranges that qemu-img calls data, where ours must be data too unless the host file has a hole there.
fn qemu_data(path: &Path) -> Vec<ByteRange> {
    let map = run("qemu-img", &["map", "--output=json", "-f", "qcow2", text(path)]);
    let number = |line: &str, name: &str| -> u64 {
        let rest = line.split(&format!("\"{name}\": ")).nth(1).expect("is there");
        rest.split([',', '}']).next().expect("a number").trim().parse().expect("a number")
    };
    map.lines()
        .filter(|line| line.contains("\"data\": true"))
        .map(|line| ByteRange::new(number(line, "start"), number(line, "length")))
        .collect()
}

/// Reads the image whole, in pieces and across every boundary, and compares it with what qemu-img makes of it.
fn agrees_with_qemu(folder: &Folder, path: &Path) {
    let source = open_source(path, &QCOW2).expect("opens");
    let image = &*source.image;
    let expected = folder.qemu_contents(path);
    assert_eq!(image.length(), expected.len() as u64);
    for step in [expected.len(), 1 << 20, 65536 + 512, 10_007] {
        assert!(contents(image, step) == expected, "{} in steps of {step}", path.display());
    }
    let data = qemu_data(path);
    for (range, allocation) in extents(image, u64::MAX).into_iter().chain(extents(image, 100_000)) {
        if allocation == Allocation::Zero {
            let bytes = &expected[range.offset as usize..range.end() as usize];
            assert!(bytes.iter().all(|byte| *byte == 0), "{range:?} is not zero");
        } else {
            let overlap: u64 = data.iter().map(|data| data.intersect(range).length).sum();
            assert_eq!(overlap, range.length, "{range:?} is not data for qemu-img");
        }
    }
}

/// Bytes that compress, differ from cluster to cluster, and hold runs of zeroes.
fn pattern(length: usize) -> Vec<u8> {
    let byte = |at: usize| match at / 30_000 % 4 {
        0 => 0,
        1 => (at / 7) as u8,
        _ => (at as u32).wrapping_mul(2_654_435_761).to_be_bytes()[at % 3],
    };
    (0..length).map(byte).collect()
}

/// An image of `size` bytes with data, zero, discarded and, with `compress`, compressed clusters.
fn mixed(folder: &Folder, name: &str, options: &str, compress: bool, size: usize) -> PathBuf {
    let raw = folder.write("pattern", &pattern(size));
    let path = folder.path(name);
    let flag: &[&str] = if compress { &["-c"] } else { &[] };
    run("qemu-img", &[&["convert", "-O", "qcow2", "-o", options], flag, &[text(&raw), text(&path)]].concat());
    let zero = if options.contains("compat=0.10") { "write -P 0 1M 128k" } else { "write -z 1M 128k" };
    folder.io(&path, &["write -P 7 100k 3k", zero, "write -P 9 1500k 70k", "discard 2M 1M", "write -P 5 2500k 1k"]);
    path
}

fn matrix(folder: &Folder, extra: &str, clusters: &[&str], compressions: &[&str]) {
    for cluster in clusters {
        for compression in compressions {
            let mut options = format!("{extra},cluster_size={cluster}");
            if *compression == "zstd" {
                options += ",compression_type=zstd";
            }
            // Neither size is a multiple of the cluster.
            let size = if *cluster == "2M" { (9 << 20) - 3 * 512 } else { (3 << 20) + 7 * 512 };
            let path = mixed(folder, "image.qcow2", &options, *compression != "none", size);
            agrees_with_qemu(folder, &path);
        }
    }
}

#[test]
fn version_2_of_every_cluster_size_reads_as_qemu_reads_it() {
    matrix(&Folder::new(), "compat=0.10", &["512", "4k", "64k", "2M"], &["none", "zlib"]);
}

#[test]
fn version_3_of_every_cluster_size_reads_as_qemu_reads_it() {
    matrix(&Folder::new(), "compat=1.1,lazy_refcounts=on", &["4k", "64k", "2M"], &["none", "zlib", "zstd"]);
    matrix(&Folder::new(), "compat=1.1,refcount_bits=1", &["512"], &["none", "zstd"]);
}

#[test]
fn subclusters_read_as_qemu_reads_them() {
    matrix(&Folder::new(), "extended_l2=on", &["16k", "64k", "2M"], &["none", "zlib", "zstd"]);
}

#[test]
fn subclusters_over_a_backing_file_read_as_qemu_reads_them() {
    let folder = Folder::new();
    mixed(&folder, "base.qcow2", "cluster_size=64k", true, 3 << 20);
    let top =
        folder.create("top.qcow2", "extended_l2=on,cluster_size=128k", &["-b", "base.qcow2", "-F", "qcow2", "4M"]);
    folder.io(
        &top,
        &["write -P 1 6k 1k", "write -z 70k 20k", "write -P 2 512k 3k", "write -z 520k 4k", "write -z 3000k 200k"],
    );
    agrees_with_qemu(&folder, &top);
}

#[test]
fn an_external_data_file_reads_as_qemu_reads_it() {
    let folder = Folder::new();
    for raw in ["off", "on"] {
        let data = folder.path("data.raw");
        let options = format!("data_file={},data_file_raw={raw},cluster_size=16k", text(&data));
        let path = folder.create("external.qcow2", &options, &["3073k"]);
        folder.io(&path, &["write -P 7 0 3k", "write -z 64k 64k", "write -P 3 700k 300k", "discard 800k 64k"]);
        agrees_with_qemu(&folder, &path);
        let source = open_source(&path, &QCOW2).expect("opens");
        let roles: Vec<_> = source.files.iter().map(|file| (file.path.clone(), file.role)).collect();
        assert_eq!(roles, [(path.clone(), Role::Image), (data.clone(), Role::Data)]);
        fs::remove_file(&data).expect("removes");
    }
}

#[test]
fn a_preallocated_image_is_read_where_the_file_has_data() {
    let folder = Folder::new();
    let path = folder.create("image.qcow2", "preallocation=metadata", &["1G"]);
    folder.io(&path, &["write -P 7 300M 1M"]);
    let source = open_source(&path, &QCOW2).expect("opens");
    let data = extents(&*source.image, u64::MAX).into_iter().filter(|(_, allocation)| *allocation == Allocation::Data);
    assert_eq!(data.map(|(range, _)| range).collect::<Vec<_>>(), [ByteRange::new(300 << 20, 1 << 20)]);
}

#[test]
fn the_example_image_reads_as_qemu_reads_it() {
    let path = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/images/disk.qcow2"));
    agrees_with_qemu(&Folder::new(), path);
    let source = open_source(path, &ANY).expect("opens");
    assert_eq!((source.format, source.virtual_size), (Format::Qcow2, 16 << 20));
    let mut magic = [0; 2];
    source.image.read_at(&mut magic, 1024 + 0x38).expect("reads");
    assert_eq!(magic, [0x53, 0xef], "an ext4 file system");
}

#[test]
fn threads_read_one_image_at_once() {
    let folder = Folder::new();
    let path = mixed(&folder, "image.qcow2", "cluster_size=4k,compression_type=zstd", true, 3 << 20);
    let expected = folder.qemu_contents(&path);
    let source = open_source(&path, &ANY).expect("opens");
    std::thread::scope(|scope| {
        for step in [3000, 4096, 70_000, 1 << 20] {
            let (image, expected) = (&source.image, &expected);
            scope.spawn(move || assert!(contents(&**image, step) == *expected, "in steps of {step}"));
        }
    });
}

#[test]
fn internal_snapshots_and_bitmaps_do_not_disturb() {
    let folder = Folder::new();
    let path = mixed(&folder, "image.qcow2", "cluster_size=64k", false, 3 << 20);
    run("qemu-img", &["snapshot", "-c", "before", text(&path)]);
    run("qemu-img", &["bitmap", "--add", text(&path), "b0"]);
    folder.io(&path, &["write -P 8 0 1M"]);
    agrees_with_qemu(&folder, &path);
}

#[test]
fn a_dirty_image_is_read_and_a_corrupt_one_with_a_warning() {
    let folder = Folder::new();
    let path = mixed(&folder, "image.qcow2", "cluster_size=64k,lazy_refcounts=on", false, 3 << 20);
    let expected = folder.qemu_contents(&path);
    let mut bytes = fs::read(&path).expect("reads");
    for (bits, warnings) in [(1, 0), (2, 1)] {
        bytes[79] = bits;
        let marked = folder.write("marked.qcow2", &bytes);
        let source = open_source(&marked, &ANY).expect("opens");
        assert!(contents(&*source.image, 1 << 20) == expected);
        assert_eq!(source.warnings.len(), warnings);
        assert!(source.warnings.iter().all(|warning| warning.contains("marked.qcow2' is marked corrupt")));
    }
}

#[test]
fn a_chain_of_both_formats_reads_as_qemu_reads_it() {
    let folder = Folder::new();
    fs::create_dir(folder.path("bases")).expect("makes");
    folder.write("bases/base.raw", &pattern(2_500_000 / 512 * 512));
    let middle = folder.create("bases/middle.qcow2", "cluster_size=4k", &["-b", "base.raw", "-F", "raw", "3M"]);
    folder.io(&middle, &["write -P 6 1000k 20k", "write -z 1200k 80k", "write -P 4 2600k 100k"]);
    let options = "cluster_size=64k,compat=0.10";
    let top = folder.create("top.qcow2", options, &["-b", "bases/middle.qcow2", "-F", "qcow2", "3585k"]);
    folder.io(&top, &["write -P 1 900k 5k", "write -P 2 3500k 10k"]);
    agrees_with_qemu(&folder, &top);
    let source = open_source(&top, &ANY).expect("opens");
    let roles: Vec<_> = source.files.iter().map(|file| file.role).collect();
    assert_eq!(roles, [Role::Image, Role::Backing, Role::Backing]);
    assert_eq!((source.format, source.virtual_size, source.warnings.len()), (Format::Qcow2, 3585 << 10, 0));

    let refused = open_source(&top, &SourceOptions { backing: false, ..ANY }).err().expect("refused").to_string();
    assert!(refused.contains("top.qcow2' has a backing file, 'bases/middle.qcow2'"), "{refused}");
}

#[test]
fn layers_with_their_tables_at_the_same_place_are_told_apart() {
    let folder = Folder::new();
    mixed(&folder, "base.qcow2", "cluster_size=64k", true, 3 << 20);
    let top = folder.create("top.qcow2", "cluster_size=64k", &["-b", "base.qcow2", "-F", "qcow2", "3M"]);
    folder.io(&top, &["write -P 1 64k 64k", "write -c -P 2 1M 64k"]);
    agrees_with_qemu(&folder, &top);
}

#[test]
fn sixteen_tebibytes_are_skipped_at_once() {
    let folder = Folder::new();
    let path = folder.create("huge.qcow2", "cluster_size=64k", &["16T"]);
    folder.io(&path, &["write -P 7 1T 128k", "write -P 9 15T 64k"]);
    let source = open_source(&path, &ANY).expect("opens");
    let found = extents(&*source.image, u64::MAX);
    let data: Vec<_> = found.iter().filter(|(_, allocation)| *allocation == Allocation::Data).collect();
    assert_eq!(found.len(), 5);
    assert_eq!(data[0].0, ByteRange::new(1 << 40, 128 << 10));
    assert_eq!(data[1].0, ByteRange::new(15 << 40, 64 << 10));
}

#[test]
fn a_raw_image_is_the_file_itself() {
    let folder = Folder::new();
    let path = folder.write("disk.img", &pattern(100_001));
    let source = open_source(&path, &ANY).expect("opens");
    assert_eq!((source.format, source.virtual_size), (Format::Raw, 100_001));
    assert!(source.image.file().is_some() && source.warnings.is_empty());
    assert!(contents(&*source.image, 4096) == pattern(100_001));

    let foreign = folder.write("disk.vmdk", b"KDMV\x01\0\0\0");
    let source = open_source(&foreign, &RAW).expect("opens");
    assert_eq!((source.format, source.virtual_size), (Format::Raw, 8));
}

#[test]
fn a_header_that_a_guest_wrote_into_its_raw_disk_is_not_followed() {
    let folder = Folder::new();
    let secret = folder.write("secret", &[0x5e; 1 << 20]);
    let planted = folder.create("disk.raw", "cluster_size=64k", &["-b", text(&secret), "-F", "raw", "1M"]);
    let planted_bytes = fs::read(&planted).expect("reads");

    let source = open_source(&planted, &RAW).expect("opens");
    assert_eq!((source.format, source.files.len()), (Format::Raw, 1));
    assert!(contents(&*source.image, 1 << 20) == planted_bytes);

    // Backing files without a recorded format; the image in the middle has been given one, as raw.
    for version in ["compat=0.10", "compat=1.1"] {
        let options = format!("{version},cluster_size=64k");
        let top = folder.create("top.qcow2", &options, &["-u", "-b", "disk.raw", "-F", "raw", "1M"]);
        let mut bytes = fs::read(&top).expect("reads");
        let at = bytes.windows(4).position(|word| word == 0xe279_2aca_u32.to_be_bytes()).expect("recorded");
        bytes[at..at + 4].copy_from_slice(b"none");
        let top = folder.write("top.qcow2", &bytes);
        let source = open_source(&top, &ANY).expect("opens");
        assert_eq!(source.files.len(), 2, "the secret is not opened");
        let found = contents(&*source.image, 1 << 20);
        assert!(found[..planted_bytes.len()] == planted_bytes && !found.contains(&0x5e));
        assert!(source.warnings[0].contains("does not record the format of its backing file 'disk.raw'"));
    }
}

/// The one line with which `open_source` refuses.
fn refusal(path: &Path, options: &SourceOptions) -> String {
    let error = open_source(path, options).err().expect("refused");
    assert_eq!(error.kind(), Kind::Source);
    let text = error.to_string();
    assert!(!text.contains(char::is_control), "{text}");
    text
}

#[test]
fn a_loop_in_the_chain_is_refused() {
    let folder = Folder::new();
    let link = |name: &str, backing: &str| {
        folder.create(name, "cluster_size=64k", &["-u", "-b", backing, "-F", "qcow2", "1M"])
    };
    let own = link("own.qcow2", "own.qcow2");
    let a = link("a.qcow2", "b.qcow2");
    link("b.qcow2", "other/../hard.qcow2");
    fs::create_dir(folder.path("other")).expect("makes");
    fs::hard_link(&a, folder.path("hard.qcow2")).expect("links");
    for path in [own, a] {
        let text = refusal(&path, &ANY);
        assert!(text.contains("in the chain already: it is a loop"), "{text}");
    }
}

#[test]
fn an_endless_chain_is_refused() {
    let folder = Folder::new();
    for index in 0..=CHAIN_LIMIT {
        let mut bytes = minimal_image(1 << 20).encode().expect("fits");
        let name = format!("{}.qcow2", index + 1);
        bytes[8..16].copy_from_slice(&1024u64.to_be_bytes());
        bytes[16..20].copy_from_slice(&(name.len() as u32).to_be_bytes());
        bytes.resize(3 * 65536, 0);
        bytes[1024..1024 + name.len()].copy_from_slice(name.as_bytes());
        // The format's extension goes where the extensions begin.
        bytes[112..125].copy_from_slice(b"\xe2\x79\x2a\xca\0\0\0\x05qcow2");
        folder.write(&format!("{index}.qcow2"), &bytes);
    }
    let text = refusal(&folder.path("0.qcow2"), &ANY);
    assert!(text.contains("the chain has more than 256 images"), "{text}");
}

fn minimal_image(size: u64) -> Header {
    Header {
        version: 3,
        cluster_bits: 16,
        size,
        l1_size: 1,
        l1_table_offset: 0x20000,
        refcount_table_offset: 0x10000,
        refcount_table_clusters: 1,
        nb_snapshots: 0,
        snapshots_offset: 0,
        incompatible_features: 0,
        compatible_features: 0,
        autoclear_features: 0,
        refcount_order: 4,
        compression: crate::image::qcow2::header::Compression::Zlib,
        backing: None,
        data_file: None,
        bitmaps: false,
    }
}

#[test]
fn what_an_image_names_and_is_not_there_is_named_with_the_image() {
    let folder = Folder::new();
    let missing = folder.create("a.qcow2", "cluster_size=64k", &["-u", "-b", "gone.raw", "-F", "raw", "1M"]);
    let line = refusal(&missing, &ANY);
    assert!(line.contains("a.qcow2'") && line.contains("gone.raw'") && line.contains("No such file"), "{line}");

    let data = folder.path("data.raw");
    let external = folder.create("e.qcow2", &format!("data_file={}", text(&data)), &["1M"]);
    fs::remove_file(&data).expect("removes");
    let line = refusal(&external, &ANY);
    assert!(line.contains("data file of") && line.contains("e.qcow2'") && line.contains("data.raw'"), "{line}");
}

#[test]
fn backing_files_that_are_no_plain_files_are_refused() {
    let folder = Folder::new();
    let named = |name: &str, format: &str| {
        let path = folder.create(
            "a.qcow2",
            "cluster_size=64k",
            &["-u", "-b", "placeholder-of-some-length", "-F", format, "1M"],
        );
        let mut bytes = fs::read(&path).expect("reads");
        let at = bytes.windows(11).position(|word| word == b"placeholder").expect("is there");
        bytes[at..at + name.len()].copy_from_slice(name.as_bytes());
        bytes[16..20].copy_from_slice(&(name.len() as u32).to_be_bytes());
        refusal(&folder.write("a.qcow2", &bytes), &ANY)
    };
    for name in ["json:{\"driver\":\"raw\"}", "nbd://localhost/disk", "http:x", "file:", "file:nbd:x"] {
        let text = named(name, "raw");
        assert!(text.contains(&format!("'{name}' is not the name of a file here")), "{text}");
    }
    assert!(named("disk\x1b[2J", "raw").contains("disk?[2J"));
    let text = named("base.vmdk", "vmdk");
    assert!(text.contains("'base.vmdk': unknown format 'vmdk' (known: raw, qcow2)"), "{text}");
}

#[test]
fn names_are_relative_to_the_image_that_names_them() {
    let at = |path: &str, name: &str| named_path(Path::new(path), OsStr::new(name)).expect("a path");
    assert_eq!(at("dir/a.qcow2", "b.raw"), Path::new("dir/b.raw"));
    assert_eq!(at("dir/a.qcow2", "../b.raw"), Path::new("dir/../b.raw"));
    assert_eq!(at("a.qcow2", "b.raw"), Path::new("b.raw"));
    assert_eq!(at("dir/a.qcow2", "/b.raw"), Path::new("/b.raw"));
    assert_eq!(at("dir/a.qcow2", "file:b.raw"), Path::new("dir/b.raw"));
    assert_eq!(at("dir/a.qcow2", "./a:b.raw"), Path::new("dir/./a:b.raw"));
}

#[test]
fn what_is_no_image_is_refused_in_one_line() {
    let folder = Folder::new();
    let empty = folder.write("empty", b"");
    assert!(refusal(&empty, &QCOW2).ends_with("empty': not a qcow2 image: it is empty"));
    let short = folder.write("short", b"QFI\xfb\0\0\0\x03");
    assert!(refusal(&short, &ANY).contains("truncated qcow2 image: 8 bytes are no header"));
    let other = folder.write("other", &[0; 4096]);
    assert!(refusal(&other, &QCOW2).contains("does not start with the magic"));
    assert!(refusal(&folder.path("gone"), &ANY).contains("gone': No such file"));
    assert!(refusal(folder.0.path(), &ANY).contains("open source"));
    assert!(refusal(&empty, &ANY).ends_with("empty' is empty; if a disk of no bytes is meant, say raw"));
    assert_eq!(open_source(&empty, &RAW).expect("an empty raw image").virtual_size, 0);
}

#[test]
fn an_encrypted_image_is_refused_by_name() {
    let folder = Folder::new();
    let path = folder.path("luks.qcow2");
    let options = "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10";
    run(
        "qemu-img",
        &["create", "-q", "-f", "qcow2", "--object", "secret,id=s,data=x", "-o", options, text(&path), "1M"],
    );
    assert!(refusal(&path, &ANY).contains("encrypted with LUKS (crypt_method 2)"));
}

#[test]
fn the_l1_tables_of_a_chain_are_bounded_together() {
    let folder = Folder::new();
    let image = |name: &str, backing: Option<&str>| {
        let backing = backing
            .map(|name| crate::image::qcow2::header::Backing { name: name.into(), format: Some("qcow2".to_owned()) });
        let entries = 4 << 20;
        let header = Header {
            l1_size: entries,
            cluster_bits: 9,
            refcount_table_offset: 512,
            l1_table_offset: 1024,
            backing,
            ..minimal_image((entries as u64) << 15)
        };
        let path = folder.write(name, &header.encode().expect("fits"));
        fs::File::options().write(true).open(&path).expect("opens").set_len(40 << 20).expect("grows");
        path
    };
    image("c.qcow2", None);
    image("b.qcow2", Some("c.qcow2"));
    let top = image("a.qcow2", Some("b.qcow2"));
    assert!(open_source(&folder.path("b.qcow2"), &ANY).is_ok());
    let text = refusal(&top, &ANY);
    assert!(text.contains("the L1 tables take more than 64 MiB"), "{text}");
}
