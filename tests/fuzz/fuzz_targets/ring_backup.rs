//! A hostile backup and a real writer. The first byte chooses how the writer starts and what it does in a freeze; the
//! rest are steps, a letter each with what it chooses: see [`Tyrant::step`]. Digits and letters are enough for all but
//! raw words, so that a session can be written by hand: `8a0033000f0f1l02kj0e` attaches, freezes, thaws, and grants a
//! write.
#![no_main]

use drive_backup::ground::cluster::ClusterSize;
use drive_backup::ring::folder::{Disk, Folder};
use drive_backup::ring::futex::WAKER;
use drive_backup::ring::layout::{MAGIC, SLOTS, VERSION, at, state};
use drive_backup::ring::packet::{Attach, PACKET, Packet, field};
use drive_backup::ring::queue::Answer;
use drive_backup::ring::shm::{Bits, Ring};
use drive_backup::ring::socket::{self, Received};
use drive_backup::writer::Writer;
use libfuzzer_sys::fuzz_target;
use rustix::fs::{MemfdFlags, SealFlags};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags};
use std::io::{self, IoSlice};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Arc, OnceLock};
use std::thread;
use std::time::{Duration, Instant};
use tempfile::TempDir;

const LENGTH: u64 = 4 << 20;
/// Everything has an end by then, since [`BOUNDS`] are short, or since the tyrant has hung up.
const SOON: Duration = Duration::from_secs(4);
/// Longer than an answer of the writer takes, when one comes.
const ANSWER: Duration = Duration::from_millis(20);
const STEPS: usize = 48;
const WRITES: usize = 80;
/// Milliseconds that the writer is asked to agree to. Its writes are waited for before the hang-up, unless an Attach
/// had others.
const BOUNDS: [u64; 4] = [1, 2, 5, 16];
/// How long a starting writer waits for a backup that does not attach.
const PATIENCE: Duration = Duration::from_millis(3);

const LENGTHS: [u64; 10] = [LENGTH, 0, 1, 4096, LENGTH - 1, LENGTH + 1, 1 << 40, 1 << 47, i64::MAX as u64, u64::MAX];
const CLUSTERS: [u64; 5] = [4096, 512, 64 << 10, 2 << 20, 64 << 20];
const OFFSETS: [u64; 12] =
    [0, 1, 4095, 4096, 1 << 20, (2 << 20) - 1, LENGTH - 1, LENGTH, 1 << 40, i64::MAX as u64, u64::MAX - 1, u64::MAX];
const SIZES: [u64; 8] = [1, 512, 4096, (1 << 20) + 1, LENGTH, 1 << 40, u64::MAX, 0];
const WORDS: [u32; 13] = [0, 1, u32::MAX, 2, 3, 4, 5, 4095, 4096, 1 << 31, MAGIC, 300_001, 0x7fff_ffff];
/// In the ring.
const PLACES: [usize; 10] = [
    at::SLOTS + at::SLOT_STATE,
    at::SLOTS + at::SLOT_ERRNO,
    at::SLOTS + at::SLOT_OFFSET,
    at::SLOTS + at::SLOT_LENGTH,
    at::POSTED,
    at::ATTENTIVE,
    at::MAGIC,
    at::TRAPPED,
    at::STALLS,
    at::BROKEN,
];
const PACKETS: [Packet; 8] = [
    Packet::Freeze,
    Packet::Thaw { trap: true },
    Packet::Thaw { trap: false },
    Packet::Detach,
    Packet::Attached,
    Packet::Frozen,
    Packet::Thawed { held: true },
    Packet::Refused { errno: 5 },
];

/// What is left of the bytes.
struct Input<'a>(&'a [u8]);

impl Input<'_> {
    fn byte(&mut self) -> u8 {
        self.0.split_off_first().copied().unwrap_or_default()
    }

    /// By the low half of a byte: '0' is the first.
    fn pick<T: Copy>(&mut self, of: &[T]) -> T {
        of[usize::from(self.byte() & 15) % of.len()]
    }

    fn word(&mut self) -> u32 {
        match self.byte() & 15 {
            15 => u32::from_ne_bytes(std::array::from_fn(|_| self.byte())),
            at => WORDS[usize::from(at) % WORDS.len()],
        }
    }
}

