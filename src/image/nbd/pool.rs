//! Connections to one export: as many as its server takes, replaced within a bound when they are lost.

use super::connection::{Ask, Connection, Fault};
use super::handshake;
use super::handshake::Export;
use super::unflushed::{Change, Unflushed};
use crate::nbd::protocol::{command, transmission};
use crate::nbd::stream::Stream;
use std::io;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

/// Connections at most.
const CONNECTIONS: usize = 4;
/// For one more connection: a server that takes no more may leave it waiting.
const EXTRA_TIMEOUT: Duration = Duration::from_secs(2);
/// Between tries to reconnect.
const PAUSES: [Duration; 2] = [Duration::from_millis(50), Duration::from_millis(500)];

/// Makes a fresh connection within a time.
pub type Dial = Box<dyn Fn(Duration) -> io::Result<Stream> + Send + Sync>;

/// How long what may take.
#[derive(Clone, Copy, Debug)]
pub struct Terms {
    /// To connect and negotiate.
    pub connect: Duration,
    /// To bear a silent server that owes a reply.
    pub patience: Duration,
    /// To reconnect in, after which requests fail.
    pub reconnect: Duration,
}

/// The connections, and what a reconnect must not forget.
pub struct Pool {
    dial: Dial,
    ask: handshake::Ask,
    terms: Terms,
    export: Export,
    /// Written to.
    is_target: bool,
    slots: Vec<Slot>,
    /// Connections that are worth a try.
    usable: AtomicUsize,
    /// Since when nothing has been answered.
    outage: Mutex<Option<Instant>>,
    unflushed: Mutex<Unflushed>,
    /// Only one writes again what may be lost: another one could do so after newer changes.
    restoring: Mutex<()>,
}

#[derive(Default)]
struct Slot {
    connection: Mutex<Option<Arc<Connection>>>,
    busy: AtomicUsize,
}

/// A connection while it is used.
struct Lease<'p> {
    slot: &'p Slot,
    connection: Arc<Connection>,
}

impl Drop for Lease<'_> {
    fn drop(&mut self) {
        self.slot.busy.fetch_sub(1, Relaxed);
    }
}

impl Pool {
    /// Connects once. Blocks for the terms' connect time at most.
    pub fn open(dial: Dial, ask: handshake::Ask, terms: Terms, is_target: bool) -> io::Result<Self> {
        let first = Connection::begin(dial(terms.connect)?, &ask, terms.patience)?;
        let export = *first.export();
        let count = if export.has(transmission::CAN_MULTI_CONN) { CONNECTIONS } else { 1 };
        let slots: Vec<Slot> = (0..count).map(|_| Slot::default()).collect();
        *slots[0].connection.lock().expect("new") = Some(Arc::new(first));
        let unflushed = Mutex::new(Unflushed::new());
        let usable = AtomicUsize::new(count);
        Ok(Self {
            dial,
            ask,
            terms,
            export,
            is_target,
            slots,
            usable,
            outage: Mutex::default(),
            unflushed,
            restoring: Mutex::default(),
        })
    }

    /// The export.
    pub fn export(&self) -> &Export {
        &self.export
    }

    /// Does `work` on a connection, again on another one while connections are lost, within the bound. `work` changes
    /// nothing, or may be done twice.
    pub fn run(&self, mut work: impl FnMut(&Connection) -> Result<(), Fault>) -> io::Result<()> {
        let mut trouble: Option<Instant> = None;
        let mut pauses = 0;
        loop {
            let error = match self.lease() {
                Ok(lease) => match work(&lease.connection) {
                    Ok(()) => {
                        *self.outage.lock().expect("nothing panics under this lock") = None;
                        return Ok(());
                    }
                    Err(Fault::Refused(error)) => return Err(error),
                    Err(Fault::Lost(error)) => {
                        self.drop_connection(&lease);
                        error
                    }
                },
                Err(Unreachable::Final(error)) => return Err(error),
                Err(Unreachable::Now(error)) => error,
            };
            let now = Instant::now();
            let began = *self.outage.lock().expect("nothing panics under this lock").get_or_insert(now);
            let began = began.min(*trouble.get_or_insert(now));
            if now.duration_since(began) >= self.terms.reconnect {
                let (kind, why) = (error.kind(), crate::error::reason(&error));
                let seconds = self.terms.reconnect.as_secs_f64();
                return Err(io::Error::new(kind, format!("{why}; not reconnected within {seconds} s")));
            }
            std::thread::sleep(PAUSES[pauses]);
            pauses = (pauses + 1).min(PAUSES.len() - 1);
        }
    }

    /// Changes the disk, and keeps the change until a flush covers it: `kept` makes what is to be kept; `None` is for
    /// disks that nobody flushes.
    pub fn change(
        &self,
        kept: impl FnOnce() -> Option<Change>,
        mut work: impl FnMut(&Connection) -> Result<(), Fault>,
    ) -> io::Result<()> {
        let mut kept = Some(kept);
        let mut change = None;
        self.run(|connection| {
            work(connection)?;
            if let Some(kept) = kept.take() {
                change = Some(kept());
            }
            let mut unflushed = self.unflushed();
            if unflushed.epoch != connection.epoch {
                return Err(Fault::Lost(io::Error::other("the server may have been restarted")));
            }
            change.take().into_iter().for_each(|change| unflushed.add(change));
            Ok(())
        })
    }

