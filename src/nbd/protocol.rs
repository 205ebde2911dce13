//! The numbers of the NBD protocol and its fixed headers, as pure functions on byte arrays. All integers are
//! big-endian. Section names refer to the NBD project's `doc/proto.md`.

use crate::ground::range::ByteRange;
use nix::libc;
use std::io;

/// First eight bytes of a server, `NBDMAGIC` (section "Newstyle negotiation").
pub const GREETING_MAGIC: u64 = 0x4e42_444d_4147_4943;
/// Second eight bytes of a newstyle server, and the first of every option, `IHAVEOPT`.
pub const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054;
/// First eight bytes of an oldstyle server in place of [`OPTION_MAGIC`] (section "Oldstyle negotiation").
pub const OLDSTYLE_MAGIC: u64 = 0x0000_4202_8186_1253;
/// First eight bytes of a reply to an option (section "Fixed newstyle negotiation").
pub const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
/// First four bytes of a request (section "Request message").
pub const REQUEST_MAGIC: u32 = 0x2560_9513;
/// First four bytes of a simple reply (section "Simple reply message").
pub const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;
/// First four bytes of a chunk of a structured reply (section "Structured reply chunk message").
pub const CHUNK_MAGIC: u32 = 0x668e_33ef;
/// The port that IANA assigned.
pub const PORT: u16 = 10809;

/// Longest string on the wire, in bytes: names of exports, queries, messages (section "Metadata querying" and others).
pub const LONGEST_STRING: usize = 4096;
/// Longest request that every server must take when it announces no block sizes (section "Size constraints").
pub const DEFAULT_MAXIMUM: u32 = 32 << 20;
/// The only metadata context that the protocol defines (section "`base:` metadata namespace").
pub const BASE_ALLOCATION: &str = "base:allocation";

/// Flags of the server's greeting and of the client's answer (section "Flag fields" → "Handshake flags", "Client
/// flags"): the two sides use the same bits.
pub mod handshake {
    /// Fixed newstyle: unknown options get an answer.
    pub const FIXED_NEWSTYLE: u16 = 1;
    /// No 124 zero bytes after the answer to `NBD_OPT_EXPORT_NAME`.
    pub const NO_ZEROES: u16 = 1 << 1;
}

/// Flags of an export (section "Transmission flags").
pub mod transmission {
    /// Always set.
    pub const HAS_FLAGS: u16 = 1;
    /// Writes fail with `EPERM`.
    pub const READ_ONLY: u16 = 1 << 1;
    /// `NBD_CMD_FLUSH` is there.
    pub const SEND_FLUSH: u16 = 1 << 2;
    /// `NBD_CMD_FLAG_FUA` is there.
    pub const SEND_FUA: u16 = 1 << 3;
    /// Like a spinning disk.
    pub const ROTATIONAL: u16 = 1 << 4;
    /// `NBD_CMD_TRIM` is there.
    pub const SEND_TRIM: u16 = 1 << 5;
    /// `NBD_CMD_WRITE_ZEROES` is there.
    pub const SEND_WRITE_ZEROES: u16 = 1 << 6;
    /// `NBD_CMD_FLAG_DF` is there; only with structured replies.
    pub const SEND_DF: u16 = 1 << 7;
    /// A flush on one connection covers what others wrote.
    pub const CAN_MULTI_CONN: u16 = 1 << 8;
    /// `NBD_CMD_CACHE` is there.
    pub const SEND_CACHE: u16 = 1 << 10;
    /// `NBD_CMD_FLAG_FAST_ZERO` is there.
    pub const SEND_FAST_ZERO: u16 = 1 << 11;
}

/// Options of the handshake (section "Option types").
pub mod option {
    /// Ends the handshake with an export, without an answer for errors.
    pub const EXPORT_NAME: u32 = 1;
    /// Ends the session.
    pub const ABORT: u32 = 2;
    /// Names of all exports.
    pub const LIST: u32 = 3;
    /// Everything after it is inside TLS.
    pub const STARTTLS: u32 = 5;
    /// What an export is like.
    pub const INFO: u32 = 6;
    /// Ends the handshake with an export.
    pub const GO: u32 = 7;
    /// Structured replies from now on.
    pub const STRUCTURED_REPLY: u32 = 8;
    /// Which metadata contexts are there.
    pub const LIST_META_CONTEXT: u32 = 9;
    /// Chooses metadata contexts.
    pub const SET_META_CONTEXT: u32 = 10;
    /// Requests and replies with 64-bit lengths.
    pub const EXTENDED_HEADERS: u32 = 11;
}

