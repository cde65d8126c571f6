//! Draws a [`Truth`]: chest film, CT slice of the abdomen, or microscopy field.
//!
//! Pose, texture and places vary with the random stream; what the truth says does not. Seen by a reader, the patient's
//! left is on the right of the image. Findings of one image never hide each other.

use rand::RngExt;
use rand_chacha::ChaCha8Rng;

use super::{
    canvas::{Canvas, Color, Noise, Point, arc, cover, ellipse, gray, jitter, polyline},
    truth::{Density, Finding, Kind, Modality, Side, Size, Truth},
};

/// Draws `truth` as `size` x `size` RGB pixels, row by row.
///
/// Only the modalities of [`Modality::DRAWN`] have an appearance; the others come out blank.
#[must_use]
pub fn render(truth: &Truth, size: u32, rng: &mut ChaCha8Rng) -> Vec<u8> {
    let zoom = jitter(rng, 1.0, 0.04);
    let shift = (jitter(rng, 0.0, 0.02), jitter(rng, 0.0, 0.02));
    let background = if truth.modality == Modality::Microscopy { [0.93, 0.78, 0.86] } else { gray(0.02) };
    let mut painter = Painter { canvas: Canvas::new(size, background, zoom, shift), truth, rng };
    let (noise, colored) = match truth.modality {
        Modality::ChestFilm => {
            painter.chest_film();
            (0.018, false)
        }
        Modality::AbdomenCt => {
            painter.abdomen_ct();
            (0.022, false)
        }
        Modality::Microscopy => {
            painter.microscopy();
            (0.012, true)
        }
        Modality::BrainMri | Modality::Ultrasound => (0.0, false),
    };
    painter.canvas.finish(noise, colored, painter.rng)
}

struct Painter<'a> {
    canvas: Canvas,
    truth: &'a Truth,
    rng: &'a mut ChaCha8Rng,
}

/// Direction on the image of a patient's side: the patient's left is at larger x.
fn direction(side: Option<Side>) -> f32 {
    if side == Some(Side::Left) { 1.0 } else { -1.0 }
}

fn large(finding: &Finding) -> bool {
    finding.size == Some(Size::Large)
}

