//! OpenCLIP's vision transformer as Qwen-VL uses it (`visual.py` of Qwen/Qwen-VL-Chat): no class token, one fixed table
//! of positions that is interpolated to the image, queries, keys and values interleaved per head, and a resampler that
//! turns any number of patches into a fixed number of features.

use burn::{
    module::{Module, Param},
    nn::Linear,
    tensor::{Device, Tensor, module::linear, s},
};
use serde::{Deserialize, Serialize};

use super::{
    attention::attend,
    cast,
    interpolate::bicubic_table,
    linear::{linear_forward, linear_module},
    norm::LayerNorm,
    parameter,
    resampler::Resampler,
    vit::PatchEmbedding,
};
use crate::kernel::gelu::gelu;

/// Cells of the table of positions, whatever the image size.
const POSITIONS: usize = 256;

/// Added to the variance in norms.
const EPS: f64 = 1e-6;

/// Width of a head of the resampler.
const POOL_HEAD: usize = 128;

/// The keys of `visual` in config.json; defaults are those of Qwen-VL-Chat.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct OpenClipConfig {
    /// Side of the square input, pixels.
    pub image_size: usize,
    /// Side of a patch, pixels.
    pub patch_size: usize,
    /// Width.
    pub width: usize,
    /// Blocks.
    pub layers: usize,
    /// Heads.
    pub heads: usize,
    /// Width inside the MLP over `width`.
    pub mlp_ratio: f64,
    /// Width of the features.
    pub output_dim: usize,
    /// Id of `<img>`; absent where the tokenizer alone decides.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub image_start_id: Option<i32>,
    /// Features of one image.
    pub n_queries: usize,
}

impl Default for OpenClipConfig {
    fn default() -> Self {
        Self {
            image_size: 448,
            patch_size: 14,
            width: 1664,
            layers: 48,
            heads: 16,
            mlp_ratio: 4.9231,
            output_dim: 4096,
            image_start_id: Some(151_857),
            n_queries: 256,
        }
    }
}

impl OpenClipConfig {
    /// Width inside the MLP.
    #[must_use]
    pub fn mlp_width(&self) -> usize {
        (self.width as f64 * self.mlp_ratio) as usize
    }

    /// Heads of the resampler.
    #[must_use]
    pub fn pool_heads(&self) -> usize {
        (self.output_dim / POOL_HEAD).max(1)
    }
}

/// Bidirectional attention; `in_proj` holds query, key and value of the first head, then of the second, ...
#[derive(Module, Debug)]
pub struct OpenClipAttention {
    /// `width -> heads * 3 * head_dim`
    pub in_proj: Linear,
    /// Output.
    pub out_proj: Linear,
    /// Heads.
    pub num_heads: usize,
}

impl OpenClipAttention {
    /// # Shapes
    /// `[tiles, patches, width]` -> same
    #[must_use]
    pub fn forward(&self, x: Tensor<3>) -> Tensor<3> {
        let [tiles, patches, width] = x.dims();
        let head_dim = width / self.num_heads;
        let mixed = linear_forward(&self.in_proj, x).reshape([tiles, patches, self.num_heads, 3 * head_dim]);
        let part = |i: usize| mixed.clone().slice(s![.., .., .., i * head_dim..(i + 1) * head_dim]);
        let (q, k, v) = (part(0), part(1).swap_dims(1, 2), part(2).swap_dims(1, 2));
        linear_forward(&self.out_proj, attend(q, k, v, None))
    }
}

/// Two linear layers with exact GELU between them.
#[derive(Module, Debug)]
pub struct OpenClipMlp {
    /// `width -> mlp_width`
    pub c_fc: Linear,
    /// `mlp_width -> width`
    pub c_proj: Linear,
}

/// Pre-norm block.
#[derive(Module, Debug)]
pub struct OpenClipBlock {
    /// Norm before attention.
    pub ln_1: LayerNorm,
    /// Norm before the MLP.
    pub ln_2: LayerNorm,
    /// Attention.
    pub attn: OpenClipAttention,
    /// MLP.
    pub mlp: OpenClipMlp,
}

