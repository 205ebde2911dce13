//! Compressed clusters: raw deflate without a header, or Zstandard frames; each gives exactly one cluster.

use super::header::Compression;
use std::cell::Cell;
use zstd::zstd_safe;

/// Contexts and buffers that a thread uses again and again.
pub struct Scratch {
    deflate: libdeflater::Decompressor,
    zstd: zstd_safe::DCtx<'static>,
    /// Compressed bytes, as read.
    pub input: Vec<u8>,
}

thread_local! {
    static SCRATCH: Cell<Option<Box<Scratch>>> = const { Cell::new(None) };
}

impl Scratch {
    /// Lends this thread's scratch to `f`. Taken out meanwhile, so that `f` may come here again.
    pub fn lend<R>(f: impl FnOnce(&mut Self) -> R) -> R {
        let mut scratch = SCRATCH.take().unwrap_or_else(|| {
            Box::new(Self {
                deflate: libdeflater::Decompressor::new(),
                zstd: zstd_safe::DCtx::create(),
                input: Vec::new(),
            })
        });
        let result = f(&mut scratch);
        SCRATCH.set(Some(scratch));
        result
    }

    /// Fills `output`, one cluster, from the bytes `at` of `self.input`. What follows the compressed data in them is
    /// ignored. An error says what is wrong with the data.
    pub fn inflate(
        &mut self,
        compression: Compression,
        at: std::ops::Range<usize>,
        output: &mut [u8],
    ) -> Result<(), String> {
        let wanted = output.len();
        let filled = match compression {
            Compression::Zlib => self.inflate_zlib(at, output),
            Compression::Zstd => self.inflate_zstd(at, output),
        }?;
        match filled == wanted {
            true => Ok(()),
            false => Err(format!("it inflates to {filled} bytes, not to the {wanted} of a cluster")),
        }
    }

    fn inflate_zlib(&mut self, at: std::ops::Range<usize>, output: &mut [u8]) -> Result<usize, String> {
        let wanted = output.len();
        // The output is bounded: data that would inflate further is told apart from broken data by it.
        self.deflate.deflate_decompress(&self.input[at], output).map_err(|e| match e {
            libdeflater::DecompressionError::InsufficientSpace => too_long(wanted),
            libdeflater::DecompressionError::BadData => "it is not valid deflate data".to_owned(),
        })
    }

    /// Frame by frame and each at once: the output serves as the window, however large a window a frame asks for.
    fn inflate_zstd(&mut self, at: std::ops::Range<usize>, output: &mut [u8]) -> Result<usize, String> {
        use zstd_safe::zstd_sys::ZSTD_ErrorCode::ZSTD_error_dstSize_tooSmall;
        let wanted = output.len();
        let invalid =
            |code| format!("it is not valid Zstandard data: {}", zstd_safe::get_error_name(code).to_lowercase());
        let mut input = &self.input[at];
        let mut filled = 0;
        while filled < wanted && !input.is_empty() {
            let length = zstd_safe::find_frame_compressed_size(input).map_err(invalid)?;
            let (frame, rest) = input.split_at(length);
            filled += self.zstd.decompress(&mut output[filled..], frame).map_err(|code| {
                if zstd_safe::is_error_kind(code, ZSTD_error_dstSize_tooSmall) {
                    too_long(wanted)
                } else {
                    invalid(code)
                }
            })?;
            input = rest;
        }
        Ok(filled)
    }
}

fn too_long(wanted: usize) -> String {
    format!("it inflates to more than the {wanted} bytes of a cluster")
}

#[cfg(test)]
mod tests {
    use super::*;

    const CLUSTER: usize = 4096;

    fn deflated(data: &[u8]) -> Vec<u8> {
        let mut compressor = libdeflater::Compressor::new(libdeflater::CompressionLvl::default());
        let mut out = vec![0; compressor.deflate_compress_bound(data.len())];
        let length = compressor.deflate_compress(data, &mut out).expect("fits");
        out.truncate(length);
        out
    }

    fn zstd_frame(data: &[u8]) -> Vec<u8> {
        zstd::bulk::compress(data, 3).expect("compresses")
    }

    fn inflate(compression: Compression, input: &[u8]) -> Result<Vec<u8>, String> {
        let mut output = vec![0; CLUSTER];
        Scratch::lend(|scratch| {
            scratch.input = input.to_vec();
            scratch.inflate(compression, 0..input.len(), &mut output).map(|()| output)
        })
    }

    fn text(length: usize) -> Vec<u8> {
        (0..length).map(|i| (i * i / 7) as u8).collect()
    }

    #[test]
    fn garbage_after_the_data_is_ignored() {
        for (compression, mut input) in
            [(Compression::Zlib, deflated(&text(CLUSTER))), (Compression::Zstd, zstd_frame(&text(CLUSTER)))]
        {
            input.extend_from_slice(&[0xa5; 511]);
            assert_eq!(inflate(compression, &input), Ok(text(CLUSTER)));
        }
    }

    #[test]
    fn zstd_frames_follow_each_other() {
        let input = [zstd_frame(&text(CLUSTER)[..1000]), zstd_frame(&text(CLUSTER)[1000..])].concat();
        assert_eq!(inflate(Compression::Zstd, &input), Ok(text(CLUSTER)));
    }

    #[test]
    fn a_cluster_that_inflates_too_far_or_too_short_is_an_error() {
        for pack in [(Compression::Zlib, deflated as fn(&[u8]) -> Vec<u8>), (Compression::Zstd, zstd_frame)] {
            let long = inflate(pack.0, &pack.1(&text(CLUSTER + 1))).expect_err("too long");
            assert_eq!(long, "it inflates to more than the 4096 bytes of a cluster");
            let short = inflate(pack.0, &pack.1(&text(CLUSTER - 1))).expect_err("too short");
            assert_eq!(short, "it inflates to 4095 bytes, not to the 4096 of a cluster");
        }
    }

    #[test]
    fn data_cut_off_anywhere_is_an_error() {
        for (compression, input) in
            [(Compression::Zlib, deflated(&text(CLUSTER))), (Compression::Zstd, zstd_frame(&text(CLUSTER)))]
        {
            for length in 0..input.len() {
                assert!(inflate(compression, &input[..length]).is_err(), "{compression:?} cut at {length}");
            }
        }
    }

    #[test]
    fn the_scratch_may_be_lent_again_meanwhile() {
        let nested = Scratch::lend(|outer| {
            outer.input = vec![1, 2, 3];
            (inflate(Compression::Zlib, &deflated(&text(CLUSTER))), outer.input.clone())
        });
        assert_eq!(nested, (Ok(text(CLUSTER)), vec![1, 2, 3]));
    }
}
