//! The client against servers that play by a script: each lie must end in an error of one line, soon, without a panic.

use super::*;
use crate::ground::range::Allocation;
use crate::nbd::protocol::{
    Chunk, GREETING_MAGIC, OPTION_MAGIC, OptionHeader, OptionReply, Request, SimpleReply, chunk, info, option,
    option_reply,
};
use proptest::prelude::*;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::atomic::AtomicUsize;
use std::sync::mpsc;
use std::time::Instant;

const LENGTH: u64 = 8 << 20;
const FLAGS: u16 = transmission::HAS_FLAGS | transmission::SEND_FLUSH | transmission::SEND_WRITE_ZEROES;

/// A server's end of one connection, after the handshake.
struct Peer {
    socket: UnixStream,
}

impl Peer {
    fn send(&mut self, bytes: &[u8]) -> bool {
        self.socket.write_all(bytes).is_ok()
    }

    fn option(&mut self) -> Option<(u32, Vec<u8>)> {
        let mut head = [0; OptionHeader::LENGTH];
        self.socket.read_exact(&mut head).ok()?;
        let head = OptionHeader::decode(&head).expect("we ask well");
        let mut data = vec![0; head.length as usize];
        self.socket.read_exact(&mut data).ok()?;
        Some((head.option, data))
    }

    fn reply(&mut self, option: u32, kind: u32, data: &[u8]) {
        self.send(&OptionReply { option, kind, length: data.len() as u32 }.encode());
        self.send(data);
    }

    /// A good handshake with structured replies and `base:allocation` as number 7.
    fn shake_hands(&mut self, flags: u16) -> Option<()> {
        let mut greeting = GREETING_MAGIC.to_be_bytes().to_vec();
        greeting.extend(OPTION_MAGIC.to_be_bytes());
        greeting.extend(3u16.to_be_bytes());
        self.send(&greeting);
        self.socket.read_exact(&mut [0; 4]).ok()?;
        loop {
            let (option, _) = self.option()?;
            match option {
                option::STRUCTURED_REPLY => self.reply(option, option_reply::ACK, &[]),
                option::SET_META_CONTEXT => {
                    self.reply(option, option_reply::META_CONTEXT, b"\0\0\0\x07base:allocation");
                    self.reply(option, option_reply::ACK, &[]);
                }
                _ => {
                    let mut data = info::EXPORT.to_be_bytes().to_vec();
                    data.extend(LENGTH.to_be_bytes());
                    data.extend(flags.to_be_bytes());
                    self.reply(option, option_reply::INFO, &data);
                    self.reply(option, option_reply::ACK, &[]);
                    return Some(());
                }
            }
        }
    }

    /// The next request, with the data of a write.
    fn request(&mut self) -> Option<(Request, Vec<u8>)> {
        let mut head = [0; Request::LENGTH];
        self.socket.read_exact(&mut head).ok()?;
        let request = Request::decode(&head).expect("we ask well");
        let mut data = vec![0; if request.command == command::WRITE { request.length as usize } else { 0 }];
        self.socket.read_exact(&mut data).ok()?;
        (request.command != command::DISC).then_some((request, data))
    }

    fn simple(&mut self, cookie: u64, error: u32) {
        self.send(&SimpleReply { error, cookie }.encode());
    }

    fn chunk(&mut self, cookie: u64, kind: u16, flags: u16, payload: &[u8]) -> bool {
        self.send(&Chunk { flags, kind, cookie, length: payload.len() as u32 }.encode()) && self.send(payload)
    }

    fn data(&mut self, request: &Request, byte: u8) {
        let mut payload = request.offset.to_be_bytes().to_vec();
        payload.resize(8 + request.length as usize, byte);
        self.chunk(request.cookie, chunk::OFFSET_DATA, chunk::DONE, &payload);
    }
}

/// For whom only silence is silent, however busy the machine is.
const PATIENT: Terms = Terms { connect: BOUND, patience: BOUND, reconnect: BOUND };
/// What is silent is left after so long.
const SHORT: Duration = Duration::from_millis(200);

