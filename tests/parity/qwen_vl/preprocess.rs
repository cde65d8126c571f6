//! Image preprocessing: bytes exact, values to 2e-6.

use std::fmt::Write as _;

use medtune::{
    image::{Rgb8, open, resize},
    models::qwen_vl::processor::pixels,
};
use serde_json::Value;
use sha2::{Digest, Sha256};

use super::{
    Family,
    text::{ints, list, text},
};
use crate::parity::fixture::{Checks, Tensors, json};

const VALUES: f32 = 2e-6;

pub(super) fn check(checks: &mut Checks) {
    let family = Family::open();
    let tensors = Tensors::open(&family.golden("preprocess.safetensors"));
    for case in list(&json(&family.golden("preprocess.json"))) {
        image(checks, &family, &tensors, case);
    }
}

fn image(checks: &mut Checks, family: &Family, tensors: &Tensors, case: &Value) {
    let file = text(&case["file"]);
    let shape = tensors.shape(&format!("{file}.decoded"));
    let decoded = Rgb8 { height: shape[0], width: shape[1], data: tensors.bytes(&format!("{file}.decoded")) };
    let found = open(family.root.join("images").join(file)).unwrap();
    checks.equal(&format!("{file} size"), vec![found.height, found.width, 3], shape);
    // A JPEG decoder may round differently; everything else is exact.
    if case["lossy"] != true {
        checks.equal(&format!("{file} decoded"), found.data == decoded.data, true);
    }
    let side = family.config.visual.image_size;
    let small = resize::resize(&decoded, side, side, resize::Filter::Bicubic);
    checks.equal(&format!("{file} resized"), small.data == tensors.bytes(&format!("{file}.resized")), true);
    let values = pixels(&decoded, side).data;
    let (sum, min, max) = values
        .iter()
        .fold((0f64, f32::MAX, f32::MIN), |(sum, min, max), v| (sum + f64::from(*v), min.min(*v), max.max(*v)));
    let number = |key: &str| case[key].as_f64().unwrap();
    assert!((sum - number("pixel_sum")).abs() < values.len() as f64 * f64::from(VALUES), "{file} sum {sum}");
    checks.close(
        &format!("{file} range"),
        &[min, max],
        &[number("pixel_min") as f32, number("pixel_max") as f32],
        VALUES,
    );
    let name = format!("{file}.pixel_values");
    if tensors.has(&name) {
        checks.close(&name, &values, &tensors.f32(&name), VALUES);
    }
    for (side, big) in case["big"].as_object().unwrap() {
        enlarged(checks, &decoded, side.parse().unwrap(), &format!("{file} {side}"), big);
    }
}

fn enlarged(checks: &mut Checks, decoded: &Rgb8, side: usize, what: &str, big: &Value) {
    let image = resize::resize(decoded, side, side, resize::Filter::Bicubic);
    let at = |row: usize, column: usize| {
        let start = (row * side + column) * 3;
        image.data[start..start + 3].iter().map(|b| i32::from(*b)).collect::<Vec<_>>()
    };
    for (column, expected) in list(&big["row0_col0_to_4"]).iter().enumerate() {
        checks.equal(&format!("{what} column {column}"), at(0, column), ints(expected));
    }
    checks.equal(&format!("{what} centre"), at(side / 2, side / 2), ints(&big["centre"]));
    let sum: u64 = image.data.iter().map(|b| u64::from(*b)).sum();
    checks.equal(&format!("{what} sum"), Some(sum), big["sum"].as_u64());
    let hex = Sha256::digest(&image.data).iter().fold(String::new(), |mut hex, b| {
        let _ = write!(hex, "{b:02x}");
        hex
    });
    checks.equal(&format!("{what} sha256"), hex.as_str(), text(&big["sha256"]));
}
