//! From the flags of `serve` to disks with names, and where each is served.

use super::args::ServeArgs;
use crate::error::{Error, Kind, Result};
use crate::image::format::Format;
use crate::image::secret::SecretPlace;
use crate::serve::disk::DiskOptions;
use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

/// What a server is asked to do.
#[derive(Clone, Debug)]
pub struct Plan {
    /// The disks, by different names.
    pub disks: Vec<DiskOptions>,
    /// Where QMP clients come in.
    pub qmp: Option<PathBuf>,
    /// NBD addresses, as given.
    pub nbd: Vec<String>,
    /// For NBD.
    #[cfg_attr(not(feature = "nbd"), expect(dead_code, reason = "the NBD server takes it"))]
    pub tls_dir: Option<PathBuf>,
    /// For NBD.
    #[cfg_attr(not(feature = "nbd"), expect(dead_code, reason = "the NBD server takes it"))]
    pub max_connections: u32,
    /// A disk's place, and the socket.
    pub vhost_user: Vec<(usize, PathBuf)>,
    /// A disk's place, and the file.
    pub fuse: Vec<(usize, PathBuf)>,
}

/// A plan, or what is wrong with the flags, in one line.
pub fn plan(args: &ServeArgs) -> Result<Plan> {
    if args.nbd.is_empty() && args.vhost_user.is_empty() && args.fuse.is_empty() {
        return Err(refusal("say where to serve: --nbd, --vhost-user or --fuse"));
    }
    let disks = disks(args)?;
    let place = |of: &OsString, flag: &str| {
        let (name, path) = split(of, flag)?;
        let found = match &name {
            None if disks.len() == 1 => Some(0),
            None => return Err(refusal(format!("{flag} '{}': say NAME=PATH, there are several disks", of.display()))),
            Some(name) => disks.iter().position(|disk| disk.name == *name),
        };
        let place = found.ok_or_else(|| refusal(format!("{flag} '{}': there is no such disk", of.display())))?;
        Ok((place, path))
    };
    let places = |given: &[OsString], flag| given.iter().map(|of| place(of, flag)).collect::<Result<Vec<_>>>();
    Ok(Plan {
        qmp: args.qmp.clone(),
        nbd: args.nbd.clone(),
        tls_dir: args.tls_dir.clone(),
        max_connections: args.max_connections,
        vhost_user: places(&args.vhost_user, "--vhost-user")?,
        fuse: places(&args.fuse, "--fuse")?,
        disks,
    })
}

fn disks(args: &ServeArgs) -> Result<Vec<DiskOptions>> {
    let secret = args.secret.as_ref().map(SecretPlace::read).transpose()?;
    let mut disks: Vec<DiskOptions> = Vec::new();
    for given in &args.device {
        let (name, path) = split(given, "--device")?;
        let name = match name {
            Some(name) => name,
            None if args.device.len() == 1 => String::new(),
            None => stem(&path)?,
        };
        if disks.iter().any(|disk| disk.name == name) {
            return Err(refusal(format!("two disks have the name '{name}'; say --device NAME=PATH")));
        }
        disks.push(DiskOptions {
            name,
            path,
            format: args.format.map(Format::from),
            read_only: args.read_only,
            secret: secret.clone(),
            writer_dir: args.writer_dir.clone(),
        });
    }
    Ok(disks)
}

/// NAME and PATH; a slash ends what may be a name.
fn split(given: &OsStr, flag: &str) -> Result<(Option<String>, PathBuf)> {
    let bytes = given.as_bytes();
    let refuse = |what: &str| Err(refusal(format!("{flag} '{}': {what}", given.display())));
    let first = bytes.split(|byte| *byte == b'/').next().unwrap_or_default();
    let Some(at) = first.iter().position(|byte| *byte == b'=') else {
        return if bytes.is_empty() { refuse("the path is empty") } else { Ok((None, given.into())) };
    };
    let path = PathBuf::from(OsString::from_vec(bytes[at + 1..].to_vec()));
    match String::from_utf8(bytes[..at].to_vec()) {
        _ if path.as_os_str().is_empty() => refuse("the path is empty"),
        Ok(name) if name.len() <= NAME_LIMIT && !name.contains(char::is_control) => Ok((Some(name), path)),
        _ => refuse("the name is not plain text of at most 4096 bytes"),
    }
}

/// Bytes of a name; NBD allows no more.
const NAME_LIMIT: usize = 4096;

fn stem(path: &Path) -> Result<String> {
    let stem = path.file_stem().and_then(OsStr::to_str).filter(|stem| !stem.contains(char::is_control));
    stem.map(str::to_owned)
        .ok_or_else(|| refusal(format!("--device '{}' has no name to serve it under; say NAME=PATH", path.display())))
}

fn refusal(what: impl Into<String>) -> Error {
    Error::new(Kind::Usage, what)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::args::{Args, Verb};
    use clap::Parser;

    fn plan_of(flags: &str) -> Result<Plan, String> {
        let line = format!("drive-backup serve {flags}");
        let args = Args::try_parse_from(line.split_whitespace()).map_err(|error| error.to_string())?;
        let Some(Verb::Serve(args)) = args.verb else { panic!("{flags}") };
        plan(&args).map_err(|error| error.to_string())
    }

    fn names(plan: &Plan) -> Vec<(&str, &Path)> {
        plan.disks.iter().map(|disk| (&*disk.name, &*disk.path)).collect()
    }

    #[test]
    fn a_single_disk_has_the_empty_name_and_several_have_their_files() {
        let one = plan_of("--device /srv/disk.raw --nbd unix:s").unwrap();
        assert_eq!(names(&one), [("", Path::new("/srv/disk.raw"))]);
        let two = plan_of("--device /srv/a.raw --device b=c.qcow2 --nbd unix:s").unwrap();
        assert_eq!(names(&two), [("a", Path::new("/srv/a.raw")), ("b", Path::new("c.qcow2"))]);
    }

    #[test]
    fn a_name_ends_before_the_first_slash() {
        let plan = plan_of("--device ./a=b --device d=/x=y --device =e --nbd unix:s").unwrap();
        assert_eq!(names(&plan), [("a=b", Path::new("./a=b")), ("d", Path::new("/x=y")), ("", Path::new("e"))]);
    }

    #[test]
    fn sockets_and_mounts_find_their_disk() {
        let plan = plan_of("--device a.raw --device b.raw --vhost-user b=/run/s --fuse a=/mnt/a").unwrap();
        assert_eq!((plan.vhost_user, plan.fuse), (vec![(1, "/run/s".into())], vec![(0, "/mnt/a".into())]));
        let plan = plan_of("--device a.raw --vhost-user s").unwrap();
        assert_eq!(plan.vhost_user, [(0, "s".into())]);
    }

    #[test]
    fn contradictions_are_told_in_words() {
        for (flags, expected) in [
            ("--device a", "say where to serve"),
            ("--device a.raw --device b/a.qcow2 --nbd unix:s", "two disks have the name 'a'"),
            ("--device a --device b --vhost-user s", "--vhost-user 's': say NAME=PATH"),
            ("--device a --device b --fuse c=s", "--fuse 'c=s': there is no such disk"),
            ("--device a= --nbd unix:s", "--device 'a=': the path is empty"),
            ("--nbd unix:s", "required arguments were not provided"),
            ("--device a --nbd unix:s --max-connections 0", "0 is not in"),
            ("--device a --fuse s --tls-dir d", "required arguments were not provided"),
        ] {
            let found = plan_of(flags).unwrap_err();
            assert!(found.contains(expected), "{flags}: {found}");
        }
    }
}
