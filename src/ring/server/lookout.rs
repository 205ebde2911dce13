//! The thread that watches: writers that start, writers that go, captures that take too long. It captures nothing.

use super::{Counted, Hub, Phase, lock};
use rustix::event::{PollFd, PollFlags, Timespec};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::Duration;

/// How often it looks at the clock: a late capture is answered that much later.
const TICK: Duration = Duration::from_millis(50);

/// Starts it. It ends when the phase is over and the bell rings.
pub fn start(hub: Arc<Hub>) -> io::Result<JoinHandle<()>> {
    // Without inotify, which users can run out of, it looks at the folder every time.
    let watch = hub.folder.watch().ok();
    *lock(&hub.threads) += 1;
    let counted = Counted(hub.clone());
    thread::Builder::new().name("lookout".into()).spawn(move || {
        let _counted = counted;
        while !hub.is_over() {
            turn(&hub, watch.as_ref());
        }
    })
}

fn turn(hub: &Arc<Hub>, watch: Option<&OwnedFd>) {
    // While they are frozen, who freezes them hears what they say; the bell rings when that is over.
    let frozen = *lock(&hub.phase) == Phase::Frozen;
    let links = if frozen { Vec::new() } else { lock(&hub.links).clone() };
    // Those that are over would be ready for ever.
    let links: Vec<_> = links.into_iter().filter(|link| !link.is_over()).collect();
    let watch = watch.filter(|_| !frozen);
    let mut fds = vec![PollFd::new(&hub.bell, PollFlags::IN)];
    // Only hang-ups: what writers say is for the one who asked them.
    fds.extend(links.iter().map(|link| PollFd::new(&link.socket, PollFlags::RDHUP)));
    fds.extend(watch.map(|watch| PollFd::from_borrowed_fd(watch.as_fd(), PollFlags::IN)));
    let timeout = Timespec { tv_sec: 0, tv_nsec: TICK.as_nanos() as i64 };
    // A failure (EINTR, no memory) is an empty turn.
    let events = rustix::event::poll(&mut fds, Some(&timeout)).unwrap_or(0);
    let ready: Vec<_> = fds.iter().map(|fd| events > 0 && !fd.revents().is_empty()).collect();
    drop(fds);
    let rung = ready[0];
    if rung {
        let _ = rustix::io::read(&hub.bell, &mut [0; 8]);
    }
    let phase = lock(&hub.phase);
    if *phase == Phase::Frozen || *phase == Phase::Over {
        return;
    }
    for (link, _) in links.iter().zip(&ready[1..]).filter(|(_, ready)| **ready) {
        hub.look_at_mark(link.pid, &link.ring);
        if hub.lost.get().is_none() {
            hub.forget(link);
        }
    }
    hub.bury_the_dead();
    for link in links.iter().filter(|link| !link.is_over()) {
        hub.expire(link);
    }
    let appeared = rung || watch.is_none() || ready[ready.len() - 1];
    if appeared && hub.lost.get().is_none() {
        if let Some(watch) = watch {
            while rustix::io::read(watch, &mut [0; 4096]).is_ok_and(|bytes| bytes > 0) {}
        }
        // Before the instant a writer that can't be attached makes the freeze fail; after it, the backup.
        if let (Err(error), Phase::Trapping) = (hub.scan(&phase), *phase) {
            hub.lose(error.to_string());
        }
    }
}
