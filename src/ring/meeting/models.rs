//! A writer that starts, and a backup from its announcement to its end, in every order.

use super::*;
use crate::ring::gate::{Gate, Passage};
use crate::sync::{Arc, Condvar, Mutex, check_model};
#[cfg(loom)]
use loom::thread;
#[cfg(shuttle)]
use shuttle::thread;
use std::convert::Infallible;

const BACKUP: u64 = 7;
/// What the disk holds before the writer's write, and after it.
const OLD: u32 = 1;
const NEW: u32 = 2;

/// Names in the folder. The kernel gives all of them one order.
#[derive(Default)]
struct Names {
    announced: bool,
    listening: bool,
    marked: bool,
}

/// The writer's, under its control lock.
struct Control {
    open: bool,
    attached: Vec<u64>,
}

struct World {
    names: Mutex<Names>,
    control: Mutex<Control>,
    arrived: Condvar,
    gate: Gate,
    /// The one cluster, and what was saved of it.
    disk: Mutex<(u32, Option<u32>)>,
    is_patient: bool,
    /// The writer ends after its write.
    dies: bool,
}

struct Lost;

impl Place for World {
    type Error = Infallible;

    fn backups(&self) -> Result<Vec<Announced>, Infallible> {
        let announced = self.names.lock().unwrap().announced;
        Ok(announced.then_some(Announced { number: BACKUP, patience: Duration::MAX }).into_iter().collect())
    }

    fn mark_unattached(&self, number: u64) -> Result<(), Infallible> {
        assert_eq!(number, BACKUP);
        self.names.lock().unwrap().marked = true;
        Ok(())
    }
}

impl Door for World {
    fn attached(&self) -> Vec<u64> {
        self.control.lock().unwrap().attached.clone()
    }

    fn waits_for(&self, _: &Announced) -> bool {
        self.is_patient
    }

    /// The backup's end wakes it too, which a real writer sees when its moment is over.
    fn wait(&self, count: usize) {
        let mut control = self.control.lock().unwrap();
        while control.attached.len() <= count && self.names.lock().unwrap().announced {
            control = self.arrived.wait(control).unwrap();
        }
    }

    fn shut(&self) {
        self.control.lock().unwrap().open = false;
    }
}

impl World {
    fn new(is_patient: bool, dies: bool) -> Arc<Self> {
        Arc::new(Self {
            names: Mutex::default(),
            control: Mutex::new(Control { open: true, attached: Vec::new() }),
            arrived: Condvar::new(),
            gate: Gate::default(),
            disk: Mutex::new((OLD, None)),
            is_patient,
            dies,
        })
    }

    /// A writer's life: one write.
    fn write(&self) {
        let Ok(()) = join(self, self, || {
            self.names.lock().unwrap().listening = true;
            Ok(())
        });
        let passage = loop {
            match self.gate.enter(0) {
                Passage::Frozen => drop(self.gate.wait_thaw(Duration::MAX)),
                passage => break passage,
            }
        };
        let mut disk = self.disk.lock().unwrap();
        if passage == Passage::Trapping {
            disk.1 = disk.1.or(Some(disk.0));
        }
        disk.0 = NEW;
        drop(disk);
        let _ = self.gate.leave(0);
        if self.dies {
            self.names.lock().unwrap().listening = false;
        }
    }

    /// As `ring::server` attaches to a writer whose socket it finds: what the writer's thread does then is one step.
    fn scan(&self, is_linked: &mut bool, is_late: bool) -> Result<(), Lost> {
        if *is_linked || !self.names.lock().unwrap().listening {
            return Ok(());
        }
        let mut control = self.control.lock().unwrap();
        if !admits(control.open, is_late) {
            return Err(Lost);
        }
        if control.open {
            control.attached.push(BACKUP);
            self.arrived.notify_all();
        }
        if is_late {
            self.gate.trap();
        }
        *is_linked = true;
        Ok(())
    }

    /// The instant and the copy of it.
    fn copy(&self, is_linked: &mut bool) -> Result<(u32, u32), Lost> {
        self.names.lock().unwrap().announced = true;
        self.scan(is_linked, false)?;
        // The freeze looks once more.
        self.scan(is_linked, false)?;
        if *is_linked {
            self.gate.freeze();
            while self.gate.in_flight() != 0 {
                thread::yield_now();
            }
        }
        let instant = self.disk.lock().unwrap().0;
        if *is_linked {
            self.gate.trap();
        }
        // The lookout, and later the check before anything is published.
        self.scan(is_linked, true)?;
        let (source, saved) = *self.disk.lock().unwrap();
        if self.names.lock().unwrap().marked {
            return Err(Lost);
        }
        self.scan(is_linked, true)?;
        Ok((instant, saved.unwrap_or(source)))
    }

    fn back_up(&self) {
        let mut is_linked = false;
        if let Ok((instant, copy)) = self.copy(&mut is_linked) {
            assert_eq!(copy, instant, "a copy that is called good is as of its instant");
        }
        if is_linked {
            self.gate.open();
        }
        // Under the lock, so that who looks at the name sleeps already or sees that it is gone.
        let control = self.control.lock().unwrap();
        self.names.lock().unwrap().announced = false;
        drop(control);
        self.arrived.notify_all();
    }
}

fn meet(is_patient: bool, dies: bool) {
    check_model(3, 20_000, move || {
        let world = World::new(is_patient, dies);
        let writer = world.clone();
        let writing = thread::spawn(move || writer.write());
        world.back_up();
        writing.join().unwrap();
        assert_eq!(world.disk.lock().unwrap().0, NEW);
    });
}

#[test]
fn a_writer_and_a_backup_that_start_together_do_not_miss_each_other() {
    meet(true, false);
}

#[test]
fn a_writer_that_does_not_wait_makes_the_backup_fail() {
    meet(false, false);
}

#[test]
fn what_a_writer_wrote_that_is_gone_is_not_missed() {
    meet(true, true);
    meet(false, true);
}
