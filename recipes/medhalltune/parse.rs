//! Reads question-answer items out of a model's reply, whatever the reply looks like.
//!
//! What cannot be read becomes a [`Fault`] with a reason code, never nothing: items and faults together account for the
//! whole reply. Repairs are limited to the form (fences, prose around the JSON, typographic quotes, trailing commas, a
//! cut-off end, entities); words are never changed.

use std::sync::LazyLock;

use regex::Regex;
use serde::{Deserialize, Deserializer, de};
use serde_json::Value;

use super::categories;
use crate::{recipe::Fault, sample::Polarity};

/// A question with its answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Item {
    /// Task or hallucination category, one of the recipe's.
    pub category: &'static str,
    /// The question, without image marks.
    pub question: String,
    /// The answer.
    pub answer: String,
    /// The words of the annotation that support the answer; may be empty.
    pub evidence: String,
}

/// What a reply gave.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Parsed {
    /// Items in order.
    pub items: Vec<Item>,
    /// Everything else.
    pub faults: Vec<Fault>,
}

/// Reads a reply to a request for items of `polarity`.
#[must_use]
pub fn parse(text: &str, finish_reason: Option<&str>, refusal: Option<&str>, polarity: Polarity) -> Parsed {
    let mut parsed = Parsed::default();
    let text = text.replace(['\u{feff}', '\u{200b}'], "").replace("\r\n", "\n");
    let text = text.trim();
    let mut whole = |code, detail: &str| parsed.faults.push(Fault { code, detail: detail.into(), raw: text.into() });
    if text.is_empty() {
        match (finish_reason, refusal) {
            (Some("content_filter"), _) => whole("content_filter", "the server's filter withheld the reply"),
            (_, Some(words)) => whole("refused", words),
            _ => whole("empty_reply", "the reply has no text"),
        }
        return parsed;
    }
    let Found { records, broken } = records(text);
    if records.is_empty() && broken.is_empty() {
        match (REFUSAL.is_match(&text.replace('\u{2019}', "'")), says_none(text)) {
            (_, true) => whole("count", "the list of items is empty"),
            (true, _) => whole("refused", "the model declines"),
            _ => whole("malformed", "the reply has no items"),
        }
        return parsed;
    }
    for record in records {
        match item(&record, polarity) {
            Ok(item) => parsed.items.push(item),
            Err((code, detail)) => parsed.faults.push(Fault { code, detail, raw: record.raw }),
        }
    }
    let cut = finish_reason == Some("length");
    for raw in broken {
        let detail = if cut { "the reply is cut off in this item" } else { "the item is not JSON" };
        parsed.faults.push(Fault { code: "malformed", detail: detail.into(), raw });
    }
    parsed
}

static REFUSAL: LazyLock<Regex> =
    LazyLock::new(|| regex(r"(?i)\b(?:sorry|apologi[sz]e|cannot|can't|unable|not able|won't|decline|as an ai)\b"));
static NUMBERED: LazyLock<Regex> = LazyLock::new(|| {
    regex(
        r"(?im)^[\s*#>_-]*(?:\(?\d+[.):]\s*)?[*_]*(category|type|task|question|q|instruction|answer|a|evidence)[*_]*\s*:[*_]*[ \t]*",
    )
});

fn regex(pattern: &str) -> Regex {
    Regex::new(pattern).expect("the pattern is a constant that the tests compile")
}

/// Fields of what is meant as an item, in order, keys in lower case; a key may come twice.
#[derive(Debug, Clone, PartialEq)]
struct Record {
    fields: Vec<(String, Value)>,
    raw: String,
}

/// What looks like items.
#[derive(Debug, Default)]
struct Found {
    records: Vec<Record>,
    /// Pieces that begin like items and cannot be read.
    broken: Vec<String>,
}

/// Finds the items of a reply: as whole JSON, as pieces of JSON, as labelled lines.
fn records(text: &str) -> Found {
    let entities = unescape(text);
    let quotes = ['\u{201c}', '\u{201d}', '\u{201e}', '\u{ff02}'];
    let straight = text.replace(quotes, "\"");
    let candidates = [text, entities.as_str(), straight.as_str()];
    if let Some(records) = candidates.iter().find_map(|c| whole(c).or_else(|| whole(&mend(c)))) {
        return Found { records, broken: Vec::new() };
    }
    let mut best = Found::default();
    for found in candidates.iter().map(|c| pieces(c)) {
        if found.records.len() > best.records.len() || (best.records.is_empty() && best.broken.is_empty()) {
            best = found;
        }
    }
    let lines = labelled(text);
    if best.records.is_empty() && !lines.is_empty() {
        return Found { records: lines, broken: Vec::new() };
    }
    best
}

