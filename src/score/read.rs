//! Reads anybody's predictions. A line that cannot be used is set aside with its reason; the others are still scored.
//!
//! Known forms: MedHallTune's prediction files (`question_id`, `image`, `question`, `answer`), the result files of its
//! history (`text` with the question, `gpt4_answer`, `fig_caption`, `result`), LLaVA-Med's answer files (`prompt`,
//! `text`), its question files (`conversations`), this program's own rows (`turns`), JSONL or one JSON array.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::{
    error::{Error, Result},
    judge::{last_answer, last_question},
    sample::{AnswerType, Polarity, Sample},
};

/// The two parts of the benchmark. Their ids collide, so a row is known by part and id.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Part {
    /// Ordinary questions.
    Positive,
    /// Questions with a false premise.
    Negative,
}

impl Part {
    /// Both, in table order.
    pub const ALL: [Self; 2] = [Self::Positive, Self::Negative];

    /// Word of tables.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Positive => "positive",
            Self::Negative => "negative",
        }
    }

    /// The part that a file's name speaks of, if it speaks of exactly one. One of the released names is misspelt.
    #[must_use]
    pub fn of_file(path: &Path) -> Option<Self> {
        let name = path.file_name()?.to_string_lossy().to_lowercase();
        match (name.contains("positive") || name.contains("postive"), name.contains("negative")) {
            (true, false) => Some(Self::Positive),
            (false, true) => Some(Self::Negative),
            _ => None,
        }
    }

    fn of_word(word: &str) -> Option<Self> {
        match word.to_lowercase().as_str() {
            "positive" | "p" | "non-hallucination" => Some(Self::Positive),
            "negative" | "n" | "hallucination" => Some(Self::Negative),
            _ => None,
        }
    }
}

/// A line with its fields, whatever they mean.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Row {
    /// Line of the file, or element of its array, from 1.
    pub line: usize,
    /// `question_id`, `id` or `qid`, as text.
    pub id: Option<String>,
    /// What the row says of its part.
    pub part: Option<Part>,
    /// Name of the image.
    pub image: Option<String>,
    /// The question, without image marks.
    pub question: Option<String>,
    /// `answer`, or `text` where that is not the question.
    pub answer: Option<String>,
    /// The reference answer.
    pub reference: Option<String>,
    /// Ground-truth text about the image.
    pub caption: Option<String>,
    /// A judge's reply that is already there.
    pub result: Option<String>,
    /// Open or closed, for visual question answering.
    pub answer_type: Option<AnswerType>,
    /// Options of a multiple-choice question, without letters.
    pub options: Vec<String>,
}

/// A line that is set aside.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SetAside {
    /// File it is in.
    pub file: PathBuf,
    /// Line, or element of the array, from 1.
    pub line: usize,
    /// Its id, where it has one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub id: Option<String>,
    /// Reason code, stable, snake_case.
    pub code: String,
    /// What exactly was wrong.
    pub detail: String,
    /// The line itself, unreadable bytes replaced.
    pub raw: String,
}

/// A file: its rows, and the lines that are none.
#[derive(Debug, Clone, Default)]
pub struct Rows {
    /// Where it is.
    pub path: PathBuf,
    /// Rows in file order, each with the text it was read from.
    pub rows: Vec<(Row, String)>,
    /// Lines that are no rows.
    pub set_aside: Vec<SetAside>,
    /// Rows in which `NaN` or `Infinity` stood where JSON allows no such number; they were read as nothing.
    pub no_numbers: usize,
}

impl Rows {
    /// Lines of the file that are not empty: every one is a row or set aside.
    #[must_use]
    pub fn lines(&self) -> usize {
        self.rows.len() + self.set_aside.len()
    }
}

/// Reads a file.
///
/// # Errors
/// The file cannot be read.
pub fn read(path: &Path) -> Result<Rows> {
    let bytes = std::fs::read(path).map_err(|e| Error::io(path, e))?;
    let mut found = Rows { path: path.into(), ..Rows::default() };
    let bytes = bytes.strip_prefix("\u{feff}".as_bytes()).unwrap_or(&bytes);
    if bytes.iter().find(|b| !b.is_ascii_whitespace()) == Some(&b'[')
        && let Ok(Value::Array(all)) = serde_json::from_slice(bytes)
    {
        for (i, value) in all.into_iter().enumerate() {
            found.take(i + 1, value.to_string(), value);
        }
        return Ok(found);
    }
    let ended = bytes.last().is_none_or(|b| *b == b'\n');
    let lines: Vec<&[u8]> = bytes.split(|b| *b == b'\n').collect();
    for (i, line) in lines.iter().enumerate() {
        let last = i + 1 == lines.len() && !ended;
        if !line.iter().all(u8::is_ascii_whitespace) {
            found.line(i + 1, line, last);
        }
    }
    Ok(found)
}

