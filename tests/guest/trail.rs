//! What the guest's `job=trail` leaves: each thread has its own part of the disk and numbers its writes, so that the highest
//! number in its part says what all of it must hold. And each block tells how many writes of every thread had been
//! acknowledged when it was begun: whoever has the block has those, if the copy is the disk of one instant.

const BLOCK: usize = 4096;
/// Threads of the guest.
pub const THREADS: usize = 4;
/// Of each thread.
const BLOCKS: usize = 1024;

/// splitmix64, as in init.c.
pub fn scramble(seed: u64) -> u64 {
    let mut z = seed.wrapping_add(0x9E37_79B9_7F4A_7C15);
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

/// One in 16 writes are zeroes, without a number.
fn zeroes(me: usize, number: u64) -> bool {
    scramble(scramble(number) ^ (me as u64 + 1)).is_multiple_of(16)
}

fn place(me: usize, number: u64) -> usize {
    (scramble(number * THREADS as u64 + me as u64) % BLOCKS as u64) as usize
}

/// What a thread's part of a disk shows.
struct Part {
    me: usize,
    /// For each block, 0: zeroes.
    numbers: Vec<u64>,
    /// What the blocks tell of each thread, at most.
    seen: [u64; THREADS],
}

impl Part {
    #[track_caller]
    fn read(me: usize, bytes: &[u8]) -> Self {
        let mut part = Self { me, numbers: Vec::new(), seen: [0; THREADS] };
        for (at, block) in bytes.chunks_exact(BLOCK).enumerate() {
            let number = part.look(at, block);
            part.numbers.push(number);
        }
        part
    }

    #[track_caller]
    fn look(&mut self, at: usize, block: &[u8]) -> u64 {
        if block.iter().all(|byte| *byte == 0) {
            return 0;
        }
        let words: Vec<u64> = block.chunks_exact(8).map(|word| u64::from_le_bytes(word.try_into().unwrap())).collect();
        let (number, me) = (words[0], self.me);
        assert!(
            (words[1], words[2]) == (me as u64, (me * BLOCKS + at) as u64),
            "block {at} of thread {me} is another's"
        );
        let mut sum = scramble(number ^ scramble(me as u64));
        for (seen, &word) in self.seen.iter_mut().zip(&words[3..]) {
            *seen = word.max(*seen);
            sum = scramble(sum ^ word);
        }
        let rest = (3 + THREADS..).zip(&words[3 + THREADS..]);
        for (word, &found) in rest {
            assert!(found == sum.wrapping_mul(word as u64 * 2 + 1), "block {at} of thread {me} is torn");
        }
        number
    }

    fn is_after(&self, number: u64) -> bool {
        let mut expected = vec![None; BLOCKS];
        let mut left = BLOCKS;
        for number in (1..=number).rev() {
            let block = &mut expected[place(self.me, number)];
            if block.is_none() {
                *block = Some(if zeroes(self.me, number) { 0 } else { number });
                left -= 1;
            }
            if left == 0 {
                break;
            }
        }
        self.numbers.iter().zip(expected).all(|(found, expected)| *found == expected.unwrap_or(0))
    }

    /// The last write that it may have: a write of zeroes does not tell its number.
    #[track_caller]
    fn last(&self) -> u64 {
        let highest = self.numbers.iter().copied().max().unwrap_or(0);
        let silent = (highest + 1..).take_while(|&number| zeroes(self.me, number));
        let candidates = std::iter::once(highest).chain(silent);
        let last = candidates.filter(|&number| self.is_after(number)).last();
        last.unwrap_or_else(|| panic!("not the part of thread {} after write {highest}", self.me))
    }
}

/// The last write of each thread on a disk; panics unless the disk is that of one instant.
#[track_caller]
pub fn check(disk: &[u8]) -> [u64; THREADS] {
    let part = |me| Part::read(me, &disk[me * BLOCKS * BLOCK..][..BLOCKS * BLOCK]);
    let parts: [Part; THREADS] = std::array::from_fn(part);
    let last = parts.each_ref().map(Part::last);
    for part in &parts {
        for (thread, (seen, last)) in part.seen.iter().zip(last).enumerate() {
            let me = part.me;
            assert!(
                *seen <= last,
                "it has a write of thread {me} that came after {seen} of thread {thread}, and has {last}"
            );
        }
    }
    last
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(disk: &mut [u8], me: usize, number: u64, acknowledged: [u64; THREADS]) {
        let at = (me * BLOCKS + place(me, number)) * BLOCK;
        let block = &mut disk[at..at + BLOCK];
        block.fill(0);
        if zeroes(me, number) {
            return;
        }
        let mut words = vec![number, me as u64, (at / BLOCK) as u64];
        let mut sum = scramble(number ^ scramble(me as u64));
        for word in acknowledged {
            words.push(word);
            sum = scramble(sum ^ word);
        }
        (3 + THREADS as u64..BLOCK as u64 / 8).for_each(|word| words.push(sum.wrapping_mul(word * 2 + 1)));
        block.copy_from_slice(&words.iter().flat_map(|word| word.to_le_bytes()).collect::<Vec<_>>());
    }

    /// After writes by turns, 600 by each thread, all but those that `lacks` names.
    fn disk(lacks: impl Fn(usize, u64) -> bool) -> Vec<u8> {
        let mut disk = vec![0; THREADS * BLOCKS * BLOCK];
        for number in 1..=600 {
            for me in 0..THREADS {
                let acknowledged = std::array::from_fn(|other| if other < me { number } else { number - 1 });
                if !lacks(me, number) {
                    write(&mut disk, me, number, acknowledged);
                }
            }
        }
        disk
    }

    #[test]
    fn a_prefix_is_an_instant_and_nothing_else_is() {
        assert!(check(&disk(|_, _| false)).iter().all(|last| (600..610).contains(last)));
        let last = check(&disk(|me, number| number > 400 || number == 400 && me > 1));
        assert!((400..410).contains(&last[1]) && (399..410).contains(&last[2]));
        let wrong: [(&str, Vec<u8>); 3] = [
            ("one thread stands still", disk(|me, number| me == 2 && number > 300)),
            ("a write is missing", disk(|me, number| me == 1 && number == 597 - u64::from(zeroes(1, 597)))),
            ("torn", {
                let mut disk = disk(|_, _| false);
                let at = place(0, 600 - u64::from(zeroes(0, 600))) * BLOCK;
                disk[at + 2048..at + BLOCK].fill(0);
                disk
            }),
        ];
        for (what, disk) in wrong {
            assert!(std::panic::catch_unwind(|| check(&disk)).is_err(), "{what}");
        }
    }
}
