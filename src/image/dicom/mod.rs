//! Pictures in DICOM files, as a viewer first shows them.
//!
//! Stored values go through the modality look-up table or rescale, then through the VOI look-up table or the first
//! window, and are inverted for MONOCHROME1 (DICOM PS3.3 C.11.1, C.11.2, C.7.6.3). Without a window, values of up to 8
//! bits are shown as they are, others from the smallest to the largest of the frame. Palettes and YBR become RGB.
//!
//! A header says who the patient is. None of it is returned: [`Header::identity`] names the attributes that are filled,
//! not what they say.

mod compressed;

use std::panic::{AssertUnwindSafe, catch_unwind};

use dicom_object::{DefaultDicomObject, InMemDicomObject, Tag, mem::InMemElement};

use super::{MAX_PIXELS, Rgb8};
use crate::error::{Error, Kind, Result};

/// What a header says about the picture, and that it says something about a person.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Header {
    /// Modality, for example `CT`.
    pub modality: Option<String>,
    /// Body part examined.
    pub body_part: Option<String>,
    /// Number of frames.
    pub frames: usize,
    /// Photometric interpretation, for example `MONOCHROME2`.
    pub photometric: String,
    /// UID of the transfer syntax.
    pub transfer_syntax: String,
    /// Names of the filled attributes that can identify a person.
    pub identity: Vec<&'static str>,
    /// Whether annotation is burned into the pixels, where the header states it.
    pub burned_in: Option<bool>,
}

/// Attributes that can identify a person.
const IDENTITY: [(Tag, &str); 16] = [
    (Tag(0x0010, 0x0010), "PatientName"),
    (Tag(0x0010, 0x0020), "PatientID"),
    (Tag(0x0010, 0x0030), "PatientBirthDate"),
    (Tag(0x0010, 0x0032), "PatientBirthTime"),
    (Tag(0x0010, 0x1000), "OtherPatientIDs"),
    (Tag(0x0010, 0x1001), "OtherPatientNames"),
    (Tag(0x0010, 0x1005), "PatientBirthName"),
    (Tag(0x0010, 0x1040), "PatientAddress"),
    (Tag(0x0010, 0x1060), "PatientMotherBirthName"),
    (Tag(0x0010, 0x2154), "PatientTelephoneNumbers"),
    (Tag(0x0010, 0x4000), "PatientComments"),
    (Tag(0x0008, 0x0050), "AccessionNumber"),
    (Tag(0x0008, 0x0080), "InstitutionName"),
    (Tag(0x0008, 0x0081), "InstitutionAddress"),
    (Tag(0x0008, 0x0090), "ReferringPhysicianName"),
    (Tag(0x0008, 0x1050), "PerformingPhysicianName"),
];

const BURNED_IN: Tag = Tag(0x0028, 0x0301);
const MODALITY: Tag = Tag(0x0008, 0x0060);
const BODY_PART: Tag = Tag(0x0018, 0x0015);
const SAMPLES: Tag = Tag(0x0028, 0x0002);
const PHOTOMETRIC: Tag = Tag(0x0028, 0x0004);
const PLANAR: Tag = Tag(0x0028, 0x0006);
const FRAMES: Tag = Tag(0x0028, 0x0008);
const ROWS: Tag = Tag(0x0028, 0x0010);
const COLUMNS: Tag = Tag(0x0028, 0x0011);
const BITS_ALLOCATED: Tag = Tag(0x0028, 0x0100);
const BITS_STORED: Tag = Tag(0x0028, 0x0101);
const SIGNED: Tag = Tag(0x0028, 0x0103);
const WINDOW_CENTER: Tag = Tag(0x0028, 0x1050);
const WINDOW_WIDTH: Tag = Tag(0x0028, 0x1051);
const INTERCEPT: Tag = Tag(0x0028, 0x1052);
const SLOPE: Tag = Tag(0x0028, 0x1053);
const WINDOW_FUNCTION: Tag = Tag(0x0028, 0x1056);
const MODALITY_LUT: Tag = Tag(0x0028, 0x3000);
const LUT_DESCRIPTOR: Tag = Tag(0x0028, 0x3002);
const LUT_DATA: Tag = Tag(0x0028, 0x3006);
const VOI_LUT: Tag = Tag(0x0028, 0x3010);
const SHARED_GROUPS: Tag = Tag(0x5200, 0x9229);
const FRAME_GROUPS: Tag = Tag(0x5200, 0x9230);
/// Sequences of a functional group that hold windows and rescales.
const GROUP_MACROS: [Tag; 2] = [Tag(0x0028, 0x9132), Tag(0x0028, 0x9145)];
const PIXELS: Tag = Tag(0x7FE0, 0x0010);
const FLOAT_PIXELS: Tag = Tag(0x7FE0, 0x0008);
const DOUBLE_PIXELS: Tag = Tag(0x7FE0, 0x0009);

