//! Both ends in one process: real sockets, real shared memory, the writer's own library.

mod hostile;

use super::*;
use crate::ring::folder::Folder;
use crate::ring::layout::state;
use crate::ring::queue::Answer;
use crate::ring::queue::Slot;
use crate::writer::Writer;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::sync::mpsc;
use std::time::Instant;

const CLUSTER: u64 = 4096;
const LENGTH: u64 = 64 * CLUSTER + 100;
/// No wait in these tests lasts so long unless something hangs.
const HANGS: Duration = Duration::from_secs(30);

struct Scene {
    temp: tempfile::TempDir,
}

impl Scene {
    fn new() -> Self {
        let temp = tempfile::tempdir().unwrap();
        for name in ["disk", "other"] {
            std::fs::File::create(temp.path().join(name)).unwrap().set_len(LENGTH).unwrap();
        }
        Self { temp }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.temp.path().join(name)
    }

    fn disk(&self) -> Disk {
        Disk::at(&self.path("disk")).unwrap()
    }

    fn folder(&self) -> Arc<Folder> {
        Folder::open(&self.path("meet")).unwrap()
    }

    fn writer(&self) -> Writer {
        Writer::open_in(self.path("disk"), self.path("meet")).unwrap()
    }

    fn attach(&self, options: Options) -> Result<Writers> {
        Writers::attach(self.disk(), &self.path("meet"), options)
    }

    fn trapping(&self, options: Options, trap: &Arc<Recorder>) -> Writers {
        let writers = self.attach(options).unwrap();
        writers.freeze().unwrap().thaw(trap.clone()).unwrap();
        writers
    }
}

fn options() -> Options {
    Options {
        length: LENGTH,
        cluster_size: ClusterSize::new(CLUSTER),
        freeze_timeout: HANGS,
        cbw_timeout: HANGS,
        on_cbw_error: OnCbwError::BreakSnapshot,
        threads: 2,
    }
}

/// Records what it is asked, and answers as it is told.
#[derive(Default)]
struct Recorder {
    state: Mutex<Recorded>,
    changed: Condvar,
}

#[derive(Default)]
struct Recorded {
    asked: Vec<ByteRange>,
    lost: Vec<String>,
    held: bool,
    errno: Option<i32>,
}

impl Recorder {
    fn held() -> Arc<Self> {
        let recorder = Arc::new(Self::default());
        lock(&recorder.state).held = true;
        recorder
    }

    fn set(&self, change: impl FnOnce(&mut Recorded)) {
        change(&mut lock(&self.state));
        self.changed.notify_all();
    }

    fn wait(&self, until: impl Fn(&Recorded) -> bool) -> MutexGuard<'_, Recorded> {
        let waited = self.changed.wait_timeout_while(lock(&self.state), HANGS, |state| !until(state)).unwrap();
        assert!(!waited.1.timed_out(), "it never came");
        waited.0
    }

    fn asked(&self) -> Vec<ByteRange> {
        lock(&self.state).asked.clone()
    }
}

impl Trap for Recorder {
    fn before_write(&self, range: ByteRange) -> Result<()> {
        self.set(|state| state.asked.push(range));
        let state = self.wait(|state| !state.held);
        match state.errno {
            Some(errno) => Err(Error::system(Kind::InstantLost, "save", io::Error::from_raw_os_error(errno))),
            None => Ok(()),
        }
    }

    fn lost(&self, why: &Error) {
        self.set(|state| state.lost.push(why.to_string()));
    }
}

fn in_time<T: Send + 'static>(what: &str, body: impl FnOnce() -> T + Send + 'static) -> T {
    let (done, wait) = mpsc::channel();
    thread::spawn(move || done.send(body()));
    wait.recv_timeout(HANGS * 2).unwrap_or_else(|_| panic!("{what} hangs"))
}

#[test]
fn without_a_backup_a_write_just_begins() {
    let scene = Scene::new();
    let writer = scene.writer();
    drop(writer.begin(0, LENGTH).unwrap());
    assert_eq!(writer.begin(u64::MAX, 2).unwrap_err().raw_os_error(), Some(22));
}