/// Kinds of a reply to an option (section "Option reply types").
pub mod option_reply {
    /// The end of a good answer.
    pub const ACK: u32 = 1;
    /// One export's name.
    pub const SERVER: u32 = 2;
    /// One piece of an export's description.
    pub const INFO: u32 = 3;
    /// One metadata context and its number.
    pub const META_CONTEXT: u32 = 4;
    /// Set in every kind that is an error.
    pub const ERROR: u32 = 1 << 31;
    /// The server doesn't know this option.
    pub const ERR_UNSUP: u32 = ERROR + 1;
    /// Forbidden by the server's configuration.
    pub const ERR_POLICY: u32 = ERROR + 2;
    /// The option makes no sense, or not now.
    pub const ERR_INVALID: u32 = ERROR + 3;
    /// Not on this platform.
    pub const ERR_PLATFORM: u32 = ERROR + 4;
    /// Only inside TLS.
    pub const ERR_TLS_REQD: u32 = ERROR + 5;
    /// No such export.
    pub const ERR_UNKNOWN: u32 = ERROR + 6;
    /// The server is going down.
    pub const ERR_SHUTDOWN: u32 = ERROR + 7;
    /// The export wants a client that asks for its block sizes.
    pub const ERR_BLOCK_SIZE_REQD: u32 = ERROR + 8;
    /// The option's data is too long.
    pub const ERR_TOO_BIG: u32 = ERROR + 9;
}

/// Pieces of an export's description (section "Option types", `NBD_OPT_INFO` and `NBD_OPT_GO`).
pub mod info {
    /// Size and transmission flags.
    pub const EXPORT: u16 = 0;
    /// Its canonical name.
    pub const NAME: u16 = 1;
    /// For people.
    pub const DESCRIPTION: u16 = 2;
    /// Minimum, preferred and maximum request.
    pub const BLOCK_SIZE: u16 = 3;
}

/// Kinds of a request (section "Request types").
pub mod command {
    /// Reads.
    pub const READ: u16 = 0;
    /// Writes; the data follow the header.
    pub const WRITE: u16 = 1;
    /// Ends the session; has no reply.
    pub const DISC: u16 = 2;
    /// All writes answered before are durable at its reply.
    pub const FLUSH: u16 = 3;
    /// The range is no longer needed.
    pub const TRIM: u16 = 4;
    /// The range will be read soon.
    pub const CACHE: u16 = 5;
    /// The range becomes zero.
    pub const WRITE_ZEROES: u16 = 6;
    /// Extents of the negotiated metadata contexts.
    pub const BLOCK_STATUS: u16 = 7;
}

/// Flags of a request (section "Command flags").
pub mod command_flag {
    /// Durable at its reply.
    pub const FUA: u16 = 1;
    /// Zeroes must be allocated.
    pub const NO_HOLE: u16 = 1 << 1;
    /// The data of a read in one chunk.
    pub const DF: u16 = 1 << 2;
    /// One extent for each metadata context, within the range.
    pub const REQ_ONE: u16 = 1 << 3;
    /// Fail with `ENOTSUP` where zeroes are not faster than a write.
    pub const FAST_ZERO: u16 = 1 << 4;
}

/// Chunks of a structured reply (section "Structured reply types").
pub mod chunk {
    /// In a chunk's flags: the last one of its reply.
    pub const DONE: u16 = 1;
    /// Nothing but the end.
    pub const NONE: u16 = 0;
    /// u64 offset, then data.
    pub const OFFSET_DATA: u16 = 1;
    /// u64 offset, u32 length: zeroes.
    pub const OFFSET_HOLE: u16 = 2;
    /// u32 number of the metadata context, then extents.
    pub const BLOCK_STATUS: u16 = 5;
    /// Set in every kind that is an error.
    pub const IS_ERROR: u16 = 1 << 15;
    /// u32 error, u16 length of a message, the message.
    pub const ERROR: u16 = IS_ERROR + 1;
    /// As [`ERROR`], then the u64 offset of the error.
    pub const ERROR_OFFSET: u16 = IS_ERROR + 2;
}

