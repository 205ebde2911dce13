//! A frontend of vhost-user with virtqueues of its own, for what a well-behaved guest does not do. QEMU's interop/vhost-user;
//! virtio 1.2, 2.7.
#![allow(dead_code)] // each program uses its part

use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use std::fs::File;
use std::io::{self, IoSlice, Read};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering::{Acquire, Release, SeqCst};
use std::time::{Duration, Instant};
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryMmap};

/// Bytes of memory, from guest address 0 on.
pub const MEMORY: u64 = 64 << 20;
/// Where the frontend says that it has the memory.
pub const OURS: u64 = 0x7000_0000_0000;
/// Entries of a queue.
pub const SIZE: u16 = 128;
/// Requests that may be in flight in a queue, of at most 1 MiB each.
pub const SLOTS: u16 = 16;
/// Where data begins; a MiB for each slot of each queue.
const DATA: u64 = 4 << 20;
const BOUND: Duration = Duration::from_secs(40);

pub const GET_FEATURES: u32 = 1;
pub const SET_FEATURES: u32 = 2;
pub const SET_OWNER: u32 = 3;
pub const SET_MEM_TABLE: u32 = 5;
pub const SET_VRING_NUM: u32 = 8;
pub const SET_VRING_ADDR: u32 = 9;
pub const SET_VRING_BASE: u32 = 10;
pub const GET_VRING_BASE: u32 = 11;
pub const SET_VRING_KICK: u32 = 12;
pub const SET_VRING_CALL: u32 = 13;
pub const GET_PROTOCOL_FEATURES: u32 = 15;
pub const SET_PROTOCOL_FEATURES: u32 = 16;
pub const SET_VRING_ENABLE: u32 = 18;
pub const GET_CONFIG: u32 = 24;
pub const RESET_DEVICE: u32 = 34;
pub const ADD_MEM_REG: u32 = 37;

/// Protocol features that are used where they are there: MQ, REPLY_ACK, CONFIG, RESET_DEVICE, CONFIGURE_MEM_SLOTS.
const PROTOCOL: u64 = 1 | 1 << 3 | 1 << 9 | 1 << 13 | 1 << 15;
/// Of a message: its protocol's version; it is to be acknowledged.
const VERSION: u32 = 1;
const NEED_REPLY: u32 = 1 << 3;
/// Features: indirect descriptors are not used, event indices are; version 1, the protocol features, flush.
const FEATURES: u64 = 1 << 9 | 1 << 29 | 1 << 30 | 1 << 32;

/// A descriptor as it lies in memory: address, length, flags (1 next, 2 write, 4 indirect), next.
pub type Raw = (u64, u32, u16, u16);

/// See the module.
pub struct Frontend {
    socket: UnixStream,
    pub memory: GuestMemoryMmap<()>,
    file: Arc<File>,
    queues: Vec<Queue>,
}

/// Its rings are at `base`: descriptors, 0x1000 behind them what is available, 0x2000 behind them what was used.
struct Queue {
    base: u64,
    kick: OwnedFd,
    call: OwnedFd,
    available: u16,
    used: u16,
}

impl Frontend {
    /// Connects, and agrees on features. No queue yet.
    pub fn connect(path: &Path) -> io::Result<Self> {
        let socket = UnixStream::connect(path)?;
        socket.set_read_timeout(Some(BOUND))?;
        let file = Arc::new(File::from(memfd_create(c"guest", MFdFlags::MFD_CLOEXEC)?));
        file.set_len(MEMORY)?;
        let place = (GuestAddress(0), MEMORY as usize, Some(FileOffset::from_arc(file.clone(), 0)));
        let memory = GuestMemoryMmap::from_ranges_with_files([place]).unwrap();
        let mut frontend = Self { socket, memory, file, queues: Vec::new() };
        frontend.agree()?;
        Ok(frontend)
    }

    fn agree(&mut self) -> io::Result<()> {
        self.send(SET_OWNER, &[], None)?;
        let offered = self.get(GET_FEATURES)?;
        let protocol = self.get(GET_PROTOCOL_FEATURES)?;
        self.send_u64(SET_PROTOCOL_FEATURES, protocol & PROTOCOL)?;
        self.send_u64(SET_FEATURES, offered & FEATURES)?;
        let table = words(&[1, 0, MEMORY, OURS, 0]);
        let file = self.file.clone();
        self.send(SET_MEM_TABLE, &table, Some(file.as_fd()))
    }

