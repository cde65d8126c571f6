//! Both passes of a resizing with AVX2, bit for bit as the plain form.
//!
//! A weight of 22 bits of fraction is split into `high * 2^12 + low`; each half fits into 16 bits, so that one
//! instruction takes two taps of eight sums, and the two sums together are the sum in 32 bits.
//!
//! Across, sixteen lines are worked on together: they are turned so that the sixteen samples of a column lie side by
//! side, and turned back afterwards. The lines that come out wait until the pass down has used them.

use std::arch::x86_64::{__m128i, __m256i};

use pulp::{cast, x86::V3};

use super::{super::vector::vectorized, FRACTION_BITS, HALF, Plan, Windows};

/// Lines of a tile.
const TILE: usize = 16;
/// Samples that the pass down makes together.
const STEP: usize = 32;
const LOW_BITS: u32 = 12;

/// Weights of two neighbouring taps: the upper halves, the lower halves; the second tap in the upper 16 bits.
type Pair = [i32; 2];

/// Weights in pairs.
struct Pairs {
    pairs: Vec<Pair>,
    /// First pair of each output.
    starts: Vec<usize>,
}

impl Pairs {
    /// With `aligned` the first tap of a pair has an even number; taps outside the window weigh nothing.
    fn new(windows: &Windows, aligned: bool) -> Self {
        let mut pairs = Vec::with_capacity(windows.weights.len() / 2 + 2 * windows.len());
        let mut starts = vec![0];
        for i in 0..windows.len() {
            let (first, weights) = windows.get(i);
            let odd = aligned && first % 2 == 1;
            let (alone, rest) = weights.split_at(usize::from(odd).min(weights.len()));
            pairs.extend(alone.iter().map(|w| pair(0, *w)));
            pairs.extend(rest.chunks(2).map(|c| pair(c[0], c.get(1).copied().unwrap_or(0))));
            starts.push(pairs.len());
        }
        Self { pairs, starts }
    }

    fn get(&self, i: usize) -> &[Pair] {
        &self.pairs[self.starts[i]..self.starts[i + 1]]
    }
}

fn pair(first: i32, second: i32) -> Pair {
    let low = (1 << LOW_BITS) - 1;
    let join = |a: i32, b: i32| i32::from(a as i16) & 0xFFFF | b << 16;
    [join(first >> LOW_BITS, second >> LOW_BITS), join(first & low, second & low)]
}

/// Output lines `start` to `end`.
pub(super) fn band(simd: V3, plan: &Plan<'_>, start: usize, end: usize) -> Vec<u8> {
    let line = plan.width * 3;
    let across = plan.across.as_ref().map(|w| Across::new(simd, plan, w));
    let down = plan.down.as_ref().map(|w| Pairs::new(w, false));
    let most = (start..end).map(|y| plan.lines(y)).map(|(a, b)| b - a).max().unwrap_or(0);
    let mut held = Held::new(line, plan.lines(start).0, most + 2 * TILE);
    let mut source = across;
    let mut sums = vec![0; held.stride];
    let mut out = Vec::with_capacity((end - start) * line);
    for y in start..end {
        let (first, behind) = plan.lines(y);
        while held.end() < behind {
            held.make_room(first);
            let top = held.end();
            let lines = held.grow(TILE.min(plan.image.height - top));
            match &mut source {
                Some(across) => across.tile(top, lines, line),
                None => copy(&plan.image.data[top * line..], lines, line),
            }
        }
        match &down {
            Some(down) => {
                vertical(simd, down.get(y), &held, (first, behind - 1), &mut sums);
                out.extend_from_slice(&sums[..line]);
            }
            None => out.extend_from_slice(&held.line(first)[..line]),
        }
    }
    out
}

fn copy(from: &[u8], to: Lines<'_>, line: usize) {
    for (to, from) in to.samples.chunks_exact_mut(to.stride).zip(from.chunks_exact(line)) {
        to[..line].copy_from_slice(from);
    }
}

