//! What hangs on the weight of a `Linear`: an update, and how its product is computed.
//!
//! Burn lets one object hang on a parameter, and shows it to nobody but the module that owns the parameter. So there is
//! one kind for everything, and [`attachments`] lists those of a model.

use std::{
    cell::RefCell,
    sync::{
        Arc,
        atomic::{AtomicU8, Ordering},
    },
};

use burn::{
    module::{Module, Reparameterization},
    tensor::{DType, FloatDType, Tensor},
};

use super::{lora::Lora, quantized::matrix};
use crate::{
    kernel::quant::{Packed, packed_linear},
    nn::{
        cast,
        linear::{low_rank, product},
        visit::named_params,
    },
};

/// What a module with an update computes with.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Mode {
    /// The weight, with the update beside it.
    #[default]
    Beside,
    /// The weight with the update folded in.
    Folded,
    /// The weight alone.
    Bare,
    /// The weight with the update taken off: what it was before the update was folded into it.
    Unfolded,
    /// The same, with the update beside it again.
    Restored,
}

impl Mode {
    const ALL: [Self; 5] = [Self::Beside, Self::Folded, Self::Bare, Self::Unfolded, Self::Restored];
}

/// What the modules of one model compute with, shared by all of them.
#[derive(Debug, Clone, Default)]
pub struct Folding(Arc<AtomicU8>);

impl Folding {
    /// Runs `body` in `mode`. Weights are changed where they are used, one at a time.
    pub fn during<T>(&self, mode: Mode, body: impl FnOnce() -> T) -> T {
        let before = self.0.swap(mode as u8, Ordering::Relaxed);
        let result = body();
        self.0.store(before, Ordering::Relaxed);
        result
    }

    fn mode(&self) -> Mode {
        Mode::ALL[usize::from(self.0.load(Ordering::Relaxed))]
    }
}

/// Hangs on the weight `[d_in, d_out]` of a `Linear`.
#[derive(Module, Debug)]
pub struct Attachment {
    /// The update.
    pub lora: Option<Lora>,
    /// The weight in few bits; the parameter is then an empty place of the same shape.
    #[module(skip)]
    pub packed: Option<Arc<Packed>>,
    /// What is computed with.
    #[module(skip)]
    pub folding: Folding,
}

impl Attachment {
    /// The layer's output.
    ///
    /// # Shapes
    /// `[.., d_in]` -> `[.., d_out]`
    #[must_use]
    pub fn forward<const D: usize>(&self, x: Tensor<D>, weight: Tensor<2>, bias: Option<Tensor<1>>) -> Tensor<D> {
        match self.folding.mode() {
            Mode::Beside => self.beside(x, weight, bias),
            Mode::Folded => product(x, self.folded(weight, None), bias),
            Mode::Bare => self.base(x, weight, bias),
            Mode::Unfolded => product(x, self.unfolded(weight), bias),
            Mode::Restored => self.beside(x, self.unfolded(weight), bias),
        }
    }

    /// `x W + b` and what the update adds.
    fn beside<const D: usize>(&self, x: Tensor<D>, weight: Tensor<2>, bias: Option<Tensor<1>>) -> Tensor<D> {
        match &self.lora {
            None => self.base(x, weight, bias),
            Some(lora) => match &lora.magnitude {
                // A start that is taken off the weight is two branches, which no one pass computes.
                None if self.packed.is_none() && lora.fixed.initial.is_none() && !lora.drops() => {
                    low_rank(x, weight, bias, lora.a.val(), lora.b.val(), lora.scale)
                }
                None => self.base(x.clone(), weight, bias) + lora.branch(x),
                Some(_) => self.weight_decomposed(lora, x, weight, bias),
            },
        }
    }

    /// `x W + b` with the frozen weight.
    fn base<const D: usize>(&self, x: Tensor<D>, weight: Tensor<2>, bias: Option<Tensor<1>>) -> Tensor<D> {
        let Some(packed) = &self.packed else { return product(x, weight, bias) };
        let out = packed_linear(x, packed);
        match bias {
            Some(bias) => out + cast(bias, DType::F32).unsqueeze(),
            None => out,
        }
    }