#[test]
fn a_write_waits_for_its_grant() {
    let scene = Scene::new();
    let writer = Arc::new(scene.writer());
    let trap = Recorder::held();
    let writers = scene.trapping(options(), &trap);
    let (began, wait) = mpsc::channel();
    let writing = {
        let writer = writer.clone();
        thread::spawn(move || {
            let _write = writer.begin(CLUSTER + 1, 3 * CLUSTER).unwrap();
            began.send(()).unwrap();
        })
    };
    drop(trap.wait(|state| !state.asked.is_empty()));
    // Whether the writer has seen an answer is a matter of time; whether there is one is not.
    let ring = lock(&writers.hub.links)[0].ring.clone();
    let waits = |slot: &&Slot| matches!(slot.state.load(Ordering::SeqCst), state::POSTED | state::ASLEEP);
    assert_eq!(ring.slots.iter().filter(waits).count(), 1, "it has been granted");
    assert!(wait.try_recv().is_err(), "it went on");
    trap.set(|state| state.held = false);
    wait.recv_timeout(HANGS).unwrap();
    writing.join().unwrap();
    assert_eq!(trap.asked(), [ByteRange::new(CLUSTER + 1, 3 * CLUSTER)]);
    writers.finish().unwrap();
    let counts = writers.counts();
    assert_eq!((counts.attached, counts.ever, counts.writes, counts.trapped), (0, 1, 1, 1));
    assert!(counts.stalls.max() > Duration::ZERO);
}

#[test]
fn free_clusters_and_what_lies_past_the_end_need_no_grant() {
    let scene = Scene::new();
    let writer = scene.writer();
    let trap = Arc::new(Recorder::default());
    let writers = scene.trapping(options(), &trap);
    writers.free_map().free(2..5);
    for (offset, length) in [(2 * CLUSTER, 3 * CLUSTER), (4 * CLUSTER + 9, 1), (LENGTH, 1 << 40), (7, 0)] {
        drop(writer.begin(offset, length).unwrap());
    }
    assert_eq!(trap.asked(), []);
    drop(writer.begin(2 * CLUSTER, 4 * CLUSTER).unwrap());
    drop(writer.begin(LENGTH - 1, 1 << 50).unwrap());
    assert_eq!(trap.asked(), [ByteRange::new(5 * CLUSTER, CLUSTER), ByteRange::new(LENGTH - 1, 1)]);
    assert_eq!(writers.counts().writes, 6);
    writers.finish().unwrap();
}

#[test]
fn a_large_write_is_asked_for_in_pieces() {
    let scene = Scene::new();
    let writer = scene.writer();
    let trap = Arc::new(Recorder::default());
    let large = 3 << 20;
    let writers = scene.trapping(Options { length: large, ..options() }, &trap);
    drop(writer.begin(0, large).unwrap());
    assert_eq!(trap.asked(), [0, 1, 2].map(|mib| ByteRange::new(mib << 20, 1 << 20)));
    writers.finish().unwrap();
}

#[test]
fn the_freeze_waits_for_writes_in_flight() {
    let scene = Scene::new();
    let writer = scene.writer();
    let writers = scene.attach(Options { freeze_timeout: Duration::from_millis(200), ..options() }).unwrap();
    let write = writer.begin(0, 1).unwrap();
    let Err(refused) = writers.freeze() else { panic!("frozen with a write in flight") };
    assert_eq!(refused.kind(), Kind::InstantLost);
    assert!(refused.to_string().contains("did not freeze within 0.2 s"), "{refused}");
    drop(write);
    drop(writer.begin(0, 1).unwrap());
}

#[test]
fn a_write_that_ends_lets_the_freeze_go_on() {
    let scene = Scene::new();
    let writer = Arc::new(scene.writer());
    let writers = scene.attach(options()).unwrap();
    let (began, wait) = mpsc::channel();
    let (end, until) = mpsc::channel::<()>();
    let ended = Arc::new(AtomicBool::new(false));
    let writing = {
        let (writer, ended) = (writer.clone(), ended.clone());
        thread::spawn(move || {
            let _write = writer.begin(0, 1).unwrap();
            began.send(()).unwrap();
            until.recv_timeout(HANGS).unwrap();
            ended.store(true, Ordering::SeqCst);
        })
    };
    wait.recv_timeout(HANGS).unwrap();
    let freezing = thread::spawn(move || {
        let frozen = writers.freeze().unwrap();
        assert!(ended.load(Ordering::SeqCst), "frozen before the write had ended");
        frozen.release().unwrap()
    });
    end.send(()).unwrap();
    writing.join().unwrap();
    assert!(freezing.join().unwrap() < HANGS);
}

