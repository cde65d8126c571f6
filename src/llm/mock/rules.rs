//! What the rehearsal server answers: rules by name, general ones first, and scripts that go before them.

use std::{path::Path, sync::Mutex, sync::PoisonError};

use rand::{Rng, RngExt};
use rand_chacha::ChaCha8Rng;
use regex::Regex;
use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::{
    Fault,
    chat::{Asked, Said},
};
use crate::{
    error::{Error, Kind, Result},
    run_dir::read_jsonl,
};

/// Answers for rehearsals. Unit struct in [`RULES`]; a recipe puts its own there.
pub trait Rules: Send + Sync {
    /// Name, as in `base_url = "mock:NAME"` and `medtune mock-llm --rules NAME`.
    fn name(&self) -> &'static str;

    /// What they answer, one line.
    fn about(&self) -> &'static str;

    /// The answer to a request. It may use `draw`, whose stream depends on the server's seed and the words alone.
    fn answer(&self, asked: &Asked, draw: &mut ChaCha8Rng) -> Said;
}

/// All rules.
pub const RULES: &[&dyn Rules] = &[&General, &crate::recipes::medhalltune::answers::RehearsalAnswers];

/// Answers anything: JSON of the wanted shape made of words of the question, or a sentence.
#[derive(Debug)]
pub struct General;

impl Rules for General {
    fn name(&self) -> &'static str {
        "general"
    }

    fn about(&self) -> &'static str {
        "Fills the wanted JSON schema with words of the question; without a schema, answers a sentence."
    }

    fn answer(&self, asked: &Asked, draw: &mut ChaCha8Rng) -> Said {
        let words: Vec<&str> = asked.last().split_whitespace().collect();
        match &asked.schema {
            Some(schema) => Said::text(fill(schema, schema, &words, draw, 0).to_string()),
            None if asked.json => Said::text(json!({ "answer": phrase(&words, draw, 6) }).to_string()),
            None => Said::text(format!("It says {}; reply {:08x}.", phrase(&words, draw, 8), draw.next_u32())),
        }
    }
}

/// Consecutive words of the question.
fn phrase(words: &[&str], draw: &mut ChaCha8Rng, most: usize) -> String {
    if words.is_empty() {
        return "nothing".into();
    }
    let start = draw.random_range(0..words.len());
    let end = (start + most).min(words.len());
    words[start..end].join(" ")
}

/// Deepest nesting that is filled; schemas may refer to themselves.
const MAX_DEPTH: usize = 12;

/// A value of the wanted shape.
fn fill(root: &Value, schema: &Value, words: &[&str], draw: &mut ChaCha8Rng, depth: usize) -> Value {
    if depth > MAX_DEPTH {
        return Value::Null;
    }
    let deeper = |schema: &Value, draw: &mut ChaCha8Rng| fill(root, schema, words, draw, depth + 1);
    if let Some(target) = schema["$ref"].as_str().and_then(|r| r.strip_prefix('#')).and_then(|r| root.pointer(r)) {
        return deeper(target, draw);
    }
    if !schema["const"].is_null() {
        return schema["const"].clone();
    }
    for choice in [&schema["enum"], &schema["anyOf"], &schema["oneOf"]] {
        if let Some(all) = choice.as_array().filter(|all| !all.is_empty()) {
            let one = &all[draw.random_range(0..all.len())];
            return if choice == &schema["enum"] { one.clone() } else { deeper(one, draw) };
        }
    }
    let kind = match &schema["type"] {
        Value::Array(kinds) => kinds.first().and_then(Value::as_str),
        kind => kind.as_str(),
    };
    match kind {
        Some("object") => {
            let properties = schema["properties"].as_object().into_iter().flatten();
            let fields: Map<_, _> = properties.map(|(name, inner)| (name.clone(), deeper(inner, draw))).collect();
            fields.into()
        }
        Some("array") => {
            let least = schema["minItems"].as_u64().unwrap_or(2);
            let most = schema["maxItems"].as_u64().unwrap_or(least.max(4)).max(least);
            let count = draw.random_range(least..=most);
            (0..count).map(|_| deeper(&schema["items"], draw)).collect()
        }
        Some("integer") => {
            let low = schema["minimum"].as_i64().unwrap_or(1);
            draw.random_range(low..=schema["maximum"].as_i64().unwrap_or(10).max(low)).into()
        }
        Some("number") => {
            let low = schema["minimum"].as_f64().unwrap_or(0.0);
            let high = schema["maximum"].as_f64().unwrap_or(1.0).max(low);
            json!((100.0 * draw.random_range(low..=high)).round() / 100.0)
        }
        Some("boolean") => draw.random_bool(0.5).into(),
        Some("null") => Value::Null,
        _ => phrase(words, draw, 8).into(),
    }
}

/// Answers from a file, one JSON object a line: `{"match": "regular expression", "reply": "text"}`, optionally with
/// `"refusal"` or a `"fault"` by its name, and with `"times"`, after which the line is used up. The first line that
/// matches the last user message answers.
#[derive(Debug, Default)]
pub struct Script {
    lines: Vec<Line>,
}

