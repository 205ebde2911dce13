//! Peers made by hand: writers that put garbage on the ring, backups that break every rule, and dead ones.

use super::*;
use crate::ring::futex::WAKER;
use crate::ring::layout::SLOTS;
use crate::ring::packet::{Malformed, Packet};
use crate::ring::socket::{self, Received};
use rustix::net::SendFlags;
use rustix::net::sockopt::{self, Timeout};
use std::os::fd::{AsFd, BorrowedFd};

/// A writer without a library: it agrees to everything.
struct Puppet {
    connection: OwnedFd,
    ring: Ring,
}

impl Puppet {
    /// Listens before the backup attaches, and is frozen and thawed with it.
    fn trapping(scene: &Scene, trap: &Arc<Recorder>) -> (Self, Writers) {
        Self::trapping_under(options(), scene, trap)
    }

    fn trapping_under(options: Options, scene: &Scene, trap: &Arc<Recorder>) -> (Self, Writers) {
        let folder = scene.folder();
        let (listener, name) = folder.listen(scene.disk()).unwrap();
        let obeying = thread::spawn(move || {
            let _name = name;
            rustix::io::ioctl_fionbio(&listener, false).unwrap();
            let connection = rustix::net::accept(&listener).unwrap();
            let Received::Packet(Packet::Attach(_), descriptors) = socket::receive(&connection).unwrap() else {
                panic!("no terms")
            };
            let ring = Ring::receive(descriptors.into_iter().next().unwrap()).unwrap();
            socket::send(&connection, &Packet::Attached, &[]).unwrap();
            for (asked, answer) in
                [(Packet::Freeze, Packet::Frozen), (Packet::Thaw { trap: true }, Packet::Thawed { held: true })]
            {
                assert!(
                    matches!(socket::receive(&connection).unwrap(), Received::Packet(packet, _) if packet == asked)
                );
                socket::send(&connection, &answer, &[]).unwrap();
            }
            Self { connection, ring }
        });
        let writers = scene.trapping(options, trap);
        (obeying.join().unwrap(), writers)
    }

    fn is_let_go(&self) -> bool {
        sockopt::set_socket_timeout(&self.connection, Timeout::Recv, Some(HANGS)).unwrap();
        matches!(socket::receive(&self.connection).unwrap(), Received::HungUp)
    }
}

/// A backup without a library, attached to a real writer.
struct Tyrant {
    connection: OwnedFd,
    ring: Ring,
}

fn terms(cbw_ms: u64, freeze_ms: u64) -> Attach {
    Attach {
        announcement: 1,
        length: LENGTH,
        cluster_size: ClusterSize::new(CLUSTER),
        freeze_timeout: Duration::from_millis(freeze_ms),
        cbw_timeout: Duration::from_millis(cbw_ms),
        trap_at_once: false,
    }
}

fn connect(scene: &Scene) -> OwnedFd {
    let folder = scene.folder();
    let number = folder.writers(scene.disk()).unwrap()[0];
    folder.connect(scene.disk(), number, HANGS).unwrap().unwrap()
}

impl Tyrant {
    fn attach(scene: &Scene, terms: Attach) -> Self {
        let tyrant = Self::ask(scene, terms);
        tyrant.hear(Packet::Attached);
        tyrant
    }

    /// Does not wait for the answer.
    fn ask(scene: &Scene, terms: Attach) -> Self {
        let connection = connect(scene);
        let (ring, descriptor) = Ring::create().unwrap();
        let (_, bits) = Bits::create(terms.bitmap_bytes()).unwrap();
        socket::send(&connection, &Packet::Attach(terms), &[descriptor.as_fd(), bits.as_fd()]).unwrap();
        Self { connection, ring }
    }

    fn freeze_at_once(scene: &Scene) -> Self {
        let tyrant = Self::ask(scene, terms(1000, 60_000));
        tyrant.say(Packet::Freeze);
        tyrant.hear(Packet::Attached);
        tyrant.hear(Packet::Frozen);
        tyrant
    }

    fn say(&self, packet: Packet) {
        socket::send(&self.connection, &packet, &[]).unwrap();
    }

    fn hear(&self, expected: Packet) {
        match socket::receive(&self.connection).unwrap() {
            Received::Packet(packet, _) => assert_eq!(packet, expected),
            other => panic!("{other:?} and not {expected:?}"),
        }
    }

    fn trap(&self) {
        self.say(Packet::Freeze);
        self.hear(Packet::Frozen);
        self.say(Packet::Thaw { trap: true });
        self.hear(Packet::Thawed { held: true });
    }
}