/// Flags of an extent of `base:allocation` (section "`base:allocation` metadata context").
pub mod allocation {
    /// Not allocated.
    pub const HOLE: u32 = 1;
    /// Reads as zeroes.
    pub const ZERO: u32 = 1 << 1;
}

/// What makes a peer's bytes no NBD.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Malformed {
    /// A magic number is not what must stand there.
    #[error("NBD {of} begins with {found:#x}")]
    Magic {
        /// Which header.
        of: &'static str,
        /// What stood there.
        found: u64,
    },
    /// A length is impossible.
    #[error("NBD {of} of {found} bytes")]
    Length {
        /// What has that length.
        of: &'static str,
        /// Bytes.
        found: u64,
    },
    /// A field has a value that it can't have.
    #[error("NBD {of} {found:#x}")]
    Value {
        /// Which field.
        of: &'static str,
        /// What stood there.
        found: u64,
    },
    /// A string is not UTF-8.
    #[error("NBD {of} is not UTF-8")]
    Text {
        /// Which string.
        of: &'static str,
    },
}

impl From<Malformed> for io::Error {
    fn from(malformed: Malformed) -> Self {
        Self::new(io::ErrorKind::InvalidData, malformed)
    }
}

/// `N` bytes of `bytes` from `at`, where a header has them.
fn part<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    bytes[at..at + N].try_into().expect("N bytes")
}

fn check(of: &'static str, found: u64, expected: u64) -> Result<(), Malformed> {
    if found == expected { Ok(()) } else { Err(Malformed::Magic { of, found }) }
}

/// What a newstyle server says first (section "Newstyle negotiation").
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Greeting {
    /// Of [`handshake`].
    pub flags: u16,
}

impl Greeting {
    /// Bytes on the wire.
    pub const LENGTH: usize = 18;

    /// As it is sent.
    pub fn encode(self) -> [u8; Self::LENGTH] {
        let mut bytes = [0; Self::LENGTH];
        bytes[..8].copy_from_slice(&GREETING_MAGIC.to_be_bytes());
        bytes[8..16].copy_from_slice(&OPTION_MAGIC.to_be_bytes());
        bytes[16..].copy_from_slice(&self.flags.to_be_bytes());
        bytes
    }

    /// As it was received.
    pub fn decode(bytes: &[u8; Self::LENGTH]) -> Result<Self, Malformed> {
        check("greeting", u64::from_be_bytes(part(bytes, 0)), GREETING_MAGIC)?;
        check("newstyle greeting's second half", u64::from_be_bytes(part(bytes, 8)), OPTION_MAGIC)?;
        Ok(Self { flags: u16::from_be_bytes(part(bytes, 16)) })
    }
}

/// The head of an option; `length` bytes of data follow (section "Newstyle negotiation").
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OptionHeader {
    /// Of [`option`].
    pub option: u32,
    /// Bytes of data.
    pub length: u32,
}

impl OptionHeader {
    /// Bytes on the wire.
    pub const LENGTH: usize = 16;

    /// As it is sent.
    pub fn encode(self) -> [u8; Self::LENGTH] {
        let mut bytes = [0; Self::LENGTH];
        bytes[..8].copy_from_slice(&OPTION_MAGIC.to_be_bytes());
        bytes[8..12].copy_from_slice(&self.option.to_be_bytes());
        bytes[12..].copy_from_slice(&self.length.to_be_bytes());
        bytes
    }

    /// As it was received.
    pub fn decode(bytes: &[u8; Self::LENGTH]) -> Result<Self, Malformed> {
        check("option", u64::from_be_bytes(part(bytes, 0)), OPTION_MAGIC)?;
        Ok(Self { option: u32::from_be_bytes(part(bytes, 8)), length: u32::from_be_bytes(part(bytes, 12)) })
    }
}

/// The head of a reply to an option; `length` bytes follow (section "Fixed newstyle negotiation").
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OptionReply {
    /// The option that it answers.
    pub option: u32,
    /// Of [`option_reply`].
    pub kind: u32,
    /// Bytes of data.
    pub length: u32,
}

