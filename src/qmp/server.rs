//! The server: sockets, clients, what they can see.

use super::hub::Hub;
use super::jobs::Jobs;
use super::{client, wire};
use crate::error::{Error, Kind, Result};
use crate::image::format::Format;
use crate::image::secret::Secret;
use crate::ring::folder::{self, Folder};
use crate::unix_socket::{self, Bound};
use serde_json::{Value, json};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::thread;
use std::time::{Duration, Instant};

/// Clients at once.
const MOST_CLIENTS: usize = 16;
/// Between two looks for clients that have got everything.
const LOOK: Duration = Duration::from_millis(5);
/// After a client could not be let in.
const BREATHER: Duration = Duration::from_millis(100);
/// The sockets that are found without being named.
pub(super) const PRIVATE_PREFIX: &str = "qmp-";

/// A disk as clients see it.
#[derive(Clone, Debug)]
pub struct Node {
    /// What they call it.
    pub device: String,
    /// Where it is.
    pub path: PathBuf,
    /// Its format; `None`: its content tells.
    pub format: Option<Format>,
    /// Bytes; `None`: its job tells.
    pub length: Option<u64>,
    /// Nobody writes it.
    pub read_only: bool,
    /// What opens it, where it is encrypted, and a copy of the same format. Never shown.
    pub secret: Option<Secret>,
}

/// What a server is for.
pub struct Setup {
    /// The disks.
    pub nodes: Vec<Node>,
    /// Where the disks' writers are found; `None`: backups can't be started here.
    pub writer_dir: Option<PathBuf>,
    /// `quit` was asked for. Must not block.
    pub quit: Box<dyn Fn() + Send + Sync>,
}

/// What all clients share.
pub(super) struct Shared {
    pub jobs: Arc<Jobs>,
    pub setup: Setup,
    pub groups: AtomicU64,
    pub stopping: AtomicBool,
    hub: Arc<Hub>,
}

impl Shared {
    /// Can backups be started here?
    pub fn serves(&self) -> bool {
        self.setup.writer_dir.is_some()
    }

    pub fn quit(&self) {
        (self.setup.quit)();
    }

    pub fn query_block(&self) -> Value {
        let shown = |node: &Node| {
            let format = node.format.map_or("unknown", Format::name);
            let jobs = self.jobs.shown();
            let of_job =
                || jobs.iter().find(|job| job.new.device == node.device).map(|job| job.new.job.snapshot().total);
            let length = node.length.or_else(of_job).unwrap_or(0);
            json!({
                "device": node.device, "qdev": "", "type": "hd", "removable": false, "locked": false,
                "inserted": {
                    "node-name": node.device, "file": node.path.display().to_string(), "drv": format,
                    "ro": node.read_only, "encrypted": false,
                    "image": {
                        "filename": node.path.display().to_string(), "format": format, "virtual-size": length,
                    },
                },
            })
        };
        self.setup.nodes.iter().map(shown).collect::<Vec<_>>().into()
    }
}

/// Runs on threads of its own until [`Server::stop`].
pub struct Server {
    shared: Arc<Shared>,
    bound: Vec<Arc<Bound>>,
}

impl Server {
    /// Nobody can reach it yet.
    pub fn new(setup: Setup) -> Self {
        let hub = Arc::new(Hub::default());
        let jobs = Arc::new(Jobs::new(Arc::clone(&hub)));
        let (groups, stopping) = (AtomicU64::new(0), AtomicBool::new(false));
        Self { shared: Arc::new(Shared { jobs, setup, groups, stopping, hub }), bound: Vec::new() }
    }

    /// Its jobs.
    pub fn jobs(&self) -> &Arc<Jobs> {
        &self.shared.jobs
    }

    /// Lets clients come in at a socket.
    pub fn listen(&mut self, path: &Path) -> Result<()> {
        let bound = Arc::new(Bound::at(path)?);
        let (accepting, shared) = (Arc::clone(&bound), Arc::clone(&self.shared));
        thread::Builder::new()
            .name("qmp".to_owned())
            .spawn(move || accept(&accepting, &shared))
            .map_err(|e| Error::system(Kind::Other, "start a QMP thread", e))?;
        self.bound.push(bound);
        Ok(())
    }

    /// Lets `drive-backup ctl` find it: a socket in the writers' folder. What killed runs left there is removed.
    pub fn listen_privately(&mut self, writer_dir: Option<&Path>) -> Result<()> {
        let path = writer_dir.map_or_else(folder::default_path, Path::to_owned);
        Folder::open(&path).map_err(|e| Error::system(Kind::Other, format!("use folder '{}'", path.display()), e))?;
        private_sockets(&path)
            .into_iter()
            .filter(|path| unix_socket::is_live(path).is_ok_and(|is_live| !is_live))
            .for_each(|path| {
                // Somebody else may have removed it.
                let _ = std::fs::remove_file(path);
            });
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let number = NEXT.fetch_add(1, Relaxed);
        self.listen(&path.join(format!("{PRIVATE_PREFIX}{}-{number}", std::process::id())))
    }

    /// Tells clients that it ends, and why in QEMU's word for it; waits until `deadline` for them to read it.
    pub fn stop(self, reason: &str, deadline: Instant) {
        self.shared.stopping.store(true, Relaxed);
        self.shared.hub.event("SHUTDOWN", json!({"guest": false, "reason": reason}));
        for bound in &self.bound {
            // Wakes the thread that accepts.
            bound.remove();
            let _ = rustix::net::shutdown(bound.listener(), rustix::net::Shutdown::Both);
        }
        self.shared.hub.close();
        while !self.shared.hub.is_empty() && Instant::now() < deadline {
            thread::sleep(LOOK);
        }
    }
}

/// Those in a folder.
pub(super) fn private_sockets(folder: &Path) -> Vec<PathBuf> {
    let Ok(entries) = std::fs::read_dir(folder) else { return Vec::new() };
    let is_ours = |path: &PathBuf| {
        path.file_name().is_some_and(|name| name.as_encoded_bytes().starts_with(PRIVATE_PREFIX.as_bytes()))
    };
    let mut found: Vec<PathBuf> = entries.flatten().map(|entry| entry.path()).filter(is_ours).collect();
    found.sort();
    found
}

fn accept(bound: &Bound, shared: &Arc<Shared>) {
    loop {
        match bound.listener().accept() {
            _ if shared.stopping.load(Relaxed) => return,
            Ok((stream, _)) => let_in(stream, shared),
            // Of open files, say, there may be fewer soon.
            Err(_) => thread::sleep(BREATHER),
        }
    }
}

fn let_in(stream: UnixStream, shared: &Arc<Shared>) {
    let Some(queue) = shared.hub.join(MOST_CLIENTS) else { return refuse(&stream) };
    let (own, left) = (Arc::clone(shared), Arc::clone(&queue));
    let serve = move || {
        // A client's own trouble.
        let _ = client::serve(stream, &queue, &own);
        own.hub.leave(&queue);
    };
    if thread::Builder::new().name("qmp-read".to_owned()).spawn(serve).is_err() {
        shared.hub.leave(&left);
    }
}

fn refuse(mut stream: &UnixStream) {
    use std::io::Write;
    let text = format!("too many clients: {MOST_CLIENTS} at most");
    // It fits the socket's empty buffer.
    let _ = stream.write_all(&wire::reply(Err(wire::Refusal::generic(text)), None));
}
