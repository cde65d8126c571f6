//! JPEG, bit for bit as libjpeg-turbo (and so Pillow) decodes it: accurate integer inverse DCT, triangle-filter
//! chroma upsampling, 16-bit fixed-point colour conversion.
//!
//! Baseline, extended and progressive files with 8-bit samples and Huffman coding. Unlike libjpeg, which fills in
//! grey and goes on, corrupt or missing data is an error.

mod color;
mod entropy;
mod huffman;
mod idct;
mod upsample;

use color::ColorSpace;
use entropy::Scan;
use huffman::Table;

/// Why a file could not be decoded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum JpegError {
    /// The data ends before the image does.
    Truncated,
    /// The data contradicts the standard.
    Corrupt(&'static str),
    /// Legal, but not a kind that is read here.
    Unsupported(&'static str),
}

type Result<T> = std::result::Result<T, JpegError>;

/// Samples as they are in the file, interleaved.
pub(crate) struct Jpeg {
    /// 1 grey, 3 RGB, 4 CMYK as stored by Adobe (inverted).
    pub(crate) channels: usize,
    /// Row-major `[height, width, channels]`.
    pub(crate) data: Vec<u8>,
}

/// A colour plane.
struct Component {
    id: u8,
    h: usize,
    v: usize,
    table: usize,
    /// Size of the real samples.
    width: usize,
    height: usize,
    /// Blocks in a line of the padded plane, whole MCUs.
    blocks_wide: usize,
    /// Coefficients of progressive files, `[.., blocks_wide, 64]`, natural order.
    coefficients: Vec<i16>,
    /// Samples, `[.., blocks_wide * 8]`.
    plane: Vec<u8>,
    /// The quantiser in force when the component's first scan began.
    quant: Option<[u16; 64]>,
    /// Low bits of each coefficient, zigzag order, that no scan has brought yet.
    missing_bits: [u8; 64],
}

impl Component {
    fn stride(&self) -> usize {
        self.blocks_wide * 8
    }
}

struct Frame {
    progressive: bool,
    width: usize,
    height: usize,
    h_max: usize,
    v_max: usize,
    components: Vec<Component>,
}

impl Frame {
    fn mcus_wide(&self) -> usize {
        self.width.div_ceil(8 * self.h_max)
    }

    fn mcus_high(&self) -> usize {
        self.height.div_ceil(8 * self.v_max)
    }
}

/// Zigzag position to natural position.
const NATURAL: [u8; 64] = [
    0, 1, 8, 16, 9, 2, 3, 10, 17, 24, 32, 25, 18, 11, 4, 5, 12, 19, 26, 33, 40, 48, 41, 34, 27, 20, 13, 6, 7, 14, 21,
    28, 35, 42, 49, 56, 57, 50, 43, 36, 29, 22, 15, 23, 30, 37, 44, 51, 58, 59, 52, 45, 38, 31, 39, 46, 53, 60, 61, 54,
    47, 55, 62, 63,
];

/// More scans than any encoder writes; a bound on the work that a small hostile file can ask for.
const MAX_SCANS: usize = 500;

#[derive(Default)]
struct Decoder<'a> {
    data: &'a [u8],
    at: usize,
    quant: [Option<[u16; 64]>; 4],
    dc: [Option<Table>; 4],
    ac: [Option<Table>; 4],
    restart: usize,
    jfif: bool,
    adobe: Option<u8>,
    /// Three components are RGB unless an Adobe marker says otherwise.
    rgb: bool,
    frame: Option<Frame>,
    scans: usize,
}

/// Width and height from the frame header, without decoding.
pub(crate) fn dimensions(data: &[u8]) -> Result<(usize, usize)> {
    let mut decoder = Decoder { data, ..Decoder::default() };
    loop {
        let (marker, segment) = decoder.segment()?;
        match marker {
            0xC0..=0xC3 | 0xC5..=0xC7 | 0xC9..=0xCB | 0xCD..=0xCF => {
                let size = segment.get(1..5).ok_or(JpegError::Corrupt("short frame header"))?;
                let (h, w) = (u16::from_be_bytes([size[0], size[1]]), u16::from_be_bytes([size[2], size[3]]));
                return Ok((w.into(), h.into()));
            }
            0xD9 | 0xDA => return Err(JpegError::Corrupt("no frame header before the image data")),
            _ => {}
        }
    }
}

/// Decodes the whole file.
pub(crate) fn decode(data: &[u8]) -> Result<Jpeg> {
    decode_as(data, false)
}

