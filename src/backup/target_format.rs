//! The format that a target gets, or has, and what does not go with it.

use super::options::{Mode, Options, SyncMode};
use super::origin::Origin;
use crate::error::{Error, Kind, Result, Side};
use crate::image::Image;
use crate::image::format::{Foreign, Format};
use crate::image::probe::{self, probe};
use crate::image::raw::Raw;
use std::os::unix::fs::FileTypeExt;
use std::path::Path;

/// Of a part of a disk the rest has to be somewhere: behind a new target. One that is there has what it needs, if it can.
pub fn refuse_without_backing(options: &Options, path: &Path, origin: &Origin) -> Result<()> {
    let may_be_any = options.mode == Mode::Existing && options.sync != SyncMode::None;
    if origin.backing().is_none() || may_be_any {
        return Ok(());
    }
    let format = match (options.format, options.mode) {
        (Some(format), _) => format,
        (None, Mode::Existing) => format_of_content(&Raw::open(path, Side::Target)?, path, origin)?,
        (None, Mode::AbsolutePaths) => Format::of_extension(path).unwrap_or_else(|| as_source(origin)),
    };
    match format {
        Format::Qcow2 => Ok(()),
        // QEMU's words.
        _ => Err(Error::new(Kind::Usage, format!("Backing file not supported for file format '{format}'"))),
    }
}

/// As the source is, if that can be written.
pub fn as_source(origin: &Origin) -> Format {
    match origin.format() {
        Format::Foreign(foreign) if !foreign.is_writable() => Format::Raw,
        format => format,
    }
}

/// Refuses what only a qcow2 image has.
pub fn refuse_qcow2_options(options: &Options, path: &Path, format: Format) -> Result<()> {
    if format != Format::Qcow2 && (options.compression.is_some() || options.cluster_size.is_some()) {
        let path = path.display();
        let what = format!(
            "target '{path}' is to be {format}: --compress and --cluster-size are for qcow2; use --format qcow2"
        );
        return Err(Error::new(Kind::Usage, what));
    }
    Ok(())
}

/// What QEMU is to write in place at `path`. A device gets raw or qcow2.
pub fn foreign_in_place(options: &Options, path: &Path, origin: &Origin) -> Result<Option<Foreign>> {
    let is_device = path.metadata().is_ok_and(|found| found.file_type().is_block_device());
    let format = match (options.format, options.mode) {
        (Some(format), _) => format,
        (None, Mode::Existing) => {
            // Without a lock, which QEMU takes for itself; it is looked at again by whoever writes it.
            let raw = Raw::open(path, Side::Target)?;
            let start = start_of(&raw, path)?;
            let encrypted = probe::encrypted(&start).filter(|_| options.secret_of_target().is_some());
            match probe(&start).foreign.or(encrypted).map(Format::Foreign) {
                None => Format::Raw,
                // Its own secret says what it is.
                Some(found) if encrypted.is_some() && options.target_secret.is_some() => found,
                Some(found) => believed(found, path, origin)?,
            }
        }
        (None, Mode::AbsolutePaths) => Format::Raw,
    };
    match format {
        Format::Foreign(foreign) if is_device => {
            let (path, name) = (path.display(), foreign.name());
            let what = format!("target '{path}' is a device: it gets raw or qcow2, not {name}");
            Err(Error::new(Kind::Usage, what))
        }
        Format::Foreign(foreign) => Ok(Some(foreign)),
        _ => Ok(None),
    }
}

/// As what it holds says, and its name does not deny.
pub fn format_of_content(raw: &Raw, path: &Path, origin: &Origin) -> Result<Format> {
    let found = probe(&start_of(raw, path)?);
    believed(found.foreign.map_or(found.format, Format::Foreign), path, origin)
}

/// A raw copy begins with what a guest wrote at the beginning of its disk, which may look like an image that names files of
/// the host: what is there is believed where the target's name says the same, or nothing and the source is such an image.
fn believed(found: Format, path: &Path, origin: &Origin) -> Result<Format> {
    let is_file = path.metadata().is_ok_and(|target| target.file_type().is_file());
    let expected = Format::of_extension(path).or_else(|| is_file.then(|| origin.format()));
    if found == Format::Raw || expected == Some(found) {
        return Ok(found);
    }
    let path = path.display();
    let what = format!(
        "target '{path}' begins like {found}, which the data of a raw disk may do too: say --format {found} or --format raw"
    );
    Err(Error::new(Kind::Usage, what))
}

/// What a format is recognised by.
fn start_of(raw: &Raw, path: &Path) -> Result<Vec<u8>> {
    let mut start = vec![0; raw.length().min(probe::LENGTH as u64) as usize];
    raw.read_at(&mut start, 0).map_err(|error| Error::file(Side::Target, "read", path, error))?;
    Ok(start)
}
