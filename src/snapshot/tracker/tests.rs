use super::*;
use crate::ground::cluster::ClusterSize;
use crate::snapshot::copy_state::Plan;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

const CLUSTER: u64 = 4096;

fn tracker(clusters: u64) -> Tracker {
    let plan = Plan { granule: CLUSTER, ascending: false };
    Tracker::new(CopyState::new(clusters * CLUSTER, ClusterSize::new(CLUSTER), plan))
}

fn cluster(first: u64) -> ByteRange {
    ByteRange::new(first * CLUSTER, CLUSTER)
}

/// A capture that must not be asked for.
fn refuse(run: ByteRange) -> Result<(), String> {
    Err(format!("asked to preserve {run}"))
}

fn save(_: ByteRange) -> Result<(), String> {
    Ok(())
}

/// Every run that was freed, in order.
#[derive(Default)]
struct Log(std::sync::Mutex<Vec<Clusters>>);

impl FreeMap for Log {
    fn free(&self, clusters: Clusters) {
        self.0.lock().unwrap().push(clusters);
    }
}

impl Log {
    fn take(&self) -> Vec<(u64, u64)> {
        self.0.lock().unwrap().drain(..).map(|run| (run.start, run.end)).collect()
    }
}

/// Runs `waits` in a thread; true when it ended because of `event`, and not before.
fn ends_by(tracker: &Tracker, waits: impl FnOnce() + Send, event: impl FnOnce()) -> bool {
    let (ended, end) = mpsc::channel();
    thread::scope(|scope| {
        scope.spawn(move || {
            waits();
            ended.send(()).unwrap();
        });
        // Not seen from outside: whether the thread waits already. A late one makes the test weaker, never wrong.
        let early = end.recv_timeout(Duration::from_millis(20)).is_ok();
        event();
        let ends = early || end.recv_timeout(Duration::from_secs(10)).is_ok();
        if !ends {
            tracker.stop();
        }
        ends && !early
    })
}

#[test]
fn guest_write_waits_for_source_reader() {
    let tracker = tracker(2);
    let mut claim = tracker.claim_next(CLUSTER).unwrap();
    assert!(ends_by(
        &tracker,
        || assert_eq!(tracker.before_write(cluster(0), refuse), Ok(Granted::Write)),
        || claim.source_read()
    ));
    claim.finish(true);
}

#[test]
fn guest_write_waits_for_another_capture() {
    let tracker = tracker(1);
    let (begun, begin) = mpsc::channel();
    let (go, gone) = mpsc::channel::<()>();
    thread::scope(|scope| {
        let tracker = &tracker;
        scope.spawn(move || {
            let capture = |_| {
                begun.send(()).unwrap();
                gone.recv().unwrap();
                Ok::<_, String>(())
            };
            assert_eq!(tracker.before_write(cluster(0), capture), Ok(Granted::Write));
        });
        begin.recv().unwrap();
        assert!(ends_by(
            tracker,
            || assert_eq!(tracker.before_write(cluster(0), refuse), Ok(Granted::Write)),
            || go.send(()).unwrap()
        ));
    });
}

#[test]
fn copier_waits_for_a_capture_and_copies_it_from_the_overlay() {
    let tracker = tracker(1);
    let copier = || {
        let mut claim = tracker.claim_next(CLUSTER).unwrap();
        assert_eq!(claim.pieces(), [(cluster(0), Holder::Overlay)]);
        claim.source_read();
        assert_eq!(claim.finish(true), [cluster(0)]);
    };
    let capture = |_| {
        assert_eq!(tracker.dirty_bytes(), 0);
        Ok::<_, String>(())
    };
    assert_eq!(tracker.before_write(cluster(0), capture), Ok(Granted::Write));
    assert_eq!(tracker.saved_clusters(), 1);
    copier();
    assert!(tracker.is_done());
}

#[test]
fn claim_dropped_by_a_panic_is_dirty_again() {
    let tracker = tracker(1);
    let died = catch_unwind(AssertUnwindSafe(|| {
        let _claim = tracker.claim_next(CLUSTER).unwrap();
        panic!("a worker dies");
    }));
    assert!(died.is_err());
    assert_eq!(tracker.dirty_bytes(), CLUSTER);
    assert!(!tracker.is_lost() && !tracker.is_stopped());
    tracker.claim_next(CLUSTER).unwrap().finish(true);
    assert!(tracker.is_done());
}