impl Painter<'_> {
    fn find(&self, kind: Kind) -> Option<Finding> {
        self.truth.find(kind).copied()
    }

    fn near(&mut self, center: Point, spread: f32) -> Point {
        (jitter(self.rng, center.0, spread), jitter(self.rng, center.1, spread))
    }

    // Chest film

    fn chest_film(&mut self) {
        self.chest_body();
        self.lungs();
        if let Some(f) = self.find(Kind::Consolidation) {
            self.consolidation(direction(f.side));
        }
        self.heart_and_vessels();
        self.diaphragm();
        if let Some(f) = self.find(Kind::Effusion) {
            self.effusion(direction(f.side), if large(&f) { 0.43 } else { 0.63 });
        }
        self.bones();
        if let Some(f) = self.find(Kind::Nodule) {
            self.nodules(&f);
        }
        if let Some(f) = self.find(Kind::Pacemaker) {
            self.pacemaker(direction(f.side));
        }
        if self.find(Kind::Tube).is_some() {
            self.canvas.stroke(&[(0.5, -0.1), (0.5, 0.335)], 0.035, gray(1.0), 1.0);
        }
    }

    fn chest_body(&mut self) {
        let c = &mut self.canvas;
        c.ellipse((0.5, 0.02), (0.14, 0.22), 0.05, gray(0.50));
        c.ellipse((0.5, 0.30), (0.52, 0.19), 0.05, gray(0.44));
        c.ellipse((0.5, 0.80), (0.455, 0.62), 0.05, gray(0.46));
        c.ellipse((0.5, 0.75), (0.40, 0.60), 0.16, gray(0.52));
    }

    fn lungs(&mut self) {
        let texture = Noise::new(14, self.rng);
        for s in [-1.0, 1.0] {
            self.canvas.paint(gray(0.12), |x, y| cover(lung(x, y, s), 0.035));
        }
        // Vessels fan out from the hilum.
        for s in [-1.0f32, 1.0] {
            for i in 0..7 {
                let angle = -1.1 + 0.37 * i as f32 + jitter(self.rng, 0.0, 0.08);
                let reach = jitter(self.rng, 0.17, 0.04);
                let from = (0.5 + s * 0.09, 0.46);
                let to = (from.0 + s * reach * angle.cos(), from.1 + reach * angle.sin() * 1.2);
                self.canvas.stroke(&[from, to], 0.012, gray(0.34), 0.55);
            }
        }
        self.canvas.shade(|x, y, pixel| {
            let delta = (texture.at(x, y) - 0.5) * 0.05;
            pixel.iter_mut().for_each(|p| *p += delta);
        });
    }

    fn heart_and_vessels(&mut self) {
        let enlarged = self.find(Kind::EnlargedHeart).is_some();
        let (center, radii) = if enlarged { ((0.55, 0.62), (0.235, 0.165)) } else { ((0.545, 0.62), (0.115, 0.135)) };
        let c = &mut self.canvas;
        c.paint(gray(0.70), |x, y| cover((x - 0.505).abs() - 0.055 - 0.02 * (y - 0.3).abs(), 0.03));
        c.ellipse((0.555, 0.36), (0.055, 0.05), 0.03, gray(0.70));
        c.ellipse(center, radii, 0.035, gray(0.78));
        c.ellipse((0.465, 0.62), (0.06, 0.11), 0.03, gray(0.74));
        c.stroke(&[(0.5, -0.1), (0.5, 0.36)], 0.045, gray(0.38), 0.9);
    }

    fn diaphragm(&mut self) {
        for (s, top) in [(-1.0f32, 0.735f32), (1.0, 0.765)] {
            self.canvas.paint(gray(0.66), |x, y| {
                let inside = ellipse((x, y), (0.5, 0.75), (0.40, 0.60));
                let dome = top + ((x - 0.5 - s * 0.19).abs() / 0.2).powi(2) * 0.10 - y;
                if (x - 0.5) * s < 0.0 { 0.0 } else { cover(dome.max(inside), 0.02) }
            });
        }
        let c = &mut self.canvas;
        c.ellipse((0.70, 0.86), (0.06, 0.045), 0.03, gray(0.30));
    }

    fn bones(&mut self) {
        let c = &mut self.canvas;
        for i in 0..8 {
            let y = 0.16 + 0.085 * i as f32;
            let reach = [0.20, 0.27, 0.31, 0.34, 0.355, 0.365, 0.37, 0.37][i];
            for s in [-1.0f32, 1.0] {
                let rib: Vec<Point> = (0..=10)
                    .map(|k| {
                        let t = k as f32 / 10.0;
                        let x = 0.5 + s * (0.06 + (reach - 0.06) * (t * std::f32::consts::FRAC_PI_2).sin());
                        (x, y - 0.035 * (t * 3.0).sin() + 0.15 * t * t)
                    })
                    .collect();
                c.stroke(&rib, 0.02, gray(0.66), 0.42);
            }
        }
        for i in 0..11 {
            let y = 0.10 + 0.08 * i as f32;
            c.ellipse((0.5, y), (0.035, 0.026), 0.02, gray(0.80));
        }
        for s in [-1.0f32, 1.0] {
            c.stroke(&[(0.5 + s * 0.05, 0.19), (0.5 + s * 0.2, 0.135), (0.5 + s * 0.40, 0.13)], 0.03, gray(0.80), 0.7);
            c.stroke(&[(0.5 + s * 0.41, 0.14), (0.5 + s * 0.46, 0.34)], 0.05, gray(0.78), 0.6);
        }
        // The airway stays visible over the spine.
        c.stroke(&[(0.5, -0.1), (0.5, 0.33)], 0.03, gray(0.30), 0.8);
    }

    fn consolidation(&mut self, s: f32) {
        let center = self.near((0.5 + s * 0.225, 0.35), 0.015);
        let texture = Noise::new(12, self.rng);
        self.canvas.paint(gray(0.80), |x, y| {
            let d = ellipse((x, y), center, (0.125, 0.115)) + (texture.at(x, y) - 0.5) * 0.08;
            cover(d.max(lung(x, y, s)), 0.05) * (0.72 + 0.28 * texture.at(y, x))
        });
    }

    fn effusion(&mut self, s: f32, level: f32) {
        let level = jitter(self.rng, level, 0.015);
        self.canvas.paint(gray(0.86), |x, y| {
            // The surface curves up along the chest wall; below, the fluid fills the lung space and hides the diaphragm.
            let lateral = ((x - 0.5) * s / 0.38).clamp(0.0, 1.0);
            let surface = level + 0.05 - 0.12 * lateral * lateral - y;
            let space = lung(x, y.min(0.62), s).max(y - 0.83);
            cover(surface.max(space), 0.03)
        });
    }

    fn nodules(&mut self, finding: &Finding) {
        let s = direction(finding.side);
        let radius = if large(finding) { 0.062 } else { 0.034 };
        let slots = [(0.155, 0.25), (0.285, 0.31), (0.19, 0.395)];
        for at in self.choose(&slots, finding.count) {
            let at = self.near((0.5 + s * at.0, at.1), 0.012);
            self.canvas.disc(at, radius, gray(0.97));
        }
    }

    fn pacemaker(&mut self, s: f32) {
        let (x, y) = (0.5 + s * 0.345, 0.225);
        let lead: Vec<Point> =
            vec![(x, y), (0.5 + s * 0.24, 0.16), (0.5 + s * 0.05, 0.26), (0.49, 0.45), (0.54, 0.66), (0.60, 0.70)];
        self.canvas.stroke(&lead, 0.016, gray(1.0), 0.9);
        self.canvas.paint(gray(1.0), |px, py| {
            let d = ((px - x).abs() - 0.055).max((py - y).abs() - 0.045);
            cover(d, 0.015)
        });
    }

    /// As many of `slots` as the count says, in random order.
    fn choose(&mut self, slots: &[Point], count: Option<u8>) -> Vec<Point> {
        let mut slots = slots.to_vec();
        let count = usize::from(count.unwrap_or(1)).min(slots.len());
        for i in 0..count {
            let j = self.rng.random_range(i..slots.len());
            slots.swap(i, j);
        }
        slots.truncate(count);
        slots
    }

    // Abdomen

    fn abdomen_ct(&mut self) {
        let ascites = self.find(Kind::Ascites).is_some();
        self.abdominal_wall(ascites);
        self.organs(if ascites { 0.88 } else { 1.0 });
        for s in [-1.0, 1.0] {
            self.kidney(s);
        }
        self.spine();
        self.vessels();
        if let Some(f) = self.find(Kind::LiverLesion) {
            self.liver_lesions(&f);
        }
        if let Some(f) = self.find(Kind::KidneyCyst) {
            let center = (0.5 + direction(f.side) * 0.205, 0.655);
            let radius = if large(&f) { 0.085 } else { 0.042 };
            self.canvas.disc(center, radius + 0.014, gray(0.70));
            self.canvas.disc(center, radius, gray(0.10));
        }
        if let Some(f) = self.find(Kind::KidneyStone) {
            let center = (0.5 + direction(f.side) * 0.165, 0.705);
            self.canvas.disc(center, 0.034, gray(1.0));
        }
        if let Some(f) = self.find(Kind::Drain) {
            self.drain(direction(f.side));
        }
    }

    fn abdominal_wall(&mut self, ascites: bool) {
        let texture = Noise::new(20, self.rng);
        let c = &mut self.canvas;
        c.stroke(&arc((0.5, 0.40), (0.62, 0.56), 0.12, 0.38), 0.018, gray(0.35), 1.0);
        c.ellipse((0.5, 0.5), (0.475, 0.375), 0.012, gray(0.55));
        c.ellipse((0.5, 0.5), (0.462, 0.362), 0.012, gray(0.22));
        c.ellipse((0.5, 0.5), (0.425, 0.325), 0.015, gray(0.46));
        let cavity = if ascites { 0.40 } else { 0.15 };
        c.ellipse((0.5, 0.485), (0.395, 0.29), 0.015, gray(cavity));
        for i in 0..12 {
            let angle = std::f32::consts::TAU * (i as f32 + 0.5) / 12.0;
            let at = (0.5 + 0.41 * angle.cos(), 0.495 + 0.308 * angle.sin());
            c.ellipse(at, (0.02, 0.016), 0.012, gray(0.92));
        }
        c.shade(|x, y, pixel| {
            let delta = if pixel[0] > 0.1 { (texture.at(x, y) - 0.5) * 0.06 } else { 0.0 };
            pixel.iter_mut().for_each(|p| *p += delta);
        });
    }

    fn organs(&mut self, scale: f32) {
        let loops = Noise::new(10, self.rng);
        let c = &mut self.canvas;
        let liver = |x: f32, y: f32| {
            let right = ellipse((x, y), (0.29, 0.45), (0.165 * scale, 0.20 * scale));
            let left = ellipse((x, y), (0.43, 0.335), (0.15 * scale, 0.085 * scale));
            right.min(left)
        };
        c.paint(gray(0.58), |x, y| cover(liver(x, y), 0.015));
        c.ellipse((0.665, 0.365), (0.125 * scale, 0.10 * scale), 0.015, gray(0.50));
        c.ellipse((0.675, 0.335), (0.085 * scale, 0.05 * scale), 0.015, gray(0.03));
        c.ellipse((0.825, 0.54), (0.052 * scale, 0.115 * scale), 0.015, gray(0.60));
        for at in [(0.50, 0.47), (0.585, 0.49), (0.66, 0.52), (0.735, 0.47)] {
            c.ellipse(at, (0.042, 0.038), 0.015, gray(0.48));
            c.ellipse((at.0, at.1 - 0.006), (0.016, 0.012), 0.015, gray(0.12 + 0.3 * loops.at(at.0, at.1)));
        }
    }

    fn kidney(&mut self, s: f32) {
        let c = &mut self.canvas;
        let center = (0.5 + s * 0.185, 0.69);
        c.ellipse(center, (0.082, 0.075), 0.012, gray(0.66));
        c.ellipse((center.0 - s * 0.03, center.1 + 0.01), (0.04, 0.032), 0.02, gray(0.40));
    }

    fn spine(&mut self) {
        let c = &mut self.canvas;
        for s in [-1.0f32, 1.0] {
            c.ellipse((0.5 + s * 0.105, 0.80), (0.075, 0.04), 0.015, gray(0.50));
            c.stroke(&[(0.5, 0.76), (0.5 + s * 0.10, 0.775)], 0.022, gray(0.93), 1.0);
        }
        c.ellipse((0.5, 0.70), (0.068, 0.055), 0.012, gray(0.95));
        c.ellipse((0.5, 0.70), (0.05, 0.038), 0.015, gray(0.80));
        c.stroke(&[(0.5, 0.79), (0.5, 0.845)], 0.024, gray(0.95), 1.0);
        c.ellipse((0.5, 0.768), (0.032, 0.024), 0.012, gray(0.95));
        c.ellipse((0.5, 0.768), (0.02, 0.015), 0.01, gray(0.25));
    }

    fn vessels(&mut self) {
        let wide = self.find(Kind::Aneurysm).is_some();
        let c = &mut self.canvas;
        c.ellipse((0.44, 0.605), (0.034, 0.026), 0.012, gray(0.62));
        if wide {
            c.disc((0.53, 0.56), 0.105, gray(0.62));
            c.disc((0.53, 0.56), 0.075, gray(0.97));
        } else {
            c.disc((0.525, 0.615), 0.03, gray(0.92));
        }
    }

    fn liver_lesions(&mut self, finding: &Finding) {
        let radius = if large(finding) { 0.06 } else { 0.034 };
        let shade = if finding.density == Some(Density::High) { 0.98 } else { 0.16 };
        let slots = [(0.235, 0.37), (0.36, 0.41), (0.25, 0.525)];
        for at in self.choose(&slots, finding.count) {
            let at = self.near(at, 0.008);
            self.canvas.disc(at, radius, gray(shade));
        }
    }

    fn drain(&mut self, s: f32) {
        let x = |v: f32| 0.5 + s * v;
        let line = [(x(0.52), 0.20), (x(0.40), 0.28), (x(0.30), 0.33), (x(0.20), 0.31)];
        self.canvas.stroke(&line, 0.03, gray(1.0), 1.0);
        self.canvas.stroke(&arc((x(0.165), 0.335), (0.04, 0.04), 0.0, 1.0), 0.022, gray(1.0), 1.0);
    }

    // Microscopy

    fn microscopy(&mut self) {
        self.stroma();
        if self.find(Kind::Fibrosis).is_some() {
            self.fibrosis();
        }
        let slots = [(0.24, 0.26), (0.75, 0.35), (0.36, 0.76)];
        let giants =
            self.find(Kind::GiantCell).map_or_else(Vec::new, |f| self.choose(&slots, Some(f.count.unwrap_or(1))));
        let necrosis = self.find(Kind::Necrosis).map(|f| self.necrosis_area(large(&f)));
        self.cells(&giants, necrosis);
        if let Some((center, radius)) = necrosis {
            self.necrosis(center, radius);
        }
        if let Some(f) = self.find(Kind::FatVacuole) {
            self.vacuoles(large(&f), &giants);
        }
        for at in giants {
            self.giant_cell(at);
        }
        if self.find(Kind::Inflammation).is_some() {
            self.dots(75, 0.014, [0.16, 0.10, 0.42]);
        }
        if let Some(f) = self.find(Kind::Pigment) {
            let color =
                if f.color == Some(super::truth::Color::Green) { [0.10, 0.55, 0.20] } else { [0.42, 0.20, 0.02] };
            self.dots(20, 0.03, color);
        }
    }

    fn stroma(&mut self) {
        let (coarse, fine) = (Noise::new(5, self.rng), Noise::new(22, self.rng));
        self.canvas.shade(|x, y, pixel| {
            let t = 0.6 * coarse.at(x, y) + 0.4 * fine.at(x, y);
            *pixel = mix([0.95, 0.82, 0.89], [0.88, 0.66, 0.79], t);
        });
    }

    fn cells(&mut self, giants: &[Point], necrosis: Option<(Point, f32)>) {
        const GRID: usize = 7;
        for i in 0..GRID * GRID {
            let cell = |v: usize| (v as f32 + 0.5) / GRID as f32;
            let stagger = if (i / GRID).is_multiple_of(2) { 0.03 } else { -0.03 };
            let at = self.near((cell(i % GRID) + stagger, cell(i / GRID)), 0.032);
            let radii = (jitter(self.rng, 0.058, 0.008), jitter(self.rng, 0.055, 0.008));
            let nucleus = jitter(self.rng, 0.023, 0.004);
            let dead = necrosis.is_some_and(|(c, r)| distance(at, c) < r + 0.02);
            if dead || giants.iter().any(|g| distance(at, *g) < 0.15) {
                continue;
            }
            self.canvas.ellipse(at, radii, 0.012, [0.78, 0.52, 0.70]);
            self.canvas.ellipse(at, (radii.0 - 0.008, radii.1 - 0.008), 0.012, [0.91, 0.68, 0.81]);
            self.canvas.ellipse(at, (nucleus, nucleus * 0.9), 0.012, [0.45, 0.25, 0.58]);
        }
    }

    fn giant_cell(&mut self, at: Point) {
        let at = self.near(at, 0.02);
        self.canvas.ellipse(at, (0.135, 0.125), 0.012, [0.58, 0.30, 0.58]);
        self.canvas.ellipse(at, (0.122, 0.112), 0.012, [0.86, 0.56, 0.78]);
        for i in 0..9 {
            let angle = std::f32::consts::TAU * (i as f32 / 9.0);
            let nucleus = (at.0 + 0.085 * angle.cos(), at.1 + 0.078 * angle.sin());
            self.canvas.disc(nucleus, 0.023, [0.30, 0.12, 0.46]);
        }
    }

    fn necrosis_area(&mut self, large: bool) -> (Point, f32) {
        let radius = if large { 0.30 } else { 0.15 };
        (self.near((0.68, 0.70), 0.03), radius)
    }

    /// A pale smudge without nuclei, with a few specks of debris.
    fn necrosis(&mut self, center: Point, radius: f32) {
        let edge = Noise::new(9, self.rng);
        self.canvas.paint([0.97, 0.93, 0.80], |x, y| {
            let d = distance((x, y), center) - radius + (edge.at(x, y) - 0.5) * 0.08;
            cover(d, 0.04)
        });
        for _ in 0..(40.0 * radius) as usize {
            let at = self.near(center, radius * 0.6);
            self.canvas.disc(at, 0.008, [0.70, 0.55, 0.60]);
        }
    }

    fn vacuoles(&mut self, large: bool, giants: &[Point]) {
        let (count, radius) = if large { (9, 0.075) } else { (22, 0.034) };
        let mut placed: Vec<Point> = Vec::new();
        for _ in 0..400 {
            if placed.len() == count {
                break;
            }
            let at: Point = (jitter(self.rng, 0.5, 0.45), jitter(self.rng, 0.5, 0.45));
            let free = placed.iter().all(|p| distance(at, *p) > 2.2 * radius)
                && giants.iter().all(|g| distance(at, *g) > 0.15 + radius);
            if free {
                placed.push(at);
                self.canvas.disc(at, radius + 0.01, [0.62, 0.40, 0.58]);
                self.canvas.disc(at, radius, [1.0, 1.0, 1.0]);
            }
        }
    }

    fn fibrosis(&mut self) {
        let phase: f32 = self.rng.random::<f32>() * 6.0;
        for i in 0..4 {
            let y = jitter(self.rng, 0.14 + 0.24 * i as f32, 0.02);
            let band: Vec<Point> = (-1..=13)
                .map(|k| {
                    let x = k as f32 / 12.0;
                    (x, y + 0.045 * (x * 7.0 + phase + i as f32).sin())
                })
                .collect();
            self.canvas.paint([0.80, 0.22, 0.45], |x, y| cover(polyline((x, y), &band) - 0.032, 0.02) * 0.95);
            self.canvas.stroke(&band, 0.012, [0.92, 0.48, 0.64], 0.9);
        }
    }

    fn dots(&mut self, count: usize, radius: f32, color: Color) {
        for _ in 0..count {
            let at = self.near((0.5, 0.5), 0.47);
            let radius = jitter(self.rng, radius, radius * 0.2);
            self.canvas.disc(at, radius, color);
        }
    }
}

/// Signed distance to one lung: narrow at the top, wide at the bottom.
fn lung(x: f32, y: f32, s: f32) -> f32 {
    let narrow = 0.74 + 0.30 * ((y - 0.12) / 0.6).clamp(0.0, 1.0);
    let center = 0.5 + s * (0.165 + 0.05 * narrow);
    ellipse((x, y), (center, 0.50), (0.165 * narrow, 0.38))
}

fn distance(a: Point, b: Point) -> f32 {
    ((a.0 - b.0).powi(2) + (a.1 - b.1).powi(2)).sqrt()
}

fn mix(a: Color, b: Color, t: f32) -> Color {
    [0, 1, 2].map(|i| a[i] + (b[i] - a[i]) * t)
}
