//! Decoder blocks of the Llama, Mistral and Qwen2 shape: context of a batch, key-value cache, layer.

use burn::{
    module::Module,
    nn::Linear,
    tensor::{Device, Int, Tensor, s},
};

use super::{
    attention::{AttentionMask, Columns, attend, probabilities},
    cast, debug_dtype,
    linear::{linear_forward, linear_module},
    norm::RmsNorm,
    rope::Rope,
};
use crate::kernel::swiglu::swiglu;

/// Rotary tables and attention mask of a batch.
#[derive(Debug, Clone)]
pub struct DecoderContext {
    /// Rotary tables of the queries.
    pub rope: Rope,
    /// Which keys each query sees.
    pub mask: AttentionMask,
    /// Factors of the queries, `[rows or 1, length, 1, 1]`, f32, for models whose attention sharpens with the length.
    pub query_scale: Option<Tensor<4>>,
}

impl DecoderContext {
    /// Causal context.
    #[must_use]
    pub fn causal(columns: &Columns, inverse_frequencies: &[f32], window: Option<usize>, device: &Device) -> Self {
        Self {
            rope: Rope::new(&columns.positions, columns.length, inverse_frequencies, device),
            mask: AttentionMask::causal(columns, window, device),
            query_scale: None,
        }
    }
}

/// Keys and values of earlier positions of one layer, in memory that is reserved once.
#[derive(Debug, Clone)]
pub struct LayerCache {
    /// `[rows, kv_heads, capacity, head_dim]`, absent until the first positions arrive.
    keys_values: Option<(Tensor<4>, Tensor<4>)>,
    capacity: usize,
    len: usize,
}

impl LayerCache {
    /// Room for `capacity` positions a row.
    #[must_use]
    pub fn new(capacity: usize) -> Self {
        Self { keys_values: None, capacity, len: 0 }
    }

    /// Positions stored.
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether nothing is stored.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Stores keys and values behind the earlier ones and returns the first `keys` columns; columns that nothing was
    /// stored in are zero.
    ///
    /// # Shapes
    /// `[rows, kv_heads, length, head_dim]` each -> `[rows, kv_heads, keys, head_dim]` each
    #[must_use]
    pub fn append(&mut self, k: Tensor<4>, v: Tensor<4>, keys: usize) -> (Tensor<4>, Tensor<4>) {
        let [rows, heads, length, head_dim] = k.dims();
        let end = self.len + length;
        assert!(end <= self.capacity && keys <= self.capacity, "the cache is sized for the longest answer");
        let (all_k, all_v) = self.keys_values.take().unwrap_or_else(|| {
            let zeros = || Tensor::zeros([rows, heads, self.capacity, head_dim], (&k.device(), k.dtype()));
            (zeros(), zeros())
        });
        let all_k = all_k.slice_assign(s![.., .., self.len..end, ..], k);
        let all_v = all_v.slice_assign(s![.., .., self.len..end, ..], v);
        self.len = end;
        let seen = (all_k.clone().slice(s![.., .., ..keys, ..]), all_v.clone().slice(s![.., .., ..keys, ..]));
        self.keys_values = Some((all_k, all_v));
        seen
    }

    /// Keeps the given rows, in the given order; rows may repeat.
    pub fn select_rows(&mut self, rows: Tensor<1, Int>) {
        if let Some((k, v)) = self.keys_values.take() {
            self.keys_values = Some((k.select(0, rows.clone()), v.select(0, rows)));
        }
    }
}

