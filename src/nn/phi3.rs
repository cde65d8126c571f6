//! Phi-3's decoder layer (`modeling_phi3.py` of transformers): queries, keys and values in one projection, one after
//! the other; gate and up in another.

use burn::{
    module::Module,
    nn::{Embedding, Linear},
    tensor::{Device, Tensor, activation::silu, s},
};

use super::{
    decoder::{DecoderContext, DecoderShape, FusedHeads, LayerCache, fused_attention},
    linear::{linear_forward, linear_module},
    norm::RmsNorm,
    parameter,
};

/// Self-attention with one fused projection.
#[derive(Module, Debug)]
pub struct Phi3Attention {
    /// `hidden_size -> (num_attention_heads + 2 * num_key_value_heads) * head_dim`
    pub qkv_proj: Linear,
    /// `num_attention_heads * head_dim -> hidden_size`
    pub o_proj: Linear,
    /// Query heads.
    pub num_heads: usize,
    /// Key-value heads.
    pub num_key_value_heads: usize,
}

impl Phi3Attention {
    fn forward(&self, x: Tensor<3>, context: &DecoderContext, cache: Option<&mut LayerCache>) -> Tensor<3> {
        let heads = FusedHeads { groups: 1, queries: self.num_heads, keys: self.num_key_value_heads };
        fused_attention([&self.qkv_proj, &self.o_proj], heads, x, context, cache)
    }
}

/// `down(silu(gate) * up)` with gate and up from one projection.
#[derive(Module, Debug)]
pub struct Phi3Mlp {
    /// `hidden_size -> 2 * intermediate_size`, gate first
    pub gate_up_proj: Linear,
    /// `intermediate_size -> hidden_size`
    pub down_proj: Linear,
}

impl Phi3Mlp {
    fn forward(&self, x: Tensor<3>) -> Tensor<3> {
        let mixed = linear_forward(&self.gate_up_proj, x);
        let half = mixed.dims()[2] / 2;
        let gate = silu(mixed.clone().slice(s![.., .., ..half]));
        linear_forward(&self.down_proj, gate * mixed.slice(s![.., .., half..]))
    }
}

/// Pre-norm decoder layer.
#[derive(Module, Debug)]
pub struct Phi3Layer {
    /// Attention.
    pub self_attn: Phi3Attention,
    /// MLP.
    pub mlp: Phi3Mlp,
    /// Norm before attention.
    pub input_layernorm: RmsNorm,
    /// Norm before the MLP.
    pub post_attention_layernorm: RmsNorm,
}

impl Phi3Layer {
    fn new(shape: &DecoderShape, device: &Device) -> Self {
        let hidden = shape.hidden_size;
        let (heads, kv) = (shape.num_attention_heads, shape.num_key_value_heads);
        let norm = || RmsNorm::new(hidden, shape.rms_norm_eps, device);
        Self {
            self_attn: Phi3Attention {
                qkv_proj: linear_module(hidden, (heads + 2 * kv) * shape.head_dim, false, device),
                o_proj: linear_module(heads * shape.head_dim, hidden, false, device),
                num_heads: heads,
                num_key_value_heads: kv,
            },
            mlp: Phi3Mlp {
                gate_up_proj: linear_module(hidden, 2 * shape.intermediate_size, false, device),
                down_proj: linear_module(shape.intermediate_size, hidden, false, device),
            },
            input_layernorm: norm(),
            post_attention_layernorm: norm(),
        }
    }

    /// # Shapes
    /// `[rows, length, hidden_size]` -> same
    #[must_use]
    pub fn forward(&self, x: Tensor<3>, context: &DecoderContext, cache: Option<&mut LayerCache>) -> Tensor<3> {
        let branch = self.self_attn.forward(self.input_layernorm.forward(x.clone()), context, cache);
        let (x, normed) = self.post_attention_layernorm.add_forward(x, branch);
        x + self.mlp.forward(normed)
    }
}

/// `Phi3Model`: everything below the head.
#[derive(Module, Debug)]
pub struct Phi3Model {
    /// Token embeddings.
    pub embed_tokens: Embedding,
    /// Decoder layers.
    pub layers: Vec<Phi3Layer>,
    /// Final norm.
    pub norm: RmsNorm,
}

/// `Phi3ForCausalLM`.
#[derive(Module, Debug)]
pub struct Phi3 {
    /// Everything below the head.
    pub model: Phi3Model,
    /// States to logits.
    pub lm_head: Linear,
}

impl Phi3 {
    /// Without memory until loaded.
    #[must_use]
    pub fn new(shape: &DecoderShape, layers: usize, vocab_size: usize, device: &Device) -> Self {
        let hidden = shape.hidden_size;
        Self {
            model: Phi3Model {
                embed_tokens: Embedding { weight: parameter([vocab_size, hidden], 0.0, device) },
                layers: (0..layers).map(|_| Phi3Layer::new(shape, device)).collect(),
                norm: RmsNorm::new(hidden, shape.rms_norm_eps, device),
            },
            lm_head: linear_module(hidden, vocab_size, false, device),
        }
    }
}
