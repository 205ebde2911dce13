//! On a terminal: a bar, Enter, Ctrl-C, Ctrl-S.

use crate::kit::{BINARY, BOUND, Bench, DISK, Tmpfs, undisturbed};
use expectrl::process::unix::WaitStatus;
use expectrl::session::OsSession;
use expectrl::{ControlCode, Eof, Expect, Regex, Session};
use std::fs;
use std::os::unix::net::UnixListener;
use std::time::{Duration, Instant};

const GREEN_OR_SO: &str = "\u{1b}[36m";

fn on_terminal(bench: &Bench, program: &str, flags: &[&str], no_color: bool) -> OsSession {
    let mut command = undisturbed(program);
    command.current_dir(&bench.folder).args(flags).env("TERM", "xterm").env_remove("NO_COLOR");
    command.env_remove("CLICOLOR_FORCE").env_remove("JOURNAL_STREAM");
    if no_color {
        command.env("NO_COLOR", "1");
    }
    let mut session = Session::spawn(command).unwrap();
    session.get_process_mut().set_window_size(120, 24).unwrap();
    session.set_expect_timeout(Some(BOUND));
    session
}

/// Waits for `what`; everything that was shown up to its end.
fn until(session: &mut OsSession, what: &str) -> String {
    let found = session.expect(Regex(what)).unwrap_or_else(|error| panic!("{what}: {error}"));
    String::from_utf8_lossy(found.before()).into_owned() + &String::from_utf8_lossy(found.get(0).unwrap())
}

fn wait(session: &OsSession) -> WaitStatus {
    let end = Instant::now() + BOUND;
    loop {
        match session.get_process().status().unwrap() {
            WaitStatus::StillAlive => std::thread::sleep(Duration::from_millis(2)),
            status => return status,
        }
        assert!(Instant::now() < end, "still runs");
    }
}

/// Lifts its speed limit.
fn hurry(session: &OsSession) {
    let pid = rustix::process::Pid::from_raw(session.get_process().pid().as_raw()).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::USR2).unwrap();
}

#[test]
fn a_bar_shows_the_copy_and_a_line_its_end() {
    let bench = Bench::new();
    let flags = ["--device", "disk.raw", "--target", "out.raw", "--speed", "8M"];
    let began = Instant::now();
    let mut terminal = on_terminal(&bench, BINARY, &flags, false);
    let shown = until(&mut terminal, r"\[.*=>.*\].* %, .* of 16\.0 MiB, .*MiB/s");
    assert!(shown.contains(GREEN_OR_SO), "{shown:?}");
    let shown = shown + &until(&mut terminal, "drive-backup: complete: 16\\.0 MiB");
    assert!(!shown.contains("100"), "{shown:?}");
    let (draws, most) = (shown.matches(" %, ").count(), began.elapsed().as_millis() / 100 + 1);
    assert!(draws > 3 && draws as u128 <= most, "{draws} draws, at most 10 a second are {most}");
    terminal.expect(Eof).unwrap();
    assert!(matches!(wait(&terminal), WaitStatus::Exited(_, 0)));
    bench.assert_copied("out.raw");
}

#[test]
fn a_variable_that_says_not_to_be_quiet_hides_no_bar() {
    let bench = Bench::new();
    let flags = ["DRIVE_BACKUP_QUIET=0", BINARY, "--device", "disk.raw", "--target", "out.raw", "--speed", "1M"];
    let mut terminal = on_terminal(&bench, "env", &flags, false);
    until(&mut terminal, r"\[.*=>.*\].* %, .* of 16\.0 MiB, .*MiB/s");
    hurry(&terminal);
    until(&mut terminal, "drive-backup: complete: 16\\.0 MiB");
    assert!(matches!(wait(&terminal), WaitStatus::Exited(_, 0)));
}

#[test]
fn two_bars_show_both_disks_and_draw_no_more_than_one() {
    let bench = Bench::new();
    fs::copy(bench.path("disk.raw"), bench.path("more.raw")).unwrap();
    let flags = ["--device", "disk.raw", "--target", "out.raw", "--device", "more.raw", "--target", "other.raw"];
    let began = Instant::now();
    let mut terminal = on_terminal(&bench, BINARY, &[&flags[..], &["--speed", "8M"]].concat(), false);
    let both = r"\[.*=>.*\] disk\.raw: .* %, .*\[.*=>.*\] more\.raw: .* %, .*MiB/s";
    let shown = until(&mut terminal, both);
    let ends = r"(?s)drive-backup: (disk|more)\.raw: complete: 16.*drive-backup: (disk|more)\.raw: complete: 16";
    let shown = shown + &until(&mut terminal, ends);
    let (draws, most) = (shown.matches("] disk.raw: ").count(), began.elapsed().as_millis() / 100 + 3);
    assert!(draws > 3 && draws as u128 <= most, "{draws} draws, at most 10 a second are {most}");
    assert!(matches!(wait(&terminal), WaitStatus::Exited(_, 0)));
    bench.assert_copied("out.raw");
    bench.assert_copied("other.raw");
}

