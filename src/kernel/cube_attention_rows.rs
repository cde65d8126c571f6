//! The passes of attention over blocks of rows; `cube_attention.rs` says how they fit together and starts them.

use burn_cubecl::cubecl::{self, prelude::*};

use super::{attention::MASKED, cube::lanes, cube_attention::Tile};

/// Where rows of a tensor lie: `groups` of them one after the other at a distance of `inner`, then the next at `outer`.
#[derive(CubeType, Clone, Copy)]
struct Rows {
    base: usize,
    outer: usize,
    inner: usize,
    #[cube(comptime)]
    groups: usize,
}

#[cube]
impl Rows {
    fn at(&self, row: usize) -> usize {
        self.base + (row / self.groups) * self.outer + (row % self.groups) * self.inner
    }
}

/// Queries of the heads that share a key-value head.
#[cube]
fn queries_of<F: Float, N: Size>(
    q: &Tensor<Vector<F, N>>,
    row: usize,
    kv_head: usize,
    #[comptime] groups: usize,
) -> Rows {
    let head = q.stride(2) / N::value();
    Rows {
        base: row * (q.stride(0) / N::value()) + kv_head * groups * head,
        outer: q.stride(1) / N::value(),
        inner: head,
        groups,
    }
}

/// Keys or values of a key-value head.
#[cube]
fn keys_of<F: Float, N: Size>(k: &Tensor<Vector<F, N>>, row: usize, kv_head: usize) -> Rows {
    Rows {
        base: row * (k.stride(0) / N::value()) + kv_head * (k.stride(1) / N::value()),
        outer: k.stride(2) / N::value(),
        inner: 0usize.runtime(),
        groups: 1usize,
    }
}

/// Copies `count` rows from `first` on; zeros behind them, as far as the tile's `height`.
#[cube]
fn load<F: Float, N: Size>(
    from: &Tensor<Vector<F, N>>,
    rows: &Rows,
    to: &mut Shared<[Vector<f32, N>]>,
    first: usize,
    count: usize,
    #[comptime] height: usize,
    #[comptime] dim: usize,
    #[comptime] tile: Tile,
) {
    let mut i = UNIT_POS as usize;
    while i < comptime!(height * dim) {
        let (row, d) = (i / dim, i % dim);
        let mut value = Vector::<f32, N>::zeroed();
        if row < count {
            value = Vector::cast_from(from[rows.at(first + row) + d]);
        }
        to[row * comptime!(dim + 1) + d] = value;
        i += comptime!(tile.tall * tile.wide);
    }
}

/// First key and key past the last of `count` folded queries from `first` on; no key for those behind.
#[cube]
fn load_ranges(
    ranges: &[i32],
    to: &mut Shared<[u32]>,
    start: usize,
    first: usize,
    count: usize,
    keys: usize,
    #[comptime] height: usize,
    #[comptime] groups: usize,
) {
    let unit = UNIT_POS as usize;
    if unit < height {
        let mut begin = keys as u32;
        let mut end = 0u32;
        if unit < count {
            let at = (start + (first + unit) / groups) * 2;
            let (low, high) = (ranges[at], ranges[at + 1]);
            let low = select(low < 0, 0i32, low) as u32;
            let high = select(high < 0, 0i32, high) as u32;
            let high = select(high > keys as u32, keys as u32, high);
            if low < high {
                begin = low;
                end = high;
            }
        }
        to[2 * unit] = begin;
        to[2 * unit + 1] = end;
    }
}

/// Keys that any row of a tile sees.
#[cube]
fn union(ranges: &Shared<[u32]>, keys: usize, #[comptime] height: usize) -> (u32, u32) {
    let mut begin = keys as u32;
    let mut end = 0u32;
    for row in 0..height {
        let (low, high) = (ranges[2 * row], ranges[2 * row + 1]);
        begin = select(low < begin, low, begin);
        end = select(high > end, high, end);
    }
    (begin, end)
}

