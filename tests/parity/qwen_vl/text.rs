//! Tokens, decoding, prompts, label masks, boxes: exact, for the fixture's vocabulary and the released one.

use medtune::{
    sample::{Role, Turn},
    text::{
        chatml, grounding,
        qwen::{CHAT_SPECIALS, DecodeOptions, Element, QwenTokenizer, picture},
        tiktoken::{AllowedSpecial, InvalidUtf8},
    },
    vlm::IGNORE,
};
use serde_json::Value;

use crate::parity::fixture::{Checks, json, root};

pub(super) fn check(checks: &mut Checks) {
    let released = root("tokenizers").join("qwen");
    let t = QwenTokenizer::from_file(&released.join("qwen.tiktoken")).unwrap();
    encode(checks, &t, &json(&released.join("encode_cases.json")));
    decode(checks, &t, &json(&released.join("decode_cases.json")));
    chat(checks, &t, &json(&released.join("chat_cases.json")));

    let family = root("qwen_vl");
    let t = QwenTokenizer::from_file(&family.join("checkpoint/qwen.tiktoken")).unwrap();
    let cases = json(&family.join("golden/prompts.json"));
    chat(checks, &t, &cases);
    specials(checks, &t, &cases["special_ids"]);
    list(&cases["tokenize"]).iter().for_each(|case| encode_case(checks, &t, case));
}

/// A list of cases, which must not be empty.
pub(super) fn list(value: &Value) -> &[Value] {
    let list = value.as_array().expect("a list");
    assert!(!list.is_empty(), "an empty list of cases");
    list
}

pub(super) fn text(value: &Value) -> &str {
    value.as_str().unwrap_or_else(|| panic!("not a string: {value}"))
}

pub(super) fn ints(value: &Value) -> Vec<i32> {
    value
        .as_array()
        .unwrap_or_else(|| panic!("not a list: {value}"))
        .iter()
        .map(|v| v.as_i64().unwrap() as i32)
        .collect()
}

fn failed<T: std::fmt::Debug>(checks: &mut Checks, what: &str, result: medtune::Result<T>) {
    checks.equal(&format!("{what} fails"), result.is_err(), true);
}

fn encode(checks: &mut Checks, t: &QwenTokenizer, cases: &Value) {
    let meta = &cases["meta"];
    checks.equal("ranks", t.eod as u64, meta["n_mergeable"].as_u64().unwrap());
    checks.equal("vocabulary", t.vocab_size() as u64, meta["n_vocab"].as_u64().unwrap());
    specials(checks, t, &meta["special_tokens"]);
    for case in list(&cases["encode"]) {
        encode_case(checks, t, case);
    }
}

fn specials(checks: &mut Checks, t: &QwenTokenizer, ids: &Value) {
    for (name, id) in ids.as_object().expect("a map of special tokens") {
        checks.equal(name, t.special(name).map(i64::from), id.as_i64());
    }
}

fn encode_case(checks: &mut Checks, t: &QwenTokenizer, case: &Value) {
    let allowed = match text(&case["allowed_special"]) {
        "all" => AllowedSpecial::All,
        "none" => AllowedSpecial::None,
        "image_st" => CHAT_SPECIALS,
        other => panic!("unknown policy {other}"),
    };
    let (source, what) = (text(&case["text"]), format!("encode {} {}", case["text"], case["allowed_special"]));
    let found = t.encode(source, allowed);
    if case["error"].is_string() {
        return failed(checks, &what, found);
    }
    checks.equal(&what, found.unwrap(), ints(&case["ids"]));
}

fn decode(checks: &mut Checks, t: &QwenTokenizer, cases: &Value) {
    for case in list(&cases["decode"]) {
        let kwargs = &case["kwargs"];
        let options = DecodeOptions {
            skip_special_tokens: kwargs["skip_special_tokens"] == true,
            keep_grounding: kwargs["keep_image_special"] == true,
            invalid: match kwargs["errors"].as_str() {
                None | Some("replace") => InvalidUtf8::Replace,
                Some("ignore") => InvalidUtf8::Ignore,
                Some("strict") => InvalidUtf8::Strict,
                Some(other) => panic!("unknown policy {other}"),
            },
        };
        let (what, found) = (format!("decode {} {kwargs}", case["id"]), t.decode(&ints(&case["ids"]), options));
        if case["error"].is_string() {
            failed(checks, &what, found);
        } else {
            checks.equal(&what, found.unwrap(), text(&case["text"]).to_string());
        }
    }
    list(&cases["list_format"]).iter().for_each(|case| list_format(checks, t, case));
    list(&cases["from_list_format"]).iter().for_each(|case| from_list_format(checks, t, case));
}

