//! From a connected stream to an export, as "Newstyle negotiation" in the NBD project's `doc/proto.md` has it: TLS if it
//! is asked for, structured replies and `base:allocation` if they are there, then `NBD_OPT_GO`, or `NBD_OPT_EXPORT_NAME`
//! where a server knows only that.

use crate::nbd::protocol::{
    BASE_ALLOCATION, DEFAULT_MAXIMUM, Greeting, LONGEST_STRING, OptionHeader, OptionReply, handshake, info, option,
    option_reply, transmission,
};
use crate::nbd::stream::Stream;
use crate::nbd::tls::ClientTls;
use std::io;
use std::time::{Duration, Instant};

/// Replies to one option at most: a server that goes on for ever is left.
const REPLIES_LIMIT: usize = 1024;
/// Bytes of one reply to an option at most.
const REPLY_LIMIT: u32 = 64 << 10;
/// The zero bytes that end the answer to `NBD_OPT_EXPORT_NAME`.
const PADDING: usize = 124;
/// The largest minimum that the protocol allows.
const MINIMUM_LIMIT: u32 = 64 << 10;

/// What is asked of a server.
#[derive(Clone, Debug)]
pub struct Ask {
    /// The export's name.
    pub export: String,
    /// TLS, without which nothing is said.
    pub tls: Option<ClientTls>,
    /// For all of it.
    pub timeout: Duration,
}

/// What a server said of its export.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Export {
    /// Size in bytes.
    pub length: u64,
    /// Of [`transmission`].
    pub flags: u16,
    /// Bytes: requests start and end on multiples of it. A power of two, 1 to 64 KiB.
    pub minimum: u32,
    /// Bytes of a request's data at most; a multiple of `minimum`.
    pub maximum: u32,
    /// Replies come in chunks.
    pub structured: bool,
    /// The number that `base:allocation` has in this connection.
    pub context: Option<u32>,
}

impl Export {
    /// Has it this flag of [`transmission`]?
    pub fn has(&self, flag: u16) -> bool {
        self.flags & flag != 0
    }
}

/// Negotiates on a fresh connection. Blocks for the ask's timeout at most. Errors are one line on what the server did.
pub fn negotiate(stream: Stream, ask: &Ask) -> io::Result<(Stream, Export)> {
    let mut talk = Talk { stream, deadline: Instant::now() + ask.timeout };
    let flags = talk.greet()?;
    if let Some(tls) = &ask.tls {
        talk = talk.start_tls(tls)?;
    }
    let mut export =
        if flags & handshake::FIXED_NEWSTYLE == 0 { talk.export_name(ask, flags)? } else { talk.choose(ask, flags)? };
    check(&mut export)?;
    talk.stream.set_read_timeout(None)?;
    talk.stream.set_write_timeout(None)?;
    Ok((talk.stream, export))
}

struct Talk {
    stream: Stream,
    deadline: Instant,
}

/// A reply to an option.
struct Reply {
    kind: u32,
    data: Vec<u8>,
}

impl Talk {
    fn greet(&mut self) -> io::Result<u16> {
        let greeting = Greeting::decode(&self.take()?)
            .map_err(|error| wrong(format!("this is no newstyle NBD server: {error}")))?;
        let answer = greeting.flags & (handshake::FIXED_NEWSTYLE | handshake::NO_ZEROES);
        self.send(&u32::from(answer).to_be_bytes())?;
        Ok(answer)
    }

    fn start_tls(mut self, tls: &ClientTls) -> io::Result<Self> {
        let reply = self.ask(option::STARTTLS, &[])?;
        match reply.kind {
            option_reply::ACK => {}
            option_reply::ERR_UNSUP | option_reply::ERR_POLICY => return Err(denied("the server has no TLS")),
            _ => return Err(refused("TLS", &reply)),
        }
        let rest = self.deadline.saturating_duration_since(Instant::now());
        Ok(Self { stream: self.stream.start_tls_client(tls, rest)?, ..self })
    }

    fn choose(&mut self, ask: &Ask, flags: u16) -> io::Result<Export> {
        let structured = self.ask(option::STRUCTURED_REPLY, &[])?;
        let structured = match structured.kind {
            option_reply::ACK => true,
            option_reply::ERR_TLS_REQD => {
                return Err(denied("the server wants TLS: write nbds, with tls-certificates"));
            }
            _ => false,
        };
        let context = if structured { self.context(&ask.export)? } else { None };
        let mut export = match self.go(ask)? {
            Some(export) => export,
            None => self.export_name(ask, flags)?,
        };
        (export.structured, export.context) = (structured, context);
        Ok(export)
    }

