//! Huffman tables and the bit stream.

use super::{JpegError, Result};

/// Bits that are looked up at once.
pub(super) const LOOK: u32 = 10;

/// A decoding table.
pub(super) struct Table {
    /// By the next [`LOOK`] bits: length << 8 | symbol; 0 where the code is longer.
    look: Box<[u16; 1 << LOOK]>,
    /// By the next [`LOOK`] bits, where they hold a code and its value: value << 16 | zeros before it << 8 | bits of
    /// both; otherwise 0, as always for differences of DC coefficients.
    whole: Box<[i32; 1 << LOOK]>,
    /// Largest code of each length, -1 if none; index 17 ends every search.
    max_code: [i32; 18],
    /// What to add to a code to get the index of its symbol.
    offset: [i32; 17],
    symbols: Vec<u8>,
}

impl Table {
    /// From the number of codes of each length and their symbols in order.
    pub(super) fn new(counts: &[u8; 16], symbols: &[u8]) -> Result<Self> {
        let mut table = Self {
            look: Box::new([0; 1 << LOOK]),
            whole: Box::new([0; 1 << LOOK]),
            max_code: [-1; 18],
            offset: [0; 17],
            symbols: symbols.to_vec(),
        };
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

    /// As [`Table::new`], for AC coefficients.
    pub(super) fn with_values(counts: &[u8; 16], symbols: &[u8]) -> Result<Self> {
        let mut table = Self::new(counts, symbols)?;
        let whole = |(bits, entry): (usize, &u16)| {
            let (length, run, size) = (u32::from(entry >> 8), i32::from(entry >> 4 & 15), u32::from(entry & 15));
            if *entry == 0 || size == 0 || length + size > LOOK {
                return 0;
            }
            let value = bits >> (LOOK - length - size) & ((1 << size) - 1);
            extend(value as i32, size) << 16 | run << 8 | (length + size) as i32
        };
        for (to, entry) in table.whole.iter_mut().zip(table.look.iter().enumerate().map(whole)) {
            *to = entry;
        }
        Ok(table)
    }

    /// Code and value that begin `bits`, as in `whole`.
    #[inline(always)]
    pub(super) fn whole(&self, bits: Bits<'_>) -> i32 {
        self.whole[(bits.buffer >> (64 - LOOK)) as usize]
    }
}

/// JPEG's offset form of a signed value of `n` bits, at least one.
#[inline(always)]
fn extend(value: i32, n: u32) -> i32 {
    if value < 1 << (n - 1) { value - (1 << n) + 1 } else { value }
}

/// Entropy-coded bits with byte stuffing removed. Bits past the end read as zero; [`Bits::check`] reports them.
#[derive(Clone, Copy)]
pub(super) struct Bits<'a> {
    data: &'a [u8],
    at: usize,
    /// The next bits, the first one on top; zeros below those that count.
    buffer: u64,
    count: u32,
    /// Zero bits that were supplied beyond the data.
    invented: u32,
}

impl<'a> Bits<'a> {
    pub(super) fn new(data: &'a [u8]) -> Self {
        Self { data, at: 0, buffer: 0, count: 0, invented: 0 }
    }

    /// Makes sure that 32 bits are there.
    #[inline(always)]
    pub(super) fn fill(&mut self) {
        const ONES: u64 = 0x0101_0101_0101_0101;
        if self.count >= 32 {
            return;
        }
        if let Some(bytes) = self.data.get(self.at..).and_then(|d| d.first_chunk()) {
            let word = u64::from_be_bytes(*bytes);
            // Bytes of eight ones are followed by stuffing, or begin a marker.
            if (!word).wrapping_sub(ONES) & word & (ONES << 7) == 0 {
                let bytes = (64 - self.count) / 8;
                let kept = word & (u64::MAX << (64 - 8 * bytes));
                self.buffer |= kept >> self.count;
                self.at += bytes as usize;
                self.count += 8 * bytes;
                return;
            }
        }
        *self = self.fill_by_byte();
    }

    #[cold]
    #[inline(never)]
    fn fill_by_byte(mut self) -> Self {
        while self.count <= 56 {
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
            self.buffer |= u64::from(byte) << (56 - self.count);
            self.count += 8;
        }
        self
    }

    /// Drops `n` bits of those that are there.
    #[inline(always)]
    pub(super) fn skip(&mut self, n: u32) {
        self.buffer <<= n;
        self.count -= n;
    }

    /// The next `n` bits of those that are there, at least one.
    #[inline(always)]
    fn next(&mut self, n: u32) -> u32 {
        let bits = (self.buffer >> (64 - n)) as u32;
        self.skip(n);
        bits
    }

    /// The next `n` bits, at most 16.
    pub(super) fn take(&mut self, n: u32) -> u32 {
        self.fill();
        if n == 0 { 0 } else { self.next(n) }
    }

    /// The next symbol; 16 bits are left after it.
    #[inline(always)]
    pub(super) fn symbol(&mut self, table: &Table) -> Result<u8> {
        self.fill();
        let entry = table.look[(self.buffer >> (64 - LOOK)) as usize];
        if entry != 0 {
            self.skip(u32::from(entry >> 8));
            return Ok(entry as u8);
        }
        let (after, symbol) = self.long_symbol(table)?;
        *self = after;
        Ok(symbol)
    }

    #[cold]
    #[inline(never)]
    fn long_symbol(mut self, table: &Table) -> Result<(Self, u8)> {
        let bits = (self.buffer >> 48) as u32;
        for length in LOOK + 1..=16 {
            let code = (bits >> (16 - length)) as i32;
            if code <= table.max_code[length as usize] {
                self.skip(length);
                let index = code + table.offset[length as usize];
                let symbol =
                    table.symbols.get(index as usize).copied().ok_or(JpegError::Corrupt("bad Huffman code"))?;
                return Ok((self, symbol));
            }
        }
        self.check()?;
        Err(JpegError::Corrupt("bad Huffman code"))
    }

    /// A signed value of `n` bits in JPEG's offset form, right after [`Bits::symbol`].
    #[inline(always)]
    pub(super) fn signed(&mut self, n: u32) -> i32 {
        if n == 0 { 0 } else { extend(self.next(n) as i32, n) }
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