#[test]
fn claim_failed_after_its_release_loses_the_instant_and_lets_everybody_go() {
    let tracker = tracker(2);
    let mut claim = tracker.claim_next(CLUSTER).unwrap();
    let other = tracker.claim_next(CLUSTER).unwrap();
    claim.source_read();
    assert!(ends_by(
        &tracker,
        || assert_eq!(tracker.before_write(cluster(1), refuse), Ok(Granted::Stopped)),
        || drop(claim)
    ));
    assert!(tracker.is_lost() && !tracker.is_done());
    assert!(tracker.claim_next(CLUSTER).is_none());
    other.finish(true);
    assert!(!tracker.is_done());
}

#[test]
fn what_was_given_up_leaves_nothing_to_claim() {
    let (stopped, lost) = (tracker(3), tracker(3));
    assert_eq!(stopped.dirty_bytes(), 3 * CLUSTER);
    stopped.stop();
    lost.claim_next(CLUSTER).unwrap().source_read();
    assert!(lost.is_lost() && !lost.is_stopped());
    assert_eq!((stopped.dirty_bytes(), lost.dirty_bytes()), (0, 0));
}

#[test]
fn failed_capture_leaves_the_cluster_dirty_and_the_next_write_tries_again() {
    let tracker = tracker(1);
    let full = |_| Err("overlay is full");
    assert_eq!(tracker.before_write(cluster(0), full), Err("overlay is full"));
    assert_eq!((tracker.dirty_bytes(), tracker.saved_clusters()), (CLUSTER, 0));
    assert_eq!(tracker.before_write(cluster(0), save), Ok(Granted::Write));
    assert_eq!((tracker.dirty_bytes(), tracker.saved_clusters()), (CLUSTER, 1));
}

#[test]
fn panicking_capture_leaves_the_cluster_dirty() {
    let tracker = tracker(1);
    let died = catch_unwind(AssertUnwindSafe(|| {
        tracker.before_write(cluster(0), |_| -> Result<(), String> { panic!("a capture dies") })
    }));
    assert!(died.is_err());
    assert_eq!((tracker.dirty_bytes(), tracker.saved_clusters()), (CLUSTER, 0));
    assert_eq!(tracker.before_write(cluster(0), save), Ok(Granted::Write));
}

#[test]
fn panic_in_the_middle_of_a_change_lets_everybody_go() {
    struct Broken;
    impl FreeMap for Broken {
        fn free(&self, _: Clusters) {
            panic!("a map dies");
        }
    }
    let tracker = tracker(3);
    let mut claim = tracker.claim_next(CLUSTER).unwrap();
    let other = tracker.claim_next(CLUSTER).unwrap();
    tracker.attach_free_map(Arc::new(Broken));
    assert!(ends_by(
        &tracker,
        || assert_eq!(tracker.before_write(cluster(1), refuse), Ok(Granted::Stopped)),
        || assert!(catch_unwind(AssertUnwindSafe(|| claim.source_read())).is_err())
    ));
    assert!(tracker.is_stopped() && !tracker.is_done());
    assert!(tracker.claim_next(CLUSTER).is_none());
    drop(other);
}

#[test]
fn stop_ends_the_wait_of_copiers_and_writers() {
    let tracker = tracker(1);
    let claim = tracker.claim_next(CLUSTER).unwrap();
    assert!(ends_by(
        &tracker,
        || {
            thread::scope(|scope| {
                scope.spawn(|| assert!(tracker.claim_next(CLUSTER).is_none()));
                assert_eq!(tracker.before_write(cluster(0), refuse), Ok(Granted::Stopped));
            })
        },
        || tracker.stop()
    ));
    claim.finish(true);
    assert!(!tracker.is_done());
}

#[test]
fn copiers_end_when_the_last_claim_is_finished() {
    let tracker = tracker(1);
    let claim = tracker.claim_next(CLUSTER).unwrap();
    assert!(ends_by(
        &tracker,
        || assert!(tracker.claim_next(CLUSTER).is_none()),
        || assert!(claim.finish(true).is_empty())
    ));
    assert!(tracker.is_done());
}

#[test]
fn waiting_copier_gets_what_another_gives_back() {
    let tracker = tracker(2);
    let mut claim = tracker.claim_next(2 * CLUSTER).unwrap();
    assert!(ends_by(
        &tracker,
        || {
            let rest = tracker.claim_next(2 * CLUSTER).unwrap();
            assert_eq!(rest.range(), cluster(1));
            rest.finish(true);
        },
        || claim.shrink(CLUSTER)
    ));
    claim.finish(true);
    assert!(tracker.is_done());
}

