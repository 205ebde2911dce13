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