/// What was shared with a writer that has agreed, or might.
struct Session {
    ring: Ring,
    ring_memory: OwnedFd,
    bits: OwnedFd,
    terms: Attach,
    /// The writer owes it a mark for each write that goes on,
    owed: AtomicBool,
    /// unless something was granted, or the writer was let go.
    excused: AtomicBool,
}

impl Session {
    fn owes(&self, offset: u64) -> bool {
        self.owed.load(SeqCst) && !self.excused.load(SeqCst) && offset < self.terms.length
    }

    fn excuse(&self) {
        self.excused.store(true, SeqCst);
    }
}

struct Connection {
    socket: OwnedFd,
    session: Option<Arc<Session>>,
}

struct Tyrant<'a> {
    folder: Arc<Folder>,
    disk: Disk,
    announcement: u64,
    writer: &'a OnceLock<Arc<Writer>>,
    opener: Option<thread::JoinHandle<Writer>>,
    connections: Vec<Connection>,
    sessions: Vec<Arc<Session>>,
    /// An Attach with longer bounds than [`BOUNDS`] was sent.
    patient: bool,
    refuses: Arc<AtomicBool>,
    done: (Sender<()>, Receiver<()>),
    writes: usize,
    waiting: usize,
    began: Instant,
}

fn folder() -> &'static TempDir {
    static FOLDER: OnceLock<TempDir> = OnceLock::new();
    FOLDER.get_or_init(|| {
        let folder = tempfile::tempdir_in("/dev/shm").unwrap();
        std::fs::write(folder.path().join("disk"), [0; 512]).unwrap();
        folder
    })
}

fn memory(bytes: u64, seals: SealFlags) -> OwnedFd {
    let fd = rustix::fs::memfd_create("hostile", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).unwrap();
    // It has no more than the kernel allows; then it is of the wrong size.
    let _ = rustix::fs::ftruncate(&fd, bytes);
    rustix::fs::fcntl_add_seals(&fd, seals).unwrap();
    fd
}

fn sized() -> SealFlags {
    SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL
}

/// A ring with the words that make it one.
fn labelled(bytes: u64, seals: SealFlags) -> OwnedFd {
    let fd = memory(bytes, SealFlags::empty());
    rustix::io::pwrite(&fd, &[MAGIC.to_ne_bytes(), VERSION.to_ne_bytes()].concat(), 0).unwrap();
    rustix::fs::fcntl_add_seals(&fd, seals).unwrap();
    fd
}

fn send(socket: &OwnedFd, bytes: &[u8], descriptors: &[BorrowedFd<'_>]) {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(8))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !descriptors.is_empty() {
        assert!(control.push(SendAncillaryMessage::ScmRights(descriptors)));
    }
    let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
    // It may have hung up.
    let _ = rustix::net::sendmsg(socket, &[IoSlice::new(bytes)], &mut control, flags);
}

/// Begins a write, and looks before its end whether it may have begun.
fn write(writer: &Writer, sessions: &[Arc<Session>], refuses: &AtomicBool, offset: u64, length: u64) {
    let owing: Vec<_> = sessions.iter().filter(|session| length > 0 && session.owes(offset)).collect();
    let _ = writer.would_wait(offset, length);
    match writer.begin(offset, length) {
        Ok(_write) => {
            for session in owing {
                // In this order: what excuses it is said before it is done.
                let marked = session.ring.broken() != 0;
                assert!(marked || !session.owes(offset), "{offset}+{length} went on without a grant or a mark");
            }
        }
        Err(error) => {
            let errno = error.raw_os_error().unwrap();
            let overflows = offset.checked_add(length).is_none() && errno == 22;
            assert!(overflows || (1..4096).contains(&errno) && refuses.load(SeqCst), "{error}");
        }
    }
}

