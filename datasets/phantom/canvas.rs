//! A small float canvas in unit coordinates: soft shapes, strokes, smooth noise, and reduction to 8-bit pixels.

use std::f32::consts::PI;

use rand::RngExt;
use rand_chacha::ChaCha8Rng;

/// Linear colour, each channel from 0 to 1.
pub(super) type Color = [f32; 3];

/// A point in unit coordinates, y downwards.
pub(super) type Point = (f32, f32);

/// Samples along one side of a pixel.
const OVERSAMPLE: usize = 3;

/// A shade of grey.
pub(super) fn gray(value: f32) -> Color {
    [value; 3]
}

/// A square canvas. All lengths are shares of its side.
pub(super) struct Canvas {
    side: usize,
    pixels: Vec<Color>,
    /// Magnification about the centre, then shift: varies the pose of whole images.
    zoom: f32,
    shift: Point,
}

impl Canvas {
    /// A canvas that becomes an image of `size` x `size` pixels.
    pub(super) fn new(size: u32, background: Color, zoom: f32, shift: Point) -> Self {
        let side = size as usize * OVERSAMPLE;
        Self { side, pixels: vec![background; side * side], zoom, shift }
    }

    /// Mixes `color` in by `coverage(x, y)`, from 0 to 1.
    pub(super) fn paint(&mut self, color: Color, coverage: impl Fn(f32, f32) -> f32) {
        self.paint_in((0.0, 0.0), f32::INFINITY, color, coverage);
    }

    /// The same where `coverage` is 0 farther than `reach` from `center` along an axis.
    fn paint_in(&mut self, center: Point, reach: f32, color: Color, coverage: impl Fn(f32, f32) -> f32) {
        self.shade_in(center, reach, |x, y, pixel| {
            let alpha = coverage(x, y);
            if alpha > 0.0 {
                for (p, c) in pixel.iter_mut().zip(color) {
                    *p += (c - *p) * alpha.min(1.0);
                }
            }
        });
    }

    /// Changes every sample by its position.
    pub(super) fn shade(&mut self, change: impl Fn(f32, f32, &mut Color)) {
        self.shade_in((0.0, 0.0), f32::INFINITY, change);
    }

    fn shade_in(&mut self, center: Point, reach: f32, change: impl Fn(f32, f32, &mut Color)) {
        let unit = 1.0 / self.side as f32;
        let range = |center: f32, shift: f32| {
            let at = |v: f32| ((v - 0.5) * self.zoom + 0.5 + shift) * self.side as f32;
            let (from, to) = (at(center - reach).floor(), at(center + reach).ceil());
            (from.clamp(0.0, self.side as f32) as usize)..(to.clamp(0.0, self.side as f32) as usize)
        };
        let (rows, columns) = (range(center.1, self.shift.1), range(center.0, self.shift.0));
        for row in rows {
            for column in columns.clone() {
                let (x, y) = ((column as f32 + 0.5) * unit, (row as f32 + 0.5) * unit);
                let x = (x - 0.5 - self.shift.0) / self.zoom + 0.5;
                let y = (y - 0.5 - self.shift.1) / self.zoom + 0.5;
                change(x, y, &mut self.pixels[row * self.side + column]);
            }
        }
    }

    /// A filled ellipse.
    pub(super) fn ellipse(&mut self, center: Point, radii: Point, soft: f32, color: Color) {
        // The distance to an ellipse is scaled along its long axis.
        let reach = radii.0.max(radii.1) * (1.0 + soft / radii.0.min(radii.1));
        self.paint_in(center, reach, color, |x, y| cover(ellipse((x, y), center, radii), soft));
    }

    /// A filled disc with a crisp edge.
    pub(super) fn disc(&mut self, center: Point, radius: f32, color: Color) {
        self.ellipse(center, (radius, radius), 0.012, color);
    }

    /// A polyline of `width`.
    pub(super) fn stroke(&mut self, points: &[Point], width: f32, color: Color, opacity: f32) {
        let bound = |pick: fn(&Point) -> f32| {
            points.iter().map(pick).fold((f32::INFINITY, f32::NEG_INFINITY), |(a, b), v| (a.min(v), b.max(v)))
        };
        let ((left, right), (top, bottom)) = (bound(|p| p.0), bound(|p| p.1));
        let center = ((left + right) / 2.0, (top + bottom) / 2.0);
        let reach = (right - left).max(bottom - top) / 2.0 + width / 2.0 + 0.012;
        self.paint_in(center, reach, color, |x, y| opacity * cover(polyline((x, y), points) - width / 2.0, 0.012));
    }

