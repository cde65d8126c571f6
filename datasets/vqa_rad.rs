//! VQA-RAD in the forms it is published in: the authors' JSON, the `trainset.json` and `testset.json` of later work, and
//! the parquet files of the Hugging Face hub.
//!
//! Lau et al., Scientific Data 5:180251 (2018). Quirks that are read: answers and ids that are numbers, blanks after
//! `CLOSED`, the text `NULL` for nothing, the test marking as a prefix of `phrase_type`. That marking is not by image
//! (the same image has train and test questions), so that it is kept in `meta.marked_split` and not followed unless
//! `data.split = "marked"`.

use std::path::{Path, PathBuf};

use serde_json::{Map, Value, json};

use super::{
    MARKED_SPLIT,
    io::{
        Record,
        driver::{Images, Part, Reading, nothing_to_read, open_or_closed, question, root},
        layout,
    },
};
use crate::{
    error::Result,
    sample::{AnswerType, Sample, Split, meta},
    source::{DataConfig, Download, Facts, Release, Samples, Source},
};

/// The reader.
pub struct VqaRad;

/// File name of the public release.
const FILE: &str = "VQA_RAD Dataset Public.json";

const FACTS: Facts = Facts {
    licence: "CC0 1.0",
    home: "https://osf.io/89kps/",
    releases: &[
        Release { name: "the public JSON", rows: &[(Split::Train, 1797), (Split::Test, 451)] },
        Release { name: "flaviagiammarino/vqa-rad", rows: &[(Split::Train, 1793), (Split::Test, 451)] },
    ],
    download: Some(Download { repo: "flaviagiammarino/vqa-rad", files: &["data/*.parquet"] }),
};

impl Source for VqaRad {
    fn name(&self) -> &'static str {
        "vqa_rad"
    }

    fn doc(&self) -> &'static str {
        "VQA-RAD: questions about head, chest and abdomen images, open and closed.\n\
         `data.path` is a folder, in which the first of these is read, or one of the files: `VQA_RAD Dataset Public.json` \
         beside `VQA_RAD Image Folder`; `trainset.json` and `testset.json`; parquet files of the hub, which hold the \
         images and do not say which questions are closed (yes or no are).\n\
         The official train and test questions share images: rows are split by image unless data.split = \"marked\"."
    }

    fn facts(&self) -> &'static Facts {
        &FACTS
    }

    fn open(&self, config: &DataConfig, _seed: u64, work_dir: &Path) -> Result<Samples> {
        let root = root(config)?;
        let files = files(&root)?;
        let dir = files[0].parent().unwrap_or(Path::new("")).to_path_buf();
        let images = Images::new(config, work_dir, vec![dir.join("VQA_RAD Image Folder"), dir.join("images"), dir]);
        let reading = Reading { source: self, config, work_dir, answers_optional: false };
        reading.parts(files.into_iter().map(Part::named).collect(), move |record, part| {
            match record.fields.contains_key("image_name") {
                true => from_json(record, part, &images),
                false => from_hub(record, part, &images),
            }
        })
    }
}

fn files(root: &Path) -> Result<Vec<PathBuf>> {
    if root.is_file() {
        return Ok(vec![root.to_path_buf()]);
    }
    for names in [[FILE].as_slice(), &["trainset.json", "testset.json"]] {
        let found = layout::existing(root, names);
        if !found.is_empty() {
            return Ok(found);
        }
    }
    let found = layout::with_extension(root, "parquet", 2)?;
    if found.is_empty() {
        return Err(nothing_to_read(
            root,
            &format!("`{FILE}`, trainset.json, testset.json or parquet files"),
            "vqa_rad",
        ));
    }
    Ok(found)
}

fn from_json(record: &Record, part: &Part, images: &Images) -> Result<Sample> {
    let image = record.need(&["image_name"])?;
    let phrase = record.text("phrase_type").unwrap_or_default();
    let qid = record.need(&["qid"])?;
    let answer = collapse(&record.need(&["answer"])?);
    let text = collapse(&record.need(&["question"])?);
    let mut sample = question(format!("vqa_rad-{qid}"), vec![images.find(&image)], &text, &answer);
    sample.group = image;
    sample.category = stated(&record.fields, "question_type");
    sample.answer_type = Some(answer_type(record, &answer)?);
    sample.meta = rest(&record.fields);
    let marked = if phrase.starts_with("test") { Split::Test } else { Split::Train };
    let renamed = [
        (meta::QUESTION_ID, Some(qid)),
        (meta::LOCATION, stated(&record.fields, "image_organ")),
        (meta::QUESTION_TYPE, stated(&record.fields, "question_type")),
    ];
    for (key, value) in renamed {
        if let Some(value) = value {
            sample.meta.insert(key.into(), json!(value));
        }
    }
    sample.meta.insert(MARKED_SPLIT.into(), json!(part.split.unwrap_or(marked)));
    Ok(sample)
}

