//! Matrix products in f32 where the second factor may be stored in bf16 or f16, for the Flex backend.
//!
//! Three reasons not to use Burn's own product there: it is compiled for 256-bit vectors, where processors with AVX-512
//! do twice the work; a factor of a half type would be converted as a whole at each call, where here it is converted
//! while it is packed; and a narrow product (a low-rank update) can be added to a result that is there already.
//!
//! The scheme is that of Goto and van de Geijn ("Anatomy of high-performance matrix multiplication", 2008): panels of
//! the second factor are packed once, tiles of the result stay in registers. Every element of a result is summed in
//! the order of the inner index, so neither the number of threads nor the shape of the blocks changes it.

#![expect(unsafe_code, reason = "vector instructions and disjoint tiles of one result; bounds are asserted by `View`")]

use std::{cell::Cell, sync::LazyLock};

use burn::{
    backend::flex::FlexTensor,
    tensor::{bf16, f16},
};
use rayon::prelude::*;

use super::flex::{self, LANES, vectorized};

/// Inner indices that a tile sums at one time: a panel of 32 columns of them is 32 KiB.
const DEPTH: usize = 256;

/// Values of the packed second factor at one time: 8 MiB.
const PACKED: usize = 1 << 21;

/// Rows up to which the second factor is not packed but read where it lies.
const FEW: usize = 16;

/// Multiplications below which one core is quicker than two.
const SMALL: usize = 1 << 19;

/// Tasks that a product is cut into, at least; more than cores, so that a core that is interrupted does not hold all.
const TASKS: usize = 16;

/// A stored number that becomes f32 without rounding.
pub(super) trait Element: Copy + Send + Sync + 'static {
    /// Whole storage of a tensor of this type.
    fn storage(tensor: &FlexTensor) -> &[Self];

    /// The same number.
    fn widen(self) -> f32;

    /// `values` where they are f32 already.
    fn plain(values: &[Self]) -> Option<&[f32]>;
}

impl Element for f32 {
    fn storage(tensor: &FlexTensor) -> &[Self] {
        tensor.storage()
    }

    #[inline(always)]
    fn widen(self) -> f32 {
        self
    }

    fn plain(values: &[Self]) -> Option<&[f32]> {
        Some(values)
    }
}

impl Element for bf16 {
    fn storage(tensor: &FlexTensor) -> &[Self] {
        tensor.storage()
    }

    #[inline(always)]
    fn widen(self) -> f32 {
        f32::from_bits(u32::from(self.to_bits()) << 16)
    }

    fn plain(_: &[Self]) -> Option<&[f32]> {
        None
    }
}

impl Element for f16 {
    fn storage(tensor: &FlexTensor) -> &[Self] {
        tensor.storage()
    }

    #[inline(always)]
    fn widen(self) -> f32 {
        self.to_f32()
    }

    fn plain(_: &[Self]) -> Option<&[f32]> {
        None
    }
}

/// A matrix somewhere in memory.
#[derive(Clone, Copy)]
pub(super) struct View<'a, T> {
    values: &'a [T],
    rows: usize,
    columns: usize,
    /// Values between two rows, and between two columns.
    strides: [usize; 2],
}

impl<'a, T: Copy> View<'a, T> {
    /// Element `(i, j)` is `values[i * strides[0] + j * strides[1]]`.
    pub(super) fn new(values: &'a [T], [rows, columns]: [usize; 2], strides: [usize; 2]) -> Self {
        let last = rows.saturating_sub(1) * strides[0] + columns.saturating_sub(1) * strides[1];
        assert!(rows == 0 || columns == 0 || last < values.len(), "a matrix lies within its storage");
        Self { values, rows, columns, strides }
    }

    /// Rows one behind the other.
    pub(super) fn rows(values: &'a [T], [rows, columns]: [usize; 2]) -> Self {
        Self::new(values, [rows, columns], [columns, 1])
    }

    /// Rows as columns.
    pub(super) fn transposed(self) -> Self {
        Self { rows: self.columns, columns: self.rows, strides: [self.strides[1], self.strides[0]], ..self }
    }
}

