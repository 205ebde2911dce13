//! A layer over its backing file, over the backing file's own, and so on: seen as one disk.
//!
//! What a layer has unallocated, the next one answers for; what no layer has is zero, and so is what lies past the end
//! of a shorter backing file.

use super::{Image, Properties};
use crate::ground::range::{Allocation, ByteRange, Extent};
use std::io;
use std::sync::{Arc, Mutex};

/// Extents of layers that one call merges at most: more would not be cheap.
const MERGE_LIMIT: usize = 1 << 14;

/// Layers, the top one first. Read-only.
pub struct Chain {
    layers: Vec<Arc<dyn Image>>,
    /// For each layer, what was last found unallocated in it: long runs are not searched for their end again for
    /// every extent of the layer below. Taken out while in use.
    unallocated: Mutex<Vec<ByteRange>>,
}

impl Chain {
    /// `layers`, the top one first; there must be one at least. The top one's length is the disk's.
    pub fn new(layers: Vec<Arc<dyn Image>>) -> Self {
        assert!(!layers.is_empty(), "a chain has a top");
        Self { layers, unallocated: Mutex::default() }
    }

    /// The first bytes of `range` that one layer answers for alone, and that layer; `None` when none does. In
    /// `unallocated` is for each layer a range known to be.
    fn locate(&self, range: ByteRange, unallocated: &mut [ByteRange]) -> io::Result<(Option<usize>, Extent)> {
        let mut range = range;
        for (index, layer) in self.layers.iter().enumerate() {
            match layer.length() {
                // No layer below may show through what this one cuts off.
                length if length <= range.offset => break,
                length => range = range.prefix(length - range.offset),
            }
            let known = unallocated[index].intersect(range);
            if known.offset == range.offset && !known.is_empty() {
                range = known;
                continue;
            }
            let extent = layer.block_status(range)?;
            if extent.allocation != Allocation::Unallocated {
                return Ok((Some(index), extent));
            }
            unallocated[index] = extent.range;
            range = extent.range;
        }
        Ok((None, Extent::zero(range)))
    }
}

impl Image for Chain {
    fn length(&self) -> u64 {
        self.layers[0].length()
    }

    fn block_status(&self, range: ByteRange) -> io::Result<Extent> {
        let lock = || self.unallocated.lock().expect("nothing panics under this lock");
        let mut unallocated = std::mem::take(&mut *lock());
        unallocated.resize(self.layers.len(), ByteRange::default());
        let (_, mut found) = self.locate(range, &mut unallocated)?;
        for _ in 0..MERGE_LIMIT {
            if found.range.end() == range.end() {
                break;
            }
            let rest = ByteRange::between(found.range.end(), range.end());
            let (_, next) = self.locate(rest, &mut unallocated)?;
            if next.allocation != found.allocation {
                break;
            }
            found.range.length += next.range.length;
        }
        *lock() = unallocated;
        Ok(found)
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        if self.layers.len() == 1 {
            return self.layers[0].read_at(buf, offset);
        }
        let mut unallocated = vec![ByteRange::default(); self.layers.len()];
        let mut rest = buf;
        let mut at = offset;
        while !rest.is_empty() {
            let (layer, extent) = self.locate(ByteRange::new(at, rest.len() as u64), &mut unallocated)?;
            let (output, after) = rest.split_at_mut(extent.range.length as usize);
            match (layer, extent.allocation) {
                (Some(layer), Allocation::Data) => self.layers[layer].read_at(output, at)?,
                _ => output.fill(0),
            }
            at = extent.range.end();
            rest = after;
        }
        Ok(())
    }

    fn write_at(&self, _buf: &[u8], _offset: u64) -> io::Result<()> {
        Err(read_only())
    }

    fn write_zeroes(&self, _range: ByteRange) -> io::Result<()> {
        Err(read_only())
    }

    fn discard(&self, _range: ByteRange) -> io::Result<()> {
        Err(read_only())
    }

    fn flush(&self) -> io::Result<()> {
        Ok(())
    }

    fn properties(&self) -> Properties {
        self.layers[0].properties()
    }
}

