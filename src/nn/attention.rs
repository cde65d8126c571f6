//! Scaled dot-product attention with grouped key-value heads; softmax in f32.
//!
//! Queries of the heads that share a key-value head are folded into one longer block of queries, so keys and values are
//! never repeated. Where activations are f32, on the CPU and on WebGPU and Vulkan devices, the project's own kernel runs,
//! with and without autodiff. On CUDA, without autodiff Burn's fused attention runs; with autodiff the composed form runs,
//! in chunks of queries that read only the keys they may see, which bounds the score matrices that are kept for the
//! backward pass. Both multiply on tensor cores, which the project's kernel does not; none of this has been measured on
//! a GPU yet.

use std::{
    collections::HashSet,
    ops::Range,
    sync::{Arc, OnceLock},
};

use burn::tensor::{Bool, DType, Device, Int, Tensor, TensorData, module::attention, ops::AttentionModuleOptions, s};

use super::{cast, debug_dtype};
use crate::{
    kernel::{attention::attention as ranged, fused as fused_kernels, softmax::masked_softmax},
    weights::keeps_half,
};

/// Queries per chunk under autodiff.
pub(crate) const QUERY_CHUNK: usize = 256;

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
    /// `[rows, keys]`, which text each column belongs to, where rows hold several texts one after the other; columns of
    /// padding have numbers of their own. None when every row is one text.
    pub segments: Option<Arc<[i32]>>,
}

/// A text in the query columns of a batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Text {
    /// Its query columns.
    pub columns: usize,
    /// Its real tokens in the first pass.
    pub tokens: usize,
}

impl Columns {
    /// Real tokens of a row in the first pass.
    #[must_use]
    pub fn prompt_len(&self, row: usize) -> usize {
        self.mask[row * self.keys..][..self.prefill].iter().filter(|m| **m).count()
    }

    /// The texts, row by row; their columns together are all query columns. Padding behind packed texts counts as one
    /// without tokens.
    #[must_use]
    pub fn texts(&self) -> Vec<Text> {
        let Some(segments) = &self.segments else {
            return (0..self.rows).map(|row| Text { columns: self.length, tokens: self.prompt_len(row) }).collect();
        };
        let rows = segments.chunks(self.keys.max(1)).zip(self.mask.chunks(self.keys.max(1)));
        rows.flat_map(|(segments, mask)| {
            let mut at = 0;
            segments.chunk_by(|a, b| a == b).map(move |run| {
                let tokens = mask[at..at + run.len()].iter().filter(|m| **m).count();
                at += run.len();
                Text { columns: run.len(), tokens }
            })
        })
        .collect()
    }
}

/// What the queries of a batch see, on the host.
#[derive(Debug)]
enum Seen {
    /// First key and key past the last of each query, all keys between included.
    Ranges(Vec<[i32; 2]>),
    /// `[rows, queries, keys]`, true at keys that a query must not see; for rows whose real keys have gaps.
    Masked(Vec<bool>),
}

/// Which keys each query of a batch sees. The matrix of all pairs exists only for those who ask for it.
#[derive(Debug, Clone)]
pub struct AttentionMask {
    /// Rows or 1, queries, keys.
    dims: [usize; 3],
    seen: Arc<Seen>,
    device: Device,
    /// `[rows or 1, queries, 2]`, where the keys between two are what each query sees.
    ranges: Option<Tensor<3, Int>>,
    /// Key column of the first query.
    start: usize,
    /// `[rows, keys]`, which text each column belongs to, if rows hold several.
    segments: Option<Arc<[i32]>>,
    masked: Arc<OnceLock<Tensor<4, Bool>>>,
    bias: Arc<OnceLock<Tensor<4>>>,
    folded: Arc<OnceLock<Tensor<4, Bool>>>,
}

impl AttentionMask {
    fn new(dims: [usize; 3], seen: Seen, device: &Device) -> Self {
        let ranges = match &seen {
            Seen::Ranges(values) => {
                let data = TensorData::new(values.as_flattened().to_vec(), [dims[0], dims[1], 2]);
                Some(Tensor::from_data(data, (device, DType::I32)))
            }
            Seen::Masked(_) => None,
        };
        let (masked, bias, folded) = Default::default();
        let (seen, device) = (Arc::new(seen), device.clone());
        Self { dims, seen, device, ranges, start: 0, segments: None, masked, bias, folded }
    }