impl<'a, T: Element> View<'a, T> {
    /// A tensor of two dimensions, as it lies in memory; none if a stride is negative.
    pub(super) fn of(tensor: &'a FlexTensor) -> Option<Self> {
        let layout = tensor.layout();
        let strides = layout.strides();
        let strides = [usize::try_from(strides[0]).ok()?, usize::try_from(strides[1]).ok()?];
        Some(Self::new(&T::storage(tensor)[layout.start_offset()..], layout.shape().dims(), strides))
    }
}

/// `out = scale a b`, or `out += scale a b`; the rows of `out` are `row` values apart.
pub(super) fn multiply<T: Element>(
    a: View<'_, f32>,
    b: View<'_, T>,
    scale: f32,
    out: &mut [f32],
    row: usize,
    add: bool,
) {
    let parallel = a.rows * a.columns * b.columns > SMALL;
    Out::of(out, row, a.rows, b.columns).product(a, b, scale, add, parallel);
}

/// [`multiply`] on this core alone, for products inside a parallel loop.
pub(super) fn multiply_here<T: Element>(
    a: View<'_, f32>,
    b: View<'_, T>,
    scale: f32,
    out: &mut [f32],
    row: usize,
    add: bool,
) {
    Out::of(out, row, a.rows, b.columns).product(a, b, scale, add, false);
}

/// `scale a b` in new memory.
pub(super) fn multiplied<T: Element>(a: View<'_, f32>, b: View<'_, T>, scale: f32) -> Vec<f32> {
    let (rows, columns) = (a.rows, b.columns);
    let mut values = Vec::with_capacity(rows * columns);
    let parallel = rows * a.columns * columns > SMALL;
    Out { start: values.as_mut_ptr(), row: columns, rows, columns }.product(a, b, scale, false, parallel);
    // SAFETY: a product that is not added to anything writes every element.
    unsafe { values.set_len(rows * columns) };
    values
}

/// Where a result goes; the memory of a product that is not added to anything may be uninitialised.
#[derive(Clone, Copy)]
struct Out {
    start: *mut f32,
    /// Values between two rows.
    row: usize,
    rows: usize,
    columns: usize,
}

impl Out {
    fn of(out: &mut [f32], row: usize, rows: usize, columns: usize) -> Self {
        let last = if rows == 0 || columns == 0 { 0 } else { (rows - 1) * row + columns };
        assert!(last <= out.len() && (rows <= 1 || columns <= row), "a result lies within its storage");
        Self { start: out.as_mut_ptr(), row, rows, columns }
    }

    /// Puts `value` at a place, or adds it to what is there.
    fn put(self, i: usize, j: usize, value: f32, add: bool) {
        debug_assert!(i < self.rows && j < self.columns);
        // SAFETY: row and column are within the result, and what is added to was initialised.
        unsafe {
            let out = self.start.add(i * self.row + j);
            *out = if add { *out + value } else { value };
        }
    }

    fn product<T: Element>(self, a: View<'_, f32>, b: View<'_, T>, scale: f32, add: bool, parallel: bool) {
        let (m, k, n) = (a.rows, a.columns, b.columns);
        assert_eq!(k, b.rows, "inner sizes of a product");
        if k == 0 && !add {
            (0..m).flat_map(|i| (0..n).map(move |j| (i, j))).for_each(|(i, j)| self.put(i, j, 0.0, false));
        }
        if m == 0 || n == 0 || k == 0 {
            return;
        }
        if m <= FEW && b.strides[0] == 1 && a.strides[1] == 1 && k >= LANES {
            return self.dots(a, b, scale, add, parallel);
        }
        let isa = &*ISA;
        let width = if n <= isa.lanes { isa.lanes } else { 2 * isa.lanes };
        let bare = T::plain(b.values).filter(|_| m <= FEW && b.strides[1] == 1 && n.is_multiple_of(isa.lanes));
        let columns = if bare.is_some() { n } else { (PACKED / k / width).max(8) * width };
        let mut packed = BUFFER.take();
        for first in (0..n).step_by(columns) {
            let panels = Panels { k, width, first, count: columns.min(n - first) };
            let second = match bare {
                Some(values) => Second { start: values[first..].as_ptr(), bare: Some(b.strides[0]) },
                None => {
                    pack(b, &panels, &mut packed, parallel);
                    Second { start: packed.as_ptr(), bare: None }
                }
            };
            Job { isa, a, second, panels, scale, out: self, add }.run(parallel);
        }
        BUFFER.set(packed);
    }