impl Rows {
    fn aside(&mut self, line: usize, id: Option<String>, code: &str, detail: String, raw: String) {
        self.set_aside.push(SetAside { file: self.path.clone(), line, id, code: code.into(), detail, raw });
    }

    fn line(&mut self, number: usize, bytes: &[u8], unfinished: bool) {
        let Ok(text) = std::str::from_utf8(bytes) else {
            let raw = String::from_utf8_lossy(bytes).into_owned();
            return self.aside(number, None, "not_utf8", "the line is not UTF-8 text".into(), raw);
        };
        let text = text.trim();
        match serde_json::from_str(text) {
            Ok(value) => self.take(number, text.into(), value),
            Err(error) => match serde_json::from_str(&without_nan(text)) {
                Ok(value) => {
                    self.no_numbers += 1;
                    self.take(number, text.into(), value);
                }
                Err(_) if unfinished => {
                    let detail = format!("the last line is half-written: {error}");
                    self.aside(number, None, "half_written", detail, text.into());
                }
                Err(_) => self.aside(number, None, "not_json", format!("no JSON: {error}"), text.into()),
            },
        }
    }

    fn take(&mut self, line: usize, text: String, value: Value) {
        match value {
            Value::Object(fields) => self.rows.push((row(line, &fields), text)),
            _ => self.aside(line, None, "not_object", "the line is no JSON object".into(), text),
        }
    }
}

/// `NaN`, `Infinity` and `-Infinity`, which Python writes, become `null`; strings stay.
fn without_nan(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let (mut inside, mut escaped, mut rest) = (false, false, text);
    while let Some(c) = rest.chars().next() {
        let word = ["-Infinity", "Infinity", "NaN"].into_iter().find(|w| !inside && rest.starts_with(w));
        if let Some(word) = word {
            out.push_str("null");
            rest = &rest[word.len()..];
            continue;
        }
        if c == '"' && !escaped {
            inside = !inside;
        }
        escaped = inside && c == '\\' && !escaped;
        out.push(c);
        rest = &rest[c.len_utf8()..];
    }
    out
}

/// A scalar as text; nothing for absent, null, lists and objects.
fn text(value: Option<&Value>) -> Option<String> {
    match value? {
        Value::String(s) => Some(s.clone()),
        Value::Number(n) => Some(n.to_string()),
        Value::Bool(b) => Some(b.to_string()),
        _ => None,
    }
}

fn row(line: usize, fields: &Map<String, Value>) -> Row {
    if let Ok(sample) = serde_json::from_value::<Sample>(Value::Object(fields.clone())) {
        return of_sample(line, &sample);
    }
    let first = |names: &[&str]| names.iter().find_map(|name| text(fields.get(*name)));
    let turn = |index: usize| {
        let turns = fields.get("conversations").or_else(|| fields.get("conversatons"))?;
        text(turns.get(index)?.get("value"))
    };
    let mark = |s: String| s.replace("<image>", "").trim().to_string();
    let body = text(fields.get("text"));
    let question = first(&["question", "prompt"]);
    // In result files `text` is the question, with its mark; in answer files it is the answer.
    let is_question = |t: &String| t.contains("<image>") || question.is_none();
    let answer = first(&["answer", "prediction", "response", "output"]);
    let (question, answer) = match (answer, body) {
        (None, Some(t)) if !is_question(&t) => (question, Some(t)),
        (None, Some(t)) if question.is_none() && !t.contains("<image>") && !fields.contains_key("gpt4_answer") => {
            (None, Some(t))
        }
        (answer, Some(t)) => (question.or(Some(t)), answer),
        (answer, None) => (question, answer),
    };
    let part = ["split", "polarity"].iter().find_map(|k| Part::of_word(fields.get(*k)?.as_str()?));
    Row {
        line,
        id: first(&["question_id", "id", "qid"]).map(|id| id.trim().to_string()).filter(|id| !id.is_empty()),
        part,
        image: first(&["image", "image_path", "img_name", "image_name"]),
        question: question.or_else(|| turn(0)).map(mark),
        answer,
        reference: first(&["gpt4_answer", "reference", "ground_truth", "gt_answer"]).or_else(|| turn(1)),
        caption: first(&["fig_caption", "caption"]),
        result: text(fields.get("result")),
        answer_type: text(fields.get("answer_type")).and_then(|t| match t.trim().to_uppercase().as_str() {
            "OPEN" => Some(AnswerType::Open),
            "CLOSED" => Some(AnswerType::Closed),
            _ => None,
        }),
        options: fields
            .get("options")
            .and_then(Value::as_array)
            .map_or_else(Vec::new, |all| all.iter().filter_map(|o| text(Some(o))).collect()),
    }
}

