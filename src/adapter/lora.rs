//! The low-rank update of one `Linear`: `y = x W + (alpha / r) (dropout(x) A) B` (Hu et al., arXiv 2106.09685).
//!
//! It hangs on the `weight` of a stock [`burn::nn::Linear`], so that every model can be adapted without knowing it; the
//! shared linear helper adds [`Lora::branch`] to its output. The composed weight is only built to merge.

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering},
};

use burn::{
    module::{Module, Param, Reparameterization},
    tensor::{DType, Device, FloatDType, Tensor, TensorData, module::linear},
};
use rand::Rng;

use crate::random;

/// Which forward pass the dropout masks belong to, shared by all updates of a model. Off outside training, so that
/// evaluation never drops anything; the recomputed pass sees the same value as the first one, and so the same masks.
#[derive(Debug, Clone)]
pub struct DropoutClock(Arc<AtomicU64>);

impl Default for DropoutClock {
    fn default() -> Self {
        Self(Arc::new(AtomicU64::new(Self::OFF)))
    }
}

impl DropoutClock {
    const OFF: u64 = u64::MAX;

    /// Masks of pass `index` from now on.
    pub fn start(&self, index: u64) {
        self.0.store(index, Ordering::Relaxed);
    }

    /// No dropout from now on.
    pub fn stop(&self) {
        self.0.store(Self::OFF, Ordering::Relaxed);
    }

    fn now(&self) -> Option<u64> {
        Some(self.0.load(Ordering::Relaxed)).filter(|t| *t != Self::OFF)
    }
}

/// Dropout of one update: share, and the key of its masks.
#[derive(Debug, Clone)]
pub struct Dropout {
    /// Share of inputs that is zeroed, 0 to below 1.
    pub rate: f64,
    /// Seed of the masks.
    pub seed: u64,
    /// Name of the module, part of the key.
    pub module: String,
    /// Forward pass, part of the key.
    pub clock: DropoutClock,
}

impl Dropout {
    /// Zeroes a share of `x` and scales the rest up; returns `x` as it is outside training.
    fn apply<const D: usize>(&self, x: Tensor<D>) -> Tensor<D> {
        let Some(pass) = self.clock.now().filter(|_| self.rate > 0.0) else { return x };
        let shape = x.shape();
        let keep = 1.0 - self.rate;
        let mut draws = random::stream(self.seed, &format!("dropout {}", self.module), pass);
        let below = (keep * f64::from(u32::MAX)) as u32;
        let scale = (1.0 / keep) as f32;
        let mask: Vec<f32> =
            (0..shape.num_elements()).map(|_| if draws.next_u32() < below { scale } else { 0.0 }).collect();
        let device = x.device().without_autodiff();
        let mask = Tensor::<D>::from_data(TensorData::new(mask, shape), (&device, x.dtype()));
        x * mask
    }
}

/// Low-rank update attached to a weight `[d_in, d_out]`. Its parameters are always f32.
#[derive(Module, Debug)]
pub struct Lora {
    /// `[d_in, r]`
    pub a: Param<Tensor<2>>,
    /// `[r, d_out]`
    pub b: Param<Tensor<2>>,
    /// `lora_alpha / r`
    pub scale: f64,
    /// Dropout on the input.
    #[module(skip)]
    pub dropout: Dropout,
}

/// Shape and scale of an update to create.
#[derive(Debug, Clone)]
pub struct LoraSpec {
    /// Rank.
    pub r: usize,
    /// `lora_alpha / r`
    pub scale: f64,
    /// Dropout; its seed and module name also key the initial `A`.
    pub dropout: Dropout,
}

impl Lora {
    /// A new update of a weight `[d_in, d_out]` on `device`: A drawn as PEFT does (Kaiming uniform with a = sqrt 5, so
    /// uniform within `1 / sqrt(d_in)`), B zero, so that the model starts unchanged.
    #[must_use]
    pub fn init(spec: &LoraSpec, d_in: usize, d_out: usize, device: &Device) -> Self {
        let mut draws = random::stream(spec.dropout.seed, &format!("lora_A {}", spec.dropout.module), 0);
        let bound = 1.0 / (d_in.max(1) as f64).sqrt();
        let a: Vec<f32> = (0..d_in * spec.r)
            .map(|_| ((f64::from(draws.next_u32()) / f64::from(u32::MAX) * 2.0 - 1.0) * bound) as f32)
            .collect();
        let a = Tensor::from_data(TensorData::new(a, [d_in, spec.r]), (device, DType::F32));
        let b = Tensor::zeros([spec.r, d_out], (device, DType::F32));
        Self { a: Param::from_tensor(a), b: Param::from_tensor(b), scale: spec.scale, dropout: spec.dropout.clone() }
    }