#[test]
fn nothing_begins_while_frozen() {
    let scene = Scene::new();
    let writer = Arc::new(scene.writer());
    let writers = scene.attach(options()).unwrap();
    let frozen = writers.freeze().unwrap();
    let thawed = Arc::new(AtomicBool::new(false));
    let (trying, tries) = mpsc::channel();
    let writing = {
        let (writer, thawed) = (writer.clone(), thawed.clone());
        thread::spawn(move || {
            trying.send(()).unwrap();
            let _write = writer.begin(0, 1).unwrap();
            assert!(thawed.load(Ordering::SeqCst), "begun before the thaw");
        })
    };
    tries.recv_timeout(HANGS).unwrap();
    thawed.store(true, Ordering::SeqCst);
    let trap = Arc::new(Recorder::default());
    frozen.thaw(trap.clone()).unwrap();
    writing.join().unwrap();
    assert_eq!(trap.asked(), [ByteRange::new(0, 1)], "after the instant it asks");
    writers.finish().unwrap();
}

#[test]
fn the_quiesce_callback_runs_before_the_instant_and_may_write() {
    let scene = Scene::new();
    let writer = Arc::new(scene.writer());
    let flushed = Arc::new(AtomicBool::new(false));
    let (inside, done) = (Arc::downgrade(&writer), flushed.clone());
    writer.on_freeze(move || {
        drop(inside.upgrade().unwrap().begin(0, 512)?);
        done.store(true, Ordering::SeqCst);
        Ok(())
    });
    let writers = scene.attach(options()).unwrap();
    let frozen = writers.freeze().unwrap();
    assert!(flushed.load(Ordering::SeqCst));
    frozen.release().unwrap();
}

/// It may start programs, which would be deaf to every signal.
#[test]
fn the_quiesce_callback_has_the_programs_signals() {
    use nix::sys::signal::{SigSet, Signal};
    let scene = Scene::new();
    let own = SigSet::from(Signal::SIGUSR2);
    let writer = thread::scope(|scope| {
        let start = scope.spawn(|| {
            own.thread_block().unwrap();
            scene.writer()
        });
        start.join().unwrap()
    });
    let (tell, told) = mpsc::channel();
    writer.on_freeze(move || {
        tell.send(SigSet::thread_get_mask()?).unwrap();
        Ok(())
    });
    scene.attach(options()).unwrap().freeze().unwrap().release().unwrap();
    assert_eq!(told.recv_timeout(HANGS).unwrap(), own);
}

#[test]
fn a_callback_that_fails_or_panics_makes_the_freeze_fail() {
    let scene = Scene::new();
    let writer = scene.writer();
    for panics in [false, true] {
        writer.on_freeze(move || if panics { panic!("on purpose") } else { Err(io::Error::from_raw_os_error(28)) });
        let writers = scene.attach(options()).unwrap();
        let Err(refused) = writers.freeze() else { panic!("frozen") };
        assert_eq!(refused.errno(), Some(if panics { 5 } else { 28 }), "{refused}");
        drop(writer.begin(0, 1).unwrap());
    }
    writer.on_freeze(|| Ok(()));
    scene.attach(options()).unwrap().freeze().unwrap().release().unwrap();
}

