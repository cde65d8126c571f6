//! Attention of grouped heads, each query to one range of keys, without the matrix of all scores.
//!
//! Causal masks, windows, padding on either side and rows packed behind one another all let a query see one range of
//! keys, so a mask is two numbers a query. The forward pass keeps nothing but its inputs; the backward pass computes
//! the probabilities again, a block of queries at a time. Scores of a block stand as `[keys, queries]`: keys and values
//! are then read where they lie, and the softmax runs over many queries in one vector.

use burn::{
    backend::{
        Autodiff, Backend, Dispatch, Flex, TensorMetadata,
        autodiff::{
            NodeId,
            checkpoint::{base::Checkpointer, strategy::CheckpointStrategy},
            grads::Gradients,
            ops::{Backward, Ops, OpsKind},
        },
        backend_extension,
        flex::FlexTensor,
        tensor::{FloatTensor, IntTensor},
    },
    tensor::{FloatDType, Int, IntDType, Shape, Tensor},
};
use rayon::prelude::*;

use super::{
    flex::{self, vectorized},
    gemm::{View, multiply_here},
};

/// Queries of a block.
const BLOCK: usize = 64;

/// Added to scores of keys outside a range by the composed form. Finite, so that a query without keys stays finite.
pub(super) const MASKED: f32 = -1e30;

/// Softmax of `scale q k^T` over the keys of each query's range, times `v`; f32.
///
/// Gradients flow to `q`, `k` and `v`. A query with an empty range gets some finite vector that nothing may use.
///
/// # Shapes
/// `q` `[rows, queries, heads, head_dim]`, `k` and `v` `[rows, kv_heads, keys, head_dim]`, `ranges`
/// `[rows or 1, queries, 2]` (first key and key past the last, i32) -> as `q`
#[must_use]
pub fn attention(q: Tensor<4>, k: Tensor<4>, v: Tensor<4>, ranges: Tensor<3, Int>, scale: f64) -> Tensor<4> {
    let ([rows, queries, heads, dim], [_, kv_heads, keys, _]) = (q.dims(), k.dims());
    let seen = ranges.dims();
    assert!(
        k.dims() == v.dims()
            && k.dims() == [rows, kv_heads, keys, dim]
            && heads.is_multiple_of(kv_heads)
            && (seen == [rows, queries, 2] || seen == [1, queries, 2]),
        "attention: q {:?}, k {:?}, v {:?}, ranges {seen:?}",
        q.dims(),
        k.dims(),
        v.dims()
    );
    let (q, k, v) = (q.into_dispatch(), k.into_dispatch(), v.into_dispatch());
    Tensor::from_dispatch(Dispatch::ranged_attention(q, k, v, ranges.into_dispatch(), scale as f32))
}

/// The operation and its gradients.
#[backend_extension(Flex, Cube: cfg(feature = "gpu"), Fusion: cfg(feature = "gpu"), Autodiff)]
pub trait AttentionOps: Backend {
    /// Attention within ranges.
    #[fusion(dtype = q, shape = q)]
    fn ranged_attention(
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        v: FloatTensor<Self>,
        ranges: IntTensor<Self>,
        scale: f32,
    ) -> FloatTensor<Self> {
        forward::<Self>(q, k, v, ranges, scale)
    }

    /// Gradients of queries, keys and values.
    #[fusion(meta = |q, k, v, _ranges, _grad, _scale| (q.clone(), k.clone(), v.clone()))]
    fn ranged_attention_backward(
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        v: FloatTensor<Self>,
        ranges: IntTensor<Self>,
        grad: FloatTensor<Self>,
        scale: f32,
    ) -> (FloatTensor<Self>, FloatTensor<Self>, FloatTensor<Self>) {
        backward::<Self>(q, k, v, ranges, grad, scale)
    }
}

/// 0 at keys that a query sees and [`MASKED`] or twice that elsewhere: `[rows or 1, 1, queries, keys]`.
fn bias<B: Backend>(ranges: IntTensor<B>, keys: usize) -> FloatTensor<B> {
    let [rows, queries, _] = ranges.shape().dims();
    let device = ranges.device();
    let column = |from: usize| {
        let part = B::int_slice(ranges.clone(), &[(0..rows).into(), (0..queries).into(), (from..from + 1).into()]);
        B::int_into_float(B::int_reshape(part, Shape::new([rows, 1, queries, 1])), FloatDType::F32)
    };
    let index = B::int_into_float(B::int_arange(0..keys as i64, &device, IntDType::I32), FloatDType::F32);
    let index = B::float_reshape(index, Shape::new([1, 1, 1, keys]));
    // by how many keys outside, at most one
    let outside = |distance| B::float_clamp(distance, 0f32.into(), 1f32.into());
    let before = outside(B::float_sub(column(0), index.clone()));
    let behind = outside(B::float_add_scalar(B::float_sub(index, column(1)), 1f32.into()));
    B::float_mul_scalar(B::float_add(before, behind), MASKED.into())
}

