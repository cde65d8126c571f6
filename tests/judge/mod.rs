//! Judging and reading what language models say, against fixtures: the robust parser, the layout of the messages, and
//! the replies that go wrong.

mod replies;

use medtune::judge::{
    messages::{Case, Order, messages},
    parse,
};
use serde_json::Value;

use crate::parity::fixture::{Checks, root};

fn rows(name: &str) -> Vec<Value> {
    let path = root("metrics").join(name);
    let text = std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    text.lines().filter(|l| !l.trim().is_empty()).map(|l| serde_json::from_str(l).unwrap()).collect()
}

/// Every reply of `judge_parse.jsonl`: scores, or the reason why there are none.
#[test]
fn judge_parse() {
    let mut checks = Checks::new("judge parse");
    for row in rows("judge_parse.jsonl") {
        let (id, expected) = (row["id"].as_str().unwrap(), &row["robust"]);
        match parse::scores(row["reply"].as_str().unwrap()) {
            Ok(scores) => {
                let wanted: Vec<f64> = serde_json::from_value(expected["scores"].clone())
                    .unwrap_or_else(|_| panic!("{id}: found {scores:?}, expected {expected}"));
                checks.equal(id, scores.values().to_vec(), wanted);
            }
            Err(why) => checks.equal(id, Some(why.name()), expected["error"].as_str()),
        }
        checks.equal(&format!("{id} ok"), expected["ok"].is_boolean(), true);
    }
    checks.finish();
}

/// Every sample of `judge_messages.jsonl`: the messages with the user's own instruction, or the field that is missing.
#[test]
fn judge_messages() {
    let mut checks = Checks::new("judge messages");
    for row in rows("judge_messages.jsonl") {
        let id = row["id"].as_str().unwrap();
        match Case::from_row(row["sample"].as_object().unwrap()) {
            Ok(case) => {
                let found = messages(row["instruction_placeholder"].as_str().unwrap(), &case, Order::AnswerFirst);
                let wanted = row["messages"].as_array().unwrap_or_else(|| panic!("{id}: expected {}", row["error"]));
                checks.equal(&format!("{id} messages"), found.len(), wanted.len());
                for (i, (found, wanted)) in found.iter().zip(wanted).enumerate() {
                    let found = serde_json::to_value(found).unwrap();
                    checks.equal(&format!("{id} role {i}"), &found["role"], &wanted["role"]);
                    checks.equal(&format!("{id} text {i}"), &found["parts"][0]["text"], &wanted["content"]);
                    checks.equal(&format!("{id} parts {i}"), found["parts"].as_array().map(Vec::len), Some(1));
                }
            }
            Err(error) => {
                let wanted = row["error"].as_str().unwrap_or_else(|| panic!("{id}: {error}"));
                let field = wanted.split('\'').nth(1).unwrap();
                checks.equal(&format!("{id} missing {field}"), error.to_string().contains(field), true);
            }
        }
    }
    checks.finish();
}
