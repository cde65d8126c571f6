//! Preference pairs: an answer that quality control accepted, beside one to the same question about the same image that
//! it rejected for what it says.

use std::{
    collections::HashMap,
    path::{Path, PathBuf},
};

use serde::Deserialize;
use serde_json::{Value, json};

use crate::{
    error::Result,
    parallel::{CHUNK, ordered},
    qc::{
        hash::hash,
        words::{Codes, codes, normal},
    },
    run_dir::Lines,
    sample::{ImageRef, Role, Sample, Split, Turn},
    stage::encode::RejectedRow,
};

/// Reasons that are about what an answer says. Duplicates, lengths and images say nothing about its worth.
pub const WRONG: [&str; 8] = [
    "truth_mismatch",
    "premise_true",
    "positive_refutes",
    "qc_contradicted",
    "qc_partial",
    "no_access",
    "leak_text",
    "answer_only",
];

/// A rejected answer.
#[derive(Debug, Clone, PartialEq)]
pub struct Rejected {
    /// Id of its row.
    pub id: String,
    /// The answer.
    pub answer: String,
    /// Why it was rejected.
    pub code: String,
    question: Codes,
    claim: Option<Value>,
}

/// How many pairs there are.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Found {
    /// Pairs.
    pub pairs: usize,
    /// Rejected answers whose question has no accepted one.
    pub unmatched: usize,
}

/// Hands every pair of a run to `each`: the row with the accepted answer, and a rejected answer to the same question,
/// in the order of `kept.jsonl`. Rows of the test split are left alone.
///
/// # Errors
/// A file cannot be read, or `each` fails.
pub fn pairs(run: &Path, mut each: impl FnMut(&Sample, Rejected) -> Result<()>) -> Result<Found> {
    let mut open = rejected(&run.join("rejected.jsonl"))?;
    let all: usize = open.values().map(Vec::len).sum();
    let path = run.join("kept.jsonl");
    let mut found = Found::default();
    for row in ordered(Lines::open(&path)?, CHUNK, |line| line?.parse::<Sample>(&path)) {
        let row = row?;
        if row.split == Split::Test || row.turns.len() != 2 {
            continue;
        }
        let Some(candidates) = open.get_mut(&hash(row.group.as_bytes())) else { continue };
        let question = codes(&normal(&row.question()));
        let same = |r: &Rejected| {
            let claims = r.claim.is_some() && r.claim.as_ref() == row.meta.get("claim");
            (claims || r.question.is_near(&question)) && normal(&r.answer) != normal(row.answer())
        };
        while let Some(at) = candidates.iter().position(same) {
            each(&row, candidates.remove(at))?;
            found.pairs += 1;
        }
    }
    found.unmatched = all - found.pairs;
    Ok(found)
}

/// Rejected answers by the hash of their group.
fn rejected(path: &Path) -> Result<HashMap<u64, Vec<Rejected>>> {
    let mut out: HashMap<u64, Vec<Rejected>> = HashMap::new();
    if !path.exists() {
        return Ok(out);
    }
    for row in ordered(Lines::open(path)?, CHUNK, |line| line?.parse::<RejectedRow>(path)) {
        let RejectedRow { sample, code, .. } = row?;
        if !WRONG.contains(&code.as_str()) || sample.split == Split::Test || sample.turns.len() != 2 {
            continue;
        }
        out.entry(hash(sample.group.as_bytes())).or_default().push(Rejected {
            question: codes(&normal(&sample.question())),
            claim: sample.meta.get("claim").cloned(),
            answer: sample.answer().to_string(),
            id: sample.id,
            code,
        });
    }
    Ok(out)
}

/// A pair as preference trainers read it: prompt, chosen and rejected as messages.
#[must_use]
pub fn record(chosen: &Sample, rejected: &Rejected, image: impl Fn(&Path) -> String) -> Value {
    let prompt = chosen.turns.iter().filter(|t| t.role != Role::Assistant);
    json!({
        "id": format!("{}/{}", chosen.id, rejected.id),
        "images": chosen.images.iter().map(|i| image(&i.path)).collect::<Vec<_>>(),
        "prompt": prompt.map(|t| json!({ "role": t.role, "content": t.text })).collect::<Vec<_>>(),
        "chosen": [{ "role": "assistant", "content": chosen.answer() }],
        "rejected": [{ "role": "assistant", "content": rejected.answer }],
        "reason": rejected.code,
        "split": chosen.split,
        "polarity": chosen.polarity,
        "category": chosen.category,
    })
}

