//! LLaVA conversations: a JSON array of `{id, image, conversations: [{from, value}]}`.
//!
//! Quirks that occur in the wild and are read: ids that are numbers, `image` as a string or a list or absent, the key
//! `conversatons`, images without any `<image>` mark (it is put before the first question), a file of JSON lines.
//! Every other key is carried along in `meta`.

use std::path::Path;

use serde_json::{Map, Value};

use super::{
    id_field,
    io::{
        Record,
        driver::{Images, Part, Reading, group_of, nothing_to_read, root},
        layout,
    },
    json_type, text_field,
};
use crate::{
    error::{Error, Kind, Result},
    sample::{ImageRef, Origin, Role, Sample, Split, Turn, meta},
    source::{DataConfig, Samples, Source},
};

/// The reader.
pub struct Llava;

/// Files of a folder.
const FILES: [&str; 7] =
    ["train.json", "train.jsonl", "val.json", "valid.json", "validation.json", "test.json", "test.jsonl"];

impl Source for Llava {
    fn name(&self) -> &'static str {
        "llava"
    }

    fn doc(&self) -> &'static str {
        "LLaVA conversations JSON: an array of {id, image, conversations}.\n\
         `data.path` is the JSON (or JSONL) file, or a folder with train.json, val.json and test.json; `data.image_dir` \
         the folder that image paths start from (default: the file's folder, or images/ in it). `image` may be a path, a \
         list, or absent; roles are human and gpt; other keys are kept in meta, of which `split`, `group`, `polarity`, \
         `category`, `annotation` and `answer_type` are understood. Question-answering sets in LLaVA-Med's style (with \
         `answer_type`) are this format, too."
    }

    fn open(&self, config: &DataConfig, _seed: u64, work_dir: &Path) -> Result<Samples> {
        let root = root(config)?;
        let files = if root.is_file() { vec![root.clone()] } else { layout::existing(&root, &FILES) };
        let Some(dir) = files.first().and_then(|f| f.parent()) else {
            return Err(nothing_to_read(&root, &FILES.join(", "), "llava"));
        };
        let images = Images::new(config, work_dir, vec![dir.to_path_buf(), dir.join("images")]);
        let reading = Reading { source: self, config, work_dir, answers_optional: false };
        reading.parts(files.into_iter().map(Part::named).collect(), move |record, _| read(record, &images))
    }
}

/// A conversation of a file in this format.
pub(super) fn read(record: &Record, image_dir: &Images) -> Result<Sample> {
    let (mut row, at) = (record.fields.clone(), record.at.as_str());
    let id = id_field(&row, "id").unwrap_or_else(|| format!("row-{}", record.row));
    row.remove("id");
    let turns = turns(&mut row, at)?;
    let images = images(row.remove("image"), image_dir, at)?;
    finish(id, images, turns, row, at)
}

fn turns(row: &mut Map<String, Value>, at: &str) -> Result<Vec<Turn>> {
    let list = row.remove("conversations").or_else(|| row.remove("conversatons"));
    let Some(Value::Array(list)) = list else {
        return Err(Error::new(Kind::Data, "a row has no conversation")
            .code("malformed")
            .at(at)
            .expected("`conversations`, an array")
            .found(list.as_ref().map_or("nothing", json_type)));
    };
    list.iter().map(|turn| turn_of(turn, "from", "value", at)).collect()
}

/// One message with its role under `role_key` and its text under `text_key`.
pub(super) fn turn_of(turn: &Value, role_key: &str, text_key: &str, at: &str) -> Result<Turn> {
    let Value::Object(turn) = turn else {
        return Err(Error::new(Kind::Data, "a message is not an object")
            .code("malformed")
            .at(at)
            .found(json_type(turn)));
    };
    let role = match text_field(turn, role_key, at)? {
        "human" | "user" => Role::User,
        "gpt" | "assistant" => Role::Assistant,
        "system" => Role::System,
        other => {
            return Err(Error::new(Kind::Data, "unknown role of a message")
                .code("malformed")
                .at(at)
                .expected("human, gpt, user, assistant or system")
                .found(other));
        }
    };
    Ok(Turn { role, text: text_field(turn, text_key, at)?.to_string() })
}