/// Scalar products of a unit's own rows with its share of the streamed rows.
#[cube]
fn products<N: Size>(
    own: &Shared<[Vector<f32, N>]>,
    stream: &Shared<[Vector<f32, N>]>,
    out: &mut Array<f32>,
    #[comptime] dim: usize,
    #[comptime] tile: Tile,
) {
    let (tall, wide) = comptime!((tile.rows / tile.tall, tile.cols / tile.wide));
    let (ty, tx) = (UNIT_POS as usize / tile.wide, UNIT_POS as usize % tile.wide);
    let mut sums = Array::<Vector<f32, N>>::new(comptime!(tall * wide));
    #[unroll]
    for i in 0..comptime!(tall * wide) {
        sums[i] = Vector::zeroed();
    }
    for d in 0..dim {
        let mut other = Array::<Vector<f32, N>>::new(wide);
        #[unroll]
        for j in 0..wide {
            other[j] = stream[(tx + j * tile.wide) * comptime!(dim + 1) + d];
        }
        #[unroll]
        for i in 0..tall {
            let value = own[(ty + i * tile.tall) * comptime!(dim + 1) + d];
            #[unroll]
            for j in 0..wide {
                sums[i * wide + j] += value * other[j];
            }
        }
    }
    #[unroll]
    for i in 0..comptime!(tall * wide) {
        out[i] = lanes::<N>(sums[i]);
    }
}

/// Adds the streamed rows, weighted, to a unit's part of its own rows.
#[cube]
fn accumulate<N: Size>(
    weights: &Shared<[f32]>,
    stream: &Shared<[Vector<f32, N>]>,
    out: &mut Array<Vector<f32, N>>,
    #[comptime] dim: usize,
    #[comptime] tile: Tile,
) {
    let (tall, part) = comptime!((tile.rows / tile.tall, dim.div_ceil(tile.wide)));
    let (ty, tx) = (UNIT_POS as usize / tile.wide, UNIT_POS as usize % tile.wide);
    for row in 0..comptime!(tile.cols) {
        let mut values = Array::<Vector<f32, N>>::new(part);
        #[unroll]
        for c in 0..part {
            values[c] = stream[row * comptime!(dim + 1) + tx + c * tile.wide];
        }
        #[unroll]
        for i in 0..tall {
            let weight = Vector::<f32, N>::new(weights[(ty + i * tile.tall) * comptime!(tile.cols + 1) + row]);
            #[unroll]
            for c in 0..part {
                out[i * part + c] += weight * values[c];
            }
        }
    }
}

/// Shared memory for `rows` rows of `dim` vectors. Rows lie one vector further apart than they are long, so that units
/// that read neighbouring rows read different banks; units beyond the last vector of the last row read what lies behind.
#[cube]
fn rows_in_shared<N: Size>(
    #[comptime] rows: usize,
    #[comptime] dim: usize,
    #[comptime] tile: Tile,
) -> Shared<[Vector<f32, N>]> {
    Shared::<[Vector<f32, N>]>::new_slice(comptime!(rows * (dim + 1) + tile.wide))
}

/// Writes a unit's part of `count` rows.
#[cube]
fn store<F: Float, N: Size>(
    from: &Array<Vector<f32, N>>,
    to: &mut Tensor<Vector<F, N>>,
    rows: &Rows,
    first: usize,
    count: usize,
    #[comptime] dim: usize,
    #[comptime] tile: Tile,
) {
    let (tall, part) = comptime!((tile.rows / tile.tall, dim.div_ceil(tile.wide)));
    let (ty, tx) = (UNIT_POS as usize / tile.wide, UNIT_POS as usize % tile.wide);
    #[unroll]
    for i in 0..tall {
        let row = ty + i * tile.tall;
        #[unroll]
        for c in 0..part {
            let d = tx + c * tile.wide;
            if row < count && d < dim {
                to[rows.at(first + row) + d] = Vector::cast_from(from[i * part + c]);
            }
        }
    }
}