/// Queries by the key-value head they read: `[rows, kv_heads, heads / kv_heads * queries, head_dim]`.
fn folded<B: Backend>(q: FloatTensor<B>, kv_heads: usize) -> FloatTensor<B> {
    let [rows, queries, heads, dim] = q.shape().dims();
    B::float_reshape(B::float_swap_dims(q, 1, 2), Shape::new([rows, kv_heads, heads / kv_heads * queries, dim]))
}

/// Reverse of [`folded`].
fn unfolded<B: Backend>(q: FloatTensor<B>, heads: usize) -> FloatTensor<B> {
    let [rows, kv_heads, folded, dim] = q.shape().dims();
    let q = B::float_reshape(q, Shape::new([rows, heads, folded * kv_heads / heads, dim]));
    B::float_swap_dims(q, 1, 2)
}

/// `[rows, kv_heads, heads / kv_heads * queries, keys]`
fn probabilities<B: Backend>(q: FloatTensor<B>, k: FloatTensor<B>, ranges: IntTensor<B>, scale: f32) -> FloatTensor<B> {
    let ([rows, queries, heads, _], [_, kv_heads, keys, _]) = (q.shape().dims(), k.shape().dims());
    let scores = B::float_matmul(folded::<B>(q, kv_heads), B::float_swap_dims(k, 2, 3));
    let scores = B::float_reshape(B::float_mul_scalar(scores, scale.into()), Shape::new([rows, heads, queries, keys]));
    let scores = B::float_add(scores, bias::<B>(ranges, keys));
    let largest = B::float_max_dim(scores.clone(), 3);
    let exp = B::float_exp(B::float_sub(scores, largest));
    let sum = B::float_sum_dim(exp.clone(), 3);
    let groups = heads / kv_heads;
    B::float_reshape(B::float_div(exp, sum), Shape::new([rows, kv_heads, groups * queries, keys]))
}

pub(super) fn forward<B: Backend>(
    q: FloatTensor<B>,
    k: FloatTensor<B>,
    v: FloatTensor<B>,
    ranges: IntTensor<B>,
    scale: f32,
) -> FloatTensor<B> {
    let [_, _, heads, _] = q.shape().dims();
    unfolded::<B>(B::float_matmul(probabilities::<B>(q, k, ranges, scale), v), heads)
}

pub(super) fn backward<B: Backend>(
    q: FloatTensor<B>,
    k: FloatTensor<B>,
    v: FloatTensor<B>,
    ranges: IntTensor<B>,
    grad: FloatTensor<B>,
    scale: f32,
) -> (FloatTensor<B>, FloatTensor<B>, FloatTensor<B>) {
    let ([_, _, heads, _], [_, kv_heads, _, _]) = (q.shape().dims(), k.shape().dims());
    let p = probabilities::<B>(q.clone(), k.clone(), ranges, scale);
    let (q, grad) = (folded::<B>(q, kv_heads), folded::<B>(grad, kv_heads));
    let grad_v = B::float_matmul(B::float_swap_dims(p.clone(), 2, 3), grad.clone());
    let grad_p = B::float_matmul(grad, B::float_swap_dims(v, 2, 3));
    let along = B::float_sum_dim(B::float_mul(p.clone(), grad_p.clone()), 3);
    let grad_s = B::float_mul_scalar(B::float_mul(p, B::float_sub(grad_p, along)), scale.into());
    let grad_q = unfolded::<B>(B::float_matmul(grad_s.clone(), k), heads);
    (grad_q, B::float_matmul(B::float_swap_dims(grad_s, 2, 3), q), grad_v)
}

#[derive(Debug)]
struct AttentionBackward;

/// What the gradients are computed from.
#[derive(Debug, Clone)]
struct AttentionState<B: Backend> {
    /// Queries, keys, values.
    inputs: [NodeId; 3],
    ranges: IntTensor<B>,
    scale: f32,
}

