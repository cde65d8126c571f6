//! Frames of compressed transfer syntaxes.

use dicom_pixeldata::PixelDecoder;

use super::{FRAMES, File, Frame, PIXELS, corrupt, number};
use crate::{
    error::{Error, Kind, Result},
    image::{
        MAX_PIXELS,
        jpeg::{self, JpegError},
        jpeg_ls,
    },
};

const JPEG_BASELINE: &str = "1.2.840.10008.1.2.4.50";
/// 8 or 12 bits.
const JPEG_EXTENDED: &str = "1.2.840.10008.1.2.4.51";
const JPEG_LS: &str = "1.2.840.10008.1.2.4.80";
const JPEG_LS_NEAR: &str = "1.2.840.10008.1.2.4.81";
const RLE: &str = "1.2.840.10008.1.2.5";

impl File<'_> {
    /// Values of a compressed frame whose samples take `allocated` bits.
    pub(super) fn encapsulated(&self, frame: usize, allocated: usize, out: &mut Frame) -> Result<()> {
        let stream = self.fragment(frame);
        match (self.syntax(), stream) {
            (JPEG_BASELINE, Some(stream)) if out.bits == 8 => self.jpeg(&stream, out),
            (JPEG_EXTENDED, Some(stream)) if out.bits == 8 => self.jpeg(&stream, out),
            (JPEG_EXTENDED, Some(stream)) => self.jpeg_12_bit(&stream, out),
            (JPEG_LS | JPEG_LS_NEAR, Some(stream)) => self.jpeg_ls(&stream, out),
            (RLE, Some(stream)) => self.rle(&stream, allocated, out),
            (JPEG_LS | JPEG_LS_NEAR | RLE, None) => {
                Err(corrupt(self.at).expected("one fragment a frame").found("fragments that do not match the frames"))
            }
            _ => self.other(frame, out),
        }
    }

    /// The stream of a compressed frame, where fragments and frames agree.
    fn fragment(&self, frame: usize) -> Option<Vec<u8>> {
        let fragments = self.element(PIXELS)?.value().fragments()?;
        match self.optional(FRAMES, "NumberOfFrames", 1).ok()? {
            0 | 1 => Some(fragments.concat()),
            frames if frames == fragments.len() => fragments.get(frame).cloned(),
            _ => None,
        }
    }

    /// An error of a decoder.
    fn failed(&self, name: &str, error: &JpegError) -> Error {
        match error {
            JpegError::Unsupported(what) => Error::new(Kind::Image, "a compressed DICOM frame cannot be decoded")
                .at(self.at)
                .found(format!("{}: {what}", syntax_name(self.syntax())))
                .help("convert it to an uncompressed transfer syntax, for example with gdcmconv --raw"),
            JpegError::Corrupt(what) => {
                corrupt(self.at).found(format!("a {name} frame that cannot be decoded: {what}"))
            }
            JpegError::Truncated => corrupt(self.at).found(format!("a {name} frame that is cut off")),
        }
    }

    /// Checks the size that a stream states of itself.
    fn sized(&self, name: &str, found: (usize, usize), out: &Frame) -> Result<()> {
        if found == (out.columns, out.rows) {
            return Ok(());
        }
        Err(corrupt(self.at)
            .expected(format!("{} x {} pixels, as the header states", out.columns, out.rows))
            .found(format!("a {name} frame of {} x {}", found.0, found.1)))
    }

    /// Checks the number of samples a pixel of a stream.
    fn sampled(&self, name: &str, channels: usize, out: &Frame) -> Result<()> {
        if channels == out.samples {
            return Ok(());
        }
        Err(corrupt(self.at).found(format!("a {name} frame of {channels} components")))
    }

    /// An 8-bit JPEG frame, decoded as all other JPEG files are. Three components without an Adobe marker are what the
    /// header says.
    fn jpeg(&self, stream: &[u8], out: &mut Frame) -> Result<()> {
        let failed = |e: JpegError| self.failed("JPEG", &e);
        self.sized("JPEG", jpeg::dimensions(stream).map_err(failed)?, out)?;
        let decoded = jpeg::decode_as(stream, out.photometric == "RGB").map_err(failed)?;
        self.sampled("JPEG", decoded.channels, out)?;
        out.values = decoded.data.into_iter().map(f64::from).collect();
        if out.samples == 3 {
            out.photometric = "RGB".into();
        }
        Ok(())
    }

    /// A JPEG frame of more than 8 bits.
    fn jpeg_12_bit(&self, stream: &[u8], out: &mut Frame) -> Result<()> {
        let failed = |e: JpegError| self.failed("JPEG", &e);
        self.sized("JPEG", jpeg::dimensions(stream).map_err(failed)?, out)?;
        let decoded = jpeg::decode_12_bit(stream).map_err(failed)?;
        self.sampled("JPEG", 1, out)?;
        out.values = decoded.into_iter().map(|v| number(v.into(), out.bits, out.signed)).collect();
        Ok(())
    }

    fn jpeg_ls(&self, stream: &[u8], out: &mut Frame) -> Result<()> {
        let decoded = jpeg_ls::decode(stream, MAX_PIXELS).map_err(|e| self.failed("JPEG-LS", &e))?;
        self.sized("JPEG-LS", (decoded.width, decoded.height), out)?;
        self.sampled("JPEG-LS", decoded.channels, out)?;
        out.values = decoded.data.into_iter().map(|v| number(v.into(), out.bits, out.signed)).collect();
        Ok(())
    }

    /// A run-length coded frame (DICOM PS3.5, annex G): a segment for each byte of a sample, the highest first.
    fn rle(&self, stream: &[u8], allocated: usize, out: &mut Frame) -> Result<()> {
        let bad = |what: String| corrupt(self.at).found(format!("an RLE frame with {what}"));
        let (pixels, width) = (out.rows * out.columns, allocated / 8);
        let words: Vec<usize> =
            stream.chunks_exact(4).take(16).map(|w| u32::from_le_bytes([w[0], w[1], w[2], w[3]]) as usize).collect();
        let segments = out.samples * width;
        if words.len() < 16 || words[0] != segments || !(1..=15).contains(&segments) {
            return Err(bad(format!("{} segments instead of {segments}", words.first().unwrap_or(&0))));
        }
        let mut values = vec![0u64; pixels * out.samples];
        for segment in 0..segments {
            let start = words[1 + segment];
            let end = if segment + 1 < segments { words[2 + segment] } else { stream.len() };
            let coded = stream.get(start.max(64)..end).ok_or_else(|| bad("segments outside of it".into()))?;
            let bytes = unpacked(coded, pixels).ok_or_else(|| bad("too little data".into()))?;
            let (sample, shift) = (segment / width, 8 * (width - 1 - segment % width));
            let samples = values.iter_mut().skip(sample).step_by(out.samples);
            samples.zip(bytes).for_each(|(value, byte)| *value |= u64::from(byte) << shift);
        }
        out.values = values.into_iter().map(|v| number(v, out.bits, out.signed)).collect();
        Ok(())
    }

    /// A frame of one of the transfer syntaxes that a library decodes.
    fn other(&self, frame: usize, out: &mut Frame) -> Result<()> {
        let number_of = u32::try_from(frame).map_err(|_| corrupt(self.at))?;
        let decoded = self.object.decode_pixel_data_frame(number_of).map_err(|e| {
            let supported = !e.to_string().to_lowercase().contains("unsupported");
            let what = if supported {
                "a compressed DICOM frame cannot be decoded"
            } else {
                "no decoder for a DICOM transfer syntax"
            };
            Error::new(Kind::Image, what)
                .at(self.at)
                .found(syntax_name(self.syntax()))
                .help(if supported {
                    "fetch the file again, or convert it (gdcmconv --raw)"
                } else {
                    "convert it to an uncompressed transfer syntax, for example with gdcmconv --raw"
                })
                .source(e)
        })?;
        let count = out.rows * out.columns * out.samples;
        let bytes = decoded.data();
        let width = usize::from(decoded.bits_allocated()).div_ceil(8);
        if bytes.len() < count * width {
            return Err(self.cut(bytes.len(), count * width));
        }
        let value = |i: usize| match width {
            1 => u64::from(bytes[i]),
            2 => u64::from(u16::from_le_bytes([bytes[2 * i], bytes[2 * i + 1]])),
            _ => u64::from(u32::from_le_bytes(std::array::from_fn(|k| bytes[4 * i + k]))),
        };
        out.values = (0..count).map(|i| number(value(i), out.bits, out.signed)).collect();
        out.photometric = decoded.photometric_interpretation().as_str().trim().to_string();
        Ok(())
    }
}