    /// Averages the samples of each pixel, adds Gaussian noise of deviation `noise`, and rounds to RGB.
    pub(super) fn finish(self, noise: f32, colored: bool, rng: &mut ChaCha8Rng) -> Vec<u8> {
        let size = self.side / OVERSAMPLE;
        let mut out = Vec::with_capacity(size * size * 3);
        for row in 0..size {
            for column in 0..size {
                let mut sum = [0.0f32; 3];
                for i in 0..OVERSAMPLE * OVERSAMPLE {
                    let (y, x) = (row * OVERSAMPLE + i / OVERSAMPLE, column * OVERSAMPLE + i % OVERSAMPLE);
                    for (s, p) in sum.iter_mut().zip(self.pixels[y * self.side + x]) {
                        *s += p;
                    }
                }
                let common = gaussian(rng) * noise;
                for s in sum {
                    let grain = if colored { gaussian(rng) * noise } else { common };
                    let value = s / (OVERSAMPLE * OVERSAMPLE) as f32 + grain;
                    out.push((value.clamp(0.0, 1.0) * 255.0).round() as u8);
                }
            }
        }
        out
    }
}

/// 1 inside, 0 outside, smooth over `soft` around distance 0.
pub(super) fn cover(distance: f32, soft: f32) -> f32 {
    let t = (0.5 - distance / soft).clamp(0.0, 1.0);
    t * t * (3.0 - 2.0 * t)
}

/// Signed distance to an ellipse, exact for circles and close near the border otherwise.
pub(super) fn ellipse(at: Point, center: Point, radii: Point) -> f32 {
    let (dx, dy) = ((at.0 - center.0) / radii.0, (at.1 - center.1) / radii.1);
    ((dx * dx + dy * dy).sqrt() - 1.0) * radii.0.min(radii.1)
}

/// Distance to a polyline.
pub(super) fn polyline(at: Point, points: &[Point]) -> f32 {
    points.windows(2).map(|w| segment(at, w[0], w[1])).fold(f32::INFINITY, f32::min)
}

fn segment(at: Point, a: Point, b: Point) -> f32 {
    let (dx, dy) = (b.0 - a.0, b.1 - a.1);
    let length = dx * dx + dy * dy;
    let t = if length > 0.0 { (((at.0 - a.0) * dx + (at.1 - a.1) * dy) / length).clamp(0.0, 1.0) } else { 0.0 };
    ((at.0 - a.0 - t * dx).powi(2) + (at.1 - a.1 - t * dy).powi(2)).sqrt()
}

/// Points on an arc of an ellipse, angles in turns.
pub(super) fn arc(center: Point, radii: Point, from: f32, to: f32) -> Vec<Point> {
    (0..=12)
        .map(|i| {
            let angle = 2.0 * PI * (from + (to - from) * i as f32 / 12.0);
            (center.0 + radii.0 * angle.cos(), center.1 + radii.1 * angle.sin())
        })
        .collect()
}

/// Smooth noise from 0 to 1 on a random lattice.
pub(super) struct Noise {
    cells: usize,
    lattice: Vec<f32>,
}

impl Noise {
    /// Noise with `cells` waves along a side.
    pub(super) fn new(cells: usize, rng: &mut ChaCha8Rng) -> Self {
        let lattice = (0..(cells + 1) * (cells + 1)).map(|_| rng.random::<f32>()).collect();
        Self { cells, lattice }
    }

    /// Its value at a point; outside the unit square the border continues.
    pub(super) fn at(&self, x: f32, y: f32) -> f32 {
        let place = |v: f32| {
            let v = v.clamp(0.0, 0.9999) * self.cells as f32;
            let t = v.fract();
            (v as usize, t * t * (3.0 - 2.0 * t))
        };
        let ((i, s), (j, t)) = (place(x), place(y));
        let value = |i: usize, j: usize| self.lattice[j * (self.cells + 1) + i];
        let top = value(i, j) * (1.0 - s) + value(i + 1, j) * s;
        let bottom = value(i, j + 1) * (1.0 - s) + value(i + 1, j + 1) * s;
        top * (1.0 - t) + bottom * t
    }
}

/// A draw around `center`, at most `spread` away.
pub(super) fn jitter(rng: &mut ChaCha8Rng, center: f32, spread: f32) -> f32 {
    center + (rng.random::<f32>() * 2.0 - 1.0) * spread
}

fn gaussian(rng: &mut ChaCha8Rng) -> f32 {
    // The sum of four uniforms is close enough to normal for grain, and needs no logarithm.
    let sum: f32 = (0..4).map(|_| rng.random::<f32>()).sum();
    (sum - 2.0) * 1.732
}
