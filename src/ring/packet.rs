//! What goes over the socket: packets of 64 bytes, in the machine's byte order. Pure: bytes to values and back.

use super::layout::{MAGIC, VERSION, at, bitmap_bytes};
use crate::ground::cluster::ClusterSize;
use std::time::Duration;

/// Bytes of every packet.
pub const PACKET: usize = 64;
const SMALLEST_CLUSTER: u32 = 512;
const LARGEST_CLUSTER: u32 = 64 << 20;
/// A writer never agrees to be frozen for longer.
pub const LONGEST_FREEZE: Duration = Duration::from_secs(60);
/// A writer never agrees to wait longer for a grant.
pub const LONGEST_WAIT: Duration = Duration::from_secs(300);

/// The terms under which a backup attaches to a writer. Two descriptors come with it: the ring, then the bitmap.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Attach {
    /// The number in the name of the backup's announcement.
    pub announcement: u64,
    /// Bytes of the disk that the backup copies. Writes beyond are none of its business.
    pub length: u64,
    /// The unit of trapping.
    pub cluster_size: ClusterSize,
    /// How long the writer lets itself be frozen.
    pub freeze_timeout: Duration,
    /// How long the writer waits for a grant.
    pub cbw_timeout: Duration,
    /// The instant has passed: every write is trapped from the first on. A writer that has begun a write refuses.
    pub trap_at_once: bool,
}

/// One packet. See docs/RING.md for who sends which when.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Packet {
    /// Backup: these are the terms.
    Attach(Attach),
    /// Writer: agreed.
    Attached,
    /// Writer: no, or not any more, because of this errno.
    Refused {
        /// A positive errno.
        errno: u32,
    },
    /// Backup: begin no further write, finish those in flight, flush, say so.
    Freeze,
    /// Writer: nothing is in flight and everything is flushed.
    Frozen,
    /// Backup: go on, and ask before each write when `trap`.
    Thaw {
        /// Ask before each write; otherwise the connection is over.
        trap: bool,
    },
    /// Writer: going on.
    Thawed {
        /// It was frozen from its `Frozen` until now. Otherwise there was no instant.
        held: bool,
    },
    /// Backup: the copy needs the writer no more.
    Detach,
}

/// Why 64 bytes are no packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Malformed {
    /// Not 64 bytes.
    #[error("a packet of {0} bytes, not 64")]
    Length(usize),
    /// Not of this protocol.
    #[error("not a packet of this protocol")]
    Magic,
    /// Of another version.
    #[error("version {0} of the protocol; this is version {VERSION}")]
    Version(u32),
    /// A kind that does not exist.
    #[error("unknown kind of packet {0}")]
    Kind(u32),
    /// A field out of its range, by name.
    #[error("bad {0} in a packet")]
    Field(&'static str),
}

/// The numbers of the kinds.
pub mod kind {
    /// [`super::Packet::Attach`].
    pub const ATTACH: u32 = 1;
    /// [`super::Packet::Attached`].
    pub const ATTACHED: u32 = 2;
    /// [`super::Packet::Refused`].
    pub const REFUSED: u32 = 3;
    /// [`super::Packet::Freeze`].
    pub const FREEZE: u32 = 4;
    /// [`super::Packet::Frozen`].
    pub const FROZEN: u32 = 5;
    /// [`super::Packet::Thaw`].
    pub const THAW: u32 = 6;
    /// [`super::Packet::Thawed`].
    pub const THAWED: u32 = 7;
    /// [`super::Packet::Detach`].
    pub const DETACH: u32 = 8;
}

