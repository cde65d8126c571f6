//! Grids, tiles and pixel values, bit for bit.

use std::{collections::BTreeMap, path::Path};

use medtune::image::{
    Rgb8, open,
    pad::{normalize, to_square},
    resize::{Filter, resize},
    tiling::Tiling,
};
use serde::Deserialize;
use sha2::{Digest, Sha256};

use super::files::{Tensors, json, root};
use crate::parity::fixture::Checks;

#[derive(Deserialize)]
struct GridTable {
    cases: Vec<GridCase>,
    target_ratio_order: BTreeMap<String, Vec<[usize; 2]>>,
}

#[derive(Deserialize)]
struct GridCase {
    width: usize,
    height: usize,
    min_num: usize,
    max_num: usize,
    use_thumbnail: bool,
    image_size: usize,
    grid: [usize; 2],
    resized: [usize; 2],
    boxes: Vec<[usize; 4]>,
    thumbnail: bool,
    num_tiles: usize,
}

#[derive(Deserialize)]
struct Tiles {
    image_size: usize,
    min_num: usize,
    max_num: usize,
    use_thumbnail: bool,
    mean: [f32; 3],
    std: [f32; 3],
    pad2square_fill: [u8; 3],
    images: BTreeMap<String, TiledImage>,
}

#[derive(Deserialize)]
struct TiledImage {
    width: usize,
    height: usize,
    rgb_sha256: String,
    num_tiles: usize,
    tiles_u8_sha256: String,
    num_tiles_448: usize,
    tiles448_u8_sha256: Vec<String>,
    single_resize_u8_sha256: String,
    pad2square_size: Option<[usize; 2]>,
}

pub(super) fn check(checks: &mut Checks) {
    let dir = root().join("golden/preprocess");
    check_grids(&json(&dir.join("grid_table.json")), checks);
    let tiles: Tiles = json(&dir.join("tiles.json"));
    let stored = Tensors::open(&dir.join("tiles_u8.safetensors"));
    let pixels = Tensors::open(&dir.join("pixel_values.safetensors"));
    for (name, expected) in &tiles.images {
        check_image(name, expected, &tiles, &stored, &pixels, checks);
    }
    check_decoded(&root().join("images_decoded"), checks);
}

fn check_grids(table: &GridTable, checks: &mut Checks) {
    for case in &table.cases {
        let what = format!("grid of {}x{}, {}..={}", case.width, case.height, case.min_num, case.max_num);
        let tiling = Tiling {
            image_size: case.image_size,
            min_num: case.min_num,
            max_num: case.max_num,
            use_thumbnail: case.use_thumbnail,
        };
        let grid = tiling.grid(case.width, case.height);
        checks.equal(&what, [grid.columns, grid.rows], case.grid);
        let boxes: Vec<[usize; 4]> =
            grid.boxes(case.image_size).iter().map(|b| [b.left, b.top, b.right, b.bottom]).collect();
        checks.equal(&format!("boxes, {what}"), boxes, case.boxes.clone());
        let resized = [grid.columns * case.image_size, grid.rows * case.image_size];
        checks.equal(&format!("size, {what}"), resized, case.resized);
        let tiles = tiling.num_tiles(case.width, case.height);
        checks.equal(&format!("tiles, {what}"), tiles, case.num_tiles);
        checks.equal(&format!("thumbnail, {what}"), tiles > grid.tiles(), case.thumbnail);
    }
    for (range, order) in &table.target_ratio_order {
        let (min, max) = range.split_once(',').unwrap();
        let (min_num, max_num) = (min.parse().unwrap(), max.parse().unwrap());
        let tiling = Tiling { image_size: 1, min_num, max_num, use_thumbnail: true };
        let found: Vec<[usize; 2]> = tiling.candidates().iter().map(|g| [g.columns, g.rows]).collect();
        checks.equal(&format!("order of the grids {range}"), found, order.clone());
    }
}

