//! VQA-RAD in its public form: `VQA_RAD Dataset Public.json` beside the folder `VQA_RAD Image Folder`.
//!
//! Lau et al., Scientific Data 5:180251 (2018). Quirks that are read: answers and ids that are numbers, blanks after
//! `CLOSED`, the text `NULL` for nothing, the test marking as a prefix of `phrase_type`. That marking is not by image
//! (the same image has train and test questions), so that it is kept in `meta.marked_split` and not followed unless
//! `data.split = "marked"`.

use std::path::Path;

use serde_json::{Map, Value, json};

use super::{MARKED_SPLIT, check_row, data_file, id_field, image_dir, json_rows, json_type, place, text_field};
use crate::{
    error::{Error, Kind, Result},
    sample::{AnswerType, ImageRef, Origin, Role, Sample, Split, Turn},
    source::{DataConfig, Samples, Source},
};

/// The reader.
pub struct VqaRad;

/// File name of the public release.
const FILE: &str = "VQA_RAD Dataset Public.json";

impl Source for VqaRad {
    fn name(&self) -> &'static str {
        "vqa_rad"
    }

    fn doc(&self) -> &'static str {
        "VQA-RAD as its authors publish it: `VQA_RAD Dataset Public.json` and `VQA_RAD Image Folder`.\n\
         `data.path` is the folder that holds both, or the JSON file. Questions about head, chest and abdomen images, open \
         and closed. The official train and test questions share images: rows are split by image unless \
         data.split = \"marked\"."
    }

    fn open(&self, config: &DataConfig, _seed: u64, _work_dir: &Path) -> Result<Samples> {
        let file = data_file(config, FILE)?;
        let dir = image_dir(config, &file, "VQA_RAD Image Folder");
        let rows = json_rows(&file)?;
        Ok(Samples::new(rows.into_iter().enumerate().map(move |(i, row)| read(&row, i, &file, &dir))))
    }
}

fn read(row: &Value, index: usize, file: &Path, dir: &Path) -> Result<Sample> {
    let at = place(file, index);
    let Value::Object(row) = row else {
        return Err(Error::new(Kind::Data, "a row is not an object")
            .code("malformed")
            .at(at)
            .expected("{...}")
            .found(json_type(row)));
    };
    let image = text_field(row, "image_name", &at)?.trim();
    let phrase = text_field(row, "phrase_type", &at)?.trim();
    let qid =
        id_field(row, "qid").ok_or_else(|| Error::new(Kind::Data, "a row has no `qid`").code("malformed").at(&at))?;
    let question = collapse(text_field(row, "question", &at)?);
    let marked = if phrase.starts_with("test") { Split::Test } else { Split::Train };
    let mut meta = meta(row);
    meta.insert(MARKED_SPLIT.into(), json!(marked));
    let sample = Sample {
        id: format!("vqa_rad-{qid}"),
        images: vec![ImageRef { path: dir.join(image) }],
        turns: vec![
            Turn { role: Role::User, text: format!("<image>\n{question}") },
            Turn { role: Role::Assistant, text: answer(row, &at)? },
        ],
        origin: Origin { dataset: "vqa_rad".into(), file: file.to_path_buf(), row: index },
        split: Split::default(),
        group: image.to_string(),
        polarity: None,
        category: stated(row, "question_type"),
        answer_type: Some(answer_type(row, &at)?),
        options: Vec::new(),
        annotation: None,
        meta,
    };
    check_row(&sample, &at)?;
    Ok(sample)
}

/// Every field that is stated and not used elsewhere.
fn meta(row: &Map<String, Value>) -> Map<String, Value> {
    const USED: [&str; 4] = ["question", "answer", "image_name", "answer_type"];
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

fn answer(row: &Map<String, Value>, at: &str) -> Result<String> {
    match row.get("answer") {
        Some(Value::String(text)) => Ok(collapse(text)),
        Some(Value::Number(number)) => Ok(number.to_string()),
        other => Err(Error::new(Kind::Data, "the answer of a row is neither text nor a number")
            .code("malformed")
            .at(at)
            .found(other.map_or("nothing", json_type))),
    }
}

fn answer_type(row: &Map<String, Value>, at: &str) -> Result<AnswerType> {
    match text_field(row, "answer_type", at)?.trim().to_uppercase().as_str() {
        "OPEN" => Ok(AnswerType::Open),
        "CLOSED" => Ok(AnswerType::Closed),
        other => Err(Error::new(Kind::Data, "unknown answer type of a row")
            .code("malformed")
            .at(at)
            .expected("OPEN or CLOSED")
            .found(format!("{other:?}"))),
    }
}

/// Without tabs, line breaks and blanks around.
fn collapse(text: &str) -> String {
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
        assert!(rows[3].as_ref().unwrap_err().to_string().contains("neither text nor a number"));
    }
}