/// Images given as a path, a list of paths, or not at all.
pub(super) fn images(value: Option<Value>, dir: &Images, at: &str) -> Result<Vec<ImageRef>> {
    let bad = |found: &Value| {
        Error::new(Kind::Data, "the image of a row is not a path")
            .code("malformed")
            .at(at)
            .expected("a string")
            .found(json_type(found))
    };
    let one = |v: &Value| match v {
        Value::String(path) if !path.is_empty() => Ok(dir.find(path)),
        other => Err(bad(other)),
    };
    match value {
        None | Some(Value::Null) => Ok(Vec::new()),
        Some(Value::Array(list)) => list.iter().map(one).collect(),
        Some(value) => one(&value).map(|i| vec![i]),
    }
}

/// Puts a row together from its parts; what `rest` holds beside the keys that are understood goes to `meta`.
pub(super) fn finish(
    id: String,
    images: Vec<ImageRef>,
    mut turns: Vec<Turn>,
    mut rest: Map<String, Value>,
    at: &str,
) -> Result<Sample> {
    let marks: usize = turns.iter().map(|t| t.text.matches("<image>").count()).sum();
    if marks == 0
        && !images.is_empty()
        && let Some(first) = turns.iter_mut().find(|t| t.role == Role::User)
    {
        first.text = format!("{}{}", "<image>\n".repeat(images.len()), first.text);
    }
    let category = take_text(&mut rest, "category");
    let annotation = take_text(&mut rest, "annotation");
    let group = take_text(&mut rest, "group");
    let polarity = take_known(&mut rest, "polarity", "hallucination or non-hallucination", at)?;
    let answer_type = take_known(&mut rest, "answer_type", "OPEN or CLOSED", at)?;
    if let Some(split) = take_known::<Split>(&mut rest, "split", "train, validation or test", at)? {
        rest.insert(meta::MARKED_SPLIT.into(), serde_json::json!(split));
    }
    let mut sample = Sample {
        id,
        images,
        turns,
        origin: Origin::default(),
        split: Split::default(),
        group: String::new(),
        polarity,
        category,
        answer_type,
        options: Vec::new(),
        annotation,
        meta: rest,
    };
    sample.group = group.unwrap_or_else(|| group_of(&sample.images, &sample.id));
    Ok(sample)
}

fn take_text(row: &mut Map<String, Value>, key: &str) -> Option<String> {
    match row.get(key) {
        Some(Value::String(text)) => {
            let text = text.clone();
            row.remove(key);
            Some(text)
        }
        _ => None,
    }
}

