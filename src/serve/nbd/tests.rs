//! The server's functions over streams in memory, and over socket pairs.

use super::connection::{End, serve};
use super::handshake::{Offer, negotiate};
use super::request::Session;
use super::watch::Watch;
use super::wire::Wire;
use crate::ground::range::{ByteRange, Extent};
use crate::image::raw::Raw;
use crate::image::{Image, Properties};
use crate::nbd::payload::{InfoRequest, MetaRequest};
use crate::nbd::protocol::{
    BASE_ALLOCATION, Chunk, Greeting, OPTION_MAGIC, OptionHeader, Request, SimpleReply, command, command_flag, info,
    option,
};
use crate::nbd::stream::Stream;
use crate::nbd::tls::ServerTls;
use crate::serve::disk::{Disk, DiskOptions};
use proptest::prelude::*;
use std::io::{self, Write};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Condvar, Mutex};
use std::thread;
use std::time::Duration;

mod promises;

/// No event takes longer.
const HANGS: Duration = Duration::from_secs(20);
const LENGTH: u64 = 65_536 + 100;

/// A disk in memory whose writes of the first byte wait while the gate is shut.
struct Memory {
    bytes: Mutex<Vec<u8>>,
    shut: Mutex<bool>,
    opened: Condvar,
}

impl Memory {
    fn new() -> Arc<Self> {
        Self::of(LENGTH)
    }

    fn of(length: u64) -> Arc<Self> {
        let bytes = Mutex::new(vec![0; length as usize]);
        Arc::new(Self { bytes, shut: Mutex::new(false), opened: Condvar::new() })
    }

    fn set_shut(&self, shut: bool) {
        *self.shut.lock().unwrap() = shut;
        self.opened.notify_all();
    }
}

impl Image for Memory {
    fn length(&self) -> u64 {
        self.bytes.lock().unwrap().len() as u64
    }

    fn block_status(&self, range: ByteRange) -> io::Result<Extent> {
        // Alternating kilobytes, so that replies have many chunks.
        let part = range.prefix(1024 - range.offset % 1024);
        Ok(if (range.offset / 1024).is_multiple_of(2) { Extent::data(part) } else { Extent::zero(part) })
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        let offset = offset as usize;
        buf.copy_from_slice(&self.bytes.lock().unwrap()[offset..offset + buf.len()]);
        Ok(())
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        if offset == 0 {
            let waited = self.opened.wait_timeout_while(self.shut.lock().unwrap(), HANGS, |shut| *shut).unwrap();
            assert!(!waited.1.timed_out(), "nobody opened the gate");
        }
        let offset = offset as usize;
        self.bytes.lock().unwrap()[offset..offset + buf.len()].copy_from_slice(buf);
        Ok(())
    }

    fn write_zeroes(&self, range: ByteRange) -> io::Result<()> {
        self.write_at(&vec![0; range.length as usize], range.offset)
    }

    fn discard(&self, range: ByteRange) -> io::Result<()> {
        self.write_zeroes(range)
    }

    fn flush(&self) -> io::Result<()> {
        Ok(())
    }

    fn properties(&self) -> Properties {
        Properties { cluster_size: 1, alignment: 1, reads_zero: false, sequential: false }
    }
}

/// An image that says it is plain, so that its requests are taken for short ones, but is [`Memory`].
struct Plain(Arc<Memory>, std::fs::File);

impl Image for Plain {
    fn length(&self) -> u64 {
        LENGTH
    }

    fn block_status(&self, range: ByteRange) -> io::Result<Extent> {
        self.0.block_status(range)
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.0.read_at(buf, offset)
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        self.0.write_at(buf, offset)
    }

    fn write_zeroes(&self, range: ByteRange) -> io::Result<()> {
        self.0.write_zeroes(range)
    }

    fn discard(&self, range: ByteRange) -> io::Result<()> {
        self.0.discard(range)
    }

    fn flush(&self) -> io::Result<()> {
        Ok(())
    }

    fn properties(&self) -> Properties {
        self.0.properties()
    }

    fn file(&self) -> Option<&std::fs::File> {
        Some(&self.1)
    }
}

fn disk(image: Arc<dyn Image>, read_only: bool) -> Arc<Disk> {
    let (name, path) = ("disk".into(), "disk".into());
    let options = DiskOptions { name, path, format: None, read_only, secret: None, writer_dir: None };
    Arc::new(Disk::over(&options, image))
}

fn session(disk: Arc<Disk>, structured: bool) -> Session {
    Session { disk, structured, allocation: structured }
}

