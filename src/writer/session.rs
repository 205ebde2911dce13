//! One backup attached to this writer: its terms, its ring, and how a write asks.

use crate::ground::cluster::Clusters;
use crate::ground::range::ByteRange;
use crate::hold;
use crate::ring::futex::{Futex, WAKER};
use crate::ring::layout::{Breach, MAX_ENTRY};
use crate::ring::packet::Attach;
use crate::ring::queue::{Answer, Places};
use crate::ring::shm::{Bits, Ring};
use crate::ring::socket;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

/// How long a write waits awake: about what a capture of one cluster takes while the backup is awake too. Then it
/// sleeps, and a wake-up costs as much again.
const AWAKE: Duration = Duration::from_micros(50);

/// See the module. Everything in it is final but the ring, the bitmap and the two flags.
#[derive(Debug)]
pub struct Session {
    pub terms: Attach,
    pub ring: Ring,
    pub socket: OwnedFd,
    bits: Bits,
    places: Places,
    trapping: AtomicBool,
    over: AtomicBool,
    awake: Duration,
}

/// How an asking write ends.
#[derive(Debug)]
pub enum Asked {
    /// Write.
    Granted,
    /// Fail with this error, before the disk is touched.
    Refused(io::Error),
    /// Mark the ring broken for this reason, then write.
    Left(Breach),
}

impl Session {
    /// Under `terms`, over what came with them.
    pub fn new(terms: Attach, ring: Ring, bits: Bits, socket: OwnedFd) -> Self {
        let alone = std::thread::available_parallelism().is_ok_and(|cpus| cpus.get() == 1);
        Self {
            trapping: AtomicBool::new(terms.trap_at_once),
            terms,
            ring,
            socket,
            bits,
            places: Places::default(),
            over: AtomicBool::new(false),
            awake: if alone { Duration::ZERO } else { AWAKE },
        }
    }

    /// The instant has passed: writes ask from now on.
    pub fn trap(&self) {
        self.trapping.store(true, Ordering::SeqCst);
    }

    /// The first cluster that a write to `range` has to ask for. `None`: it may write.
    ///
    /// A write that finds the session not trapping is inside the gate. It came in before the freeze, which waits for
    /// its end: it belongs to the time before the instant.
    pub fn first_held(&self, mine: usize, range: ByteRange) -> Option<u64> {
        if !self.trapping.load(Ordering::SeqCst) {
            return None;
        }
        self.ring.count_write(mine);
        self.bits.first_held(self.clusters(range))
    }

    /// Has [`Session::first_held`] something, just now?
    pub fn is_held(&self, range: ByteRange) -> bool {
        self.trapping.load(Ordering::SeqCst) && self.bits.first_held(self.clusters(range)).is_some()
    }

    /// Writes beyond the end of what the backup copies are none of its business.
    fn clusters(&self, range: ByteRange) -> Clusters {
        self.terms.cluster_size.covering(range.intersect(ByteRange::new(0, self.terms.length)))
    }

    /// Asks for every held cluster of `range`, `first` being the first. Blocks, within the terms' bound for each piece.
    pub fn ask(&self, range: ByteRange, first: u64) -> Asked {
        let size = self.terms.cluster_size;
        let end = self.clusters(range).end;
        let most = (MAX_ENTRY / size.bytes()).max(1);
        let mut held = Some(first);
        while let Some(first) = held {
            let piece = first..end.min(first + most);
            held = (piece.end < end).then(|| self.bits.first_held(piece.end..end)).flatten();
            match self.ask_for(size.bytes_of(piece, self.terms.length).intersect(range)) {
                Answer::Granted => {}
                Answer::Refused(errno @ 1..4096) => {
                    return Asked::Refused(io::Error::from_raw_os_error(errno as i32));
                }
                Answer::Refused(_) => return Asked::Left(Breach::Nonsense),
                Answer::Left if self.over.load(Ordering::SeqCst) => return Asked::Left(Breach::HungUp),
                Answer::Left => return Asked::Left(Breach::NoAnswer),
            }
        }
        Asked::Granted
    }

    fn ask_for(&self, piece: ByteRange) -> Answer {
        let mut patience = Futex::new(self.awake, self.terms.cbw_timeout);
        let Some(slot) = self.places.take(|| patience.remaining(), &self.over) else { return Answer::Left };
        self.ring.post(slot, piece, &WAKER);
        hold::at(hold::Place::Waiting);
        let answer = self.ring.await_answer(slot, &self.over, &mut patience);
        // A slot that was left is not used again: the backup may still answer it. The session is over anyhow.
        if answer != Answer::Left {
            self.places.give_back(slot);
        }
        answer
    }

    /// Releases everybody who waits, now and later, and hangs up.
    pub fn end(&self) {
        self.ring.end(&self.over, &WAKER);
        self.places.wake_all();
        socket::hang_up(&self.socket);
    }
}
