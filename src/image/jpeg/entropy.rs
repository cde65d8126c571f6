//! One scan: Huffman-coded coefficients, sequential or progressive.

use super::{
    Frame, JpegError, NATURAL, Result,
    huffman::{Bits, Table},
    painter::Painter,
};

/// A scan header with its tables.
pub(super) struct Scan<'a> {
    /// Component, DC table, AC table.
    pub(super) parts: Vec<(usize, Option<&'a Table>, Option<&'a Table>)>,
    /// First and last coefficient, zigzag order.
    pub(super) start: usize,
    pub(super) end: usize,
    /// Successive approximation: bits done before, and position of the bit of this scan.
    pub(super) high: u8,
    pub(super) low: u8,
    /// MCUs between restart markers; 0 for none.
    pub(super) restart: usize,
}

struct State<'a> {
    bits: Bits<'a>,
    predictions: [i32; 4],
    end_of_band: u32,
    /// MCUs between restart markers, and those left until the next one.
    restart: usize,
    left: usize,
}

const NO_TABLE: JpegError = JpegError::Corrupt("a Huffman table is missing");
const OVERRUN: JpegError = JpegError::Corrupt("a block has too many coefficients");

impl<'a> State<'a> {
    fn new(scan: &Scan<'_>, data: &'a [u8]) -> Self {
        let (restart, left) = (scan.restart, scan.restart);
        Self { bits: Bits::new(data), predictions: [0; 4], end_of_band: 0, restart, left }
    }

    /// Steps over the restart marker that is due before the next MCU.
    fn begin_mcu(&mut self) -> Result<()> {
        if self.restart > 0 {
            if self.left == 0 {
                self.bits.restart()?;
                (self.predictions, self.end_of_band, self.left) = ([0; 4], 0, self.restart);
            }
            self.left -= 1;
        }
        Ok(())
    }
}

impl Scan<'_> {
    /// MCUs across and down, and by part the blocks of an MCU across and down.
    ///
    /// A scan of one component has MCUs of one block, and leaves out the blocks that only pad.
    fn layout(&self, frame: &Frame) -> (usize, usize, Vec<(usize, usize)>) {
        if let [(index, ..)] = self.parts[..] {
            let c = &frame.components[index];
            return (c.width.div_ceil(8), c.height.div_ceil(8), vec![(1, 1)]);
        }
        let blocks = self.parts.iter().map(|p| &frame.components[p.0]).map(|c| (c.h, c.v)).collect();
        (frame.mcus_wide(), frame.mcus_high(), blocks)
    }
}

/// Decodes the scan at the start of `data` and keeps its coefficients; returns the number of bytes it takes.
pub(super) fn decode(frame: &mut Frame, scan: &Scan<'_>, data: &[u8]) -> Result<usize> {
    check(frame, scan)?;
    let mut state = State::new(scan, data);
    let (wide, high, blocks) = scan.layout(frame);
    for row in 0..high {
        for column in 0..wide {
            state.begin_mcu()?;
            for (part, (h, v)) in blocks.iter().enumerate() {
                for block in 0..h * v {
                    let (x, y) = (column * h + block % h, row * v + block / h);
                    decode_block(frame, scan, part, x, y, &mut state)?;
                }
            }
        }
        state.bits.check()?;
    }
    // Some writers state another part of the coefficients for sequential scans, which always bring all.
    let (brought, low) = if frame.progressive { (scan.start..scan.end + 1, scan.low) } else { (0..64, 0) };
    for (index, ..) in &scan.parts {
        frame.components[*index].missing_bits[brought.clone()].fill(low);
    }
    Ok(state.bits.end())
}

/// As [`decode`], for a sequential scan of all components, which is painted while it is read.
pub(super) fn paint<'a>(frame: &Frame, scan: &Scan<'a>, data: &[u8], painter: &mut Painter) -> Result<usize> {
    check(frame, scan)?;
    let mut state = State::new(scan, data);
    let (wide, high) = (frame.mcus_wide(), frame.mcus_high());
    let tables = |part: &(usize, Option<&'a Table>, Option<&'a Table>)| {
        let (h, v) = (frame.components[part.0].h, frame.components[part.0].v);
        Ok((part.0, part.1.ok_or(NO_TABLE)?, part.2.ok_or(NO_TABLE)?, h, v))
    };
    let parts: Vec<_> = scan.parts.iter().map(tables).collect::<Result<_>>()?;
    let kernels = painter.kernels();
    for row in 0..high {
        for column in 0..wide {
            state.begin_mcu()?;
            for (part, (index, dc, ac, h, v)) in parts.iter().enumerate() {
                for y in 0..*v {
                    for x in 0..*h {
                        let mut block = [0i16; 64];
                        let prediction = &mut state.predictions[part];
                        let end = kernels.sequential(&mut block, (dc, ac), prediction, &mut state.bits)?;
                        painter.block(*index, &block, end, (column * h + x, y));
                    }
                }
            }
        }
        state.bits.check()?;
        painter.paint(row);
    }
    Ok(state.bits.end())
}

fn check(frame: &Frame, scan: &Scan<'_>) -> Result<()> {
    const BAD: JpegError = JpegError::Corrupt("bad scan parameters");
    if frame.progressive {
        let dc = scan.start == 0;
        if scan.start > scan.end || scan.end > 63 || scan.low > 13 || (dc && scan.end != 0) {
            return Err(BAD);
        }
        if (!dc && scan.parts.len() != 1) || (scan.high != 0 && scan.high != scan.low + 1) {
            return Err(BAD);
        }
    }
    // libjpeg's limit on blocks in an interleaved MCU.
    let blocks: usize = scan.parts.iter().map(|p| frame.components[p.0].h * frame.components[p.0].v).sum();
    if scan.parts.len() > 1 && blocks > 10 { Err(BAD) } else { Ok(()) }
}

