use super::*;
use proptest::prelude::*;
use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::Bytes;

/// Bytes of the guest's memory.
const END: u64 = 0x1_0000;
const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

/// A descriptor as a guest writes it: address, length, flags, next.
type Raw = (u64, u32, u16, u16);

fn memory() -> Memory {
    Memory::from_ranges(&[(GuestAddress(0), END as usize)]).unwrap()
}

fn put(memory: &Memory, table: u64, descriptors: &[Raw]) {
    for (at, &(address, length, flags, next)) in (table..).step_by(16).zip(descriptors) {
        memory.write_obj(address, GuestAddress(at)).unwrap();
        memory.write_obj(length, GuestAddress(at + 8)).unwrap();
        memory.write_obj(flags, GuestAddress(at + 12)).unwrap();
        memory.write_obj(next, GuestAddress(at + 14)).unwrap();
    }
}

/// What comes out of a queue of 16 entries whose first chain begins with descriptor 0.
fn taken(memory: &Memory, descriptors: &[Raw]) -> Result<Request, Malformed> {
    put(memory, 0, descriptors);
    let mut queue = Queue::new(16).unwrap();
    queue.set_avail_ring_address(Some(0x400), None);
    queue.set_used_ring_address(Some(0x600), None);
    queue.set_ready(true);
    memory.write_obj(0_u16, GuestAddress(0x404)).unwrap();
    memory.write_obj(1_u16, GuestAddress(0x402)).unwrap();
    let chain = queue.iter(memory).unwrap().next().unwrap();
    Request::parse(chain, memory)
}

fn put_header(memory: &Memory, at: u64, kind: u32, sector: u64) {
    memory.write_obj(kind, GuestAddress(at)).unwrap();
    memory.write_obj(sector, GuestAddress(at + 8)).unwrap();
}

#[test]
fn a_request_is_the_same_however_it_is_cut_into_descriptors() {
    let memory = memory();
    put_header(&memory, 0x1000, 1, 7);
    memory.write_slice(b"some data", GuestAddress(0x1010)).unwrap();
    let usual: &[Raw] = &[(0x1000, 16, NEXT, 1), (0x1010, 9, NEXT, 2), (0x2000, 1, WRITE, 0)];
    let at_once: &[Raw] = &[(0x1000, 25, NEXT, 1), (0x2000, 1, WRITE, 0)];
    let in_crumbs: &[Raw] =
        &[(0x1000, 5, NEXT, 3), (0x2000, 1, WRITE, 0), (0x1014, 5, NEXT, 1), (0x1005, 15, NEXT, 4), (0, 0, NEXT, 2)];
    put(&memory, 0x3000, usual);
    let indirect: &[Raw] = &[(0x3000, 48, INDIRECT, 0)];
    for descriptors in [usual, at_once, in_crumbs, indirect] {
        let request = taken(&memory, descriptors).unwrap();
        assert_eq!((request.operation, request.sector), (Operation::Write, 7));
        let mut bytes = [0; 9];
        assert_eq!(request.input.length(), 9);
        request.input.copy_to(&memory, 0, &mut bytes).unwrap();
        assert_eq!((&bytes, request.output.length()), (b"some data", 0));
        assert_eq!(request.answer(&memory, 2), 1);
        assert_eq!(memory.read_obj::<u8>(GuestAddress(0x2000)).unwrap(), 2);
    }
}

#[test]
fn what_is_read_lies_before_the_status() {
    let memory = memory();
    put_header(&memory, 0x1000, 0, 3);
    let request =
        taken(&memory, &[(0x1000, 16, NEXT, 1), (0x2000, 4, NEXT | WRITE, 2), (0x2100, 5, WRITE, 0)]).unwrap();
    assert_eq!((request.operation, request.sector, request.output.length()), (Operation::Read, 3, 8));
    request.output.copy_from(&memory, 0, b"12345678").unwrap();
    assert_eq!(request.answer(&memory, 0), 9);
    let mut bytes = [0xFF; 5];
    memory.read_slice(&mut bytes, GuestAddress(0x2100)).unwrap();
    assert_eq!(&bytes, b"5678\0");
    // Nothing is told to be there that was not put there.
    assert_eq!(request.answer(&memory, 1), 0);
    assert_eq!(request.output.copy_from(&memory, 4, b"12345"), Err(Malformed));
}

