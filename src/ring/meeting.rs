//! How a starting writer and a backup don't miss each other, whichever comes first.
//!
//! Both announce themselves first and look for the other then, so one of them at least sees the other:
//!
//! | the writer | the backup |
//! |---|---|
//! | listens | announces itself |
//! | waits for the backups that it sees, until they have attached or their time is up | attaches to the writers that it sees, once more before the instant, and to those that come later |
//! | shuts its door: who has an instant already is turned away | is turned away by one that may have written: the instant is lost |
//! | leaves a sign for each backup that it saw and that has not attached | looks for signs, and for writers, after its last read |
//! | writes | publishes |
//!
//! The writer's column is here; the backup's is `ring::server`.

use std::time::Duration;

/// A backup that has announced itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Announced {
    /// The number in its name.
    pub number: u64,
    /// How long a starting writer waits for it to attach.
    pub patience: Duration,
}

/// Where both meet, as a writer of one disk sees it.
pub trait Place {
    /// Why it can't be used.
    type Error;

    /// Backups that live.
    fn backups(&self) -> Result<Vec<Announced>, Self::Error>;

    /// Leaves a sign for the backup `number`: writes will happen without it.
    fn mark_unattached(&self, number: u64) -> Result<(), Self::Error>;
}

/// A starting writer's door, at which backups attach meanwhile.
pub trait Door {
    /// The numbers of those that have.
    fn attached(&self) -> Vec<u64>;

    /// Is there still time to wait for `backup`?
    fn waits_for(&self, backup: &Announced) -> bool;

    /// Blocks until more than `count` have attached, or for a moment.
    fn wait(&self, count: usize);

    /// From now on [`admits`] says no to who comes too late. Nobody is half attached when this returns.
    fn shut(&self);
}

/// May a backup attach? One whose instant has passed, `is_late`, may do so only while nothing has been written since.
pub fn admits(is_open: bool, is_late: bool) -> bool {
    is_open || !is_late
}

/// Listens with `listen`, then meets the backups that were there before. When this returns, each backup has attached,
/// has died, has a sign that tells it to fail, or looks for this writer before its instant. The writer may write.
///
/// Blocks as long as the door waits for one of them.
pub fn join<T, P: Place>(
    place: &P,
    door: &impl Door,
    listen: impl FnOnce() -> Result<T, P::Error>,
) -> Result<T, P::Error> {
    let listening = listen()?;
    let found = loop {
        let attached = door.attached();
        let mut found = place.backups()?;
        found.retain(|backup| !attached.contains(&backup.number));
        if !found.iter().any(|backup| door.waits_for(backup)) {
            break found;
        }
        door.wait(attached.len());
    };
    door.shut();
    let attached = door.attached();
    let unattached = |number| !attached.contains(&number) && found.iter().any(|backup| backup.number == number);
    // Of those that live still. One that was not there yet looks for us before its instant.
    for backup in place.backups()?.iter().filter(|backup| unattached(backup.number)) {
        place.mark_unattached(backup.number)?;
    }
    Ok(listening)
}

#[cfg(all(test, any(loom, shuttle)))]
mod models;
#[cfg(all(test, not(any(loom, shuttle))))]
mod tests;
