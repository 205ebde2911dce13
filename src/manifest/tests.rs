use super::*;
use crate::digest::Sums;
use proptest::prelude::*;
use std::path::PathBuf;

const LENGTH: u64 = 6 * BLOCK + 1000;

/// Blocks 1 and 6 have data.
fn contents() -> (Digest, blake3::Hash) {
    let sums = Sums::new(LENGTH, None);
    sums.add_zeroes(ByteRange::new(0, BLOCK));
    sums.add(BLOCK, &vec![7; BLOCK as usize]);
    sums.add_zeroes(ByteRange::new(2 * BLOCK, 4 * BLOCK));
    sums.add(6 * BLOCK, &[9; 1000]);
    let digest = sums.finish().unwrap().found(1, &|| true).unwrap().digest;
    let whole = digest.whole(1, &|| true).unwrap();
    (digest, whole)
}

fn story() -> Story {
    let taken = Taken {
        time: rfc3339(SystemTime::UNIX_EPOCH),
        monotonic_ns: 5,
        boot_id: None,
        how: "frozen",
        writers: 1,
        frozen_ms: Some(0.5),
        consistent: true,
    };
    let end = |name: &str, format| End { name: PathName::of(Path::new(name)), format };
    let (unreadable, skipped) = (vec![ByteRange::new(0, 512)], vec![ByteRange::new(4096, 4096)]);
    Story { instant: taken, source: end("disk.raw", "raw"), target: end("copy.qcow2", "qcow2"), unreadable, skipped }
}

fn text() -> String {
    let (digest, whole) = contents();
    String::from_utf8(Manifest::new(story(), digest, whole).bytes().unwrap()).unwrap()
}

fn written(text: &[u8]) -> (tempfile::TempDir, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("m.json");
    std::fs::write(&path, text).unwrap();
    (folder, path)
}

fn read(text: &[u8]) -> Result<Contents> {
    let (_folder, path) = written(text);
    Contents::read(&path, LENGTH)
}

#[track_caller]
fn refusal(text: &[u8]) -> String {
    let error = read(text).expect_err("refused");
    assert_eq!(error.kind(), Kind::Usage, "{error}");
    let line = error.to_string();
    assert!(!line.contains('\n') && line.len() < 500, "{line}");
    line
}

#[test]
fn what_is_written_is_read_again() {
    let (digest, whole) = contents();
    let found = read(text().as_bytes()).unwrap();
    assert_eq!((found.digest, found.whole), (digest, whole));
    assert_eq!(found.skipped, [ByteRange::new(4096, 4096)]);
}

#[test]
fn runs_of_zero_blocks_are_numbers() {
    let value: serde_json::Value = serde_json::from_str(&text()).unwrap();
    let blocks = value["blocks"].as_array().unwrap();
    let shape: Vec<_> = blocks.iter().map(|block| block.as_u64().unwrap_or(0)).collect();
    assert_eq!(shape, [1, 0, 4, 0]);
    assert_eq!((value["length"].as_u64(), value["instant"]["how"].as_str()), (Some(LENGTH), Some("frozen")));
}

#[test]
fn other_words_and_layouts_are_read_too() {
    let mut value: serde_json::Value = serde_json::from_str(&text()).unwrap();
    value["comment"] = "from a later version".into();
    value["instant"] = serde_json::Value::Null;
    assert!(read(value.to_string().as_bytes()).is_ok());
}

#[test]
fn a_disk_of_another_size_is_another_disk() {
    let (_folder, path) = written(text().as_bytes());
    let error = Contents::read(&path, LENGTH - 1).unwrap_err();
    assert_eq!(error.kind(), Kind::Differs);
    assert!(error.to_string().contains("is of another disk"), "{error}");
    let sectors = LENGTH.next_multiple_of(SECTOR);
    assert_eq!(Contents::read(&path, sectors).unwrap().digest.length(), LENGTH);
    assert!(Contents::read(&path, sectors + 1).is_err());
}

