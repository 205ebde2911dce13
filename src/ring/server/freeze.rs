//! The instant: every writer of every disk frozen, then all thawed.

use super::link::{ANSWER, Link};
use super::{Hub, Phase, Trap, lock, seconds};
use crate::error::{Error, Kind, Result};
use crate::ring::packet::Packet;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// The writers of one disk, frozen: nothing is in flight. Dropped, they are thawed, and the job has no instant.
#[must_use = "dropped, it thaws the writers without an instant"]
pub struct Frozen {
    hub: Arc<Hub>,
    links: Vec<Arc<Link>>,
    since: Instant,
    ended: bool,
}

/// See [`super::Writers::freeze_all`].
pub fn freeze_all(hubs: &[Arc<Hub>]) -> Result<Vec<Frozen>> {
    let mut disks = Vec::new();
    let since = Instant::now();
    for hub in hubs {
        let mut phase = lock(&hub.phase);
        hub.lost_error().map_or(Ok(()), Err)?;
        if *phase != Phase::Gathering {
            return Err(Error::new(Kind::Other, "writers are frozen once"));
        }
        hub.scan(&phase)?;
        *phase = Phase::Frozen;
        let links = lock(&hub.links).clone();
        disks.push(Frozen { hub: hub.clone(), links, since, ended: false });
    }
    let limit = hubs.iter().map(|hub| hub.options.freeze_timeout).max().unwrap_or_default();
    let since = Instant::now();
    let deadline = since + limit;
    // All are asked before any is waited for, so that they flush at the same time.
    for link in disks.iter_mut().flat_map(|disk| &disk.links) {
        link.send(Packet::Freeze);
    }
    for disk in &mut disks {
        disk.since = since;
        disk.hear_frozen(deadline, limit)?;
    }
    Ok(disks)
}

impl Frozen {
    fn hear_frozen(&mut self, deadline: Instant, limit: Duration) -> Result<()> {
        for link in self.links.clone() {
            match link.answer(deadline) {
                Ok(Some(Packet::Frozen)) => {}
                Ok(Some(Packet::Refused { errno })) => {
                    let errno = std::io::Error::from_raw_os_error(errno as i32);
                    return Err(Error::system(Kind::InstantLost, format!("freeze {link}"), errno));
                }
                Ok(None) => self.drop_gone(&link)?,
                Err(_) if Instant::now() >= deadline => {
                    let text = format!("{link} did not freeze within {}", seconds(limit));
                    return Err(Error::new(Kind::InstantLost, text));
                }
                Ok(Some(_)) => return Err(Error::new(Kind::InstantLost, format!("{link} sent no answer to a freeze"))),
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// A writer that hung up has died, or it lives and writes: then the mark says so.
    fn drop_gone(&mut self, link: &Arc<Link>) -> Result<()> {
        self.hub.look_at_mark(link.pid, &link.ring);
        self.hub.lost_error().map_or(Ok(()), Err)?;
        self.links.retain(|other| !Arc::ptr_eq(other, link));
        self.hub.forget(link);
        Ok(())
    }

    /// Takes the instant as now, and lets the writers go on: from here each write asks `trap`. Returns for how long they
    /// were frozen.
    ///
    /// Fails with [`Kind::InstantLost`] when a writer did not stay frozen until now.
    pub fn thaw(mut self, trap: Arc<dyn Trap>) -> Result<Duration> {
        let known = self.hub.trap.set(trap).is_err();
        debug_assert!(!known, "one freeze, one trap");
        let frozen = self.go_on(true);
        if let Err(error) = &frozen {
            self.hub.lose(error.to_string());
        }
        *lock(&self.hub.phase) = Phase::Trapping;
        // Writers that started meanwhile wait to be attached.
        self.hub.ring_bell();
        frozen
    }

    /// The instant is kept elsewhere, in a clone of the source: lets the writers go for good. Returns for how long they
    /// were frozen.
    ///
    /// Fails with [`Kind::InstantLost`] when a writer did not stay frozen until now.
    pub fn release(mut self) -> Result<Duration> {
        let frozen = self.go_on(false);
        self.hub.end(&mut lock(&self.hub.phase));
        frozen
    }

    fn go_on(&mut self, trap: bool) -> Result<Duration> {
        self.ended = true;
        for link in &self.links {
            link.send(Packet::Thaw { trap });
        }
        let deadline = Instant::now() + ANSWER;
        for link in self.links.clone() {
            loop {
                match link.answer(deadline)? {
                    Some(Packet::Thawed { held: true }) => {}
                    // What it said to a freeze that we had given up on.
                    Some(Packet::Frozen | Packet::Refused { .. }) if !trap => continue,
                    None => self.drop_gone(&link)?,
                    Some(_) => {
                        return Err(Error::new(Kind::InstantLost, format!("{link} did not stay frozen")));
                    }
                }
                break;
            }
        }
        Ok(self.since.elapsed())
    }
}

impl Drop for Frozen {
    fn drop(&mut self) {
        if !self.ended {
            // The job fails for another reason; they are let go whatever they answer.
            for link in &self.links {
                link.send(Packet::Thaw { trap: false });
            }
            self.hub.end(&mut lock(&self.hub.phase));
        }
    }
}
