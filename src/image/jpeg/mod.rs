//! JPEG, bit for bit as libjpeg-turbo (and so Pillow) decodes it: accurate integer inverse DCT, triangle-filter
//! chroma upsampling, 16-bit fixed-point colour conversion.
//!
//! Baseline, extended and progressive files with 8-bit samples and Huffman coding, and grey ones with 12-bit samples.
//! Unlike libjpeg, which fills in grey and goes on, corrupt or missing data is an error.

mod color;
mod entropy;
mod huffman;
mod idct;
mod kernels;
mod painter;
mod upsample;
#[cfg(target_arch = "x86_64")]
mod wide;

use color::ColorSpace;
use entropy::Scan;
use huffman::Table;
use kernels::Kernels;
use painter::Painter;

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
    /// Coefficients where they are kept until all are there, `[.., blocks_wide, 64]`, natural order.
    coefficients: Vec<i16>,
    /// The quantiser in force when the component's first scan began.
    quant: Option<[u16; 64]>,
    /// Low bits of each coefficient, zigzag order, that no scan has brought yet.
    missing_bits: [u8; 64],
}

impl Component {
    fn stride(&self) -> usize {
        self.blocks_wide * 8
    }

    /// The quantiser, if all coefficients are there.
    fn complete(&self) -> Result<[u16; 64]> {
        if self.missing_bits.iter().any(|b| *b != 0) {
            return Err(JpegError::Corrupt("the image data ends early"));
        }
        self.quant.ok_or(JpegError::Corrupt("a colour component has no data"))
    }

    /// The blocks that were kept.
    fn blocks(&self) -> impl Iterator<Item = &[i16; 64]> {
        self.coefficients.as_chunks().0.iter()
    }
}

struct Frame {
    progressive: bool,
    /// Samples have 12 bits.
    deep: bool,
    width: usize,
    height: usize,
    h_max: usize,
    v_max: usize,
    components: Vec<Component>,
}

impl Frame {
    /// Makes room for the coefficients, which are kept until the file has been read.
    fn keep(&mut self) {
        let lines = self.mcus_high();
        for c in &mut self.components {
            c.coefficients.resize(c.blocks_wide * lines * c.v * 64, 0);
        }
    }

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
    /// Samples of 12 bits are wanted.
    deep: bool,
    /// Coefficients are kept even if the first scan has them all, because more scans follow.
    keep: bool,
    kernels: Kernels,
    frame: Option<Frame>,
    scans: usize,
    /// The picture, where one scan brought all of it.
    painted: Option<Jpeg>,
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
    decode_with(Kernels::best(), data, rgb)
}

fn decode_with(kernels: Kernels, data: &[u8], rgb: bool) -> Result<Jpeg> {
    let mut decoder = Decoder { data, rgb, kernels, ..Decoder::default() };
    if !decoder.read()? {
        decoder = Decoder { data, rgb, kernels, keep: true, ..Decoder::default() };
        decoder.read()?;
    }
    decoder.finish()
}

/// Decodes a grey stream of 12-bit samples, row-major `[height, width]`.
pub(crate) fn decode_12_bit(data: &[u8]) -> Result<Vec<u16>> {
    let mut decoder = Decoder { data, deep: true, ..Decoder::default() };
    decoder.read()?;
    decoder.finish_12_bit()
}

