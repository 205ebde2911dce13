//! What QEMU's drivers reach: real servers on loopback, and one that says nothing. `prepare` brings the drivers. What a user
//! keeps in the system's files (keys, known hosts, authorities) is there for the processes of a test alone.

use super::support::*;
use super::{Bench, child_of, is_gone};
use nix::sys::signal::Signal;
use std::fs;
use std::io::{BufRead, BufReader};
use std::net::TcpListener;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex, Once};
use std::time::Instant;

fn unpacked() -> PathBuf {
    static PREPARED: Once = Once::new();
    PREPARED.call_once(|| drop(run("tests/formats/prepare", &[])));
    let target = std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| "target".into(), PathBuf::from);
    fs::canonicalize(target.join("remote/unpacked")).unwrap()
}

/// The libraries beside the tools.
fn libraries() -> String {
    let unpacked = unpacked();
    let folders =
        ["usr/lib", "lib"].map(|folder| format!("{}/{folder}/{}-linux-gnu", text(&unpacked), std::env::consts::ARCH));
    folders.join(":")
}

/// `program` where the files of `bench` stand in the places of the system's.
fn elsewhere(bench: &Bench, program: &Path, arguments: &[&str]) -> Command {
    let script = r#"cd "$0"; mount --bind passwd /etc/passwd; mount --bind shadow /etc/shadow
        mount --bind authority.pem /etc/ssl/certs/ca-certificates.crt; mount -t tmpfs run /run; mkdir /run/sshd; exec env --default-signal "$@""#;
    let mut command = Command::new("unshare");
    command.args(["--mount", "sh", "-ec", script]).arg(bench.folder.path()).arg(program).args(arguments);
    let path = format!("{}/usr/bin:{}", text(&unpacked()), std::env::var("PATH").unwrap());
    command.env("PATH", path).env("LD_LIBRARY_PATH", libraries()).env("TMPDIR", bench.at("tmp"));
    piped(command)
}

fn copy(bench: &Bench, device: &str, target: &str, more: &[&str]) -> Ended {
    let arguments = [&["--device", device, "--target", target], more].concat();
    let ended = Ended::of(elsewhere(bench, Path::new(BINARY), &arguments).output().unwrap());
    assert_eq!(names(&bench.at("tmp")), [""; 0], "{ended:?}");
    ended
}

/// A disk, a user whose home is `home`, and an authority that nobody else trusts.
fn bench() -> Bench {
    let bench = Bench::new();
    fs::create_dir_all(bench.at("home/.ssh")).unwrap();
    let home = text(&bench.at("home")).to_owned();
    let users = format!("root:x:0:0:root:{home}:/bin/sh\nsshd:x:65533:65534::/run/sshd:/usr/sbin/nologin\n");
    fs::write(bench.at("passwd"), users).unwrap();
    fs::write(bench.at("shadow"), "root:*:20000::::::\nsshd:!:20000::::::\n").unwrap();
    let new =
        ["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-batch", "-days", "2"];
    let (certificate, key) = (bench.at("authority.pem"), bench.at("key.pem"));
    let name = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"];
    run("openssl", &[&new[..], &name, &["-keyout", text(&key), "-out", text(&certificate)]].concat());
    bench
}

/// A web server, and its port.
fn web(bench: &Bench, tls: &[&Path]) -> (Running, u16) {
    let mut command = Command::new("python3");
    command.arg("tests/formats/ranges.py").arg(bench.folder.path()).args(tls).stdout(Stdio::piped());
    let mut server = Running::start(&mut command);
    let mut line = String::new();
    BufReader::new(server.child().stdout.take().unwrap()).read_line(&mut line).unwrap();
    (server, line.trim().parse().unwrap())
}

#[test]
fn images_behind_a_web_server_are_copied() {
    let bench = bench();
    qemu_img("convert -f raw -O qcow2", &[&bench.at("disk.raw"), &bench.at("disk.qcow2")]);
    let (_server, port) = web(&bench, &[]);
    copy(&bench, &format!("http://127.0.0.1:{port}/disk.raw"), text(&bench.at("a.raw")), &[]).succeeds();
    bench.is_disk("a.raw");
    // QEMU's driver loses a request now and then when it has several. It reads ahead for itself.
    let most: u32 = fs::read_to_string(bench.at("most")).unwrap().parse().unwrap();
    assert!(most <= 2, "{most} requests at once");
    copy(&bench, &format!("http://127.0.0.1:{port}/disk.qcow2"), text(&bench.at("b.raw")), &[]).succeeds();
    bench.is_disk("b.raw");
    let missing = format!("http://127.0.0.1:{port}/missing");
    copy(&bench, &missing, text(&bench.at("c.raw")), &[]).fails(4, &format!("open source '{missing}': "));
    assert!(!bench.at("c.raw").exists());
}

#[test]
fn a_web_server_must_have_the_certificate_of_its_name() {
    let bench = bench();
    let (_server, port) = web(&bench, &[&bench.at("authority.pem"), &bench.at("key.pem")]);
    let source = format!("https://localhost:{port}/disk.raw");
    copy(&bench, &source, text(&bench.at("a.raw")), &[]).succeeds();
    bench.is_disk("a.raw");
    fs::write(bench.at("authority.pem"), "").unwrap();
    copy(&bench, &source, text(&bench.at("b.raw")), &[]).fails(4, "certificate");
}

/// sshd for each connection. It is asked by its port.
struct Ssh {
    port: u16,
    sessions: Arc<Mutex<Vec<Child>>>,
}

impl Drop for Ssh {
    fn drop(&mut self) {
        for session in self.sessions.lock().unwrap().iter_mut() {
            let _ = session.kill();
            let _ = session.wait();
        }
    }
}

