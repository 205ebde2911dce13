//! What a writer does when its service thread does nothing: one test here has one.

use super::*;
use crate::ground::cluster::ClusterSize;
use crate::ring::packet::{Attach, Packet};
use crate::ring::shm::{Bits, Ring};
use crate::ring::socket::{self, Received};
use rustix::net::{AddressFamily, SocketFlags, SocketType};
use std::cell::RefCell;
use std::convert::Infallible;
use std::os::fd::AsFd;
use std::thread;

const BOUND: Duration = Duration::from_millis(50);

fn terms() -> Attach {
    Attach {
        announcement: 1,
        length: 1 << 20,
        cluster_size: ClusterSize::new(4096),
        freeze_timeout: BOUND,
        cbw_timeout: BOUND,
        trap_at_once: false,
    }
}

/// The backup's end is kept, so that it does not hang up.
pub(super) fn attached() -> (Arc<Shared>, Arc<Session>, Ring, OwnedFd) {
    let terms = terms();
    let (backup, ring) = Ring::create().unwrap();
    let (_bits, bits) = Bits::create(terms.bitmap_bytes()).unwrap();
    let flags = SocketFlags::CLOEXEC;
    let (here, there) = rustix::net::socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None).unwrap();
    let bits = Bits::receive(&bits, terms.bitmap_bytes()).unwrap();
    let session = Arc::new(Session::new(terms, Ring::receive(ring).unwrap(), bits, here));
    let shared = Arc::new(Shared {
        gate: Gate::default(),
        control: RwLock::new(Control { session: Some(session.clone()), frozen_until: None, opening: false }),
        attached: Mutex::default(),
        arrived: Condvar::new(),
        quiesce: Mutex::default(),
        quiescing: Mutex::new(false),
        quiesced: Condvar::new(),
        waiting: AtomicUsize::new(0),
        bell: rustix::event::eventfd(0, EventfdFlags::NONBLOCK).unwrap(),
        stop: AtomicBool::new(false),
    });
    (shared, session, backup, there)
}

fn freeze(shared: &Shared) {
    shared.control_mut().frozen_until = Some(Instant::now() + BOUND);
    shared.gate.freeze();
}

#[test]
fn a_write_that_waits_ends_a_freeze_that_lasts_too_long() {
    let (shared, _, ring, _there) = attached();
    let began = Instant::now();
    freeze(&shared);
    let (writing, waiting) = (shared.clone(), thread::current());
    let writing = thread::spawn(move || {
        writing.enter(0, 1).unwrap();
        waiting.unpark();
    });
    while !writing.is_finished() && began.elapsed() < Duration::from_secs(30) {
        thread::park_timeout(Duration::from_millis(20));
    }
    assert!(writing.is_finished(), "it waits for ever");
    assert!(began.elapsed() >= BOUND);
    assert_eq!(ring.broken(), Breach::FrozenTooLong as u32);
    assert_eq!(shared.gate.in_flight(), 1, "it has begun");
}

#[test]
fn a_write_that_nobody_answers_marks_the_ring_before_the_gate_opens() {
    let (shared, session, ring, _there) = attached();
    session.trap();
    shared.gate.trap();
    shared.enter(0, 1).unwrap();
    assert_eq!(ring.broken(), Breach::NoAnswer as u32);
    assert_eq!(shared.gate.enter(0), Passage::Open);
    assert!(shared.control().session.is_none());
}

#[test]
fn a_write_inside_the_gate_before_the_thaw_does_not_ask() {
    let (shared, _, ring, _there) = attached();
    shared.gate.trap();
    shared.enter(0, 1).unwrap();
    assert_eq!((ring.posted(), ring.broken()), (0, 0));
}

#[test]
fn a_write_that_begins_in_a_freeze_rings_the_bell_since_it_was_counted() {
    let (shared, ..) = attached();
    freeze(&shared);
    shared.enter(0, 1).unwrap();
    assert!(rustix::io::read(&shared.bell, &mut [0; 8]).is_ok());
}

#[test]
fn no_freeze_begins_while_a_write_waits_for_the_end_of_an_earlier_one() {
    let place = tempfile::tempdir().unwrap();
    let (disk, folder) = (place.path().join("disk"), place.path().join("writers"));
    std::fs::write(&disk, "").unwrap();
    let writer = Writer::open_in(&disk, &folder).unwrap();
    let asks_for_a_freeze = || {
        let (folder, disk) = (Folder::open(&folder).unwrap(), Disk::at(&disk).unwrap());
        let number = folder.writers(disk).unwrap()[0];
        let backup = folder.connect(disk, number, Duration::from_secs(30)).unwrap().unwrap();
        let terms = Attach { freeze_timeout: Duration::from_secs(60), ..terms() };
        let (ring, bits) = (Ring::create().unwrap().1, Bits::create(terms.bitmap_bytes()).unwrap().1);
        socket::send(&backup, &Packet::Attach(terms), &[ring.as_fd(), bits.as_fd()]).unwrap();
        socket::send(&backup, &Packet::Freeze, &[]).unwrap();
        assert_eq!(heard(&backup), Packet::Attached);
        backup
    };
    // It has not woken up yet.
    writer.shared.waiting.fetch_add(1, Ordering::SeqCst);
    let backup = asks_for_a_freeze();
    socket::send(&backup, &Packet::Thaw { trap: false }, &[]).unwrap();
    assert_eq!(heard(&backup), Packet::Thawed { held: false }, "before it was frozen");
    let backup = asks_for_a_freeze();
    writer.shared.waiting.fetch_sub(1, Ordering::SeqCst);
    // Another one, the last to come in.
    assert_eq!(writer.shared.enter_after_thaw(0), Passage::Open);
    writer.leave();
    assert_eq!(heard(&backup), Packet::Frozen);
}

fn heard(backup: &OwnedFd) -> Packet {
    match socket::receive(backup).unwrap() {
        Received::Packet(packet, _) => packet,
        other => panic!("{other:?}"),
    }
}

/// Backup 1 has attached, 2 does not come, 3 announces itself when the writer has looked, and finds it.
#[derive(Default)]
struct Crowd {
    is_shut: Cell<bool>,
    marked: RefCell<Vec<u64>>,
}

impl Place for Crowd {
    type Error = Infallible;

    fn backups(&self) -> Result<Vec<Announced>, Infallible> {
        let last = if self.is_shut.get() { 3 } else { 2 };
        Ok((1..=last).map(|number| Announced { number, patience: Duration::ZERO }).collect())
    }

    fn mark_unattached(&self, number: u64) -> Result<(), Infallible> {
        self.marked.borrow_mut().push(number);
        Ok(())
    }
}

impl Door for Crowd {
    fn attached(&self) -> Vec<u64> {
        vec![1]
    }

    fn waits_for(&self, _: &Announced) -> bool {
        false
    }

    fn wait(&self, _: usize) {}

    fn shut(&self) {
        self.is_shut.set(true);
    }
}

#[test]
fn a_starting_writer_breaks_only_backups_that_it_found_and_that_did_not_come() {
    let crowd = Crowd::default();
    let Ok(()) = meeting::join(&crowd, &crowd, || Ok(()));
    assert_eq!(*crowd.marked.borrow(), [2]);
}