/// A client that takes no second connection.
fn client(side: Side, script: impl Fn(usize, Peer) + Send + Sync + 'static) -> io::Result<Nbd> {
    client_with(Terms { reconnect: Duration::ZERO, ..PATIENT }, side, script)
}

/// A client whose connection number N is answered by `script(N, peer)` on a thread of its own.
fn client_with(terms: Terms, side: Side, script: impl Fn(usize, Peer) + Send + Sync + 'static) -> io::Result<Nbd> {
    let script = Arc::new(script);
    let number = AtomicUsize::new(0);
    let dial: Dial = Box::new(move |_| {
        let (ours, theirs) = UnixStream::pair()?;
        let (script, number) = (Arc::clone(&script), number.fetch_add(1, Relaxed));
        std::thread::spawn(move || script(number, Peer { socket: theirs }));
        Ok(Stream::unix(ours))
    });
    Nbd::over(dial, "disk", terms, Use { side, flushes: true, reconnect: terms.reconnect })
}

/// What ends the read of a client from a server that answers each request so.
fn read_from(patience: Duration, answer: impl Fn(&mut Peer, Request) + Send + Sync + 'static) -> String {
    let terms = Terms { patience, reconnect: Duration::ZERO, ..PATIENT };
    let nbd = client_with(terms, Side::Source, move |_, mut peer| {
        peer.shake_hands(FLAGS);
        while let Some((request, _)) = peer.request() {
            answer(&mut peer, request);
        }
    });
    let mut buf = vec![1; 256 << 10];
    nbd.unwrap().read_at(&mut buf, 0).expect_err("a lie").to_string()
}

#[test]
fn lies_about_a_read_are_found() {
    type Answer = fn(&mut Peer, Request);
    let lies: [(&str, Answer); 12] =
        [
            ("NBD simple reply begins with 0x0", |peer, _| {
                peer.send(&[0; 64]);
            }),
            ("a reply to a request that was not made", |peer, r| peer.simple(r.cookie + (1 << 16), 0)),
            ("a reply to a request that was not made", |peer, r| peer.simple(r.cookie + 1, 0)),
            ("data in a simple reply", |peer, r| peer.simple(r.cookie, 0)),
            ("less than 0x0+262144, which was asked for", |peer, r| {
                peer.data(&Request { length: 512, ..r }, 1);
            }),
            ("0x0+524288 where 0x0+262144 was asked for", |peer, r| {
                peer.data(&Request { length: r.length * 2, ..r }, 1);
            }),
            ("0x1000+262144 where 0x0+262144 was asked for", |peer, r| {
                peer.data(&Request { offset: 4096, ..r }, 1);
            }),
            ("which it has sent or which is empty", |peer, r| {
                let hole = [&0u64.to_be_bytes()[..], &r.length.to_be_bytes()].concat();
                peer.chunk(r.cookie, chunk::OFFSET_HOLE, 0, &hole);
                peer.chunk(r.cookie, chunk::OFFSET_HOLE, 0, &hole);
            }),
            ("a range past the end of all numbers", |peer, r| {
                peer.data(&Request { offset: u64::MAX, length: 512, ..r }, 1);
            }),
            ("a chunk of kind 77 with 4294967295 bytes", |peer, r| {
                peer.send(&Chunk { flags: 0, kind: 77, cookie: r.cookie, length: u32::MAX }.encode());
            }),
            ("an error's chunk of 4294967295 bytes", |peer, r| {
                peer.send(&Chunk { flags: 0, kind: chunk::ERROR, cookie: r.cookie, length: u32::MAX }.encode());
            }),
            ("more errors than one request can have", |peer, r| {
                while peer.chunk(r.cookie, chunk::ERROR, 0, b"\0\0\0\x05\0\0") {}
            }),
        ];
    for (reason, lie) in lies {
        let began = Instant::now();
        let found = read_from(BOUND, lie);
        assert!(found.contains(reason), "{reason}: {found}");
        assert!(!found.contains('\n') && began.elapsed() < BOUND, "{found}");
    }
}