/// Waits until `what` is so.
fn until(what: impl Fn() -> bool) {
    let since = Instant::now();
    while !what() {
        assert!(since.elapsed() < HANGS);
        thread::yield_now();
    }
}

#[test]
fn an_entry_that_makes_no_sense_breaks_the_snapshot_and_lets_the_writer_go() {
    type Put = fn(&Ring);
    let cases: [(&str, Put); 5] = [
        ("overflow", |ring| ring.post(0, ByteRange { offset: u64::MAX - 3, length: 100 }, &WAKER)),
        ("past the end", |ring| ring.post(0, ByteRange::new(LENGTH - 1, 2), &WAKER)),
        ("empty", |ring| ring.post(0, ByteRange::new(0, 0), &WAKER)),
        ("no write waits there", |ring| {
            ring.post(5, ByteRange::new(0, 1), &WAKER);
            ring.answer(5, crate::ring::queue::Answer::Granted, &WAKER).unwrap();
        }),
        ("a bell without an entry", |ring| {
            for slot in 0..SLOTS {
                ring.post(slot, ByteRange::new(0, 0), &WAKER);
            }
        }),
    ];
    for (name, put) in cases {
        let scene = Scene::new();
        let trap = if name == "no write waits there" { Recorder::held() } else { Arc::default() };
        let (puppet, writers) = Puppet::trapping(&scene, &trap);
        put(&puppet.ring);
        trap.set(|state| state.held = false);
        assert!(puppet.is_let_go(), "{name}");
        let lost = writers.check().unwrap_err();
        assert_eq!(lost.kind(), Kind::InstantLost, "{name}");
        assert!(lost.to_string().contains("makes no sense"), "{name}: {lost}");
        assert_eq!(lock(&trap.state).lost.len(), 1, "{name}");
    }
}

#[test]
fn a_slot_that_is_posted_twice_makes_no_sense() {
    let scene = Scene::new();
    let trap = Recorder::held();
    let (puppet, writers) = Puppet::trapping(&scene, &trap);
    for _ in 0..2 {
        puppet.ring.post(3, ByteRange::new(0, 1), &WAKER);
        drop(trap.wait(|state| !state.asked.is_empty()));
    }
    assert!(puppet.is_let_go());
    assert!(writers.check().unwrap_err().to_string().contains("makes no sense"));
    trap.set(|state| state.held = false);
}

#[test]
fn an_entry_that_is_longer_than_any_writer_posts_makes_no_sense() {
    let scene = Scene::new();
    let trap = Arc::new(Recorder::default());
    let large = Options { length: 16 << 20, ..options() };
    let (puppet, writers) = Puppet::trapping_under(large, &scene, &trap);
    puppet.ring.post(0, ByteRange::new(0, (1 << 20) + 1), &WAKER);
    assert!(puppet.is_let_go());
    assert!(writers.check().unwrap_err().to_string().contains("makes no sense"));
    assert_eq!(trap.asked(), []);
}

#[test]
fn a_mark_is_found_by_the_check_and_by_the_hang_up() {
    for hangs_up in [false, true] {
        let scene = Scene::new();
        let trap = Arc::new(Recorder::default());
        let (puppet, writers) = Puppet::trapping(&scene, &trap);
        writers.check().unwrap();
        puppet.ring.mark_broken(Breach::NoAnswer);
        if hangs_up {
            drop(puppet.connection);
            drop(trap.wait(|state| !state.lost.is_empty()));
        }
        let lost = writers.finish().unwrap_err();
        assert!(lost.to_string().contains("longer than the writer's bound"), "{lost}");
    }
}

/// A program that closes all its descriptors is not dead: it marks its ring when it notices.
#[test]
fn a_mark_after_the_hang_up_is_found_too() {
    let scene = Scene::new();
    let trap = Arc::new(Recorder::default());
    let (puppet, writers) = Puppet::trapping(&scene, &trap);
    drop(puppet.connection);
    until(|| writers.counts().attached == 0);
    writers.check().unwrap();
    puppet.ring.mark_broken(Breach::HungUp);
    assert!(writers.finish().unwrap_err().to_string().contains("connection was lost"));
}

