//! Writers and backups as processes: killed, stopped, started late, of another user. The backup here is the smallest
//! there can be, with the ring and a map of saved clusters; the proof of the copy is that of examples/writer.rs.

#[path = "../examples/writer.rs"]
mod example;

use drive_backup::error::{Error, Kind};
use drive_backup::ground::cluster::ClusterSize;
use drive_backup::ground::range::ByteRange;
use drive_backup::ring::folder::{Disk, Folder};
use drive_backup::ring::packet::Packet;
use drive_backup::ring::server::{OnCbwError, Options, Trap, Writers};
use drive_backup::ring::socket::{self, Received};
use drive_backup::snapshot::tracker::FreeMap;
use drive_backup::writer::Writer;
use rustix::process::{Pid, Resource, Rlimit, Signal, WaitId, WaitIdOptions, kill_process, prlimit, waitid};
use std::collections::HashMap;
use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

const CLUSTER: u64 = 4096;
const BLOCKS: u64 = 512;
/// No wait lasts so long unless something hangs.
const HANGS: Duration = Duration::from_secs(60);
const ROLE: &str = "DRIVE_BACKUP_TEST_ROLE";
/// A socket's, for the role that needs one.
const NAME: &str = "DRIVE_BACKUP_TEST_NAME";

fn options(cbw_timeout: Duration) -> Options {
    Options {
        length: BLOCKS * CLUSTER,
        cluster_size: ClusterSize::new(CLUSTER),
        freeze_timeout: Duration::from_secs(2),
        cbw_timeout,
        on_cbw_error: OnCbwError::BreakSnapshot,
        threads: 2,
    }
}

/// Who holds each cluster: saved, or still on the disk.
struct Saver {
    disk: File,
    saved: Mutex<HashMap<u64, Vec<u8>>>,
    map: Arc<dyn FreeMap>,
    hang: bool,
}

impl Saver {
    fn save(&self, cluster: u64) -> std::io::Result<()> {
        let mut saved = self.saved.lock().unwrap();
        if let std::collections::hash_map::Entry::Vacant(vacant) = saved.entry(cluster) {
            let mut bytes = vec![0; CLUSTER as usize];
            self.disk.read_exact_at(&mut bytes, cluster * CLUSTER)?;
            vacant.insert(bytes);
            self.map.free(cluster..cluster + 1);
        }
        Ok(())
    }
}

impl Trap for Saver {
    fn before_write(&self, range: ByteRange) -> Result<(), Error> {
        if self.hang {
            println!("trapped");
            std::thread::sleep(HANGS);
        }
        for cluster in ClusterSize::new(CLUSTER).covering(range) {
            self.save(cluster).map_err(|e| Error::system(Kind::InstantLost, "save", e))?;
        }
        Ok(())
    }

    fn lost(&self, why: &Error) {
        println!("lost: {why}");
    }
}

struct Scene {
    temp: tempfile::TempDir,
}

impl Scene {
    fn new() -> Self {
        let temp = tempfile::tempdir().unwrap();
        File::create(temp.path().join("disk")).unwrap().set_len(BLOCKS * CLUSTER).unwrap();
        Self { temp }
    }

    fn disk(&self) -> PathBuf {
        self.temp.path().join("disk")
    }

    fn copy(&self) -> PathBuf {
        self.temp.path().join("copy")
    }

    fn folder(&self) -> PathBuf {
        self.temp.path().join("meet")
    }

    fn attach(&self) -> Writers {
        attach(self.temp.path(), Duration::from_secs(30)).unwrap()
    }

    /// A process of this test program in another role.
    fn play(&self, role: &str) -> Player {
        self.play_as(role, |_| {})
    }

    fn play_as(&self, role: &str, change: impl FnOnce(&mut Command)) -> Player {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(["--exact", "another_process_plays_its_role", "--nocapture"]);
        command.env(ROLE, role).current_dir(self.temp.path()).stdin(Stdio::piped()).stdout(Stdio::piped());
        change(&mut command);
        let mut child = command.spawn().unwrap();
        let said = BufReader::new(child.stdout.take().unwrap());
        Player { child, said }
    }