/// A row of this program's own files: its last answer is the reference.
fn of_sample(line: usize, sample: &Sample) -> Row {
    let name = |p: &Path| p.file_name().map(|n| n.to_string_lossy().into_owned());
    Row {
        line,
        id: Some(sample.id.clone()),
        part: sample.polarity.map(|p| match p {
            Polarity::Hallucination => Part::Negative,
            Polarity::NonHallucination => Part::Positive,
        }),
        image: sample.images.first().and_then(|i| name(&i.path)),
        question: Some(last_question(sample)),
        answer: None,
        reference: Some(last_answer(sample).to_string()),
        caption: sample.annotation.clone(),
        result: None,
        answer_type: sample.answer_type,
        options: sample.options.clone(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(text: &str) -> Row {
        row(1, serde_json::from_str::<Value>(text).unwrap().as_object().unwrap())
    }

    fn file(bytes: &[u8]) -> Rows {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), bytes).unwrap();
        read(file.path()).unwrap()
    }

    #[test]
    fn every_published_form_says_which_text_is_which() {
        let r = of(r#"{"question_id": 1, "image": "a.jpg", "question": "Is it?", "answer": "Yes."}"#);
        assert_eq!((r.id.as_deref(), r.answer.as_deref(), r.reference), (Some("1"), Some("Yes."), None));
        let r = of(r#"{"question_id": 1, "text": "Is it?\n<image>", "gpt4_answer": "No.", "question": "Is it?",
            "answer": "Yes.", "result": "1 2 3 4"}"#);
        assert_eq!((r.question.as_deref(), r.answer.as_deref()), (Some("Is it?"), Some("Yes.")));
        assert_eq!((r.reference.as_deref(), r.result.as_deref()), (Some("No."), Some("1 2 3 4")));
        // A question file of the history has no answer.
        let r = of(r#"{"question_id": 1, "text": "Is it?\n<image>", "gpt4_answer": "No."}"#);
        assert_eq!((r.question.as_deref(), r.answer), (Some("Is it?"), None));
        // LLaVA-Med's answers.
        let r = of(r#"{"question_id": "q", "prompt": "Is it?", "text": "Yes.", "model_id": "m"}"#);
        assert_eq!((r.question.as_deref(), r.answer.as_deref()), (Some("Is it?"), Some("Yes.")));
        let r = of(r#"{"question_id": "q", "text": "Yes."}"#);
        assert_eq!((r.question, r.answer.as_deref()), (None, Some("Yes.")));
        let r =
            of(r#"{"id": 3, "answer_type": "CLOSED ", "conversatons": [{"from": "human", "value": "<image>\nIs it?"},
            {"from": "gpt", "value": "No"}]}"#);
        assert_eq!((r.question.as_deref(), r.reference.as_deref()), (Some("Is it?"), Some("No")));
        assert_eq!(r.answer_type, Some(AnswerType::Closed));
        assert_eq!(of(r#"{"id": 1, "answer": 3, "polarity": "hallucination"}"#).answer.as_deref(), Some("3"));
        assert_eq!(of(r#"{"id": 1, "polarity": "hallucination"}"#).part, Some(Part::Negative));
        assert_eq!(of(r#"{"id": 1, "split": "test"}"#).part, None);
    }

    #[test]
    fn bad_lines_are_set_aside_and_good_ones_read() {
        let mut bytes =
            b"{\"id\": 1, \"answer\": \"a\"}\n\n{\"id\": 2, \"answer\": \"\xff\"}\nnonsense\n[1]\n".to_vec();
        bytes.extend(
            b"{\"id\": 3, \"answer\": \"NaN \\\" NaN\", \"score\": NaN, \"x\": [-Infinity]}\n{\"id\": 4, \"ans",
        );
        let found = file(&bytes);
        let codes: Vec<(usize, &str)> = found.set_aside.iter().map(|s| (s.line, s.code.as_str())).collect();
        assert_eq!(codes, [(3, "not_utf8"), (4, "not_json"), (5, "not_object"), (7, "half_written")]);
        assert_eq!(found.rows.iter().map(|r| r.0.line).collect::<Vec<_>>(), [1, 6]);
        assert_eq!(found.rows[1].0.answer.as_deref(), Some("NaN \" NaN"));
        assert_eq!((found.no_numbers, found.lines()), (1, 6));
        let found = file(b"\xef\xbb\xbf[{\"id\": 1, \"answer\": \"a\"}, 7]");
        assert_eq!((found.rows.len(), found.set_aside.len()), (1, 1));
        assert_eq!(file(b"").lines(), 0);
        // A last line without a line feed that is whole is a row.
        assert_eq!(file(b"{\"id\": 1}\n{\"id\": 2}").rows.len(), 2);
    }

    #[test]
    fn file_names_speak_of_their_part() {
        let part = |name: &str| Part::of_file(Path::new(name));
        assert_eq!(part("x/llava-med-prediction-postive-GPT4o-eval.jsonl"), Some(Part::Positive));
        assert_eq!(part("positive/negative_qa.jsonl"), Some(Part::Negative));
        assert_eq!(part("negative_and_positive.jsonl"), None);
    }
}