/// Lines that the pass down still needs, one behind the other, padded to whole steps.
struct Held {
    samples: Vec<u8>,
    stride: usize,
    /// Number of the first line.
    first: usize,
    lines: usize,
}

/// Some of them, to be written.
struct Lines<'a> {
    samples: &'a mut [u8],
    stride: usize,
}

impl Held {
    fn new(line: usize, first: usize, room: usize) -> Self {
        let stride = line.next_multiple_of(STEP);
        Self { samples: vec![0; room * stride], stride, first, lines: 0 }
    }

    fn end(&self) -> usize {
        self.first + self.lines
    }

    fn line(&self, number: usize) -> &[u8] {
        &self.samples[(number - self.first) * self.stride..][..self.stride]
    }

    /// Drops the lines before `needed` if there is no room for a tile.
    fn make_room(&mut self, needed: usize) {
        if (self.lines + TILE) * self.stride > self.samples.len() {
            let dropped = (needed - self.first).min(self.lines);
            self.samples.copy_within(dropped * self.stride..self.lines * self.stride, 0);
            (self.first, self.lines) = (self.first + dropped, self.lines - dropped);
        }
    }

    /// `more` lines at the end.
    fn grow(&mut self, more: usize) -> Lines<'_> {
        let start = self.lines * self.stride;
        self.lines += more;
        Lines { samples: &mut self.samples[start..self.lines * self.stride], stride: self.stride }
    }
}

/// The pass across, with its buffers.
struct Across<'a> {
    simd: V3,
    image: &'a [u8],
    /// Samples of a line of the image.
    from: usize,
    windows: &'a Windows,
    pairs: Pairs,
    /// By pair of columns and channel: two samples of each line.
    turned: Vec<[u8; 2 * TILE]>,
    /// By sample of the output line: one sample of each line, in the order of [`ORDER`].
    made: Vec<[u8; TILE]>,
    /// The end of each line, with zeros behind it.
    tails: [[u8; GROUP + 16]; TILE],
}

/// Bytes of a line that are turned together: two pairs of columns.
const GROUP: usize = 12;

/// Which line each place of [`Across::made`] belongs to: packing to bytes works within halves of a vector.
const ORDER: [usize; TILE] = [0, 1, 2, 3, 8, 9, 10, 11, 4, 5, 6, 7, 12, 13, 14, 15];

impl<'a> Across<'a> {
    fn new(simd: V3, plan: &Plan<'a>, windows: &'a Windows) -> Self {
        let from = plan.image.width * 3;
        Self {
            simd,
            image: &plan.image.data,
            from,
            windows,
            pairs: Pairs::new(windows, true),
            turned: vec![[0; 2 * TILE]; from.div_ceil(GROUP) * 6],
            made: vec![[0; TILE]; (windows.len() * 3).next_multiple_of(TILE)],
            tails: [[0; GROUP + 16]; TILE],
        }
    }

    /// Makes the lines from `top` on. What is missing to a whole tile repeats the last line, and is dropped.
    fn tile(&mut self, top: usize, to: Lines<'_>, line: usize) {
        let (simd, from) = (self.simd, self.from);
        let count = to.samples.len() / to.stride;
        let rows: [&[u8]; TILE] = std::array::from_fn(|r| &self.image[(top + r.min(count - 1)) * from..][..from]);
        // Groups of which 16 bytes can be read.
        let whole = from.saturating_sub(4) / GROUP;
        for (tail, row) in self.tails.iter_mut().zip(rows) {
            tail[..from - whole * GROUP].copy_from_slice(&row[whole * GROUP..]);
        }
        let tails: [&[u8]; TILE] = std::array::from_fn(|r| &self.tails[r][..]);
        let (body, end) = self.turned.split_at_mut(whole * 6);
        turn(simd, &rows, body);
        turn(simd, &tails, end);
        pixels(simd, self.windows, &self.pairs, &self.turned, &mut self.made);
        turn_back(simd, &self.made, to, line);
    }
}

/// Two neighbouring pixels' samples of a channel side by side, for two pairs of pixels.
const COUPLE: [u8; 16] = [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11, 128, 128, 128, 128];

