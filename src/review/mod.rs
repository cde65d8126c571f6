//! Human audit: a seeded, stratified sample of rows as one page that works offline, and what its marks say about the
//! data.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    fs,
    io::Cursor,
    path::Path,
};

use base64::{Engine, engine::general_purpose::STANDARD};
use rand::Rng;
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use crate::{
    error::{Error, Kind, Result},
    image,
    parallel::{CHUNK, ordered},
    random::stream,
    run_dir::{Lines, sha256_bytes, write_atomic},
    sample::{Polarity, Role, Sample},
    stage::encode::RejectedRow,
};

pub mod interval;
pub mod marks;

/// Share of the sample that is drawn from rejected rows, when there are enough.
const REJECTED_SHARE: f64 = 0.2;

/// Longest side of an image in the page, in pixels.
const SIDE: u32 = 896;

/// JPEG quality of images that had to be made smaller.
const QUALITY: u8 = 88;

/// A row to be reviewed, with all that a reviewer needs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Item {
    /// Id of the row.
    pub id: String,
    /// Whether quality control kept it.
    pub kept: bool,
    /// Why not.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub reason: String,
    /// Task or hallucination category.
    #[serde(default)]
    pub category: String,
    /// Whether the question is said to have a false premise.
    #[serde(default)]
    pub false_premise: Option<bool>,
    /// Messages: who, and what.
    pub turns: Vec<(String, String)>,
    /// Text about the image that the pair was checked against.
    #[serde(default)]
    pub annotation: String,
    /// Piece of it that the answer was made from.
    #[serde(default)]
    pub evidence: String,
    /// What the language model of quality control said.
    #[serde(default)]
    pub check: String,
    /// Positions of its images in the page.
    pub images: Vec<usize>,
}

/// `review.json`: the sample, without its images.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Review {
    /// Name of the sample: a hash of what is in it.
    pub review: String,
    /// Seed it was drawn with.
    pub seed: u64,
    /// Rows that it was drawn from: kept and rejected.
    pub rows: [usize; 2],
    /// The rows.
    pub items: Vec<Item>,
}

/// Draws `n` rows of a run and writes `index.html` and `review.json` into `out`.
///
/// # Errors
/// The run has no rows, or the folder cannot be written. An image that cannot be read is named in the page.
pub fn write(run: &Path, out: &Path, n: usize, seed: u64) -> Result<Review> {
    let kept = draw(&run.join("kept.jsonl"), seed, |line, path| Ok((line.parse(path)?, String::new())))?;
    let read = |line: &crate::run_dir::Line, path: &Path| {
        let row: RejectedRow = line.parse(path)?;
        // What building could not read has nothing to be looked at.
        Ok((row.sample, format!("{}: {}", row.code, row.detail)))
    };
    let rejected = run.join("rejected.jsonl");
    let rejected = if rejected.exists() { draw(&rejected, seed, read)? } else { Drawn::default() };
    if kept.rows == 0 {
        return Err(Error::new(Kind::Run, "there are no kept rows to review").at(run.display()));
    }
    let rows = [kept.rows, rejected.rows];
    let few = ((n as f64 * REJECTED_SHARE).round() as usize).min(rejected.rows);
    let chosen: Vec<(Sample, String, bool)> = kept
        .choose(n.saturating_sub(few))
        .into_iter()
        .map(|(s, r)| (s, r, true))
        .chain(rejected.choose(few).into_iter().map(|(s, r)| (s, r, false)))
        .collect();
    let mut paths: Vec<&Path> = chosen.iter().flat_map(|(s, ..)| &s.images).map(|i| i.path.as_path()).collect();
    paths.sort_unstable();
    paths.dedup();
    let pictures: Vec<String> = paths.par_iter().map(|path| picture(path)).collect();
    let place: HashMap<&Path, usize> = paths.iter().enumerate().map(|(i, p)| (*p, i)).collect();
    let mut items: Vec<(u64, Item)> = chosen
        .iter()
        .map(|(sample, reason, kept)| {
            let images = sample.images.iter().map(|i| place[i.path.as_path()]).collect();
            (stream(seed, &format!("review/order/{}", sample.id), 0).next_u64(), item(sample, reason, *kept, images))
        })
        .collect();
    // A reviewer must not know from its place whether a row was kept.
    items.sort_by(|a, b| (a.0, &a.1.id).cmp(&(b.0, &b.1.id)));
    let items: Vec<Item> = items.into_iter().map(|(_, item)| item).collect();
    let name = sha256_bytes(json(&items)?.as_bytes())[..16].to_string();
    let review = Review { review: name, seed, rows, items };
    let page = include_str!("review.html")
        .replace("__REVIEW__", &embed(&json(&review)?))
        .replace("__IMAGES__", &embed(&json(&pictures)?));
    write_atomic(&out.join("review.json"), json(&review)?.as_bytes())?;
    write_atomic(&out.join("index.html"), page.as_bytes())?;
    Ok(review)
}

