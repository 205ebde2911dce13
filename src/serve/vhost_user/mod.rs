//! A guest's disk: vhost-user-blk, for QEMU, cloud-hypervisor, crosvm and Firecracker. The vhost-user protocol is rust-vmm's
//! vhost-user-backend; what a block device does is here. virtio 1.2, 5.2, and QEMU's interop/vhost-user.
//!
//! ```text
//! guest ──queue──▶ queue (its thread) ──▶ request ──▶ perform ──▶ Disk
//!                        └──── pool ───────▲
//! ```
//!
//! One frontend at a time; another one is refused (see `door`). Requests that are in flight when it goes end before the next
//! one is served. Its memory must be shared, and must stay as long as it is: a frontend that truncates it, or whose running queue
//! finds itself past the end of its file, kills us (SIGBUS), as it would kill whoever serves it. Before a queue runs such memory is
//! refused. It runs as a user who may connect to the socket.

mod config;
mod device;
mod door;
pub mod perform;
mod pool;
mod queue;
pub mod request;
mod transfer;
mod vring;

use super::disk::Disk;
use super::{FrontEnd, Notice, Notify};
use crate::error::{Error, Kind, Result};
use crate::unix_socket::Bound;
use device::Device;
use door::{Door, wait};
use queue::Service;
use request::Memory;
use rustix::event::{EventfdFlags, Timespec};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Instant;
use vhost::vhost_user::{Error as ProtocolError, Listener};
use vhost_user_backend::{Error as DaemonError, ShutdownHandle, VhostUserDaemon};
use vm_memory::GuestMemoryAtomic;

type Daemon = VhostUserDaemon<Arc<Device>>;
type DaemonResult = std::result::Result<(), DaemonError>;

/// Queues at most: a thread each.
pub const MOST_QUEUES: u16 = 16;

/// Serves `disk` to frontends that connect to the socket at `path`, with at most `queues` queues (1 to [`MOST_QUEUES`]); a guest
/// may use fewer. See [`crate::serve`] for errors.
pub fn start(disk: Arc<Disk>, path: &Path, queues: u16, notify: Notify) -> Result<Box<dyn FrontEnd>> {
    if !(1..=MOST_QUEUES).contains(&queues) {
        return Err(Error::new(Kind::Usage, format!("{queues} queues for '{}': 1 to {MOST_QUEUES}", path.display())));
    }
    let failed = |what: &str, e| Error::system(Kind::Other, what.to_owned(), e);
    let socket = Bound::at(path)?;
    let address = socket.path().display().to_string();
    let bell = bell().map_err(|e| failed("make an eventfd", e))?;
    let shared = Arc::new(Shared { disk, queues, notify, bell, frontend: Mutex::default() });
    let (alive, ended) = std::sync::mpsc::channel();
    let theirs = shared.clone();
    let thread = std::thread::Builder::new().name("vhost-user".into());
    let thread = thread.spawn(move || theirs.accept(socket, alive));
    let thread = thread.map_err(|e| failed("start the thread of vhost-user", e))?;
    Ok(Box::new(VhostUser { address, shared, thread: Some(thread), ended }))
}

/// An eventfd that nobody has rung.
fn bell() -> io::Result<OwnedFd> {
    Ok(rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?)
}

/// From now on it can be read.
fn ring(bell: &OwnedFd) {
    // It fails only when it has rung 2^64 times unheard.
    let _ = rustix::io::write(bell, &1_u64.to_ne_bytes());
}

/// A socket that is served.
struct VhostUser {
    address: String,
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
    /// Hangs up when the thread has ended.
    ended: Receiver<()>,
}

struct Shared {
    disk: Arc<Disk>,
    queues: u16,
    notify: Notify,
    bell: OwnedFd,
    frontend: Mutex<Frontend>,
}

/// Who is connected.
#[derive(Default)]
struct Frontend {
    stopping: bool,
    current: Option<(ShutdownHandle, Arc<Service>)>,
}

impl Shared {
    fn frontend(&self) -> MutexGuard<'_, Frontend> {
        self.frontend.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The thread: one frontend after the other.
    fn accept(&self, socket: Bound, _alive: Sender<()>) {
        loop {
            match self.wait_for_somebody(&socket) {
                Ok(true) => {}
                Ok(false) => return,
                Err(e) => {
                    let error = Error::system(Kind::Other, format!("wait at '{}'", socket.path().display()), e);
                    return (self.notify)(Notice::Failed(error));
                }
            }
            if let Err(why) = self.serve(&socket) {
                (self.notify)(Notice::Warning(format!("frontend at '{}': {why}", socket.path().display())));
                // Out of descriptors or threads, perhaps: not again at once.
                self.rest();
            }
        }
    }