impl OptionReply {
    /// Bytes on the wire.
    pub const LENGTH: usize = 20;

    /// As it is sent.
    pub fn encode(self) -> [u8; Self::LENGTH] {
        let mut bytes = [0; Self::LENGTH];
        bytes[..8].copy_from_slice(&OPTION_REPLY_MAGIC.to_be_bytes());
        bytes[8..12].copy_from_slice(&self.option.to_be_bytes());
        bytes[12..16].copy_from_slice(&self.kind.to_be_bytes());
        bytes[16..].copy_from_slice(&self.length.to_be_bytes());
        bytes
    }

    /// As it was received.
    pub fn decode(bytes: &[u8; Self::LENGTH]) -> Result<Self, Malformed> {
        check("option reply", u64::from_be_bytes(part(bytes, 0)), OPTION_REPLY_MAGIC)?;
        Ok(Self {
            option: u32::from_be_bytes(part(bytes, 8)),
            kind: u32::from_be_bytes(part(bytes, 12)),
            length: u32::from_be_bytes(part(bytes, 16)),
        })
    }
}

/// A request; the data of a write follow it (section "Request message").
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request {
    /// Of [`command_flag`].
    pub flags: u16,
    /// Of [`command`].
    pub command: u16,
    /// The client's own number, which the reply repeats.
    pub cookie: u64,
    /// In bytes.
    pub offset: u64,
    /// In bytes.
    pub length: u32,
}

impl Request {
    /// Bytes on the wire.
    pub const LENGTH: usize = 28;

    /// As it is sent.
    pub fn encode(self) -> [u8; Self::LENGTH] {
        let mut bytes = [0; Self::LENGTH];
        bytes[..4].copy_from_slice(&REQUEST_MAGIC.to_be_bytes());
        bytes[4..6].copy_from_slice(&self.flags.to_be_bytes());
        bytes[6..8].copy_from_slice(&self.command.to_be_bytes());
        bytes[8..16].copy_from_slice(&self.cookie.to_be_bytes());
        bytes[16..24].copy_from_slice(&self.offset.to_be_bytes());
        bytes[24..].copy_from_slice(&self.length.to_be_bytes());
        bytes
    }

    /// As it was received.
    pub fn decode(bytes: &[u8; Self::LENGTH]) -> Result<Self, Malformed> {
        check("request", u32::from_be_bytes(part(bytes, 0)).into(), REQUEST_MAGIC.into())?;
        Ok(Self {
            flags: u16::from_be_bytes(part(bytes, 4)),
            command: u16::from_be_bytes(part(bytes, 6)),
            cookie: u64::from_be_bytes(part(bytes, 8)),
            offset: u64::from_be_bytes(part(bytes, 16)),
            length: u32::from_be_bytes(part(bytes, 24)),
        })
    }

    /// The bytes that it is about; `None` when they end beyond 2^64.
    pub fn range(self) -> Option<ByteRange> {
        ByteRange::checked(self.offset, self.length.into())
    }

    /// Is this flag of [`command_flag`] set?
    pub fn has(self, flag: u16) -> bool {
        self.flags & flag != 0
    }
}

/// A simple reply; after one without an error to a read the data follow (section "Simple reply message").
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SimpleReply {
    /// 0, or one of [`ErrorValue`].
    pub error: u32,
    /// The request's.
    pub cookie: u64,
}

impl SimpleReply {
    /// Bytes on the wire.
    pub const LENGTH: usize = 16;

    /// As it is sent.
    pub fn encode(self) -> [u8; Self::LENGTH] {
        let mut bytes = [0; Self::LENGTH];
        bytes[..4].copy_from_slice(&SIMPLE_REPLY_MAGIC.to_be_bytes());
        bytes[4..8].copy_from_slice(&self.error.to_be_bytes());
        bytes[8..].copy_from_slice(&self.cookie.to_be_bytes());
        bytes
    }

    /// As it was received.
    pub fn decode(bytes: &[u8; Self::LENGTH]) -> Result<Self, Malformed> {
        check("simple reply", u32::from_be_bytes(part(bytes, 0)).into(), SIMPLE_REPLY_MAGIC.into())?;
        Ok(Self { error: u32::from_be_bytes(part(bytes, 4)), cookie: u64::from_be_bytes(part(bytes, 8)) })
    }
}

