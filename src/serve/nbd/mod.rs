//! The NBD server: `--nbd`. Fixed newstyle, structured replies, `base:allocation`, TLS.
//!
//! A thread accepts; each connection has threads of its own ([`connection`]), so that none waits for another's client.
//! One thread watches over all of them ([`watch`]).

mod address;
mod clients;
pub mod connection;
pub mod handshake;
mod input;
mod replies;
pub mod request;
#[cfg(test)]
mod tests;
pub mod watch;
pub mod wire;

use crate::error::{Error, Kind, Result};
use crate::nbd::stream::Stream;
use crate::nbd::tls::ServerTls;
use crate::serve::disk::Disk;
use crate::serve::{FrontEnd, Notice, Notify};
use address::Listener;
use clients::{Clients, Place};
use handshake::Offer;
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::io::Errno;
use std::io;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};
use watch::Watch;

/// A client must have chosen an export after so long.
const PATIENCE: Duration = Duration::from_secs(10);
/// A client must take some of its replies within so long: longer than any pause of a healthy one, such as a stopped
/// process that somebody looks at.
const STALL: Duration = Duration::from_secs(300);
/// How long nobody is let in when the process has too many open files.
const BREATHER: Duration = Duration::from_millis(100);

/// How to serve.
#[derive(Clone, Debug)]
pub struct NbdOptions {
    /// Of the server's certificate; every client must use TLS then.
    pub tls_dir: Option<PathBuf>,
    /// Clients at once, of all addresses together. Further ones are hung up on.
    pub max_connections: u32,
}

struct Server {
    address: String,
    clients: Arc<Clients>,
    /// Rung at the end.
    bell: OwnedFd,
    listening: Option<JoinHandle<()>>,
    /// Ends after the connections.
    _watch: Arc<Watch>,
}

/// Serves `disks`, which have different names, at `addresses`: `unix:PATH`, `HOST:PORT`, or `:PORT` for the loopback
/// alone. One front-end for each address.
pub fn start(
    disks: &[Arc<Disk>],
    addresses: &[String],
    options: &NbdOptions,
    notify: &Notify,
) -> Result<Vec<Box<dyn FrontEnd>>> {
    let refused = |e| Error::system(Kind::Usage, "use --tls-dir", e);
    let tls = options.tls_dir.as_deref().map(|folder| ServerTls::new(folder).map_err(refused)).transpose()?;
    let offer = Offer { disks: disks.to_vec(), tls, patience: PATIENCE, stall: STALL };
    let listeners = addresses.iter().map(|address| Listener::at(address)).collect::<Result<Vec<_>>>()?;
    let thread = |e| Error::system(Kind::Other, "start the NBD server's threads", e);
    let watch = Arc::new(Watch::start().map_err(thread)?);
    let clients = Arc::new(Clients::new(offer, watch.bell(), options.max_connections, notify.clone()));
    let serve = |listener| Server::start(listener, &clients, &watch).map_err(thread);
    let servers = listeners.into_iter().map(serve).collect::<Result<Vec<_>>>()?;
    Ok(servers.into_iter().map(|server| Box::new(server) as Box<dyn FrontEnd>).collect())
}

impl Server {
    fn start(listener: Listener, clients: &Arc<Clients>, watch: &Arc<Watch>) -> io::Result<Self> {
        listener.set_nonblocking()?;
        let address = listener.uri(clients.is_encrypted());
        let bell = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        let (heard, letting_in) = (bell.try_clone()?, clients.clone());
        let listen = move || {
            if let Err(e) = listen(&listener, &heard, &letting_in) {
                let what = format!("accept NBD clients at '{}'", listener.uri(letting_in.is_encrypted()));
                letting_in.notify(Notice::Failed(Error::system(Kind::Other, what, e)));
            }
        };
        let listening = Some(thread::Builder::new().name("nbd listen".into()).spawn(listen)?);
        Ok(Self { address, clients: clients.clone(), bell, listening, _watch: watch.clone() })
    }

    /// Lets nobody in any more; the socket is gone afterwards.
    fn close(&mut self) {
        // It fails only when it has been rung 2^64 times unheard.
        let _ = rustix::io::write(&self.bell, &1_u64.to_ne_bytes());
        if let Some(listening) = self.listening.take() {
            let _ = listening.join();
        }
    }
}

impl FrontEnd for Server {
    fn address(&self) -> String {
        self.address.clone()
    }

    fn stop(mut self: Box<Self>, deadline: Instant) -> bool {
        self.close();
        self.clients.drain(deadline)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if self.listening.is_some() {
            self.close();
            self.clients.drain(Instant::now());
        }
    }
}

/// Lets clients in until the bell rings. An error is for good.
fn listen(listener: &Listener, bell: &OwnedFd, clients: &Arc<Clients>) -> io::Result<()> {
    let mut pause = None;
    loop {
        let timeout = pause.take().map(|pause: Duration| Timespec { tv_sec: 0, tv_nsec: pause.as_nanos() as _ });
        let ready = if timeout.is_some() { PollFlags::empty() } else { PollFlags::IN };
        let mut events = [PollFd::new(bell, PollFlags::IN), PollFd::new(listener, ready)];
        match poll(&mut events, timeout.as_ref()) {
            Ok(_) if !events[0].revents().is_empty() => return Ok(()),
            Ok(_) | Err(Errno::INTR) => {}
            Err(errno) => return Err(errno.into()),
        }
        match listener.accept() {
            Ok(stream) => let_in(stream, clients),
            Err(e) => pause = after(e)?,
        }
    }
}

/// Whether to go on after `accept` failed, and when.
fn after(error: io::Error) -> io::Result<Option<Duration>> {
    match Errno::from_io_error(&error) {
        Some(Errno::MFILE | Errno::NFILE | Errno::NOBUFS | Errno::NOMEM) => Ok(Some(BREATHER)),
        Some(Errno::BADF | Errno::INVAL | Errno::NOTSOCK | Errno::OPNOTSUPP | Errno::FAULT) => Err(error),
        // What went wrong with one client, and is told here.
        _ => Ok(None),
    }
}

fn let_in(stream: Stream, clients: &Arc<Clients>) {
    let Some(place) = Place::take(clients) else { return };
    let Ok(place) = place.hold(&stream) else { return };
    let serve = move || {
        let end = place.serve(stream);
        place.leave(end);
    };
    // Where no thread can be started the client is hung up on; the next one may be luckier.
    let _ = thread::Builder::new().name("nbd client".into()).spawn(serve);
}