/// Zeros for a unit's part of its rows.
#[cube]
fn zeros<N: Size>(#[comptime] dim: usize, #[comptime] tile: Tile) -> Array<Vector<f32, N>> {
    let size = comptime!(tile.rows / tile.tall * dim.div_ceil(tile.wide));
    let mut out = Array::<Vector<f32, N>>::new(size);
    #[unroll]
    for i in 0..size {
        out[i] = Vector::zeroed();
    }
    out
}

/// Where a cube is: row of the batch, key-value head, first of its own rows; the batch's row is past the last for cubes
/// that have nothing to do.
#[cube]
fn place(kv_heads: usize, own: usize, #[comptime] tile: Tile) -> (usize, usize, usize) {
    let blocks = own.div_ceil(tile.rows);
    let block = CUBE_POS % blocks;
    let head = CUBE_POS / blocks;
    (head / kv_heads, head % kv_heads, block * tile.rows)
}

/// Attention of a block of folded queries: their outputs, in parts, and the logarithm of the sum of the exponentials of
/// each unit's rows. A query without keys has zeros.
#[cube]
fn online<F: Float, N: Size>(
    q: &Tensor<Vector<F, N>>,
    k: &Tensor<Vector<F, N>>,
    v: &Tensor<Vector<F, N>>,
    ranges: &[i32],
    by_row: u32,
    scale: f32,
    row: usize,
    kv_head: usize,
    first: usize,
    count: usize,
    out: &mut Array<Vector<f32, N>>,
    logarithms: &mut Array<f32>,
    partial: &mut Shared<[f32]>,
    #[comptime] groups: usize,
    #[comptime] dim: usize,
    #[comptime] tile: Tile,
) {
    let (tall, wide, part) = comptime!((tile.rows / tile.tall, tile.cols / tile.wide, dim.div_ceil(tile.wide)));
    let (ty, tx) = (UNIT_POS as usize / tile.wide, UNIT_POS as usize % tile.wide);
    let keys = k.shape(2);
    let mut own = rows_in_shared::<N>(tile.rows, dim, tile);
    let mut stream = rows_in_shared::<N>(tile.cols, dim, tile);
    let mut weights = Shared::<[f32]>::new_slice(comptime!(tile.rows * (tile.cols + 1)));
    let mut spans = Shared::<[u32]>::new_slice(comptime!(2 * tile.rows));
    let start = row * by_row as usize * q.shape(1);
    load_ranges(ranges, &mut spans, start, first, count, keys, tile.rows, groups);
    load::<F, N>(q, &queries_of::<F, N>(q, row, kv_head, groups), &mut own, first, count, tile.rows, dim, tile);
    sync_cube();
    let (begin, end) = union(&spans, keys, tile.rows);
    let (key_rows, value_rows) = (keys_of::<F, N>(k, row, kv_head), keys_of::<F, N>(v, row, kv_head));
    let mut largest = Array::<f32>::new(tall);
    let mut totals = Array::<f32>::new(tall);
    #[unroll]
    for i in 0..tall {
        largest[i] = f32::new(MASKED);
        totals[i] = 0.0f32;
    }
    let mut scores = Array::<f32>::new(comptime!(tall * wide));
    let mut base = begin;
    while base < end {
        let seen = (end - base) as usize;
        let seen = select(seen > tile.cols, tile.cols.runtime(), seen);
        load::<F, N>(k, &key_rows, &mut stream, base as usize, seen, tile.cols, dim, tile);
        sync_cube();
        products::<N>(&own, &stream, &mut scores, dim, tile);
        #[unroll]
        for i in 0..tall {
            let row = ty + i * tile.tall;
            let mut most = f32::new(MASKED);
            #[unroll]
            for j in 0..wide {
                let key = base + (tx + j * tile.wide) as u32;
                let inside = (key >= spans[2 * row]) & (key < spans[2 * row + 1]);
                let score = select(inside, scores[i * wide + j] * scale, f32::new(MASKED));
                scores[i * wide + j] = score;
                most = most.max(score);
            }
            partial[row * tile.wide + tx] = most;
        }
        sync_cube();
        load::<F, N>(v, &value_rows, &mut stream, base as usize, seen, tile.cols, dim, tile);
        #[unroll]
        for i in 0..tall {
            let row = ty + i * tile.tall;
            let mut most = largest[i];
            for x in 0..comptime!(tile.wide) {
                most = most.max(partial[row * tile.wide + x]);
            }
            let shrink = (largest[i] - most).exp();
            let mut total = totals[i] * shrink;
            #[unroll]
            for j in 0..wide {
                let key = base + (tx + j * tile.wide) as u32;
                let inside = (key >= spans[2 * row]) & (key < spans[2 * row + 1]);
                let weight = select(inside, (scores[i * wide + j] - most).exp(), 0.0f32);
                weights[row * comptime!(tile.cols + 1) + tx + j * tile.wide] = weight;
                total += weight;
            }
            largest[i] = most;
            totals[i] = total;
            #[unroll]
            for c in 0..part {
                out[i * part + c] *= Vector::new(shrink);
            }
        }
        sync_cube();
        accumulate::<N>(&weights, &stream, out, dim, tile);
        sync_cube();
        base += tile.cols as u32;
    }
    #[unroll]
    for i in 0..tall {
        partial[(ty + i * tile.tall) * tile.wide + tx] = totals[i];
    }
    sync_cube();
    #[unroll]
    for i in 0..tall {
        let mut total = 0.0f32;
        for x in 0..comptime!(tile.wide) {
            total += partial[(ty + i * tile.tall) * tile.wide + x];
        }
        let some = total > 0.0f32;
        let divisor = select(some, total, 1.0f32);
        logarithms[i] = select(some, largest[i] + divisor.ln(), 0.0f32);
        let factor = select(some, 1.0f32 / divisor, 0.0f32);
        #[unroll]
        for c in 0..part {
            out[i * part + c] *= Vector::new(factor);
        }
    }
}

