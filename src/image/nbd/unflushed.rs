//! What a target's server has taken and not yet flushed. A server that was restarted may have lost it, and does not say
//! so; therefore it is kept here until a flush covers it, and written again after a reconnect.

use crate::ground::range::ByteRange;
use std::sync::Arc;

/// Bytes that are kept before a flush makes room.
pub const WINDOW: u64 = 64 << 20;
/// Kept for a range of zeroes.
const RANGE_COST: u64 = 64;

/// One change of the disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// Bytes at an offset.
    Bytes(u64, Arc<Vec<u8>>),
    /// Zeroes.
    Zeroes(ByteRange),
}

impl Change {
    fn cost(&self) -> u64 {
        match self {
            Self::Bytes(_, bytes) => bytes.len() as u64 + RANGE_COST,
            Self::Zeroes(_) => RANGE_COST,
        }
    }
}

/// The changes since the last flush that ended well, oldest first.
#[derive(Debug, Default)]
pub struct Unflushed {
    changes: Vec<Change>,
    cost: u64,
    /// Those that a flush under way covers come first.
    covered: usize,
    /// A change was made that is not kept here.
    has_forgotten: bool,
    /// Grows whenever the server may have been restarted.
    pub epoch: u64,
}

impl Unflushed {
    /// A change that the server has answered; `None`: too much to keep.
    pub fn add(&mut self, change: Option<Change>) {
        match change {
            Some(change) => {
                self.cost += change.cost();
                self.changes.push(change);
            }
            None => self.has_forgotten = true,
        }
    }

    /// Time to flush? While a flush is under way there is room for as much again, so that nobody waits for a slow one.
    pub fn is_full(&self) -> bool {
        self.cost >= if self.covered == 0 { WINDOW } else { 2 * WINDOW }
    }

    /// A flush begins: it covers what is here now.
    pub fn begin_flush(&mut self) {
        self.covered = self.changes.len();
    }

    /// It ended, well or not.
    pub fn end_flush(&mut self, is_good: bool) {
        let covered = std::mem::take(&mut self.covered);
        if is_good {
            let gone: u64 = self.changes.drain(..covered).map(|change| change.cost()).sum();
            self.cost -= gone;
        }
    }

    /// The server may have been restarted: every connection of `epoch` is void. False: that is known.
    pub fn lose(&mut self, epoch: u64) -> bool {
        let is_current = self.epoch == epoch;
        self.epoch += u64::from(is_current);
        is_current
    }

    /// What has to be written again; `None`: it is not known any more.
    pub fn to_restore(&self) -> Option<Vec<Change>> {
        (!self.has_forgotten).then(|| self.changes.clone())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn change(offset: u64, length: usize) -> Change {
        Change::Bytes(offset, Arc::new(vec![1; length]))
    }

    #[test]
    fn a_flush_covers_what_was_there_when_it_began() {
        let mut unflushed = Unflushed::default();
        unflushed.add(Some(change(0, 10)));
        unflushed.begin_flush();
        unflushed.add(Some(change(10, 10)));
        assert_eq!(unflushed.to_restore().unwrap().len(), 2);
        unflushed.end_flush(true);
        assert_eq!(unflushed.to_restore(), Some(vec![change(10, 10)]));
        unflushed.begin_flush();
        unflushed.end_flush(false);
        assert_eq!(unflushed.to_restore(), Some(vec![change(10, 10)]));
    }

    #[test]
    fn what_was_not_kept_cannot_be_restored() {
        let mut unflushed = Unflushed::default();
        assert_eq!(unflushed.to_restore(), Some(Vec::new()));
        unflushed.add(None);
        assert_eq!(unflushed.to_restore(), None);
    }

    #[test]
    fn a_full_window_asks_for_one_flush() {
        let mut unflushed = Unflushed::default();
        assert!(!unflushed.is_full());
        unflushed.add(Some(change(0, WINDOW as usize)));
        assert!(unflushed.is_full());
        unflushed.begin_flush();
        assert!(!unflushed.is_full());
        unflushed.add(Some(change(0, WINDOW as usize)));
        assert!(unflushed.is_full(), "what is kept is bounded, however slow the flush");
        unflushed.end_flush(true);
        assert!(unflushed.is_full(), "the next flush is due");
        unflushed.begin_flush();
        unflushed.end_flush(true);
        assert_eq!(unflushed.cost, 0);
    }
}