    /// Causal mask over real keys; with `window`, a query sees itself and the `window - 1` keys before it.
    ///
    /// When padding only follows the tokens, no query of a token can see it, and one mask serves all rows. Texts that
    /// share a row do not see each other.
    #[must_use]
    pub fn causal(columns: &Columns, window: Option<usize>, device: &Device) -> Self {
        let Columns { rows, length, keys, start, mask, segments, .. } = columns;
        let right_padded = mask.chunks((*keys).max(1)).all(|row| row.is_sorted_by(|a, b| a >= b));
        let rows = if right_padded && segments.is_none() { 1 } else { *rows };
        let window = window.unwrap_or(usize::MAX);
        let every = vec![true; *keys];
        let real = |row: usize| if right_padded { &every[..] } else { &mask[row * keys..][..*keys] };
        let text = |row: usize| segments.as_ref().map(|s| &s[row * keys..][..*keys]);
        let queries = *start..start + length;
        let ranges: Option<Vec<_>> =
            (0..rows).map(|row| ranges(queries.clone(), real(row), text(row), window)).collect();
        let seen = ranges.map_or_else(
            || Seen::Masked((0..rows).flat_map(|row| masked(queries.clone(), real(row), text(row), window)).collect()),
            |rows| Seen::Ranges(rows.concat()),
        );
        Self { start: *start, segments: segments.clone(), ..Self::new([rows, *length, *keys], seen, device) }
    }

    /// Every query sees the real keys of its row: the first `lengths[row]` of `keys`.
    #[must_use]
    pub fn padded(lengths: &[usize], keys: usize, device: &Device) -> Self {
        let seen = lengths.iter().flat_map(|n| vec![[0, *n as i32]; keys]).collect();
        Self::new([lengths.len(), keys, keys], Seen::Ranges(seen), device)
    }

    /// `[rows, keys]`, which text each column belongs to; none when every row is one text.
    #[must_use]
    pub fn segments(&self) -> Option<&[i32]> {
        self.segments.as_deref()
    }

    /// Number of key columns.
    #[must_use]
    pub fn keys(&self) -> usize {
        self.dims[2]
    }

    /// `[rows or 1, 1, queries, keys]`, true where a query must not see a key.
    fn masked(&self) -> Tensor<4, Bool> {
        self.masked
            .get_or_init(|| {
                let [rows, queries, keys] = self.dims;
                let masked = match &*self.seen {
                    Seen::Masked(masked) => masked.clone(),
                    Seen::Ranges(ranges) => {
                        let outside = |r: &[i32; 2]| {
                            let [first, last] = *r;
                            (0..keys as i32).map(move |key| key < first || key >= last)
                        };
                        ranges.iter().flat_map(outside).collect()
                    }
                };
                Tensor::from_data(TensorData::new(masked, [rows, 1, queries, keys]), &self.device)
            })
            .clone()
    }

    /// `[rows or 1, 1, queries, keys]`, f32, to be added to scores.
    fn bias(&self) -> Tensor<4> {
        self.bias
            .get_or_init(|| {
                let masked = self.masked();
                Tensor::zeros(masked.dims(), (&self.device, DType::F32)).mask_fill(masked, MASKED)
            })
            .clone()
    }

    /// `[rows or 1, 1, groups * queries, keys]`
    fn folded(&self, groups: usize) -> Tensor<4, Bool> {
        if groups == 1 {
            return self.masked();
        }
        self.folded.get_or_init(|| self.masked().repeat_dim(2, groups)).clone()
    }
}

/// First key and key past the last that each query of a row sees: not itself in a later column, not further back than
/// `window`, `real` keys of its own `text`. None if there are gaps among them.
fn ranges(queries: Range<usize>, real: &[bool], text: Option<&[i32]>, window: usize) -> Option<Vec<[i32; 2]>> {
    // the first real key from each column on, the last before each column, and how many are before it
    let keys = real.len();
    let (mut next, mut last, mut count) = (vec![keys; keys + 1], vec![0; keys + 1], vec![0; keys + 1]);
    for key in 0..keys {
        last[key + 1] = if real[key] { key + 1 } else { last[key] };
        count[key + 1] = count[key] + usize::from(real[key]);
    }
    for key in (0..keys).rev() {
        next[key] = if real[key] { key } else { next[key + 1] };
    }
    let mut begins = vec![0; keys];
    if let Some(text) = text {
        let mut before = HashSet::new();
        for key in 0..keys {
            let same = key > 0 && text[key] == text[key - 1];
            if !same && !before.insert(text[key]) {
                return None;
            }
            begins[key] = if same { begins[key - 1] } else { key };
        }
    }
    queries
        .map(|column| {
            let first = next[begins[column].max((column + 1).saturating_sub(window))];
            let last = last[column + 1];
            match first < last {
                false => Some([0, 0]),
                true => (count[last] - count[first] == last - first).then_some([first as i32, last as i32]),
            }
        })
        .collect()
}

