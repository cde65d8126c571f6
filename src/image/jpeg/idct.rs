//! The accurate integer inverse DCT (Loeffler, Ligtenberg and Moschytz with 13-bit constants), as in `jidctint.c`.

const CONST_BITS: u32 = 13;
const PASS1_BITS: u32 = 2;

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

/// Dequantises `block` (natural order) and writes its 8x8 samples to `out`, rows `stride` apart.
pub(super) fn inverse(block: &[i16; 64], quant: &[u16; 64], out: &mut [u8], stride: usize) {
    if block[1..].iter().all(|c| *c == 0) {
        let dc = i32::from(block[0]).wrapping_mul(i32::from(quant[0])).wrapping_shl(PASS1_BITS);
        let value = (descale(dc, PASS1_BITS + 3) + 128).clamp(0, 255) as u8;
        for row in out.chunks_mut(stride).take(8) {
            row[..8].fill(value);
        }
        return;
    }
    let mut work = [0i32; 64];
    for column in 0..8 {
        let values = std::array::from_fn(|k| {
            let at = k * 8 + column;
            i32::from(block[at]).wrapping_mul(i32::from(quant[at]))
        });
        for (k, value) in pass(values).into_iter().enumerate() {
            work[k * 8 + column] = descale(value, CONST_BITS - PASS1_BITS);
        }
    }
    for (row, line) in out.chunks_mut(stride).take(8).enumerate() {
        let values = std::array::from_fn(|k| work[row * 8 + k]);
        for (sample, value) in line[..8].iter_mut().zip(pass(values)) {
            *sample = descale(value, CONST_BITS + PASS1_BITS + 3).saturating_add(128).clamp(0, 255) as u8;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn agrees_with_the_real_transform_within_one() {
        let mut block = [0i16; 64];
        for (i, c) in block.iter_mut().enumerate() {
            *c = ((i * 37 + 11) % 23) as i16 - 11;
        }
        let quant = [3u16; 64];
        let mut out = [0u8; 64];
        inverse(&block, &quant, &mut out, 8);
        for y in 0..8 {
            for x in 0..8 {
                let mut sum = 0.0;
                for v in 0..8 {
                    for u in 0..8 {
                        let scale = |k: usize| if k == 0 { 0.5f64.sqrt() } else { 1.0 };
                        let angle =
                            |k: usize, n: usize| ((2 * n + 1) as f64 * k as f64 * std::f64::consts::PI / 16.0).cos();
                        sum += scale(u) * scale(v) * f64::from(block[v * 8 + u]) * 3.0 * angle(u, x) * angle(v, y);
                    }
                }
                let real = (sum / 4.0 + 128.0).clamp(0.0, 255.0);
                assert!((f64::from(out[y * 8 + x]) - real).abs() <= 1.0, "({x},{y})");
            }
        }
    }
}