impl OpenClipBlock {
    fn new(config: &OpenClipConfig, device: &Device) -> Self {
        let (width, inner) = (config.width, config.mlp_width());
        let norm = || LayerNorm::new(width, EPS, device);
        Self {
            ln_1: norm(),
            ln_2: norm(),
            attn: OpenClipAttention {
                in_proj: linear_module(width, 3 * width, true, device),
                out_proj: linear_module(width, width, true, device),
                num_heads: config.heads,
            },
            mlp: OpenClipMlp {
                c_fc: linear_module(width, inner, true, device),
                c_proj: linear_module(inner, width, true, device),
            },
        }
    }

    /// What attention adds.
    ///
    /// # Shapes
    /// `[tiles, patches, width]` -> same
    #[must_use]
    pub fn attention(&self, x: Tensor<3>) -> Tensor<3> {
        self.attn.forward(self.ln_1.forward(x))
    }

    /// # Shapes
    /// `[tiles, patches, width]` -> same
    #[must_use]
    pub fn forward(&self, x: Tensor<3>) -> Tensor<3> {
        let branch = self.attention(x.clone());
        let (x, normed) = self.ln_2.add_forward(x, branch);
        let inner = gelu(linear_forward(&self.mlp.c_fc, normed));
        x + linear_forward(&self.mlp.c_proj, inner)
    }
}

/// Blocks under their checkpoint name.
#[derive(Module, Debug)]
pub struct OpenClipBlocks {
    /// Blocks in order.
    pub resblocks: Vec<OpenClipBlock>,
}

/// Vision tower and resampler.
#[derive(Module, Debug)]
pub struct OpenClipVision {
    /// Patches to vectors, without bias.
    pub conv1: PatchEmbedding,
    /// `[256, width]`, a grid of 16 x 16
    pub positional_embedding: Param<Tensor<2>>,
    /// Norm before the blocks.
    pub ln_pre: LayerNorm,
    /// Blocks.
    pub transformer: OpenClipBlocks,
    /// Patches to a fixed number of features.
    pub attn_pool: Resampler,
    /// Norm of the features.
    pub ln_post: LayerNorm,
    /// `[output_dim, output_dim]`, applied from the right
    pub proj: Param<Tensor<2>>,
}

impl OpenClipVision {
    /// Without memory until loaded.
    #[must_use]
    pub fn new(config: &OpenClipConfig, device: &Device) -> Self {
        let (width, out, patch) = (config.width, config.output_dim, config.patch_size);
        Self {
            conv1: PatchEmbedding { weight: parameter([width, 3, patch, patch], 0.0, device), bias: None },
            positional_embedding: parameter([POSITIONS, width], 0.0, device),
            ln_pre: LayerNorm::new(width, EPS, device),
            transformer: OpenClipBlocks {
                resblocks: (0..config.layers).map(|_| OpenClipBlock::new(config, device)).collect(),
            },
            attn_pool: Resampler::new(config.n_queries, out, width, config.pool_heads(), EPS, device),
            ln_post: LayerNorm::new(out, EPS, device),
            proj: parameter([out, out], 0.0, device),
        }
    }

    /// Patches with positions, normed: the input of the first block.
    ///
    /// # Shapes
    /// `[tiles, 3, height, height]` -> `[tiles, patches, width]`
    #[must_use]
    pub fn embed(&self, pixels: Tensor<4>) -> Tensor<3> {
        self.ln_pre.forward(self.with_positions(self.conv1.forward(pixels)))
    }

    /// Adds the table of positions, interpolated to the grid of `patches`.
    ///
    /// # Shapes
    /// `[tiles, patches, width]` -> same
    #[must_use]
    pub fn with_positions(&self, patches: Tensor<3>) -> Tensor<3> {
        let table = bicubic_table(self.positional_embedding.val(), patches.dims()[1].isqrt());
        let dtype = patches.dtype();
        patches + cast(table, dtype).unsqueeze()
    }

    /// Patches after all blocks.
    ///
    /// # Shapes
    /// `[tiles, 3, height, height]` -> `[tiles, patches, width]`
    #[must_use]
    pub fn patches(&self, pixels: Tensor<4>) -> Tensor<3> {
        self.transformer.resblocks.iter().fold(self.embed(pixels), |x, block| block.forward(x))
    }

    /// Features of patches.
    ///
    /// # Shapes
    /// `[tiles, patches, width]` -> `[tiles, queries, output_dim]`
    #[must_use]
    pub fn pool(&self, patches: Tensor<3>) -> Tensor<3> {
        linear(self.ln_post.forward(self.attn_pool.forward(patches)), self.proj.val(), None)
    }
}