#[test]
fn a_manifest_that_ends_too_early_is_refused_wherever_it_ends() {
    let text = text();
    for end in (0..text.trim_end().len()).step_by(7) {
        let line = refusal(&text.as_bytes()[..end]);
        assert!(line.contains("ends too early"), "{end}: {line}");
    }
}

#[test]
fn hostile_values_are_refused() {
    let text = text();
    let change = |from: &str, to: &str| {
        assert!(text.contains(from), "{from}");
        refusal(text.replacen(from, to, 1).as_bytes())
    };
    let hash = "\"".to_owned() + &"0".repeat(64) + "\"";
    for (from, to, why) in [
        ("drive-backup manifest", "some other", "not a manifest"),
        ("\"schema\": 1", "\"schema\": 2", "schema is 2"),
        ("\"schema\": 1", "\"schema\": -1", "not a manifest"),
        ("\"block_size\": 4194304", "\"block_size\": 1", "its blocks have 1 bytes"),
        (&format!("\"length\": {LENGTH}"), "\"length\": 18446744073709551615", "blocks are not those"),
        (&format!("\"length\": {LENGTH}"), "\"length\": 0", "blocks are not those"),
        (&format!("\"length\": {LENGTH}"), &format!("\"length\": {}", LENGTH + 1), "seal"),
        ("\"blocks\": [\n    1,", "\"blocks\": [\n    18446744073709551615,", "too many blocks"),
        ("\"blocks\": [\n    1,", "\"blocks\": [\n    4611686018427387904,", "blocks are not those"),
        ("\"blocks\": [\n    1,", "\"blocks\": [\n    0,", "blocks are not those"),
        ("\"blocks\": [\n    1,", &format!("\"blocks\": [\n    {hash},"), "seal"),
        ("\"blocks\": [\n    1,", "\"blocks\": [\n    -1,", "not a manifest"),
        ("\"blocks\": [\n    1,", "\"blocks\": [\n    \"abc\",", "64 hexadecimal digits"),
        ("\"offset\": 4096,", "\"offset\": 18446744073709551615,", "overflows"),
    ] {
        let line = change(from, to);
        assert!(line.contains(why), "{to}: {line}");
    }
    for text in ["", "null", "[]", "7", "{}", "{\"type\": \"drive-backup manifest\"}", "\u{0}", &"[".repeat(100_000)] {
        refusal(text.as_bytes());
    }
    refusal(&[0xff; 100]);
}

#[test]
fn a_file_that_is_too_long_or_no_file_is_refused() {
    let long = tempfile::NamedTempFile::new().unwrap();
    long.as_file().set_len(1 << 40).unwrap();
    let error = Contents::read(long.path(), LENGTH).unwrap_err();
    assert!(error.to_string().contains("more than a manifest of a disk of this size"), "{error}");
    let folder = tempfile::tempdir().unwrap();
    nix::unistd::mkfifo(&folder.path().join("fifo"), nix::sys::stat::Mode::S_IRWXU).unwrap();
    for path in [folder.path().join("fifo"), folder.path().to_owned(), "/dev/zero".into()] {
        let error = Contents::read(&path, LENGTH).unwrap_err();
        assert!(error.to_string().ends_with("is not a regular file"), "{error}");
    }
    let error = Contents::read(&folder.path().join("none"), LENGTH).unwrap_err();
    assert!(error.to_string().ends_with("No such file or directory"), "{error}");
}

proptest! {
    #![proptest_config(crate::ground::cases(400))]

    #[test]
    fn a_flipped_bit_never_changes_what_is_compared(at: prop::sample::Index, bit in 0..8u8) {
        let (digest, whole) = contents();
        let mut bytes = text().into_bytes();
        let at = at.index(bytes.len());
        bytes[at] ^= 1 << bit;
        match read(&bytes) {
            // A name or a time, which is not compared.
            Ok(found) => prop_assert_eq!((found.digest, found.whole), (digest, whole)),
            Err(error) => prop_assert_eq!(error.kind(), Kind::Usage),
        }
    }
}
