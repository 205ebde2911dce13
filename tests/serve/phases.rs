//! Signals and death at named places of a server, which is held there: see `DRIVE_BACKUP_HOLD` in `src/hold.rs`. Clients get an
//! answer or hear of the end, what they were told is written is there, and the next server finds nothing in its way.
//! `DRIVE_BACKUP_SWEEP=all` tries everything at each front end.

use crate::frontend::Frontend;
use crate::support::hold::Hold;
use crate::support::{PATIENCE, Running, command, folder, sparse_file, text, wait_for};
use drive_backup::error::Side;
use drive_backup::image::Image;
use drive_backup::image::nbd::{Nbd, Use};
use drive_backup::nbd::uri::Uri;
use nix::sys::signal::Signal;
use serde_json::Value;
use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, Error, Result};
use std::os::unix::fs::FileExt;
use std::os::unix::net::{UnixDatagram, UnixStream};
use std::path::PathBuf;
use std::sync::mpsc::{Receiver, channel};
use std::thread::JoinHandle;
use std::time::Duration;
use vm_memory::{Bytes, GuestAddress};

const LENGTH: u64 = 4 << 20;
const BLOCK: usize = 4096;
/// Where the write is that is held, and where one is that is not.
const HELD: u64 = 1 << 20;
const OTHER: u64 = 2 << 20;

#[derive(Clone, Copy, Debug, PartialEq)]
enum FrontEnd {
    Nbd,
    Fuse,
    VhostUser,
}

const FRONT_ENDS: [FrontEnd; 3] = [FrontEnd::Nbd, FrontEnd::Fuse, FrontEnd::VhostUser];
const SIGNALS: [Signal; 3] = [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP];

/// Every pair, or each signal at one front end, another one each `turn`.
fn pairs(signals: &[Signal], turn: usize) -> Vec<(FrontEnd, Signal)> {
    let is_wide = std::env::var("DRIVE_BACKUP_SWEEP").is_ok_and(|width| width == "all");
    let pairs = FRONT_ENDS.iter().enumerate().flat_map(|(at, &one)| {
        signals
            .iter()
            .enumerate()
            .filter(move |(number, _)| is_wide || (number + turn) % 3 == at)
            .map(move |(_, &s)| (one, s))
    });
    pairs.collect()
}

/// A disk, and the place where it is served.
struct Scene {
    folder: tempfile::TempDir,
    front_end: FrontEnd,
    /// Hears what a server tells systemd.
    notify: UnixDatagram,
}

struct Server {
    running: Running,
    lines: Receiver<String>,
    hold: Option<UnixStream>,
}

