//! Image preprocessing, bit for bit.

use std::path::Path;

use medtune::image::{self, Rgb8, clip::ClipPreprocess, pad};
use safetensors::SafeTensors;
use serde_json::Value;
use sha2::{Digest, Sha256};

use crate::parity::fixture::{self, Checks};

pub(super) fn check(checks: &mut Checks) {
    let root = fixture::root("llava_med");
    let cases = fixture::json(&root.join("golden/preprocess.json"));
    let bytes = std::fs::read(root.join("golden/preprocess.safetensors")).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let size = cases["image_size"].as_u64().unwrap() as usize;
    let file = root.join("vision_tower/preprocessor_config.json");
    let rules = ClipPreprocess::open(&file, size, true).unwrap();
    constants(checks, &cases, &rules);
    let images = cases["images"].as_object().unwrap();
    for (id, case) in images {
        let path = root.join(case["file"].as_str().unwrap());
        header(checks, id, case, &path);
        let image = image::open(&path).unwrap();
        checks.equal(&format!("{id} decoded"), hex(&image.data), case["decoded_rgb_sha256"].as_str().unwrap().into());
    }
    for name in tensors.names() {
        let (id, what) = name.split_once('.').unwrap();
        let path = root.join(images[id]["file"].as_str().unwrap());
        let view = tensors.tensor(name).unwrap();
        tensor(checks, name, what, &image::open(&path).unwrap(), &rules, view.shape(), view.data());
    }
}

fn constants(checks: &mut Checks, cases: &Value, rules: &ClipPreprocess) {
    let list =
        |key: &str| -> Vec<f32> { cases[key].as_array().unwrap().iter().map(|v| v.as_f64().unwrap() as f32).collect() };
    checks.equal("mean", rules.mean.to_vec(), list("image_mean"));
    checks.equal("std", rules.std.to_vec(), list("image_std"));
    checks.equal("factor", rules.rescale_factor, cases["rescale_factor"].as_f64().unwrap());
    let color = rules.pad_color.unwrap().map(f32::from).to_vec();
    checks.equal("pad colour", color, list("pad_color_rgb"));
    checks.equal("defaults", &ClipPreprocess::openai(rules.crop_size, true), rules);
}

fn header(checks: &mut Checks, id: &str, case: &Value, path: &Path) {
    checks.equal(&format!("{id} file"), hex(&std::fs::read(path).unwrap()), case["sha256"].as_str().unwrap().into());
    let probe = image::probe(path).unwrap();
    let number = |key: &str| case[key].as_u64().unwrap() as usize;
    checks.equal(&format!("{id} size"), (probe.width, probe.height), (number("width"), number("height")));
    let square = pad::to_square(&Rgb8::filled(probe.width, probe.height, [1; 3]), [0; 3], false);
    checks.equal(
        &format!("{id} square"),
        (square.width, square.height),
        (number("square_size"), number("square_size")),
    );
    let first = square.data.iter().position(|v| *v == 1).unwrap() / 3;
    let offset = match case["pad_axis"].as_str().unwrap() {
        "y" => first / square.width,
        "x" => first,
        _ => 0,
    };
    checks.equal(&format!("{id} offset"), offset, number("pad_offset_low"));
}

fn tensor(
    checks: &mut Checks,
    name: &str,
    what: &str,
    image: &Rgb8,
    rules: &ClipPreprocess,
    shape: &[usize],
    data: &[u8],
) {
    let unpadded = ClipPreprocess { pad_color: None, ..rules.clone() };
    let found = match what {
        "decoded_rgb" => image.clone(),
        "resized" => rules.square(image, false).unwrap(),
        "resized_offset_high" => rules.square(image, true).unwrap(),
        "nopad_resized" => unpadded.square(image, false).unwrap(),
        "pixel_values" => {
            let pixels = rules.apply(image).unwrap();
            checks.equal(&format!("{name} shape"), pixels.shape.to_vec(), shape.to_vec());
            let expected: Vec<f32> = data.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect();
            return checks.close(name, &pixels.data, &expected, 0.0);
        }
        // What the original makes of files that it did not convert to RGB; optional, and not wanted here.
        "raw_mode_resized" => return,
        // `resized_336`: at another size.
        other => {
            let side = other.strip_prefix("resized_").and_then(|s| s.parse().ok());
            let side = side.unwrap_or_else(|| panic!("{name}: a kind of tensor that no check covers"));
            ClipPreprocess::openai(side, true).square(image, false).unwrap()
        }
    };
    checks.equal(&format!("{name} shape"), vec![found.height, found.width, 3], shape.to_vec());
    let wrong = found.data.iter().zip(data).position(|(f, e)| f != e);
    checks.equal(&format!("{name}: first wrong byte"), wrong, None);
}

fn hex(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|b| format!("{b:02x}")).collect()
}
