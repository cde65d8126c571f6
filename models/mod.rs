//! The model families: registry, and the closed enum the rest of the program holds.

use std::path::PathBuf;

use burn::{
    module::Module,
    tensor::{Device, Int, Tensor},
};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::{
    nn::{
        attention::Columns,
        decoder::{DecoderContext, LayerCache},
    },
    vlm::{Tower, Vlm},
};

pub mod llava_med;

/// `[model]` of a recipe.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct ModelConfig {
    /// Family, as `medtune models` lists it.
    pub name: String,
    /// Checkpoint directory in Hugging Face layout; when absent, `preset` is initialised at random.
    pub checkpoint: Option<PathBuf>,
    /// Shape of a randomly initialised model.
    pub preset: String,
    /// Directory with other weights for the vision tower.
    pub vision_tower: Option<PathBuf>,
}

impl Default for ModelConfig {
    fn default() -> Self {
        Self { name: "llava_med".into(), checkpoint: None, preset: "tiny".into(), vision_tower: None }
    }
}

/// A model of any family.
#[derive(Module, Debug)]
pub enum AnyVlm {
    /// LLaVA-Med v1.5.
    LlavaMed(llava_med::LlavaMed),
}

/// Calls a method on whichever family is there.
macro_rules! dispatch {
    ($self:expr, $model:ident => $call:expr) => {
        match $self {
            AnyVlm::LlavaMed($model) => $call,
        }
    };
}

impl Vlm for AnyVlm {
    fn towers(&self) -> &'static [Tower] {
        dispatch!(self, m => m.towers())
    }

    fn vision(&self, pixels: Tensor<4>) -> Tensor<3> {
        dispatch!(self, m => m.vision(pixels))
    }

    fn project(&self, features: Tensor<3>) -> Tensor<3> {
        dispatch!(self, m => m.project(features))
    }

    fn embed_tokens(&self, input_ids: Tensor<2, Int>) -> Tensor<3> {
        dispatch!(self, m => m.embed_tokens(input_ids))
    }

    fn columns_context(&self, columns: &Columns, device: &Device) -> DecoderContext {
        dispatch!(self, m => m.columns_context(columns, device))
    }

    fn num_layers(&self) -> usize {
        dispatch!(self, m => m.num_layers())
    }

    fn layer(&self, index: usize, x: Tensor<3>, context: &DecoderContext, cache: Option<&mut LayerCache>) -> Tensor<3> {
        dispatch!(self, m => m.layer(index, x, context, cache))
    }

    fn final_norm(&self, x: Tensor<3>) -> Tensor<3> {
        dispatch!(self, m => m.final_norm(x))
    }

    fn logits(&self, hidden: Tensor<2>) -> Tensor<2> {
        dispatch!(self, m => m.logits(hidden))
    }
}
