use super::*;
use proptest::prelude::*;
use std::sync::Arc;

/// Bytes that differ from place to place, with runs of zeroes.
fn content(length: usize, seed: u64) -> Vec<u8> {
    let mut state = seed | 1;
    let mut bytes = vec![0; length];
    for piece in bytes.chunks_mut(64 << 10) {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        if state >> 62 != 0 {
            piece.iter_mut().enumerate().for_each(|(at, byte)| *byte = (state >> (at % 7 * 8)) as u8 ^ at as u8);
        }
    }
    bytes
}

/// The sum of `bytes`, added in pieces of a multiple of `unit` in an order that `seed` says; holes are not looked at.
fn sum(bytes: &[u8], unit: usize, seed: u64, expected: Option<Arc<Digest>>) -> Found {
    let length = bytes.len() as u64;
    let sums =
        if expected.is_none() && seed & 2 == 0 { Sums::deferring(length, 100) } else { Sums::new(length, expected) };
    let mut state = seed | 1;
    let mut next = |below: usize| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state % below as u64) as usize
    };
    let (mut pieces, mut at) = (Vec::new(), 0);
    while at < bytes.len() {
        let length = (unit * (1 + next(40))).min(bytes.len() - at);
        pieces.push((at, length));
        at += length;
    }
    for at in (1..pieces.len()).rev() {
        pieces.swap(at, next(at + 1));
    }
    for (at, length) in pieces {
        let piece = &bytes[at..at + length];
        if crate::ground::zero::is_zero(piece) && next(2) == 0 {
            sums.add_zeroes(ByteRange::new(at as u64, length as u64));
        } else {
            sums.add(at as u64, piece);
        }
    }
    found(sums).expect("every byte was added")
}

fn found(sums: Sums) -> Option<Found> {
    sums.finish().and_then(|summed| summed.found(2, &|| true))
}

fn whole(found: &Found) -> blake3::Hash {
    found.whole.or_else(|| found.digest.whole(2, &|| true)).expect("nobody said stop")
}

proptest! {
    #![proptest_config(crate::ground::cases(10))]

    #[test]
    fn the_whole_is_blake3_of_all_bytes_whatever_the_order(
        length in prop_oneof![0usize..5000, 0usize..(9 << 20), (1usize..3).prop_map(|blocks| blocks << 22)],
        shift in 10u32..21,
        seed: u64,
    ) {
        let bytes = content(length, seed);
        let found = sum(&bytes, 1 << shift, seed, None);
        prop_assert_eq!(whole(&found), blake3::hash(&bytes));
        let again = sum(&bytes, 4096, !seed, Some(Arc::new(found.digest.clone())));
        prop_assert_eq!(&again.digest, &found.digest);
        prop_assert!(again.differing.is_empty());
    }

    #[test]
    fn one_bit_anywhere_is_seen_in_its_block_and_in_the_whole(bit in 0usize..(5 << 23) + 800, seed: u64) {
        let mut bytes = content((5 << 20) + 100, seed);
        let before = sum(&bytes, 65536, seed, None);
        bytes[bit / 8] ^= 1 << (bit % 8);
        let after = sum(&bytes, 65536, seed, Some(Arc::new(before.digest.clone())));
        let block = (bit / 8) as u64 / BLOCK;
        let expected = ranges(bytes.len() as u64, [block]);
        prop_assert_eq!(before.digest.differences(&after.digest), expected);
        prop_assert_eq!(after.differing.as_slice(), &[block][..]);
        prop_assert_ne!(whole(&before), whole(&after));
    }
}

#[test]
fn the_whole_of_more_than_a_stretch_is_right() {
    // Three blocks with data, far apart; the rest is zero.
    let length = (1 << 30) + (5 << 20) + 17;
    let sums = Sums::new(length, None);
    let mut reference = blake3::Hasher::new();
    let (mut at, mut random) = (0, 1_u64);
    let zeroes = vec![0; 1 << 20];
    while at < length {
        let piece = (1 << 20).min(length - at);
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(99);
        if [3 << 20, 1 << 30, (1 << 30) + (4 << 20)].contains(&at) {
            let bytes: Vec<u8> = (0..piece).map(|byte| (byte ^ random) as u8).collect();
            sums.add(at, &bytes);
            reference.update(&bytes);
        } else {
            sums.add_zeroes(ByteRange::new(at, piece));
            reference.update(&zeroes[..piece as usize]);
        }
        at += piece;
    }
    let found = found(sums).unwrap();
    assert_eq!(found.digest.hashes().len(), 3);
    assert_eq!(whole(&found), reference.finalize());
    assert_eq!(found.digest.whole(1, &|| false), None);
}

/// A disk of `blocks` blocks, a quarter of each data.
fn quarters(blocks: u64, sums: &Sums) -> Vec<u8> {
    let (mut bytes, quarter) = (vec![0; (blocks * BLOCK) as usize], BLOCK / 4);
    for block in 0..blocks {
        let at = block * BLOCK + block % 4 * quarter;
        bytes[at as usize..(at + quarter) as usize].fill(block as u8 + 1);
        sums.add(at, &bytes[at as usize..(at + quarter) as usize]);
        sums.add_zeroes(ByteRange::between(block * BLOCK, at));
        sums.add_zeroes(ByteRange::between(at + quarter, (block + 1) * BLOCK));
    }
    bytes
}

