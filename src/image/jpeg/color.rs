//! Colour conversion as in `jdcolor.c`.

use super::{
    Frame, Jpeg, Result,
    upsample::{self, Method},
};

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

    fn channels(self) -> usize {
        match self {
            Self::Gray => 1,
            Self::Rgb | Self::YCbCr => 3,
            Self::Cmyk | Self::Ycck => 4,
        }
    }
}

/// Upsamples, converts and interleaves all rows.
pub(super) fn interleave(frame: &Frame, space: ColorSpace) -> Result<Jpeg> {
    let channels = space.channels();
    let methods = frame.components.iter().map(|c| Method::of(frame, c)).collect::<Result<Vec<_>>>()?;
    // Room for the last source sample, of which only a part may be inside the image.
    let room = frame.mcus_wide() * 8 * frame.h_max;
    let mut rows = vec![vec![0u8; room]; channels];
    let mut sums = vec![0i32; room];
    let mut data = vec![0u8; frame.width * frame.height * channels];
    for (y, line) in data.chunks_exact_mut(frame.width * channels).enumerate() {
        for ((c, method), row) in frame.components.iter().zip(&methods).zip(&mut rows) {
            upsample::row(c, *method, y, &mut sums, row);
        }
        for (x, pixel) in line.chunks_exact_mut(channels).enumerate() {
            for (sample, row) in pixel.iter_mut().zip(&rows) {
                *sample = row[x];
            }
        }
        match space {
            ColorSpace::YCbCr => line.chunks_exact_mut(3).for_each(to_rgb),
            ColorSpace::Ycck => line.chunks_exact_mut(4).for_each(|pixel| {
                to_rgb(&mut pixel[..3]);
                pixel[..3].iter_mut().for_each(|s| *s = 255 - *s);
            }),
            _ => {}
        }
    }
    Ok(Jpeg { channels, data })
}

#[inline(always)]
fn to_rgb(pixel: &mut [u8]) {
    const HALF: i32 = 1 << 15;
    let [y, cb, cr] = [i32::from(pixel[0]), i32::from(pixel[1]) - 128, i32::from(pixel[2]) - 128];
    pixel[0] = (y + ((91_881 * cr + HALF) >> 16)).clamp(0, 255) as u8;
    pixel[1] = (y + ((-22_554 * cb - 46_802 * cr + HALF) >> 16)).clamp(0, 255) as u8;
    pixel[2] = (y + ((116_130 * cb + HALF) >> 16)).clamp(0, 255) as u8;
}
