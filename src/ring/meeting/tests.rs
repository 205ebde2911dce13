use super::*;
use std::cell::{Cell, RefCell};

/// A folder and a door in which everything happens by a script.
#[derive(Default)]
struct World {
    /// Whom each look into the folder finds.
    looks: RefCell<Vec<Vec<u64>>>,
    attached: RefCell<Vec<u64>>,
    /// Who attaches while the writer waits.
    arriving: RefCell<Vec<u64>>,
    /// Who is waited for.
    patient: Vec<u64>,
    shut: Cell<bool>,
    marked: RefCell<Vec<u64>>,
}

impl Place for World {
    type Error = &'static str;

    fn backups(&self) -> Result<Vec<Announced>, &'static str> {
        let numbers = self.looks.borrow_mut().remove(0);
        Ok(numbers.into_iter().map(|number| Announced { number, patience: Duration::ZERO }).collect())
    }

    fn mark_unattached(&self, number: u64) -> Result<(), &'static str> {
        assert!(self.shut.get(), "until then it may attach");
        self.marked.borrow_mut().push(number);
        Ok(())
    }
}

impl Door for World {
    fn attached(&self) -> Vec<u64> {
        self.attached.borrow().clone()
    }

    fn waits_for(&self, backup: &Announced) -> bool {
        self.patient.contains(&backup.number)
    }

    fn wait(&self, count: usize) {
        assert_eq!(count, self.attached.borrow().len());
        let number = self.arriving.borrow_mut().remove(0);
        self.attached.borrow_mut().push(number);
    }

    fn shut(&self) {
        self.shut.set(true);
    }
}

/// A world, after a writer has started in it.
fn met(world: World) -> World {
    assert_eq!(join(&world, &world, || Ok("listening")), Ok("listening"));
    assert!(world.shut.get() && world.looks.borrow().is_empty());
    world
}

#[test]
fn who_comes_after_the_instant_is_admitted_only_while_the_door_is_open() {
    assert!(admits(true, true) && admits(true, false) && admits(false, false));
    assert!(!admits(false, true));
}

#[test]
fn a_backup_that_is_waited_for_attaches_and_gets_no_sign() {
    let world = met(World {
        looks: vec![vec![7, 8], vec![7, 8], vec![7, 8], vec![7, 8]].into(),
        arriving: vec![8, 7].into(),
        patient: vec![7, 8],
        ..World::default()
    });
    assert_eq!(*world.attached.borrow(), [8, 7]);
    assert!(world.marked.borrow().is_empty());
}

#[test]
fn those_that_have_not_attached_in_time_get_a_sign() {
    let world =
        met(World { looks: vec![vec![7, 8, 9], vec![7, 8, 9]].into(), attached: vec![8].into(), ..World::default() });
    assert_eq!(*world.marked.borrow(), [7, 9]);
}

#[test]
fn who_died_meanwhile_and_who_came_only_now_get_none() {
    let world = met(World { looks: vec![vec![7, 8], vec![8, 9]].into(), ..World::default() });
    assert_eq!(*world.marked.borrow(), [8]);
}

#[test]
fn a_writer_that_cannot_listen_looks_for_nobody() {
    let world = World::default();
    assert_eq!(join(&world, &world, || Err::<(), _>("no socket")), Err("no socket"));
    assert!(!world.shut.get());
}