impl<'a> Tyrant<'a> {
    /// Beside a writer that has opened its disk, or that is about to and finds this backup announced.
    fn new(writer: &'a OnceLock<Arc<Writer>>, announcement: Option<u64>) -> Self {
        let place = folder().path().join("writers");
        let folder = Folder::open(&place).unwrap();
        let path = self::folder().path().join("disk");
        let disk = Disk::at(&path).unwrap();
        let mut tyrant = Self {
            folder,
            disk,
            announcement: announcement.unwrap_or(7),
            writer,
            opener: None,
            connections: Vec::new(),
            sessions: Vec::new(),
            patient: false,
            refuses: Arc::default(),
            done: mpsc::channel(),
            writes: 0,
            waiting: 0,
            began: Instant::now(),
        };
        tyrant.opener = Some(thread::spawn(move || Writer::open_in(&path, &place).unwrap()));
        if announcement.is_none() {
            tyrant.writer();
        }
        tyrant
    }

    fn writer(&mut self) -> Arc<Writer> {
        if let Some(opener) = self.opener.take() {
            assert!(self.writer.set(Arc::new(opener.join().unwrap())).is_ok());
        }
        self.writer.get().unwrap().clone()
    }

    /// One step, by the low half of a letter; with its highest bit no answer is waited for.
    fn step(&mut self, input: &mut Input<'_>) {
        let letter = input.byte();
        let hears = letter & 0x80 == 0;
        match letter & 15 {
            1 => self.attach(input),                            // a
            2 => self.free(input),                              // b
            3 => self.connections.truncate(0),                  // c: and connects again
            4 => self.connect(),                                // d: one more
            5 => self.wait(),                                   // e
            6 => self.say(&input.pick(&PACKETS).encode(), &[]), // f
            7 => self.babble(input),                            // g
            8 => self.turn(),                                   // h
            9 => self.spoil(input),                             // i
            10 => self.answer(input),                           // j
            11 => self.wait_for_entry(),                        // k
            12 => self.write(input),                            // l
            13 => self.say_with_strangers(input),               // m
            14 => drop(self.connections.pop()),                 // n
            _ => self.crowd(input),                             // o
        }
        if hears && matches!(letter & 15, 1 | 6 | 7 | 13) {
            self.hear();
        }
    }

    /// Goes on with the oldest connection.
    fn turn(&mut self) {
        let some = usize::from(!self.connections.is_empty());
        self.connections.rotate_left(some);
    }

    fn connect(&mut self) {
        if self.connections.len() >= 4 {
            return;
        }
        let waited = Instant::now();
        while waited.elapsed() < SOON {
            let number = self.folder.writers(self.disk).unwrap().first().copied();
            let socket = number.and_then(|number| self.folder.connect(self.disk, number, ANSWER).unwrap());
            if let Some(socket) = socket {
                self.connections.push(Connection { socket, session: None });
                return;
            }
            thread::yield_now();
        }
        panic!("no writer");
    }

    fn connection(&mut self) -> &mut Connection {
        if self.connections.is_empty() {
            self.connect();
        }
        self.connections.last_mut().unwrap()
    }