fn take_known<T: serde::de::DeserializeOwned>(
    row: &mut Map<String, Value>,
    key: &str,
    expected: &str,
    at: &str,
) -> Result<Option<T>> {
    match row.remove(key) {
        None | Some(Value::Null) => Ok(None),
        Some(value) => serde_json::from_value(value.clone()).map(Some).map_err(|_| {
            Error::new(Kind::Data, format!("unknown value of `{key}` in a row"))
                .code("malformed")
                .at(at)
                .expected(expected)
                .found(value)
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn open(text: &str) -> (tempfile::TempDir, Result<Vec<Result<Sample>>>) {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("data.json"), text).unwrap();
        std::fs::write(dir.path().join("a.png"), b"x").unwrap();
        let config = DataConfig { path: Some(dir.path().join("data.json")), ..DataConfig::default() };
        let rows = Llava.open(&config, 0, dir.path()).map(Iterator::collect);
        (dir, rows)
    }

    #[test]
    fn reads_the_forms_that_occur() {
        let (_dir, rows) = open(
            r#"[
            {"id": 7, "image": "a.png", "domain": {"mri": true}, "conversatons": [
                {"from": "human", "value": "What?\n<image>"}, {"from": "gpt", "value": "A brain."}]},
            {"id": "two", "image": ["a.png", "a.png"], "split": "test", "polarity": "hallucination", "conversations": [
                {"from": "human", "value": "Compare."}, {"from": "gpt", "value": "Same."},
                {"from": "human", "value": "Sure?"}, {"from": "gpt", "value": "Yes."}]},
            {"conversations": [{"from": "human", "value": "Define edema."}, {"from": "gpt", "value": "Swelling."}]}
        ]"#,
        );
        let rows: Vec<Sample> = rows.unwrap().into_iter().collect::<Result<_>>().unwrap();
        assert_eq!((rows[0].id.as_str(), rows[0].images.len(), rows[0].question()), ("7", 1, "What?".into()));
        assert_eq!(rows[0].meta["domain"]["mri"], true);
        assert_eq!(rows[1].turns[0].text, "<image>\n<image>\nCompare.");
        assert_eq!(rows[1].meta[super::super::MARKED_SPLIT], "test");
        assert_eq!(rows[1].polarity, Some(crate::sample::Polarity::Hallucination));
        assert_eq!((rows[2].id.as_str(), rows[2].group.as_str()), ("row-2", "row-2"));
        assert_eq!(rows[1].origin.row, 1);
    }

    #[test]
    fn bad_rows_are_named_and_the_others_still_come() {
        let talk = r#""conversations": [{"from": "human", "value": "<image>\nQ?"}, {"from": "gpt", "value": "A."}]"#;
        let (_dir, rows) = open(&format!(
            r#"[{{"id": 1, "image": "missing.png", {talk}}},
                {{"id": 2, {talk}}},
                {{"id": 3, "image": "a.png", "conversations": [{{"from": "human", "value": "<image>"}}, {{"from": "gpt", "value": "A."}}]}},
                {{"id": 4, "image": "a.png", "conversations": [{{"from": "gpt", "value": "A."}}]}},
                {{"id": 5, "image": 5, {talk}}},
                {{"id": 6, "image": "a.png", "conversations": [{{"from": "robot", "value": "A."}}]}},
                "text",
                {{"id": 8, "image": "a.png", {talk}}},
                {{"id": 9, "image": "a.png", "conversations": [{{"from": "human", "value": "Q?"}}, {{"from": "gpt", "value": " "}}]}}]"#
        ));
        let rows = rows.unwrap();
        let messages: Vec<String> =
            rows.iter().map(|r| r.as_ref().map_or_else(ToString::to_string, |s| s.id.clone())).collect();
        let expected = [
            "image file of a row is missing",
            "number of <image> marks",
            "message 1 of a row is empty",
            "out of order",
            "not a path",
            "unknown role",
            "not an object",
            "8",
            "message 2 of a row is empty",
        ];
        for (i, (message, part)) in messages.iter().zip(expected).enumerate() {
            assert!(message.contains(part), "row {}: {message}", i + 1);
            assert!(i == 7 || message.contains(&format!("data.json, row {}", i + 1)), "{message}");
        }
        assert_eq!(messages.len(), expected.len());
    }

    #[test]
    fn broken_files_are_errors_with_a_place() {
        let (_d, rows) = open("[{\"id\": 1,\n \"conver");
        let error = rows.unwrap_err();
        assert!(error.to_string().contains("data.json:2"), "{error}");
        assert!(error.help_line().unwrap().contains("too early"));
        assert!(open("{}").1.unwrap_err().to_string().contains("expected a JSON array"));
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("d.json"), b"[\n\"\xff\"]").unwrap();
        let config = DataConfig { path: Some(dir.path().join("d.json")), ..DataConfig::default() };
        let error = Llava.open(&config, 0, dir.path()).err().unwrap();
        assert!(error.to_string().contains("not UTF-8") && error.to_string().contains("d.json:2"), "{error}");
    }
}
