//! How a server ends when several things ask for its end.

use super::*;
use crate::cli::progress::People;
use crate::cli::signs::Files;
use signal_hook::consts::SIGINT;

/// Exit code, and the signal that the process dies of, when all that has happened to a server that lets people in.
fn ended(happened: Vec<Wake>) -> (u8, Option<i32>) {
    let ends = Ends { json: None, people: People::at(std::io::sink()), files: Files::default() };
    let session = Session::start(ends, true).unwrap();
    assert!(session.door.take());
    happened.into_iter().for_each(|wake| session.wake.send(wake).unwrap());
    let ending = session.supervise();
    (ending.code, ending.signal)
}

fn fault() -> Wake {
    Wake::Notice(Notice::Failed(internal()))
}

fn flushed() -> Wake {
    Wake::Stopped(Ok(true))
}

#[test]
fn only_a_second_signal_cuts_a_server_off() {
    let cut = (128 + SIGINT as u8, Some(SIGINT));
    assert_eq!(ended(vec![Wake::Signal(SIGTERM), Wake::Signal(SIGINT), flushed()]), cut);
    assert_eq!(ended(vec![Wake::Signal(SIGTERM), Wake::Quit, flushed()]), (0, None));
    assert_eq!(ended(vec![Wake::Quit, Wake::Quit, flushed()]), (0, None));
    assert_eq!(ended(vec![Wake::Quit, Wake::Signal(SIGTERM), flushed()]), (0, None));
    assert_eq!(ended(vec![Wake::Quit, Wake::Signal(SIGTERM), Wake::Signal(SIGINT), flushed()]), cut);
    assert_eq!(ended(vec![fault(), Wake::Signal(SIGTERM), Wake::Quit, flushed()]), (exit::OTHER, None));
    assert_eq!(ended(vec![fault(), Wake::Signal(SIGTERM), Wake::Signal(SIGINT), flushed()]), cut);
}

#[test]
fn no_two_disks_are_one_to_clients() {
    let names = |named: &[(&str, &str)]| {
        devices(&named.iter().map(|(name, path)| (*name, PathBuf::from(path))).collect::<Vec<_>>())
    };
    assert_eq!(names(&[("a", "/x/a.raw"), ("b", "/x/b.raw")]), ["a", "b"]);
    // Ids begin with a letter, and have no spaces.
    assert_eq!(names(&[("a b", "/x/a b.raw"), ("a_b", "/x/a_b.raw")]), ["a_b.2", "a_b"]);
    assert_eq!(names(&[("100", "/x/100.raw"), ("disk-100", "/x/disk-100.raw")]), ["disk-100.2", "disk-100"]);
    assert_eq!(names(&[("1", "/x/b.raw"), ("2", "/y/b.raw"), ("b", "/x/c.raw")]), ["b.2", "b.3", "b"]);
}