/// Offsets in a packet.
pub mod field {
    /// u32.
    pub const MAGIC: usize = 0;
    /// u32.
    pub const VERSION: usize = 4;
    /// u32.
    pub const KIND: usize = 8;
    /// u32: `Refused` an errno, `Thaw` trap, `Thawed` held, else 0.
    pub const VALUE: usize = 12;
    /// u64, as all from here only in `Attach`, else 0.
    pub const ANNOUNCEMENT: usize = 16;
    /// u64.
    pub const LENGTH: usize = 24;
    /// u64.
    pub const BITMAP_BYTES: usize = 32;
    /// u32.
    pub const RING_BYTES: usize = 40;
    /// u32.
    pub const SLOTS: usize = 44;
    /// u32.
    pub const CLUSTER_BYTES: usize = 48;
    /// u32.
    pub const FREEZE_MS: usize = 52;
    /// u32.
    pub const CBW_MS: usize = 56;
    /// u32: bit 0 is `trap_at_once`.
    pub const FLAGS: usize = 60;
}

type Bytes = [u8; PACKET];

fn put(bytes: &mut Bytes, at: usize, value: u32) {
    bytes[at..at + 4].copy_from_slice(&value.to_ne_bytes());
}

fn put_wide(bytes: &mut Bytes, at: usize, value: u64) {
    bytes[at..at + 8].copy_from_slice(&value.to_ne_bytes());
}

fn get(bytes: &Bytes, at: usize) -> u32 {
    u32::from_ne_bytes(std::array::from_fn(|i| bytes[at + i]))
}

fn get_wide(bytes: &Bytes, at: usize) -> u64 {
    u64::from_ne_bytes(std::array::from_fn(|i| bytes[at + i]))
}

fn milliseconds(duration: Duration) -> u32 {
    duration.as_millis().clamp(1, u128::from(u32::MAX)) as u32
}

impl Attach {
    /// Bytes of the bitmap.
    pub fn bitmap_bytes(&self) -> u64 {
        bitmap_bytes(self.cluster_size.count(self.length))
    }

    fn encode(&self, bytes: &mut Bytes) {
        put_wide(bytes, field::ANNOUNCEMENT, self.announcement);
        put_wide(bytes, field::LENGTH, self.length);
        put_wide(bytes, field::BITMAP_BYTES, self.bitmap_bytes());
        put(bytes, field::RING_BYTES, at::END as u32);
        put(bytes, field::SLOTS, super::layout::SLOTS as u32);
        put(bytes, field::CLUSTER_BYTES, self.cluster_size.bytes() as u32);
        put(bytes, field::FREEZE_MS, milliseconds(self.freeze_timeout));
        put(bytes, field::CBW_MS, milliseconds(self.cbw_timeout));
        put(bytes, field::FLAGS, u32::from(self.trap_at_once));
    }

    fn decode(bytes: &Bytes) -> Result<Self, Malformed> {
        let cluster_bytes = get(bytes, field::CLUSTER_BYTES);
        if !cluster_bytes.is_power_of_two() || !(SMALLEST_CLUSTER..=LARGEST_CLUSTER).contains(&cluster_bytes) {
            return Err(Malformed::Field("cluster size"));
        }
        let (freeze, cbw) = (get(bytes, field::FREEZE_MS), get(bytes, field::CBW_MS));
        let attach = Self {
            announcement: get_wide(bytes, field::ANNOUNCEMENT),
            length: get_wide(bytes, field::LENGTH),
            cluster_size: ClusterSize::new(u64::from(cluster_bytes)),
            freeze_timeout: Duration::from_millis(u64::from(freeze)).min(LONGEST_FREEZE),
            cbw_timeout: Duration::from_millis(u64::from(cbw)).min(LONGEST_WAIT),
            trap_at_once: get(bytes, field::FLAGS) == 1,
        };
        let good = [
            (attach.length <= i64::MAX as u64, "length"),
            (get_wide(bytes, field::BITMAP_BYTES) == attach.bitmap_bytes(), "size of the bitmap"),
            (get(bytes, field::RING_BYTES) == at::END as u32, "size of the ring"),
            (get(bytes, field::SLOTS) == super::layout::SLOTS as u32, "number of slots"),
            (freeze > 0, "freeze timeout"),
            (cbw > 0, "cbw timeout"),
            (get(bytes, field::FLAGS) <= 1, "flags"),
        ];
        match good.iter().find(|(good, _)| !good) {
            Some((_, name)) => Err(Malformed::Field(name)),
            None => Ok(attach),
        }
    }
}

