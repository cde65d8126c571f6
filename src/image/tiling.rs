//! InternVL's dynamic tiling: an image becomes a grid of square tiles whose shape suits it best, and a thumbnail.
//!
//! Reference: `dynamic_preprocess` of InternVL 1.5.

use super::{
    Rgb8,
    resize::{Filter, resize},
};

/// How images are cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Tiling {
    /// Side of a tile, pixels.
    pub image_size: usize,
    /// Fewest tiles of a grid.
    pub min_num: usize,
    /// Most tiles of a grid.
    pub max_num: usize,
    /// Whether the whole image follows as one more tile when the grid has several.
    pub use_thumbnail: bool,
}

/// A rectangle in pixels; right and bottom lie outside.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TileBox {
    /// First column.
    pub left: usize,
    /// First row.
    pub top: usize,
    /// Column behind the last.
    pub right: usize,
    /// Row behind the last.
    pub bottom: usize,
}

/// Number of columns and rows of a grid.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Grid {
    /// Columns.
    pub columns: usize,
    /// Rows.
    pub rows: usize,
}

impl Grid {
    /// Tiles of the grid.
    #[must_use]
    pub fn tiles(self) -> usize {
        self.columns * self.rows
    }

    /// Where the tiles lie in the resized image, row by row.
    #[must_use]
    pub fn boxes(self, side: usize) -> Vec<TileBox> {
        let tile = |i: usize| {
            let (left, top) = (i % self.columns * side, i / self.columns * side);
            TileBox { left, top, right: left + side, bottom: top + side }
        };
        (0..self.tiles()).map(tile).collect()
    }
}

impl Tiling {
    /// The grid whose shape is closest to that of an image; of equally close ones the larger, if the image has more than
    /// half of its pixels.
    ///
    /// # Panics
    /// If `min_num` is 0 or above `max_num`: whoever reads a config checks that.
    #[must_use]
    pub fn grid(&self, width: usize, height: usize) -> Grid {
        let wanted = width as f64 / height as f64;
        let tile = (self.image_size * self.image_size) as f64;
        let (mut best, mut distance) = (Grid { columns: 1, rows: 1 }, f64::INFINITY);
        for grid in self.candidates() {
            let found = (wanted - grid.columns as f64 / grid.rows as f64).abs();
            let closer = found < distance;
            if closer || (found == distance && (width * height) as f64 > 0.5 * tile * grid.tiles() as f64) {
                best = grid;
            }
            distance = distance.min(found);
        }
        best
    }

    /// All grids in the order in which the original tries them: by size, and within a size as Python's set yields them.
    ///
    /// # Panics
    /// As [`Tiling::grid`].
    #[must_use]
    pub fn candidates(&self) -> Vec<Grid> {
        assert!(1 <= self.min_num && self.min_num <= self.max_num, "the config was checked");
        let mut set = PythonSet::default();
        for n in self.min_num..=self.max_num {
            for columns in 1..=n {
                for rows in 1..=n {
                    if (self.min_num..=self.max_num).contains(&(columns * rows)) {
                        set.insert((columns as u64, rows as u64));
                    }
                }
            }
        }
        let pairs = set.table.into_iter().flatten().map(|((c, r), _)| Grid { columns: c as usize, rows: r as usize });
        let mut grids: Vec<Grid> = pairs.collect();
        grids.sort_by_key(|g| g.tiles());
        grids
    }

    /// Tiles that an image of this size becomes, thumbnail included.
    #[must_use]
    pub fn num_tiles(&self, width: usize, height: usize) -> usize {
        let tiles = self.grid(width, height).tiles();
        tiles + usize::from(self.use_thumbnail && tiles > 1)
    }

    /// Cuts an image: tiles row by row, then the thumbnail.
    #[must_use]
    pub fn tiles(&self, image: &Rgb8) -> Vec<Rgb8> {
        let grid = self.grid(image.width, image.height);
        let side = self.image_size;
        let whole = resize(image, grid.columns * side, grid.rows * side, Filter::Bicubic);
        let mut tiles: Vec<Rgb8> = grid.boxes(side).iter().map(|b| crop(&whole, b)).collect();
        if self.use_thumbnail && tiles.len() > 1 {
            tiles.push(resize(image, side, side, Filter::Bicubic));
        }
        tiles
    }
}

fn crop(image: &Rgb8, tile: &TileBox) -> Rgb8 {
    let mut data = Vec::with_capacity((tile.right - tile.left) * (tile.bottom - tile.top) * 3);
    for row in tile.top..tile.bottom {
        let start = (row * image.width + tile.left) * 3;
        data.extend_from_slice(&image.data[start..start + (tile.right - tile.left) * 3]);
    }
    Rgb8 { width: tile.right - tile.left, height: tile.bottom - tile.top, data }
}

type Pair = (u64, u64);

