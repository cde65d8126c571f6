//! Pillow's resampling, bit for bit: two passes, each stored as 8 bits, weights in 22-bit fixed point.
//!
//! Where the processor has AVX2 both passes run together, a few lines at a time, so that what lies between them stays
//! in the cache (`wide.rs`).

#[cfg(target_arch = "x86_64")]
mod wide;

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

    /// Input samples behind those that output `i` is made of.
    fn end(&self, i: usize) -> usize {
        self.first[i] + self.starts[i + 1] - self.starts[i]
    }

    #[cfg(target_arch = "x86_64")]
    fn len(&self) -> usize {
        self.first.len()
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

/// A resizing: the windows of both passes, none where the size does not change.
struct Plan<'a> {
    image: &'a Rgb8,
    width: usize,
    across: Option<Windows>,
    down: Option<Windows>,
}

/// Products of a weight and a sample, one or two milliseconds of work, for each thread. Images mostly come many at a time,
/// on threads of their own; below this, waiting for another thread costs more than it saves.
const WORTH_A_THREAD: usize = 24 << 20;

/// Resizes to `width` x `height`: across first, then down, as Pillow before 13 always does.
///
/// A pass whose size does not change is left out. Neither size may be zero.
#[must_use]
pub fn resize(image: &Rgb8, width: usize, height: usize, filter: Filter) -> Rgb8 {
    assert!(width > 0 && height > 0 && !image.data.is_empty(), "callers resize between sizes above zero");
    let plan = Plan::new(image, width, height, filter);
    if plan.across.is_none() && plan.down.is_none() {
        return image.clone();
    }
    // A pool of one thread is another thread than this one, and the image lies in this one's cache.
    let threads = rayon::current_num_threads().min(plan.work() / WORTH_A_THREAD).clamp(1, height);
    let data = if threads == 1 {
        plan.band(0, height)
    } else {
        let part = |i: usize| plan.band(i * height / threads, (i + 1) * height / threads);
        (0..threads).into_par_iter().map(part).collect::<Vec<_>>().concat()
    };
    Rgb8 { width, height, data }
}

impl<'a> Plan<'a> {
    fn new(image: &'a Rgb8, width: usize, height: usize, filter: Filter) -> Self {
        let windows = |from, to| if from == to { None } else { Some(Windows::new(from, to, filter)) };
        Self { image, width, across: windows(image.width, width), down: windows(image.height, height) }
    }

    /// Products of both passes.
    fn work(&self) -> usize {
        let across = self.across.as_ref().map_or(0, |w| w.weights.len() * self.image.height);
        3 * (across + self.down.as_ref().map_or(0, |w| w.weights.len() * self.width))
    }

    /// Lines of the image that output line `y` is made of.
    fn lines(&self, y: usize) -> (usize, usize) {
        self.down.as_ref().map_or((y, y + 1), |w| (w.first[y], w.end(y)))
    }

    /// Output lines `start` to `end`.
    fn band(&self, start: usize, end: usize) -> Vec<u8> {
        #[cfg(target_arch = "x86_64")]
        if let Some(simd) = pulp::x86::V3::try_new() {
            return wide::band(simd, self, start, end);
        }
        self.portable_band(start, end)
    }

    fn portable_band(&self, start: usize, end: usize) -> Vec<u8> {
        let line = self.width * 3;
        // The lines that the band is made of, across.
        let (first, last) = (self.lines(start).0, self.lines(end - 1).1);
        let from = &self.image.data[first * self.image.width * 3..last * self.image.width * 3];
        let across = self.across.as_ref().map(|windows| {
            let mut to = vec![0; (last - first) * line];
            for (to, from) in to.chunks_exact_mut(line).zip(from.chunks_exact(self.image.width * 3)) {
                horizontal(windows, from, to);
            }
            to
        });
        let from = across.as_deref().unwrap_or(from);
        let Some(windows) = &self.down else { return from.to_vec() };
        let mut sums = vec![0; line];
        let mut out = Vec::with_capacity((end - start) * line);
        for y in start..end {
            let (top, weights) = windows.get(y);
            sums.fill(HALF);
            for (weight, from) in weights.iter().zip(from[(top - first) * line..].chunks_exact(line)) {
                for (sum, s) in sums.iter_mut().zip(from) {
                    *sum += weight * i32::from(*s);
                }
            }
            out.extend(sums.iter().map(|sum| clip(*sum)));
        }
        out
    }
}

fn horizontal(windows: &Windows, from: &[u8], to: &mut [u8]) {
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
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use rand::{Rng, SeedableRng};

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

    proptest! {
        /// The wide form, whole and in bands, against the plain form.
        #[test]
        fn every_form_gives_the_same_bytes(
            from in (1usize..150, 1usize..150),
            to in (1usize..150, 1usize..150),
            kept in prop::option::of(any::<bool>()),
            filter in prop::sample::select(vec![Filter::Bilinear, Filter::Bicubic, Filter::Lanczos]),
            contrast: bool,
            seed: u64,
        ) {
            let to = match kept {
                None => to,
                Some(true) => (from.0, to.1),
                Some(false) => (to.0, from.1),
            };
            let mut image = Rgb8::filled(from.0, from.1, [0; 3]);
            rand_chacha::ChaCha8Rng::seed_from_u64(seed).fill_bytes(&mut image.data);
            if contrast {
                image.data.iter_mut().for_each(|s| *s = if *s < 128 { 0 } else { 255 });
            }
            let plan = Plan::new(&image, to.0, to.1, filter);
            let plain = plan.portable_band(0, to.1);
            prop_assert_eq!(&resize(&image, to.0, to.1, filter).data, &plain);
            let cut = to.1 / 3;
            if cut > 0 {
                prop_assert_eq!([plan.band(0, cut), plan.band(cut, to.1)].concat(), plain);
            }
        }
    }
}
