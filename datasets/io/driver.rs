//! What every reader shares: parts are checked first and streamed then, rows are filtered, checked and counted, and the
//! counts are compared with the published sizes.

use std::{
    collections::{BTreeMap, VecDeque},
    path::{Path, PathBuf},
};

use serde_json::{Value, json};

use super::{Record, Records, layout, store_image};
use crate::{
    datasets::{MARKED_SPLIT, check_images, check_turns},
    error::{Error, Kind, Result},
    image::{Rgb8, dicom},
    sample::{AnswerType, ImageRef, Origin, Role, Sample, Split, Turn, meta},
    source::{DataConfig, Facts, Notes, Samples, Source},
};

/// One file of a data set.
#[derive(Debug, Clone)]
pub(crate) struct Part {
    /// The file.
    pub(crate) path: PathBuf,
    /// Split of all its rows, where the file has one.
    pub(crate) split: Option<Split>,
    /// What else the place of the file says, for example `radiology`.
    pub(crate) tag: &'static str,
}

impl Part {
    /// A file whose name says the split.
    pub(crate) fn named(path: PathBuf) -> Self {
        Self { split: layout::split_of(&path), path, tag: "" }
    }

    /// The split as a word for ids; `rows` where there is none.
    pub(crate) fn split_name(&self) -> &'static str {
        self.split.map_or("rows", split_name)
    }
}

/// The word of a split.
pub(crate) fn split_name(split: Split) -> &'static str {
    match split {
        Split::Train => "train",
        Split::Validation => "validation",
        Split::Test => "test",
    }
}

/// The folder or file of a reader, resolved through the hub's cache.
///
/// # Errors
/// `data.path` is not set, or is ambiguous.
pub(crate) fn root(config: &DataConfig) -> Result<PathBuf> {
    let path = config.path.as_ref().ok_or_else(|| {
        Error::new(Kind::Config, "the data source needs a path")
            .at("data.path")
            .help("set data.path to the file or folder to read; `medtune data get NAME` downloads some data sets")
    })?;
    if !path.exists() {
        return Err(Error::new(Kind::Data, "there is no such file or folder")
            .at(path.display())
            .help("check data.path"));
    }
    layout::snapshot(path)
}

/// The error of a folder that has none of the files a reader reads.
pub(crate) fn nothing_to_read(root: &Path, expected: &str, source: &str) -> Error {
    Error::new(Kind::Data, "the folder has no file that this reader reads")
        .at(root.display())
        .expected(expected)
        .help(format!("`medtune explain {source}` says which forms are read"))
}

/// Where images of rows are, and where those go that a file itself holds.
#[derive(Debug, Clone)]
pub(crate) struct Images {
    /// Folders that paths start from; the first that has the file counts.
    folders: Vec<PathBuf>,
    store: PathBuf,
}

impl Images {
    /// `data.image_dir` alone if it is set, else the folders a data set is known to use.
    pub(crate) fn new(config: &DataConfig, work_dir: &Path, folders: Vec<PathBuf>) -> Self {
        let folders = config.image_dir.clone().map_or(folders, |dir| vec![dir]);
        Self { folders, store: work_dir.join("images") }
    }

    /// The file called `name`; where none exists, the place it is expected at.
    pub(crate) fn find(&self, name: &str) -> ImageRef {
        let mut paths = self.folders.iter().map(|folder| folder.join(name));
        let first = self.folders.first().map_or_else(|| PathBuf::from(name), |folder| folder.join(name));
        ImageRef { path: paths.find(|path| path.is_file()).unwrap_or(first) }
    }

    /// The image with the first of these extensions that exists.
    pub(crate) fn find_stem(&self, stem: &str, extensions: &[&str]) -> ImageRef {
        let names: Vec<String> = extensions.iter().map(|e| format!("{stem}.{e}")).collect();
        let existing = names.iter().map(|name| self.find(name)).find(|image| image.path.is_file());
        existing.unwrap_or_else(|| self.find(names.first().map_or(stem, String::as_str)))
    }