/// Items of a reply that is JSON from its first bracket to its last; none if it is not, or has no object.
fn whole(text: &str) -> Option<Vec<Record>> {
    let start = text.find(['{', '['])?;
    let end = text.rfind(['}', ']'])?;
    let node: Node = serde_json::from_str(text.get(start..=end)?).ok()?;
    let mut records = Vec::new();
    node.collect(&mut records);
    (!records.is_empty()).then_some(records)
}

/// Every `{...}` that looks like an item, by its braces, and what is left open at the end.
fn pieces(text: &str) -> Found {
    let mut found = Found::default();
    // Start of each open brace, and whether an item was found inside it.
    let mut open: Vec<(usize, bool)> = Vec::new();
    let (mut quoted, mut escaped) = (false, false);
    for (i, c) in text.char_indices() {
        match c {
            _ if escaped => escaped = false,
            '\\' if quoted => escaped = true,
            '"' if !open.is_empty() => quoted = !quoted,
            '{' if !quoted => open.push((i, false)),
            '}' if !quoted => {
                let Some((start, wrapper)) = open.pop() else { continue };
                let is_item = !wrapper && object(&text[start..=i], &mut found);
                if let Some((_, parent)) = open.last_mut() {
                    *parent |= is_item || wrapper;
                }
            }
            _ => {}
        }
    }
    if let Some((start, false)) = open.last() {
        found.broken.push(text[*start..].to_string());
    }
    found
}

fn looks_like_item(text: &str) -> bool {
    let lower = text.to_lowercase();
    ["question", "answer", "category", "instruction"].iter().any(|key| lower.contains(&format!("\"{key}\"")))
}

/// Takes an object that looks like an item, readable or not; false if it does not look like one.
fn object(raw: &str, found: &mut Found) -> bool {
    if !looks_like_item(raw) {
        return false;
    }
    match serde_json::from_str(raw).or_else(|_| serde_json::from_str(&mend(raw))) {
        Ok(Node::Object(fields)) => found.records.push(Record::new(fields)),
        _ => found.broken.push(raw.to_string()),
    }
    true
}

/// One repair attempt: trailing commas go, line feeds inside strings are escaped.
fn mend(raw: &str) -> String {
    let mut out = String::with_capacity(raw.len());
    let (mut quoted, mut escaped) = (false, false);
    for (i, c) in raw.char_indices() {
        match c {
            _ if escaped => escaped = false,
            '\\' if quoted => escaped = true,
            '"' => quoted = !quoted,
            '\n' if quoted => {
                out.push_str("\\n");
                continue;
            }
            '\t' if quoted => {
                out.push_str("\\t");
                continue;
            }
            ',' if !quoted && raw[i + 1..].trim_start().starts_with(['}', ']', ',']) => continue,
            _ => {}
        }
        out.push(c);
    }
    out
}

/// JSON in which a key may come twice.
#[derive(Debug, Clone, PartialEq)]
enum Node {
    Object(Vec<(String, Node)>),
    Array(Vec<Node>),
    Leaf(Value),
}

impl Node {
    /// Adds the items in here; whatever stands in a list beside items is one, if a broken one.
    fn collect(self, records: &mut Vec<Record>) {
        match self {
            Self::Object(fields) if fields.iter().any(|(k, _)| FIELDS.contains(&canonical(k))) => {
                records.push(Record::new(fields));
            }
            Self::Object(fields) => {
                let lists = fields.iter().any(|(_, v)| matches!(v, Self::Array(_) | Self::Object(_)));
                if lists {
                    fields.into_iter().for_each(|(_, node)| node.collect(records));
                } else if !fields.is_empty() {
                    records.push(Record::new(fields));
                }
            }
            Self::Array(nodes) => nodes.into_iter().for_each(|node| match node {
                Self::Leaf(value) => records.push(Record { fields: Vec::new(), raw: value.to_string() }),
                other => other.collect(records),
            }),
            Self::Leaf(_) => {}
        }
    }

    fn to_json(&self) -> String {
        let list = |all: Vec<String>| all.join(", ");
        match self {
            Self::Object(fields) => {
                let pair = |(k, v): &(String, Self)| format!("{}: {}", Value::from(k.as_str()), v.to_json());
                format!("{{{}}}", list(fields.iter().map(pair).collect()))
            }
            Self::Array(nodes) => format!("[{}]", list(nodes.iter().map(Self::to_json).collect())),
            Self::Leaf(value) => value.to_string(),
        }
    }
}