#[test]
fn a_server_that_is_silent_or_trickles_is_left() {
    assert!(read_from(SHORT, |_, _| ()).contains("the server has not answered for"));
    let trickle = || {
        read_from(SHORT, |peer, r| {
            peer.send(&Chunk { flags: 0, kind: chunk::OFFSET_DATA, cookie: r.cookie, length: r.length + 8 }.encode());
            peer.send(&0u64.to_be_bytes());
            while peer.send(&[1]) {
                std::thread::sleep(Duration::from_millis(10));
            }
        })
    };
    // On a busy machine it may be silent for too long now and then.
    let found: Vec<String> =
        (0..5).map(|_| trickle()).take_while(|found| !found.contains("answers too slowly")).collect();
    assert!(found.len() < 5, "{found:?}");
}

#[test]
fn lies_about_extents_are_found() {
    type Answer = fn(&mut Peer, Request);
    let lies: [(&str, Answer); 5] = [
        ("extents of another metadata context", |peer, r| {
            peer.chunk(r.cookie, chunk::BLOCK_STATUS, chunk::DONE, b"\0\0\0\x08\0\0\x10\0\0\0\0\0");
        }),
        ("an extent of 0 bytes", |peer, r| {
            peer.chunk(r.cookie, chunk::BLOCK_STATUS, chunk::DONE, b"\0\0\0\x07\0\0\0\0\0\0\0\0");
        }),
        ("extents in a chunk of 13 bytes", |peer, r| {
            peer.chunk(r.cookie, chunk::BLOCK_STATUS, chunk::DONE, &[0; 13]);
        }),
        ("extents in a chunk of 4294967292 bytes", |peer, r| {
            peer.send(&Chunk { flags: 1, kind: chunk::BLOCK_STATUS, cookie: r.cookie, length: u32::MAX - 3 }.encode());
        }),
        ("no extents", |peer, r| {
            peer.chunk(r.cookie, chunk::NONE, chunk::DONE, &[]);
        }),
    ];
    for (reason, lie) in lies {
        let nbd = client(Side::Source, move |_, mut peer| {
            peer.shake_hands(FLAGS);
            while let Some((request, _)) = peer.request() {
                lie(&mut peer, request);
            }
        });
        let found = nbd.as_ref().unwrap().status(ByteRange::new(0, 4096)).expect_err("a lie").to_string();
        assert!(found.contains(reason), "{reason}: {found}");
        // The copy need not know: everything is data then.
        let everything = ByteRange::new(0, LENGTH);
        assert_eq!(nbd.unwrap().block_status(everything).unwrap(), Extent::data(everything));
    }
}

#[test]
fn lies_in_the_handshake_are_found() {
    type Script = fn(&mut Peer);
    let endless = |peer: &mut Peer| {
        peer.send(b"NBDMAGICIHAVEOPT\0\x03");
        let _ = peer.socket.read_exact(&mut [0; 4]);
        peer.option();
        peer.reply(option::STRUCTURED_REPLY, option_reply::ERR_UNSUP, &[]);
        peer.option();
        let reply = OptionReply { option: option::GO, kind: option_reply::INFO, length: 3 }.encode();
        while peer.send(&reply) && peer.send(b"\0\x02x") {}
    };
    const SILENT: &str = "the server does not answer";
    let scripts: [(&str, Script); 6] = [
        ("this is no newstyle NBD server", |peer| {
            peer.send(b"SSH-2.0-OpenSSH_9.9 and so on");
        }),
        ("this is no newstyle NBD server", |peer| {
            peer.send(b"NBDMAGIC\0\0\x42\x02\x81\x86\x12\x53\0\0");
        }),
        ("the server hung up", |peer| {
            peer.send(b"NBDMAGIC");
        }),
        (SILENT, |peer| {
            let _ = peer.socket.read_exact(&mut [0; 1]);
        }),
        ("the server's reply to option 8 has 4294967295 bytes", |peer| {
            peer.send(b"NBDMAGICIHAVEOPT\0\x03");
            let _ = peer.socket.read_exact(&mut [0; 4]);
            peer.option();
            peer.send(&OptionReply { option: 8, kind: 1, length: u32::MAX }.encode());
            peer.option();
        }),
        ("answers one option with more than 1024 replies", endless),
    ];
    for (reason, script) in scripts {
        let connect = if reason == SILENT { SHORT } else { BOUND };
        let found = client_with(Terms { connect, ..PATIENT }, Side::Source, move |_, mut peer| script(&mut peer));
        let found = found.err().expect("a lie").to_string();
        assert!(found.contains(reason), "{reason}: {found}");
    }
}

