//! The handshake: fixed newstyle negotiation (section of that name), until the client has chosen an export.
//!
//! Everything is read exactly, never ahead: what a client sends in the clear behind `NBD_OPT_STARTTLS` must not count as
//! sent inside TLS.

use super::connection::End;
use super::request::{CONTEXT, Session};
use super::wire::Wire;
use crate::nbd::payload::{self, BlockSize, Info, InfoRequest, MetaRequest};
use crate::nbd::protocol::{
    BASE_ALLOCATION, Greeting, Malformed, OptionHeader, OptionReply, handshake, info, option, option_reply as reply,
    transmission as flag,
};
use crate::nbd::tls::ServerTls;
use crate::serve::disk::Disk;
use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Options of one client at most. A client that looks at every export of a large server uses two for each.
const MOST_OPTIONS: u32 = 1024;
/// Bytes of an option's data at most: a name, and a few dozen queries.
const LONGEST_OPTION: u32 = 64 << 10;
/// Bytes of an option that is too long, and is skipped for the sake of an answer; a longer one ends the connection.
const LONGEST_SKIPPED: u32 = 1 << 20;

/// What a server offers.
#[derive(Clone)]
pub struct Offer {
    /// With different names.
    pub disks: Vec<Arc<Disk>>,
    /// Required of every client, if there.
    pub tls: Option<ServerTls>,
    /// A client must have chosen after so long.
    pub patience: Duration,
    /// A client that takes no replies for so long is hung up on.
    pub stall: Duration,
}

impl Offer {
    /// The export of a name; the only one is the default one, too.
    fn find(&self, name: &str) -> Option<&Arc<Disk>> {
        let only = || self.disks.first().filter(|_| name.is_empty() && self.disks.len() == 1);
        self.disks.iter().find(|disk| disk.name() == name).or_else(only)
    }
}

/// A client between its first byte and its choice.
struct Client<'a, W> {
    wire: W,
    offer: &'a Offer,
    deadline: Instant,
    encrypted: bool,
    zeroes: bool,
    structured: bool,
    /// The export whose `base:allocation` was chosen.
    allocation: Option<Arc<Disk>>,
}