/// Output of a block of folded queries.
#[cube(launch)]
pub(super) fn attention_rows<F: Float, N: Size>(
    q: &Tensor<Vector<F, N>>,
    k: &Tensor<Vector<F, N>>,
    v: &Tensor<Vector<F, N>>,
    ranges: &[i32],
    out: &mut Tensor<Vector<F, N>>,
    by_row: u32,
    scale: f32,
    #[comptime] groups: usize,
    #[comptime] dim: usize,
    #[comptime] tile: Tile,
    #[define(F)] _dtype: ElemType,
) {
    let folded = q.shape(1) * groups;
    let (row, kv_head, first) = place(k.shape(1), folded, tile);
    if row >= q.shape(0) {
        terminate!();
    }
    let count = folded - first;
    let mut values = zeros::<N>(dim, tile);
    let mut logarithms = Array::<f32>::new(comptime!(tile.rows / tile.tall));
    let mut partial = Shared::<[f32]>::new_slice(comptime!(tile.rows * tile.wide));
    online::<F, N>(
        q,
        k,
        v,
        ranges,
        by_row,
        scale,
        row,
        kv_head,
        first,
        count,
        &mut values,
        &mut logarithms,
        &mut partial,
        groups,
        dim,
        tile,
    );
    let rows = queries_of::<F, N>(&*out, row, kv_head, groups);
    store::<F, N>(&values, out, &rows, first, count, dim, tile);
}

