//! InternViT (arXiv 2312.14238; `modeling_intern_vit.py` of InternVL): pre-norm blocks with layer scale, no final norm.
//!
//! The 300M kind has layer norms and a bias on the fused projection; the 6B kind has root-mean-square norms, no such
//! bias, and norms queries and keys over the whole width before it cuts them into heads.

use burn::{
    module::{Module, Param},
    nn::Linear,
    tensor::{Device, Tensor, s},
};

use super::{
    attention::attend,
    cast,
    interpolate::bicubic_grid,
    linear::{linear_forward, linear_module},
    norm::{LayerNorm, RmsNorm},
    parameter,
    vit::PatchEmbedding,
};
use crate::kernel::gelu::gelu;

/// Shape of an InternViT.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct InternVitShape {
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
    /// Side of a patch, pixels.
    pub patch_size: usize,
    /// Side of the grid that the table of positions covers.
    pub grid: usize,
    /// Whether norms are root-mean-square norms; else layer norms.
    pub rms_norm: bool,
    /// Whether the fused projection has a bias.
    pub qkv_bias: bool,
    /// Whether queries and keys are normed.
    pub qk_normalization: bool,
    /// Added to the variance or mean square in norms.
    pub eps: f64,
}

/// One of the two kinds of norm.
#[derive(Module, Debug)]
pub enum VisionNorm {
    /// Layer norm.
    Layer(LayerNorm),
    /// Root-mean-square norm.
    Rms(RmsNorm),
}

impl VisionNorm {
    fn new(shape: &InternVitShape, device: &Device) -> Self {
        if shape.rms_norm {
            Self::Rms(RmsNorm::new(shape.hidden_size, shape.eps, device))
        } else {
            Self::Layer(LayerNorm::new(shape.hidden_size, shape.eps, device))
        }
    }

    /// # Shapes
    /// `[.., hidden_size]` -> same
    #[must_use]
    pub fn forward(&self, x: Tensor<3>) -> Tensor<3> {
        match self {
            Self::Layer(norm) => norm.forward(x),
            Self::Rms(norm) => norm.forward(x),
        }
    }
}

/// Class token, patches and positions.
#[derive(Module, Debug)]
pub struct InternVitEmbeddings {
    /// `[1, 1, hidden_size]`
    pub class_embedding: Param<Tensor<3>>,
    /// Patches to vectors, with bias.
    pub patch_embedding: PatchEmbedding,
    /// `[1, 1 + grid * grid, hidden_size]`, the class token's first
    pub position_embedding: Param<Tensor<3>>,
}

impl InternVitEmbeddings {
    fn new(shape: &InternVitShape, device: &Device) -> Self {
        let (hidden, patch) = (shape.hidden_size, shape.patch_size);
        Self {
            class_embedding: parameter([1, 1, hidden], 0.0, device),
            patch_embedding: PatchEmbedding {
                weight: parameter([hidden, shape.num_channels, patch, patch], 0.0, device),
                bias: Some(parameter([hidden], 0.0, device)),
            },
            position_embedding: parameter([1, 1 + shape.grid * shape.grid, hidden], 0.0, device),
        }
    }

    /// The table of positions for a grid of patches: the class token's stays, the others are interpolated.
    ///
    /// # Shapes
    /// -> `[1, 1 + rows * columns, hidden_size]`
    #[must_use]
    pub fn positions(&self, rows: usize, columns: usize) -> Tensor<3> {
        let table = self.position_embedding.val();
        let [_, length, hidden] = table.dims();
        let class = table.clone().slice(s![.., ..1, ..]);
        let patches = table.slice(s![.., 1.., ..]).reshape([length - 1, hidden]);
        Tensor::cat(vec![class, bicubic_grid(patches, [rows, columns]).unsqueeze()], 1)
    }

    /// # Shapes
    /// `[tiles, channels, height, width]` -> `[tiles, 1 + patches, hidden_size]`
    #[must_use]
    pub fn forward(&self, pixels: Tensor<4>) -> Tensor<3> {
        let [tiles, _, height, width] = pixels.dims();
        let patch = self.patch_embedding.weight.lazy_shape()[2];
        let patches = self.patch_embedding.forward(pixels);
        let (hidden, dtype) = (patches.dims()[2], patches.dtype());
        let class = cast(self.class_embedding.val(), dtype).expand([tiles, 1, hidden]);
        let positions = cast(self.positions(height / patch, width / patch), dtype);
        Tensor::cat(vec![class, patches], 1) + positions
    }
}

/// Bidirectional attention with one fused projection: all queries, all keys, all values.
#[derive(Module, Debug)]
pub struct InternVitAttention {
    /// `hidden_size -> 3 * hidden_size`
    pub qkv: Linear,
    /// Norm of the queries of all heads together.
    pub q_norm: Option<RmsNorm>,
    /// Norm of the keys of all heads together.
    pub k_norm: Option<RmsNorm>,
    /// Output.
    pub proj: Linear,
    /// Heads.
    pub num_heads: usize,
}