    /// One more queue, started and enabled.
    pub fn start_queue(&mut self) -> io::Result<()> {
        let flags = EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK;
        let number = self.queues.len() as u64;
        let (kick, call) = (eventfd(0, flags)?, eventfd(0, flags)?);
        let base = number * 0x4000;
        self.send_pair(SET_VRING_NUM, number, SIZE.into())?;
        self.send_pair(SET_VRING_BASE, number, 0)?;
        let at = OURS + base;
        self.send(SET_VRING_ADDR, &words(&[number, at, at + 0x2000, at + 0x1000, 0]), None)?;
        self.send(SET_VRING_CALL, &words(&[number]), Some(call.as_fd()))?;
        self.send(SET_VRING_KICK, &words(&[number]), Some(kick.as_fd()))?;
        self.send_pair(SET_VRING_ENABLE, number, 1)?;
        self.queues.push(Queue { base, kick, call, available: 0, used: 0 });
        Ok(())
    }

    /// A message as it is.
    pub fn send(&mut self, request: u32, payload: &[u8], fd: Option<BorrowedFd>) -> io::Result<()> {
        self.send_with(VERSION, request, payload, fd)
    }

    fn send_with(&mut self, flags: u32, request: u32, payload: &[u8], fd: Option<BorrowedFd>) -> io::Result<()> {
        let header = [request, flags, payload.len() as u32].map(u32::to_le_bytes).concat();
        let message = [&header, payload].concat();
        let fds: Vec<_> = fd.iter().map(|fd| fd.as_raw_fd()).collect();
        let rights: &[ControlMessage] = if fds.is_empty() { &[] } else { &[ControlMessage::ScmRights(&fds)] };
        let sent =
            sendmsg::<()>(self.socket.as_raw_fd(), &[IoSlice::new(&message)], rights, MsgFlags::MSG_NOSIGNAL, None)?;
        assert_eq!(sent, message.len());
        Ok(())
    }

    /// Adds a region of memory behind all that there is, and waits until the device has it; the region's file.
    pub fn add_memory(&mut self, length: u64) -> io::Result<File> {
        let file = File::from(memfd_create(c"more", MFdFlags::MFD_CLOEXEC)?);
        file.set_len(length)?;
        let region = words(&[0, MEMORY, length, OURS + MEMORY, 0]);
        self.send_with(VERSION | NEED_REPLY, ADD_MEM_REG, &region, Some(file.as_fd()))?;
        assert_eq!(self.receive()?, words(&[0]));
        Ok(file)
    }

    /// Asks for a reset, to be acknowledged with 0.
    pub fn reset(&mut self) -> io::Result<()> {
        self.send_with(VERSION | NEED_REPLY, RESET_DEVICE, &[], None)
    }

    pub fn send_u64(&mut self, request: u32, value: u64) -> io::Result<()> {
        self.send(request, &words(&[value]), None)
    }

    /// Two words of 32 bits.
    pub fn send_pair(&mut self, request: u32, first: u64, second: u64) -> io::Result<()> {
        self.send_u64(request, first | second << 32)
    }

    /// The answer to what was sent last.
    pub fn receive(&mut self) -> io::Result<Vec<u8>> {
        let mut header = [0; 12];
        self.socket.read_exact(&mut header)?;
        let mut payload = vec![0; u32::from_le_bytes(header[8..].try_into().unwrap()) as usize];
        self.socket.read_exact(&mut payload)?;
        Ok(payload)
    }

    /// Is there a part of an answer, in that time?
    pub fn is_answered_within(&self, time: Duration) -> bool {
        let time = Timespec { tv_sec: 0, tv_nsec: time.subsec_nanos().into() };
        poll(&mut [PollFd::new(&self.socket, PollFlags::IN)], Some(&time)).unwrap() > 0
    }

    pub fn get(&mut self, request: u32) -> io::Result<u64> {
        self.send(request, &[], None)?;
        Ok(u64::from_le_bytes(self.receive()?[..8].try_into().unwrap()))
    }

    /// The configuration space.
    pub fn config(&mut self, offset: u32, size: u32) -> io::Result<Vec<u8>> {
        let header = [offset, size, 0].map(u32::to_le_bytes).concat();
        self.send(GET_CONFIG, &[header, vec![0; size as usize]].concat(), None)?;
        Ok(self.receive()?[12..].to_vec())
    }

    fn put<T: vm_memory::ByteValued>(&self, at: u64, value: T) {
        self.memory.write_obj(value, GuestAddress(at)).unwrap();
    }

    /// Writes a descriptor.
    pub fn describe(&self, queue: usize, number: u16, (address, length, flags, next): Raw) {
        let at = self.queues[queue].base + u64::from(number) * 16;
        self.put(at, address);
        self.put(at + 8, length);
        self.put(at + 12, flags);
        self.put(at + 14, next);
    }

    /// Where the data of a slot is.
    pub fn data(queue: usize, slot: u16) -> u64 {
        DATA + (queue as u64 * u64::from(SLOTS) + u64::from(slot)) * (1 << 20)
    }

