//! The inner loops with AVX2. Lines have [`SLACK`](super::painter::SLACK) behind them, so that all of them go in whole
//! vectors.

use std::arch::x86_64::{__m128i, __m256i};

use pulp::{cast, x86::V3};

use super::{
    super::vector::vectorized,
    Result, entropy,
    huffman::{Bits, Table},
    idct::CONST_BITS,
    upsample,
};

vectorized! {
    /// [`entropy::sequential`] with the instructions for bits.
    pub(super) fn sequential<'a, 'b>(
        _simd: V3,
        block: &'a mut [i16; 64],
        tables: (&'a Table, &'a Table),
        prediction: &'a mut i32,
        bits: &'a mut Bits<'b>,
    ) -> Result<usize> {
        entropy::sequential(block, tables, prediction, bits)
    }
}

#[inline(always)]
fn load(from: &[u8]) -> __m128i {
    let bytes: [u8; 16] = from[..16].try_into().expect("a slice of 16 bytes");
    cast(bytes)
}

#[inline(always)]
fn load_words(from: &[u16]) -> __m256i {
    let words: [u16; 16] = from[..16].try_into().expect("a slice of 16 words");
    cast(words)
}

/// Sixteen samples as words.
#[inline(always)]
fn widen(simd: V3, from: &[u8]) -> __m256i {
    simd.avx2._mm256_cvtepu8_epi16(load(from))
}

/// `3 * near + far`.
#[inline(always)]
fn lean(simd: V3, near: __m256i, far: __m256i) -> __m256i {
    let twice = simd.avx2._mm256_slli_epi16::<1>(near);
    simd.avx2._mm256_add_epi16(simd.avx2._mm256_add_epi16(twice, near), far)
}

vectorized! {
    /// [`upsample::double`].
    pub(super) fn double<'a>(
        simd: V3,
        lines: [&'a [u8]; 2],
        width: usize,
        bias: [u16; 2],
        sums: &'a mut [u16],
        out: &'a mut [u8],
    ) -> () {
        let [near, far] = lines;
        let (avx, avx2) = (simd.avx, simd.avx2);
        let vectors = width.div_ceil(16);
        for ((sums, near), far) in
            sums[1..].chunks_exact_mut(16).zip(near.chunks_exact(16)).zip(far.chunks_exact(16)).take(vectors)
        {
            let words: [u16; 16] = cast(lean(simd, widen(simd, near), widen(simd, far)));
            sums.copy_from_slice(&words);
        }
        upsample::repeat_ends(sums, width);
        let [left_bias, right_bias] = bias.map(|b| b as i16);
        let (left_bias, right_bias) = (avx._mm256_set1_epi16(left_bias), avx._mm256_set1_epi16(right_bias));
        for (i, out) in out.chunks_exact_mut(32).take(vectors).enumerate() {
            let sums = &sums[16 * i..][..18];
            let middle = load_words(&sums[1..]);
            let left = avx2._mm256_add_epi16(lean(simd, middle, load_words(sums)), left_bias);
            let right = avx2._mm256_add_epi16(lean(simd, middle, load_words(&sums[2..])), right_bias);
            let (left, right) = (avx2._mm256_srli_epi16::<4>(left), avx2._mm256_srli_epi16::<4>(right));
            let pairs: [u8; 32] = cast(avx2._mm256_or_si256(left, avx2._mm256_slli_epi16::<8>(right)));
            out.copy_from_slice(&pairs);
        }
    }
}

vectorized! {
    /// [`upsample::blend`].
    pub(super) fn blend<'a>(simd: V3, lines: [&'a [u8]; 2], width: usize, bias: u16, out: &'a mut [u8]) -> () {
        let [near, far] = lines;
        let (avx, avx2) = (simd.avx, simd.avx2);
        let bias = avx._mm256_set1_epi16(bias as i16);
        for ((out, near), far) in
            out.chunks_exact_mut(16).zip(near.chunks_exact(16)).zip(far.chunks_exact(16)).take(width.div_ceil(16))
        {
            let sum = avx2._mm256_add_epi16(lean(simd, widen(simd, near), widen(simd, far)), bias);
            let words = avx2._mm256_srli_epi16::<2>(sum);
            let halves = avx2._mm256_permute4x64_epi64::<0b11_01_10_00>(avx2._mm256_packus_epi16(words, words));
            let [bytes, _]: [[u8; 16]; 2] = cast(halves);
            out.copy_from_slice(&bytes);
        }
    }
}

