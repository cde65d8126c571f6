//! Data set readers, one a file.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

use burn::data::dataset::Dataset;

use crate::{
    error::{Error, Kind, Result},
    registry,
    sample::Sample,
    source::{DataConfig, Source},
};

pub mod llava;
pub mod messages;
pub mod phantom;
pub mod vqa_rad;

pub use crate::sample::meta::MARKED_SPLIT;

/// All readers.
pub const DATASETS: &[&dyn Source] = &[&phantom::Phantom, &llava::Llava, &messages::Messages, &vqa_rad::VqaRad];

/// The reader called `name`.
///
/// # Errors
/// There is none.
pub fn find(name: &str) -> Result<&'static dyn Source> {
    registry::datasets().find(|d| d.name() == name).ok_or_else(|| {
        let names: Vec<&str> = registry::datasets().map(|d| d.name()).collect();
        Error::new(Kind::Config, "unknown data source")
            .at("data.source")
            .expected(format!("one of {}", names.join(", ")))
            .found(name)
            .help("`medtune datasets` describes them")
    })
}

/// Samples in memory, as Burn's own data loaders take them.
#[derive(Debug, Clone)]
pub struct SampleSet {
    samples: Arc<[Sample]>,
}

impl SampleSet {
    /// A set of `samples`.
    #[must_use]
    pub fn new(samples: Vec<Sample>) -> Self {
        Self { samples: samples.into() }
    }

    /// Reads everything that the source of `config` has.
    ///
    /// # Errors
    /// The source cannot be opened, or a row cannot be read.
    pub fn load(config: &DataConfig, seed: u64, work_dir: &Path) -> Result<Self> {
        let samples = find(&config.source)?.open(config, seed, work_dir)?.collect::<Result<_>>()?;
        Ok(Self::new(samples))
    }

    /// All samples in order.
    #[must_use]
    pub fn samples(&self) -> &[Sample] {
        &self.samples
    }
}

impl Dataset<Sample> for SampleSet {
    fn get(&self, index: usize) -> Result<Sample, burn::data::dataset::DatasetError> {
        Ok(self.samples[index].clone())
    }

    fn len(&self) -> usize {
        self.samples.len()
    }
}

/// The file a reader reads: `data.path` itself, or the file called `name` in it when it is a directory.
fn data_file(config: &DataConfig, name: &str) -> Result<PathBuf> {
    let path = config.path.as_ref().ok_or_else(|| {
        Error::new(Kind::Config, "the data source needs a path")
            .at("data.path")
            .help("set data.path to the file to read")
    })?;
    Ok(if path.is_dir() { path.join(name) } else { path.clone() })
}

/// Directory that relative image paths start from.
fn image_dir(config: &DataConfig, file: &Path, default: &str) -> PathBuf {
    config.image_dir.clone().unwrap_or_else(|| file.parent().unwrap_or(Path::new("")).join(default))
}

/// A whole file as text.
///
/// # Errors
/// It cannot be read, or is not UTF-8; the error names the line.
fn read_text(path: &Path) -> Result<String> {
    let bytes = std::fs::read(path).map_err(|e| {
        Error::new(Kind::Data, "cannot read the data file").at(path.display()).help("check data.path").source(e)
    })?;
    String::from_utf8(bytes).map_err(|e| {
        let line = e.as_bytes()[..e.utf8_error().valid_up_to()].iter().filter(|b| **b == b'\n').count() + 1;
        Error::new(Kind::Data, "the data file is not UTF-8")
            .at(format!("{}:{line}", path.display()))
            .help("convert it, for example with iconv -t UTF-8")
    })
}

/// A JSON file that holds an array of objects, as rows.
///
/// # Errors
/// It is not JSON (truncated, for example), or not an array.
fn json_rows(path: &Path) -> Result<Vec<serde_json::Value>> {
    let text = read_text(path)?;
    let value: serde_json::Value = serde_json::from_str(text.trim_start_matches('\u{feff}')).map_err(|e| {
        let hint = if e.is_eof() { "the file ends too early: copy it again" } else { "repair the file at this place" };
        Error::new(Kind::Data, "the data file is not JSON")
            .at(format!("{}:{}", path.display(), e.line()))
            .help(hint)
            .source(e)
    })?;
    match value {
        serde_json::Value::Array(rows) => Ok(rows),
        other => Err(Error::new(Kind::Data, "the data file has another form")
            .at(path.display())
            .expected("a JSON array of rows")
            .found(json_type(&other))),
    }
}