/// Causal attention of heads that are not rotated yet; reads and extends the cache if there is one.
///
/// # Shapes
/// `q` `[rows, length, heads, head_dim]`, `k` and `v` `[rows, length, kv_heads, head_dim]` ->
/// `[rows, length, heads * head_dim]`
#[must_use]
pub fn rotary_attention(
    q: Tensor<4>,
    k: Tensor<4>,
    v: Tensor<4>,
    context: &DecoderContext,
    cache: Option<&mut LayerCache>,
) -> Tensor<3> {
    let mut q = context.rope.rotate(q);
    if let Some(scale) = &context.query_scale {
        let dtype = q.dtype();
        q = q * cast(scale.clone(), dtype);
    }
    let (k, v) = (context.rope.rotate(k).swap_dims(1, 2), v.swap_dims(1, 2));
    let (k, v) = match cache {
        Some(cache) => cache.append(k, v, context.mask.keys()),
        None => (k, v),
    };
    attend(q, k, v, Some(&context.mask))
}

/// Heads of one fused projection of queries, keys and values.
#[derive(Debug, Clone, Copy)]
pub struct FusedHeads {
    /// Groups that stand one after the other.
    pub groups: usize,
    /// Query heads of a group, which come first in it.
    pub queries: usize,
    /// Key heads of a group, and as many value heads behind them.
    pub keys: usize,
}

impl FusedHeads {
    /// Queries, keys and values: `[rows, length, heads or kv_heads, head_dim]`.
    fn split(self, mixed: Tensor<3>) -> [Tensor<4>; 3] {
        let [rows, length, width] = mixed.dims();
        let all = self.queries + 2 * self.keys;
        let head_dim = width / (self.groups * all);
        let mixed = mixed.reshape([rows, length, self.groups, all, head_dim]);
        let part = |from: usize, to: usize| {
            let part = mixed.clone().slice(s![.., .., .., from..to, ..]);
            part.reshape([rows, length, self.groups * (to - from), head_dim])
        };
        let (k, v) = (self.queries, self.queries + self.keys);
        [part(0, k), part(k, v), part(v, all)]
    }
}

/// Causal self-attention whose queries, keys and values come from one projection.
///
/// # Shapes
/// `[rows, length, hidden_size]` -> same
#[must_use]
pub fn fused_attention(
    [qkv, out]: [&Linear; 2],
    heads: FusedHeads,
    x: Tensor<3>,
    context: &DecoderContext,
    cache: Option<&mut LayerCache>,
) -> Tensor<3> {
    let [q, k, v] = heads.split(linear_forward(qkv, x));
    linear_forward(out, rotary_attention(q, k, v, context, cache))
}

/// Shape of a decoder layer.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct DecoderShape {
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width inside the MLP.
    pub intermediate_size: usize,
    /// Query heads.
    pub num_attention_heads: usize,
    /// Key-value heads; a divisor of the query heads.
    pub num_key_value_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Added to the mean square in norms.
    pub rms_norm_eps: f64,
    /// Whether query, key and value projections have a bias.
    pub attention_bias: bool,
}

/// Self-attention with grouped key-value heads and rotary positions.
#[derive(Module, Debug)]
pub struct SelfAttention {
    /// `hidden_size -> num_attention_heads * head_dim`
    pub q_proj: Linear,
    /// `hidden_size -> num_key_value_heads * head_dim`
    pub k_proj: Linear,
    /// `hidden_size -> num_key_value_heads * head_dim`
    pub v_proj: Linear,
    /// `num_attention_heads * head_dim -> hidden_size`
    pub o_proj: Linear,
    /// Width of a head.
    pub head_dim: usize,
}

impl SelfAttention {
    fn new(shape: &DecoderShape, device: &Device) -> Self {
        let (q, kv) = (shape.num_attention_heads * shape.head_dim, shape.num_key_value_heads * shape.head_dim);
        Self {
            q_proj: linear_module(shape.hidden_size, q, shape.attention_bias, device),
            k_proj: linear_module(shape.hidden_size, kv, shape.attention_bias, device),
            v_proj: linear_module(shape.hidden_size, kv, shape.attention_bias, device),
            o_proj: linear_module(q, shape.hidden_size, false, device),
            head_dim: shape.head_dim,
        }
    }

