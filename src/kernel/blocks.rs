//! Values in blocks of few bits: 8-bit integers, and the 4-bit normal floats of QLoRA (Dettmers et al., arXiv 2305.14314).
//!
//! A block of 64 values shares one scale, its largest magnitude. NF4 codes and double quantisation (scales in 8 bits, in
//! blocks of 256) are those of bitsandbytes, so that a weight has the value that it has there.

use std::{ops::Range, sync::LazyLock};

use rayon::prelude::*;

/// Values that share a scale.
pub const BLOCK: usize = 64;

/// Scales that share a scale, where scales are packed as well.
pub const SCALES: usize = 256;

/// How values are packed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// Signed 8-bit integers times a scale.
    Int8,
    /// 4 bits: quantiles of a normal distribution.
    Nf4,
    /// The same, with scales in 8 bits.
    Nf4Double,
}

impl Format {
    /// Bytes that `len` values take.
    #[must_use]
    pub fn num_bytes(self, len: usize) -> usize {
        let blocks = len.div_ceil(BLOCK);
        match self {
            Self::Int8 => len + 4 * blocks,
            Self::Nf4 => len.div_ceil(2) + 4 * blocks,
            Self::Nf4Double => len.div_ceil(2) + blocks + 4 * blocks.div_ceil(SCALES) + 4,
        }
    }
}

/// The 16 values of NF4.
pub const NF4: [f32; 16] = [
    -1.0,
    -0.696_192_8,
    -0.525_073_05,
    -0.394_917_5,
    -0.284_441_38,
    -0.184_773_43,
    -0.091_050_036,
    0.0,
    0.079_580_3,
    0.160_930_2,
    0.246_112_3,
    0.337_915_24,
    0.440_709_83,
    0.562_617,
    0.722_956_84,
    1.0,
];

/// Both values of a byte, the first in the high half.
static PAIRS: LazyLock<[[f32; 2]; 256]> =
    LazyLock::new(|| std::array::from_fn(|byte| [NF4[byte >> 4], NF4[byte & 15]]));

/// The signed values of 8 bits whose spacing grows with the magnitude: seven decades, each with twice as many means
/// between evenly spaced bounds as the one below; 0 and 1.
static DYNAMIC: LazyLock<[f32; 256]> = LazyLock::new(|| {
    let mut values = vec![0f32, 1.0];
    for decade in 0..7 {
        let count = 1usize << decade;
        let bound = |i: usize| (0.1 + 0.9 * i as f64 / count as f64) as f32;
        let scale = 10f64.powi(decade - 6);
        for i in 0..count {
            let mean = f64::from((bound(i) + bound(i + 1)) / 2.0);
            values.extend([(scale * mean) as f32, (-scale * mean) as f32]);
        }
    }
    values.sort_by(f32::total_cmp);
    std::array::from_fn(|i| values[i])
});

/// Index of the entry of a sorted table that is nearest to `x`; the lower one of two that are equally near.
fn nearest(table: &[f32], x: f32) -> u8 {
    let above = table.partition_point(|v| *v < x);
    let lower = above.saturating_sub(1);
    let upper = above.min(table.len() - 1);
    (if x - table[lower] <= table[upper] - x { lower } else { upper }) as u8
}

#[derive(Debug, Clone, PartialEq)]
enum Scales {
    Plain(Vec<f32>),
    /// Differences from `mean`, in 8 bits.
    Packed {
        codes: Vec<u8>,
        scales: Vec<f32>,
        mean: f32,
    },
}

impl Scales {
    fn packed(plain: &[f32]) -> Self {
        let mean = (plain.iter().map(|s| f64::from(*s)).sum::<f64>() / plain.len().max(1) as f64) as f32;
        let (mut codes, mut scales) = (Vec::with_capacity(plain.len()), Vec::new());
        for block in plain.chunks(SCALES) {
            let scale = block.iter().fold(0f32, |m, s| m.max((s - mean).abs()));
            let factor = if scale > 0.0 { 1.0 / scale } else { 0.0 };
            codes.extend(block.iter().map(|s| nearest(&*DYNAMIC, (s - mean) * factor)));
            scales.push(scale);
        }
        Self::Packed { codes, scales, mean }
    }

    fn get(&self, block: usize) -> f32 {
        match self {
            Self::Plain(scales) => scales[block],
            Self::Packed { codes, scales, mean } => DYNAMIC[codes[block] as usize] * scales[block / SCALES] + mean,
        }
    }

    fn num_bytes(&self) -> usize {
        match self {
            Self::Plain(scales) => 4 * scales.len(),
            Self::Packed { codes, scales, .. } => codes.len() + 4 * scales.len() + 4,
        }
    }
}

/// Packed values.
#[derive(Debug, Clone, PartialEq)]
pub struct Blocks {
    format: Format,
    len: usize,
    codes: Vec<u8>,
    scales: Scales,
}

