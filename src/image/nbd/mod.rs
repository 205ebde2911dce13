//! An export of an NBD server as an image.

mod connection;
mod extents;
mod handshake;
mod pool;
mod reply;
mod unflushed;

pub use pool::{Dial, Terms};

use super::{Image, Properties};
use crate::error::{Error, Kind, Result, Side};
use crate::ground::range::{ByteRange, Extent};
use crate::nbd::protocol::{command, transmission};
use crate::nbd::stream::Stream;
use crate::nbd::tls::ClientTls;
use crate::nbd::uri::{Address, Uri};
use connection::{Ask, Connection, Fault};
use extents::{Answer, Extents};
use nix::libc;
use pool::Pool;
use std::io;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use unflushed::Change;

/// To connect and negotiate.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// With a silent server.
const PATIENCE: Duration = Duration::from_secs(60);
/// For a server of our own to open its image, which may be behind a network.
const PRIVATE_TIMEOUT: Duration = Duration::from_secs(60);
/// With storage behind it that stands still. Whoever can't wait ends the server.
const PRIVATE_PATIENCE: Duration = Duration::from_secs(600);
/// Bytes that one question about extents is about: the largest that every server takes.
const STATUS_RANGE: u64 = 1 << 30;
/// Questions at most to find out that a target is empty.
const EMPTY_QUESTIONS: usize = 4096;
/// Zeroes that are sent at once where a server can't make them.
const ZEROES: usize = 1 << 20;

/// What the export is used for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Use {
    /// Source: it is read; target: it is written.
    pub side: Side,
    /// A flush means something: nobody asked to leave it out.
    pub flushes: bool,
    /// In which a lost server must be back.
    pub reconnect: Duration,
}

/// An open export. Several threads use it at once, each waiting for its own requests.
pub struct Nbd {
    pool: Pool,
    extents: Extents,
    usage: Use,
    reads_zero: bool,
    /// The server does not say what ranges hold, though it promised to.
    no_status: AtomicBool,
    /// After a failed flush nothing is durable any more.
    flush_failed: AtomicBool,
    flushing: Mutex<()>,
    /// Writes of parts of blocks, one at a time.
    patching: Mutex<()>,
}

impl Nbd {
    /// Connects to `uri`. A read-only export is no target. Blocks for seconds at most; errors name the URI.
    pub fn open(uri: &Uri, usage: Use) -> Result<Self> {
        let name = uri.to_string();
        let failed = |error: io::Error| Error::file(usage.side, "open", Path::new(&name), error);
        let tls = uri.tls.as_ref().map(ClientTls::new).transpose().map_err(failed)?;
        let address = uri.address.clone();
        let dial: Dial = Box::new(move |timeout| Stream::connect(&address, timeout));
        let ask = handshake::Ask { export: uri.export.clone(), tls, timeout: CONNECT_TIMEOUT };
        let terms = Terms { connect: CONNECT_TIMEOUT, patience: PATIENCE, reconnect: usage.reconnect };
        Self::begin(dial, ask, terms, usage).map_err(|error| {
            if error.raw_os_error() == Some(libc::EROFS) {
                return Error::new(Kind::Target, format!("open target '{name}': the export is read-only"));
            }
            failed(error)
        })
    }

    /// Connects to the Unix socket of a server that is ours alone: it is given time to open what it serves and to answer, and
    /// it does not come back when it is gone.
    pub fn open_private(socket: &Path, usage: Use) -> io::Result<Self> {
        let address = Address::Unix(socket.to_owned());
        let dial: Dial = Box::new(move |timeout| Stream::connect(&address, timeout));
        let terms = Terms { connect: PRIVATE_TIMEOUT, patience: PRIVATE_PATIENCE, reconnect: usage.reconnect };
        Self::over(dial, "", terms, usage)
    }

    /// An export over connections that `dial` makes, in the clear. Blocks as the terms say.
    pub fn over(dial: Dial, export: &str, terms: Terms, usage: Use) -> io::Result<Self> {
        let ask = handshake::Ask { export: export.to_owned(), tls: None, timeout: terms.connect };
        Self::begin(dial, ask, terms, usage)
    }

    /// The export reads as zeroes, as its maker knows: a server need not say so.
    pub fn of_zeroes(self) -> Self {
        Self { reads_zero: true, ..self }
    }