impl<B: AttentionOps> Backward<B, 3> for AttentionBackward {
    type State = AttentionState<B>;

    fn backward(self, ops: Ops<Self::State, 3>, grads: &mut Gradients, checkpointer: &mut Checkpointer) {
        let grad = grads.consume::<B>(&ops.node);
        let AttentionState { inputs, ranges, scale } = ops.state;
        let [q, k, v] = inputs.map(|id| checkpointer.retrieve_node_output(id));
        let (q, k, v) = B::ranged_attention_backward(q, k, v, ranges, grad, scale);
        for (node, grad) in ops.parents.into_iter().zip([q, k, v]) {
            if let Some(node) = node {
                grads.register::<B>(node.id, grad);
            }
        }
    }
}

impl<B: AttentionOps, C: CheckpointStrategy> AttentionOps for Autodiff<B, C> {
    fn ranged_attention(
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        v: FloatTensor<Self>,
        ranges: IntTensor<Self>,
        scale: f32,
    ) -> FloatTensor<Self> {
        match AttentionBackward.prepare::<C>([q.node(), k.node(), v.node()]).compute_bound().stateful() {
            OpsKind::Tracked(mut prep) => {
                let inputs = [prep.checkpoint(&q), prep.checkpoint(&k), prep.checkpoint(&v)];
                let (q, k, v) = (q.into_primitive(), k.into_primitive(), v.into_primitive());
                let out = B::ranged_attention(q, k, v, ranges.clone(), scale);
                prep.finish(AttentionState { inputs, ranges, scale }, out)
            }
            OpsKind::UnTracked(prep) => {
                let (q, k, v) = (q.into_primitive(), k.into_primitive(), v.into_primitive());
                prep.finish(B::ranged_attention(q, k, v, ranges, scale))
            }
        }
    }
}

/// A tensor of four dimensions whose last is contiguous, as it lies in memory.
struct Heads {
    tensor: FlexTensor,
    dims: [usize; 4],
    strides: [usize; 3],
}

impl Heads {
    fn of(tensor: FlexTensor) -> Self {
        let ready = {
            let strides = tensor.layout().strides();
            strides[3] == 1 && strides.iter().all(|stride| *stride >= 0)
        };
        let tensor = if ready { tensor } else { tensor.to_contiguous() };
        let strides: Vec<usize> = tensor.layout().strides().iter().map(|stride| stride.unsigned_abs()).collect();
        Self { dims: tensor.layout().shape().dims(), strides: [strides[0], strides[1], strides[2]], tensor }
    }

    /// Values from an index of the first three dimensions on.
    fn from(&self, [a, b, c]: [usize; 3]) -> &[f32] {
        let offset = a * self.strides[0] + b * self.strides[1] + c * self.strides[2];
        &self.tensor.storage::<f32>()[self.tensor.layout().start_offset() + offset..]
    }
}

/// Inputs of an attention.
struct Problem {
    q: Heads,
    k: Heads,
    v: Heads,
    ranges: Vec<[usize; 2]>,
    /// Whether each row has ranges of its own.
    by_row: bool,
    groups: usize,
    scale: f32,
}

/// Queries that are computed together: some of one head, or the only one of each head that reads the same keys.
#[derive(Clone, Copy)]
struct Block {
    row: usize,
    kv_head: usize,
    head: usize,
    query: usize,
    count: usize,
    /// Values between two of them.
    stride: usize,
    /// Keys that any of them sees.
    first: usize,
    last: usize,
}

impl Block {
    fn keys(&self) -> usize {
        self.last - self.first
    }
}

impl Problem {
    fn new(q: FlexTensor, k: FlexTensor, v: FlexTensor, ranges: FlexTensor, scale: f32) -> Self {
        let by_row = ranges.layout().shape()[0] > 1;
        let ranges = ranges.to_contiguous();
        let values = ranges.as_slice::<i32>().expect("the wrapper makes ranges of i32");
        let (q, k, v) = (Heads::of(q), Heads::of(k), Heads::of(v));
        let keys = k.dims[2];
        let end = |key: i32| usize::try_from(key).unwrap_or(0).min(keys);
        let ranges = values.chunks(2).map(|r| [end(r[0]), end(r[1])]).collect();
        Self { groups: q.dims[2] / k.dims[1], q, k, v, ranges, by_row, scale }
    }