    /// The highest write on the disk, if it is whole just now.
    fn progress(&self) -> u64 {
        let mut word = [0; 8];
        let disk = File::open(self.disk()).unwrap();
        let numbers = (0..BLOCKS).map(|at| {
            disk.read_exact_at(&mut word, at * CLUSTER).unwrap();
            u64::from_le_bytes(word)
        });
        numbers.max().unwrap()
    }

    /// Waits until the writer has gone on by `writes`.
    fn wait_for_writes(&self, writes: u64) {
        let (from, since) = (self.progress(), Instant::now());
        while self.progress() < from + writes {
            assert!(since.elapsed() < HANGS, "the writer does not go on");
            std::thread::yield_now();
        }
    }
}

struct Player {
    child: Child,
    said: BufReader<ChildStdout>,
}

impl Player {
    /// Waits until it says a line that begins so.
    fn says(&mut self, expected: &str) -> String {
        loop {
            let mut line = String::new();
            assert!(self.said.read_line(&mut line).unwrap() > 0, "it ended before it said '{expected}'");
            // The harness writes the test's name without a line's end.
            if let Some(at) = line.find(expected) {
                return line[at..].trim_end().to_owned();
            }
        }
    }

    /// After STOP, all its threads stand still when this returns, or it has ended.
    fn signal(&self, signal: Signal) {
        let pid = Pid::from_child(&self.child);
        kill_process(pid, signal).unwrap();
        if signal == Signal::STOP {
            // Its end is left for `child`: a number that was waited for can't be signalled again.
            let left = WaitIdOptions::STOPPED | WaitIdOptions::EXITED | WaitIdOptions::NOWAIT;
            waitid(WaitId::Pid(pid), left).unwrap();
        }
    }

    fn go(&mut self) {
        self.child.stdin.as_mut().unwrap().write_all(b"go\n").unwrap();
    }

    fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    fn ends(mut self) -> ExitStatus {
        let mut rest = String::new();
        self.said.read_to_string(&mut rest).unwrap();
        let status = self.child.wait().unwrap();
        assert!(status.success(), "{rest}");
        status
    }
}

