//! Opens a source with all the files that it is made of. Here a [`Format`] is matched, and nowhere else.

use super::Image;
use super::chain::Chain;
use super::format::{Foreign, Format};
#[cfg(feature = "nbd")]
use super::lock;
use super::probe::{self, probe};
use super::qcow2::header::{self, Header, incompatible};
use super::qcow2::{Cache, Qcow2};
#[cfg(feature = "nbd")]
use super::qemu::{self, Qemu};
use super::raw::Raw;
use super::secret::Secret;
use super::stability::Fingerprint;
use crate::error::{Error, Kind, Result, Side};
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Images in a backing chain. Loops are found otherwise; this bounds what a hostile chain may open.
const CHAIN_LIMIT: usize = 256;
/// Bytes of the L1 tables of a whole chain.
const L1_TABLES_LIMIT: u64 = 64 << 20;

/// How to open a source.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SourceOptions {
    /// The format of the image itself; `None` looks at its first bytes. An image given as raw is raw, whatever it holds.
    pub format: Option<Format>,
    /// A backing file is allowed; else an image that has one is refused.
    pub backing: bool,
    /// Read past the page cache.
    pub direct: bool,
    /// What opens an encrypted image.
    pub secret: Option<Secret>,
    /// Another QEMU may write it meanwhile.
    pub shared: bool,
}

/// What a file is to the source.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// The image that was asked for.
    Image,
    /// A backing file.
    Backing,
    /// An external data file.
    Data,
}

/// A file of the source: to be locked, and to be watched for changes.
#[derive(Clone, Debug)]
pub struct SourceFile {
    /// As it was opened.
    pub path: PathBuf,
    /// What it is to the source.
    pub role: Role,
    /// The file.
    pub raw: Arc<Raw>,
}

impl SourceFile {
    /// How it looks now. Blocks while a device's dirty pages are written.
    pub fn look(&self) -> Result<Fingerprint> {
        Fingerprint::take(self.raw.as_file(), &self.path).map_err(|e| Error::file(Side::Source, "stat", &self.path, e))
    }
}

/// An open source.
pub struct Source {
    /// The disk as its guest sees it; nothing of it is unallocated.
    pub image: Arc<dyn Image>,
    /// Of the image that was asked for.
    pub format: Format,
    /// Bytes of the disk.
    pub virtual_size: u64,
    /// Every file that it is made of, the image itself first.
    pub files: Vec<SourceFile>,
    /// What its user should know: full lines.
    pub warnings: Vec<String>,
    /// The image on its own, where it has a backing file.
    pub top: Option<TopLayer>,
    /// How the files looked when their tables were read, where that can't be done again at low cost: QEMU has them. Else none.
    pub opened: Vec<Fingerprint>,
}

/// A qcow2 image without what is behind it.
pub struct TopLayer {
    /// What it does not hold is unallocated.
    pub image: Arc<dyn Image>,
    /// What is behind it, by a path that does not depend on where it is named, and its format.
    pub backing: header::Backing,
}

/// Opens the image at `path` with its backing chain and external data files, for reading.
///
/// Blocks. Errors are of [`Kind::Source`] and name the file, and the image that names it. Only the image itself is
/// probed: a backing file without a recorded format is raw.
pub fn open_source(path: &Path, options: &SourceOptions) -> Result<Source> {
    open_covered(path, path, options)
}

/// [`open_source`] of an image that `through` leads to, in place of `path`, which names it and its backing files' folder.
pub fn open_covered(path: &Path, through: &Path, options: &SourceOptions) -> Result<Source> {
    let mut opening = Opening::new(options);
    let first = opening.file_through(path, through, Role::Image)?;
    let format = match options.format {
        Some(format) => format,
        None => opening.probe(path, &first)?,
    };
    let (mut top, mut opened) = (None, Vec::new());
    let image = match format {
        Format::Raw => first,
        Format::Qcow2 => {
            let layers = opening.chain(path, first)?;
            top = opening.below.take().map(|backing| TopLayer { image: layers[0].clone(), backing });
            Arc::new(Chain::new(layers))
        }
        Format::Foreign(format) => {
            opened.push(opening.files[0].look()?);
            let image = opening.foreign(path, format)?;
            opened.extend(opening.files[1..].iter().map(SourceFile::look).collect::<Result<Vec<_>>>()?);
            image
        }
    };
    let Opening { files, warnings, .. } = opening;
    Ok(Source { virtual_size: image.length(), image, format, files, warnings, top, opened })
}

