//! What a reply promises, as an exact log: of what reached the image, and of replies, in the order in which they came about.

use super::{LENGTH, disk, file_image, reply, request, served, session, with_payload};
use crate::ground::range::{ByteRange, Extent};
use crate::image::{Image, Properties};
use crate::nbd::protocol::{Request, SimpleReply, command, command_flag};
use crate::nbd::tls::ServerTls;
use crate::serve::nbd::connection::{End, serve};
use crate::serve::nbd::watch::Watch;
use crate::serve::nbd::wire::Wire;
use std::io::{self, Read};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

type Log = Arc<Mutex<Vec<String>>>;

/// An image that does nothing but tell, when a call is over.
struct Telltale {
    log: Log,
    /// Says to be plain, so that changes are taken for short ones.
    file: Option<std::fs::File>,
    fails: AtomicBool,
}

impl Telltale {
    fn new(is_plain: bool) -> Arc<Self> {
        let file = is_plain.then(|| tempfile::tempfile().unwrap());
        Arc::new(Self { log: Log::default(), file, fails: AtomicBool::new(false) })
    }

    fn tell(&self, what: &str, range: ByteRange) -> io::Result<()> {
        self.log.lock().unwrap().push(format!("{what} {range}"));
        Ok(())
    }

    fn take(&self) -> Vec<String> {
        std::mem::take(&mut self.log.lock().unwrap())
    }
}

impl Image for Telltale {
    fn length(&self) -> u64 {
        LENGTH
    }

    fn block_status(&self, range: ByteRange) -> io::Result<Extent> {
        Ok(Extent::data(range))
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        buf.fill(0);
        self.tell("read", ByteRange::new(offset, buf.len() as u64))
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        self.tell("write", ByteRange::new(offset, buf.len() as u64))
    }

    fn write_zeroes(&self, range: ByteRange) -> io::Result<()> {
        self.tell("zeroes", range)
    }

    fn discard(&self, range: ByteRange) -> io::Result<()> {
        self.tell("discard", range)
    }

    fn flush(&self) -> io::Result<()> {
        self.log.lock().unwrap().push("flush".to_owned());
        if self.fails.load(Ordering::Relaxed) { Err(io::Error::from_raw_os_error(nix::libc::EIO)) } else { Ok(()) }
    }

    fn properties(&self) -> Properties {
        Properties { cluster_size: 1, alignment: 1, reads_zero: false, sequential: false }
    }

    fn file(&self) -> Option<&std::fs::File> {
        self.file.as_ref()
    }
}

/// Sends one request, and tells of simple replies.
struct Letter {
    bytes: Mutex<io::Cursor<Vec<u8>>>,
    log: Log,
}

impl Wire for Letter {
    fn read(&self, buf: &mut [u8]) -> io::Result<usize> {
        self.bytes.lock().unwrap().read(buf)
    }

    fn write_all(&self, bytes: &[u8]) -> io::Result<()> {
        for bytes in bytes.chunks(SimpleReply::LENGTH) {
            let reply = SimpleReply::decode(bytes.try_into().unwrap()).unwrap();
            self.log.lock().unwrap().push(format!("reply {}", reply.error));
        }
        Ok(())
    }

    fn set_timeouts(&self, _: Option<Duration>, _: Option<Duration>) -> io::Result<()> {
        Ok(())
    }

    fn start_tls(self, _tls: &ServerTls, _timeout: Duration) -> io::Result<Self> {
        Err(io::ErrorKind::Unsupported.into())
    }

    fn shutdown(&self) {}
}

/// A whole connection with one request: what came about.
fn story(image: &Arc<Telltale>, request: Request) -> Vec<String> {
    let bytes = Mutex::new(io::Cursor::new(with_payload(request)));
    let letter = Letter { bytes, log: image.log.clone() };
    let watch = Watch::start().unwrap();
    let end = serve(letter, session(disk(image.clone(), false), false), Arc::default(), watch.bell());
    assert!(matches!(end, End::Bye), "{end:?}");
    image.take()
}

