//! VQA metrics against LLaVA-Med's own evaluation script.

use std::collections::BTreeSet;

use medtune::metric::{
    closed_accuracy, open_recall,
    open_table::{Known, LINES, values},
    vqa_text::normalise,
};

use super::{each_case, each_file, number, string};

/// Each answer by itself.
#[test]
fn cases() {
    each_case("vqa_llavamed", |checks, case| {
        let (id, answer, prediction) = (string(case, "id"), string(case, "answer"), string(case, "prediction"));
        checks.equal(&format!("{id} reference"), normalise(answer).as_str(), string(case, "norm_answer"));
        checks.equal(&format!("{id} answer"), normalise(prediction).as_str(), string(case, "norm_prediction"));
        if string(case, "type") == "CLOSED" {
            let found = closed_accuracy::agreement(prediction, answer);
            checks.equal(&format!("{id} hit"), found.llava_med, number(case, "hit"));
            checks.equal(&format!("{id} strict"), found.strict, number(case, "strict_hit"));
        } else {
            let found = open_recall::scores(prediction, answer);
            for (what, value) in
                [("recall", found.recall), ("precision", found.precision), ("f1", found.f1), ("exact", found.exact)]
            {
                checks.near(&format!("{id} {what}"), value, number(case, what), 1e-9);
            }
            checks.equal(&format!("{id} strict is at most the original"), found.strict_recall <= found.recall, true);
        }
    });
}

/// The table that the original prints for a whole file.
#[test]
fn aggregate() {
    each_file("vqa_llavamed_aggregate", |checks, run| {
        let candidates = run["candidate"].as_array().unwrap().iter().map(|c| c.as_str().unwrap());
        let known = Known::new(candidates);
        let mut table = [0.0; LINES.len()];
        let mut sums = [0.0; 5];
        let (mut open, mut closed) = (0.0, 0.0);
        for (item, prediction) in run["items"].as_array().unwrap().iter().zip(run["predictions"].as_array().unwrap()) {
            assert_eq!(item["id"], prediction["question_id"]);
            let turns = item.get("conversations").or(item.get("conversatons")).unwrap();
            let (reference, answer) = (string(&turns[1], "value"), string(prediction, "text"));
            if string(item, "answer_type") == "OPEN" {
                let found = open_recall::scores(answer, reference);
                for (sum, value) in sums.iter_mut().zip([found.exact, found.f1, found.precision, found.recall]) {
                    *sum += value;
                }
                for (sum, value) in table.iter_mut().zip(values(answer, reference, &known)) {
                    *sum += value;
                }
                open += 1.0;
            } else {
                sums[4] += closed_accuracy::agreement(answer, reference).llava_med;
                closed += 1.0;
            }
        }
        let names = ["exact match score", "f1 score", "precision", "recall", "yes/no accuracy"];
        for ((name, sum), n) in names.into_iter().zip(sums).zip([open, open, open, open, closed]) {
            let expected = number(&run["expected"], name);
            // The original prints six significant digits.
            checks.near(name, 100.0 * sum / n, expected, 5e-5 * expected.max(1.0));
        }
        let lines = [
            "exact match score",
            "f1 score",
            "precision",
            "bleu_score",
            "bleu_score_1",
            "bleu_score_2",
            "bleu_score_3",
            "open accuracy",
        ];
        for (name, sum) in lines.into_iter().zip(table) {
            let expected = number(&run["expected"], name);
            checks.near(name, 100.0 * sum / open, expected, 5e-5 * expected.max(1.0));
        }
        let told: BTreeSet<&str> = names.into_iter().chain(lines).collect();
        let printed: BTreeSet<&str> = run["expected"].as_object().unwrap().keys().map(String::as_str).collect();
        checks.equal("lines of the table", told, printed);
    });
}
