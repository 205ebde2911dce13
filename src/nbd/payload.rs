//! The variable parts of the NBD protocol: data of options, of their replies, and of chunks. Encoders append to a
//! buffer; decoders take a whole payload and refuse what does not fill it exactly.

use super::protocol::{ErrorValue, LONGEST_STRING, Malformed, info};

/// Takes a payload apart from its front.
#[derive(Clone, Copy, Debug)]
struct Fields<'a> {
    of: &'static str,
    total: usize,
    rest: &'a [u8],
}

impl<'a> Fields<'a> {
    fn new(of: &'static str, bytes: &'a [u8]) -> Self {
        Self { of, total: bytes.len(), rest: bytes }
    }

    fn wrong_length(&self) -> Malformed {
        Malformed::Length { of: self.of, found: self.total as u64 }
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], Malformed> {
        let (first, rest) = self.rest.split_first_chunk::<N>().ok_or_else(|| self.wrong_length())?;
        self.rest = rest;
        Ok(*first)
    }

    fn u16(&mut self) -> Result<u16, Malformed> {
        self.array().map(u16::from_be_bytes)
    }

    fn u32(&mut self) -> Result<u32, Malformed> {
        self.array().map(u32::from_be_bytes)
    }

    fn u64(&mut self) -> Result<u64, Malformed> {
        self.array().map(u64::from_be_bytes)
    }

    fn bytes(&mut self, length: usize) -> Result<&'a [u8], Malformed> {
        let (first, rest) = self.rest.split_at_checked(length).ok_or_else(|| self.wrong_length())?;
        self.rest = rest;
        Ok(first)
    }

    fn string(&mut self, length: usize) -> Result<&'a str, Malformed> {
        if length > LONGEST_STRING {
            return Err(Malformed::Length { of: "string", found: length as u64 });
        }
        text(self.of, self.bytes(length)?)
    }

    fn end(self) -> Result<(), Malformed> {
        if self.rest.is_empty() { Ok(()) } else { Err(self.wrong_length()) }
    }
}

/// A string of the wire (section "Protocol phases": names are UTF-8, at most 4096 bytes).
pub fn text<'a>(of: &'static str, bytes: &'a [u8]) -> Result<&'a str, Malformed> {
    if bytes.len() > LONGEST_STRING {
        return Err(Malformed::Length { of, found: bytes.len() as u64 });
    }
    std::str::from_utf8(bytes).map_err(|_| Malformed::Text { of })
}

fn push_string(to: &mut Vec<u8>, string: &str) {
    to.extend((string.len() as u32).to_be_bytes());
    to.extend(string.as_bytes());
}

/// The data of `NBD_OPT_INFO` and `NBD_OPT_GO` (section "Option types").
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InfoRequest<'a> {
    /// Of the export; empty: the default one.
    pub name: &'a str,
    /// The kinds of [`info`] that are wanted, as they are sent: two bytes each. Unknown ones are to be ignored.
    wanted: &'a [u8],
}

impl<'a> InfoRequest<'a> {
    /// Appends a request for `name` that wants `kinds` of [`info`].
    pub fn encode(to: &mut Vec<u8>, name: &str, kinds: &[u16]) {
        push_string(to, name);
        to.extend((kinds.len() as u16).to_be_bytes());
        kinds.iter().for_each(|kind| to.extend(kind.to_be_bytes()));
    }

    /// As it was received.
    pub fn decode(bytes: &'a [u8]) -> Result<Self, Malformed> {
        let mut fields = Fields::new("information request", bytes);
        let length = fields.u32()?;
        let name = fields.string(length as usize)?;
        let count = fields.u16()?;
        let wanted = fields.bytes(usize::from(count) * 2)?;
        fields.end()?;
        Ok(Self { name, wanted })
    }

    /// Is this kind of [`info`] wanted?
    pub fn wants(&self, kind: u16) -> bool {
        self.wanted.chunks_exact(2).any(|wanted| wanted == kind.to_be_bytes())
    }
}