#[test]
fn errors_of_the_server_are_the_systems() {
    let found = client(Side::Source, |_, mut peer| {
        peer.shake_hands(FLAGS);
        while let Some((request, _)) = peer.request() {
            let error = b"\0\0\0\x1c\0\x03why";
            peer.chunk(request.cookie, chunk::ERROR, chunk::DONE, error);
        }
    });
    let error = found.unwrap().read_at(&mut [0; 512], 512).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::ENOSPC));
}

#[test]
fn replies_in_any_order_reach_who_asked() {
    let nbd = client(Side::Source, |_, mut peer| {
        peer.shake_hands(FLAGS);
        let mut held: Vec<Request> = Vec::new();
        while let Some((request, _)) = peer.request() {
            held.push(request);
            // Of four threads with two pieces each: the last one is answered first.
            if held.len() == 8 {
                for request in held.drain(..).rev() {
                    peer.data(&request, (request.offset >> 18) as u8 + 1);
                }
            }
        }
    })
    .unwrap();
    std::thread::scope(|scope| {
        for thread in 0..4u64 {
            let nbd = &nbd;
            scope.spawn(move || {
                for _ in 0..50 {
                    let mut buf = vec![0; 512 << 10];
                    nbd.read_at(&mut buf, thread * (512 << 10)).unwrap();
                    for (piece, bytes) in buf.chunks(256 << 10).enumerate() {
                        let expected = (thread * 2) as u8 + piece as u8 + 1;
                        assert!(bytes.iter().all(|byte| *byte == expected));
                    }
                }
            });
        }
    });
}

/// A disk in memory behind each connection; what a connection wrote and did not flush is lost with it.
fn forgetful(disk: Arc<Mutex<Vec<u8>>>, dies_after: usize) -> impl Fn(usize, Peer) + Send + Sync {
    move |number, mut peer| {
        peer.shake_hands(FLAGS);
        let mut volatile = disk.lock().unwrap().clone();
        let mut served = 0;
        while let Some((request, data)) = peer.request() {
            let range = request.offset as usize..request.offset as usize + request.length as usize;
            if request.command != command::BLOCK_STATUS {
                if number == 0 && served == dies_after {
                    return;
                }
                served += 1;
            }
            match request.command {
                command::WRITE => volatile[range].copy_from_slice(&data),
                command::WRITE_ZEROES => volatile[range].fill(0),
                command::FLUSH => disk.lock().unwrap().clone_from(&volatile),
                command::BLOCK_STATUS => {
                    peer.chunk(request.cookie, chunk::BLOCK_STATUS, chunk::DONE, b"\0\0\0\x07\0\x80\0\0\0\0\0\0");
                    continue;
                }
                _ => panic!("not asked for here: {request:?}"),
            }
            peer.simple(request.cookie, 0);
        }
    }
}

#[test]
fn what_a_restarted_server_forgot_is_written_again() {
    for dies_after in [0, 1, 3, 4, 5] {
        let disk = Arc::new(Mutex::new(vec![0xff; LENGTH as usize]));
        let nbd = client_with(PATIENT, Side::Target, forgetful(Arc::clone(&disk), dies_after)).unwrap();
        for piece in 0..4u64 {
            nbd.write_at(&vec![piece as u8 + 1; 4096], piece * 4096).unwrap();
        }
        nbd.write_zeroes(ByteRange::new(1 << 20, 1 << 20)).unwrap();
        nbd.flush().unwrap();
        let disk = disk.lock().unwrap();
        for piece in 0..4usize {
            assert!(disk[piece * 4096..][..4096].iter().all(|byte| *byte == piece as u8 + 1), "{dies_after}");
        }
        assert!(disk[1 << 20..2 << 20].iter().all(|byte| *byte == 0), "{dies_after}");
    }
}