/// A job of hours sees thousands that write once and end.
#[test]
fn the_ring_of_a_process_that_has_ended_is_looked_at_once_more_and_let_go() {
    let scene = Scene::new();
    let writers = scene.attach(options()).unwrap();
    let mut process = std::process::Command::new("true").spawn().unwrap();
    let (ended, lives) = (process.id() as i32, std::process::id() as i32);
    process.wait().unwrap();
    let bury = |pid| {
        let ring = Arc::new(Ring::create().unwrap().0);
        let left = Arc::downgrade(&ring);
        lock(&writers.hub.gone).push((pid, ring));
        left
    };
    // Whoever looks at the dead one sees both.
    let (of_the_living, of_the_dead) = (bury(lives), bury(ended));
    until(|| of_the_dead.strong_count() == 0);
    assert_eq!(of_the_living.strong_count(), 1, "it may mark its ring yet");
    writers.check().unwrap();
    let ring = Arc::new(Ring::create().unwrap().0);
    ring.mark_broken(Breach::HungUp);
    lock(&writers.hub.gone).push((ended, ring));
    until(|| writers.lost().is_some());
}

#[test]
fn a_writer_that_dies_is_no_loss() {
    let scene = Scene::new();
    let trap = Arc::new(Recorder::default());
    let (puppet, writers) = Puppet::trapping(&scene, &trap);
    puppet.ring.post(0, ByteRange::new(0, 1), &WAKER);
    drop(puppet);
    until(|| writers.counts().attached == 0);
    writers.finish().unwrap();
}

#[test]
fn a_writer_that_stays_silent_makes_the_start_fail() {
    let scene = Scene::new();
    let _listening = scene.folder().listen(scene.disk()).unwrap();
    let began = Instant::now();
    let Err(refused) = scene.attach(options()) else { panic!("attached to silence") };
    assert_eq!((refused.kind(), began.elapsed() < HANGS), (Kind::InstantLost, true));
    assert!(refused.to_string().contains("does not answer"), "{refused}");
}

#[test]
fn a_writer_that_ends_while_it_is_attached_is_no_loss() {
    let scene = Scene::new();
    let (listener, name) = scene.folder().listen(scene.disk()).unwrap();
    let ending = thread::spawn(move || {
        // Its connections are closed before the socket that takes more of them.
        for _ in 0..3 {
            let began = Instant::now();
            while socket::accept(&listener).is_err() {
                assert!(began.elapsed() < HANGS, "nobody connects");
                thread::yield_now();
            }
        }
        drop((listener, name));
    });
    assert_eq!(scene.attach(options()).unwrap().attached(), 0);
    ending.join().unwrap();
}

#[test]
fn a_live_writer_that_is_not_attached_makes_the_check_fail() {
    let scene = Scene::new();
    let trap = Arc::new(Recorder::default());
    let writers = scene.trapping(options(), &trap);
    writers.check().unwrap();
    scene.folder().mark_unattached(scene.disk(), writers.hub.number).unwrap();
    assert!(writers.finish().unwrap_err().to_string().contains("before we could attach"));
    assert!(!scene.folder().is_marked_unattached(scene.disk(), writers.hub.number).unwrap(), "swept at the end");
}

#[test]
fn a_handshake_that_makes_no_sense_is_refused_and_the_next_one_works() {
    let scene = Scene::new();
    let writer = scene.writer();
    let good = Packet::Attach(terms(1000, 1000)).encode();
    let (_ring, ring) = Ring::create().unwrap();
    let (_bits, bits) = Bits::create(terms(1, 1).bitmap_bytes()).unwrap();
    let (_large, large) = Bits::create(1 << 20).unwrap();
    let file: OwnedFd = tempfile::tempfile().unwrap().into();
    let mut version = good;
    version[4] = 99;
    let long = [good.to_vec(), vec![0]].concat();
    let cases: [(&str, &[u8], Vec<BorrowedFd<'_>>, u32); 9] = [
        ("short", &good[..63], vec![ring.as_fd(), bits.as_fd()], 71),
        ("long", &long, vec![ring.as_fd(), bits.as_fd()], 71),
        ("another version", &version, vec![ring.as_fd(), bits.as_fd()], 93),
        ("another kind", &Packet::Freeze.encode(), vec![], 71),
        ("no descriptors", &good, vec![], 71),
        ("one descriptor", &good, vec![ring.as_fd()], 71),
        ("a bitmap of another size", &good, vec![ring.as_fd(), large.as_fd()], 22),
        ("a bitmap for a ring", &good, vec![bits.as_fd(), bits.as_fd()], 22),
        ("a file", &good, vec![file.as_fd(), bits.as_fd()], 22),
    ];
    for (name, bytes, descriptors, errno) in cases {
        let connection = connect(&scene);
        send_raw(&connection, bytes, &descriptors);
        match socket::receive(&connection).unwrap() {
            Received::Packet(Packet::Refused { errno: refused }, _) => assert_eq!(refused, errno, "{name}"),
            other => panic!("{name}: {other:?}"),
        }
        assert!(matches!(socket::receive(&connection).unwrap(), Received::HungUp), "{name}");
        drop(writer.begin(0, 1).unwrap());
    }
    Tyrant::attach(&scene, terms(1000, 60_000));
}

fn send_raw(connection: &OwnedFd, bytes: &[u8], descriptors: &[BorrowedFd<'_>]) {
    use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage};
    let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(2))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !descriptors.is_empty() {
        assert!(control.push(SendAncillaryMessage::ScmRights(descriptors)));
    }
    rustix::net::sendmsg(connection, &[io::IoSlice::new(bytes)], &mut control, SendFlags::empty()).unwrap();
}

