//! Data set readers, one a file.

use std::{path::Path, sync::Arc};

use burn::data::dataset::Dataset;

use crate::{
    error::{Error, Kind, Result},
    registry,
    sample::Sample,
    source::{DataConfig, Source},
};

mod io;
pub mod llava;
pub mod llava_med;
pub mod medhalltune;
pub mod messages;
pub mod omnimedvqa;
pub mod pathvqa;
pub mod phantom;
pub mod pmc_vqa;
pub mod pubmedvision;
pub mod roco;
pub mod rocov2;
pub mod slake;
pub mod table;
pub mod vqa_rad;

pub use crate::sample::meta::MARKED_SPLIT;

/// All readers.
pub const DATASETS: &[&dyn Source] = &[
    &phantom::Phantom,
    &llava::Llava,
    &messages::Messages,
    &table::Table,
    &vqa_rad::VqaRad,
    &slake::Slake,
    &pathvqa::PathVqa,
    &pmc_vqa::PmcVqa,
    &omnimedvqa::OmniMedVqa,
    &medhalltune::MedHallTune,
    &pubmedvision::PubMedVision,
    &llava_med::LlavaMed,
    &roco::Roco,
    &rocov2::RocoV2,
];

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

/// Problems that the messages of a row can have: roles out of order, empty messages, `<image>` marks that do not match
/// the images, no answer where `answers` are not optional.
///
/// # Errors
/// The row has one of them.
fn check_turns(sample: &Sample, at: &str, answers_optional: bool) -> Result<()> {
    use crate::sample::Role;
    let bad = |code, what: &str| Error::new(Kind::Data, what).code(code).at(at);
    if !answers_optional && !sample.turns.iter().any(|t| t.role == Role::Assistant) {
        return Err(bad("roles", "a row has no answer to learn from").help("add an assistant message"));
    }
    let spoken: Vec<Role> = sample.turns.iter().map(|t| t.role).filter(|r| *r != Role::System).collect();
    let ordered = spoken.iter().enumerate().all(|(i, r)| *r == if i % 2 == 0 { Role::User } else { Role::Assistant });
    let system_first = sample.turns.iter().skip(1).all(|t| t.role != Role::System);
    if !ordered || !system_first || spoken.is_empty() {
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
    Ok(())
}

/// Whether the image files of a row are there.
///
/// # Errors
/// One is missing.
fn check_images(sample: &Sample, at: &str) -> Result<()> {
    match sample.images.iter().find(|i| !i.path.is_file()) {
        None => Ok(()),
        Some(missing) => Err(Error::new(Kind::Data, "an image file of a row is missing")
            .code("image_missing")
            .at(at)
            .expected(missing.path.display())
            .about(&missing.path)
            .found("no such file")
            .help("check data.image_dir")),
    }
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