fn list_format(checks: &mut Checks, t: &QwenTokenizer, case: &Value) {
    let source = text(&case["text"]);
    let (elements, boxes) = (t.elements(source), grounding::boxes(t, source));
    if case["to_list_error"].is_string() {
        failed(checks, source, elements);
    } else {
        let found: Vec<Value> = elements.unwrap().into_iter().map(element_json).collect();
        checks.equal(source, &found, case["to_list_format"].as_array().unwrap());
    }
    if case["boxes_error"].is_string() {
        return failed(checks, source, boxes);
    }
    let found: Vec<Value> = boxes
        .unwrap()
        .into_iter()
        .map(|b| match b.phrase {
            Some(phrase) => serde_json::json!({"box": b.corners, "ref": phrase}),
            None => serde_json::json!({"box": b.corners}),
        })
        .collect();
    checks.equal(source, &found, case["boxes"].as_array().unwrap());
}

fn element_json(element: Element) -> Value {
    let (key, value) = match element {
        Element::Text(v) => ("text", v),
        Element::Image(v) => ("image", v),
        Element::Ref(v) => ("ref", v),
        Element::Box(v) => ("box", v),
        Element::Quad(v) => ("quad", v),
    };
    serde_json::json!({ key: value })
}

fn from_list_format(checks: &mut Checks, t: &QwenTokenizer, case: &Value) {
    let (mut pictures, mut written) = (0, Some(String::new()));
    for element in list(&case["elements"]) {
        let part = if let Some(path) = element["image"].as_str() {
            pictures += 1;
            Some(picture(pictures, path))
        } else if let Some(plain) = element["text"].as_str() {
            Some(plain.to_string())
        } else {
            element["box"].as_array().map(|boxes| boxes_text(element["ref"].as_str(), boxes))
        };
        written = written.zip(part).map(|(all, part)| all + &part);
    }
    checks.equal("representable", written.is_some(), !case["error"].is_string());
    let Some(written) = written else { return };
    checks.equal("from_list_format", written.as_str(), text(&case["text"]));
    checks.equal("from_list_format ids", t.encode(&written, AllowedSpecial::All).unwrap(), ints(&case["ids"]));
}

/// The phrase goes to the first box.
fn boxes_text(phrase: Option<&str>, boxes: &[Value]) -> String {
    let tagged = |(i, corners): (usize, &Value)| {
        let phrase = phrase.filter(|_| i == 0).map(String::from);
        grounding::GroundedBox { corners: ints(corners).try_into().unwrap(), phrase }.tagged().unwrap()
    };
    boxes.iter().enumerate().map(tagged).collect()
}

fn chat(checks: &mut Checks, t: &QwenTokenizer, cases: &Value) {
    list(&cases["make_context"]).iter().for_each(|case| make_context(checks, t, case));
    list(&cases["finetune_preprocess"]).iter().for_each(|case| preprocess(checks, t, case));
}

fn make_context(checks: &mut Checks, t: &QwenTokenizer, case: &Value) {
    let query = text(&case["query"]);
    let (raw_text, ids) = if case["chat_format"] == "raw" {
        (query.to_string(), t.encode(query, AllowedSpecial::All).unwrap())
    } else {
        let history: Vec<(String, Option<String>)> = case["history"]
            .as_array()
            .unwrap()
            .iter()
            .map(|turn| (text(&turn[0]).into(), turn[1].as_str().map(String::from)))
            .collect();
        let window = case["max_window_size"].as_u64().unwrap() as usize;
        let prompt = chatml::prompt(t, text(&case["system"]), &history, query, window).unwrap();
        (prompt.text, prompt.ids)
    };
    let name = text(&case["name"]);
    checks.equal(name, raw_text.as_str(), text(&case["raw_text"]));
    checks.equal(name, ids, ints(&case["ids"]));
}

pub(super) fn turns(conversation: &Value) -> Vec<Turn> {
    let turn = |t: &Value| {
        let role = if t["from"] == "assistant" { Role::Assistant } else { Role::User };
        Turn { role, text: text(&t["value"]).into() }
    };
    list(conversation).iter().map(turn).collect()
}

/// The original pads to `max_len`, cuts there, and masks whatever equals the pad id.
fn preprocess(checks: &mut Checks, t: &QwenTokenizer, case: &Value) {
    let name = text(&case["name"]);
    let length = case["max_len"].as_u64().unwrap() as usize;
    let mut row = chatml::conversation(t, &turns(&case["conversations"]), AllowedSpecial::All).unwrap();
    row.ids.resize(length, t.eod);
    row.labels.resize(length, IGNORE);
    let mask: Vec<i32> = row.ids.iter().map(|id| i32::from(*id != t.eod)).collect();
    checks.equal(&format!("{name} ids"), row.ids, ints(&case["input_ids"]));
    checks.equal(&format!("{name} labels"), row.labels, ints(&case["labels"]));
    checks.equal(&format!("{name} mask"), mask, ints(&case["attention_mask"]));
}
