//! The blocks of a disk in JSON: a string is the hash of one block, a number stands for so many blocks of zeroes.

use crate::digest::{BlockHash, Digest};
use serde::de::{Error, SeqAccess, Visitor};
use serde::ser::SerializeSeq;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use std::fmt;

/// In order, the first block first.
#[derive(Debug)]
pub struct Blocks {
    /// Zero ones too.
    count: u64,
    /// Number and hash of those that are not zero, ascending.
    hashes: Vec<(u64, BlockHash)>,
}

impl Blocks {
    pub fn of(digest: Digest) -> Self {
        Self { count: digest.blocks(), hashes: digest.hashes().to_vec() }
    }

    /// Of a disk of `length` bytes; `None` when it has another number of blocks.
    pub fn digest(self, length: u64) -> Option<Digest> {
        Digest::new(length, self.hashes).filter(|digest| digest.blocks() == self.count)
    }
}

impl Serialize for Blocks {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut list = serializer.serialize_seq(None)?;
        let mut next = 0;
        for (block, hash) in &self.hashes {
            if *block > next {
                list.serialize_element(&(block - next))?;
            }
            list.serialize_element(blake3::Hash::from_bytes(*hash).to_hex().as_str())?;
            next = block + 1;
        }
        if self.count > next {
            list.serialize_element(&(self.count - next))?;
        }
        list.end()
    }
}

impl<'de> Deserialize<'de> for Blocks {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_seq(ListVisitor)
    }
}

/// One entry of the list.
enum Entry {
    Zeroes(u64),
    Hash(BlockHash),
}

struct ListVisitor;

impl<'de> Visitor<'de> for ListVisitor {
    type Value = Blocks;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a list of blocks")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Blocks, A::Error> {
        let mut blocks = Blocks { count: 0, hashes: Vec::new() };
        while let Some(entry) = list.next_element()? {
            let count = match entry {
                Entry::Zeroes(count) => count,
                Entry::Hash(hash) => {
                    blocks.hashes.push((blocks.count, hash));
                    1
                }
            };
            blocks.count = blocks.count.checked_add(count).ok_or_else(|| Error::custom("too many blocks"))?;
        }
        Ok(blocks)
    }
}

impl<'de> Deserialize<'de> for Entry {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(EntryVisitor)
    }
}

struct EntryVisitor;

impl Visitor<'_> for EntryVisitor {
    type Value = Entry;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a block's hash or a number of zero blocks")
    }

    fn visit_u64<E: Error>(self, count: u64) -> Result<Entry, E> {
        Ok(Entry::Zeroes(count))
    }

    fn visit_str<E: Error>(self, text: &str) -> Result<Entry, E> {
        let hash =
            blake3::Hash::from_hex(text).map_err(|_| Error::custom("a block's hash has 64 hexadecimal digits"))?;
        Ok(Entry::Hash(*hash.as_bytes()))
    }
}