#[test]
fn a_callback_that_hangs_holds_nobody_beyond_the_bound() {
    let scene = Scene::new();
    let writer = scene.writer();
    let (release, until) = mpsc::channel::<()>();
    let (called, calls) = mpsc::channel();
    writer.on_freeze(move || {
        called.send(()).unwrap();
        let _ = until.recv_timeout(HANGS);
        Ok(())
    });
    let writers = scene.attach(Options { freeze_timeout: Duration::from_millis(100), ..options() }).unwrap();
    let freezing = thread::spawn(move || writers.freeze().map(drop));
    calls.recv_timeout(HANGS).unwrap();
    let began = Instant::now();
    drop(writer.begin(0, 1).unwrap());
    assert!(began.elapsed() < HANGS, "it was let in by its own bound or by the backup");
    assert!(freezing.join().unwrap().is_err());
    let busy = scene.attach(options()).unwrap().freeze().map(drop).unwrap_err();
    assert_eq!(busy.errno(), Some(16), "{busy}");
    drop(release);
}

/// Only one that runs is waited for: a freeze was refused as busy that came when the program set its callback.
#[test]
fn a_callback_may_be_set_at_any_time() {
    let scene = Scene::new();
    let writer = scene.writer();
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(Ordering::SeqCst) {
                writer.on_freeze(|| Ok(()));
            }
        });
        for _ in 0..100 {
            let frozen = scene.attach(options()).and_then(|writers| writers.freeze().map(drop));
            if frozen.is_err() {
                stop.store(true, Ordering::SeqCst);
            }
            frozen.unwrap();
        }
        stop.store(true, Ordering::SeqCst);
    });
}

#[test]
fn a_writer_that_starts_during_the_job_is_trapped_from_its_first_write_on() {
    let scene = Scene::new();
    let trap = Arc::new(Recorder::default());
    let writers = scene.trapping(options(), &trap);
    assert_eq!(writers.counts().ever, 0);
    let writer = scene.writer();
    drop(writer.begin(0, 1).unwrap());
    assert_eq!(trap.asked(), [ByteRange::new(0, 1)]);
    drop(writer);
    let again = scene.writer();
    drop(again.begin(5, 1).unwrap());
    assert_eq!(trap.asked().len(), 2);
    writers.finish().unwrap();
    let counts = writers.counts();
    assert_eq!((counts.ever, counts.writes, counts.trapped), (2, 2, 2), "of those that are gone too");
}

#[test]
fn a_writer_that_starts_before_the_instant_is_frozen_with_the_others() {
    let scene = Scene::new();
    let writers = scene.attach(options()).unwrap();
    let writer = scene.writer();
    let opened = Instant::now();
    while writers.attached() == 0 {
        assert!(opened.elapsed() < HANGS, "our side hears of it a moment later");
        thread::yield_now();
    }
    let write = writer.begin(0, 1).unwrap();
    let freezing = thread::spawn(move || {
        let frozen = writers.freeze().unwrap();
        (frozen, writers)
    });
    drop(write);
    let (frozen, writers) = freezing.join().unwrap();
    let trap = Arc::new(Recorder::default());
    frozen.thaw(trap.clone()).unwrap();
    drop(writer.begin(0, 1).unwrap());
    assert_eq!(trap.asked().len(), 1);
    writers.finish().unwrap();
}

#[test]
fn a_writer_that_starts_during_the_freeze_waits_for_the_thaw() {
    let scene = Arc::new(Scene::new());
    let writers = scene.attach(options()).unwrap();
    let frozen = writers.freeze().unwrap();
    let thawed = Arc::new(AtomicBool::new(false));
    let opening = {
        let (scene, thawed) = (scene.clone(), thawed.clone());
        thread::spawn(move || {
            let writer = scene.writer();
            assert!(thawed.load(Ordering::SeqCst), "opened before the thaw");
            drop(writer.begin(9, 1).unwrap());
        })
    };
    let folder = scene.folder();
    let appeared = Instant::now();
    while folder.writers(scene.disk()).unwrap().is_empty() {
        assert!(appeared.elapsed() < HANGS);
        thread::yield_now();
    }
    thawed.store(true, Ordering::SeqCst);
    let trap = Arc::new(Recorder::default());
    frozen.thaw(trap.clone()).unwrap();
    opening.join().unwrap();
    assert_eq!(trap.asked(), [ByteRange::new(9, 1)]);
    writers.finish().unwrap();
}

