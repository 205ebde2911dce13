//! The device that one frontend sees, from its connection to its end.

use super::config::{self, QUEUE_SIZE, WRITEBACK};
use super::pool::Pool;
use super::queue::{Errand, Service};
use super::request::Memory;
use super::vring::{SharedMemory, Vring};
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, Mutex, PoisonError};
use vhost::vhost_user::message::{VhostUserProtocolFeatures, VhostUserVirtioFeatures};
use vhost_user_backend::VhostUserBackend;
use vm_memory::{GuestAddressSpace, GuestMemoryBackend, GuestMemoryRegion, GuestRegionMmap};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::event::{EventConsumer, EventFlag, EventNotifier, new_event_consumer_and_notifier};

/// See the module.
pub struct Device {
    service: Arc<Service>,
    pool: Pool<Errand>,
    memory: SharedMemory,
    queues: u16,
    /// Which the daemon does not close.
    exits: Mutex<Vec<RawFd>>,
}

impl Device {
    /// With the guest's memory, empty before the frontend tells of it.
    pub fn new(service: Arc<Service>, queues: u16, memory: SharedMemory) -> Self {
        let theirs = service.clone();
        let pool = Pool::new(move |errand| theirs.errand(errand));
        Self { service, pool, memory, queues, exits: Mutex::default() }
    }
}

fn is_in_its_file(region: &GuestRegionMmap) -> bool {
    region.file_offset().is_none_or(|place| {
        let length = place.file().metadata().map_or(0, |found| found.len());
        place.start().checked_add(region.len()).is_some_and(|end| end <= length)
    })
}

impl Drop for Device {
    /// All threads that used them have ended: each of them holds the device.
    fn drop(&mut self) {
        for exit in self.exits.get_mut().unwrap_or_else(PoisonError::into_inner).drain(..) {
            let _ = nix::unistd::close(exit);
        }
    }
}

impl VhostUserBackend for Device {
    type Bitmap = ();
    type Vring = Vring;

    fn num_queues(&self) -> usize {
        self.queues.into()
    }

    fn max_queue_size(&self) -> usize {
        QUEUE_SIZE.into()
    }

    fn features(&self) -> u64 {
        config::features(&self.service.disk, self.queues) | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits()
    }

    fn acked_features(&self, features: u64) {
        self.service.acknowledged.store(features, Relaxed);
    }

    fn protocol_features(&self) -> VhostUserProtocolFeatures {
        type F = VhostUserProtocolFeatures;
        F::CONFIG | F::MQ | F::REPLY_ACK | F::CONFIGURE_MEM_SLOTS | F::RESET_DEVICE
    }

    /// The rings are disabled. What is in flight ends first: the guest's memory may be another's then.
    fn reset_device(&self) {
        (0..self.queues).for_each(|queue| self.service.settle(queue.into()));
        self.service.acknowledged.store(0, Relaxed);
        self.service.writeback.store(true, Relaxed);
    }

    /// The queues know.
    fn set_event_idx(&self, _enabled: bool) {}

    fn get_config(&self, offset: u32, size: u32) -> Vec<u8> {
        config::space(&self.service.disk, self.queues, self.service.writeback.load(Relaxed), offset, size)
    }

    fn set_config(&self, offset: u32, bytes: &[u8]) -> io::Result<()> {
        match (offset as usize, bytes) {
            (WRITEBACK, [mode @ 0..=1]) => {
                self.service.writeback.store(*mode == 1, Relaxed);
                Ok(())
            }
            _ => Err(io::ErrorKind::InvalidInput.into()),
        }
    }

    /// The one that we hold is changed. Memory past the end of its file is refused: a touch of it would kill us.
    fn update_memory(&self, _memory: SharedMemory) -> io::Result<()> {
        if self.memory.memory().iter().all(is_in_its_file) {
            return Ok(());
        }
        // Nobody holds this lock for more than such a change.
        self.memory.lock().unwrap_or_else(PoisonError::into_inner).replace(Memory::new());
        Err(io::Error::new(io::ErrorKind::InvalidInput, "memory past the end of its file"))
    }

    /// A thread for each queue.
    fn queues_per_thread(&self) -> Vec<u64> {
        (0..self.queues).map(|queue| 1 << queue).collect()
    }

    fn exit_event(&self, _thread: usize) -> Option<(EventConsumer, EventNotifier)> {
        let (consumer, notifier) = new_event_consumer_and_notifier(EventFlag::CLOEXEC).ok()?;
        self.exits.lock().unwrap_or_else(PoisonError::into_inner).push(consumer.as_raw_fd());
        Some((consumer, notifier))
    }

    fn stop_vring(&self, queue: u32) -> io::Result<()> {
        self.service.settle(queue as usize);
        Ok(())
    }

    fn handle_event(&self, event: u16, _events: EventSet, vrings: &[Vring], thread: usize) -> io::Result<()> {
        if let Some(vring) = vrings.get(usize::from(event)) {
            self.service.drain(thread, vring, &self.memory, &self.pool);
        }
        Ok(())
    }
}
