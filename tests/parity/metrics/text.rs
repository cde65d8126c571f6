//! METEOR, ROUGE, BLEU, stems and synonyms.

use std::collections::BTreeSet;

use medtune::metric::{
    bleu::sentence_bleu,
    meteor::Meteor,
    porter::stem,
    rouge::{self, Overlap},
    wordnet::WordNet,
};
use serde_json::Value;

use super::{each_case, number, string, strings};

const TOLERANCE: f64 = 1e-9;

#[test]
fn porter() {
    each_case("porter", |checks, case| {
        let word = string(case, "word");
        checks.equal(word, stem(word).as_str(), string(case, "stem"));
    });
}

#[test]
fn wordnet() {
    let table = WordNet::embedded().unwrap();
    each_case("wordnet_synonyms", |checks, case| {
        let word = string(case, "word");
        let mut found = BTreeSet::from([word.to_lowercase()]);
        table.synonyms(word, |s| {
            found.insert(s.to_string());
        });
        let expected: BTreeSet<String> = strings(case, "usable_synonyms").into_iter().collect();
        checks.equal(&format!("synonyms of {word}"), found, expected);
        for (part, _) in case["morphy"].as_object().unwrap() {
            let found: BTreeSet<String> =
                table.morphy(&word.to_lowercase(), part.chars().next().unwrap()).into_iter().collect();
            let expected: BTreeSet<String> = strings(&case["morphy"], part).into_iter().collect();
            checks.equal(&format!("{part} forms of {word}"), found, expected);
        }
    });
}

#[test]
fn meteor() {
    let meteor = Meteor::new().unwrap();
    each_case("meteor", |checks, case| {
        let id = string(case, "id");
        let found = meteor.align(string(case, "hypothesis"), string(case, "reference"));
        for (what, value) in [
            ("n_hyp", found.answer_words),
            ("n_ref", found.reference_words),
            ("exact", found.exact),
            ("stem", found.stem),
            ("syn", found.synonym),
            ("matches", found.pairs.len()),
            ("chunks", found.chunks),
        ] {
            checks.equal(&format!("{id} {what}"), Some(value as u64), case[what].as_u64());
        }
        if let Some(expected) = case["alignment"].as_array() {
            let found: Vec<Value> = found.pairs.iter().map(|(h, r)| serde_json::json!([h, r])).collect();
            checks.equal(&format!("{id} alignment"), &found, expected);
        }
        checks.near(&format!("{id} meteor"), found.score(), number(case, "meteor"), TOLERANCE);
    });
}

#[test]
fn rouge() {
    each_case("rouge", |checks, case| {
        let id = string(case, "id");
        let (answer, reference) = (rouge::tokens(string(case, "hypothesis")), rouge::tokens(string(case, "reference")));
        for (key, found) in [("hyp_tokens", &answer), ("ref_tokens", &reference)] {
            if case.get(key).is_some_and(|v| !v.is_null()) {
                checks.equal(&format!("{id} {key}"), found, &strings(case, key));
            }
        }
        for (key, Overlap { precision, recall, f }) in [
            ("rouge1", rouge::ngrams(&answer, &reference, 1)),
            ("rouge2", rouge::ngrams(&answer, &reference, 2)),
            ("rougeL", rouge::longest(&answer, &reference)),
        ] {
            for (part, found) in [("p", precision), ("r", recall), ("f", f)] {
                checks.near(&format!("{id} {key} {part}"), found, number(&case[key], part), TOLERANCE);
            }
        }
    });
}

#[test]
fn bleu() {
    each_case("bleu", |checks, case| {
        let (answer, reference) = (string(case, "hypothesis"), string(case, "reference"));
        for orders in 1..=4 {
            let found = sentence_bleu(answer, reference, orders);
            let what = format!("{} bleu{orders}", string(case, "id"));
            checks.near(&what, found, number(case, &format!("bleu{orders}")), TOLERANCE);
        }
    });
}
