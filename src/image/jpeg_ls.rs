//! JPEG-LS (ITU-T T.87): lossless and near-lossless, regular and run mode, components one after the other or
//! interleaved by line or by sample, restart intervals counted in lines.
//!
//! Streams with mapping tables (palettes) are not read; DICOM does not use them.

use super::jpeg::JpegError;

type Result<T> = std::result::Result<T, JpegError>;

const TRUNCATED: JpegError = JpegError::Truncated;
const BAD_FRAME: JpegError = JpegError::Corrupt("bad JPEG-LS frame header");
const BAD_SCAN: JpegError = JpegError::Corrupt("bad JPEG-LS scan header");
const BAD_PRESETS: JpegError = JpegError::Corrupt("bad JPEG-LS coding parameters");
const BAD_CODE: JpegError = JpegError::Corrupt("a JPEG-LS code is out of range");

/// Exponents of the lengths of runs, by how well runs went so far (table in T.87, A.2.1).
const RUN_BITS: [u32; 32] =
    [0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7, 8, 9, 10, 11, 12, 13, 14, 15];

/// A decoded picture.
pub(crate) struct JpegLs {
    /// Columns.
    pub(crate) width: usize,
    /// Rows.
    pub(crate) height: usize,
    /// Samples a pixel, 1 to 4.
    pub(crate) channels: usize,
    /// Row-major `[height, width, channels]`.
    pub(crate) data: Vec<u16>,
}

/// Coding parameters of a stream; 0 stands for the default.
#[derive(Default, Clone, Copy)]
struct Presets {
    max_value: i32,
    thresholds: [i32; 3],
    reset: i32,
}

#[derive(Default)]
struct Decoder<'a> {
    data: &'a [u8],
    at: usize,
    bits: u32,
    ids: Vec<u8>,
    /// Components that a scan has brought.
    done: Vec<bool>,
    presets: Presets,
    restart: usize,
    image: Option<JpegLs>,
}

/// Decodes a whole stream of at most `max_pixels` pixels.
pub(crate) fn decode(data: &[u8], max_pixels: u64) -> Result<JpegLs> {
    let mut decoder = Decoder { data, ..Decoder::default() };
    if !data.starts_with(&[0xFF, 0xD8]) {
        return Err(JpegError::Corrupt("no start of image"));
    }
    decoder.at = 2;
    loop {
        let (marker, segment) = decoder.segment()?;
        match marker {
            0xF7 => decoder.frame(segment, max_pixels)?,
            0xF8 => decoder.parameters(segment)?,
            0xDD => decoder.restart = number(segment).ok_or(JpegError::Corrupt("bad restart interval"))?,
            0xDA => decoder.scan(segment)?,
            0xC0..=0xC3 | 0xC5..=0xC7 | 0xC9..=0xCB | 0xCD..=0xCF => {
                return Err(JpegError::Unsupported("the stream is JPEG, not JPEG-LS"));
            }
            0xD9 => return Err(JpegError::Corrupt("a colour component has no data")),
            _ => {}
        }
        if let Some(image) = decoder.image.take_if(|_| decoder.done.iter().all(|d| *d)) {
            return Ok(image);
        }
    }
}

/// A big-endian number of two to four bytes.
fn number(bytes: &[u8]) -> Option<usize> {
    (2..=4).contains(&bytes.len()).then(|| bytes.iter().fold(0, |n, b| n << 8 | usize::from(*b)))
}

impl<'a> Decoder<'a> {
    /// The next marker and its segment; the segment of EOI is empty.
    fn segment(&mut self) -> Result<(u8, &'a [u8])> {
        loop {
            match self.data.get(self.at..self.at + 2) {
                Some([0xFF, 0xFF]) => self.at += 1,
                Some([0xFF, 0xD9]) => return Ok((0xD9, &[])),
                Some([0xFF, marker]) if *marker >= 0x80 => {
                    let head = self.data.get(self.at + 2..self.at + 4).ok_or(TRUNCATED)?;
                    let length = usize::from(u16::from_be_bytes([head[0], head[1]]));
                    let end = self.at + 2 + length;
                    let segment = self.data.get(self.at + 4..end).ok_or(match length {
                        0 | 1 => JpegError::Corrupt("bad segment length"),
                        _ => TRUNCATED,
                    })?;
                    self.at = end;
                    return Ok((*marker, segment));
                }
                Some(_) => return Err(JpegError::Corrupt("a marker is missing")),
                None => return Err(TRUNCATED),
            }
        }
    }