impl<'a> Decoder<'a> {
    /// Reads all segments; false if coefficients should have been kept.
    fn read(&mut self) -> Result<bool> {
        loop {
            let (marker, segment) = self.segment()?;
            match marker {
                0xC0..=0xC2 => self.start_of_frame(marker, segment)?,
                0xC4 => self.huffman_tables(segment)?,
                0xC3 | 0xC5..=0xC7 | 0xCD..=0xCF => {
                    return Err(JpegError::Unsupported("lossless and hierarchical JPEG are not supported"));
                }
                0xC9..=0xCB => return Err(JpegError::Unsupported("arithmetic coding is not supported")),
                0xDB => self.quantisers(segment)?,
                0xDD => {
                    let [high, low] = *segment else { return Err(JpegError::Corrupt("bad restart interval")) };
                    self.restart = usize::from(u16::from_be_bytes([high, low]));
                }
                0xE0 if segment.len() >= 14 && segment.starts_with(b"JFIF\0") => self.jfif = true,
                0xEE if segment.len() >= 12 && segment.starts_with(b"Adobe") => self.adobe = Some(segment[11]),
                0xDA if self.painted.is_some() => return Ok(false),
                0xDA => self.scan(segment)?,
                0xD9 => break,
                _ => {}
            }
        }
        Ok(true)
    }

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
            match class {
                0 => self.dc[slot] = Some(Table::new(counts, values)?),
                _ => self.ac[slot] = Some(Table::with_values(counts, values)?),
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
        match (precision, self.deep) {
            (8, false) => {}
            (12, true) if count == 1 => {}
            (12, true) => return Err(JpegError::Unsupported("JPEG with 12 bits is supported in grey only")),
            (_, false) => return Err(JpegError::Unsupported("only 8-bit JPEG is supported")),
            (_, true) => return Err(JpegError::Corrupt("the samples have not 12 bits")),
        }
        let (width, height) = (usize::from(u16::from_be_bytes([w1, w2])), usize::from(u16::from_be_bytes([h1, h2])));
        let count = usize::from(count);
        if width == 0 || height == 0 || parts.len() != 3 * count {
            return Err(BAD);
        }
        if !matches!(count, 1 | 3 | 4) {
            return Err(JpegError::Unsupported("only 1, 3 or 4 colour components are supported"));
        }
        let mut sampling: Vec<_> =
            parts.chunks_exact(3).map(|p| (usize::from(p[1] >> 4), usize::from(p[1] & 15))).collect();
        if sampling.iter().any(|(h, v)| !(1..=4).contains(h) || !(1..=4).contains(v))
            || parts.iter().skip(2).step_by(3).any(|t| *t > 3)
        {
            return Err(BAD);
        }
        if count == 1 {
            // The blocks of the only component come one by one.
            sampling = vec![(1, 1)];
        }
        let h_max = sampling.iter().map(|s| s.0).max().unwrap_or(1);
        let v_max = sampling.iter().map(|s| s.1).max().unwrap_or(1);
        let components = Vec::with_capacity(count);
        let (progressive, deep) = (marker == 0xC2, self.deep);
        let mut frame = Frame { progressive, deep, width, height, h_max, v_max, components };
        for (part, (h, v)) in parts.chunks_exact(3).zip(sampling) {
            let blocks_wide = frame.mcus_wide() * h;
            frame.components.push(Component {
                id: part[0],
                h,
                v,
                table: usize::from(part[2]),
                width: (width * h).div_ceil(h_max),
                height: (height * v).div_ceil(v_max),
                blocks_wide,
                coefficients: Vec::new(),
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
        let data = &self.data[self.at..];
        let all = scan.parts.len() == frame.components.len();
        if !all || frame.progressive || frame.deep || self.keep {
            frame.keep();
            self.at += entropy::decode(frame, &scan, data)?;
            return Ok(());
        }
        let mut painter = Painter::new(frame, color_space(frame, self.rgb, self.jfif, self.adobe), self.kernels)?;
        self.at += entropy::paint(frame, &scan, data, &mut painter)?;
        self.painted = Some(painter.finish());
        Ok(())
    }

    /// Checks that all data came, and paints what was kept until now.
    fn finish(self) -> Result<Jpeg> {
        if let Some(jpeg) = self.painted {
            return Ok(jpeg);
        }
        let frame = self.frame.ok_or(JpegError::Corrupt("no image"))?;
        for component in &frame.components {
            component.complete()?;
        }
        let space = color_space(&frame, self.rgb, self.jfif, self.adobe);
        let mut painter = Painter::new(&frame, space, self.kernels)?;
        painter.paint_kept(&frame);
        Ok(painter.finish())
    }

    fn finish_12_bit(self) -> Result<Vec<u16>> {
        let frame = self.frame.ok_or(JpegError::Corrupt("no image"))?;
        let component = frame.components.first().ok_or(JpegError::Corrupt("no image"))?;
        let quant = component.complete()?;
        let mut plane = vec![0u16; component.coefficients.len()];
        let (stride, wide) = (component.stride(), component.blocks_wide);
        for (i, block) in component.blocks().enumerate() {
            idct::inverse(block, &quant.map(i32::from), &mut plane[(i / wide) * 8 * stride + (i % wide) * 8..], stride);
        }
        let rows = plane.chunks_exact(stride).take(frame.height);
        Ok(rows.flat_map(|row| &row[..frame.width]).copied().collect())
    }
}

fn color_space(frame: &Frame, rgb: bool, jfif: bool, adobe: Option<u8>) -> ColorSpace {
    let ids: Vec<u8> = frame.components.iter().map(|c| c.id).collect();
    match (rgb && ids.len() == 3, adobe) {
        (true, None) => ColorSpace::Rgb,
        _ => ColorSpace::of(&ids, jfif, adobe),
    }
}

#[cfg(test)]
mod tests {
    use base64::{Engine, engine::general_purpose::STANDARD};
    use sha2::{Digest, Sha256};

    use super::Kernels;

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

    #[test]
    fn the_form_of_the_inner_loops_changes_nothing() {
        for (name, _, file) in FILES {
            let file = STANDARD.decode(file).unwrap();
            let plain = super::decode_with(Kernels::Portable, &file, false).unwrap();
            let best = super::decode_with(Kernels::best(), &file, false).unwrap();
            assert_eq!((plain.channels, plain.data), (best.channels, best.data), "{name}");
        }
    }

    /// A file whose only scan is repeated is painted from the coefficients of the last one.
    #[test]
    fn a_second_scan_replaces_the_first() {
        let file = STANDARD.decode(FILES[2].2).unwrap();
        let once = super::decode(&file).unwrap();
        let scan = file.windows(2).position(|w| w == [0xFF, 0xDA]).unwrap();
        let twice = [&file[..file.len() - 2], &file[scan..]].concat();
        assert_eq!(super::decode(&twice).unwrap().data, once.data);
    }

    /// Grey, 12 bits, 21 x 13, from libjpeg-turbo 3.1.3 (imagecodecs 2026.3.6).
    const DEEP: &str = "/9j/4AAQSkZJRgABAQAAAQABAAD/2wBDAAMCAgMCAgMDAwMEAwMEBQgFBQQEBQoHBwYIDAoMDAsKCwsNDhIQDQ4RDgsLEBYQERMU\
             FRUVDA8XGBYUGBIUFRT/wQALDAANABUBAREA/8QAFgABAQEAAAAAAAAAAAAAAAAADAoL/8QAKRAAAAIHCAMBAQAAAAAAAAAAFBUF\
             BwsSExYXAgMEBggJChgMERkbGv/aAAgBAQAAPwA4eyqGcd+ezSDcUMe/NTQigKbSvTgtMXU6bGQhLxocshwwaw8MiRrMFy8ZAMqh\
             nHfXWkHKbMaUSmEX/wBT5XORVNncGUzWIw7hlKT4kqtBR/qDiYHu9tUb1nlGPCDYLO1hxZP7KNnnkAZg+rHZbqr8L9OCkNUcGmV0\
             qadJ7qauFUJB7qPlMrKj4a6mRRWCwpib3ZVHDW08s9mkG4pUHvzU0IoCm0qWFcFpi6nTYyFpeNDlkOGDWHhkSNZguXjIBlUcNbTz\
             u60g5TdQaUSmEX/1PlSwmRVNncGUzWLw7hlKT4kqtBR/qDiYHu9x/mlm0RdW3hILUA5WrQV3c1bfpQ6q2s1rNxS7cl6aRuVdqz5C\
             qJ0DoNH5EUQpCZcuZUWdgl6gVT6m1d5Dm6+y9kZJ39ETxL3SeSuccffo7//Z";

    #[test]
    fn samples_of_12_bits_come_out_as_in_libjpeg_turbo() {
        let file = STANDARD.decode(DEEP).unwrap();
        let samples = super::decode_12_bit(&file).unwrap();
        assert_eq!((super::dimensions(&file), samples.len()), (Ok((21, 13)), 21 * 13));
        let bytes: Vec<u8> = samples.iter().flat_map(|v| v.to_le_bytes()).collect();
        let found: String = Sha256::digest(&bytes).iter().map(|b| format!("{b:02x}")).collect();
        assert_eq!(found, "2d60bc7fc3a6692e202d3c52b4abb4f6a491786dc612081b9ba8f165c0cee771");
        assert!(matches!(super::decode(&file), Err(super::JpegError::Unsupported(_))));
        assert!((0..file.len() - 2).all(|cut| super::decode_12_bit(&file[..cut]).is_err()));
    }
}
