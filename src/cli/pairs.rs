//! Several disks: which target is whose, and that no two of them meet.

use super::resolve::is_dash;
use crate::error::{Error, Kind, Result};
use crate::image::identity;
use crate::image::location::Location;
use crate::publish::place;
use std::path::{Path, PathBuf};

/// Refuses what can't be paired: a missing end, a stream among several, one disk under two names.
pub fn check(devices: &[PathBuf], targets: &[PathBuf]) -> Result<()> {
    let refuse = |what: String| Err(Error::new(Kind::Usage, what));
    if devices.len() != targets.len() {
        let (devices, targets) = (devices.len(), targets.len());
        return refuse(format!("{devices} --device and {targets} --target: give one --target for each --device"));
    }
    if targets.len() > 1 && targets.iter().any(|target| is_dash(target)) {
        return refuse("--target - takes one disk: of several, each needs a file or a device".to_owned());
    }
    if let Some((one, other)) = first_pair(devices, |one, other| one == other || identity::is_same(one, other)) {
        return refuse(format!("{} given twice: name each disk once", named("--device", one, other)));
    }
    if let Some((one, other)) = first_pair(targets, is_one_target) {
        return refuse(format!("{} given twice: each disk needs a target of its own", named("--target", one, other)));
    }
    for (disk, target) in targets.iter().enumerate() {
        let others = devices.iter().enumerate().filter(|(other, _)| *other != disk);
        if let Some((_, device)) = others.into_iter().find(|(_, device)| identity::is_overlapping(device, target)) {
            let (device, target) = (Location::shown(device), Location::shown(target));
            return refuse(format!("--target '{target}' holds bytes of --device '{device}': name another target"));
        }
    }
    Ok(())
}

/// Refuses manifests that are not one for each disk, or that would be written over a disk, a copy or each other.
pub fn check_manifests(devices: &[PathBuf], targets: &[PathBuf], manifests: &[PathBuf]) -> Result<()> {
    let refuse = |what: String| Err(Error::new(Kind::Usage, what));
    if !manifests.is_empty() && manifests.len() != devices.len() {
        let (devices, manifests) = (devices.len(), manifests.len());
        return refuse(format!("{devices} --device and {manifests} --manifest: give one for each --device, or none"));
    }
    if let Some(dash) = manifests.iter().find(|manifest| is_dash(manifest)) {
        return refuse(format!("--manifest {}: it is published as a file; name one", dash.display()));
    }
    if let Some((one, other)) = first_pair(manifests, is_one_target) {
        return refuse(format!("{} given twice: each disk has its own", named("--manifest", one, other)));
    }
    for manifest in manifests {
        if let Some(other) =
            devices.iter().chain(targets).find(|other| !is_dash(other) && is_one_target(manifest, other))
        {
            let (manifest, other) = (Location::shown(manifest), Location::shown(other));
            return refuse(format!("--manifest '{manifest}' is '{other}' too: name another file"));
        }
    }
    Ok(())
}

/// Refuses `file`, which `flag` names for monitors, if it would take the place of one of `others`.
pub fn check_file<'a>(flag: &str, file: &Path, others: impl IntoIterator<Item = &'a PathBuf>) -> Result<()> {
    match others.into_iter().find(|other| !is_dash(other) && is_one_target(file, other)) {
        None => Ok(()),
        Some(other) => {
            let (file, other) = (Location::shown(file), Location::shown(other));
            Err(Error::new(Kind::Usage, format!("{flag} '{file}' is '{other}' too: name another file")))
        }
    }
}

fn is_one_target(one: &Path, other: &Path) -> bool {
    let leads_to_one = || place(one).is_some_and(|one| place(other).is_some_and(|other| one == other));
    one == other || identity::is_overlapping(one, other) || leads_to_one()
}

fn first_pair(paths: &[PathBuf], is_one: impl Fn(&Path, &Path) -> bool) -> Option<(&Path, &Path)> {
    let later = |at: usize| paths[at + 1..].iter().map(move |other| (&*paths[at], &**other));
    (0..paths.len()).flat_map(later).find(|(one, other)| is_one(one, other))
}

fn named(flag: &str, one: &Path, other: &Path) -> String {
    let (one, other) = (Location::shown(one), Location::shown(other));
    if one == other { format!("{flag} '{one}' is") } else { format!("{flag} '{one}' and '{other}' are one,") }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::symlink;

    fn refusal(devices: &[PathBuf], targets: &[PathBuf]) -> String {
        let error = check(devices, targets).expect_err("refused");
        assert_eq!(error.kind(), Kind::Usage);
        error.to_string()
    }

    #[test]
    fn no_password_is_in_a_refusal() {
        let paths = |words: &[&str]| words.iter().map(PathBuf::from).collect::<Vec<_>>();
        let (disk, files) = ("https://alice:hunter2@h/x", paths(&["t", "u"]));
        let refusals = [
            refusal(&paths(&[disk, disk]), &files),
            refusal(&files, &paths(&[disk, disk])),
            check_manifests(&paths(&[disk]), &paths(&["t"]), &paths(&[disk])).unwrap_err().to_string(),
            check_file("--status-file", Path::new(disk), &paths(&[disk])).unwrap_err().to_string(),
        ];
        for text in refusals {
            assert!(text.contains("'https://alice:…@h/x'") && !text.contains("hunter2"), "{text}");
        }
    }

    #[test]
    fn one_disk_under_two_names_is_found() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        for name in ["a", "b", "x"] {
            fs::write(at(name), name).unwrap();
        }
        symlink("a", at("link")).unwrap();
        fs::hard_link(at("a"), at("hard")).unwrap();
        symlink("new", at("dangling")).unwrap();
        fs::create_dir(at("folder")).unwrap();
        let (devices, aliased) = ([at("a"), at("b")], at("folder/../new"));
        check(&devices, &[at("x"), at("new")]).unwrap();
        for alias in ["a", "link", "hard"] {
            assert!(refusal(&[at("a"), at(alias)], &[at("x"), at("y")]).contains("--device"), "{alias}");
        }
        fs::hard_link(at("x"), at("other x")).unwrap();
        let aliases = [(at("x"), at("other x")), (at("new"), at("dangling")), (at("new"), aliased)];
        for (one, other) in [(at("x"), at("x"))].into_iter().chain(aliases) {
            assert!(refusal(&devices, &[one, other]).contains("given twice: each disk needs a target"));
        }
        // Each pair for itself is fine.
        assert!(refusal(&devices, &[at("x"), at("link")]).contains("holds bytes of --device"));
    }
}
