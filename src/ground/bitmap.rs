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

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn naive_runs(bits: &[bool], within: Clusters, wanted: bool) -> Vec<Clusters> {
        let mut runs: Vec<Clusters> = Vec::new();
        for bit in within.filter(|&bit| bits[bit as usize] == wanted) {
            match runs.last_mut() {
                Some(run) if run.end == bit => run.end += 1,
                _ => runs.push(bit..bit + 1),
            }
        }
        runs
    }

    /// Three cuts into `len` bits, in order.
    fn cuts(len: u64) -> impl Strategy<Value = [u64; 3]> {
        [0..=len, 0..=len, 0..=len].prop_map(|mut cuts| {
            cuts.sort_unstable();
            cuts
        })
    }

    proptest! {
        #![proptest_config(crate::ground::cases(500))]

        #[test]
        fn bitmap_agrees_with_a_vec_of_bool(
            (len, changes, asked) in (0..400u64).prop_flat_map(|len| {
                (Just(len), prop::collection::vec((cuts(len), any::<bool>()), 0..12), cuts(len))
            }),
        ) {
            let mut bitmap = Bitmap::new(len);
            let mut naive = vec![false; len as usize];
            for ([start, end, _], value) in changes {
                if value { bitmap.set(start..end) } else { bitmap.clear(start..end) }
                naive[start as usize..end as usize].fill(value);
            }
            prop_assert_eq!(bitmap.len(), len);
            prop_assert_eq!(bitmap.is_empty(), len == 0);
            prop_assert_eq!(bitmap.count_ones(), naive.iter().filter(|&&bit| bit).count() as u64);
            prop_assert!((0..len).all(|bit| bitmap.get(bit) == naive[bit as usize]));
            let [from, _, end] = asked;
            let find = |wanted: bool| (from..end).find(|&bit| naive[bit as usize] == wanted);
            prop_assert_eq!(bitmap.next_set(from, end), find(true));
            prop_assert_eq!(bitmap.next_clear(from, end), find(false));
            prop_assert_eq!(bitmap.runs(from..end).collect::<Vec<_>>(), naive_runs(&naive, from..end, true));
            prop_assert_eq!(bitmap.clear_runs(from..end).collect::<Vec<_>>(), naive_runs(&naive, from..end, false));
        }
    }

    #[test]
    fn search_past_the_end_finds_nothing() {
        assert!(Bitmap::new(0).is_empty());
        let mut bitmap = Bitmap::new(65);
        bitmap.set(0..65);
        assert_eq!(bitmap.next_set(64, u64::MAX), Some(64));
        assert_eq!(bitmap.next_set(65, u64::MAX), None);
        assert_eq!(bitmap.next_clear(0, u64::MAX), None);
        assert_eq!(bitmap.next_set(u64::MAX, u64::MAX), None);
    }
}