fn decode_block(
    frame: &mut Frame,
    scan: &Scan<'_>,
    part: usize,
    x: usize,
    y: usize,
    state: &mut State<'_>,
) -> Result<()> {
    let (index, dc, ac) = scan.parts[part];
    let progressive = frame.progressive;
    let component = &mut frame.components[index];
    let at = (y * component.blocks_wide + x) * 64;
    let block: &mut [i16; 64] =
        (&mut component.coefficients[at..at + 64]).try_into().expect("a block has 64 coefficients");
    if !progressive {
        block.fill(0);
        let tables = (dc.ok_or(NO_TABLE)?, ac.ok_or(NO_TABLE)?);
        sequential(block, tables, &mut state.predictions[part], &mut state.bits)?;
        return Ok(());
    }
    match (scan.start == 0, scan.high == 0) {
        (true, true) => {
            let size = dc_size(dc.ok_or(NO_TABLE)?, &mut state.bits)?;
            let value = state.predictions[part].wrapping_add(state.bits.signed(size));
            state.predictions[part] = value;
            block[0] = (value << scan.low) as i16;
            Ok(())
        }
        (true, false) => {
            if state.bits.take(1) == 1 {
                block[0] |= 1 << scan.low;
            }
            Ok(())
        }
        (false, true) => ac_first(block, scan, ac.ok_or(NO_TABLE)?, state),
        (false, false) => ac_refine(block, scan, ac.ok_or(NO_TABLE)?, state),
    }
}

#[inline(always)]
fn dc_size(table: &Table, bits: &mut Bits<'_>) -> Result<u32> {
    match bits.symbol(table)? {
        size @ 0..=15 => Ok(size.into()),
        _ => Err(JpegError::Corrupt("bad Huffman code")),
    }
}

/// All coefficients of a block of zeros; returns how many there are up to the last that is not zero, at least 1.
#[inline(always)]
pub(super) fn sequential(
    block: &mut [i16; 64],
    (dc, ac): (&Table, &Table),
    prediction: &mut i32,
    stream: &mut Bits<'_>,
) -> Result<usize> {
    let mut bits = *stream;
    let size = dc_size(dc, &mut bits)?;
    *prediction = prediction.wrapping_add(bits.signed(size));
    block[0] = *prediction as i16;
    let mut k = 1;
    let mut end = 1;
    while k < 64 {
        bits.fill();
        let whole = ac.whole(bits);
        let value = if whole != 0 {
            k += (whole >> 8 & 15) as usize;
            bits.skip((whole & 0xFF) as u32);
            whole >> 16
        } else {
            let symbol = bits.symbol(ac)?;
            let (run, size) = (usize::from(symbol >> 4), u32::from(symbol & 15));
            if size == 0 {
                if run != 15 {
                    break;
                }
                k += 16;
                continue;
            }
            k += run;
            bits.signed(size)
        };
        block[usize::from(*NATURAL.get(k).ok_or(OVERRUN)?)] = value as i16;
        k += 1;
        end = k;
    }
    *stream = bits;
    Ok(end)
}

fn ac_first(block: &mut [i16; 64], scan: &Scan<'_>, table: &Table, state: &mut State<'_>) -> Result<()> {
    if state.end_of_band > 0 {
        state.end_of_band -= 1;
        return Ok(());
    }
    let mut k = scan.start;
    while k <= scan.end {
        let symbol = state.bits.symbol(table)?;
        let (run, size) = (usize::from(symbol >> 4), u32::from(symbol & 15));
        match (size, run) {
            (0, 15) => k += 16,
            (0, _) => {
                state.end_of_band = (1 << run) - 1 + state.bits.take(run as u32);
                break;
            }
            _ => {
                k += run;
                let value = state.bits.signed(size) << scan.low;
                block[usize::from(*NATURAL.get(k).ok_or(OVERRUN)?)] = value as i16;
                k += 1;
            }
        }
    }
    Ok(())
}

fn ac_refine(block: &mut [i16; 64], scan: &Scan<'_>, table: &Table, state: &mut State<'_>) -> Result<()> {
    let bit = 1i16 << scan.low;
    let mut k = scan.start;
    if state.end_of_band == 0 {
        while k <= scan.end {
            let symbol = state.bits.symbol(table)?;
            let (mut run, size) = (usize::from(symbol >> 4), symbol & 15);
            let mut value = 0;
            match size {
                0 if run < 15 => {
                    state.end_of_band = (1 << run) + state.bits.take(run as u32);
                    break;
                }
                0 => {}
                1 => value = if state.bits.take(1) == 1 { bit } else { -bit },
                _ => return Err(JpegError::Corrupt("bad refinement code")),
            }
            // Coefficients that are not zero yet take a correction bit each and do not count in the run.
            while k <= scan.end {
                let slot = &mut block[usize::from(NATURAL[k])];
                if *slot != 0 {
                    correct(slot, bit, &mut state.bits);
                } else if run == 0 {
                    *slot = value;
                    k += 1;
                    break;
                } else {
                    run -= 1;
                }
                k += 1;
            }
        }
    }
    if state.end_of_band > 0 {
        while k <= scan.end {
            let slot = &mut block[usize::from(NATURAL[k])];
            if *slot != 0 {
                correct(slot, bit, &mut state.bits);
            }
            k += 1;
        }
        state.end_of_band -= 1;
    }
    Ok(())
}

fn correct(slot: &mut i16, bit: i16, bits: &mut Bits<'_>) {
    if bits.take(1) == 1 && *slot & bit == 0 {
        *slot += if *slot >= 0 { bit } else { -bit };
    }
}