    /// Whether one query a head is computed together with those of the heads that read the same keys.
    fn single(&self) -> bool {
        self.q.dims[1] == 1
    }

    fn range(&self, row: usize, query: usize) -> [usize; 2] {
        self.ranges[if self.by_row { row * self.q.dims[1] + query } else { query }]
    }

    fn block(&self, row: usize, head: usize, query: usize) -> Block {
        let queries = self.q.dims[1];
        let (count, stride) = if self.single() {
            (self.groups, self.q.strides[2])
        } else {
            (BLOCK.min(queries - query), self.q.strides[1])
        };
        let seen = if self.single() { 1 } else { count };
        let ranges = (query..query + seen).map(|i| self.range(row, i)).filter(|r| r[0] < r[1]);
        let [first, last] = ranges.fold([usize::MAX, 0], |a, r| [a[0].min(r[0]), a[1].max(r[1])]);
        let (first, last) = if first < last { (first, last) } else { (0, 0) };
        Block { row, kv_head: head / self.groups, head, query, count, stride, first, last }
    }

    fn queries(&self, block: &Block) -> View<'_, f32> {
        let values = self.q.from([block.row, block.query, block.head]);
        View::new(values, [block.count, self.q.dims[3]], [block.stride, 1])
    }

    fn rows<'a>(&self, heads: &'a Heads, block: &Block) -> View<'a, f32> {
        View::new(
            heads.from([block.row, block.kv_head, block.first]),
            [block.keys(), heads.dims[3]],
            [heads.strides[2], 1],
        )
    }

    /// Exponentials of the scores of a block, `[keys, count]`, and the reciprocal of their sum for each query.
    fn softmax(&self, block: &Block, scores: &mut Vec<f32>) -> [f32; BLOCK] {
        scores.resize(block.keys() * block.count, 0.0);
        multiply_here(self.rows(&self.k, block), self.queries(block).transposed(), 1.0, scores, block.count, false);
        let mut ranges = [[0u32; BLOCK]; 2];
        let [firsts, lasts] = &mut ranges;
        for (i, (start, end)) in firsts.iter_mut().zip(lasts).enumerate().take(block.count) {
            let [first, last] = self.range(block.row, if self.single() { 0 } else { block.query + i });
            *start = first.saturating_sub(block.first) as u32;
            *end = last.saturating_sub(block.first) as u32;
        }
        let mut sums = [0f32; BLOCK];
        vectorized!(softmax_columns(scores, block.count, &ranges, self.scale, &mut sums));
        sums.map(|sum| if sum > 0.0 { 1.0 / sum } else { 0.0 })
    }

    /// Output of some queries of a row, `[queries, heads, head_dim]`.
    fn output(&self, row: usize, query: usize, out: &mut [f32]) {
        let [_, _, heads, dim] = self.q.dims;
        let step = if self.single() { self.groups } else { 1 };
        let mut scores = Vec::new();
        for head in (0..heads).step_by(step) {
            let block = self.block(row, head, query);
            let scale = self.softmax(&block, &mut scores);
            let apart = if self.single() { dim } else { heads * dim };
            let out = &mut out[head * dim..];
            let weights = View::rows(&scores, [block.keys(), block.count]).transposed();
            multiply_here(weights, self.rows(&self.v, &block), 1.0, out, apart, false);
            for (out, scale) in out.chunks_mut(apart).zip(scale).take(block.count) {
                out[..dim].iter_mut().for_each(|value| *value *= scale);
            }
        }
    }

    /// Gradients of the queries, keys and values of one key-value head of a row.
    fn gradients(&self, row: usize, kv_head: usize, grad: &Heads, out: [&mut [f32]; 3]) {
        let ([_, queries, _, dim], [grad_q, grad_k, grad_v]) = (self.q.dims, out);
        let (mut p, mut grad_s) = (Vec::new(), Vec::new());
        for group in 0..self.groups {
            let head = kv_head * self.groups + group;
            for query in (0..queries).step_by(BLOCK) {
                // one head at a time: its rows of the gradient lie apart
                let block = Block {
                    count: BLOCK.min(queries - query),
                    stride: self.q.strides[1],
                    ..self.block(row, head, query)
                };
                if block.keys() == 0 {
                    continue;
                }
                let scale = self.softmax(&block, &mut p);
                let count = block.count;
                let grad = View::new(grad.from([row, query, head]), [count, dim], [grad.strides[1], 1]);
                grad_s.resize(p.len(), 0.0);
                multiply_here(self.rows(&self.v, &block), grad.transposed(), 1.0, &mut grad_s, count, false);
                vectorized!(backward_columns(&mut p, &mut grad_s, count, &scale, self.scale));
                let seen = block.first * dim..block.last * dim;
                let (p, grad_s) = (View::rows(&p, [block.keys(), count]), View::rows(&grad_s, [block.keys(), count]));
                multiply_here(p, grad, 1.0, &mut grad_v[seen.clone()], dim, true);
                multiply_here(grad_s, self.queries(&block), 1.0, &mut grad_k[seen], dim, true);
                let grad_q = &mut grad_q[(group * queries + query) * dim..];
                multiply_here(grad_s.transposed(), self.rows(&self.k, &block), 1.0, grad_q, dim, false);
            }
        }
    }
}