/// Of each folded query, the logarithm of the sum of its exponentials and the product of its output with the output's
/// gradient: `[rows, kv_heads, groups * queries, 2]`.
#[cube(launch)]
pub(super) fn statistics_rows<F: Float, N: Size>(
    q: &Tensor<Vector<F, N>>,
    k: &Tensor<Vector<F, N>>,
    v: &Tensor<Vector<F, N>>,
    ranges: &[i32],
    grad: &Tensor<Vector<F, N>>,
    statistics: &mut [f32],
    by_row: u32,
    scale: f32,
    #[comptime] groups: usize,
    #[comptime] dim: usize,
    #[comptime] tile: Tile,
    #[define(F)] _dtype: ElemType,
) {
    let folded = q.shape(1) * groups;
    let (row, kv_head, first) = place(k.shape(1), folded, tile);
    if row >= q.shape(0) {
        terminate!();
    }
    let count = folded - first;
    let (tall, part) = comptime!((tile.rows / tile.tall, dim.div_ceil(tile.wide)));
    let (ty, tx) = (UNIT_POS as usize / tile.wide, UNIT_POS as usize % tile.wide);
    let mut values = zeros::<N>(dim, tile);
    let mut logarithms = Array::<f32>::new(tall);
    let mut partial = Shared::<[f32]>::new_slice(comptime!(tile.rows * tile.wide));
    online::<F, N>(
        q,
        k,
        v,
        ranges,
        by_row,
        scale,
        row,
        kv_head,
        first,
        count,
        &mut values,
        &mut logarithms,
        &mut partial,
        groups,
        dim,
        tile,
    );
    let rows = queries_of::<F, N>(grad, row, kv_head, groups);
    sync_cube();
    #[unroll]
    for i in 0..tall {
        let own = ty + i * tile.tall;
        let mut along = Vector::<f32, N>::zeroed();
        #[unroll]
        for c in 0..part {
            let d = tx + c * tile.wide;
            if own < count && d < dim {
                along += values[i * part + c] * Vector::cast_from(grad[rows.at(first + own) + d]);
            }
        }
        partial[own * tile.wide + tx] = lanes::<N>(along);
    }
    sync_cube();
    #[unroll]
    for i in 0..tall {
        let own = ty + i * tile.tall;
        if tx == 0 && own < count {
            let mut along = 0.0f32;
            for x in 0..comptime!(tile.wide) {
                along += partial[own * tile.wide + x];
            }
            let at = ((row * k.shape(1) + kv_head) * folded + first + own) * 2;
            statistics[at] = logarithms[i];
            statistics[at + 1] = along;
        }
    }
}