/// A stream whose input is given and whose output is counted.
struct Tape {
    input: Mutex<(Vec<u8>, usize)>,
    piece: usize,
    sent: Arc<Mutex<u64>>,
}

impl Wire for Tape {
    fn read(&self, buf: &mut [u8]) -> io::Result<usize> {
        let (bytes, at) = &mut *self.input.lock().unwrap();
        let length = buf.len().min(self.piece).min(bytes.len() - *at);
        buf[..length].copy_from_slice(&bytes[*at..*at + length]);
        *at += length;
        Ok(length)
    }

    fn write_all(&self, bytes: &[u8]) -> io::Result<()> {
        *self.sent.lock().unwrap() += bytes.len() as u64;
        Ok(())
    }

    fn set_timeouts(&self, _: Option<Duration>, _: Option<Duration>) -> io::Result<()> {
        Ok(())
    }

    fn start_tls(self, _tls: &ServerTls, _timeout: Duration) -> io::Result<Self> {
        Err(io::ErrorKind::Unsupported.into())
    }

    fn shutdown(&self) {}
}

/// Feeds `input` to a whole server, handshake and transmission, in pieces; panics unless it ends in time, with bytes sent in
/// proportion to the requests received. True: it came to an export.
fn feed(input: Vec<u8>, piece: usize, image: Arc<dyn Image>) -> bool {
    let (done, ended): (Sender<bool>, Receiver<bool>) = channel();
    let requests = input.len() as u64 / 16 + 2;
    let sent = Arc::new(Mutex::new(0));
    let tape = Tape { input: Mutex::new((input, 0)), piece, sent: sent.clone() };
    thread::spawn(move || {
        let watch = Watch::start().unwrap();
        let offer = Offer { disks: vec![disk(image, false)], tls: None, patience: HANGS, stall: HANGS };
        let reached = match negotiate(tape, &offer) {
            Err(_) => false,
            Ok((tape, session)) => {
                serve(tape, session, Arc::new(AtomicBool::new(false)), watch.bell());
                true
            }
        };
        done.send(reached).unwrap();
    });
    let reached = ended.recv_timeout(HANGS).expect("the server ends, and does not panic");
    assert!(*sent.lock().unwrap() <= requests * (LENGTH + 8192));
    reached
}

fn handshake_bytes() -> Vec<u8> {
    let mut bytes = 3_u32.to_be_bytes().to_vec();
    let mut add = |option, data: Vec<u8>| {
        bytes.extend(OptionHeader { option, length: data.len() as u32 }.encode());
        bytes.extend(data);
    };
    add(option::STRUCTURED_REPLY, Vec::new());
    let mut meta = Vec::new();
    MetaRequest::encode(&mut meta, "disk", &[BASE_ALLOCATION]);
    add(option::LIST_META_CONTEXT, meta.clone());
    add(option::SET_META_CONTEXT, meta);
    add(option::LIST, Vec::new());
    let mut go = Vec::new();
    InfoRequest::encode(&mut go, "disk", &[info::BLOCK_SIZE, info::NAME]);
    add(option::INFO, go.clone());
    add(option::GO, go);
    bytes
}

fn with_payload(request: Request) -> Vec<u8> {
    let mut bytes = request.encode().to_vec();
    if request.command == command::WRITE {
        bytes.resize(bytes.len() + request.length as usize, 0x5a);
    }
    bytes
}

fn any_request() -> impl Strategy<Value = Request> {
    (0..9_u16, 0..64_u16, any::<u64>(), 0..=LENGTH + 5, 0..20_000_u32).prop_map(
        |(command, flags, cookie, offset, length)| {
            let flags = if flags < 32 { flags } else { 0 };
            Request { flags, command, cookie, offset, length }
        },
    )
}

fn file_image() -> Arc<dyn Image> {
    Arc::new(Raw::fresh(tempfile::tempfile().unwrap(), LENGTH).unwrap())
}

proptest! {
    #![proptest_config(crate::ground::cases(150))]

    #[test]
    fn no_bytes_make_a_server_hang_or_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200), piece in 1..300_usize) {
        feed(bytes.clone(), piece, Memory::new());
        feed([3_u32.to_be_bytes().to_vec(), OPTION_MAGIC.to_be_bytes().to_vec(), bytes].concat(), piece, Memory::new());
    }

    #[test]
    fn no_spoilt_session_makes_a_server_hang_or_panic(
        requests in proptest::collection::vec(any_request(), 0..12),
        spoilt in proptest::collection::vec((any::<proptest::sample::Index>(), any::<u8>()), 0..4),
        end in proptest::option::of(any::<proptest::sample::Index>()),
        piece in prop_oneof![1..40_usize, Just(100_000)],
        in_file in any::<bool>(),
    ) {
        let mut bytes = handshake_bytes();
        requests.into_iter().for_each(|request| bytes.extend(with_payload(request)));
        let whole = spoilt.is_empty() && end.is_none();
        spoilt.iter().for_each(|(at, byte)| *at.get_mut(&mut bytes) = *byte);
        if let Some(end) = end {
            bytes.truncate(end.index(bytes.len() + 1));
        }
        let image = if in_file { file_image() } else { Memory::new() };
        let reached = feed(bytes, piece, image);
        prop_assert!(reached || !whole);
    }
}