/// A source whose bytes are `image`, which is no file of this machine; `name` is for messages. Not probed. A qcow2 with
/// a backing or data file is refused: the names in it are another machine's.
pub fn open_elsewhere(image: Arc<dyn Image>, name: &Path, format: Format) -> Result<Source> {
    let options = &SourceOptions { format: Some(format), backing: false, direct: false, secret: None, shared: false };
    let mut opening = Opening::new(options);
    let image = match format {
        Format::Raw => image,
        Format::Qcow2 => {
            let header = Qcow2::header_of(&*image).map_err(|e| Error::file(Side::Source, "open", name, e))?;
            if header.backing.is_some() || header.has(incompatible::DATA_FILE) {
                let name = name.display();
                return Err(refusal(format!("source '{name}' names other files, which are not to be had from here")));
            }
            let (layer, _) = opening.layer(name, image, 0)?;
            Arc::new(Chain::new(vec![layer]))
        }
        Format::Foreign(_) => {
            let what = format!("source '{}': only raw and qcow2 are read over NBD", name.display());
            return Err(Error::new(Kind::Usage, what));
        }
    };
    let (virtual_size, warnings) = (image.length(), opening.warnings);
    Ok(Source { virtual_size, image, format, files: Vec::new(), warnings, top: None, opened: Vec::new() })
}

impl SourceOptions {
    /// The format of an image that begins with `start`, for whoever has these options.
    pub fn look(&self, start: &[u8]) -> Format {
        let found = probe(start);
        let encrypted = probe::encrypted(start).filter(|_| self.secret.is_some());
        found.foreign.or(encrypted).map_or(found.format, Format::Foreign)
    }
}

/// What is behind a qcow2 image that is written in place.
pub struct Backing {
    /// As its guest sees it, without what the image itself holds.
    pub image: Arc<dyn Image>,
    /// Every file that it is made of, without the image itself.
    pub files: Vec<SourceFile>,
    /// What its user should know: full lines.
    pub warnings: Vec<String>,
}

/// The disk behind the qcow2 image at `path`, without what the image itself holds; `None` without a backing file. The
/// image's own file is not kept open here. Blocks; errors as of [`open_source`].
pub fn open_backing(path: &Path) -> Result<Option<Backing>> {
    let options =
        &SourceOptions { format: Some(Format::Qcow2), backing: true, direct: false, secret: None, shared: false };
    let mut opening = Opening::new(options);
    let first = opening.file(path, Role::Image)?;
    let mut layers = opening.chain(path, first)?;
    layers.remove(0);
    if layers.is_empty() {
        return Ok(None);
    }
    let Opening { mut files, warnings, .. } = opening;
    files.remove(0);
    Ok(Some(Backing { image: Arc::new(Chain::new(layers)), files, warnings }))
}

struct Opening<'a> {
    options: &'a SourceOptions,
    files: Vec<SourceFile>,
    warnings: Vec<String>,
    cache: Cache,
    /// Bytes of all L1 tables so far.
    l1_size: u64,
    /// What the first image of a chain names.
    below: Option<header::Backing>,
}

/// A backing file to be opened.
struct Link {
    path: PathBuf,
    format: Format,
    named_by: PathBuf,
}

impl Link {
    /// For an image in any other folder.
    fn as_backing(&self) -> Result<header::Backing> {
        let path = std::path::absolute(&self.path).map_err(|e| Error::file(Side::Source, "open", &self.path, e))?;
        Ok(header::Backing { name: path.into_os_string(), format: Some(self.format.name().to_owned()) })
    }
}

