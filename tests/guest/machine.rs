//! A virtual machine: Linux, one program (init.c), the disk under test. See `prepare`.

use crate::support::{Running, run, text, wait_for};
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{ChildStdin, Command, Stdio};
use std::sync::{Arc, Condvar, Mutex, Once};
use std::time::{Duration, Instant};

/// Without KVM a guest is slow, and the machine may have other work.
const PATIENCE: Duration = Duration::from_secs(300);

fn home() -> PathBuf {
    static PREPARED: Once = Once::new();
    PREPARED.call_once(|| drop(run("tests/guest/prepare", &[])));
    PathBuf::from(std::env::var_os("CARGO_TARGET_DIR").unwrap_or("target".into())).join("guest")
}

/// A machine that runs; ended when dropped.
pub struct Machine {
    process: Running,
    console: Arc<Console>,
    keyboard: ChildStdin,
}

#[derive(Default)]
struct Console {
    lines: Mutex<(Vec<String>, bool)>,
    more: Condvar,
}

impl Machine {
    /// Boots, with a job for its program and QEMU's `arguments` for the disk.
    ///
    /// `no_timer_check`: under TCG on a busy host the kernel may find that its timer does not tick in time, and gives up.
    pub fn start(job: &str, arguments: &[String]) -> Self {
        Self::boot(job, &home().join("initramfs"), arguments)
    }

    /// A machine that runs `script` by bash, with `program` and what `pack` brings.
    pub fn run(script: &str, program: &str, folder: &Path, arguments: &[String]) -> Self {
        let [text_of_it, archive, initramfs] = ["script", "archive", "initramfs"].map(|name| folder.join(name));
        std::fs::write(&text_of_it, script).unwrap();
        let basis = std::fs::read(home().join("initramfs")).unwrap();
        run("tests/guest/pack", &[text(&text_of_it), program, text(&archive)]);
        std::fs::write(&initramfs, [basis, std::fs::read(&archive).unwrap()].concat()).unwrap();
        Self::boot("script", &initramfs, arguments)
    }

    fn boot(job: &str, initramfs: &Path, arguments: &[String]) -> Self {
        let home = home();
        let unpacked = home.join("unpacked");
        let accelerator = std::fs::read_to_string(home.join("accelerator")).unwrap();
        let [qemu, kernel, data, bios] =
            ["usr/bin/qemu-system-x86_64", "vmlinuz", "usr/share/qemu", "usr/share/seabios"]
                .map(|name| unpacked.join(name));
        let mut command = Command::new(qemu);
        command.env("LD_LIBRARY_PATH", unpacked.join("usr/lib/x86_64-linux-gnu"));
        command.args([
            "-L",
            text(&data),
            "-L",
            text(&bios),
            "-accel",
            accelerator.trim(),
            "-cpu",
            "max,-arch-capabilities",
        ]);
        command.args([
            "-nodefaults",
            "-no-user-config",
            "-display",
            "none",
            "-no-reboot",
            "-smp",
            "2",
            "-serial",
            "stdio",
        ]);
        command.args(["-kernel", text(&kernel), "-initrd", text(initramfs)]);
        command.args(["-append", &format!("console=ttyS0 panic=-1 quiet no_timer_check job={job}")]);
        command.args(arguments).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut process = Running::start(&mut command);
        let output = process.child().stdout.take().unwrap();
        let keyboard = process.child().stdin.take().unwrap();
        let console = Arc::new(Console::default());
        let theirs = console.clone();
        std::thread::spawn(move || {
            for line in BufReader::new(output).lines().map_while(Result::ok) {
                theirs.lines.lock().unwrap().0.push(line.trim_end().to_owned());
                theirs.more.notify_all();
            }
            theirs.lines.lock().unwrap().1 = true;
            theirs.more.notify_all();
        });
        Self { process, console, keyboard }
    }

    /// Waits until the guest says a line that begins with `word`, and gives what follows it.
    #[track_caller]
    pub fn hear(&self, word: &str) -> String {
        self.hear_such(word, |_| true)
    }

    /// Waits until the guest says a line that begins with `word` and goes on as `such` wants it, and gives what follows.
    #[track_caller]
    pub fn hear_such(&self, word: &str, such: impl Fn(&str) -> bool) -> String {
        let since = Instant::now();
        let mut lines = self.console.lines.lock().unwrap();
        loop {
            let mut said = lines.0.iter().filter_map(|line| line.strip_prefix(word)).map(str::trim);
            if let Some(rest) = said.find(|rest| such(rest)) {
                return rest.to_owned();
            }
            let bad = lines.1 || lines.0.iter().any(|line| line.starts_with("FAILED")) || since.elapsed() > PATIENCE;
            assert!(!bad, "the guest does not say {word}: {:#?}", lines.0);
            lines = self.console.more.wait_timeout(lines, Duration::from_millis(100)).unwrap().0;
        }
    }

    /// All that the guest has said after `word` so far.
    pub fn heard(&self, word: &str) -> Vec<String> {
        let lines = self.console.lines.lock().unwrap();
        lines.0.iter().filter_map(|line| line.strip_prefix(word)).map(|line| line.trim().to_owned()).collect()
    }

    /// The guest is to come to an end, verifies what it wrote, and switches the machine off. How much that was, on each disk.
    #[track_caller]
    pub fn stop(mut self) -> Vec<u64> {
        self.keyboard.write_all(b"stop\n").unwrap();
        self.ends()
    }

    /// [`Machine::stop`], for a guest that ends by itself.
    #[track_caller]
    pub fn ends(mut self) -> Vec<u64> {
        let verified = self.hear("VERIFIED");
        self.hear("DONE");
        wait_for("the machine to be switched off", || self.process.has_ended().then_some(()));
        verified.split_whitespace().map(|count| count.parse().unwrap()).collect()
    }
}

/// QEMU's arguments for a disk served by vhost-user at `socket`: those of the README, with less memory.
pub fn vhost_user(socket: &Path) -> Vec<String> {
    of_the_readme("vhost-user-blk", "/run/disk.sock", socket)
}

/// QEMU's arguments for a disk served by NBD at `socket`: those of the README.
pub fn nbd(socket: &Path) -> Vec<String> {
    of_the_readme("nbd+unix", "/run/vm.sock", socket)
}

fn of_the_readme(what: &str, example: &str, socket: &Path) -> Vec<String> {
    let readme = std::fs::read_to_string("README.md").unwrap().replace("\\\n", " ");
    let line = readme.lines().find(|line| line.starts_with("qemu-system-x86_64") && line.contains(what));
    let words = line.unwrap_or_else(|| panic!("the README does not say how QEMU uses {what}")).split_whitespace();
    let words = words.skip(1).take_while(|word| *word != "...");
    words.map(|word| word.replace(example, text(socket)).replace("2G", "256M")).collect()
}