impl Packet {
    fn kind_and_value(&self) -> (u32, u32) {
        match *self {
            Self::Attach(_) => (kind::ATTACH, 0),
            Self::Attached => (kind::ATTACHED, 0),
            Self::Refused { errno } => (kind::REFUSED, errno),
            Self::Freeze => (kind::FREEZE, 0),
            Self::Frozen => (kind::FROZEN, 0),
            Self::Thaw { trap } => (kind::THAW, u32::from(trap)),
            Self::Thawed { held } => (kind::THAWED, u32::from(held)),
            Self::Detach => (kind::DETACH, 0),
        }
    }

    /// The bytes to send.
    pub fn encode(&self) -> [u8; PACKET] {
        let mut bytes = [0; PACKET];
        let (kind, value) = self.kind_and_value();
        put(&mut bytes, field::MAGIC, MAGIC);
        put(&mut bytes, field::VERSION, VERSION);
        put(&mut bytes, field::KIND, kind);
        put(&mut bytes, field::VALUE, value);
        if let Self::Attach(attach) = self {
            attach.encode(&mut bytes);
        }
        bytes
    }

    /// What a peer sent. The peer is not trusted: every field is checked.
    pub fn decode(received: &[u8]) -> Result<Self, Malformed> {
        let bytes: &Bytes = received.try_into().map_err(|_| Malformed::Length(received.len()))?;
        if get(bytes, field::MAGIC) != MAGIC {
            return Err(Malformed::Magic);
        }
        match get(bytes, field::VERSION) {
            VERSION => {}
            other => return Err(Malformed::Version(other)),
        }
        let value = get(bytes, field::VALUE);
        let packet = match get(bytes, field::KIND) {
            kind::ATTACH => Self::Attach(Attach::decode(bytes)?),
            kind::ATTACHED => Self::Attached,
            kind::REFUSED if (1..4096).contains(&value) => Self::Refused { errno: value },
            kind::FREEZE => Self::Freeze,
            kind::FROZEN => Self::Frozen,
            kind::THAW if value <= 1 => Self::Thaw { trap: value == 1 },
            kind::THAWED if value <= 1 => Self::Thawed { held: value == 1 },
            kind::DETACH => Self::Detach,
            kind::REFUSED | kind::THAW | kind::THAWED => return Err(Malformed::Field("value")),
            other => return Err(Malformed::Kind(other)),
        };
        let (_, expected) = packet.kind_and_value();
        let rest_is_clear = bytes[field::ANNOUNCEMENT..].iter().all(|&byte| byte == 0);
        if value != expected || !(rest_is_clear || matches!(packet, Self::Attach(_))) {
            return Err(Malformed::Field("reserved bytes"));
        }
        Ok(packet)
    }
}

