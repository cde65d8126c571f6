//! ROCOv2: captions and concepts of radiology figures of PubMed Central articles.
//!
//! Rückert et al., Scientific Data 11:688 (2024). `{train,valid,test}_captions.csv` with `_concepts.csv` beside them and
//! image folders, or parquet files of the Hugging Face hub.

use std::{
    collections::HashMap,
    path::{Path, PathBuf},
};

use serde_json::{Value, json};

use super::io::{
    self, Record,
    driver::{Images, Part, Reading, caption, nothing_to_read, root},
    layout,
};
use crate::{
    error::Result,
    sample::{Sample, Split},
    source::{DataConfig, Download, Facts, Release, Samples, Source},
};

/// The reader.
pub struct RocoV2;

const FACTS: Facts = Facts {
    licence: "CC BY-NC-SA 4.0",
    home: "https://zenodo.org/records/10821435",
    releases: &[Release {
        name: "ROCOv2",
        rows: &[(Split::Train, 59_958), (Split::Validation, 9904), (Split::Test, 9927)],
    }],
    download: Some(Download { repo: "eltorio/ROCOv2-radiology", files: &["data/*.parquet"] }),
};

impl Source for RocoV2 {
    fn name(&self) -> &'static str {
        "rocov2"
    }

    fn doc(&self) -> &'static str {
        "ROCOv2: captions and UMLS concepts of radiology figures of PubMed Central articles.\n\
         `data.path` is a folder with {train,valid,test}_captions.csv (with _concepts.csv and the folders train/, valid/ \
         and test/ of images), or with the hub's parquet files, or one file. Concepts go to meta.cuis."
    }

    fn facts(&self) -> &'static Facts {
        &FACTS
    }

    fn open(&self, config: &DataConfig, _seed: u64, work_dir: &Path) -> Result<Samples> {
        let root = root(config)?;
        let files = files(&root)?;
        let dir = files[0].parent().unwrap_or(Path::new("")).to_path_buf();
        let mut folders: Vec<PathBuf> = Vec::new();
        for name in ["train", "valid", "test"] {
            folders.extend([
                dir.join(name),
                dir.join(format!("{name}_images")),
                dir.join(format!("{name}_images/{name}")),
            ]);
        }
        folders.extend([dir.join("images"), dir.clone()]);
        let images = Images::new(config, work_dir, folders);
        let mut concepts: (PathBuf, HashMap<String, Value>) = Default::default();
        let reading = Reading { source: self, config, work_dir, answers_optional: false };
        reading.parts(files.into_iter().map(Part::named).collect(), move |record, part| {
            if concepts.0 != part.path {
                concepts = (part.path.clone(), load(&part.path)?);
            }
            read(record, part, &images, &concepts.1)
        })
    }
}

fn files(root: &Path) -> Result<Vec<PathBuf>> {
    if root.is_file() {
        return Ok(vec![root.to_path_buf()]);
    }
    let mut csv = layout::with_extension(root, "csv", 0)?;
    csv.retain(|p| p.file_stem().is_some_and(|s| s.to_string_lossy().ends_with("_captions")));
    if !csv.is_empty() {
        return Ok(csv);
    }
    let parquet = layout::with_extension(root, "parquet", 2)?;
    if parquet.is_empty() {
        return Err(nothing_to_read(root, "train_captions.csv, or parquet files", "rocov2"));
    }
    Ok(parquet)
}

/// Concepts by id, from the file beside the captions.
fn load(captions: &Path) -> Result<HashMap<String, Value>> {
    let name = captions.file_name().unwrap_or_default().to_string_lossy().replace("_captions", "_concepts");
    let path = captions.with_file_name(name);
    if path == captions || !path.is_file() {
        return Ok(HashMap::new());
    }
    let pair = |record: Record| {
        let cuis: Vec<String> =
            record.text("CUIs").unwrap_or_default().split(';').map(|c| c.trim().to_string()).collect();
        Ok((record.need(&["ID"])?, json!(cuis)))
    };
    io::open(&path)?.map(|record| record.and_then(pair)).collect()
}

fn read(record: &Record, part: &Part, images: &Images, concepts: &HashMap<String, Value>) -> Result<Sample> {
    let id = record.need(&["ID", "image_id"])?;
    let image = match record.fields.contains_key("image") {
        true => images.of(record, "image")?,
        false => vec![images.find_stem(&id, &["jpg", "png"])],
    };
    let mut sample =
        caption(format!("rocov2-{}-{id}", part.split_name()), image, &record.need(&["Caption", "caption"])?);
    if let Some(cuis) = record.fields.get("cui").or_else(|| concepts.get(&id)) {
        sample.meta.insert("cuis".into(), cuis.clone());
    }
    Ok(sample)
}