    /// Images of a column: bytes that the file holds, a path, or a list of paths.
    ///
    /// # Errors
    /// There is none, or the bytes are not an image.
    pub(crate) fn of(&self, record: &Record, column: &str) -> Result<Vec<ImageRef>> {
        let held = record.images.iter().filter(|(name, _)| name == column);
        let held: Vec<ImageRef> = held
            .map(|(_, bytes)| Ok(ImageRef { path: store_image(&self.store, bytes, &record.at)? }))
            .collect::<Result<_>>()?;
        if !held.is_empty() {
            return Ok(held);
        }
        let one = |value: &Value| match value {
            Value::String(path) if !path.trim().is_empty() => Some(self.find(path.trim())),
            Value::Object(group) => Some(self.find(group.get("path")?.as_str()?)),
            _ => None,
        };
        let found: Option<Vec<ImageRef>> = match record.fields.get(column) {
            Some(Value::Array(list)) => list.iter().map(one).collect(),
            Some(value) => one(value).map(|image| vec![image]),
            None => None,
        };
        found.filter(|images| !images.is_empty()).ok_or_else(|| {
            record.error("image_missing", &format!("a row has no image in `{column}`")).expected("a path or its bytes")
        })
    }
}

/// A row with one question about its images and one answer.
pub(crate) fn question(id: String, images: Vec<ImageRef>, question: &str, answer: &str) -> Sample {
    let marks = "<image>\n".repeat(images.len());
    let bare = question.replace("<image>", " ");
    let bare = bare.trim();
    let mut turns = vec![Turn { role: Role::User, text: format!("{marks}{bare}") }];
    if !answer.trim().is_empty() {
        turns.push(Turn { role: Role::Assistant, text: answer.trim().to_string() });
    }
    let group = group_of(&images, &id);
    Sample { id, images, turns, group, ..Sample::default() }
}

/// A row that describes its image, with the description as annotation.
pub(crate) fn caption(id: String, images: Vec<ImageRef>, caption: &str) -> Sample {
    let sample = question(id, images, "Describe this image.", caption);
    Sample { category: Some("caption".into()), annotation: Some(caption.trim().to_string()), ..sample }
}

/// Adds the options to a question, and below it if the user wants it so.
pub(crate) fn with_options(mut sample: Sample, options: Vec<String>, config: &DataConfig) -> Sample {
    sample.answer_type = Some(AnswerType::Mcq);
    if config.show_options {
        sample.meta.insert(meta::QUESTION.into(), json!(sample.question()));
        for (letter, option) in ('A'..).zip(&options) {
            sample.turns[0].text.push_str(&format!("\n{letter}. {option}"));
        }
    }
    sample.options = options;
    sample
}

/// Whether an answer is yes or no, where a data set does not say whether a question is closed.
pub(crate) fn open_or_closed(answer: &str) -> AnswerType {
    match answer.trim().trim_end_matches('.').to_lowercase().as_str() {
        "yes" | "no" => AnswerType::Closed,
        _ => AnswerType::Open,
    }
}

/// Key of a row's images, or of the row where it has none.
pub(crate) fn group_of(images: &[ImageRef], id: &str) -> String {
    match images {
        [] => id.to_string(),
        images => images.iter().map(|i| i.path.display().to_string()).collect::<Vec<_>>().join("|"),
    }
}

/// Marks the article of a row, and keeps rows of one article together.
pub(crate) fn with_article(mut sample: Sample, article: Option<String>) -> Sample {
    if let Some(article) = article {
        sample.group.clone_from(&article);
        sample.meta.insert(meta::ARTICLE.into(), json!(article));
    }
    sample
}

/// The article that an image name of the PubMed-based data sets states: `PMC1000001_F1.jpg`, `18000001_F1.jpg`,
/// `pmc_900001_0.jpg`.
pub(crate) fn article_of(image: &str) -> Option<String> {
    let name = Path::new(image).file_stem()?.to_str()?;
    let digits = |text: &str| !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
    if let Some(rest) = name.strip_prefix("pmc_") {
        let number = rest.split('_').next().filter(|n| digits(n))?;
        return Some(format!("pubmedvision:pmc_{number}"));
    }
    let (article, _) = name.split_once('_')?;
    match article.strip_prefix("PMC") {
        Some(number) if digits(number) => Some(format!("pmcid:{article}")),
        None if digits(article) && article.len() >= 5 => Some(format!("pmid:{article}")),
        _ => None,
    }
}

/// A reader at work.
pub(crate) struct Reading<'a> {
    pub(crate) source: &'a dyn Source,
    pub(crate) config: &'a DataConfig,
    pub(crate) work_dir: &'a Path,
    /// Whether rows without an answer are rows: question files whose answers are published elsewhere, or not at all.
    pub(crate) answers_optional: bool,
}

