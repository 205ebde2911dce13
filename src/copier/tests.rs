use super::*;
use crate::ground::cluster::ClusterSize;
use crate::image::raw::Raw;
use crate::snapshot::copy_state::{CopyState, Plan};
use std::convert::Infallible;
use std::sync::mpsc::channel;

#[test]
fn a_processor_is_left_to_those_who_write() {
    for (processors, rest) in [(1, vec![1, 2, 3]), (2, vec![1, 2, 3]), (4, vec![3])] {
        let resting = |number| Manners::of_thread(number, processors).rests(1, Instant::now());
        assert_eq!((0..4).filter(|number| resting(*number)).collect::<Vec<_>>(), rest, "of {processors}");
    }
}

#[test]
fn a_spare_thread_rests_for_a_while_after_each_trapped_write() {
    let mut manners = Manners::of_thread(1, 2);
    let begin = Instant::now();
    let mut rests = |trapped, at| manners.rests(trapped, begin + at);
    assert!(!rests(0, Duration::ZERO));
    assert!(rests(1, LOOK) && rests(1, REST));
    assert!(!rests(1, LOOK + REST));
    assert!(rests(3, 2 * REST) && rests(4, 3 * REST - LOOK) && rests(4, 3 * REST));
    assert!(!rests(4, 4 * REST));
}

struct Deaf;

impl Monitor for Deaf {
    fn event(&self, _: Event<'_>) {}
}

const CLUSTER: u64 = 4 << 10;
const GRANULE: u64 = 64 << 10;

/// Moves what is overwritten of a disk of one granule until the end, at which one of its clusters is saved and the capture of
/// another is under way, and `goes_on` or not. Returns the target's first byte beside how it ended.
fn end_beside_a_capture(goes_on: bool) -> (Result<Losses>, u8) {
    let file = |byte: u8| {
        let image = Raw::fresh(tempfile::tempfile().unwrap(), GRANULE).unwrap();
        image.write_at(&[byte; GRANULE as usize], 0).unwrap();
        image
    };
    let (source, target, overlay) = (file(1), file(0), Overlay::in_memory(GRANULE, None).unwrap());
    let (job, plan) = (Job::new(None), Plan { granule: GRANULE, ascending: false });
    let tracker = Tracker::new(CopyState::new(GRANULE, ClusterSize::new(CLUSTER), plan));
    let save = |range: ByteRange| -> std::result::Result<(), Infallible> {
        overlay.save(&[1; CLUSTER as usize], range.offset).unwrap();
        Ok(())
    };
    tracker.before_write(ByteRange::new(0, 1), save).unwrap();
    let capture = if goes_on { Duration::from_secs(20) } else { Duration::from_millis(100) };
    let (on_source_error, on_target_error) = (OnError::Report, OnError::Report);
    let rules = Rules { granule: GRANULE, hole: None, on_source_error, on_target_error, capture };
    let ends = Ends { source: &source, overlay: Some(&overlay), target: &target, unallocated: None };
    let copier = Copier::new(&job, &Deaf, &tracker, ends, rules);
    let ((begun, begins), (let_go, held)) = (channel(), channel());
    let moved = thread::scope(|scope| {
        let let_go = &let_go;
        let tracker = &tracker;
        scope.spawn(move || {
            let _ = tracker.before_write(ByteRange::new(CLUSTER, 1), |range| {
                begun.send(()).unwrap();
                held.recv().unwrap();
                // Longer than the end takes that does not wait.
                thread::sleep(10 * LOOK);
                save(range)
            });
        });
        begins.recv().unwrap();
        job.cancel();
        let release = || {
            if goes_on {
                let_go.send(()).unwrap();
            }
            Ok(())
        };
        let moved = copier.run_until_cancelled(release);
        // One that hangs still.
        let _ = let_go.send(());
        moved
    });
    let mut first = [0];
    target.read_at(&mut first, 0).unwrap();
    (moved, first[0])
}

#[test]
fn what_is_saved_beside_a_capture_is_moved_when_that_has_ended() {
    let (moved, first) = end_beside_a_capture(true);
    moved.unwrap();
    assert_eq!(first, 1);
}

#[test]
fn what_is_saved_beside_a_capture_that_hangs_is_not_passed_over() {
    let (moved, first) = end_beside_a_capture(false);
    assert_eq!((moved.unwrap_err().kind(), first), (Kind::InstantLost, 0));
}