    /// Product of few rows with a matrix whose columns lie one behind the other: each is read once.
    fn dots<T: Element>(self, a: View<'_, f32>, b: View<'_, T>, scale: f32, add: bool, parallel: bool) {
        let m = a.rows;
        // columns first, so that a task owns what it writes
        let mut turned = vec![0f32; m * b.columns];
        let height = (flex::CHUNK / a.columns).max(1);
        let fill = |(index, part): (usize, &mut [f32])| vectorized!(dot_columns(a, b, index * height, part));
        if parallel {
            turned.par_chunks_mut(height * m).enumerate().for_each(fill);
        } else {
            turned.chunks_mut(height * m).enumerate().for_each(fill);
        }
        for (j, column) in turned.chunks(m).enumerate() {
            for (i, value) in column.iter().enumerate() {
                self.put(i, j, scale * value, add);
            }
        }
    }
}

thread_local! {
    /// Packed panels of the last product of this thread, so that their memory is used again.
    static BUFFER: Cell<Vec<f32>> = const { Cell::new(Vec::new()) };
    /// Packed rows of the first factor.
    static ROWS: Cell<Vec<f32>> = const { Cell::new(Vec::new()) };
}

/// Columns `first..first + count` of the second factor in panels of `width`.
struct Panels {
    k: usize,
    width: usize,
    first: usize,
    count: usize,
}

impl Panels {
    fn number(&self) -> usize {
        self.count.div_ceil(self.width)
    }
}

/// Packs panels: block after block of [`DEPTH`] inner indices, panel after panel, row after row; missing columns are 0.
fn pack<T: Element>(b: View<'_, T>, panels: &Panels, packed: &mut Vec<f32>, parallel: bool) {
    let (width, whole) = (panels.width, panels.number() * panels.width);
    if packed.len() < panels.k * whole {
        packed.resize(panels.k * whole, 0.0);
    }
    for (block, region) in packed[..panels.k * whole].chunks_mut(DEPTH * whole).enumerate() {
        let (inner, depth) = (block * DEPTH, region.len() / whole);
        let fill = |(index, panel): (usize, &mut [f32])| {
            let first = panels.first + index * width;
            let columns = width.min(panels.first + panels.count - first);
            vectorized!(pack_panel(b, inner, first, columns, panel, width));
        };
        if parallel {
            region.par_chunks_mut(depth * width).enumerate().for_each(fill);
        } else {
            region.chunks_mut(depth * width).enumerate().for_each(fill);
        }
    }
}

#[inline(always)]
fn pack_panel<const FMA: bool>(
    b: View<'_, impl Element>,
    inner: usize,
    first: usize,
    columns: usize,
    panel: &mut [f32],
    width: usize,
) {
    let start = inner * b.strides[0] + first * b.strides[1];
    if b.strides[1] == 1 {
        for (index, out) in panel.chunks_mut(width).enumerate() {
            let values = &b.values[start + index * b.strides[0]..][..columns];
            for (out, value) in out.iter_mut().zip(values) {
                *out = value.widen();
            }
            out[columns..].fill(0.0);
        }
        return;
    }
    for (column, stride) in (0..columns).map(|column| (column, b.strides[1])) {
        let values = &b.values[start + column * stride..];
        for (index, out) in panel.chunks_mut(width).enumerate() {
            out[column] = values[index * b.strides[0]].widen();
        }
    }
    if columns < width {
        panel.chunks_mut(width).for_each(|out| out[columns..].fill(0.0));
    }
}

/// The second factor: packed panels, or rows that lie `bare` values apart.
#[derive(Clone, Copy)]
struct Second {
    start: *const f32,
    bare: Option<usize>,
}

/// A product of panels, cut into tasks that write disjoint parts of the result.
struct Job<'a> {
    isa: &'static Isa,
    a: View<'a, f32>,
    second: Second,
    panels: Panels,
    scale: f32,
    out: Out,
    add: bool,
}

// SAFETY: tasks read shared factors, and each writes its own rows and columns of `out`, which outlives the parallel loop.
unsafe impl Sync for Job<'_> {}

