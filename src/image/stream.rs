//! A raw image as a stream: each byte once, in ascending order, to a pipe or whatever stdout is.

use super::{Image, Properties};
use crate::error::{Error, Kind, Result, Side};
use crate::ground::range::{ByteRange, Extent};
use rustix::event::{PollFd, PollFlags};
use rustix::fs::FileType;
use std::fs::File;
use std::io::{self, IsTerminal, Write};
use std::os::fd::AsFd;
use std::path::Path;
use std::sync::Mutex;

/// See the module.
#[derive(Debug)]
pub struct Stream {
    file: File,
    length: u64,
    /// Bytes written; held during a write, since the next one must not overtake it.
    position: Mutex<u64>,
}

/// Zero bytes sent at once.
static ZEROES: [u8; 64 << 10] = [0; 64 << 10];

/// A flush of `stream` reaches stable storage. What a pipe's reader does with the bytes is not ours to know.
pub fn can_flush(stream: impl AsFd) -> io::Result<bool> {
    let file_type = FileType::from_raw_mode(rustix::fs::fstat(stream)?.st_mode);
    Ok(matches!(file_type, FileType::RegularFile | FileType::BlockDevice))
}

impl Stream {
    /// The process's stdout as a target of `length` bytes. A terminal is refused.
    pub fn stdout(length: u64) -> Result<Self> {
        let stdout = io::stdout();
        if stdout.is_terminal() {
            return Err(Error::new(Kind::Usage, "target '-' is a terminal: redirect stdout to a file or a pipe"));
        }
        let fd = rustix::io::fcntl_dupfd_cloexec(stdout, 3);
        let fd = fd.map_err(|e| Error::file(Side::Target, "open", Path::new("-"), e.into()))?;
        Ok(Self::of(File::from(fd), length))
    }

    /// Writes from the current position of `file` on, `length` bytes.
    pub fn of(file: File, length: u64) -> Self {
        Self { file, length, position: Mutex::new(0) }
    }

    /// See [`can_flush`].
    pub fn can_flush(&self) -> io::Result<bool> {
        can_flush(&self.file)
    }

    fn send(&self, mut bytes: &[u8], position: &mut u64) -> io::Result<()> {
        while !bytes.is_empty() {
            match (&self.file).write(bytes) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(n) => {
                    *position += n as u64;
                    bytes = &bytes[n..];
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                // Whoever shares the pipe with us may have made it non-blocking.
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => self.wait_for_room()?,
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }

    fn wait_for_room(&self) -> io::Result<()> {
        match rustix::event::poll(&mut [PollFd::new(&self.file, PollFlags::OUT)], None) {
            Ok(_) | Err(rustix::io::Errno::INTR) => Ok(()),
            Err(errno) => Err(errno.into()),
        }
    }

    /// Sends what `write` sends, if `range` is next.
    fn next(&self, range: ByteRange, write: impl FnOnce(&mut u64) -> io::Result<()>) -> io::Result<()> {
        let mut position = self.position.lock().expect("nothing panics under this lock");
        if range.offset != *position {
            let text = format!("a stream is written in ascending order: {range} came when {:#x} was next", *position);
            return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
        }
        write(&mut position)
    }
}

impl Image for Stream {
    fn length(&self) -> u64 {
        self.length
    }

    fn block_status(&self, _range: ByteRange) -> io::Result<Extent> {
        Err(unreadable())
    }

    fn read_at(&self, _buf: &mut [u8], _offset: u64) -> io::Result<()> {
        Err(unreadable())
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        self.next(ByteRange::new(offset, buf.len() as u64), |position| self.send(buf, position))
    }

    fn write_zeroes(&self, range: ByteRange) -> io::Result<()> {
        self.next(range, |position| {
            while *position < range.end() {
                let piece = (range.end() - *position).min(ZEROES.len() as u64);
                self.send(&ZEROES[..piece as usize], position)?;
            }
            Ok(())
        })
    }

    /// Nothing can be taken back from a stream, and nothing needs to be.
    fn discard(&self, _range: ByteRange) -> io::Result<()> {
        Ok(())
    }

    fn flush(&self) -> io::Result<()> {
        if self.can_flush()? { self.file.sync_all() } else { Ok(()) }
    }

    fn properties(&self) -> Properties {
        Properties { cluster_size: 1, alignment: 1, reads_zero: false, sequential: true }
    }
}

fn unreadable() -> io::Error {
    io::Error::new(io::ErrorKind::Unsupported, "a stream can't be read back")
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;
    use std::os::fd::OwnedFd;

    fn pipe() -> (File, File) {
        let (reader, writer) = io::pipe().unwrap();
        (File::from(OwnedFd::from(reader)), File::from(OwnedFd::from(writer)))
    }

    fn range(offset: u64, length: u64) -> ByteRange {
        ByteRange::new(offset, length)
    }

    #[test]
    fn bytes_and_zeroes_come_out_in_order() {
        let (mut reader, writer) = pipe();
        let received = std::thread::spawn(move || {
            let mut all = Vec::new();
            reader.read_to_end(&mut all).unwrap();
            all
        });
        let stream = Stream::of(writer, 200_003);
        stream.write_at(b"abc", 0).unwrap();
        stream.write_zeroes(range(3, 199_997)).unwrap();
        stream.discard(range(0, 3)).unwrap();
        stream.write_at(b"xyz", 200_000).unwrap();
        stream.flush().unwrap();
        drop(stream);
        let all = received.join().unwrap();
        assert_eq!((all.len(), &all[..3], &all[200_000..]), (200_003, &b"abc"[..], &b"xyz"[..]));
        assert!(all[3..200_000].iter().all(|&b| b == 0));
    }

    #[test]
    fn a_write_out_of_order_is_an_error_and_sends_nothing() {
        let (mut reader, writer) = pipe();
        let stream = Stream::of(writer, 100);
        stream.write_at(b"abc", 0).unwrap();
        let error = stream.write_at(b"xyz", 4).unwrap_err().to_string();
        assert_eq!(error, "a stream is written in ascending order: 0x4+3 came when 0x3 was next");
        assert!(stream.write_at(b"xyz", 0).is_err() && stream.write_zeroes(range(2, 1)).is_err());
        drop(stream);
        let mut all = Vec::new();
        reader.read_to_end(&mut all).unwrap();
        assert_eq!(all, b"abc");
    }

    #[test]
    fn a_reader_that_went_away_is_an_error() {
        let (reader, writer) = pipe();
        drop(reader);
        let error = Stream::of(writer, 100).write_at(b"abc", 0).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::BrokenPipe);
    }

    #[test]
    fn a_pipe_that_does_not_block_is_waited_for() {
        let (mut reader, writer) = pipe();
        rustix::io::ioctl_fionbio(&writer, true).unwrap();
        let stream = Stream::of(writer, 1 << 20);
        let sender = std::thread::spawn(move || stream.write_at(&vec![7; 1 << 20], 0));
        let mut all = Vec::new();
        reader.read_to_end(&mut all).unwrap();
        sender.join().unwrap().unwrap();
        assert_eq!(all.len(), 1 << 20);
    }

    #[test]
    fn a_regular_file_takes_the_stream_from_where_it_is() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let mut handle = file.reopen().unwrap();
        handle.write_all(b"head").unwrap();
        let stream = Stream::of(handle, 3);
        stream.write_at(b"abc", 0).unwrap();
        stream.flush().unwrap();
        assert_eq!(std::fs::read(file.path()).unwrap(), b"headabc");
    }
}