impl Record {
    fn new(fields: Vec<(String, Node)>) -> Self {
        let raw = Node::Object(fields.clone()).to_json();
        let value = |node: Node| match node {
            Node::Leaf(value) => value,
            other => Value::Array(vec![other.to_json().into()]),
        };
        Self { fields: fields.into_iter().map(|(k, v)| (k, value(v))).collect(), raw }
    }
}

impl<'de> Deserialize<'de> for Node {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Visitor;
        impl<'de> de::Visitor<'de> for Visitor {
            type Value = Node;

            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("JSON")
            }

            fn visit_map<M: de::MapAccess<'de>>(self, mut map: M) -> Result<Node, M::Error> {
                let mut fields = Vec::new();
                while let Some((key, value)) = map.next_entry::<String, Node>()? {
                    fields.push((key.trim().to_lowercase(), value));
                }
                Ok(Node::Object(fields))
            }

            fn visit_seq<S: de::SeqAccess<'de>>(self, mut seq: S) -> Result<Node, S::Error> {
                let mut nodes = Vec::new();
                while let Some(node) = seq.next_element()? {
                    nodes.push(node);
                }
                Ok(Node::Array(nodes))
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<Node, E> {
                Ok(Node::Leaf(text.into()))
            }

            fn visit_bool<E: de::Error>(self, value: bool) -> Result<Node, E> {
                Ok(Node::Leaf(value.into()))
            }

            fn visit_i64<E: de::Error>(self, value: i64) -> Result<Node, E> {
                Ok(Node::Leaf(value.into()))
            }

            fn visit_u64<E: de::Error>(self, value: u64) -> Result<Node, E> {
                Ok(Node::Leaf(value.into()))
            }

            fn visit_f64<E: de::Error>(self, value: f64) -> Result<Node, E> {
                Ok(Node::Leaf(value.into()))
            }

            fn visit_unit<E: de::Error>(self) -> Result<Node, E> {
                Ok(Node::Leaf(Value::Null))
            }
        }
        deserializer.deserialize_any(Visitor)
    }
}

/// Names by which an object is known to be meant as an item.
const FIELDS: &[&str] = &["question", "answer", "category"];

/// Items written as lines: "Question: ...", "Answer: ...", numbered or not. A new item begins with a field that the
/// current one has already.
fn labelled(text: &str) -> Vec<Record> {
    let marks: Vec<_> = NUMBERED.captures_iter(text).filter_map(|c| Some((c.get(0)?, c.get(1)?))).collect();
    let mut records: Vec<Record> = Vec::new();
    for (i, (whole, label)) in marks.iter().enumerate() {
        let end = marks.get(i + 1).map_or(text.len(), |(next, _)| next.start());
        let key = match label.as_str().to_lowercase().as_str() {
            "q" => "question".to_string(),
            "a" => "answer".to_string(),
            other => other.to_string(),
        };
        let value = Value::String(text[whole.end()..end].trim().trim_matches(['*', '_']).trim().to_string());
        let raw = &text[whole.start()..end];
        match records.last_mut().filter(|r| r.fields.iter().all(|(k, _)| canonical(k) != canonical(&key))) {
            Some(record) => {
                record.fields.push((key, value));
                record.raw.push_str(raw);
            }
            None => records.push(Record { fields: vec![(key, value)], raw: raw.to_string() }),
        }
    }
    records.retain(|r| r.fields.iter().any(|(k, _)| canonical(k) == "question"));
    records
}

/// The name of a field, whatever the model called it.
fn canonical(key: &str) -> &str {
    match key {
        "instruction" | "q" => "question",
        "a" | "response" => "answer",
        "task" | "type" => "category",
        other => other,
    }
}

/// Whether the reply is an empty list of items.
fn says_none(text: &str) -> bool {
    let compact: String = text.chars().filter(|c| !c.is_whitespace()).collect();
    compact.contains("\"items\":[]") || compact == "[]"
}