#[test]
fn a_backup_whose_instant_has_passed_is_turned_away_by_a_writer_that_has_begun() {
    let scene = Scene::new();
    let _writer = scene.writer();
    let connection = connect(&scene);
    let (_ring, ring) = Ring::create().unwrap();
    let (_bits, bits) = Bits::create(terms(1, 1).bitmap_bytes()).unwrap();
    let late = Packet::Attach(Attach { trap_at_once: true, ..terms(1000, 1000) });
    socket::send(&connection, &late, &[ring.as_fd(), bits.as_fd()]).unwrap();
    let answer = socket::receive(&connection).unwrap();
    assert!(matches!(answer, Received::Packet(Packet::Refused { errno: 116 }, _)), "{answer:?}");
}

#[test]
fn a_backup_that_says_nothing_blocks_no_other_for_long() {
    let scene = Scene::new();
    let _writer = scene.writer();
    let silent = connect(&scene);
    assert!(matches!(socket::receive(&silent).unwrap(), Received::Packet(Packet::Refused { errno: 110 }, _)));
    Tyrant::attach(&scene, terms(1000, 60_000));
}

#[test]
fn a_write_that_is_never_granted_marks_the_ring_and_goes_on() {
    let scene = Scene::new();
    let writer = scene.writer();
    let tyrant = Tyrant::attach(&scene, terms(100, 60_000));
    tyrant.trap();
    let began = Instant::now();
    let write = writer.begin(0, 1).unwrap();
    assert_eq!(tyrant.ring.broken(), Breach::NoAnswer as u32, "marked before the write");
    assert!(began.elapsed() >= Duration::from_millis(100) && began.elapsed() < HANGS);
    drop(write);
    let again = Instant::now();
    // Each of them waiting once more would take 10 s.
    (0..100).for_each(|_| drop(writer.begin(CLUSTER, 1).unwrap()));
    assert!(again.elapsed() < Duration::from_secs(5), "once is enough");
    assert!(matches!(socket::receive(&tyrant.connection).unwrap(), Received::HungUp));
}

#[test]
fn a_hang_up_releases_a_trapped_write_at_once_and_marks() {
    let scene = Scene::new();
    let writer = Arc::new(scene.writer());
    let tyrant = Tyrant::attach(&scene, terms(300_000, 60_000));
    tyrant.trap();
    let waiting = {
        let writer = writer.clone();
        thread::spawn(move || drop(writer.begin(0, 1).unwrap()))
    };
    until(|| tyrant.ring.posted() != 0);
    drop(tyrant.connection);
    in_time("a trapped write", move || waiting.join().unwrap());
    assert_eq!(tyrant.ring.broken(), Breach::HungUp as u32);
}

#[test]
fn more_writes_wait_than_there_are_slots_and_all_are_released() {
    let scene = Scene::new();
    let writer = Arc::new(scene.writer());
    let tyrant = Tyrant::attach(&scene, terms(300_000, 60_000));
    tyrant.trap();
    let waiting: Vec<_> = (0..SLOTS + 8)
        .map(|_| {
            let writer = writer.clone();
            thread::spawn(move || drop(writer.begin(0, 1).unwrap()))
        })
        .collect();
    until(|| tyrant.ring.posted() == u32::MAX);
    drop(tyrant.connection);
    in_time("the writes", move || waiting.into_iter().for_each(|thread| thread.join().unwrap()));
}

#[test]
fn a_hang_up_while_frozen_thaws_at_once() {
    let scene = Scene::new();
    let writer = Arc::new(scene.writer());
    let tyrant = Tyrant::attach(&scene, terms(1000, 60_000));
    tyrant.say(Packet::Freeze);
    tyrant.hear(Packet::Frozen);
    let waiting = {
        let writer = writer.clone();
        thread::spawn(move || drop(writer.begin(0, 1).unwrap()))
    };
    drop(tyrant.connection);
    in_time("a frozen write", move || waiting.join().unwrap());
    assert_eq!(tyrant.ring.broken(), Breach::HungUp as u32);
}