/// Scores to exponentials, `[keys, count]`: 0 outside the ranges; adds each query's sum to `sums`.
#[inline(always)]
fn softmax_columns<const FMA: bool>(
    scores: &mut [f32],
    count: usize,
    ranges: &[[u32; BLOCK]; 2],
    scale: f32,
    sums: &mut [f32; BLOCK],
) {
    let [first, last] = ranges;
    let mut largest = [MASKED; BLOCK];
    for (key, scores) in scores.chunks(count).enumerate() {
        let key = key as u32;
        for i in 0..scores.len() {
            let seen = (key >= first[i]) & (key < last[i]);
            let score = if seen { scores[i] } else { MASKED };
            largest[i] = if score > largest[i] { score } else { largest[i] };
        }
    }
    for (key, scores) in scores.chunks_mut(count).enumerate() {
        let key = key as u32;
        for i in 0..scores.len() {
            let seen = (key >= first[i]) & (key < last[i]);
            let value = flex::exp::<FMA>((scores[i] - largest[i]) * scale);
            let value = if seen { value } else { 0.0 };
            scores[i] = value;
            sums[i] += value;
        }
    }
}

/// Exponentials and gradients of probabilities, `[keys, count]`, to probabilities and gradients of scores.
#[inline(always)]
fn backward_columns<const FMA: bool>(p: &mut [f32], grad: &mut [f32], count: usize, normal: &[f32; BLOCK], scale: f32) {
    let mut along = [0f32; BLOCK];
    for (p, grad) in p.chunks_mut(count).zip(grad.chunks(count)) {
        for i in 0..p.len() {
            p[i] *= normal[i];
            along[i] = flex::mul_add::<FMA>(p[i], grad[i], along[i]);
        }
    }
    for (p, grad) in p.chunks(count).zip(grad.chunks_mut(count)) {
        for i in 0..grad.len() {
            grad[i] = p[i] * (grad[i] - along[i]) * scale;
        }
    }
}

impl AttentionOps for Flex {
    fn ranged_attention(q: FlexTensor, k: FlexTensor, v: FlexTensor, ranges: FlexTensor, scale: f32) -> FlexTensor {
        if !flex::applies(&[&q, &k, &v]) {
            return forward::<Self>(q, k, v, ranges, scale);
        }
        let problem = Problem::new(q, k, v, ranges, scale);
        let [rows, queries, heads, dim] = problem.q.dims;
        let mut out = vec![0f32; rows * queries * heads * dim];
        let width = (heads * dim).max(1);
        out.par_chunks_mut((queries * width).max(1)).enumerate().for_each(|(row, out)| {
            out.par_chunks_mut(BLOCK * width)
                .enumerate()
                .for_each(|(block, out)| problem.output(row, block * BLOCK, out));
        });
        flex::tensor(out, Shape::new([rows, queries, heads, dim]))
    }