    fn frame(&mut self, segment: &[u8], max_pixels: u64) -> Result<()> {
        let &[bits, h1, h2, w1, w2, count, ref parts @ ..] = segment else { return Err(BAD_FRAME) };
        let (width, height) = (u16::from_be_bytes([w1, w2]), u16::from_be_bytes([h1, h2]));
        let whole = parts.len() == 3 * usize::from(count) && (1..=4).contains(&count) && (2..=16).contains(&bits);
        if !whole || width == 0 || height == 0 || self.image.is_some() {
            return Err(BAD_FRAME);
        }
        if u64::from(width) * u64::from(height) > max_pixels {
            return Err(JpegError::Unsupported("the picture is too large"));
        }
        if parts.chunks_exact(3).any(|p| p[1] != 0x11) {
            return Err(JpegError::Unsupported("subsampled JPEG-LS is not supported"));
        }
        self.bits = bits.into();
        self.ids = parts.iter().step_by(3).copied().collect();
        self.done = vec![false; self.ids.len()];
        let (width, height, channels) = (width.into(), height.into(), self.ids.len());
        self.image = Some(JpegLs { width, height, channels, data: vec![0; width * height * channels] });
        Ok(())
    }

    fn parameters(&mut self, segment: &[u8]) -> Result<()> {
        let (&[1], words) = segment.split_at_checked(1).ok_or(BAD_PRESETS)? else {
            return Err(JpegError::Unsupported("JPEG-LS mapping tables and oversized pictures are not supported"));
        };
        if words.len() != 10 {
            return Err(BAD_PRESETS);
        }
        let word = |i: usize| i32::from(u16::from_be_bytes([words[2 * i], words[2 * i + 1]]));
        self.presets = Presets { max_value: word(0), thresholds: [word(1), word(2), word(3)], reset: word(4) };
        Ok(())
    }

    fn scan(&mut self, segment: &[u8]) -> Result<()> {
        let image = self.image.as_mut().ok_or(JpegError::Corrupt("image data before the frame header"))?;
        let (&count, rest) = segment.split_first().ok_or(BAD_SCAN)?;
        let count = usize::from(count);
        if !(1..=image.channels).contains(&count) || rest.len() != 2 * count + 3 {
            return Err(BAD_SCAN);
        }
        let mut components = Vec::with_capacity(count);
        for part in rest[..2 * count].chunks_exact(2) {
            let index = self.ids.iter().position(|id| *id == part[0]).ok_or(BAD_SCAN)?;
            if std::mem::replace(&mut self.done[index], true) {
                return Err(BAD_SCAN);
            }
            if part[1] != 0 {
                return Err(JpegError::Unsupported("JPEG-LS mapping tables are not supported"));
            }
            components.push(index);
        }
        let [near, interleave, shift] = rest[2 * count..] else { return Err(BAD_SCAN) };
        if shift & 15 != 0 {
            return Err(JpegError::Unsupported("a JPEG-LS point transform is not supported"));
        }
        // How many components go through one sample after the other: groups are coded line by line.
        let group = match (interleave, count) {
            (0, 1) | (1, _) => 1,
            (2, _) => count,
            _ => return Err(BAD_SCAN),
        };
        let coding = Coding::new(self.bits, near.into(), self.presets)?;
        let lines = if self.restart == 0 { image.height } else { self.restart };
        for (n, first) in (0..image.height).step_by(lines).enumerate() {
            if n > 0 {
                let expected = 0xD0 + (n - 1) as u8 % 8;
                if self.data.get(self.at..self.at + 2) != Some(&[0xFF, expected]) {
                    return Err(JpegError::Corrupt("a restart marker is missing"));
                }
                self.at += 2;
            }
            let data = self.data.get(self.at..).ok_or(TRUNCATED)?;
            let length = data.windows(2).position(|w| w[0] == 0xFF && w[1] >= 0x80).unwrap_or(data.len());
            self.at += length;
            let mut interval = Interval::new(coding, &data[..length], image.width, &components, group);
            for y in first..(first + lines).min(image.height) {
                interval.line(image, y)?;
            }
        }
        Ok(())
    }
}

/// What stays the same in a scan (T.87, A.2.1 and C.2.4.1.1).
#[derive(Clone, Copy)]
struct Coding {
    near: i32,
    max_value: i32,
    thresholds: [i32; 3],
    reset: i32,
    /// Number of different errors.
    range: i32,
    /// Bits of an error that is written out.
    error_bits: u32,
    /// Longest code.
    limit: u32,
}