#[test]
fn overlay_first_takes_what_the_overlay_holds() {
    let tracker = tracker(4);
    assert_eq!(tracker.before_write(ByteRange::new(2 * CLUSTER, 2 * CLUSTER), save), Ok(Granted::Write));
    tracker.set_overlay_first(true);
    let claim = tracker.claim_next(4 * CLUSTER).unwrap();
    assert_eq!(claim.range(), ByteRange::new(2 * CLUSTER, 2 * CLUSTER));
    tracker.set_overlay_first(false);
    assert_eq!(tracker.claim_next(CLUSTER).unwrap().range(), cluster(0));
}

#[test]
fn what_the_overlay_holds_can_be_claimed_alone() {
    let tracker = tracker(4);
    assert!(tracker.claim_saved(CLUSTER).is_none());
    assert_eq!(tracker.before_write(ByteRange::new(2 * CLUSTER, 2 * CLUSTER), save), Ok(Granted::Write));
    let claim = tracker.claim_saved(CLUSTER).unwrap();
    assert_eq!(claim.range(), cluster(2));
    assert_eq!(claim.finish(true), [cluster(2)]);
    tracker.stop();
    assert!(tracker.claim_saved(CLUSTER).is_none(), "it is over");
}

#[test]
fn a_claim_grows_over_what_is_dirty() {
    let tracker = tracker(4);
    tracker.before_write(cluster(3), save).unwrap();
    let last = tracker.claim_saved(CLUSTER).unwrap();
    let mut claim = tracker.claim_next(CLUSTER).unwrap();
    claim.grow(2 * CLUSTER);
    assert_eq!(claim.range(), ByteRange::new(0, 2 * CLUSTER));
    claim.grow(u64::MAX);
    assert_eq!(claim.range(), ByteRange::new(0, 3 * CLUSTER));
    drop(last);
}

#[test]
fn each_write_that_asks_is_counted_once() {
    let tracker = tracker(1000);
    for count in 1..4 {
        tracker.before_write(ByteRange::new(0, 1000 * CLUSTER), save).unwrap();
        assert_eq!(tracker.trapped(), count);
    }
}

#[test]
fn free_map_is_told_of_every_run_in_order() {
    let tracker = tracker(6);
    tracker.before_write(cluster(5), save).unwrap();
    tracker.claim_next(CLUSTER).unwrap().finish(true);
    let _reading = tracker.claim_next(CLUSTER).unwrap();
    let mut read = tracker.claim_next(CLUSTER).unwrap();
    read.source_read();
    let log = Arc::new(Log::default());
    tracker.attach_free_map(log.clone());
    assert_eq!(log.take(), [(5, 6), (0, 1), (2, 3)]);
    tracker.before_write(cluster(4), save).unwrap();
    assert_eq!(log.take(), [(4, 5)]);
    tracker.before_write(cluster(4), refuse).unwrap();
    assert_eq!(log.take(), []);
    let mut last = tracker.claim_next(CLUSTER).unwrap();
    assert_eq!(log.take(), []);
    last.source_read();
    assert_eq!(log.take(), [(3, 4)]);
    last.finish(true);
}

#[test]
fn clusters_that_are_never_read_are_free_when_they_are_finished() {
    let tracker = tracker(1);
    let log = Arc::new(Log::default());
    tracker.attach_free_map(log.clone());
    let claim = tracker.claim_next(CLUSTER).unwrap();
    assert_eq!(log.take(), []);
    claim.finish(true);
    assert_eq!(log.take(), [(0, 1)]);
}

#[test]
fn write_of_the_whole_disk_and_more_is_preserved_in_bounded_runs() {
    let tracker = tracker(1000);
    let mut runs = Vec::new();
    let preserve = |run| {
        runs.push(run);
        Ok::<_, String>(())
    };
    let granted = tracker.before_write(ByteRange::new(1, u64::MAX - 1), preserve);
    assert_eq!(granted, Ok(Granted::Write));
    assert!(runs.iter().all(|run| run.length <= STEP));
    assert_eq!(runs.iter().map(|run| run.length).sum::<u64>(), 1000 * CLUSTER);
    assert_eq!(tracker.saved_clusters(), 1000);
}

#[test]
fn empty_writes_and_empty_disks_ask_for_nothing() {
    assert_eq!(tracker(1).before_write(ByteRange::new(0, 0), refuse), Ok(Granted::Write));
    let empty = tracker(0);
    assert_eq!(empty.before_write(ByteRange::new(0, 4096), refuse), Ok(Granted::Write));
    assert!(empty.claim_next(CLUSTER).is_none() && empty.is_done());
}
