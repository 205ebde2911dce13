//! What a trapped write sets going: the clusters that it touches are read from the source into the overlay.

use crate::error::{Error, Kind, Result, Side};
use crate::ground::range::ByteRange;
use crate::ground::zero::is_zero;
use crate::hold::{self, Place};
use crate::image::Image;
use crate::snapshot::overlay::Overlay;
use crate::snapshot::tracker::{Granted, Tracker};
use crate::snapshot::unallocated::Unallocated;
use std::sync::{Arc, Mutex, PoisonError};

/// Shared by all preserving threads.
pub struct Preserver {
    tracker: Arc<Tracker>,
    source: Arc<dyn Image>,
    overlay: Arc<Overlay>,
    unallocated: Option<Arc<Unallocated>>,
    /// One for each thread that ever captured at the same time: a capture should not wait for fresh pages.
    buffers: Mutex<Vec<Vec<u8>>>,
}

impl Preserver {
    /// `source` and `overlay` have the length of the disk that `tracker` tracks.
    pub fn new(tracker: Arc<Tracker>, source: Arc<dyn Image>, overlay: Arc<Overlay>) -> Self {
        Self { tracker, source, overlay, unallocated: None, buffers: Mutex::default() }
    }

    /// The same, for a copy of what is allocated: what of it was not is remembered there.
    pub fn noting(self, unallocated: Option<Arc<Unallocated>>) -> Self {
        Self { unallocated, ..self }
    }

    /// Whose clusters are preserved.
    pub fn tracker(&self) -> &Arc<Tracker> {
        &self.tracker
    }

    /// A write to `range` is waiting. Blocks until no one reads the source there: for the reads of the source that are
    /// under way there and for its own into the overlay, never for the target.
    ///
    /// An error says why the range can't be preserved, with the errno that the write should fail with if it is to fail;
    /// its kind is [`Kind::InstantLost`]. Everything is as it was: either the write does not happen, or the caller gives
    /// the instant up ([`Tracker::stop`]) before it answers the writer.
    pub fn before_write(&self, range: ByteRange) -> Result<Granted> {
        let mut captured = false;
        let granted = self.tracker.before_write(range, |run| {
            let mut buffer = self.take_buffer();
            buffer.resize(buffer.len().max(run.length as usize), 0);
            let saved = self.capture(run, &mut buffer[..run.length as usize]);
            self.give_buffer(buffer);
            captured = true;
            saved
        });
        let granted = granted.map_err(|error| error.with_kind(Kind::InstantLost))?;
        let usage = self.overlay.usage();
        if captured && usage.limit.is_some() {
            self.tracker.set_overlay_first(usage.past_half());
        }
        Ok(granted)
    }

    fn capture(&self, run: ByteRange, bytes: &mut [u8]) -> Result<()> {
        hold::at(Place::Capturing);
        self.note_allocation(run);
        self.source.read_at(bytes, run.offset).map_err(|error| Error::io(Side::Source, "read", run, error))?;
        if is_zero(bytes) { self.overlay.save_zeroes(run) } else { self.overlay.save(bytes, run.offset) }
    }

    fn note_allocation(&self, run: ByteRange) {
        let Some(unallocated) = &self.unallocated else { return };
        let mut rest = run;
        while !rest.is_empty() {
            // What can't be told is taken for allocated.
            let Ok(extent) = self.source.block_status(rest) else { return };
            unallocated.note(extent);
            rest = ByteRange::between(extent.range.end(), rest.end());
        }
    }

    fn take_buffer(&self) -> Vec<u8> {
        self.buffers.lock().unwrap_or_else(PoisonError::into_inner).pop().unwrap_or_default()
    }

    fn give_buffer(&self, buffer: Vec<u8>) {
        self.buffers.lock().unwrap_or_else(PoisonError::into_inner).push(buffer);
    }
}

#[cfg(test)]
mod tests;