fn json(value: &impl Serialize) -> Result<String> {
    serde_json::to_string(value).map_err(|e| Error::new(Kind::Run, "a review has no JSON form").source(e))
}

/// JSON that may stand in a script element: nothing in it can end the element.
fn embed(json: &str) -> String {
    json.replace('<', "\\u003c")
}

/// Rows of a file by stratum, those with the smallest draws.
#[derive(Default)]
struct Drawn {
    rows: usize,
    strata: BTreeMap<String, Stratum>,
}

/// Rows of one polarity and category: how many there are, and the first of them in random order, each with the reason of
/// its rejection.
type Stratum = (usize, BTreeMap<u64, (Sample, String)>);

/// Most rows of one stratum that are remembered.
const MOST: usize = 5000;

fn draw(
    path: &Path,
    seed: u64,
    read: impl Fn(&crate::run_dir::Line, &Path) -> Result<(Sample, String)> + Sync,
) -> Result<Drawn> {
    let mut drawn = Drawn::default();
    let rows = ordered(Lines::open(path)?, CHUNK, |line| {
        let (sample, reason) = read(&line?, path)?;
        let key = stream(seed, &format!("review/{}", sample.id), 0).next_u64();
        Ok::<_, Error>((key, sample, reason))
    });
    for row in rows {
        let (key, sample, reason) = row?;
        if sample.turns.len() < 2 {
            continue;
        }
        drawn.rows += 1;
        let (count, first) = drawn.strata.entry(stratum(&sample)).or_default();
        *count += 1;
        if first.len() < MOST || first.last_key_value().is_some_and(|(last, _)| key < *last) {
            first.insert(key, (sample, reason));
        }
        if first.len() > MOST {
            first.pop_last();
        }
    }
    Ok(drawn)
}

/// Rows are drawn from each polarity and category in proportion.
fn stratum(sample: &Sample) -> String {
    format!("{:?}/{}", sample.polarity, sample.category.as_deref().unwrap_or_default())
}

impl Drawn {
    /// `n` rows: each stratum gives its share, rounded by largest remainder, so that every row is as likely as any other.
    fn choose(self, n: usize) -> Vec<(Sample, String)> {
        let n = n.min(self.rows);
        let exact = |count: usize| n as f64 * count as f64 / self.rows.max(1) as f64;
        let mut shares: Vec<(usize, f64)> =
            self.strata.values().map(|(count, _)| (exact(*count) as usize, exact(*count).fract())).collect();
        let mut left = n - shares.iter().map(|s| s.0).sum::<usize>();
        let mut order: Vec<usize> = (0..shares.len()).collect();
        order.sort_by(|a, b| shares[*b].1.total_cmp(&shares[*a].1).then(a.cmp(b)));
        for i in order {
            if left > 0 {
                shares[i].0 += 1;
                left -= 1;
            }
        }
        let strata = self.strata.into_values().zip(shares);
        strata.flat_map(|((_, first), (share, _))| first.into_values().take(share)).collect()
    }
}

fn item(sample: &Sample, reason: &str, kept: bool, images: Vec<usize>) -> Item {
    let text = |key: &str| match sample.meta.get(key) {
        Some(serde_json::Value::String(text)) => text.clone(),
        _ => String::new(),
    };
    let said = |key: &str| sample.meta.get("qc").and_then(|qc| qc[key].as_str()).unwrap_or_default().to_string();
    let check = [said("judgement"), said("reason")];
    let who = |role| match role {
        Role::System => "System",
        Role::User => "Question",
        Role::Assistant => "Answer",
    };
    Item {
        id: sample.id.clone(),
        kept,
        reason: reason.to_string(),
        category: sample.category.clone().unwrap_or_default(),
        false_premise: sample.polarity.map(|p| p == Polarity::Hallucination),
        turns: sample
            .turns
            .iter()
            .map(|t| (who(t.role).to_string(), t.text.replace("<image>", "").trim().to_string()))
            .collect(),
        annotation: sample.annotation.clone().unwrap_or_default(),
        evidence: text("evidence"),
        check: check.into_iter().filter(|s| !s.is_empty()).collect::<Vec<_>>().join(": "),
        images,
    }
}

