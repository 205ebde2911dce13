//! The ring under a model checker: loom looks at every order of every access, shuttle at many random ones.

use super::*;

#[cfg(not(any(loom, shuttle)))]
mod plain {
    use super::*;
    use crate::ring::layout::{LINE, at};
    use std::mem::{offset_of, size_of};

    struct Never;
    impl Patience for Never {
        fn spin(&mut self) -> bool {
            false
        }
        fn sleep(&mut self, _: &AtomicU32, _: u32) -> bool {
            false
        }
        fn wake(&self, _: &AtomicU32) {}
    }

    #[test]
    fn the_structures_lie_where_the_layout_says() {
        assert_eq!(offset_of!(Region, magic), at::MAGIC);
        assert_eq!(offset_of!(Region, posted), at::POSTED);
        assert_eq!(offset_of!(Region, attentive), at::ATTENTIVE);
        assert_eq!(offset_of!(Region, broken), at::BROKEN);
        assert_eq!(offset_of!(Region, counts) + offset_of!(Counts, trapped), at::TRAPPED);
        assert_eq!(offset_of!(Region, counts) + offset_of!(Counts, stall_max), at::STALL_MAX);
        assert_eq!(offset_of!(Region, writes), at::WRITES);
        assert_eq!(offset_of!(Region, stalls), at::STALLS);
        assert_eq!(offset_of!(Region, slots), at::SLOTS);
        assert_eq!(size_of::<Region>(), at::END);
        assert_eq!((size_of::<Slot>(), size_of::<Line<AtomicU64>>()), (LINE, LINE));
        assert_eq!(offset_of!(Slot, state), at::SLOT_STATE);
        assert_eq!(offset_of!(Slot, errno), at::SLOT_ERRNO);
        assert_eq!(offset_of!(Slot, offset), at::SLOT_OFFSET);
        assert_eq!(offset_of!(Slot, length), at::SLOT_LENGTH);
    }

    #[test]
    fn a_refusal_carries_its_errno_and_a_late_answer_changes_nothing() {
        let (region, over) = (Region::new(), AtomicBool::new(false));
        region.post(3, ByteRange::new(8, 9), &Never);
        assert_eq!((region.take(0), region.entry(3)), (Some(3), (8, 9)));
        region.answer(3, Answer::Refused(28), &Never).unwrap();
        assert_eq!(region.await_answer(3, &over, &mut Never), Answer::Refused(28));

        region.post(4, ByteRange::new(0, 1), &Never);
        assert_eq!(region.await_answer(4, &over, &mut Never), Answer::Left);
        region.answer(4, Answer::Granted, &Never).unwrap();
        assert_eq!(region.await_answer(4, &over, &mut Never), Answer::Left);
    }

    #[test]
    fn an_answer_to_a_slot_in_which_nobody_waits_is_unexpected() {
        let region = Region::new();
        assert_eq!(region.answer(0, Answer::Granted, &Never), Err(Unexpected));
        region.slots[0].state.store(77, Ordering::Relaxed);
        assert_eq!(region.answer(0, Answer::Granted, &Never), Err(Unexpected));
    }

    #[test]
    fn slots_are_taken_in_a_circle() {
        let region = Region::new();
        for slot in [0, 5, 31] {
            region.post(slot, ByteRange::new(0, 1), &Never);
        }
        assert_eq!(
            [region.take(6), region.take(0), region.take(1), region.take(2)],
            [Some(31), Some(0), Some(5), None]
        );
    }

    #[test]
    fn a_ring_has_places_for_as_many_writes_as_it_has_slots() {
        let (places, over) = (Places::default(), AtomicBool::new(false));
        let none = || Duration::ZERO;
        let mut taken: Vec<_> = (0..SLOTS).map(|_| places.take(none, &over).unwrap()).collect();
        assert_eq!(places.take(none, &over), None);
        places.give_back(taken[7]);
        assert_eq!(places.take(none, &over), Some(taken[7]));
        taken.sort_unstable();
        taken.dedup();
        assert_eq!(taken.len(), SLOTS);
        over.store(true, Ordering::SeqCst);
        places.give_back(0);
        assert_eq!(places.take(none, &over), None);
    }

    #[test]
    fn the_first_mark_stays() {
        let region = Region::new();
        assert_eq!(region.broken(), 0);
        region.mark_broken(Breach::NoAnswer);
        region.mark_broken(Breach::HungUp);
        assert_eq!(region.broken(), Breach::NoAnswer as u32);
    }

