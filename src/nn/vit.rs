//! CLIP's vision transformer (arXiv 2103.00020; transformers `modeling_clip.py`).

use burn::{
    module::{Module, Param},
    nn::{Embedding, Linear},
    tensor::{Device, Tensor},
};
use serde::{Deserialize, Serialize};

use super::{
    attention::attend,
    cast,
    linear::{linear_forward, linear_module},
    norm::LayerNorm,
    parameter,
};
use crate::kernel::gelu::quick_gelu;

/// `CLIPVisionConfig`; defaults are those of transformers.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct ClipVisionConfig {
    /// Width.
    pub hidden_size: usize,
    /// Width inside the MLP.
    pub intermediate_size: usize,
    /// Blocks.
    pub num_hidden_layers: usize,
    /// Heads.
    pub num_attention_heads: usize,
    /// Colour channels.
    pub num_channels: usize,
    /// Side of the square input, pixels.
    pub image_size: usize,
    /// Side of a patch, pixels.
    pub patch_size: usize,
    /// Activation of the MLP.
    pub hidden_act: String,
    /// Added to the variance in norms.
    pub layer_norm_eps: f64,
}

impl Default for ClipVisionConfig {
    fn default() -> Self {
        Self {
            hidden_size: 768,
            intermediate_size: 3072,
            num_hidden_layers: 12,
            num_attention_heads: 12,
            num_channels: 3,
            image_size: 224,
            patch_size: 32,
            hidden_act: "quick_gelu".into(),
            layer_norm_eps: 1e-5,
        }
    }
}

impl ClipVisionConfig {
    /// Patches of one image.
    #[must_use]
    pub fn num_patches(&self) -> usize {
        (self.image_size / self.patch_size).pow(2)
    }
}

/// Convolution whose stride is its kernel, computed as one matrix product over flattened patches.
#[derive(Module, Debug)]
pub struct PatchEmbedding {
    /// `[hidden_size, channels, patch, patch]`
    pub weight: Param<Tensor<4>>,
    /// `[hidden_size]`
    pub bias: Option<Param<Tensor<1>>>,
}

impl PatchEmbedding {
    /// # Shapes
    /// `[tiles, channels, height, width]` -> `[tiles, patches, hidden_size]`, patches row by row
    #[must_use]
    pub fn forward(&self, pixels: Tensor<4>) -> Tensor<3> {
        let weight = self.weight.val();
        let [hidden, channels, patch, _] = weight.dims();
        let [tiles, _, height, width] = pixels.dims();
        let (down, across) = (height / patch, width / patch);
        let patches = cast(pixels, weight.dtype())
            .reshape([tiles, channels, down, patch, across, patch])
            .permute([0, 2, 4, 1, 3, 5])
            .reshape([tiles, down * across, channels * patch * patch]);
        let weight = weight.reshape([hidden, channels * patch * patch]).transpose();
        burn::tensor::module::linear(patches, weight, self.bias.as_ref().map(Param::val))
    }
}

/// Class token, patches and positions.
#[derive(Module, Debug)]
pub struct ClipEmbeddings {
    /// `[hidden_size]`
    pub class_embedding: Param<Tensor<1>>,
    /// Patches to vectors.
    pub patch_embedding: PatchEmbedding,
    /// `[1 + patches, hidden_size]`
    pub position_embedding: Embedding,
}

impl ClipEmbeddings {
    fn new(config: &ClipVisionConfig, device: &Device) -> Self {
        let (hidden, patch) = (config.hidden_size, config.patch_size);
        Self {
            class_embedding: parameter([hidden], 0.0, device),
            patch_embedding: PatchEmbedding {
                weight: parameter([hidden, config.num_channels, patch, patch], 0.0, device),
                bias: None,
            },
            position_embedding: Embedding { weight: parameter([config.num_patches() + 1, hidden], 0.0, device) },
        }
    }

    /// # Shapes
    /// `[tiles, channels, height, width]` -> `[tiles, 1 + patches, hidden_size]`
    #[must_use]
    pub fn forward(&self, pixels: Tensor<4>) -> Tensor<3> {
        let tiles = pixels.dims()[0];
        let patches = self.patch_embedding.forward(pixels);
        let class = self.class_embedding.val();
        let hidden = class.dims()[0];
        let class = class.reshape([1, 1, hidden]).expand([tiles, 1, hidden]);
        Tensor::cat(vec![class, patches], 1) + self.position_embedding.weight.val().unsqueeze()
    }
}

/// Bidirectional attention with biases.
#[derive(Module, Debug)]
pub struct ClipAttention {
    /// Queries.
    pub q_proj: Linear,
    /// Keys.
    pub k_proj: Linear,
    /// Values.
    pub v_proj: Linear,
    /// Output.
    pub out_proj: Linear,
    /// Heads.
    pub num_heads: usize,
}

