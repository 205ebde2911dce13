//! What was read or inflated lately: bounded in bytes for a whole backing chain, shared by all threads.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, PoisonError};

/// An L2 table's words in the machine's byte order.
pub type Table = Arc<[u64]>;
/// A layer of the chain, and an offset in it.
type Key = (u32, u64);

/// An inflated cluster, once it is inflated.
type Slot = Arc<Mutex<Option<Arc<[u8]>>>>;

/// Bytes of L2 tables.
const TABLES_LIMIT: usize = 16 << 20;
/// Bytes of inflated clusters, or one cluster if that is more.
const CLUSTERS_LIMIT: usize = 8 << 20;

/// L2 tables by host offset, and inflated clusters of which only a part was wanted by guest offset: the rest is likely
/// wanted next. A clone is for another layer of the same chain, and shares the bounds.
pub struct Cache {
    layer: u32,
    shared: Arc<Shared>,
}

struct Shared {
    tables: Mutex<Tables>,
    clusters: Mutex<Clusters>,
}

/// Two generations: a table that is used moves to the young one, and when that is full, the old one is forgotten. So
/// every step is O(1), and what was used within the last half of the bound stays.
#[derive(Default)]
struct Tables {
    young: HashMap<Key, Table>,
    young_size: usize,
    old: HashMap<Key, Table>,
}

/// The newest first.
#[derive(Default)]
struct Clusters {
    size: usize,
    list: VecDeque<(Key, usize, Slot)>,
}

impl Default for Cache {
    fn default() -> Self {
        Self { layer: 0, shared: Arc::new(Shared { tables: Mutex::default(), clusters: Mutex::default() }) }
    }
}

impl Cache {
    /// For layer `layer` of the chain.
    pub fn layer(&self, layer: u32) -> Self {
        Self { layer, shared: Arc::clone(&self.shared) }
    }

    /// The table at host offset `offset`, from memory or by `load`, which runs without the lock.
    pub(super) fn table<E>(&self, offset: u64, load: impl FnOnce() -> Result<Table, E>) -> Result<Table, E> {
        let key = (self.layer, offset);
        let lock = || self.shared.tables.lock().expect("nothing panics under this lock");
        if let Some(table) = lock().find(key) {
            return Ok(table);
        }
        let table = load()?;
        lock().insert(key, table.clone());
        Ok(table)
    }

    /// The inflated cluster of `size` bytes at guest offset `offset`, from memory or by `inflate`. Blocks while another
    /// thread inflates it: side by side, two halves of a large cluster are otherwise inflated twice.
    pub(super) fn cluster<E>(
        &self,
        offset: u64,
        size: usize,
        inflate: impl FnOnce(&mut [u8]) -> Result<(), E>,
    ) -> Result<Arc<[u8]>, E> {
        let slot =
            self.shared.clusters.lock().expect("nothing panics under this lock").slot((self.layer, offset), size);
        // A panic while inflating leaves the slot empty, and so does a failure: the next one tries again.
        let mut slot = slot.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(cluster) = &*slot {
            return Ok(cluster.clone());
        }
        let mut cluster = vec![0; size];
        inflate(&mut cluster)?;
        Ok(slot.insert(cluster.into()).clone())
    }
}

impl Tables {
    fn find(&mut self, key: Key) -> Option<Table> {
        if let Some(table) = self.young.get(&key) {
            return Some(table.clone());
        }
        let table = self.old.remove(&key)?;
        self.insert(key, table.clone());
        Some(table)
    }

    fn insert(&mut self, key: Key, table: Table) {
        let size = size_of_val(&*table);
        if self.young_size + size > TABLES_LIMIT / 2 {
            self.old = std::mem::take(&mut self.young);
            self.young_size = 0;
        }
        if self.young.insert(key, table).is_none() {
            self.young_size += size;
        }
    }
}

