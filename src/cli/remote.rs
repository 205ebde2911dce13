//! The jobs of a run, or the disks of a server, for QMP clients and for `drive-backup ctl`.

use super::watch::Watch;
use crate::backup::{Failure, Options, Summary};
use crate::error::Result;
use crate::job::Job;
use crate::monitor::{Event, Monitor};
use crate::qmp::{Entry, New, Node, Server, Setup, valid_id};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Clients have so long to read the end.
const LAST_EVENTS_BOUND: Duration = Duration::from_millis(250);

/// `unix:PATH`.
pub fn socket(text: &str) -> std::result::Result<PathBuf, &'static str> {
    match text.strip_prefix("unix:") {
        Some(path) if !path.is_empty() => Ok(path.into()),
        _ => Err("write unix:PATH"),
    }
}

/// The jobs of a run, each of which has a monitor of its own already.
pub struct Remote {
    server: Server,
    entries: Vec<Arc<Entry>>,
}

/// Tells both.
pub struct Tee<'a> {
    /// First.
    pub own: &'a Watch,
    /// Then.
    pub remote: Option<Arc<Entry>>,
    /// Once all is open it speaks for the process, of which it says whether nothing of the user's will be started.
    pub shuts: Option<bool>,
}

impl Monitor for Tee<'_> {
    fn event(&self, event: Event<'_>) {
        // Started ends nothing for QMP; a fault is told to both.
        if let (Some(remote), Event::Fault { error, action }) = (&self.remote, &event) {
            remote.event(Event::Fault { error, action: *action });
        }
        if let (Some(shuts), Event::Opened { programs }) = (self.shuts, &event) {
            self.own.hold(shuts && !programs);
        }
        self.own.event(event);
    }
}

impl Remote {
    /// Shows `jobs`, at `named` if there is one, which may be refused, and where `drive-backup ctl` looks, if possible.
    pub fn start(
        disks: &[Options],
        jobs: &[Arc<Job>],
        named: Option<&Path>,
        quit: impl Fn() + Send + Sync + 'static,
    ) -> Result<Self> {
        let mut nodes: Vec<Node> = Vec::new();
        for disk in disks {
            let path = disk.device.name();
            let path = path.canonicalize().unwrap_or_else(|_| path.to_owned());
            let device = name_of(&path, |name| nodes.iter().all(|node| node.device != name));
            let format = disk.source_format;
            nodes.push(Node { device, path, format, length: None, read_only: false, secret: None });
        }
        let new = nodes.iter().zip(jobs).map(|(node, job)| New {
            id: node.device.clone(),
            device: node.device.clone(),
            job: Arc::clone(job),
            auto_finalize: true,
            auto_dismiss: true,
            group: None,
        });
        let new = new.collect();
        let mut server = Server::new(Setup { nodes, writer_dir: None, quit: Box::new(quit) });
        // Their names differ.
        let entries = server.jobs().reserve(new).unwrap_or_default();
        entries.iter().for_each(|entry| entry.show(None));
        if let Some(path) = named {
            server.listen(path)?;
        }
        // Without it `ctl` needs the socket's name: no reason for a backup to fail.
        let _ = server.listen_privately(disks.first().and_then(|disk| disk.writer_dir.as_deref()));
        Ok(Self { server, entries })
    }

    /// The job at this place.
    pub fn entry(&self, place: usize) -> Option<Arc<Entry>> {
        self.entries.get(place).cloned()
    }

    /// What tells clients that a job is over, from any thread.
    pub fn ended(&self) -> impl Fn(usize, std::result::Result<&Summary, &Failure>) + Send + Sync + 'static {
        let (jobs, entries) = (Arc::clone(self.server.jobs()), self.entries.clone());
        move |place, result| {
            if let Some(entry) = entries.get(place) {
                jobs.ended(entry, result);
            }
        }
    }

    /// The run is over. Blocks for a moment if there are clients.
    pub fn stop(self) {
        self.server.stop("host-qmp-quit", Instant::now() + LAST_EVENTS_BOUND);
    }
}

/// A file's name as QMP takes it: QEMU's rule for ids, and `is_free`.
pub fn name_of(path: &Path, is_free: impl Fn(&str) -> bool) -> String {
    let stem = path.file_stem().map_or_else(String::new, |stem| stem.to_string_lossy().into_owned());
    let allowed = |c: char| if c.is_ascii_alphanumeric() || "-._".contains(c) { c } else { '_' };
    let mut name: String = stem.chars().map(allowed).collect();
    if !valid_id(&name) {
        name.insert_str(0, "disk-");
    }
    if is_free(&name) {
        return name;
    }
    (2..).map(|number| format!("{name}.{number}")).find(|name| is_free(name)).unwrap_or(name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_get_names_that_clients_can_write() {
        let any = |_: &str| true;
        assert_eq!(name_of(Path::new("/a/disk.raw"), any), "disk");
        assert_eq!(name_of(Path::new("0 b/ü x.raw"), any), "disk-__x");
        assert_eq!(name_of(Path::new("disk.raw"), |name| name != "disk"), "disk.2");
        assert!(valid_id(&name_of(Path::new(""), any)));
    }

    #[test]
    fn a_socket_is_written_with_its_kind() {
        assert_eq!(socket("unix:/run/x"), Ok("/run/x".into()));
        assert!(socket("/run/x").is_err() && socket("unix:").is_err());
    }
}