/// The image as a data URI, made smaller if it is large; the empty text when it cannot be read.
fn picture(path: &Path) -> String {
    let uri = |mime: &str, bytes: &[u8]| format!("data:{mime};base64,{}", STANDARD.encode(bytes));
    let Ok(decoded) = image::open(path) else { return String::new() };
    let (width, height) = (decoded.width as u32, decoded.height as u32);
    let small = width.max(height) <= SIDE;
    if small
        && let Ok(bytes) = fs::read(path)
        && bytes.starts_with(b"\x89PNG")
        && bytes.len() < 200_000
    {
        return uri("image/png", &bytes);
    }
    let Some(buffer) = ::image::RgbImage::from_raw(width, height, decoded.data) else { return String::new() };
    let mut picture = ::image::DynamicImage::ImageRgb8(buffer);
    if !small {
        picture = picture.resize(SIDE, SIDE, ::image::imageops::FilterType::Triangle);
    }
    let mut bytes = Cursor::new(Vec::new());
    let encoder = ::image::codecs::jpeg::JpegEncoder::new_with_quality(&mut bytes, QUALITY);
    match picture.write_with_encoder(encoder) {
        Ok(()) => uri("image/jpeg", bytes.get_ref()),
        Err(_) => String::new(),
    }
}

/// Ids of a review, to hold marks against.
impl Review {
    /// All ids.
    #[must_use]
    pub fn ids(&self) -> BTreeSet<&str> {
        self.items.iter().map(|i| i.id.as_str()).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{qc::tests::row, run_dir::RunDir, sample::ImageRef};

    fn run(root: &Path) -> RunDir {
        let dir = RunDir::open(root.join("run")).unwrap();
        let image = root.join("a.png");
        ::image::RgbImage::new(1200, 40).save(&image).unwrap();
        let sample = |i: usize| Sample {
            id: format!("r{i}"),
            images: vec![ImageRef { path: image.clone() }],
            polarity: Some([Polarity::Hallucination, Polarity::NonHallucination][usize::from(i.is_multiple_of(4))]),
            category: Some(["a", "b"][i % 2].into()),
            annotation: Some("</script><script>alert(1)</script> & more".into()),
            ..row("<image>\nIs it <b>large</b>?", "It is small.")
        };
        dir.write_jsonl("kept.jsonl", (0..300).map(sample)).unwrap();
        let bad = (300..340).map(|i| RejectedRow { sample: sample(i), code: "length".into(), detail: "short".into() });
        dir.write_jsonl("rejected.jsonl", bad).unwrap();
        dir
    }

    #[test]
    fn the_sample_is_proportional_seeded_and_holds_both_sides() {
        let root = tempfile::tempdir().unwrap();
        let dir = run(root.path());
        let out = root.path().join("review");
        let review = write(dir.root(), &out, 100, 5).unwrap();
        assert_eq!((review.items.len(), review.rows, review.ids().len()), (100, [300, 40], 100));
        let kept: Vec<&Item> = review.items.iter().filter(|i| i.kept).collect();
        assert_eq!((kept.len(), kept.iter().filter(|i| i.false_premise == Some(false)).count()), (80, 20));
        assert_eq!(kept.iter().filter(|i| i.category == "b").count(), 40);
        assert!(review.items.iter().filter(|i| !i.kept).all(|i| i.reason == "length: short"));
        assert!(review.items[..20].iter().any(|i| !i.kept), "rejected rows stand among the others");
        assert_eq!(write(dir.root(), &out, 100, 5).unwrap(), review);
        assert_ne!(write(dir.root(), &out, 100, 6).unwrap().review, review.review);
        assert_eq!(write(dir.root(), &out, 5000, 6).unwrap().items.len(), 340);
    }

    #[test]
    fn the_page_is_whole_and_no_text_escapes_its_place() {
        let root = tempfile::tempdir().unwrap();
        let dir = run(root.path());
        write(dir.root(), root.path(), 10, 5).unwrap();
        let page = fs::read_to_string(root.path().join("index.html")).unwrap();
        assert!(!page.contains("__REVIEW__") && !page.contains("__IMAGES__"));
        assert!(!page.contains("alert(1)</script>") && page.contains("data:image/jpeg;base64,"));
        for outside in ["http://", "https://", "src=\"/", "@import"] {
            assert!(!page.contains(outside), "{outside}");
        }
        let start = page.find("id=\"review\">").unwrap() + "id=\"review\">".len();
        let text = &page[start..start + page[start..].find("</script>").unwrap()];
        let review: Review = serde_json::from_str(text).unwrap();
        assert_eq!(review.items[0].annotation, "</script><script>alert(1)</script> & more");
    }
}