/// Gradient of a block of folded queries.
#[cube(launch)]
pub(super) fn query_gradient_rows<F: Float, N: Size>(
    q: &Tensor<Vector<F, N>>,
    k: &Tensor<Vector<F, N>>,
    v: &Tensor<Vector<F, N>>,
    ranges: &[i32],
    grad: &Tensor<Vector<F, N>>,
    statistics: &[f32],
    out: &mut Tensor<Vector<F, N>>,
    by_row: u32,
    scale: f32,
    #[comptime] groups: usize,
    #[comptime] dim: usize,
    #[comptime] tile: Tile,
    #[define(F)] _dtype: ElemType,
) {
    let folded = q.shape(1) * groups;
    let (row, kv_head, first) = place(k.shape(1), folded, tile);
    if row >= q.shape(0) {
        terminate!();
    }
    let count = folded - first;
    let (tall, wide) = comptime!((tile.rows / tile.tall, tile.cols / tile.wide));
    let (ty, tx) = (UNIT_POS as usize / tile.wide, UNIT_POS as usize % tile.wide);
    let keys = k.shape(2);
    let mut own = rows_in_shared::<N>(tile.rows, dim, tile);
    let mut own_grad = rows_in_shared::<N>(tile.rows, dim, tile);
    let mut stream = rows_in_shared::<N>(tile.cols, dim, tile);
    let mut weights = Shared::<[f32]>::new_slice(comptime!(tile.rows * (tile.cols + 1)));
    let mut spans = Shared::<[u32]>::new_slice(comptime!(2 * tile.rows));
    let start = row * by_row as usize * q.shape(1);
    load_ranges(ranges, &mut spans, start, first, count, keys, tile.rows, groups);
    load::<F, N>(q, &queries_of::<F, N>(q, row, kv_head, groups), &mut own, first, count, tile.rows, dim, tile);
    load::<F, N>(
        grad,
        &queries_of::<F, N>(grad, row, kv_head, groups),
        &mut own_grad,
        first,
        count,
        tile.rows,
        dim,
        tile,
    );
    let mut logarithms = Array::<f32>::new(tall);
    let mut along = Array::<f32>::new(tall);
    #[unroll]
    for i in 0..tall {
        let at = first + ty + i * tile.tall;
        let at = select(at < folded, at, 0usize.runtime());
        let at = ((row * k.shape(1) + kv_head) * folded + at) * 2;
        logarithms[i] = statistics[at];
        along[i] = statistics[at + 1];
    }
    sync_cube();
    let (begin, end) = union(&spans, keys, tile.rows);
    let (key_rows, value_rows) = (keys_of::<F, N>(k, row, kv_head), keys_of::<F, N>(v, row, kv_head));
    let mut values = zeros::<N>(dim, tile);
    let mut scores = Array::<f32>::new(comptime!(tall * wide));
    let mut slopes = Array::<f32>::new(comptime!(tall * wide));
    let mut base = begin;
    while base < end {
        let seen = (end - base) as usize;
        let seen = select(seen > tile.cols, tile.cols.runtime(), seen);
        load::<F, N>(v, &value_rows, &mut stream, base as usize, seen, tile.cols, dim, tile);
        sync_cube();
        products::<N>(&own_grad, &stream, &mut slopes, dim, tile);
        sync_cube();
        load::<F, N>(k, &key_rows, &mut stream, base as usize, seen, tile.cols, dim, tile);
        sync_cube();
        products::<N>(&own, &stream, &mut scores, dim, tile);
        #[unroll]
        for i in 0..tall {
            let row = ty + i * tile.tall;
            #[unroll]
            for j in 0..wide {
                let key = base + (tx + j * tile.wide) as u32;
                let inside = (key >= spans[2 * row]) & (key < spans[2 * row + 1]);
                let p = select(inside, (scores[i * wide + j] * scale - logarithms[i]).exp(), 0.0f32);
                weights[row * comptime!(tile.cols + 1) + tx + j * tile.wide] =
                    p * (slopes[i * wide + j] - along[i]) * scale;
            }
        }
        sync_cube();
        accumulate::<N>(&weights, &stream, &mut values, dim, tile);
        sync_cube();
        base += tile.cols as u32;
    }
    let rows = queries_of::<F, N>(&*out, row, kv_head, groups);
    store::<F, N>(&values, out, &rows, first, count, dim, tile);
}

