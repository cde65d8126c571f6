//! Looks for test images and test questions in the training data: same bytes, nearly the same picture, same words.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
    fmt,
    path::{Path, PathBuf},
};

use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::{
    error::{Error, Kind, Result},
    image,
    qc::words::normal,
    sample::{Sample, Split},
};

pub mod picture;

/// Words of an n-gram that must not occur on both sides.
const NGRAM: usize = 8;

/// Bits that difference hashes of the same picture may differ in, of 256.
const HASH_BITS: u32 = 16;

/// Largest mean difference of grey values, 0 to 255, of two versions of one picture at 32 x 32.
const GREY_DIFFERENCE: f64 = 4.0;

/// What training and test have in common.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct LeakReport {
    /// Different images of training and validation rows, by content.
    pub train_images: usize,
    /// Different images of test rows, by content.
    pub test_images: usize,
    /// Files whose exact content is in both, one path an image.
    pub shared_images: Vec<PathBuf>,
    /// Pairs (training file, test file) that look the same and are not byte for byte.
    pub similar_images: Vec<(PathBuf, PathBuf)>,
    /// Test rows whose image, question and answer are all in training.
    pub shared_rows: usize,
    /// Test questions of eight words or more.
    pub long_questions: usize,
    /// Of these, the ones that share eight words in a row with a training question.
    pub shared_questions: usize,
}

impl LeakReport {
    /// Whether images or rows are shared, which makes test numbers worthless.
    #[must_use]
    pub fn leaks(&self) -> bool {
        !self.shared_images.is_empty() || self.shared_rows > 0
    }

    /// The error of a run whose test split leaks.
    ///
    /// # Errors
    /// Images or rows are shared.
    pub fn gate(&self) -> Result<()> {
        if !self.leaks() {
            return Ok(());
        }
        let example = self.shared_images.first().map_or_else(String::new, |p| format!(", for example {}", p.display()));
        Err(Error::new(Kind::Gate, "training and test share images")
            .expected("none in common")
            .found(format!("{} images{example}", self.shared_images.len()))
            .help("let medtune split by image (data.split = \"by_image\"), or set qc.allow_leaks = true"))
    }
}

impl fmt::Display for LeakReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "images: {} train, {} test", self.train_images, self.test_images)?;
        writeln!(f, "shared images: {}", self.shared_images.len())?;
        writeln!(f, "similar images: {}", self.similar_images.len())?;
        writeln!(f, "shared rows: {}", self.shared_rows)?;
        write!(f, "shared questions: {} of {} with {NGRAM} words or more", self.shared_questions, self.long_questions)
    }
}

/// Looks for what test rows have in common with all others.
///
/// # Errors
/// An image cannot be read or decoded.
pub fn check(samples: &[Sample]) -> Result<LeakReport> {
    let (test, train): (Vec<&Sample>, Vec<&Sample>) = samples.iter().partition(|s| s.split == Split::Test);
    let files = fingerprints(samples)?;
    let (train_images, test_images) = (by_content(&train, &files), by_content(&test, &files));
    let shared = test_images.iter().filter(|(hash, _)| train_images.contains_key(*hash));
    let mut report = LeakReport {
        train_images: train_images.len(),
        test_images: test_images.len(),
        shared_images: shared.map(|(_, file)| file.path.clone()).collect(),
        similar_images: similar(&train_images, &test_images),
        shared_rows: shared_rows(&train, &test, &files),
        ..LeakReport::default()
    };
    report.shared_images.sort();
    (report.long_questions, report.shared_questions) = shared_questions(&train, &test);
    Ok(report)
}

/// Number of images that rows of `marks` other than test share with its test rows, by file content; `marks` gives each
/// sample's split.
///
/// # Errors
/// An image cannot be read or decoded.
pub fn check_as(samples: &[Sample], mark: impl Fn(&Sample) -> Split) -> Result<LeakReport> {
    let marked: Vec<Sample> = samples.iter().map(|s| Sample { split: mark(s), ..s.clone() }).collect();
    check(&marked)
}

/// SHA-256 of a file's bytes, by path.
///
/// # Errors
/// A file cannot be read.
pub fn content_hashes(samples: &[Sample]) -> Result<HashMap<PathBuf, [u8; 32]>> {
    let paths: BTreeSet<&PathBuf> = samples.iter().flat_map(|s| &s.images).map(|i| &i.path).collect();
    paths.into_par_iter().map(|path| Ok((path.clone(), Sha256::digest(&read(path)?).into()))).collect()
}