fn bits_of(values: i32) -> u32 {
    32 - (values - 1).leading_zeros()
}

impl Coding {
    fn new(bits: u32, near: i32, presets: Presets) -> Result<Self> {
        let full = (1 << bits) - 1;
        let max_value = if presets.max_value == 0 { full } else { presets.max_value };
        if max_value > full || near > 255.min(max_value / 2) {
            return Err(BAD_PRESETS);
        }
        // A value outside its limits is replaced by the lower one.
        let within = |value: i32, low: i32| if (low..=max_value).contains(&value) { value } else { low };
        let steps = [(2, 1, 3, 3), (3, 4, 5, 7), (4, 17, 7, 21)];
        let mut thresholds = presets.thresholds;
        let mut low = near + 1;
        for (threshold, (least, factor, of_near, small)) in thresholds.iter_mut().zip(steps) {
            let default = if max_value >= 128 {
                factor * ((max_value.min(4095) + 128) / 256) + least + of_near * near
            } else {
                least.max(small / (256 / (max_value + 1)) + of_near * near)
            };
            if *threshold == 0 {
                *threshold = within(default, low);
            } else if !(low..=max_value).contains(threshold) {
                return Err(BAD_PRESETS);
            }
            low = *threshold;
        }
        let reset = if presets.reset == 0 { 64 } else { presets.reset };
        if !(3..=255.max(max_value)).contains(&reset) {
            return Err(BAD_PRESETS);
        }
        let range = (max_value + 2 * near) / (2 * near + 1) + 1;
        let value_bits = bits_of(max_value + 1).max(2);
        let limit = 2 * (value_bits + value_bits.max(8));
        Ok(Self { near, max_value, thresholds, reset, range, error_bits: bits_of(range), limit })
    }

    /// Region of a gradient, -4 to 4.
    fn region(&self, gradient: i32) -> i32 {
        let size = gradient.abs();
        if size <= self.near {
            return 0;
        }
        let region = 1 + self.thresholds.iter().filter(|t| size >= **t).count() as i32;
        if gradient < 0 { -region } else { region }
    }

    /// A sample from its prediction and its error.
    fn sample(&self, prediction: i32, error: i32) -> i32 {
        let step = 2 * self.near + 1;
        let mut sample = prediction + error * step;
        if sample < -self.near {
            sample += self.range * step;
        } else if sample > self.max_value + self.near {
            sample -= self.range * step;
        }
        sample.clamp(0, self.max_value)
    }
}

/// Statistics of a context: sum of sizes of errors, bias, correction of the prediction, count.
#[derive(Clone, Copy)]
struct Context {
    sizes: i32,
    bias: i32,
    correction: i32,
    count: i32,
}

/// Statistics of the samples that end runs.
#[derive(Clone, Copy)]
struct RunContext {
    sizes: i32,
    count: i32,
    negative: i32,
}

/// Smallest shift that brings `count` to `sizes`.
fn golomb(count: i32, sizes: i32) -> u32 {
    (0..31).find(|k| i64::from(count) << k >= i64::from(sizes)).unwrap_or(31)
}

/// A component in work: the line above and the present one, each with a sample more on either side.
struct Lines {
    component: usize,
    above: Vec<i32>,
    present: Vec<i32>,
}

/// Lines that are coded on their own.
struct Interval<'a> {
    coding: Coding,
    bits: Bits<'a>,
    contexts: Vec<Context>,
    runs: [RunContext; 2],
    lines: Vec<Lines>,
    /// Components that go through one sample after the other.
    group: usize,
    /// Position in [`RUN_BITS`], by group.
    run_index: Vec<usize>,
}

impl<'a> Interval<'a> {
    fn new(coding: Coding, data: &'a [u8], width: usize, components: &[usize], group: usize) -> Self {
        let sizes = 2.max((coding.range + 32) / 64);
        let line =
            |component: &usize| Lines { component: *component, above: vec![0; width + 2], present: vec![0; width + 2] };
        Self {
            coding,
            bits: Bits { data, ..Bits::default() },
            contexts: vec![Context { sizes, bias: 0, correction: 0, count: 1 }; 365],
            runs: [RunContext { sizes, count: 1, negative: 0 }; 2],
            lines: components.iter().map(line).collect(),
            group,
            run_index: vec![0; components.len() / group],
        }
    }