/// An answer to an option that is an error, with words for people.
type Refusal = (u32, &'static str);

/// What follows an option.
enum Next {
    Option,
    Transmission(Session),
    Tls,
}

/// Agrees with a client on an export. Bounded in time, bytes and options by [`Offer::patience`] and the limits above.
pub fn negotiate<W: Wire>(wire: W, offer: &Offer) -> Result<(W, Session), End> {
    let deadline = Instant::now() + offer.patience;
    let mut client =
        Client { wire, offer, deadline, encrypted: false, zeroes: true, structured: false, allocation: None };
    client.greet().map_err(End::Broken)?;
    for _ in 0..MOST_OPTIONS {
        match client.option()? {
            Next::Option => {}
            Next::Tls => client = client.encrypt().map_err(End::Broken)?,
            Next::Transmission(session) => {
                client.wire.set_timeouts(None, Some(offer.stall)).map_err(End::Broken)?;
                return Ok((client.wire, session));
            }
        }
    }
    Err(broken("too many options"))
}

fn broken(what: &'static str) -> End {
    End::Broken(io::Error::new(io::ErrorKind::InvalidData, what))
}

/// What a client may do with `disk`.
fn flags_of(disk: &Disk, structured: bool) -> u16 {
    let always = flag::HAS_FLAGS | flag::SEND_FLUSH | flag::SEND_FUA | flag::CAN_MULTI_CONN | flag::SEND_CACHE;
    let access = match disk.is_read_only() {
        true => flag::READ_ONLY,
        false => flag::SEND_TRIM | flag::SEND_WRITE_ZEROES | flag::SEND_FAST_ZERO,
    };
    always | access | if structured { flag::SEND_DF } else { 0 }
}

impl<W: Wire> Client<'_, W> {
    fn rest(&self) -> io::Result<Duration> {
        let rest = self.deadline.saturating_duration_since(Instant::now());
        if rest.is_zero() { Err(io::ErrorKind::TimedOut.into()) } else { Ok(rest) }
    }

    fn receive(&self, buf: &mut [u8]) -> io::Result<()> {
        let mut filled = 0;
        while filled < buf.len() {
            let rest = Some(self.rest()?);
            self.wire.set_timeouts(rest, rest)?;
            match self.wire.read(&mut buf[filled..])? {
                0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                received => filled += received,
            }
        }
        Ok(())
    }

    fn send(&self, bytes: &[u8]) -> io::Result<()> {
        let rest = Some(self.rest()?);
        self.wire.set_timeouts(rest, rest)?;
        self.wire.write_all(bytes)
    }

    fn greet(&mut self) -> io::Result<()> {
        let all = handshake::FIXED_NEWSTYLE | handshake::NO_ZEROES;
        self.send(&Greeting { flags: all }.encode())?;
        let mut flags = [0; 4];
        self.receive(&mut flags)?;
        let flags = u32::from_be_bytes(flags);
        if flags & !u32::from(all) != 0 {
            return Err(Malformed::Value { of: "client flags", found: flags.into() }.into());
        }
        self.zeroes = flags & u32::from(handshake::NO_ZEROES) == 0;
        Ok(())
    }

    /// Section "`NBD_OPT_STARTTLS`": what was negotiated before counts no more.
    fn encrypt(self) -> io::Result<Self> {
        let Some(tls) = &self.offer.tls else { return Ok(self) };
        let rest = self.rest()?;
        let wire = self.wire.start_tls(tls, rest)?;
        Ok(Self { wire, encrypted: true, structured: false, allocation: None, ..self })
    }

    fn option(&mut self) -> Result<Next, End> {
        let mut header = [0; OptionHeader::LENGTH];
        self.receive(&mut header).map_err(|e| match e.kind() {
            // Half a header counts as none: no client loses anything by it.
            io::ErrorKind::UnexpectedEof => End::Bye,
            _ => End::Broken(e),
        })?;
        let header = OptionHeader::decode(&header).map_err(|e| End::Broken(e.into()))?;
        if header.length > LONGEST_OPTION {
            self.skip(header.length)?;
            return self.refuse(header.option, (reply::ERR_TOO_BIG, "the option's data is too long"));
        }
        let mut data = vec![0; header.length as usize];
        self.receive(&mut data).map_err(End::Broken)?;
        let must_encrypt = self.offer.tls.is_some() && !self.encrypted;
        match header.option {
            option::ABORT => {
                // The client may be gone already.
                let _ = self.answer(header.option, reply::ACK, &[]);
                Err(End::Bye)
            }
            option::STARTTLS => self.start_tls(&data),
            option::EXPORT_NAME if must_encrypt => Err(broken("an export was chosen without TLS")),
            _ if must_encrypt => self.refuse(header.option, (reply::ERR_TLS_REQD, "TLS comes first")),
            option::EXPORT_NAME => self.export_name(&data).map(Next::Transmission),
            option::INFO | option::GO => self.info(header.option, &data),
            option::LIST => self.list(&data),
            option::STRUCTURED_REPLY => self.structured_reply(&data),
            option::LIST_META_CONTEXT | option::SET_META_CONTEXT => self.meta_context(header.option, &data),
            unknown => self.refuse(unknown, (reply::ERR_UNSUP, "unknown option")),
        }
    }

    fn skip(&self, length: u32) -> Result<(), End> {
        if length > LONGEST_SKIPPED {
            return Err(broken("an option of more than 1 MiB"));
        }
        let mut rest = length as usize;
        let mut buf = [0; 4096];
        while rest > 0 {
            let piece = rest.min(buf.len());
            self.receive(&mut buf[..piece]).map_err(End::Broken)?;
            rest -= piece;
        }
        Ok(())
    }

    fn answer(&self, option: u32, kind: u32, data: &[u8]) -> Result<(), End> {
        let mut bytes = OptionReply { option, kind, length: data.len() as u32 }.encode().to_vec();
        bytes.extend(data);
        self.send(&bytes).map_err(End::Broken)
    }

    fn refuse(&self, option: u32, (kind, why): Refusal) -> Result<Next, End> {
        self.answer(option, kind, why.as_bytes()).map(|()| Next::Option)
    }

    fn start_tls(&self, data: &[u8]) -> Result<Next, End> {
        let refusal = match &self.offer.tls {
            None => (reply::ERR_POLICY, "this server has no certificate"),
            Some(_) if self.encrypted => (reply::ERR_INVALID, "TLS has begun already"),
            Some(_) if !data.is_empty() => (reply::ERR_INVALID, "the option has no data"),
            Some(_) => return self.answer(option::STARTTLS, reply::ACK, &[]).map(|()| Next::Tls),
        };
        self.refuse(option::STARTTLS, refusal)
    }

    fn session(&self, disk: &Arc<Disk>) -> Session {
        let allocation = self.allocation.as_ref().is_some_and(|chosen| Arc::ptr_eq(chosen, disk));
        Session { disk: disk.clone(), structured: self.structured, allocation }
    }

    /// The option that has no error: a client that asks for what is not there is hung up on.
    fn export_name(&self, data: &[u8]) -> Result<Session, End> {
        let name = payload::text("export name", data).map_err(|e| End::Broken(e.into()))?;
        let disk = self.offer.find(name).ok_or_else(|| broken("there is no such export"))?;
        let mut bytes = disk.length().to_be_bytes().to_vec();
        bytes.extend(flags_of(disk, self.structured).to_be_bytes());
        bytes.extend([0; 124].iter().filter(|_| self.zeroes));
        self.send(&bytes).map_err(End::Broken)?;
        Ok(self.session(disk))
    }

    fn info(&self, option: u32, data: &[u8]) -> Result<Next, End> {
        let Ok(request) = InfoRequest::decode(data) else {
            return self.refuse(option, (reply::ERR_INVALID, "the option's data makes no sense"));
        };
        let Some(disk) = self.offer.find(request.name) else {
            return self.refuse(option, (reply::ERR_UNKNOWN, "there is no such export"));
        };
        let sizes = disk.sizes();
        let (minimum, preferred, maximum) = (sizes.minimum, sizes.preferred, sizes.maximum);
        let flags = flags_of(disk, self.structured);
        let mut all = vec![
            Info::Export { size: disk.length(), flags },
            Info::BlockSize(BlockSize { minimum, preferred, maximum }),
        ];
        if request.wants(info::NAME) {
            all.push(Info::Name(disk.name()));
        }
        for info in all {
            let mut data = Vec::new();
            info.encode(&mut data);
            self.answer(option, reply::INFO, &data)?;
        }
        self.answer(option, reply::ACK, &[])?;
        Ok(if option == option::GO { Next::Transmission(self.session(disk)) } else { Next::Option })
    }

    fn list(&self, data: &[u8]) -> Result<Next, End> {
        if !data.is_empty() {
            return self.refuse(option::LIST, (reply::ERR_INVALID, "the option has no data"));
        }
        for disk in &self.offer.disks {
            let mut data = Vec::new();
            payload::encode_server(&mut data, disk.name());
            self.answer(option::LIST, reply::SERVER, &data)?;
        }
        self.answer(option::LIST, reply::ACK, &[]).map(|()| Next::Option)
    }

    fn structured_reply(&mut self, data: &[u8]) -> Result<Next, End> {
        if !data.is_empty() || self.structured {
            return self
                .refuse(option::STRUCTURED_REPLY, (reply::ERR_INVALID, "it was asked for already, or has data"));
        }
        self.structured = true;
        self.answer(option::STRUCTURED_REPLY, reply::ACK, &[]).map(|()| Next::Option)
    }

    /// Section "Metadata querying". A choice replaces the one before, even when it fails.
    fn meta_context(&mut self, option: u32, data: &[u8]) -> Result<Next, End> {
        let sets = option == option::SET_META_CONTEXT;
        if sets {
            self.allocation = None;
        }
        if !self.structured {
            return self.refuse(option, (reply::ERR_INVALID, "structured replies come first"));
        }
        let Ok(request) = MetaRequest::decode(data) else {
            return self.refuse(option, (reply::ERR_INVALID, "the option's data makes no sense"));
        };
        let Some(disk) = self.offer.find(request.name) else {
            return self.refuse(option, (reply::ERR_UNKNOWN, "there is no such export"));
        };
        let everything = !sets && request.queries().next().is_none();
        // `base:` lists its namespace, and chooses nothing.
        let fits = |query: &str| query == BASE_ALLOCATION || !sets && query == "base:";
        if everything || request.queries().any(fits) {
            let mut data = Vec::new();
            payload::encode_context(&mut data, if sets { CONTEXT } else { 0 }, BASE_ALLOCATION);
            self.answer(option, reply::META_CONTEXT, &data)?;
            if sets {
                self.allocation = Some(disk.clone());
            }
        }
        self.answer(option, reply::ACK, &[]).map(|()| Next::Option)
    }
}
