//! A queue as vhost-user-backend sees it, but its eventfds never block us: the frontend has them too, and may drain or fill them.

use super::request::Memory;
use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use std::fs::File;
use std::io;
use std::sync::MutexGuard;
use vhost_user_backend::{VringMutex, VringState, VringStateGuard, VringStateMutGuard, VringT};
use virtio_queue::Error;
use vm_memory::GuestMemoryAtomic;

/// The guest's memory as it is now; a new one replaces it when the frontend says so.
pub type SharedMemory = GuestMemoryAtomic<Memory>;

/// See the module.
#[derive(Clone)]
pub struct Vring(VringMutex<SharedMemory>);

fn never_blocking(file: Option<File>) -> Option<File> {
    // What is no eventfd at all fails when it is used.
    file.inspect(|file| {
        let _ = fcntl_getfl(file).and_then(|flags| fcntl_setfl(file, flags | OFlags::NONBLOCK));
    })
}

/// Drained by somebody else, or full: in either case what had to be said is said.
fn unless_blocked<T>(result: io::Result<T>, blocked: T) -> io::Result<T> {
    match result {
        Err(e) if e.kind() == io::ErrorKind::WouldBlock => Ok(blocked),
        other => other,
    }
}

impl<'a> VringStateGuard<'a, SharedMemory> for Vring {
    type G = MutexGuard<'a, VringState<SharedMemory>>;
}

impl<'a> VringStateMutGuard<'a, SharedMemory> for Vring {
    type G = MutexGuard<'a, VringState<SharedMemory>>;
}

impl VringT<SharedMemory> for Vring {
    fn new(memory: SharedMemory, max_queue_size: u16) -> Result<Self, Error> {
        VringMutex::new(memory, max_queue_size).map(Self)
    }

    fn get_ref(&self) -> <Self as VringStateGuard<'_, SharedMemory>>::G {
        self.0.get_ref()
    }

    fn get_mut(&self) -> <Self as VringStateMutGuard<'_, SharedMemory>>::G {
        self.0.get_mut()
    }

    fn add_used(&self, desc_index: u16, len: u32) -> Result<(), Error> {
        self.0.add_used(desc_index, len)
    }

    fn signal_used_queue(&self) -> io::Result<()> {
        unless_blocked(self.0.signal_used_queue(), ())
    }

    fn enable_notification(&self) -> Result<bool, Error> {
        self.0.enable_notification()
    }

    fn disable_notification(&self) -> Result<(), Error> {
        self.0.disable_notification()
    }

    fn needs_notification(&self) -> Result<bool, Error> {
        self.0.needs_notification()
    }

    fn set_enabled(&self, enabled: bool) {
        self.0.set_enabled(enabled);
    }

    fn set_queue_info(&self, desc_table: u64, avail_ring: u64, used_ring: u64) -> Result<(), Error> {
        self.0.set_queue_info(desc_table, avail_ring, used_ring)
    }

    fn queue_next_avail(&self) -> u16 {
        self.0.queue_next_avail()
    }

    fn set_queue_next_avail(&self, base: u16) {
        self.0.set_queue_next_avail(base);
    }

    fn set_queue_next_used(&self, idx: u16) {
        self.0.set_queue_next_used(idx);
    }

    fn queue_used_idx(&self) -> Result<u16, Error> {
        self.0.queue_used_idx()
    }

    fn set_queue_size(&self, num: u16) {
        self.0.set_queue_size(num);
    }

    fn set_queue_event_idx(&self, enabled: bool) {
        self.0.set_queue_event_idx(enabled);
    }

    fn set_queue_ready(&self, ready: bool) {
        self.0.set_queue_ready(ready);
    }

    fn set_kick(&self, file: Option<File>) {
        self.0.set_kick(never_blocking(file));
    }

    fn read_kick(&self) -> io::Result<bool> {
        let enabled = self.get_ref().is_enabled();
        unless_blocked(self.0.read_kick(), enabled)
    }

    fn set_call(&self, file: Option<File>) {
        self.0.set_call(never_blocking(file));
    }

    fn set_err(&self, file: Option<File>) {
        self.0.set_err(file);
    }
}
