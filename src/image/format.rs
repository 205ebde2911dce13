//! The formats of images, by name.

use crate::error::{Error, Kind};
use std::fmt;
use std::path::Path;
use std::str::FromStr;

/// How a disk is laid out in a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Format {
    /// The disk's bytes as they are.
    Raw,
    /// QEMU's qcow2, versions 2 and 3.
    Qcow2,
    /// What QEMU reads and writes for us.
    Foreign(Foreign),
}

/// A format that is known here by its name alone: a private qemu-nbd opens it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Foreign {
    /// VMware's.
    Vmdk,
    /// VirtualBox's.
    Vdi,
    /// Hyper-V's.
    Vhdx,
    /// Virtual PC's, VHD.
    Vpc,
    /// QEMU's former enhanced disk.
    Qed,
    /// Parallels'.
    Parallels,
    /// LUKS, version 1.
    Luks,
    /// qcow2, encrypted in LUKS' way.
    EncryptedQcow2,
    /// Apple's, for reading.
    Dmg,
    /// Compressed loop devices, for reading.
    Cloop,
    /// Bochs' growing images, for reading.
    Bochs,
}

impl Foreign {
    /// All of them.
    pub const ALL: [Self; 11] = [
        Self::Vmdk,
        Self::Vdi,
        Self::Vhdx,
        Self::Vpc,
        Self::Qed,
        Self::Parallels,
        Self::Luks,
        Self::EncryptedQcow2,
        Self::Dmg,
        Self::Cloop,
        Self::Bochs,
    ];

    /// Its name, as in QEMU, but for `qcow2-luks`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::EncryptedQcow2 => "qcow2-luks",
            _ => self.driver(),
        }
    }

    /// QEMU's block driver.
    pub const fn driver(self) -> &'static str {
        match self {
            Self::Vmdk => "vmdk",
            Self::Vdi => "vdi",
            Self::Vhdx => "vhdx",
            Self::Vpc => "vpc",
            Self::Qed => "qed",
            Self::Parallels => "parallels",
            Self::Luks => "luks",
            Self::EncryptedQcow2 => "qcow2",
            Self::Dmg => "dmg",
            Self::Cloop => "cloop",
            Self::Bochs => "bochs",
        }
    }

    /// It takes a secret.
    pub const fn is_encrypted(self) -> bool {
        matches!(self, Self::Luks | Self::EncryptedQcow2)
    }

    /// QEMU makes and writes it.
    pub const fn is_writable(self) -> bool {
        !matches!(self, Self::Dmg | Self::Cloop | Self::Bochs)
    }
}

impl Format {
    /// Those that are read and written here, backing files too.
    pub const OWN: [Self; 2] = [Self::Raw, Self::Qcow2];

    /// What the extension of a file's name says.
    pub fn of_extension(path: &Path) -> Option<Self> {
        Some(match path.extension()?.to_str()?.to_ascii_lowercase().as_str() {
            "raw" | "img" => Self::Raw,
            "qcow2" => Self::Qcow2,
            "vmdk" => Self::Foreign(Foreign::Vmdk),
            "vdi" => Self::Foreign(Foreign::Vdi),
            "vhdx" => Self::Foreign(Foreign::Vhdx),
            "vhd" | "vpc" => Self::Foreign(Foreign::Vpc),
            "qed" => Self::Foreign(Foreign::Qed),
            "hdd" => Self::Foreign(Foreign::Parallels),
            "luks" => Self::Foreign(Foreign::Luks),
            _ => return None,
        })
    }

    /// Its name, as in the formats of QEMU.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::Qcow2 => "qcow2",
            Self::Foreign(foreign) => foreign.name(),
        }
    }
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// One of [`Format::OWN`] by the exact name; the error lists them.
impl FromStr for Format {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self, Error> {
        Self::OWN.into_iter().find(|format| format.name() == name).ok_or_else(|| {
            let known = Self::OWN.map(Self::name).join(", ");
            Error::new(Kind::Usage, format!("unknown format '{name}' (known: {known})"))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_format_is_known_by_its_name_alone() {
        for format in Format::OWN {
            assert_eq!(format.to_string().parse::<Format>().expect("known"), format);
        }
        let error = "vmdk".parse::<Format>().expect_err("unknown");
        assert_eq!(
            (error.kind(), error.to_string().as_str()),
            (Kind::Usage, "unknown format 'vmdk' (known: raw, qcow2)")
        );
    }
}
