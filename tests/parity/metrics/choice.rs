//! Multiple choice and closed questions by the rules of OmniMedVQA, PMC-VQA and MedEvalKit.

use medtune::metric::{
    choice::{self, medevalkit},
    similarity::{most_similar, ratio},
};

use super::{each_case, number, string, strings};

#[test]
fn difflib() {
    each_case("difflib_ratio", |checks, case| {
        let (a, b) = (string(case, "a"), string(case, "b"));
        checks.near(&format!("{a:?} {b:?}"), ratio(a, b), number(case, "ratio"), 1e-9);
    });
}

#[test]
fn omnimedvqa() {
    each_case("mcq_omnimedvqa", |checks, case| {
        let (id, reply, options) = (string(case, "id"), string(case, "model_pred"), strings(case, "options"));
        for (option, expected) in options.iter().zip(case["ratios"].as_array().unwrap()) {
            checks.near(&format!("{id} {option}"), ratio(option, reply), expected.as_f64().unwrap(), 1e-9);
        }
        checks.equal(&format!("{id} index"), most_similar(&options, reply).map(|i| i as u64), case["index"].as_u64());
        let right = options.iter().position(|o| o == string(case, "gt_answer")).unwrap_or(options.len());
        let found = (choice::OMNIMEDVQA.judge)(reply, &options, right);
        checks.equal(&format!("{id} correct"), found.correct, case["is_correct"].as_str() == Some("yes"));
    });
}

#[test]
fn pmc_vqa() {
    each_case("mcq_pmcvqa", |checks, case| {
        let (id, cells, label) = (string(case, "id"), strings(case, "choices"), string(case, "label"));
        let found = choice::pmc_vqa(string(case, "generated"), &cells, label);
        checks.equal(&format!("{id} chosen"), found.chosen.map(|i| i as u64), case["pred_index"].as_u64());
        let (chosen, right) = (case["pred_index"].as_u64(), case["label_index"].as_u64());
        checks.equal(&format!("{id} correct"), found.correct, chosen.is_some() && chosen == right);
    });
}

#[test]
fn medevalkit_choices() {
    each_case("mcq_medevalkit", |checks, case| {
        let found =
            medevalkit::multiple_choice(string(case, "response"), &strings(case, "choices"), string(case, "answer"));
        checks.equal(string(case, "id"), Some(found.correct), case["correct"].as_bool());
    });
}

#[test]
fn medevalkit_closed() {
    each_case("closed_medevalkit", |checks, case| {
        let (reply, answer) = (string(case, "response"), string(case, "answer"));
        let found = match string(case, "rule") {
            "judgement" => medevalkit::yes_or_no(reply, answer),
            "close_end" => medevalkit::closed_text(reply, answer),
            other => panic!("unknown rule {other}"),
        };
        checks.equal(&format!("{reply:?} for {answer:?}"), Some(found), case["correct"].as_bool());
    });
}
