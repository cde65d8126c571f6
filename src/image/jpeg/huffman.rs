//! Huffman tables and the bit stream.

use super::{JpegError, Result};

const LOOK: u32 = 9;

/// A decoding table.
pub(super) struct Table {
    /// By the next [`LOOK`] bits: length << 8 | symbol; 0 where the code is longer.
    look: Vec<u16>,
    /// Largest code of each length, -1 if none; index 17 ends every search.
    max_code: [i32; 18],
    /// What to add to a code to get the index of its symbol.
    offset: [i32; 17],
    symbols: Vec<u8>,
}

impl Table {
    /// From the number of codes of each length and their symbols in order.
    pub(super) fn new(counts: &[u8; 16], symbols: &[u8]) -> Result<Self> {
        let mut table =
            Self { look: vec![0; 1 << LOOK], max_code: [-1; 18], offset: [0; 17], symbols: symbols.to_vec() };
        let (mut code, mut k) = (0i32, 0usize);
        for length in 1..=16u32 {
            let count = usize::from(counts[length as usize - 1]);
            table.offset[length as usize] = k as i32 - code;
            for _ in 0..count {
                if code >= 1 << length {
                    return Err(JpegError::Corrupt("bad Huffman table"));
                }
                if length <= LOOK {
                    let first = (code as usize) << (LOOK - length);
                    let entry = (length as u16) << 8 | u16::from(symbols[k]);
                    table.look[first..first + (1 << (LOOK - length))].fill(entry);
                }
                code += 1;
                k += 1;
            }
            if count > 0 {
                table.max_code[length as usize] = code - 1;
            }
            code <<= 1;
        }
        Ok(table)
    }
}

/// Entropy-coded bits with byte stuffing removed. Bits past the end read as zero; [`Bits::check`] reports them.
pub(super) struct Bits<'a> {
    data: &'a [u8],
    at: usize,
    buffer: u64,
    count: u32,
    /// Zero bits that were supplied beyond the data.
    invented: u32,
}

impl<'a> Bits<'a> {
    pub(super) fn new(data: &'a [u8]) -> Self {
        Self { data, at: 0, buffer: 0, count: 0, invented: 0 }
    }

    fn fill(&mut self) {
        while self.count <= 48 {
            let byte = match (self.data.get(self.at), self.data.get(self.at + 1)) {
                (Some(0xFF), Some(0x00)) => {
                    self.at += 2;
                    0xFF
                }
                (Some(&byte), _) if byte != 0xFF => {
                    self.at += 1;
                    byte
                }
                // A marker, or the end.
                _ => {
                    self.invented += 8;
                    0
                }
            };
            self.buffer = self.buffer << 8 | u64::from(byte);
            self.count += 8;
        }
    }

    fn peek(&mut self, n: u32) -> u32 {
        if self.count < n {
            self.fill();
        }
        ((self.buffer >> (self.count - n)) & ((1 << n) - 1)) as u32
    }

    /// The next `n` bits, at most 16.
    pub(super) fn take(&mut self, n: u32) -> u32 {
        let bits = self.peek(n);
        self.count -= n;
        bits
    }

    /// The next symbol.
    pub(super) fn symbol(&mut self, table: &Table) -> Result<u8> {
        let entry = table.look[self.peek(LOOK) as usize];
        if entry != 0 {
            self.count -= u32::from(entry >> 8);
            return Ok(entry as u8);
        }
        let bits = self.peek(16);
        for length in LOOK + 1..=16 {
            let code = (bits >> (16 - length)) as i32;
            if code <= table.max_code[length as usize] {
                self.count -= length;
                let index = code + table.offset[length as usize];
                return table.symbols.get(index as usize).copied().ok_or(JpegError::Corrupt("bad Huffman code"));
            }
        }
        self.check()?;
        Err(JpegError::Corrupt("bad Huffman code"))
    }

    /// A signed value of `n` bits in JPEG's offset form.
    pub(super) fn signed(&mut self, n: u32) -> i32 {
        if n == 0 {
            return 0;
        }
        let value = self.take(n) as i32;
        if value < 1 << (n - 1) { value - (1 << n) + 1 } else { value }
    }

    /// An error if bits beyond the data were used.
    pub(super) fn check(&self) -> Result<()> {
        if self.invented <= self.count {
            return Ok(());
        }
        match self.data.get(self.at + 1) {
            // libjpeg would fill the rest with grey.
            Some(_) => Err(JpegError::Corrupt("the image data ends early")),
            None => Err(JpegError::Truncated),
        }
    }

    /// Discards the bits up to the next marker and steps over it, which must be a restart marker.
    pub(super) fn restart(&mut self) -> Result<()> {
        self.check()?;
        let marker = self.marker().ok_or(JpegError::Truncated)?;
        if !matches!(self.data[marker + 1], 0xD0..=0xD7) {
            return Err(JpegError::Corrupt("a restart marker is missing"));
        }
        *self = Self { data: self.data, at: marker + 2, buffer: 0, count: 0, invented: 0 };
        Ok(())
    }

    /// Number of bytes up to the marker that ends the scan, or to the end of the data.
    pub(super) fn end(&self) -> usize {
        self.marker().unwrap_or(self.data.len())
    }

    fn marker(&self) -> Option<usize> {
        let from = self.at.min(self.data.len());
        self.data[from..].windows(2).position(|w| w[0] == 0xFF && !matches!(w[1], 0x00 | 0xFF)).map(|p| from + p)
    }
}
