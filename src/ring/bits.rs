//! The shared bitmap: one bit a cluster, 1 when a writer may overwrite it without asking. Bits only go from 0 to 1.
//!
//! The backup sets a bit with release order after the cluster's old contents are in memory or in the overlay; the
//! writer reads it with acquire order before it touches the disk. So no read of the old contents is still to come.

use crate::ground::cluster::Clusters;
use crate::sync::atomic::{AtomicU64, Ordering};

const WORD: u64 = u64::BITS as u64;

fn mask(clusters: &Clusters, word: u64) -> u64 {
    let first = clusters.start.max(word * WORD) - word * WORD;
    let end = clusters.end.min((word + 1) * WORD) - word * WORD;
    (u64::MAX >> (WORD - (end - first))) << first
}

fn words_of(clusters: &Clusters) -> std::ops::Range<u64> {
    if clusters.is_empty() { 0..0 } else { clusters.start / WORD..(clusters.end - 1) / WORD + 1 }
}

/// Sets the bits of `clusters`. May run in several threads.
pub fn free(words: &[AtomicU64], clusters: Clusters) {
    for word in words_of(&clusters) {
        words[word as usize].fetch_or(mask(&clusters, word), Ordering::Release);
    }
}

/// The first of `clusters` whose bit is not set: a write there has to ask.
#[inline]
pub fn first_held(words: &[AtomicU64], clusters: Clusters) -> Option<u64> {
    for word in words_of(&clusters) {
        let held = !words[word as usize].load(Ordering::Acquire) & mask(&clusters, word);
        if held != 0 {
            return Some(word * WORD + u64::from(held.trailing_zeros()));
        }
    }
    None
}

#[cfg(all(test, not(any(loom, shuttle))))]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #![proptest_config(crate::ground::cases(256))]

        #[test]
        fn bits_are_those_of_a_plain_model(
            frees in prop::collection::vec((0..300_u64, 0..300_u64), 0..8),
            looks in prop::collection::vec((0..300_u64, 0..300_u64), 1..20),
        ) {
            let words: Vec<_> = (0..5).map(|_| AtomicU64::new(0)).collect();
            let mut model = [false; 320];
            for (a, b) in frees {
                let clusters = a.min(b)..a.max(b);
                model[clusters.start as usize..clusters.end as usize].fill(true);
                free(&words, clusters);
            }
            for (a, b) in looks {
                let clusters = a.min(b)..a.max(b);
                let expected = clusters.clone().find(|&c| !model[c as usize]);
                prop_assert_eq!(first_held(&words, clusters), expected);
            }
        }
    }
}
