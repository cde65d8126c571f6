//! What is known of each image file: its bytes as a hash, its size, and how it looks.
//!
//! Every file is read and decoded once; `images.jsonl` of the run directory keeps the result for the stages that follow.

use std::{
    collections::HashMap,
    fs,
    path::{Path, PathBuf},
    time::UNIX_EPOCH,
};

use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::{
    error::Result,
    image::{self, Rgb8},
    qc::hash::hash,
    run_dir::{JsonlReplacement, stream_jsonl},
};

/// Bits of a perceptual hash.
pub const BITS: usize = 256;

/// Bits that hashes of one picture may differ in, of [`BITS`].
pub const SAME_BITS: u32 = 16;

/// Largest mean difference of grey values, 0 to 255, of two versions of one picture at 32 x 32.
pub const SAME_GREY: f64 = 4.0;

/// Pieces of a hash by which it is looked up: with more pieces than bits that may differ, one piece is always equal.
const PIECES: usize = SAME_BITS as usize + 1;

/// Grey values by which two columns must differ to count as different.
const MARGIN: u8 = 2;

/// One image file.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Picture {
    /// The file.
    pub path: PathBuf,
    /// Its length in bytes; 0 when it is not there.
    #[serde(default)]
    pub bytes: u64,
    /// Time of its last change in nanoseconds; 0 when it is not there.
    #[serde(default)]
    pub modified: u64,
    /// SHA-256 of its bytes in hexadecimal digits; none when it cannot be read.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sha256: Option<String>,
    /// Width and height in pixels; none when it cannot be decoded.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub size: Option<(usize, usize)>,
    /// [`perceptual_hash`], [`BITS`] bits.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hash: Option<[u64; BITS / 64]>,
    /// Why it cannot be read or decoded.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub problem: Option<String>,
    /// The first file of the data set that shows the same picture, if that is another one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub copy_of: Option<PathBuf>,
}

impl Picture {
    /// Reads and decodes a file.
    #[must_use]
    pub fn look_at(path: &Path) -> Self {
        let (bytes, modified) = stamp(path);
        let mut picture = Self { path: path.to_path_buf(), bytes, modified, ..Self::default() };
        let content = match fs::read(path) {
            Ok(content) => content,
            Err(_) => {
                picture.problem = image::open(path).err().map(|e| e.to_string());
                return picture;
            }
        };
        picture.sha256 = Some(Sha256::digest(&content).iter().map(|b| format!("{b:02x}")).collect());
        match image::decode(&content, &path.display().to_string()) {
            Ok(decoded) => {
                picture.size = Some((decoded.width, decoded.height));
                picture.hash = Some(perceptual_hash(&decoded));
            }
            Err(e) => picture.problem = Some(e.to_string()),
        }
        picture
    }

    /// Whether the file still is what was looked at, as far as its length and time of change tell.
    #[must_use]
    pub fn is_current(&self) -> bool {
        stamp(&self.path) == (self.bytes, self.modified)
    }
}

/// Length and time of change of a file; zeros when it is not there.
pub(crate) fn stamp(path: &Path) -> (u64, u64) {
    let Ok(meta) = fs::metadata(path) else { return (0, 0) };
    let since = meta.modified().ok().and_then(|t| t.duration_since(UNIX_EPOCH).ok());
    (meta.len(), since.map_or(0, |d| d.as_nanos() as u64))
}

/// Gradient hash of 16 x 16 bits: where the picture grows clearly brighter from one column to the next. Differences of
/// [`MARGIN`] grey values or less are flat: that is what noise and another compression make of a black background.
#[must_use]
pub fn perceptual_hash(picture: &Rgb8) -> [u64; BITS / 64] {
    let grid = grey_grid(picture, 17, 16);
    let mut hash = [0; BITS / 64];
    for bit in 0..BITS {
        let at = bit / 16 * 17 + bit % 16;
        if grid[at + 1] > grid[at].saturating_add(MARGIN) {
            hash[bit / 64] |= 1 << (bit % 64);
        }
    }
    hash
}

