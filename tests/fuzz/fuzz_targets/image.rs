//! A whole qcow2 file, beside the files that it may name: opened with its chain, and read; refused or read, in bounded time and
//! memory. The corpus is qemu-img's: see `corpus` in the folder above.
#![no_main]

use drive_backup::ground::range::ByteRange;
use drive_backup::image::Image;
use drive_backup::image::format::Format;
use drive_backup::image::open::{SourceOptions, open_source};
use libfuzzer_sys::fuzz_target;
use std::fs;
use std::path::Path;
use std::sync::OnceLock;
use tempfile::TempDir;

/// Bytes to read of a disk, which may say that it is huge.
const READ_LIMIT: u64 = 1 << 20;
/// Extents to ask for.
const EXTENTS_LIMIT: usize = 256;

/// In memory, with the names that images of the corpus have for what is behind them.
fn folder() -> &'static Path {
    static FOLDER: OnceLock<TempDir> = OnceLock::new();
    let folder = FOLDER.get_or_init(|| {
        let folder = tempfile::tempdir_in("/dev/shm").unwrap();
        for name in ["base.raw", "data.raw"] {
            let bytes: Vec<u8> = (0..64_u32 << 10).map(|byte| (byte / 97) as u8).collect();
            fs::write(folder.path().join(name), bytes).unwrap();
        }
        folder
    });
    folder.path()
}

fn read(image: &dyn Image) {
    let whole = ByteRange::new(0, image.length());
    let mut rest = whole;
    for _ in 0..EXTENTS_LIMIT {
        if rest.is_empty() {
            break;
        }
        let Ok(extent) = image.block_status(rest) else { break };
        assert!(extent.range.offset == rest.offset && !extent.range.is_empty() && extent.range.end() <= rest.end());
        rest = ByteRange::between(extent.range.end(), rest.end());
    }
    let mut buf = vec![0; 64 << 10];
    let last = whole.length.saturating_sub(buf.len() as u64);
    for offset in (0..whole.length.min(READ_LIMIT)).step_by(buf.len()).chain([last]) {
        let length = (whole.length - offset).min(buf.len() as u64) as usize;
        let _ = image.read_at(&mut buf[..length], offset);
    }
}

fuzz_target!(|bytes: &[u8]| {
    let path = folder().join("disk.qcow2");
    fs::write(&path, bytes).unwrap();
    let options =
        SourceOptions { format: Some(Format::Qcow2), backing: true, direct: false, secret: None, shared: false };
    match open_source(&path, &options) {
        Ok(source) => read(&*source.image),
        Err(error) => assert!(!error.to_string().contains('\n')),
    }
});