impl Reading<'_> {
    /// Checks every part, then streams their rows through `to_sample`.
    ///
    /// # Errors
    /// A part is missing, cut off, or of a form that cannot be read.
    pub(crate) fn parts<F>(&self, parts: Vec<Part>, to_sample: F) -> Result<Samples>
    where
        F: FnMut(&Record, &Part) -> Result<Sample> + Send + 'static,
    {
        let notes = Notes::default();
        let mut wanted = VecDeque::new();
        for part in parts {
            let name = part.split.map_or(String::new(), |s| format!(" ({})", split_name(s)));
            if part.split.is_some_and(|split| !self.wants(split)) {
                notes.info(format!("left out: {}{name}, not in data.splits", part.path.display()));
                continue;
            }
            super::check(&part.path)?;
            notes.info(format!("reads {}{name}", part.path.display()));
            wanted.push_back(part);
        }
        if wanted.is_empty() {
            return Err(Error::new(Kind::Config, "no part of the data set is in the splits to read")
                .at("data.splits")
                .found(format!("{:?}", self.config.splits)));
        }
        let rows = Rows {
            name: self.source.name(),
            facts: self.source.facts(),
            config: self.config.clone(),
            store: self.work_dir.join("images"),
            answers_optional: self.answers_optional,
            parts: wanted,
            current: None,
            to_sample,
            tally: Tally::default(),
            notes: notes.clone(),
            ended: false,
        };
        match self.config.by_image {
            false => Ok(Samples::with_notes(rows, notes)),
            true => Ok(Samples::with_notes(by_image(rows), notes)),
        }
    }

    fn wants(&self, split: Split) -> bool {
        self.config.splits.is_empty() || self.config.splits.contains(&split)
    }
}

/// Rows of a data set in order.
struct Rows<F> {
    name: &'static str,
    facts: &'static Facts,
    config: DataConfig,
    store: PathBuf,
    answers_optional: bool,
    parts: VecDeque<Part>,
    current: Option<(Part, Records)>,
    to_sample: F,
    tally: Tally,
    notes: Notes,
    ended: bool,
}

/// What has been read.
#[derive(Default)]
struct Tally {
    /// Rows by split; none where nothing marks one.
    rows: BTreeMap<Option<Split>, usize>,
    unreadable: usize,
    language: usize,
    splits: usize,
    /// Images by what the headers of their files give away.
    headers: BTreeMap<String, usize>,
}

impl<F: FnMut(&Record, &Part) -> Result<Sample> + Send> Iterator for Rows<F> {
    type Item = Result<Sample>;

    fn next(&mut self) -> Option<Self::Item> {
        while !self.ended {
            let Some((part, records)) = &mut self.current else {
                let Some(part) = self.parts.pop_front() else {
                    self.finish();
                    break;
                };
                match super::open(&part.path) {
                    Ok(records) => self.current = Some((part, records)),
                    Err(e) => return Some(Err(e)),
                }
                continue;
            };
            let Some(record) = records.next() else {
                self.current = None;
                continue;
            };
            let split = part.split;
            let sample = match record {
                Ok(record) => {
                    let sample = (self.to_sample)(&record, part);
                    let part = part.clone();
                    sample.and_then(|sample| self.complete(sample, &record, &part))
                }
                Err(e) => Err(e),
            };
            match sample {
                Ok(None) => {}
                Ok(Some(sample)) => return Some(Ok(sample)),
                Err(e) => {
                    self.tally.unreadable += 1;
                    *self.tally.rows.entry(split).or_default() += usize::from(split.is_some());
                    return Some(Err(e));
                }
            }
        }
        None
    }
}