/// CPython's set of integer pairs, for its order of iteration: the original sorts a set by size only, and the order
/// within a size decides when all grids have one size. Holds from Python 3.8 on (tuple hash) with 64-bit words.
struct PythonSet {
    table: Vec<Option<(Pair, u64)>>,
    used: usize,
}

impl Default for PythonSet {
    fn default() -> Self {
        Self { table: vec![None; 8], used: 0 }
    }
}

impl PythonSet {
    const LINEAR_PROBES: usize = 9;

    fn insert(&mut self, pair: Pair) {
        let hash = tuple_hash(pair);
        let slot = self.slot(pair, hash);
        if self.table[slot].is_some() {
            return;
        }
        self.table[slot] = Some((pair, hash));
        self.used += 1;
        if self.used * 5 >= (self.table.len() - 1) * 3 {
            self.grow();
        }
    }

    /// Where the pair is, or would go.
    fn slot(&self, pair: Pair, hash: u64) -> usize {
        let mask = self.table.len() - 1;
        let (mut index, mut perturb) = (hash as usize & mask, hash);
        loop {
            let probes = if index + Self::LINEAR_PROBES <= mask { Self::LINEAR_PROBES } else { 0 };
            for slot in index..=index + probes {
                if self.table[slot].is_none_or(|(found, _)| found == pair) {
                    return slot;
                }
            }
            perturb >>= 5;
            index = index.wrapping_mul(5).wrapping_add(1).wrapping_add(perturb as usize) & mask;
        }
    }

    fn grow(&mut self) {
        let minimum = if self.used > 50_000 { self.used * 2 } else { self.used * 4 };
        let mut size = 8;
        while size <= minimum {
            size *= 2;
        }
        for (pair, hash) in std::mem::replace(&mut self.table, vec![None; size]).into_iter().flatten() {
            let slot = self.slot(pair, hash);
            self.table[slot] = Some((pair, hash));
        }
    }
}

/// CPython's hash of a tuple of two small integers: xxHash without its final mixing.
fn tuple_hash((a, b): Pair) -> u64 {
    const PRIME_1: u64 = 11_400_714_785_074_694_791;
    const PRIME_2: u64 = 14_029_467_366_897_019_727;
    const PRIME_5: u64 = 2_870_177_450_012_600_261;
    let hash = [a, b].into_iter().fold(PRIME_5, |hash, item| {
        hash.wrapping_add(item.wrapping_mul(PRIME_2)).rotate_left(31).wrapping_mul(PRIME_1)
    });
    match hash.wrapping_add(2 ^ (PRIME_5 ^ 3_527_539)) {
        u64::MAX => 1_546_275_796,
        hash => hash,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TILING: Tiling = Tiling { image_size: 4, min_num: 1, max_num: 12, use_thumbnail: true };

    #[test]
    fn the_grid_follows_the_shape_of_the_image() {
        let grid = |w, h| {
            let g = TILING.grid(w, h);
            (g.columns, g.rows)
        };
        assert_eq!(grid(40, 30), (4, 3));
        assert_eq!(grid(30, 40), (3, 4));
        assert_eq!(grid(1000, 1), (12, 1));
        assert_eq!(grid(2, 2), (1, 1), "a small image is not enlarged to a larger grid of the same shape");
        assert_eq!(grid(40, 40), (3, 3));
        assert_eq!(TILING.num_tiles(40, 30), 13);
        assert_eq!(TILING.num_tiles(2, 2), 1);
    }

    #[test]
    fn tiles_are_cut_row_by_row_and_the_thumbnail_is_last() {
        let mut image = Rgb8::filled(8, 4, [0, 0, 0]);
        for (i, pixel) in image.data.chunks_mut(3).enumerate() {
            pixel[0] = if i % 8 < 4 { 10 } else { 200 };
        }
        let tiles = TILING.tiles(&image);
        assert_eq!(tiles.len(), 3);
        assert!(tiles[0].data.chunks(3).all(|p| p[0] == 10) && tiles[1].data.chunks(3).all(|p| p[0] == 200));
        assert!(tiles.iter().all(|t| (t.width, t.height) == (4, 4)));
        let boxes = Grid { columns: 2, rows: 2 }.boxes(5);
        assert_eq!((boxes[1].left, boxes[1].top, boxes[2].left, boxes[2].bottom), (5, 0, 0, 10));
    }

    #[test]
    fn pairs_come_in_the_order_of_a_python_set() {
        // hash((1, 2)) and hash((3, 1)) of CPython 3.8 and later
        assert_eq!(tuple_hash((1, 2)) as i64, -3_550_055_125_485_641_917);
        assert_eq!(tuple_hash((3, 1)) as i64, 8_756_109_708_711_196_808);
        let order: Vec<_> = Tiling { min_num: 2, max_num: 2, ..TILING }.candidates();
        assert_eq!(order, [Grid { columns: 1, rows: 2 }, Grid { columns: 2, rows: 1 }]);
    }
}