impl Blocks {
    /// Packs `values`.
    #[must_use]
    pub fn pack(format: Format, values: &[f32]) -> Self {
        let largest = |block: &[f32]| block.iter().fold(0f32, |m, v| m.max(v.abs()));
        let plain: Vec<f32> = values.par_chunks(BLOCK).map(largest).collect();
        let inverse = |s: f32| if s > 0.0 { 1.0 / s } else { 0.0 };
        let codes: Vec<u8> = match format {
            Format::Int8 => values
                .par_chunks(BLOCK)
                .zip(&plain)
                .flat_map_iter(|(block, s)| {
                    let factor = inverse(*s) * 127.0;
                    block.iter().map(move |v| ((v * factor).round_ties_even() as i8).cast_unsigned())
                })
                .collect(),
            Format::Nf4 | Format::Nf4Double => values
                .par_chunks(BLOCK)
                .zip(&plain)
                .flat_map_iter(|(block, s)| {
                    let factor = inverse(*s);
                    let code = move |v: Option<&f32>| v.map_or(7, |v| nearest(&NF4, v * factor));
                    block.chunks(2).map(move |pair| code(pair.first()) << 4 | code(pair.get(1)))
                })
                .collect(),
        };
        let scales = match format {
            Format::Int8 => Scales::Plain(plain.iter().map(|s| s / 127.0).collect()),
            Format::Nf4 => Scales::Plain(plain),
            Format::Nf4Double => Scales::packed(&plain),
        };
        Self { format, len: values.len(), codes, scales }
    }

    /// Number of values.
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there is no value.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Bytes in memory.
    #[must_use]
    pub fn num_bytes(&self) -> usize {
        self.codes.len() + self.scales.num_bytes()
    }

    /// Writes the values of `range` to `out`, which is as long.
    pub fn unpack(&self, range: Range<usize>, out: &mut [f32]) {
        let mut at = range.start;
        while at < range.end {
            let end = range.end.min((at / BLOCK + 1) * BLOCK);
            let part = &mut out[at - range.start..end - range.start];
            self.unpack_block(at, part);
            at = end;
        }
    }

    /// Values from `start` on that lie in one block.
    fn unpack_block(&self, start: usize, out: &mut [f32]) {
        let scale = self.scales.get(start / BLOCK);
        if self.format == Format::Int8 {
            let codes = &self.codes[start..start + out.len()];
            out.iter_mut().zip(codes).for_each(|(o, c)| *o = f32::from(c.cast_signed()) * scale);
            return;
        }
        let (odd, out) = out.split_at_mut(start % 2);
        if let Some(first) = odd.first_mut() {
            *first = PAIRS[self.codes[start / 2] as usize][1] * scale;
        }
        let codes = &self.codes[start.div_ceil(2)..];
        let mut pairs = out.chunks_exact_mut(2);
        let count = pairs.len();
        for (pair, code) in pairs.by_ref().zip(codes) {
            let [high, low] = PAIRS[*code as usize];
            (pair[0], pair[1]) = (high * scale, low * scale);
        }
        if let Some(last) = pairs.into_remainder().first_mut() {
            *last = PAIRS[codes[count] as usize][0] * scale;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn values(n: usize) -> Vec<f32> {
        (0..n).map(|i| ((i * i % 97) as f32 * 0.37).sin() * 0.02 * (1.0 + (i / BLOCK) as f32)).collect()
    }

    fn unpacked(blocks: &Blocks) -> Vec<f32> {
        let mut out = vec![0.0; blocks.len()];
        blocks.unpack(0..blocks.len(), &mut out);
        out
    }

    #[test]
    fn errors_are_at_most_half_the_spacing() {
        for n in [1, 63, 64, 65, 1000] {
            let x = values(n);
            for (format, spacing) in [(Format::Int8, 1.0 / 127.0), (Format::Nf4, 0.304), (Format::Nf4Double, 0.4)] {
                let blocks = Blocks::pack(format, &x);
                assert_eq!(blocks.num_bytes(), format.num_bytes(n), "{format:?} {n}");
                for (block, found) in x.chunks(BLOCK).zip(unpacked(&blocks).chunks(BLOCK)) {
                    let largest = block.iter().fold(0f32, |m, v| m.max(v.abs()));
                    let worst = block.iter().zip(found).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
                    assert!(worst <= 0.5001 * spacing * largest, "{format:?} {n}: {worst} of {largest}");
                }
            }
        }
    }

    #[test]
    fn what_is_packed_twice_is_the_same_and_any_part_can_be_read() {
        let x = values(777);
        for format in [Format::Int8, Format::Nf4, Format::Nf4Double] {
            let blocks = Blocks::pack(format, &x);
            let all = unpacked(&blocks);
            if format != Format::Nf4Double {
                let again = unpacked(&Blocks::pack(format, &all));
                assert!(again.iter().zip(&all).all(|(a, b)| (a - b).abs() <= 1e-7 * b.abs()), "{format:?}");
            }
            for (start, end) in [(0, 1), (1, 2), (5, 200), (63, 65), (64, 128), (100, 777), (7, 7)] {
                let mut part = vec![0.0; end - start];
                blocks.unpack(start..end, &mut part);
                assert_eq!(part, all[start..end], "{format:?} {start}..{end}");
            }
        }
    }

    #[test]
    fn zeros_stay_zeros() {
        for format in [Format::Int8, Format::Nf4, Format::Nf4Double] {
            assert!(unpacked(&Blocks::pack(format, &[0.0; 130])).iter().all(|v| *v == 0.0), "{format:?}");
        }
    }
}
