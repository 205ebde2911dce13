//! Which faults are tried where.

use crate::inject::{Fault, Fault::*};
use crate::rule::{Place, Policy};
use crate::stage::{Setup, Setup::*};

/// Each of the faults with each of the policies, in each of the setups.
pub struct Line {
    pub place: Place,
    pub call: &'static str,
    pub faults: &'static [Fault],
    pub policies: &'static [Policy],
    pub setups: &'static [Setup],
}

const fn line(
    place: Place,
    call: &'static str,
    faults: &'static [Fault],
    policies: &'static [Policy],
    setups: &'static [Setup],
) -> Line {
    Line { place, call, faults, policies, setups }
}

const DEFAULT: &[Policy] = &[Policy::Default];
const ON_TARGET_ERROR: &[Policy] = &[Policy::TargetIgnore, Policy::TargetStop, Policy::TargetEnospc];
const ON_CBW_ERROR: &[Policy] = &[Policy::Default, Policy::GuestWrite];
const BROKEN: &[Fault] = &[Eio, Enospc];
const MOVED_HARMLESSLY: &[Fault] = &[Eintr, Late, Half, Least];
const OPENED: &[Fault] = &[Eio, Enospc, Emfile, Eintr, Late];
const LIVE: &[Setup] = &[LiveRaw, LiveQcow2];
const NEW: &[Setup] = &[Raw, Direct, Qcow2, Compressed, LiveRaw, LiveQcow2];
const ALONE: &[Setup] = &[Raw, Direct, Qcow2, Compressed];
const RAW: &[Setup] = &[Raw, Direct, LiveRaw];
const IN_PLACE: &[Setup] = &[InPlace, LiveInPlace];
const MEMORY: &[Setup] = &[LiveMemory];
const PROOFS: &[Setup] = &[Setup::Manifest];

