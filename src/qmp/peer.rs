//! The other end: a small client, with bounds, for `drive-backup ctl`.

use super::frame::{Cutter, Piece};
use super::server::private_sockets;
use rustix::net::sockopt::{self, Timeout};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use serde_json::{Value, json};
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// A server that answers answers within this.
const PATIENCE: Duration = Duration::from_secs(5);

/// A connection.
pub struct Peer {
    stream: UnixStream,
    cutter: Cutter,
    buffer: Vec<u8>,
    taken: usize,
}

/// Sockets of runs and servers whose writers' folder this is, dead ones among them.
pub fn sockets(writer_dir: &Path) -> Vec<PathBuf> {
    private_sockets(writer_dir)
}

/// Whoever does not accept has a queue, which may be full for good.
fn connect(path: &Path) -> io::Result<UnixStream> {
    let address = SocketAddrUnix::new(path)?;
    let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
    sockopt::set_socket_timeout(&socket, Timeout::Send, Some(PATIENCE))?;
    rustix::net::connect(&socket, &address)?;
    Ok(socket.into())
}

impl Peer {
    /// Connects and negotiates. Blocks for some seconds at most, as does every call.
    pub fn connect(path: &Path) -> io::Result<Self> {
        let stream = connect(path)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.set_write_timeout(Some(PATIENCE))?;
        let mut peer = Self { stream, cutter: Cutter::default(), buffer: Vec::new(), taken: 0 };
        if peer.receive()?.get("QMP").is_none() {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "it does not speak QMP"));
        }
        peer.execute("qmp_capabilities", json!({}))?.map_err(io::Error::other)?;
        Ok(peer)
    }

    /// What a command returns, or the text of its error.
    pub fn execute(&mut self, command: &str, arguments: Value) -> io::Result<Result<Value, String>> {
        let request = json!({"execute": command, "arguments": arguments});
        self.stream.write_all(format!("{request}\n").as_bytes())?;
        loop {
            let mut message = self.receive()?;
            if let Some(error) = message.get("error") {
                return Ok(Err(error["desc"].as_str().unwrap_or("unknown error").to_owned()));
            }
            if let Some(answer) = message.get_mut("return") {
                return Ok(Ok(answer.take()));
            }
        }
    }

    fn receive(&mut self) -> io::Result<Value> {
        loop {
            while self.taken < self.buffer.len() {
                self.taken += 1;
                match self.cutter.push(self.buffer[self.taken - 1]) {
                    None => {}
                    Some(Piece::Value(text)) => return Ok(serde_json::from_slice(&text)?),
                    Some(Piece::TooMuch(why)) => return Err(io::Error::new(io::ErrorKind::InvalidData, why)),
                }
            }
            self.taken = 0;
            self.buffer.resize(4096, 0);
            let length = self.stream.read(&mut self.buffer).inspect_err(|_| self.buffer.clear())?;
            self.buffer.truncate(length);
            if length == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
        }
    }
}
