//! Compression of clusters, in the caller's thread, with contexts and buffers that the thread keeps.

use super::header::Compression;
use flate2::{Compress, FlushCompress, Status};
use std::cell::RefCell;
use std::io;

/// Deflate in qcow2 has a window of 4 KiB: a reader keeps no more, and refuses what reaches back further.
const DEFLATE_WINDOW_BITS: u8 = 12;

/// A compressed cluster takes at least so many bytes, so that 16 bits hold the number of those that share a cluster of
/// the file: at most 2 MiB / 64 of them.
const SHORTEST: usize = 64;

/// How clusters are compressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CompressOptions {
    /// The format.
    pub kind: Compression,
    /// 1 to 9 for zlib, 1 to 22 for zstd; more is smaller and slower.
    pub level: i32,
}

impl CompressOptions {
    /// At the level that is worth its time. Zlib 3 is as small as qemu-img's (level 6) in less than half of its time;
    /// 1 is a third larger, 6 saves one per cent. Zstd 1 is 2 per cent larger than 3 in two thirds of its time.
    pub fn default_of(kind: Compression) -> Self {
        let level = match kind {
            Compression::Zlib => 3,
            Compression::Zstd => 1,
        };
        Self { kind, level }
    }

    /// Refuses a level that `kind` does not have.
    pub(super) fn check(self) -> Result<(), String> {
        let (name, highest) = match self.kind {
            Compression::Zlib => ("zlib", 9),
            Compression::Zstd => ("zstd", 22),
        };
        if (1..=highest).contains(&self.level) {
            return Ok(());
        }
        Err(format!("compression level {} of {name} is not from 1 to {highest}", self.level))
    }
}

/// The clusters of one write, compressed.
pub struct Chunk<'a> {
    /// The compressed clusters, one after the other.
    pub bytes: &'a [u8],
    /// For each cluster the bytes that it takes, or `None` when it does not shrink.
    pub clusters: &'a [Option<u32>],
}

/// Compresses `buf` cluster by cluster, the last one padded with zeroes, and hands the result to `write`.
pub fn with_chunk<T>(
    compression: CompressOptions,
    buf: &[u8],
    cluster_size: usize,
    write: impl FnOnce(Chunk<'_>) -> io::Result<T>,
) -> io::Result<T> {
    SCRATCH.with_borrow_mut(|scratch| {
        let Scratch { encoder, bytes, clusters } = scratch;
        let encoder = match encoder {
            Some(encoder) if encoder.compression == compression => encoder,
            _ => encoder.insert(Encoder::new(compression)?),
        };
        clusters.clear();
        let mut end = 0;
        let mut padded = Vec::new();
        for cluster in buf.chunks(cluster_size) {
            let cluster = if cluster.len() == cluster_size {
                cluster
            } else {
                padded.extend_from_slice(cluster);
                padded.resize(cluster_size, 0);
                &padded
            };
            let room = encoder.bound(cluster_size).max(SHORTEST);
            bytes.resize(bytes.len().max(end + room), 0);
            let length = encoder.encode(cluster, &mut bytes[end..end + room])?;
            clusters.push(length.map(|length| length as u32));
            end += length.unwrap_or(0);
        }
        write(Chunk { bytes: &bytes[..end], clusters })
    })
}

#[derive(Default)]
struct Scratch {
    encoder: Option<Encoder>,
    bytes: Vec<u8>,
    clusters: Vec<Option<u32>>,
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

struct Encoder {
    compression: CompressOptions,
    context: Context,
}

enum Context {
    Deflate(Compress),
    Zstd(zstd::bulk::Compressor<'static>),
}

impl Encoder {
    fn new(compression: CompressOptions) -> io::Result<Self> {
        let context = match compression.kind {
            Compression::Zlib => {
                let level = flate2::Compression::new(compression.level.unsigned_abs());
                Context::Deflate(Compress::new_with_window_bits(level, false, DEFLATE_WINDOW_BITS))
            }
            Compression::Zstd => Context::Zstd(zstd::bulk::Compressor::new(compression.level)?),
        };
        Ok(Self { compression, context })
    }

    /// Room that [`Encoder::encode`] needs: enough for what does not shrink, too. A compressor that had to stop short
    /// would have to be thrown away, as zlib-rs 0.6 does not forget what it could not write when it is reset.
    fn bound(&self, cluster_size: usize) -> usize {
        match self.context {
            // The worst code has 9 bits for each byte; blocks and ends take a few bytes more.
            Context::Deflate(_) => cluster_size + cluster_size / 8 + cluster_size / 64 + 64,
            Context::Zstd(_) => zstd::zstd_safe::compress_bound(cluster_size),
        }
    }

    /// The bytes at the start of `out` that hold `cluster`, or `None` when they would not be fewer than its own.
    fn encode(&mut self, cluster: &[u8], out: &mut [u8]) -> io::Result<Option<usize>> {
        let length = match &mut self.context {
            Context::Deflate(deflate) => {
                deflate.reset();
                match deflate.compress(cluster, out, FlushCompress::Finish).map_err(io::Error::other)? {
                    Status::StreamEnd => deflate.total_out() as usize,
                    Status::Ok | Status::BufError => return Err(io::Error::other("deflate wrote more than its bound")),
                }
            }
            Context::Zstd(zstd) => zstd.compress_to_buffer(cluster, out)?,
        };
        let padded = length.max(SHORTEST);
        out[length..padded].fill(0);
        Ok((padded < cluster.len()).then_some(padded))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use flate2::{Decompress, FlushDecompress};

    /// Inflates piece by piece, so that nothing but a window of 4 KiB is left of what came before.
    fn inflate_with_small_window(input: &[u8], length: usize) -> Vec<u8> {
        let mut inflate = Decompress::new_with_window_bits(false, 12);
        let mut output = Vec::new();
        while output.len() < length {
            let mut piece = [0; 512];
            let (read, before) = (inflate.total_in() as usize, inflate.total_out());
            inflate
                .decompress(&input[read..], &mut piece, FlushDecompress::None)
                .expect("no reference reaches too far");
            output.extend_from_slice(&piece[..(inflate.total_out() - before) as usize]);
        }
        output
    }

    #[test]
    fn no_level_of_zlib_refers_further_back_than_4_kib() {
        // What comes again after 8 KiB tempts a larger window.
        let mut state = 1u32;
        let noise = std::iter::repeat_with(|| {
            state = state.wrapping_mul(0x0019_660d).wrapping_add(0x3c6e_f35f);
            (state >> 24) as u8
        });
        let mut block: Vec<u8> = noise.take(5000).collect();
        block.resize(8192, 0);
        let cluster = block.repeat(8);
        for level in 1..=9 {
            let options = CompressOptions { kind: Compression::Zlib, level };
            let compressed = with_chunk(options, &cluster, cluster.len(), |chunk| Ok(chunk.bytes.to_vec())).unwrap();
            assert!((30_000..60_000).contains(&compressed.len()), "level {level}: {} bytes", compressed.len());
            assert!(inflate_with_small_window(&compressed, cluster.len()) == cluster, "level {level}");
        }
    }
}