#[test]
fn a_target_that_is_not_flushed_does_not_survive_a_restart() {
    let disk = Arc::new(Mutex::new(vec![0; LENGTH as usize]));
    let mut nbd = client_with(PATIENT, Side::Target, forgetful(disk, 1)).unwrap();
    nbd.usage.flushes = false;
    nbd.write_at(&[1; 4096], 0).unwrap();
    let error = nbd.write_at(&[1; 4096], 4096).unwrap_err().to_string();
    assert!(error.contains("after writes that no flush covers"), "{error}");
}

/// Each connection takes what it gets; a flush is told of and answered once `let_go` says so.
fn slow_to_flush(begun: mpsc::Sender<()>, let_go: mpsc::Receiver<()>) -> impl Fn(usize, Peer) + Send + Sync {
    let ends = Mutex::new((begun, let_go));
    move |_, mut peer| {
        peer.shake_hands(FLAGS | transmission::CAN_MULTI_CONN);
        while let Some((request, _)) = peer.request() {
            match request.command {
                command::FLUSH => {
                    let ends = ends.lock().unwrap();
                    let _ = ends.0.send(());
                    let _ = ends.1.recv();
                }
                command::BLOCK_STATUS => {
                    peer.chunk(request.cookie, chunk::BLOCK_STATUS, chunk::DONE, b"\0\0\0\x07\0\x80\0\0\0\0\0\0");
                    continue;
                }
                _ => {}
            }
            peer.simple(request.cookie, 0);
        }
    }
}

#[test]
fn nobody_waits_for_a_slow_flush_while_there_is_room() {
    let ((begun, flushes), (let_go, held)) = (mpsc::channel(), mpsc::channel());
    let nbd = client_with(PATIENT, Side::Target, slow_to_flush(begun, held)).unwrap();
    let bytes = vec![1; 4 << 20];
    let fill = || (0..unflushed::WINDOW / bytes.len() as u64).for_each(|_| nbd.write_at(&bytes, 0).unwrap());
    std::thread::scope(|scope| {
        let filling = scope.spawn(fill);
        flushes.recv_timeout(BOUND).expect("a full window begins a flush");
        // On another connection, which the flush is not on; the window's second half ends before it is full.
        (1..unflushed::WINDOW / bytes.len() as u64).for_each(|_| nbd.write_at(&bytes, 4 << 20).unwrap());
        assert!(!filling.is_finished(), "who began the flush waits for it");
        // One more is too much to keep, and waits.
        let waiting = scope.spawn(|| nbd.write_at(&bytes, 0).unwrap());
        assert!(flushes.try_recv().is_err());
        let_go.send(()).unwrap();
        filling.join().unwrap();
        let_go.send(()).unwrap();
        waiting.join().unwrap();
    });
    drop(let_go);
    nbd.flush().unwrap();
}

const BOUND: Duration = Duration::from_secs(20);

/// A disk of a server that is restarted, which loses what was not flushed. Its connections of before don't learn of it.
struct Machine {
    state: Mutex<Life>,
    /// Whether a connection of an earlier life hangs up, or is silent and tells so.
    silent: Option<mpsc::Sender<()>>,
}

struct Life {
    number: usize,
    disk: Vec<u8>,
    memory: Vec<u8>,
    /// How many requests before each restart.
    restarts: Vec<usize>,
}

impl Machine {
    fn new(restarts: Vec<usize>, silent: Option<mpsc::Sender<()>>) -> Arc<Self> {
        let zeroes = || vec![0; LENGTH as usize];
        Arc::new(Self { state: Mutex::new(Life { number: 0, disk: zeroes(), memory: zeroes(), restarts }), silent })
    }

    fn client(self: &Arc<Self>, patience: Duration) -> Nbd {
        let machine = Arc::clone(self);
        client_with(Terms { patience, ..PATIENT }, Side::Target, move |_, peer| machine.serve(peer)).unwrap()
    }

    /// The first byte of the block at `offset`, as after a loss of power.
    fn durable(&self, offset: u64) -> u8 {
        self.state.lock().unwrap().disk[offset as usize]
    }

