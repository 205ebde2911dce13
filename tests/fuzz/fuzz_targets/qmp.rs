//! A QMP client that says its bytes and hangs up; the server has a disk, and a job whose engine does nothing.
#![no_main]

use drive_backup::job::Job;
use drive_backup::qmp::{New, Node, Server, Setup};
use libfuzzer_sys::fuzz_target;
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::{Arc, OnceLock};
use std::time::Duration;
use tempfile::TempDir;

const SOON: Duration = Duration::from_secs(4);

/// A server with its socket, for all inputs: one that an input could harm would fail the next.
fn socket() -> &'static PathBuf {
    static SERVER: OnceLock<(TempDir, Server, PathBuf)> = OnceLock::new();
    let (_, _, path) = SERVER.get_or_init(|| {
        let folder = tempfile::tempdir_in("/dev/shm").unwrap();
        let path = folder.path().join("s");
        let node = Node {
            device: "d".into(),
            path: "/dev/null".into(),
            format: None,
            length: Some(1),
            read_only: false,
            secret: None,
        };
        let mut server = Server::new(Setup { nodes: vec![node], writer_dir: None, quit: Box::new(|| ()) });
        let job = Arc::new(Job::new(None));
        let new =
            New { id: "d".into(), device: "d".into(), job, auto_finalize: true, auto_dismiss: false, group: None };
        server.jobs().reserve(vec![new]).map_err(|refusal| refusal.text).unwrap();
        server.listen(&path).unwrap();
        (folder, server, path)
    });
    path
}

fuzz_target!(|bytes: &[u8]| {
    let mut client = UnixStream::connect(socket()).unwrap();
    client.set_read_timeout(Some(SOON)).unwrap();
    client.set_write_timeout(Some(SOON)).unwrap();
    let (first, rest) = bytes.split_at(usize::from(bytes.first() == Some(&b'+')));
    let mut all = if first.is_empty() { Vec::new() } else { b"{\"execute\": \"qmp_capabilities\"}\n".to_vec() };
    all.extend(rest);
    // It may have had enough of us before the end.
    let _ = client.write_all(&all);
    let _ = client.shutdown(Shutdown::Write);
    let mut said = Vec::new();
    let end = client.read_to_end(&mut said).map_err(|error| error.kind());
    assert!(end.is_ok() || end == Err(std::io::ErrorKind::ConnectionReset), "the server holds on: {end:?}");
    assert!(said.starts_with(b"{\"QMP\""), "a greeting comes first");
});