impl Job<'_> {
    fn run(&self, parallel: bool) {
        let slivers = self.a.rows.div_ceil(self.isa.rows);
        if !parallel {
            return self.block(0..slivers, 0..self.panels.number());
        }
        let tall = if slivers >= 256 { 8 } else { 4 };
        let blocks = slivers.div_ceil(tall);
        let wide = self.panels.number().div_ceil(TASKS.div_ceil(blocks));
        let across = self.panels.number().div_ceil(wide);
        (0..blocks * across).into_par_iter().for_each(|task| {
            let (block, part) = (task / across, task % across);
            let rows = block * tall..slivers.min((block + 1) * tall);
            self.block(rows, part * wide..self.panels.number().min((part + 1) * wide));
        });
    }

    /// Tiles of some slivers of rows and some panels.
    fn block(&self, slivers: std::ops::Range<usize>, panels: std::ops::Range<usize>) {
        let tall = self.isa.rows;
        let rows = slivers.start * tall..self.a.rows.min(slivers.end * tall);
        let strided = self.a.strides[1] == 1 && self.scale == 1.0;
        let mut copy = ROWS.take();
        for inner in (0..self.panels.k).step_by(DEPTH) {
            let depth = DEPTH.min(self.panels.k - inner);
            if !strided {
                pack_rows(self.a, rows.clone(), inner..inner + depth, tall, self.scale, &mut copy);
            }
            for panel in panels.clone() {
                for first in rows.clone().step_by(tall) {
                    let (a, a_row, a_step) = if strided {
                        (&self.a.values[first * self.a.strides[0] + inner..], self.a.strides[0], 1)
                    } else {
                        (&copy[(first - rows.start) * depth..], 1, tall)
                    };
                    let (b, b_step) = self.panel(panel, inner, depth);
                    let column = panel * self.panels.width;
                    let tile = Tile {
                        k: depth,
                        a: a.as_ptr(),
                        a_row,
                        a_step,
                        b,
                        b_step,
                        // SAFETY: the result has all rows and columns of the factors.
                        c: unsafe { self.out.start.add(first * self.out.row + self.panels.first + column) },
                        c_row: self.out.row,
                        add: self.add || inner > 0,
                    };
                    let (height, width) = (tall.min(rows.end - first), self.panels.count - column);
                    // SAFETY: the factors have `height` rows, `depth` inner indices and, packed, whole panels.
                    unsafe { self.isa.tile(&tile, height, width.min(self.panels.width)) };
                }
            }
        }
        ROWS.set(copy);
    }

    /// Start of a panel at an inner index, and the values between its rows.
    fn panel(&self, panel: usize, inner: usize, depth: usize) -> (*const f32, usize) {
        let Panels { width, .. } = self.panels;
        let (offset, step) = match self.second.bare {
            Some(stride) => (inner * stride + panel * width, stride),
            None => (inner * self.panels.number() * width + panel * depth * width, width),
        };
        // SAFETY: within the rows of the view, or within the packed panels.
        (unsafe { self.second.start.add(offset) }, step)
    }
}

/// Rows of the first factor in slivers of `tall`, inner index after inner index.
fn pack_rows(
    a: View<'_, f32>,
    rows: std::ops::Range<usize>,
    inner: std::ops::Range<usize>,
    tall: usize,
    scale: f32,
    copy: &mut Vec<f32>,
) {
    let depth = inner.len();
    copy.resize(rows.len().next_multiple_of(tall) * depth, 0.0);
    for (sliver, first) in copy.chunks_mut(tall * depth).zip(rows.clone().step_by(tall)) {
        let height = tall.min(rows.end - first);
        let start = first * a.strides[0] + inner.start * a.strides[1];
        if a.strides[0] == 1 {
            for (index, out) in sliver.chunks_mut(tall).enumerate() {
                let values = &a.values[start + index * a.strides[1]..][..height];
                for (out, value) in out.iter_mut().zip(values) {
                    *out = value * scale;
                }
            }
            continue;
        }
        for i in 0..height {
            let values = &a.values[start + i * a.strides[0]..];
            for (index, out) in sliver.chunks_mut(tall).enumerate() {
                out[i] = values[index * a.strides[1]] * scale;
            }
        }
    }
}