fn fua(command: u16) -> Request {
    Request { flags: command_flag::FUA, ..request(command, 1, 4096, 512) }
}

#[test]
fn a_reply_comes_after_what_it_says_is_done() {
    for is_plain in [false, true] {
        let image = Telltale::new(is_plain);
        for (command, word) in
            [(command::WRITE, "write"), (command::WRITE_ZEROES, "zeroes"), (command::TRIM, "discard")]
        {
            let done = format!("{word} 0x1000+512");
            assert_eq!(story(&image, request(command, 1, 4096, 512)), [&done, "reply 0"], "{is_plain}");
            assert_eq!(story(&image, fua(command)), [&done, "flush", "reply 0"], "{is_plain}");
        }
        assert_eq!(story(&image, request(command::FLUSH, 1, 0, 0)), ["flush", "reply 0"], "{is_plain}");
    }
}

#[test]
fn a_flush_that_fails_is_no_success_of_what_asked_for_it() {
    for is_plain in [false, true] {
        let image = Telltale::new(is_plain);
        image.fails.store(true, Ordering::Relaxed);
        assert_eq!(story(&image, request(command::FLUSH, 1, 0, 0)), ["flush", "reply 5"]);
        assert_eq!(story(&image, fua(command::WRITE)), ["write 0x1000+512", "flush", "reply 5"]);
        assert_eq!(story(&image, fua(command::WRITE_ZEROES)), ["zeroes 0x1000+512", "flush", "reply 5"]);
    }
}

#[test]
fn nothing_past_the_end_reaches_the_disk() {
    for is_plain in [false, true] {
        let image = Telltale::new(is_plain);
        for (offset, length) in [(LENGTH - 1, 2), (LENGTH, 1), (0, LENGTH as u32 + 1), (u64::MAX, 2)] {
            for (command, error) in [(command::WRITE_ZEROES, 28), (command::TRIM, 22), (command::WRITE, 28)] {
                let told = story(&image, request(command, 1, offset, length));
                assert_eq!(told, [format!("reply {error}")], "{command} of {length} at {offset}");
            }
        }
        let last = story(&image, request(command::WRITE_ZEROES, 1, LENGTH - 1, 1));
        assert_eq!(last, [&format!("zeroes {}", ByteRange::new(LENGTH - 1, 1)), "reply 0"]);
    }
}

/// `CAN_MULTI_CONN`: what one connection was told is done is there for all, and a flush by any of them covers it.
#[test]
fn connections_are_one_disk_and_a_flush_of_one_covers_the_others() {
    let image = Telltale::new(false);
    let one_disk = disk(image.clone(), false);
    let connect = || served(session(one_disk.clone(), false), &Arc::default());
    let ((writer, _, _watch), (other, _, _its_watch)) = (connect(), connect());
    writer.write_all(&with_payload(request(command::WRITE, 1, 4096, 512))).unwrap();
    assert_eq!(reply(&writer), SimpleReply { error: 0, cookie: 1 });
    other.write_all(&request(command::FLUSH, 2, 0, 0).encode()).unwrap();
    assert_eq!(reply(&other), SimpleReply { error: 0, cookie: 2 });
    assert_eq!(image.take(), ["write 0x1000+512", "flush"]);
}

#[test]
fn what_one_connection_wrote_another_reads() {
    let one_disk = disk(file_image(), false);
    let connect = || served(session(one_disk.clone(), false), &Arc::default());
    let ((writer, _, _watch), (other, _, _its_watch)) = (connect(), connect());
    for cookie in 1..4 {
        // Whatever a connection might keep of it is old by now.
        other.write_all(&request(command::READ, cookie, 4096, 512).encode()).unwrap();
        assert_eq!(reply(&other), SimpleReply { error: 0, cookie });
        let mut bytes = [1; 512];
        other.read_exact(&mut bytes).unwrap();
        assert_eq!(bytes, [if cookie == 1 { 0 } else { 0x5a }; 512]);
        writer.write_all(&with_payload(request(command::WRITE, cookie, 4096, 512))).unwrap();
        assert_eq!(reply(&writer), SimpleReply { error: 0, cookie });
    }
}
