//! Which parts of a buffer are zero.

use std::ops::Range;

/// Are all bytes zero? At the speed of a comparison: the buffer is compared with itself, one byte on.
pub fn is_zero(bytes: &[u8]) -> bool {
    match bytes {
        [] => true,
        // Most data shows itself in its first byte.
        [first, rest @ ..] => *first == 0 && *rest == bytes[..rest.len()],
    }
}

/// Cuts `bytes` into runs that are zero or not, in order, judged by blocks of `block` bytes (the last may be shorter).
pub fn runs(bytes: &[u8], block: usize) -> impl Iterator<Item = (Range<usize>, bool)> {
    let mut start = 0;
    std::iter::from_fn(move || {
        let mut blocks = bytes[start..].chunks(block).map(|block| (block.len(), is_zero(block)));
        let (mut length, zero) = blocks.next()?;
        length += blocks.take_while(|&(_, other)| other == zero).map(|(length, _)| length).sum::<usize>();
        start += length;
        Some((start - length..start, zero))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn one_byte_anywhere_is_seen() {
        for length in 1..40 {
            assert!(is_zero(&vec![0; length]));
            for at in 0..length {
                let mut bytes = vec![0; length];
                bytes[at] = 1;
                assert!(!is_zero(&bytes), "byte {at} of {length}");
            }
        }
        assert!(is_zero(&[]));
    }

    proptest! {
        #![proptest_config(crate::ground::cases(256))]

        #[test]
        fn runs_alternate_and_cover_everything(blocks in proptest::collection::vec(any::<bool>(), 0..40), tail in 0usize..7) {
            let mut bytes: Vec<u8> = blocks.iter().flat_map(|&set| [0, 0, 0, 0, 0, 0, u8::from(set)]).collect();
            bytes.extend(vec![0; tail]);
            let mut end = 0;
            let mut last = None;
            for (run, zero) in runs(&bytes, 7) {
                prop_assert_eq!(run.start, end);
                prop_assert!(!run.is_empty() && last != Some(zero), "runs alternate");
                prop_assert!(bytes[run.clone()].chunks(7).all(|block| is_zero(block) == zero));
                (end, last) = (run.end, Some(zero));
            }
            prop_assert_eq!(end, bytes.len());
        }
    }
}
