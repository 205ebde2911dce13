//! fio writes a served disk while three backups run one after the other; each copy is proven to be the disk of one instant.
//!
//! Every block is written once, in a random order, over contents that are known. fio puts into each block where it belongs, a
//! checksum, and the number of the write. Of a copy every block must be whole, the old one or fio's. fio has at most DEPTH
//! writes in flight, and begins them in the order of their numbers: so of those that were begun before the last one that a copy
//! has, all but DEPTH - 1 had ended, and the copy must have them. And it must have every block that was on the disk before the
//! backup began, and none that was not there when it had ended.

use crate::kit::{Served, sparse_disk};
use crate::support::{Running, piped, text, wait_for};
use std::path::Path;
use std::process::Command;

const BLOCK: usize = 4096;
const BLOCKS: usize = 10 << 10;
const DEPTH: usize = 16;

/// fio's header of a block, and the checksum of what follows.
const MAGIC: u16 = 0xacca;
const LENGTH_AT: usize = 4;
const OFFSET_AT: usize = 16;
const NUMBER_AT: usize = 34;
const HEADER_SUM_AT: usize = 36;
const DATA_SUM_AT: usize = 40;
const DATA_AT: usize = 44;

/// CRC-32C (RFC 3720, B.4).
fn crc32c(bytes: &[u8], table: &[u32; 256]) -> u32 {
    bytes.iter().fold(!0, |crc, byte| table[((crc ^ u32::from(*byte)) & 0xff) as usize] ^ (crc >> 8))
}

fn table() -> [u32; 256] {
    std::array::from_fn(|byte| (0..8).fold(byte as u32, |crc, _| (crc >> 1) ^ (0x82f6_3b78 & (crc & 1).wrapping_neg())))
}

fn old_block(index: usize) -> [u8; BLOCK] {
    let mut block = [0x55; BLOCK];
    block[..8].copy_from_slice(&(index as u64 + 1).to_be_bytes());
    block[BLOCK - 8..].copy_from_slice(&(index as u64 + 1).to_be_bytes());
    block
}

/// The number of fio's write in each block; `None` where the old contents are. Panics for a block that is neither.
fn writes(disk: &[u8], table: &[u32; 256]) -> Vec<Option<u16>> {
    assert_eq!(disk.len(), BLOCKS * BLOCK);
    let number_of = |(index, block): (usize, &[u8])| {
        if block == old_block(index) {
            return None;
        }
        let word = |at: usize| u32::from_le_bytes(block[at..at + 4].try_into().unwrap());
        let half = |at: usize| u16::from_le_bytes(block[at..at + 2].try_into().unwrap());
        let offset = u64::from_le_bytes(block[OFFSET_AT..OFFSET_AT + 8].try_into().unwrap());
        let found = (half(0), word(LENGTH_AT) as usize, offset);
        assert_eq!(found, (MAGIC, BLOCK, (index * BLOCK) as u64), "block {index} is nobody's");
        assert_eq!(crc32c(&block[..HEADER_SUM_AT], table), word(HEADER_SUM_AT), "the header of block {index} is torn");
        assert_eq!(crc32c(&block[DATA_AT..], table), word(DATA_SUM_AT), "block {index} is torn");
        Some(half(NUMBER_AT))
    };
    disk.chunks(BLOCK).enumerate().map(number_of).collect()
}

fn numbers(writes: &[Option<u16>]) -> Vec<u16> {
    let mut numbers: Vec<u16> = writes.iter().copied().flatten().collect();
    numbers.sort_unstable();
    let count = numbers.len();
    numbers.dedup();
    assert_eq!(numbers.len(), count, "a number occurs twice");
    numbers
}

fn is_within(part: &[u16], whole: &[u16]) -> bool {
    part.iter().all(|number| whole.binary_search(number).is_ok())
}