vectorized! {
    fn turn<'a>(simd: V3, rows: &'a [&'a [u8]; TILE], out: &'a mut [[u8; 2 * TILE]]) -> () {
        let (avx2, couple) = (simd.avx2, simd.avx2._mm256_broadcastsi128_si256(cast(COUPLE)));
        for (group, out) in out.chunks_exact_mut(6).enumerate() {
            let at = group * GROUP;
            let mut x = [simd.avx._mm256_setzero_si256(); 8];
            for (r, x) in x.iter_mut().enumerate() {
                let both = simd.avx._mm256_set_m128i(load(&rows[r + 8][at..]), load(&rows[r][at..]));
                *x = avx2._mm256_shuffle_epi8(both, couple);
            }
            // 8 x 8 units of two bytes. Each stage takes the vectors half their number apart together; three transpose.
            for _ in 0..3 {
                let y = x;
                for i in 0..4 {
                    x[2 * i] = avx2._mm256_unpacklo_epi16(y[i], y[i + 4]);
                    x[2 * i + 1] = avx2._mm256_unpackhi_epi16(y[i], y[i + 4]);
                }
            }
            for (out, unit) in out.iter_mut().zip(x) {
                *out = cast(unit);
            }
        }
    }
}

#[inline(always)]
fn load(from: &[u8]) -> __m128i {
    let bytes: [u8; 16] = from[..16].try_into().expect("a slice of 16 bytes");
    cast(bytes)
}

vectorized! {
    /// The output pixels of all lines of a tile.
    fn pixels<'a>(
        simd: V3,
        windows: &'a Windows,
        pairs: &'a Pairs,
        from: &'a [[u8; 2 * TILE]],
        out: &'a mut [[u8; TILE]],
    ) -> () {
        for (i, out) in out.chunks_exact_mut(3).take(windows.len()).enumerate() {
            let start = windows.first[i] / 2 * 3;
            let pairs = pairs.get(i);
            pixel(simd, pairs, &from[start..start + pairs.len() * 3], out);
        }
    }
}

/// One output pixel of all lines of a tile.
#[inline(always)]
fn pixel(simd: V3, pairs: &[Pair], from: &[[u8; 2 * TILE]], out: &mut [[u8; TILE]]) {
    let (avx, avx2) = (simd.avx, simd.avx2);
    let zero = avx._mm256_setzero_si256();
    let (mut high, mut low) = ([zero; 6], [zero; 6]);
    for (pair, from) in pairs.iter().zip(from.chunks_exact(3)) {
        let weights = [avx._mm256_set1_epi32(pair[0]), avx._mm256_set1_epi32(pair[1])];
        for (c, from) in from.iter().enumerate() {
            for half in 0..2 {
                let (i, samples) = (2 * c + half, avx2._mm256_cvtepu8_epi16(load(&from[16 * half..])));
                high[i] = avx2._mm256_add_epi32(high[i], avx2._mm256_madd_epi16(samples, weights[0]));
                low[i] = avx2._mm256_add_epi32(low[i], avx2._mm256_madd_epi16(samples, weights[1]));
            }
        }
    }
    let mut words = [zero; 3];
    for (c, words) in words.iter_mut().enumerate() {
        let (a, b) = (finish(simd, high[2 * c], low[2 * c]), finish(simd, high[2 * c + 1], low[2 * c + 1]));
        *words = avx2._mm256_packs_epi32(a, b);
    }
    let bytes = avx2._mm256_permute4x64_epi64::<0b11_01_10_00>(avx2._mm256_packus_epi16(words[0], words[1]));
    let [red, green]: [[u8; 16]; 2] = cast(bytes);
    let bytes = avx2._mm256_permute4x64_epi64::<0b11_01_10_00>(avx2._mm256_packus_epi16(words[2], words[2]));
    let [blue, _]: [[u8; 16]; 2] = cast(bytes);
    out.copy_from_slice(&[red, green, blue]);
}

