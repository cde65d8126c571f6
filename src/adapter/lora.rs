//! The low-rank update of one `Linear`: `y = x W + (alpha / r) (dropout(x) A) B` (Hu et al., arXiv 2106.09685).
//!
//! It hangs on the `weight` of a stock [`burn::nn::Linear`] (as an [`Attachment`](super::attachment::Attachment)), so that
//! every model can be adapted without knowing it; the shared linear helper adds [`Lora::branch`] to its output. The
//! composed weight is only built to merge. With magnitudes it is DoRA (Liu et al., arXiv 2402.09353).

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering},
};

use burn::{
    module::{Module, Param},
    tensor::{DType, Device, FloatDType, Tensor, TensorData, module::linear},
};
use rand::Rng;

use super::init::{self, InitLoraWeights};
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
    /// `x` with a share of its values zeroed and the rest scaled up; none outside training.
    fn apply<const D: usize>(&self, x: Tensor<D>) -> Option<Tensor<D>> {
        let pass = self.clock.now().filter(|_| self.rate > 0.0)?;
        let shape = x.shape();
        let keep = 1.0 - self.rate;
        let mut draws = random::stream(self.seed, &format!("dropout {}", self.module), pass);
        let below = (keep * f64::from(u32::MAX)) as u32;
        let scale = (1.0 / keep) as f32;
        let mask: Vec<f32> =
            (0..shape.num_elements()).map(|_| if draws.next_u32() < below { scale } else { 0.0 }).collect();
        let device = x.device().without_autodiff();
        let mask = Tensor::<D>::from_data(TensorData::new(mask, shape), (&device, x.dtype()));
        Some(x * mask)
    }
}

/// Low-rank update of a weight `[d_in, d_out]`. Its parameters are always f32.
#[derive(Module, Debug)]
pub struct Lora {
    /// `[d_in, r]`
    pub a: Param<Tensor<2>>,
    /// `[r, d_out]`
    pub b: Param<Tensor<2>>,
    /// Lengths of the updated weight's columns, `[d_out]`, where they are trained (DoRA).
    pub magnitude: Option<Param<Tensor<1>>>,
    /// `lora_alpha / r`, or what stands for it.
    pub scale: f64,
    /// Dropout on the input.
    #[module(skip)]
    pub dropout: Dropout,
    /// What never changes.
    #[module(skip)]
    pub fixed: Fixed,
}

/// Frozen values of an update.
#[derive(Debug, Clone, Default)]
pub struct Fixed {
    /// `A` and `B` of the start, whose product is taken off the weight (PiSSA, OLoRA): as frozen columns of the update, so
    /// that the weight stays as it is in its file.
    pub initial: Option<(Tensor<2>, Tensor<2>)>,
    /// Sums of squares of the frozen weight's columns, `[d_out]`, for DoRA's norm.
    pub squares: Option<Tensor<1>>,
}

/// Shape and scale of an update to create.
#[derive(Debug, Clone)]
pub struct LoraSpec {
    /// Rank.
    pub r: usize,
    /// `lora_alpha / r`, or what stands for it.
    pub scale: f64,
    /// How it starts.
    pub init: InitLoraWeights,
    /// Whether the lengths of columns are trained.
    pub use_dora: bool,
    /// Dropout; its seed and module name also key the initial `A`.
    pub dropout: Dropout,
}

impl Lora {
    /// A new update of the frozen weight that `weight` yields, on `device`: A drawn as PEFT does (Kaiming uniform with
    /// a = sqrt 5, so uniform within `1 / sqrt(d_in)`) and B zero, or made from the weight; the model starts unchanged.
    ///
    /// # Shapes
    /// `weight` `[d_in, d_out]`
    #[must_use]
    pub fn init(spec: &LoraSpec, d_in: usize, d_out: usize, device: &Device, weight: impl Fn() -> Tensor<2>) -> Self {
        let (a, b) = init::factors(spec, d_in, d_out, device, &weight);
        let plain = |t: &Tensor<2>| t.clone().without_autodiff();
        let initial = spec.init.changes_the_weight().then(|| (plain(&a), plain(&b)));
        let squares = spec.use_dora.then(|| {
            let weight = weight();
            let weight = if weight.dtype() == DType::F32 { weight } else { weight.cast(DType::F32) };
            weight.square().sum_dim(0).reshape([d_out])
        });
        // The start changes nothing, so the lengths are those of the weight.
        let lengths = |s: Tensor<1>| Tensor::from_data(s.sqrt().into_data(), (device, DType::F32));
        let magnitude = squares.clone().map(|s| Param::from_tensor(lengths(s)));
        Self {
            a: Param::from_tensor(a),
            b: Param::from_tensor(b),
            magnitude,
            scale: spec.scale,
            dropout: spec.dropout.clone(),
            fixed: Fixed { initial, squares },
        }
    }