impl Drop for Player {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn attach(folder: &Path, cbw_timeout: Duration) -> Result<Writers, Error> {
    Writers::attach(Disk::at(&folder.join("disk")).unwrap(), &folder.join("meet"), options(cbw_timeout))
}

fn saver(folder: &Path, writers: &Writers, hang: bool) -> Arc<Saver> {
    let disk = File::open(folder.join("disk")).unwrap();
    Arc::new(Saver { disk, saved: Mutex::default(), map: writers.free_map(), hang })
}

/// Copies, slowly enough that the writer is in the middle of it; publishes only what the check calls whole.
fn copy(folder: &Path, writers: &Writers, saver: &Saver, mut at: impl FnMut(u64)) -> Result<(), Error> {
    for cluster in 0..BLOCKS {
        at(cluster);
        saver.save(cluster).unwrap();
    }
    writers.finish()?;
    let copy = File::create(folder.join("unfinished")).unwrap();
    for (cluster, bytes) in &*saver.saved.lock().unwrap() {
        copy.write_all_at(bytes, cluster * CLUSTER).unwrap();
    }
    fs::rename(folder.join("unfinished"), folder.join("copy")).unwrap();
    Ok(())
}

fn wait_for_go() {
    let mut line = String::new();
    assert!(std::io::stdin().read_line(&mut line).unwrap() > 0);
}

/// What another process does. Exits by itself.
fn play(role: &str) {
    let here = Path::new(".");
    match role {
        "hello" => println!("hello"),
        "writer" => {
            println!("writing");
            example::run(Path::new("disk"), Some(Path::new("meet")), BLOCKS, u64::MAX).map(drop).unwrap();
        }
        "backup that hangs" | "backup with a short bound" => {
            let bound = if role.ends_with("hangs") { HANGS } else { Duration::from_millis(300) };
            let writers = attach(here, bound).unwrap();
            let saver = saver(here, &writers, true);
            writers.freeze().unwrap().thaw(saver.clone()).unwrap();
            println!("trapping");
            wait_for_go();
            println!("checked: {}", writers.finish().map_or_else(|e| e.to_string(), |()| "good".into()));
        }
        "backup that freezes" => {
            let writers = attach(here, HANGS).unwrap();
            let frozen = writers.freeze().unwrap();
            println!("frozen");
            wait_for_go();
            let thawed = frozen.thaw(saver(here, &writers, false));
            println!("thawed: {}", thawed.map_or_else(|e| e.to_string(), |_| "good".into()));
        }
        "backup" => {
            let writers = attach(here, HANGS).unwrap();
            let saver = saver(here, &writers, false);
            writers.freeze().unwrap().thaw(saver.clone()).unwrap();
            println!("trapping");
            let copied = copy(here, &writers, &saver, |_| std::thread::sleep(Duration::from_micros(200)));
            println!("copied: {}", copied.map_or_else(|e| e.to_string(), |()| "good".into()));
        }
        "intruder" => {
            let folder = fs::read_dir("meet").unwrap();
            let name =
                folder.map(|entry| entry.unwrap().path()).find(|path| path.to_string_lossy().contains("writer-"));
            let connection = socket::connect(&name.unwrap(), HANGS).unwrap();
            match socket::receive(&connection).unwrap() {
                Received::Packet(Packet::Refused { errno }, _) => println!("refused: {errno}"),
                other => println!("received: {other:?}"),
            }
        }
        "stranger" => {
            let _listener = socket::listen(Path::new(&std::env::var_os(NAME).unwrap())).unwrap();
            println!("listening");
            wait_for_go();
        }
        other => panic!("no role {other}"),
    }
}

#[test]
fn another_process_plays_its_role() {
    match std::env::var(ROLE) {
        Ok(role) => play(&role),
        Err(_) => {
            let mut player = Scene::new().play("hello");
            player.says("hello");
            player.ends();
        }
    }
}

#[test]
fn the_copy_of_a_disk_that_is_being_written_is_one_instant() {
    for _ in 0..3 {
        let scene = Scene::new();
        let mut writer = scene.play("writer");
        writer.says("writing");
        scene.wait_for_writes(1000);
        let writers = scene.attach();
        assert_eq!(writers.attached(), 1);
        let saver = saver(scene.temp.path(), &writers, false);
        writers.freeze().unwrap().thaw(saver.clone()).unwrap();
        copy(scene.temp.path(), &writers, &saver, |cluster| {
            if cluster % 64 == 0 {
                scene.wait_for_writes(20)
            }
        })
        .unwrap();
        let instant = example::check(&scene.copy()).unwrap();
        assert!(instant >= 1000 && instant < scene.progress(), "{instant}");
        let counts = writers.counts();
        assert!(counts.trapped > 0 && counts.writes > counts.trapped, "{counts:?}");
        writer.kill();
    }
}

#[test]
fn a_backup_that_is_killed_holds_no_write() {
    let scene = Scene::new();
    let writer = Writer::open_in(scene.disk(), scene.folder()).unwrap();
    let mut backup = scene.play("backup that hangs");
    backup.says("trapping");
    std::thread::scope(|scope| {
        let write = scope.spawn(|| drop(writer.begin(0, 1).unwrap()));
        backup.says("trapped");
        assert!(!write.is_finished());
        backup.signal(Signal::KILL);
        let killed = Instant::now();
        write.join().unwrap();
        assert!(killed.elapsed() < HANGS / 2, "released by the hang-up and not by the bound");
    });
    drop(writer.begin(4096, 1).unwrap());
}

#[test]
fn a_backup_that_is_stopped_holds_a_write_for_its_bound_and_fails_when_it_wakes() {
    let scene = Scene::new();
    let writer = Writer::open_in(scene.disk(), scene.folder()).unwrap();
    let mut backup = scene.play("backup with a short bound");
    backup.says("trapping");
    backup.signal(Signal::STOP);
    let began = Instant::now();
    drop(writer.begin(0, 1).unwrap());
    assert!(began.elapsed() >= Duration::from_millis(300) && began.elapsed() < HANGS / 2, "{:?}", began.elapsed());
    drop(writer.begin(8192, 1).unwrap());
    backup.signal(Signal::CONT);
    backup.go();
    let checked = backup.says("checked: ");
    assert!(checked.contains("longer than the writer's bound"), "{checked}");
    backup.ends();
}

#[test]
fn a_backup_that_is_killed_or_stopped_in_the_freeze_holds_nobody() {
    for signal in [Signal::KILL, Signal::STOP] {
        let scene = Scene::new();
        let writer = Writer::open_in(scene.disk(), scene.folder()).unwrap();
        let mut backup = scene.play("backup that freezes");
        backup.says("frozen");
        backup.signal(signal);
        let began = Instant::now();
        drop(writer.begin(0, 1).unwrap());
        assert!(began.elapsed() < HANGS / 2);
        if signal == Signal::STOP {
            backup.signal(Signal::CONT);
            backup.go();
            let thawed = backup.says("thawed: ");
            assert!(!thawed.contains("good"), "{thawed}");
            backup.ends();
        }
    }
}

#[test]
fn a_writer_that_starts_while_the_backup_is_stopped_begins_in_time_and_the_backup_fails() {
    let scene = Scene::new();
    let mut backup = scene.play("backup that hangs");
    backup.says("trapping");
    backup.signal(Signal::STOP);
    let began = Instant::now();
    let writer = Writer::open_in(scene.disk(), scene.folder()).unwrap();
    drop(writer.begin(0, 1).unwrap());
    assert!(began.elapsed() < HANGS / 2, "it waits for its bound and no longer");
    drop(writer);
    backup.signal(Signal::CONT);
    backup.go();
    let checked = backup.says("checked: ");
    assert!(checked.contains("before we could attach"), "{checked}");
    backup.ends();
}

#[test]
fn what_a_killed_backup_left_delays_no_writer() {
    let scene = Scene::new();
    let mut backup = scene.play("backup that hangs");
    backup.says("trapping");
    backup.kill();
    let began = Instant::now();
    let _writer = Writer::open_in(scene.disk(), scene.folder()).unwrap();
    assert!(began.elapsed() < Duration::from_secs(2), "the lock of the dead is open");
    let left = fs::read_dir(scene.folder())
        .unwrap()
        .filter(|e| e.as_ref().unwrap().file_name().to_string_lossy().starts_with("backup-"));
    assert_eq!(left.count(), 0, "swept");
}

/// Of the thread that listens for backups, in clock ticks (10 ms).
fn ticks_of_service(writer: &Player) -> u64 {
    let tasks = format!("/proc/{}/task", writer.child.id());
    let stat_of = |task: std::io::Result<fs::DirEntry>| fs::read_to_string(task.unwrap().path().join("stat")).unwrap();
    let since = Instant::now();
    loop {
        // It has its name once it runs.
        if let Some(stat) = fs::read_dir(&tasks).unwrap().map(stat_of).find(|stat| stat.contains("(drive-backup)")) {
            // proc(5): utime and stime are the 12th and 13th field behind the name.
            let fields: Vec<&str> = stat.rsplit(')').next().unwrap().split_whitespace().collect();
            return fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap();
        }
        assert!(since.elapsed() < HANGS, "no thread listens");
        std::thread::yield_now();
    }
}

#[test]
fn a_writer_that_may_open_nothing_rests_and_is_attached_when_it_may() {
    let scene = Scene::new();
    let mut writer = scene.play("writer");
    writer.says("writing");
    scene.wait_for_writes(1);
    let files = |most: u64| {
        let most = Rlimit { current: Some(most), maximum: Some(1024) };
        prlimit(Some(Pid::from_child(&writer.child)), Resource::Nofile, most).unwrap();
    };
    // It has these, and needs no more for its poll.
    files(3);
    let before = ticks_of_service(&writer);
    let refused = attach(scene.temp.path(), HANGS).err().expect("the writer lives and can't be attached");
    assert_eq!(refused.kind(), Kind::InstantLost);
    let spent = ticks_of_service(&writer) - before;
    assert!(spent < 50, "{spent} ticks in the two seconds of a backup's patience");
    files(1024);
    drop(scene.attach());
}

#[test]
fn a_writer_that_is_killed_and_started_again_during_the_job_is_no_loss() {
    let scene = Scene::new();
    let mut writer = scene.play("writer");
    writer.says("writing");
    scene.wait_for_writes(100);
    let writers = scene.attach();
    let saver = saver(scene.temp.path(), &writers, false);
    writers.freeze().unwrap().thaw(saver.clone()).unwrap();
    let mut writer = Some(writer);
    copy(scene.temp.path(), &writers, &saver, |cluster| match cluster {
        100 | 300 => {
            scene.wait_for_writes(50);
            writer.as_mut().unwrap().kill();
        }
        200 | 400 => {
            let mut next = scene.play("writer");
            next.says("writing");
            scene.wait_for_writes(50);
            writer = Some(next);
        }
        _ => {}
    })
    .unwrap();
    example::check(&scene.copy()).unwrap();
    assert_eq!(writers.counts().ever, 3);
}

/// Either side dies or stops at another moment each time: the writer goes on, and what is published is an instant.
/// DRIVE_BACKUP_ROUNDS sets how often.
#[test]
fn whoever_dies_when_nothing_torn_is_published() {
    let rounds = std::env::var("DRIVE_BACKUP_ROUNDS").map_or(12, |rounds| rounds.parse().unwrap());
    for round in 0..rounds {
        let scene = Scene::new();
        let mut writer = scene.play("writer");
        writer.says("writing");
        scene.wait_for_writes(50);
        let mut backup = scene.play("backup");
        let moment = Duration::from_micros(round * 13_331 % 150_000);
        if round % 2 == 0 {
            backup.says("trapping");
        }
        // Not to be right: to meet the other processes at another point each time.
        std::thread::sleep(moment);
        match round % 3 {
            0 => {
                backup.kill();
                scene.wait_for_writes(50);
            }
            1 => {
                backup.signal(Signal::STOP);
                std::thread::sleep(moment);
                backup.signal(Signal::CONT);
                scene.wait_for_writes(50);
            }
            _ => writer.kill(),
        }
        if round % 3 != 0 {
            let copied = backup.says("copied: ");
            assert_eq!(scene.copy().exists(), copied.contains("good"), "{copied}");
        }
        if scene.copy().exists() {
            example::check(&scene.copy()).unwrap();
        }
    }
}

fn open(path: &Path, mode: u32) {
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
}

/// Another user in a role. Nobody can get there: the doors are opened to see the second lock.
fn somebody_else(scene: &Scene, role: &str) -> Command {
    assert!(rustix::process::geteuid().is_root(), "this test becomes another user, for which it must be root");
    open(scene.temp.path(), 0o755);
    open(&scene.folder(), 0o777);
    for entry in fs::read_dir(scene.folder()).unwrap() {
        open(&entry.unwrap().path(), 0o777);
    }
    let program = scene.temp.path().join("program");
    // Written by another process: what others fork here could have it open, and it would be busy.
    let mut install = Command::new("install");
    install.args(["-m", "755"]).arg(std::env::current_exe().unwrap()).arg(&program);
    assert!(install.status().unwrap().success());
    let mut command = Command::new(&program);
    command.args(["--exact", "another_process_plays_its_role", "--nocapture"]).env(ROLE, role);
    command.current_dir(scene.temp.path()).uid(65534).gid(65534);
    command
}

#[test]
fn another_users_process_is_refused() {
    let scene = Scene::new();
    let _writer = Writer::open_in(scene.disk(), scene.folder()).unwrap();
    let output = somebody_else(&scene, "intruder").output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(said.contains("refused: 1\n"), "{said}{}", String::from_utf8_lossy(&output.stderr));
    // And a folder that is open to others is not used any more.
    assert!(Folder::open(&scene.folder()).is_err());
}

#[test]
fn another_users_writer_is_not_talked_to() {
    let scene = Scene::new();
    let writer = Writer::open_in(scene.disk(), scene.folder()).unwrap();
    let mut names = fs::read_dir(scene.folder()).unwrap().map(|entry| entry.unwrap().path());
    let name = names.find(|path| path.to_string_lossy().contains("writer-")).unwrap();
    drop(writer);
    let mut stranger = somebody_else(&scene, "stranger");
    let mut child = stranger.env(NAME, name).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let mut stranger = Player { said: BufReader::new(child.stdout.take().unwrap()), child };
    stranger.says("listening");
    open(&scene.folder(), 0o700);
    let refused = attach(scene.temp.path(), HANGS).map(drop).unwrap_err();
    assert_eq!(refused.to_string(), "a writer's socket belongs to user 65534");
    stranger.go();
    stranger.ends();
}

/// The folder of the library for C.
fn c_library() -> PathBuf {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let target = root.join("target/capi");
    let cargo = Command::new(env!("CARGO"))
        .args(["rustc", "--lib", "--crate-type", "cdylib", "--no-default-features", "--features", "capi"])
        .arg("--target-dir")
        .arg(&target)
        .current_dir(root)
        .output()
        .unwrap();
    assert!(cargo.status.success(), "{}", String::from_utf8_lossy(&cargo.stderr));
    target.join("debug")
}

/// Opens and closes a writer, then forks two that open one each; says how many writers' names there are.
const FORKS: &str = r#"
import ctypes, os, sys
library = ctypes.CDLL(sys.argv[1] + "/libdrive_backup.so")
disk, folder = (os.fsencode(path) for path in sys.argv[2:])
def writer():
    opened = ctypes.c_void_p()
    assert library.drive_backup_writer_open(ctypes.byref(opened), disk, folder) == 0
    return opened
library.drive_backup_writer_close(writer())
(ready, tell), (hold, release) = os.pipe(), os.pipe()
for _ in range(2):
    if os.fork() == 0:
        os.close(release)
        writer()
        os.write(tell, b".")
        os.read(hold, 1)
        os._exit(0)
os.close(tell)
if os.read(ready, 1) and os.read(ready, 1):
    print(sum(name.startswith(b"writer-") for name in os.listdir(folder)))
os.close(release)
"#;

#[test]
fn forks_that_open_a_disk_each_are_writers_of_their_own() {
    let scene = Scene::new();
    let output =
        Command::new("python3").args(["-c", FORKS]).arg(c_library()).args([scene.disk(), scene.folder()]).output();
    let output = output.unwrap();
    assert_eq!(String::from_utf8_lossy(&output.stdout), "2\n", "{}", String::from_utf8_lossy(&output.stderr));
}

#[test]
fn the_writer_in_c_is_compiled_without_a_warning_and_backed_up() {
    let (root, library) = (Path::new(env!("CARGO_MANIFEST_DIR")), c_library());
    let scene = Scene::new();
    let program = scene.temp.path().join("writer");
    let gcc = Command::new("gcc")
        .args(["-std=c11", "-Wall", "-Wextra", "-Werror", "-O2", "-o"])
        .args([&program, &root.join("examples/writer.c")])
        .arg(format!("-I{}", root.join("include").display()))
        .arg(format!("-L{}", library.display()))
        .arg("-ldrive_backup")
        .arg(format!("-Wl,-rpath,{}", library.display()))
        .output()
        .unwrap();
    assert!(gcc.status.success(), "{}", String::from_utf8_lossy(&gcc.stderr));

    let mut writer = Command::new(&program).arg(scene.disk()).arg("100000000").arg(scene.folder()).spawn().unwrap();
    scene.wait_for_writes(200);
    let writers = scene.attach();
    assert_eq!(writers.attached(), 1);
    let saver = saver(scene.temp.path(), &writers, false);
    writers.freeze().unwrap().thaw(saver.clone()).unwrap();
    let copied = copy(scene.temp.path(), &writers, &saver, |cluster| {
        if cluster % 64 == 0 {
            scene.wait_for_writes(20)
        }
    });
    writer.kill().unwrap();
    writer.wait().unwrap();
    copied.unwrap();
    assert!(example::check(&scene.copy()).unwrap() >= 200);
    // A disk that is not there: a negative errno, and an orderly end after the writes asked for.
    let missing = Command::new(&program).args(["/nowhere/disk", "1"]).output().unwrap();
    assert!(!missing.status.success());
    let short = Command::new(&program).arg(scene.disk()).arg("10").arg(scene.folder()).status().unwrap();
    assert!(short.success());
}