#[inline(always)]
fn dot_columns<const FMA: bool>(a: View<'_, f32>, b: View<'_, impl Element>, first: usize, out: &mut [f32]) {
    for (index, out) in out.chunks_mut(a.rows).enumerate() {
        let column = &b.values[(first + index) * b.strides[1]..][..a.columns];
        for (i, out) in out.iter_mut().enumerate() {
            *out = dot::<FMA>(column, &a.values[i * a.strides[0]..][..a.columns]);
        }
    }
}

/// `sum(a[i] * b[i])`.
#[inline(always)]
pub(super) fn dot<const FMA: bool>(a: &[impl Element], b: &[f32]) -> f32 {
    let mut lanes = [0f32; 2 * LANES];
    let whole = a.len() / (2 * LANES) * (2 * LANES);
    for (a, b) in a[..whole].chunks_exact(2 * LANES).zip(b[..whole].chunks_exact(2 * LANES)) {
        for (lane, (a, b)) in lanes.iter_mut().zip(a.iter().zip(b)) {
            *lane = flex::mul_add::<FMA>(a.widen(), *b, *lane);
        }
    }
    let rest: f32 = a[whole..].iter().zip(&b[whole..]).map(|(a, b)| a.widen() * b).sum();
    // halves, because a sum in order is never vectorised
    for half in [LANES, 8, 4, 2, 1] {
        for lane in 0..half {
            lanes[lane] += lanes[lane + half];
        }
    }
    lanes[0] + rest
}

/// One tile of a result: `c = a b` or `c += a b` over `k` inner indices.
struct Tile {
    k: usize,
    a: *const f32,
    a_row: usize,
    a_step: usize,
    b: *const f32,
    b_step: usize,
    c: *mut f32,
    c_row: usize,
    add: bool,
}

type TileFn = unsafe fn(&Tile);

/// What a processor offers.
struct Isa {
    /// Most rows of a tile.
    rows: usize,
    /// f32 in one vector; tiles are one or two vectors wide.
    lanes: usize,
    /// By rows less one, then vectors less one.
    tiles: &'static [[TileFn; 2]],
}

impl Isa {
    /// Computes `height` rows and `width` columns of a tile.
    ///
    /// # Safety
    /// The first factor has `height` rows, the second a whole number of vectors in each row, the result `height` rows
    /// of `width` columns.
    unsafe fn tile(&self, tile: &Tile, height: usize, width: usize) {
        let vectors = width.div_ceil(self.lanes);
        let run = self.tiles[height - 1][vectors - 1];
        if width.is_multiple_of(self.lanes) {
            // SAFETY: as the caller says.
            return unsafe { run(tile) };
        }
        let mut whole = [0f32; 12 * 32];
        let columns = vectors * self.lanes;
        let aside = Tile { c: whole.as_mut_ptr(), c_row: columns, add: false, ..*tile };
        // SAFETY: `whole` has room for the largest tile.
        unsafe { run(&aside) };
        for (i, values) in whole.chunks(columns).take(height).enumerate() {
            for (j, value) in values[..width].iter().enumerate() {
                // SAFETY: row and column are within the result.
                let out = unsafe { &mut *tile.c.add(i * tile.c_row + j) };
                *out = if tile.add { *out + value } else { *value };
            }
        }
    }
}

static ISA: LazyLock<Isa> = LazyLock::new(|| {
    #[cfg(target_arch = "x86_64")]
    {
        if std::arch::is_x86_feature_detected!("avx512f") {
            return Isa { rows: 12, lanes: 16, tiles: x86::AVX512 };
        }
        if std::arch::is_x86_feature_detected!("avx2") && std::arch::is_x86_feature_detected!("fma") {
            return Isa { rows: 6, lanes: 8, tiles: x86::AVX2 };
        }
    }
    Isa { rows: 6, lanes: 4, tiles: PORTABLE }
});

/// Pairs of tiles, one and two vectors wide, for each number of rows.
macro_rules! tiles {
    ($tile:ident: $($rows:literal)*) => { &[$([$tile::<$rows, 1>, $tile::<$rows, 2>]),*] };
}