    /// Chooses `base:allocation`; without it every byte is data.
    fn context(&mut self, export: &str) -> io::Result<Option<u32>> {
        let mut data = string(export);
        data.extend(1u32.to_be_bytes());
        data.extend(string(BASE_ALLOCATION));
        self.request(option::SET_META_CONTEXT, &data)?;
        let mut context = None;
        for _ in 0..REPLIES_LIMIT {
            let reply = self.reply(option::SET_META_CONTEXT)?;
            match reply.kind {
                option_reply::META_CONTEXT if reply.data.get(4..) == Some(BASE_ALLOCATION.as_bytes()) => {
                    context = Some(number(&reply.data)?);
                }
                option_reply::META_CONTEXT => {}
                option_reply::ACK => return Ok(context),
                // Whether the export is there is for GO to say, with the better reason.
                kind if kind & option_reply::ERROR != 0 => return Ok(None),
                kind => return Err(wrong(format!("the server answers a metadata context with {kind:#x}"))),
            }
        }
        Err(endless())
    }

    /// `None`: the server does not know GO.
    fn go(&mut self, ask: &Ask) -> io::Result<Option<Export>> {
        let mut data = string(&ask.export);
        data.extend(1u16.to_be_bytes());
        data.extend(info::BLOCK_SIZE.to_be_bytes());
        self.request(option::GO, &data)?;
        let mut found: Option<(u64, u16)> = None;
        let mut sizes = None;
        for _ in 0..REPLIES_LIMIT {
            let reply = self.reply(option::GO)?;
            match reply.kind {
                option_reply::INFO => match (number16(&reply.data)?, reply.data.len()) {
                    (info::EXPORT, 12) => {
                        let flags = u16::from_be_bytes([reply.data[10], reply.data[11]]);
                        found = Some((number64(&reply.data[2..])?, flags));
                    }
                    (info::BLOCK_SIZE, 14) => sizes = Some((number(&reply.data[2..])?, number(&reply.data[10..])?)),
                    (kind @ (info::EXPORT | info::BLOCK_SIZE), length) => {
                        return Err(wrong(format!("the server's info {kind} has {length} bytes")));
                    }
                    _ => {}
                },
                option_reply::ACK => {
                    let (length, flags) = found.ok_or_else(|| wrong("the server does not say the export's size"))?;
                    return Ok(Some(self::export(length, flags, sizes)));
                }
                option_reply::ERR_UNSUP => return Ok(None),
                option_reply::ERR_UNKNOWN => {
                    let why = format!("the server has no export '{}'{}", ask.export, message(&reply));
                    return Err(io::Error::new(io::ErrorKind::NotFound, why));
                }
                option_reply::ERR_TLS_REQD => {
                    return Err(denied("the server wants TLS: write nbds, with tls-certificates"));
                }
                _ => return Err(refused("the export", &reply)),
            }
        }
        Err(endless())
    }

    /// The old way: an export that is not there ends the connection.
    fn export_name(&mut self, ask: &Ask, flags: u16) -> io::Result<Export> {
        self.request(option::EXPORT_NAME, ask.export.as_bytes())?;
        let head: [u8; 10] = self.take().map_err(|error| match error.kind() {
            io::ErrorKind::UnexpectedEof => io::Error::new(
                io::ErrorKind::NotFound,
                format!("the server hung up when asked for export '{}'", ask.export),
            ),
            _ => error,
        })?;
        if flags & handshake::NO_ZEROES == 0 {
            self.take::<PADDING>()?;
        }
        Ok(export(number64(&head)?, u16::from_be_bytes([head[8], head[9]]), None))
    }

    fn ask(&mut self, option: u32, data: &[u8]) -> io::Result<Reply> {
        self.request(option, data)?;
        self.reply(option)
    }

    fn request(&mut self, option: u32, data: &[u8]) -> io::Result<()> {
        let header = OptionHeader { option, length: data.len() as u32 };
        let mut bytes = header.encode().to_vec();
        bytes.extend(data);
        self.send(&bytes)
    }

    fn reply(&mut self, option: u32) -> io::Result<Reply> {
        let reply = OptionReply::decode(&self.take()?)?;
        if reply.option != option {
            return Err(wrong(format!("the server answers option {} where {option} was asked", reply.option)));
        }
        if reply.length > REPLY_LIMIT {
            return Err(wrong(format!("the server's reply to option {option} has {} bytes", reply.length)));
        }
        let mut data = vec![0; reply.length as usize];
        self.fill(&mut data)?;
        Ok(Reply { kind: reply.kind, data })
    }