/// Explicit VR big endian, whose words are stored the other way round.
const BIG_ENDIAN: &str = "1.2.840.10008.1.2.2";

/// Whether bytes are a DICOM file, by the mark behind its preamble.
#[must_use]
pub fn is_dicom(bytes: &[u8]) -> bool {
    bytes.get(128..132) == Some(b"DICM")
}

/// Decodes frame `frame`, from 0, of the content of a file; `at` names it in errors.
///
/// # Errors
/// The file is not DICOM, is cut off or contradicts itself; it holds no picture; its transfer syntax has no decoder here;
/// there is no such frame; the picture is too large.
pub fn decode(bytes: &[u8], frame: usize, at: &str) -> Result<(Rgb8, Header)> {
    // The decoders of compressed frames panic on some damaged ones.
    match catch_unwind(AssertUnwindSafe(|| File::open(bytes, at)?.picture(frame))) {
        Ok(result) => result,
        Err(_) => Err(corrupt(at).found("content that its decoder gives up on")),
    }
}

/// Stored values of a frame, sample by sample, before anything is applied to them: `[rows, columns, samples]`.
///
/// # Errors
/// As [`decode`].
pub fn stored(bytes: &[u8], frame: usize, at: &str) -> Result<Vec<f64>> {
    match catch_unwind(AssertUnwindSafe(|| Ok(File::open(bytes, at)?.frame(frame)?.values))) {
        Ok(result) => result,
        Err(_) => Err(corrupt(at).found("content that its decoder gives up on")),
    }
}

fn corrupt(at: &str) -> Error {
    Error::new(Kind::Image, "a DICOM file is corrupt").at(at).help("fetch the file again, or leave its rows out")
}

/// A parsed file.
struct File<'a> {
    object: DefaultDicomObject,
    at: &'a str,
}

/// Values of one frame.
struct Frame {
    values: Vec<f64>,
    rows: usize,
    columns: usize,
    samples: usize,
    bits: u32,
    signed: bool,
    float: bool,
    /// As the values are now; decoders may have changed it.
    photometric: String,
}

impl<'a> File<'a> {
    fn open(bytes: &[u8], at: &'a str) -> Result<Self> {
        if !is_dicom(bytes) {
            return Err(Error::new(Kind::Image, "a file is not a DICOM file")
                .at(at)
                .expected("`DICM` behind a preamble of 128 bytes")
                .help("files without the file meta information have to be repaired first, for example with dcmconv"));
        }
        let object = dicom_object::from_reader(bytes).map_err(|e| corrupt(at).source(e))?;
        Ok(Self { object, at })
    }

    fn element(&self, tag: Tag) -> Option<&InMemElement> {
        self.object.get(tag)
    }

    fn text(&self, tag: Tag) -> Option<String> {
        let text = text_of(self.element(tag)?)?;
        let text = text.trim_matches(|c: char| c.is_whitespace() || c == '\0');
        (!text.is_empty()).then(|| text.to_string())
    }

