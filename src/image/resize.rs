//! Pillow's resampling, bit for bit: two passes, each stored as 8 bits, weights in 22-bit fixed point.

use rayon::prelude::*;

use super::Rgb8;

/// Interpolation kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Filter {
    /// Triangle; Pillow's `BILINEAR`.
    Bilinear,
    /// Cubic with a = -0.5; Pillow's `BICUBIC`.
    Bicubic,
    /// Sinc with three lobes; Pillow's `LANCZOS`.
    Lanczos,
}

impl Filter {
    /// By Pillow's `resample` number, which `preprocessor_config.json` uses.
    #[must_use]
    pub fn from_pillow(number: u64) -> Option<Self> {
        match number {
            1 => Some(Self::Lanczos),
            2 => Some(Self::Bilinear),
            3 => Some(Self::Bicubic),
            _ => None,
        }
    }

    fn support(self) -> f64 {
        match self {
            Self::Bilinear => 1.0,
            Self::Bicubic => 2.0,
            Self::Lanczos => 3.0,
        }
    }

    fn weight(self, x: f64) -> f64 {
        const A: f64 = -0.5;
        let x = x.abs();
        match self {
            Self::Bilinear if x < 1.0 => 1.0 - x,
            Self::Bicubic if x < 1.0 => ((A + 2.0) * x - (A + 3.0)) * x * x + 1.0,
            Self::Bicubic if x < 2.0 => (((x - 5.0) * x + 8.0) * x - 4.0) * A,
            Self::Lanczos if x < 3.0 => sinc(x) * sinc(x / 3.0),
            _ => 0.0,
        }
    }
}

fn sinc(x: f64) -> f64 {
    if x == 0.0 {
        return 1.0;
    }
    let x = x * std::f64::consts::PI;
    x.sin() / x
}

const FRACTION_BITS: u32 = 32 - 8 - 2;

/// For each output sample, the first input sample and the weights of it and its successors.
struct Windows {
    first: Vec<usize>,
    weights: Vec<i32>,
    /// Weights of output `i` are `weights[starts[i]..starts[i + 1]]`.
    starts: Vec<usize>,
}

impl Windows {
    fn new(from: usize, to: usize, filter: Filter) -> Self {
        let scale = from as f64 / to as f64;
        let stretch = scale.max(1.0);
        let support = filter.support() * stretch;
        let inverse = 1.0 / stretch;
        let mut windows = Self { first: Vec::with_capacity(to), weights: Vec::new(), starts: vec![0] };
        let mut weights = Vec::new();
        for i in 0..to {
            let center = (i as f64 + 0.5) * scale;
            // Truncation toward zero before clipping, as in C.
            let first = ((center - support + 0.5) as i64).max(0) as usize;
            let end = ((center + support + 0.5) as i64).min(from as i64) as usize;
            weights.clear();
            weights.extend((first..end).map(|x| filter.weight((x as f64 - center + 0.5) * inverse)));
            let sum: f64 = weights.iter().sum();
            windows.weights.extend(weights.iter().map(|w| fixed(if sum == 0.0 { *w } else { w / sum })));
            windows.first.push(first);
            windows.starts.push(windows.weights.len());
        }
        windows
    }

    fn get(&self, i: usize) -> (usize, &[i32]) {
        (self.first[i], &self.weights[self.starts[i]..self.starts[i + 1]])
    }
}

fn fixed(weight: f64) -> i32 {
    let scaled = weight * f64::from(1u32 << FRACTION_BITS);
    (scaled + if weight < 0.0 { -0.5 } else { 0.5 }) as i32
}

const HALF: i32 = 1 << (FRACTION_BITS - 1);

#[inline(always)]
fn clip(sum: i32) -> u8 {
    (sum >> FRACTION_BITS).clamp(0, 255) as u8
}

/// Resizes to `width` x `height`: across first, then down, as Pillow before 13 always does.
///
/// A pass whose size does not change is left out. Neither size may be zero.
#[must_use]
pub fn resize(image: &Rgb8, width: usize, height: usize, filter: Filter) -> Rgb8 {
    assert!(width > 0 && height > 0 && !image.data.is_empty(), "callers resize between sizes above zero");
    let across = if image.width == width { None } else { Some(horizontal(image, width, filter)) };
    let image = across.as_ref().unwrap_or(image);
    if image.height == height { image.clone() } else { vertical(image, height, filter) }
}

fn horizontal(image: &Rgb8, width: usize, filter: Filter) -> Rgb8 {
    let windows = Windows::new(image.width, width, filter);
    let mut out = Rgb8::filled(width, image.height, [0; 3]);
    out.data.par_chunks_exact_mut(width * 3).zip(image.data.par_chunks_exact(image.width * 3)).for_each(
        |(to, from)| {
            for (i, pixel) in to.chunks_exact_mut(3).enumerate() {
                let (first, weights) = windows.get(i);
                let mut sums = [HALF; 3];
                for (weight, sample) in weights.iter().zip(from[first * 3..].chunks_exact(3)) {
                    for (sum, s) in sums.iter_mut().zip(sample) {
                        *sum += weight * i32::from(*s);
                    }
                }
                for (to, sum) in pixel.iter_mut().zip(sums) {
                    *to = clip(sum);
                }
            }
        },
    );
    out
}

fn vertical(image: &Rgb8, height: usize, filter: Filter) -> Rgb8 {
    let windows = Windows::new(image.height, height, filter);
    let line = image.width * 3;
    let mut out = Rgb8::filled(image.width, height, [0; 3]);
    out.data.par_chunks_exact_mut(line).enumerate().for_each_init(
        || vec![0i32; line],
        |sums, (i, to)| {
            let (first, weights) = windows.get(i);
            sums.fill(HALF);
            for (weight, from) in weights.iter().zip(image.data[first * line..].chunks_exact(line)) {
                for (sum, s) in sums.iter_mut().zip(from) {
                    *sum += weight * i32::from(*s);
                }
            }
            for (to, sum) in to.iter_mut().zip(sums.iter()) {
                *to = clip(*sum);
            }
        },
    );
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn gradient(width: usize, height: usize) -> Rgb8 {
        let data = (0..width * height * 3).map(|i| (i * 7 % 251) as u8).collect();
        Rgb8 { width, height, data }
    }

    #[test]
    fn the_same_size_changes_nothing_and_a_flat_image_stays_flat() {
        let image = gradient(5, 4);
        assert_eq!(resize(&image, 5, 4, Filter::Bicubic), image);
        for filter in [Filter::Bilinear, Filter::Bicubic, Filter::Lanczos] {
            let flat = Rgb8::filled(31, 17, [10, 200, 255]);
            assert_eq!(resize(&flat, 8, 40, filter), Rgb8::filled(8, 40, [10, 200, 255]), "{filter:?}");
        }
    }

    /// Pillow 10.2.0: `Image.fromarray(uint8 [[0, 50, 100, 255]]).resize((2, 1), filter)`, grey as RGB.
    #[test]
    fn a_row_shrinks_as_in_pillow() {
        let data = [0u8, 50, 100, 255].iter().flat_map(|v| [*v; 3]).collect();
        let image = Rgb8 { width: 4, height: 1, data };
        let row = |filter| {
            let out = resize(&image, 2, 1, filter);
            [out.data[0], out.data[3]]
        };
        assert_eq!(row(Filter::Bilinear), [36, 159]);
        assert_eq!(row(Filter::Bicubic), [25, 169]);
        assert_eq!(row(Filter::Lanczos), [20, 172]);
    }
}