/// Mean grey values of `width` x `height` boxes, row by row.
#[must_use]
pub fn grey_grid(picture: &Rgb8, width: usize, height: usize) -> Vec<u8> {
    let mut out = Vec::with_capacity(width * height);
    for row in 0..height {
        for column in 0..width {
            let span = |i: usize, n: usize, size: usize| {
                let from = i * size / n;
                from..((i + 1) * size / n).max(from + 1).min(size.max(1))
            };
            let (mut sum, mut count) = (0u64, 0u64);
            for y in span(row, height, picture.height) {
                for x in span(column, width, picture.width) {
                    let at = (y * picture.width + x) * 3;
                    sum += picture.data[at..at + 3].iter().map(|v| u64::from(*v)).sum::<u64>();
                    count += 3;
                }
            }
            out.push((sum / count.max(1)) as u8);
        }
    }
    out
}

/// Image files by path, in the order in which they were first named.
#[derive(Debug, Clone, Default)]
pub struct Pictures {
    all: Vec<Picture>,
    by_path: HashMap<u64, u32>,
}

impl Pictures {
    /// What an earlier stage wrote.
    ///
    /// # Errors
    /// The file cannot be read.
    pub fn load(path: &Path) -> Result<Self> {
        let mut pictures = Self::default();
        for picture in stream_jsonl(path)? {
            pictures.add(picture?);
        }
        Ok(pictures)
    }

    /// Writes them for the stages that follow.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn save(&self, path: &Path) -> Result<()> {
        let mut file = JsonlReplacement::new(path)?;
        for picture in &self.all {
            file.push(picture)?;
        }
        file.finish()
    }

    /// Looks at the files that are not known yet, in parallel.
    pub fn look_at<'a>(&mut self, paths: impl IntoIterator<Item = &'a Path>) {
        let mut new: Vec<&Path> = Vec::new();
        for path in paths {
            if let std::collections::hash_map::Entry::Vacant(slot) = self.by_path.entry(key(path)) {
                slot.insert((self.all.len() + new.len()) as u32);
                new.push(path);
            }
        }
        self.all.extend(new.into_par_iter().map(Picture::look_at).collect::<Vec<_>>());
    }

    /// Looks again at the files that have changed since, in parallel.
    pub fn refresh(&mut self) {
        self.all.par_iter_mut().filter(|p| !p.is_current()).for_each(|p| *p = Picture::look_at(&p.path));
    }

    fn add(&mut self, picture: Picture) {
        self.by_path.insert(key(&picture.path), self.all.len() as u32);
        self.all.push(picture);
    }

    /// What is known of a file.
    #[must_use]
    pub fn get(&self, path: &Path) -> Option<&Picture> {
        self.index(path).map(|i| &self.all[i])
    }

    /// Position of a file among [`Self::all`].
    #[must_use]
    pub fn index(&self, path: &Path) -> Option<usize> {
        self.by_path.get(&key(path)).map(|i| *i as usize)
    }

    /// All files in order.
    #[must_use]
    pub fn all(&self) -> &[Picture] {
        &self.all
    }

    /// Notes in every file the first earlier one of the same bytes.
    pub fn find_exact_copies(&mut self) {
        let same = self.exact_copies();
        self.note(same);
    }

    fn exact_copies(&self) -> Vec<Option<usize>> {
        let mut first: HashMap<&str, usize> = HashMap::new();
        let contents = self.all.iter().enumerate();
        contents
            .map(|(i, picture)| {
                let earlier = *first.entry(picture.sha256.as_deref()?).or_insert(i);
                (earlier != i).then_some(earlier)
            })
            .collect()
    }

    fn note(&mut self, same: Vec<Option<usize>>) {
        for (i, earlier) in same.into_iter().enumerate() {
            self.all[i].copy_of = earlier.map(|e| self.all[e].path.clone());
        }
    }

    /// Notes in every file the first earlier one that shows the same picture: same bytes, or the same look.
    pub fn find_copies(&mut self) {
        let mut same = self.exact_copies();
        let mut index = LookIndex::default();
        let mut likely: Vec<(usize, usize)> = Vec::new();
        for (i, picture) in self.all.iter().enumerate() {
            if let Some(hash) = picture.hash.filter(|_| same[i].is_none()) {
                likely.extend(index.near(&hash).into_iter().map(|earlier| (earlier, i)));
                index.add(i, hash);
            }
        }
        for (earlier, i) in alike(&self.all, &self.all, likely) {
            // The first of a chain stands for all of it.
            let earlier = same[earlier].unwrap_or(earlier);
            same[i] = Some(same[i].map_or(earlier, |s| s.min(earlier)));
        }
        self.note(same);
    }
}