type Objection = (&'static str, String);

fn item(record: &Record, polarity: Polarity) -> Result<Item, Objection> {
    let question = required(record, "question")?;
    let answer = required(record, "answer")?;
    let named = required(record, "category")?;
    let evidence = field(record, "evidence")?.unwrap_or_default();
    let category = categories::find(&named, polarity)
        .ok_or_else(|| ("malformed", format!("{named:?} is no category of what was asked for")))?;
    if answer.ends_with('?') && !question.contains('?') {
        return Err(("swapped", "question and answer have changed places".into()));
    }
    let (q, a) = (words(&question), words(&answer));
    if a == q || (q.len() > 3 && a.starts_with(&q)) {
        return Err(("echo", "the answer repeats the question".into()));
    }
    if questions(&question) > 1 {
        return Err(("two_questions", format!("{} questions in one item", questions(&question))));
    }
    Ok(Item { category, question, answer, evidence })
}

fn required(record: &Record, name: &str) -> Result<String, Objection> {
    match field(record, name)? {
        Some(text) if !text.is_empty() => Ok(text),
        Some(_) => Err(("malformed", format!("`{name}` is empty"))),
        None => Err(("malformed", format!("`{name}` is missing"))),
    }
}

/// A text field, entities decoded, image marks and surrounding blanks removed; none where it is absent.
fn field(record: &Record, name: &str) -> Result<Option<String>, Objection> {
    let mut values = record.fields.iter().filter(|(k, _)| canonical(k) == name).map(|(_, v)| v);
    let Some(first) = values.next() else { return Ok(None) };
    if values.any(|other| other != first) {
        return Err(("malformed", format!("two different values of `{name}`")));
    }
    match first {
        Value::String(text) => Ok(Some(unescape(text).replace("<image>", " ").trim().to_string())),
        // Evidence may be left out in more than one way.
        Value::Null if name == "evidence" => Ok(None),
        Value::Null => Err(("malformed", format!("`{name}` is null"))),
        other => Err(("malformed", format!("`{name}` is not text: {other}"))),
    }
}

/// Number of questions: question marks at the end of a sentence.
fn questions(text: &str) -> usize {
    let mut count = 0;
    let mut rest = text;
    while let Some(i) = rest.find(['?', '\u{ff1f}']) {
        let after = rest[i..].trim_start_matches(['?', '!', '\u{ff1f}', '"', '\'', ')', '\u{201d}', '\u{2019}']);
        if after.is_empty() || after.starts_with(char::is_whitespace) {
            count += 1;
        }
        rest = after;
    }
    count
}

fn words(text: &str) -> Vec<String> {
    text.split(|c: char| !c.is_alphanumeric()).filter(|w| !w.is_empty()).map(str::to_lowercase).collect()
}

/// HTML entities as the characters they stand for; one pass, so that nothing is decoded twice.
fn unescape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(i) = rest.find('&') {
        out.push_str(&rest[..i]);
        rest = &rest[i..];
        let end = rest.bytes().take(10).position(|b| b == b';');
        match end.and_then(|end| Some((entity(&rest[1..end])?, end))) {
            Some((c, end)) => {
                out.push(c);
                rest = &rest[end + 1..];
            }
            None => {
                out.push('&');
                rest = &rest[1..];
            }
        }
    }
    out + rest
}