    /// What the update adds to the output of the linear layer, in the dtype of `x`.
    ///
    /// # Shapes
    /// `[.., d_in]` -> `[.., d_out]`
    #[must_use]
    pub fn branch<const D: usize>(&self, x: Tensor<D>) -> Tensor<D> {
        let dtype = x.dtype();
        let x = if dtype == DType::F32 { x } else { x.cast(DType::F32) };
        // The scale goes to the narrow side: r columns instead of d_out.
        let narrow = linear(self.dropout.apply(x), self.a.val(), None).mul_scalar(self.scale);
        let wide = linear(narrow, self.b.val(), None);
        if dtype == DType::F32 { wide } else { wide.cast(FloatDType::from(dtype)) }
    }

    /// Whether inputs of the update are dropped now.
    #[must_use]
    pub fn drops(&self) -> bool {
        self.dropout.rate > 0.0 && self.dropout.clock.now().is_some()
    }

    /// `scale * A B`, f32.
    ///
    /// # Shapes
    /// `[d_in, d_out]`
    #[must_use]
    pub fn delta(&self) -> Tensor<2> {
        self.a.val().matmul(self.b.val()).mul_scalar(self.scale)
    }
}

impl Reparameterization for Lora {
    const NAME: &'static str = "lora";

    /// The merged weight, in the dtype of `base`.
    fn apply<const D: usize>(&self, base: Tensor<D>) -> Tensor<D> {
        let dtype = FloatDType::from(base.dtype());
        let shape = base.shape();
        let sum = base.cast(DType::F32) + self.delta().reshape(shape);
        sum.cast(dtype)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lora(rate: f64) -> Lora {
        let dropout = Dropout { rate, seed: 7, module: "m".into(), clock: DropoutClock::default() };
        let device = Device::flex();
        let mut lora = Lora::init(&LoraSpec { r: 2, scale: 1.5, dropout }, 6, 4, &device);
        let b: Vec<f32> = (0..8).map(|i| i as f32 * 0.25 - 1.0).collect();
        lora.b = Param::from_tensor(Tensor::from_data(TensorData::new(b, [2, 4]), &device));
        lora
    }

    fn input() -> Tensor<3> {
        let x: Vec<f32> = (0..36).map(|i| (i as f32 * 0.7).sin()).collect();
        Tensor::from_data(TensorData::new(x, [2, 3, 6]), &Device::flex())
    }

    #[test]
    fn the_branch_equals_the_merged_weight() {
        let lora = lora(0.0);
        let base = Tensor::<2>::ones([6, 4], &Device::flex());
        let merged = linear(input(), Reparameterization::apply(&lora, base.clone()), None);
        let branched = linear(input(), base, None) + lora.branch(input());
        let worst: f32 = (merged - branched).abs().max().into_scalar();
        assert!(worst < 1e-5, "{worst}");
    }

    #[test]
    fn a_new_update_changes_nothing_and_depends_on_the_module() {
        let dropout = Dropout { rate: 0.0, seed: 7, module: "m".into(), clock: DropoutClock::default() };
        let spec = LoraSpec { r: 2, scale: 1.0, dropout };
        let fresh = Lora::init(&spec, 6, 4, &Device::flex());
        assert_eq!(fresh.branch(input()).abs().max().into_scalar::<f32>(), 0.0);
        let a: Vec<f32> = fresh.a.val().into_data().try_to_vec().unwrap();
        assert!(a.iter().all(|x| x.abs() <= 1.0 / 6f32.sqrt()) && a.iter().any(|x| x.abs() > 0.2));
        let mut other = spec.clone();
        other.dropout.module = "n".into();
        let b: Vec<f32> = Lora::init(&other, 6, 4, &Device::flex()).a.val().into_data().try_to_vec().unwrap();
        assert_ne!(a, b);
    }

    #[test]
    fn dropout_repeats_within_a_pass_and_is_off_outside() {
        let lora = lora(0.5);
        let out = || lora.branch(input()).into_data().try_to_vec::<f32>().unwrap();
        let off = out();
        lora.dropout.clock.start(3);
        let first = out();
        assert_eq!(first, out());
        assert_ne!(first, off);
        lora.dropout.clock.start(4);
        assert_ne!(first, out());
        lora.dropout.clock.stop();
        assert_eq!(off, out());
    }
}
