//! Chat messages with images, one JSON object a line: `{"messages": [{role, content}], "images": [path]}`.

use std::path::Path;

use serde_json::Value;

use super::{
    id_field,
    io::{
        Record,
        driver::{Images, Part, Reading, nothing_to_read, root},
        layout,
    },
    json_type,
    llava::{finish, images, turn_of},
};
use crate::{
    error::{Error, Kind, Result},
    sample::Sample,
    source::{DataConfig, Samples, Source},
};

/// The reader.
pub struct Messages;

/// Files of a folder.
const FILES: [&str; 4] = ["train.jsonl", "val.jsonl", "validation.jsonl", "test.jsonl"];

impl Source for Messages {
    fn name(&self) -> &'static str {
        "messages"
    }

    fn doc(&self) -> &'static str {
        "Chat messages with images, one row a line: {messages: [{role, content}], images: [path]}.\n\
         `data.path` is the JSONL (or JSON) file, or a folder with train.jsonl, val.jsonl and test.jsonl; \
         `data.image_dir` the folder that image paths start from (default: the file's folder, or images/ in it). Roles \
         are system, user and assistant. `id`, `split`, `group`, `polarity`, `category`, `annotation` and `answer_type` \
         are understood; other keys are kept in meta."
    }

    fn open(&self, config: &DataConfig, _seed: u64, work_dir: &Path) -> Result<Samples> {
        let root = root(config)?;
        let files = if root.is_file() { vec![root.clone()] } else { layout::existing(&root, &FILES) };
        let Some(dir) = files.first().and_then(|f| f.parent()) else {
            return Err(nothing_to_read(&root, &FILES.join(", "), "messages"));
        };
        let images = Images::new(config, work_dir, vec![dir.to_path_buf(), dir.join("images")]);
        let reading = Reading { source: self, config, work_dir, answers_optional: false };
        reading.parts(files.into_iter().map(Part::named).collect(), move |record, _| read(record, &images))
    }
}

fn read(record: &Record, dir: &Images) -> Result<Sample> {
    let (mut row, at) = (record.fields.clone(), record.at.as_str());
    let id = id_field(&row, "id").unwrap_or_else(|| format!("row-{}", record.row));
    row.remove("id");
    let list = row.remove("messages");
    let Some(Value::Array(list)) = list else {
        return Err(Error::new(Kind::Data, "a row has no messages")
            .code("malformed")
            .at(at)
            .expected("`messages`, an array")
            .found(list.as_ref().map_or("nothing", json_type)));
    };
    let turns = list.iter().map(|t| turn_of(t, "role", "content", at)).collect::<Result<_>>()?;
    let images = images(row.remove("images"), dir, at)?;
    finish(id, images, turns, row, at)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn good_lines_come_and_bad_lines_are_named() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("a.png"), b"x").unwrap();
        let file = dir.path().join("d.jsonl");
        let talk = r#""messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "<image>Q?"}, {"role": "assistant", "content": "A."}]"#;
        let text = format!(
            "{{\"id\": \"x\", \"images\": [\"a.png\"], \"answer_type\": \"CLOSED\", \"extra\": 1, {talk}}}\n\n\
             {{\"images\": [\"a.png\", \"a.png\"], {talk}}}\n\
             {{\"images\": [\"a.png\"], \"split\": \"holdout\", {talk}}}\n\
             {{\"images\": [\"a.p"
        );
        std::fs::write(&file, text).unwrap();
        let config = DataConfig { path: Some(file), ..DataConfig::default() };
        let rows: Vec<Result<Sample>> = Messages.open(&config, 0, dir.path()).unwrap().collect();
        let first = rows[0].as_ref().unwrap();
        assert_eq!((first.id.as_str(), first.turns.len(), first.meta["extra"].as_i64()), ("x", 3, Some(1)));
        assert_eq!(first.answer_type, Some(crate::sample::AnswerType::Closed));
        let message = |i: usize| rows[i].as_ref().unwrap_err().to_string();
        assert!(message(1).contains("row 3") && message(1).contains("expected 2 marks, found 1"), "{}", message(1));
        assert!(message(2).contains("unknown value of `split`") && message(2).contains("holdout"), "{}", message(2));
        assert!(message(3).contains("row 5") && message(3).contains("not JSON"), "{}", message(3));
    }
}