fn entity(name: &str) -> Option<char> {
    let code = |digits: &str, radix| u32::from_str_radix(digits, radix).ok().and_then(char::from_u32);
    match name {
        "quot" => Some('"'),
        "apos" => Some('\''),
        "amp" => Some('&'),
        "lt" => Some('<'),
        "gt" => Some('>'),
        "nbsp" => Some(' '),
        _ => match name.strip_prefix('#')? {
            hex if hex.starts_with(['x', 'X']) => code(&hex[1..], 16),
            digits => code(digits, 10),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn negative(text: &str) -> Parsed {
        parse(text, Some("stop"), None, Polarity::Hallucination)
    }

    fn good(n: usize) -> String {
        let one = |i: usize| {
            format!(
                r#"{{"category": "nonexistent_object", "question": "Is mass number {i} on the left?", "answer": "There is no mass {i}; the lungs are clear.", "evidence": "clear"}}"#
            )
        };
        (0..n).map(one).collect::<Vec<_>>().join(", ")
    }

    #[track_caller]
    fn gives(text: &str, items: usize, codes: &[&str]) {
        let parsed = negative(text);
        let found: Vec<&str> = parsed.faults.iter().map(|f| f.code).collect();
        assert_eq!((parsed.items.len(), found.as_slice()), (items, codes), "{text}\n{parsed:#?}");
    }

    #[test]
    fn the_form_of_a_reply_does_not_matter() {
        let all = good(3);
        for text in [
            format!(r#"{{"items": [{all}]}}"#),
            format!("```json\n{{\"items\": [{all}]}}\n```"),
            format!("Here are the items:\n\n{{\"items\": [{all}]}}\n\nI hope this helps {{really}}."),
            format!("[{all}]"),
            format!(r#"{{"items": [{all},],}}"#),
            format!(r#"{{"items": [{all}]"#),
            format!(r#"{{"items": [{}]}}"#, all.replace('"', "\u{201c}")),
            format!(r#"{{"items": [{all}]}}"#).replace('"', "&quot;"),
            all.replace("}, {", "}\n{"),
        ] {
            gives(&text, 3, &[]);
        }
    }

    #[test]
    fn numbered_lists_are_read() {
        let text = "1. **Category**: Non-existent object\n   **Question:** Is the pacemaker new?\n   \
                    **Answer:** No pacemaker is there.\n\n2. Category: knowledge\nQuestion: Does this heal?\n\
                    Answer: It does not heal.\nIt stays.";
        let parsed = negative(text);
        assert_eq!((parsed.items.len(), parsed.faults.len()), (2, 0), "{parsed:#?}");
        assert_eq!(parsed.items[0].answer, "No pacemaker is there.");
        assert_eq!(parsed.items[1].answer, "It does not heal.\nIt stays.");
    }

    #[test]
    fn a_cut_off_reply_keeps_its_complete_items() {
        let text = format!(r#"{{"items": [{}, {{"category": "nonex"#, good(2));
        let parsed = parse(&text, Some("length"), None, Polarity::Hallucination);
        assert_eq!((parsed.items.len(), parsed.faults.len()), (2, 1), "{parsed:#?}");
        assert!(parsed.faults[0].detail.contains("cut off"));
    }

    #[test]
    fn every_bad_item_has_its_code() {
        let item = |c: &str, q: &str, a: &str| {
            format!(r#"{{"items": [{{"category": {c}, "question": {q}, "answer": {a}}}]}}"#)
        };
        let n = r#""nonexistent_object""#;
        gives(&item(n, r#""Is it?""#, "null"), 0, &["malformed"]);
        gives(&item(n, r#""Is it?""#, "3"), 0, &["malformed"]);
        gives(&item(n, r#""Is it?""#, r#""  ""#), 0, &["malformed"]);
        gives(&item(r#""weather""#, r#""Is it?""#, r#""It is not.""#), 0, &["malformed"]);
        gives(&item(n, r#""There is no mass.""#, r#""Where is the mass?""#), 0, &["swapped"]);
        gives(&item(n, r#""Is the mass on the left?""#, r#""Is the mass on the left? No.""#), 0, &["echo"]);
        gives(&item(n, r#""Is it red? Where is it?""#, r#""It is not red.""#), 0, &["two_questions"]);
        gives(&item(n, r#""The mass is red, right?""#, r#""It is not red.""#), 1, &[]);
        gives(
            r#"[{"category": "nonexistent_object", "answer": "a", "answer": "b", "question": "c?"}]"#,
            0,
            &["malformed"],
        );
        gives(r#"[{"category": "nonexistent_object", "answer": "a", "answer": "a", "question": "c?"}]"#, 1, &[]);
        gives(r#"{"items": [{"category": "nonexistent_object"}, 7, {"note": "x"}]}"#, 0, &["malformed"; 3]);
        gives(r#"{"items": [{"category": "nonexistent_object" "question": "a?", "answer": "b"}]}"#, 0, &["malformed"]);
    }

    #[test]
    fn replies_without_items_say_why() {
        gives("", 0, &["empty_reply"]);
        gives("I\u{2019}m sorry, I can\u{2019}t provide medical advice.", 0, &["refused"]);
        gives("The image shows a chest.", 0, &["malformed"]);
        gives(r#"{"items": []}"#, 0, &["count"]);
        gives(r#"{"items": ["#, 0, &["malformed"]);
        let filtered = parse("", Some("content_filter"), None, Polarity::Hallucination);
        assert_eq!(filtered.faults[0].code, "content_filter");
        let refused = parse("", Some("stop"), Some("no"), Polarity::Hallucination);
        assert_eq!((refused.faults[0].code, refused.faults[0].detail.as_str()), ("refused", "no"));
    }

    #[test]
    fn entities_are_decoded_once_and_image_marks_removed() {
        let text = r#"[{"category": "nonexistent_object", "question": "<image>\nIs p &lt; 0.05 &amp;lt; &#x41;?", "answer": "It &quot;is&quot; not."}]"#;
        let parsed = negative(text);
        assert_eq!(parsed.items[0].question, "Is p < 0.05 &lt; A?");
        assert_eq!(parsed.items[0].answer, "It \"is\" not.");
    }
}