    fn ranged_attention_backward(
        q: FlexTensor,
        k: FlexTensor,
        v: FlexTensor,
        ranges: FlexTensor,
        grad: FlexTensor,
        scale: f32,
    ) -> (FlexTensor, FlexTensor, FlexTensor) {
        if !flex::applies(&[&q, &k, &v, &grad]) {
            return backward::<Self>(q, k, v, ranges, grad, scale);
        }
        let (problem, grad) = (Problem::new(q, k, v, ranges, scale), Heads::of(grad));
        let ([rows, queries, heads, dim], [_, kv_heads, keys, _]) = (problem.q.dims, problem.k.dims);
        let mut grad_q = vec![0f32; rows * heads * queries * dim];
        let (mut grad_k, mut grad_v) =
            (vec![0f32; rows * kv_heads * keys * dim], vec![0f32; rows * kv_heads * keys * dim]);
        let whole = (keys * dim).max(1);
        grad_q
            .par_chunks_mut((problem.groups * queries * dim).max(1))
            .zip(grad_k.par_chunks_mut(whole))
            .zip(grad_v.par_chunks_mut(whole))
            .enumerate()
            .for_each(|(task, ((q, k), v))| problem.gradients(task / kv_heads, task % kv_heads, &grad, [q, k, v]));
        let grad_q = flex::tensor(grad_q, Shape::new([rows, heads, queries, dim])).transpose(1, 2);
        let shape = Shape::new([rows, kv_heads, keys, dim]);
        (grad_q, flex::tensor(grad_k, shape.clone()), flex::tensor(grad_v, shape))
    }
}

#[cfg(test)]
pub(super) mod tests {
    use burn::tensor::{Device, TensorData};

    use super::{
        super::tests::{device, difference, values},
        *,
    };

    /// Rows, queries, heads, key-value heads, keys, width of a head.
    pub(in crate::kernel) type Dims = [usize; 6];

    /// Output and gradients of queries, keys and values; `swapped` keys and values are views of `[rows, keys, ..]`.
    fn run(
        op: impl Fn([Tensor<4>; 3], f64) -> Tensor<4>,
        device: Device,
        dims: Dims,
        swapped: bool,
        expanded: bool,
    ) -> [Tensor<4>; 4] {
        let [rows, queries, heads, kv_heads, keys, dim] = dims;
        let device = device.autodiff();
        let q = values([rows, queries, heads, dim], 0, &device).require_grad();
        let leaf = |key: u64| {
            let shape = if swapped { [rows, keys, kv_heads, dim] } else { [rows, kv_heads, keys, dim] };
            values(shape, key, &device).require_grad()
        };
        let (k, v) = (leaf(1), leaf(2));
        let turn = |t: &Tensor<4>| if swapped { t.clone().swap_dims(1, 2) } else { t.clone() };
        let out = op([q.clone(), turn(&k), turn(&v)], 0.3);
        let loss = if expanded { out.clone() } else { out.clone() * values([rows, queries, heads, dim], 3, &device) };
        let mut grads = loss.sum().backward();
        let mut grad = |t: Tensor<4>| t.grad_remove(&mut grads).expect("tracked");
        [out.without_autodiff(), grad(q), grad(k), grad(v)]
    }

    /// Burn's operations under autodiff, on the CPU.
    fn composed([q, k, v]: [Tensor<4>; 3], ranges: &[[i32; 2]], scale: f64) -> Tensor<4> {
        let ([rows, queries, heads, dim], [_, kv_heads, keys, _]) = (q.dims(), k.dims());
        let repeat = |t: Tensor<4>| {
            let t: Tensor<5> = t.unsqueeze_dim(2);
            t.repeat_dim(2, heads / kv_heads).reshape([rows, heads, keys, dim])
        };
        let bias: Vec<f32> = ranges
            .iter()
            .flat_map(|r| (0..keys as i32).map(|key| if key >= r[0] && key < r[1] { 0.0 } else { MASKED }))
            .collect();
        let bias =
            Tensor::<4>::from_data(TensorData::new(bias, [ranges.len() / queries, 1, queries, keys]), &q.device());
        let scores = q.swap_dims(1, 2).matmul(repeat(k).swap_dims(2, 3)).mul_scalar(scale) + bias;
        burn::tensor::activation::softmax(scores, 3).matmul(repeat(v)).swap_dims(1, 2)
    }

    fn tensor(ranges: &[[i32; 2]], queries: usize) -> Tensor<3, Int> {
        let data = TensorData::new(ranges.as_flattened().to_vec(), [ranges.len() / queries, queries, 2]);
        Tensor::from_data(data, (&device(), burn::tensor::DType::I32))
    }

    pub(in crate::kernel) fn check(dims: Dims, ranges: &[[i32; 2]]) {
        for (swapped, expanded) in [(false, false), (true, false), (false, true)] {
            let seen = tensor(ranges, dims[1]);
            let found =
                run(|[q, k, v], scale| attention(q, k, v, seen.clone(), scale), device(), dims, swapped, expanded);
            let cpu = Device::flex();
            let expected = run(|inputs, scale| composed(inputs, ranges, scale), cpu, dims, swapped, expanded);
            for (found, expected) in found.into_iter().zip(expected) {
                let off = difference(found, expected);
                assert!(off < 1e-5, "{dims:?} {off}");
            }
        }
    }