    fn number(&self, tag: Tag, name: &str) -> Result<usize> {
        let bad = || corrupt(self.at).expected(format!("a number as {name}"));
        let element = self.element(tag).ok_or_else(|| bad().found("no such attribute"))?;
        let number = match text_of_unknown(element) {
            Some(text) => text.trim_matches(['\0', ' ']).parse::<i64>().map_err(|e| bad().source(e))?,
            None => element.to_int::<i64>().map_err(|e| bad().source(e))?,
        };
        usize::try_from(number).map_err(|_| bad().found(number))
    }

    fn optional(&self, tag: Tag, name: &str, default: usize) -> Result<usize> {
        if self.element(tag).is_none() { Ok(default) } else { self.number(tag, name) }
    }

    fn syntax(&self) -> &str {
        self.object.meta().transfer_syntax.trim_end_matches(|c: char| c == '\0' || c.is_whitespace())
    }

    fn header(&self) -> Result<Header> {
        let identity = IDENTITY.iter().filter(|(tag, _)| self.text(*tag).is_some()).map(|(_, name)| *name).collect();
        Ok(Header {
            modality: self.text(MODALITY),
            body_part: self.text(BODY_PART),
            frames: self.optional(FRAMES, "NumberOfFrames", 1)?.max(1),
            photometric: self.text(PHOTOMETRIC).unwrap_or_default(),
            transfer_syntax: self.syntax().to_string(),
            identity,
            burned_in: self.text(BURNED_IN).map(|t| t.eq_ignore_ascii_case("YES")),
        })
    }

    fn picture(&self, frame: usize) -> Result<(Rgb8, Header)> {
        let header = self.header()?;
        let values = self.frame(frame)?;
        let data = match values.photometric.as_str() {
            "MONOCHROME1" => gray(self.shades(&values, frame)?.into_iter().map(|v| 255 - v)),
            "MONOCHROME2" => gray(self.shades(&values, frame)?.into_iter()),
            "PALETTE COLOR" => self.palette(&values)?,
            "RGB" => color(&values, |rgb| rgb),
            "YBR_FULL" | "YBR_FULL_422" => color(&values, from_ybr),
            other => {
                return Err(Error::new(Kind::Image, "a kind of DICOM picture that cannot be read")
                    .at(self.at)
                    .found(format!("photometric interpretation {other:?}"))
                    .help("convert the picture to PNG"));
            }
        };
        if data.len() != values.rows * values.columns * 3 {
            return Err(corrupt(self.at).found(format!("{} samples a pixel", values.samples)));
        }
        Ok((Rgb8 { width: values.columns, height: values.rows, data }, header))
    }

