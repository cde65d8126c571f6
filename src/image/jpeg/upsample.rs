//! Chroma upsampling as in `jdsample.c`: triangle filters for factors of two, replication for the rest.

use super::{Component, Frame, JpegError, Result};

/// How a component gets to full size.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Method {
    Full,
    /// Triangle filter across.
    H2V1,
    /// Triangle filter down.
    H1V2,
    /// Triangle filter both ways.
    H2V2,
    /// Replication by whole factors.
    Repeat(usize, usize),
}

impl Method {
    pub(super) fn of(frame: &Frame, c: &Component) -> Result<Self> {
        if !frame.h_max.is_multiple_of(c.h) || !frame.v_max.is_multiple_of(c.v) {
            return Err(JpegError::Unsupported("fractional chroma sampling is not supported"));
        }
        // The filters need a neighbour on either side.
        let wide = c.width > 2;
        Ok(match (frame.h_max / c.h, frame.v_max / c.v) {
            (1, 1) => Self::Full,
            (2, 1) if wide => Self::H2V1,
            (1, 2) => Self::H1V2,
            (2, 2) if wide => Self::H2V2,
            (h, v) => Self::Repeat(h, v),
        })
    }
}

/// Twice the `width` of two lines, each sample made of three parts of the nearer and one of the farther one both ways;
/// at the ends, which have no neighbour, the sample itself. `bias` is the rounding of left and right samples; `sums` is
/// for own use.
pub(super) fn double([near, far]: [&[u8]; 2], width: usize, bias: [u16; 2], sums: &mut [u16], out: &mut [u8]) {
    for ((sum, a), b) in sums[1..=width].iter_mut().zip(near).zip(far) {
        *sum = u16::from(*a) * 3 + u16::from(*b);
    }
    repeat_ends(sums, width);
    for (pair, s) in out.chunks_exact_mut(2).zip(sums[..width + 2].windows(3)) {
        pair[0] = ((s[1] * 3 + s[0] + bias[0]) >> 4) as u8;
        pair[1] = ((s[1] * 3 + s[2] + bias[1]) >> 4) as u8;
    }
}

/// Gives the line `sums[1..=width]` neighbours on both sides.
pub(super) fn repeat_ends(sums: &mut [u16], width: usize) {
    (sums[0], sums[width + 1]) = (sums[1], sums[width]);
}

/// A line of three parts of the first and one of the second.
pub(super) fn blend([near, far]: [&[u8]; 2], width: usize, bias: u16, out: &mut [u8]) {
    for ((to, a), b) in out[..width].iter_mut().zip(near).zip(far) {
        *to = ((u16::from(*a) * 3 + u16::from(*b) + bias) >> 2) as u8;
    }
}
