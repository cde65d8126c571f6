//! Blocks to lines of the picture, one row of MCUs at a time.
//!
//! Only that row's samples are held, and the last line of the row before it, to which the triangle filters look back; so
//! the last line of a row waits until the next row is there.

use super::{
    Component, Frame, Jpeg, JpegError, Result,
    color::{self, ColorSpace},
    kernels::Kernels,
    upsample::Method,
};

/// Samples that a kernel may read or write beyond the end of a line.
pub(super) const SLACK: usize = 64;

/// The samples of a component.
struct Strip {
    method: Method,
    quant: [i32; 64],
    /// Size of the real samples.
    width: usize,
    height: usize,
    /// Lines in a row of MCUs.
    lines: usize,
    stride: usize,
    /// The last line of the row of MCUs before, then those of this one, then slack.
    samples: Vec<u8>,
    /// Whether any sample ever differed from the middle, which is what chroma is in a picture without colour.
    written: bool,
}

/// Turns blocks into a picture.
pub(super) struct Painter {
    kernels: Kernels,
    space: ColorSpace,
    width: usize,
    height: usize,
    /// Lines of the picture in a row of MCUs.
    lines: usize,
    strips: Vec<Strip>,
    /// By component, a line of full size.
    full: Vec<Vec<u8>>,
    sums: Vec<u16>,
    /// A line of the picture.
    line: Vec<u8>,
    done: usize,
    data: Vec<u8>,
}

impl Painter {
    pub(super) fn new(frame: &Frame, space: ColorSpace, kernels: Kernels) -> Result<Self> {
        let strips = frame.components.iter().map(|c| Strip::new(frame, c)).collect::<Result<Vec<_>>>()?;
        // Whole source samples, of the last of which only a part may be inside the picture.
        let room = frame.mcus_wide() * 8 * frame.h_max + SLACK;
        let channels = space.channels();
        Ok(Self {
            kernels,
            space,
            width: frame.width,
            height: frame.height,
            lines: 8 * frame.v_max,
            full: strips.iter().map(|s| vec![0; if s.method == Method::Full { 0 } else { room }]).collect(),
            strips,
            sums: vec![0; room],
            line: vec![0; room * channels],
            done: 0,
            data: Vec::with_capacity(frame.width * frame.height * channels),
        })
    }

    pub(super) fn kernels(&self) -> Kernels {
        self.kernels
    }

    /// Takes a block of the current row of MCUs, whose last coefficient that is not zero comes before `end` in zigzag
    /// order.
    #[inline]
    pub(super) fn block(&mut self, component: usize, block: &[i16; 64], end: usize, (x, y): (usize, usize)) {
        let strip = &mut self.strips[component];
        if end == 1 && block[0] == 0 && !strip.written {
            return;
        }
        strip.written = true;
        let corner = (1 + y * 8) * strip.stride + x * 8;
        self.kernels.inverse(block, &strip.quant, end, &mut strip.samples[corner..], strip.stride);
    }

    /// Paints what is complete once all blocks of the row of MCUs `row` are there.
    pub(super) fn paint(&mut self, row: usize) {
        let below = (row + 1) * self.lines;
        let end = if below >= self.height { self.height } else { below - 1 };
        let grey = self.space == ColorSpace::YCbCr && self.strips[1..].iter().all(|s| !s.written);
        for y in self.done..end {
            if grey && self.strips[0].method == Method::Full {
                self.kernels.grey(self.strips[0].line(y, row), self.width, &mut self.line);
                self.data.extend_from_slice(&self.line[..3 * self.width]);
                continue;
            }
            for (strip, full) in self.strips.iter().zip(&mut self.full) {
                strip.upsample(y, row, self.kernels, &mut self.sums, full);
            }
            self.convert(y, row);
        }
        self.done = end;
        for strip in &mut self.strips {
            let last = strip.lines * strip.stride;
            strip.samples.copy_within(last..last + strip.stride, 0);
        }
    }

    /// Paints from the coefficients that were kept.
    pub(super) fn paint_kept(&mut self, frame: &Frame) {
        for row in 0..frame.mcus_high() {
            for (index, c) in frame.components.iter().enumerate() {
                let blocks = c.blocks().enumerate().skip(row * c.v * c.blocks_wide).take(c.v * c.blocks_wide);
                for (i, block) in blocks {
                    let end = if block[1..].iter().all(|k| *k == 0) { 1 } else { 64 };
                    self.block(index, block, end, (i % c.blocks_wide, i / c.blocks_wide - row * c.v));
                }
            }
            self.paint(row);
        }
    }

    fn convert(&mut self, y: usize, row: usize) {
        let mut lines: [&[u8]; 4] = [&[]; 4];
        for ((line, strip), full) in lines.iter_mut().zip(&self.strips).zip(&self.full) {
            *line = if strip.method == Method::Full { strip.line(y, row) } else { full };
        }
        let channels = self.space.channels();
        let out = &mut self.line;
        match self.space {
            ColorSpace::Gray => return self.data.extend_from_slice(&lines[0][..self.width]),
            ColorSpace::YCbCr => self.kernels.rgb([lines[0], lines[1], lines[2]], self.width, out),
            ColorSpace::Rgb | ColorSpace::Cmyk => color::interleave(&lines[..channels], self.width, out),
            ColorSpace::Ycck => color::cmyk(&lines, self.width, out),
        }
        self.data.extend_from_slice(&out[..self.width * channels]);
    }

    pub(super) fn finish(self) -> Jpeg {
        Jpeg { channels: self.space.channels(), data: self.data }
    }
}

impl Strip {
    fn new(frame: &Frame, c: &Component) -> Result<Self> {
        let quant = c.quant.ok_or(JpegError::Corrupt("a quantisation table is missing"))?;
        let (lines, stride) = (8 * c.v, c.stride());
        Ok(Self {
            method: Method::of(frame, c)?,
            quant: quant.map(i32::from),
            width: c.width,
            height: c.height,
            lines,
            stride,
            samples: vec![128; (1 + lines) * stride + SLACK],
            written: false,
        })
    }

    /// Line `number` of the component, of the row of MCUs `row` or the last one before it, and what lies behind it.
    fn line(&self, number: usize, row: usize) -> &[u8] {
        &self.samples[(number + 1 - row * self.lines) * self.stride..]
    }

    /// Writes line `y` of the picture to `out`, unless the component has full size.
    fn upsample(&self, y: usize, row: usize, kernels: Kernels, sums: &mut [u16], out: &mut [u8]) {
        let neighbours = || {
            let near = y / 2;
            let far = if y.is_multiple_of(2) { near.saturating_sub(1) } else { (near + 1).min(self.height - 1) };
            [self.line(near, row), self.line(far, row)]
        };
        match self.method {
            Method::Full => {}
            Method::Repeat(h, v) => {
                for (to, from) in out.chunks_mut(h).zip(&self.line(y / v, row)[..self.width]) {
                    to.fill(*from);
                }
            }
            // Both lines the same, a filter across; its rounding is that of the filter both ways turned round.
            Method::H2V1 => kernels.double([self.line(y, row); 2], self.width, [7, 8], sums, out),
            Method::H2V2 => kernels.double(neighbours(), self.width, [8, 7], sums, out),
            Method::H1V2 => kernels.blend(neighbours(), self.width, if y.is_multiple_of(2) { 1 } else { 2 }, out),
        }
    }
}
