//! One connection: a thread that reads and obeys, and one that writes.

use super::command::{Request, execute};
use super::frame::{Cutter, Piece};
use super::hub::Queue;
use super::server::Shared;
use super::wire::{self, Refusal};
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

/// Who does not read for so long, though something waits, is cut off.
const PATIENCE: Duration = Duration::from_secs(5);

/// Serves a client until it, or the server, has enough. Blocks.
pub fn serve(stream: UnixStream, queue: &Arc<Queue>, shared: &Shared) -> io::Result<()> {
    stream.set_write_timeout(Some(PATIENCE))?;
    let writer = {
        let (stream, queue) = (stream.try_clone()?, Arc::clone(queue));
        thread::Builder::new().name("qmp-write".to_owned()).spawn(move || write(&stream, &queue))?
    };
    if queue.reply(wire::greeting()) {
        read(&stream, queue, shared);
    }
    queue.close();
    // It ends within its bound, even when nobody reads.
    let _ = writer.join();
    Ok(())
}

fn write(mut stream: &UnixStream, queue: &Queue) {
    while let Some(line) = queue.next() {
        if stream.write_all(&line).is_err() {
            break;
        }
    }
    let _ = stream.shutdown(Shutdown::Both);
}

/// What a client may do after a command.
enum Next {
    /// Say the next one.
    Say,
    /// Listen until the end, which it asked for.
    Listen,
    /// Nothing.
    Leave,
}

/// Until it has gone, or has to go.
fn read(mut stream: &UnixStream, queue: &Queue, shared: &Shared) {
    let mut cutter = Cutter::default();
    let (mut negotiated, mut listens) = (false, false);
    let mut buffer = [0; 4096];
    loop {
        let length = match stream.read(&mut buffer) {
            Ok(0) => return,
            Ok(length) => length,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
            Err(_) => return,
        };
        for byte in &buffer[..length] {
            if listens {
                break;
            }
            let next = match cutter.push(*byte) {
                None => Next::Say,
                Some(Piece::Value(text)) => obey(&text, queue, shared, &mut negotiated),
                Some(Piece::TooMuch(why)) => {
                    let _ = queue.reply(wire::reply(Err(Refusal::generic(why)), None));
                    Next::Leave
                }
            };
            match next {
                Next::Say => {}
                Next::Listen => listens = true,
                Next::Leave => return,
            }
        }
    }
}

fn obey(text: &[u8], queue: &Queue, shared: &Shared, negotiated: &mut bool) -> Next {
    let Request { id, command } = Request::parse(text);
    queue.owe();
    let quits = command.as_ref().is_ok_and(|(name, _)| name == "quit");
    let answer = command.and_then(|(name, arguments)| execute(shared, &name, &arguments, negotiated));
    let quits = quits && answer.is_ok();
    let fits = queue.reply(wire::reply(answer, id));
    if quits {
        shared.quit();
    }
    if *negotiated {
        // After the reply: events come only then.
        queue.listen();
    }
    match (fits, quits) {
        (false, _) => Next::Leave,
        (true, true) => Next::Listen,
        (true, false) => Next::Say,
    }
}

#[cfg(test)]
mod tests {
    use crate::qmp::server::{Server, Setup};
    use std::io::{Read, Write};
    use std::net::Shutdown;
    use std::os::unix::net::UnixStream;
    use std::time::Duration;

    #[test]
    fn who_said_quit_and_has_gone_is_let_go_before_the_end() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("socket");
        let mut server = Server::new(Setup { nodes: Vec::new(), writer_dir: None, quit: Box::new(|| ()) });
        server.listen(&path).unwrap();
        let mut client = UnixStream::connect(&path).unwrap();
        client.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        client.write_all(b"{\"execute\": \"qmp_capabilities\"}{\"execute\": \"quit\"}").unwrap();
        client.shutdown(Shutdown::Write).unwrap();
        let mut said = String::new();
        client.read_to_string(&mut said).expect("it is hung up on");
        assert_eq!(said.matches("\"return\"").count(), 2, "{said}");
    }
}
