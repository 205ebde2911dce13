//! What stands between the writers and the source, and what watchers see of it.

use super::vigil::Vigil;
use crate::error::{Error, Result};
use crate::ground::range::ByteRange;
use crate::ground::status::WriterStats;
use crate::job::{Gauges, Job, Readings};
use crate::ring::server::{Trap, Writers};
use crate::sandbox::{self, Reach};
use crate::snapshot::overlay::Overlay;
use crate::snapshot::preserve::Preserver;
use std::sync::{Arc, Weak};

/// Captures for trapped writes. Neither delayed nor charged: the speed is the target's, and a capture stays here.
pub struct Guard {
    preserver: Preserver,
    /// Not its owner: the job knows the writers, who know this.
    job: Weak<Job>,
    reach: Reach,
    vigil: Option<Arc<Vigil>>,
}

impl Guard {
    /// Captures with `preserver`, in threads that get no further than `reach`, and tells `vigil` of writers that come.
    pub fn new(preserver: Preserver, job: &Arc<Job>, reach: Reach, vigil: Option<Arc<Vigil>>) -> Self {
        Self { preserver, job: Arc::downgrade(job), reach, vigil }
    }
}

impl Trap for Guard {
    fn before_write(&self, range: ByteRange) -> Result<()> {
        sandbox::enter(self.reach);
        self.preserver.before_write(range).map(drop)
    }

    fn writer_may_come(&self) {
        self.vigil.iter().for_each(|vigil| vigil.writer_may_come());
    }

    fn writer_came(&self) {
        self.vigil.iter().for_each(|vigil| vigil.writer_came());
    }

    fn writers_left(&self) {
        self.vigil.iter().for_each(|vigil| vigil.writers_left());
    }

    fn lost(&self, _why: &Error) {
        // What is copied from now on may be torn, so nothing more is: the copier ends, and whoever sleeps at its gate.
        self.preserver.tracker().stop();
        if let Some(job) = self.job.upgrade() {
            job.interrupt();
        }
    }
}

/// Reads the overlay and the writers for a watcher.
pub struct Gauge {
    overlay: Arc<Overlay>,
    writers: Arc<Writers>,
}

impl Gauge {
    /// Of one job.
    pub fn new(overlay: Arc<Overlay>, writers: Arc<Writers>) -> Self {
        Self { overlay, writers }
    }
}

impl Gauges for Gauge {
    fn read(&self) -> Readings {
        let counts = self.writers.counts();
        let milliseconds = |duration: std::time::Duration| duration.as_secs_f64() * 1e3;
        let writers = (counts.ever > 0).then(|| WriterStats {
            attached: counts.attached as u64,
            writes: counts.writes,
            trapped: counts.trapped,
            stall_ms: [counts.stalls.quantile(50), counts.stalls.quantile(99), counts.stalls.max()].map(milliseconds),
            stalled: counts.stalls.sum(),
        });
        (Some(self.overlay.usage()), writers)
    }
}
