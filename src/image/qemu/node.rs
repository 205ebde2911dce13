//! An image in QEMU's words.

use super::super::format::Foreign;
use super::super::secret::Secret;
use super::process::run;
use super::remote::Remote;
use super::{IMG_TIMEOUT, Terms, kind_of, tool, words};
use crate::error::{Error, Kind, Result, Side, reason};
use std::ffi::OsString;
use std::io;
use std::os::unix::fs::FileTypeExt;
use std::path::Path;

/// What the secret is called in QEMU.
const SECRET: &str = "secret0";

/// What QEMU is to open.
#[derive(Clone, Copy, Debug)]
pub enum Node<'a> {
    /// A file or a block device of this machine.
    File {
        /// Where it is.
        path: &'a Path,
        /// As messages name it.
        name: &'a Path,
        /// Its format.
        format: Foreign,
    },
    /// Somewhere else.
    Remote {
        /// Where.
        place: &'a Remote,
        /// `None`: raw.
        format: Option<Foreign>,
    },
}

impl Node<'_> {
    /// For messages.
    pub fn name(&self) -> &Path {
        match self {
            Self::File { name, .. } => name,
            Self::Remote { place, .. } => place.name(),
        }
    }

    fn format(&self) -> Option<Foreign> {
        match self {
            Self::File { format, .. } => Some(*format),
            Self::Remote { format, .. } => *format,
        }
    }

    /// What needs QEMU, for a message.
    pub(super) fn need(&self) -> String {
        let name = self.name().display();
        self.format().map_or_else(|| format!("'{name}'"), |format| format!("'{name}' is {} and", format.name()))
    }

    /// Must there be one read at a time? QEMU's curl driver (seen in 7.2 and 10.0.2) loses now and then one of several under
    /// way, and whoever waits for it waits for ever.
    pub(super) fn reads_one_by_one(&self) -> bool {
        matches!(self, Self::Remote { place, .. } if place.is_by_curl())
    }

    /// Must there be one change at a time? QEMU's driver for QED (seen in 10.0.2) aborts when several that allocate clusters
    /// wait for each other: `qed_aio_write_alloc: Assertion s->allocating_acb == NULL`.
    pub(super) fn changes_one_by_one(&self) -> bool {
        self.format() == Some(Foreign::Qed)
    }

    fn driver(&self) -> &'static str {
        self.format().map_or("raw", Foreign::driver)
    }

    /// qemu-nbd's arguments that name the image. [`Kind::Usage`] for what can't be said.
    pub(super) fn argument(&self, terms: &Terms<'_>) -> Result<Vec<OsString>> {
        let file = match self {
            Self::File { path, .. } => file_node(path)?,
            Self::Remote { place, format } => match format {
                Some(format) if format.is_encrypted() => remote_node(place)?,
                _ => return Ok(vec!["--format".into(), self.driver().into(), place.word().into()]),
            },
        };
        let mut node = format!(r#"json:{{"driver":"{}","file":{file}"#, self.driver());
        node += &secret_members(self.format(), terms.secret);
        if terms.side != Side::Target && terms.shared {
            node += r#","force-share":true"#;
        }
        Ok(vec![(node + "}").into()])
    }

    /// A backing file would be opened by QEMU, and nobody would see it here.
    pub(super) fn refuse_backing(&self, terms: &Terms<'_>) -> Result<()> {
        let name = self.name().display();
        let program = tool("qemu-img", terms.side, &self.need())?;
        let mut arguments = words([&"info", &"--force-share", &"--output=json", &"--format", &self.driver()]);
        arguments.push(self.place());
        let told = run(&program, &arguments, None, IMG_TIMEOUT, terms.job)
            .map_err(|error| terms.unless_cancelled(self.failed(terms.side, "open", error)))?;
        // A quotation mark inside a value has a backslash before it.
        if String::from_utf8_lossy(&told).contains(r#""backing-filename":"#) {
            let what = format!("{} '{name}' has a backing file, which was ruled out", terms.side);
            return Err(Error::new(kind_of(terms.side), what));
        }
        Ok(())
    }

    /// qemu-img's name of it.
    pub(super) fn place(&self) -> OsString {
        match self {
            // Absolute: a colon in it is no scheme then, a dash no option.
            Self::File { path, .. } => std::path::absolute(path).unwrap_or_else(|_| path.into()).into(),
            Self::Remote { place, .. } => place.word().into(),
        }
    }

    /// `-f` and `-o` of qemu-img create.
    pub(super) fn create_options(&self) -> Vec<OsString> {
        let mut options = words([&"-f", &self.driver()]);
        let special = match self.format() {
            // Else the size is what cylinders, heads and sectors make of it.
            Some(Foreign::Vpc) => "force_size=on".to_owned(),
            Some(Foreign::Luks) => format!("key-secret={SECRET}"),
            Some(Foreign::EncryptedQcow2) => format!("encrypt.format=luks,encrypt.key-secret={SECRET}"),
            _ => return options,
        };
        options.extend(words([&"-o", &special]));
        options
    }

    /// An error of QEMU's, in one line and without passwords.
    pub(super) fn failed(&self, side: Side, during: &'static str, error: io::Error) -> Error {
        let is_locked = is_lock(&error);
        let text = reason(&error);
        let text = ["qemu-nbd: ", "qemu-img: "].iter().find_map(|tool| text.strip_prefix(tool)).unwrap_or(&text);
        let text = match self {
            Self::File { .. } => text.to_owned(),
            Self::Remote { place, .. } => place.hidden_in(text),
        };
        // The image's JSON says nothing that the message does not.
        let text = match (text.find("'json:"), text.rfind("': ")) {
            (Some(start), Some(end)) if start < end => text[end + 3..].to_owned(),
            _ => text,
        };
        let text = match self {
            Self::Remote { place, .. } if NO_DRIVER.iter().any(|said| text.contains(said)) => {
                format!("QEMU has no driver for {} here (Debian: package qemu-block-extra)", place.scheme())
            }
            _ => text,
        };
        let failure = Error::file(side, during, self.name(), io::Error::new(error.kind(), text));
        if is_locked { failure.with_kind(Kind::Busy) } else { failure }
    }
}