    /// Everything that was changed before is durable afterwards, on this server or the one that came after it.
    pub fn flush(&self) -> io::Result<()> {
        self.run(|connection| {
            self.unflushed().begin_flush();
            let result = connection.ask(Ask::Plain(command::FLUSH), 0, 0);
            let mut unflushed = self.unflushed();
            let is_same = unflushed.epoch == connection.epoch;
            unflushed.end_flush(result.is_ok() && is_same);
            match result {
                Ok(()) if !is_same => Err(Fault::Lost(io::Error::other("the server may have been restarted"))),
                other => other,
            }
        })
    }

    /// So much is kept that a flush is due.
    pub fn is_flush_due(&self) -> bool {
        self.unflushed().is_full()
    }

    fn unflushed(&self) -> MutexGuard<'_, Unflushed> {
        self.unflushed.lock().expect("nothing panics under this lock")
    }

    /// The least busy connection; a new one where all are busy and the server may take more.
    fn lease(&self) -> Result<Lease<'_>, Unreachable> {
        let usable = &self.slots[..self.usable.load(Relaxed)];
        let (index, slot) = usable
            .iter()
            .enumerate()
            .min_by_key(|(_, slot)| slot.busy.load(Relaxed))
            .expect("the first one is always usable");
        match self.lease_of(slot, if index == 0 { self.terms.connect } else { EXTRA_TIMEOUT }) {
            Err(Unreachable::Now(_)) if index > 0 => {
                self.usable.fetch_min(index, Relaxed);
                self.lease_of(&self.slots[0], self.terms.connect)
            }
            result => result,
        }
    }

    fn lease_of<'p>(&'p self, slot: &'p Slot, timeout: Duration) -> Result<Lease<'p>, Unreachable> {
        slot.busy.fetch_add(1, Relaxed);
        let connected = self.connected(slot, timeout);
        match connected {
            Ok(connection) => Ok(Lease { slot, connection }),
            Err(error) => {
                slot.busy.fetch_sub(1, Relaxed);
                Err(error)
            }
        }
    }

    fn connected(&self, slot: &Slot, timeout: Duration) -> Result<Arc<Connection>, Unreachable> {
        let mut place = slot.connection.lock().expect("nothing panics under this lock");
        let epoch = self.unflushed().epoch;
        if let Some(connection) = place.as_ref().filter(|connection| connection.epoch == epoch) {
            return Ok(connection.clone());
        }
        let stream = (self.dial)(timeout).map_err(Unreachable::Now)?;
        let ask = handshake::Ask { timeout, ..self.ask.clone() };
        let mut connection = Connection::begin(stream, &ask, self.terms.patience).map_err(Unreachable::Now)?;
        connection.epoch = epoch;
        let (found, known) = (connection.export(), &self.export);
        if (found.length, found.minimum) != (known.length, known.minimum)
            || found.flags & known.flags & !transmission::CAN_MULTI_CONN != known.flags & !transmission::CAN_MULTI_CONN
        {
            let what = format!("after a reconnect the export is another one, of {} bytes", found.length);
            return Err(Unreachable::Final(io::Error::new(io::ErrorKind::InvalidData, what)));
        }
        if self.is_target {
            self.restore(&connection)?;
        }
        let connection = Arc::new(connection);
        *place = Some(connection.clone());
        Ok(connection)
    }

    /// Writes again what the server may have lost, before anybody goes on.
    fn restore(&self, connection: &Connection) -> Result<(), Unreachable> {
        let _one = self.restoring.lock().expect("nothing panics under this lock");
        let changes = {
            let unflushed = self.unflushed();
            if unflushed.is_restored && unflushed.epoch == connection.epoch {
                return Ok(());
            }
            unflushed.to_restore()
        };
        let Some(changes) = changes else {
            let what = "the connection was lost after writes that no flush covers: the server may have lost them";
            return Err(Unreachable::Final(io::Error::other(what)));
        };
        for change in changes {
            let done = match &change {
                Change::Bytes(offset, bytes) => connection.ask(Ask::Write(bytes), *offset, bytes.len() as u64),
                Change::Zeroes(range) => super::zeroes(connection, *range),
            };
            done.map_err(|fault| match fault {
                Fault::Lost(error) => Unreachable::Now(error),
                Fault::Refused(error) => Unreachable::Final(error),
            })?;
        }
        let mut unflushed = self.unflushed();
        if unflushed.epoch == connection.epoch {
            unflushed.is_restored = true;
            Ok(())
        } else {
            Err(Unreachable::Now(io::Error::other("the connection was lost again")))
        }
    }

    /// It is of no use any more, nor, on a target, are the others: who answered there may have been restarted.
    fn drop_connection(&self, lease: &Lease<'_>) {
        let mut place = lease.slot.connection.lock().expect("nothing panics under this lock");
        place.take_if(|found| Arc::ptr_eq(found, &lease.connection));
        drop(place);
        lease.connection.close();
        if !self.is_target {
            return;
        }
        let mut unflushed = self.unflushed();
        if unflushed.epoch != lease.connection.epoch {
            return;
        }
        unflushed.lose();
        drop(unflushed);
        for slot in &self.slots {
            let other = slot.connection.try_lock().ok().and_then(|mut place| place.take());
            if let Some(other) = other {
                other.give_up("another connection to the server was lost");
            }
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        for slot in &self.slots {
            if let Ok(mut place) = slot.connection.lock()
                && let Some(connection) = place.take()
            {
                connection.close();
            }
        }
    }
}

/// Why there is no connection.
enum Unreachable {
    /// Trying again may help.
    Now(io::Error),
    /// Nothing will.
    Final(io::Error),
}
