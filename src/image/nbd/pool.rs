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
    /// Of a target: one at a time begins an epoch.
    beginning: Mutex<()>,
}

#[derive(Default)]
struct Slot {
    connection: Mutex<Option<Arc<Connection>>>,
    busy: AtomicUsize,
}

impl Slot {
    fn place(&self) -> MutexGuard<'_, Option<Arc<Connection>>> {
        self.connection.lock().expect("nothing panics under this lock")
    }
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
    /// Connects: to a source once, to a target as often as it ever will. Blocks for the terms' connect time at most,
    /// and for that of the connections after the first.
    pub fn open(dial: Dial, ask: handshake::Ask, terms: Terms, is_target: bool) -> io::Result<Self> {
        let first = Connection::begin(dial(terms.connect)?, &ask, terms.patience)?;
        let export = *first.export();
        let count = if export.has(transmission::CAN_MULTI_CONN) { CONNECTIONS } else { 1 };
        let slots: Vec<Slot> = (0..count).map(|_| Slot::default()).collect();
        let usable = AtomicUsize::new(count);
        let pool = Self {
            dial,
            ask,
            terms,
            export,
            is_target,
            slots,
            usable,
            outage: Mutex::default(),
            unflushed: Mutex::default(),
            beginning: Mutex::default(),
        };
        let connections = if is_target { pool.with_others(first)? } else { vec![first] };
        pool.publish(connections, 0);
        Ok(pool)
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

    /// The least busy connection; to a source a new one where all are busy and the server may take more.
    fn lease(&self) -> Result<Lease<'_>, Unreachable> {
        if self.is_target {
            self.begin_epoch()?;
        }
        let usable = &self.slots[..self.usable.load(Relaxed)];
        let (index, slot) = usable
            .iter()
            .enumerate()
            .min_by_key(|(_, slot)| slot.busy.load(Relaxed))
            .expect("the first one is always usable");
        match self.lease_of(slot, if index == 0 { self.terms.connect } else { EXTRA_TIMEOUT }) {
            Err(Unreachable::Now(_)) if index > 0 && !self.is_target => {
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
        let mut place = slot.place();
        let epoch = self.unflushed().epoch;
        if let Some(connection) = place.as_ref().filter(|connection| connection.epoch == epoch) {
            return Ok(connection.clone());
        }
        if self.is_target {
            return Err(Unreachable::Now(io::Error::other("the connection was lost again")));
        }
        let connection = Arc::new(self.dialled(timeout)?);
        *place = Some(connection.clone());
        Ok(connection)
    }

    /// A new connection to the same export.
    fn dialled(&self, timeout: Duration) -> Result<Connection, Unreachable> {
        let stream = (self.dial)(timeout).map_err(Unreachable::Now)?;
        let ask = handshake::Ask { timeout, ..self.ask.clone() };
        let connection = Connection::begin(stream, &ask, self.terms.patience).map_err(Unreachable::Now)?;
        let (found, known) = (connection.export(), &self.export);
        if (found.length, found.minimum) != (known.length, known.minimum)
            || found.flags & known.flags & !transmission::CAN_MULTI_CONN != known.flags & !transmission::CAN_MULTI_CONN
        {
            let what = format!("after a reconnect the export is another one, of {} bytes", found.length);
            return Err(Unreachable::Final(io::Error::new(io::ErrorKind::InvalidData, what)));
        }
        Ok(connection)
    }

    /// Connects to a target's server, and writes again what it may have lost, before anybody goes on.
    ///
    /// A server may be restarted at any time; old connections need not notice, and each life of it ends before the
    /// next one begins. So every connection of an epoch is made before anything is asked in it: of the lives that they
    /// reach, only one can answer afterwards, that which still lives when the last of them is made. All answers of an
    /// epoch come from it, and so a flush on one connection covers the changes on all.
    ///
    /// Nobody else has a connection of this epoch before all are made and everything is written again. So it can't end
    /// meanwhile, and nobody writes beside that.
    fn begin_epoch(&self) -> Result<(), Unreachable> {
        let _one = self.beginning.lock().expect("nothing panics under this lock");
        let epoch = self.unflushed().epoch;
        if self.slots[0].place().as_ref().is_some_and(|connection| connection.epoch == epoch) {
            return Ok(());
        }
        let connections = self.with_others(self.dialled(self.terms.connect)?)?;
        self.restore(&connections[0])?;
        self.publish(connections, epoch);
        Ok(())
    }

    /// `first` and as many more connections as the server takes. One that came back may not share any more.
    fn with_others(&self, first: Connection) -> Result<Vec<Connection>, Unreachable> {
        let mut is_shared = first.export().has(transmission::CAN_MULTI_CONN);
        let mut connections = vec![first];
        while is_shared && connections.len() < self.usable.load(Relaxed) {
            match self.dialled(EXTRA_TIMEOUT) {
                Ok(connection) => {
                    is_shared = connection.export().has(transmission::CAN_MULTI_CONN);
                    connections.push(connection);
                }
                Err(Unreachable::Now(_)) => break,
                Err(error) => return Err(error),
            }
        }
        self.usable.store(connections.len(), Relaxed);
        Ok(connections)
    }

    /// Writes again what no flush covers.
    fn restore(&self, connection: &Connection) -> Result<(), Unreachable> {
        let Some(changes) = self.unflushed().to_restore() else {
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
        Ok(())
    }

    fn publish(&self, connections: Vec<Connection>, epoch: u64) {
        debug_assert_eq!(self.unflushed().epoch, epoch, "nobody could lose a connection of it");
        for (slot, mut connection) in self.slots.iter().zip(connections) {
            connection.epoch = epoch;
            *slot.place() = Some(Arc::new(connection));
        }
    }

    /// It is of no use any more, nor, on a target, are the others: who answered there may have been restarted.
    fn drop_connection(&self, lease: &Lease<'_>) {
        let epoch = lease.connection.epoch;
        // Before a slot is empty: nobody connects once more in this epoch.
        let is_over = self.is_target && self.unflushed().lose(epoch);
        lease.slot.place().take_if(|found| Arc::ptr_eq(found, &lease.connection));
        lease.connection.close();
        if !is_over {
            return;
        }
        for slot in &self.slots {
            let other = slot.place().take_if(|found| found.epoch == epoch);
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

impl From<Unreachable> for io::Error {
    fn from(unreachable: Unreachable) -> Self {
        let (Unreachable::Now(error) | Unreachable::Final(error)) = unreachable;
        error
    }
}