    /// Sends bytes, of which some let the writer go.
    fn say(&mut self, bytes: &[u8], descriptors: &[BorrowedFd<'_>]) {
        let connection = self.connection();
        let packet = Packet::decode(bytes);
        if let (Ok(Packet::Detach | Packet::Thaw { trap: false }), Some(session)) = (&packet, &connection.session) {
            session.excuse();
        }
        send(&connection.socket, bytes, descriptors);
        if let Ok(Packet::Attach(terms)) = packet {
            let longest = Duration::from_millis(BOUNDS[3]);
            self.patient |= terms.freeze_timeout > longest || terms.cbw_timeout > longest;
        }
    }

    fn hear(&mut self) {
        let connection = self.connection();
        let Ok(Received::Packet(packet, _)) = socket::receive(&connection.socket) else { return };
        let Some(session) = &connection.session else {
            assert!(matches!(packet, Packet::Refused { .. }), "a writer says {packet:?} to what it can't agree to");
            return;
        };
        match packet {
            Packet::Attached if session.terms.trap_at_once => session.owed.store(true, SeqCst),
            Packet::Frozen | Packet::Thawed { held: true } => session.owed.store(true, SeqCst),
            Packet::Attached | Packet::Thawed { held: false } | Packet::Refused { .. } => {}
            other => panic!("a writer says {other:?}"),
        }
    }

    fn terms(&mut self, input: &mut Input<'_>) -> [u8; PACKET] {
        let length = input.pick(&LENGTHS);
        let terms = Attach {
            announcement: self.announcement,
            length,
            cluster_size: ClusterSize::new(input.pick(&CLUSTERS)),
            freeze_timeout: Duration::from_millis(input.pick(&BOUNDS)),
            cbw_timeout: Duration::from_millis(input.pick(&BOUNDS)),
            trap_at_once: input.byte() & 1 == 1,
        };
        let mut bytes = Packet::Attach(terms).encode();
        for _ in 0..input.byte() & 3 {
            let at = usize::from(input.byte() & 15) * 4;
            bytes[at..at + 4].copy_from_slice(&input.word().to_ne_bytes());
        }
        bytes
    }

    fn attach(&mut self, input: &mut Input<'_>) {
        let bytes = self.terms(input);
        let bitmap = u64::from_ne_bytes(bytes[field::BITMAP_BYTES..][..8].try_into().unwrap()).min(i64::MAX as u64);
        let (ring, right) = Ring::create().unwrap();
        let bits = memory(bitmap, sized());
        let file = || OwnedFd::from(std::fs::File::open("/dev/null").unwrap());
        let both = match input.byte() & 15 {
            1 => vec![],
            2 => vec![right.as_fd()],
            3 => vec![bits.as_fd(), right.as_fd()],
            4 => vec![right.as_fd(), bits.as_fd(), bits.as_fd()],
            5 => return self.say_both(&bytes, labelled(8192, SealFlags::empty()), bits),
            6 => return self.say_both(&bytes, labelled(4096, sized()), bits),
            7 => return self.say_both(&bytes, memory(8192, sized()), bits),
            8 => return self.say_both(&bytes, labelled(8192, sized() | SealFlags::WRITE), bits),
            9 => return self.say_both(&bytes, right, memory(bitmap / 2 + 12288, sized())),
            10 => return self.say_both(&bytes, right, memory(bitmap, SealFlags::SHRINK)),
            11 => return self.say_both(&bytes, file(), bits),
            12 => return self.say_both(&bytes, right, file()),
            _ => vec![right.as_fd(), bits.as_fd()],
        };
        let right_memory = right.try_clone().unwrap();
        if let (Ok(Packet::Attach(terms)), 2) = (Packet::decode(&bytes), both.len()) {
            let (owed, excused) = Default::default();
            let bits = bits.try_clone().unwrap();
            let session = Arc::new(Session { ring, ring_memory: right_memory, bits, terms, owed, excused });
            let connection = self.connection();
            if connection.session.is_none() {
                connection.session = Some(session.clone());
                self.sessions.push(session);
            }
        }
        self.say(&bytes, &both);
    }

    fn say_both(&mut self, bytes: &[u8], ring: OwnedFd, bits: OwnedFd) {
        self.say(bytes, &[ring.as_fd(), bits.as_fd()]);
    }

    /// Bytes that are no packet, or a part of one, or one with a word changed.
    fn babble(&mut self, input: &mut Input<'_>) {
        let mut bytes = [input.pick(&PACKETS).encode().as_slice(), &[0; 40]].concat();
        let length = [PACKET, PACKET - 1, PACKET + 1, 0, 1, 104, 12][usize::from(input.byte() & 15) % 7];
        let at = usize::from(input.byte() & 15) * 4;
        bytes[at..at + 4].copy_from_slice(&input.word().to_ne_bytes());
        self.say(&bytes[..length], &[]);
    }

    fn say_with_strangers(&mut self, input: &mut Input<'_>) {
        let packet = input.pick(&PACKETS).encode();
        let stranger = OwnedFd::from(std::fs::File::open("/dev/null").unwrap());
        self.say(&packet, &vec![stranger.as_fd(); 1 + usize::from(input.byte() & 7)]);
    }

    fn current(&mut self) -> Option<Arc<Session>> {
        self.connections.last()?.session.clone()
    }

    fn free(&mut self, input: &mut Input<'_>) {
        let Some(session) = self.current() else { return };
        session.excuse();
        let word = (u64::from(input.word()) << 32) | u64::from(input.word());
        let at = u64::from(input.byte() & 15) * 8;
        if at + 8 <= session.terms.bitmap_bytes() {
            // It may be sealed, or smaller than it should be.
            let _ = rustix::io::pwrite(&session.bits, &word.to_ne_bytes(), at);
        }
    }

    /// A word anywhere in the ring.
    fn spoil(&mut self, input: &mut Input<'_>) {
        let Some(session) = self.current() else { return };
        let place = input.pick(&PLACES);
        let slot = if place >= at::SLOTS { usize::from(input.byte() & 3) * 64 } else { 0 };
        let word = input.word();
        let is_state = place == at::SLOTS + at::SLOT_STATE;
        if place == at::BROKEN || is_state && word == state::GRANTED {
            session.excuse();
        }
        if is_state && word == state::REFUSED {
            self.refuses.store(true, SeqCst);
        }
        let _ = rustix::io::pwrite(&session.ring_memory, &word.to_ne_bytes(), (place + slot) as u64);
    }

    /// To all that are posted.
    fn answer(&mut self, input: &mut Input<'_>) {
        let Some(session) = self.current() else { return };
        let answer = match input.byte() & 3 {
            0 => Answer::Granted,
            _ => Answer::Refused(input.word()),
        };
        if answer == Answer::Granted {
            session.excuse();
        } else {
            self.refuses.store(true, SeqCst);
        }
        for _ in 0..SLOTS {
            let Some(slot) = session.ring.take(0) else { break };
            let _ = session.ring.answer(slot, answer, &WAKER);
        }
    }

    fn wait_for_entry(&mut self) {
        let Some(session) = self.current() else { return };
        let since = Instant::now();
        while self.waiting > 0 && session.ring.posted() == 0 && since.elapsed() < ANSWER / 4 {
            thread::yield_now();
            while self.done.1.try_recv().is_ok() {
                self.waiting -= 1;
            }
        }
    }

    fn write(&mut self, input: &mut Input<'_>) {
        let (offset, length) = (input.pick(&OFFSETS), input.pick(&SIZES));
        self.begin(offset, length);
    }

    /// More writes than there are slots.
    fn crowd(&mut self, input: &mut Input<'_>) {
        let length = input.pick(&SIZES);
        (0..SLOTS as u64 + 4).for_each(|number| self.begin(number * 4096, length));
    }

    fn begin(&mut self, offset: u64, length: u64) {
        if self.writes == WRITES {
            return;
        }
        self.writes += 1;
        self.waiting += 1;
        let (writer, sessions, refuses) = (self.writer(), self.sessions.clone(), self.refuses.clone());
        let done = self.done.0.clone();
        thread::spawn(move || {
            write(&writer, &sessions, &refuses, offset, length);
            drop(writer);
            let _ = done.send(());
        });
    }

    /// For the end of all writes, unless the writer may have agreed to a longer time than there is.
    fn wait(&mut self) {
        if self.patient {
            return;
        }
        while self.waiting > 0 {
            let left = SOON.saturating_sub(self.began.elapsed());
            self.done.1.recv_timeout(left).expect("a write is held longer than the writer has agreed to");
            self.waiting -= 1;
        }
    }

    /// Hangs up, after which nobody is held.
    fn end(&mut self) {
        self.wait();
        self.connections.clear();
        self.patient = false;
        self.wait();
        // Waits for a callback that runs, which may hold the writer.
        self.writer().on_freeze(|| Ok(()));
    }
}

/// A next backup, which keeps to the protocol.
fn honest(tyrant: &mut Tyrant<'_>) {
    let minute = Duration::from_secs(60);
    let terms = Attach {
        announcement: 8,
        length: LENGTH,
        cluster_size: ClusterSize::new(4096),
        freeze_timeout: minute,
        cbw_timeout: minute,
        trap_at_once: false,
    };
    let writer = tyrant.writer();
    let number = tyrant.folder.writers(tyrant.disk).unwrap()[0];
    let connection = loop {
        let connection = tyrant.folder.connect(tyrant.disk, number, SOON).unwrap().unwrap();
        let (ring, right) = Ring::create().unwrap();
        let (bits, free) = Bits::create(terms.bitmap_bytes()).unwrap();
        send(&connection, &Packet::Attach(terms).encode(), &[right.as_fd(), free.as_fd()]);
        match socket::receive(&connection).unwrap() {
            Received::Packet(Packet::Attached, _) => break (connection, ring, bits),
            // The tyrant's last connection is about to be found closed.
            Received::Packet(Packet::Refused { errno: 16 }, _) => assert!(tyrant.began.elapsed() < SOON),
            other => panic!("an honest backup hears {other:?}"),
        }
    };
    let (connection, ring, _bits) = connection;
    let thaw = (Packet::Thaw { trap: true }, Packet::Thawed { held: true });
    for (said, heard) in [(Packet::Freeze, Packet::Frozen), thaw] {
        send(&connection, &said.encode(), &[]);
        let answer = socket::receive(&connection).unwrap();
        assert!(matches!(answer, Received::Packet(packet, _) if packet == heard), "{answer:?}");
    }
    let writing = thread::spawn(move || drop(writer.begin(5000, 1).unwrap()));
    while ring.posted() == 0 {
        assert!(tyrant.began.elapsed() < SOON, "a write does not ask");
        thread::yield_now();
    }
    let slot = ring.take(0).unwrap();
    let (offset, length) = ring.entry(slot);
    assert_eq!((offset, length), (5000, 1));
    ring.answer(slot, Answer::Granted, &WAKER).unwrap();
    writing.join().unwrap();
    assert_eq!(ring.broken(), 0);
    send(&connection, &Packet::Detach.encode(), &[]);
}

/// What the program does in a freeze.
fn quiesce(writer: &Arc<Writer>, kind: u8) {
    let in_freeze = Arc::downgrade(writer);
    match kind {
        0 => {}
        1 => writer.on_freeze(|| Err(io::Error::from_raw_os_error(28))),
        2 => writer.on_freeze(|| Err(io::ErrorKind::Other.into())),
        _ => writer.on_freeze(move || {
            let Some(writer) = in_freeze.upgrade() else { return Ok(()) };
            let _write = writer.begin(0, 4096)?;
            Ok(())
        }),
    }
}

fuzz_target!(|bytes: &[u8]| {
    let mut input = Input(bytes);
    let first = input.byte();
    let place = Folder::open(&folder().path().join("writers")).unwrap();
    let disk = Disk::at(&folder().path().join("disk")).unwrap();
    let announced = (first & 1 == 1).then(|| place.announce(disk, PATIENCE).unwrap());
    let number = announced.as_ref().map(|(number, ..)| *number);
    let writer = OnceLock::new();
    let mut tyrant = Tyrant::new(&writer, number);
    if let Some(writer) = writer.get() {
        quiesce(writer, first >> 1 & 3);
    }
    for _ in 0..STEPS {
        if input.0.is_empty() {
            break;
        }
        tyrant.step(&mut input);
    }
    tyrant.end();
    let has_asked = |number| tyrant.sessions.iter().any(|session| session.terms.announcement == number);
    if let Some(number) = number.filter(|number| !has_asked(*number)) {
        assert!(place.is_marked_unattached(disk, number).unwrap(), "a writer began unattached and left no sign");
    }
    if first & 8 != 0 {
        honest(&mut tyrant);
    }
    let began = tyrant.began;
    drop(tyrant);
    drop(writer);
    if let Some(number) = number {
        place.clear_mark(disk, number);
    }
    assert!(began.elapsed() < SOON, "a hostile backup holds the writer");
});
