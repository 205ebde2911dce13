//! Which format an image has, by its first bytes.
//!
//! A guest writes what it likes into its own raw disk, the magic bytes of any format too. So only the image that a
//! person named without a format is probed, never one that another image names.

use super::format::Format;
use super::qcow2::header::MAGIC;

/// Bytes that are looked at.
pub const LENGTH: usize = 512;

/// What the first bytes say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Probe {
    /// Read it as this.
    pub format: Format,
    /// It looks like this format, which is not known here: its bytes are copied as they are.
    pub foreign: Option<&'static str>,
}

/// Offset, magic bytes and name of formats that hold a disk, and that are not read here.
const FOREIGN: [(usize, &[u8], &str); 8] = [
    (0, b"KDMV", "VMDK"),
    (0, b"COWD", "VMDK"),
    (0, b"# Disk DescriptorFile", "VMDK"),
    (0, b"conectix", "VHD"),
    (0, b"vhdxfile", "VHDX"),
    (0x40, b"\x7f\x10\xda\xbe", "VDI"),
    (0, b"QED\0", "QED"),
    (0, b"WithoutFreeSpace", "Parallels"),
];

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
        for (start, name) in [(&vdi[..], "VDI"), (b"KDMV", "VMDK"), (b"vhdxfile!", "VHDX")] {
            assert_eq!(probe(start), Probe { format: Format::Raw, foreign: Some(name) });
        }
    }
}