/// The data of an `NBD_REP_INFO` (section "Option types", `NBD_OPT_INFO`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Info<'a> {
    /// `NBD_INFO_EXPORT`.
    Export {
        /// Bytes.
        size: u64,
        /// Of [`super::protocol::transmission`].
        flags: u16,
    },
    /// `NBD_INFO_NAME`.
    Name(&'a str),
    /// `NBD_INFO_DESCRIPTION`.
    Description(&'a str),
    /// `NBD_INFO_BLOCK_SIZE`.
    BlockSize(BlockSize),
    /// A kind that the protocol may define some day.
    Unknown(u16),
}

/// What requests should be like, in bytes (section "Size constraints").
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockSize {
    /// Offsets and lengths must be multiples of it.
    pub minimum: u32,
    /// Multiples of it are fast.
    pub preferred: u32,
    /// Longest payload of a request or a reply.
    pub maximum: u32,
}

impl<'a> Info<'a> {
    /// Appends it. An unknown kind has no data.
    pub fn encode(self, to: &mut Vec<u8>) {
        match self {
            Self::Export { size, flags } => {
                to.extend(info::EXPORT.to_be_bytes());
                to.extend(size.to_be_bytes());
                to.extend(flags.to_be_bytes());
            }
            Self::Name(name) => {
                to.extend(info::NAME.to_be_bytes());
                to.extend(name.as_bytes());
            }
            Self::Description(text) => {
                to.extend(info::DESCRIPTION.to_be_bytes());
                to.extend(text.as_bytes());
            }
            Self::BlockSize(BlockSize { minimum, preferred, maximum }) => {
                to.extend(info::BLOCK_SIZE.to_be_bytes());
                [minimum, preferred, maximum].iter().for_each(|size| to.extend(size.to_be_bytes()));
            }
            Self::Unknown(kind) => to.extend(kind.to_be_bytes()),
        }
    }

    /// As it was received. The block sizes are not judged here.
    pub fn decode(bytes: &'a [u8]) -> Result<Self, Malformed> {
        let mut fields = Fields::new("export information", bytes);
        let this = match fields.u16()? {
            info::EXPORT => Self::Export { size: fields.u64()?, flags: fields.u16()? },
            info::NAME => return text("export name", fields.rest).map(Self::Name),
            info::DESCRIPTION => return text("export description", fields.rest).map(Self::Description),
            info::BLOCK_SIZE => {
                Self::BlockSize(BlockSize { minimum: fields.u32()?, preferred: fields.u32()?, maximum: fields.u32()? })
            }
            kind => return Ok(Self::Unknown(kind)),
        };
        fields.end()?;
        Ok(this)
    }
}

/// The data of an `NBD_REP_SERVER`: an export's name; what follows it is for people.
pub fn encode_server(to: &mut Vec<u8>, name: &str) {
    push_string(to, name);
}

/// The name in an `NBD_REP_SERVER`.
pub fn decode_server(bytes: &[u8]) -> Result<&str, Malformed> {
    let mut fields = Fields::new("list entry", bytes);
    let length = fields.u32()?;
    fields.string(length as usize)
}

/// The data of `NBD_OPT_LIST_META_CONTEXT` and `NBD_OPT_SET_META_CONTEXT` (section "Option types").
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MetaRequest<'a> {
    /// Of the export; empty: the default one.
    pub name: &'a str,
    count: u32,
    queries: &'a [u8],
}

impl<'a> MetaRequest<'a> {
    /// Appends a request about `name`.
    pub fn encode(to: &mut Vec<u8>, name: &str, queries: &[&str]) {
        push_string(to, name);
        to.extend((queries.len() as u32).to_be_bytes());
        queries.iter().for_each(|query| push_string(to, query));
    }

    /// As it was received; every query has been looked at.
    pub fn decode(bytes: &'a [u8]) -> Result<Self, Malformed> {
        let mut fields = Fields::new("metadata request", bytes);
        let length = fields.u32()?;
        let name = fields.string(length as usize)?;
        let this = Self { name, count: fields.u32()?, queries: fields.rest };
        // A query takes four bytes at least: a count that is too large ends at the end of the data.
        for _ in 0..this.count {
            let length = fields.u32()?;
            fields.string(length as usize)?;
        }
        fields.end()?;
        Ok(this)
    }

    /// What is asked for. None: for a list everything, for a choice nothing.
    pub fn queries(&self) -> impl Iterator<Item = &'a str> {
        let mut fields = Fields::new("metadata request", self.queries);
        std::iter::from_fn(move || fields.u32().and_then(|length| fields.string(length as usize)).ok())
    }
}

/// Appends the data of an `NBD_REP_META_CONTEXT`.
pub fn encode_context(to: &mut Vec<u8>, number: u32, name: &str) {
    to.extend(number.to_be_bytes());
    to.extend(name.as_bytes());
}