    /// Decodes row `y` of all components of the scan.
    fn line(&mut self, image: &mut JpegLs, y: usize) -> Result<()> {
        let width = image.width;
        for group in 0..self.run_index.len() {
            let members = group * self.group..(group + 1) * self.group;
            for lines in &mut self.lines[members.clone()] {
                std::mem::swap(&mut lines.above, &mut lines.present);
                lines.present[0] = lines.above[1];
                lines.above[width + 1] = lines.above[width];
            }
            let mut x = 1;
            while x <= width {
                x += self.pixels(group, members.clone(), x, width)?;
            }
            for lines in &self.lines[members] {
                let row = &mut image.data[y * width * image.channels..][..width * image.channels];
                let samples = row.iter_mut().skip(lines.component).step_by(image.channels);
                samples.zip(&lines.present[1..=width]).for_each(|(to, from)| *to = *from as u16);
            }
        }
        self.bits.check()
    }

    /// Decodes one pixel of a group, or a run; returns how many pixels that were.
    fn pixels(&mut self, group: usize, members: std::ops::Range<usize>, x: usize, width: usize) -> Result<usize> {
        let mut regions = [[0; 3]; 4];
        for (region, lines) in regions.iter_mut().zip(&self.lines[members.clone()]) {
            let [left, above, corner, right] = neighbours(lines, x);
            *region = [right - above, above - corner, corner - left].map(|g| self.coding.region(g));
        }
        if regions[..members.len()].iter().all(|r| *r == [0; 3]) {
            return self.run(group, members, x, width);
        }
        for (region, member) in regions.into_iter().zip(members) {
            let sample = self.regular(region, neighbours(&self.lines[member], x))?;
            self.lines[member].present[x] = sample;
        }
        Ok(1)
    }

    fn regular(&mut self, regions: [i32; 3], [left, above, corner, _]: [i32; 4]) -> Result<i32> {
        let index = 81 * regions[0] + 9 * regions[1] + regions[2];
        let sign = if index < 0 { -1 } else { 1 };
        let coding = self.coding;
        let context = &mut self.contexts[index.unsigned_abs() as usize];
        let (low, high) = (left.min(above), left.max(above));
        let edge = match corner {
            c if c >= high => low,
            c if c <= low => high,
            c => left + above - c,
        };
        let prediction = (edge + sign * context.correction).clamp(0, coding.max_value);
        let k = golomb(context.count, context.sizes);
        let mapped = self.bits.code(k, coding.limit, coding.error_bits)?;
        let mut error = if mapped % 2 == 0 { mapped / 2 } else { -(mapped + 1) / 2 };
        if coding.near == 0 && k == 0 && 2 * context.bias <= -context.count {
            error = -(error + 1);
        }
        context.learn(error, &coding)?;
        Ok(coding.sample(prediction, sign * error))
    }

    /// Decodes a run and the pixel that ends it, unless the line does.
    fn run(&mut self, group: usize, members: std::ops::Range<usize>, x: usize, width: usize) -> Result<usize> {
        let room = width + 1 - x;
        let mut length = 0;
        while length < room && self.bits.take(1) == 1 {
            let whole = 1 << RUN_BITS[self.run_index[group]];
            if whole <= room - length {
                self.run_index[group] = (self.run_index[group] + 1).min(31);
            }
            length = room.min(length + whole);
            self.bits.check()?;
        }
        let index = self.run_index[group];
        if length < room {
            length += self.bits.take(RUN_BITS[index]) as usize;
            if length >= room {
                return Err(JpegError::Corrupt("a JPEG-LS run is longer than its line"));
            }
        }
        for lines in &mut self.lines[members.clone()] {
            let value = lines.present[x - 1];
            lines.present[x..x + length].fill(value);
        }
        if length == room {
            return Ok(room);
        }
        let alone = members.len() == 1;
        for member in members {
            let [left, above, ..] = neighbours(&self.lines[member], x + length);
            let sample = self.end_of_run(alone, left, above, index)?;
            self.lines[member].present[x + length] = sample;
        }
        self.run_index[group] = index.saturating_sub(1);
        Ok(length + 1)
    }