    fn serve(&self, mut peer: Peer) {
        let life = self.state.lock().unwrap().number;
        peer.shake_hands(FLAGS | transmission::CAN_MULTI_CONN);
        while let Some((request, data)) = peer.request() {
            if request.command == command::BLOCK_STATUS {
                peer.chunk(request.cookie, chunk::BLOCK_STATUS, chunk::DONE, b"\0\0\0\x07\0\x80\0\0\0\0\0\0");
            } else if self.state.lock().unwrap().does(life, &request, &data) {
                peer.simple(request.cookie, 0);
            } else if let Some(told) = &self.silent {
                let _ = told.send(());
            } else {
                return;
            }
        }
    }
}

impl Life {
    fn restart(&mut self) {
        self.number += 1;
        self.memory.clone_from(&self.disk);
    }

    /// False: it came on a connection of an earlier life.
    fn does(&mut self, life: usize, request: &Request, data: &[u8]) -> bool {
        if let Some(left) = self.restarts.last_mut() {
            *left -= 1;
            if *left == 0 {
                self.restarts.pop();
                self.restart();
            }
        }
        if self.number != life {
            return false;
        }
        match request.command {
            command::WRITE => self.memory[request.offset as usize..][..data.len()].copy_from_slice(data),
            command::FLUSH => self.disk.clone_from(&self.memory),
            _ => panic!("not asked for here: {request:?}"),
        }
        true
    }
}

#[test]
fn a_restart_that_one_connection_has_not_noticed_loses_nothing() {
    let (told, swallowed) = mpsc::channel();
    let machine = Machine::new(Vec::new(), Some(told));
    let nbd = machine.client(Duration::from_secs(1));
    nbd.write_at(&[1; 4096], 0).unwrap();
    machine.state.lock().unwrap().restart();
    std::thread::scope(|scope| {
        let waiting = scope.spawn(|| nbd.write_at(&[2; 4096], 4096).unwrap());
        swallowed.recv_timeout(BOUND).expect("nobody answers on this connection any more");
        // On another one, since that one is busy.
        nbd.write_at(&[3; 4096], 8192).unwrap();
        nbd.flush().unwrap();
        assert_eq!([machine.durable(0), machine.durable(8192)], [1, 3]);
        waiting.join().unwrap();
    });
    nbd.flush().unwrap();
    assert_eq!(machine.durable(4096), 2);
}

#[test]
fn one_at_a_time_connects_after_a_loss() {
    let ((dialled, dials), (let_go, held)) = (mpsc::channel(), mpsc::channel::<()>());
    // How many of the first connections die at the next request.
    let dying = Arc::new(AtomicUsize::new(0));
    let (held, left) = (Mutex::new(held), Arc::clone(&dying));
    let script = move |number, mut peer: Peer| {
        let _ = dialled.send(number);
        if left.load(Relaxed) > 0 {
            let _ = held.lock().unwrap().recv();
        }
        peer.shake_hands(FLAGS | transmission::CAN_MULTI_CONN);
        while let Some((request, _)) = peer.request() {
            match request.command {
                command::BLOCK_STATUS => peer.simple(request.cookie, 22),
                _ if number < left.load(Relaxed) => return,
                _ => peer.simple(request.cookie, 0),
            }
        }
    };
    let nbd = client_with(PATIENT, Side::Target, script).unwrap();
    nbd.write_at(&[1; 4096], 0).unwrap();
    dying.store(dials.try_iter().count(), Relaxed);
    std::thread::scope(|scope| {
        let one = scope.spawn(|| nbd.write_at(&[2; 4096], 0).unwrap());
        dials.recv_timeout(BOUND).expect("who lost the connection makes another one");
        let other = scope.spawn(|| nbd.write_at(&[3; 4096], 4096).unwrap());
        let early = dials.recv_timeout(Duration::from_millis(300));
        drop(let_go);
        one.join().unwrap();
        other.join().unwrap();
        assert!(early.is_err(), "the other one waits until everything was written again");
    });
}

