//! What the ends of a copy need while it runs, and so what can be taken from those who make it.

use super::destination::Destination;
use super::instant::Ready;
use crate::image::format::Format;
use crate::image::location::Location;
use crate::monitor::TargetKind;
use crate::sandbox::Reach;

/// Of the threads that copy or capture.
pub fn of(ready: &Ready<'_>) -> Reach {
    let reads_file = is_path(&ready.options.device) && is_native(ready.origin.format());
    if reads_file { of_target(&ready.destination) } else { Reach::Servers }
}

/// Of the threads that read the target back.
pub fn of_target(destination: &Destination) -> Reach {
    let is_server = matches!(destination.kind(), TargetKind::Remote | TargetKind::Export);
    if is_server || !is_native(destination.format()) { Reach::Servers } else { Reach::Nothing }
}

/// Whether a program may still be started: the user's while writers are frozen, or a qemu-nbd, which has all our rights anyway.
pub fn runs_programs(ready: &Ready<'_>) -> bool {
    let of_qemu = !is_native(ready.origin.format()) || !is_native(ready.destination.format());
    of_qemu
        || is_qemu(&ready.options.device)
        || ready.destination.kind() == TargetKind::Remote
        || ready.options.hook_frozen.is_some()
}

fn is_native(format: Format) -> bool {
    !matches!(format, Format::Foreign(_))
}

fn is_path(location: &Location) -> bool {
    location.path().is_some()
}

#[cfg(feature = "nbd")]
fn is_qemu(location: &Location) -> bool {
    matches!(location, Location::Qemu(_))
}

#[cfg(not(feature = "nbd"))]
fn is_qemu(_: &Location) -> bool {
    false
}