#[test]
fn several_writers_and_disks_share_one_instant() {
    let scene = Scene::new();
    let (first, second) = (scene.writer(), scene.writer());
    let third = Writer::open_in(scene.path("other"), scene.path("meet")).unwrap();
    let disk = scene.attach(options()).unwrap();
    let other = Disk::at(&scene.path("other")).unwrap();
    let other = Writers::attach(other, &scene.path("meet"), options()).unwrap();
    assert_eq!((disk.attached(), other.attached()), (2, 1));
    let traps = [(); 2].map(|()| Arc::new(Recorder::default()));
    for (frozen, trap) in Writers::freeze_all(&[&disk, &other]).unwrap().into_iter().zip(&traps) {
        assert!(frozen.thaw(trap.clone()).unwrap() < HANGS);
    }
    for (at, writer) in [&first, &second, &third].into_iter().enumerate() {
        drop(writer.begin(at as u64, 1).unwrap());
    }
    assert_eq!(traps[0].asked(), [ByteRange::new(0, 1), ByteRange::new(1, 1)]);
    assert_eq!(traps[1].asked(), [ByteRange::new(2, 1)]);
    disk.finish().unwrap();
    other.finish().unwrap();
}

#[test]
fn one_writer_that_does_not_freeze_thaws_all() {
    let scene = Scene::new();
    let (first, second) = (scene.writer(), scene.writer());
    second.on_freeze(|| Err(io::Error::from_raw_os_error(5)));
    let writers = scene.attach(options()).unwrap();
    assert!(writers.freeze().is_err());
    drop((first.begin(0, 1).unwrap(), second.begin(0, 1).unwrap()));
}

#[test]
fn a_second_backup_is_refused_and_a_later_one_is_not() {
    let scene = Scene::new();
    let writer = scene.writer();
    let first = scene.attach(options()).unwrap();
    let Err(refused) = scene.attach(options()) else { panic!("attached twice") };
    assert_eq!(refused.kind(), Kind::Busy);
    first.freeze().unwrap().thaw(Arc::new(Recorder::default())).unwrap();
    first.finish().unwrap();
    let trap = Arc::new(Recorder::default());
    let attached = Instant::now();
    let second = loop {
        match scene.attach(options()) {
            Ok(writers) => break writers,
            Err(e) => assert!(e.kind() == Kind::Busy && attached.elapsed() < HANGS, "{e}"),
        }
    };
    second.freeze().unwrap().thaw(trap.clone()).unwrap();
    drop(writer.begin(0, 1).unwrap());
    assert_eq!(trap.asked().len(), 1);
    second.finish().unwrap();
}

#[test]
fn a_failed_capture_breaks_the_snapshot_and_not_the_write() {
    let scene = Scene::new();
    let writer = scene.writer();
    let trap = Arc::new(Recorder::default());
    trap.set(|state| state.errno = Some(28));
    let writers = scene.trapping(options(), &trap);
    drop(writer.begin(0, 1).unwrap());
    assert_eq!(lock(&trap.state).lost, ["save: No space left on device"], "told before the write was granted");
    let lost = writers.check().unwrap_err();
    assert_eq!((lost.kind(), lost.to_string().as_str()), (Kind::InstantLost, "save: No space left on device"));
    drop(writer.begin(CLUSTER, 1).unwrap());
    assert!(writers.finish().is_err());
}

#[test]
fn a_failed_capture_breaks_the_write_and_not_the_snapshot() {
    let scene = Scene::new();
    let writer = scene.writer();
    let trap = Arc::new(Recorder::default());
    trap.set(|state| state.errno = Some(28));
    let writers = scene.trapping(Options { on_cbw_error: OnCbwError::BreakGuestWrite, ..options() }, &trap);
    assert_eq!(writer.begin(0, 1).unwrap_err().raw_os_error(), Some(28));
    writers.check().unwrap();
    trap.set(|state| state.errno = None);
    drop(writer.begin(0, 1).unwrap());
    writers.finish().unwrap();
    assert_eq!(lock(&trap.state).lost, Vec::<String>::new());
}

