//! CLIP's image preprocessing, as `preprocessor_config.json` describes it, with LLaVA's padding to a square.

use std::path::Path;

use serde::Deserialize;
use serde_json::{Value, json};

use super::{
    MAX_PIXELS, Rgb8, pad,
    resize::{Filter, resize},
};
use crate::{
    error::{Error, Kind, Result},
    vlm::Pixels,
};

/// How an image becomes the input of a CLIP vision tower.
#[derive(Debug, Clone, PartialEq)]
pub struct ClipPreprocess {
    /// Length of the shorter side after resizing; none leaves the size as it is.
    pub size: Option<usize>,
    /// Side of the square that is cut out of the middle.
    pub crop_size: usize,
    /// Kernel.
    pub filter: Filter,
    /// What samples are multiplied with first.
    pub rescale_factor: f64,
    /// Subtracted, by channel.
    pub mean: [f32; 3],
    /// Divided by, by channel.
    pub std: [f32; 3],
    /// Colour that fills images to a square; none crops them instead.
    pub pad_color: Option<[u8; 3]>,
}

/// `preprocessor_config.json`, old and new style.
#[derive(Debug, Deserialize)]
#[serde(default)]
struct File {
    do_resize: bool,
    do_center_crop: bool,
    do_rescale: bool,
    do_normalize: bool,
    size: Value,
    crop_size: Value,
    resample: u64,
    rescale_factor: f64,
    image_mean: [f64; 3],
    image_std: [f64; 3],
}

impl Default for File {
    fn default() -> Self {
        Self {
            do_resize: true,
            do_center_crop: true,
            do_rescale: true,
            do_normalize: true,
            size: json!(224),
            crop_size: json!(224),
            resample: 3,
            rescale_factor: 1.0 / 255.0,
            image_mean: [0.48145466, 0.4578275, 0.40821073],
            image_std: [0.26862954, 0.26130258, 0.27577711],
        }
    }
}

impl ClipPreprocess {
    /// OpenAI's constants for a tower with inputs of `image_size` pixels.
    #[must_use]
    pub fn openai(image_size: usize, pad: bool) -> Self {
        let file = File { size: json!(image_size), crop_size: json!(image_size), ..File::default() };
        Self::from_file(&file, image_size, pad).expect("the defaults are what this function accepts")
    }

    /// Reads `preprocessor_config.json` of a tower with inputs of `image_size` pixels.
    ///
    /// # Errors
    /// An unreadable file, or one that asks for something else than resizing, cropping and normalising to that size.
    pub fn open(path: &Path, image_size: usize, pad: bool) -> Result<Self> {
        let text = std::fs::read_to_string(path).map_err(|e| Error::io(path, e))?;
        let file: File = serde_json::from_str(&text).map_err(|e| {
            Error::new(Kind::Checkpoint, "cannot read a preprocessor_config.json").at(path.display()).source(e)
        })?;
        Self::from_file(&file, image_size, pad).map_err(|e| e.at(path.display()))
    }

    fn from_file(file: &File, image_size: usize, pad: bool) -> Result<Self> {
        let refuse = |key: &str, expected: String, found: &dyn std::fmt::Display| {
            Error::new(Kind::Checkpoint, format!("unsupported {key} in a preprocessor_config.json"))
                .expected(expected)
                .found(found)
                .help("use the preprocessor_config.json that belongs to the vision tower")
        };
        for (key, on) in [
            ("do_center_crop", file.do_center_crop),
            ("do_rescale", file.do_rescale),
            ("do_normalize", file.do_normalize),
        ] {
            if !on {
                return Err(refuse(key, "true".into(), &on));
            }
        }
        let filter =
            Filter::from_pillow(file.resample).ok_or_else(|| refuse("resample", "1, 2 or 3".into(), &file.resample))?;
        let crop_size = side(&file.crop_size, &["height", "width"]);
        if crop_size != Some(image_size) {
            return Err(refuse("crop_size", format!("the tower's image_size {image_size}"), &file.crop_size));
        }
        let size = side(&file.size, &["shortest_edge"]);
        if file.do_resize && size.is_none() {
            return Err(refuse("size", "a number of pixels or a shortest_edge".into(), &file.size));
        }
        Ok(Self {
            size: size.filter(|_| file.do_resize),
            crop_size: image_size,
            filter,
            rescale_factor: file.rescale_factor,
            mean: file.image_mean.map(|v| v as f32),
            std: file.image_std.map(|v| v as f32),
            // Truncated, as in the original: 122, 116, 104 for OpenAI's mean.
            pad_color: pad.then(|| file.image_mean.map(|v| (v * 255.0) as u8)),
        })
    }

