//! Files to RGB, as Pillow's `Image.open(..).convert("RGB")` does it.
//!
//! Orientation tags are ignored, alpha is dropped, 16-bit grey is cut at 255, other 16-bit samples keep their high
//! byte, CMYK becomes RGB by Pillow's plain formula. What a file is follows from its content, never from its name.
//! JPEG and PNG are bit-exact; lossy WebP may differ from libwebp by rounding.

use std::{fs, io::Cursor, path::Path};

use image::{ColorType, ImageDecoder, ImageError, ImageFormat, ImageReader};

use super::{
    Rgb8, dicom,
    jpeg::{self, JpegError},
};
use crate::error::{Error, Kind, Result};

/// Largest number of pixels that is decoded; Pillow's limit against decompression bombs.
pub const MAX_PIXELS: u64 = 178_956_970;

/// What [`probe`] found out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Probe {
    /// Columns.
    pub width: usize,
    /// Rows.
    pub height: usize,
    /// Format by content, for example `jpeg`.
    pub format: &'static str,
}

/// Reads and decodes a file.
///
/// # Errors
/// A file that is missing, unreadable, not an image, truncated, corrupt, of an unsupported kind, or larger than
/// [`MAX_PIXELS`].
pub fn open(path: impl AsRef<Path>) -> Result<Rgb8> {
    let path = path.as_ref();
    decode(&read(path)?, &path.display().to_string())
}

/// Decodes a file and returns what it is; the pixels are dropped.
///
/// # Errors
/// As [`open`].
pub fn probe(path: impl AsRef<Path>) -> Result<Probe> {
    let path = path.as_ref();
    let bytes = read(path)?;
    let at = path.display().to_string();
    let image = decode(&bytes, &at)?;
    if dicom::is_dicom(&bytes) {
        return Ok(Probe { width: image.width, height: image.height, format: "dicom" });
    }
    let format = format_of(&bytes, &at)?;
    let format = format.extensions_str().first().copied().unwrap_or("unknown");
    Ok(Probe { width: image.width, height: image.height, format: if format == "jpg" { "jpeg" } else { format } })
}

/// Decodes the content of a file; `at` names it in errors.
///
/// # Errors
/// As [`open`], without those of reading.
pub fn decode(bytes: &[u8], at: &str) -> Result<Rgb8> {
    if dicom::is_dicom(bytes) {
        return Ok(dicom::decode(bytes, 0, at)?.0);
    }
    match format_of(bytes, at)? {
        ImageFormat::Jpeg => decode_jpeg(bytes, at),
        format => decode_other(bytes, format, at),
    }
}

fn read(path: &Path) -> Result<Vec<u8>> {
    fs::read(path).map_err(|e| {
        let what = match e.kind() {
            std::io::ErrorKind::NotFound => "an image file does not exist",
            _ => "an image file cannot be read",
        };
        Error::new(Kind::Image, what).at(path.display()).help("check the path of the image in the data set").source(e)
    })
}

fn format_of(bytes: &[u8], at: &str) -> Result<ImageFormat> {
    image::guess_format(bytes).map_err(|_| {
        let found = if bytes.is_empty() { "an empty file" } else { "something else" };
        Error::new(Kind::Image, "a file is not an image")
            .at(at)
            .expected("JPEG, PNG, BMP, GIF, TIFF, WebP, PNM or DICOM")
            .found(found)
            .help("replace the file, or leave its rows out")
    })
}

fn check_size(width: usize, height: usize, at: &str) -> Result<()> {
    if width == 0 || height == 0 {
        return Err(corrupt(at).found(format!("a size of {width} x {height} pixels")));
    }
    if (width as u64).saturating_mul(height as u64) > MAX_PIXELS {
        return Err(Error::new(Kind::Image, "an image is too large to decode")
            .at(at)
            .expected(format!("at most {MAX_PIXELS} pixels"))
            .found(format!("{width} x {height} in its header"))
            .help("scale the image down, or leave its rows out"));
    }
    Ok(())
}