#[test]
fn while_the_flush_runs_it_says_so_and_never_100_percent() {
    let bench = Bench::new();
    // It is held before its flush as long as this exists: see `src/hold.rs`.
    let hold = UnixListener::bind(bench.path("hold")).unwrap();
    let variable = format!("DRIVE_BACKUP_HOLD=Flushing:{}", bench.path("hold").display());
    let flags = [&variable, BINARY, "--device", "disk.raw", "--target", "out.raw"];
    let mut terminal = on_terminal(&bench, "env", &flags, false);
    let shown = until(&mut terminal, "flushing 16\\.0 MiB to stable storage, 0:[0-5][1-9]");
    drop(hold);
    let shown = shown + &until(&mut terminal, "drive-backup: complete");
    assert!(!shown.contains("100"), "{shown:?}");
    assert!(matches!(wait(&terminal), WaitStatus::Exited(_, 0)));
}

#[test]
fn a_narrow_terminal_has_the_words_and_no_bar() {
    let bench = Bench::new();
    let flags = ["--device", "disk.raw", "--target", "out.raw", "--speed", "2M"];
    let mut terminal = on_terminal(&bench, BINARY, &flags, false);
    terminal.get_process_mut().set_window_size(60, 24).unwrap();
    let shown = until(&mut terminal, " of 16\\.0 MiB, .*MiB/s, 0:0[0-9] left");
    let last = shown.rsplit('\r').next().unwrap();
    assert!(!last.contains("=>") && shown.is_ascii(), "{shown:?}");
    hurry(&terminal);
    assert!(matches!(wait(&terminal), WaitStatus::Exited(_, 0)));
}

#[test]
fn no_color_means_no_colour() {
    let bench = Bench::new();
    let flags = ["--device", "disk.raw", "--target", "out.raw", "--speed", "1M"];
    let mut terminal = on_terminal(&bench, BINARY, &flags, true);
    let shown = until(&mut terminal, " %, ");
    hurry(&terminal);
    let shown = shown + &until(&mut terminal, "drive-backup: complete");
    assert!(!shown.contains("\u{1b}[3"), "{shown:?}");
}

#[test]
fn enter_goes_on_after_a_stop() {
    let bench = Bench::new();
    let small = Tmpfs::at(&bench.path("small"), DISK / 2);
    let flags = ["--device", "disk.raw", "--target", "small/out.raw", "--on-target-error", "stop"];
    let mut terminal = on_terminal(&bench, BINARY, &flags, false);
    until(&mut terminal, "No space left on device; stopped; press Enter to go on");
    until(&mut terminal, "STOPPED by an error; Enter or SIGCONT goes on");
    small.resize(2 * DISK);
    terminal.send("\n").unwrap();
    until(&mut terminal, "drive-backup: complete");
    assert!(matches!(wait(&terminal), WaitStatus::Exited(_, 0)));
    bench.assert_copied("small/out.raw");
}

#[test]
fn ctrl_c_removes_the_partial_copy_and_ends_as_a_signal_does() {
    let bench = Bench::new();
    let flags = ["--device", "disk.raw", "--target", "out.raw", "--speed", "256K"];
    let mut terminal = on_terminal(&bench, BINARY, &flags, false);
    until(&mut terminal, " %, ");
    terminal.send(ControlCode::ETX).unwrap();
    until(&mut terminal, "drive-backup: ended by SIGINT: .*; the partial copy was removed");
    let status = wait(&terminal);
    assert!(matches!(status, WaitStatus::Signaled(_, signal, _) if signal as i32 == nix::libc::SIGINT), "{status:?}");
    assert!(bench.leftovers().is_empty());
}

#[test]
fn a_terminal_that_is_stopped_holds_nothing_up() {
    let bench = Bench::new();
    let flags = ["--device", "disk.raw", "--target", "out.raw", "--speed", "8M"];
    let mut terminal = on_terminal(&bench, BINARY, &flags, false);
    until(&mut terminal, " %, ");
    // Ctrl-S: from here on whoever writes to the terminal blocks.
    terminal.send(ControlCode::DC3).unwrap();
    assert!(matches!(wait(&terminal), WaitStatus::Exited(_, 0)));
    bench.assert_copied("out.raw");
}

#[test]
fn the_disk_is_not_written_to_a_terminal() {
    let bench = Bench::new();
    let mut terminal = on_terminal(&bench, BINARY, &["--device", "disk.raw", "--target", "-"], false);
    until(&mut terminal, "would write the disk to a terminal");
    assert!(matches!(wait(&terminal), WaitStatus::Exited(_, 2)));
}

#[test]
fn a_dumb_terminal_gets_lines() {
    let bench = Bench::new();
    let script =
        format!("TERM=dumb exec {BINARY} --device disk.raw --target out.raw --speed 1M --progress-interval 0.2");
    let mut terminal = on_terminal(&bench, "sh", &["-c", &script], false);
    let shown = until(&mut terminal, r" %, [^\n]*\n[^\n]* %, ");
    hurry(&terminal);
    let shown = shown + &until(&mut terminal, "drive-backup: complete");
    assert!(!shown.contains('\u{1b}'), "{shown:?}");
    let _ = fs::read(bench.path("out.raw")).unwrap();
}