    /// Values of a frame after decompression.
    fn frame(&self, frame: usize) -> Result<Frame> {
        let pixels = [PIXELS, FLOAT_PIXELS, DOUBLE_PIXELS].iter().find_map(|tag| self.element(*tag));
        let Some(pixels) = pixels else {
            return Err(Error::new(Kind::Image, "a DICOM file holds no picture")
                .at(self.at)
                .found(
                    self.text(MODALITY)
                        .map_or_else(|| "no pixel data".into(), |m| format!("modality {m}, no pixel data")),
                )
                .help("leave the file out"));
        };
        let frames = self.optional(FRAMES, "NumberOfFrames", 1)?.max(1);
        if frame >= frames {
            return Err(Error::new(Kind::Image, "a DICOM file has no such frame")
                .at(self.at)
                .expected(format!("a number below {frames}"))
                .found(frame));
        }
        let (rows, columns) = (self.number(ROWS, "Rows")?, self.number(COLUMNS, "Columns")?);
        if rows == 0 || columns == 0 || (rows as u64) * (columns as u64) > MAX_PIXELS {
            return Err(corrupt(self.at)
                .expected(format!("1 to {MAX_PIXELS} pixels"))
                .found(format!("{columns} x {rows}")));
        }
        let samples = self.optional(SAMPLES, "SamplesPerPixel", 1)?;
        let allocated = self.number(BITS_ALLOCATED, "BitsAllocated")?;
        let stored = self.optional(BITS_STORED, "BitsStored", allocated)?;
        let legal = matches!(allocated, 1 | 8 | 16 | 32 | 64) && (1..=allocated).contains(&stored);
        if !legal || !matches!(samples, 1 | 3) {
            return Err(corrupt(self.at).found(format!("{stored} of {allocated} bits, {samples} samples a pixel")));
        }
        let mut frame_of = Frame {
            values: Vec::new(),
            rows,
            columns,
            samples,
            bits: stored as u32,
            signed: self.optional(SIGNED, "PixelRepresentation", 0)? == 1,
            float: false,
            photometric: self.text(PHOTOMETRIC).unwrap_or_default(),
        };
        match pixels.value().primitive() {
            Some(native) if pixels.header().tag == PIXELS => {
                self.native(&native.to_bytes(), frame, allocated, &mut frame_of)?;
            }
            Some(floats) => {
                let all = floats.to_multi_float64().map_err(|e| corrupt(self.at).source(e))?;
                let size = rows * columns * samples;
                let part = all.get(frame * size..(frame + 1) * size).ok_or_else(|| self.cut(all.len(), size))?;
                (frame_of.values, frame_of.float) = (part.to_vec(), true);
            }
            None => self.encapsulated(frame, allocated, &mut frame_of)?,
        }
        Ok(frame_of)
    }

    fn cut(&self, found: usize, expected: usize) -> Error {
        Error::new(Kind::Image, "a DICOM file is truncated")
            .at(self.at)
            .expected(format!("{expected} bytes or values a frame"))
            .found(format!("{found} in all"))
            .help("fetch the file again, or leave its rows out")
    }

    /// Uncompressed values.
    fn native(&self, bytes: &[u8], frame: usize, allocated: usize, out: &mut Frame) -> Result<()> {
        let pixels = out.rows * out.columns;
        let subsampled = out.photometric == "YBR_FULL_422";
        let count = if subsampled { pixels * 2 } else { pixels * out.samples };
        let bits = count * allocated;
        let (first, last) = (frame * bits, (frame + 1) * bits);
        if last.div_ceil(8) > bytes.len() {
            return Err(self.cut(bytes.len(), last.div_ceil(8)));
        }
        if allocated == 1 {
            // Frames of single bits need not begin at a byte.
            out.values = (first..last).map(|bit| f64::from(bytes[bit / 8] >> (bit % 8) & 1)).collect();
            return Ok(());
        }
        let (bytes, width) = (&bytes[first / 8..last / 8], allocated / 8);
        // Words come in the machine's order, except that bytes of a big endian file's 8-bit samples stay swapped in words.
        let swapped = width == 1 && self.syntax() == BIG_ENDIAN && self.words();
        let at = |i: usize| if swapped { i ^ 1 } else { i };
        let value = |i: usize| match width {
            1 => u64::from(*bytes.get(at(i)).unwrap_or(&0)),
            2 => u64::from(u16::from_le_bytes([bytes[2 * i], bytes[2 * i + 1]])),
            4 => u64::from(u32::from_le_bytes(std::array::from_fn(|k| bytes[4 * i + k]))),
            _ => u64::from_le_bytes(std::array::from_fn(|k| bytes[8 * i + k])),
        };
        let all: Vec<f64> = (0..count).map(|i| number(value(i), out.bits, out.signed)).collect();
        out.values = match () {
            () if subsampled => all.chunks_exact(4).flat_map(|p| [p[0], p[2], p[3], p[1], p[2], p[3]]).collect(),
            () if out.samples == 3 && self.optional(PLANAR, "PlanarConfiguration", 0)? == 1 => {
                (0..count).map(|i| all[i % 3 * pixels + i / 3]).collect()
            }
            () => all,
        };
        Ok(())
    }