    /// Pads, resizes and crops; `high` moves the padded image by one pixel (see [`pad::to_square`]).
    ///
    /// # Errors
    /// An image so thin that padding or resizing it would take more than [`MAX_PIXELS`].
    pub fn square(&self, image: &Rgb8, high: bool) -> Result<Rgb8> {
        self.check_shape(image)?;
        let padded = match self.pad_color {
            Some(color) => pad::to_square(image, color, high),
            None => image.clone(),
        };
        let image = if padded.height == 3 { transposed(&padded) } else { padded };
        let resized = match self.size {
            Some(size) => {
                let (width, height) = pad::shortest_edge(image.width, image.height, size);
                resize(&image, width, height, self.filter)
            }
            None => image,
        };
        Ok(pad::center_crop(&resized, self.crop_size))
    }

    fn check_shape(&self, image: &Rgb8) -> Result<()> {
        let (long, short) = (image.width.max(image.height) as u64, image.width.min(image.height) as u64);
        let pixels = match (self.pad_color, self.size) {
            (Some(_), _) => long.saturating_mul(long),
            (None, Some(size)) => (size as u64).saturating_mul(size as u64).saturating_mul(long) / short.max(1),
            (None, None) => 0,
        };
        if pixels <= MAX_PIXELS {
            return Ok(());
        }
        Err(Error::new(Kind::Image, "an image is too thin to be made square")
            .expected(format!("at most {MAX_PIXELS} pixels on the way"))
            .found(format!("{pixels} for {} x {}", image.width, image.height))
            .help("cut the image into parts, or leave its rows out"))
    }

    /// The whole way to the input of the tower.
    ///
    /// # Shapes
    /// `[3, crop_size, crop_size]`
    ///
    /// # Errors
    /// As [`ClipPreprocess::square`].
    pub fn apply(&self, image: &Rgb8) -> Result<Pixels> {
        let square = self.square(image, false)?;
        Ok(Pixels {
            data: pad::normalize(&square, self.rescale_factor, self.mean, self.std),
            shape: [3, square.height, square.width],
        })
    }

    /// Everything that decides how an image becomes numbers.
    #[must_use]
    pub fn signature(&self) -> Value {
        json!({
            "size": self.size,
            "crop_size": self.crop_size,
            "filter": format!("{:?}", self.filter).to_lowercase(),
            "rescale_factor": self.rescale_factor,
            "mean": self.mean,
            "std": self.std,
            "pad_color": self.pad_color,
        })
    }
}

fn side(value: &Value, keys: &[&str]) -> Option<usize> {
    let number = |v: &Value| v.as_u64().filter(|n| *n > 0).map(|n| n as usize);
    match value {
        Value::Object(object) if object.len() == keys.len() => {
            let sides: Vec<usize> = keys.iter().map(|k| object.get(*k).and_then(number)).collect::<Option<_>>()?;
            sides.iter().all(|s| *s == sides[0]).then(|| sides[0])
        }
        other => number(other),
    }
}

/// An image of three rows read as if its rows were its channels: transformers guesses the channel axis from the shape,
/// and the models were trained on what it guesses.
fn transposed(image: &Rgb8) -> Rgb8 {
    let mut out = Rgb8::filled(3, image.width, [0; 3]);
    for (i, sample) in out.data.iter_mut().enumerate() {
        let (x, channel, row) = (i / 9, i / 3 % 3, i % 3);
        *sample = image.data[(row * image.width + x) * 3 + channel];
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn old_and_new_files_mean_the_same() {
        let old: File = serde_json::from_value(json!({"size": 56, "crop_size": 56})).unwrap();
        let new: File = serde_json::from_value(
            json!({"size": {"shortest_edge": 56}, "crop_size": {"height": 56, "width": 56}, "do_rescale": true}),
        )
        .unwrap();
        let read = |file| ClipPreprocess::from_file(file, 56, true).unwrap();
        assert_eq!(read(&old), read(&new));
        assert_eq!(read(&old), ClipPreprocess::openai(56, true));
        assert_eq!(read(&old).pad_color, Some([122, 116, 104]));
        let error = ClipPreprocess::from_file(&old, 64, true).unwrap_err().to_string();
        assert!(
            error.contains("crop_size") && error.contains("image_size 64") && error.contains("found 56"),
            "{error}"
        );
    }

    #[test]
    fn output_has_the_size_of_the_tower() {
        for pad in [true, false] {
            let rules = ClipPreprocess::openai(8, pad);
            for (width, height) in [(1, 1), (3, 3), (20, 3), (3, 20), (9, 40), (8, 8)] {
                let out = rules.apply(&Rgb8::filled(width, height, [1, 2, 3])).unwrap();
                assert_eq!((out.shape, out.data.len()), ([3, 8, 8], 192), "{width}x{height} {pad}");
            }
            let thin = Rgb8::filled(1, 3_000_000, [0; 3]);
            assert!(rules.apply(&thin).unwrap_err().to_string().contains("1 x 3000000"));
        }
    }
}