#[test]
fn a_capture_that_hangs_breaks_the_snapshot_in_time() {
    let scene = Scene::new();
    let writer = scene.writer();
    let trap = Recorder::held();
    let writers = scene.trapping(Options { cbw_timeout: Duration::from_millis(100), ..options() }, &trap);
    let began = Instant::now();
    drop(writer.begin(0, 1).unwrap());
    assert!(began.elapsed() >= Duration::from_millis(90) && began.elapsed() < HANGS, "{:?}", began.elapsed());
    assert_eq!(writers.check().unwrap_err().kind(), Kind::InstantLost);
    trap.set(|state| state.held = false);
}

/// The late end of a capture must not answer the write that has got its slot meanwhile.
#[test]
fn a_capture_that_hangs_fails_its_write_and_grants_no_other() {
    let scene = Scene::new();
    let writer = Arc::new(scene.writer());
    let trap = Recorder::held();
    let cbw_timeout = Duration::from_secs(1);
    let on_cbw_error = OnCbwError::BreakGuestWrite;
    let writers = scene.trapping(Options { cbw_timeout, on_cbw_error, ..options() }, &trap);
    assert_eq!(writer.begin(0, 1).unwrap_err().raw_os_error(), Some(110));
    // The same slot again: it is the one given back last. The first capture still hangs.
    let second = writer.clone();
    let writing = thread::spawn(move || second.begin(CLUSTER, 1).map(drop));
    drop(trap.wait(|state| state.asked.len() == 2));
    // All threads hang now; a third entry is refused although nobody can take it.
    assert_eq!(writer.begin(2 * CLUSTER, 1).unwrap_err().raw_os_error(), Some(110));
    assert_eq!(writing.join().unwrap().unwrap_err().raw_os_error(), Some(110));
    assert_eq!(trap.asked().len(), 2);
    writers.check().unwrap();
    trap.set(|state| state.held = false);
    drop(writer.begin(3 * CLUSTER, 1).unwrap());
    writers.finish().unwrap();
}

#[test]
fn a_capture_that_ends_late_does_not_answer_the_slots_next_write() {
    let (ring, _descriptor) = Ring::create().unwrap();
    let (socket, _peer) = rustix::net::socketpair(
        rustix::net::AddressFamily::UNIX,
        rustix::net::SocketType::SEQPACKET,
        rustix::net::SocketFlags::CLOEXEC,
        None,
    )
    .unwrap();
    link::tests::late_answers_are_dropped(ring, socket);
}

#[test]
fn a_fault_in_a_capture_is_a_failed_capture() {
    struct Faulty;
    impl Trap for Faulty {
        fn before_write(&self, _: ByteRange) -> Result<()> {
            panic!("on purpose")
        }
        fn lost(&self, _: &Error) {}
    }
    let scene = Scene::new();
    let writer = scene.writer();
    let writers = scene.attach(options()).unwrap();
    writers.freeze().unwrap().thaw(Arc::new(Faulty)).unwrap();
    drop(writer.begin(0, 1).unwrap());
    assert!(writers.check().unwrap_err().to_string().contains("fault"));
}

#[test]
fn no_write_fails_for_an_instant_that_is_lost() {
    let scene = Scene::new();
    let writers = scene.attach(Options { on_cbw_error: OnCbwError::BreakGuestWrite, ..options() }).unwrap();
    let error = Error::system(Kind::InstantLost, "save", io::Error::from_raw_os_error(28));
    assert_eq!(writers.hub.failed(&error), Answer::Refused(28));
    writers.hub.lose("another writer went on".to_owned());
    assert_eq!(writers.hub.failed(&error), Answer::Granted);
}

#[test]
fn a_slow_capture_does_not_hold_up_other_writes() {
    let scene = Scene::new();
    let writer = Arc::new(scene.writer());
    let trap = Recorder::held();
    let writers = scene.trapping(options(), &trap);
    let slow = {
        let writer = writer.clone();
        thread::spawn(move || drop(writer.begin(0, 1).unwrap()))
    };
    drop(trap.wait(|state| state.asked.len() == 1));
    let other = {
        let writer = writer.clone();
        thread::spawn(move || drop(writer.begin(CLUSTER, 1).unwrap()))
    };
    drop(trap.wait(|state| state.asked.len() == 2));
    trap.set(|state| state.held = false);
    slow.join().unwrap();
    other.join().unwrap();
    writers.finish().unwrap();
}

