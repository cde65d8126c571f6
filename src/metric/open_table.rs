//! The rest of the table that LLaVA-Med's evaluation (`llava/eval/run_eval.py`) prints for open questions beside its
//! recall: exact match, F1, precision, BLEU without smoothing, and accuracy against a list of known answers. Published
//! tables leave them out; here they are for comparing runs of the original script with ours.

use std::collections::BTreeSet;

use super::{bleu::unsmoothed_bleu, open_recall::scores, text::words, vqa_text::normalise};

/// A line of the table.
#[derive(Debug)]
pub struct OpenLine {
    /// Stable key in result files.
    pub key: &'static str,
    /// Name in tables.
    pub name: &'static str,
    /// Exact definition.
    pub signature: &'static str,
}

/// Lines in the order of the original, recall and the closed accuracy left out.
pub const LINES: [OpenLine; 8] = [
    OpenLine {
        key: "open_exact_llava_med",
        name: "Open exact match, LLaVA-Med rule",
        signature: "open_exact_llava_med|v1|rule=LLaVA-Med b9a98a7 run_eval, distinct reference words found per answer word",
    },
    OpenLine {
        key: "open_f1_llava_med",
        name: "Open F1, LLaVA-Med rule",
        signature: "open_f1_llava_med|v1|rule=LLaVA-Med b9a98a7 run_eval unclipped",
    },
    OpenLine {
        key: "open_precision_llava_med",
        name: "Open precision, LLaVA-Med rule",
        signature: "open_precision_llava_med|v1|rule=LLaVA-Med b9a98a7 run_eval unclipped",
    },
    OpenLine {
        key: "open_bleu_llava_med",
        name: "Open BLEU, LLaVA-Med rule",
        signature: "open_bleu_llava_med|v1|rule=LLaVA-Med b9a98a7 run_eval, nltk sentence_bleu without smoothing|orders=1-4",
    },
    OpenLine {
        key: "open_bleu1_llava_med",
        name: "Open BLEU of single words, LLaVA-Med rule",
        signature: "open_bleu1_llava_med|v1|rule=LLaVA-Med b9a98a7 run_eval, nltk sentence_bleu without smoothing|orders=1",
    },
    OpenLine {
        key: "open_bleu2_llava_med",
        name: "Open BLEU of word pairs, LLaVA-Med rule",
        signature: "open_bleu2_llava_med|v1|rule=LLaVA-Med b9a98a7 run_eval, nltk sentence_bleu without smoothing|orders=2",
    },
    OpenLine {
        key: "open_bleu3_llava_med",
        name: "Open BLEU of three words, LLaVA-Med rule",
        signature: "open_bleu3_llava_med|v1|rule=LLaVA-Med b9a98a7 run_eval, nltk sentence_bleu without smoothing|orders=3",
    },
    OpenLine {
        key: "open_accuracy_llava_med",
        name: "Open accuracy, LLaVA-Med rule",
        signature: "open_accuracy_llava_med|v1|rule=LLaVA-Med b9a98a7 run_eval, nearest of the known answers|known=all references of open rows, sorted",
    },
];

/// Weights of the orders in the four BLEU lines.
const WEIGHTS: [[f64; 4]; 4] =
    [[0.25, 0.25, 0.25, 0.25], [1.0, 0.0, 0.0, 0.0], [0.0, 1.0, 0.0, 0.0], [0.0, 0.0, 1.0, 0.0]];

/// Answers that are known, normalised, in their order.
#[derive(Debug, Clone, Default)]
pub struct Known(Vec<String>);

impl Known {
    /// The answers that a prediction may mean.
    pub fn new<'a>(answers: impl IntoIterator<Item = &'a str>) -> Self {
        Self(answers.into_iter().map(normalise).collect())
    }

    /// The first of those of whose words the prediction has the largest share.
    fn nearest(&self, prediction: &str) -> Option<&str> {
        let said: BTreeSet<&str> = words(prediction).collect();
        let share = |answer: &String| {
            let wanted: BTreeSet<&str> = words(answer).collect();
            wanted.intersection(&said).count() as f64 / wanted.len().max(1) as f64
        };
        let mut best: Option<(f64, &str)> = None;
        for answer in &self.0 {
            let share = share(answer);
            if best.is_none_or(|(largest, _)| share > largest) {
                best = Some((share, answer));
            }
        }
        best.map(|b| b.1)
    }
}

/// Values of one answer in the order of [`LINES`], shares.
#[must_use]
pub fn values(answer: &str, reference: &str, known: &Known) -> [f64; 8] {
    let found = scores(answer, reference);
    let (answer, reference) = (normalise(answer), normalise(reference));
    let bleu = WEIGHTS.map(|weights| unsmoothed_bleu(&answer, &reference, weights));
    let right = known.nearest(&normalise(&answer)) == Some(normalise(&reference).as_str());
    let right = f64::from(u8::from(right));
    [found.exact, found.f1, found.precision, bleu[0], bleu[1], bleu[2], bleu[3], right]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_nearest_known_answer_is_the_one_whose_words_are_said() {
        let known = Known::new(["CT", "left lower lobe", "lobe", "MRI"]);
        assert_eq!(known.nearest("lower left lobe"), Some("left lower lobe"));
        assert_eq!(known.nearest("nothing of that"), Some("ct"), "the first where none fits");
        assert_eq!(Known::default().nearest("ct"), None);
        let of = |answer: &str| values(answer, "MRI", &known)[7];
        assert_eq!((of("It is an MRI."), of("a CT")), (1.0, 0.0));
    }

    #[test]
    fn keys_and_signatures_belong_together() {
        for line in LINES {
            assert!(line.signature.starts_with(&format!("{}|v", line.key)), "{}", line.signature);
        }
    }
}
