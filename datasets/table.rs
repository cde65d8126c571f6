//! Tables of your own: an image and its caption, or an image, a question and an answer, a row. CSV, TSV, JSON, JSON lines
//! or parquet, with column names of your choice.

use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use super::{
    MARKED_SPLIT,
    io::{
        Record,
        driver::{Images, Part, Reading, caption, nothing_to_read, question, root, with_article},
        layout,
    },
};
use crate::{
    error::Result,
    sample::{Sample, meta},
    source::{ColumnConfig, DataConfig, Samples, Source},
};

/// The reader.
pub struct Table;

/// Forms of tables in a folder; the first that is there is read.
const FORMS: [&str; 5] = ["parquet", "csv", "tsv", "jsonl", "json"];

impl Source for Table {
    fn name(&self) -> &'static str {
        "table"
    }

    fn doc(&self) -> &'static str {
        "A table of your own: image and caption, or image, question and answer, a row.\n\
         `data.path` is a CSV, TSV, JSON, JSONL or parquet file, or a folder of such files; names such as train.csv mark \
         splits. Columns are called image, caption, id, article, question, answer and split, or what data.columns says; \
         others go to meta. Images are paths (from data.image_dir, by default the file's folder or images/ in it), DICOM \
         files, or the bytes themselves in parquet files. Rows of one article stay in one split."
    }

    fn open(&self, config: &DataConfig, _seed: u64, work_dir: &Path) -> Result<Samples> {
        let root = root(config)?;
        let files = files(&root)?;
        let dir = files[0].parent().unwrap_or(Path::new("")).to_path_buf();
        let images = Images::new(config, work_dir, vec![dir.clone(), dir.join("images"), root]);
        let columns = config.columns.clone();
        let reading = Reading { source: self, config, work_dir, answers_optional: false };
        reading.parts(files.into_iter().map(Part::named).collect(), move |record, part| {
            read(record, part, &images, &columns)
        })
    }
}

fn files(root: &Path) -> Result<Vec<PathBuf>> {
    if root.is_file() {
        return Ok(vec![root.to_path_buf()]);
    }
    for form in FORMS {
        let found = layout::with_extension(root, form, 1)?;
        if !found.is_empty() {
            return Ok(found);
        }
    }
    Err(nothing_to_read(root, "csv, tsv, json, jsonl or parquet files", "table"))
}

fn read(record: &Record, part: &Part, images: &Images, columns: &ColumnConfig) -> Result<Sample> {
    let stem = part.path.file_stem().unwrap_or_default().to_string_lossy();
    let id = record.scalar(&columns.id).unwrap_or_else(|| format!("{stem}-{}", record.row));
    let pictures = images.of(record, &columns.image)?;
    let text = record.scalar(&columns.caption);
    let sample = match (record.scalar(&columns.question), text) {
        (Some(asked), text) => {
            let sample = question(id, pictures, &asked, &record.need(&[&columns.answer])?);
            Sample { annotation: text, ..sample }
        }
        (None, Some(text)) => caption(id, pictures, &text),
        (None, None) => caption(id, pictures, &record.need(&[&columns.caption])?),
    };
    let mut sample = with_article(sample, record.scalar(&columns.article));
    let used = [&columns.image, &columns.caption, &columns.id, &columns.article, &columns.question, &columns.answer];
    let rest = record.fields.iter().filter(|(key, value)| !used.contains(key) && **value != Value::Null);
    sample.meta.extend(rest.map(|(key, value)| (key.clone(), value.clone())));
    if let Some(word) = record.scalar(&columns.split) {
        let split = layout::split_word(&word).ok_or_else(|| {
            record.error("malformed", "unknown split of a row").expected("train, validation or test").found(&word)
        })?;
        sample.meta.remove(&columns.split);
        sample.meta.insert(MARKED_SPLIT.into(), json!(split));
    }
    if let Some(id) = record.scalar("question_id") {
        sample.meta.insert(meta::QUESTION_ID.into(), json!(id));
    }
    Ok(sample)
}