#[test]
fn a_server_that_comes_back_and_does_not_share_gets_one_connection() {
    let dials = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&dials);
    let script = move |number, mut peer: Peer| {
        counted.fetch_add(1, Relaxed);
        peer.shake_hands(if number < 4 { FLAGS | transmission::CAN_MULTI_CONN } else { FLAGS });
        while let Some((request, _)) = peer.request() {
            match request.command {
                command::BLOCK_STATUS => peer.simple(request.cookie, 22),
                _ if number < 4 => return,
                _ => peer.simple(request.cookie, 0),
            }
        }
    };
    let nbd = client_with(PATIENT, Side::Target, script).unwrap();
    nbd.write_at(&[1; 4096], 0).unwrap();
    nbd.flush().unwrap();
    assert_eq!(dials.load(Relaxed), 5);
}

/// Says that all is data once something was written, and zero before; its second answer is told of and waits for
/// `let_go`.
fn slow_to_say(begun: mpsc::Sender<()>, let_go: mpsc::Receiver<()>) -> impl Fn(usize, Peer) + Send + Sync {
    let (ends, is_written, answers) = (Mutex::new((begun, let_go)), AtomicBool::new(false), AtomicUsize::new(0));
    move |_, mut peer| {
        peer.shake_hands(FLAGS | transmission::CAN_MULTI_CONN | transmission::SEND_TRIM);
        while let Some((request, _)) = peer.request() {
            if request.command != command::BLOCK_STATUS {
                is_written.store(request.command == command::WRITE, Relaxed);
                peer.simple(request.cookie, 0);
                continue;
            }
            let answer: &[u8] = match is_written.load(Relaxed) {
                true => b"\0\0\0\x07\0\x80\0\0\0\0\0\0",
                false => b"\0\0\0\x07\0\x80\0\0\0\0\0\x03",
            };
            if answers.fetch_add(1, Relaxed) == 1 {
                let ends = ends.lock().unwrap();
                let _ = ends.0.send(());
                let _ = ends.1.recv();
            }
            peer.chunk(request.cookie, chunk::BLOCK_STATUS, chunk::DONE, answer);
        }
    }
}

#[test]
fn what_a_server_said_of_a_range_does_not_outlive_a_change() {
    let ((begun, asked), (let_go, held)) = (mpsc::channel(), mpsc::channel());
    let nbd = client_with(PATIENT, Side::Target, slow_to_say(begun, held)).unwrap();
    let all = ByteRange::new(0, LENGTH);
    std::thread::scope(|scope| {
        let asking = scope.spawn(|| nbd.block_status(all).unwrap());
        asked.recv_timeout(BOUND).expect("nothing is known before");
        nbd.write_at(&[1; 4096], 0).unwrap();
        let_go.send(()).unwrap();
        assert_eq!(asking.join().unwrap(), Extent::zero(all), "it was so when it was asked");
    });
    assert_eq!(nbd.block_status(all).unwrap(), Extent::data(all));
    nbd.discard(all).unwrap();
    assert_eq!(nbd.block_status(all).unwrap(), Extent::zero(all));
    nbd.write_at(&[1; 4096], 0).unwrap();
    assert_eq!(nbd.block_status(all).unwrap(), Extent::data(all));
    nbd.write_zeroes(all).unwrap();
    assert_eq!(nbd.block_status(all).unwrap(), Extent::zero(all));
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 16, max_shrink_iters: 20, ..ProptestConfig::default() })]
    #[test]
    fn restarts_at_any_moment_lose_nothing_that_was_flushed(restarts in proptest::collection::vec(1usize..6, 0..6)) {
        let machine = Machine::new(restarts, None);
        let nbd = machine.client(BOUND);
        std::thread::scope(|scope| {
            for thread in 0..3u64 {
                let (nbd, machine) = (&nbd, &machine);
                scope.spawn(move || {
                    for version in 1..=12 {
                        nbd.write_at(&[version; 4096], thread * 4096).unwrap();
                        if version % 4 == 0 {
                            nbd.flush().unwrap();
                            assert_eq!(machine.durable(thread * 4096), version);
                        }
                    }
                });
            }
        });
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]
    #[test]
    fn any_bytes_of_a_server_end_soon(is_shaken in any::<bool>(), bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
        let nbd = client(Side::Source, move |_, mut peer| {
            if is_shaken {
                peer.shake_hands(FLAGS);
                peer.request();
            }
            peer.send(&bytes);
        });
        if let Ok(nbd) = nbd {
            prop_assert!(nbd.read_at(&mut [0; 8192], 0).is_err());
        }
    }
}