/// What QEMU's versions say of a protocol whose driver is not installed.
const NO_DRIVER: [&str; 2] = ["Unknown protocol", "A block device must be specified for \"file\""];

/// Another process has the image: QEMU says that in words alone.
fn is_lock(error: &io::Error) -> bool {
    let text = reason(error);
    text.contains("Is another process using the image") || (text.contains("Failed to") && text.contains(" lock"))
}

/// The object that holds the secret that `path` reads.
pub(super) fn secret_object(path: &str) -> [OsString; 2] {
    ["--object".into(), format!("secret,id={SECRET},file={path}").into()]
}

fn secret_members(format: Option<Foreign>, secret: Option<&Secret>) -> String {
    match format.filter(|_| secret.is_some()) {
        Some(Foreign::Luks) => format!(r#","key-secret":"{SECRET}""#),
        Some(Foreign::EncryptedQcow2) => format!(r#","encrypt":{{"format":"luks","key-secret":"{SECRET}"}}"#),
        _ => String::new(),
    }
}

fn file_node(path: &Path) -> Result<String> {
    let is_device = path.metadata().is_ok_and(|found| found.file_type().is_block_device());
    let driver = if is_device { "host_device" } else { "file" };
    let absolute = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
    let text = absolute.to_str().ok_or_else(|| {
        let what = format!("'{}': QEMU's tools take names in UTF-8 only; rename it or link to it", path.display());
        Error::new(Kind::Usage, what)
    })?;
    Ok(format!(r#"{{"driver":"{driver}","filename":{}}}"#, quoted(text)))
}

/// Where QEMU's own syntax has no place for a secret.
fn remote_node(place: &Remote) -> Result<String> {
    match place.scheme() {
        scheme @ ("http" | "https" | "ftp" | "ftps") => {
            Ok(format!(r#"{{"driver":"{scheme}","url":{}}}"#, quoted(place.word())))
        }
        scheme => {
            let what = format!("'{}': an encrypted image can't be reached by {scheme}", place.name().display());
            Err(Error::new(Kind::Usage, what))
        }
    }
}

/// A string of JSON.
fn quoted(text: &str) -> String {
    let mut quoted = String::from('"');
    for c in text.chars() {
        match c {
            '"' | '\\' => quoted.extend(['\\', c]),
            c if c.is_control() => quoted += &format!("\\u{:04x}", c as u32),
            c => quoted.push(c),
        }
    }
    quoted + "\""
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_cannot_leave_its_quotation_marks() {
        assert_eq!(quoted("a\"b\\c\nd,e=f"), "\"a\\\"b\\\\c\\u000ad,e=f\"");
    }

    #[test]
    fn errors_are_one_line_without_the_json() {
        let node = Node::File { path: Path::new("/x"), name: Path::new("/x"), format: Foreign::Vdi };
        let said = "qemu-nbd: Failed to blk_new_open 'json:{\"driver\":\"vdi\"}': Invalid header";
        let error = node.failed(Side::Source, "open", io::Error::other(said));
        assert_eq!(error.to_string(), "open source '/x': Invalid header");
    }

    #[test]
    fn a_driver_that_is_not_installed_is_named_with_its_package() {
        let place = Remote::parse("rbd:backup/disk").unwrap();
        let node = Node::Remote { place: &place, format: None };
        for said in
            ["Unknown protocol 'rbd'", "Failed to blk_new_open 'rbd:x': A block device must be specified for \"file\""]
        {
            let error = node.failed(Side::Target, "open", io::Error::other(said)).to_string();
            let why = "QEMU has no driver for rbd here (Debian: package qemu-block-extra)";
            assert_eq!(error, format!("open target 'rbd:backup/disk': {why}"));
        }
    }

    #[test]
    fn an_image_that_another_qemu_has_is_busy() {
        let node = Node::File { path: Path::new("/x"), name: Path::new("/x"), format: Foreign::Vdi };
        let said = "Failed to get shared \"write\" lock";
        assert_eq!(node.failed(Side::Source, "open", io::Error::other(said)).kind(), Kind::Busy);
    }
}