fn read(path: &Path) -> Result<Vec<u8>> {
    std::fs::read(path)
        .map_err(|e| Error::new(Kind::Image, "cannot read an image").code("image_missing").at(path.display()).source(e))
}

struct File {
    path: PathBuf,
    content: [u8; 32],
    /// Whether brightness grows from left to right, on a 16 x 16 grid.
    difference: [u64; 4],
    /// Grey values at 32 x 32.
    grey: Vec<u8>,
}

fn fingerprints(samples: &[Sample]) -> Result<HashMap<PathBuf, File>> {
    let paths: BTreeSet<&PathBuf> = samples.iter().flat_map(|s| &s.images).map(|i| &i.path).collect();
    paths.into_par_iter().map(|path| Ok((path.clone(), fingerprint(path)?))).collect()
}

fn fingerprint(path: &Path) -> Result<File> {
    let bytes = read(path)?;
    let picture = image::decode(&bytes, &path.display().to_string())?;
    let grid = grey_grid(&picture, 17, 16);
    let mut difference = [0u64; 4];
    for i in 0..256 {
        let (row, column) = (i / 16, i % 16);
        if grid[row * 17 + column + 1] > grid[row * 17 + column] {
            difference[i / 64] |= 1 << (i % 64);
        }
    }
    Ok(File {
        path: path.to_path_buf(),
        content: Sha256::digest(&bytes).into(),
        difference,
        grey: grey_grid(&picture, 32, 32),
    })
}

/// Mean grey values of `width` x `height` boxes.
fn grey_grid(picture: &image::Rgb8, width: usize, height: usize) -> Vec<u8> {
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

fn by_content<'a>(samples: &[&Sample], files: &'a HashMap<PathBuf, File>) -> BTreeMap<[u8; 32], &'a File> {
    let paths = samples.iter().flat_map(|s| &s.images).map(|i| &i.path);
    paths.filter_map(|p| files.get(p)).map(|file| (file.content, file)).collect()
}

fn similar(train: &BTreeMap<[u8; 32], &File>, test: &BTreeMap<[u8; 32], &File>) -> Vec<(PathBuf, PathBuf)> {
    let mut found: Vec<(PathBuf, PathBuf)> = test
        .par_iter()
        .filter(|(content, _)| !train.contains_key(*content))
        .flat_map_iter(|(_, b)| train.values().filter(|a| alike(a, b)).map(|a| (a.path.clone(), b.path.clone())))
        .collect();
    found.sort();
    found
}

fn alike(a: &File, b: &File) -> bool {
    let bits: u32 = a.difference.iter().zip(b.difference).map(|(x, y)| (x ^ y).count_ones()).sum();
    if bits > HASH_BITS {
        return false;
    }
    let sum: u64 = a.grey.iter().zip(&b.grey).map(|(x, y)| u64::from(x.abs_diff(*y))).sum();
    sum as f64 / a.grey.len() as f64 <= GREY_DIFFERENCE
}

fn shared_rows(train: &[&Sample], test: &[&Sample], files: &HashMap<PathBuf, File>) -> usize {
    let key = |s: &Sample| {
        let images: Vec<[u8; 32]> = s.images.iter().filter_map(|i| files.get(&i.path)).map(|f| f.content).collect();
        (images, normal(&s.question()), normal(s.answer()))
    };
    let known: HashSet<_> = train.iter().map(|s| key(s)).collect();
    test.iter().filter(|s| known.contains(&key(s))).count()
}

