//! Squaring, cropping and normalising.

use super::Rgb8;

/// Pads to a square of the longer side.
///
/// The image starts `(longer - shorter) / 2` from the edge, rounded down, or with `high` one pixel farther where that
/// still fits. A square image is returned unchanged.
#[must_use]
pub fn to_square(image: &Rgb8, color: [u8; 3], high: bool) -> Rgb8 {
    let (w, h) = (image.width, image.height);
    if w == h {
        return image.clone();
    }
    let side = w.max(h);
    let gap = side - w.min(h);
    let offset = (gap / 2 + usize::from(high)).min(gap);
    let (left, top) = if w > h { (0, offset) } else { (offset, 0) };
    let mut out = Rgb8::filled(side, side, color);
    for (y, line) in image.data.chunks_exact(w * 3).enumerate() {
        let start = ((top + y) * side + left) * 3;
        out.data[start..start + w * 3].copy_from_slice(line);
    }
    out
}

/// Size after the shorter side has become `side`, the longer one truncated: `int(side * long / short)`.
#[must_use]
pub fn shortest_edge(width: usize, height: usize, side: usize) -> (usize, usize) {
    if width <= height { (side, side * height / width) } else { (side * width / height, side) }
}

/// The middle `side` x `side` pixels; what lies outside the image is black.
#[must_use]
pub fn center_crop(image: &Rgb8, side: usize) -> Rgb8 {
    if image.width == side && image.height == side {
        return image.clone();
    }
    let mut out = Rgb8::filled(side, side, [0; 3]);
    let (left, into_x) = overlap(image.width, side);
    let (top, into_y) = overlap(image.height, side);
    let (columns, rows) = (image.width.min(side), image.height.min(side));
    for y in 0..rows {
        let from = ((top + y) * image.width + left) * 3;
        let to = ((into_y + y) * side + into_x) * 3;
        out.data[to..to + columns * 3].copy_from_slice(&image.data[from..from + columns * 3]);
    }
    out
}

/// Start in the source and in the target when `size` is cut, or centred with zeros, to `side`.
fn overlap(size: usize, side: usize) -> (usize, usize) {
    if size >= side { ((size - side) / 2, 0) } else { (0, (side - size).div_ceil(2)) }
}

/// Scales to 0..1 and normalises with `mean` and `std`.
///
/// The product with `factor` is taken in double precision and the rest in single, the order that the original has.
///
/// # Shapes
/// `[height, width, 3]` -> `[3, height, width]`
#[must_use]
pub fn normalize(image: &Rgb8, factor: f64, mean: [f32; 3], std: [f32; 3]) -> Vec<f32> {
    let pixels = image.data.as_chunks::<3>().0;
    let mut out = Vec::with_capacity(3 * pixels.len());
    for channel in 0..3 {
        let table: [f32; 256] = std::array::from_fn(|v| ((v as f64 * factor) as f32 - mean[channel]) / std[channel]);
        // Nothing is set to zero first; what is left is bound by writing the result.
        out.extend(pixels.iter().map(|p| table[usize::from(p[channel])]));
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn padding_is_even_or_one_pixel_off() {
        let image = Rgb8::filled(4, 1, [9; 3]);
        let rows = |high| {
            let out = to_square(&image, [1, 2, 3], high);
            (0..4).filter(|y| out.data[y * 12] == 9).collect::<Vec<_>>()
        };
        assert_eq!((rows(false), rows(true)), (vec![1], vec![2]));
        let high = to_square(&Rgb8::filled(2, 3, [9; 3]), [1, 2, 3], true);
        assert_eq!(high.data[..6], [1, 2, 3, 9, 9, 9]);
    }

    #[test]
    fn crops_floor_their_offset() {
        let data = (0..5).flat_map(|v| [v; 3]).collect();
        let image = Rgb8 { width: 5, height: 1, data };
        let cropped = center_crop(&image, 2);
        assert_eq!(cropped.data, [0, 0, 0, 0, 0, 0, 1, 1, 1, 2, 2, 2]);
        assert_eq!(shortest_edge(75, 40, 56), (105, 56));
        assert_eq!(shortest_edge(40, 75, 56), (56, 105));
    }

    #[test]
    fn normalising_separates_the_channels() {
        let image = Rgb8 { width: 2, height: 1, data: vec![0, 51, 255, 255, 0, 0] };
        let out = normalize(&image, 1.0 / 255.0, [0.0, 0.0, 0.5], [1.0, 0.5, 0.5]);
        assert_eq!(out, [0.0, 1.0, 0.4, 0.0, 1.0, -1.0]);
    }

    #[test]
    fn every_sample_is_normalised_in_the_same_order() {
        let data: Vec<u8> = (0..21 * 37 * 3).map(|i| (i * 7 % 256) as u8).collect();
        let image = Rgb8 { width: 37, height: 21, data };
        let (factor, mean, std) =
            (1.0 / 255.0, [0.481_454_66, 0.457_827_5, 0.408_210_73], [0.268_629_5, 0.3, 0.275_777_1]);
        let out = normalize(&image, factor, mean, std);
        for (i, pixel) in image.data.chunks_exact(3).enumerate() {
            for c in 0..3 {
                let expected = ((f64::from(pixel[c]) * factor) as f32 - mean[c]) / std[c];
                assert_eq!(out[c * 21 * 37 + i].to_bits(), expected.to_bits(), "pixel {i}, channel {c}");
            }
        }
    }
}