/// The head of a chunk; `length` bytes of payload follow (section "Structured reply chunk message").
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Chunk {
    /// [`chunk::DONE`] or 0.
    pub flags: u16,
    /// Of [`chunk`].
    pub kind: u16,
    /// The request's.
    pub cookie: u64,
    /// Bytes of payload.
    pub length: u32,
}

impl Chunk {
    /// Bytes on the wire.
    pub const LENGTH: usize = 20;

    /// As it is sent.
    pub fn encode(self) -> [u8; Self::LENGTH] {
        let mut bytes = [0; Self::LENGTH];
        bytes[..4].copy_from_slice(&CHUNK_MAGIC.to_be_bytes());
        bytes[4..6].copy_from_slice(&self.flags.to_be_bytes());
        bytes[6..8].copy_from_slice(&self.kind.to_be_bytes());
        bytes[8..16].copy_from_slice(&self.cookie.to_be_bytes());
        bytes[16..].copy_from_slice(&self.length.to_be_bytes());
        bytes
    }

    /// As it was received.
    pub fn decode(bytes: &[u8; Self::LENGTH]) -> Result<Self, Malformed> {
        check("chunk", u32::from_be_bytes(part(bytes, 0)).into(), CHUNK_MAGIC.into())?;
        Ok(Self {
            flags: u16::from_be_bytes(part(bytes, 4)),
            kind: u16::from_be_bytes(part(bytes, 6)),
            cookie: u64::from_be_bytes(part(bytes, 8)),
            length: u32::from_be_bytes(part(bytes, 16)),
        })
    }
}

/// What may be in an error field (section "Error values").
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum ErrorValue {
    /// `NBD_EPERM`: the export is read-only.
    Perm = 1,
    /// `NBD_EIO`.
    Io = 5,
    /// `NBD_ENOMEM`.
    NoMemory = 12,
    /// `NBD_EINVAL`: the request makes no sense.
    Invalid = 22,
    /// `NBD_ENOSPC`: full, or past the end.
    NoSpace = 28,
    /// `NBD_EOVERFLOW`: too much for one reply, with `NBD_CMD_FLAG_DF`.
    Overflow = 75,
    /// `NBD_ENOTSUP`.
    NotSupported = 95,
    /// `NBD_ESHUTDOWN`: the server is going down.
    Shutdown = 108,
}

impl ErrorValue {
    /// What the wire says; a number that the protocol does not define counts as `EINVAL`, as the section asks of
    /// clients. 0 is no error: `None`.
    pub fn of_wire(value: u32) -> Option<Self> {
        Some(match value {
            0 => return None,
            1 => Self::Perm,
            5 => Self::Io,
            12 => Self::NoMemory,
            28 => Self::NoSpace,
            75 => Self::Overflow,
            95 => Self::NotSupported,
            108 => Self::Shutdown,
            _ => Self::Invalid,
        })
    }

    /// The nearest to an error of the system.
    pub fn of_error(error: &io::Error) -> Self {
        match error.raw_os_error() {
            Some(errno) => Self::of_errno(errno),
            None => match error.kind() {
                io::ErrorKind::StorageFull => Self::NoSpace,
                io::ErrorKind::OutOfMemory => Self::NoMemory,
                io::ErrorKind::Unsupported => Self::NotSupported,
                io::ErrorKind::InvalidInput => Self::Invalid,
                io::ErrorKind::PermissionDenied => Self::Perm,
                _ => Self::Io,
            },
        }
    }

    /// The nearest to `errno`; what has no counterpart is `NBD_EIO`.
    pub fn of_errno(errno: i32) -> Self {
        match errno {
            libc::EPERM | libc::EROFS | libc::EACCES => Self::Perm,
            libc::ENOMEM => Self::NoMemory,
            libc::EINVAL => Self::Invalid,
            libc::ENOSPC | libc::EDQUOT | libc::EFBIG => Self::NoSpace,
            libc::EOVERFLOW => Self::Overflow,
            libc::ENOTSUP => Self::NotSupported,
            libc::ESHUTDOWN => Self::Shutdown,
            _ => Self::Io,
        }
    }