/// Test questions of at least [`NGRAM`] words, and how many of them share an n-gram with training.
fn shared_questions(train: &[&Sample], test: &[&Sample]) -> (usize, usize) {
    let grams = |s: &Sample| -> Vec<String> {
        let text = normal(&s.question());
        let words: Vec<&str> = text.split(' ').collect();
        words.windows(NGRAM).map(|w| w.join(" ")).collect()
    };
    let known: HashSet<String> = train.iter().flat_map(|s| grams(s)).collect();
    let long: Vec<Vec<String>> = test.iter().map(|s| grams(s)).filter(|g| !g.is_empty()).collect();
    let shared = long.iter().filter(|g| g.iter().any(|n| known.contains(n))).count();
    (long.len(), shared)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        datasets::{MARKED_SPLIT, SampleSet},
        source::DataConfig,
    };

    fn picture(path: &Path, seed: u64, change: u8) {
        use rand::RngExt;
        let mut rng = crate::random::stream(seed, "test", 0);
        let cells: Vec<u8> = (0..64).map(|_| rng.random()).collect();
        let picture = ::image::RgbImage::from_fn(64, 64, |x, y| {
            let v = cells[(y / 8 * 8 + x / 8) as usize].saturating_add(change);
            ::image::Rgb([v; 3])
        });
        picture.save(path).unwrap();
    }

    fn row(path: &Path, question: &str, split: Split) -> Sample {
        let images = vec![crate::sample::ImageRef { path: path.into() }];
        Sample { images, split, ..crate::qc::tests::row(question, "Yes it is.") }
    }

    #[test]
    fn same_bytes_similar_pictures_and_same_words_are_found() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        picture(&path("a.png"), 1, 0);
        picture(&path("b.png"), 2, 0);
        picture(&path("b_brighter.png"), 2, 2);
        picture(&path("c.png"), 3, 0);
        std::fs::copy(path("a.png"), path("a_again.png")).unwrap();
        let long = "is there any sign of a tumor in the left lung";
        let rows = [
            row(&path("a.png"), "Is it large?", Split::Train),
            row(&path("b.png"), long, Split::Validation),
            row(&path("a_again.png"), "Is it large", Split::Test),
            row(&path("b_brighter.png"), &format!("Please say: {long}?"), Split::Test),
            row(&path("c.png"), "Is it on the left side of this new image?", Split::Test),
        ];
        let report = check(&rows).unwrap();
        assert_eq!((report.train_images, report.test_images), (2, 3));
        assert_eq!(report.shared_images, [path("a_again.png")]);
        assert_eq!(report.similar_images, [(path("b.png"), path("b_brighter.png"))]);
        assert_eq!((report.shared_rows, report.long_questions, report.shared_questions), (1, 2, 1));
        assert!(report.leaks() && report.gate().is_err());
        let clean = check(&[rows[0].clone(), rows[1].clone(), rows[4].clone()]).unwrap();
        assert!(clean.gate().is_ok() && clean.similar_images.is_empty());
    }

    #[test]
    fn different_phantoms_are_not_similar() {
        let dir = tempfile::tempdir().unwrap();
        let config = DataConfig { images: 90, ..DataConfig::default() };
        let set = SampleSet::load(&config, 4, dir.path()).unwrap();
        let report =
            check_as(set.samples(), |s| if s.origin.row % 2 == 0 { Split::Test } else { Split::Train }).unwrap();
        assert_eq!((report.train_images, report.test_images), (45, 45));
        assert!(!report.leaks());
        assert!(report.similar_images.len() < 9, "{:?}", report.similar_images);
    }

    /// With `MEDTUNE_VQA_RAD` set to a folder of the public release.
    #[test]
    fn vqa_rads_own_marks_share_as_many_images_as_its_json_says() {
        let Some(path) = std::env::var_os("MEDTUNE_VQA_RAD").map(PathBuf::from) else { return };
        let text = std::fs::read_to_string(path.join("VQA_RAD Dataset Public.json")).unwrap();
        let rows: Vec<serde_json::Value> = serde_json::from_str(&text).unwrap();
        let mut sides: HashMap<&str, [bool; 2]> = HashMap::new();
        for row in &rows {
            let test = row["phrase_type"].as_str().unwrap().starts_with("test");
            sides.entry(row["image_name"].as_str().unwrap()).or_default()[usize::from(test)] = true;
        }
        let expected = sides.values().filter(|s| s[0] && s[1]).count();
        let config = DataConfig { source: "vqa_rad".into(), path: Some(path), ..DataConfig::default() };
        let set = SampleSet::load(&config, 0, Path::new("")).unwrap();
        assert_eq!(set.samples().len(), rows.len());
        let marked = |s: &Sample| if s.meta[MARKED_SPLIT] == "test" { Split::Test } else { Split::Train };
        let report = check_as(set.samples(), marked).unwrap();
        assert_eq!(report.shared_images.len(), expected);
        assert!(report.gate().is_err());
    }
}
