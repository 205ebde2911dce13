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
    match queue.reply(wire::greeting()).then(|| read(&stream, queue, shared)) {
        // It hears of the end that it asked for: who ends closes the queue.
        Some(Over::Quits) => {}
        _ => queue.close(),
    }
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

/// Why nothing more is taken from a client.
enum Over {
    /// It has gone, or has to go.
    Leaves,
    /// It asked for the end of everything.
    Quits,
}

fn read(mut stream: &UnixStream, queue: &Queue, shared: &Shared) -> Over {
    let mut cutter = Cutter::default();
    let mut negotiated = false;
    let mut buffer = [0; 4096];
    loop {
        let length = match stream.read(&mut buffer) {
            Ok(0) => return Over::Leaves,
            Ok(length) => length,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
            Err(_) => return Over::Leaves,
        };
        for byte in &buffer[..length] {
            let over = match cutter.push(*byte) {
                None => None,
                Some(Piece::Value(text)) => obey(&text, queue, shared, &mut negotiated),
                Some(Piece::TooMuch(why)) => {
                    let _ = queue.reply(wire::reply(Err(Refusal::generic(why)), None));
                    Some(Over::Leaves)
                }
            };
            if let Some(over) = over {
                return over;
            }
        }
    }
}

/// `None`: it may go on.
fn obey(text: &[u8], queue: &Queue, shared: &Shared, negotiated: &mut bool) -> Option<Over> {
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
        (false, _) => Some(Over::Leaves),
        (true, true) => Some(Over::Quits),
        (true, false) => None,
    }
}