impl Scene {
    fn new(front_end: FrontEnd) -> Self {
        let folder = folder();
        sparse_file(&folder.path().join("disk.raw"), LENGTH);
        let notify = UnixDatagram::bind(folder.path().join("notify")).unwrap();
        notify.set_read_timeout(Some(PATIENCE)).unwrap();
        Self { folder, front_end, notify }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Where it is served: a socket, or a file.
    fn address(&self) -> PathBuf {
        self.path("address")
    }

    fn start(&self, hold: Option<&Hold>) -> Server {
        let (disk, address, writers) = (self.path("disk.raw"), self.address(), self.path("writers"));
        let mut serve = command(&["serve", "--json", "--device", text(&disk), "--format", "raw"]);
        match self.front_end {
            FrontEnd::Nbd => serve.arg("--nbd").arg(format!("unix:{}", text(&address))),
            FrontEnd::Fuse => serve.arg("--fuse").arg(&address),
            FrontEnd::VhostUser => serve.arg("--vhost-user").arg(&address),
        };
        serve.arg("--writer-dir").arg(&writers).env("NOTIFY_SOCKET", self.path("notify"));
        if let Some(hold) = hold {
            serve.env("DRIVE_BACKUP_HOLD", hold.variable());
        }
        let mut running = Running::start(&mut serve);
        let stdout = BufReader::new(running.child().stdout.take().unwrap());
        let (send, lines) = channel();
        // It ends with the child.
        std::thread::spawn(move || stdout.lines().map_while(Result::ok).try_for_each(|line| send.send(line)));
        Server { running, lines, hold: None }
    }

    /// Waits until the server says so to systemd.
    #[track_caller]
    fn hears(&self, what: &str) {
        let mut word = [0; 64];
        loop {
            let length = self.notify.recv(&mut word).unwrap_or_else(|e| panic!("no {what}: {e}"));
            if String::from_utf8_lossy(&word[..length]).contains(what) {
                return;
            }
        }
    }

    /// A server that is ready. What one was starting when it was killed has the disk, and its lock, until it has started.
    #[track_caller]
    fn serve(&self) -> Server {
        wait_for("a server that the disk is free for", || {
            let mut server = self.start(None);
            match self.ends_before_it_is_ready(&mut server) {
                None => Some(server),
                Some(said) if said.contains("is in use by another program") => None,
                Some(said) => panic!("it ended before it was ready: {said}"),
            }
        })
    }

    /// What it said then.
    fn ends_before_it_is_ready(&self, server: &mut Server) -> Option<String> {
        self.notify.set_nonblocking(true).unwrap();
        let mut word = [0; 64];
        let mut is_ready = || {
            let length = self.notify.recv(&mut word).ok()?;
            String::from_utf8_lossy(&word[..length]).contains("READY=1").then_some(None)
        };
        let end = wait_for("a server that is ready", || {
            let has_ended = server.running.has_ended();
            let said = || std::io::read_to_string(server.running.child().stderr.take().unwrap()).unwrap();
            is_ready().or_else(|| has_ended.then(said).map(Some))
        });
        self.notify.set_nonblocking(false).unwrap();
        end
    }

    /// A server that has come to `place`, which is before it is ready.
    fn held_before_it_is_ready(&self, place: &str) -> Server {
        let hold = Hold::at(place, self.folder.path());
        let mut server = self.start(Some(&hold));
        server.hold = Some(hold.reached(&mut server.running));
        server
    }

    /// A server that has come to "Writing", and the client whose write it is. Another's write has been answered meanwhile.
    fn held_while_writing(&self) -> (Server, Client) {
        let hold = Hold::at("Writing", self.folder.path());
        let mut server = self.start(Some(&hold));
        self.hears("READY=1");
        let mut client = Client::begin(self);
        server.hold = Some(hold.reached(&mut server.running));
        client.writes_beside(self);
        (server, client)
    }

    /// A server that has come to "Stopping", asked by `signal`, after a write was answered.
    fn held_while_stopping(&self, signal: Signal) -> Server {
        let hold = Hold::at("Stopping", self.folder.path());
        let mut server = self.start(Some(&hold));
        self.hears("READY=1");
        Client::begin(self).end().unwrap();
        server.running.signal(signal);
        server.hold = Some(hold.reached(&mut server.running));
        server
    }

    fn byte_at(&self, offset: u64) -> u8 {
        let mut block = [0; BLOCK];
        File::open(self.path("disk.raw")).unwrap().read_exact_at(&mut block, offset).unwrap();
        assert!(block.iter().all(|&byte| byte == block[0]), "a block is torn");
        block[0]
    }

    /// Nothing is left of where it was served.
    #[track_caller]
    fn is_withdrawn(&self, what: &str) {
        assert!(!self.address().exists(), "{what}: the address is there still");
        assert!(!self.is_mounted(), "{what}");
    }

    fn is_mounted(&self) -> bool {
        std::fs::read_to_string("/proc/self/mountinfo").unwrap().contains(text(&self.address()))
    }

    /// The next server of the same disk at the same place serves, and ends in order.
    #[track_caller]
    fn next_one_serves(&self, what: &str) {
        let server = self.serve();
        Client::begin(self).end().unwrap_or_else(|e| panic!("{what}: {e}"));
        assert_eq!(self.byte_at(HELD), b'w', "{what}");
        server.running.signal(Signal::SIGTERM);
        server.ends_in_order(Signal::SIGTERM, what);
        // A file that a killed server made for its mount is there as if it had always been.
        assert!(!self.is_mounted() && (self.front_end == FrontEnd::Fuse || !self.address().exists()), "{what}");
    }
}

impl Drop for Scene {
    fn drop(&mut self) {
        if self.is_mounted() {
            let _ = nix::mount::umount2(&self.address(), nix::mount::MntFlags::MNT_DETACH);
        }
    }
}

/// Who writes at [`HELD`].
enum Client {
    Thread(JoinHandle<Result<()>>),
    Guest(Box<Frontend>),
}

fn connected(address: &std::path::Path) -> Result<Nbd> {
    let usage = Use { side: Side::Target, flushes: true, reconnect: Duration::from_millis(1) };
    let uri: Uri = format!("nbd+unix:///?socket={}", text(address)).parse().unwrap();
    Nbd::open(&uri, usage).map_err(|error| Error::other(error.to_string()))
}

/// Puts the bytes that a queue's first slot writes into the guest's memory.
fn fill(guest: &Frontend, queue: usize, byte: u8) {
    guest.memory.write_slice(&[byte; BLOCK], GuestAddress(Frontend::data(queue, 0))).unwrap();
}

impl Client {
    fn begin(scene: &Scene) -> Self {
        let address = scene.address();
        match scene.front_end {
            FrontEnd::Nbd => {
                let disk = connected(&address).unwrap();
                Self::Thread(std::thread::spawn(move || disk.write_at(&[b'w'; BLOCK], HELD)))
            }
            FrontEnd::Fuse => {
                let file = OpenOptions::new().write(true).open(address).unwrap();
                Self::Thread(std::thread::spawn(move || file.write_all_at(&[b'w'; BLOCK], HELD)))
            }
            FrontEnd::VhostUser => {
                let mut guest = Frontend::connect(&address).unwrap();
                (0..2).for_each(|_| guest.start_queue().unwrap());
                fill(&guest, 0, b'w');
                guest.submit(0, 0, 1, HELD / 512, BLOCK as u32, true);
                Self::Guest(Box::new(guest))
            }
        }
    }