/// Decodes a stream whose container says whether three components are `rgb`; an Adobe marker still decides.
pub(crate) fn decode_as(data: &[u8], rgb: bool) -> Result<Jpeg> {
    let mut decoder = Decoder { data, rgb, ..Decoder::default() };
    loop {
        let (marker, segment) = decoder.segment()?;
        match marker {
            0xC0..=0xC2 => decoder.start_of_frame(marker, segment)?,
            0xC4 => decoder.huffman_tables(segment)?,
            0xC3 | 0xC5..=0xC7 | 0xCD..=0xCF => {
                return Err(JpegError::Unsupported("lossless and hierarchical JPEG are not supported"));
            }
            0xC9..=0xCB => return Err(JpegError::Unsupported("arithmetic coding is not supported")),
            0xDB => decoder.quantisers(segment)?,
            0xDD => {
                let [high, low] = *segment else { return Err(JpegError::Corrupt("bad restart interval")) };
                decoder.restart = usize::from(u16::from_be_bytes([high, low]));
            }
            0xE0 if segment.len() >= 14 && segment.starts_with(b"JFIF\0") => decoder.jfif = true,
            0xEE if segment.len() >= 12 && segment.starts_with(b"Adobe") => decoder.adobe = Some(segment[11]),
            0xDA => decoder.scan(segment)?,
            0xD9 => break,
            _ => {}
        }
    }
    decoder.finish()
}

impl<'a> Decoder<'a> {
    /// The next marker and its segment; the segment of SOI, EOI and RST is empty.
    fn segment(&mut self) -> Result<(u8, &'a [u8])> {
        let marker = loop {
            let skipped = self.data[self.at..].iter().position(|b| *b == 0xFF).ok_or(JpegError::Truncated)?;
            self.at += skipped + 1;
            match self.data.get(self.at) {
                None => return Err(JpegError::Truncated),
                // A stuffed zero or a fill byte is not a marker.
                Some(0x00 | 0xFF) => {}
                Some(&marker) => break marker,
            }
        };
        self.at += 1;
        if matches!(marker, 0x01 | 0xD0..=0xD9) {
            return Ok((marker, &[]));
        }
        let head = self.data.get(self.at..self.at + 2).ok_or(JpegError::Truncated)?;
        let length = usize::from(u16::from_be_bytes([head[0], head[1]]));
        if length < 2 {
            return Err(JpegError::Corrupt("bad segment length"));
        }
        let segment = self.data.get(self.at + 2..self.at + length).ok_or(JpegError::Truncated)?;
        self.at += length;
        Ok((marker, segment))
    }

    fn quantisers(&mut self, mut segment: &[u8]) -> Result<()> {
        const BAD: JpegError = JpegError::Corrupt("bad quantisation table");
        while let Some((&head, rest)) = segment.split_first() {
            let (wide, slot) = (head >> 4, usize::from(head & 15));
            let size = if wide == 0 { 64 } else { 128 };
            if wide > 1 || slot > 3 || rest.len() < size {
                return Err(BAD);
            }
            let mut table = [0u16; 64];
            for (k, &to) in NATURAL.iter().enumerate() {
                table[usize::from(to)] = match wide {
                    0 => u16::from(rest[k]),
                    _ => u16::from_be_bytes([rest[2 * k], rest[2 * k + 1]]),
                };
            }
            self.quant[slot] = Some(table);
            segment = &rest[size..];
        }
        Ok(())
    }

    fn huffman_tables(&mut self, mut segment: &[u8]) -> Result<()> {
        const BAD: JpegError = JpegError::Corrupt("bad Huffman table");
        while !segment.is_empty() {
            let head = segment[0];
            let (class, slot) = (head >> 4, usize::from(head & 15));
            let counts: &[u8; 16] = segment.get(1..17).and_then(|c| c.try_into().ok()).ok_or(BAD)?;
            let symbols: usize = counts.iter().map(|c| usize::from(*c)).sum();
            let values = segment.get(17..17 + symbols).ok_or(BAD)?;
            if class > 1 || slot > 3 {
                return Err(BAD);
            }
            let table = Table::new(counts, values)?;
            match class {
                0 => self.dc[slot] = Some(table),
                _ => self.ac[slot] = Some(table),
            }
            segment = &segment[17 + symbols..];
        }
        Ok(())
    }