    #[test]
    fn what_writers_count_is_read_back() {
        let region = Region::new();
        for counter in 0..100 {
            region.count_write(counter);
        }
        region.count_stall(Duration::from_micros(50));
        region.count_stall(Duration::from_micros(70));
        assert_eq!(region.counted(), (100, 2));
        assert_eq!(region.stalls().max(), Duration::from_micros(70));
        let median = region.stalls().quantile(50);
        assert!(median >= Duration::from_micros(50) && median < Duration::from_micros(57), "{median:?}");
    }
}

/// The kernel's futex as a lock and a condition variable for each word.
#[cfg(any(loom, shuttle))]
mod model {
    use super::*;
    use crate::sync::Arc;
    #[cfg(loom)]
    use loom::thread;
    #[cfg(shuttle)]
    use shuttle::thread;

    struct Shared {
        region: Region,
        over: AtomicBool,
        lock: Mutex<()>,
        sleepers: [Condvar; PLACES + 1],
        disk: Disk,
    }

    /// One cluster of the disk. loom reports every pair of accesses that nothing orders.
    #[cfg(loom)]
    type Disk = loom::cell::UnsafeCell<()>;
    #[cfg(shuttle)]
    type Disk = AtomicU32;

    impl Shared {
        fn new() -> Arc<Self> {
            Arc::new(Self {
                region: Region::new(),
                over: AtomicBool::new(false),
                lock: Mutex::new(()),
                sleepers: std::array::from_fn(|_| Condvar::new()),
                #[cfg(loom)]
                disk: Disk::new(()),
                #[cfg(shuttle)]
                disk: Disk::new(0),
            })
        }

        fn capture(&self) {
            #[cfg(loom)]
            self.disk.with(|_| ());
            #[cfg(shuttle)]
            assert_eq!(self.disk.load(Ordering::SeqCst), 0, "captured before it was overwritten");
        }

        fn overwrite(&self) {
            #[cfg(loom)]
            self.disk.with_mut(|_| ());
            #[cfg(shuttle)]
            self.disk.store(1, Ordering::SeqCst);
        }
    }

    struct Futex(Arc<Shared>);

    impl Futex {
        fn sleepers(&self, word: &AtomicU32) -> &Condvar {
            let region = &self.0.region;
            let slot = region.slots.iter().position(|slot| std::ptr::eq(&slot.state, word));
            assert!(slot.is_some() || std::ptr::eq(&region.posted.0, word));
            &self.0.sleepers[slot.map_or(0, |slot| slot + 1)]
        }
    }

    impl Patience for Futex {
        fn spin(&mut self) -> bool {
            false
        }

        fn sleep(&mut self, word: &AtomicU32, expected: u32) -> bool {
            let guard = self.0.lock.lock().unwrap();
            if word.load(Ordering::Relaxed) == expected {
                drop(self.sleepers(word).wait(guard).unwrap());
            }
            true
        }

        fn wake(&self, word: &AtomicU32) {
            let _guard = self.0.lock.lock().unwrap();
            self.sleepers(word).notify_one();
        }
    }

    /// A server that finds out by itself how attentive it is: it looks twice before it sleeps.
    struct Watching(Futex, bool);

    impl Patience for Watching {
        fn spin(&mut self) -> bool {
            std::mem::replace(&mut self.1, false)
        }
        fn sleep(&mut self, word: &AtomicU32, expected: u32) -> bool {
            self.1 = true;
            self.0.sleep(word, expected)
        }
        fn wake(&self, word: &AtomicU32) {
            self.0.wake(word);
        }
    }

    /// All orders with at most `preemptions` switches of a thread that could have gone on; as many as take seconds.
    fn check(preemptions: usize, model: impl Fn() + Send + Sync + 'static) {
        #[cfg(loom)]
        {
            let mut builder = loom::model::Builder::new();
            builder.preemption_bound = Some(preemptions);
            builder.check(model);
        }
        #[cfg(shuttle)]
        shuttle::check_random(model, 5_000 + preemptions);
    }

    fn write(shared: &Arc<Shared>, slot: usize) -> Answer {
        let mut futex = Futex(shared.clone());
        shared.region.post(slot, ByteRange::new(4096 * slot as u64 + 1, 7), &futex);
        shared.region.await_answer(slot, &shared.over, &mut futex)
    }

    fn serve(shared: &Arc<Shared>, capture: bool) -> bool {
        let mut patience = Watching(Futex(shared.clone()), true);
        let Some(slot) = shared.region.next(0, &shared.over, &mut patience) else { return false };
        assert_eq!(shared.region.entry(slot), (4096 * slot as u64 + 1, 7));
        if capture {
            shared.capture();
        }
        shared.region.answer(slot, Answer::Granted, &patience).unwrap();
        true
    }