/// The sum of both halves as a sample, not yet cut off at 0 and 255.
#[inline(always)]
fn finish(simd: V3, high: __m256i, low: __m256i) -> __m256i {
    let (avx, avx2) = (simd.avx, simd.avx2);
    let sum = avx2._mm256_add_epi32(avx2._mm256_slli_epi32::<{ LOW_BITS as i32 }>(high), low);
    avx2._mm256_srai_epi32::<{ FRACTION_BITS as i32 }>(avx2._mm256_add_epi32(sum, avx._mm256_set1_epi32(HALF)))
}

vectorized! {
    /// Samples of sixteen lines each to lines.
    fn turn_back<'a>(simd: V3, made: &'a [[u8; TILE]], to: Lines<'a>, line: usize) -> () {
        let sse2 = simd.sse2;
        for (block, from) in made.chunks_exact(TILE).enumerate() {
            let mut x = [sse2._mm_setzero_si128(); TILE];
            for (x, from) in x.iter_mut().zip(from) {
                *x = cast(*from);
            }
            for _ in 0..4 {
                let y = x;
                for i in 0..8 {
                    x[2 * i] = sse2._mm_unpacklo_epi8(y[i], y[i + 8]);
                    x[2 * i + 1] = sse2._mm_unpackhi_epi8(y[i], y[i + 8]);
                }
            }
            let at = block * TILE;
            let wide = TILE.min(line - at);
            for (place, row) in ORDER.into_iter().zip(x) {
                let bytes: [u8; TILE] = cast(row);
                if let Some(to) = to.samples.get_mut(place * to.stride + at..(place + 1) * to.stride) {
                    match to.first_chunk_mut::<TILE>() {
                        Some(to) if wide == TILE => *to = bytes,
                        _ => to[..wide].copy_from_slice(&bytes[..wide]),
                    }
                }
            }
        }
    }
}

vectorized! {
    /// One output line from the lines `first` to `last`.
    fn vertical<'a>(simd: V3, pairs: &'a [Pair], held: &'a Held, span: (usize, usize), out: &'a mut [u8]) -> () {
        let (first, last) = span;
        let (avx, avx2) = (simd.avx, simd.avx2);
        let zero = avx._mm256_setzero_si256();
        for (step, out) in out.chunks_exact_mut(STEP).enumerate() {
            let (mut high, mut low) = ([zero; 4], [zero; 4]);
            for (i, pair) in pairs.iter().enumerate() {
                let weights = [avx._mm256_set1_epi32(pair[0]), avx._mm256_set1_epi32(pair[1])];
                let a = load_step(held.line(first + 2 * i), step);
                let b = load_step(held.line((first + 2 * i + 1).min(last)), step);
                let (ab, cd) = (avx2._mm256_unpacklo_epi8(a, b), avx2._mm256_unpackhi_epi8(a, b));
                let samples = [
                    avx2._mm256_unpacklo_epi8(ab, zero),
                    avx2._mm256_unpackhi_epi8(ab, zero),
                    avx2._mm256_unpacklo_epi8(cd, zero),
                    avx2._mm256_unpackhi_epi8(cd, zero),
                ];
                for (i, samples) in samples.into_iter().enumerate() {
                    high[i] = avx2._mm256_add_epi32(high[i], avx2._mm256_madd_epi16(samples, weights[0]));
                    low[i] = avx2._mm256_add_epi32(low[i], avx2._mm256_madd_epi16(samples, weights[1]));
                }
            }
            let mut sums = [zero; 4];
            for (i, sum) in sums.iter_mut().enumerate() {
                *sum = finish(simd, high[i], low[i]);
            }
            let words = [avx2._mm256_packs_epi32(sums[0], sums[1]), avx2._mm256_packs_epi32(sums[2], sums[3])];
            let bytes: [u8; STEP] = cast(avx2._mm256_packus_epi16(words[0], words[1]));
            out.copy_from_slice(&bytes);
        }
    }
}

#[inline(always)]
fn load_step(line: &[u8], step: usize) -> __m256i {
    let bytes: [u8; STEP] = line[step * STEP..][..STEP].try_into().expect("a slice of one step");
    cast(bytes)
}
