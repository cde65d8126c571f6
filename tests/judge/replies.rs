//! Replies that go wrong, from `replies.jsonl`: what construction makes of them, and what quality control reads.

use medtune::{recipes::medhalltune::parse::parse, sample::Polarity, stage::verify::parse::finding};
use serde_json::Value;

use crate::parity::fixture::Checks;

fn rows(kind: &str) -> Vec<Value> {
    let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/judge/replies.jsonl");
    let text = std::fs::read_to_string(path).unwrap();
    let all = text.lines().filter(|l| !l.trim().is_empty()).map(|l| serde_json::from_str::<Value>(l).unwrap());
    all.filter(|row| row["kind"] == kind).collect()
}

/// Every malformed reply to a construction request: how many items it gives, and the reason of everything else.
#[test]
fn malformed_replies() {
    let mut checks = Checks::new("judge malformed replies");
    for row in rows("construct") {
        let (id, reply) = (row["id"].as_str().unwrap(), row["reply"].as_str().unwrap());
        let finish = row["finish_reason"].as_str().unwrap_or("stop");
        let polarity = serde_json::from_value(row["polarity"].clone()).unwrap_or(Polarity::Hallucination);
        let parsed = parse(reply, Some(finish), row["refusal"].as_str(), polarity);
        let codes: Vec<&str> = parsed.faults.iter().map(|f| f.code).collect();
        checks.equal(&format!("{id} items"), parsed.items.len(), row["items"].as_u64().unwrap() as usize);
        checks.equal(&format!("{id} codes"), serde_json::json!(codes), row["codes"].clone());
        for (item, category) in parsed.items.iter().zip(row["categories"].as_array().into_iter().flatten()) {
            checks.equal(&format!("{id} category"), item.category, category.as_str().unwrap());
        }
        for (item, answer) in parsed.items.iter().zip(row["answers"].as_array().into_iter().flatten()) {
            checks.equal(&format!("{id} answer"), item.answer.as_str(), answer.as_str().unwrap());
        }
    }
    checks.finish();
}

/// Every quality-control reply: its judgement, or that it has none.
#[test]
fn qc_replies() {
    let mut checks = Checks::new("judge quality-control replies");
    for row in rows("qc") {
        let found = finding(row["reply"].as_str().unwrap());
        let found = found.map_or(Value::Null, |f| serde_json::to_value(f.judgement).unwrap());
        checks.equal(row["id"].as_str().unwrap(), found, row["judgement"].clone());
    }
    checks.finish();
}