    fn start_of_frame(&mut self, marker: u8, segment: &[u8]) -> Result<()> {
        const BAD: JpegError = JpegError::Corrupt("bad frame header");
        let &[precision, h1, h2, w1, w2, count, ref parts @ ..] = segment else { return Err(BAD) };
        if self.frame.is_some() {
            return Err(JpegError::Corrupt("two frame headers"));
        }
        if precision != 8 {
            return Err(JpegError::Unsupported("only 8-bit JPEG is supported"));
        }
        let (width, height) = (usize::from(u16::from_be_bytes([w1, w2])), usize::from(u16::from_be_bytes([h1, h2])));
        let count = usize::from(count);
        if width == 0 || height == 0 || parts.len() != 3 * count {
            return Err(BAD);
        }
        if !matches!(count, 1 | 3 | 4) {
            return Err(JpegError::Unsupported("only 1, 3 or 4 colour components are supported"));
        }
        let sampling: Vec<_> =
            parts.chunks_exact(3).map(|p| (usize::from(p[1] >> 4), usize::from(p[1] & 15))).collect();
        if sampling.iter().any(|(h, v)| !(1..=4).contains(h) || !(1..=4).contains(v))
            || parts.iter().skip(2).step_by(3).any(|t| *t > 3)
        {
            return Err(BAD);
        }
        let h_max = sampling.iter().map(|s| s.0).max().unwrap_or(1);
        let v_max = sampling.iter().map(|s| s.1).max().unwrap_or(1);
        let mut frame =
            Frame { progressive: marker == 0xC2, width, height, h_max, v_max, components: Vec::with_capacity(count) };
        for (part, (h, v)) in parts.chunks_exact(3).zip(sampling) {
            let (blocks_wide, blocks_high) = (frame.mcus_wide() * h, frame.mcus_high() * v);
            let samples = blocks_wide * blocks_high * 64;
            frame.components.push(Component {
                id: part[0],
                h,
                v,
                table: usize::from(part[2]),
                width: (width * h).div_ceil(h_max),
                height: (height * v).div_ceil(v_max),
                blocks_wide,
                coefficients: vec![0; if frame.progressive { samples } else { 0 }],
                plane: vec![0; samples],
                quant: None,
                missing_bits: [16; 64],
            });
        }
        self.frame = Some(frame);
        Ok(())
    }

    fn scan(&mut self, segment: &[u8]) -> Result<()> {
        const BAD: JpegError = JpegError::Corrupt("bad scan header");
        let frame = self.frame.as_mut().ok_or(JpegError::Corrupt("image data before the frame header"))?;
        let (&count, rest) = segment.split_first().ok_or(BAD)?;
        let count = usize::from(count);
        if !(1..=4).contains(&count) || rest.len() != 2 * count + 3 {
            return Err(BAD);
        }
        self.scans += 1;
        if self.scans > MAX_SCANS {
            return Err(JpegError::Unsupported("too many scans"));
        }
        let mut parts: Vec<(usize, Option<&Table>, Option<&Table>)> = Vec::with_capacity(count);
        for part in rest[..2 * count].chunks_exact(2) {
            let index = frame.components.iter().position(|c| c.id == part[0]).ok_or(BAD)?;
            let (dc, ac) = (usize::from(part[1] >> 4), usize::from(part[1] & 15));
            if dc > 3 || ac > 3 || parts.iter().any(|(i, ..)| *i == index) {
                return Err(BAD);
            }
            let component = &mut frame.components[index];
            if component.quant.is_none() {
                component.quant = self.quant[component.table];
            }
            parts.push((index, self.dc[dc].as_ref(), self.ac[ac].as_ref()));
        }
        let [start, end, approximation] = rest[2 * count..] else { return Err(BAD) };
        let scan = Scan {
            parts,
            start: usize::from(start),
            end: usize::from(end),
            high: approximation >> 4,
            low: approximation & 15,
            restart: self.restart,
        };
        self.at += entropy::decode(frame, &scan, &self.data[self.at..])?;
        Ok(())
    }