    /// Whether the pixels are stored as words.
    fn words(&self) -> bool {
        self.element(PIXELS).is_some_and(|e| e.header().vr.to_string() == "OW")
    }

    /// Grey values of a monochrome frame, brighter for larger values.
    fn shades(&self, frame: &Frame, number: usize) -> Result<Vec<u8>> {
        let modality = self.modality(frame, number)?;
        if let Some(lut) = self.table(VOI_LUT)? {
            let top = f64::from(lut.bits).exp2() - 1.0;
            return Ok(modality.values.iter().map(|v| byte(lut.get(*v) / top)).collect());
        }
        if let Some(window) = self.window(number) {
            return Ok(modality.values.iter().map(|v| byte(window.apply(*v))).collect());
        }
        if frame.bits <= 8 && !frame.signed && !modality.changed && !frame.float {
            let top = f64::from(frame.bits).exp2() - 1.0;
            return Ok(modality.values.iter().map(|v| byte(v / top)).collect());
        }
        let finite = modality.values.iter().filter(|v| v.is_finite());
        let (low, high) = finite.fold((f64::MAX, f64::MIN), |(low, high), v| (low.min(*v), high.max(*v)));
        let range = if high > low { high - low } else { 1.0 };
        Ok(modality.values.iter().map(|v| byte((v - low) / range)).collect())
    }

    fn modality(&self, frame: &Frame, number: usize) -> Result<Modality> {
        if let Some(lut) = self.table(MODALITY_LUT)? {
            return Ok(Modality { values: frame.values.iter().map(|v| lut.get(*v)).collect(), changed: true });
        }
        let slope = self.float(SLOPE, number).unwrap_or(1.0);
        let intercept = self.float(INTERCEPT, number).unwrap_or(0.0);
        let changed = slope != 1.0 || intercept != 0.0;
        Ok(Modality { values: frame.values.iter().map(|v| v * slope + intercept).collect(), changed })
    }

    /// A number of the header, or of the functional groups of a frame; the first of several.
    fn float(&self, tag: Tag, frame: usize) -> Option<f64> {
        let first = |object: &InMemDicomObject| {
            let element = object.get(tag)?;
            match text_of_unknown(element) {
                Some(text) => text.split('\\').next()?.trim_matches(['\0', ' ']).parse().ok(),
                None => element.to_multi_float64().ok()?.first().copied(),
            }
        };
        first(&self.object).or_else(|| self.groups(frame).find_map(first))
    }

    /// Functional groups that hold windows and rescales of a frame.
    fn groups(&self, frame: usize) -> impl Iterator<Item = &InMemDicomObject> {
        let item = |tag: Tag, at: usize| self.element(tag).and_then(|e| e.items()).and_then(|items| items.get(at));
        let groups = [item(FRAME_GROUPS, frame), item(SHARED_GROUPS, 0)].into_iter().flatten();
        groups.flat_map(|group| {
            GROUP_MACROS.iter().filter_map(|tag| group.get(*tag).and_then(|e| e.items()).and_then(<[_]>::first))
        })
    }

    fn window(&self, frame: usize) -> Option<Window> {
        let (center, width) = (self.float(WINDOW_CENTER, frame)?, self.float(WINDOW_WIDTH, frame)?);
        let function = self.text(WINDOW_FUNCTION).unwrap_or_default().to_uppercase();
        let exact = matches!(function.as_str(), "SIGMOID" | "LINEAR_EXACT");
        let wide = if exact { width > 0.0 } else { width >= 1.0 };
        let legal = center.is_finite() && width.is_finite() && wide;
        legal.then_some(Window { center, width, function })
    }

    /// The first look-up table of a sequence.
    fn table(&self, sequence: Tag) -> Result<Option<Table>> {
        let item = self.element(sequence).and_then(|e| e.items()).and_then(<[_]>::first);
        item.map(|item| self.table_of(item, LUT_DESCRIPTOR, LUT_DATA)).transpose()
    }