fn read_only() -> io::Error {
    io::Error::new(io::ErrorKind::Unsupported, "a backing chain is only read")
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

    /// A layer of one letter for each byte: `.` is unallocated, `0` is zero, others are data.
    struct Letters {
        letters: &'static str,
        asked: AtomicU64,
    }

    impl Letters {
        fn layer(letters: &'static str) -> Arc<Self> {
            Arc::new(Self { letters, asked: AtomicU64::new(0) })
        }

        fn allocation(&self, at: u64) -> Allocation {
            match self.letters.as_bytes()[at as usize] {
                b'.' => Allocation::Unallocated,
                b'0' => Allocation::Zero,
                _ => Allocation::Data,
            }
        }
    }

    impl Image for Letters {
        fn length(&self) -> u64 {
            self.letters.len() as u64
        }

        fn block_status(&self, range: ByteRange) -> io::Result<Extent> {
            assert!(range.end() <= self.length(), "asked past the end");
            self.asked.fetch_add(1, Relaxed);
            let allocation = self.allocation(range.offset);
            let end = (range.offset..range.end()).find(|at| self.allocation(*at) != allocation);
            Ok(Extent { range: ByteRange::between(range.offset, end.unwrap_or(range.end())), allocation })
        }

        fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
            let bytes = &self.letters.as_bytes()[offset as usize..][..buf.len()];
            assert!(!bytes.iter().any(|byte| b".0".contains(byte)), "read what holds nothing");
            buf.copy_from_slice(bytes);
            Ok(())
        }

        fn write_at(&self, _buf: &[u8], _offset: u64) -> io::Result<()> {
            Err(read_only())
        }

        fn write_zeroes(&self, _range: ByteRange) -> io::Result<()> {
            Err(read_only())
        }

        fn discard(&self, _range: ByteRange) -> io::Result<()> {
            Err(read_only())
        }

        fn flush(&self) -> io::Result<()> {
            Ok(())
        }

        fn properties(&self) -> Properties {
            Properties { cluster_size: 1, alignment: 1, reads_zero: false, sequential: false }
        }
    }

    fn chain(layers: &[&Arc<Letters>]) -> Chain {
        Chain::new(layers.iter().map(|layer| Arc::clone(layer) as Arc<dyn Image>).collect())
    }

    fn contents(chain: &Chain) -> String {
        let mut bytes = vec![b'!'; chain.length() as usize];
        chain.read_at(&mut bytes, 0).expect("reads");
        String::from_utf8(bytes).expect("letters").replace('\0', "0")
    }

    fn extents(chain: &Chain) -> String {
        let mut text = String::new();
        let mut at = 0;
        while at < chain.length() {
            let extent = chain.block_status(ByteRange::between(at, chain.length())).expect("asks");
            assert_eq!(extent.range.offset, at);
            text.push_str(&format!("{}{:?} ", extent.range.length, extent.allocation));
            at = extent.range.end();
        }
        text.trim_end().to_owned()
    }

    #[test]
    fn the_uppermost_layer_that_has_it_answers() {
        let layers = [Letters::layer("a.0..d"), Letters::layer("xy..ux"), Letters::layer("123456")];
        let chain = chain(&layers.each_ref());
        assert_eq!(contents(&chain), "ay04ud");
        assert_eq!(extents(&chain), "2Data 1Zero 3Data");
    }

    #[test]
    fn nothing_is_unallocated_above_the_chain() {
        let layers = [Letters::layer("a..0."), Letters::layer("...yz")];
        assert_eq!(extents(&chain(&[&layers[0], &layers[1]])), "1Data 3Zero 1Data");
        assert_eq!(extents(&chain(&[&layers[0]])), "1Data 4Zero");
    }

    #[test]
    fn past_the_end_of_a_shorter_backing_file_is_zero() {
        let layers = [Letters::layer("a......"), Letters::layer("xyz"), Letters::layer("1234567")];
        let two = chain(&[&layers[0], &layers[1]]);
        assert_eq!((contents(&two).as_str(), extents(&two).as_str()), ("ayz0000", "3Data 4Zero"));
        let three = chain(&layers.each_ref());
        assert_eq!(contents(&three), "ayz0000", "the bottom does not show past the middle's end");
        let empty = [Letters::layer("..."), Letters::layer("")];
        assert_eq!(contents(&chain(&empty.each_ref())), "000");
    }

    #[test]
    fn a_longer_backing_file_is_cut_off() {
        let layers = [Letters::layer("a."), Letters::layer("xyz")];
        assert_eq!(contents(&chain(&layers.each_ref())), "ay");
    }

    #[test]
    fn a_long_unallocated_run_is_searched_once() {
        let layers = [Letters::layer("................"), Letters::layer("x0x0x0x0x0x0x0x0")];
        let chain = chain(&layers.each_ref());
        assert_eq!(extents(&chain).matches("1Data").count(), 8);
        assert_eq!(layers[0].asked.load(Relaxed), 1);
    }

    #[test]
    fn every_part_of_every_chain_reads_as_a_model_does() {
        let top = "ab..00cd....0e..";
        let middle = "..mn0.o.p..q00..";
        let bottom = "zyxwvutsrq";
        let layers = [Letters::layer(top), Letters::layer(middle), Letters::layer(bottom)];
        let chain = chain(&layers.each_ref());
        let model: Vec<u8> = (0..top.len())
            .map(|at| {
                let found = [top, middle, bottom].into_iter().filter_map(|layer| layer.as_bytes().get(at));
                found.copied().find(|byte| *byte != b'.').filter(|byte| *byte != b'0').unwrap_or(0)
            })
            .collect();
        for start in 0..top.len() {
            for end in start + 1..=top.len() {
                let mut bytes = vec![b'!'; end - start];
                chain.read_at(&mut bytes, start as u64).expect("reads");
                assert_eq!(bytes, model[start..end]);
                let extent = chain.block_status(ByteRange::between(start as u64, end as u64)).expect("asks");
                let run = &model[start..extent.range.end() as usize];
                assert!(run.iter().all(|byte| (*byte == 0) == (extent.allocation == Allocation::Zero)));
            }
        }
    }
}
