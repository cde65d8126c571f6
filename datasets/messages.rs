//! Chat messages with images, one JSON object a line: `{"messages": [{role, content}], "images": [path]}`.

use std::path::Path;

use serde_json::Value;

use super::{
    check_row, data_file, id_field, image_dir, json_type,
    llava::{finish, images, turn_of},
    place, read_text,
};
use crate::{
    error::{Error, Kind, Result},
    sample::{Origin, Sample},
    source::{DataConfig, Samples, Source},
};

/// The reader.
pub struct Messages;

impl Source for Messages {
    fn name(&self) -> &'static str {
        "messages"
    }

    fn doc(&self) -> &'static str {
        "Chat messages with images, one row a line: {messages: [{role, content}], images: [path]}.\n\
         `data.path` is the JSONL file, `data.image_dir` the folder that image paths start from (default: beside the file). \
         Roles are system, user and assistant. `id`, `split`, `group`, `polarity`, `category`, `annotation` and \
         `answer_type` are understood; other keys are kept in meta."
    }

    fn open(&self, config: &DataConfig, _seed: u64, _work_dir: &Path) -> Result<Samples> {
        let file = data_file(config, "train.jsonl")?;
        let dir = image_dir(config, &file, "");
        let text = read_text(&file)?;
        let lines: Vec<(usize, String)> = text
            .trim_start_matches('\u{feff}')
            .lines()
            .enumerate()
            .filter(|(_, line)| !line.trim().is_empty())
            .map(|(i, line)| (i, line.to_string()))
            .collect();
        if lines.is_empty() {
            return Err(Error::new(Kind::Data, "the data file has no rows").at(file.display()));
        }
        Ok(Samples::new(lines.into_iter().map(move |(i, line)| read(&line, i, &file, &dir))))
    }
}

fn read(line: &str, index: usize, file: &Path, dir: &Path) -> Result<Sample> {
    let at = place(file, index);
    let value: Value = serde_json::from_str(line).map_err(|e| {
        let hint = if e.is_eof() { "the line ends too early: copy the file again" } else { "repair this line" };
        Error::new(Kind::Data, "a line is not JSON").code("malformed").at(&at).help(hint).source(e)
    })?;
    let Value::Object(mut row) = value else {
        return Err(Error::new(Kind::Data, "a row is not an object")
            .code("malformed")
            .at(at)
            .expected("{...}")
            .found(json_type(&value)));
    };
    let id = id_field(&row, "id").unwrap_or_else(|| format!("row-{index}"));
    row.remove("id");
    let list = row.remove("messages");
    let Some(Value::Array(list)) = list else {
        return Err(Error::new(Kind::Data, "a row has no messages")
            .code("malformed")
            .at(at)
            .expected("`messages`, an array")
            .found(list.as_ref().map_or("nothing", json_type)));
    };
    let turns = list.iter().map(|t| turn_of(t, "role", "content", &at)).collect::<Result<_>>()?;
    let images = images(row.remove("images"), dir, &at)?;
    let mut sample = finish(id, images, turns, row, &at)?;
    sample.origin = Origin { dataset: "messages".into(), file: file.to_path_buf(), row: index };
    check_row(&sample, &at)?;
    Ok(sample)
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
