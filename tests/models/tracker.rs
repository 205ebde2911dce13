//! Copiers and writers on a disk of two or three clusters, each of which is one atomic number.

use crate::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use crate::{check, thread};
use drive_backup::ground::cluster::{ClusterSize, Clusters};
use drive_backup::ground::range::ByteRange;
use drive_backup::snapshot::copy_state::{CopyState, Holder, Plan};
use drive_backup::snapshot::tracker::{FreeMap, Granted, Tracker};
use std::sync::Arc;

/// The clusters' value as of the instant; writers write larger ones.
const INSTANT: usize = 1;
const NOTHING: usize = 0;

struct Bits(Vec<AtomicBool>);

impl FreeMap for Bits {
    fn free(&self, clusters: Clusters) {
        // As in the shared bitmap: who sees the bit sees that the source was read.
        clusters.for_each(|c| self.0[c as usize].store(true, Ordering::Release));
    }
}

struct World {
    tracker: Tracker,
    bits: Arc<Bits>,
    source: Vec<AtomicUsize>,
    overlay: Vec<AtomicUsize>,
    target: Vec<AtomicUsize>,
}

impl World {
    /// Clusters are one byte.
    fn new(clusters: u64) -> Arc<Self> {
        let all = |value| (0..clusters).map(|_| AtomicUsize::new(value)).collect();
        let plan = Plan { granule: 1, ascending: false };
        let tracker = Tracker::new(CopyState::new(clusters, ClusterSize::new(1), plan));
        let bits = Arc::new(Bits((0..clusters).map(|_| AtomicBool::new(false)).collect()));
        tracker.attach_free_map(bits.clone());
        Arc::new(Self { tracker, bits, source: all(INSTANT), overlay: all(NOTHING), target: all(NOTHING) })
    }

    /// Relaxed everywhere: only the tracker orders the accesses.
    fn copy(&self, limit: u64) {
        while let Some(mut claim) = self.tracker.claim_next(limit) {
            let mut values = Vec::new();
            for (piece, holder) in claim.pieces() {
                for c in piece.offset..piece.end() {
                    let from = if holder == Holder::Source { &self.source } else { &self.overlay };
                    values.push((c as usize, from[c as usize].load(Ordering::Relaxed)));
                }
            }
            claim.source_read();
            values.into_iter().for_each(|(c, value)| self.target[c].store(value, Ordering::Relaxed));
            claim.finish(true);
        }
    }

    fn save(&self, run: ByteRange) -> Result<(), ()> {
        for c in run.offset as usize..run.end() as usize {
            let before = self.overlay[c].swap(self.source[c].load(Ordering::Relaxed), Ordering::Relaxed);
            assert_eq!(before, NOTHING, "saved once");
        }
        Ok(())
    }

    fn write(&self, range: ByteRange, value: usize) {
        let clusters = range.offset as usize..range.end() as usize;
        if !self.bits.0[clusters.clone()].iter().all(|bit| bit.load(Ordering::Acquire)) {
            let granted = self.tracker.before_write(range, |run| self.save(run));
            assert_eq!(granted, Ok(Granted::Write));
        }
        clusters.for_each(|c| self.source[c].store(value, Ordering::Relaxed));
    }

    fn assert_target_is_the_instant(&self) {
        assert!(self.tracker.is_done());
        for value in &self.target {
            assert_eq!(value.load(Ordering::Relaxed), INSTANT);
        }
    }
}

fn spawn(world: &Arc<World>, run: impl FnOnce(&World) + Send + 'static) -> thread::JoinHandle<()> {
    let world = world.clone();
    thread::spawn(move || run(&world))
}

fn range(first: u64, count: u64) -> ByteRange {
    ByteRange::new(first, count)
}

#[test]
fn copier_and_writer_of_the_same_clusters() {
    check(|| {
        let world = World::new(2);
        let writer = spawn(&world, |world| {
            world.write(range(0, 2), 2);
            world.write(range(1, 1), 3);
        });
        world.copy(2);
        writer.join().unwrap();
        world.assert_target_is_the_instant();
        assert_eq!([2, 3], [0, 1].map(|c: usize| world.source[c].load(Ordering::Relaxed)));
    });
}

#[test]
fn two_writers_of_one_cluster_save_it_once() {
    check(|| {
        let world = World::new(1);
        let writer = spawn(&world, |world| world.write(range(0, 1), 2));
        let other = spawn(&world, |world| world.write(range(0, 1), 3));
        world.copy(1);
        writer.join().unwrap();
        other.join().unwrap();
        world.assert_target_is_the_instant();
    });
}

