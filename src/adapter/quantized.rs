//! Which frozen weights are held in few bits (QLoRA).

use std::{collections::HashSet, fmt, sync::Arc};

use burn::{
    module::{Module, Param, ParamId},
    tensor::Tensor,
};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{attachment::attachments, target::linears};
use crate::{
    kernel::{blocks::Format, quant::Packed},
    nn::visit::NamedParam,
    vlm::Vlm,
    weights,
};

/// How the frozen linear modules of the language tower are held in memory; all but `lm_head`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema, clap::ValueEnum)]
#[serde(rename_all = "snake_case")]
#[value(rename_all = "snake_case")]
pub enum Quantization {
    /// As they are.
    #[default]
    None,
    /// 8 bits, 8.5 with the scale of each block of 64.
    Int8,
    /// 4 bits (NF4), 4.5 with the scale of each block of 64.
    Nf4,
    /// 4 bits (NF4) with scales in 8 bits, 4.13 in all.
    Nf4Double,
}

impl Quantization {
    /// Layout of the blocks; none for weights as they are.
    #[must_use]
    pub fn format(self) -> Option<Format> {
        match self {
            Self::None => None,
            Self::Int8 => Some(Format::Int8),
            Self::Nf4 => Some(Format::Nf4),
            Self::Nf4Double => Some(Format::Nf4Double),
        }
    }
}

impl fmt::Display for Quantization {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::None => "none",
            Self::Int8 => "int8",
            Self::Nf4 => "nf4",
            Self::Nf4Double => "nf4_double",
        })
    }
}

/// Weights to pack.
#[derive(Debug, Clone, Default)]
pub struct Packing {
    format: Option<Format>,
    ids: HashSet<ParamId>,
}

impl Packing {
    /// The linear modules of the language tower, without the head and without those that are `kept` as they are.
    #[must_use]
    pub fn of<M: Module + Vlm>(model: &M, quantization: Quantization, kept: impl Fn(&str) -> bool) -> Self {
        let Some(format) = quantization.format() else { return Self::default() };
        let packed = |name: &str, tower: &str| {
            tower == "language" && name != "lm_head" && !name.ends_with(".lm_head") && !kept(&format!("{name}.weight"))
        };
        let modules = linears(model, model.towers()).into_iter().filter(|m| packed(&m.name, m.tower));
        Self { format: Some(format), ids: modules.map(|m| m.id).collect() }
    }

    /// The weight in blocks, if it is one to pack. The pages that it was read from leave the process where its file is
    /// streamed.
    pub(super) fn pack<const D: usize>(&self, param: &Param<Tensor<D>>) -> Option<Arc<Packed>> {
        let format = self.format.filter(|_| self.ids.contains(&param.id))?;
        let packed = Packed::new(matrix(param.base().without_autodiff()), format);
        weights::release_streamed();
        Some(Arc::new(packed))
    }

    /// Bytes of the packed values of `param`; none if it is not packed.
    #[must_use]
    pub fn num_bytes(&self, param: &NamedParam) -> Option<u64> {
        let format = self.format.filter(|_| self.ids.contains(&param.id))?;
        Some(format.num_bytes(param.num_elements()) as u64)
    }
}

/// The same tensor; a weight of a linear module has two dimensions.
pub(super) fn matrix<const D: usize>(tensor: Tensor<D>) -> Tensor<2> {
    same(tensor)
}

/// The same tensor under another name of its number of dimensions, without the copy that a reshape may make.
pub(super) fn same<const A: usize, const B: usize>(tensor: Tensor<A>) -> Tensor<B> {
    let tensor: Box<dyn std::any::Any> = Box::new(tensor);
    *tensor.downcast().expect("weights of linear modules have two dimensions")
}

/// Bytes of packed weights in memory, and their number.
#[must_use]
pub fn packed_bytes<M: Module>(model: &M) -> (usize, usize) {
    let packed = attachments(model).into_iter().filter_map(|(_, a)| a.packed);
    packed.fold((0, 0), |(bytes, count), p| (bytes + p.num_bytes(), count + 1))
}
