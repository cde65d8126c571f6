//! Colour conversion as in `jdcolor.c`.

/// What the components mean.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum ColorSpace {
    Gray,
    Rgb,
    YCbCr,
    Cmyk,
    /// Inverted YCbCr of CMY, and K.
    Ycck,
}

impl ColorSpace {
    /// libjpeg's guess from the JFIF and Adobe markers and the component ids.
    pub(super) fn of(ids: &[u8], jfif: bool, adobe: Option<u8>) -> Self {
        match (ids.len(), jfif, adobe) {
            (1, ..) => Self::Gray,
            (4, _, None | Some(0)) => Self::Cmyk,
            (4, ..) => Self::Ycck,
            (_, false, Some(0)) => Self::Rgb,
            (_, false, None) if ids == b"RGB" => Self::Rgb,
            _ => Self::YCbCr,
        }
    }

    pub(super) fn channels(self) -> usize {
        match self {
            Self::Gray => 1,
            Self::Rgb | Self::YCbCr => 3,
            Self::Cmyk | Self::Ycck => 4,
        }
    }
}

/// Lines of all channels to one line of pixels.
pub(super) fn interleave(lines: &[&[u8]], width: usize, out: &mut [u8]) {
    for (x, pixel) in out.chunks_exact_mut(lines.len()).take(width).enumerate() {
        for (sample, line) in pixel.iter_mut().zip(lines) {
            *sample = line[x];
        }
    }
}

/// A line of YCbCr whose chroma is in the middle everywhere to a line of RGB.
pub(super) fn grey(line: &[u8], width: usize, out: &mut [u8]) {
    for (pixel, y) in out.chunks_exact_mut(3).zip(&line[..width]) {
        pixel.fill(*y);
    }
}

/// Lines of YCbCr to a line of RGB.
pub(super) fn rgb(lines: [&[u8]; 3], width: usize, out: &mut [u8]) {
    let [y, cb, cr] = lines.map(|line| &line[..width]);
    for (((pixel, y), cb), cr) in out.chunks_exact_mut(3).zip(y).zip(cb).zip(cr) {
        pixel.copy_from_slice(&to_rgb(*y, *cb, *cr));
    }
}

/// Lines of inverted YCbCr and K to a line of CMYK.
pub(super) fn cmyk(lines: &[&[u8]; 4], width: usize, out: &mut [u8]) {
    for (x, pixel) in out.chunks_exact_mut(4).take(width).enumerate() {
        let [r, g, b] = to_rgb(lines[0][x], lines[1][x], lines[2][x]);
        pixel.copy_from_slice(&[255 - r, 255 - g, 255 - b, lines[3][x]]);
    }
}

fn to_rgb(y: u8, cb: u8, cr: u8) -> [u8; 3] {
    const HALF: i32 = 1 << 15;
    let [y, cb, cr] = [i32::from(y), i32::from(cb) - 128, i32::from(cr) - 128];
    [91_881 * cr, -22_554 * cb - 46_802 * cr, 116_130 * cb].map(|part| (y + ((part + HALF) >> 16)).clamp(0, 255) as u8)
}
