//! The formats of images, by name.

use crate::error::{Error, Kind};
use std::fmt;
use std::str::FromStr;

/// How a disk is laid out in a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Format {
    /// The disk's bytes as they are.
    Raw,
    /// QEMU's qcow2, versions 2 and 3.
    Qcow2,
}

impl Format {
    /// All of them.
    pub const ALL: [Self; 2] = [Self::Raw, Self::Qcow2];

    /// Its name, as in the formats of QEMU.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::Qcow2 => "qcow2",
        }
    }
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// By the exact name; the error lists the known ones.
impl FromStr for Format {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self, Error> {
        Self::ALL.into_iter().find(|format| format.name() == name).ok_or_else(|| {
            let known = Self::ALL.map(Self::name).join(", ");
            Error::new(Kind::Usage, format!("unknown format '{name}' (known: {known})"))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_format_is_known_by_its_name_alone() {
        for format in Format::ALL {
            assert_eq!(format.to_string().parse::<Format>().expect("known"), format);
        }
        let error = "vmdk".parse::<Format>().expect_err("unknown");
        assert_eq!(
            (error.kind(), error.to_string().as_str()),
            (Kind::Usage, "unknown format 'vmdk' (known: raw, qcow2)")
        );
    }
}
