//! Scaled dot-product attention with grouped key-value heads; softmax in f32.
//!
//! Queries of the heads that share a key-value head are folded into one longer block of queries, so keys and values are
//! never repeated. Without autodiff Burn's fused attention runs; with autodiff the composed form runs, in chunks of
//! queries that read only the keys they may see, which bounds the score matrices that are kept for the backward pass.

use std::sync::{Arc, OnceLock};

use burn::tensor::{Bool, DType, Device, Tensor, TensorData, module::attention, ops::AttentionModuleOptions, s};

use super::cast;
use crate::kernel::softmax::masked_softmax;

/// Queries per chunk under autodiff.
const QUERY_CHUNK: usize = 256;

/// Added to scores that must not be seen. Finite, so that a padded query without any key stays finite.
const MASKED: f32 = -1e30;

/// Which key columns the query columns of a batch lie in, on the host.
#[derive(Debug, Clone, PartialEq)]
pub struct Columns {
    /// Number of rows.
    pub rows: usize,
    /// Queries per row.
    pub length: usize,
    /// `[rows, length]`, position of each query for the rotary embedding.
    pub positions: Vec<i32>,
    /// Key columns; at least `start + length`.
    pub keys: usize,
    /// Key column of the first query.
    pub start: usize,
    /// Key columns of the first pass over these rows: a rotary base that depends on the length is fixed there, because
    /// the keys that are cached were rotated by it. Equal to `keys` without a cache.
    pub prefill: usize,
    /// `[rows, keys]`, true at real tokens.
    pub mask: Vec<bool>,
}

impl Columns {
    /// Real tokens of a row in the first pass.
    #[must_use]
    pub fn prompt_len(&self, row: usize) -> usize {
        self.mask[row * self.keys..][..self.prefill].iter().filter(|m| **m).count()
    }
}

/// Mask of a batch, true where a query must not see a key.
#[derive(Debug, Clone)]
pub struct AttentionMask {
    /// `[rows or 1, 1, queries, keys]`
    masked: Tensor<4, Bool>,
    /// Key column of the first query.
    start: usize,
    bias: Arc<OnceLock<Tensor<4>>>,
    folded: Arc<OnceLock<Tensor<4, Bool>>>,
}

impl AttentionMask {
    /// Causal mask over real keys; with `window`, a query sees itself and the `window - 1` keys before it.
    ///
    /// When padding only follows the tokens, no query of a token can see it, and one mask serves all rows.
    #[must_use]
    pub fn causal(columns: &Columns, window: Option<usize>, device: &Device) -> Self {
        let Columns { rows, length, keys, start, mask, .. } = columns;
        let right_padded = mask.chunks((*keys).max(1)).all(|row| row.is_sorted_by(|a, b| a >= b));
        let rows = if right_padded { 1 } else { *rows };
        let window = window.unwrap_or(usize::MAX);
        let mut masked = Vec::with_capacity(rows * length * keys);
        for row in 0..rows {
            for query in 0..*length {
                let column = start + query;
                masked.extend(
                    (0..*keys).map(|key| {
                        key > column || column - key >= window || (!right_padded && !mask[row * keys + key])
                    }),
                );
            }
        }
        let masked = Tensor::from_data(TensorData::new(masked, [rows, 1, *length, *keys]), device);
        Self { masked, start: *start, bias: Arc::default(), folded: Arc::default() }
    }

    /// Number of key columns.
    #[must_use]
    pub fn keys(&self) -> usize {
        self.masked.dims()[3]
    }

    /// `[rows or 1, 1, queries, keys]`, f32, to be added to scores.
    fn bias(&self) -> Tensor<4> {
        self.bias
            .get_or_init(|| {
                let device = self.masked.device();
                Tensor::zeros(self.masked.dims(), (&device, DType::F32)).mask_fill(self.masked.clone(), MASKED)
            })
            .clone()
    }

    /// `[rows or 1, 1, groups * queries, keys]`
    fn folded(&self, groups: usize) -> Tensor<4, Bool> {
        if groups == 1 {
            return self.masked.clone();
        }
        self.folded.get_or_init(|| self.masked.clone().repeat_dim(2, groups)).clone()
    }
}