/// As [`ranges`], pair by pair: true where a query must not see a key.
fn masked(queries: Range<usize>, real: &[bool], text: Option<&[i32]>, window: usize) -> Vec<bool> {
    let hidden = |column: usize, key: usize| {
        let other = text.is_some_and(|text| text[column] != text[key]);
        key > column || column - key >= window || !real[key] || other
    };
    queries.flat_map(|column| (0..real.len()).map(move |key| hidden(column, key))).collect()
}

/// Attention of queries to keys and values; the default scale `1 / sqrt(head_dim)`.
///
/// # Shapes
/// `q` `[rows, queries, heads, head_dim]`, `k` and `v` `[rows, kv_heads, keys, head_dim]` ->
/// `[rows, queries, heads * head_dim]`
#[must_use]
pub fn attend(q: Tensor<4>, k: Tensor<4>, v: Tensor<4>, mask: Option<&AttentionMask>) -> Tensor<3> {
    let [rows, queries, heads, head_dim] = q.dims();
    debug_dtype(&k, q.dtype(), "attention");
    debug_dtype(&v, q.dtype(), "attention");
    if let Some(ranges) = own_ranges(&[&q, &k, &v], mask) {
        let out = ranged(q, k, v, ranges, (head_dim as f64).powf(-0.5));
        return out.reshape([rows, queries, heads * head_dim]);
    }
    let tracked = [&q, &k, &v].iter().any(|t| t.is_autodiff());
    let out = if tracked { composed(q, k, v, mask) } else { fused(q, k, v, mask) };
    out.swap_dims(1, 2).reshape([rows, queries, heads * head_dim])
}