    /// The sample behind a run. A component `alone` tells whether the sample above is like the run.
    fn end_of_run(&mut self, alone: bool, left: i32, above: i32, index: usize) -> Result<i32> {
        let coding = self.coding;
        let alike = alone && (left - above).abs() <= coding.near;
        let context = &mut self.runs[usize::from(alike)];
        let sizes = if alike { context.sizes + (context.count >> 1) } else { context.sizes };
        let k = golomb(context.count, sizes);
        let mapped = self.bits.code(k, coding.limit - RUN_BITS[index] - 1, coding.error_bits)?;
        let kind = i32::from(alike);
        let odd = (mapped + kind) & 1;
        let size = (mapped + kind + odd) / 2;
        let mostly_negative = k != 0 || 2 * context.negative >= context.count;
        let error = if mostly_negative == (odd == 1) { -size } else { size };
        context.learn(error, (mapped + 1 - kind) >> 1, coding.reset);
        let (prediction, sign) = match (alike, left > above) {
            (true, _) => (left, 1),
            (false, true) => (above, -1),
            (false, false) => (above, 1),
        };
        Ok(coding.sample(prediction, sign * error))
    }
}

/// The samples to the left, above, above to the left and above to the right.
fn neighbours(lines: &Lines, x: usize) -> [i32; 4] {
    [lines.present[x - 1], lines.above[x], lines.above[x - 1], lines.above[x + 1]]
}

impl Context {
    fn learn(&mut self, error: i32, coding: &Coding) -> Result<()> {
        self.sizes += error.abs();
        self.bias += error * (2 * coding.near + 1);
        if self.sizes >= 1 << 24 || self.bias.abs() >= 1 << 24 {
            return Err(BAD_CODE);
        }
        if self.count == coding.reset {
            self.sizes >>= 1;
            self.bias >>= 1;
            self.count >>= 1;
        }
        self.count += 1;
        if self.bias <= -self.count {
            self.bias = (self.bias + self.count).max(1 - self.count);
            self.correction = (self.correction - 1).max(-128);
        } else if self.bias > 0 {
            self.bias = (self.bias - self.count).min(0);
            self.correction = (self.correction + 1).min(127);
        }
        Ok(())
    }
}

impl RunContext {
    fn learn(&mut self, error: i32, size: i32, reset: i32) {
        self.negative += i32::from(error < 0);
        self.sizes = (self.sizes + size).min(1 << 24);
        if self.count == reset {
            self.sizes >>= 1;
            self.count >>= 1;
            self.negative >>= 1;
        }
        self.count += 1;
    }
}

/// The bits of an interval. A byte behind 0xFF has seven. Bits past the end read as zero; [`Bits::check`] reports them.
#[derive(Default)]
struct Bits<'a> {
    data: &'a [u8],
    at: usize,
    buffer: u64,
    count: u32,
    invented: u32,
}

impl Bits<'_> {
    fn fill(&mut self) {
        while self.count <= 48 {
            let width = if self.at > 0 && self.data.get(self.at - 1) == Some(&0xFF) { 7 } else { 8 };
            let byte = self.data.get(self.at).copied();
            self.at = (self.at + 1).min(self.data.len() + 1);
            if byte.is_none() {
                self.invented += width;
            }
            self.buffer = self.buffer << width | u64::from(byte.unwrap_or(0));
            self.count += width;
        }
    }

    /// The next `n` bits, at most 32.
    fn take(&mut self, n: u32) -> u32 {
        if self.count < n {
            self.fill();
        }
        self.count -= n;
        ((self.buffer >> self.count) & ((1 << n) - 1)) as u32
    }

    /// A limited-length Golomb code (T.87, A.5.3).
    fn code(&mut self, k: u32, limit: u32, error_bits: u32) -> Result<i32> {
        let longest = limit - error_bits - 1;
        let mut zeros = 0;
        while zeros < longest && self.take(1) == 0 {
            zeros += 1;
        }
        let value = if zeros < longest {
            u64::from(zeros) << k | u64::from(self.take(k))
        } else {
            // The mark that ends the zeros.
            self.take(1);
            u64::from(self.take(error_bits)) + 1
        };
        i32::try_from(value).ok().filter(|v| *v < 1 << 18).ok_or(BAD_CODE)
    }

    /// An error if bits beyond the data were used.
    fn check(&self) -> Result<()> {
        if self.invented <= self.count { Ok(()) } else { Err(JpegError::Corrupt("the image data ends early")) }
    }
}

#[cfg(test)]
mod tests {
    use base64::{Engine, engine::general_purpose::STANDARD};
    use sha2::{Digest, Sha256};

    use super::*;