impl<'a> Opening<'a> {
    fn new(options: &'a SourceOptions) -> Self {
        let (files, warnings) = (Vec::new(), Vec::new());
        Self { options, files, warnings, cache: Cache::default(), l1_size: 0, below: None }
    }

    fn file(&mut self, path: &Path, role: Role) -> Result<Arc<dyn Image>> {
        self.file_through(path, path, role)
    }

    fn file_through(&mut self, path: &Path, through: &Path, role: Role) -> Result<Arc<dyn Image>> {
        let mut raw = Raw::open(through, Side::Source)?;
        if self.options.direct {
            raw = raw.with_direct().map_err(|e| Error::file(Side::Source, "open", path, e))?;
        }
        let raw = Arc::new(raw);
        if self.has(&raw) {
            return Err(refusal(format!("'{}' is in the chain already: it is a loop", path.display())));
        }
        self.files.push(SourceFile { path: path.to_owned(), role, raw: raw.clone() });
        Ok(raw)
    }

    fn has(&self, raw: &Raw) -> bool {
        self.files.iter().any(|file| identity(&file.raw).is_some_and(|id| Some(id) == identity(raw)))
    }

    fn probe(&mut self, path: &Path, file: &Arc<dyn Image>) -> Result<Format> {
        if file.length() == 0 {
            return Err(refusal(format!(
                "source '{}' is empty; if a disk of no bytes is meant, say raw",
                path.display()
            )));
        }
        let mut start = vec![0; file.length().min(probe::LENGTH as u64) as usize];
        file.read_at(&mut start, 0).map_err(|e| Error::file(Side::Source, "read", path, e))?;
        Ok(self.options.look(&start))
    }

    /// Through a child that has the file open for itself.
    #[cfg(feature = "nbd")]
    fn foreign(&mut self, path: &Path, format: Foreign) -> Result<Arc<dyn Image>> {
        let SourceOptions { backing, direct, ref secret, shared, .. } = *self.options;
        let secret = secret.as_ref().filter(|_| format.is_encrypted());
        qemu::check_secret(format, secret, path)?;
        if !shared {
            lock::refuse_writer(self.files[0].raw.as_file(), path, Side::Source)?;
        }
        let terms = qemu::Terms { side: Side::Source, secret, direct, flushes: false, shared, backing, job: None };
        let qemu = Qemu::open(&qemu::Node::File { path, name: path, format }, terms)?;
        let others = qemu.files().map_err(|e| Error::file(Side::Source, "find the files of", path, e))?;
        for (through, path) in others {
            let raw = Arc::new(Raw::open(&through, Side::Source)?);
            if !self.has(&raw) {
                self.files.push(SourceFile { path, role: Role::Data, raw });
            }
        }
        Ok(Arc::new(qemu))
    }

    #[cfg(not(feature = "nbd"))]
    fn foreign(&self, path: &Path, format: Foreign) -> Result<Arc<dyn Image>> {
        let (path, name) = (path.display(), format.name());
        Err(refusal(format!(
            "source '{path}' is {name}, and this drive-backup was built without NBD, which that needs"
        )))
    }

    /// The layers of the qcow2 image `file` at `path`, the top one first.
    fn chain(&mut self, path: &Path, file: Arc<dyn Image>) -> Result<Vec<Arc<dyn Image>>> {
        let (top, mut link) = self.layer(path, file, 0)?;
        self.below = link.as_ref().map(Link::as_backing).transpose()?;
        let mut layers = vec![top];
        while let Some(Link { path, format, named_by }) = link.take() {
            let within = |error| within("backing file", &named_by, error);
            if layers.len() == CHAIN_LIMIT {
                return Err(within(refusal(format!("the chain has more than {CHAIN_LIMIT} images"))));
            }
            let mut layer = self.file(&path, Role::Backing).map_err(within)?;
            if format == Format::Qcow2 {
                (layer, link) = self.layer(&path, layer, layers.len() as u32).map_err(within)?;
            }
            layers.push(layer);
        }
        Ok(layers)
    }

