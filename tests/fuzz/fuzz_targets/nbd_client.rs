//! The NBD client against a server that has said all of its bytes before it was asked. The first byte says whether the bytes
//! begin behind a good handshake, and which side the client is on.
#![no_main]

use drive_backup::error::Side;
use drive_backup::ground::range::ByteRange;
use drive_backup::image::Image;
use drive_backup::image::nbd::{Dial, Nbd, Terms, Use};
use drive_backup::nbd::protocol::{
    GREETING_MAGIC, OPTION_MAGIC, OptionReply, info, option, option_reply, transmission,
};
use drive_backup::nbd::stream::Stream;
use libfuzzer_sys::fuzz_target;
use std::io::{self, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::Mutex;
use std::time::{Duration, Instant};

const LENGTH: u64 = 1 << 20;
/// Bytes of a script at most, so that it fits into a socket's buffer.
const SCRIPT_LIMIT: usize = 16 << 10;
/// Nothing is ever waited for: all bytes, and their end, are there from the start.
const SOON: Duration = Duration::from_secs(5);

fn reply(bytes: &mut Vec<u8>, option: u32, kind: u32, data: &[u8]) {
    bytes.extend(OptionReply { option, kind, length: data.len() as u32 }.encode());
    bytes.extend(data);
}

/// All that a good server says until it serves `base:allocation` as number 7 and structured replies.
fn handshake() -> Vec<u8> {
    let mut bytes = GREETING_MAGIC.to_be_bytes().to_vec();
    bytes.extend(OPTION_MAGIC.to_be_bytes());
    bytes.extend(3u16.to_be_bytes());
    reply(&mut bytes, option::STRUCTURED_REPLY, option_reply::ACK, &[]);
    reply(&mut bytes, option::SET_META_CONTEXT, option_reply::META_CONTEXT, b"\0\0\0\x07base:allocation");
    reply(&mut bytes, option::SET_META_CONTEXT, option_reply::ACK, &[]);
    let flags = transmission::HAS_FLAGS
        | transmission::SEND_FLUSH
        | transmission::SEND_TRIM
        | transmission::SEND_WRITE_ZEROES
        | transmission::CAN_MULTI_CONN;
    let mut export = info::EXPORT.to_be_bytes().to_vec();
    export.extend(LENGTH.to_be_bytes());
    export.extend(flags.to_be_bytes());
    reply(&mut bytes, option::GO, option_reply::INFO, &export);
    reply(&mut bytes, option::GO, option_reply::ACK, &[]);
    bytes
}

/// A client of one connection, on which `script` is said; there is no second one.
fn client(script: &[u8], side: Side) -> io::Result<(Nbd, UnixStream)> {
    let (ours, mut theirs) = UnixStream::pair()?;
    theirs.write_all(script)?;
    theirs.shutdown(Shutdown::Write)?;
    let ours = Mutex::new(Some(ours));
    let dial: Dial = Box::new(move |_| {
        let socket = ours.lock().unwrap().take().ok_or(io::ErrorKind::ConnectionRefused)?;
        Ok(Stream::unix(socket))
    });
    let terms = Terms { connect: SOON, patience: SOON, reconnect: Duration::ZERO };
    let nbd = Nbd::over(dial, "disk", terms, Use { side, flushes: true, reconnect: SOON })?;
    Ok((nbd, theirs))
}

/// Hangs up at its end, while the server is still there: nobody ignores SIGPIPE here.
fn use_up(nbd: Nbd, side: Side) {
    let whole = ByteRange::new(0, nbd.length());
    if whole.is_empty() {
        return;
    }
    let extent = nbd.block_status(whole).expect("everything is data where the server does not say");
    assert!(extent.range.offset == 0 && !extent.range.is_empty() && extent.range.end() <= whole.end());
    let length = whole.length.min(8 << 10) as usize;
    let mut buf = vec![0; length];
    let _ = nbd.read_at(&mut buf, 0);
    let _ = nbd.read_at(&mut buf[..length / 3], (length / 3) as u64);
    if side == Side::Target {
        let _ = nbd.write_at(&buf, 0);
        let _ = nbd.write_zeroes(whole.prefix(length as u64 / 2));
        let _ = nbd.discard(whole);
        let _ = nbd.flush();
    }
}

fuzz_target!(|bytes: &[u8]| {
    let Some((&first, rest)) = bytes.split_first() else { return };
    let mut script = if first & 1 == 0 { handshake() } else { Vec::new() };
    script.extend(&rest[..rest.len().min(SCRIPT_LIMIT)]);
    let side = if first & 2 == 0 { Side::Source } else { Side::Target };
    let began = Instant::now();
    match client(&script, side) {
        Ok((nbd, _peer)) => use_up(nbd, side),
        Err(error) => assert!(!error.to_string().is_empty()),
    }
    assert!(began.elapsed() < SOON, "it waited for a server that had hung up");
});