fn corrupt(at: &str) -> Error {
    Error::new(Kind::Image, "an image file is corrupt").at(at).help("fetch the file again, or leave its rows out")
}

fn truncated(at: &str) -> Error {
    Error::new(Kind::Image, "an image file is truncated").at(at).help("fetch the file again, or leave its rows out")
}

fn jpeg_error(error: JpegError, at: &str) -> Error {
    match error {
        JpegError::Truncated => truncated(at),
        JpegError::Corrupt(detail) => corrupt(at).found(detail),
        JpegError::Unsupported(detail) => Error::new(Kind::Image, "a kind of JPEG that cannot be read")
            .at(at)
            .found(detail)
            .help("convert the image to PNG or to an ordinary JPEG"),
    }
}

fn decode_jpeg(bytes: &[u8], at: &str) -> Result<Rgb8> {
    let (width, height) = jpeg::dimensions(bytes).map_err(|e| jpeg_error(e, at))?;
    check_size(width, height, at)?;
    let jpeg = jpeg::decode(bytes).map_err(|e| jpeg_error(e, at))?;
    let data = match jpeg.channels {
        1 => pixels(&jpeg.data, |[v]| [*v; 3]),
        3 => jpeg.data,
        _ => pixels(&jpeg.data, cmyk_to_rgb),
    };
    Ok(Rgb8 { width, height, data })
}

/// The pixels of an image, of `N` bytes each, as `rgb` has them.
fn pixels<const N: usize>(raw: &[u8], rgb: impl Fn(&[u8; N]) -> [u8; 3]) -> Vec<u8> {
    raw.as_chunks().0.iter().map(rgb).collect::<Vec<_>>().into_flattened()
}

/// Pillow's conversion of CMYK, of which JPEG files are taken to hold the inverse, as Adobe writes it.
fn cmyk_to_rgb(stored: &[u8; 4]) -> [u8; 3] {
    let white = u32::from(stored[3]);
    std::array::from_fn(|i| {
        let product = u32::from(255 - stored[i]) * white + 128;
        white.saturating_sub((product + (product >> 8)) >> 8) as u8
    })
}

fn decode_other(bytes: &[u8], format: ImageFormat, at: &str) -> Result<Rgb8> {
    let fail = |e: ImageError| match &e {
        ImageError::IoError(io) if io.kind() == std::io::ErrorKind::UnexpectedEof => truncated(at).source(e),
        ImageError::Unsupported(_) => Error::new(Kind::Image, "a kind of image that cannot be read")
            .at(at)
            .found(&e)
            .help("convert the image to PNG")
            .source(e),
        _ => corrupt(at).found(&e).source(e),
    };
    let mut reader = ImageReader::with_format(Cursor::new(bytes), format);
    // The size is checked below; the decoders' own limit on allocations would refuse legal images.
    reader.no_limits();
    let decoder = reader.into_decoder().map_err(fail)?;
    let (width, height) = decoder.dimensions();
    let (width, height) = (width as usize, height as usize);
    check_size(width, height, at)?;
    let color = decoder.color_type();
    let mut raw = vec![0u8; width * height * usize::from(color.bytes_per_pixel())];
    decoder.read_image(&mut raw).map_err(fail)?;
    let data = to_rgb(raw, color).ok_or_else(|| {
        Error::new(Kind::Image, "a kind of image that cannot be read")
            .at(at)
            .found(format!("{color:?} samples"))
            .help("convert the image to 8-bit PNG")
    })?;
    Ok(Rgb8 { width, height, data })
}