impl<F> Rows<F> {
    /// Fills in what is the same for all sources and checks the row; nothing if it is not wanted.
    fn complete(&mut self, mut sample: Sample, record: &Record, part: &Part) -> Result<Option<Sample>> {
        sample.origin = Origin { dataset: self.name.into(), file: part.path.clone(), row: record.row };
        if let Some(split) = part.split
            && !sample.meta.contains_key(MARKED_SPLIT)
        {
            sample.meta.insert(MARKED_SPLIT.into(), json!(split));
        }
        // The name of an image that the file holds is its hash; where the run lies does not matter.
        sample.group = sample.group.replace(&format!("{}{}", self.store.display(), std::path::MAIN_SEPARATOR), "");
        let marked: Option<Split> = sample.meta.get(MARKED_SPLIT).and_then(|m| serde_json::from_value(m.clone()).ok());
        if !self.config.splits.is_empty() && !marked.is_some_and(|split| self.config.splits.contains(&split)) {
            self.tally.splits += 1;
            return Ok(None);
        }
        if let (Some(wanted), Some(Value::String(language))) = (&self.config.language, sample.meta.get(meta::LANGUAGE))
            && language != wanted
        {
            self.tally.language += 1;
            return Ok(None);
        }
        check_turns(&sample, &record.at, self.answers_optional)?;
        check_images(&sample, &record.at)?;
        self.render_dicom(&mut sample)?;
        *self.tally.rows.entry(marked).or_default() += 1;
        Ok(Some(sample))
    }

    /// Puts PNG files in the place of DICOM files: their headers name people and must not travel with the rows.
    fn render_dicom(&mut self, sample: &mut Sample) -> Result<()> {
        for image in &mut sample.images {
            if !might_be_dicom(&image.path) {
                continue;
            }
            let bytes = std::fs::read(&image.path).map_err(|e| Error::io(&image.path, e))?;
            if !dicom::is_dicom(&bytes) && image.path.extension().is_none() {
                continue;
            }
            let (picture, header) = dicom::decode(&bytes, self.config.frame, &image.path.display().to_string())?;
            image.path = store_image(&self.store, &png(&picture, &image.path)?, &image.path.display().to_string())?;
            if !header.identity.is_empty() {
                let remark = "the header names a person or place, which is left behind";
                *self.tally.headers.entry(format!("{remark} ({})", header.identity.join(", "))).or_default() += 1;
            }
            if header.burned_in == Some(true) {
                let remark = "the header says that annotation is burned into the pixels: look for names";
                *self.tally.headers.entry(remark.into()).or_default() += 1;
                sample.meta.insert(meta::BURNED_IN.into(), json!(true));
            }
            for (key, value) in [(meta::MODALITY, header.modality), (meta::LOCATION, header.body_part)] {
                if let Some(value) = value {
                    sample.meta.entry(key).or_insert_with(|| json!(value));
                }
            }
        }
        Ok(())
    }

    /// Says what was read once everything has been.
    fn finish(&mut self) {
        self.ended = true;
        for (split, rows) in &self.tally.rows {
            compare(*split, *rows, self.facts, &self.notes);
        }
        if self.tally.unreadable > 0 {
            self.notes.warn(format!("{} rows cannot be used; each is listed with its reason", self.tally.unreadable));
        }
        if self.tally.splits > 0 {
            self.notes.info(format!("left out: {} rows of splits not in data.splits", self.tally.splits));
        }
        for (remark, images) in &self.tally.headers {
            self.notes.warn(format!("{remark}: {images} images"));
        }
        if self.tally.language > 0 {
            let wanted = self.config.language.as_deref().unwrap_or_default();
            self.notes.info(format!("left out: {} rows not in data.language = {wanted:?}", self.tally.language));
        }
    }
}

/// Whether a file's name is one that DICOM files have: their usual extensions, or none.
fn might_be_dicom(path: &Path) -> bool {
    match path.extension() {
        None => true,
        Some(extension) => ["dcm", "dicom", "ima"].iter().any(|e| extension.eq_ignore_ascii_case(e)),
    }
}

fn png(picture: &Rgb8, at: &Path) -> Result<Vec<u8>> {
    use ::image::ImageEncoder;
    let mut bytes = Vec::new();
    let (width, height) = (picture.width as u32, picture.height as u32);
    ::image::codecs::png::PngEncoder::new(&mut bytes)
        .write_image(&picture.data, width, height, ::image::ExtendedColorType::Rgb8)
        .map_err(|e| Error::new(Kind::Image, "cannot encode an image").at(at.display()).source(e))?;
    Ok(bytes)
}