    fn take<const N: usize>(&mut self) -> io::Result<[u8; N]> {
        let mut bytes = [0; N];
        self.fill(&mut bytes)?;
        Ok(bytes)
    }

    fn fill(&mut self, buf: &mut [u8]) -> io::Result<()> {
        let mut filled = 0;
        while filled < buf.len() {
            self.stream.set_read_timeout(Some(self.rest()?))?;
            match self.stream.read(&mut buf[filled..]) {
                Ok(0) => return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the server hung up")),
                Ok(length) => filled += length,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Err(silent()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    fn send(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.stream.set_write_timeout(Some(self.rest()?))?;
        self.stream.write_all(bytes)
    }

    fn rest(&self) -> io::Result<Duration> {
        let rest = self.deadline.saturating_duration_since(Instant::now());
        if rest.is_zero() { Err(silent()) } else { Ok(rest) }
    }
}

fn export(length: u64, flags: u16, sizes: Option<(u32, u32)>) -> Export {
    // Without announced sizes a server takes everything.
    let (minimum, maximum) = sizes.unwrap_or((1, DEFAULT_MAXIMUM));
    Export { length, flags, minimum, maximum, structured: false, context: None }
}

/// Sizes that make no sense would make requests that make none.
fn check(export: &mut Export) -> io::Result<()> {
    let Export { length, minimum, maximum, .. } = *export;
    if length > i64::MAX as u64 {
        return Err(wrong(format!("the export has {length} bytes, which no disk has")));
    }
    if !minimum.is_power_of_two() || minimum > MINIMUM_LIMIT {
        return Err(wrong(format!("the export's minimum block size is {minimum}")));
    }
    if !length.is_multiple_of(minimum.into()) {
        return Err(wrong(format!("the export has {length} bytes, which are no whole blocks of {minimum}")));
    }
    export.maximum = maximum.min(DEFAULT_MAXIMUM) / minimum * minimum;
    if export.maximum == 0 {
        return Err(wrong(format!("the export's maximum block size is {maximum}, its minimum {minimum}")));
    }
    if !export.has(transmission::HAS_FLAGS) {
        // All other flags mean nothing then.
        export.flags = 0;
    }
    Ok(())
}

fn string(text: &str) -> Vec<u8> {
    let mut bytes = (text.len() as u32).to_be_bytes().to_vec();
    bytes.extend(text.as_bytes());
    bytes
}

fn bytes<const N: usize>(data: &[u8]) -> io::Result<[u8; N]> {
    data.first_chunk().copied().ok_or_else(|| wrong("a reply of the server is too short"))
}

fn number16(data: &[u8]) -> io::Result<u16> {
    bytes(data).map(u16::from_be_bytes)
}

fn number(data: &[u8]) -> io::Result<u32> {
    bytes(data).map(u32::from_be_bytes)
}

fn number64(data: &[u8]) -> io::Result<u64> {
    bytes(data).map(u64::from_be_bytes)
}

/// What the server says to people, for one line of ours.
fn message(reply: &Reply) -> String {
    let text = String::from_utf8_lossy(&reply.data[..reply.data.len().min(LONGEST_STRING)]);
    let text = text.replace(char::is_control, " ");
    if text.trim().is_empty() { String::new() } else { format!(" ({})", text.trim()) }
}

fn refused(what: &str, reply: &Reply) -> io::Error {
    let why = match reply.kind {
        option_reply::ERR_POLICY => "not allowed".to_owned(),
        option_reply::ERR_INVALID => "invalid".to_owned(),
        option_reply::ERR_PLATFORM => "not supported on its platform".to_owned(),
        option_reply::ERR_SHUTDOWN => "it is going down".to_owned(),
        option_reply::ERR_BLOCK_SIZE_REQD => "it wants its block sizes to be asked for".to_owned(),
        option_reply::ERR_TOO_BIG => "too long".to_owned(),
        other => format!("reply {other:#x}"),
    };
    denied(format!("the server refuses {what}: {why}{}", message(reply)))
}

fn wrong(why: impl Into<String>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, why.into())
}

fn denied(why: impl Into<String>) -> io::Error {
    io::Error::new(io::ErrorKind::PermissionDenied, why.into())
}

fn endless() -> io::Error {
    wrong(format!("the server answers one option with more than {REPLIES_LIMIT} replies"))
}

fn silent() -> io::Error {
    io::Error::new(io::ErrorKind::TimedOut, "the server does not answer")
}
