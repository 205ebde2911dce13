//! Which format an image has, by its first bytes.
//!
//! A guest writes what it likes into its own raw disk, the magic bytes of any format too. So only the image that a
//! person named without a format is probed, never one that another image names.

use super::format::{Foreign, Format};
use super::qcow2::header::MAGIC;

/// Bytes that are looked at.
pub const LENGTH: usize = 512;

/// What the first bytes say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Probe {
    /// Read it as this.
    pub format: Format,
    /// It looks like this format, which QEMU reads; its bytes as they are would be no disk.
    pub foreign: Option<Foreign>,
}

/// Offset and magic bytes of formats that hold a disk, and that are not read here. Not LUKS: a guest's disk may well be
/// encrypted by the guest, and is copied as it is.
const FOREIGN: [(usize, &[u8], Foreign); 11] = [
    (0, b"KDMV", Foreign::Vmdk),
    (0, b"COWD", Foreign::Vmdk),
    (0, b"# Disk DescriptorFile", Foreign::Vmdk),
    (0, b"conectix", Foreign::Vpc),
    (0, b"vhdxfile", Foreign::Vhdx),
    (0x40, b"\x7f\x10\xda\xbe", Foreign::Vdi),
    (0, b"QED\0", Foreign::Qed),
    (0, b"WithoutFreeSpace", Foreign::Parallels),
    (0, b"WithouFreSpacExt", Foreign::Parallels),
    (0, b"Bochs Virtual HD Image", Foreign::Bochs),
    (0, b"#!/bin/sh\n#V2.0 Format", Foreign::Cloop),
];
/// Where a qcow2 header says how it is encrypted, and the word for LUKS.
const QCOW2_CRYPT_METHOD: (usize, &[u8]) = (32, &2u32.to_be_bytes());

/// Decides by `start`, the image's first [`LENGTH`] bytes, or all of it when it is shorter. Every version of qcow is
/// [`Format::Qcow2`], so that reading it tells what is not supported.
pub fn probe(start: &[u8]) -> Probe {
    if start.starts_with(&MAGIC) {
        return Probe { format: Format::Qcow2, foreign: None };
    }
    let has = |at: usize, magic: &[u8]| start.get(at..).is_some_and(|bytes| bytes.starts_with(magic));
    let foreign = FOREIGN.iter().find(|(at, magic, _)| has(*at, magic)).map(|(_, _, name)| *name);
    Probe { format: Format::Raw, foreign }
}

/// What of `start` takes a secret to be read: for whoever has one.
pub fn encrypted(start: &[u8]) -> Option<Foreign> {
    let (at, luks) = QCOW2_CRYPT_METHOD;
    let is_method = || start.get(at..).is_some_and(|bytes| bytes.starts_with(luks));
    match start {
        // Whichever version: QEMU says which it can't read, and nobody who has the secret wants the bytes as they are.
        _ if start.starts_with(b"LUKS\xba\xbe") => Some(Foreign::Luks),
        _ if start.starts_with(&MAGIC) && is_method() => Some(Foreign::EncryptedQcow2),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn qcow2_is_known_by_its_magic_and_all_else_is_raw() {
        assert_eq!(probe(b"QFI\xfb\0\0\0\x03").format, Format::Qcow2);
        for raw in [&b""[..], b"QFI", b"QFI\xfa\0\0\0\x03", &[0; LENGTH], b"LUKS\xba\xbe"] {
            assert_eq!(probe(raw), Probe { format: Format::Raw, foreign: None });
        }
    }

    #[test]
    fn formats_that_are_not_read_are_named() {
        let mut vdi = [0; LENGTH];
        vdi[0x40..0x44].copy_from_slice(b"\x7f\x10\xda\xbe");
        for (start, name) in [(&vdi[..], Foreign::Vdi), (b"KDMV", Foreign::Vmdk), (b"vhdxfile!", Foreign::Vhdx)] {
            assert_eq!(probe(start), Probe { format: Format::Raw, foreign: Some(name) });
        }
    }

    #[test]
    fn what_a_secret_opens_is_known() {
        let mut qcow2 = *b"QFI\xfb\0\0\0\x03\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\x02";
        assert_eq!(encrypted(&qcow2), Some(Foreign::EncryptedQcow2));
        qcow2[35] = 0;
        assert_eq!(encrypted(&qcow2), None);
        for version in [b"LUKS\xba\xbe\0\x01", b"LUKS\xba\xbe\0\x02"] {
            assert_eq!(encrypted(version), Some(Foreign::Luks));
        }
        for other in [&b""[..], b"LUKS\xba", b"QFI\xfb"] {
            assert_eq!(encrypted(other), None);
        }
    }
}