#[test]
fn a_freeze_that_lasts_too_long_is_ended_by_the_writer_and_marked() {
    for writes in [false, true] {
        let scene = Scene::new();
        let writer = scene.writer();
        let tyrant = Tyrant::attach(&scene, terms(1000, 100));
        tyrant.say(Packet::Freeze);
        tyrant.hear(Packet::Frozen);
        if writes {
            drop(writer.begin(0, 1).unwrap());
            assert_eq!(tyrant.ring.broken(), Breach::FrozenTooLong as u32, "marked before the write");
        }
        while !matches!(socket::receive(&tyrant.connection).unwrap(), Received::HungUp) {}
        assert_eq!(tyrant.ring.broken(), Breach::FrozenTooLong as u32);
    }
}

/// Who hangs up and freezes again is faster than a write that wakes up: it was held for up to 180 freezes.
#[test]
fn freezes_one_after_the_other_hold_a_write_once() {
    let scene = Scene::new();
    let writer = Arc::new(scene.writer());
    let mut tyrant = Tyrant::freeze_at_once(&scene);
    for _ in 0..20 {
        let begun = Arc::new(AtomicBool::new(false));
        let writing = {
            let (writer, begun) = (writer.clone(), begun.clone());
            thread::spawn(move || {
                let _write = writer.begin(0, 1).unwrap();
                begun.store(true, Ordering::SeqCst);
            })
        };
        until(|| writer.waiting() > 0);
        drop(tyrant);
        tyrant = Tyrant::freeze_at_once(&scene);
        // Frozen means that nothing is in flight: if it has begun, it has ended.
        assert!(begun.load(Ordering::SeqCst), "a write is held by a second freeze");
        writing.join().unwrap();
    }
}

/// Who replaces a callback waits for one that runs, or is about to: a freeze after that is not refused for it.
#[test]
fn a_callback_that_was_waited_for_does_not_run_any_more() {
    let scene = Scene::new();
    let writer = scene.writer();
    for _ in 0..200 {
        let ran = Arc::new(AtomicBool::new(false));
        let runs = ran.clone();
        writer.on_freeze(move || {
            runs.store(true, Ordering::SeqCst);
            Ok(())
        });
        let tyrant = Tyrant::attach(&scene, terms(1000, 60_000));
        tyrant.say(Packet::Freeze);
        until(|| writer.is_quiescing() || ran.load(Ordering::SeqCst));
        drop(tyrant);
        writer.on_freeze(|| Ok(()));
        assert!(!writer.is_quiescing());
        drop(Tyrant::freeze_at_once(&scene));
    }
}

#[test]
fn packets_out_of_turn_end_the_connection_with_a_mark() {
    for packet in [Packet::Thaw { trap: true }, Packet::Frozen, Packet::Attached, Packet::Attach(terms(1, 1))] {
        let scene = Scene::new();
        let writer = scene.writer();
        let tyrant = Tyrant::attach(&scene, terms(1000, 60_000));
        tyrant.say(packet);
        tyrant.hear(Packet::Refused { errno: 71 });
        assert!(matches!(socket::receive(&tyrant.connection).unwrap(), Received::HungUp));
        assert_eq!(tyrant.ring.broken(), Breach::Nonsense as u32);
        drop(writer.begin(0, 1).unwrap());
    }
}

#[test]
fn garbage_while_trapping_lets_the_writer_go() {
    let scene = Scene::new();
    let writer = scene.writer();
    let tyrant = Tyrant::attach(&scene, terms(300_000, 60_000));
    tyrant.trap();
    send_raw(&tyrant.connection, b"garbage", &[]);
    drop(writer.begin(0, 1).unwrap());
    assert_ne!(tyrant.ring.broken(), 0);
}

#[test]
fn a_detached_writer_is_free_without_a_mark() {
    let scene = Scene::new();
    let writer = scene.writer();
    let tyrant = Tyrant::attach(&scene, terms(300_000, 60_000));
    tyrant.trap();
    tyrant.say(Packet::Detach);
    assert!(matches!(socket::receive(&tyrant.connection).unwrap(), Received::HungUp));
    drop(writer.begin(0, 1).unwrap());
    assert_eq!(tyrant.ring.broken(), 0);
    assert_eq!(Malformed::Kind(9).to_string(), "unknown kind of packet 9");
}