/// A served socket pair: the client's end, and how the server's ended.
fn served(session: Session, draining: &Arc<AtomicBool>) -> (Stream, Receiver<End>, Watch) {
    let (client, server) = UnixStream::pair().unwrap();
    let watch = Watch::start().unwrap();
    let (done, ended) = channel();
    let (bell, draining) = (watch.bell(), draining.clone());
    thread::spawn(move || done.send(serve(Stream::unix(server), session, draining, bell)).unwrap());
    let client = Stream::unix(client);
    client.set_read_timeout(Some(HANGS)).unwrap();
    (client, ended, watch)
}

fn request(command: u16, cookie: u64, offset: u64, length: u32) -> Request {
    Request { flags: 0, command, cookie, offset, length }
}

fn reply(client: &Stream) -> SimpleReply {
    let mut bytes = [0; SimpleReply::LENGTH];
    client.read_exact(&mut bytes).unwrap();
    SimpleReply::decode(&bytes).unwrap()
}

/// Writes the first byte, which waits, then elsewhere; the second is answered first.
fn second_overtakes_first(image: Arc<dyn Image>, memory: &Memory) {
    let (client, ended, _watch) = served(session(disk(image, false), false), &Arc::default());
    for _ in 0..3 {
        memory.set_shut(true);
        client.write_all(&with_payload(request(command::WRITE, 1, 0, 512))).unwrap();
        client.write_all(&with_payload(request(command::WRITE, 2, 4096, 512))).unwrap();
        assert_eq!(reply(&client), SimpleReply { error: 0, cookie: 2 });
        memory.set_shut(false);
        assert_eq!(reply(&client), SimpleReply { error: 0, cookie: 1 });
    }
    client.write_all(&request(command::DISC, 3, 0, 0).encode()).unwrap();
    assert!(matches!(ended.recv_timeout(HANGS).unwrap(), End::Bye));
    assert_eq!(memory.bytes.lock().unwrap()[511], 0x5a);
}

#[test]
fn a_request_that_waits_does_not_stop_the_next() {
    let memory = Memory::new();
    second_overtakes_first(memory.clone(), &memory);
}

#[test]
fn a_request_that_was_taken_for_short_does_not_stop_the_next() {
    let memory = Memory::new();
    second_overtakes_first(Arc::new(Plain(memory.clone(), tempfile::tempfile().unwrap())), &memory);
}

#[test]
fn replies_do_not_wait_for_the_budget_of_a_long_request() {
    let longest = 32 << 20;
    let memory = Memory::of(longest.into());
    memory.set_shut(true);
    let (client, _ended, _watch) = served(session(disk(memory.clone(), false), false), &Arc::default());
    // Two of them are all that may be in flight.
    (1..3).for_each(|cookie| client.write_all(&with_payload(request(command::WRITE, cookie, 0, longest))).unwrap());
    // In one piece, so that the second is there when the first is answered.
    let refused = request(command::READ, 3, u64::from(longest), 1);
    client.write_all(&[refused.encode(), request(command::READ, 4, 0, longest).encode()].concat()).unwrap();
    assert_eq!(reply(&client), SimpleReply { error: 22, cookie: 3 });
    memory.set_shut(false);
    let mut answered = [(); 2].map(|()| reply(&client).cookie);
    answered.sort_unstable();
    assert_eq!((answered, reply(&client)), ([1, 2], SimpleReply { error: 0, cookie: 4 }));
}

#[test]
fn everything_in_flight_ends_before_a_connection_does() {
    let memory = Memory::new();
    memory.set_shut(true);
    let (client, ended, _watch) = served(session(disk(memory.clone(), false), false), &Arc::default());
    client.write_all(&with_payload(request(command::WRITE, 1, 0, 512))).unwrap();
    client.write_all(&request(command::DISC, 2, 0, 0).encode()).unwrap();
    assert!(ended.recv_timeout(Duration::from_millis(50)).is_err());
    memory.set_shut(false);
    assert_eq!(reply(&client), SimpleReply { error: 0, cookie: 1 });
    assert!(matches!(ended.recv_timeout(HANGS).unwrap(), End::Bye));
}