    /// One qcow2 image, with its external data file, and the backing file that it names.
    fn layer(&mut self, path: &Path, file: Arc<dyn Image>, index: u32) -> Result<(Arc<dyn Image>, Option<Link>)> {
        let wrong = |e| Error::file(Side::Source, "open", path, e);
        let header = Qcow2::header_of(&*file).map_err(wrong)?;
        self.l1_size += header.l1_needed() * 8;
        if self.l1_size > L1_TABLES_LIMIT {
            let limit = L1_TABLES_LIMIT >> 20;
            return Err(refusal(format!("open source '{}': the L1 tables take more than {limit} MiB", path.display())));
        }
        if header.has(incompatible::CORRUPT) {
            self.warnings.push(format!("'{}' is marked corrupt: what it holds may be wrong", path.display()));
        }
        let link = self.link(path, &header)?;
        let data = self.data_file(path, &header, index)?;
        let image = Qcow2::open(file, header, data, self.cache.layer(index)).map_err(wrong)?;
        Ok((Arc::new(image), link))
    }

    fn data_file(&mut self, path: &Path, header: &Header, index: u32) -> Result<Option<Arc<dyn Image>>> {
        if !header.has(incompatible::DATA_FILE) {
            return Ok(None);
        }
        let within = |error| within("external data file", path, error);
        let name = header.data_file.as_deref().ok_or_else(|| within(refusal("its name is not recorded")))?;
        let data = named_path(path, name).map_err(within)?;
        // Of a backing file it is one too: nobody traps what is written there.
        let role = if index == 0 { Role::Data } else { Role::Backing };
        self.file(&data, role).map(Some).map_err(within)
    }

    fn link(&mut self, path: &Path, header: &Header) -> Result<Option<Link>> {
        let Some(backing) = &header.backing else { return Ok(None) };
        let within = |error| within("backing file", path, error);
        let name = printable(&backing.name.display().to_string());
        if !self.options.backing {
            return Err(refusal(format!(
                "source '{}' has a backing file, '{name}', which was ruled out",
                path.display()
            )));
        }
        let format = match &backing.format {
            Some(format) => format.parse().map_err(|e: Error| within(refusal(format!("'{name}': {e}"))))?,
            None => {
                let path = path.display();
                self.warnings.push(format!(
                    "'{path}' does not record the format of its backing file '{name}', which is therefore read as raw"
                ));
                Format::Raw
            }
        };
        let target = named_path(path, &backing.name).map_err(within)?;
        Ok(Some(Link { path: target, format, named_by: path.to_owned() }))
    }
}

/// `error` came of a file that the image at `path` names.
fn within(role: &str, path: &Path, error: Error) -> Error {
    Error::new(error.kind(), printable(&format!("{role} of '{}': {error}", path.display())))
}

/// Names come from untrusted files and go to terminals.
fn printable(text: &str) -> String {
    text.replace(char::is_control, "?")
}

fn refusal(what: impl Into<String>) -> Error {
    Error::new(Kind::Source, what)
}

/// What makes two files one: device and inode, or the device that a device file stands for.
fn identity(raw: &Raw) -> Option<(u64, u64)> {
    let metadata = raw.file()?.metadata().ok()?;
    match metadata.file_type().is_block_device() {
        true => Some((metadata.rdev(), u64::MAX)),
        false => Some((metadata.dev(), metadata.ino())),
    }
}

/// The path of what the image at `path` names: relative to the image's folder. `file:` may come before it; other
/// protocols, a colon before the first slash, are refused, and so are descriptions in JSON.
fn named_path(path: &Path, name: &OsStr) -> Result<PathBuf> {
    let bytes = name.as_bytes();
    let local = bytes.strip_prefix(b"file:").unwrap_or(bytes);
    let first = local.split(|byte| *byte == b'/').next().unwrap_or_default();
    if local.is_empty() || first.contains(&b':') {
        return Err(refusal(format!("'{}' is not the name of a file here", name.display())));
    }
    let local = Path::new(OsStr::from_bytes(local));
    Ok(path.parent().unwrap_or(Path::new("")).join(local))
}

#[cfg(test)]
mod tests;