impl Clusters {
    /// The place for a cluster of `size` bytes: filled, being filled, or empty.
    fn slot(&mut self, key: Key, size: usize) -> Slot {
        if let Some((_, _, slot)) = self.list.iter().find(|(at, _, _)| *at == key) {
            return slot.clone();
        }
        let slot = Slot::default();
        self.size += size;
        self.list.push_front((key, size, slot.clone()));
        // The list is searched from the front: it must be short, too.
        while self.list.len() > 1 && (self.size > CLUSTERS_LIMIT || self.list.len() > 64) {
            self.size -= self.list.pop_back().map_or(0, |(_, size, _)| size);
        }
        slot
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::convert::Infallible;
    use std::sync::Barrier;
    use std::sync::atomic::{AtomicU32, Ordering::Relaxed};

    /// Whether a table of `size` bytes had to be loaded.
    fn loads(cache: &Cache, offset: u64, size: usize) -> bool {
        let mut loaded = false;
        let load = || {
            loaded = true;
            Ok::<_, Infallible>(vec![offset; size / 8].into())
        };
        assert_eq!(cache.table(offset, load).expect("infallible")[0], offset);
        loaded
    }

    fn inflates(cache: &Cache, offset: u64, size: usize) -> bool {
        let mut inflated = false;
        let inflate = |cluster: &mut [u8]| {
            inflated = true;
            cluster.fill(offset as u8);
            Ok::<_, Infallible>(())
        };
        assert_eq!(cache.cluster(offset, size, inflate).expect("infallible")[0], offset as u8);
        inflated
    }

    #[test]
    fn a_table_is_loaded_once_while_it_is_used() {
        let cache = Cache::default();
        assert!(loads(&cache, 7, 1 << 20));
        for other in 100..200 {
            assert!(loads(&cache, other, 1 << 20));
            assert!(!loads(&cache, 7, 1 << 20), "used all the time");
        }
    }

    #[test]
    fn tables_in_memory_are_bounded() {
        let cache = Cache::default();
        (0..1000).for_each(|offset| assert!(loads(&cache.layer(offset as u32 % 3), offset, 1 << 20)));
        let tables = cache.shared.tables.lock().expect("not poisoned");
        assert!((8..=16).contains(&(tables.young.len() + tables.old.len())));
    }

    #[test]
    fn layers_have_each_their_own() {
        let cache = Cache::default();
        assert!(loads(&cache.layer(0), 7, 512) && loads(&cache.layer(1), 7, 512));
        assert!(inflates(&cache.layer(0), 7, 512) && inflates(&cache.layer(1), 7, 512));
    }

    #[test]
    fn the_last_few_clusters_are_inflated_once() {
        let cache = Cache::default();
        assert!(inflates(&cache, 1, 4 << 20) && !inflates(&cache, 1, 4 << 20));
        assert!(inflates(&cache, 2, 4 << 20) && !inflates(&cache, 1, 4 << 20) && !inflates(&cache, 2, 4 << 20));
        assert!(inflates(&cache, 3, 4 << 20) && !inflates(&cache, 2, 4 << 20) && inflates(&cache, 1, 4 << 20));
    }

    #[test]
    fn two_threads_that_want_one_cluster_inflate_it_once() {
        let cache = Cache::default();
        let inflated = AtomicU32::new(0);
        let both = Barrier::new(2);
        let want = || {
            both.wait();
            let inflate = |_: &mut [u8]| {
                inflated.fetch_add(1, Relaxed);
                Ok::<_, Infallible>(())
            };
            cache.cluster(7, 512, inflate).expect("infallible");
        };
        std::thread::scope(|scope| [scope.spawn(want), scope.spawn(want)].map(|thread| thread.join().expect("ends")));
        assert_eq!(inflated.load(Relaxed), 1);
    }

    #[test]
    fn a_failure_is_not_remembered() {
        let cache = Cache::default();
        assert_eq!(cache.table(7, || Err("no")), Err("no"));
        assert!(loads(&cache, 7, 512));
        assert_eq!(cache.cluster(7, 512, |_| Err("no")), Err("no"));
        assert!(inflates(&cache, 7, 512));
    }
}
