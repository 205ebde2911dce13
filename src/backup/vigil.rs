//! Whether the source's files were changed by anybody who was not trapped, where nothing else keeps the instant.
//!
//! | the instant | the image, its data files | backing files |
//! |---|---|---|
//! | there was no writer | must not change until the end, or until a writer comes: from then on it is the writer's to change them | must not change until the end |
//! | writers were frozen | are theirs to change, trapped | must not change until the end |

use crate::error::Result;
use crate::image::open::{Role, SourceFile};
use crate::image::stability::Fingerprint;
use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// See the module. Shared by the backup and by whoever lets writers in.
pub struct Vigil {
    watched: Vec<Watched>,
    met: Mutex<Met>,
}

struct Watched {
    file: SourceFile,
    at_instant: Fingerprint,
}

/// How all watched files looked at one moment.
pub type Look = Vec<Fingerprint>;

/// The first writer that started after the instant.
enum Met {
    Nobody,
    /// How it was before one came that may still turn out to be dead.
    Maybe(Result<Look>),
    /// It was attached, after this look.
    Somebody(Result<Look>),
}

impl Vigil {
    /// Begins with how `files` look at the instant, for which writers were `frozen` or there was none. Blocks while a device's
    /// dirty pages are written.
    pub fn begin(files: &[SourceFile], frozen: bool) -> Result<Self> {
        let is_watched = |file: &&SourceFile| !frozen || file.role == Role::Backing;
        let watch = |file: &SourceFile| Ok(Watched { at_instant: file.look()?, file: file.clone() });
        let watched = files.iter().filter(is_watched).map(watch).collect::<Result<_>>()?;
        Ok(Self { watched, met: Mutex::new(Met::Nobody) })
    }

    /// How they look now. Blocks like [`Vigil::begin`].
    pub fn look(&self) -> Result<Look> {
        self.watched.iter().map(|watched| watched.file.look()).collect()
    }

    /// A writer may have started: looks, while it has written nothing yet.
    pub fn writer_may_come(&self) {
        let mut met = self.met();
        if !matches!(*met, Met::Somebody(_)) {
            *met = Met::Maybe(self.look());
        }
    }

    /// It did, and is attached: what changes from now on may be its own.
    pub fn writer_came(&self) {
        let mut met = self.met();
        *met = match std::mem::replace(&mut *met, Met::Nobody) {
            Met::Maybe(look) | Met::Somebody(look) => Met::Somebody(look),
            Met::Nobody => Met::Somebody(self.look()),
        };
    }

    /// The first file that changed in a way that nobody was trapped for, and what is different; `now` is how all looked after
    /// the last read, and no writer may come any more. Asked once.
    pub fn change(&self, now: &Look) -> Result<Option<(&Path, String)>> {
        let met = std::mem::replace(&mut *self.met(), Met::Nobody);
        let met = if let Met::Somebody(look) = met { Some(look?) } else { None };
        let mut each = self.watched.iter().enumerate();
        Ok(each.find_map(|(place, Watched { file, at_instant })| {
            let last = match &met {
                Some(before) if file.role != Role::Backing => &before[place],
                _ => &now[place],
            };
            Some((file.path.as_path(), last.changed_since(at_instant)?))
        }))
    }

    /// Of what can be told at once, such as a device that is mounted.
    pub fn change_at_once(&self) -> Option<(&Path, String)> {
        self.watched
            .iter()
            .find_map(|Watched { file, at_instant }| Some((file.path.as_path(), at_instant.changed_since(at_instant)?)))
    }

    // Whoever panicked has left a whole value.
    fn met(&self) -> MutexGuard<'_, Met> {
        self.met.lock().unwrap_or_else(PoisonError::into_inner)
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
    fn frozen_writers_may_change_their_image() {
        let chain = Chain::new();
        let vigil = chain.begin(true);
        chain.change("top");
        assert_eq!(changed(&vigil), None);
    }
}
