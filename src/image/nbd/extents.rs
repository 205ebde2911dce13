//! What servers said of ranges, kept for a while: one question is answered for many chunks.

use crate::ground::range::{Allocation, ByteRange, Extent};
use crate::nbd::protocol::allocation;
use std::collections::VecDeque;
use std::sync::Mutex;

/// Answers that are kept: threads work in a few places of the disk at once.
const ANSWERS: usize = 8;

/// The last answers.
#[derive(Debug, Default)]
pub struct Extents {
    answers: Mutex<VecDeque<Answer>>,
}

#[derive(Debug)]
struct Answer {
    range: ByteRange,
    /// Ends, ascending; neighbours differ.
    runs: Vec<(u64, Allocation)>,
}

impl Extents {
    /// The first extent of `range`, if an answer covers its first byte.
    pub fn find(&self, range: ByteRange) -> Option<Extent> {
        let answers = self.answers.lock().expect("nothing panics under this lock");
        let found = answers
            .iter()
            .rev()
            .find(|answer| answer.range.offset <= range.offset && range.offset < answer.range.end())?;
        let at = found.runs.partition_point(|(end, _)| *end <= range.offset);
        let (end, allocation) = found.runs[at];
        Some(Extent { range: ByteRange::between(range.offset, end.min(range.end())), allocation })
    }

    /// A server's answer about the bytes from `offset`: lengths and flags. What goes past `end` is left out.
    pub fn keep(&self, offset: u64, end: u64, told: &[(u32, u32)]) {
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
        let mut answers = self.answers.lock().expect("nothing panics under this lock");
        answers.push_back(Answer { range: ByteRange::between(offset, at), runs });
        if answers.len() > ANSWERS {
            answers.pop_front();
        }
    }

    /// Something was written.
    pub fn forget(&self) {
        self.answers.lock().expect("nothing panics under this lock").clear();
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
        extents.keep(100, 1000, &[(100, 3), (50, 2), (50, 0), (100, 1), (5000, 3)]);
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
            extents.keep(at * 10, 1000, &[(10, 0)]);
        }
        assert_eq!(extents.find(ByteRange::new(0, 1)), None);
        assert!(extents.find(ByteRange::new(190, 1)).is_some());
        assert_eq!(extents.answers.lock().unwrap().len(), ANSWERS);
    }
}
