//! MedHallTune as it is released: question files of the test split, the validation files with answers and captions of
//! the repository's history, and prediction files.
//!
//! arXiv:2502.20780. Questions with false premises are in `negative_qa.jsonl`, ordinary ones in `positive_qa.jsonl`; the
//! numbers of both files overlap, so that ids carry the polarity. The released question files have no answers.

use std::path::{Path, PathBuf};

use serde_json::json;

use super::io::{
    Record,
    driver::{Images, Part, Reading, article_of, nothing_to_read, question, root, with_article},
    layout,
};
use crate::{
    error::Result,
    sample::{Polarity, Sample, Split, meta},
    source::{DataConfig, Download, Facts, Release, Samples, Source},
};

/// The reader.
pub struct MedHallTune;

/// Pairs of files of a folder; the first pair that is there is read.
const PAIRS: [[&str; 2]; 2] =
    [["val_positive_qa-filtered.jsonl", "val_negative_qa-filtered.jsonl"], ["positive_qa.jsonl", "negative_qa.jsonl"]];

const FACTS: Facts = Facts {
    licence: "not stated",
    home: "https://github.com/russellyq/MedHallTune",
    releases: &[
        Release { name: "positive_qa.jsonl and negative_qa.jsonl", rows: &[(Split::Test, 2238)] },
        Release { name: "positive_qa.jsonl", rows: &[(Split::Test, 1110)] },
        Release { name: "negative_qa.jsonl", rows: &[(Split::Test, 1128)] },
    ],
    download: Some(Download { repo: "russellyq/MedHallTune", files: &[] }),
};

impl Source for MedHallTune {
    fn name(&self) -> &'static str {
        "medhalltune"
    }

    fn doc(&self) -> &'static str {
        "MedHallTune's released test questions with and without false premises; not for training.\n\
         `data.path` is a folder with val_{positive,negative}_qa-filtered.jsonl (with answers and captions) or \
         {positive,negative}_qa.jsonl (questions alone), or one file, which may also be a prediction file: its answers go \
         to meta.prediction, never into the conversation. Files with answers carry the polarity in their name. Rows of \
         question files have no assistant turn: they can be answered, and not be scored against a reference."
    }

    fn facts(&self) -> &'static Facts {
        &FACTS
    }

    fn open(&self, config: &DataConfig, _seed: u64, work_dir: &Path) -> Result<Samples> {
        let root = root(config)?;
        let files = files(&root)?;
        let dir = files[0].parent().unwrap_or(Path::new("")).to_path_buf();
        let images = Images::new(config, work_dir, vec![dir.join("images"), dir.join("../images"), dir]);
        let parts = files.into_iter().map(|path| Part { tag: polarity_name(&path), path, split: Some(Split::Test) });
        let reading = Reading { source: self, config, work_dir, answers_optional: true };
        reading.parts(parts.collect(), move |record, part| read(record, part, &images))
    }
}

fn files(root: &Path) -> Result<Vec<PathBuf>> {
    if root.is_file() {
        return Ok(vec![root.to_path_buf()]);
    }
    let found = PAIRS.iter().map(|names| layout::existing(root, names)).find(|files| !files.is_empty());
    found.ok_or_else(|| nothing_to_read(root, "positive_qa.jsonl or negative_qa.jsonl", "medhalltune"))
}

/// `positive` or `negative`, by the file's name, which the release also spells `postive`.
fn polarity_name(path: &Path) -> &'static str {
    let name = path.file_name().unwrap_or_default().to_string_lossy().to_lowercase();
    match () {
        () if name.contains("negative") => "negative",
        () if name.contains("positive") || name.contains("postive") => "positive",
        () => "",
    }
}

fn read(record: &Record, part: &Part, images: &Images) -> Result<Sample> {
    let image = record.need(&["image"])?;
    let qid = record.need(&["question_id"])?;
    let text = record.need(&["text", "question"])?;
    let name = if part.tag.is_empty() { "rows" } else { part.tag };
    let answer = record.scalar("gpt4_answer").unwrap_or_default();
    let sample = question(format!("medhalltune-{name}-{qid}"), vec![images.find(&image)], &text, &answer);
    let mut sample = with_article(sample, article_of(&image));
    sample.polarity = match part.tag {
        "negative" => Some(Polarity::Hallucination),
        "positive" => Some(Polarity::NonHallucination),
        _ => None,
    };
    sample.annotation = record.scalar("fig_caption");
    let known = [
        (meta::QUESTION_ID, Some(qid)),
        ("prediction", record.scalar("answer")),
        ("judge_reply", record.scalar("result")),
    ];
    for (key, value) in known {
        if let Some(value) = value {
            sample.meta.insert(key.into(), json!(value));
        }
    }
    Ok(sample)
}
