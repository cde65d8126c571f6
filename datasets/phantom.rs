//! Synthetic medical-looking images whose content is known exactly: chest films, CT slices of the abdomen, microscopy
//! fields.
//!
//! Each image is drawn from a [`truth::Truth`], which also writes its annotation, so that every claim about it can be
//! checked by program ([`check::check`]). Sides are the patient's, in the radiological convention: the patient's left
//! is on the right of the image.

use std::path::{Path, PathBuf};

use image::ImageEncoder;
use rayon::prelude::*;
use serde_json::json;

use crate::{
    error::{Error, Kind, Result},
    random::stream,
    run_dir::write_atomic,
    sample::{ImageRef, Origin, Role, Sample, Turn},
    source::{DataConfig, Samples, Source},
};

mod canvas;
pub mod caption;
pub mod check;
mod lex;
mod read;
pub mod render;
pub mod truth;
pub mod words;

use truth::{Modality, Truth};

/// Number of images when the recipe states none.
const DEFAULT_IMAGES: usize = 300;

/// Images that are drawn in parallel before the first of them is handed out.
const BLOCK: usize = 64;

/// The source of generated images.
pub struct Phantom;

impl Source for Phantom {
    fn name(&self) -> &'static str {
        "phantom"
    }

    fn doc(&self) -> &'static str {
        "Synthetic images with a known truth: chest films, abdominal CT slices, microscopy fields.\n\
         Draws `data.images` PNG files of `data.phantom.image_size` pixels into images/ of the run directory, each with \
         an annotation and its structured truth (meta.truth). Files that are already right are left alone.\n\
         Sides are the patient's: the patient's left is on the right of the image."
    }

    fn open(&self, config: &DataConfig, seed: u64, work_dir: &Path) -> Result<Samples> {
        let settings = &config.phantom;
        if !(48..=512).contains(&settings.image_size) {
            return Err(out_of_range("data.phantom.image_size", "48 to 512", settings.image_size));
        }
        if !(0.0..=1.0).contains(&settings.normal_share) {
            return Err(out_of_range("data.phantom.normal_share", "0 to 1", settings.normal_share));
        }
        let count = if config.images == 0 { DEFAULT_IMAGES } else { config.images };
        let dir = work_dir.join("images");
        let settings = settings.clone();
        let draw = move |row| sample(row, seed, settings.normal_share, settings.image_size, &dir);
        let block = move |start: usize| -> Vec<Result<Sample>> {
            (start..count.min(start + BLOCK)).into_par_iter().map(&draw).collect()
        };
        Ok(Samples::new((0..count).step_by(BLOCK).flat_map(block)))
    }
}

fn out_of_range(key: &str, expected: &str, found: impl std::fmt::Display) -> Error {
    Error::new(Kind::Config, "value out of range").at(key).expected(expected).found(found)
}

/// Draws image `row`, writes it unless it is there, and tells about it.
fn sample(row: usize, seed: u64, normal_share: f64, size: u32, dir: &Path) -> Result<Sample> {
    let index = row as u64;
    let modality = Modality::DRAWN[row % Modality::DRAWN.len()];
    let truth = caption::draw_truth(modality, normal_share, &mut stream(seed, "phantom/truth", index));
    let id = format!("phantom-{row:06}");
    let path = dir.join(format!("{id}.png"));
    write_image(&truth, size, seed, index, &path)?;
    let annotation = caption::annotation(&truth, &mut stream(seed, "phantom/annotation", index));
    let words = caption::describe(&truth, &mut stream(seed, "phantom/describe", index));
    let meta = [("truth".to_string(), json!(truth)), ("modality".to_string(), json!(modality))];
    Ok(Sample {
        images: vec![ImageRef { path }],
        turns: vec![
            Turn { role: Role::User, text: "<image>\nDescribe this image.".into() },
            Turn { role: Role::Assistant, text: words },
        ],
        origin: Origin { dataset: "phantom".into(), file: PathBuf::new(), row },
        split: crate::sample::Split::default(),
        group: id.clone(),
        polarity: None,
        category: Some("caption".into()),
        answer_type: None,
        options: Vec::new(),
        annotation: Some(annotation),
        meta: meta.into_iter().collect(),
        id,
    })
}

fn write_image(truth: &Truth, size: u32, seed: u64, index: u64, path: &Path) -> Result<()> {
    let pixels = render::render(truth, size, &mut stream(seed, "phantom/render", index));
    let mut bytes = Vec::new();
    image::codecs::png::PngEncoder::new(&mut bytes)
        .write_image(&pixels, size, size, image::ExtendedColorType::Rgb8)
        .map_err(|e| Error::new(Kind::Image, "cannot encode an image").at(path.display()).source(e))?;
    // Drawing is cheap, so that an old file is compared and not trusted: another size or seed must not survive.
    if std::fs::read(path).is_ok_and(|old| old == bytes) {
        return Ok(());
    }
    write_atomic(path, &bytes)
}