#[test]
fn a_connection_ends_after_the_last_of_its_threads() {
    let memory = Memory::new();
    let (client, ended, _watch) = served(session(disk(memory.clone(), false), false), &Arc::default());
    let write = |cookie, offset| client.write_all(&with_payload(request(command::WRITE, cookie, offset, 512))).unwrap();
    let answered = |cookie| assert_eq!(reply(&client), SimpleReply { error: 0, cookie });
    // While the first thread waits in a write, a second one takes over and keeps the turn.
    memory.set_shut(true);
    write(1, 0);
    write(2, 512);
    answered(2);
    memory.set_shut(false);
    answered(1);
    // So it is that one's write which the end, heard by another, has to wait for.
    memory.set_shut(true);
    write(3, 0);
    write(4, 512);
    answered(4);
    client.write_all(&request(command::DISC, 5, 0, 0).encode()).unwrap();
    assert!(ended.recv_timeout(Duration::from_millis(50)).is_err());
    memory.set_shut(false);
    answered(3);
    assert!(matches!(ended.recv_timeout(HANGS).unwrap(), End::Bye));
}

#[test]
fn half_a_request_when_the_server_goes_down_does_not_cost_the_replies_of_others() {
    let (memory, draining) = (Memory::new(), Arc::new(AtomicBool::new(false)));
    memory.set_shut(true);
    let (client, ended, _watch) = served(session(disk(memory.clone(), false), false), &draining);
    client.write_all(&with_payload(request(command::WRITE, 1, 0, 512))).unwrap();
    client.write_all(&with_payload(request(command::WRITE, 2, 512, 512))).unwrap();
    assert_eq!(reply(&client), SimpleReply { error: 0, cookie: 2 });
    client.write_all(&with_payload(request(command::WRITE, 3, 1024, 512))[..100]).unwrap();
    draining.store(true, Ordering::SeqCst);
    // What the server does to its own end looks the same from there.
    rustix::net::shutdown(&client, rustix::net::Shutdown::Write).unwrap();
    assert!(ended.recv_timeout(Duration::from_millis(50)).is_err());
    memory.set_shut(false);
    assert_eq!(reply(&client), SimpleReply { error: 0, cookie: 1 });
    assert!(matches!(ended.recv_timeout(HANGS).unwrap(), End::Bye));
}

#[test]
fn a_client_that_vanishes_leaves_what_it_had_sent() {
    let memory = Memory::new();
    memory.set_shut(true);
    let (client, ended, _watch) = served(session(disk(memory.clone(), false), false), &Arc::default());
    client.write_all(&with_payload(request(command::WRITE, 1, 0, 512))).unwrap();
    client.write_all(&request(command::WRITE, 2, 0, 512).encode()[..20]).unwrap();
    drop(client);
    memory.set_shut(false);
    assert!(matches!(ended.recv_timeout(HANGS).unwrap(), End::Broken(_)));
    assert_eq!(memory.bytes.lock().unwrap()[511], 0x5a);
}

#[test]
fn requests_are_refused_as_the_protocol_says() {
    let fua = |mut request: Request, flags| {
        request.flags = flags;
        request
    };
    let cases = [
        (request(command::READ, 0, LENGTH, 1), 22),
        (request(command::READ, 0, u64::MAX, 1), 22),
        (request(command::READ, 0, 0, (32 << 20) + 1), 22),
        (request(command::WRITE, 0, LENGTH - 1, 2), 28),
        (request(command::WRITE_ZEROES, 0, LENGTH, 1), 28),
        (request(command::TRIM, 0, LENGTH, 1), 22),
        (request(command::BLOCK_STATUS, 0, 0, 512), 22),
        (request(command::FLUSH, 0, 1, 0), 22),
        (request(8, 0, 0, 0), 22),
        (request(77, 0, 0, 0), 22),
        (fua(request(command::READ, 0, 0, 512), command_flag::DF), 22),
        (fua(request(command::WRITE, 0, 0, 512), command_flag::NO_HOLE), 22),
        (fua(request(command::WRITE, 0, 0, 512), 1 << 9), 22),
        (fua(request(command::WRITE_ZEROES, 0, 0, 512), command_flag::FAST_ZERO), 95),
        (fua(request(command::WRITE, 0, 0, 512), command_flag::FUA), 0),
        (request(command::WRITE_ZEROES, 0, LENGTH - 1, 1), 0),
        (request(command::FLUSH, 0, 0, 0), 0),
        (request(command::CACHE, 0, 0, 512), 0),
    ];
    let (client, _ended, _watch) = served(session(disk(Memory::new(), false), false), &Arc::default());
    for (number, (request, error)) in cases.into_iter().enumerate() {
        let cookie = number as u64;
        client.write_all(&with_payload(Request { cookie, ..request })).unwrap();
        assert_eq!(reply(&client), SimpleReply { error, cookie }, "{request:?}");
    }
}