    fn header(queue: usize, slot: u16) -> u64 {
        0x10_0000 + queue as u64 * 0x1_0000 + u64::from(slot) * 64
    }

    /// Makes a request of a slot that is free available; `length` bytes of the slot's data are `input`, else the answer.
    pub fn submit(&mut self, queue: usize, slot: u16, kind: u32, sector: u64, length: u32, input: bool) {
        self.submit_at(queue, slot, kind, sector, (Self::data(queue, slot), length), input);
    }

    /// The same with data anywhere.
    pub fn submit_at(&mut self, queue: usize, slot: u16, kind: u32, sector: u64, data: (u64, u32), input: bool) {
        let (header, first) = (Self::header(queue, slot), slot * 3);
        self.put(header, kind);
        self.put(header + 8, sector);
        self.put(header + 32, 0xFF_u8);
        self.describe(queue, first, (header, 16, 1, first + 1));
        let flags = if input { 1 } else { 3 };
        self.describe(queue, first + 1, (data.0, data.1, flags, first + 2));
        self.describe(queue, first + 2, (header + 32, 1, 2, 0));
        self.offer(queue, first);
    }

    /// Makes the chain that begins with descriptor `head` available, and rings if the device wants to hear of it.
    pub fn offer(&mut self, queue: usize, head: u16) {
        let Queue { base, available, .. } = self.queues[queue];
        self.put(base + 0x1004 + u64::from(available % SIZE) * 2, head);
        self.set_available(queue, available.wrapping_add(1));
        std::sync::atomic::fence(SeqCst);
        let wanted: u16 = self.memory.load(GuestAddress(base + 0x2004 + u64::from(SIZE) * 8), Acquire).unwrap();
        if wanted == available {
            self.ring(queue);
        }
    }

    /// Says that the ring has so many entries, of all time.
    pub fn set_available(&mut self, queue: usize, available: u16) {
        let at = GuestAddress(self.queues[queue].base + 0x1002);
        self.memory.store(available, at, Release).unwrap();
        self.queues[queue].available = available;
    }

    pub fn ring(&self, queue: usize) {
        rustix::io::write(&self.queues[queue].kick, &1_u64.to_ne_bytes()).unwrap();
    }

    /// The heads of chains that were used since the last call.
    pub fn used(&mut self, queue: usize) -> Vec<u16> {
        let base = self.queues[queue].base;
        let index: u16 = self.memory.load(GuestAddress(base + 0x2002), Acquire).unwrap();
        let mut heads = Vec::new();
        while self.queues[queue].used != index {
            let at = base + 0x2004 + u64::from(self.queues[queue].used % SIZE) * 8;
            heads.push(self.memory.read_obj::<u32>(GuestAddress(at)).unwrap() as u16);
            self.queues[queue].used = self.queues[queue].used.wrapping_add(1);
        }
        heads
    }

    /// Waits until something was used, and gives its slots.
    #[track_caller]
    pub fn wait(&mut self, queue: usize) -> Vec<u16> {
        let since = Instant::now();
        loop {
            let used = self.used(queue);
            if !used.is_empty() {
                return used.into_iter().map(|head| head / 3).collect();
            }
            // Tell us of the next one; then it may be there already.
            let Queue { base, used: next, .. } = self.queues[queue];
            self.memory.store(next, GuestAddress(base + 0x1004 + u64::from(SIZE) * 2), SeqCst).unwrap();
            std::sync::atomic::fence(SeqCst);
            if self.memory.load::<u16>(GuestAddress(base + 0x2002), Acquire).unwrap() != next {
                continue;
            }
            let left = BOUND.saturating_sub(since.elapsed());
            let left = Timespec { tv_sec: left.as_secs() as i64, tv_nsec: 0 };
            let call = &self.queues[queue].call;
            let told = poll(&mut [PollFd::new(call, PollFlags::IN)], Some(&left)).unwrap();
            // Also where it is served, and we are not told.
            assert!(told > 0, "we do not hear that queue {queue} is served");
            let _ = rustix::io::read(call, &mut [0_u8; 8]);
        }
    }

    /// How a slot's request went: the byte that the device left.
    pub fn status(&self, queue: usize, slot: u16) -> u8 {
        self.memory.read_obj(GuestAddress(Self::header(queue, slot) + 32)).unwrap()
    }

    /// Reads or writes a slot's data at a sector, alone, and gives the status.
    #[track_caller]
    pub fn ask(&mut self, queue: usize, kind: u32, sector: u64, length: u32) -> u8 {
        self.submit(queue, 0, kind, sector, length, kind != 0 && kind != 8);
        assert_eq!(self.wait(queue), [0]);
        self.status(queue, 0)
    }
}

fn words(values: &[u64]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_le_bytes()).collect()
}