    fn finish(self) -> Result<Jpeg> {
        let mut frame = self.frame.ok_or(JpegError::Corrupt("no image"))?;
        for component in &mut frame.components {
            let quant = component.quant.ok_or(JpegError::Corrupt("a colour component has no data"))?;
            if component.missing_bits.iter().any(|b| *b != 0) {
                return Err(JpegError::Corrupt("the image data ends early"));
            }
            if frame.progressive {
                let coefficients = std::mem::take(&mut component.coefficients);
                let (stride, wide) = (component.stride(), component.blocks_wide);
                for (i, block) in coefficients.chunks_exact(64).enumerate() {
                    let block = block.try_into().expect("a chunk of 64");
                    let corner = (i / wide) * 8 * stride + (i % wide) * 8;
                    idct::inverse(block, &quant, &mut component.plane[corner..], stride);
                }
            }
        }
        let ids: Vec<u8> = frame.components.iter().map(|c| c.id).collect();
        let space = match (self.rgb && ids.len() == 3, self.adobe) {
            (true, None) => ColorSpace::Rgb,
            _ => ColorSpace::of(&ids, self.jfif, self.adobe),
        };
        color::interleave(&frame, space)
    }
}

#[cfg(test)]
mod tests {
    use base64::{Engine, engine::general_purpose::STANDARD};
    use sha2::{Digest, Sha256};