    fn table_of(&self, object: &InMemDicomObject, descriptor: Tag, data: Tag) -> Result<Table> {
        let bad = || corrupt(self.at).expected("a whole look-up table");
        let numbers = |tag: Tag| object.get(tag).and_then(|e| e.to_multi_int::<i64>().ok());
        let descriptor = numbers(descriptor).filter(|d| d.len() == 3).ok_or_else(bad)?;
        let length = match descriptor[0] & 0xFFFF {
            0 => 65_536,
            n => n as usize,
        };
        let bits = (descriptor[2] & 0xFFFF) as u32;
        let bytes = |tag: Tag| object.get(tag).map(|e| e.to_bytes().map_err(|e| bad().source(e))).transpose();
        // Entries of 8 bits may be packed two to a word.
        let numbers = |bytes: &[u8], packed: bool| -> Vec<u16> {
            match packed {
                true => bytes.iter().map(|b| u16::from(*b)).collect(),
                false => bytes.chunks_exact(2).map(|w| u16::from_le_bytes([w[0], w[1]])).collect(),
            }
        };
        let mut entries = match (bytes(data)?, bytes(Tag(data.0, data.1 + SEGMENTED))?) {
            (Some(bytes), _) => numbers(&bytes, bits <= 8 && bytes.len() < 2 * length),
            (None, Some(bytes)) => expand(&numbers(&bytes, bits <= 8)).ok_or_else(bad)?,
            (None, None) => return Err(bad().found("none")),
        };
        entries.truncate(length);
        // The first value that is mapped has the sign of the values themselves.
        let signed = self.optional(SIGNED, "PixelRepresentation", 0)? == 1;
        let first = descriptor[1];
        let first = if signed && first > 0x7FFF { first - 0x1_0000 } else { first };
        match entries.len() == length && (1..=16).contains(&bits) {
            true => Ok(Table { first, bits, entries }),
            false => Err(bad().found(format!("{} of {length} entries of {bits} bits", entries.len()))),
        }
    }

    fn palette(&self, frame: &Frame) -> Result<Vec<u8>> {
        let tables: Vec<Table> = (0..3)
            .map(|i| self.table_of(&self.object, Tag(0x0028, 0x1101 + i), Tag(0x0028, 0x1201 + i)))
            .collect::<Result<_>>()?;
        let shift = if tables[0].bits > 8 { 8 } else { 0 };
        let pixel = |v: &f64| std::array::from_fn::<u8, 3, _>(|i| ((tables[i].get(*v) as u16) >> shift) as u8);
        Ok(frame.values.iter().flat_map(pixel).collect())
    }
}

/// Tags of segmented palettes come so far behind those of plain ones.
const SEGMENTED: u16 = 0x20;

/// Unrolls a segmented palette (DICOM PS3.3 C.7.9.2): runs of entries, straight lines between entries, and repetitions of
/// earlier segments.
fn expand(words: &[u16]) -> Option<Vec<u16>> {
    let mut entries: Vec<u16> = Vec::new();
    let mut at = 0;
    while at + 1 < words.len() {
        at += segment(words, at, &mut entries)?;
        if let Some([2, count, low, high]) = words.get(at..at + 4) {
            let mut from = (usize::from(*high) << 16 | usize::from(*low)) / 2;
            for _ in 0..*count {
                from += segment(words, from, &mut entries)?;
            }
            at += 4;
        }
        if entries.len() > usize::from(u16::MAX) + 1 {
            return None;
        }
    }
    Some(entries)
}

/// Unrolls one run or line and returns its length in words.
fn segment(words: &[u16], at: usize, entries: &mut Vec<u16>) -> Option<usize> {
    let count = usize::from(*words.get(at + 1)?);
    match words[at] {
        0 => {
            entries.extend_from_slice(words.get(at + 2..at + 2 + count)?);
            Some(2 + count)
        }
        1 => {
            let (first, last) = (f64::from(*entries.last()?), f64::from(*words.get(at + 2)?));
            let step = (last - first) / count.max(1) as f64;
            entries.extend((1..=count).map(|i| (first + step * i as f64).round() as u16));
            Some(3)
        }
        _ => None,
    }
}