/// As a server says that is restarted: the next one answers.
#[test]
fn a_server_that_is_going_down_is_waited_for() {
    for asked in [command::READ, command::WRITE, command::FLUSH, command::BLOCK_STATUS] {
        let script = move |number: usize, mut peer: Peer| {
            peer.shake_hands(FLAGS);
            while let Some((request, _)) = peer.request() {
                match request.command {
                    command if command == asked && number == 0 => peer.simple(request.cookie, 108),
                    command::READ => peer.data(&request, 7),
                    command::BLOCK_STATUS => {
                        peer.chunk(request.cookie, chunk::BLOCK_STATUS, chunk::DONE, b"\0\0\0\x07\0\x80\0\0\0\0\0\x03");
                    }
                    _ => peer.simple(request.cookie, 0),
                }
            }
        };
        let nbd = client_with(PATIENT, Side::Target, script).unwrap();
        let mut bytes = [0; 4096];
        nbd.read_at(&mut bytes, 0).unwrap();
        assert_eq!(bytes, [7; 4096]);
        nbd.write_at(&bytes, 0).unwrap();
        nbd.flush().unwrap();
        let status = nbd.block_status(ByteRange::new(0, LENGTH)).unwrap();
        assert_eq!(status.allocation, Allocation::Zero, "{asked}: it is asked on");
    }
}

/// It reads nothing while it sends. Who waits for its bytes is told to read them, and not who still sends.
#[test]
fn a_server_that_sends_first_is_read_by_somebody() {
    // Whom the reading is given to is a matter of luck.
    for _ in 0..12 {
        let (seen, sees) = mpsc::channel();
        let script = move |_: usize, mut peer: Peer| {
            peer.shake_hands(FLAGS);
            let mut heads = Vec::new();
            // The first read, the four pieces of the second one, the head of a write whose bytes wait.
            while heads.len() < 6 {
                let mut head = [0; Request::LENGTH];
                if peer.socket.read_exact(&mut head).is_err() {
                    return;
                }
                let request = Request::decode(&head).unwrap();
                if request.command == command::BLOCK_STATUS {
                    // The client's first question.
                    peer.chunk(request.cookie, chunk::BLOCK_STATUS, chunk::DONE, b"\0\0\0\x07\0\x80\0\0\0\0\0\0");
                    continue;
                }
                heads.push(request);
                let _ = seen.send(heads.len());
            }
            // Long enough for the write to fill what is between us.
            std::thread::sleep(Duration::from_millis(20));
            heads[..5].iter().for_each(|request| peer.data(request, 7));
            let mut left = heads[5].length as usize + 3 * ((256 << 10) + Request::LENGTH);
            while left > 0 {
                let mut bytes = vec![0; left.min(1 << 20)];
                left -= peer.socket.read(&mut bytes).unwrap();
            }
            (0..4).for_each(|piece| peer.simple(heads[5].cookie + piece, 0));
            while peer.request().is_some() {}
        };
        let nbd = &client(Side::Target, script).unwrap();
        std::thread::scope(|scope| {
            let read = |length: usize| nbd.read_at(&mut vec![0; length], 0).map_err(|e| e.to_string());
            let first = scope.spawn(move || read(4096));
            while sees.recv_timeout(BOUND).unwrap() < 1 {}
            let second = scope.spawn(move || read(1 << 20));
            while sees.recv_timeout(BOUND).unwrap() < 5 {}
            let third = scope.spawn(|| nbd.write_at(&vec![1; 1 << 20], 1 << 20).map_err(|e| e.to_string()));
            assert_eq!([first, second, third].map(|thread| thread.join().unwrap()), [Ok(()), Ok(()), Ok(())]);
        });
    }
}
