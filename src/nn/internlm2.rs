//! InternLM2's decoder layer (`modeling_internlm2.py` of InternLM): one projection holds, for each key-value head, its
//! query heads, its key and its value.

use burn::{
    module::Module,
    nn::{Embedding, Linear},
    tensor::{Device, Tensor, activation::silu},
};

use super::{
    decoder::{DecoderContext, DecoderShape, FusedHeads, LayerCache, fused_attention},
    linear::{linear_forward, linear_module},
    norm::RmsNorm,
    parameter,
};

/// Self-attention with one grouped projection.
#[derive(Module, Debug)]
pub struct InternLm2Attention {
    /// `hidden_size -> (num_attention_heads + 2 * num_key_value_heads) * head_dim`
    pub wqkv: Linear,
    /// `num_attention_heads * head_dim -> hidden_size`
    pub wo: Linear,
    /// Query heads.
    pub num_heads: usize,
    /// Key-value heads.
    pub num_key_value_heads: usize,
}

impl InternLm2Attention {
    fn forward(&self, x: Tensor<3>, context: &DecoderContext, cache: Option<&mut LayerCache>) -> Tensor<3> {
        let groups = self.num_key_value_heads;
        let heads = FusedHeads { groups, queries: self.num_heads / groups, keys: 1 };
        fused_attention([&self.wqkv, &self.wo], heads, x, context, cache)
    }
}

/// `w2(silu(w1(x)) * w3(x))`
#[derive(Module, Debug)]
pub struct InternLm2Mlp {
    /// `hidden_size -> intermediate_size`, the gate
    pub w1: Linear,
    /// `hidden_size -> intermediate_size`
    pub w3: Linear,
    /// `intermediate_size -> hidden_size`
    pub w2: Linear,
}

impl InternLm2Mlp {
    fn forward(&self, x: Tensor<3>) -> Tensor<3> {
        let gate = silu(linear_forward(&self.w1, x.clone()));
        linear_forward(&self.w2, gate * linear_forward(&self.w3, x))
    }
}

/// Pre-norm decoder layer.
#[derive(Module, Debug)]
pub struct InternLm2Layer {
    /// Attention.
    pub attention: InternLm2Attention,
    /// MLP.
    pub feed_forward: InternLm2Mlp,
    /// Norm before attention.
    pub attention_norm: RmsNorm,
    /// Norm before the MLP.
    pub ffn_norm: RmsNorm,
}

impl InternLm2Layer {
    fn new(shape: &DecoderShape, bias: bool, device: &Device) -> Self {
        let (hidden, inner) = (shape.hidden_size, shape.intermediate_size);
        let (heads, kv) = (shape.num_attention_heads, shape.num_key_value_heads);
        let norm = || RmsNorm::new(hidden, shape.rms_norm_eps, device);
        Self {
            attention: InternLm2Attention {
                wqkv: linear_module(hidden, (heads + 2 * kv) * shape.head_dim, bias, device),
                wo: linear_module(heads * shape.head_dim, hidden, bias, device),
                num_heads: heads,
                num_key_value_heads: kv,
            },
            feed_forward: InternLm2Mlp {
                w1: linear_module(hidden, inner, false, device),
                w3: linear_module(hidden, inner, false, device),
                w2: linear_module(inner, hidden, false, device),
            },
            attention_norm: norm(),
            ffn_norm: norm(),
        }
    }

    /// # Shapes
    /// `[rows, length, hidden_size]` -> same
    #[must_use]
    pub fn forward(&self, x: Tensor<3>, context: &DecoderContext, cache: Option<&mut LayerCache>) -> Tensor<3> {
        let branch = self.attention.forward(self.attention_norm.forward(x.clone()), context, cache);
        let (x, normed) = self.ffn_norm.add_forward(x, branch);
        x + self.feed_forward.forward(normed)
    }
}

/// `InternLM2Model`: everything below the head.
#[derive(Module, Debug)]
pub struct InternLm2Model {
    /// Token embeddings.
    pub tok_embeddings: Embedding,
    /// Decoder layers.
    pub layers: Vec<InternLm2Layer>,
    /// Final norm.
    pub norm: RmsNorm,
}

/// `InternLM2ForCausalLM`.
#[derive(Module, Debug)]
pub struct InternLm2 {
    /// Everything below the head.
    pub model: InternLm2Model,
    /// States to logits.
    pub output: Linear,
}

impl InternLm2 {
    /// Without memory until loaded.
    #[must_use]
    pub fn new(shape: &DecoderShape, bias: bool, layers: usize, vocab_size: usize, device: &Device) -> Self {
        let hidden = shape.hidden_size;
        Self {
            model: InternLm2Model {
                tok_embeddings: Embedding { weight: parameter([vocab_size, hidden], 0.0, device) },
                layers: (0..layers).map(|_| InternLm2Layer::new(shape, bias, device)).collect(),
                norm: RmsNorm::new(hidden, shape.rms_norm_eps, device),
            },
            output: linear_module(hidden, vocab_size, false, device),
        }
    }
}