/// Ranges of keys for the project's own attention, where it is to compute this one: in f32, on devices
/// whose activations are f32.
fn own_ranges([q, k, v]: &[&Tensor<4>; 3], mask: Option<&AttentionMask>) -> Option<Tensor<3, Int>> {
    let device = q.device();
    if !fused_kernels() || !keeps_half(&device) || [q, k, v].iter().any(|t| t.dtype() != DType::F32) {
        return None;
    }
    match mask {
        Some(mask) => mask.ranges.clone(),
        None => {
            let (queries, keys) = (q.dims()[1], k.dims()[2] as i32);
            let all = TensorData::new([0, keys].repeat(queries), [1, queries, 2]);
            Some(Tensor::from_data(all, (&device.without_autodiff(), DType::I32)))
        }
    }
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

#[cfg(test)]
mod tests {
    use burn::tensor::{Distribution, Tolerance};

    use super::*;

    fn columns(masks: &[Vec<bool>]) -> Columns {
        let keys = masks[0].len();
        Columns {
            rows: masks.len(),
            length: keys,
            positions: vec![0; masks.len() * keys],
            keys,
            start: 0,
            prefill: keys,
            mask: masks.concat(),
            segments: None,
        }
    }

    /// The definition, one row, head and query at a time.
    fn naive(
        q: &[f32],
        k: &[f32],
        v: &[f32],
        dims: [usize; 5],
        seen: impl Fn(usize, usize, usize) -> bool,
    ) -> Vec<f32> {
        let [rows, heads, kv_heads, length, dim] = dims;
        let mut out = vec![0f32; rows * length * heads * dim];
        for (row, head, query) in
            (0..rows).flat_map(|r| (0..heads).flat_map(move |h| (0..length).map(move |t| (r, h, t))))
        {
            let kv = head / (heads / kv_heads);
            let q = &q[((row * length + query) * heads + head) * dim..][..dim];
            let at = |t: usize| ((row * kv_heads + kv) * length + t) * dim;
            let weights: Vec<f64> = (0..length)
                .map(|t| {
                    let dot: f32 = q.iter().zip(&k[at(t)..]).map(|(a, b)| a * b).sum();
                    if seen(row, query, t) { (f64::from(dot) / (dim as f64).sqrt()).exp() } else { 0.0 }
                })
                .collect();
            let sum: f64 = weights.iter().sum();
            for d in 0..dim {
                let value: f64 = (0..length).map(|t| weights[t] * f64::from(v[at(t) + d])).sum();
                out[((row * length + query) * heads + head) * dim + d] = (value / sum) as f32;
            }
        }
        out
    }

    #[test]
    fn fused_and_chunked_attention_agree_with_the_definition() {
        let device = Device::flex();
        let (rows, heads, kv_heads, length, dim) = (2, 4, 2, QUERY_CHUNK + 40, 8);
        let random = |shape: [usize; 4]| Tensor::<4>::random(shape, Distribution::Normal(0.0, 1.0), &device);
        let q = random([rows, length, heads, dim]);
        let (k, v) = (random([rows, kv_heads, length, dim]), random([rows, kv_heads, length, dim]));
        let host = |t: &Tensor<4>| t.clone().into_data().as_slice::<f32>().unwrap().to_vec();
        let full = vec![true; length];
        let left: Vec<bool> = (0..length).map(|t| t >= 30).collect();
        let right: Vec<bool> = (0..length).map(|t| t < 270).collect();
        let gaps: Vec<bool> = (0..length).map(|t| t % 7 != 3).collect();
        for (masks, window, ranged) in [
            (vec![full.clone(), right], None, true),
            (vec![full.clone(), left.clone()], None, true),
            (vec![left, full.clone()], Some(20), true),
            (vec![full, gaps], Some(20), false),
        ] {
            let mask = AttentionMask::causal(&columns(&masks), window, &device);
            assert_eq!(mask.ranges.is_some(), ranged);
            let seen = |row: usize, query: usize, key: usize| {
                key <= query && window.is_none_or(|w| query - key < w) && masks[row][key]
            };
            let expected = naive(&host(&q), &host(&k), &host(&v), [rows, heads, kv_heads, length, dim], seen);
            let real = |values: Vec<f32>| -> Vec<f32> {
                let cells = values.chunks(heads * dim).enumerate();
                cells.filter(|(c, _)| masks[c / length][c % length]).flat_map(|(_, r)| r.to_vec()).collect()
            };
            let ad = |t: &Tensor<4>| t.clone().autodiff();
            let flat = |out: Tensor<4>| out.swap_dims(1, 2).reshape([rows, length, heads * dim]);
            for found in [
                attend(q.clone(), k.clone(), v.clone(), Some(&mask)),
                flat(fused(q.clone(), k.clone(), v.clone(), Some(&mask))),
                flat(composed(ad(&q), ad(&k), ad(&v), Some(&mask)).without_autodiff()),
            ] {
                let found = found.into_data().as_slice::<f32>().unwrap().to_vec();
                assert!(found.iter().all(|x| x.is_finite()), "padding must stay finite");
                let (found, expected) = (real(found), real(expected.clone()));
                let n = found.len();
                TensorData::new(found, [n])
                    .assert_approx_eq::<f32>(&TensorData::new(expected, [n]), Tolerance::rel_abs(1e-4, 1e-5));
            }
        }
    }

    #[test]
    fn texts_that_share_a_row_do_not_see_each_other() {
        let device = Device::flex();
        let (heads, kv_heads, dim) = (4, 2, 8);
        let lengths = [QUERY_CHUNK + 9, 1, 40];
        let length: usize = lengths.iter().sum();
        let segments: Vec<i32> = lengths.iter().zip(0..).flat_map(|(n, i)| vec![i; *n]).collect();
        let columns = Columns { segments: Some(segments.into()), ..columns(&[vec![true; length]]) };
        let texts: Vec<usize> = columns.texts().iter().map(|t| t.columns).collect();
        assert_eq!(texts, lengths);
        let packed = AttentionMask::causal(&columns, None, &device);
        let random = |shape: [usize; 4]| Tensor::<4>::random(shape, Distribution::Normal(0.0, 1.0), &device);
        let q = random([1, length, heads, dim]);
        let (k, v) = (random([1, kv_heads, length, dim]), random([1, kv_heads, length, dim]));
        let mut start = 0;
        let alone = lengths.map(|n| {
            let plain = AttentionMask::causal(&super::tests::columns(&[vec![true; n]]), None, &device);
            let part = |t: &Tensor<4>, axis| t.clone().narrow(axis, start, n);
            let out = attend(part(&q, 1), part(&k, 2), part(&v, 2), Some(&plain));
            start += n;
            out
        });
        let alone = Tensor::cat(alone.to_vec(), 1).into_data();
        let ad = |t: &Tensor<4>| t.clone().autodiff();
        for found in [
            attend(q.clone(), k.clone(), v.clone(), Some(&packed)),
            attend(ad(&q), ad(&k), ad(&v), Some(&packed)).without_autodiff(),
        ] {
            found.into_data().assert_approx_eq::<f32>(&alone, Tolerance::rel_abs(1e-4, 1e-5));
        }
    }
}