impl InternVitAttention {
    fn new(shape: &InternVitShape, device: &Device) -> Self {
        let hidden = shape.hidden_size;
        let norm = || shape.qk_normalization.then(|| RmsNorm::new(hidden, shape.eps, device));
        Self {
            qkv: linear_module(hidden, 3 * hidden, shape.qkv_bias, device),
            q_norm: norm(),
            k_norm: norm(),
            proj: linear_module(hidden, hidden, true, device),
            num_heads: shape.num_attention_heads,
        }
    }

    /// Queries, keys and values before they are cut into heads; queries and keys normed where the model norms them.
    ///
    /// # Shapes
    /// `[tiles, length, hidden_size]` -> three of the same
    #[must_use]
    pub fn project(&self, x: Tensor<3>) -> [Tensor<3>; 3] {
        let width = x.dims()[2];
        let mixed = linear_forward(&self.qkv, x);
        let part = |i: usize| mixed.clone().slice(s![.., .., i * width..(i + 1) * width]);
        let norm = |norm: &Option<RmsNorm>, x: Tensor<3>| match norm {
            Some(norm) => norm.forward(x),
            None => x,
        };
        [norm(&self.q_norm, part(0)), norm(&self.k_norm, part(1)), part(2)]
    }

    /// # Shapes
    /// `[tiles, length, hidden_size]` -> same
    #[must_use]
    pub fn forward(&self, x: Tensor<3>) -> Tensor<3> {
        let [tiles, length, hidden] = x.dims();
        let [q, k, v] = self.project(x).map(|y| y.reshape([tiles, length, self.num_heads, hidden / self.num_heads]));
        linear_forward(&self.proj, attend(q, k.swap_dims(1, 2), v.swap_dims(1, 2), None))
    }
}

/// Two linear layers with exact GELU between them.
#[derive(Module, Debug)]
pub struct InternVitMlp {
    /// `hidden_size -> intermediate_size`
    pub fc1: Linear,
    /// `intermediate_size -> hidden_size`
    pub fc2: Linear,
}

impl InternVitMlp {
    /// # Shapes
    /// `[tiles, length, hidden_size]` -> same
    #[must_use]
    pub fn forward(&self, x: Tensor<3>) -> Tensor<3> {
        linear_forward(&self.fc2, gelu(linear_forward(&self.fc1, x)))
    }
}

/// Pre-norm block whose two branches are scaled per channel.
#[derive(Module, Debug)]
pub struct InternVitLayer {
    /// Attention.
    pub attn: InternVitAttention,
    /// MLP.
    pub mlp: InternVitMlp,
    /// Norm before attention.
    pub norm1: VisionNorm,
    /// Norm before the MLP.
    pub norm2: VisionNorm,
    /// `[hidden_size]`, scale of what attention adds.
    pub ls1: Param<Tensor<1>>,
    /// `[hidden_size]`, scale of what the MLP adds.
    pub ls2: Param<Tensor<1>>,
}

impl InternVitLayer {
    fn new(shape: &InternVitShape, device: &Device) -> Self {
        let hidden = shape.hidden_size;
        Self {
            attn: InternVitAttention::new(shape, device),
            mlp: InternVitMlp {
                fc1: linear_module(hidden, shape.intermediate_size, true, device),
                fc2: linear_module(shape.intermediate_size, hidden, true, device),
            },
            norm1: VisionNorm::new(shape, device),
            norm2: VisionNorm::new(shape, device),
            ls1: parameter([hidden], 1.0, device),
            ls2: parameter([hidden], 1.0, device),
        }
    }

    /// States after attention.
    ///
    /// # Shapes
    /// `[tiles, length, hidden_size]` -> same
    #[must_use]
    pub fn after_attention(&self, x: Tensor<3>) -> Tensor<3> {
        x.clone() + self.attn.forward(self.norm1.forward(x)) * self.ls1.val().unsqueeze()
    }

    /// # Shapes
    /// `[tiles, length, hidden_size]` -> same
    #[must_use]
    pub fn forward(&self, x: Tensor<3>) -> Tensor<3> {
        let x = self.after_attention(x);
        x.clone() + self.mlp.forward(self.norm2.forward(x)) * self.ls2.val().unsqueeze()
    }
}

/// Blocks under their checkpoint name.
#[derive(Module, Debug)]
pub struct InternVitEncoder {
    /// Blocks in order.
    pub layers: Vec<InternVitLayer>,
}

/// `InternVisionModel`.
#[derive(Module, Debug)]
pub struct InternVit {
    /// Class token, patches, positions.
    pub embeddings: InternVitEmbeddings,
    /// Blocks.
    pub encoder: InternVitEncoder,
}

impl InternVit {
    /// Without memory until loaded.
    #[must_use]
    pub fn new(shape: &InternVitShape, device: &Device) -> Self {
        Self {
            embeddings: InternVitEmbeddings::new(shape, device),
            encoder: InternVitEncoder {
                layers: (0..shape.num_hidden_layers).map(|_| InternVitLayer::new(shape, device)).collect(),
            },
        }
    }

    /// States after the first `layers` blocks.
    ///
    /// # Shapes
    /// `[tiles, channels, height, width]` -> `[tiles, 1 + patches, hidden_size]`
    #[must_use]
    pub fn forward(&self, pixels: Tensor<4>, layers: usize) -> Tensor<3> {
        self.encoder.layers[..layers].iter().fold(self.embeddings.forward(pixels), |x, layer| layer.forward(x))
    }
}