    /// The number on the wire.
    pub const fn to_wire(self) -> u32 {
        self as u32
    }

    /// The system's number of the same name.
    pub const fn errno(self) -> i32 {
        match self {
            Self::Perm => libc::EPERM,
            Self::Io => libc::EIO,
            Self::NoMemory => libc::ENOMEM,
            Self::Invalid => libc::EINVAL,
            Self::NoSpace => libc::ENOSPC,
            Self::Overflow => libc::EOVERFLOW,
            Self::NotSupported => libc::ENOTSUP,
            Self::Shutdown => libc::ESHUTDOWN,
        }
    }
}

impl From<ErrorValue> for io::Error {
    fn from(value: ErrorValue) -> Self {
        Self::from_raw_os_error(value.errno())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const REQUEST: Request =
        Request { flags: 0x0102, command: 0x0304, cookie: 0x1112_1314_1516_1718, offset: 1 << 40, length: 0xdead_beef };

    #[test]
    fn headers_stand_on_the_wire_as_the_protocol_says() {
        assert_eq!(&Greeting { flags: 3 }.encode(), b"NBDMAGICIHAVEOPT\0\x03");
        assert_eq!(&OptionHeader { option: option::GO, length: 9 }.encode(), b"IHAVEOPT\0\0\0\x07\0\0\0\x09");
        let reply = OptionReply { option: 7, kind: option_reply::ERR_UNKNOWN, length: 2 };
        assert_eq!(&reply.encode(), b"\0\x03\xe8\x89\x04\x55\x65\xa9\0\0\0\x07\x80\0\0\x06\0\0\0\x02");
        assert_eq!(
            &REQUEST.encode(),
            b"\x25\x60\x95\x13\x01\x02\x03\x04\x11\x12\x13\x14\x15\x16\x17\x18\0\0\x01\0\0\0\0\0\xde\xad\xbe\xef"
        );
        let reply = SimpleReply { error: 28, cookie: 7 };
        assert_eq!(&reply.encode(), b"\x67\x44\x66\x98\0\0\0\x1c\0\0\0\0\0\0\0\x07");
        let head = Chunk { flags: chunk::DONE, kind: chunk::ERROR_OFFSET, cookie: 7, length: 14 };
        assert_eq!(&head.encode(), b"\x66\x8e\x33\xef\0\x01\x80\x02\0\0\0\0\0\0\0\x07\0\0\0\x0e");
    }

    #[test]
    fn flags_are_the_bits_that_the_protocol_numbers() {
        let bits = |flags: &[u16]| flags.iter().map(|flag| flag.ilog2()).collect::<Vec<_>>();
        {
            use transmission::*;
            let flags = [HAS_FLAGS, READ_ONLY, SEND_FLUSH, SEND_FUA, ROTATIONAL, SEND_TRIM, SEND_WRITE_ZEROES, SEND_DF];
            assert_eq!(bits(&flags), [0, 1, 2, 3, 4, 5, 6, 7]);
            assert_eq!(bits(&[CAN_MULTI_CONN, SEND_CACHE, SEND_FAST_ZERO]), [8, 10, 11]);
        }
        {
            use command_flag::*;
            assert_eq!(bits(&[FUA, NO_HOLE, DF, REQ_ONE, FAST_ZERO]), [0, 1, 2, 3, 4]);
        }
        assert_eq!(bits(&[handshake::FIXED_NEWSTYLE, handshake::NO_ZEROES, chunk::DONE]), [0, 1, 0]);
        assert_eq!((allocation::HOLE, allocation::ZERO), (1, 2));
        assert_eq!((DEFAULT_MAXIMUM, LONGEST_STRING), (33_554_432, 4096));
    }

    #[test]
    fn errors_have_the_numbers_of_the_protocol() {
        {
            use option_reply::*;
            let errors = [ERR_UNSUP, ERR_POLICY, ERR_INVALID, ERR_PLATFORM, ERR_TLS_REQD];
            assert_eq!(errors.map(|error| error - (1 << 31)), [1, 2, 3, 4, 5]);
            let errors = [ERR_UNKNOWN, ERR_SHUTDOWN, ERR_BLOCK_SIZE_REQD, ERR_TOO_BIG];
            assert_eq!(errors.map(|error| error - (1 << 31)), [6, 7, 8, 9]);
        }
        assert_eq!((chunk::ERROR, chunk::ERROR_OFFSET), (0x8001, 0x8002));
    }

    #[test]
    fn headers_are_read_as_they_were_written() {
        assert_eq!(Greeting::decode(&Greeting { flags: 3 }.encode()), Ok(Greeting { flags: 3 }));
        let header = OptionHeader { option: 11, length: u32::MAX };
        assert_eq!(OptionHeader::decode(&header.encode()), Ok(header));
        let reply = OptionReply { option: 1, kind: 0x8000_0003, length: 5 };
        assert_eq!(OptionReply::decode(&reply.encode()), Ok(reply));
        assert_eq!(Request::decode(&REQUEST.encode()), Ok(REQUEST));
        let reply = SimpleReply { error: 5, cookie: u64::MAX };
        assert_eq!(SimpleReply::decode(&reply.encode()), Ok(reply));
        let head = Chunk { flags: 1, kind: 5, cookie: 3, length: 1 };
        assert_eq!(Chunk::decode(&head.encode()), Ok(head));
    }

    #[test]
    fn a_wrong_magic_is_told() {
        let mut bytes = REQUEST.encode();
        bytes[0] = 0;
        let error = Request::decode(&bytes).unwrap_err();
        assert_eq!(error, Malformed::Magic { of: "request", found: 0x60_9513 });
        assert_eq!(io::Error::from(error).to_string(), "NBD request begins with 0x609513");
        assert!(Greeting::decode(b"NBDMAGIC\0\0\x42\x02\x81\x86\x12\x53\0\0").is_err());
        assert!(OptionHeader::decode(&[0; 16]).is_err());
        assert!(OptionReply::decode(&[0; 20]).is_err());
        assert!(SimpleReply::decode(&[0; 16]).is_err());
        assert!(Chunk::decode(&[0; 20]).is_err());
    }

    #[test]
    fn a_request_beyond_the_largest_offset_has_no_range() {
        assert_eq!(Request { offset: u64::MAX, length: 1, ..REQUEST }.range(), None);
        assert_eq!(Request { offset: 5, length: 1, ..REQUEST }.range(), Some(ByteRange::new(5, 1)));
    }

    #[test]
    fn a_request_has_the_flags_that_are_set_in_it() {
        let request = Request { flags: command_flag::FUA | command_flag::DF, ..REQUEST };
        assert!(request.has(command_flag::FUA) && request.has(command_flag::DF) && !request.has(command_flag::NO_HOLE));
    }

    #[test]
    fn errors_of_our_own_have_the_nearest_meaning() {
        for (kind, value) in [
            (io::ErrorKind::StorageFull, ErrorValue::NoSpace),
            (io::ErrorKind::OutOfMemory, ErrorValue::NoMemory),
            (io::ErrorKind::Unsupported, ErrorValue::NotSupported),
            (io::ErrorKind::InvalidInput, ErrorValue::Invalid),
            (io::ErrorKind::PermissionDenied, ErrorValue::Perm),
            (io::ErrorKind::InvalidData, ErrorValue::Io),
        ] {
            assert_eq!(ErrorValue::of_error(&kind.into()), value, "{kind:?}");
        }
    }

    #[test]
    fn errors_keep_their_meaning_over_the_wire() {
        for errno in [1, 5, 12, 22, 28, 75, 95, 108] {
            let value = ErrorValue::of_errno(errno);
            assert_eq!((value.to_wire(), value.errno()), (errno as u32, errno));
            assert_eq!(ErrorValue::of_wire(errno as u32), Some(value));
        }
        assert_eq!(ErrorValue::of_wire(0), None);
        assert_eq!(ErrorValue::of_wire(4242), Some(ErrorValue::Invalid));
        assert_eq!(ErrorValue::of_errno(libc::EBADF), ErrorValue::Io);
        assert_eq!(ErrorValue::of_errno(libc::EROFS), ErrorValue::Perm);
        assert_eq!(ErrorValue::of_errno(libc::EDQUOT), ErrorValue::NoSpace);
    }
}
