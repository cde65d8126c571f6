//! Where samples come from: the trait of every data set reader, and the part of a recipe that selects one.

use std::path::PathBuf;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::{error::Result, sample::Sample};

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
    /// Settings of the source `phantom`.
    pub phantom: PhantomConfig,
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
            phantom: PhantomConfig::default(),
        }
    }
}

/// Samples, one by one, in a fixed order.
pub type Samples = Box<dyn Iterator<Item = Result<Sample>> + Send>;

/// A data set reader. Unit struct in [`crate::datasets::DATASETS`].
pub trait Source: Sync {
    /// Name in recipes and on the command line.
    fn name(&self) -> &'static str;

    /// What it reads: one line, then format and quirks.
    fn doc(&self) -> &'static str;

    /// Opens the data. Rows that cannot be read are `Err` items that name file and row; they do not end the iterator.
    ///
    /// # Errors
    /// The data as a whole is unreadable: missing, not the right format.
    fn open(&self, config: &DataConfig, seed: u64, work_dir: &std::path::Path) -> Result<Samples>;
}
