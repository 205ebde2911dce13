//! A bitmap with runs: one bit a cluster.

use super::cluster::Clusters;

const WORD: u64 = u64::BITS as u64;

/// `len` bits, all clear at first. Pages that were never set cost no memory.
#[derive(Clone, Debug)]
pub struct Bitmap {
    words: Vec<u64>,
    len: u64,
    ones: u64,
}

impl Bitmap {
    /// `len` clear bits.
    pub fn new(len: u64) -> Self {
        Self { words: vec![0; len.div_ceil(WORD) as usize], len, ones: 0 }
    }

    /// Number of bits.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Has no bit at all.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Number of bits that are set.
    pub fn count_ones(&self) -> u64 {
        self.ones
    }

    /// Is `bit` set?
    pub fn get(&self, bit: u64) -> bool {
        debug_assert!(bit < self.len, "bit {bit} of {}", self.len);
        self.words[(bit / WORD) as usize] >> (bit % WORD) & 1 == 1
    }

    /// Sets a run of bits.
    pub fn set(&mut self, bits: Clusters) {
        self.each_word(bits, |word, mask| *word |= mask);
    }

    /// Clears a run of bits.
    pub fn clear(&mut self, bits: Clusters) {
        self.each_word(bits, |word, mask| *word &= !mask);
    }

    fn each_word(&mut self, bits: Clusters, change: impl Fn(&mut u64, u64)) {
        debug_assert!(bits.end <= self.len, "bits {bits:?} of {}", self.len);
        let mut bit = bits.start;
        while bit < bits.end {
            let stop = bits.end.min((bit / WORD + 1) * WORD);
            let mask = (u64::MAX >> (WORD - (stop - bit))) << (bit % WORD);
            let word = &mut self.words[(bit / WORD) as usize];
            let before = word.count_ones();
            change(word, mask);
            self.ones = self.ones + u64::from(word.count_ones()) - u64::from(before);
            bit = stop;
        }
    }

    /// First set bit at or after `from`, before `end`.
    pub fn next_set(&self, from: u64, end: u64) -> Option<u64> {
        self.find(from, end, |word| word)
    }

    /// First clear bit at or after `from`, before `end`.
    pub fn next_clear(&self, from: u64, end: u64) -> Option<u64> {
        self.find(from, end, |word| !word)
    }

    /// The runs of set bits in `within`, in order.
    pub fn runs(&self, within: Clusters) -> impl Iterator<Item = Clusters> + '_ {
        let Clusters { mut start, end } = within;
        std::iter::from_fn(move || {
            let first = self.next_set(start, end)?;
            start = self.next_clear(first, end).unwrap_or(end);
            Some(first..start)
        })
    }

    /// The runs of clear bits in `within`, in order.
    pub fn clear_runs(&self, within: Clusters) -> impl Iterator<Item = Clusters> + '_ {
        let Clusters { mut start, end } = within;
        std::iter::from_fn(move || {
            let first = self.next_clear(start, end)?;
            start = self.next_set(first, end).unwrap_or(end);
            Some(first..start)
        })
    }

    fn find(&self, from: u64, end: u64, wanted: impl Fn(u64) -> u64) -> Option<u64> {
        let end = end.min(self.len);
        let mut bit = from;
        while bit < end {
            let rest = wanted(self.words[(bit / WORD) as usize]) >> (bit % WORD);
            if rest != 0 {
                return Some(bit + u64::from(rest.trailing_zeros())).filter(|&found| found < end);
            }
            bit = (bit / WORD + 1) * WORD;
        }
        None
    }
}
