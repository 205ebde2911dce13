//! A source that is the view of an image which a server of ours shows: the image is what is read.

use super::options::{Options, WriterChoice};
use crate::error::{Error, Kind, Result, Side};
use crate::image::open::{Source, SourceOptions, open_covered};
use crate::ring::folder::shown::Shown;
use crate::ring::folder::{self, Disk, Folder};
use std::path::Path;

/// Of [`rustix::fs::statfs`].
const FUSE: i64 = 0x6573_5546;

/// What a running server shows at `view`, if that is a FUSE file of ours.
pub fn image_behind(options: &Options, view: &Path) -> Result<Option<Shown>> {
    if options.writer == WriterChoice::None || !rustix::fs::statfs(view).is_ok_and(|found| found.f_type == FUSE) {
        return Ok(None);
    }
    let path = options.writer_dir.clone().unwrap_or_else(folder::default_path);
    // Without the folder nobody can have left a word there.
    let Ok(folder) = Folder::open(&path) else { return Ok(None) };
    Disk::at(view).and_then(|disk| folder.image_behind(disk)).map_err(|e| {
        let what = format!("find the image behind '{}' in '{}'", view.display(), path.display());
        Error::system(Kind::Source, what, e)
    })
}

/// Opens it. The server's word on the format counts: a disk that its guest made look like another format is none.
pub fn open(view: &Path, shown: &Shown, how: SourceOptions) -> Result<Source> {
    let within = |e: Error| Error::new(e.kind(), format!("the image that '{}' shows: {e}", view.display()));
    let how = SourceOptions { format: Some(shown.format.parse().map_err(within)?), ..how };
    let source = open_covered(&shown.path, &shown.through, &how).map_err(within)?;
    let opened = Disk::open(source.files[0].raw.as_file());
    match opened.map_err(|e| Error::file(Side::Source, "stat", &shown.path, e))? {
        opened if opened == shown.image => Ok(source),
        _ => Err(within(Error::new(Kind::Source, format!("'{}' is another one", shown.through.display())))),
    }
}