/// `length` bytes from their PackBits form; nothing if there are fewer.
fn unpacked(mut coded: &[u8], length: usize) -> Option<Vec<u8>> {
    let mut bytes = Vec::with_capacity(length);
    while bytes.len() < length {
        let (&head, rest) = coded.split_first()?;
        let used = match head {
            0..=127 => {
                let run = rest.get(..usize::from(head) + 1)?;
                bytes.extend_from_slice(run);
                run.len()
            }
            128 => 0,
            129..=255 => {
                bytes.extend(std::iter::repeat_n(*rest.first()?, 257 - usize::from(head)));
                1
            }
        };
        coded = &rest[used..];
    }
    bytes.truncate(length);
    Some(bytes)
}

/// The name of a transfer syntax with its UID.
fn syntax_name(uid: &str) -> String {
    let name = match uid {
        JPEG_BASELINE => "JPEG baseline",
        JPEG_EXTENDED => "JPEG extended, 8 or 12 bits",
        "1.2.840.10008.1.2.4.57" | "1.2.840.10008.1.2.4.70" => "JPEG lossless",
        JPEG_LS => "JPEG-LS lossless",
        JPEG_LS_NEAR => "JPEG-LS near-lossless",
        "1.2.840.10008.1.2.4.90" => "JPEG 2000 lossless",
        "1.2.840.10008.1.2.4.91" => "JPEG 2000",
        RLE => "RLE lossless",
        _ => "transfer syntax",
    };
    format!("{name} ({uid})")
}

#[cfg(test)]
mod tests {
    use super::unpacked;

    #[test]
    fn runs_are_unpacked_and_cut_ones_noticed() {
        // The example of the PackBits description: literals, repeats, and a byte without meaning.
        let coded = [0xFE, 0xAA, 0x02, 0x80, 0x00, 0x2A, 0x80, 0xFD, 0xAA, 0x03, 0x80, 0x00, 0x2A, 0x22, 0xF7, 0xAA];
        let mut expected = vec![0xAA; 3];
        expected.extend([0x80, 0x00, 0x2A, 0xAA, 0xAA, 0xAA, 0xAA, 0x80, 0x00, 0x2A, 0x22]);
        expected.extend([0xAA; 10]);
        assert_eq!(unpacked(&coded, expected.len()).unwrap(), expected);
        assert_eq!(unpacked(&coded, 5).unwrap(), expected[..5]);
        assert!((0..coded.len()).all(|cut| unpacked(&coded[..cut], expected.len()).is_none()));
    }
}