/// Every byte of 16 three times.
const THRICE: [[u8; 16]; 3] = thrice();

const fn thrice() -> [[u8; 16]; 3] {
    let mut out = [[0; 16]; 3];
    let mut at = 0;
    while at < 48 {
        out[at / 16][at % 16] = (at / 3) as u8;
        at += 1;
    }
    out
}

vectorized! {
    /// [`color::grey`](super::color::grey).
    pub(super) fn grey<'a>(simd: V3, line: &'a [u8], width: usize, out: &'a mut [u8]) -> () {
        let vectors = line.as_chunks::<16>().0.iter().take(width.div_ceil(16));
        for (pixels, y) in out.as_chunks_mut::<48>().0.iter_mut().zip(vectors) {
            for (to, places) in pixels.as_chunks_mut::<16>().0.iter_mut().zip(THRICE) {
                *to = cast(simd.ssse3._mm_shuffle_epi8(cast(*y), cast(places)));
            }
        }
    }
}

/// What the constants 1.402 and 1.772 have beyond 1 and 2, and the two of green, the second less 1; 16 bits of fraction.
const RED: i16 = 26_345;
const BLUE: i16 = -14_942;
const GREEN: [i16; 2] = [-22_554, 18_734];

/// From eight bytes of red and green each, or of blue, to the first 16 and the last 8 bytes of eight pixels.
const PLACES: [[u8; 16]; 4] = places();

const fn places() -> [[u8; 16]; 4] {
    let mut out = [[128; 16]; 4];
    let mut at = 0;
    while at < 24 {
        let (pixel, channel, half) = ((at / 3) as u8, (at % 3) as u8, at / 16);
        if channel < 2 {
            out[half][at % 16] = channel * 8 + pixel;
        } else {
            out[2 + half][at % 16] = pixel;
        }
        at += 1;
    }
    out
}

vectorized! {
    /// [`color::rgb`](super::color::rgb).
    pub(super) fn rgb<'a>(simd: V3, lines: [&'a [u8]; 3], width: usize, out: &'a mut [u8]) -> () {
        let [y, cb, cr] = lines;
        let (avx, avx2) = (simd.avx, simd.avx2);
        let middle = avx._mm256_set1_epi16(128);
        let green = avx._mm256_set1_epi32(cast::<[i16; 2], i32>(GREEN));
        let (one, half) = (avx._mm256_set1_epi16(1), avx._mm256_set1_epi32(1 << 15));
        let (red, blue) = (avx._mm256_set1_epi16(RED), avx._mm256_set1_epi16(BLUE));
        let mut places = [avx._mm256_setzero_si256(); 4];
        for (place, bytes) in places.iter_mut().zip(PLACES) {
            *place = avx2._mm256_broadcastsi128_si256(cast(bytes));
        }
        for i in 0..width.div_ceil(16) {
            let y = widen(simd, &y[16 * i..]);
            let cb = avx2._mm256_sub_epi16(widen(simd, &cb[16 * i..]), middle);
            let cr = avx2._mm256_sub_epi16(widen(simd, &cr[16 * i..]), middle);
            let (cb_2, cr_2) = (avx2._mm256_add_epi16(cb, cb), avx2._mm256_add_epi16(cr, cr));

            // Half of a product rounded down and increased is the product of the half, rounded.
            let part = avx2._mm256_add_epi16(avx2._mm256_mulhi_epi16(cr_2, red), one);
            let r = avx2._mm256_add_epi16(avx2._mm256_add_epi16(y, cr), avx2._mm256_srai_epi16::<1>(part));
            let part = avx2._mm256_add_epi16(avx2._mm256_mulhi_epi16(cb_2, blue), one);
            let b = avx2._mm256_add_epi16(avx2._mm256_add_epi16(y, cb_2), avx2._mm256_srai_epi16::<1>(part));
            let low = avx2._mm256_madd_epi16(avx2._mm256_unpacklo_epi16(cb, cr), green);
            let high = avx2._mm256_madd_epi16(avx2._mm256_unpackhi_epi16(cb, cr), green);
            let low = avx2._mm256_srai_epi32::<16>(avx2._mm256_add_epi32(low, half));
            let high = avx2._mm256_srai_epi32::<16>(avx2._mm256_add_epi32(high, half));
            let part = avx2._mm256_packs_epi32(low, high);
            let g = avx2._mm256_add_epi16(avx2._mm256_sub_epi16(y, cr), part);

            let rg = avx2._mm256_packus_epi16(r, g);
            let bb = avx2._mm256_packus_epi16(b, b);
            let (a, b) = (avx2._mm256_shuffle_epi8(rg, places[0]), avx2._mm256_shuffle_epi8(bb, places[2]));
            let first: [[u8; 16]; 2] = cast(avx2._mm256_or_si256(a, b));
            let (a, b) = (avx2._mm256_shuffle_epi8(rg, places[1]), avx2._mm256_shuffle_epi8(bb, places[3]));
            let last: [[u8; 16]; 2] = cast(avx2._mm256_or_si256(a, b));
            // Each write of 16 bytes begins where the one before it has ended, or covers its empty half.
            let out = &mut out[48 * i..][..56];
            out[..16].copy_from_slice(&first[0]);
            out[16..32].copy_from_slice(&last[0]);
            out[24..40].copy_from_slice(&first[1]);
            out[40..56].copy_from_slice(&last[1]);
        }
    }
}