    /// Another write, answered while the first one is not.
    fn writes_beside(&mut self, scene: &Scene) {
        match self {
            Self::Guest(guest) => {
                fill(guest, 1, b'o');
                assert_eq!(guest.ask(1, 1, OTHER / 512, BLOCK as u32), 0);
            }
            Self::Thread(_) if scene.front_end == FrontEnd::Nbd => {
                connected(&scene.address()).unwrap().write_at(&[b'o'; BLOCK], OTHER).unwrap();
            }
            Self::Thread(_) => {
                let file = OpenOptions::new().write(true).open(scene.address()).unwrap();
                file.write_all_at(&[b'o'; BLOCK], OTHER).unwrap();
            }
        }
        assert_eq!(scene.byte_at(OTHER), b'o');
    }

    /// Waits, bounded, until the first write is answered, or its server gone.
    #[track_caller]
    fn end(self) -> Result<()> {
        match self {
            Self::Thread(thread) => {
                wait_for("the client", || thread.is_finished().then_some(()));
                thread.join().unwrap()
            }
            Self::Guest(mut guest) => wait_for("the guest", || {
                if !guest.used(0).is_empty() {
                    let status = guest.status(0, 0);
                    return Some(if status == 0 { Ok(()) } else { Err(Error::other(format!("status {status}"))) });
                }
                // Nobody sends anything: it is the end.
                let is_over = guest.is_answered_within(Duration::from_millis(1));
                // Its last answer may have come between the two.
                (is_over && guest.used(0).is_empty()).then(|| Err(Error::other("the server hung up")))
            }),
        }
    }
}

impl Server {
    /// Waits for its end: the exit code, and the last record.
    #[track_caller]
    fn ends(self, what: &str) -> (i32, Option<Value>) {
        let Self { running, lines, hold } = self;
        let code = running.ended().code;
        drop(hold);
        let records: Vec<Value> = lines.iter().map(|line| serde_json::from_str(&line).unwrap()).collect();
        let is_last = |record: &&Value| record["message_type"] == "stopped" || record["message_type"] == "exit_error";
        assert!(records.iter().filter(is_last).count() <= 1, "{what}: {records:?}");
        (code, records.last().filter(is_last).cloned())
    }

    /// It is let go, and ends with 0 because of `signal`.
    #[track_caller]
    fn ends_in_order(mut self, signal: Signal, what: &str) {
        drop(self.hold.take());
        let (code, last) = self.ends(what);
        let last = last.unwrap_or_else(|| panic!("{what}: no last record"));
        assert_eq!((code, &last["exit_code"]), (0, &0.into()), "{what}: {last}");
        let told = (&last["message_type"], &last["drained"], &last["signal"]);
        assert_eq!(told, (&"stopped".into(), &true.into(), &signal.as_str().into()), "{what}: {last}");
    }

