//! Which guest clusters were written, and where they went: runs, so that memory follows what was written and not the
//! size of the disk.

use std::collections::BTreeMap;
use std::ops::Range;

/// Where the clusters of one run are in the file. Offsets in bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Place {
    /// Whole clusters, one after the other.
    Plain { host: u64 },
    /// Compressed clusters, one after the other: the bytes that each one takes.
    Packed { host: u64, lengths: Box<[u32]> },
    /// Nowhere: they read as zeroes, whatever the backing file holds.
    Zero,
}

/// Consecutive guest clusters that are consecutive in the file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Run {
    /// Number of clusters, at least 1.
    pub count: u64,
    /// In the file.
    pub place: Place,
}

impl Run {
    /// `count` whole clusters from byte `host` on.
    pub fn plain(host: u64, count: u64) -> Self {
        Self { count, place: Place::Plain { host } }
    }

    /// One compressed cluster for each length, from byte `host` on.
    pub fn packed(host: u64, lengths: &[u32]) -> Self {
        Self { count: lengths.len() as u64, place: Place::Packed { host, lengths: lengths.into() } }
    }

    /// `count` clusters of zeroes.
    pub fn zero(count: u64) -> Self {
        Self { count, place: Place::Zero }
    }

    /// Its clusters from number `from` up to, without, `to`.
    fn part(&self, from: u64, to: u64, cluster_size: u64) -> Self {
        match &self.place {
            Place::Plain { host } => Self::plain(host + from * cluster_size, to - from),
            Place::Zero => Self::zero(to - from),
            Place::Packed { host, lengths } => {
                let before: u64 = lengths[..from as usize].iter().map(|&length| u64::from(length)).sum();
                Self::packed(host + before, &lengths[from as usize..to as usize])
            }
        }
    }
}

/// Runs by their first guest cluster; no two overlap.
#[derive(Debug)]
pub struct RunMap {
    runs: BTreeMap<u64, Run>,
    cluster_size: u64,
}

impl RunMap {
    /// Nothing was written.
    pub fn new(cluster_size: u64) -> Self {
        Self { runs: BTreeMap::new(), cluster_size }
    }

    /// In guest order: first cluster and run.
    pub fn iter(&self) -> impl Iterator<Item = (u64, &Run)> {
        self.runs.iter().map(|(&first, run)| (first, run))
    }

    /// The run that holds `cluster`, and its first cluster.
    pub fn find(&self, cluster: u64) -> Option<(u64, &Run)> {
        let (&first, run) = self.runs.range(..=cluster).next_back()?;
        (cluster < first + run.count).then_some((first, run))
    }

    /// First cluster of the first run at or after `cluster`.
    pub fn next_from(&self, cluster: u64) -> Option<u64> {
        self.runs.range(cluster..).next().map(|(&first, _)| first)
    }

    /// `run` now holds the clusters from `first` on; what held them before no longer does.
    pub fn insert(&mut self, first: u64, run: Run) {
        self.remove(first..first + run.count);
        if !self.extend_previous(first, &run) {
            self.runs.insert(first, run);
        }
    }

    /// Nothing holds these clusters any more. None of them, when the range ends where it starts or before.
    pub fn remove(&mut self, clusters: Range<u64>) {
        if clusters.is_empty() {
            return;
        }
        while let Some((&first, _)) = self.runs.range(..clusters.end).next_back() {
            let run = &self.runs[&first];
            let end = first + run.count;
            if end <= clusters.start {
                return;
            }
            let head = (first < clusters.start).then(|| run.part(0, clusters.start - first, self.cluster_size));
            let tail = (clusters.end < end).then(|| run.part(clusters.end - first, run.count, self.cluster_size));
            self.runs.remove(&first);
            self.runs.extend(head.map(|head| (first, head)));
            self.runs.extend(tail.map(|tail| (clusters.end, tail)));
        }
    }

    /// A copy in ascending order stays one run.
    fn extend_previous(&mut self, first: u64, run: &Run) -> bool {
        let Some((&before, previous)) = self.runs.range_mut(..first).next_back() else { return false };
        match (&previous.place, &run.place) {
            (Place::Zero, Place::Zero) if before + previous.count == first => {
                previous.count += run.count;
                true
            }
            (Place::Plain { host: old }, Place::Plain { host: new })
                if before + previous.count == first && old + previous.count * self.cluster_size == *new =>
            {
                previous.count += run.count;
                true
            }
            _ => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn hosts(map: &RunMap) -> Vec<(u64, u64, u32)> {
        let mut all = Vec::new();
        for (first, run) in map.iter() {
            match &run.place {
                Place::Plain { host } => all.extend((0..run.count).map(|n| (first + n, host + n * 512, 0))),
                Place::Packed { host, lengths } => {
                    assert_eq!(run.count, lengths.len() as u64);
                    let mut at = *host;
                    for (n, &length) in lengths.iter().enumerate() {
                        all.push((first + n as u64, at, length));
                        at += u64::from(length);
                    }
                }
                Place::Zero => all.extend((0..run.count).map(|n| (first + n, 0, 0))),
            }
        }
        all
    }

    #[test]
    fn consecutive_plain_runs_are_one() {
        let mut map = RunMap::new(512);
        map.insert(4, Run::plain(1024, 2));
        map.insert(6, Run::plain(2048, 3));
        assert_eq!(map.iter().collect::<Vec<_>>(), [(4, &Run::plain(1024, 5))]);
        map.insert(9, Run::plain(4096, 1));
        assert_eq!(map.iter().count(), 2, "not consecutive in the file");
        map.insert(10, Run::zero(2));
        map.insert(12, Run::zero(5));
        assert_eq!(map.iter().last(), Some((10, &Run::zero(7))));
    }

    proptest! {
        #[test]
        fn the_last_write_of_a_cluster_holds(
            steps in proptest::collection::vec((0u64..40, 1u64..12, 0u8..5), 1..40)
        ) {
            let mut map = RunMap::new(512);
            let mut model = std::collections::BTreeMap::new();
            let mut host = 512u64;
            for (first, count, kind) in steps {
                if kind == 4 {
                    map.remove(first + count..first);
                    prop_assert_eq!(hosts(&map).len(), model.len());
                    continue;
                }
                for cluster in first..first + count {
                    model.remove(&cluster);
                }
                match kind {
                    0 => map.remove(first..first + count),
                    3 => {
                        map.insert(first, Run::zero(count));
                        model.extend((0..count).map(|n| (first + n, (0, 0))));
                    }
                    1 => {
                        map.insert(first, Run::plain(host, count));
                        model.extend((0..count).map(|n| (first + n, (host + n * 512, 0))));
                    }
                    _ => {
                        let lengths: Vec<u32> = (0..count).map(|n| 64 + n as u32).collect();
                        map.insert(first, Run::packed(host, &lengths));
                        let mut at = host;
                        for (n, &length) in lengths.iter().enumerate() {
                            model.insert(first + n as u64, (at, length));
                            at += u64::from(length);
                        }
                    }
                }
                host += 512 * (count + 1);
                let expected: Vec<_> = model.iter().map(|(&cluster, &(at, length))| (cluster, at, length)).collect();
                prop_assert_eq!(hosts(&map), expected);
            }
        }
    }
}