    /// Name, SHA-256 of the RGB bytes that Pillow 10.2.0 (libjpeg-turbo 3.0.1) decodes, and the file.
    const FILES: [(&str, &str, &str); 5] = [
        (
            "progressive, 4:2:0",
            "82b3e9509929560c9a8773ceb37b608f9f947ff20c6f8f2e44b76b94089dab2b",
            "/9j/4AAQSkZJRgABAQAAAQABAAD/2wBDAA0JCgsKCA0LCgsODg0PEyAVExISEyccHhcgLikxMC4pLSwzOko+MzZGNywtQFdBRkxO\
             UlNSMj5aYVpQYEpRUk//2wBDAQ4ODhMREyYVFSZPNS01T09PT09PT09PT09PT09PT09PT09PT09PT09PT09PT09PT09PT09PT09P\
             T09PT09PT0//wgARCAANABMDASIAAhEBAxEB/8QAGAAAAwEBAAAAAAAAAAAAAAAAAAMFAQT/xAAWAQEBAQAAAAAAAAAAAAAAAAAD\
             AgT/2gAMAwEAAhADEAAAAd5KaMcrKQr/AP/EABwQAAICAgMAAAAAAAAAAAAAAAECAAMEERMUIf/aAAgBAQABBQLs6BySSL/HqWLS\
             m+BJ/8QAGhEAAgIDAAAAAAAAAAAAAAAAAQIAAwQRUf/aAAgBAwEBPwHIsqLBNQJTyf/EABoRAAICAwAAAAAAAAAAAAAAAAADERIT\
             MVH/2gAIAQIBAT8BTj3BZfD/xAAUEAEAAAAAAAAAAAAAAAAAAAAg/9oACAEBAAY/Al//xAAYEAADAQEAAAAAAAAAAAAAAAAAETEB\
             If/aAAgBAQABPyFokCaJwXhugxEP/9oADAMBAAIAAwAAABBc3//EABYRAQEBAAAAAAAAAAAAAAAAAAABEf/aAAgBAwEBPxCWDDH/\
             xAAWEQADAAAAAAAAAAAAAAAAAAABEBH/2gAIAQIBAT8QiET/xAAYEAADAQEAAAAAAAAAAAAAAAAAARFxwf/aAAgBAQABPxAbNUYS\
             IShcsKJyf//Z",
        ),
        (
            "4:2:2 with restart markers",
            "13c72854df829444135f05ef1ee982740bc6cd8dc9874e055767a4fb172db351",
            "/9j/4AAQSkZJRgABAQAAAQABAAD/2wBDAA0JCgsKCA0LCgsODg0PEyAVExISEyccHhcgLikxMC4pLSwzOko+MzZGNywtQFdBRkxO\
             UlNSMj5aYVpQYEpRUk//2wBDAQ4ODhMREyYVFSZPNS01T09PT09PT09PT09PT09PT09PT09PT09PT09PT09PT09PT09PT09PT09P\
             T09PT09PT0//wAARCAAJABMDASEAAhEBAxEB/8QAGAAAAgMAAAAAAAAAAAAAAAAAAAUCAwT/xAAkEAACAAIKAwAAAAAAAAAAAAAA\
             AwECBAUGERITFiIyM0Fxgf/EABgBAAIDAAAAAAAAAAAAAAAAAAMFAQQG/8QAHxEAAgICAQUAAAAAAAAAAAAAAAECBQQRAxIUMTIz\
             /90ABAAB/9oADAMBAAIRAxEAPwCWpJ1J4CptpWNddhiKsKuW9hrSvSjHjTP/0K115Ply7PAFfskHjSR6Uf/RV0rqFae76BwvUYWf\
             2if/0sS+EPQEmkj4R//Z",
        ),
        (
            "4:4:0",
            "8fd0b307b0d4b9f1da101bdc7d7e8b9648aa9676de638ab995586d4d97959c01",
            "/9j/4AAQSkZJRgABAQAAAQABAAD/2wBDABALDA4MChAODQ4SERATGCgaGBYWGDEjJR0oOjM9PDkzODdASFxOQERXRTc4UG1RV19i\
             Z2hnPk1xeXBkeFxlZ2P/2wBDARESEhgVGC8aGi9jQjhCY2NjY2NjY2NjY2NjY2NjY2NjY2NjY2NjY2NjY2NjY2NjY2NjY2NjY2Nj\
             Y2NjY2NjY2P/wAARCAAQABADARIAAhEBAxEB/8QAFgABAQEAAAAAAAAAAAAAAAAABQIE/8QAHBAAAQQDAQAAAAAAAAAAAAAAAwAB\
             AgQFETIV/8QAFwEAAwEAAAAAAAAAAAAAAAAAAAMEBf/EABsRAAIDAAMAAAAAAAAAAAAAAAEEAAIDBREx/9oADAMBAAIRAxEAPwCv\
             ekMXKNJn5kLys1VIexvIJACtBGrlOk0dM7LPVxlOZN7ZC+mgp3IWWNdGBWf/2Q==",
        ),
        (
            "4:1:0, replicated",
            "05537d908cbeea47c7c6dbf330f8aec1eb5fde8eb64db21ff731cc0801c9ac7a",
            "/9j/4AAQSkZJRgABAQAAAQABAAD/2wBDABQODxIPDRQSEBIXFRQYHjIhHhwcHj0sLiQySUBMS0dARkVQWnNiUFVtVkVGZIhlbXd7\
             gYKBTmCNl4x9lnN+gXz/2wBDARUXFx4aHjshITt8U0ZTfHx8fHx8fHx8fHx8fHx8fHx8fHx8fHx8fHx8fHx8fHx8fHx8fHx8fHx8\
             fHx8fHx8fHz/wAARCAAQACADAUEAAhEBAxEB/8QAGAAAAwEBAAAAAAAAAAAAAAAAAwQFAQL/xAAeEAABBAIDAQAAAAAAAAAAAAAC\
             AAEEEQMFEjEyFf/EABYBAQEBAAAAAAAAAAAAAAAAAAQAAv/EABoRAAICAwAAAAAAAAAAAAAAAAEDAAIEERL/2gAMAwEAAhEDEQA/\
             AOvsEGPykT3JHk8qpJjRWarZAjwIxHdsgoCgN8zOUxN7hYrNjbUhC+KFJ3ZO9UqhQ4oY+2SLw4x5O2TkBRO+ZZLEUoFis//Z",
        ),
        (
            "grey, progressive",
            "ec68005da082ec6837c8b97fd91ceff86e177052c96cefb8ea056a44e418d1f5",
            "/9j/4AAQSkZJRgABAQAAAQABAAD/2wBDABALDA4MChAODQ4SERATGCgaGBYWGDEjJR0oOjM9PDkzODdASFxOQERXRTc4UG1RV19i\
             Z2hnPk1xeXBkeFxlZ2P/wgALCAAFAAkBAREA/8QAFAABAAAAAAAAAAAAAAAAAAAAA//aAAgBAQAAAAFD/8QAFxAAAwEAAAAAAAAA\
             AAAAAAAAAAETEf/aAAgBAQABBQKryzP/xAAUEAEAAAAAAAAAAAAAAAAAAAAQ/9oACAEBAAY/Aj//xAAXEAEAAwAAAAAAAAAAAAAA\
             AAAAETFh/9oACAEBAAE/IYaMX//aAAgBAQAAABA//8QAFxAAAwEAAAAAAAAAAAAAAAAAAAEhYf/aAAgBAQABPxBSUMx//9k=",
        ),
    ];

    #[test]
    fn kinds_of_files_come_out_as_in_libjpeg_turbo() {
        for (name, expected, file) in FILES {
            let image = crate::image::decode(&STANDARD.decode(file).unwrap(), name).unwrap();
            let found: String = Sha256::digest(&image.data).iter().map(|b| format!("{b:02x}")).collect();
            assert_eq!(found, expected, "{name}");
        }
    }
}