#[test]
fn a_read_that_must_not_be_fragmented_has_one_chunk() {
    let (client, _ended, _watch) = served(session(disk(Memory::new(), false), true), &Arc::default());
    for (flags, length) in [(0, 1024), (command_flag::DF, 4096)] {
        let read = Request { flags, ..request(command::READ, 7, 0, 4096) };
        client.write_all(&read.encode()).unwrap();
        let mut head = [0; Chunk::LENGTH];
        client.read_exact(&mut head).unwrap();
        assert_eq!(Chunk::decode(&head).unwrap().length, length + 8, "the first chunk's offset and data");
        // What is left of it, and of the second time nothing: holes and data take turns.
        let rest = if flags == 0 { 2 * (8 + 1024) + 3 * Chunk::LENGTH + 2 * 12 } else { 8 + 4096 };
        client.read_exact(&mut vec![0; rest]).unwrap();
    }
}

#[test]
fn a_read_only_disk_is_not_changed() {
    let (client, _ended, _watch) = served(session(disk(Memory::new(), true), false), &Arc::default());
    for (command, error) in [(command::WRITE, 1), (command::TRIM, 1), (command::WRITE_ZEROES, 1), (command::FLUSH, 0)] {
        let length = if command == command::FLUSH { 0 } else { 512 };
        client.write_all(&with_payload(request(command, 7, 0, length))).unwrap();
        assert_eq!(reply(&client), SimpleReply { error, cookie: 7 });
    }
}

#[test]
fn who_is_going_down_says_so() {
    let draining = Arc::new(AtomicBool::new(false));
    let (client, _ended, _watch) = served(session(disk(Memory::new(), false), false), &draining);
    draining.store(true, Ordering::SeqCst);
    client.write_all(&with_payload(request(command::WRITE, 7, 0, 512))).unwrap();
    assert_eq!(reply(&client), SimpleReply { error: 108, cookie: 7 });
}

#[test]
fn a_write_that_is_too_long_ends_the_connection_before_its_payload() {
    let (client, ended, _watch) = served(session(disk(Memory::new(), false), false), &Arc::default());
    client.write_all(&request(command::WRITE, 7, 0, (32 << 20) + 1).encode()).unwrap();
    let End::Broken(error) = ended.recv_timeout(HANGS).unwrap() else { panic!() };
    assert!(error.to_string().contains("longer than the largest request"), "{error}");
}

#[test]
fn who_says_nothing_is_let_go() {
    let (_client, server) = UnixStream::pair().unwrap();
    let offer =
        Offer { disks: vec![disk(Memory::new(), false)], tls: None, patience: Duration::from_millis(30), stall: HANGS };
    let Err(End::Broken(error)) = negotiate(Stream::unix(server), &offer) else { panic!() };
    assert!(matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut), "{error}");
}

#[test]
fn who_takes_no_replies_is_let_go() {
    let (mut client, server) = UnixStream::pair().unwrap();
    let offer =
        Offer { disks: vec![disk(Memory::new(), false)], tls: None, patience: HANGS, stall: Duration::from_millis(30) };
    let watch = Watch::start().unwrap();
    let (done, ended) = channel();
    let bell = watch.bell();
    thread::spawn(move || {
        let (stream, session) = negotiate(Stream::unix(server), &offer).unwrap();
        done.send(serve(stream, session, Arc::default(), bell)).unwrap();
    });
    let mut bytes = handshake_bytes();
    (0..100).for_each(|cookie| bytes.extend(request(command::READ, cookie, 0, 65_536).encode()));
    client.write_all(&bytes).unwrap();
    let End::Broken(error) = ended.recv_timeout(HANGS).unwrap() else { panic!() };
    assert!(error.to_string().contains("takes no replies"), "{error}");
}

#[test]
fn a_whole_session_comes_to_its_export() {
    let mut bytes = handshake_bytes();
    assert!(feed(bytes.clone(), 7, Memory::new()));
    bytes.truncate(Greeting::LENGTH);
    assert!(!feed(bytes, 7, Memory::new()));
}