fn check_image(
    name: &str,
    expected: &TiledImage,
    all: &Tiles,
    stored: &Tensors,
    pixels: &Tensors,
    checks: &mut Checks,
) {
    let image = open(root().join("images").join(name)).unwrap();
    checks.equal(&format!("size of {name}"), (image.width, image.height), (expected.width, expected.height));
    checks.equal(&format!("pixels of {name}"), sha256([&image]), expected.rgb_sha256.clone());
    let tiling = |image_size| Tiling {
        image_size,
        min_num: all.min_num,
        max_num: all.max_num,
        use_thumbnail: all.use_thumbnail,
    };
    let tiles = tiling(all.image_size).tiles(&image);
    checks.equal(&format!("number of tiles of {name}"), tiles.len(), expected.num_tiles);
    checks.equal(&format!("tiles of {name}"), sha256(&tiles), expected.tiles_u8_sha256.clone());
    let key = format!("{name}.tiles_u8");
    if stored.has(&key) {
        checks.equal(&key, bytes(&tiles), stored.bytes(&key));
    }
    check_full_size(name, &tiling(448).tiles(&image), expected, stored, checks);

    let side = all.image_size;
    let single = resize(&image, side, side, Filter::Bicubic);
    checks.equal(&format!("{name} in one tile"), sha256([&single]), expected.single_resize_u8_sha256.clone());
    let key = format!("{name}.single_resize_u8");
    if stored.has(&key) {
        checks.equal(&key, single.data.clone(), stored.bytes(&key));
    }
    let normalized = |image: &Rgb8| normalize(image, 1.0 / 255.0, all.mean, all.std);
    let key = format!("{name}.pixel_values");
    if pixels.has(&key) {
        let count = pixels.shape(&key)[0];
        let found: Vec<f32> = tiles[..count].iter().flat_map(normalized).collect();
        checks.close(&key, &found, &pixels.f32(&key), 1e-6);
    }
    if let Some(size) = expected.pad2square_size {
        let padded = to_square(&image, all.pad2square_fill, false);
        checks.equal(&format!("padded size of {name}"), [padded.width, padded.height], size);
        let padded = resize(&padded, side, side, Filter::Bicubic);
        checks.equal(&format!("{name} padded"), padded.data.clone(), stored.bytes(&format!("{name}.pad2square_u8")));
        let key = format!("{name}.pad2square_pixel_values");
        checks.close(&key, &normalized(&padded), &pixels.f32(&key), 1e-6);
    }
}

fn check_full_size(name: &str, tiles: &[Rgb8], expected: &TiledImage, stored: &Tensors, checks: &mut Checks) {
    checks.equal(&format!("number of large tiles of {name}"), tiles.len(), expected.num_tiles_448);
    let hashes: Vec<String> = tiles.iter().map(|t| sha256([t])).collect();
    checks.equal(&format!("large tiles of {name}"), hashes, expected.tiles448_u8_sha256.clone());
    let key = format!("{name}.tiles448_u8_stride56");
    let mut found = Vec::new();
    for tile in tiles {
        for row in (28..tile.height).step_by(56) {
            for column in (28..tile.width).step_by(56) {
                found.extend_from_slice(&tile.data[(row * tile.width + column) * 3..][..3]);
            }
        }
    }
    checks.equal(&key, found, stored.bytes(&key));
}

fn check_decoded(dir: &Path, checks: &mut Checks) {
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        let jpeg = root().join("images").join(path.file_stem().unwrap()).with_extension("jpg");
        checks.equal(&format!("decoding of {}", jpeg.display()), open(&jpeg).unwrap(), open(&path).unwrap());
    }
}

fn bytes<'a>(images: impl IntoIterator<Item = &'a Rgb8>) -> Vec<u8> {
    images.into_iter().flat_map(|i| i.data.iter().copied()).collect()
}

fn sha256<'a>(images: impl IntoIterator<Item = &'a Rgb8>) -> String {
    Sha256::digest(bytes(images)).iter().map(|b| format!("{b:02x}")).collect()
}
