//! Whether the source's files were changed by anybody who was not trapped, where nothing else keeps the instant.
//!
//! Backing files must not change until the end. The image and its data files are for those to change who are trapped, as long as
//! one of them is attached: they must not change while none is, from the instant on if there was none, after the last one has
//! left, until the next one comes, and to the end.

use crate::error::Result;
use crate::image::open::{Role, SourceFile};
use crate::image::stability::Fingerprint;
use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// See the module. Shared by the backup and by whoever lets writers in.
pub struct Vigil {
    watched: Vec<Watched>,
    quiet: Mutex<Quiet>,
}

struct Watched {
    file: SourceFile,
    /// `None`: it was writers' then, and a look at a device waits for its dirty pages while they are frozen.
    at_instant: Option<Fingerprint>,
}

/// How the watched files looked at one moment; `None`: a file that writers change was not looked at.
pub type Look = Vec<Option<Fingerprint>>;

/// When the image is nobody's to change.
struct Quiet {
    /// How it was when that began; `None`: a writer is attached.
    since: Option<Result<Look>>,
    /// How it was before a writer came that may still turn out to be dead.
    maybe_until: Option<Result<Look>>,
    /// What changed in one that is over: the file's place and what was different.
    changed: Option<Result<(usize, String)>>,
}

impl Vigil {
    /// Begins with how `files` look at the instant, for which writers were `frozen` or there was none. Blocks while a device's
    /// dirty pages are written.
    pub fn begin(files: &[SourceFile], frozen: bool) -> Result<Self> {
        let is_watched = |file: &SourceFile| !frozen || file.role == Role::Backing;
        let look = |file: &SourceFile| is_watched(file).then(|| file.look()).transpose();
        let watch = |file: &SourceFile| Ok(Watched { at_instant: look(file)?, file: file.clone() });
        let watched: Vec<Watched> = files.iter().map(watch).collect::<Result<_>>()?;
        let at_instant = || Ok(watched.iter().map(|watched| watched.at_instant.clone()).collect());
        let since = (!frozen).then(at_instant);
        Ok(Self { watched, quiet: Mutex::new(Quiet { since, maybe_until: None, changed: None }) })
    }

    /// How they look now, but for those that writers change. Blocks like [`Vigil::begin`].
    pub fn look(&self) -> Result<Look> {
        let all = self.quiet().since.is_some();
        self.look_at(|file| all || file.role == Role::Backing)
    }

    fn look_at(&self, is_wanted: impl Fn(&SourceFile) -> bool) -> Result<Look> {
        let look = |Watched { file, .. }: &Watched| is_wanted(file).then(|| file.look()).transpose();
        self.watched.iter().map(look).collect()
    }

    fn look_at_image(&self) -> Result<Look> {
        self.look_at(|file| file.role != Role::Backing)
    }

    /// A writer may have started: looks, while it has written nothing yet.
    pub fn writer_may_come(&self) {
        let mut quiet = self.quiet();
        if quiet.since.is_some() {
            quiet.maybe_until = Some(self.look_at_image());
        }
    }

    /// It did, and is attached: what changes from now on may be its own.
    pub fn writer_came(&self) {
        let mut quiet = self.quiet();
        let Some(since) = quiet.since.take() else { return };
        let until = quiet.maybe_until.take().unwrap_or_else(|| self.look_at_image());
        let changed = since.and_then(|since| Ok(self.image_changed(&since, &until?))).transpose();
        quiet.changed = quiet.changed.take().or(changed);
    }

    /// The last of them has left: looks, and from now on it is nobody's to change.
    pub fn writers_left(&self) {
        let mut quiet = self.quiet();
        if quiet.since.is_none() {
            quiet.since = Some(self.look_at_image());
        }
    }

    /// Where the image is different in `now`.
    fn image_changed(&self, before: &Look, now: &Look) -> Option<(usize, String)> {
        let each = self.watched.iter().zip(before.iter().zip(now)).enumerate();
        each.filter(|(_, (watched, _))| watched.file.role != Role::Backing)
            .find_map(|(place, (_, (before, now)))| Some((place, now.as_ref()?.changed_since(before.as_ref()?)?)))
    }

    /// The first file that changed in a way that nobody was trapped for, and what is different; `now` is how all looked after
    /// the last read.
    pub fn change(&self, now: &Look) -> Result<Option<(&Path, String)>> {
        let mut quiet = self.quiet();
        let mut changed = quiet.changed.take().transpose()?;
        quiet.changed = changed.clone().map(Ok);
        if let Some(since) = quiet.since.take().transpose()? {
            changed = changed.or_else(|| self.image_changed(&since, now));
            quiet.since = Some(Ok(since));
        }
        let backing = || {
            self.watched.iter().zip(now).enumerate().find_map(|(place, (watched, now))| {
                let now = now.as_ref().filter(|_| watched.file.role == Role::Backing)?;
                Some((place, now.written_since(watched.at_instant.as_ref()?)?))
            })
        };
        Ok(changed.or_else(backing).map(|(place, what)| (self.watched[place].file.path.as_path(), what)))
    }

    /// Of what can be told at once, such as a device that is mounted.
    pub fn change_at_once(&self) -> Option<(&Path, String)> {
        self.watched.iter().find_map(|Watched { file, at_instant }| {
            let look = at_instant.as_ref()?;
            Some((file.path.as_path(), look.changed_since(look)?))
        })
    }

