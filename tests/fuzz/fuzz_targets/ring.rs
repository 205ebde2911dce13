//! A hostile writer and its backup. The first byte chooses what is hostile: a packet, what it answers in the handshake, or, after a
//! good one, what it posts: 17 bytes each, a slot, an offset and a length. Only writes within the disk are ever captured.
#![no_main]

use drive_backup::error::{Error, Result};
use drive_backup::ground::cluster::ClusterSize;
use drive_backup::ground::range::ByteRange;
use drive_backup::ring::folder::{Disk, Folder};
use drive_backup::ring::futex::WAKER;
use drive_backup::ring::layout::{MAX_ENTRY, SLOTS};
use drive_backup::ring::packet::Packet;
use drive_backup::ring::server::{OnCbwError, Options, Trap, Writers};
use drive_backup::ring::shm::Ring;
use drive_backup::ring::socket::{self, Received};
use libfuzzer_sys::fuzz_target;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::{Arc, OnceLock};
use std::thread;
use std::time::{Duration, Instant};
use tempfile::TempDir;

const LENGTH: u64 = 1 << 20;
const SOON: Duration = Duration::from_secs(4);

struct Within;

impl Trap for Within {
    fn before_write(&self, range: ByteRange) -> Result<()> {
        assert!(!range.is_empty() && range.end() <= LENGTH && range.length <= MAX_ENTRY, "{range}");
        Ok(())
    }

    fn lost(&self, why: &Error) {
        assert!(!why.to_string().contains('\n'));
    }
}

fn options() -> Options {
    Options {
        length: LENGTH,
        cluster_size: ClusterSize::new(4096),
        freeze_timeout: Duration::from_millis(200),
        cbw_timeout: Duration::from_millis(200),
        on_cbw_error: OnCbwError::BreakSnapshot,
        threads: 1,
    }
}

fn folder() -> &'static Path {
    static FOLDER: OnceLock<TempDir> = OnceLock::new();
    let folder = FOLDER.get_or_init(|| {
        let folder = tempfile::tempdir_in("/dev/shm").unwrap();
        std::fs::write(folder.path().join("disk"), [0; 512]).unwrap();
        folder
    });
    folder.path()
}

/// Sends bytes as they are, each piece a packet.
fn babble(connection: &OwnedFd, bytes: &[u8]) {
    for piece in bytes.chunks(1 + usize::from(bytes[0]) % 80) {
        if send(connection, piece).is_err() {
            return;
        }
    }
}

fn send(connection: &OwnedFd, bytes: &[u8]) -> std::io::Result<()> {
    Ok(rustix::net::send(connection, bytes, rustix::net::SendFlags::NOSIGNAL).map(drop)?)
}

/// The writer's side: obeys up to the thaw, unless its answers are the bytes. Nobody is there for a second connection.
fn obey(listener: OwnedFd, lies: Option<&[u8]>) -> Option<(OwnedFd, Ring)> {
    rustix::io::ioctl_fionbio(&listener, false).unwrap();
    let connection = rustix::net::accept(&listener).ok()?;
    drop(listener);
    let Ok(Received::Packet(Packet::Attach(_), descriptors)) = socket::receive(&connection) else { return None };
    let ring = Ring::receive(descriptors.into_iter().next()?).ok()?;
    if let Some(lies) = lies {
        babble(&connection, lies);
        return None;
    }
    socket::send(&connection, &Packet::Attached, &[]).ok()?;
    for answer in [Packet::Frozen, Packet::Thawed { held: true }] {
        let Ok(Received::Packet(..)) = socket::receive(&connection) else { return None };
        socket::send(&connection, &answer, &[]).ok()?;
    }
    Some((connection, ring))
}

fn meet(lies: Option<&[u8]>, entries: &[u8]) {
    let folder = Folder::open(&folder().join("writers")).unwrap();
    let disk = Disk::at(&self::folder().join("disk")).unwrap();
    let (listener, name) = folder.listen(disk).unwrap();
    thread::scope(|scope| {
        let writer = scope.spawn(move || obey(listener, lies));
        let Ok(writers) = Writers::attach(disk, folder.path(), options()) else { return };
        let thawed = writers.freeze().and_then(|frozen| frozen.thaw(Arc::new(Within)));
        if let (Ok(_), Ok(Some((_connection, ring)))) = (thawed, writer.join()) {
            for entry in entries.chunks_exact(17) {
                let number = |at: usize| u64::from_be_bytes(entry[at..at + 8].try_into().unwrap());
                let range = ByteRange { offset: number(1), length: number(9) };
                ring.post(usize::from(entry[0]) % SLOTS, range, &WAKER);
            }
        }
        let _ = writers.finish();
    });
    drop(name);
}

fn packet(bytes: &[u8]) {
    match Packet::decode(bytes) {
        Ok(packet) => assert_eq!(Packet::decode(&packet.encode()).ok(), Some(packet)),
        Err(why) => assert!(!why.to_string().is_empty()),
    }
}

fuzz_target!(|bytes: &[u8]| {
    let Some((&first, rest)) = bytes.split_first() else { return };
    let began = Instant::now();
    match first % 8 {
        0 if !rest.is_empty() => meet(Some(rest), &[]),
        1 => meet(None, rest),
        _ => packet(rest),
    }
    assert!(began.elapsed() < SOON, "a hostile writer holds the backup");
});