#[test]
fn the_end_of_the_job_releases_who_waits() {
    let scene = Scene::new();
    let writer = Arc::new(scene.writer());
    let trap = Recorder::held();
    let writers = scene.trapping(options(), &trap);
    let waiting = writer.clone();
    let waiting = thread::spawn(move || drop(waiting.begin(0, 1).unwrap()));
    drop(trap.wait(|state| state.asked.len() == 1));
    drop(writers);
    in_time("a write after the end", move || waiting.join().unwrap());
    trap.set(|state| state.held = false);
    drop(writer.begin(0, 1).unwrap());
}

/// Writers on four threads, captures on two, and a copier that reads everything: the copy is what was there at the
/// instant, byte by byte.
#[test]
fn the_copy_is_the_disk_as_of_the_instant() {
    struct Copy {
        disk: Arc<Vec<AtomicU8>>,
        saved: Vec<Mutex<Option<u8>>>,
        map: Arc<dyn FreeMap>,
    }
    impl Copy {
        fn save(&self, cluster: u64) {
            let mut saved = lock(&self.saved[cluster as usize]);
            if saved.is_none() {
                *saved = Some(self.disk[cluster as usize].load(Ordering::Relaxed));
                self.map.free(cluster..cluster + 1);
            }
        }
    }
    impl Trap for Copy {
        fn before_write(&self, range: ByteRange) -> Result<()> {
            ClusterSize::new(CLUSTER).covering(range).for_each(|cluster| self.save(cluster));
            Ok(())
        }
        fn lost(&self, why: &Error) {
            panic!("{why}");
        }
    }
    const CLUSTERS: u64 = 64;
    for seed in 0..20_u64 {
        let scene = Scene::new();
        let writer = Arc::new(scene.writer());
        let disk: Arc<Vec<AtomicU8>> = Arc::new((0..CLUSTERS).map(|_| AtomicU8::new(0)).collect());
        let stop = Arc::new(AtomicBool::new(false));
        let writes = Arc::new(AtomicU64::new(0));
        let threads: Vec<_> = (0..4_u64)
            .map(|at| {
                let (writer, disk, stop, writes) = (writer.clone(), disk.clone(), stop.clone(), writes.clone());
                thread::spawn(move || {
                    let mut random = seed * 4 + at + 1;
                    while !stop.load(Ordering::Relaxed) {
                        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                        let (first, count) = (random >> 40 & 63, 1 + (random >> 50 & 3));
                        let end = (first + count).min(CLUSTERS);
                        let _write = writer.begin(first * CLUSTER, (end - first) * CLUSTER).unwrap();
                        for cluster in first..end {
                            disk[cluster as usize].store((random >> 32) as u8, Ordering::Relaxed);
                        }
                        writes.fetch_add(1, Ordering::Relaxed);
                    }
                })
            })
            .collect();
        let writers = scene.attach(Options { length: CLUSTERS * CLUSTER, ..options() }).unwrap();
        let saved = (0..CLUSTERS).map(|_| Mutex::default()).collect();
        let copy = Arc::new(Copy { disk: disk.clone(), saved, map: writers.free_map() });
        let frozen = writers.freeze().unwrap();
        let instant: Vec<u8> = disk.iter().map(|byte| byte.load(Ordering::Relaxed)).collect();
        frozen.thaw(copy.clone()).unwrap();
        let begun = writes.load(Ordering::Relaxed);
        let waiting = Instant::now();
        while writes.load(Ordering::Relaxed) < begun + 50 {
            assert!(waiting.elapsed() < HANGS);
            thread::yield_now();
        }
        (0..CLUSTERS).for_each(|cluster| copy.save(cluster));
        writers.finish().unwrap();
        stop.store(true, Ordering::Relaxed);
        threads.into_iter().for_each(|thread| thread.join().unwrap());
        let copied: Vec<u8> = copy.saved.iter().map(|byte| lock(byte).unwrap()).collect();
        assert_eq!(copied, instant, "seed {seed}");
    }
}