#[test]
fn two_copiers_and_a_writer() {
    check(|| {
        let world = World::new(2);
        let copier = spawn(&world, |world| world.copy(1));
        let writer = spawn(&world, |world| world.write(range(0, 2), 2));
        world.copy(1);
        copier.join().unwrap();
        writer.join().unwrap();
        world.assert_target_is_the_instant();
    });
}

#[test]
fn overlapping_writes_do_not_wait_for_each_other_for_ever() {
    check(|| {
        let world = World::new(3);
        let writer = spawn(&world, |world| world.write(range(0, 2), 2));
        let other = spawn(&world, |world| world.write(range(1, 2), 3));
        world.copy(3);
        writer.join().unwrap();
        other.join().unwrap();
        world.assert_target_is_the_instant();
    });
}

#[test]
fn claim_that_is_dropped_is_copied_by_somebody_and_holds_no_writer() {
    check(|| {
        let world = World::new(2);
        let writer = spawn(&world, |world| world.write(range(0, 1), 2));
        let copier = spawn(&world, |world| world.copy(2));
        drop(world.tracker.claim_next(1));
        writer.join().unwrap();
        copier.join().unwrap();
        world.assert_target_is_the_instant();
    });
}

#[test]
fn what_is_given_back_wakes_copiers_and_writers() {
    check(|| {
        let world = World::new(2);
        let mut claim = world.tracker.claim_next(2).unwrap();
        let copier = spawn(&world, |world| world.copy(2));
        let writer = spawn(&world, |world| world.write(range(1, 1), 2));
        claim.shrink(1);
        writer.join().unwrap();
        world.target[0].store(world.source[0].load(Ordering::Relaxed), Ordering::Relaxed);
        claim.finish(true);
        copier.join().unwrap();
        world.assert_target_is_the_instant();
    });
}

#[test]
fn clusters_that_are_finished_without_a_read_let_writers_pass() {
    check(|| {
        let world = World::new(1);
        let claim = world.tracker.claim_next(1).unwrap();
        let writer = spawn(&world, |world| world.write(range(0, 1), 2));
        world.target[0].store(world.source[0].load(Ordering::Relaxed), Ordering::Relaxed);
        claim.finish(true);
        writer.join().unwrap();
        world.assert_target_is_the_instant();
    });
}

#[test]
fn failed_capture_is_tried_again_by_who_waits_for_it() {
    check(|| {
        let world = World::new(1);
        let writer = spawn(&world, |world| {
            // Its own write fails, and does not happen.
            let granted = world.tracker.before_write(range(0, 1), |_| Err("full"));
            assert!(granted == Err("full") || granted == Ok(Granted::Write));
        });
        let other = spawn(&world, |world| world.write(range(0, 1), 2));
        world.copy(1);
        writer.join().unwrap();
        other.join().unwrap();
        world.assert_target_is_the_instant();
    });
}

#[test]
fn stop_lets_everybody_go() {
    check(|| {
        let world = World::new(2);
        let held = world.tracker.claim_next(1).unwrap();
        let writer = spawn(&world, |world| {
            let granted = world.tracker.before_write(range(0, 2), |run| world.save(run));
            assert_eq!(granted, Ok(Granted::Stopped));
        });
        let copier = spawn(&world, |world| world.copy(2));
        world.tracker.stop();
        writer.join().unwrap();
        copier.join().unwrap();
        drop(held);
        assert!(!world.tracker.is_done());
    });
}

#[test]
fn loss_of_the_instant_lets_everybody_go() {
    check(|| {
        let world = World::new(2);
        let other = world.tracker.claim_next(1).unwrap();
        let mut lost = world.tracker.claim_next(1).unwrap();
        let writer = spawn(&world, |world| {
            let granted = world.tracker.before_write(range(0, 1), |run| world.save(run));
            assert_eq!(granted, Ok(Granted::Stopped));
        });
        let copier = spawn(&world, |world| assert!(world.tracker.claim_next(1).is_none()));
        lost.source_read();
        drop(lost);
        writer.join().unwrap();
        copier.join().unwrap();
        other.finish(true);
        assert!(world.tracker.is_lost() && !world.tracker.is_done());
    });
}

#[test]
fn map_attached_during_the_job_misses_nothing() {
    check(|| {
        let world = World::new(2);
        let late = Arc::new(Bits((0..2).map(|_| AtomicBool::new(false)).collect()));
        let copier = spawn(&world, |world| world.copy(1));
        world.tracker.attach_free_map(late.clone());
        copier.join().unwrap();
        assert!(late.0.iter().all(|bit| bit.load(Ordering::Acquire)));
        world.assert_target_is_the_instant();
    });
}