fn to_rgb(raw: Vec<u8>, color: ColorType) -> Option<Vec<u8>> {
    let wide = |bytes: [u8; 2]| u16::from_ne_bytes(bytes);
    let high = |bytes: [u8; 2]| (wide(bytes) >> 8) as u8;
    Some(match color {
        ColorType::L8 => pixels(&raw, |[v]| [*v; 3]),
        ColorType::La8 => pixels(&raw, |[v, _]| [*v; 3]),
        ColorType::Rgb8 => raw,
        ColorType::Rgba8 => pixels(&raw, |[r, g, b, _]| [*r, *g, *b]),
        ColorType::L16 => pixels(&raw, |v| [wide(*v).min(255) as u8; 3]),
        ColorType::La16 => pixels(&raw, |[a, b, _, _]| [high([*a, *b]); 3]),
        ColorType::Rgb16 => pixels(&raw, |[a, b, c, d, e, f]| [[*a, *b], [*c, *d], [*e, *f]].map(high)),
        ColorType::Rgba16 => pixels(&raw, |[a, b, c, d, e, f, _, _]| [[*a, *b], [*c, *d], [*e, *f]].map(high)),
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use image::{DynamicImage, GrayImage, ImageBuffer, Luma, LumaA, Rgb, RgbImage};
    use rand::{RngExt, SeedableRng};

    use super::*;

    fn picture() -> RgbImage {
        RgbImage::from_fn(40, 30, |x, y| Rgb([(x * 6) as u8, (y * 8) as u8, ((x * y) % 256) as u8]))
    }

    fn encode(image: &DynamicImage, format: ImageFormat) -> Vec<u8> {
        let mut out = Cursor::new(Vec::new());
        image.write_to(&mut out, format).unwrap();
        out.into_inner()
    }

    fn message(bytes: &[u8]) -> String {
        decode(bytes, "x.png").unwrap_err().to_string()
    }

    #[test]
    fn png_comes_back_and_alpha_is_dropped() {
        let rgb = picture();
        assert_eq!(decode(&encode(&rgb.clone().into(), ImageFormat::Png), "x").unwrap().data, *rgb.as_raw());
        let rgba = DynamicImage::from(rgb.clone()).to_rgba8();
        let clear = ImageBuffer::from_fn(40, 30, |x, y| {
            let mut p = *rgba.get_pixel(x, y);
            p.0[3] = 0;
            p
        });
        let bytes = encode(&DynamicImage::ImageRgba8(clear), ImageFormat::Png);
        assert_eq!(decode(&bytes, "x").unwrap().data, *rgb.as_raw());
    }

    #[test]
    fn sixteen_bit_gray_is_cut_and_the_rest_keeps_its_high_byte() {
        let gray: ImageBuffer<Luma<u16>, _> = ImageBuffer::from_vec(2, 1, vec![200u16, 3000]).unwrap();
        let bytes = encode(&DynamicImage::ImageLuma16(gray), ImageFormat::Png);
        assert_eq!(decode(&bytes, "x").unwrap().data, [200, 200, 200, 255, 255, 255]);
        let alpha: ImageBuffer<LumaA<u16>, _> = ImageBuffer::from_vec(1, 1, vec![0x1234u16, 7]).unwrap();
        let bytes = encode(&DynamicImage::ImageLumaA16(alpha), ImageFormat::Png);
        assert_eq!(decode(&bytes, "x").unwrap().data, [0x12; 3]);
    }

    #[test]
    fn a_gray_jpeg_is_gray_and_what_a_file_is_follows_from_its_content() {
        let gray = GrayImage::from_fn(33, 17, |x, _| Luma([(x * 7) as u8]));
        let file = tempfile::Builder::new().suffix(".png").tempfile().unwrap();
        std::fs::write(file.path(), encode(&gray.clone().into(), ImageFormat::Jpeg)).unwrap();
        let found = probe(file.path()).unwrap();
        assert_eq!(found, Probe { width: 33, height: 17, format: "jpeg" });
        let image = open(file.path()).unwrap();
        for (pixel, real) in image.data.chunks(3).zip(gray.as_raw()) {
            assert!(pixel[0] == pixel[1] && pixel[1] == pixel[2] && pixel[0].abs_diff(*real) < 20);
        }
    }

    #[test]
    fn every_cut_of_a_file_is_an_error() {
        for format in [ImageFormat::Jpeg, ImageFormat::Png, ImageFormat::Bmp] {
            let bytes = encode(&picture().into(), format);
            for length in (16..bytes.len() - 16).step_by(13) {
                let error = decode(&bytes[..length], "x").expect_err("a cut file");
                assert_eq!(error.kind(), Kind::Image, "{format:?} cut to {length}");
            }
            let half = message(&bytes[..bytes.len() / 2]);
            assert!(half.contains("truncated at x.png"), "{format:?}: {half}");
        }
    }

    #[test]
    fn a_cut_jpeg_with_an_end_marker_is_still_an_error() {
        let bytes = encode(&picture().into(), ImageFormat::Jpeg);
        let cut = [&bytes[..bytes.len() * 2 / 3], &[0xFF, 0xD9]].concat();
        assert!(message(&cut).contains("ends early"), "{}", message(&cut));
    }

    #[test]
    fn a_header_that_claims_too_much_is_refused_before_any_allocation() {
        let mut jpeg = encode(&picture().into(), ImageFormat::Jpeg);
        let frame = jpeg.windows(2).position(|w| w == [0xFF, 0xC0]).unwrap();
        jpeg[frame + 5..frame + 9].copy_from_slice(&[0x9C, 0x40, 0x9C, 0x40]);
        let mut bmp = encode(&picture().into(), ImageFormat::Bmp);
        bmp[18..26].copy_from_slice(&[0x40, 0x9C, 0, 0, 0x40, 0x9C, 0, 0]);
        for bytes in [jpeg, bmp, png_header(40_000, 40_000)] {
            let text = message(&bytes);
            assert!(text.contains("178956970 pixels") && text.contains("40000 x 40000"), "{text}");
        }
    }

    fn png_header(width: u32, height: u32) -> Vec<u8> {
        let mut head = [b"IHDR".as_slice(), &width.to_be_bytes(), &height.to_be_bytes(), &[8, 2, 0, 0, 0]].concat();
        let mut crc = u32::MAX;
        for byte in &head {
            crc ^= u32::from(*byte);
            for _ in 0..8 {
                crc = if crc & 1 == 1 { crc >> 1 ^ 0xEDB8_8320 } else { crc >> 1 };
            }
        }
        head.extend((!crc).to_be_bytes());
        [b"\x89PNG\r\n\x1a\n\0\0\0\x0d".as_slice(), &head, b"\0\0\0\0IDAT\x35\xaf\x06\x1e"].concat()
    }

    #[test]
    fn missing_files_and_other_files_are_named() {
        assert!(open("no/such.png").unwrap_err().to_string().contains("does not exist at no/such.png"));
        assert!(message(b"<html>").contains("not an image"));
        assert!(message(b"").contains("an empty file"));
        let cmyk = cmyk_to_rgb(&[255, 255, 255, 255]);
        assert_eq!((cmyk, cmyk_to_rgb(&[0, 128, 255, 128])), ([255; 3], [0, 64, 128]));
    }

    #[test]
    fn damaged_files_never_panic() {
        let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(1);
        for format in [ImageFormat::Jpeg, ImageFormat::Png, ImageFormat::Gif, ImageFormat::Bmp, ImageFormat::WebP] {
            let bytes = encode(&picture().into(), format);
            for _ in 0..400 {
                let mut damaged = bytes.clone();
                for _ in 0..rng.random_range(1..6) {
                    let at = rng.random_range(0..damaged.len());
                    damaged[at] = rng.random();
                }
                if let Ok(image) = decode(&damaged, "x") {
                    assert_eq!(image.data.len(), image.width * image.height * 3);
                }
            }
        }
    }
}
