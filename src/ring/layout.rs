//! The ring's numbers: every offset, state and code that both processes must agree on. docs/RING.md describes them
//! byte by byte; a test keeps that page and the C header true to this file.

/// First word of a packet and of the ring: `DBKR` in ASCII, least significant byte first.
pub const MAGIC: u32 = u32::from_le_bytes(*b"DBKR");
/// Of the whole protocol: packets, ring, bitmap, file names. A peer of another version is refused.
pub const VERSION: u32 = 1;

/// Trapped writes that may be on the ring at once; further ones wait in their own process.
pub const SLOTS: usize = 32;
/// Bytes of a slot, and what keeps words of different owners on different cache lines.
pub const LINE: usize = 64;
/// A trapped write is cut into entries of at most this many bytes, or of one cluster where that is more.
pub const MAX_ENTRY: u64 = 1 << 20;
/// Counters of writes, one for each of this many groups of threads.
pub const WRITE_COUNTERS: usize = 16;

/// Byte offsets in the ring.
pub mod at {
    /// u32 [`super::MAGIC`], u32 [`super::VERSION`].
    pub const MAGIC: usize = 0;
    /// u32: bit i is set when slot i holds an entry that nobody has taken. A futex.
    pub const POSTED: usize = 64;
    /// u32: 1 while a thread of the backup is looking at `POSTED`, so that nobody needs to wake one.
    pub const ATTENTIVE: usize = 128;
    /// u32: 0, or the [`super::Breach`] for which the writer went on without a grant. Never goes back to 0.
    pub const BROKEN: usize = 192;
    /// u64: writes that waited, for a grant or for a thaw.
    pub const TRAPPED: usize = 256;
    /// u64: nanoseconds, the longest of those waits.
    pub const STALL_MAX: usize = 264;
    /// 16 lines, each a u64: writes begun since the thaw. Their sum counts.
    pub const WRITES: usize = 320;
    /// 256 u32: the histogram of those waits, see `stall`.
    pub const STALLS: usize = 1344;
    /// 32 slots of 64 bytes.
    pub const SLOTS: usize = 4096;
    /// Bytes of the ring.
    pub const END: usize = 8192;
    /// In a slot: u32 [`super::state`]. A futex.
    pub const SLOT_STATE: usize = 0;
    /// In a slot: u32, the errno of a refusal.
    pub const SLOT_ERRNO: usize = 4;
    /// In a slot: u64, first byte of the write.
    pub const SLOT_OFFSET: usize = 8;
    /// In a slot: u64, bytes of the write.
    pub const SLOT_LENGTH: usize = 16;
}

/// What a slot's first word says. The writer moves it to `POSTED`, `ASLEEP` and `LEFT`, the backup to the answers.
pub mod state {
    /// Never used.
    pub const VACANT: u32 = 0;
    /// A write waits for its answer, awake.
    pub const POSTED: u32 = 1;
    /// A write waits for its answer in the kernel: whoever answers wakes it.
    pub const ASLEEP: u32 = 2;
    /// Answered: write.
    pub const GRANTED: u32 = 3;
    /// Answered: do not write; the errno is in the slot.
    pub const REFUSED: u32 = 4;
    /// The write went on without an answer; the ring is broken or over.
    pub const LEFT: u32 = 5;
}

/// Why a writer went on without a grant.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Breach {
    /// No answer came within the writer's bound.
    NoAnswer = 1,
    /// The backup closed the connection without detaching.
    HungUp = 2,
    /// The backup froze it for longer than agreed.
    FrozenTooLong = 3,
    /// What the backup sent made no sense.
    Nonsense = 4,
    /// The writer's own thread failed.
    Fault = 5,
}

impl Breach {
    /// What the word in the ring means; any other non-zero value is as good a mark.
    pub fn describe(word: u32) -> &'static str {
        const NO_ANSWER: u32 = Breach::NoAnswer as u32;
        const HUNG_UP: u32 = Breach::HungUp as u32;
        const FROZEN_TOO_LONG: u32 = Breach::FrozenTooLong as u32;
        const NONSENSE: u32 = Breach::Nonsense as u32;
        match word {
            NO_ANSWER => "a write waited for longer than the writer's bound",
            HUNG_UP => "the connection was lost",
            FROZEN_TOO_LONG => "it was frozen for longer than agreed",
            NONSENSE => "it could not make sense of what it was sent",
            _ => "a fault in the writer",
        }
    }
}

/// Bytes of the shared bitmap for `clusters` bits: whole pages, one at least.
pub const fn bitmap_bytes(clusters: u64) -> u64 {
    let bytes = clusters.div_ceil(64) * 8;
    if bytes == 0 { 4096 } else { bytes.next_multiple_of(4096) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_bitmap_is_as_many_pages_as_its_bits_need() {
        const BITS_OF_A_PAGE: u64 = 4096 * 8;
        for (clusters, pages) in
            [(0, 1), (1, 1), (BITS_OF_A_PAGE, 1), (BITS_OF_A_PAGE + 1, 2), (10 * BITS_OF_A_PAGE, 10)]
        {
            assert_eq!(bitmap_bytes(clusters), pages * 4096, "{clusters}");
        }
    }

    #[test]
    fn each_breach_has_words_of_its_own_and_any_other_mark_is_a_fault() {
        let all = [Breach::NoAnswer, Breach::HungUp, Breach::FrozenTooLong, Breach::Nonsense, Breach::Fault];
        let said = all.map(|breach| Breach::describe(breach as u32));
        for (at, words) in said.iter().enumerate() {
            assert!(!said[..at].contains(words), "{words}");
        }
        assert_eq!(Breach::describe(6), Breach::describe(Breach::Fault as u32));
        assert_eq!(Breach::describe(u32::MAX), Breach::describe(Breach::Fault as u32));
    }
}