/// Compares the rows of a split with the published sizes.
fn compare(split: Option<Split>, rows: usize, facts: &Facts, notes: &Notes) {
    let name = split.map_or("unmarked", split_name);
    let published: Vec<(&str, usize)> = facts
        .releases
        .iter()
        .flat_map(|r| r.rows.iter().filter(|(s, _)| Some(*s) == split).map(|(_, n)| (r.name, *n)))
        .collect();
    let of = |list: &[(&str, usize)]| list.iter().map(|(r, n)| format!("{n} in {r}")).collect::<Vec<_>>().join(", ");
    let same: Vec<(&str, usize)> = published.iter().filter(|(_, n)| *n == rows).copied().collect();
    match (published.is_empty(), same.is_empty()) {
        (true, _) => notes.info(format!("{name}: {rows} rows")),
        (false, false) => notes.info(format!("{name}: {rows} rows, as published ({})", of(&same))),
        (false, true) => notes.warn(format!(
            "{name}: {rows} rows, but published are {}: this is another version or a part of it",
            of(&published)
        )),
    }
}

/// One row an image: its annotation is every question and answer about it. Rows that cannot be read stay as they are.
fn by_image(
    rows: impl Iterator<Item = Result<Sample>> + Send + 'static,
) -> impl Iterator<Item = Result<Sample>> + Send {
    let mut rows = Some(rows);
    let mut gathered: std::vec::IntoIter<Result<Sample>> = Vec::new().into_iter();
    std::iter::from_fn(move || {
        if let Some(rows) = rows.take() {
            gathered = gather(rows).into_iter();
        }
        gathered.next()
    })
}

fn gather(rows: impl Iterator<Item = Result<Sample>>) -> Vec<Result<Sample>> {
    let mut order: Vec<Result<Sample>> = Vec::new();
    let mut known: BTreeMap<(Vec<ImageRef>, Option<String>), usize> = BTreeMap::new();
    for row in rows {
        let Ok(row) = row else {
            order.push(row);
            continue;
        };
        let fact = format!("{} {}", row.bare_question(), row.answer());
        let marked = row.meta.get(MARKED_SPLIT).map(ToString::to_string);
        match known.get(&(row.images.clone(), marked.clone())).and_then(|at| order[*at].as_mut().ok()) {
            Some(first) => {
                let annotation = first.annotation.get_or_insert_default();
                annotation.push('\n');
                annotation.push_str(&fact);
            }
            None => {
                known.insert((row.images.clone(), marked), order.len());
                let stated = row.annotation.as_ref().map(|a| format!("{a}\n")).unwrap_or_default();
                let annotation = format!("{stated}{fact}");
                let turns = vec![
                    Turn {
                        role: Role::User,
                        text: format!("{}Describe this image.", "<image>\n".repeat(row.images.len())),
                    },
                    Turn { role: Role::Assistant, text: row.answer().to_string() },
                ];
                let category = Some("caption".to_string());
                let sample = Sample {
                    turns,
                    category,
                    answer_type: None,
                    options: Vec::new(),
                    annotation: Some(annotation),
                    ..row
                };
                order.push(Ok(sample));
            }
        }
    }
    // What is said of the image is all of it, not the answer that came first.
    for sample in order.iter_mut().flatten() {
        if let (Some(turn), Some(annotation)) = (sample.turns.last_mut(), &sample.annotation) {
            turn.text.clone_from(annotation);
        }
    }
    order
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn articles_are_read_from_image_names() {
        let article = |name| article_of(name).unwrap_or_default();
        assert_eq!(article("figures/PMC1000001_F1.jpg"), "pmcid:PMC1000001");
        assert_eq!(article("18000001_F1.jpg"), "pmid:18000001");
        assert_eq!(article("images/pmc_900001_0.jpg"), "pubmedvision:pmc_900001");
        for other in ["synpic10001.jpg", "12_3.jpg", "scan_1.png", "PMCx_1.jpg", ""] {
            assert_eq!(article(other), "", "{other}");
        }
    }

    #[test]
    fn sizes_are_compared_with_what_is_published() {
        const FACTS: Facts = Facts {
            licence: "",
            home: "",
            releases: &[
                crate::source::Release { name: "first", rows: &[(Split::Test, 5), (Split::Train, 9)] },
                crate::source::Release { name: "second", rows: &[(Split::Test, 6)] },
            ],
            download: None,
        };
        let notes = Notes::default();
        compare(Some(Split::Test), 6, &FACTS, &notes);
        compare(Some(Split::Test), 7, &FACTS, &notes);
        compare(None, 3, &FACTS, &notes);
        let all = notes.all();
        assert!(!all[0].warning && all[0].text.contains("6 in second"), "{}", all[0].text);
        assert!(all[1].warning && all[1].text.contains("5 in first, 6 in second"), "{}", all[1].text);
        assert!(!all[2].warning);
    }
}