    /// Name, width, height, channels, bits, allowed error, SHA-256 of what CharLS decodes (little-endian words) where that
    /// is not [`picture`] itself, and the stream that CharLS (pyjpegls 1.5.1) wrote of it.
    type Stream = (&'static str, [usize; 3], u32, i32, &'static str, &'static str);

    const STREAMS: [Stream; 8] = [
        (
            "grey, 8 bits",
            [31, 17, 1],
            8,
            0,
            "",
            "/9j/9wALCAARAB8BAREA/9oACAEBAAAAAP0AAAaiV8AAAGolKqqqoAAAT8zFi46aYmu/s5xAAAB3AA4AcAAABqzYLt5AFiAAAAz3\
             uc9wAB8/cAAAAZEDpsAqZsiaIAAAD5AAAA1IAAANsAAADSagAAAbYAApmVEvMoAAC9gAAAdoMhmBLVdMAAAD2LrBUAAABtyUPLGA\
             AAB0pcqADnIHUWAAADbpIFDefAAAA+kcB37IFsAAAGJAAAHAAABbddQAAAeIAAAGkEo3aikea64AAAFmVnWAAADFAAAA2It+gLua\
             6oPwoavSYAAADWAAAAygAAAMLK8qd1nsnoAAAHrhQQAGgAAA1bqtJBasOn2iNkPHDTBpkiiiiiigmiCCCCCEIBplKUpSlBM0pSF7\
             Wtc1jDIRwBgIgJDAAMBqBVJBR4333gXxg7FYB4CAQRV3sAELUeR8EIkJyiuoAAACuHhWC3iGyLE6+AAADZWTwRD4QGQAAQAzroAA\
             3ZFOrdAAABjAAAAbfXcAAAD1rZgAAAYdmYdIkAASu3Y1rtzAAIAAAA3smBq0Jv6trdtqh4us7V8dK4S6gAAAOAOI9gAAAp9vtpXo\
             ZB/dHrZRsXHwAAAaeMYzBx7gRz0x44DM/9k=",
        ),
        (
            "grey, 12 bits",
            [23, 11, 1],
            12,
            0,
            "",
            "/9j/9wALDAALABcBAREA/9oACAEBAAAAAP0AAAAAaqIEEEIQhAAAAAANVECgUFBdwNQcwYQhPMkoVBoVCoH/AhgAAVgAAM9ZgAB2\
             gZsBFgfs4IlAAAAAA0QUZRVFUMpKSgnJiUkKIAAGIAAAAAHYgAAARwAAAAAb/xlUAAASAAAAAAZPf7gAAkIyIhIH5SUvnrx26clI\
             AAAomjCPC1oAAAAAPzwAAqOoc/AAAFPhu2atCgoJEiJF98oAASkXhHgY+oVFkAAAAkgAAAAA0cAAAAAA0c+eedcJyd1xxxtsnTKC\
             mAAAI4AAbwAAAAAbUIlgnQlFKm2mmmiYAAAAANECCCEIQDg8AAOHAQy4Z7gHAl2UIAAAAABqrI6FQZJgGkKQgapgOA4DgOA4DgOC\
             ADVQHAcDgcDgcDggVTA4HA4G/9k=",
        ),
        (
            "grey, 16 bits, near-lossless",
            [23, 11, 1],
            16,
            10,
            "b9f282e6758f4a5a73998ff17cf4a221676a1c583898008b0f020c5449f9dc7f",
            "/9j/9wALEAALABcBAREA//gADQH//wAwAHUBWgBA/9oACAEBAAoAAP0AAAAAvwIIIQhEAAAAAAAADA9AQEBAdwNQcwYQhLvn5efn\
             5+flAAAAAAAJIAAQQAAC6B+AFmcwAf4DJgAwrQAAAAB3miapomj9+QP379+/AAAAAAANIAAAAAKbnQARhyADYgAAAAFq20Po+j6P\
             p5Po+nk8nk+n08nkPzV464+Yftl8yEgOkDD6eTyeT6eT6fTyeTy8vLy6EDzcfpUl7CgAAAAAcH3jO13Ly8vLq6oF1eXV1dXV1dAA\
             TDElvAAAEUQnpkdkZJAFOnU6nU6nU+As0DgsDgsDgsDERbfL2QOAFfSYDgxAyCgEgmeZ5njPAgQIEEEChhCAAAAAAAAMD8CFAgQI\
             YAgAAAFFAIBAIBAIBAIAAI/AIBAIAP/Z",
        ),
        (
            "grey, 5 bits, near-lossless",
            [40, 20, 1],
            5,
            1,
            "569d3506238db47d7e4f042fb7011f0d03080afd9fa52a744abd3255270d7a05",
            "/9j/9wALBQAUACgBAREA/9oACAEBAAEAAP07+An+AD0s92NfG8dOenu3BggCAQEAEEMUFJUAhGhqMGNVLS6AmCCm1LqQRQZAhmut\
             +MR1YzooM6wPmQ4GSc+r5zGNJa4EUHgBQQT5zrhBMNlGmz5BsSH+D48NlVREHcFaB11Q4mKxqQnLnjjvANKVTVVVaVKrUqZ+Wc4B\
             IAMRL+7oKQs4gA1B/caA6jYQZXxgAeqUW3x2KIgRDENnntBhlHrqsgCxKKEqwBDAICkHa3qgFhZwotn54eA0Lr3LldHZ+OLIMWp2\
             GsSP4Gfx3X66/PHDTDulcBIAIRgGz+EBAwyCAgwAVWqA/9k=",
        ),
        (
            "colour by plane",
            [13, 11, 3],
            8,
            0,
            "",
            "/9j/9wARCAALAA0DAREAAhEAAxEA/9oACAEBAAAAAP0AAAaiV3PNE139AQ1AAAB3AA4AAANOAAADVn2bImiAAAA+QAAANSAAADbA\
             AAA0gASyXpgAAAewAAAKJKwAAANs316AAAA+koAAAL87j684AAAFmNzSAAADFAAAA2IAAAMLK8ygAAArjL0AZixQCmUpSlKUAF0I\
             gP/aAAgBAgAAAABZXwAAAaiVPyfNADuoCGq8AAAOAAAD0gAAA0YAZ0REbRKAAADGgAABwAAAbYAAAHrAAABXG0kpAAAAfd6AAAC3\
             lwAAAG2uXzAAAA7QjT1EAAOl9eg7pmNqAAABcJXkRJYjFnTVAAABqJJSlKUogAQlKQD/2gAIAQMAAAAAeV8AAAGolT8nzQADgIxr\
             +oBwAAAfEAAAGdAD4KIzbbcACAABQAAAbYS2VpEqQAAAO6jAAABr3IpqumEAAADgARoT0RvPlAAABnxcXQAAAK2rAAAAscry4AAA\
             DjNyaAAADSQdUABmKEIQhCRqhCD/2Q==",
        ),
        (
            "colour by line",
            [13, 11, 3],
            8,
            0,
            "",
            "/9j/9wARCAALAA0DAREAAhEAAxEA/9oADAMBAAIAAwAAAQD9AAAGolIMr4AAANR0cpVVVVAAAH/uc/Lvy8/Pzi139AQBGAAADuAB\
             wAAAacAAAGrB4/jnX9u1kAAAHpAAAMADKgXznWc51vgACgA8AHwUZsiaIAAAD5AAAA1IAAANsAAADSABNEqSgAAAxoAAAc6gAAA9\
             YAAAK4kvrgAR+c2Ox9VWAAAB7DXktAAAA2zOvAAAA+7luUQAMproAAAO76bHMp7XwAAAPpEQWsHXYgsnZOUoKtWAfwf/RIJFdcAA\
             ACzLBvAAABigAAAbHOvo9VS20a7zALS6AAABW1gAAAGBlebQAAAVxltHkAAAFw/kQh8Bopg9/aAAAAcZ6TTPExxNcTWAUxSlKUpQ\
             jhCEACmUpSlKURulKQNMpSlKUIjZCED/2Q==",
        ),
        (
            "colour by sample",
            [13, 11, 3],
            8,
            0,
            "",
            "/9j/9wARCAALAA0DAREAAhEAAxEA/9oADAMBAAIAAwAAAgBEUlW//3AAABqQAAAagAAA+V/GX5V8+AAEAAIACOoCtAaBDozMzNts\
             wAAAdxZvgBwAAAekAAUAAABqQAACgBoAAAGrADoAInVAUbIyJtppWu6ReAAAD5AAAAxoAEAAABqQAAA78AAAG2OpzAAABpAAAAet\
             jgBAAAAVxj2Su71Vu2QAAAewAAAH3AAAB3TVz7ybjYtKJzAAAA2wAMqeu1W3a6JAAAAB9BZP8R6D8go/7ejkiCgkjq27a278AAAF\
             mQwLB6iw4qi6AAABirYAAAK2AAADYtCwAAADAgAAAuAPSv9/ktsTQAAACuEUAAAHGZeJ8sjImvNMzxIkTUSQAAAakANABqKKUIQh\
             CEIQhCEIQhCEKKI4G42QhCEIQhD/2Q==",
        ),
        (
            "colour by sample, near-lossless",
            [13, 11, 3],
            8,
            2,
            "76e2d79b31818ba44e5a999ce6a789ddd0b0068c34bfd5efa6c8f7ad591380e5",
            "/9j/9wARCAALAA0DAREAAhEAAxEA/9oADAMBAAIAAwACAgD9AABEiV/9whDzERFcr/6qu3UAAANGoYAAAIADAAAAL4AAQDAABAHA\
             OnCkkpVJe31AAAAYAAgQAAEAMGAABlQAAYAAwAAAIyEANP9P5/SIAAAGAAABAAABFr/gAEAABKAAAjwAAGX/ef91NhATOp4LDwAG\
             /xbxUGjPz/91YA0EJAAAAHI8qgoecAQWsAIAAABZAAACAK9396rxIgcAAAwB7McIdZmRlKIjJky1VVuobtYAAAC+AAEAAAAwxERE\
             kkm2kkkkIgMDCkklJwD/2Q==",
        ),
    ];

    /// Flat areas, slopes and noise, row-major `[height, width, channels]`.
    fn picture([width, height, channels]: [usize; 3], bits: u32) -> Vec<u16> {
        let largest = (1usize << bits) - 1;
        let sample = |i: usize| {
            let (k, x, y) = (i % channels, i / channels % width, i / channels / width);
            let n = x * 7919 + y * 104_729 + k * 1_299_709;
            let value = match (y % 8 < 3, x % 16 < 8) {
                (true, _) => (x / 9 + y / 5) % 3 * (largest / 3) + k,
                (false, true) => (x * 5 + y * 3 + k * 11) * largest / 300,
                (false, false) => n * (n % 97 + 3) % (largest + 1),
            };
            value.min(largest) as u16
        };
        (0..width * height * channels).map(sample).collect()
    }

    #[test]
    fn streams_come_out_as_in_charls() {
        for (name, size, bits, near, hash, stream) in STREAMS {
            let found = decode(&STANDARD.decode(stream).unwrap(), 1000).unwrap();
            assert_eq!([found.width, found.height, found.channels], size, "{name}");
            let expected = picture(size, bits);
            let off = found.data.iter().zip(&expected).map(|(a, b)| a.abs_diff(*b)).max().unwrap();
            assert!(i32::from(off) <= near, "{name}: {off}");
            let bytes: Vec<u8> = found.data.iter().flat_map(|v| v.to_le_bytes()).collect();
            let digest: String = Sha256::digest(&bytes).iter().map(|b| format!("{b:02x}")).collect();
            assert!(near == 0 || digest == hash, "{name}");
        }
    }

    /// Intervals are coded as if each were a picture: two of one make a picture of double height.
    #[test]
    fn restart_intervals_start_anew() {
        let (_, size, bits, ..) = STREAMS[0];
        let stream = STANDARD.decode(STREAMS[0].5).unwrap();
        let scan = stream.windows(2).position(|w| w == [0xFF, 0xDA]).unwrap();
        let (head, body) = (&stream[..scan], &stream[scan + 10..stream.len() - 2]);
        let mut joined = head.to_vec();
        joined[8] = 2 * size[1] as u8;
        joined.extend([0xFF, 0xDD, 0, 4, 0, size[1] as u8]);
        joined.extend(&stream[scan..stream.len() - 2]);
        let first_end = joined.len();
        joined.extend([0xFF, 0xD0]);
        joined.extend(body);
        joined.extend([0xFF, 0xD9]);
        assert_eq!(decode(&joined, 2000).unwrap().data, picture(size, bits).repeat(2));
        joined[first_end + 1] = 0xD1;
        assert_eq!(decode(&joined, 2000).err(), Some(JpegError::Corrupt("a restart marker is missing")));
    }

    #[test]
    fn cut_damaged_and_oversized_streams_are_errors() {
        for (name, size, .., stream) in STREAMS {
            let stream = STANDARD.decode(stream).unwrap();
            assert!(decode(&stream, (size[0] * size[1] - 1) as u64).is_err(), "{name}");
            for length in 0..stream.len() - 8 {
                assert!(decode(&stream[..length], 1000).is_err(), "{name}, cut to {length}");
            }
            for at in 0..stream.len() {
                for bit in 0..8 {
                    let mut damaged = stream.clone();
                    damaged[at] ^= 1 << bit;
                    let _ = decode(&damaged, 5000);
                }
            }
        }
    }
}
