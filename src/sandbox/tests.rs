use super::*;
use rustix::io::Errno;
use std::fs::{self, File};
use std::io::{Read, Seek, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::net::UnixStream;
use std::process::Command;
use std::thread;

/// In a thread of its own, which alone is held; the test's may be the whole process's.
fn held<T: Send>(reach: Reach, act: impl FnOnce() -> T + Send) -> T {
    thread::scope(|scope| {
        let thread = scope.spawn(|| {
            assert_eq!(enter(reach), Held { files: true, calls: true }, "this kernel has no Landlock or no seccomp");
            act()
        });
        thread.join().unwrap()
    })
}

fn denied<T>(result: std::io::Result<T>) -> bool {
    let errno = result.err().and_then(|error| error.raw_os_error()).map(Errno::from_raw_os_error);
    matches!(errno, Some(Errno::ACCESS | Errno::PERM))
}

#[test]
fn a_reading_thread_opens_nothing_and_starts_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let (old, new) = (folder.path().join("old"), folder.path().join("new"));
    fs::write(&old, "x").unwrap();
    for reach in [Reach::Nothing, Reach::Servers] {
        held(reach, || {
            assert!(denied(Command::new("/bin/true").status()), "{reach:?}: execve");
            assert!(denied(File::create(&new)), "{reach:?}: create");
            assert!(denied(File::options().append(true).open(&old)), "{reach:?}: write");
            assert!(denied(fs::remove_file(&old)), "{reach:?}: unlink");
            assert!(denied(fs::rename(&old, &new)), "{reach:?}: rename");
            assert!(denied(std::os::unix::fs::symlink(&old, &new)), "{reach:?}: symlink");
            assert!(denied(fs::create_dir(&new)), "{reach:?}: mkdir");
            let free: fs::Permissions = std::os::unix::fs::PermissionsExt::from_mode(0o777);
            assert!(denied(fs::set_permissions(&old, free)), "{reach:?}: chmod");
            assert!(denied(TcpListener::bind("127.0.0.1:0").map(drop)), "{reach:?}: bind");
        });
        assert!(held(reach, || denied(File::open(&old))) == (reach == Reach::Nothing), "{reach:?}: read");
    }
    assert_eq!(fs::read(&old).unwrap(), b"x");
    assert!(!new.exists() && File::create(&new).is_ok(), "this thread is free");
}

#[test]
fn what_is_open_stays_as_it_was() {
    let folder = tempfile::tempdir().unwrap();
    let mut file = File::options().read(true).write(true).create_new(true).open(folder.path().join("f")).unwrap();
    held(Reach::Nothing, || {
        file.write_all(b"some bytes").unwrap();
        file.set_len(4).unwrap();
        file.sync_all().unwrap();
        file.rewind().unwrap();
        let mut read = String::new();
        file.read_to_string(&mut read).unwrap();
        assert_eq!(read, "some");
        // Threads of it, memory and time.
        assert_eq!(thread::scope(|scope| scope.spawn(|| vec![1_u8; 32 << 20].len()).join().unwrap()), 32 << 20);
    });
}

#[test]
fn only_who_has_a_server_connects() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    held(Reach::Servers, || drop(TcpStream::connect(address).expect("a connection made anew")));
    assert!(held(Reach::Nothing, || denied(TcpStream::connect(address))));
    assert!(held(Reach::Nothing, || denied(UnixStream::pair())));
}

#[test]
fn other_processes_and_rights_are_out_of_reach() {
    let parent = nix::unistd::getppid();
    held(Reach::Servers, || {
        assert_eq!(nix::sys::signal::kill(parent, None), Err(nix::Error::EPERM));
        assert_eq!(rustix::thread::set_thread_uid(rustix::process::getuid()), Err(Errno::PERM));
        assert_eq!(nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNS), Err(nix::Error::EPERM));
        let none: Option<&str> = None;
        let mounted = nix::mount::mount(none, "/", none, nix::mount::MsFlags::MS_REC, none);
        assert_eq!(mounted, Err(nix::Error::EPERM));
    });
}

#[test]
fn what_a_thread_starts_is_held_too() {
    assert!(held(Reach::Nothing, || thread::spawn(|| denied(File::open("/dev/null"))).join().unwrap()));
}

#[test]
fn a_thread_is_held_once() {
    held(Reach::Servers, || {
        assert_eq!(enter(Reach::Nothing), Held { files: true, calls: true });
        assert!(File::open("/dev/null").is_ok(), "its first reach counts");
    });
}
