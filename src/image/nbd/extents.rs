//! What servers said of ranges, kept for a while: one question is answered for many chunks.

use crate::ground::range::{Allocation, ByteRange, Extent};
use crate::nbd::protocol::allocation;
use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard};

/// Answers that are kept: threads work in a few places of the disk at once.
const ANSWERS: usize = 8;

/// The last answers.
#[derive(Debug, Default)]
pub struct Extents {
    answers: Mutex<Answers>,
}

#[derive(Debug, Default)]
struct Answers {
    kept: VecDeque<Answer>,
    /// Grows with each change of the disk.
    state: u64,
}

/// What a server said of a range.
#[derive(Debug)]
pub struct Answer {
    range: ByteRange,
    /// Ends, ascending; neighbours differ.
    runs: Vec<(u64, Allocation)>,
}

impl Answer {
    /// About the bytes from `offset`: lengths and flags. What goes past `end` is left out.
    pub fn new(offset: u64, end: u64, told: &[(u32, u32)]) -> Self {
        let mut runs: Vec<(u64, Allocation)> = Vec::new();
        let mut at = offset;
        for (length, flags) in told {
            at = end.min(at + u64::from(*length));
            let allocation = if flags & allocation::ZERO != 0 { Allocation::Zero } else { Allocation::Data };
            match runs.last_mut() {
                Some(last) if last.1 == allocation => last.0 = at,
                _ => runs.push((at, allocation)),
            }
        }
        Self { range: ByteRange::between(offset, at), runs }
    }

    /// The first extent of `range`, if the answer covers its first byte.
    pub fn find(&self, range: ByteRange) -> Option<Extent> {
        if range.offset < self.range.offset || self.range.end() <= range.offset {
            return None;
        }
        let at = self.runs.partition_point(|(end, _)| *end <= range.offset);
        let (end, allocation) = self.runs[at];
        Some(Extent { range: ByteRange::between(range.offset, end.min(range.end())), allocation })
    }
}

impl Extents {
    /// The first extent of `range`, if an answer covers its first byte.
    pub fn find(&self, range: ByteRange) -> Option<Extent> {
        self.lock().kept.iter().rev().find_map(|answer| answer.find(range))
    }

    /// The disk as it is now, before a server is asked about it.
    pub fn state(&self) -> u64 {
        self.lock().state
    }

    /// Keeps an answer about the disk as it was in `state`, if it still is.
    pub fn keep(&self, state: u64, answer: Answer) {
        let mut answers = self.lock();
        if answers.state != state {
            return;
        }
        answers.kept.push_back(answer);
        if answers.kept.len() > ANSWERS {
            answers.kept.pop_front();
        }
    }

    /// The disk was changed: no answer of before holds, nor one that is under way.
    pub fn forget(&self) {
        let mut answers = self.lock();
        answers.state += 1;
        answers.kept.clear();
    }

    fn lock(&self) -> MutexGuard<'_, Answers> {
        self.answers.lock().expect("nothing panics under this lock")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_answer_serves_many_questions() {
        let extents = Extents::default();
        assert_eq!(extents.find(ByteRange::new(0, 1)), None);
        // A hole that does not read as zeroes is data.
        extents.keep(0, Answer::new(100, 1000, &[(100, 3), (50, 2), (50, 0), (100, 1), (5000, 3)]));
        let find = |offset, length| extents.find(ByteRange::new(offset, length));
        let zero = |offset, length| Some(Extent::zero(ByteRange::new(offset, length)));
        let data = |offset, length| Some(Extent::data(ByteRange::new(offset, length)));
        assert_eq!(find(99, 10), None);
        assert_eq!(find(100, 10), zero(100, 10));
        assert_eq!(find(150, 1000), zero(150, 100));
        assert_eq!(find(250, 1000), data(250, 150));
        assert_eq!(find(400, 5000), zero(400, 600));
        assert_eq!(find(1000, 1), None);
        extents.forget();
        assert_eq!(find(100, 10), None);
    }

    #[test]
    fn old_answers_make_room() {
        let extents = Extents::default();
        for at in 0..20u64 {
            extents.keep(0, Answer::new(at * 10, 1000, &[(10, 0)]));
        }
        assert_eq!(extents.find(ByteRange::new(0, 1)), None);
        assert!(extents.find(ByteRange::new(190, 1)).is_some());
        assert_eq!(extents.lock().kept.len(), ANSWERS);
    }
}