    /// It ends while it is held, because of `signal`.
    #[track_caller]
    fn ends_at_once(self, signal: Signal, what: &str) {
        let (code, last) = self.ends(what);
        let last = last.unwrap_or_else(|| panic!("{what}: no last record"));
        assert_eq!((code, &last["exit_code"]), (128 + signal as i32, &code.into()), "{what}: {last}");
        let told = (&last["message_type"], &last["reason"], &last["signal"]);
        assert_eq!(told, (&"exit_error".into(), &"signal".into(), &signal.as_str().into()), "{what}: {last}");
    }

    #[track_caller]
    fn ends_by_kill(self, what: &str) {
        self.running.signal(Signal::SIGKILL);
        assert_eq!(self.ends(what), (137, None), "{what}");
    }

    /// Waits until those of its threads that stop it wait for something, or it has ended.
    #[track_caller]
    fn waits_for_its_requests(&mut self) {
        let mut before = Vec::new();
        wait_for("a server that waits", || {
            let now = self.stopping_threads();
            let has_begun = now.len() > 1;
            let stands_still = now == before && now.iter().all(|(_, is_asleep, _)| *is_asleep);
            before = now;
            (has_begun && stands_still || self.running.has_ended()).then_some(())
        });
    }

    /// The threads that stop it, which are that of the session and one for each front end: who each is, whether it is
    /// asleep, and how often it was.
    fn stopping_threads(&self) -> Vec<(String, bool, String)> {
        let tasks = format!("/proc/{}/task", self.running.id());
        let value = |status: &str, name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name));
            line.unwrap_or_default().trim().to_owned()
        };
        let mut found = Vec::new();
        // Threads that end meanwhile are not there any more.
        for task in std::fs::read_dir(tasks).into_iter().flatten().flatten() {
            let status = std::fs::read_to_string(task.path().join("status")).unwrap_or_default();
            if value(&status, "Name:") == "stop" {
                let is_asleep = value(&status, "State:").starts_with('S');
                found.push((value(&status, "Pid:"), is_asleep, value(&status, "voluntary_ctxt_switches:")));
            }
        }
        found
    }

    /// Stands still, and goes on.
    fn pauses(&self) {
        self.running.signal(Signal::SIGSTOP);
        let stat = format!("/proc/{}/stat", self.running.id());
        let is_stopped = || std::fs::read_to_string(&stat).unwrap().rsplit_once(") ").unwrap().1.starts_with('T');
        wait_for("the stop", || is_stopped().then_some(()));
        self.running.signal(Signal::SIGCONT);
    }
}

#[test]
fn a_signal_before_anything_is_served_ends_a_server_at_once() {
    for (front_end, signal) in pairs(&SIGNALS, 0) {
        let (what, scene) = (format!("{signal}, {front_end:?}"), Scene::new(front_end));
        let server = scene.held_before_it_is_ready("Opening");
        server.running.signal(signal);
        server.ends_at_once(signal, &what);
        scene.is_withdrawn(&what);
        scene.next_one_serves(&what);
    }
}

#[test]
fn a_signal_before_a_server_is_ready_keeps_what_it_has_answered_already() {
    for (front_end, signal) in pairs(&SIGNALS, 2) {
        let (what, scene) = (format!("{signal}, {front_end:?}"), Scene::new(front_end));
        let server = scene.held_before_it_is_ready("Reachable");
        Client::begin(&scene).end().unwrap();
        server.running.signal(signal);
        scene.hears("STOPPING=1");
        server.ends_in_order(signal, &what);
        assert_eq!(scene.byte_at(HELD), b'w', "{what}");
        scene.is_withdrawn(&what);
        // Who has no patience need not wait for it.
        let server = scene.held_before_it_is_ready("Reachable");
        server.running.signal(Signal::SIGTERM);
        scene.hears("STOPPING=1");
        server.running.signal(signal);
        server.ends_at_once(signal, &what);
        scene.next_one_serves(&what);
    }
}