impl Ssh {
    /// It lets in who has the key in `home`, and its own key is known there.
    fn start(bench: &Bench) -> Self {
        let (host, own) = (bench.at("host"), bench.at("home/.ssh/id_ed25519"));
        for key in [&host, &own] {
            run("ssh-keygen", &["-q", "-t", "ed25519", "-N", "", "-f", text(key)]);
        }
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let public = |key: &Path| fs::read_to_string(key.with_extension("pub")).unwrap();
        fs::write(bench.at("home/.ssh/known_hosts"), format!("[127.0.0.1]:{port} {}", public(&host))).unwrap();
        fs::write(bench.at("authorized"), public(&own)).unwrap();
        let settings = format!(
            "HostKey {}\nAuthorizedKeysFile {}\nStrictModes no\nUsePAM no\nSubsystem sftp internal-sftp\n",
            text(&host),
            text(&bench.at("authorized"))
        );
        fs::write(bench.at("sshd_config"), settings).unwrap();
        let program = unpacked().join("usr/sbin/sshd");
        let mut command = elsewhere(bench, &program, &["-i", "-f", text(&bench.at("sshd_config"))]);
        let sessions = Arc::new(Mutex::new(Vec::new()));
        let kept = sessions.clone();
        std::thread::spawn(move || {
            for socket in listener.incoming() {
                let socket = OwnedFd::from(socket.unwrap());
                command.stdin(socket.try_clone().unwrap()).stdout(socket).stderr(Stdio::null());
                kept.lock().unwrap().push(command.spawn().unwrap());
                // Nor is the end of the connection kept open here.
                command.stdin(Stdio::null()).stdout(Stdio::null());
            }
        });
        Self { port, sessions }
    }
}

#[test]
fn a_disk_is_copied_to_a_machine_behind_ssh_and_back() {
    let bench = bench();
    let ssh = Ssh::start(&bench);
    let place = format!("ssh://root@127.0.0.1:{}{}", ssh.port, text(&bench.at("there.raw")));
    let disk = bench.at("disk.raw");
    let rehearsed = copy(&bench, text(&disk), &place, &["--dry-run"]);
    assert_eq!((rehearsed.code, bench.at("there.raw").exists()), (0, false), "{rehearsed:?}");
    copy(&bench, text(&disk), &place, &["--hook-frozen", "false"]).fails(9, "--hook-frozen");
    assert!(!bench.at("there.raw").exists());
    copy(&bench, text(&disk), &place, &[]).succeeds();
    bench.is_disk("there.raw");
    copy(&bench, text(&disk), &place, &[]).fails(2, "exists; to write into it, say --mode existing");
    qemu_io(&["-f", "raw"], &bench.at("there.raw"), &["write -P 9 1M 64k"]);
    copy(&bench, text(&disk), &place, &["--mode", "existing"]).succeeds();
    bench.is_disk("there.raw");
    copy(&bench, &place, text(&bench.at("back.raw")), &[]).succeeds();
    bench.is_disk("back.raw");
    // What a disk holds is no format, neither when the file is made nor when it is written again.
    qemu_img("create -q -f qcow2", &[&bench.at("guest.raw"), Path::new("64K")]);
    fs::OpenOptions::new().write(true).open(bench.at("guest.raw")).unwrap().set_len(1 << 20).unwrap();
    let guest = (bench.at("guest.raw"), place.replace("there", "guest's"));
    for mode in ["absolute-paths", "existing"] {
        copy(&bench, text(&guest.0), &guest.1, &["--source-format", "raw", "--mode", mode]).succeeds();
        assert!(fs::read(&guest.0).unwrap() == fs::read(bench.at("guest's.raw")).unwrap());
    }
    fs::write(bench.at("home/.ssh/known_hosts"), "").unwrap();
    copy(&bench, &place, text(&bench.at("again.raw")), &[]).fails(4, "known_hosts");
}

/// Interrupts a copy with one end at a server that says nothing. Did it come back before it was given up?
fn ends_without_an_answer(scheme: &str, is_source: bool) -> bool {
    let bench = bench();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let place = format!("{scheme}://127.0.0.1:{}/x", listener.local_addr().unwrap().port());
    let (disk, copy) = (bench.at("disk.raw"), bench.at("x.raw"));
    let (device, target) = if is_source { (&*place, text(&copy)) } else { (text(&disk), &*place) };
    let arguments = ["--device", device, "--target", target];
    let running = Running::start(&mut elsewhere(&bench, Path::new(BINARY), &arguments));
    // QEMU has come, and is not answered.
    let (_silent, _) = listener.accept().unwrap();
    let child = wait_for("qemu-nbd", || child_of(running.id()));
    let began = Instant::now();
    running.signal(Signal::SIGINT);
    let ended = running.ended();
    println!("{ended:?}");
    assert!(began.elapsed() < PATIENCE / 3, "{:?}", began.elapsed());
    assert_eq!(ended.code, 130, "{ended:?}");
    assert!(!copy.exists());
    if ended.stderr.contains("hangs") {
        return false;
    }
    is_gone(child).expect("its qemu-nbd has ended before it");
    assert_eq!(names(&bench.at("tmp")), [""; 0]);
    true
}

/// A busy machine may give it up too early, but not each time.
#[test]
fn an_interrupt_ends_the_wait_for_a_server_that_says_nothing() {
    for (scheme, is_source) in [("ssh", false), ("ssh", true), ("http", true)] {
        assert!((0..5).any(|_| ends_without_an_answer(scheme, is_source)), "{scheme}, source: {is_source}");
    }
}
