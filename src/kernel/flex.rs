//! What the Flex implementations share: contiguous f32 slices, vector dispatch, a fast exponential.

use burn::{
    backend::flex::{FlexTensor, Layout},
    tensor::{Bytes, DType, Shape},
};

/// Elements that one task works on.
pub(super) const CHUNK: usize = 16 * 1024;

/// Whether all tensors are f32 and fused implementations are wanted.
pub(super) fn applies(tensors: &[&FlexTensor]) -> bool {
    super::fused() && tensors.iter().all(|t| t.dtype() == DType::F32)
}

/// Values of a tensor made by [`FlexTensor::to_contiguous`].
pub(super) fn slice(tensor: &FlexTensor) -> &[f32] {
    tensor.as_slice::<f32>().expect("contiguous f32 tensor")
}

/// A tensor that owns `values`.
pub(super) fn tensor(values: Vec<f32>, shape: Shape) -> FlexTensor {
    FlexTensor::new(Bytes::from_elems(values), Layout::contiguous(shape), DType::F32)
}

/// Calls `$body::<FMA>(..)`, compiled for the widest vectors of this processor; `FMA` says that a fused multiply-add is
/// an instruction there, and not the library call that it is elsewhere.
///
/// The instruction set is asked for by name: `pulp::Arch` knows it only with a feature of pulp that Burn's matrix
/// multiplication, which shares the crate, leaves off.
macro_rules! vectorized {
    ($body:ident($($argument:expr),* $(,)?)) => {{
        #[cfg(target_arch = "x86_64")]
        match pulp::x86::V3::try_new() {
            Some(wide) => wide.vectorize(|| $body::<true>($($argument),*)),
            None => $body::<false>($($argument),*),
        }
        #[cfg(not(target_arch = "x86_64"))]
        $body::<{ cfg!(target_arch = "aarch64") }>($($argument),*)
    }};
}
pub(super) use vectorized;

/// `a * b + c`.
#[inline(always)]
pub(super) fn mul_add<const FMA: bool>(a: f32, b: f32, c: f32) -> f32 {
    if FMA { a.mul_add(b, c) } else { a * b + c }
}

/// Natural exponential without branches, relative error below 1e-7 on [-87, 88], clamped outside.
///
/// `x = n ln 2 + r`, a polynomial in `r` (coefficients of the Cephes library), then `n` added to the exponent bits.
#[inline(always)]
pub(super) fn exp<const FMA: bool>(x: f32) -> f32 {
    /// Adding it rounds to an integer that sits in the low mantissa bits.
    const ROUND: f32 = 12_582_912.0;
    const LN_2_HIGH: f32 = 0.693_359_4;
    const LN_2_LOW: f32 = -2.121_944_4e-4;
    let x = if x < -87.0 { -87.0 } else { x };
    let x = if x > 88.0 { 88.0 } else { x };
    let shifted = mul_add::<FMA>(x, std::f32::consts::LOG2_E, ROUND);
    let n = shifted - ROUND;
    let r = mul_add::<FMA>(n, -LN_2_HIGH, x);
    let r = mul_add::<FMA>(n, -LN_2_LOW, r);
    let p = mul_add::<FMA>(1.987_569_1e-4, r, 1.398_199_9e-3);
    let p = mul_add::<FMA>(p, r, 8.333_452e-3);
    let p = mul_add::<FMA>(p, r, 4.166_579_6e-2);
    let p = mul_add::<FMA>(p, r, 1.666_666_5e-1);
    let p = mul_add::<FMA>(p, r, 0.5);
    let p = mul_add::<FMA>(p, r * r, r) + 1.0;
    f32::from_bits(p.to_bits().wrapping_add(shifted.to_bits() << 23))
}

/// Lanes of a reduction; a plain sum of f32 is never vectorised.
pub(super) const LANES: usize = 16;

/// Sum of `f(i)` over `0..n`, in lanes.
#[inline(always)]
pub(super) fn sum(n: usize, f: impl Fn(usize) -> f32) -> f32 {
    let mut lanes = [0f32; LANES];
    let whole = n / LANES * LANES;
    for start in (0..whole).step_by(LANES) {
        for (lane, value) in lanes.iter_mut().enumerate() {
            *value += f(start + lane);
        }
    }
    let mut total = lanes.iter().sum::<f32>();
    for i in whole..n {
        total += f(i);
    }
    total
}

/// Largest of `row`.
#[inline(always)]
pub(super) fn max(row: &[f32]) -> f32 {
    let mut lanes = [f32::NEG_INFINITY; LANES];
    let chunks = row.chunks_exact(LANES);
    let rest = chunks.remainder();
    for chunk in chunks {
        for (lane, value) in lanes.iter_mut().zip(chunk) {
            *lane = if *value > *lane { *value } else { *lane };
        }
    }
    lanes.iter().chain(rest).fold(f32::NEG_INFINITY, |m, v| if *v > m { *v } else { m })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_exponential_is_accurate() {
        for i in -8700..8800 {
            let x = i as f32 / 100.0;
            let truth = f64::from(x).exp();
            for found in [exp::<true>(x), exp::<false>(x)] {
                assert!((f64::from(found) / truth - 1.0).abs() < 3e-7, "exp({x}) = {found}, expected {truth}");
            }
        }
    }

    #[test]
    fn reductions_take_every_element() {
        let row: Vec<f32> = (0..37).map(|i| i as f32).collect();
        assert_eq!(sum(row.len(), |i| row[i]), 666.0);
        assert_eq!(max(&row), 36.0);
    }
}