/// Attention of queries to keys and values; the default scale `1 / sqrt(head_dim)`.
///
/// # Shapes
/// `q` `[rows, queries, heads, head_dim]`, `k` and `v` `[rows, kv_heads, keys, head_dim]` ->
/// `[rows, queries, heads * head_dim]`
#[must_use]
pub fn attend(q: Tensor<4>, k: Tensor<4>, v: Tensor<4>, mask: Option<&AttentionMask>) -> Tensor<3> {
    let [rows, queries, heads, head_dim] = q.dims();
    let tracked = [&q, &k, &v].iter().any(|t| t.is_autodiff());
    let out = if tracked { composed(q, k, v, mask) } else { fused(q, k, v, mask) };
    out.swap_dims(1, 2).reshape([rows, queries, heads * head_dim])
}

/// `[rows, heads, queries, head_dim]`
fn fused(q: Tensor<4>, k: Tensor<4>, v: Tensor<4>, mask: Option<&AttentionMask>) -> Tensor<4> {
    let [rows, queries, heads, head_dim] = q.dims();
    let kv_heads = k.dims()[1];
    let groups = heads / kv_heads;
    let mask = mask.map(|m| m.folded(groups));
    let q = q.swap_dims(1, 2).reshape([rows, kv_heads, groups * queries, head_dim]);
    attention(q, k, v, mask, None, AttentionModuleOptions::default()).reshape([rows, heads, queries, head_dim])
}

/// `[rows, heads, queries, head_dim]`
fn composed(q: Tensor<4>, k: Tensor<4>, v: Tensor<4>, mask: Option<&AttentionMask>) -> Tensor<4> {
    let [rows, queries, heads, head_dim] = q.dims();
    let [_, kv_heads, keys, _] = k.dims();
    let dtype = q.dtype();
    let chunk = |begin: usize, end: usize| {
        let (k, v, bias, q) = if end - begin == queries {
            (k.clone(), v.clone(), mask.map(AttentionMask::bias), q.clone())
        } else {
            let seen = mask.map_or(keys, |m| (m.start + end).min(keys));
            let bias = mask.map(|m| m.bias().slice(s![.., .., begin..end, ..seen]));
            let part = |t: &Tensor<4>| t.clone().slice(s![.., .., ..seen, ..]);
            (part(&k), part(&v), bias, q.clone().slice(s![.., begin..end, .., ..]))
        };
        let keys = k.dims()[2];
        let probabilities = softmax(scores(q, k), bias);
        let folded = [rows, kv_heads, heads / kv_heads * (end - begin), keys];
        cast(probabilities, dtype).reshape(folded).matmul(v).reshape([rows, heads, end - begin, head_dim])
    };
    if queries <= QUERY_CHUNK {
        return chunk(0, queries);
    }
    let parts = (0..queries).step_by(QUERY_CHUNK).map(|b| chunk(b, (b + QUERY_CHUNK).min(queries)));
    Tensor::cat(parts.collect(), 2)
}

/// Probabilities of scores, with what must not be seen masked.
fn softmax(scores: Tensor<4>, bias: Option<Tensor<4>>) -> Tensor<4> {
    let [_, _, queries, keys] = scores.dims();
    let bias = bias.unwrap_or_else(|| Tensor::zeros([1, 1, queries, keys], (&scores.device(), DType::F32)));
    masked_softmax(scores, bias)
}

/// Scaled scores, f32: `[rows, heads, queries, keys]`.
fn scores(q: Tensor<4>, k: Tensor<4>) -> Tensor<4> {
    let [rows, queries, heads, head_dim] = q.dims();
    let [_, kv_heads, keys, _] = k.dims();
    let q = q.mul_scalar((head_dim as f64).powf(-0.5)).swap_dims(1, 2);
    let q = q.reshape([rows, kv_heads, heads / kv_heads * queries, head_dim]);
    cast(q.matmul(k.swap_dims(2, 3)), DType::F32).reshape([rows, heads, queries, keys])
}

/// Attention probabilities, for inspection; f32.
///
/// # Shapes
/// As [`attend`] -> `[rows, heads, queries, keys]`
#[must_use]
pub fn probabilities(q: Tensor<4>, k: Tensor<4>, mask: Option<&AttentionMask>) -> Tensor<4> {
    softmax(scores(q, k), mask.map(AttentionMask::bias))
}