fn key(path: &Path) -> u64 {
    hash(path.as_os_str().as_encoded_bytes())
}

/// Perceptual hashes that are found again when a few bits differ.
#[derive(Debug, Default)]
pub struct LookIndex {
    hashes: Vec<(usize, [u64; BITS / 64])>,
    pieces: HashMap<(u8, u16), Vec<u32>>,
}

impl LookIndex {
    /// Adds a hash under a number.
    pub fn add(&mut self, number: usize, hash: [u64; BITS / 64]) {
        let at = self.hashes.len() as u32;
        self.hashes.push((number, hash));
        for piece in 0..PIECES {
            self.pieces.entry((piece as u8, bits(&hash, piece))).or_default().push(at);
        }
    }

    /// Numbers of the hashes that differ in at most [`SAME_BITS`] bits, ascending.
    #[must_use]
    pub fn near(&self, hash: &[u64; BITS / 64]) -> Vec<usize> {
        let mut found: Vec<usize> = (0..PIECES)
            .filter_map(|piece| self.pieces.get(&(piece as u8, bits(hash, piece))))
            .flatten()
            .map(|at| &self.hashes[*at as usize])
            .filter(|(_, other)| distance(hash, other) <= SAME_BITS)
            .map(|(number, _)| *number)
            .collect();
        found.sort_unstable();
        found.dedup();
        found
    }
}

/// The bits of piece `i`: [`BITS`] are divided as evenly as they can be.
fn bits(hash: &[u64; BITS / 64], piece: usize) -> u16 {
    let (from, to) = (piece * BITS / PIECES, (piece + 1) * BITS / PIECES);
    (from..to).fold(0, |all, bit| all << 1 | (hash[bit / 64] >> (bit % 64) & 1) as u16)
}

/// Bits that differ.
#[must_use]
pub fn distance(a: &[u64; BITS / 64], b: &[u64; BITS / 64]) -> u32 {
    a.iter().zip(b).map(|(x, y)| (x ^ y).count_ones()).sum()
}