    /// DoRA: `m / |W + s A B| * (x W + s x A B) + b`, the norm outside of the gradient. As in PEFT, dropout acts on what
    /// the magnitudes change, not on `x W` itself.
    fn weight_decomposed<const D: usize>(
        &self,
        lora: &Lora,
        x: Tensor<D>,
        weight: Tensor<2>,
        bias: Option<Tensor<1>>,
    ) -> Tensor<D> {
        let norm = lora.norm(|rows| self.base(rows, weight.clone(), None));
        let magnitude = lora.magnitude.as_ref().expect("it is of this kind").val();
        let ratio = magnitude / norm;
        let wide: FloatDType = x.dtype().into();
        let ratio = if wide == FloatDType::F32 { ratio } else { ratio.cast(wide) };
        let ratio = ratio.unsqueeze::<D>();
        let out = match lora.dropped(x.clone()) {
            None => (self.base(x.clone(), weight, None) + lora.branch_of(x)) * ratio,
            Some(dropped) => {
                let base = self.base(x, weight.clone(), None);
                let seen = self.base(dropped.clone(), weight, None);
                base + seen * ratio.clone().sub_scalar(1.0) + lora.branch_of(dropped) * ratio
            }
        };
        match bias {
            Some(bias) => out + bias.unsqueeze(),
            None => out,
        }
    }

    /// The frozen weight, dense.
    fn dense(&self, weight: Tensor<2>) -> Tensor<2> {
        match &self.packed {
            Some(packed) => packed.dense(&weight.device()),
            None => weight,
        }
    }

    /// The weight with its update folded in, as `dtype`, by default that of the weight; f32 in between.
    ///
    /// # Shapes
    /// `[d_in, d_out]`
    #[must_use]
    pub fn folded(&self, weight: Tensor<2>, dtype: Option<FloatDType>) -> Tensor<2> {
        let weight = self.dense(weight);
        let dtype = dtype.unwrap_or_else(|| weight.dtype().into());
        let Some(lora) = &self.lora else { return weight.cast(dtype) };
        let sum = cast(weight, DType::F32) + lora.delta();
        let sum = match &lora.magnitude {
            None => sum,
            Some(m) => {
                let norm = sum.clone().square().sum_dim(0).sqrt();
                sum * (m.val().unsqueeze::<2>() / norm)
            }
        };
        sum.cast(dtype)
    }

    /// The weight without the update that is folded into it. The reverse of [`Attachment::folded`], up to rounding, for
    /// updates without magnitudes: those would need the lengths of the columns before they were folded.
    ///
    /// # Shapes
    /// `[d_in, d_out]`
    #[must_use]
    pub fn unfolded(&self, weight: Tensor<2>) -> Tensor<2> {
        let dtype: FloatDType = weight.dtype().into();
        match &self.lora {
            Some(lora) => (cast(weight, DType::F32) - lora.delta()).cast(dtype),
            None => weight,
        }
    }
}

thread_local! {
    /// What `apply` is asked to list.
    static LISTED: RefCell<Option<Vec<Attachment>>> = const { RefCell::new(None) };
}

impl Reparameterization for Attachment {
    const NAME: &'static str = "adapter";

    /// The folded weight, or the unfolded one where modules compute with that, in the dtype of `base`.
    fn apply<const D: usize>(&self, base: Tensor<D>) -> Tensor<D> {
        let listing = LISTED.with_borrow_mut(|listed| listed.as_mut().map(|list| list.push(self.clone())).is_some());
        if listing {
            return base;
        }
        let shape = base.shape();
        let weight = matrix(base);
        let weight = match self.folding.mode() {
            Mode::Unfolded => self.unfolded(weight),
            _ => self.folded(weight, None),
        };
        weight.reshape(shape)
    }
}

/// What hangs on the weights of `model`, by the names of the weights, in module order. Nothing is copied or computed.
#[must_use]
pub fn attachments<M: Module>(model: &M) -> Vec<(String, Attachment)> {
    let named = named_params(model);
    LISTED.set(Some(Vec::new()));
    // Materializing asks every attachment for its effective weight, in module order.
    drop(model.clone().materialize());
    let listed = LISTED.take().unwrap_or_default();
    named.into_iter().filter(|p| p.attached).map(|p| p.name).zip(listed).collect()
}
