//! What opens an encrypted image. It is in our memory and in a pipe, never in arguments, messages or files.

use crate::error::{Error, Kind, Result};
use std::fmt;
use std::fs::File;
use std::io::Read;
use std::os::fd::RawFd;
use std::path::PathBuf;
use std::str::FromStr;

/// Bytes at most: so many fit in a pipe that nobody reads yet.
const LIMIT: u64 = 4096;

/// Where a secret is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SecretPlace {
    /// In a file.
    File(PathBuf),
    /// In what this descriptor reads up to its end.
    Descriptor(RawFd),
    /// In an environment variable.
    Environment(String),
}

/// The bytes themselves. Shows nothing of them.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(Vec<u8>);

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(…)")
    }
}

/// `file:PATH`, `fd:N` or `env:NAME`. The error does not repeat what may be the secret itself.
impl FromStr for SecretPlace {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || "say where it is, not what it is: file:PATH, fd:N or env:NAME".to_owned();
        match text.split_once(':').filter(|(_, rest)| !rest.is_empty()).ok_or_else(wrong)? {
            ("file", path) => Ok(Self::File(path.into())),
            ("fd", number) => match number.parse() {
                Ok(number) if number != 1 && number != 2 && number >= 0 => Ok(Self::Descriptor(number)),
                _ => Err("fd:N takes the number of an open descriptor, 0 or from 3 on".to_owned()),
            },
            ("env", name) if !name.contains('=') => Ok(Self::Environment(name.to_owned())),
            _ => Err(wrong()),
        }
    }
}

impl SecretPlace {
    /// Reads it; one newline at its end is not part of it. Blocks as long as the descriptor does. [`Kind::Usage`].
    pub fn read(&self) -> Result<Secret> {
        let refuse = |what: String| Error::new(Kind::Usage, format!("--secret: {what}"));
        let mut bytes = match self {
            Self::File(path) => File::open(path)
                .and_then(up_to_limit)
                .map_err(|e| refuse(format!("'{}': {}", path.display(), crate::error::reason(&e))))?,
            Self::Descriptor(number) => {
                let path = format!("/dev/fd/{number}");
                File::open(&path)
                    .and_then(up_to_limit)
                    .map_err(|e| refuse(format!("{path}: {}", crate::error::reason(&e))))?
            }
            Self::Environment(name) => {
                use std::os::unix::ffi::OsStringExt;
                std::env::var_os(name).ok_or_else(|| refuse(format!("there is no variable '{name}'")))?.into_vec()
            }
        };
        if bytes.last() == Some(&b'\n') {
            bytes.pop();
        }
        if bytes.is_empty() {
            return Err(refuse("it is empty".to_owned()));
        }
        if bytes.len() as u64 > LIMIT {
            return Err(refuse(format!("it is longer than {LIMIT} bytes")));
        }
        Ok(Secret(bytes))
    }
}

fn up_to_limit(file: File) -> std::io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    file.take(LIMIT + 2).read_to_end(&mut bytes)?;
    Ok(bytes)
}

impl Secret {
    /// What a child reads it from: the reading end of a pipe that holds it all.
    #[cfg(any(feature = "nbd", test))]
    pub(super) fn pipe(&self) -> std::io::Result<std::io::PipeReader> {
        use std::io::Write;
        let (reader, mut writer) = std::io::pipe()?;
        writer.write_all(&self.0)?;
        Ok(reader)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn place(text: &str) -> SecretPlace {
        text.parse().unwrap()
    }

    #[test]
    fn a_secret_is_named_by_its_place() {
        assert_eq!(place("file:/etc/key"), SecretPlace::File("/etc/key".into()));
        assert_eq!((place("fd:0"), place("fd:7")), (SecretPlace::Descriptor(0), SecretPlace::Descriptor(7)));
        assert_eq!(place("env:KEY"), SecretPlace::Environment("KEY".to_owned()));
        for wrong in ["hunter2", "pass:hunter2", "file:", "fd:1", "fd:-3", "fd:x", "env:", "env:hunter2=x"] {
            assert!(!wrong.parse::<SecretPlace>().unwrap_err().contains("hunter2"), "{wrong}");
        }
    }

    #[test]
    fn one_newline_at_the_end_is_not_part_of_it() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let read = |bytes: &[u8]| {
            std::fs::write(file.path(), bytes).unwrap();
            SecretPlace::File(file.path().to_owned()).read()
        };
        assert_eq!(read(b"a\n").unwrap(), Secret(b"a".to_vec()));
        assert_eq!(read(b"a\n\n").unwrap(), Secret(b"a\n".to_vec()));
        assert_eq!(read(&[7; 4096]).unwrap(), Secret(vec![7; 4096]));
        assert_eq!(read(&[7; 4097]).unwrap_err().to_string(), "--secret: it is longer than 4096 bytes");
        assert_eq!(read(b"\n").unwrap_err().to_string(), "--secret: it is empty");
        assert_eq!(format!("{:?}", read(b"hunter2").unwrap()), "Secret(…)");
    }

    #[test]
    fn a_descriptor_is_read_to_its_end() {
        use std::os::fd::AsRawFd;
        let reader = Secret(b"hunter2\n".to_vec()).pipe().unwrap();
        assert_eq!(place(&format!("fd:{}", reader.as_raw_fd())).read().unwrap(), Secret(b"hunter2".to_vec()));
        assert!(SecretPlace::Descriptor(9999).read().unwrap_err().to_string().contains("/dev/fd/9999"));
    }
}