/// Of pairs (index into `a`, index into `b`) with near hashes, those whose grey values agree as well, in order.
#[must_use]
pub fn alike(a: &[Picture], b: &[Picture], mut likely: Vec<(usize, usize)>) -> Vec<(usize, usize)> {
    likely.sort_unstable_by_key(|(i, j)| (*j, *i));
    let mut paths: Vec<&Path> = likely.iter().flat_map(|(i, j)| [a[*i].path.as_path(), b[*j].path.as_path()]).collect();
    paths.sort_unstable();
    paths.dedup();
    let greys: HashMap<&Path, Vec<u8>> =
        paths.into_par_iter().filter_map(|path| Some((path, grey_grid(&image::open(path).ok()?, 32, 32)))).collect();
    let same = |(i, j): &(usize, usize)| match (greys.get(a[*i].path.as_path()), greys.get(b[*j].path.as_path())) {
        (Some(x), Some(y)) => {
            let sum: u64 = x.iter().zip(y).map(|(x, y)| u64::from(x.abs_diff(*y))).sum();
            sum as f64 / x.len() as f64 <= SAME_GREY
        }
        _ => false,
    };
    likely.retain(same);
    likely
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// Writes a picture of random squares.
    pub(crate) fn picture(path: &Path, seed: u64, change: u8) {
        use rand::RngExt;
        let mut rng = crate::random::stream(seed, "test", 0);
        let cells: Vec<u8> = (0..64).map(|_| rng.random()).collect();
        let picture = ::image::RgbImage::from_fn(64, 64, |x, y| {
            let v = cells[(y / 8 * 8 + x / 8) as usize].saturating_add(change);
            ::image::Rgb([v; 3])
        });
        picture.save(path).unwrap();
    }

    #[test]
    fn a_hash_is_found_again_until_too_many_bits_differ() {
        let hash = [0x0123_4567_89ab_cdef_u64; 4];
        let mut index = LookIndex::default();
        index.add(5, hash);
        let flipped = |n: usize| {
            let mut other = hash;
            // Spread over all pieces, so that each of them is hit while it can be.
            (0..n).for_each(|i| other[i * 15 % BITS / 64] ^= 1 << (i * 15 % BITS % 64));
            assert_eq!(distance(&hash, &other), n as u32);
            index.near(&other)
        };
        assert_eq!(flipped(0), [5]);
        assert_eq!(flipped(SAME_BITS as usize), [5]);
        assert!(flipped(SAME_BITS as usize + 1).is_empty());
    }

    #[test]
    fn pictures_survive_the_file_and_changes_are_noticed() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        picture(&path("a.png"), 1, 0);
        std::fs::write(path("broken.png"), b"no image").unwrap();
        let names = [path("a.png"), path("broken.png"), path("absent.png"), path("a.png")];
        let mut pictures = Pictures::default();
        pictures.look_at(names.iter().map(PathBuf::as_path));
        assert_eq!(pictures.all().len(), 3);
        assert_eq!(pictures.get(&names[0]).unwrap().size, Some((64, 64)));
        assert!(pictures.all()[1..].iter().all(|p| p.problem.is_some()));
        assert_eq!(pictures.all().iter().map(|p| p.sha256.is_some()).collect::<Vec<_>>(), [true, true, false]);
        pictures.save(&path("images.jsonl")).unwrap();
        let mut again = Pictures::load(&path("images.jsonl")).unwrap();
        assert_eq!(again.all(), pictures.all());
        picture(&path("absent.png"), 3, 0);
        again.refresh();
        assert!(again.all()[2].problem.is_none());
    }

    #[test]
    fn copies_name_the_first_of_their_kind() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        picture(&path("a.png"), 1, 0);
        picture(&path("b.png"), 2, 0);
        std::fs::copy(path("b.png"), path("c.png")).unwrap();
        ::image::open(path("b.png")).unwrap().to_rgb8().save(path("d.jpg")).unwrap();
        let mut pictures = Pictures::default();
        pictures.look_at(["a.png", "b.png", "c.png", "d.jpg"].map(path).iter().map(PathBuf::as_path));
        pictures.find_copies();
        let of: Vec<_> = pictures.all().iter().map(|p| p.copy_of.clone()).collect();
        assert_eq!(of, [None, None, Some(path("b.png")), Some(path("b.png"))]);
        pictures.find_exact_copies();
        assert_eq!(pictures.all()[3].copy_of, None);
    }

    /// With `MEDTUNE_IMAGES` set to a folder of real images: copies made smaller and saved as JPEG are recognised.
    #[test]
    fn real_images_are_recognised_in_smaller_copies() {
        let Some(root) = std::env::var_os("MEDTUNE_IMAGES").map(PathBuf::from) else { return };
        let dir = tempfile::tempdir().unwrap();
        let endings = ["jpg", "jpeg", "png"].map(|e| Some(std::ffi::OsString::from(e)));
        let mut originals = crate::run_dir::files_below(&root).unwrap();
        originals.retain(|f| endings.contains(&f.extension().map(Into::into)) && f.file_stem().unwrap() != "mask");
        originals.truncate(600);
        let copies: Vec<PathBuf> = originals
            .par_iter()
            .enumerate()
            .map(|(i, file)| {
                let picture = ::image::open(file).unwrap().to_rgb8();
                let (width, height) = (picture.width() * 7 / 10, picture.height() * 7 / 10);
                let small =
                    ::image::imageops::resize(&picture, width, height, ::image::imageops::FilterType::CatmullRom);
                let path = dir.path().join(format!("{i}.jpg"));
                let out = fs::File::create(&path).unwrap();
                let encoder = ::image::codecs::jpeg::JpegEncoder::new_with_quality(out, 75);
                small.write_with_encoder(encoder).unwrap();
                path
            })
            .collect();
        let mut pictures = Pictures::default();
        pictures.look_at(originals.iter().chain(&copies).map(PathBuf::as_path));
        pictures.find_copies();
        let of = |path: &Path| pictures.get(path).unwrap().copy_of.clone();
        let known: Vec<&PathBuf> = originals.iter().filter(|o| of(o).is_some()).collect();
        let found = originals
            .iter()
            .zip(&copies)
            .filter(|(o, c)| of(c).is_some_and(|found| found == **o || of(o) == Some(found)))
            .count();
        eprintln!("{found} of {} copies found; {} originals alike: {known:?}", originals.len(), known.len());
        assert!(found * 10 >= originals.len() * 9);
    }
}
