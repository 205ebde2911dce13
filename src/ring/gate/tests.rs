//! The gate under a model checker, and its plain facts.

use super::*;

#[cfg(not(any(loom, shuttle)))]
mod plain {
    use super::*;

    #[test]
    fn a_write_may_begin_and_end_on_different_threads() {
        let gate = Gate::default();
        assert_eq!(gate.enter(1), Passage::Open);
        gate.freeze();
        assert_eq!(gate.in_flight(), 1);
        assert!(gate.leave(2), "the freezer wants to know");
        assert_eq!(gate.in_flight(), 0);
    }

    #[test]
    fn nobody_enters_a_frozen_gate() {
        let gate = Gate::default();
        gate.freeze();
        assert_eq!(gate.enter(0), Passage::Frozen);
        assert_eq!(gate.in_flight(), 0);
        assert!(!gate.wait_thaw(Duration::from_millis(1)));
        gate.trap();
        assert!(gate.wait_thaw(Duration::from_secs(60)));
        assert_eq!(gate.enter(0), Passage::Trapping);
        assert!(!gate.leave(0), "nobody freezes");
    }

    #[test]
    fn a_look_says_what_an_entrant_would_find() {
        let gate = Gate::default();
        for (change, found) in
            [(Gate::open as fn(&Gate), Passage::Open), (Gate::freeze, Passage::Frozen), (Gate::trap, Passage::Trapping)]
        {
            change(&gate);
            assert_eq!((gate.look(), gate.enter(0)), (found, found));
            assert_eq!(gate.is_frozen(), found == Passage::Frozen);
        }
        gate.open();
        assert_eq!(gate.enter(0), Passage::Open);
    }

    #[test]
    fn threads_of_any_number_are_counted_before_a_freeze_and_in_one() {
        let gate = Gate::default();
        for (mine, before) in [0, COUNTERS - 1, COUNTERS, usize::MAX].into_iter().zip((0..).step_by(2)) {
            gate.open();
            assert_eq!(gate.enter(mine), Passage::Open);
            gate.freeze();
            gate.enter_frozen(mine);
            assert_eq!(gate.in_flight(), before + 2);
        }
        assert!(gate.leave(usize::MAX));
        assert_eq!(gate.in_flight(), 7);
    }
}

#[cfg(any(loom, shuttle))]
mod model {
    use super::*;
    use crate::sync::{Arc, check_model};
    #[cfg(loom)]
    use loom::thread;
    #[cfg(shuttle)]
    use shuttle::thread;

    #[derive(Default)]
    struct Shared {
        gate: Gate,
        rung: Mutex<bool>,
        bell: Condvar,
        disk: Disk,
    }

    #[cfg(loom)]
    #[derive(Default)]
    struct Disk(loom::cell::UnsafeCell<()>);
    #[cfg(shuttle)]
    #[derive(Default)]
    struct Disk(AtomicU32);

    impl Disk {
        fn write(&self) {
            #[cfg(loom)]
            self.0.with_mut(|_| ());
            #[cfg(shuttle)]
            {
                assert_eq!(self.0.fetch_add(1, Ordering::SeqCst), 0, "alone");
                thread::yield_now();
                self.0.fetch_sub(1, Ordering::SeqCst);
            }
        }

        fn instant(&self) {
            #[cfg(loom)]
            self.0.with(|_| ());
            #[cfg(shuttle)]
            assert_eq!(self.0.load(Ordering::SeqCst), 0, "nobody writes at the instant");
        }
    }

    impl Shared {
        fn ring(&self) {
            *self.rung.lock().unwrap() = true;
            self.bell.notify_one();
        }

        fn enter(&self, mine: usize) -> Passage {
            loop {
                match self.gate.enter(mine) {
                    Passage::Frozen => {
                        self.ring();
                        self.gate.wait_thaw(Duration::MAX);
                    }
                    passage => return passage,
                }
            }
        }

        fn leave(&self, mine: usize) {
            if self.gate.leave(mine) {
                self.ring();
            }
        }

        fn instant(&self) {
            self.gate.freeze();
            while self.gate.in_flight() != 0 {
                let mut rung = self.rung.lock().unwrap();
                while !*rung {
                    rung = self.bell.wait(rung).unwrap();
                }
                *rung = false;
            }
            self.disk.instant();
            self.gate.trap();
        }
    }

    #[test]
    fn nothing_is_in_flight_at_the_instant() {
        check_model(3, 5_000, || {
            let shared = Arc::new(Shared::default());
            let writer = shared.clone();
            let writer = thread::spawn(move || {
                writer.enter(0);
                writer.disk.write();
                writer.leave(0);
            });
            shared.instant();
            writer.join().unwrap();
        });
    }

    #[test]
    fn a_write_that_changes_threads_is_in_flight_until_its_end() {
        check_model(3, 5_000, || {
            let shared = Arc::new(Shared::default());
            let writer = shared.clone();
            let writer = thread::spawn(move || {
                writer.enter(1);
                let other = writer.clone();
                thread::spawn(move || {
                    other.disk.write();
                    other.leave(0);
                })
                .join()
                .unwrap();
            });
            shared.instant();
            writer.join().unwrap();
        });
    }

    #[test]
    fn a_write_that_does_not_ask_came_before_the_instant() {
        check_model(3, 5_000, || {
            let shared = Arc::new(Shared::default());
            let after = Arc::new(crate::sync::atomic::AtomicBool::new(false));
            let (writer, passed) = (shared.clone(), after.clone());
            let writer = thread::spawn(move || {
                if writer.enter(0) == Passage::Open {
                    assert!(!passed.load(Ordering::SeqCst), "open after the instant");
                }
                writer.leave(0);
            });
            shared.gate.freeze();
            while shared.gate.in_flight() != 0 {
                let mut rung = shared.rung.lock().unwrap();
                while !*rung {
                    rung = shared.bell.wait(rung).unwrap();
                }
                *rung = false;
            }
            after.store(true, Ordering::SeqCst);
            shared.gate.trap();
            writer.join().unwrap();
        });
    }
}
