//! Where samples come from: the trait of every data set reader, and the part of a recipe that selects one.

use std::{
    fmt,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::{
    error::Result,
    leak::firewall::FirewallConfig,
    sample::{Sample, Split},
};

/// `[data]` of a recipe.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct DataConfig {
    /// Name of the source, as `medtune datasets` lists it.
    pub source: String,
    /// File or directory it reads; unused by sources that generate.
    pub path: Option<PathBuf>,
    /// Directory that relative image paths start from; the file's own directory when absent.
    pub image_dir: Option<PathBuf>,
    /// Number of images a generating source makes, or the most a reading source takes; 0 means all.
    pub images: usize,
    /// Share of images that go to the test split when the source marks none, 0 to 1.
    pub test_fraction: f64,
    /// Share of images that go to the validation split when the source marks none, 0 to 1.
    pub validation_fraction: f64,
    /// Who says which split a row belongs to.
    pub split: SplitPolicy,
    /// Marked splits that are read, for example ["test"]; empty reads all.
    pub splits: Vec<Split>,
    /// Language that is read, for example "en", where a data set has several; all when absent.
    pub language: Option<String>,
    /// Whether the options of a multiple-choice question are listed below it in the user's turn.
    pub show_options: bool,
    /// One row an image, annotated with every question and answer about it: what captions are made from where a data
    /// set has none.
    pub by_image: bool,
    /// Frame that is taken of DICOM files with several, from 0.
    pub frame: usize,
    /// Column names of the source `table`.
    pub columns: ColumnConfig,
    /// What keeps tests out of training.
    pub firewall: FirewallConfig,
    /// Settings of the source `phantom`.
    pub phantom: PhantomConfig,
}

/// `[data.columns]` of a recipe: which columns (or JSON keys) of a table are read.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct ColumnConfig {
    /// Path of the image, its bytes (parquet), or a list of either.
    pub image: String,
    /// Text about the image.
    pub caption: String,
    /// Name of the row; its number when the column is absent.
    pub id: String,
    /// Article the image comes from; rows of one article stay in one split.
    pub article: String,
    /// Question, where rows are questions and not captions.
    pub question: String,
    /// Answer to the question.
    pub answer: String,
    /// Split the row is marked with.
    pub split: String,
}

impl Default for ColumnConfig {
    fn default() -> Self {
        Self {
            image: "image".into(),
            caption: "caption".into(),
            id: "id".into(),
            article: "article".into(),
            question: "question".into(),
            answer: "answer".into(),
            split: "split".into(),
        }
    }
}

/// Who says which split a row belongs to.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum SplitPolicy {
    /// This program, by image: rows of one image never part.
    #[default]
    ByImage,
    /// The data set's own marks (`meta.marked_split`), whether or not they share images.
    Marked,
}

/// `[data.phantom]` of a recipe.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct PhantomConfig {
    /// Side of the square images in pixels, 48 to 512.
    pub image_size: u32,
    /// Share of images without any finding, 0 to 1.
    pub normal_share: f64,
}

impl DataConfig {
    /// Whether pictures that look the same count as one. Not those that this program draws: two of them may look alike
    /// by chance, and their truths tell them apart.
    #[must_use]
    pub fn compares_looks(&self) -> bool {
        self.firewall.similar_images && self.source != "phantom"
    }
}

impl Default for PhantomConfig {
    fn default() -> Self {
        Self { image_size: 64, normal_share: 0.15 }
    }
}

impl Default for DataConfig {
    fn default() -> Self {
        Self {
            source: "phantom".into(),
            path: None,
            image_dir: None,
            images: 0,
            test_fraction: 0.2,
            validation_fraction: 0.05,
            split: SplitPolicy::ByImage,
            splits: Vec::new(),
            language: None,
            show_options: true,
            by_image: false,
            frame: 0,
            columns: ColumnConfig::default(),
            firewall: FirewallConfig::default(),
            phantom: PhantomConfig::default(),
        }
    }
}

/// Samples, one by one, in a fixed order, and what the reader has to say about them.
pub struct Samples {
    rows: Box<dyn Iterator<Item = Result<Sample>> + Send>,
    notes: Notes,
}

impl Samples {
    /// Samples of a source without anything to say.
    pub fn new(rows: impl Iterator<Item = Result<Sample>> + Send + 'static) -> Self {
        Self::with_notes(rows, Notes::default())
    }

    /// Samples of a source that adds to `notes`, also while it is read.
    pub fn with_notes(rows: impl Iterator<Item = Result<Sample>> + Send + 'static, notes: Notes) -> Self {
        Self { rows: Box::new(rows), notes }
    }

    /// The reader's notes. They are complete once all samples have been taken.
    #[must_use]
    pub fn notes(&self) -> Notes {
        self.notes.clone()
    }
}

impl Iterator for Samples {
    type Item = Result<Sample>;

    fn next(&mut self) -> Option<Self::Item> {
        self.rows.next()
    }
}

impl fmt::Debug for Samples {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Samples").field("notes", &self.notes).finish_non_exhaustive()
    }
}

/// A remark about a data set.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Note {
    /// Whether the user should look into it.
    pub warning: bool,
    /// The remark, one line.
    pub text: String,
}

/// Remarks of a reader; a shared list.
#[derive(Debug, Clone, Default)]
pub struct Notes(Arc<Mutex<Vec<Note>>>);

impl Notes {
    /// Adds a remark.
    pub fn info(&self, text: impl Into<String>) {
        self.push(Note { warning: false, text: text.into() });
    }

    /// Adds a remark that the user should look into.
    pub fn warn(&self, text: impl Into<String>) {
        self.push(Note { warning: true, text: text.into() });
    }

    /// All remarks so far.
    #[must_use]
    pub fn all(&self) -> Vec<Note> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn push(&self, note: Note) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push(note);
    }
}

/// A published version of a data set with its rows per split.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Release {
    /// Which one, for example `flaviagiammarino/vqa-rad`.
    pub name: &'static str,
    /// Rows of each split.
    pub rows: &'static [(Split, usize)],
}

/// Where the files of a data set can be had on the Hugging Face hub.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Download {
    /// Repository, `owner/name`.
    pub repo: &'static str,
    /// Patterns of the files that are needed; empty means all.
    pub files: &'static [&'static str],
}

/// What is known about a public data set.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Facts {
    /// Terms of use as its publisher states them.
    pub licence: &'static str,
    /// Where it is published.
    pub home: &'static str,
    /// Published sizes.
    pub releases: &'static [Release],
    /// Where `medtune data get` fetches it from.
    pub download: Option<Download>,
}

/// Of a format that no single data set owns.
pub const NO_FACTS: Facts = Facts { licence: "", home: "", releases: &[], download: None };

/// A data set reader. Unit struct in [`crate::datasets::DATASETS`].
pub trait Source: Sync {
    /// Name in recipes and on the command line.
    fn name(&self) -> &'static str;

    /// What it reads: one line, then format and quirks.
    fn doc(&self) -> &'static str;

    /// Licence, home and published sizes, of a public data set.
    fn facts(&self) -> &'static Facts {
        &NO_FACTS
    }

    /// Opens the data. Rows that cannot be read are `Err` items that name file and row; they do not end the iterator.
    ///
    /// # Errors
    /// The data as a whole is unreadable: missing, not the right format.
    fn open(&self, config: &DataConfig, seed: u64, work_dir: &Path) -> Result<Samples>;
}