#[test]
fn chains_that_make_no_sense_are_malformed() {
    let memory = memory();
    put_header(&memory, 0x1000, 0, 0);
    // One whose every descriptor leads to the next, and the last to the first.
    let endless: Vec<Raw> = (0..16).map(|at| (0x1000, 16, NEXT, (at + 1) % 16)).collect();
    put(&memory, 0x3000, &[(0x1000, 16, NEXT, 1), (0x3000, 48, INDIRECT, 0)]);
    put(&memory, 0x3100, &[(0x1000, 16, NEXT, 0)]);
    let wrong: &[(&str, &[Raw])] = &[
        ("a loop", &endless),
        ("a loop of one", &[(0x1000, 16, NEXT, 0)]),
        ("no descriptor of that number", &[(0x1000, 16, NEXT, 16)]),
        ("no status", &[(0x1000, 16, 0, 0)]),
        ("a status that leads nowhere", &[(0x1000, 16, NEXT, 1), (0x2000, 1, NEXT | WRITE, 16)]),
        ("a status that leads to itself", &[(0x1000, 16, NEXT, 1), (0x2000, 1, NEXT | WRITE, 1)]),
        ("a status of no bytes", &[(0x1000, 16, NEXT, 1), (0x2000, 0, WRITE, 0)]),
        ("a short header", &[(0x1000, 15, NEXT, 1), (0x2000, 1, WRITE, 0)]),
        ("a header that only the device writes", &[(0x1000, 16, NEXT | WRITE, 1), (0x2000, 1, WRITE, 0)]),
        (
            "what the device reads behind what it writes",
            &[(0x1000, 16, NEXT, 1), (0x2000, 1, NEXT | WRITE, 2), (0x1000, 16, 0, 0)],
        ),
        ("a header outside of memory", &[(END - 8, 16, NEXT, 1), (0x2000, 1, WRITE, 0)]),
        ("a header past all addresses", &[(u64::MAX - 3, 16, NEXT, 1), (0x2000, 1, WRITE, 0)]),
        ("a status outside of memory", &[(0x1000, 16, NEXT, 1), (END, 1, WRITE, 0)]),
        ("a status past all addresses", &[(0x1000, 16, NEXT, 1), (u64::MAX, 2, WRITE, 0)]),
        ("more than 4 GiB", &[(0x1000, u32::MAX, NEXT, 1), (0x1000, u32::MAX, NEXT, 2), (0x2000, 1, WRITE, 0)]),
        ("an indirect table in an indirect table", &[(0x3000, 32, INDIRECT, 0)]),
        ("an indirect table that loops", &[(0x3100, 16, INDIRECT, 0)]),
        ("an indirect table of half descriptors", &[(0x3100, 8, INDIRECT, 0)]),
        ("an empty indirect table", &[(0x3100, 0, INDIRECT, 0)]),
        ("an indirect table outside of memory", &[(END, 16, INDIRECT, 0)]),
        ("a huge indirect table", &[(0x3100, u32::MAX, INDIRECT, 0)]),
    ];
    for (what, descriptors) in wrong {
        assert_eq!(taken(&memory, descriptors), Err(Malformed), "{what}");
    }
}

#[test]
fn a_chain_of_very_many_pieces_is_malformed() {
    let memory = memory();
    put_header(&memory, 0x1000, 1, 0);
    let mut pieces: Vec<Raw> = (1..=1023).map(|next| (0x1000, 16, NEXT, next)).collect();
    pieces.push((0x2000, 1, WRITE, 0));
    put(&memory, 0x4000, &pieces);
    let whole = taken(&memory, &[(0x4000, 1024 * 16, INDIRECT, 0)]).unwrap();
    assert_eq!(whole.input.length(), 1022 * 16);
    pieces.splice(1023.., [(0x1000, 16, NEXT, 1024), (0x2000, 1, WRITE, 0)]);
    put(&memory, 0x4000, &pieces);
    assert!(taken(&memory, &[(0x4000, 1025 * 16, INDIRECT, 0)]).is_err());
}

fn hostile() -> impl Strategy<Value = Raw> {
    let address = prop_oneof![
        4 => (0..END).prop_map(|at| at & !0xF),
        1 => END - 20..END + 4,
        1 => Just(0_u64),
        1 => any::<u64>(),
        1 => u64::MAX - 20..=u64::MAX,
    ];
    let length = prop_oneof![4 => 0_u32..64, 2 => Just(16_u32), 1 => 0..END as u32 * 2, 1 => any::<u32>()];
    (address, length, 0_u16..8, 0_u16..18)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(500))]

    /// Whatever a guest puts there: an end is found, and what is taken is no more than what was offered.
    #[test]
    fn hostile_chains_come_to_an_end(
        table in prop::collection::vec(hostile(), 16),
        indirect in prop::collection::vec(hostile(), 16),
        kind in 0_u32..16,
    ) {
        let memory = memory();
        put(&memory, 0x3000, &indirect);
        put_header(&memory, 0x1000, kind, 1);
        if let Ok(request) = taken(&memory, &table) {
            prop_assert!(request.input.length() + request.output.length() < 1 << 32);
            let pieces = request.input.pieces.iter().chain(&request.output.pieces);
            prop_assert_eq!(pieces.map(|(_, length)| u64::from(*length)).sum::<u64>(), request.input.length() + request.output.length());
            let mut bytes = vec![0; request.input.length().min(END * 2) as usize];
            let whole = bytes.len() as u64 == request.input.length();
            let copied = request.input.copy_to(&memory, 0, &mut bytes);
            prop_assert!(!whole || copied.is_ok() == request.input.slices(&memory).is_ok());
            request.answer(&memory, 0);
        }
    }
}