static PORTABLE: &[[TileFn; 2]] = tiles!(portable: 1 2 3 4 5 6);

unsafe fn portable<const ROWS: usize, const VECTORS: usize>(tile: &Tile) {
    let mut sums = [[[0f32; 4]; VECTORS]; ROWS];
    // SAFETY: the caller gives whole vectors of both factors and of the result.
    unsafe {
        for p in 0..tile.k {
            for (i, sums) in sums.iter_mut().enumerate() {
                let a = *tile.a.add(i * tile.a_row + p * tile.a_step);
                for (j, sum) in sums.iter_mut().flatten().enumerate() {
                    *sum =
                        flex::mul_add::<{ cfg!(target_arch = "aarch64") }>(a, *tile.b.add(p * tile.b_step + j), *sum);
                }
            }
        }
        for (i, sums) in sums.iter().enumerate() {
            for (j, sum) in sums.iter().flatten().enumerate() {
                let out = &mut *tile.c.add(i * tile.c_row + j);
                *out = if tile.add { *out + sum } else { *sum };
            }
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    use super::{Tile, TileFn};

    pub(super) static AVX512: &[[TileFn; 2]] = tiles!(avx512: 1 2 3 4 5 6 7 8 9 10 11 12);
    pub(super) static AVX2: &[[TileFn; 2]] = tiles!(avx2: 1 2 3 4 5 6);

    macro_rules! tile {
        ($name:ident, $feature:literal, $lanes:literal, $zero:ident, $load:ident, $store:ident, $all:ident,
         $mul_add:ident, $add:ident) => {
            #[target_feature(enable = $feature)]
            unsafe fn $name<const ROWS: usize, const VECTORS: usize>(tile: &Tile) {
                let mut sums = [[$zero(); VECTORS]; ROWS];
                // SAFETY: the caller gives whole vectors of both factors and of the result.
                unsafe {
                    for p in 0..tile.k {
                        let mut b = [$zero(); VECTORS];
                        for (j, b) in b.iter_mut().enumerate() {
                            *b = $load(tile.b.add(p * tile.b_step + j * $lanes));
                        }
                        for (i, sums) in sums.iter_mut().enumerate() {
                            let a = $all(*tile.a.add(i * tile.a_row + p * tile.a_step));
                            for (sum, b) in sums.iter_mut().zip(b) {
                                *sum = $mul_add(a, b, *sum);
                            }
                        }
                    }
                    for (i, sums) in sums.iter().enumerate() {
                        for (j, sum) in sums.iter().enumerate() {
                            let c = tile.c.add(i * tile.c_row + j * $lanes);
                            $store(c, if tile.add { $add($load(c), *sum) } else { *sum });
                        }
                    }
                }
            }
        };
    }

    tile!(
        avx512,
        "avx512f",
        16,
        _mm512_setzero_ps,
        _mm512_loadu_ps,
        _mm512_storeu_ps,
        _mm512_set1_ps,
        _mm512_fmadd_ps,
        _mm512_add_ps
    );
    tile!(
        avx2,
        "avx2,fma",
        8,
        _mm256_setzero_ps,
        _mm256_loadu_ps,
        _mm256_storeu_ps,
        _mm256_set1_ps,
        _mm256_fmadd_ps,
        _mm256_add_ps
    );
}

#[cfg(test)]
mod tests {
    use rand::RngExt;

    use super::*;

    fn random(count: usize, key: u64) -> Vec<f32> {
        let mut rng = crate::random::stream(1, "gemm test", key);
        (0..count).map(|_| rng.random_range(-1.0..1.0)).collect()
    }

    fn naive(a: View<'_, f32>, b: View<'_, impl Element>, scale: f32, out: &mut [f32], row: usize, add: bool) {
        for (i, j) in (0..a.rows).flat_map(|i| (0..b.columns).map(move |j| (i, j))) {
            let at = |p: usize| {
                let b = b.values[p * b.strides[0] + j * b.strides[1]].widen();
                f64::from(a.values[i * a.strides[0] + p * a.strides[1]]) * f64::from(b)
            };
            let sum = scale * (0..a.columns).map(at).sum::<f64>() as f32;
            let out = &mut out[i * row + j];
            *out = if add { *out + sum } else { sum };
        }
    }

    fn check<T: Element>(narrow: fn(f32) -> T) {
        // few and many rows, inner sizes beyond one block, columns that end within a vector, several groups of panels
        for (m, k, n) in
            [(1, 40, 5), (3, 33, 64), (7, 600, 96), (13, 17, 16), (29, 300, 70), (100, 512, 33), (64, 16, 130)]
        {
            let (a, b) = (random(m * k, 1), random(k * n, 2).into_iter().map(narrow).collect::<Vec<_>>());
            let a_forms = [View::rows(&a, [m, k]), View::rows(&a, [k, m]).transposed()];
            let b_forms = [View::rows(&b, [k, n]), View::rows(&b, [n, k]).transposed()];
            for (a, b) in a_forms.into_iter().flat_map(|a| b_forms.map(|b| (a, b))) {
                for (scale, add) in [(1.0, false), (0.5, true)] {
                    let row = n + 3;
                    let mut found = random(m * row, 3);
                    let mut expected = found.clone();
                    multiply(a, b, scale, &mut found, row, add);
                    naive(a, b, scale, &mut expected, row, add);
                    let worst = found.iter().zip(&expected).map(|(x, y)| (x - y).abs()).fold(0.0, f32::max);
                    assert!(worst < 1e-5 * k as f32, "{m} {k} {n}: {worst}");
                }
            }
        }
    }

    #[test]
    fn products_equal_the_definition_for_every_type_and_layout() {
        check::<f32>(|x| x);
        check::<bf16>(bf16::from_f32);
        check::<f16>(f16::from_f32);
    }

    #[test]
    fn every_instruction_set_gives_the_same_tile() {
        let (a, b) = (random(12 * 40, 4), random(40 * 32, 5));
        let mut sets = vec![Isa { rows: 6, lanes: 4, tiles: PORTABLE }];
        #[cfg(target_arch = "x86_64")]
        {
            if std::arch::is_x86_feature_detected!("avx2") && std::arch::is_x86_feature_detected!("fma") {
                sets.push(Isa { rows: 6, lanes: 8, tiles: x86::AVX2 });
            }
            if std::arch::is_x86_feature_detected!("avx512f") {
                sets.push(Isa { rows: 12, lanes: 16, tiles: x86::AVX512 });
            }
        }
        for isa in sets {
            for (height, width) in [(isa.rows, 2 * isa.lanes), (1, isa.lanes), (isa.rows - 1, isa.lanes + 1)] {
                let mut found = vec![1f32; height * width];
                let mut expected = found.clone();
                let c = found.as_mut_ptr();
                let tile = Tile {
                    k: 40,
                    a: a.as_ptr(),
                    a_row: 40,
                    a_step: 1,
                    b: b.as_ptr(),
                    b_step: 32,
                    c,
                    c_row: width,
                    add: true,
                };
                // SAFETY: 12 rows of 40, 40 rows of 32, and `height` rows of `width`.
                unsafe { isa.tile(&tile, height, width) };
                let (a, b) = (View::rows(&a, [12, 40]), View::rows(&b, [40, 32]));
                let (a, b) = (View { rows: height, ..a }, View { columns: width, ..b });
                naive(a, b, 1.0, &mut expected, width, true);
                let worst = found.iter().zip(&expected).map(|(x, y)| (x - y).abs()).fold(0.0, f32::max);
                assert!(worst < 1e-4, "{} lanes, {height} x {width}: {worst}", isa.lanes);
            }
        }
    }

    #[test]
    fn the_number_of_threads_changes_nothing() {
        let (m, k, n) = (200, 700, 200);
        let (a, b) = (random(m * k, 6), random(k * n, 7));
        let run = |threads: usize| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            let mut out = vec![0f32; m * n];
            pool.install(|| multiply(View::rows(&a, [m, k]), View::rows(&b, [k, n]), 1.0, &mut out, n, false));
            out
        };
        assert_eq!(run(1), run(3));
        let mut here = vec![0f32; m * n];
        multiply_here(View::rows(&a, [m, k]), View::rows(&b, [k, n]), 1.0, &mut here, n, false);
        assert_eq!(run(1), here);
    }
}