    /// `A` and `B` with the frozen columns of the start, if there are any: what the update consists of. Without gradient.
    ///
    /// # Shapes
    /// `[d_in, r]`, `[r, d_out]`
    #[must_use]
    pub fn factors(&self) -> (Tensor<2>, Tensor<2>) {
        let (a, b) = (self.a.val().without_autodiff(), self.b.val().without_autodiff());
        match self.fixed.initial.clone() {
            None => (a, b),
            Some((a0, b0)) => (Tensor::cat(vec![a, a0], 1), Tensor::cat(vec![b, b0.neg()], 0)),
        }
    }

    /// What the update adds to the output of the linear layer, in the dtype of `x`.
    ///
    /// # Shapes
    /// `[.., d_in]` -> `[.., d_out]`
    #[must_use]
    pub fn branch<const D: usize>(&self, x: Tensor<D>) -> Tensor<D> {
        let dropped = self.dropped(x.clone()).unwrap_or(x);
        self.branch_of(dropped)
    }

    /// [`Lora::branch`] of an input that has passed the dropout.
    #[must_use]
    pub fn branch_of<const D: usize>(&self, x: Tensor<D>) -> Tensor<D> {
        let dtype = x.dtype();
        let x = if dtype == DType::F32 { x } else { x.cast(DType::F32) };
        // The scale goes to the narrow side: r columns instead of d_out.
        let through = |x, a, b| linear(linear(x, a, None).mul_scalar(self.scale), b, None);
        let wide = match self.fixed.initial.clone() {
            None => through(x, self.a.val(), self.b.val()),
            Some((a0, b0)) => through(x.clone(), self.a.val(), self.b.val()) - through(x, a0, b0),
        };
        if dtype == DType::F32 { wide } else { wide.cast(FloatDType::from(dtype)) }
    }

    /// Whether inputs of the update are dropped now.
    #[must_use]
    pub fn drops(&self) -> bool {
        self.dropout.rate > 0.0 && self.dropout.clock.now().is_some()
    }

    /// `x` after the dropout; none where it is off.
    #[must_use]
    pub fn dropped<const D: usize>(&self, x: Tensor<D>) -> Option<Tensor<D>> {
        self.dropout.apply(x)
    }

    /// `scale * A B`, f32, without gradient.
    ///
    /// # Shapes
    /// `[d_in, d_out]`
    #[must_use]
    pub fn delta(&self) -> Tensor<2> {
        let (a, b) = self.factors();
        a.matmul(b).mul_scalar(self.scale)
    }

    /// Lengths of the columns of the updated weight `W + s A B`, without gradient. `times` multiplies rows with the frozen
    /// weight, so that no sum as large as the weight is made: `|w|^2 + 2 s b (A^T w) + s^2 b (A^T A b)`.
    ///
    /// # Shapes
    /// `[d_out]`
    pub(super) fn norm(&self, times: impl FnOnce(Tensor<2>) -> Tensor<2>) -> Tensor<1> {
        let (a, b) = self.factors();
        let turned = a.clone().transpose();
        let crossed = times(turned.clone()).without_autodiff().mul_scalar(2.0 * self.scale);
        let inner = turned.matmul(a).matmul(b.clone()).mul_scalar(self.scale * self.scale);
        let d_out = b.dims()[1];
        let change = (b * (crossed + inner)).sum_dim(0).reshape([d_out]);
        let squares = self.fixed.squares.clone().expect("kept for updates with magnitudes");
        (squares.without_autodiff() + change).clamp_min(0.0).sqrt()
    }
}

#[cfg(test)]
mod tests {
    use burn::module::Reparameterization;

    use super::{
        super::attachment::{Attachment, Folding, Mode},
        *,
    };

    fn spec(rate: f64, module: &str) -> LoraSpec {
        let dropout = Dropout { rate, seed: 7, module: module.into(), clock: DropoutClock::default() };
        LoraSpec { r: 2, scale: 1.5, init: InitLoraWeights::default(), use_dora: false, dropout }
    }