    fn begin(dial: Dial, ask: handshake::Ask, terms: Terms, usage: Use) -> io::Result<Self> {
        let is_target = usage.side == Side::Target;
        let pool = Pool::open(dial, ask, terms, is_target)?;
        if is_target && pool.export().has(transmission::READ_ONLY) {
            return Err(io::Error::from_raw_os_error(libc::EROFS));
        }
        let mut nbd = Self {
            pool,
            extents: Extents::default(),
            usage,
            reads_zero: false,
            no_status: AtomicBool::new(false),
            flush_failed: AtomicBool::new(false),
            flushing: Mutex::default(),
            patching: Mutex::default(),
        };
        nbd.reads_zero = is_target && nbd.is_empty();
        nbd.extents.forget();
        Ok(nbd)
    }

    /// Does the server say that all of it reads as zeroes?
    fn is_empty(&self) -> bool {
        let mut rest = ByteRange::new(0, self.length());
        for _ in 0..EMPTY_QUESTIONS {
            if rest.is_empty() {
                return true;
            }
            let Ok(extent) = self.block_status(rest) else { return false };
            if extent != Extent::zero(extent.range) {
                return false;
            }
            rest = ByteRange::between(extent.range.end(), rest.end());
        }
        false
    }

    /// As [`Image::block_status`], from the server or from what it said before.
    fn status(&self, range: ByteRange) -> io::Result<Extent> {
        if self.pool.export().context.is_none() {
            return Ok(Extent::data(range));
        }
        if let Some(known) = self.extents.find(range) {
            return Ok(known);
        }
        let asked = self.around(ByteRange::new(range.offset, STATUS_RANGE.min(self.length() - range.offset)));
        let mut told = Vec::new();
        let state = self.extents.state();
        self.pool.run(|connection| {
            told.clear();
            connection.ask(Ask::Status(&mut told), asked.offset, asked.length)
        })?;
        let answer = Answer::new(asked.offset, self.length(), &told);
        let found = answer.find(range).unwrap_or(Extent::data(range));
        self.extents.keep(state, answer);
        Ok(found)
    }

    /// Whether a flush means something to the server.
    pub fn can_flush(&self) -> bool {
        self.pool.export().has(transmission::SEND_FLUSH)
    }

    fn block(&self) -> u64 {
        self.pool.export().minimum.into()
    }

    /// The least range of whole blocks around `range`.
    fn around(&self, range: ByteRange) -> ByteRange {
        let block = self.block();
        ByteRange::between(range.offset / block * block, range.end().next_multiple_of(block))
    }

    fn flushes(&self) -> bool {
        self.usage.flushes && self.can_flush()
    }

    /// Changes are kept for a server that may come back.
    fn keeps(&self) -> bool {
        self.flushes() && !self.usage.reconnect.is_zero()
    }

    fn write_blocks(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        let kept = || self.keeps().then(|| Change::Bytes(offset, Arc::new(buf.to_vec())));
        self.change(kept, |connection| connection.ask(Ask::Write(buf), offset, buf.len() as u64))
    }

    fn zero_blocks(&self, range: ByteRange) -> io::Result<()> {
        let kept = || self.keeps().then_some(Change::Zeroes(range));
        self.change(kept, |connection| zeroes(connection, range))
    }

    fn change(
        &self,
        kept: impl FnOnce() -> Option<Change>,
        work: impl FnMut(&Connection) -> Result<(), Fault>,
    ) -> io::Result<()> {
        let changed = self.pool.change(kept, work);
        // One that failed may have been done all the same.
        self.extents.forget();
        changed?;
        self.make_room()
    }

    /// A flush, when so much is unflushed that it should not be kept longer.
    fn make_room(&self) -> io::Result<()> {
        if !self.pool.is_flush_due() {
            return Ok(());
        }
        let _one = self.flushing.lock().expect("nothing panics under this lock");
        if self.pool.is_flush_due() { self.flush_once() } else { Ok(()) }
    }

    fn flush_once(&self) -> io::Result<()> {
        if self.flush_failed.load(Relaxed) {
            return Err(io::Error::from_raw_os_error(libc::EIO));
        }
        self.pool.flush().inspect_err(|_| self.flush_failed.store(true, Relaxed))
    }

