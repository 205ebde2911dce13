//! `drive-backup ctl`: a small client of the QMP sockets of runs and servers.

use super::args::Speed;
use super::progress::one_line;
use super::{Ending, exit, remote};
use crate::error::{Error, Kind, Result};
use crate::ground::size::{Rate, parse_rate};
use crate::qmp::peer::{self, Peer};
use crate::ring::folder::{self, Folder};
use clap::{Args, Subcommand, ValueHint};
use indicatif::{MultiProgress, ProgressBar, ProgressStyle};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

/// Between two looks of `watch`.
const LOOK: Duration = Duration::from_millis(500);

/// Watch and steer backups that run
#[derive(Args, Clone, Debug)]
#[command(max_term_width = 100)]
pub struct CtlArgs {
    /// The socket that was given to --qmp; by default all runs and servers of this user are found
    #[arg(long, value_name = "unix:PATH", value_parser = remote::socket)]
    pub qmp: Option<PathBuf>,

    /// Which job: its id, or the path of the disk that it copies; may be left out where there is one
    #[arg(long, value_name = "ID|PATH")]
    pub job: Option<String>,

    /// Where runs are found: what they were given as --writer-dir
    #[arg(long, value_name = "DIR", value_hint = ValueHint::DirPath)]
    pub writer_dir: Option<PathBuf>,

    /// What to do.
    #[command(subcommand)]
    pub verb: CtlVerb,
}

/// What to do.
#[derive(Clone, Debug, Subcommand)]
pub enum CtlVerb {
    /// Show jobs: a line each
    Status {
        /// As JSON: the list that query-block-jobs returns
        #[arg(long)]
        json: bool,
    },
    /// Set the limit in bytes a second, such as 50M; 0, off and unlimited mean none
    Speed {
        /// The limit
        #[arg(value_name = "RATE", allow_hyphen_values = true, value_parser = rate)]
        rate: Speed,
    },
    /// Stand still; writers are served on
    Pause,
    /// Go on, after a pause as after an error
    Resume,
    /// End the job, and remove what it made
    Cancel,
    /// Show progress until all jobs are over
    Watch,
}

fn rate(text: &str) -> std::result::Result<Speed, crate::ground::size::NotASize> {
    parse_rate(text).map(Speed::Limit)
}

/// A job, and the connection to who runs it.
struct Found {
    peer: usize,
    id: String,
    disk: String,
    shown: Value,
}

impl Found {
    /// It is only there for whoever dismisses it.
    fn is_over(&self) -> bool {
        self.shown["status"] == "concluded"
    }
}

/// Does it, and says on stderr why it can't.
pub fn run(args: &CtlArgs) -> Ending {
    match obey(args) {
        Ok(()) => Ending::with_code(exit::COMPLETE),
        Err(error) => {
            let _ = writeln!(io::stderr(), "drive-backup: {}", one_line(&error.to_string()));
            Ending::with_code(exit::of(error.kind()).0)
        }
    }
}

fn obey(args: &CtlArgs) -> Result<()> {
    let mut peers = Peers::of(args)?;
    let mut found = peers.look(args.job.as_deref());
    match &args.verb {
        // A job that was named is to be there; of a list programs see that it is empty.
        CtlVerb::Status { json: false } if found.is_empty() && args.job.is_some() => Err(peers.nobody()),
        CtlVerb::Status { json } => {
            if let Some(error) = peers.silence() {
                let _ = writeln!(io::stderr(), "drive-backup: {}", one_line(&error.to_string()));
            }
            show(&found, *json)
        }
        CtlVerb::Watch => watch(&mut peers, args.job.as_deref()),
        verb => {
            found.retain(|job| !job.is_over());
            let one = match (found.pop(), found.is_empty()) {
                // It may be the one that was meant.
                (Some(_), true) if args.job.is_none() && peers.silence().is_some() => return Err(peers.nobody()),
                (Some(one), true) => one,
                (None, _) => return Err(peers.nobody()),
                (Some(one), false) => {
                    let ids: Vec<&str> = found.iter().chain([&one]).map(|job| job.id.as_str()).collect();
                    return Err(Error::new(Kind::Usage, format!("say which with --job: {}", ids.join(", "))));
                }
            };
            let (command, arguments) = match verb {
                CtlVerb::Speed { rate: Speed::Limit(rate) } => {
                    let speed = i64::try_from(rate.unwrap_or(0)).unwrap_or(i64::MAX);
                    ("block-job-set-speed", json!({"device": one.id, "speed": speed}))
                }
                CtlVerb::Pause => ("job-pause", json!({"id": one.id})),
                CtlVerb::Resume => ("job-resume", json!({"id": one.id})),
                _ => ("job-cancel", json!({"id": one.id})),
            };
            let answer = peers.ask(one.peer, command, arguments);
            let answer = answer.map_err(|e| Error::system(Kind::Other, "talk to the backup", e))?;
            answer.map(drop).map_err(|text| Error::new(Kind::Other, text))
        }
    }
}

/// Everybody who may run a job.
struct Peers {
    /// `None`: it is gone, or has not answered, and what it says later is no answer to anything.
    connected: Vec<(PathBuf, Option<Peer>)>,
    /// It lives, and does not answer.
    silent: Option<PathBuf>,
    /// One job is meant.
    is_named: bool,
}