/// What a line of a script says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Scripted {
    Said(Said),
    Fault(Fault),
}

#[derive(Debug)]
struct Line {
    pattern: Regex,
    said: Scripted,
    left: Mutex<Option<u64>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct ScriptLine {
    #[serde(rename = "match", default)]
    pattern: String,
    #[serde(default)]
    reply: Value,
    #[serde(default)]
    refusal: Option<String>,
    #[serde(default)]
    fault: Option<String>,
    #[serde(default)]
    times: Option<u64>,
}

impl Script {
    /// Reads a script.
    ///
    /// # Errors
    /// The file cannot be read, a line is not of this form, or a pattern is not a regular expression.
    pub fn read(path: &Path) -> Result<Self> {
        let lines: Vec<ScriptLine> = read_jsonl(path)?;
        let compile = |(i, line): (usize, ScriptLine)| {
            let pattern = Regex::new(&line.pattern).map_err(|e| {
                Error::new(Kind::Config, "a script has a pattern that is no regular expression")
                    .at(format!("{}, entry {}", path.display(), i + 1))
                    .source(e)
            })?;
            // A reply that is JSON rather than text is what the model is to say as JSON.
            let text = line.reply.as_str().map_or_else(
                || if line.reply.is_null() { String::new() } else { line.reply.to_string() },
                str::to_string,
            );
            let said = match &line.fault {
                Some(name) => Scripted::Fault(Fault::parse(name)?),
                None => Scripted::Said(Said { text, refusal: line.refusal }),
            };
            Ok(Line { pattern, said, left: Mutex::new(line.times) })
        };
        Ok(Self { lines: lines.into_iter().enumerate().map(compile).collect::<Result<_>>()? })
    }

    pub(super) fn answer(&self, asked: &Asked) -> Option<Scripted> {
        let use_up = |line: &&Line| {
            let mut left = line.left.lock().unwrap_or_else(PoisonError::into_inner);
            match left.as_mut() {
                Some(0) => false,
                Some(n) => {
                    *n -= 1;
                    true
                }
                None => true,
            }
        };
        self.lines.iter().filter(|l| l.pattern.is_match(asked.last())).find(use_up).map(|l| l.said.clone())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::stream;

    #[test]
    fn rule_names_are_distinct() {
        let names: std::collections::BTreeSet<_> = RULES.iter().map(|r| r.name()).collect();
        assert_eq!(names.len(), RULES.len());
    }

    #[test]
    fn an_answer_has_the_shape_of_its_schema() {
        let schema = json!({
            "type": "object",
            "properties": {
                "items": { "type": "array", "minItems": 3, "maxItems": 3, "items": { "$ref": "#/$defs/item" } },
                "score": { "type": "integer", "minimum": 1, "maximum": 10 },
            },
            "$defs": { "item": { "type": "object", "properties": {
                "category": { "enum": ["a", "b"] }, "question": { "type": "string" }, "sure": { "type": "boolean" },
            } } },
        });
        let asked = Asked {
            model: String::new(),
            messages: vec![super::super::Spoken { role: "user".into(), text: "one two three".into(), images: 0 }],
            schema: Some(schema),
            json: false,
        };
        let answer = |seed| General.answer(&asked, &mut stream(seed, "test", 0)).text;
        assert_eq!(answer(1), answer(1));
        for seed in 0..20 {
            let value: Value = serde_json::from_str(&answer(seed)).unwrap();
            let items = value["items"].as_array().unwrap();
            assert_eq!(items.len(), 3);
            assert!((1..=10).contains(&value["score"].as_i64().unwrap()));
            for item in items {
                assert!(item["category"] == "a" || item["category"] == "b");
                assert!("one two three".contains(item["question"].as_str().unwrap()));
                assert!(item["sure"].is_boolean());
            }
        }
    }

    #[test]
    fn a_script_answers_in_order_and_uses_lines_up() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let lines = "{\"match\": \"nodule\", \"reply\": \"first\", \"times\": 1}\n{\"match\": \"nod\", \"reply\": {\"a\": 1}}\n";
        std::fs::write(file.path(), lines).unwrap();
        let script = Script::read(file.path()).unwrap();
        let asked = |text: &str| Asked {
            model: String::new(),
            messages: vec![super::super::Spoken { role: "user".into(), text: text.into(), images: 0 }],
            schema: None,
            json: false,
        };
        let answers: Vec<_> = ["a nodule", "a nodule", "nothing"].map(|t| script.answer(&asked(t))).into();
        let said = |text: &str| Some(Scripted::Said(Said::text(text)));
        assert_eq!(answers, [said("first"), said("{\"a\":1}"), None]);
        std::fs::write(file.path(), "{\"match\": \"(\"}").unwrap();
        assert!(Script::read(file.path()).unwrap_err().to_string().contains("entry 1"));
    }
}
