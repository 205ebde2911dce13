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
        region.post(31, ByteRange::new(0, 1), &Never);
        assert_eq!(region.take(usize::MAX), Some(31));
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

    /// Keeps a log, and calls `step` with its length before each entry.
    struct Scripted<'r, F: Fn(usize)> {
        region: &'r Region,
        step: F,
        log: std::cell::RefCell<Vec<String>>,
    }

    fn scripted<F: Fn(usize)>(region: &Region, step: F) -> Scripted<'_, F> {
        Scripted { region, step, log: std::cell::RefCell::default() }
    }

    impl<F: Fn(usize)> Scripted<'_, F> {
        fn note(&self, verb: &str, word: &AtomicU32) {
            let posted = std::ptr::eq(word, &raw const self.region.posted.0);
            let slot = self.region.slots.iter().position(|slot| std::ptr::eq(word, &raw const slot.state));
            let word = slot.map_or(if posted { "posted".to_owned() } else { "?".to_owned() }, |slot| slot.to_string());
            self.happens(format!("{verb} {word}"));
        }

        fn happens(&self, what: String) {
            let count = self.log.borrow().len();
            (self.step)(count);
            self.log.borrow_mut().push(what);
        }

        fn took(&self) -> Vec<String> {
            self.log.take()
        }
    }

    impl<F: Fn(usize)> Patience for Scripted<'_, F> {
        /// Twice in a row.
        fn spin(&mut self) -> bool {
            self.happens(format!("spin, attentive {}", self.region.attentive.0.load(Ordering::Relaxed)));
            !self.log.borrow().len().is_multiple_of(3)
        }
        /// For ten events.
        fn sleep(&mut self, word: &AtomicU32, expected: u32) -> bool {
            self.note(&format!("sleep at {expected}"), word);
            self.log.borrow().len() < 10
        }
        fn wake(&self, word: &AtomicU32) {
            self.note("wake", word);
        }
    }

    const BYTE: ByteRange = ByteRange::new(0, 1);

    #[test]
    fn a_post_wakes_a_server_unless_one_is_looking() {
        let region = Region::new();
        let patience = scripted(&region, |_| {});
        region.post(3, BYTE, &patience);
        assert_eq!((patience.took(), region.posted()), (vec!["wake posted".to_owned()], 1 << 3));
        region.attentive.0.store(1, Ordering::Relaxed);
        region.post(4, BYTE, &patience);
        assert_eq!((patience.took().len(), region.posted()), (0, 3 << 3));
    }

    #[test]
    fn an_answer_wakes_who_sleeps_and_nobody_else() {
        let region = Region::new();
        let patience = scripted(&region, |_| {});
        region.post(2, BYTE, &Never);
        region.answer(2, Answer::Granted, &patience).unwrap();
        assert_eq!(patience.took().len(), 0);
        region.post(2, BYTE, &Never);
        region.slots[2].state.store(state::ASLEEP, Ordering::Relaxed);
        region.answer(2, Answer::Granted, &patience).unwrap();
        assert_eq!(patience.took(), ["wake 2"]);
    }

    #[test]
    fn a_write_spins_first_and_then_sleeps_until_it_is_answered() {
        let (region, over) = (Region::new(), AtomicBool::new(false));
        region.post(2, BYTE, &Never);
        let mut patience = scripted(&region, |count| {
            if count == 3 {
                assert_eq!(region.slots[2].state.load(Ordering::Relaxed), state::ASLEEP);
                region.answer(2, Answer::Granted, &Never).unwrap();
            }
        });
        assert_eq!(region.await_answer(2, &over, &mut patience), Answer::Granted);
        assert_eq!(patience.took()[2..], ["spin, attentive 0", "sleep at 2 2"]);
    }

    #[test]
    fn at_the_end_everybody_who_waits_leaves_and_is_woken() {
        let (region, over) = (Region::new(), AtomicBool::new(false));
        let patience = scripted(&region, |_| {});
        for slot in [1, 2, 30] {
            region.post(slot, BYTE, &Never);
        }
        region.slots[30].state.store(state::ASLEEP, Ordering::Relaxed);
        region.answer(2, Answer::Refused(5), &Never).unwrap();
        region.end(&over, &patience);
        assert!(over.load(Ordering::Relaxed));
        // The answered one too: whoever answered it may not have lived to wake it.
        let all: Vec<_> = (0..SLOTS).map(|slot| format!("wake {slot}")).collect();
        assert_eq!(patience.took(), all);
        let answers = [1, 2, 30].map(|slot| region.await_answer(slot, &over, &mut Never));
        assert_eq!(answers, [Answer::Left, Answer::Refused(5), Answer::Left]);
    }

    #[test]
    fn a_server_spins_attentively_and_sleeps_until_something_is_posted() {
        let (region, over) = (Region::new(), AtomicBool::new(false));
        let mut patience = scripted(&region, |count| {
            if count == 3 {
                region.post(7, BYTE, &Never);
                region.post(8, BYTE, &Never);
            }
        });
        assert_eq!(region.next(0, &over, &mut patience), Some(7));
        let spin = "spin, attentive 1";
        // Who posted the other one may have woken nobody.
        assert_eq!(patience.took(), [spin, spin, spin, "sleep at 0 posted", "wake posted"]);
        assert_eq!(region.next(0, &over, &mut patience), Some(8));
        assert_eq!(patience.took().len(), 0);
    }

    #[test]
    fn what_is_posted_while_a_server_is_looking_is_taken_without_sleep() {
        let (region, over) = (Region::new(), AtomicBool::new(false));
        let mut patience = scripted(&region, |count| region.post(count, BYTE, &Never));
        assert_eq!(region.next(0, &over, &mut patience), Some(0));
        assert_eq!(patience.took(), ["spin, attentive 1"]);
        assert_eq!(region.attentive.0.load(Ordering::Relaxed), 0);
    }

    #[test]
    fn one_server_looks_and_the_others_sleep() {
        let (region, over) = (Region::new(), AtomicBool::new(false));
        region.attentive.0.store(1, Ordering::Relaxed);
        let mut patience = scripted(&region, |_| over.store(true, Ordering::Relaxed));
        assert_eq!(region.next(0, &over, &mut patience), None);
        assert_eq!(patience.took(), ["sleep at 0 posted"]);
        assert_eq!(region.attentive.0.load(Ordering::Relaxed), 1, "it looks still");
    }

    #[test]
    fn a_server_goes_when_all_is_over_or_the_time_is_up() {
        let (region, over) = (Region::new(), AtomicBool::new(false));
        let mut patience = scripted(&region, |_| over.store(true, Ordering::Relaxed));
        assert_eq!(region.next(0, &over, &mut patience), None);
        assert_eq!(patience.took(), ["spin, attentive 1"], "no sleep at the end");
        region.post(0, BYTE, &Never);
        assert_eq!(region.next(0, &over, &mut patience), None);
        let over = AtomicBool::new(false);
        region.take(0);
        assert_eq!(region.next(0, &over, &mut Never), None);
        // What comes in the last moment is taken.
        let mut patience = scripted(&region, |count| {
            if count == 9 {
                region.post(9, BYTE, &Never);
            }
        });
        assert_eq!(region.next(0, &over, &mut patience), Some(9));
    }

    #[test]
    fn each_server_may_be_asleep_at_the_end() {
        let region = Region::new();
        let patience = scripted(&region, |_| {});
        region.wake_servers(&patience);
        assert_eq!(patience.took(), vec!["wake posted"; SLOTS]);
    }

    #[test]
    fn an_entry_is_taken_once() {
        let region = Region::new();
        region.post(31, BYTE, &Never);
        assert!(!region.take_slot(30) && region.take_slot(31) && !region.take_slot(31));
        assert_eq!(region.posted(), 0);
    }

    #[test]
    fn fresh_memory_is_no_ring_until_it_is_labelled() {
        let region = Region::new();
        assert!(region.is_labelled());
        for word in [&region.magic, &region.version] {
            word.store(0, Ordering::Relaxed);
            assert!(!region.is_labelled());
        }
        region.label();
        assert!(region.is_labelled());
        region.magic.store(MAGIC, Ordering::Relaxed);
        region.version.store(VERSION + 1, Ordering::Relaxed);
        assert!(!region.is_labelled());
    }

    #[test]
    fn who_waits_for_a_place_is_woken_by_one_that_comes_back_and_by_the_end() {
        for ends in [false, true] {
            let (places, over) = (Places::default(), AtomicBool::new(false));
            let (ever, none) = (|| Duration::from_secs(3600), || Duration::ZERO);
            while places.take(none, &over).is_some() {}
            std::thread::scope(|scope| {
                let (asks, asked) = std::sync::mpsc::channel();
                let remaining = move || {
                    // With the lock held: what follows finds it asleep.
                    asks.send(()).unwrap();
                    ever()
                };
                let (places, over) = (&places, &over);
                let waiter = scope.spawn(move || places.take(remaining, over));
                asked.recv().unwrap();
                if ends {
                    over.store(true, Ordering::SeqCst);
                    places.wake_all();
                } else {
                    places.give_back(5);
                }
                assert_eq!(waiter.join().unwrap(), (!ends).then_some(5));
            });
        }
    }

    #[test]
    fn what_writers_count_is_read_back() {
        let region = Region::new();
        for counter in (0..99).chain([usize::MAX]) {
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
    use crate::sync::{Arc, check_model};
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
        check_model(3, 5_000, || {
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
        check_model(2, 5_000, || {
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
        check_model(2, 5_000, || {
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
        check_model(2, 5_000, || {
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
        check_model(3, 5_000, || {
            let shared = Shared::new();
            let other = shared.clone();
            let other = thread::spawn(move || assert_eq!(write(&other, 0), Answer::Left));
            shared.region.end(&shared.over, &Futex(shared.clone()));
            other.join().unwrap();
            assert_eq!(write(&shared, 1), Answer::Left);
        });
    }

    /// A backup that is killed the moment after its answer.
    struct Killed;

    impl Patience for Killed {
        fn spin(&mut self) -> bool {
            false
        }
        fn sleep(&mut self, _: &AtomicU32, _: u32) -> bool {
            false
        }
        fn wake(&self, _: &AtomicU32) {}
    }

    #[test]
    fn the_end_wakes_whom_a_backup_answered_and_did_not_live_to_wake() {
        check_model(3, 5_000, || {
            let shared = Shared::new();
            let writer = shared.clone();
            let writer = thread::spawn(move || drop(write(&writer, 0)));
            if let Some(slot) = shared.region.take(0) {
                shared.region.answer(slot, Answer::Granted, &Killed).unwrap();
            }
            shared.region.end(&shared.over, &Futex(shared.clone()));
            writer.join().unwrap();
        });
    }

    #[test]
    fn a_grant_and_the_end_may_meet() {
        check_model(2, 5_000, || {
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
        check_model(3, 5_000, || {
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
        check_model(3, 5_000, || {
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