impl Peers {
    fn of(args: &CtlArgs) -> Result<Self> {
        let is_named = args.job.is_some();
        if let Some(path) = &args.qmp {
            let failed = |e| Error::system(Kind::Other, format!("connect to '{}'", path.display()), e);
            let peer = Peer::connect(path).map_err(failed)?;
            return Ok(Self { connected: vec![(path.clone(), Some(peer))], silent: None, is_named });
        }
        let mut peers = Self { connected: Vec::new(), silent: None, is_named };
        let path = args.writer_dir.clone().unwrap_or_else(folder::default_path);
        if std::fs::symlink_metadata(&path).is_err_and(|e| e.kind() == io::ErrorKind::NotFound) {
            return Ok(peers);
        }
        // What is in a folder of somebody else's is not believed, and hears nothing.
        let failed = |e| Error::system(Kind::Other, format!("look for runs in '{}'", path.display()), e);
        Folder::open(&path).map_err(failed)?;
        for socket in peer::sockets(&path) {
            match Peer::connect(&socket) {
                Ok(peer) => peers.connected.push((socket, Some(peer))),
                // A dead run's socket is no job.
                Err(e) if matches!(e.kind(), io::ErrorKind::ConnectionRefused | io::ErrorKind::NotFound) => {}
                Err(_) => peers.silent = Some(socket),
            }
        }
        Ok(peers)
    }

    fn ask(&mut self, peer: usize, command: &str, arguments: Value) -> io::Result<Result<Value, String>> {
        let (path, connection) = &mut self.connected[peer];
        let Some(asked) = connection else { return Err(io::ErrorKind::NotConnected.into()) };
        asked.execute(command, arguments).inspect_err(|e| {
            if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) {
                self.silent = Some(path.clone());
            }
            *connection = None;
        })
    }

    /// The jobs that `wanted` names; a peer that is gone has none.
    fn look(&mut self, wanted: Option<&str>) -> Vec<Found> {
        let mut found = Vec::new();
        for peer in 0..self.connected.len() {
            let mut ask = |command| self.ask(peer, command, json!({})).ok().and_then(std::result::Result::ok);
            let (Some(jobs), Some(disks)) = (ask("query-block-jobs"), ask("query-block")) else { continue };
            for shown in jobs.as_array().into_iter().flatten() {
                let id = shown["device"].as_str().unwrap_or_default().to_owned();
                let disks = disks.as_array().into_iter().flatten();
                let disk = disks.into_iter().find(|disk| disk["device"] == shown["disk"]);
                let disk = disk.and_then(|disk| disk["inserted"]["file"].as_str()).unwrap_or_default().to_owned();
                let is_wanted = wanted.is_none_or(|wanted| wanted == id || is_path(wanted, &disk));
                if is_wanted {
                    found.push(Found { peer, id, disk, shown: shown.clone() });
                }
            }
        }
        found
    }

    /// Why not all jobs may have been seen.
    fn silence(&self) -> Option<Error> {
        let path = self.silent.as_ref()?.display();
        let hint = if self.is_named { "" } else { "; --job says which is meant" };
        Some(Error::new(Kind::Other, format!("the run at '{path}' does not answer{hint}")))
    }

    fn nobody(&self) -> Error {
        self.silence().unwrap_or_else(|| Error::new(Kind::Other, "no such job runs"))
    }
}

fn is_path(wanted: &str, disk: &str) -> bool {
    Path::new(wanted).canonicalize().is_ok_and(|path| path == Path::new(disk))
}

fn show(found: &[Found], json: bool) -> Result<()> {
    let mut text = String::new();
    if json {
        let list: Vec<&Value> = found.iter().map(|job| &job.shown).collect();
        text = format!("{}\n", json!(list));
    } else {
        if found.is_empty() {
            let _ = writeln!(io::stderr(), "drive-backup: no job runs");
        }
        for job in found {
            let number = |name: &str| job.shown[name].as_u64().unwrap_or(0);
            let percent = number("offset").saturating_mul(100).checked_div(number("len")).unwrap_or(0);
            let status = job.shown["status"].as_str().unwrap_or_default();
            let speed = match number("speed") {
                0 => "no limit".to_owned(),
                speed => format!("at most {}", Rate(speed)),
            };
            text += &format!("{}\n", one_line(&format!("{}: {status}, {percent} %, {speed}, {}", job.id, job.disk)));
        }
    }
    match io::stdout().write_all(text.as_bytes()) {
        Err(e) if e.kind() != io::ErrorKind::BrokenPipe => Err(Error::system(Kind::Other, "write the status", e)),
        _ => Ok(()),
    }
}

fn watch(peers: &mut Peers, wanted: Option<&str>) -> Result<()> {
    let (all, mut bars) = (MultiProgress::new(), BTreeMap::<(usize, String), ProgressBar>::new());
    let style = ProgressStyle::with_template("{prefix} {wide_bar} {bytes}/{total_bytes} {binary_bytes_per_sec} {msg}")
        .map_err(|error| Error::new(Kind::Other, error.to_string()))?;
    loop {
        let mut found = peers.look(wanted);
        found.retain(|job| !job.is_over());
        if found.is_empty() {
            // The one that was meant was seen, to its end.
            let is_known = peers.is_named && !bars.is_empty();
            return peers.silence().filter(|_| !is_known).map_or(Ok(()), Err);
        }
        bars.retain(|key, bar| {
            let runs = found.iter().any(|job| (job.peer, &job.id) == (key.0, &key.1));
            if !runs {
                all.remove(bar);
            }
            runs
        });
        for job in found {
            let bar = bars.entry((job.peer, job.id.clone())).or_insert_with(|| {
                all.add(ProgressBar::new(0).with_style(style.clone()).with_prefix(one_line(&job.id)))
            });
            bar.set_length(job.shown["len"].as_u64().unwrap_or(0));
            bar.set_position(job.shown["offset"].as_u64().unwrap_or(0));
            bar.set_message(job.shown["status"].as_str().unwrap_or_default().to_owned());
        }
        thread::sleep(LOOK);
    }
}