/// Number and name of a metadata context.
pub fn decode_context(bytes: &[u8]) -> Result<(u32, &str), Malformed> {
    let mut fields = Fields::new("metadata context", bytes);
    Ok((fields.u32()?, text("metadata context", fields.rest)?))
}

/// Appends one descriptor of a block status chunk: bytes, and flags of [`super::protocol::allocation`].
pub fn encode_descriptor(to: &mut Vec<u8>, length: u32, flags: u32) {
    to.extend(length.to_be_bytes());
    to.extend(flags.to_be_bytes());
}

/// The number of the metadata context and the descriptors, `(bytes, flags)`, of a block status chunk. There is at least
/// one, and none is empty (section "Structured reply types").
pub fn decode_block_status(bytes: &[u8]) -> Result<(u32, impl Iterator<Item = (u32, u32)>), Malformed> {
    let mut fields = Fields::new("block status", bytes);
    let number = fields.u32()?;
    let (descriptors, odd) = fields.rest.as_chunks::<8>();
    if descriptors.is_empty() || !odd.is_empty() {
        return Err(fields.wrong_length());
    }
    let numbers = descriptors.iter().map(|bytes| {
        let both = u64::from_be_bytes(*bytes);
        ((both >> 32) as u32, both as u32)
    });
    if let Some((_, flags)) = numbers.clone().find(|&(length, _)| length == 0) {
        return Err(Malformed::Value { of: "empty extent with flags", found: flags.into() });
    }
    Ok((number, numbers))
}

/// The payload of an error chunk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ErrorChunk<'a> {
    /// Never 0.
    pub error: ErrorValue,
    /// For people; may be empty.
    pub message: &'a str,
    /// Where, in a chunk that says it.
    pub offset: Option<u64>,
}

impl<'a> ErrorChunk<'a> {
    /// Appends it: a chunk of kind `ERROR_OFFSET` if there is an offset, else `ERROR`. The message is cut to 4096 bytes.
    pub fn encode(self, to: &mut Vec<u8>) {
        let fits = |&end: &usize| self.message.is_char_boundary(end);
        let message = &self.message[..(0..=self.message.len().min(LONGEST_STRING)).rev().find(fits).unwrap_or(0)];
        to.extend(self.error.to_wire().to_be_bytes());
        to.extend((message.len() as u16).to_be_bytes());
        to.extend(message.as_bytes());
        to.extend(self.offset.map(u64::to_be_bytes).into_iter().flatten());
    }