#[test]
fn zeroes_that_were_put_off_have_the_hash_of_those_that_were_not() {
    let (at_once, deferring) = (Sums::new(6 * BLOCK, None), Sums::deferring(6 * BLOCK, 8));
    let bytes = quarters(6, &at_once);
    quarters(6, &deferring);
    // Three pieces each: no more than two may be put off.
    let (at_once, deferring) = (at_once.finish().unwrap(), deferring.finish().unwrap());
    assert_eq!((at_once.deferred(), deferring.deferred()), (0, 2));
    let (at_once, deferring) = (at_once.found(1, &|| true).unwrap(), deferring.found(3, &|| true).unwrap());
    assert_eq!(at_once.digest, deferring.digest);
    assert_eq!(whole(&deferring), blake3::hash(&bytes));
}

#[test]
fn a_stop_is_heard_before_the_zeroes_that_were_put_off() {
    let sums = Sums::deferring(2 * BLOCK, 8);
    quarters(2, &sums);
    assert!(sums.finish().unwrap().found(2, &|| false).is_none());
}

#[test]
fn a_hole_of_a_terabyte_is_a_step() {
    let length = 1 << 40;
    let sums = Sums::new(length, None);
    assert!(sums.add_zeroes(ByteRange::new(0, length - (3 << 20))));
    assert!(sums.add(length - (3 << 20), &[0; 1 << 20]));
    assert!(sums.add_zeroes(ByteRange::between(length - (2 << 20), length)));
    let digest = found(sums).unwrap().digest;
    assert_eq!((digest.hashes().len(), digest.blocks()), (0, 1 << 18));
}

#[test]
fn zeroes_where_data_is_expected_are_seen() {
    let length = 5 * BLOCK;
    let expected = Arc::new(Digest::new(length, vec![(1, [7; 32]), (3, [8; 32])]).unwrap());
    let sums = Sums::new(length, Some(expected.clone()));
    assert!(!sums.add_zeroes(ByteRange::new(0, length)));
    let found = found(sums).unwrap();
    assert_eq!(found.differing, [1, 3]);
    let blocks = [ByteRange::new(BLOCK, BLOCK), ByteRange::new(3 * BLOCK, BLOCK)];
    assert_eq!(expected.differences(&found.digest), blocks);
    assert_eq!(found.digest.differences(&expected), blocks);
}

#[test]
fn zeroes_are_compared_with_what_is_expected_in_their_place() {
    let expected = Arc::new(Digest::new(5 * BLOCK, vec![(1, [7; 32]), (3, [8; 32])]).unwrap());
    for (block, is_expected) in [true, false, true, false, true].into_iter().enumerate() {
        let sums = Sums::new(5 * BLOCK, Some(expected.clone()));
        assert_eq!(sums.add_zeroes(ByteRange::new(block as u64 * BLOCK, BLOCK)), is_expected, "block {block}");
    }
}

#[test]
fn who_completes_a_block_hears_that_it_is_not_as_expected() {
    let (length, half) = (5 * BLOCK, BLOCK / 2);
    let data = Sums::new(length, None);
    data.add_zeroes(ByteRange::new(0, 2 * BLOCK));
    data.add(2 * BLOCK, &vec![7; BLOCK as usize]);
    data.add_zeroes(ByteRange::between(3 * BLOCK, length));
    let expected = found(data).unwrap().digest;
    assert_eq!(expected.length(), length);

    let sums = Sums::new(length, Some(Arc::new(expected)));
    assert!(sums.add_zeroes(ByteRange::new(0, 2 * BLOCK)));
    assert!(sums.add(2 * BLOCK, &vec![7; half as usize]));
    // One block is completed wrongly, one is right, one is not complete.
    assert!(!sums.add_zeroes(ByteRange::between(2 * BLOCK + half, 4 * BLOCK + half)));
    assert!(sums.add_zeroes(ByteRange::between(4 * BLOCK + half, length)));
    assert_eq!(sums.differences(), [ByteRange::new(2 * BLOCK, BLOCK)]);
    let summed = sums.finish().unwrap();
    assert_eq!((summed.length(), summed.differing()), (length, &[2][..]));
}

#[test]
fn data_alone_is_never_put_off() {
    let piece = BLOCK / 8;
    // A whole block, and one that the disk's end cuts.
    for count in [8, 6] {
        let sums = Sums::deferring(count * piece, 100);
        for at in (0..count).rev() {
            sums.add(at * piece, &vec![7; piece as usize]);
        }
        assert_eq!(sums.finish().unwrap().deferred(), 0, "{count} pieces");
    }
}

#[test]
fn blocks_that_touch_are_one_range() {
    let joined = [ByteRange::new(0, 2 * BLOCK), ByteRange::new(3 * BLOCK, 5)];
    assert_eq!(ranges(3 * BLOCK + 5, [3, 1, 0]), joined);
}

#[test]
fn stretches_are_some_thousands_of_a_bounded_size() {
    for (length, stretch) in [(BLOCK, 16 << 20), (1 << 40, 256 << 20), (u64::MAX, 1 << 30)] {
        assert_eq!(root::stretch_of(length), stretch);
    }
}

#[test]
fn a_sum_with_a_gap_is_none() {
    let sums = Sums::new(3 * BLOCK, None);
    sums.add(0, &vec![1; BLOCK as usize]);
    sums.add_zeroes(ByteRange::new(2 * BLOCK, BLOCK));
    assert!(sums.finish().is_none());
}

#[test]
fn numbers_out_of_order_or_past_the_end_are_no_digest() {
    let hash = [1; 32];
    assert!(Digest::new(BLOCK + 1, vec![(0, hash), (1, hash)]).is_some());
    for hashes in [vec![(2, hash)], vec![(1, hash), (0, hash)], vec![(1, hash), (1, hash)]] {
        assert!(Digest::new(BLOCK + 1, hashes).is_none());
    }
}
