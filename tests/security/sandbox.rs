//! What a running backup can't do any more, as the kernel shows it.

use crate::support::{BINARY, Running, copy, drive_backup, folder, piped, run, text, wait_for};
use drive_backup::sandbox;
use drive_backup::writer::Writer;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::mpsc::channel;
use std::thread;

const DISK: u64 = 8 << 20;
const ROLE: &str = "DRIVE_BACKUP_TEST_ROLE";

/// A folder with a disk, of which a copy takes long.
fn disk(folder: &Path) -> PathBuf {
    let path = folder.join("disk.raw");
    fs::write(&path, vec![7; DISK as usize]).unwrap();
    path
}

fn slow_copy(device: &Path, more: &[&str]) -> Running {
    let target = device.with_file_name("copy.raw");
    let mut command = Command::new(BINARY);
    command.args(["--device", text(device), "--target", text(&target), "--speed", "256K", "--snapshot", "overlay"]);
    command.args(["--workers", "2"]).args(more);
    Running::start(&mut piped(command))
}

/// What the kernel says of a thread.
#[derive(Debug)]
struct Thread {
    name: String,
    /// `no_new_privs`.
    gains_nothing: bool,
    /// Number of its seccomp filters.
    filters: u32,
}

fn threads(pid: u32) -> Vec<Thread> {
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).unwrap();
    // One that has ended meanwhile is none.
    let statuses = tasks.filter_map(|task| fs::read_to_string(task.unwrap().path().join("status")).ok());
    let of = |status: String| {
        let field = |name: &str| {
            let value = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
            value.unwrap_or_else(|| panic!("{name}")).trim().to_owned()
        };
        let filters = field("Seccomp_filters").parse().unwrap();
        Thread { name: field("Name"), gains_nothing: field("NoNewPrivs") == "1", filters }
    };
    statuses.map(of).collect()
}

/// Two of them have so many filters.
fn two_copy(backup: &Running, filters: u32) -> Vec<Thread> {
    wait_for("two threads that copy", || {
        let threads = threads(backup.id());
        (threads.iter().filter(|thread| thread.filters == filters).count() == 2).then_some(threads)
    })
}

#[test]
fn once_all_is_open_no_thread_starts_a_program_and_copying_threads_have_less() {
    let folder = folder();
    let backup = slow_copy(&disk(folder.path()), &[]);
    let threads = two_copy(&backup, 2);
    assert!(threads.len() > 3, "{threads:?}");
    assert!(threads.iter().all(|thread| thread.gains_nothing && thread.filters >= 1), "{threads:?}");
}

#[test]
fn threads_that_capture_for_a_writer_are_held() {
    let folder = folder();
    let device = disk(folder.path());
    let writers = folder.path().join("writers");
    let writer = Writer::open_in(&device, &writers).unwrap();
    let backup = slow_copy(&device, &["--writer", "required", "--writer-dir", text(&writers)]);
    let mut clusters = (0..DISK / 4096).rev();
    wait_for("a capture by a thread that is held", || {
        // Before the instant they capture nothing.
        drop(writer.begin(clusters.next().unwrap() * 4096, 4096).unwrap());
        threads(backup.id()).iter().any(|thread| thread.name == "trap" && thread.filters == 2).then_some(())
    });
}

#[test]
fn a_hook_runs_as_if_nothing_were_held_and_threads_that_copy_are() {
    let folder = folder();
    let device = disk(folder.path());
    let backup = slow_copy(&device, &["--hook-after", "true"]);
    let threads = two_copy(&backup, 1);
    let free = threads.iter().filter(|thread| !thread.gains_nothing && thread.filters == 0).count();
    assert_eq!(free, threads.len() - 2, "{threads:?}");
    drop(backup);
    let path = |name: &str| folder.path().join(name);
    let free = format!(
        "grep -q '^NoNewPrivs:.0$' /proc/self/status && grep -q '^Seccomp:.0$' /proc/self/status && \
         touch {}/hooked-$DRIVE_BACKUP_HOOK",
        text(folder.path())
    );
    for hook in ["before", "frozen", "after"] {
        copy(&device, &path("new.raw"), &[&format!("--hook-{hook}"), &free]).succeeds();
        assert!(path(&format!("hooked-{hook}")).exists(), "{hook}");
    }
    copy(&device, &path("late.raw"), &["--hook-failed", &free, "--speed", "1K", "--timeout", "0.1"]).fails(10, "");
    // Whoever ended the backup does not wait for it.
    wait_for("the hook of a failure", || path("hooked-failed").exists().then_some(()));
}

#[test]
fn what_is_held_is_told_to_who_wants_to_know() {
    let folder = folder();
    let device = disk(folder.path());
    let vmdk = folder.path().join("disk.vmdk");
    run("qemu-img", &["convert", "-f", "raw", "-O", "vmdk", text(&device), text(&vmdk)]);
    for (device, name, programs) in [
        (&device, "a.raw", "no program can be started any more"),
        (&device, "a.qcow2", "no program can be started any more"),
        (&device, "a.vdi", "programs can still be started"),
        (&vmdk, "b.raw", "programs can still be started"),
    ] {
        let target = folder.path().join(name);
        let ended = drive_backup(&["--device", text(device), "--target", text(&target), "--verbose"]);
        let expected = format!("the threads that read images are held by Landlock and seccomp; {programs}\n");
        assert!(ended.code == 0 && ended.stderr.contains(&expected), "{name}: {ended:?}");
    }
}

/// What the next test has another process do, for the whole of which it is.
#[test]
fn another_process_plays_its_role() {
    if std::env::var_os(ROLE).is_none() {
        return;
    }
    let try_it = || Command::new("/bin/true").status().map_err(|error| error.raw_os_error());
    let (go, gone) = channel();
    let old = thread::spawn(move || {
        gone.recv().unwrap();
        try_it()
    });
    assert!(try_it().is_ok_and(|status| status.success()), "before");
    assert!(sandbox::shut_process());
    go.send(()).unwrap();
    for (who, tried) in
        [("this", try_it()), ("an old", old.join().unwrap()), ("a new", thread::spawn(try_it).join().unwrap())]
    {
        println!("{who} thread: {tried:?}");
    }
    println!("a file: {:?}", fs::write("/dev/null", "x"));
}

#[test]
fn a_process_that_is_shut_starts_nothing_in_any_thread() {
    let mut other = Command::new(std::env::current_exe().unwrap());
    other.args(["--exact", "sandbox::another_process_plays_its_role", "--nocapture"]).env(ROLE, "shut");
    let ended = Running::start(&mut piped(other)).ended();
    let said = String::from_utf8(ended.stdout).unwrap();
    for thread in ["this", "an old", "a new"] {
        assert!(said.contains(&format!("{thread} thread: Err(Some(1))\n")), "{said}");
    }
    assert!(said.contains("a file: Ok(())\n"), "{said}");
}