/// Gradients of a block of keys and of their values, over the queries of all heads that read them.
#[cube(launch)]
pub(super) fn key_gradient_rows<F: Float, N: Size>(
    q: &Tensor<Vector<F, N>>,
    k: &Tensor<Vector<F, N>>,
    v: &Tensor<Vector<F, N>>,
    ranges: &[i32],
    grad: &Tensor<Vector<F, N>>,
    statistics: &[f32],
    key_out: &mut Tensor<Vector<F, N>>,
    value_out: &mut Tensor<Vector<F, N>>,
    by_row: u32,
    scale: f32,
    #[comptime] groups: usize,
    #[comptime] dim: usize,
    #[comptime] tile: Tile,
    #[define(F)] _dtype: ElemType,
) {
    let (folded, keys) = (q.shape(1) * groups, k.shape(2));
    let (row, kv_head, first) = place(k.shape(1), keys, tile);
    if row >= q.shape(0) {
        terminate!();
    }
    let count = keys - first;
    let (tall, wide) = comptime!((tile.rows / tile.tall, tile.cols / tile.wide));
    let (ty, tx) = (UNIT_POS as usize / tile.wide, UNIT_POS as usize % tile.wide);
    let mut own_keys = rows_in_shared::<N>(tile.rows, dim, tile);
    let mut own_values = rows_in_shared::<N>(tile.rows, dim, tile);
    let mut stream = rows_in_shared::<N>(tile.cols, dim, tile);
    let mut weights = Shared::<[f32]>::new_slice(comptime!(tile.rows * (tile.cols + 1)));
    let mut spans = Shared::<[u32]>::new_slice(comptime!(2 * tile.cols));
    let mut known = Shared::<[f32]>::new_slice(comptime!(2 * tile.cols));
    load::<F, N>(k, &keys_of::<F, N>(k, row, kv_head), &mut own_keys, first, count, tile.rows, dim, tile);
    load::<F, N>(v, &keys_of::<F, N>(v, row, kv_head), &mut own_values, first, count, tile.rows, dim, tile);
    let (query_rows, grad_rows) =
        (queries_of::<F, N>(q, row, kv_head, groups), queries_of::<F, N>(grad, row, kv_head, groups));
    let start = row * by_row as usize * q.shape(1);
    let from = (row * k.shape(1) + kv_head) * folded;
    let mut key_values = zeros::<N>(dim, tile);
    let mut value_values = zeros::<N>(dim, tile);
    let mut scores = Array::<f32>::new(comptime!(tall * wide));
    let mut slopes = Array::<f32>::new(comptime!(tall * wide));
    let mut base = 0usize.runtime();
    while base < folded {
        let left = folded - base;
        sync_cube();
        load_ranges(ranges, &mut spans, start, base, left, keys, tile.cols, groups);
        let unit = UNIT_POS as usize;
        if unit < tile.cols && unit < left {
            known[2 * unit] = statistics[(from + base + unit) * 2];
            known[2 * unit + 1] = statistics[(from + base + unit) * 2 + 1];
        }
        sync_cube();
        let (begin, end) = union(&spans, keys, tile.cols);
        if end as usize > first && (begin as usize) < first + tile.rows {
            load::<F, N>(q, &query_rows, &mut stream, base, left, tile.cols, dim, tile);
            sync_cube();
            products::<N>(&own_keys, &stream, &mut scores, dim, tile);
            #[unroll]
            for i in 0..tall {
                let own = ty + i * tile.tall;
                let key = (first + own) as u32;
                #[unroll]
                for j in 0..wide {
                    let query = tx + j * tile.wide;
                    let inside = (key >= spans[2 * query]) & (key < spans[2 * query + 1]);
                    let p = select(inside, (scores[i * wide + j] * scale - known[2 * query]).exp(), 0.0f32);
                    scores[i * wide + j] = p;
                    weights[own * comptime!(tile.cols + 1) + query] = p;
                }
            }
            sync_cube();
            load::<F, N>(grad, &grad_rows, &mut stream, base, left, tile.cols, dim, tile);
            sync_cube();
            products::<N>(&own_values, &stream, &mut slopes, dim, tile);
            accumulate::<N>(&weights, &stream, &mut value_values, dim, tile);
            sync_cube();
            load::<F, N>(q, &query_rows, &mut stream, base, left, tile.cols, dim, tile);
            #[unroll]
            for i in 0..tall {
                let own = ty + i * tile.tall;
                #[unroll]
                for j in 0..wide {
                    let query = tx + j * tile.wide;
                    let slope = scores[i * wide + j] * (slopes[i * wide + j] - known[2 * query + 1]) * scale;
                    weights[own * comptime!(tile.cols + 1) + query] =
                        select(scores[i * wide + j] > 0.0f32, slope, 0.0f32);
                }
            }
            sync_cube();
            accumulate::<N>(&weights, &stream, &mut key_values, dim, tile);
        }
        base += tile.cols;
    }
    let (key_rows, value_rows) = (keys_of::<F, N>(&*key_out, row, kv_head), keys_of::<F, N>(&*value_out, row, kv_head));
    store::<F, N>(&key_values, key_out, &key_rows, first, count, dim, tile);
    store::<F, N>(&value_values, value_out, &value_rows, first, count, dim, tile);
}