/// What a disk holds of fio's writes while they go on: reads one page after the other, each whole or torn, so only numbers.
fn seen(image: &Path) -> Vec<u16> {
    let disk = std::fs::read(image).unwrap();
    let fios = disk.chunks(BLOCK).enumerate().filter(|(index, block)| block[..8] != old_block(*index)[..8]);
    let mut numbers: Vec<u16> =
        fios.map(|(_, block)| u16::from_le_bytes([block[NUMBER_AT], block[NUMBER_AT + 1]])).collect();
    numbers.sort_unstable();
    numbers
}

/// Writes a second that fio is asked for. Every instant is proven at every rate; where fio had ended before the last backup
/// began, which a busy machine does, nothing was written during it, and the next rate is tried.
const RATES: [u32; 3] = [2500, 800, 200];

/// Proves three backups of what `serve` serves while fio writes it with an engine.
fn prove(serve: impl Fn() -> (Served, Vec<String>)) {
    let wrote_on = RATES.iter().any(|rate| {
        let (served, engine) = serve();
        three_backups(&served, &engine, *rate)
    });
    assert!(wrote_on, "fio had ended before the third backup did, at {RATES:?} writes a second");
}

/// Runs fio with `engine` on what is served, and three backups meanwhile. True: it wrote on during each.
fn three_backups(served: &Served, engine: &[String], rate: u32) -> bool {
    let (table, image) = (table(), served.path());
    let mut wrote_on = true;
    let mut fio = Command::new("fio");
    fio.args(["--name=w", "--rw=randwrite", "--bs=4k", "--verify=crc32c", "--verify_fatal=1", "--verify_state_save=0"]);
    fio.args([format!("--size={}", BLOCKS * BLOCK), format!("--iodepth={DEPTH}"), format!("--rate_iops={rate}")])
        .args(engine);
    let fio = Running::start(&mut piped(fio));
    let mut before_it = Vec::new();
    for copy in 0..3 {
        let least = 300 + copy * 1200;
        let before = wait_for("writes", || Some(seen(image)).filter(|seen| seen.len() > least));
        let name = format!("copy{copy}.raw");
        served.backup(&name, &["--speed=200M"]).succeeds();
        let after = seen(image);
        let copied = numbers(&writes(&std::fs::read(served.join(&name)).unwrap(), &table));
        let last = *copied.last().unwrap();
        let first = u16::from(copied[0] > 0 && after.binary_search(&0).is_err());
        let missing = usize::from(last - first) + 1 - copied.len();
        assert!(
            missing < DEPTH,
            "copy {copy} has write {last}, and lacks {missing} of those that were begun before it"
        );
        assert!(is_within(&before, &copied), "copy {copy} lacks what was written before it began");
        assert!(is_within(&copied, &after), "copy {copy} has what was written after its end");
        assert!(is_within(&before_it, &copied), "copy {copy} lacks what the one before it has");
        wrote_on &= before_it.len() < copied.len() && copied.len() < after.len();
        before_it = copied;
    }
    let ended = fio.ended();
    let said = String::from_utf8_lossy(&ended.stdout);
    assert!(ended.code == 0 && said.contains("err= 0"), "{said}{}", ended.stderr);
    assert_eq!(numbers(&writes(&std::fs::read(image).unwrap(), &table)).len(), BLOCKS, "fio wrote every block");
    wrote_on
}

fn full_disk() -> tempfile::TempDir {
    let folder = sparse_disk(0);
    let disk: Vec<u8> = (0..BLOCKS).flat_map(old_block).collect();
    std::fs::write(folder.path().join("disk.raw"), disk).unwrap();
    folder
}

#[test]
fn three_backups_of_a_disk_that_fio_writes_over_nbd_are_their_instants() {
    prove(|| {
        let served = Served::nbd(full_disk());
        let uri = format!("--uri=nbd+unix:///?socket={}", text(&served.join("nbd")));
        (served, vec!["--ioengine=nbd".into(), uri])
    });
}

#[test]
fn three_backups_of_a_file_that_fio_writes_over_fuse_are_their_instants() {
    prove(|| {
        let served = Served::over_itself(full_disk(), "disk.raw", &[]);
        let file = format!("--filename={}", text(served.path()));
        (served, vec!["--ioengine=io_uring".into(), "--direct=1".into(), file])
    });
}