#[cfg(test)]
mod tests {
    use super::{truth::*, *};

    fn open(dir: &Path, images: usize, seed: u64) -> Vec<Sample> {
        let config = DataConfig { images, ..DataConfig::default() };
        Phantom.open(&config, seed, dir).unwrap().collect::<Result<_>>().unwrap()
    }

    #[test]
    fn images_are_written_once_and_depend_on_the_seed_alone() {
        let (a, b) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let (first, second) = (open(a.path(), 6, 1), open(b.path(), 6, 1));
        for (x, y) in first.iter().zip(&second) {
            assert_eq!((&x.meta, &x.annotation, &x.id), (&y.meta, &y.annotation, &y.id));
            assert_eq!(std::fs::read(&x.images[0].path).unwrap(), std::fs::read(&y.images[0].path).unwrap());
        }
        let other = open(b.path(), 6, 2);
        assert!(first.iter().zip(&other).any(|(x, y)| x.meta != y.meta));
        let path = &first[0].images[0].path;
        let (before, bytes) = (std::fs::metadata(path).unwrap().modified().unwrap(), std::fs::read(path).unwrap());
        std::fs::write(&first[1].images[0].path, b"half a fi").unwrap();
        let repaired = std::fs::read(&second[1].images[0].path);
        open(a.path(), 6, 1);
        assert_eq!(std::fs::metadata(path).unwrap().modified().unwrap(), before, "a right file is left alone");
        assert_eq!(std::fs::read(path).unwrap(), bytes);
        drop(repaired);
        open(b.path(), 6, 1);
        let healed = std::fs::read(&first[1].images[0].path).unwrap();
        assert_eq!(healed, std::fs::read(&second[1].images[0].path).unwrap(), "a broken file is drawn again");
    }

    /// Mean brightness of a region, in shares of the side.
    fn brightness(truth: &Truth, x: std::ops::Range<f32>, y: std::ops::Range<f32>) -> f32 {
        let size = 64;
        let pixels = render::render(truth, size, &mut stream(3, "test", 0));
        let (mut sum, mut n) = (0.0, 0.0);
        for row in 0..size {
            for column in 0..size {
                let at = |v: u32| (v as f32 + 0.5) / size as f32;
                if x.contains(&at(column)) && y.contains(&at(row)) {
                    sum += f32::from(pixels[((row * size + column) * 3) as usize]);
                    n += 1.0;
                }
            }
        }
        sum / n
    }

    #[test]
    fn the_patients_left_is_on_the_right_of_the_image() {
        let effusion = |side| Truth {
            modality: Modality::ChestFilm,
            findings: vec![Finding::new(truth::Kind::Effusion).with(Attr::Side(side)).with(Attr::Size(Size::Large))],
        };
        let (left, right) = (effusion(Side::Left), effusion(Side::Right));
        let on_right_of_image = |t: &Truth| brightness(t, 0.72..0.85, 0.50..0.68);
        let on_left_of_image = |t: &Truth| brightness(t, 0.15..0.28, 0.50..0.68);
        assert!(on_right_of_image(&left) > on_right_of_image(&right) + 40.0);
        assert!(on_left_of_image(&right) > on_left_of_image(&left) + 40.0);
    }

    #[test]
    fn every_attribute_changes_the_picture() {
        for kind in truth::Kind::ALL {
            let modality = words::info(kind).modality;
            let normal = Truth { modality, findings: vec![] };
            let mut variants: Vec<Finding> = vec![Finding::new(kind)];
            for name in words::info(kind).attrs {
                variants = variants
                    .iter()
                    .flat_map(|f| words::values(*name).iter().map(|v| f.with(*v)).collect::<Vec<_>>())
                    .collect();
            }
            let draw = |t: &Truth| render::render(t, 64, &mut stream(3, "test", 1));
            let mut pictures = vec![draw(&normal)];
            for finding in variants {
                let picture = draw(&Truth { modality, findings: vec![finding] });
                for other in &pictures {
                    let changed =
                        picture.chunks(3).zip(other.chunks(3)).filter(|(a, b)| a[0].abs_diff(b[0]) > 40).count();
                    assert!(changed >= 6, "{finding:?} differs from another truth in {changed} pixels only");
                }
                pictures.push(picture);
            }
        }
    }
}