pub const LINES: &[Line] = &[
    line(Place::Source, "open", OPENED, DEFAULT, NEW),
    line(Place::Source, "lock", &[Eagain, Eintr, Late], DEFAULT, ALONE),
    line(Place::Source, "lock-look", &[Eio, Eintr, Late], DEFAULT, ALONE),
    line(Place::Source, "duplicate", &[Emfile, Late], DEFAULT, ALONE),
    line(Place::Source, "look", &[Eio, Late], DEFAULT, ALONE),
    line(Place::Source, "seek", &[Eio, Eintr, Late], DEFAULT, NEW),
    line(Place::Source, "read", &[Eio, Enospc, Eintr, Late, Half, Least], DEFAULT, NEW),
    line(Place::Source, "read", &[Eio], &[Policy::SourceIgnore, Policy::SourceStop], &[Raw, Qcow2, InPlace]),
    line(Place::Capture, "read", &[Eio], ON_CBW_ERROR, LIVE),
    line(Place::Capture, "read", MOVED_HARMLESSLY, DEFAULT, LIVE),
    line(Place::Capture, "read", &[TooLate], ON_CBW_ERROR, LIVE),
    line(Place::Target, "open", OPENED, DEFAULT, NEW),
    line(Place::Target, "lock", &[Eintr, Late], DEFAULT, NEW),
    line(Place::Target, "resize", &[Eio, Enospc, Eintr, Late], DEFAULT, RAW),
    line(Place::Target, "clone", &[Eio, Enospc, Eintr, Late], DEFAULT, &[Raw]),
    line(Place::Target, "write", BROKEN, DEFAULT, NEW),
    line(Place::Target, "write", MOVED_HARMLESSLY, DEFAULT, NEW),
    line(Place::Target, "write", BROKEN, ON_TARGET_ERROR, &[Raw, Direct]),
    line(Place::Target, "write-back", &[Eio, Enospc, Eintr, Late], DEFAULT, &[Large]),
    line(Place::Target, "sync", &[Eio, Enospc, Eintr, Late], DEFAULT, NEW),
    line(Place::Target, "close", BROKEN, DEFAULT, NEW),
    line(Place::Target, "rename", &[Eio, Enospc, Late], DEFAULT, NEW),
    line(Place::Target, "rename", &[Eopnotsupp], DEFAULT, NEW),
    line(Place::Folder, "open", OPENED, DEFAULT, NEW),
    line(Place::Folder, "sync", &[Eio, Enospc, Eintr, Late], DEFAULT, NEW),
    line(Place::Target, "unlink", &[Eio, Enospc, Late], DEFAULT, NEW),
    line(Place::Target, "mode", &[Eio, Enospc, Late], DEFAULT, NEW),
    line(Place::Target, "lock-look", &[Eio, Eintr, Late], DEFAULT, NEW),
    line(Place::Target, "duplicate", &[Emfile, Late], DEFAULT, NEW),
    line(Place::Target, "look", &[Eio, Late], DEFAULT, NEW),
    line(Place::Old, "open", OPENED, DEFAULT, NEW),
    line(Place::Old, "lock", &[Eintr, Late], DEFAULT, NEW),
    line(Place::Old, "lock-look", &[Eio, Eintr, Late], DEFAULT, NEW),
    line(Place::Old, "look", &[Eio, Late], DEFAULT, NEW),
    line(Place::ReadBack, "open", OPENED, DEFAULT, &[Verify]),
    line(Place::ReadBack, "seek", &[Eio, Eintr, Late], DEFAULT, &[Verify]),
    line(Place::ReadBack, "read", &[Eio, Enospc], DEFAULT, &[Verify]),
    line(Place::ReadBack, "read", MOVED_HARMLESSLY, DEFAULT, &[Verify]),
    line(Place::ReadBack, "advice", &[Eio, Late], DEFAULT, &[Verify]),
    line(Place::Manifest, "open", OPENED, DEFAULT, PROOFS),
    line(Place::Manifest, "lock", &[Eintr, Late], DEFAULT, PROOFS),
    line(Place::Manifest, "duplicate", &[Emfile, Late], DEFAULT, PROOFS),
    line(Place::Manifest, "look", &[Eio, Late], DEFAULT, PROOFS),
    line(Place::Manifest, "write", BROKEN, DEFAULT, PROOFS),
    line(Place::Manifest, "write", MOVED_HARMLESSLY, DEFAULT, PROOFS),
    line(Place::Manifest, "sync", &[Eio, Enospc, Eintr, Late], DEFAULT, PROOFS),
    line(Place::Manifest, "close", BROKEN, DEFAULT, PROOFS),
    line(Place::Manifest, "rename", &[Eio, Enospc, Late], DEFAULT, PROOFS),
    line(Place::ManifestFolder, "open", OPENED, DEFAULT, PROOFS),
    line(Place::ManifestFolder, "sync", &[Eio, Enospc, Eintr, Late], DEFAULT, PROOFS),
    line(Place::Existing, "duplicate", &[Emfile, Late], DEFAULT, IN_PLACE),
    line(Place::Existing, "lock-look", &[Eio, Eintr, Late], DEFAULT, IN_PLACE),
    line(Place::Existing, "look", &[Eio, Late], DEFAULT, IN_PLACE),
    line(Place::Existing, "open", OPENED, DEFAULT, IN_PLACE),
    line(Place::Existing, "lock", &[Eagain, Eintr, Late], DEFAULT, IN_PLACE),
    line(Place::Existing, "write", BROKEN, DEFAULT, IN_PLACE),
    line(Place::Existing, "write", MOVED_HARMLESSLY, DEFAULT, IN_PLACE),
    line(Place::Existing, "write", BROKEN, ON_TARGET_ERROR, &[InPlace]),
    line(Place::Existing, "fallocate", &[Eio, Enospc, Eopnotsupp, Eintr, Late], DEFAULT, &[InPlace]),
    line(Place::Existing, "flush", &[Eio, Enospc, Eintr, Late], DEFAULT, IN_PLACE),
    line(Place::Existing, "sync", &[Eio, Enospc, Eintr, Late], DEFAULT, IN_PLACE),
    line(Place::Existing, "advice", &[Eio, Late], DEFAULT, IN_PLACE),
    line(Place::Overlay, "open", OPENED, DEFAULT, LIVE),
    line(Place::Overlay, "open", &[Eopnotsupp], DEFAULT, LIVE),
    line(Place::Overlay, "resize", &[Eio, Enospc, Eintr, Late], DEFAULT, LIVE),
    line(Place::Overlay, "write", BROKEN, ON_CBW_ERROR, LIVE),
    line(Place::Overlay, "write", MOVED_HARMLESSLY, DEFAULT, LIVE),
    line(Place::Overlay, "write", &[TooLate], ON_CBW_ERROR, LIVE),
    line(Place::Overlay, "read", BROKEN, ON_CBW_ERROR, LIVE),
    line(Place::Overlay, "read", MOVED_HARMLESSLY, DEFAULT, LIVE),
    line(Place::Overlay, "fallocate", &[Eio, Enospc, Eopnotsupp, Eintr, Late], DEFAULT, LIVE),
    line(Place::Overlay, "flush", &[Eio, Enospc, Eintr, Late], DEFAULT, LIVE),
    line(Place::Memory, "create", &[Emfile, Enomem], DEFAULT, MEMORY),
    line(Place::Memory, "create", &[Late], DEFAULT, MEMORY),
    line(Place::Memory, "resize", &[Enomem, Eintr, Late], DEFAULT, MEMORY),
    line(Place::Memory, "write", BROKEN, ON_CBW_ERROR, MEMORY),
    line(Place::Memory, "write", MOVED_HARMLESSLY, DEFAULT, MEMORY),
    line(Place::Memory, "read", BROKEN, ON_CBW_ERROR, MEMORY),
    line(Place::Memory, "read", MOVED_HARMLESSLY, DEFAULT, MEMORY),
    line(Place::Memory, "fallocate", &[Eio, Eintr, Late], DEFAULT, MEMORY),
    line(Place::Memory, "flush", &[Eio, Eintr, Late], DEFAULT, MEMORY),
    line(Place::Bitmap, "create", &[Emfile, Enomem, Late], DEFAULT, LIVE),
    line(Place::Bitmap, "resize", &[Enomem, Eintr, Late], DEFAULT, LIVE),
    line(Place::Bitmap, "seal", &[Enomem, Late], DEFAULT, LIVE),
    line(Place::Ring, "seal", &[Enomem, Late], DEFAULT, LIVE),
    line(Place::Ring, "create", &[Emfile, Enomem, Late], DEFAULT, LIVE),
    line(Place::Ring, "resize", &[Enomem, Eintr, Late], DEFAULT, LIVE),
    line(Place::Ring, "fallocate", &[Enomem, Enospc, Eintr, Late], DEFAULT, LIVE),
];

/// Kinds of calls that are seen and not tried.
pub struct Exemption {
    pub call: &'static str,
    pub places: &'static [Place],
    pub why: &'static str,
}

pub const EXEMPTIONS: &[Exemption] = &[
    Exemption {
        call: "close",
        places: &[
            Place::Source,
            Place::Folder,
            Place::Old,
            Place::ManifestFolder,
            Place::Existing,
            Place::Overlay,
            Place::Memory,
            Place::Ring,
            Place::Bitmap,
        ],
        why: "it tells of nothing: what was read is there, what was written is flushed or thrown away",
    },
    Exemption {
        call: "attribute",
        places: &[Place::Old, Place::Target],
        why: "what is not kept is a warning, of which src/publish/tests.rs has a test",
    },
];

/// All that `inject.c` traps.
pub const KINDS: &[&str] = &[
    "read",
    "write",
    "resize",
    "fallocate",
    "flush",
    "sync",
    "write-back",
    "seek",
    "lock",
    "lock-look",
    "duplicate",
    "seal",
    "clone",
    "advice",
    "mode",
    "attribute",
    "look",
    "close",
    "open",
    "rename",
    "unlink",
    "create",
];