#[test]
fn a_signal_in_the_midst_of_a_write_lets_it_end_and_be_answered() {
    for (front_end, signal) in pairs(&SIGNALS, 1) {
        let (what, scene) = (format!("{signal}, {front_end:?}"), Scene::new(front_end));
        let (mut server, client) = scene.held_while_writing();
        server.running.signal(signal);
        scene.hears("STOPPING=1");
        // By then one that does not wait for the write has cut it off.
        server.waits_for_its_requests();
        server.ends_in_order(signal, &what);
        client.end().unwrap_or_else(|e| panic!("{what}: {e}"));
        assert_eq!((scene.byte_at(HELD), scene.byte_at(OTHER)), (b'w', b'o'), "{what}");
        scene.is_withdrawn(&what);
        scene.next_one_serves(&what);
    }
}

#[test]
fn a_second_signal_ends_a_server_whose_write_hangs_and_its_client_hears_of_it() {
    for (front_end, signal) in pairs(&SIGNALS, 2) {
        let (what, scene) = (format!("{signal}, {front_end:?}"), Scene::new(front_end));
        let (server, client) = scene.held_while_writing();
        server.running.signal(Signal::SIGTERM);
        scene.hears("STOPPING=1");
        server.running.signal(signal);
        server.ends_at_once(signal, &what);
        client.end().expect_err(&what);
        assert_eq!((scene.byte_at(HELD), scene.byte_at(OTHER)), (0, b'o'), "{what}");
        scene.next_one_serves(&what);
    }
}

#[test]
fn a_signal_while_a_server_ends_cuts_it_and_otherwise_it_ends_in_order() {
    for (front_end, signal) in pairs(&SIGNALS, 0) {
        let what = format!("{signal}, {front_end:?}");
        let scene = Scene::new(front_end);
        scene.held_while_stopping(signal).ends_in_order(signal, &what);
        scene.is_withdrawn(&what);
        let server = scene.held_while_stopping(Signal::SIGTERM);
        server.running.signal(signal);
        server.ends_at_once(signal, &what);
        assert_eq!(scene.byte_at(HELD), b'w', "{what}");
        scene.next_one_serves(&what);
    }
}

#[test]
fn a_server_killed_at_any_place_leaves_what_it_answered_and_the_next_one_takes_its_place() {
    // One signal of three: each front end has its turn.
    for (at, (front_end, _)) in pairs(&SIGNALS, 0).into_iter().enumerate() {
        let scene = Scene::new(front_end);
        if at % 3 == 0 {
            scene.held_before_it_is_ready("Opening").ends_by_kill("Opening");
            scene.is_withdrawn("Opening");
            scene.next_one_serves("Opening");
        }
        let (server, client) = scene.held_while_writing();
        server.ends_by_kill("Writing");
        client.end().expect_err("killed");
        assert_eq!(scene.byte_at(OTHER), b'o');
        scene.next_one_serves("Writing");
        scene.held_while_stopping(Signal::SIGTERM).ends_by_kill("Stopping");
        assert_eq!(scene.byte_at(HELD), b'w');
        scene.next_one_serves("Stopping");
    }
}

#[test]
fn a_server_stopped_at_any_place_goes_on_when_it_may() {
    for (at, (front_end, _)) in pairs(&SIGNALS, 1).into_iter().enumerate() {
        let scene = Scene::new(front_end);
        if at % 3 == 0 {
            let mut server = scene.held_before_it_is_ready("Opening");
            server.pauses();
            drop(server.hold.take());
            scene.hears("READY=1");
            Client::begin(&scene).end().unwrap();
            server.running.signal(Signal::SIGTERM);
            server.ends_in_order(Signal::SIGTERM, "Opening");
        }
        let (mut server, client) = scene.held_while_writing();
        server.pauses();
        drop(server.hold.take());
        client.end().unwrap();
        server.running.signal(Signal::SIGINT);
        server.ends_in_order(Signal::SIGINT, "Writing");
        let server = scene.held_while_stopping(Signal::SIGHUP);
        server.pauses();
        server.ends_in_order(Signal::SIGHUP, "Stopping");
        assert_eq!((scene.byte_at(HELD), scene.byte_at(OTHER)), (b'w', b'o'));
        scene.is_withdrawn("at the end");
    }
}