/// One dimension of [`idct`](super::idct) on eight vectors, scaled up by 2^13.
#[inline(always)]
fn pass(simd: V3, x: [__m256i; 8]) -> [__m256i; 8] {
    let (avx, avx2) = (simd.avx, simd.avx2);
    macro_rules! add {
        ($a:expr, $b:expr) => {
            avx2._mm256_add_epi32($a, $b)
        };
    }
    macro_rules! sub {
        ($a:expr, $b:expr) => {
            avx2._mm256_sub_epi32($a, $b)
        };
    }
    macro_rules! mul {
        ($a:expr, $b:expr) => {
            avx2._mm256_mullo_epi32($a, avx._mm256_set1_epi32($b))
        };
    }
    let z1 = mul!(add!(x[2], x[6]), 4433);
    let t2 = sub!(z1, mul!(x[6], 15137));
    let t3 = add!(z1, mul!(x[2], 6270));
    let t0 = avx2._mm256_slli_epi32::<{ CONST_BITS as i32 }>(add!(x[0], x[4]));
    let t1 = avx2._mm256_slli_epi32::<{ CONST_BITS as i32 }>(sub!(x[0], x[4]));
    let even = [add!(t0, t3), add!(t1, t2), sub!(t1, t2), sub!(t0, t3)];

    let z1 = mul!(add!(x[7], x[1]), -7373);
    let z2 = mul!(add!(x[5], x[3]), -20995);
    let (z3, z4) = (add!(x[7], x[3]), add!(x[5], x[1]));
    let z5 = mul!(add!(z3, z4), 9633);
    let z3 = add!(mul!(z3, -16069), z5);
    let z4 = add!(mul!(z4, -3196), z5);
    let odd = [
        add!(mul!(x[1], 12299), add!(z1, z4)),
        add!(mul!(x[3], 25172), add!(z2, z3)),
        add!(mul!(x[5], 16819), add!(z2, z4)),
        add!(mul!(x[7], 2446), add!(z1, z3)),
    ];
    [
        add!(even[0], odd[0]),
        add!(even[1], odd[1]),
        add!(even[2], odd[2]),
        add!(even[3], odd[3]),
        sub!(even[3], odd[3]),
        sub!(even[2], odd[2]),
        sub!(even[1], odd[1]),
        sub!(even[0], odd[0]),
    ]
}

