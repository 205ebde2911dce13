//! A whole NBD server, handshake and transmission, over a stream in memory. The first byte says how the stream is cut, and
//! whether it begins behind the handshake.
//!
//! ```text
//! cd tests/fuzz && cargo +nightly fuzz run --fuzz-dir . nbd_server
//! ```
#![no_main]

use drive_backup::image::raw::Raw;
use drive_backup::nbd::tls::ServerTls;
use drive_backup::serve::disk::{Disk, DiskOptions};
use drive_backup::serve::nbd::connection::serve;
use drive_backup::serve::nbd::handshake::{Offer, negotiate};
use drive_backup::serve::nbd::request::Session;
use drive_backup::serve::nbd::watch::Watch;
use drive_backup::serve::nbd::wire::Wire;
use libfuzzer_sys::fuzz_target;
use std::io;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Duration;

const LENGTH: u64 = 70_000;
const SOON: Duration = Duration::from_secs(10);

struct Tape {
    input: Mutex<(Vec<u8>, usize)>,
    piece: usize,
}

impl Wire for Tape {
    fn read(&self, buf: &mut [u8]) -> io::Result<usize> {
        let (bytes, at) = &mut *self.input.lock().unwrap();
        let length = buf.len().min(self.piece).min(bytes.len() - *at);
        buf[..length].copy_from_slice(&bytes[*at..*at + length]);
        *at += length;
        Ok(length)
    }

    fn write_all(&self, _bytes: &[u8]) -> io::Result<()> {
        Ok(())
    }

    fn set_timeouts(&self, _receive: Option<Duration>, _send: Option<Duration>) -> io::Result<()> {
        Ok(())
    }

    fn start_tls(self, _tls: &ServerTls, _timeout: Duration) -> io::Result<Self> {
        Err(io::ErrorKind::Unsupported.into())
    }

    fn shutdown(&self) {}
}

fn disk() -> &'static Arc<Disk> {
    static DISK: OnceLock<Arc<Disk>> = OnceLock::new();
    DISK.get_or_init(|| {
        let raw = Raw::fresh(tempfile::tempfile().unwrap(), LENGTH).unwrap();
        let options = DiskOptions {
            name: "d".into(),
            path: "d".into(),
            format: None,
            read_only: false,
            secret: None,
            writer_dir: None,
        };
        Arc::new(Disk::over(&options, Arc::new(raw)))
    })
}

fuzz_target!(|bytes: &[u8]| {
    static WATCH: OnceLock<Watch> = OnceLock::new();
    let Some((&first, rest)) = bytes.split_first() else { return };
    let piece = if first & 1 == 0 { usize::MAX } else { 1 + usize::from(first >> 2) };
    let tape = Tape { input: Mutex::new((rest.to_vec(), 0)), piece };
    let session = if first & 2 == 0 {
        Ok((tape, Session { disk: disk().clone(), structured: first & 4 == 0, allocation: first & 4 == 0 }))
    } else {
        negotiate(tape, &Offer { disks: vec![disk().clone()], tls: None, patience: SOON, stall: SOON })
    };
    if let Ok((tape, session)) = session {
        let bell = WATCH.get_or_init(|| Watch::start().unwrap()).bell();
        serve(tape, session, Arc::new(AtomicBool::new(false)), bell);
    }
});
