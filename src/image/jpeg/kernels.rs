//! The inner loops of decoding in the widest form that the processor has.

#[cfg(target_arch = "x86_64")]
use super::wide;
use super::{
    Result, color, entropy,
    huffman::{Bits, Table},
    idct, upsample,
};

/// Which form of the inner loops is used. All give the same values.
#[derive(Debug, Clone, Copy, Default)]
pub(super) enum Kernels {
    /// Plain Rust.
    #[default]
    Portable,
    /// AVX2.
    #[cfg(target_arch = "x86_64")]
    Wide(pulp::x86::V3),
}

/// Calls the plain function, or the one of the same arguments that takes AVX2.
macro_rules! dispatch {
    ($kernels:expr, $portable:path, $wide:path, ($($argument:expr),*)) => {
        match $kernels {
            Kernels::Portable => $portable($($argument),*),
            #[cfg(target_arch = "x86_64")]
            Kernels::Wide(simd) => $wide(simd, $($argument),*),
        }
    };
}

impl Kernels {
    pub(super) fn best() -> Self {
        #[cfg(target_arch = "x86_64")]
        if let Some(simd) = pulp::x86::V3::try_new() {
            return Self::Wide(simd);
        }
        Self::Portable
    }

    /// [`entropy::sequential`].
    pub(super) fn sequential(
        self,
        block: &mut [i16; 64],
        tables: (&Table, &Table),
        prediction: &mut i32,
        bits: &mut Bits<'_>,
    ) -> Result<usize> {
        dispatch!(self, entropy::sequential, wide::sequential, (block, tables, prediction, bits))
    }

    /// [`idct::inverse`] of a block whose coefficients from `end` on, zigzag order, are zero.
    pub(super) fn inverse(self, block: &[i16; 64], quant: &[i32; 64], end: usize, out: &mut [u8], stride: usize) {
        if end == 1 {
            return idct::flat(block[0], quant[0], out, stride);
        }
        match self {
            Self::Portable => idct::inverse(block, quant, out, stride),
            #[cfg(target_arch = "x86_64")]
            Self::Wide(simd) => wide::inverse(simd, block, quant, end, out, stride),
        }
    }

    /// [`upsample::double`].
    pub(super) fn double(self, lines: [&[u8]; 2], width: usize, bias: [u16; 2], sums: &mut [u16], out: &mut [u8]) {
        dispatch!(self, upsample::double, wide::double, (lines, width, bias, sums, out));
    }

    /// [`upsample::blend`].
    pub(super) fn blend(self, lines: [&[u8]; 2], width: usize, bias: u16, out: &mut [u8]) {
        dispatch!(self, upsample::blend, wide::blend, (lines, width, bias, out));
    }

    /// [`color::grey`].
    pub(super) fn grey(self, line: &[u8], width: usize, out: &mut [u8]) {
        dispatch!(self, color::grey, wide::grey, (line, width, out));
    }

    /// [`color::rgb`].
    pub(super) fn rgb(self, lines: [&[u8]; 3], width: usize, out: &mut [u8]) {
        dispatch!(self, color::rgb, wide::rgb, (lines, width, out));
    }
}

#[cfg(test)]
mod tests {
    use rand::{Rng, RngExt, SeedableRng};

    use super::{super::painter::SLACK, *};

    fn rng(key: u64) -> rand_chacha::ChaCha8Rng {
        rand_chacha::ChaCha8Rng::seed_from_u64(key)
    }

    fn line(width: usize, key: u64) -> Vec<u8> {
        let mut line = vec![0; width + SLACK];
        rng(key).fill_bytes(&mut line);
        line
    }

    #[test]
    fn blocks_are_the_same_in_every_form() {
        for key in 0..2_000 {
            let mut rng = rng(key);
            let end = rng.random_range(1..=64);
            // Both what files hold and what overflows.
            let (largest, step) = if key % 2 == 0 { (200, 40) } else { (i16::MAX, 60_000) };
            let mut block = [0i16; 64];
            for k in 0..end {
                block[usize::from(super::super::NATURAL[k])] = rng.random_range(-largest..=largest);
            }
            let quant: [i32; 64] = std::array::from_fn(|_| rng.random_range(1..=step));
            let [mut plain, mut best] = [[7u8; 8 * 11]; 2];
            idct::inverse(&block, &quant, &mut plain, 11);
            Kernels::best().inverse(&block, &quant, end, &mut best, 11);
            assert_eq!(plain, best, "{key}");
        }
    }

    #[test]
    fn lines_are_the_same_in_every_form() {
        for width in 3..80 {
            let lines = [line(width, 1), line(width, 2)];
            let lines = [&lines[0][..], &lines[1]];
            let both = [Kernels::Portable, Kernels::best()].map(|kernels| {
                let [mut across, mut down] = [vec![0; 2 * width + SLACK], vec![0; width + SLACK]];
                kernels.double(lines, width, [8, 7], &mut vec![0; width + SLACK], &mut across);
                kernels.blend(lines, width, 2, &mut down);
                across.truncate(2 * width);
                down.truncate(width);
                (across, down)
            });
            assert_eq!(both[0], both[1], "{width}");
        }
    }

    #[test]
    fn colours_are_the_same_in_every_form() {
        // Every pair of chroma samples, with brightness that varies.
        let (y, cr) = (line(256, 3), (0..=255).chain([0; SLACK]).collect::<Vec<u8>>());
        for cb in 0..=255 {
            let cb = [cb; 256 + SLACK];
            let [plain, best] = [Kernels::Portable, Kernels::best()].map(|kernels| {
                let mut out = vec![0; 3 * (256 + SLACK)];
                kernels.rgb([&y, &cb, &cr], 256, &mut out);
                out.truncate(3 * 256);
                out
            });
            assert_eq!(plain, best);
        }
        let [middle, mut colour, mut grey] = [vec![128; 256 + SLACK], vec![0; 3 * 512], vec![0; 3 * 512]];
        Kernels::Portable.rgb([&y, &middle, &middle], 256, &mut colour);
        for kernels in [Kernels::Portable, Kernels::best()] {
            kernels.grey(&y, 256, &mut grey);
            assert_eq!(grey[..3 * 256], colour[..3 * 256]);
        }
    }
}