    fn random<const D: usize>(shape: [usize; D], phase: f32) -> Tensor<D> {
        let values = (0..shape.iter().product()).map(|i| (i as f32 * 0.7 + phase).sin()).collect();
        Tensor::from_data(TensorData::new::<f32, _>(values, shape), &Device::flex())
    }

    fn lora(spec: &LoraSpec) -> Lora {
        let mut lora = Lora::init(spec, 6, 4, &Device::flex(), || random([6, 4], 0.1));
        lora.b = Param::from_tensor(lora.b.val() + random([2, 4], 0.5));
        lora
    }

    fn hung(lora: Lora) -> Attachment {
        Attachment { lora: Some(lora), packed: None, folding: Folding::default() }
    }

    fn input() -> Tensor<3> {
        random([2, 3, 6], 0.0)
    }

    fn worst<const D: usize>(a: Tensor<D>, b: Tensor<D>) -> f32 {
        (a - b).abs().max().into_scalar()
    }

    fn kinds() -> Vec<LoraSpec> {
        let plain = spec(0.0, "m");
        let mut kinds = Vec::new();
        for name in ["", "gaussian", "pissa", "pissa_niter_4", "olora"] {
            for use_dora in [false, true] {
                let init =
                    if name.is_empty() { InitLoraWeights::default() } else { InitLoraWeights::Name(name.into()) };
                kinds.push(LoraSpec { init, use_dora, ..plain.clone() });
            }
        }
        kinds
    }

    #[test]
    fn the_layer_equals_the_folded_weight_and_folding_is_undone() {
        for spec in kinds() {
            let (base, bias) = (random::<2>([6, 4], 0.1), random::<1>([4], 0.3));
            let hung = hung(lora(&spec));
            let folded = hung.folded(base.clone(), None);
            let expected = linear(input(), folded.clone(), Some(bias.clone()));
            let found = hung.forward(input(), base.clone(), Some(bias.clone()));
            assert!(worst(found, expected.clone()) < 1e-5, "{spec:?}");
            let during = |mode, weight: &Tensor<2>| {
                hung.folding.during(mode, || hung.forward(input(), weight.clone(), Some(bias.clone())))
            };
            assert!(worst(during(Mode::Folded, &base), expected.clone()) < 1e-6, "{spec:?}");
            let bare = linear(input(), base.clone(), Some(bias.clone()));
            assert!(worst(during(Mode::Bare, &base), bare.clone()) < 1e-6, "{spec:?}");
            if !spec.use_dora {
                assert!(worst(hung.unfolded(folded.clone()), base.clone()) < 1e-6, "{spec:?}");
                assert!(worst(during(Mode::Unfolded, &folded), bare) < 1e-5, "{spec:?}");
                assert!(worst(during(Mode::Restored, &folded), expected) < 1e-5, "{spec:?}");
                let applied = hung.folding.during(Mode::Unfolded, || hung.apply(folded));
                assert!(worst(applied, base) < 1e-6, "{spec:?}");
            }
        }
    }

    #[test]
    fn a_new_update_changes_nothing_and_depends_on_the_module() {
        for spec in kinds() {
            let weight = random::<2>([6, 4], 0.1);
            let fresh = hung(Lora::init(&spec, 6, 4, &Device::flex(), || weight.clone()));
            let expected = linear(input(), weight.clone(), None);
            assert!(worst(fresh.forward(input(), weight, None), expected) < 2e-6, "{spec:?}");
        }
        let init = |module: &str| Lora::init(&spec(0.0, module), 6, 4, &Device::flex(), || random([6, 4], 0.1));
        let values = |lora: Lora| lora.a.val().into_data().try_to_vec::<f32>().unwrap();
        let a = values(init("m"));
        assert!(a.iter().all(|x| x.abs() <= 1.0 / 6f32.sqrt()) && a.iter().any(|x| x.abs() > 0.2));
        assert_ne!(a, values(init("n")));
    }

    #[test]
    fn the_norm_without_the_sum_is_the_norm_of_the_sum() {
        let spec = LoraSpec { use_dora: true, ..spec(0.0, "m") };
        let (lora, base) = (lora(&spec), random::<2>([6, 4], 0.1));
        let exact = (base.clone() + lora.delta()).square().sum_dim(0).sqrt().reshape([4]);
        let found = lora.norm(|rows| rows.matmul(base));
        assert!(worst(found, exact) < 1e-5);
    }

    #[test]
    fn dropout_repeats_within_a_pass_and_is_off_outside() {
        let lora = lora(&spec(0.5, "m"));
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