    /// The payload of an error chunk, of kind `ERROR_OFFSET` if it has an offset. Error chunks of other kinds begin in
    /// the same way; for them `rest` is true, and more bytes may follow.
    pub fn decode(bytes: &'a [u8], has_offset: bool, rest: bool) -> Result<Self, Malformed> {
        let mut fields = Fields::new("error chunk", bytes);
        let value = fields.u32()?;
        let error = ErrorValue::of_wire(value).ok_or(Malformed::Value { of: "error", found: 0 })?;
        let length = fields.u16()?;
        let message = fields.string(length.into())?;
        let offset = if has_offset { Some(fields.u64()?) } else { None };
        if !rest {
            fields.end()?;
        }
        Ok(Self { error, message, offset })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn encoded(write: impl FnOnce(&mut Vec<u8>)) -> Vec<u8> {
        let mut bytes = Vec::new();
        write(&mut bytes);
        bytes
    }

    #[test]
    fn an_information_request_names_export_and_kinds() {
        let bytes = encoded(|to| InfoRequest::encode(to, "disk", &[info::BLOCK_SIZE, 77]));
        assert_eq!(bytes, b"\0\0\0\x04disk\0\x02\0\x03\0\x4d");
        let request = InfoRequest::decode(&bytes).unwrap();
        assert_eq!(request.name, "disk");
        assert!(request.wants(info::BLOCK_SIZE) && request.wants(77) && !request.wants(info::NAME));
    }

    #[test]
    fn what_does_not_fill_its_payload_is_refused() {
        let whole = encoded(|to| InfoRequest::encode(to, "disk", &[info::BLOCK_SIZE]));
        for length in 0..whole.len() {
            assert!(InfoRequest::decode(&whole[..length]).is_err(), "{length}");
        }
        assert!(InfoRequest::decode(&[&whole[..], b"x"].concat()).is_err());
        let meta = encoded(|to| MetaRequest::encode(to, "d", &["base:allocation", "base:"]));
        for length in 0..meta.len() {
            assert!(MetaRequest::decode(&meta[..length]).is_err(), "{length}");
        }
        assert!(MetaRequest::decode(b"\0\0\0\0\xff\xff\xff\xff").is_err());
        assert!(InfoRequest::decode(b"\xff\xff\xff\xff").is_err());
        assert!(Info::decode(b"\0\x03\0\0\0\x01").is_err());
        assert!(decode_block_status(b"\0\0\0\0").is_err());
        assert!(decode_block_status(b"\0\0\0\0\0\0\0\x01\0\0\0").is_err());
        assert!(decode_block_status(b"\0\0\0\0\0\0\0\0\0\0\0\0").is_err());
    }

    #[test]
    fn names_are_text_of_bounded_length() {
        let long = "x".repeat(LONGEST_STRING + 1);
        assert!(InfoRequest::decode(&encoded(|to| InfoRequest::encode(to, &long, &[]))).is_err());
        assert!(InfoRequest::decode(&encoded(|to| InfoRequest::encode(to, &long[1..], &[]))).is_ok());
        assert_eq!(text("name", b"\xff"), Err(Malformed::Text { of: "name" }));
        assert!(decode_server(b"\0\0\0\x02a").is_err());
        assert_eq!(decode_server(b"\0\0\0\x02abcomment"), Ok("ab"));
        assert_eq!(decode_server(&encoded(|to| encode_server(to, "disk"))), Ok("disk"));
    }

    #[test]
    fn answers_are_read_as_they_were_written() {
        let sizes = BlockSize { minimum: 1, preferred: 4096, maximum: 32 << 20 };
        for info in [
            Info::Export { size: 1 << 40, flags: 0x0f },
            Info::Name("ü"),
            Info::Description(""),
            Info::BlockSize(sizes),
            Info::Unknown(9),
        ] {
            assert_eq!(Info::decode(&encoded(|to| info.encode(to))), Ok(info));
        }
        let meta = encoded(|to| MetaRequest::encode(to, "d", &["base:allocation", "", "qemu:"]));
        let request = MetaRequest::decode(&meta).unwrap();
        assert_eq!((request.name, request.queries().collect::<Vec<_>>()), ("d", vec!["base:allocation", "", "qemu:"]));
        assert_eq!(decode_context(&encoded(|to| encode_context(to, 1, "base:allocation"))), Ok((1, "base:allocation")));
        let mut status = 7_u32.to_be_bytes().to_vec();
        encode_descriptor(&mut status, 512, 3);
        encode_descriptor(&mut status, 1024, 0);
        let (number, extents) = decode_block_status(&status).unwrap();
        assert_eq!((number, extents.collect::<Vec<_>>()), (7, vec![(512, 3), (1024, 0)]));
    }

    #[test]
    fn error_chunks_say_where() {
        let error = ErrorChunk { error: ErrorValue::Io, message: "bad", offset: Some(4096) };
        let bytes = encoded(|to| error.encode(to));
        assert_eq!(ErrorChunk::decode(&bytes, true, false), Ok(error));
        assert!(ErrorChunk::decode(&bytes, false, false).is_err());
        assert_eq!(ErrorChunk::decode(&bytes, false, true), Ok(ErrorChunk { offset: None, ..error }));
        let long = "ü".repeat(LONGEST_STRING);
        let bytes = encoded(|to| ErrorChunk { message: &long, ..error }.encode(to));
        assert_eq!(ErrorChunk::decode(&bytes, true, false).unwrap().message.len(), LONGEST_STRING);
    }

    proptest! {
        #[test]
        fn no_bytes_make_a_decoder_panic(bytes in proptest::collection::vec(any::<u8>(), 0..64)) {
            let _ = InfoRequest::decode(&bytes).map(|request| request.wants(3));
            let _ = MetaRequest::decode(&bytes).map(|request| request.queries().count());
            let _ = Info::decode(&bytes);
            let _ = decode_server(&bytes);
            let _ = decode_context(&bytes);
            let _ = decode_block_status(&bytes).map(|(_, extents)| extents.count());
            let _ = ErrorChunk::decode(&bytes, true, false);
            let _ = ErrorChunk::decode(&bytes, false, true);
        }
    }
}
