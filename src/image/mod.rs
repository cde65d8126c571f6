//! Decoding and exact resizing of images.
//!
//! Everything here gives the bytes that Pillow gives, because the models were trained on those.

pub mod clip;
mod decode;
pub mod dicom;
mod jpeg;
mod jpeg_ls;
pub mod pad;
pub mod resize;
pub mod tiling;
#[cfg(target_arch = "x86_64")]
mod vector;

pub use decode::{MAX_PIXELS, Probe, decode, open, probe};

/// An image in memory.
#[derive(Clone, PartialEq, Eq)]
pub struct Rgb8 {
    /// Columns.
    pub width: usize,
    /// Rows.
    pub height: usize,
    /// Row-major `[height, width, 3]`, red first.
    pub data: Vec<u8>,
}

impl std::fmt::Debug for Rgb8 {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Rgb8({}x{})", self.width, self.height)
    }
}

impl Rgb8 {
    /// An image of one colour.
    #[must_use]
    pub fn filled(width: usize, height: usize, color: [u8; 3]) -> Self {
        Self { width, height, data: color.repeat(width * height) }
    }
}