    #[test]
    fn a_write_is_granted_after_its_capture() {
        check(3, || {
            let shared = Shared::new();
            let server = shared.clone();
            let server = thread::spawn(move || assert!(serve(&server, true)));
            assert_eq!(write(&shared, 1), Answer::Granted);
            shared.overwrite();
            server.join().unwrap();
        });
    }

    #[test]
    fn one_slot_serves_one_write_after_another() {
        check(2, || {
            let shared = Shared::new();
            let server = shared.clone();
            let server = thread::spawn(move || {
                serve(&server, true);
                serve(&server, false);
            });
            for _ in 0..2 {
                assert_eq!(write(&shared, 0), Answer::Granted);
                shared.overwrite();
            }
            server.join().unwrap();
        });
    }

    #[test]
    fn no_post_is_overslept_by_one_server() {
        check(2, || {
            let shared = Shared::new();
            let other = shared.clone();
            let other = thread::spawn(move || assert_eq!(write(&other, 0), Answer::Granted));
            let server = shared.clone();
            let server = thread::spawn(move || {
                serve(&server, false);
                serve(&server, false);
            });
            assert_eq!(write(&shared, 1), Answer::Granted);
            other.join().unwrap();
            server.join().unwrap();
        });
    }

    /// One server is kept busy by the first entry until the second is answered: the other server must get it.
    #[test]
    fn a_busy_server_does_not_keep_the_next_entry_waiting() {
        check(2, || {
            let shared = Shared::new();
            let servers: Vec<_> = (0..2)
                .map(|_| {
                    let shared = shared.clone();
                    thread::spawn(move || {
                        let mut patience = Watching(Futex(shared.clone()), true);
                        shared.region.next(0, &shared.over, &mut patience).unwrap()
                    })
                })
                .collect();
            let futex = Futex(shared.clone());
            shared.region.post(0, ByteRange::new(1, 7), &futex);
            shared.region.post(1, ByteRange::new(4097, 7), &futex);
            let mut taken: Vec<_> = servers.into_iter().map(|server| server.join().unwrap()).collect();
            taken.sort_unstable();
            assert_eq!(taken, [0, 1]);
        });
    }

    #[test]
    fn the_end_releases_who_waits_and_who_comes_later() {
        check(3, || {
            let shared = Shared::new();
            let other = shared.clone();
            let other = thread::spawn(move || assert_eq!(write(&other, 0), Answer::Left));
            shared.region.end(&shared.over, &Futex(shared.clone()));
            other.join().unwrap();
            assert_eq!(write(&shared, 1), Answer::Left);
        });
    }

    #[test]
    fn a_grant_and_the_end_may_meet() {
        check(2, || {
            let shared = Shared::new();
            let (server, ender) = (shared.clone(), shared.clone());
            let server = thread::spawn(move || serve(&server, true));
            let ender = thread::spawn(move || {
                let futex = Futex(ender.clone());
                ender.region.end(&ender.over, &futex);
                ender.region.wake_servers(&futex);
            });
            if write(&shared, 0) == Answer::Granted {
                shared.overwrite();
            }
            server.join().unwrap();
            ender.join().unwrap();
        });
    }

    #[test]
    fn who_reads_what_an_ungranted_write_wrote_finds_the_mark() {
        check(3, || {
            let shared = Shared::new();
            let disk = Arc::new(AtomicU32::new(0));
            let (writer, written) = (shared.clone(), disk.clone());
            let writer = thread::spawn(move || {
                writer.region.mark_broken(Breach::NoAnswer);
                written.store(1, Ordering::Relaxed);
            });
            let torn = disk.load(Ordering::Relaxed) == 1;
            assert!(!torn || shared.region.broken() != 0, "torn and not marked");
            writer.join().unwrap();
        });
    }

    #[test]
    fn a_free_bit_says_that_the_capture_is_over() {
        check(3, || {
            let shared = Shared::new();
            let bits = Arc::new([AtomicU64::new(0)]);
            let (server, shown) = (shared.clone(), bits.clone());
            let server = thread::spawn(move || {
                server.capture();
                crate::ring::bits::free(&*shown, 5..6);
            });
            if crate::ring::bits::first_held(&*bits, 5..6).is_none() {
                shared.overwrite();
            }
            server.join().unwrap();
        });
    }
}