/// What a JSON value is, in words.
fn json_type(value: &serde_json::Value) -> &'static str {
    match value {
        serde_json::Value::Null => "null",
        serde_json::Value::Bool(_) => "a truth value",
        serde_json::Value::Number(_) => "a number",
        serde_json::Value::String(_) => "a string",
        serde_json::Value::Array(_) => "an array",
        serde_json::Value::Object(_) => "an object",
    }
}

/// The place of a row for messages: file and row number, from 1.
fn place(file: &Path, row: usize) -> String {
    format!("{}, row {}", file.display(), row + 1)
}

/// Problems that rows of any source can have: roles out of order, `<image>` marks that do not match the images, image
/// files that are not there, empty messages.
///
/// # Errors
/// The row has one of them.
fn check_row(sample: &Sample, at: &str) -> Result<()> {
    use crate::sample::Role;
    let bad = |code, what: &str| Error::new(Kind::Data, what).code(code).at(at);
    if !sample.turns.iter().any(|t| t.role == Role::Assistant) {
        return Err(bad("roles", "a row has no answer to learn from").help("add an assistant message"));
    }
    let spoken: Vec<Role> = sample.turns.iter().map(|t| t.role).filter(|r| *r != Role::System).collect();
    let ordered = spoken.iter().enumerate().all(|(i, r)| *r == if i % 2 == 0 { Role::User } else { Role::Assistant });
    let system_first = sample.turns.iter().skip(1).all(|t| t.role != Role::System);
    if !ordered || !system_first {
        return Err(
            bad("roles", "the roles of a row are out of order").expected("user and assistant in turn, the user first")
        );
    }
    if let Some(i) = sample.turns.iter().position(|t| t.text.replace("<image>", "").trim().is_empty()) {
        return Err(bad("empty", &format!("message {} of a row is empty", i + 1)));
    }
    let marks =
        |role: Role| sample.turns.iter().filter(move |t| t.role == role).map(|t| t.text.matches("<image>").count());
    if marks(Role::Assistant).chain(marks(Role::System)).sum::<usize>() > 0 {
        return Err(bad("image_count", "an <image> mark stands outside the user's messages"));
    }
    let count: usize = marks(Role::User).sum();
    if count != sample.images.len() {
        return Err(bad("image_count", "the number of <image> marks is not the number of images")
            .expected(format!("{} marks", sample.images.len()))
            .found(count));
    }
    if let Some(missing) = sample.images.iter().find(|i| !i.path.is_file()) {
        return Err(bad("image_missing", "an image file of a row is missing")
            .expected(missing.path.display())
            .about(&missing.path)
            .found("no such file")
            .help("check data.image_dir"));
    }
    Ok(())
}

/// A row's text field.
fn text_field<'a>(row: &'a serde_json::Map<String, serde_json::Value>, key: &str, at: &str) -> Result<&'a str> {
    match row.get(key) {
        Some(serde_json::Value::String(text)) => Ok(text),
        other => Err(Error::new(Kind::Data, format!("field `{key}` of a row is not text"))
            .code("malformed")
            .at(at)
            .expected("a string")
            .found(other.map_or("nothing", json_type))),
    }
}

/// An id that is text or a number.
fn id_field(row: &serde_json::Map<String, serde_json::Value>, key: &str) -> Option<String> {
    match row.get(key)? {
        serde_json::Value::String(text) if !text.trim().is_empty() => Some(text.clone()),
        serde_json::Value::Number(number) => Some(number.to_string()),
        _ => None,
    }
}

/// The group of a row: its images, or the row itself when it has none.
fn group_of(sample: &Sample) -> String {
    match sample.images.as_slice() {
        [] => sample.id.clone(),
        images => images.iter().map(|i| i.path.display().to_string()).collect::<Vec<_>>().join("|"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn registry_and_folder_agree() {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("datasets");
        let mut files: Vec<String> = std::fs::read_dir(dir)
            .unwrap()
            .map(|e| e.unwrap().path())
            .filter(|p| p.extension().is_some_and(|e| e == "rs"))
            .map(|p| p.file_stem().unwrap().to_string_lossy().into_owned())
            .filter(|n| n != "mod")
            .collect();
        let mut names: Vec<String> = DATASETS.iter().map(|d| d.name().to_string()).collect();
        files.sort();
        names.sort();
        assert_eq!(files, names);
        for dataset in DATASETS {
            assert!(dataset.doc().lines().next().is_some_and(|l| l.len() > 20 && l.len() < 120), "{}", dataset.name());
            assert_eq!(find(dataset.name()).unwrap().name(), dataset.name());
        }
        assert!(find("nonsense").is_err());
    }
}