#[cfg(all(test, not(any(loom, shuttle))))]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn attach() -> Attach {
        Attach {
            announcement: 7,
            length: 10_000_001,
            cluster_size: ClusterSize::new(4096),
            freeze_timeout: Duration::from_secs(5),
            cbw_timeout: Duration::from_secs(30),
            trap_at_once: true,
        }
    }

    fn any_packet() -> impl Strategy<Value = Packet> {
        prop_oneof![
            (any::<u64>(), 0..=i64::MAX as u64, 9..26_u32, 1..60_000_u64, 1..300_000_u64, any::<bool>()).prop_map(
                |(announcement, length, bits, freeze, cbw, trap_at_once)| Packet::Attach(Attach {
                    announcement,
                    length,
                    cluster_size: ClusterSize::new(1 << bits),
                    freeze_timeout: Duration::from_millis(freeze),
                    cbw_timeout: Duration::from_millis(cbw),
                    trap_at_once,
                })
            ),
            Just(Packet::Attached),
            (1..4096_u32).prop_map(|errno| Packet::Refused { errno }),
            Just(Packet::Freeze),
            Just(Packet::Frozen),
            any::<bool>().prop_map(|trap| Packet::Thaw { trap }),
            any::<bool>().prop_map(|held| Packet::Thawed { held }),
            Just(Packet::Detach),
        ]
    }

    proptest! {
        #![proptest_config(crate::ground::cases(256))]

        #[test]
        fn what_is_encoded_is_decoded(packet in any_packet()) {
            prop_assert_eq!(Packet::decode(&packet.encode()), Ok(packet));
        }

        #[test]
        fn no_bytes_make_it_panic(bytes in prop::collection::vec(any::<u8>(), 0..100)) {
            prop_assert!(Packet::decode(&bytes).is_err());
        }

        #[test]
        fn a_changed_packet_is_refused_or_is_another_packet(
            packet in any_packet(), at in 0..PACKET, value in any::<u8>()
        ) {
            let mut bytes = packet.encode();
            bytes[at] = value;
            if let Ok(other) = Packet::decode(&bytes) {
                prop_assert_eq!(&other.encode()[..52], &bytes[..52]);
            }
        }
    }

    #[test]
    fn each_field_out_of_range_is_named() {
        let wrong = |at: usize, value: u32| {
            let mut bytes = Packet::Attach(attach()).encode();
            put(&mut bytes, at, value);
            Packet::decode(&bytes).unwrap_err()
        };
        assert_eq!(wrong(field::MAGIC, 1), Malformed::Magic);
        assert_eq!(wrong(field::VERSION, 2), Malformed::Version(2));
        assert_eq!(wrong(field::KIND, 99), Malformed::Kind(99));
        assert_eq!(wrong(field::VALUE, 1), Malformed::Field("reserved bytes"));
        assert_eq!(wrong(field::LENGTH + 4, u32::MAX), Malformed::Field("length"));
        assert_eq!(wrong(field::BITMAP_BYTES, 8), Malformed::Field("size of the bitmap"));
        assert_eq!(wrong(field::RING_BYTES, 4096), Malformed::Field("size of the ring"));
        assert_eq!(wrong(field::SLOTS, 33), Malformed::Field("number of slots"));
        for bytes in [0, 1, 256, 4097, 128 << 20] {
            assert_eq!(wrong(field::CLUSTER_BYTES, bytes), Malformed::Field("cluster size"));
        }
        assert_eq!(wrong(field::FREEZE_MS, 0), Malformed::Field("freeze timeout"));
        assert_eq!(wrong(field::CBW_MS, 0), Malformed::Field("cbw timeout"));
        assert_eq!(wrong(field::FLAGS, 2), Malformed::Field("flags"));
    }

    #[test]
    fn a_value_that_its_kind_does_not_have_is_named() {
        for (packet, values) in [
            (Packet::Refused { errno: 1 }, &[0, 4096, u32::MAX][..]),
            (Packet::Thaw { trap: true }, &[2, u32::MAX]),
            (Packet::Thawed { held: true }, &[2, u32::MAX]),
        ] {
            for &value in values {
                let mut bytes = packet.encode();
                put(&mut bytes, field::VALUE, value);
                assert_eq!(Packet::decode(&bytes), Err(Malformed::Field("value")), "{packet:?}: {value}");
            }
        }
    }

    #[test]
    fn the_bitmap_of_a_disk_has_a_bit_for_each_cluster() {
        assert_eq!(attach().bitmap_bytes(), 4096);
        assert_eq!(Attach { length: (4096 * 8 + 1) * 4096, ..attach() }.bitmap_bytes(), 8192);
    }

    #[test]
    fn a_writer_agrees_to_no_endless_wait() {
        let mut bytes = Packet::Attach(attach()).encode();
        put(&mut bytes, field::FREEZE_MS, u32::MAX);
        put(&mut bytes, field::CBW_MS, u32::MAX);
        let Ok(Packet::Attach(terms)) = Packet::decode(&bytes) else { panic!("refused") };
        assert_eq!((terms.freeze_timeout, terms.cbw_timeout), (LONGEST_FREEZE, LONGEST_WAIT));
    }
}
