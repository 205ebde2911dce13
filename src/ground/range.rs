//! Byte ranges of a disk, and what is known of their contents.

use std::fmt;

/// A run of bytes: `offset` from the start of the disk, `length` bytes long.
///
/// `offset + length` never overflows: whoever takes numbers from outside builds one with [`ByteRange::checked`].
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct ByteRange {
    /// First byte.
    pub offset: u64,
    /// Number of bytes.
    pub length: u64,
}

impl ByteRange {
    /// A range from trusted numbers; panics in debug builds when `offset + length` overflows.
    pub const fn new(offset: u64, length: u64) -> Self {
        debug_assert!(offset.checked_add(length).is_some(), "range overflows");
        Self { offset, length }
    }

    /// A range from untrusted numbers: `None` when `offset + length` overflows.
    pub const fn checked(offset: u64, length: u64) -> Option<Self> {
        match offset.checked_add(length) {
            Some(_) => Some(Self { offset, length }),
            None => None,
        }
    }

    /// From the first byte up to, without, `end`.
    pub const fn between(offset: u64, end: u64) -> Self {
        Self::new(offset, end - offset)
    }

    /// The byte after the last.
    pub const fn end(self) -> u64 {
        self.offset + self.length
    }

    /// Holds no byte.
    pub const fn is_empty(self) -> bool {
        self.length == 0
    }

    /// The bytes in both.
    pub fn intersect(self, other: Self) -> Self {
        let offset = self.offset.max(other.offset);
        let end = self.end().min(other.end());
        Self::between(offset, end.max(offset))
    }

    /// Its first `length` bytes, or all of it when it is shorter.
    pub fn prefix(self, length: u64) -> Self {
        Self::new(self.offset, self.length.min(length))
    }
}

/// `0x40000+65536`: offset in hex, length in bytes, as in every error message.
impl fmt::Display for ByteRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}+{}", self.offset, self.length)
    }
}

impl fmt::Debug for ByteRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// What a layer says of a byte range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Allocation {
    /// Bytes that have to be read.
    Data,
    /// Reads as zeroes, without being read.
    Zero,
    /// This layer has nothing; its backing file answers. Never seen above a backing chain.
    Unallocated,
}

/// A byte range with one allocation status.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// Where.
    pub range: ByteRange,
    /// What is known of it.
    pub allocation: Allocation,
}

impl Extent {
    /// An extent that has to be read.
    pub const fn data(range: ByteRange) -> Self {
        Self { range, allocation: Allocation::Data }
    }

    /// An extent that reads as zeroes.
    pub const fn zero(range: ByteRange) -> Self {
        Self { range, allocation: Allocation::Zero }
    }

    /// An extent that the backing file answers for.
    pub const fn unallocated(range: ByteRange) -> Self {
        Self { range, allocation: Allocation::Unallocated }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    fn bytes(range: ByteRange) -> BTreeSet<u64> {
        (range.offset..range.end()).collect()
    }

    proptest! {
        #![proptest_config(crate::ground::cases(500))]

        #[test]
        fn ranges_agree_with_sets_of_bytes(a in 0..50u64, b in 0..50u64, c in 0..50u64, d in 0..50u64) {
            let (left, right) = (ByteRange::new(a, b), ByteRange::new(c, d));
            let both: BTreeSet<u64> = bytes(left).intersection(&bytes(right)).copied().collect();
            prop_assert_eq!(bytes(left.intersect(right)), both);
            prop_assert_eq!(bytes(left.prefix(c)), bytes(left).into_iter().take(c as usize).collect());
            prop_assert_eq!(left.is_empty(), bytes(left).is_empty());
            prop_assert_eq!(ByteRange::between(left.offset, left.end()), left);
        }

        #[test]
        fn untrusted_numbers_never_overflow(offset: u64, length: u64) {
            let fits = u128::from(offset) + u128::from(length) <= u128::from(u64::MAX);
            prop_assert_eq!(ByteRange::checked(offset, length), fits.then_some(ByteRange { offset, length }));
        }
    }

    #[test]
    fn an_extent_says_what_its_bytes_are() {
        let range = ByteRange::new(3, 4);
        let extents = [Extent::data(range), Extent::zero(range), Extent::unallocated(range)];
        assert_eq!(
            extents.map(|extent| extent.allocation),
            [Allocation::Data, Allocation::Zero, Allocation::Unallocated]
        );
        assert_eq!(extents.map(|extent| extent.range), [range; 3]);
    }

    #[test]
    fn range_is_shown_as_hex_offset_and_length() {
        assert_eq!(ByteRange::new(0x40000, 65536).to_string(), "0x40000+65536");
        assert_eq!(format!("{:?}", ByteRange::new(0, 0)), "0x0+0");
    }
}