/// The chosen and the rejected answer as two samples with the same conversation before them.
#[must_use]
pub fn samples(chosen: &Sample, rejected: &Rejected) -> [Sample; 2] {
    let mut other = Sample { id: rejected.id.clone(), ..chosen.clone() };
    if let Some(last) = other.turns.last_mut() {
        last.text.clone_from(&rejected.answer);
    }
    [chosen.clone(), other]
}

/// A line of a file of preference pairs, as [`record`] makes it.
#[derive(Debug, Deserialize)]
struct Pair {
    #[serde(default)]
    id: Option<String>,
    #[serde(default)]
    images: Vec<PathBuf>,
    prompt: Vec<Message>,
    chosen: Vec<Message>,
    rejected: Vec<Message>,
    #[serde(default)]
    split: Split,
}

#[derive(Debug, Deserialize)]
struct Message {
    role: Role,
    content: String,
}

/// Pairs of a JSONL file of [`record`]s: chosen and rejected answer as two samples. Images are found beside the file.
///
/// # Errors
/// The file cannot be read, or a line is no pair.
pub fn read(path: &Path) -> Result<Vec<[Sample; 2]>> {
    let dir = path.parent().unwrap_or(Path::new("")).to_path_buf();
    let lines = ordered(Lines::open(path)?, CHUNK, |line| {
        let line = line?;
        let pair: Pair = line.parse(path)?;
        let id = pair.id.clone().unwrap_or_else(|| line.number.to_string());
        let images: Vec<ImageRef> = pair.images.iter().map(|i| ImageRef { path: dir.join(i) }).collect();
        let sample = |kind: &str, answer: &[Message]| Sample {
            id: format!("{id}/{kind}"),
            images: images.clone(),
            turns: pair.prompt.iter().chain(answer).map(|m| Turn { role: m.role, text: m.content.clone() }).collect(),
            split: pair.split,
            ..Sample::default()
        };
        Ok([sample("chosen", &pair.chosen), sample("rejected", &pair.rejected)])
    });
    lines.collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{qc::tests::row, run_dir::RunDir};

    #[test]
    fn wrong_answers_meet_right_ones_to_the_same_question() {
        let root = tempfile::tempdir().unwrap();
        let dir = RunDir::open(root.path().join("run")).unwrap();
        let named =
            |id: &str, group: &str, q: &str, a: &str| Sample { id: id.into(), group: group.into(), ..row(q, a) };
        let bad = |sample: Sample, code: &str| RejectedRow { sample, code: code.into(), detail: String::new() };
        let question = "Is there a pacemaker over the left chest?";
        let right = "No pacemaker is visible there.";
        dir.write_jsonl("kept.jsonl", [named("a", "1", question, right), named("b", "2", question, right)]).unwrap();
        let mut test = named("t", "1", question, "Yes, there is a pacemaker.");
        test.split = Split::Test;
        let rows = [
            bad(
                named("c", "1", "Is there any pacemaker over the left chest?", "Yes, there is a pacemaker."),
                "truth_mismatch",
            ),
            bad(named("d", "1", "Where is the heart?", "On the right."), "truth_mismatch"),
            bad(named("e", "2", question, "No pacemaker is visible there!"), "duplicate"),
            bad(named("f", "3", question, "Yes."), "answer_only"),
            bad(test, "premise_true"),
        ];
        dir.write_jsonl("rejected.jsonl", rows).unwrap();
        let mut got = Vec::new();
        let found = pairs(dir.root(), |chosen, rejected| {
            got.push(record(chosen, &rejected, |_| String::new()));
            Ok(())
        });
        assert_eq!(found.unwrap(), Found { pairs: 1, unmatched: 2 });
        assert_eq!(got[0]["id"], "a/c");
        assert_eq!((&got[0]["chosen"][0]["content"], &got[0]["reason"]), (&json!(right), &json!("truth_mismatch")));
        assert_eq!(got[0]["prompt"], json!([{ "role": "user", "content": question }]));
        dir.write_jsonl("pairs.jsonl", &got).unwrap();
        let [chosen, rejected] = read(&dir.path("pairs.jsonl")).unwrap().remove(0);
        assert_eq!((chosen.answer(), rejected.answer()), (right, "Yes, there is a pacemaker."));
        assert_eq!((chosen.question(), rejected.question()), (question.to_string(), question.to_string()));
        assert_ne!(chosen.id, rejected.id);
    }
}