/// Rows to columns.
#[inline(always)]
fn transpose(simd: V3, x: [__m256i; 8]) -> [__m256i; 8] {
    let avx2 = simd.avx2;
    let mut a = x;
    for i in 0..4 {
        a[2 * i] = avx2._mm256_unpacklo_epi32(x[2 * i], x[2 * i + 1]);
        a[2 * i + 1] = avx2._mm256_unpackhi_epi32(x[2 * i], x[2 * i + 1]);
    }
    let mut b = a;
    for i in [0, 4] {
        for j in 0..2 {
            b[i + 2 * j] = avx2._mm256_unpacklo_epi64(a[i + j], a[i + j + 2]);
            b[i + 2 * j + 1] = avx2._mm256_unpackhi_epi64(a[i + j], a[i + j + 2]);
        }
    }
    let mut out = b;
    for i in 0..4 {
        out[i] = avx2._mm256_permute2x128_si256::<0x20>(b[i], b[i + 4]);
        out[i + 4] = avx2._mm256_permute2x128_si256::<0x31>(b[i], b[i + 4]);
    }
    out
}

/// Coefficients before this one, in zigzag order, lie in the first four rows and columns.
const CORNER: usize = 10;

vectorized! {
    /// [`idct::inverse`](super::idct::inverse) of a block whose coefficients from `end` on are zero.
    pub(super) fn inverse<'a>(
        simd: V3,
        block: &'a [i16; 64],
        quant: &'a [i32; 64],
        end: usize,
        out: &'a mut [u8],
        stride: usize,
    ) -> () {
        let out = &mut out[..7 * stride + 8];
        if end <= CORNER {
            transform::<4>(simd, block, quant, out, stride);
        } else {
            transform::<8>(simd, block, quant, out, stride);
        }
    }
}

/// With coefficients in the first `SIDE` rows and columns only.
#[inline(always)]
fn transform<const SIDE: usize>(simd: V3, block: &[i16; 64], quant: &[i32; 64], out: &mut [u8], stride: usize) {
    const BETWEEN: i32 = CONST_BITS as i32 - 2;
    const AFTER: i32 = CONST_BITS as i32 + 5;
    let (avx, avx2) = (simd.avx, simd.avx2);
    let zero = avx._mm256_setzero_si256();
    let mut x = [zero; 8];
    for ((x, block), quant) in x.iter_mut().zip(block.as_chunks::<8>().0).zip(quant.as_chunks::<8>().0).take(SIDE) {
        *x = avx2._mm256_mullo_epi32(avx2._mm256_cvtepi16_epi32(cast(*block)), cast(*quant));
    }
    let mut x = pass(simd, x);
    let half = avx._mm256_set1_epi32(1 << (BETWEEN - 1));
    for x in &mut x {
        *x = avx2._mm256_srai_epi32::<BETWEEN>(avx2._mm256_add_epi32(*x, half));
    }
    let mut x = transpose(simd, x);
    for x in &mut x[SIDE..] {
        *x = zero;
    }
    let mut x = pass(simd, x);
    let half = avx._mm256_set1_epi32(1 << (AFTER - 1));
    for x in &mut x {
        *x = avx2._mm256_srai_epi32::<AFTER>(avx2._mm256_add_epi32(*x, half));
    }
    // Vectors are columns of the block now. To words, and back to rows in fours of columns.
    let middle = avx._mm256_set1_epi16(128);
    let mut rows = [zero; 4];
    for i in 0..2 {
        let x = &x[4 * i..];
        let a = avx2._mm256_add_epi16(avx2._mm256_packs_epi32(x[0], x[2]), middle);
        let b = avx2._mm256_add_epi16(avx2._mm256_packs_epi32(x[1], x[3]), middle);
        let (low, high) = (avx2._mm256_unpacklo_epi16(a, b), avx2._mm256_unpackhi_epi16(a, b));
        rows[i] = avx2._mm256_unpacklo_epi32(low, high);
        rows[2 + i] = avx2._mm256_unpackhi_epi32(low, high);
    }
    for i in 0..2 {
        let bytes = avx2._mm256_packus_epi16(rows[2 * i], rows[2 * i + 1]);
        let lines: [[u8; 8]; 4] = cast(avx2._mm256_shuffle_epi32::<0b11_01_10_00>(bytes));
        for (line, row) in lines.iter().zip([2 * i, 2 * i + 1, 2 * i + 4, 2 * i + 5]) {
            out[row * stride..][..8].copy_from_slice(line);
        }
    }
}