    // Whoever panicked has left a whole value.
    fn quiet(&self) -> MutexGuard<'_, Quiet> {
        self.quiet.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Side;
    use crate::image::raw::Raw;
    use std::fs::{self, File};
    use std::sync::Arc;

    /// A backing file and what is over it.
    struct Chain(tempfile::TempDir);

    impl Chain {
        fn new() -> Self {
            let folder = tempfile::tempdir().unwrap();
            for name in ["top", "base"] {
                fs::write(folder.path().join(name), [7; 4096]).unwrap();
            }
            Self(folder)
        }

        fn begin(&self, frozen: bool) -> Vigil {
            let file = |name, role| {
                let path = self.0.path().join(name);
                SourceFile { raw: Arc::new(Raw::open(&path, Side::Source).unwrap()), path, role }
            };
            Vigil::begin(&[file("top", Role::Image), file("base", Role::Backing)], frozen).unwrap()
        }

        /// In a way that takes no tick of the clock to be seen.
        fn change(&self, name: &str) {
            let file = File::options().append(true).open(self.0.path().join(name)).unwrap();
            file.set_len(file.metadata().unwrap().len() + 1).unwrap();
        }
    }

    fn changed(vigil: &Vigil) -> Option<String> {
        let now = vigil.look().unwrap();
        vigil.change(&now).unwrap().map(|(path, _)| path.file_name().unwrap().to_string_lossy().into_owned())
    }

    #[test]
    fn a_source_without_writers_must_not_change() {
        for name in ["top", "base"] {
            let chain = Chain::new();
            let vigil = chain.begin(false);
            assert_eq!(vigil.change_at_once(), None);
            assert_eq!(changed(&vigil), None);
            chain.change(name);
            assert_eq!(changed(&vigil).as_deref(), Some(name));
        }
    }

    #[test]
    fn what_changes_once_a_writer_came_is_the_writers() {
        let chain = Chain::new();
        let vigil = chain.begin(false);
        vigil.writer_may_come();
        vigil.writer_came();
        chain.change("top");
        // Another one.
        vigil.writer_may_come();
        vigil.writer_came();
        assert_eq!(changed(&vigil), None);
    }

    #[test]
    fn what_changed_before_a_writer_came_is_nobodys() {
        let chain = Chain::new();
        let vigil = chain.begin(false);
        chain.change("top");
        vigil.writer_may_come();
        vigil.writer_came();
        assert_eq!(changed(&vigil).as_deref(), Some("top"));
    }

    #[test]
    fn a_writer_that_was_dead_changed_nothing() {
        let chain = Chain::new();
        let vigil = chain.begin(false);
        vigil.writer_may_come();
        chain.change("top");
        assert_eq!(changed(&vigil).as_deref(), Some("top"));
        vigil.writer_may_come();
        vigil.writer_came();
        assert_eq!(changed(&vigil).as_deref(), Some("top"), "the look before the one that lives counts");
    }

    #[test]
    fn backing_files_are_no_writers() {
        for frozen in [false, true] {
            let chain = Chain::new();
            let vigil = chain.begin(frozen);
            chain.change("base");
            vigil.writer_may_come();
            vigil.writer_came();
            assert_eq!(changed(&vigil).as_deref(), Some("base"), "{frozen}");
        }
        for frozen in [false, true] {
            let chain = Chain::new();
            let vigil = chain.begin(frozen);
            vigil.writer_may_come();
            vigil.writer_came();
            chain.change("base");
            assert_eq!(changed(&vigil).as_deref(), Some("base"), "{frozen}");
        }
    }

    #[test]
    fn what_changes_after_the_last_writer_has_left_is_nobodys() {
        for frozen in [false, true] {
            for (is_changed, comes_again) in [(false, false), (false, true), (true, false), (true, true)] {
                let chain = Chain::new();
                let vigil = chain.begin(frozen);
                if !frozen {
                    vigil.writer_may_come();
                    vigil.writer_came();
                }
                chain.change("top");
                vigil.writers_left();
                if is_changed {
                    chain.change("top");
                }
                // One that is dead, first.
                for _ in 0..if comes_again { 2 } else { 1 } {
                    vigil.writer_may_come();
                }
                if comes_again {
                    vigil.writer_came();
                    chain.change("top");
                    vigil.writers_left();
                }
                let expected = is_changed.then_some("top");
                assert_eq!(changed(&vigil).as_deref(), expected, "{frozen} {is_changed} {comes_again}");
            }
        }
    }

    #[test]
    fn an_instant_without_writers_goes_on_when_none_leaves() {
        let chain = Chain::new();
        let vigil = chain.begin(false);
        chain.change("top");
        vigil.writers_left();
        assert_eq!(changed(&vigil).as_deref(), Some("top"));
    }

    #[test]
    fn a_backing_file_that_gets_another_mode_was_not_written() {
        let chain = Chain::new();
        let vigil = chain.begin(true);
        fs::set_permissions(chain.0.path().join("base"), std::os::unix::fs::PermissionsExt::from_mode(0o640)).unwrap();
        assert_eq!(changed(&vigil), None);
    }

    #[test]
    fn frozen_writers_may_change_their_image() {
        let chain = Chain::new();
        let vigil = chain.begin(true);
        chain.change("top");
        assert_eq!(changed(&vigil), None);
    }
}