/// Text of an element, also of one whose kind its writer did not know.
fn text_of(element: &InMemElement) -> Option<String> {
    text_of_unknown(element).or_else(|| element.to_str().ok().map(|t| t.into_owned()))
}

/// Text of an element whose kind its writer did not know.
fn text_of_unknown(element: &InMemElement) -> Option<String> {
    if element.header().vr.to_string() != "UN" {
        return None;
    }
    let bytes = element.to_bytes().ok()?;
    let text = std::str::from_utf8(&bytes).ok()?;
    (!text.is_empty() && !text.trim_end_matches('\0').contains(char::is_control)).then(|| text.to_string())
}

/// Values in the units of the modality.
struct Modality {
    values: Vec<f64>,
    changed: bool,
}

/// A look-up table; values outside take its ends.
struct Table {
    first: i64,
    bits: u32,
    entries: Vec<u16>,
}

impl Table {
    fn get(&self, value: f64) -> f64 {
        let at = (value as i64 - self.first).clamp(0, self.entries.len() as i64 - 1);
        f64::from(self.entries[at as usize])
    }
}

/// A window on values.
struct Window {
    center: f64,
    width: f64,
    function: String,
}

impl Window {
    /// Share of the full brightness, 0 to 1 (DICOM PS3.3 C.11.2.1.2 and C.11.2.1.3).
    fn apply(&self, value: f64) -> f64 {
        match self.function.as_str() {
            "SIGMOID" => 1.0 / (1.0 + (-4.0 * (value - self.center) / self.width).exp()),
            "LINEAR_EXACT" => ((value - self.center) / self.width + 0.5).clamp(0.0, 1.0),
            _ => {
                let (center, width) = (self.center - 0.5, self.width - 1.0);
                match () {
                    () if value <= center - width / 2.0 => 0.0,
                    () if value > center + width / 2.0 => 1.0,
                    () => (value - center) / width + 0.5,
                }
            }
        }
    }
}

/// A stored value: only the stored bits count, the highest of them is the sign of signed values.
fn number(raw: u64, bits: u32, signed: bool) -> f64 {
    let value = if bits >= 64 { raw } else { raw & ((1 << bits) - 1) };
    match signed && bits < 64 && value >> (bits - 1) == 1 {
        true => value as f64 - f64::from(bits).exp2(),
        false if signed && bits >= 64 => value as i64 as f64,
        false => value as f64,
    }
}

fn byte(share: f64) -> u8 {
    (share * 255.0).round().clamp(0.0, 255.0) as u8
}

fn gray(values: impl Iterator<Item = u8>) -> Vec<u8> {
    values.flat_map(|v| [v; 3]).collect()
}

/// Triples of samples, cut to 8 bits, through `convert`.
fn color(frame: &Frame, convert: impl Fn([f64; 3]) -> [f64; 3]) -> Vec<u8> {
    let scale = f64::from(frame.bits.saturating_sub(8)).exp2();
    let pixel =
        |p: &[f64]| convert([p[0] / scale, p[1] / scale, p[2] / scale]).map(|v| v.floor().clamp(0.0, 255.0) as u8);
    frame.values.chunks_exact(3).flat_map(pixel).collect()
}

/// Full-range YCbCr of ITU-R BT.601, rounded.
fn from_ybr([y, b, r]: [f64; 3]) -> [f64; 3] {
    let (b, r) = (b - 128.0, r - 128.0);
    [y + 1.402 * r, y - (0.114 * 1.772 * b + 0.299 * 1.402 * r) / 0.587, y + 1.772 * b].map(|v| v + 0.5)
}
