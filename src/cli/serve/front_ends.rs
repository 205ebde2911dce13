//! Starts the front-ends that were asked for. One that this binary was built without is refused by name.

use super::plan::Plan;
use crate::error::{Error, Kind, Result};
use crate::serve::disk::Disk;
use crate::serve::{FrontEnd, Notify};
use std::sync::Arc;

/// Those that were started.
pub type FrontEnds = Vec<Box<dyn FrontEnd>>;

/// Refuses what this binary can't do, before anything is opened.
pub fn check(plan: &Plan) -> Result<()> {
    let wanted = [
        ("--nbd", !plan.nbd.is_empty(), cfg!(feature = "nbd")),
        ("--vhost-user", !plan.vhost_user.is_empty(), cfg!(feature = "vhost-user")),
        ("--fuse", !plan.fuse.is_empty(), cfg!(feature = "fuse")),
    ];
    match wanted.iter().find(|(_, is_wanted, is_built)| *is_wanted && !is_built) {
        Some((flag, ..)) => Err(Error::new(Kind::Usage, format!("{flag} is not built into this drive-backup"))),
        None => clear(plan),
    }
}

/// Undoes what killed servers left: an image that a dead mount covers can't be opened.
fn clear(plan: &Plan) -> Result<()> {
    #[cfg(feature = "fuse")]
    for (_, path) in &plan.fuse {
        crate::serve::fuse::clear_stale(path)?;
    }
    let _ = plan;
    Ok(())
}

/// All of them, or none: those that were started before one that fails are dropped.
pub fn start(plan: &Plan, disks: &[Arc<Disk>], notify: &Notify) -> Result<FrontEnds> {
    #[allow(unused_mut, reason = "a binary without front-ends")]
    let mut front_ends = FrontEnds::new();
    let _ = (plan, disks, notify);
    #[cfg(feature = "nbd")]
    if !plan.nbd.is_empty() {
        use crate::serve::nbd::{NbdOptions, start};
        let options = NbdOptions { tls_dir: plan.tls_dir.clone(), max_connections: plan.max_connections };
        front_ends.extend(start(disks, &plan.nbd, &options, notify)?);
    }
    #[cfg(feature = "vhost-user")]
    for (disk, path) in &plan.vhost_user {
        use crate::serve::vhost_user::{MOST_QUEUES, start};
        front_ends.push(start(disks[*disk].clone(), path, MOST_QUEUES, notify.clone())?);
    }
    #[cfg(feature = "fuse")]
    for (disk, path) in &plan.fuse {
        front_ends.push(crate::serve::fuse::start(disks[*disk].clone(), path, notify.clone())?);
    }
    Ok(front_ends)
}
