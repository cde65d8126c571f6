//! PathVQA: questions about pathology images. Parquet files of the Hugging Face hub, or the authors' question lists
//! after a conversion to JSON.
//!
//! He et al., arXiv:2003.10286. The authors publish Python pickles, which can run any code when they are opened and are
//! therefore not read.

use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use super::io::{
    PICKLE, Record,
    driver::{Images, Part, Reading, nothing_to_read, open_or_closed, question, root},
    layout,
};
use crate::{
    error::Result,
    sample::{AnswerType, Sample, Split, meta},
    source::{DataConfig, Download, Facts, Release, Samples, Source},
};

/// The reader.
pub struct PathVqa;

const FACTS: Facts = Facts {
    licence: "MIT",
    home: "https://github.com/UCSD-AI4H/PathVQA",
    releases: &[
        Release {
            name: "flaviagiammarino/path-vqa",
            rows: &[(Split::Train, 19654), (Split::Validation, 6259), (Split::Test, 6719)],
        },
        Release {
            name: "the authors' lists",
            rows: &[(Split::Train, 19755), (Split::Validation, 6279), (Split::Test, 6761)],
        },
    ],
    download: Some(Download { repo: "flaviagiammarino/path-vqa", files: &["data/*.parquet"] }),
};

impl Source for PathVqa {
    fn name(&self) -> &'static str {
        "pathvqa"
    }

    fn doc(&self) -> &'static str {
        "PathVQA: questions about pathology images, open and closed (yes or no).\n\
         `data.path` is a folder with the hub's parquet files, or with qas/ and images/ of the authors after \
         `<split>_qa.pkl` has been converted to `<split>_qa.json`, or one file. Pickles run code when they are opened and \
         are not read; the error of reading one says how to convert it."
    }

    fn facts(&self) -> &'static Facts {
        &FACTS
    }

    fn open(&self, config: &DataConfig, _seed: u64, work_dir: &Path) -> Result<Samples> {
        let root = root(config)?;
        let files = files(&root)?;
        let mut folders: Vec<PathBuf> = Vec::new();
        for dir in files[0].ancestors().skip(1).take(3) {
            folders.extend([dir.join("images"), dir.to_path_buf()]);
        }
        let images = Images::new(config, work_dir, folders);
        let reading = Reading { source: self, config, work_dir, answers_optional: false };
        reading.parts(files.into_iter().map(Part::named).collect(), move |record, part| read(record, part, &images))
    }
}

fn files(root: &Path) -> Result<Vec<PathBuf>> {
    if root.is_file() {
        return Ok(vec![root.to_path_buf()]);
    }
    let parquet = layout::with_extension(root, "parquet", 2)?;
    if !parquet.is_empty() {
        return Ok(parquet);
    }
    let json = layout::with_extension(root, "json", 3)?;
    let lists: Vec<PathBuf> =
        json.into_iter().filter(|p| p.file_stem().is_some_and(|s| s.to_string_lossy().ends_with("_qa"))).collect();
    if !lists.is_empty() {
        return Ok(lists);
    }
    let error = nothing_to_read(root, "parquet files, or <split>_qa.json", "pathvqa");
    let pickles = layout::with_extension(root, "pkl", 3)?;
    Err(if pickles.is_empty() { error } else { error.found("Python pickles, which can run any code").help(PICKLE) })
}

fn read(record: &Record, part: &Part, images: &Images) -> Result<Sample> {
    let split = part.split_name();
    let id = record.scalar("question_id").unwrap_or_else(|| record.row.to_string());
    let answer = answer(record)?;
    let image = match record.text("image").or(record.text("img_id")) {
        Some(name) => {
            let names = [name.to_string(), format!("{split}/{name}"), format!("{}/{name}", short(split))];
            let found = names.iter().map(|n| images.find_stem(n, &["jpg", "png", "jpeg"]));
            let mut found: Vec<_> = found.collect();
            let at = found.iter().position(|i| i.path.is_file()).unwrap_or(1);
            vec![found.swap_remove(at)]
        }
        None => images.of(record, "image")?,
    };
    let mut sample = question(format!("pathvqa-{split}-{id}"), image, &record.need(&["question", "sent"])?, &answer);
    sample.answer_type = Some(match record.text("answer_type") {
        Some("yes/no") => AnswerType::Closed,
        Some(_) => AnswerType::Open,
        None => open_or_closed(&answer),
    });
    for (key, field) in [(meta::QUESTION_TYPE, "question_type"), (meta::QUESTION_ID, "question_id")] {
        if let Some(value) = record.scalar(field) {
            sample.meta.insert(key.into(), json!(value));
        }
    }
    Ok(sample)
}

/// The answer, or in the lists of the classification task the heaviest label.
fn answer(record: &Record) -> Result<String> {
    let Some(Value::Object(labels)) = record.fields.get("label") else { return record.need(&["answer"]) };
    let weight = |v: &Value| v.as_f64().unwrap_or(0.0);
    let best = labels.iter().reduce(|best, next| if weight(next.1) > weight(best.1) { next } else { best });
    best.map(|(answer, _)| answer.clone()).ok_or_else(|| record.error("empty", "a row has no answer"))
}

fn short(split: &str) -> &str {
    if split == "validation" { "val" } else { split }
}
