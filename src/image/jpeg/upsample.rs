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

/// Writes row `y` of the full-size component to `out`, which has room for whole source samples.
pub(super) fn row(c: &Component, method: Method, y: usize, sums: &mut [i32], out: &mut [u8]) {
    let line = |r: usize| &c.plane[r * c.stride()..][..c.width];
    match method {
        Method::Full => out[..c.width].copy_from_slice(line(y)),
        Method::Repeat(h, v) => {
            for (to, from) in out.chunks_mut(h).zip(line(y / v)) {
                to.fill(*from);
            }
        }
        Method::H2V1 => across(line(y), out, |x| i32::from(*x), [1, 2], 2, 0),
        Method::H1V2 => {
            let (near, far) = neighbours(c, y);
            let bias = if y.is_multiple_of(2) { 1 } else { 2 };
            for ((to, a), b) in out.iter_mut().zip(line(near)).zip(line(far)) {
                *to = ((i32::from(*a) * 3 + i32::from(*b) + bias) >> 2) as u8;
            }
        }
        Method::H2V2 => {
            let (near, far) = neighbours(c, y);
            for ((sum, a), b) in sums.iter_mut().zip(line(near)).zip(line(far)) {
                *sum = i32::from(*a) * 3 + i32::from(*b);
            }
            across(&sums[..c.width], out, |x| *x, [8, 7], 4, 2);
        }
    }
}

/// The source row that full-size row `y` lies in, and the one it leans to; edges repeat.
fn neighbours(c: &Component, y: usize) -> (usize, usize) {
    let near = y / 2;
    let far = if y.is_multiple_of(2) { near.saturating_sub(1) } else { (near + 1).min(c.height - 1) };
    (near, far)
}

/// Doubles a line: three parts of the nearer value, one of the farther. `bias` is the rounding of left and right
/// samples, `shift` the scale; the ends, which have no neighbour, repeat themselves (`end` is their own shift).
fn across<T>(line: &[T], out: &mut [u8], value: impl Fn(&T) -> i32, bias: [i32; 2], shift: u32, end: u32) {
    let last = line.len() - 1;
    let sample = |near: i32, far: i32, bias: i32| ((near * 3 + far + bias) >> shift) as u8;
    for (i, pair) in out.chunks_exact_mut(2).take(line.len()).enumerate() {
        let near = value(&line[i]);
        let ends = |bias: i32| if end == 0 { near as u8 } else { ((near * 4 + bias) >> shift) as u8 };
        pair[0] = if i == 0 { ends(bias[0]) } else { sample(near, value(&line[i - 1]), bias[0]) };
        pair[1] = if i == last { ends(bias[1]) } else { sample(near, value(&line[i + 1]), bias[1]) };
    }
}
