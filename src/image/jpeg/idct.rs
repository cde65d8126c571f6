//! The accurate integer inverse DCT (Loeffler, Ligtenberg and Moschytz with 13-bit constants), as in `jidctint.c`.

/// Bits of fraction of the constants.
pub(super) const CONST_BITS: u32 = 13;

/// A sample of a picture; its values begin at 0.
pub(super) trait Sample: Copy {
    /// Bits of a sample.
    const BITS: u32;
    /// Bits of fraction between the two passes; fewer for deeper samples, lest they overflow.
    const PASS1_BITS: u32;
    /// Of a value between 0 and the largest.
    fn new(value: i32) -> Self;

    /// Of a value around 0.
    #[inline(always)]
    fn shifted(value: i32) -> Self {
        Self::new(value.saturating_add(1 << (Self::BITS - 1)).clamp(0, (1 << Self::BITS) - 1))
    }
}

impl Sample for u8 {
    const BITS: u32 = 8;
    const PASS1_BITS: u32 = 2;

    #[inline(always)]
    fn new(value: i32) -> Self {
        value as Self
    }
}

impl Sample for u16 {
    const BITS: u32 = 12;
    const PASS1_BITS: u32 = 1;

    #[inline(always)]
    fn new(value: i32) -> Self {
        value as Self
    }
}

/// One dimension on eight values, scaled up by 2^13.
#[inline(always)]
fn pass(x: [i32; 8]) -> [i32; 8] {
    let z1 = (x[2].wrapping_add(x[6])).wrapping_mul(4433);
    let t2 = z1.wrapping_sub(x[6].wrapping_mul(15137));
    let t3 = z1.wrapping_add(x[2].wrapping_mul(6270));
    let t0 = x[0].wrapping_add(x[4]).wrapping_shl(CONST_BITS);
    let t1 = x[0].wrapping_sub(x[4]).wrapping_shl(CONST_BITS);
    let even = [t0.wrapping_add(t3), t1.wrapping_add(t2), t1.wrapping_sub(t2), t0.wrapping_sub(t3)];

    let z1 = x[7].wrapping_add(x[1]).wrapping_mul(-7373);
    let z2 = x[5].wrapping_add(x[3]).wrapping_mul(-20995);
    let (z3, z4) = (x[7].wrapping_add(x[3]), x[5].wrapping_add(x[1]));
    let z5 = z3.wrapping_add(z4).wrapping_mul(9633);
    let z3 = z3.wrapping_mul(-16069).wrapping_add(z5);
    let z4 = z4.wrapping_mul(-3196).wrapping_add(z5);
    let odd = [
        x[1].wrapping_mul(12299).wrapping_add(z1).wrapping_add(z4),
        x[3].wrapping_mul(25172).wrapping_add(z2).wrapping_add(z3),
        x[5].wrapping_mul(16819).wrapping_add(z2).wrapping_add(z4),
        x[7].wrapping_mul(2446).wrapping_add(z1).wrapping_add(z3),
    ];
    std::array::from_fn(|i| match i {
        0..=3 => even[i].wrapping_add(odd[i]),
        _ => even[7 - i].wrapping_sub(odd[7 - i]),
    })
}

#[inline(always)]
fn descale(x: i32, bits: u32) -> i32 {
    x.wrapping_add(1 << (bits - 1)) >> bits
}

/// [`inverse`] of a block that has only its first coefficient.
pub(super) fn flat<S: Sample>(first: i16, quant: i32, out: &mut [S], stride: usize) {
    let dc = i32::from(first).wrapping_mul(quant).wrapping_shl(S::PASS1_BITS);
    let value = S::shifted(descale(dc, S::PASS1_BITS + 3));
    for row in out.chunks_mut(stride).take(8) {
        row[..8].fill(value);
    }
}

/// Dequantises `block` (natural order) and writes its 8x8 samples to `out`, rows `stride` apart.
pub(super) fn inverse<S: Sample>(block: &[i16; 64], quant: &[i32; 64], out: &mut [S], stride: usize) {
    if block[1..].iter().all(|c| *c == 0) {
        return flat(block[0], quant[0], out, stride);
    }
    let mut work = [0i32; 64];
    for column in 0..8 {
        let values = std::array::from_fn(|k| {
            let at = k * 8 + column;
            i32::from(block[at]).wrapping_mul(quant[at])
        });
        for (k, value) in pass(values).into_iter().enumerate() {
            work[k * 8 + column] = descale(value, CONST_BITS - S::PASS1_BITS);
        }
    }
    for (row, line) in out.chunks_mut(stride).take(8).enumerate() {
        let values = std::array::from_fn(|k| work[row * 8 + k]);
        for (sample, value) in line[..8].iter_mut().zip(pass(values)) {
            *sample = S::shifted(descale(value, CONST_BITS + S::PASS1_BITS + 3));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The largest difference from the transform in real numbers.
    fn off<S: Sample + Default + Into<f64>>(step: i32) -> f64 {
        let mut block = [0i16; 64];
        for (i, c) in block.iter_mut().enumerate() {
            *c = ((i * 37 + 11) % 23) as i16 - 11;
        }
        let mut out = [S::default(); 64];
        inverse(&block, &[step; 64], &mut out, 8);
        let cosine = |k: usize, n: usize| ((2 * n + 1) as f64 * k as f64 * std::f64::consts::PI / 16.0).cos();
        let scale = |k: usize| if k == 0 { 0.5f64.sqrt() } else { 1.0 };
        let real = |x: usize, y: usize| {
            let term = |i: usize| {
                let (u, v) = (i % 8, i / 8);
                scale(u) * scale(v) * f64::from(block[i]) * f64::from(step) * cosine(u, x) * cosine(v, y)
            };
            let middle = f64::from(S::BITS - 1).exp2();
            ((0..64).map(term).sum::<f64>() / 4.0 + middle).clamp(0.0, 2.0 * middle - 1.0)
        };
        (0..64).map(|i| (out[i].into() - real(i % 8, i / 8)).abs()).fold(0.0, f64::max)
    }

    #[test]
    fn agrees_with_the_real_transform_within_one() {
        assert!(off::<u8>(3) <= 1.0);
        assert!(off::<u16>(40) <= 1.0);
    }
}