fn from_hub(record: &Record, part: &Part, images: &Images) -> Result<Sample> {
    let id = format!("vqa_rad-{}-{}", part.split_name(), record.row);
    let answer = collapse(&record.need(&["answer"])?);
    let text = collapse(&record.need(&["question"])?);
    let sample = question(id, images.of(record, "image")?, &text, &answer);
    Ok(Sample { answer_type: Some(open_or_closed(&answer)), ..sample })
}

/// Every field that is stated and not used elsewhere.
fn rest(row: &Map<String, Value>) -> Map<String, Value> {
    const USED: [&str; 6] = ["question", "answer", "image_name", "answer_type", "image_organ", "qid"];
    row.iter()
        .filter(|(key, value)| !USED.contains(&key.as_str()) && value.as_str().map(str::trim) != Some("NULL"))
        .map(|(key, value)| (key.clone(), value.clone()))
        .collect()
}

/// A text field, or nothing where the release says `NULL`.
fn stated(row: &Map<String, Value>, key: &str) -> Option<String> {
    let text = row.get(key)?.as_str()?.trim();
    (!text.is_empty() && text != "NULL").then(|| text.to_string())
}

fn answer_type(record: &Record, answer: &str) -> Result<AnswerType> {
    match record.text("answer_type").map(str::to_uppercase).as_deref() {
        Some("OPEN") => Ok(AnswerType::Open),
        Some("CLOSED") => Ok(AnswerType::Closed),
        None => Ok(open_or_closed(answer)),
        Some(other) => {
            Err(record.error("malformed", "unknown answer type of a row").expected("OPEN or CLOSED").found(other))
        }
    }
}

/// Without tabs, line breaks and blanks around.
pub(super) fn collapse(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_quirks_of_the_release_are_read() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("VQA_RAD Image Folder")).unwrap();
        std::fs::write(dir.path().join("VQA_RAD Image Folder/synpic1.jpg"), b"x").unwrap();
        let row = |qid: &str, phrase: &str, answer: &str, kind: &str, image: &str| {
            format!(
                r#"{{"qid": {qid}, "phrase_type": "{phrase}", "image_name": "{image}", "image_organ": "HEAD",
                 "question": "How\tmany \n?", "question_rephrase": "NULL", "question_type": "COUNT, PRSE",
                 "answer": {answer}, "answer_type": "{kind}"}}"#
            )
        };
        let rows = [
            row("\"0\"", "freeform", "4", "OPEN", "synpic1.jpg"),
            row("1", "test_para", "\"Yes\\t\"", "CLOSED ", "synpic1.jpg"),
            row("2", "para", "\"No\"", "CLOSED", "synpic2.jpg"),
            row("3", "para", "null", "CLOSED", "synpic1.jpg"),
        ];
        std::fs::write(dir.path().join(FILE), format!("[{}]", rows.join(","))).unwrap();
        let config = DataConfig { path: Some(dir.path().to_path_buf()), ..DataConfig::default() };
        let rows: Vec<Result<Sample>> = VqaRad.open(&config, 0, dir.path()).unwrap().collect();
        let (first, second) = (rows[0].as_ref().unwrap(), rows[1].as_ref().unwrap());
        assert_eq!((first.id.as_str(), first.answer(), first.question()), ("vqa_rad-0", "4", "How many ?".into()));
        assert_eq!((first.answer_type, second.answer_type), (Some(AnswerType::Open), Some(AnswerType::Closed)));
        assert_eq!((second.answer(), second.meta[MARKED_SPLIT].as_str()), ("Yes", Some("test")));
        assert_eq!((first.meta[MARKED_SPLIT].as_str(), first.group.as_str()), (Some("train"), "synpic1.jpg"));
        assert!(!first.meta.contains_key("question_rephrase"));
        assert!(rows[2].as_ref().unwrap_err().to_string().contains("row 3"));
        assert!(rows[3].as_ref().unwrap_err().to_string().contains("no `answer`"));
    }
}
