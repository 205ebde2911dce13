//! The instant that a copy shows: a clone that the file system made, or a source that did not change.

use super::destination::Destination;
use super::options::Options;
use super::origin::Origin;
use crate::error::{Error, Kind, Result, Side};
use crate::image::Image;
use crate::image::clone;
use crate::image::format::Format;
use crate::image::lock::{self, ImageLock, Protection, Terms};
use crate::image::medium::Medium;
use crate::image::open::SourceFile;
use crate::image::raw::Raw;
use crate::image::stability::Fingerprint;
use crate::monitor::{Instant, Warning};
use std::path::Path;
use std::sync::Arc;
use std::time::SystemTime;

/// The disk as of one instant.
pub struct Moment {
    image: Arc<dyn Image>,
    how: Instant,
    time: SystemTime,
    on_target: bool,
    /// How the source's files looked at the instant, where nothing else keeps it.
    before: Vec<Fingerprint>,
    warnings: Vec<Warning>,
    #[expect(dead_code, reason = "held")]
    locks: Vec<ImageLock>,
}

impl Moment {
    /// Clones the source where the file system can; otherwise locks it against writers and takes its fingerprint.
    pub fn take(options: &Options, origin: &Origin, destination: &Destination) -> Result<Self> {
        match Self::cloned(options, origin, destination)? {
            Some(moment) => Ok(moment),
            None => Self::watched(options, origin),
        }
    }

    /// Of a raw file: one call, atomic against every writer.
    fn cloned(options: &Options, origin: &Origin, destination: &Destination) -> Result<Option<Self>> {
        let [SourceFile { path, raw, .. }] = origin.files() else { return Ok(None) };
        if origin.format() != Format::Raw || raw.medium() != Medium::File {
            return Ok(None);
        }
        let moment = |image, on_target| {
            let how = Instant::Reflink;
            Self {
                image,
                how,
                time: SystemTime::now(),
                on_target,
                before: Vec::new(),
                warnings: Vec::new(),
                locks: Vec::new(),
            }
        };
        let failed = |e| Error::file(Side::Source, "clone", path, e);
        if let Some(target) = destination.clonable().filter(|_| options.sparse)
            && clone::clone_into(raw.as_file(), target.as_file()).map_err(failed)?
        {
            return Ok(Some(moment(origin.image(), true)));
        }
        let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let Some(clone) = clone::clone_unlinked(raw.as_file(), folder).map_err(failed)? else { return Ok(None) };
        let clone = Raw::of(clone).map_err(failed)?;
        let clone = if options.direct { clone.with_direct().map_err(failed)? } else { clone };
        Ok(Some(moment(Arc::new(clone), false)))
    }

    fn watched(options: &Options, origin: &Origin) -> Result<Self> {
        let terms = if options.allow_inconsistent { Terms::ReadShared } else { Terms::Read };
        let (mut locks, mut warnings) = (Vec::new(), Vec::new());
        for file in origin.files() {
            match lock::acquire(file.raw.as_file(), &file.path, Side::Source, terms)? {
                Protection::Locked(lock) => locks.push(lock),
                Protection::Unsupported(message) => warnings.push(Warning::general("no_locks", message)),
            }
        }
        let before = fingerprints(origin)?;
        let how = if options.allow_inconsistent { Instant::Unchecked } else { Instant::Unchanging };
        let moment =
            Self { image: origin.image(), how, time: SystemTime::now(), on_target: false, before, warnings, locks };
        // What can be told at once (a mounted device) must not cost a whole copy first.
        moment.compare(origin, &moment.before)?;
        Ok(moment)
    }

    /// The disk's contents as of the instant, or as they are now and must not change.
    pub fn image(&self) -> &dyn Image {
        self.image.as_ref()
    }

    /// How it was taken.
    pub fn how(&self) -> Instant {
        self.how
    }

    /// When.
    pub fn time(&self) -> SystemTime {
        self.time
    }

    /// The target has it already: it was cloned there.
    pub fn is_on_target(&self) -> bool {
        self.on_target
    }

    /// What the user should know of it.
    pub fn warnings(&self) -> impl Iterator<Item = &Warning> {
        self.warnings.iter()
    }

    /// After the last read: did the source change meanwhile? False: it did, and the user allows it.
    pub fn check(&self, origin: &Origin) -> Result<bool> {
        if self.before.is_empty() { Ok(true) } else { self.compare(origin, &fingerprints(origin)?) }
    }

    fn compare(&self, origin: &Origin, after: &[Fingerprint]) -> Result<bool> {
        let mut pairs = origin.files().iter().zip(after.iter().zip(&self.before));
        let change = pairs.find_map(|(file, (after, before))| Some((&file.path, after.changed_since(before)?)));
        match change {
            None => Ok(true),
            Some(_) if self.how == Instant::Unchecked => Ok(false),
            Some((path, change)) => {
                let what = format!("source '{}' is not consistent: {change}", path.display());
                Err(Error::new(Kind::Source, what))
            }
        }
    }
}

fn fingerprints(origin: &Origin) -> Result<Vec<Fingerprint>> {
    let take = |file: &SourceFile| {
        Fingerprint::take(file.raw.as_file(), &file.path).map_err(|e| Error::file(Side::Source, "stat", &file.path, e))
    };
    origin.files().iter().map(take).collect()
}