    /// Changes parts of blocks: what stands around is read and written back.
    fn patch(&self, range: ByteRange, change: impl Fn(&mut [u8])) -> io::Result<()> {
        let _one = self.patching.lock().expect("nothing panics under this lock");
        let whole = self.around(range);
        let mut bytes = vec![0; whole.length as usize];
        self.read_at(&mut bytes, whole.offset)?;
        let start = (range.offset - whole.offset) as usize;
        change(&mut bytes[start..start + range.length as usize]);
        self.write_blocks(&bytes, whole.offset)
    }
}

/// Makes `range` zero, in whichever way the server can.
fn zeroes(connection: &Connection, range: ByteRange) -> Result<(), Fault> {
    if connection.export().has(transmission::SEND_WRITE_ZEROES) {
        match connection.ask(Ask::Plain(command::WRITE_ZEROES), range.offset, range.length) {
            Err(Fault::Refused(error)) if error.raw_os_error() == Some(libc::ENOTSUP) => {}
            result => return result,
        }
    }
    let bytes = vec![0; ZEROES.min(range.length as usize)];
    let mut rest = range;
    while !rest.is_empty() {
        let piece = rest.prefix(bytes.len() as u64);
        connection.ask(Ask::Write(&bytes[..piece.length as usize]), piece.offset, piece.length)?;
        rest = ByteRange::between(piece.end(), range.end());
    }
    Ok(())
}

impl Image for Nbd {
    fn length(&self) -> u64 {
        self.pool.export().length
    }

    /// A server that fails to say it is not asked again: everything is data then.
    fn block_status(&self, range: ByteRange) -> io::Result<Extent> {
        if self.no_status.load(Relaxed) {
            return Ok(Extent::data(range));
        }
        Ok(self.status(range).unwrap_or_else(|_| {
            self.no_status.store(true, Relaxed);
            Extent::data(range)
        }))
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        let range = ByteRange::new(offset, buf.len() as u64);
        let whole = self.around(range);
        if whole == range {
            return self.pool.run(|connection| connection.ask(Ask::Read(buf), offset, range.length));
        }
        let mut bytes = vec![0; whole.length as usize];
        self.pool.run(|connection| connection.ask(Ask::Read(&mut bytes), whole.offset, whole.length))?;
        buf.copy_from_slice(&bytes[(offset - whole.offset) as usize..][..buf.len()]);
        Ok(())
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        let range = ByteRange::new(offset, buf.len() as u64);
        if range.end() > self.length() {
            // As on a device: the image in the export has outgrown it. Servers call that one thing or another.
            return Err(io::Error::from_raw_os_error(libc::ENOSPC));
        }
        if self.around(range) == range {
            return self.write_blocks(buf, offset);
        }
        self.patch(range, |bytes| bytes.copy_from_slice(buf))
    }

    fn write_zeroes(&self, range: ByteRange) -> io::Result<()> {
        let block = self.block();
        let whole = ByteRange::new(range.offset.next_multiple_of(block), 0);
        let end = range.end() / block * block;
        if whole.offset >= end {
            return if range.is_empty() { Ok(()) } else { self.patch(range, |bytes| bytes.fill(0)) };
        }
        self.zero_blocks(ByteRange::between(whole.offset, end))?;
        for part in [ByteRange::between(range.offset, whole.offset), ByteRange::between(end, range.end())] {
            if !part.is_empty() {
                self.patch(part, |bytes| bytes.fill(0))?;
            }
        }
        Ok(())
    }

    fn discard(&self, range: ByteRange) -> io::Result<()> {
        let block = self.block();
        let (start, end) = (range.offset.next_multiple_of(block), range.end() / block * block);
        if start >= end || !self.pool.export().has(transmission::SEND_TRIM) {
            return Ok(());
        }
        let whole = ByteRange::between(start, end);
        // What it reads as is undefined, so that there is nothing to write again.
        let trimmed = self.pool.run(|connection| connection.ask(Ask::Plain(command::TRIM), whole.offset, whole.length));
        self.extents.forget();
        trimmed
    }

    fn flush(&self) -> io::Result<()> {
        if self.usage.side != Side::Target || !self.flushes() {
            return Ok(());
        }
        let _one = self.flushing.lock().expect("nothing panics under this lock");
        self.flush_once()
    }

    fn properties(&self) -> Properties {
        Properties { cluster_size: self.block(), alignment: 1, reads_zero: self.reads_zero, sequential: false }
    }
}

#[cfg(test)]
mod tests;