    /// False: nobody will be served any more.
    fn wait_for_somebody(&self, socket: &Bound) -> io::Result<bool> {
        wait(&[self.bell.as_fd(), socket.listener().as_fd()], None)?;
        Ok(!self.frontend().stopping)
    }

    fn rest(&self) {
        let tenth = Timespec { tv_sec: 0, tv_nsec: 100_000_000 };
        // A bell ends it early.
        let _ = wait(&[self.bell.as_fd()], Some(&tenth));
    }

    /// Serves the frontend that has connected until it goes.
    fn serve(&self, socket: &Bound) -> std::result::Result<(), String> {
        let memory = GuestMemoryAtomic::new(Memory::new());
        let service = Arc::new(Service::new(self.disk.clone(), self.queues));
        let device = Arc::new(Device::new(service.clone(), self.queues, memory.clone()));
        let said = |e: DaemonError| e.to_string();
        let mut daemon = VhostUserDaemon::new("vhost-user frontend".into(), device, memory).map_err(said)?;
        let mut listener = Listener::from(socket.listener().try_clone().map_err(|e| e.to_string())?);
        daemon.start(&mut listener).map_err(said)?;
        {
            let mut frontend = self.frontend();
            frontend.current = daemon.shutdown_handle().map(|handle| (handle, service.clone()));
            if frontend.stopping {
                daemon.request_shutdown();
            }
        }
        let ended = self.until_gone(socket, daemon, &service).map_err(|e| e.to_string());
        service.stop();
        self.frontend().current = None;
        match ended? {
            Ok(()) => Ok(()),
            Err(DaemonError::HandleRequest(ProtocolError::Disconnected | ProtocolError::PartialMessage)) => Ok(()),
            Err(other) => Err(other.to_string()),
        }
    }

    /// Waits until the frontend has gone and what it had in flight has ended. How it went.
    fn until_gone(&self, socket: &Bound, daemon: Daemon, service: &Service) -> io::Result<DaemonResult> {
        let gone = bell()?;
        std::thread::scope(|scope| {
            let thread = std::thread::Builder::new().name("vhost-user end".into());
            let end = thread.spawn_scoped(scope, || {
                let ended = see_out(daemon, service);
                ring(&gone);
                ended
            })?;
            let door = Door { socket, bell: &self.bell, notify: &self.notify };
            let kept = door.keep_shut(&gone, || service.is_leaving());
            // One that panicked has done what it could.
            let ended = end.join().unwrap_or(Ok(()));
            kept.map(|()| ended)
        })
    }
}

/// Waits until a frontend has gone and what it had in flight has ended.
fn see_out(mut daemon: Daemon, service: &Service) -> DaemonResult {
    let ended = daemon.wait();
    // The guest may go on to fill its queues.
    service.stop();
    drop(daemon);
    ended
}

impl VhostUser {
    /// False: not all requests could be ended by `deadline`.
    fn end(&mut self, deadline: Instant) -> bool {
        let Some(thread) = self.thread.take() else { return true };
        let current = {
            let mut frontend = self.shared.frontend();
            frontend.stopping = true;
            frontend.current.clone()
        };
        ring(&self.shared.bell);
        let settled = current.is_none_or(|(handle, service)| {
            service.stop();
            let settled = service.all_settle(deadline);
            handle.shutdown();
            settled
        });
        if !settled {
            return false;
        }
        // All that is left is to end threads that have nothing to do.
        let left = deadline.saturating_duration_since(Instant::now()).max(std::time::Duration::from_millis(200));
        match self.ended.recv_timeout(left) {
            Err(RecvTimeoutError::Timeout) => false,
            _ => thread.join().is_ok(),
        }
    }
}

impl FrontEnd for VhostUser {
    fn address(&self) -> String {
        self.address.clone()
    }

    fn stop(mut self: Box<Self>, deadline: Instant) -> bool {
        self.end(deadline)
    }
}

impl Drop for VhostUser {
    fn drop(&mut self) {
        self.end(Instant::now());
    }
}