    #[test]
    fn causal_windowed_packed_and_padded_rows_equal_the_composed_form() {
        let causal: Vec<[i32; 2]> = (0..70).map(|i| [0, i + 1]).collect();
        check([2, 70, 4, 2, 70, 8], &causal);
        check([1, 70, 2, 2, 70, 20], &causal.iter().map(|r| [(r[1] - 9).max(0), r[1]]).collect::<Vec<_>>());
        // three rows packed into one, beside one that is padded on the left
        let packed = causal.iter().map(|r| {
            [
                if r[1] <= 30 {
                    0
                } else if r[1] <= 33 {
                    30
                } else {
                    33
                },
                r[1],
            ]
        });
        let padded = causal.iter().map(|r| [11.min(r[1] - 1), r[1].max(12)]);
        check([2, 70, 4, 1, 70, 16], &packed.chain(padded).collect::<Vec<_>>());
        // every query sees the real keys of its row
        check([2, 5, 3, 3, 9, 7], &[[[0, 9]; 5], [[0, 4]; 5]].concat());
        // one query a row, as in generation
        check([3, 1, 6, 2, 40, 16], &[[0, 40], [3, 40], [39, 40]]);
    }

    #[test]
    fn the_default_of_other_backends_equals_the_composed_form() {
        let (dims, ranges): (Dims, Vec<[i32; 2]>) = ([2, 6, 4, 2, 9, 8], (0..6).map(|i| [i / 3, i + 2]).collect());
        let device = Device::flex();
        let q = values::<4>([2, 6, 4, 8], 0, &device);
        let (k, v, g) =
            (values([2, 2, 9, 8], 1, &device), values([2, 2, 9, 8], 2, &device), values([2, 6, 4, 8], 3, &device));
        let expected = run(|inputs, scale| composed(inputs, &ranges, scale), Device::flex(), dims, false, false);
        let flex = |t: Tensor<4>| FlexTensor::from_data(t.into_data());
        let seen = || FlexTensor::from_data(tensor(&ranges, 6).into_data());
        let back = |t: FlexTensor| Tensor::<4>::from_data(flex_data(t), &device);
        let out = forward::<Flex>(flex(q.clone()), flex(k.clone()), flex(v.clone()), seen(), 0.3);
        let (dq, dk, dv) = backward::<Flex>(flex(q), flex(k), flex(v), seen(), flex(g), 0.3);
        for (found, expected) in [out, dq, dk, dv].into_iter().zip(expected) {
            assert!(difference(back(found), expected) < 1e-5);
        }
    }

    fn flex_data(t: FlexTensor) -> TensorData {
        let t = t.to_contiguous();
        let dims: [usize; 4] = t.layout().shape().dims();
        TensorData::new(flex::slice(&t).to_vec(), dims)
    }

    #[test]
    fn a_query_without_keys_is_finite_and_moves_nothing() {
        let found = run(
            |[q, k, v], scale| attention(q, k, v, tensor(&[[0, 0], [0, 2]], 2), scale),
            device(),
            [1, 2, 2, 1, 2, 16],
            false,
            false,
        );
        let values = |t: &Tensor<4>| t.clone().into_data().try_to_vec::<f32>().unwrap();
        assert!(found.iter().all(|t| values(t).iter().all(|x| x.is_finite())));
        assert!(values(&found[1])[..32].iter().all(|x| *x == 0.0));
        // a whole block of them, as padding on the left makes
        let ranges: Vec<[i32; 2]> = (0..2 * BLOCK as i32).map(|i| if i < 70 { [0, 0] } else { [70, i + 1] }).collect();
        let seen = tensor(&ranges, 2 * BLOCK);
        let found = run(
            |[q, k, v], scale| attention(q, k, v, seen.clone(), scale),
            device(),
            [1, 2 * BLOCK, 2, 1, 2 * BLOCK, 16],
            false,
            false,
        );
        assert!(found.iter().all(|t| values(t).iter().all(|x| x.is_finite())));
        assert!(values(&found[0])[..70 * 32].iter().all(|x| *x == 0.0));
    }
}
