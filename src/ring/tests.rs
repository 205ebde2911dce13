//! docs/RING.md says what the layout says.

use super::layout::{self, Breach, at, state};
use super::packet::{field, kind};

const PAGE: &str = include_str!("../../docs/RING.md");

/// The rows of the table whose heading begins with `| title |`.
fn rows(title: &str) -> Vec<Vec<&'static str>> {
    let heading = format!("| {title} |");
    let table = PAGE.lines().skip_while(|line| !line.starts_with(&heading)).skip(2);
    let rows = table.take_while(|line| line.starts_with('|'));
    rows.map(|row| row.trim_matches('|').split('|').map(str::trim).collect()).collect()
}

fn named(title: &str, column: usize) -> Vec<(u64, String)> {
    let rows = rows(title);
    assert!(!rows.is_empty(), "no table '{title}'");
    rows.iter().map(|row| (row[0].parse().unwrap(), row[column].trim_matches('`').to_owned())).collect()
}

macro_rules! numbers {
    ($module:ident: $($name:ident),*) => { vec![$(($module::$name as u64, stringify!($name).to_owned())),*] };
}

#[test]
fn the_page_lists_every_field_of_a_packet() {
    let all = numbers!(field: MAGIC, VERSION, KIND, VALUE, ANNOUNCEMENT, LENGTH, BITMAP_BYTES, RING_BYTES, SLOTS,
        CLUSTER_BYTES, FREEZE_MS, CBW_MS, FLAGS);
    assert_eq!(named("offset", 2), all);
}

#[test]
fn the_page_lists_every_kind_of_packet() {
    let all = numbers!(kind: ATTACH, ATTACHED, REFUSED, FREEZE, FROZEN, THAW, THAWED, DETACH);
    assert_eq!(named("kind | name", 1), all);
}

#[test]
fn the_page_lists_every_word_of_the_ring() {
    let ring = PAGE.split("## The ring\n").nth(1).unwrap();
    for (number, name) in numbers!(at: MAGIC, POSTED, ATTENTIVE, BROKEN, TRAPPED, STALL_MAX, WRITES, STALLS, SLOTS) {
        let begin = format!("| {number} | ");
        let row = ring.lines().find(|line| line.starts_with(&begin)).unwrap_or_else(|| panic!("no row for {name}"));
        assert!(row.contains(&format!("`{name}`")), "{row}");
    }
    let slot = numbers!(at: SLOT_STATE, SLOT_ERRNO, SLOT_OFFSET, SLOT_LENGTH);
    assert_eq!(named("offset in a slot", 2), slot);
    let states = numbers!(state: VACANT, POSTED, ASLEEP, GRANTED, REFUSED, LEFT);
    assert_eq!(named("state", 1), states);
}

#[test]
fn the_page_names_sizes_version_and_every_breach() {
    for text in [
        format!("Version {}.", layout::VERSION),
        format!("{:#x}", layout::MAGIC),
        format!("A memfd of {} bytes", at::END),
        format!("{} slots of {} bytes", layout::SLOTS, layout::LINE),
        format!("bytes: 1 to {} MiB, or to one cluster", layout::MAX_ENTRY >> 20),
        format!("one SEQPACKET message of {} bytes", super::packet::PACKET),
        format!("{} counters, 64 bytes apart", layout::WRITE_COUNTERS),
        format!("{} counters: the waits", super::stall::BUCKETS),
    ] {
        assert!(PAGE.contains(&text), "{text}");
    }
    let breaches: Vec<u64> = rows("BROKEN").iter().map(|row| row[0].parse().unwrap()).collect();
    let all = [Breach::NoAnswer, Breach::HungUp, Breach::FrozenTooLong, Breach::Nonsense, Breach::Fault];
    assert_eq!(breaches, all.map(|breach| breach as u64));
}