    /// Queries, keys and values, not rotated: `[rows, length, heads or kv_heads, head_dim]`.
    fn project(&self, x: Tensor<3>) -> (Tensor<4>, Tensor<4>, Tensor<4>) {
        let [rows, length, _] = x.dims();
        let heads = |y: Tensor<3>| {
            let width = y.dims()[2];
            y.reshape([rows, length, width / self.head_dim, self.head_dim])
        };
        let q = heads(linear_forward(&self.q_proj, x.clone()));
        let k = heads(linear_forward(&self.k_proj, x.clone()));
        (q, k, heads(linear_forward(&self.v_proj, x)))
    }

    /// # Shapes
    /// `[rows, length, hidden_size]` -> same
    fn forward(&self, x: Tensor<3>, context: &DecoderContext, cache: Option<&mut LayerCache>) -> Tensor<3> {
        let (q, k, v) = self.project(x);
        linear_forward(&self.o_proj, rotary_attention(q, k, v, context, cache))
    }

    /// Attention probabilities of normed states, for inspection.
    ///
    /// # Shapes
    /// `[rows, length, hidden_size]` -> `[rows, heads, length, length]`
    #[must_use]
    pub fn probabilities(&self, x: Tensor<3>, context: &DecoderContext) -> Tensor<4> {
        let (q, k, _) = self.project(x);
        let (q, k) = (context.rope.rotate(q), context.rope.rotate(k).swap_dims(1, 2));
        probabilities(q, k, Some(&context.mask))
    }
}

/// `down(silu(gate(x)) * up(x))`
#[derive(Module, Debug)]
pub struct GatedMlp {
    /// `hidden_size -> intermediate_size`
    pub gate_proj: Linear,
    /// `hidden_size -> intermediate_size`
    pub up_proj: Linear,
    /// `intermediate_size -> hidden_size`
    pub down_proj: Linear,
}

impl GatedMlp {
    fn new(hidden_size: usize, intermediate_size: usize, device: &Device) -> Self {
        Self {
            gate_proj: linear_module(hidden_size, intermediate_size, false, device),
            up_proj: linear_module(hidden_size, intermediate_size, false, device),
            down_proj: linear_module(intermediate_size, hidden_size, false, device),
        }
    }

    fn forward(&self, x: Tensor<3>) -> Tensor<3> {
        let gate = linear_forward(&self.gate_proj, x.clone());
        linear_forward(&self.down_proj, swiglu(gate, linear_forward(&self.up_proj, x)))
    }
}

/// Pre-norm decoder layer: attention, then a gated MLP, each with a residual.
#[derive(Module, Debug)]
pub struct DecoderLayer {
    /// Attention.
    pub self_attn: SelfAttention,
    /// MLP.
    pub mlp: GatedMlp,
    /// Norm before attention.
    pub input_layernorm: RmsNorm,
    /// Norm before the MLP.
    pub post_attention_layernorm: RmsNorm,
}

impl DecoderLayer {
    /// Without memory until loaded.
    #[must_use]
    pub fn new(shape: &DecoderShape, device: &Device) -> Self {
        let norm = || RmsNorm::new(shape.hidden_size, shape.rms_norm_eps, device);
        Self {
            self_attn: SelfAttention::new(shape, device),
            mlp: GatedMlp::new(shape.hidden_size, shape.intermediate_size, device),
            input_layernorm: norm(),
            post_attention_layernorm: norm(),
        }
    }

    /// # Shapes
    /// `[rows, length, hidden_size]` -> same
    #[must_use]
    pub fn forward(&self, x: Tensor<3>, context: &DecoderContext, cache: Option<&mut LayerCache>) -> Tensor<3> {
        let dtype = x.dtype();
        let branch = self.self_attn.forward(self.input_layernorm.forward(x.clone()), context, cache);
        let (x, normed) = self.post_attention_layernorm.add_forward(x, branch);
        let x = x + self.mlp.forward(normed);
        debug_dtype(&x, dtype, "the residual stream");
        x
    }
}
