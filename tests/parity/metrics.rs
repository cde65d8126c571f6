//! VQA metrics against LLaVA-Med's own evaluation script.

use medtune::metric::{closed_accuracy, open_recall, vqa_text::normalise};
use serde_json::Value;

use super::fixture::{Checks, root};

fn text<'a>(case: &'a Value, key: &str) -> &'a str {
    case[key].as_str().unwrap_or_else(|| panic!("{key} of {case}"))
}

/// Every case of `vqa_llavamed.jsonl`.
#[test]
fn vqa_cases() {
    let mut checks = Checks::new("metrics vqa cases");
    let file = std::fs::read_to_string(root("metrics").join("vqa_llavamed.jsonl")).unwrap();
    for line in file.lines().filter(|l| !l.trim().is_empty()) {
        let case: Value = serde_json::from_str(line).unwrap();
        let (id, answer, prediction) = (text(&case, "id"), text(&case, "answer"), text(&case, "prediction"));
        checks.equal(&format!("{id} reference"), normalise(answer).as_str(), text(&case, "norm_answer"));
        checks.equal(&format!("{id} answer"), normalise(prediction).as_str(), text(&case, "norm_prediction"));
        if text(&case, "type") == "CLOSED" {
            let found = closed_accuracy::agreement(prediction, answer);
            checks.equal(&format!("{id} hit"), Some(found.llava_med), case["hit"].as_f64());
            checks.equal(&format!("{id} strict"), Some(found.strict), case["strict_hit"].as_f64());
        } else {
            let found = open_recall::agreement(prediction, answer);
            let expected = case["recall"].as_f64().unwrap();
            assert!((found.llava_med - expected).abs() <= 1e-9, "{id}: found {}, expected {expected}", found.llava_med);
            checks.equal(&format!("{id} strict is at most the original"), found.strict <= found.llava_med, true);
        }
    }
    checks.finish();
}

/// The table that the original prints for a whole file.
#[test]
fn vqa_aggregate() {
    let mut checks = Checks::new("metrics vqa aggregate");
    let file = std::fs::read_to_string(root("metrics").join("vqa_llavamed_aggregate.json")).unwrap();
    let run: Value = serde_json::from_str(&file).unwrap();
    let (mut open, mut closed) = ((0.0, 0.0), (0.0, 0.0));
    for (item, prediction) in run["items"].as_array().unwrap().iter().zip(run["predictions"].as_array().unwrap()) {
        assert_eq!(item["id"], prediction["question_id"]);
        let turns = item.get("conversations").or(item.get("conversatons")).unwrap();
        let (reference, answer) = (text(&turns[1], "value"), text(prediction, "text"));
        let total = if text(item, "answer_type") == "OPEN" { &mut open } else { &mut closed };
        total.0 += if text(item, "answer_type") == "OPEN" {
            open_recall::agreement(answer, reference).llava_med
        } else {
            closed_accuracy::agreement(answer, reference).llava_med
        };
        total.1 += 1.0;
    }
    for (name, (sum, n)) in [("recall", open), ("yes/no accuracy", closed)] {
        let (found, expected) = (100.0 * sum / n, run["expected"][name].as_f64().unwrap());
        // The original prints six significant digits.
        checks.equal(name, (found - expected).abs() <= 5e-5 * expected.max(1.0), true);
    }
    checks.finish();
}