impl ClipAttention {
    fn new(config: &ClipVisionConfig, device: &Device) -> Self {
        let linear = || linear_module(config.hidden_size, config.hidden_size, true, device);
        Self {
            q_proj: linear(),
            k_proj: linear(),
            v_proj: linear(),
            out_proj: linear(),
            num_heads: config.num_attention_heads,
        }
    }

    fn forward(&self, x: Tensor<3>) -> Tensor<3> {
        let [tiles, length, hidden] = x.dims();
        let heads = |y: Tensor<3>| y.reshape([tiles, length, self.num_heads, hidden / self.num_heads]);
        let q = heads(linear_forward(&self.q_proj, x.clone()));
        let k = heads(linear_forward(&self.k_proj, x.clone())).swap_dims(1, 2);
        let v = heads(linear_forward(&self.v_proj, x)).swap_dims(1, 2);
        linear_forward(&self.out_proj, attend(q, k, v, None))
    }
}

/// Two linear layers with quick GELU, `x * sigmoid(1.702 x)`, between them.
#[derive(Module, Debug)]
pub struct ClipMlp {
    /// `hidden_size -> intermediate_size`
    pub fc1: Linear,
    /// `intermediate_size -> hidden_size`
    pub fc2: Linear,
}

impl ClipMlp {
    fn forward(&self, x: Tensor<3>) -> Tensor<3> {
        linear_forward(&self.fc2, quick_gelu(linear_forward(&self.fc1, x)))
    }
}

/// Pre-norm block.
#[derive(Module, Debug)]
pub struct ClipLayer {
    /// Attention.
    pub self_attn: ClipAttention,
    /// Norm before attention.
    pub layer_norm1: LayerNorm,
    /// MLP.
    pub mlp: ClipMlp,
    /// Norm before the MLP.
    pub layer_norm2: LayerNorm,
}

impl ClipLayer {
    fn new(config: &ClipVisionConfig, device: &Device) -> Self {
        let norm = || LayerNorm::new(config.hidden_size, config.layer_norm_eps, device);
        Self {
            self_attn: ClipAttention::new(config, device),
            layer_norm1: norm(),
            mlp: ClipMlp {
                fc1: linear_module(config.hidden_size, config.intermediate_size, true, device),
                fc2: linear_module(config.intermediate_size, config.hidden_size, true, device),
            },
            layer_norm2: norm(),
        }
    }

    /// # Shapes
    /// `[tiles, length, hidden_size]` -> same
    #[must_use]
    pub fn forward(&self, x: Tensor<3>) -> Tensor<3> {
        let branch = self.self_attn.forward(self.layer_norm1.forward(x.clone()));
        let (x, normed) = self.layer_norm2.add_forward(x, branch);
        x + self.mlp.forward(normed)
    }
}

/// Blocks under their checkpoint name.
#[derive(Module, Debug)]
pub struct ClipEncoder {
    /// Blocks in order.
    pub layers: Vec<ClipLayer>,
}

/// The vision half of CLIP.
#[derive(Module, Debug)]
pub struct ClipVisionTransformer {
    /// Class token, patches, positions.
    pub embeddings: ClipEmbeddings,
    /// Norm before the blocks; the checkpoint spells it so.
    pub pre_layrnorm: LayerNorm,
    /// Blocks.
    pub encoder: ClipEncoder,
    /// Norm of the pooled output, which nothing here uses; kept so that a saved checkpoint is complete.
    pub post_layernorm: LayerNorm,
}

impl ClipVisionTransformer {
    /// Without memory until loaded.
    #[must_use]
    pub fn new(config: &ClipVisionConfig, device: &Device) -> Self {
        let norm = || LayerNorm::new(config.hidden_size, config.layer_norm_eps, device);
        Self {
            embeddings: ClipEmbeddings::new(config, device),
            pre_layrnorm: norm(),
            encoder: ClipEncoder {
                layers: (0..config.num_hidden_layers).map(|_| ClipLayer::new(config, device)).collect(),
            },
            post_layernorm: norm(),
        }
    }

    /// States after the first `layers` blocks.
    ///
    /// # Shapes
    /// `[tiles, channels, height, width]` -> `[tiles, 1 + patches, hidden_size]`
    #[must_use]
    pub fn forward(&self, pixels: Tensor<4>, layers: usize) -> Tensor<3> {
        let x = self.pre_layrnorm.forward(self.embeddings.forward(pixels));
        self.encoder.layers[..layers].iter().fold(x, |x, layer| layer.forward(x))
    }
}
