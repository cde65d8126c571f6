//! ROUGE-1, ROUGE-2 and ROUGE-L as Google's `rouge_score` computes them with its stemmer; the F-measure is reported.
//!
//! Only ASCII letters and digits are kept, so accents split words, and text in other scripts has no words and scores 0.

use std::hash::Hash;

use rayon::prelude::*;

use super::{
    porter::stem,
    text::{Pair, TextMetric, TextMetricDef, numbered, shared_ngrams},
};
use crate::error::Result;

/// Overlap of words.
pub const ROUGE_1: TextMetricDef = TextMetricDef {
    key: "rouge1",
    name: "ROUGE-1",
    about: "F-measure of the stemmed words that answer and reference share.",
    signature: "rouge1|v1|rule=rouge_score 0.1.2 F-measure|words=[a-z0-9]+, Porter nltk",
    open: |_| Ok(Box::new(Rouge { def: &ROUGE_1, measure: |a, r| ngrams(a, r, 1).f })),
};

/// Overlap of pairs of words.
pub const ROUGE_2: TextMetricDef = TextMetricDef {
    key: "rouge2",
    name: "ROUGE-2",
    about: "F-measure of the pairs of neighbouring stemmed words that answer and reference share.",
    signature: "rouge2|v1|rule=rouge_score 0.1.2 F-measure|words=[a-z0-9]+, Porter nltk",
    open: |_| Ok(Box::new(Rouge { def: &ROUGE_2, measure: |a, r| ngrams(a, r, 2).f })),
};

/// Longest common subsequence.
pub const ROUGE_L: TextMetricDef = TextMetricDef {
    key: "rougeL",
    name: "ROUGE-L",
    about: "F-measure of the longest sequence of stemmed words that answer and reference share in order.",
    signature: "rougeL|v1|rule=rouge_score 0.1.2 F-measure|words=[a-z0-9]+, Porter nltk",
    open: |_| Ok(Box::new(Rouge { def: &ROUGE_L, measure: |a, r| longest(a, r).f })),
};

/// Precision, recall and their harmonic mean.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Overlap {
    /// Share of the answer that the reference holds.
    pub precision: f64,
    /// Share of the reference that the answer holds.
    pub recall: f64,
    /// Harmonic mean; 0 if both are.
    pub f: f64,
}

impl Overlap {
    fn new(precision: f64, recall: f64) -> Self {
        let sum = precision + recall;
        Self { precision, recall, f: if sum > 0.0 { 2.0 * precision * recall / sum } else { 0.0 } }
    }
}

/// The stemmed words that ROUGE compares.
#[must_use]
pub fn tokens(text: &str) -> Vec<String> {
    let lower = text.to_lowercase();
    let words = lower.split(|c: char| !c.is_ascii_lowercase() && !c.is_ascii_digit()).filter(|w| !w.is_empty());
    words.map(|w| if w.len() > 3 { stem(w) } else { w.to_string() }).collect()
}

/// ROUGE-n of two lists of tokens.
#[must_use]
pub fn ngrams<T: Hash + Eq>(answer: &[T], reference: &[T], n: usize) -> Overlap {
    let hits = shared_ngrams(answer, reference, n) as f64;
    let share = |of: &[T]| hits / (of.len() + 1).saturating_sub(n).max(1) as f64;
    Overlap::new(share(answer), share(reference))
}

/// ROUGE-L of two lists of tokens.
#[must_use]
pub fn longest<T: PartialEq>(answer: &[T], reference: &[T]) -> Overlap {
    if answer.is_empty() || reference.is_empty() {
        return Overlap::default();
    }
    let mut lengths = vec![0usize; reference.len() + 1];
    for a in answer {
        let mut diagonal = 0;
        for (j, r) in reference.iter().enumerate() {
            let above = lengths[j + 1];
            lengths[j + 1] = if a == r { diagonal + 1 } else { above.max(lengths[j]) };
            diagonal = above;
        }
    }
    let common = lengths[reference.len()] as f64;
    Overlap::new(common / answer.len() as f64, common / reference.len() as f64)
}

struct Rouge {
    def: &'static TextMetricDef,
    measure: fn(&[u32], &[u32]) -> f64,
}

impl TextMetric for Rouge {
    fn signature(&self) -> String {
        self.def.signature.into()
    }

    fn score_pairs(&self, pairs: &[Pair<'_>]) -> Result<Vec<f64>> {
        let one = |pair: &Pair<'_>| {
            let [answer, reference] = numbered([tokens(pair.answer), tokens(pair.reference)]);
            (self.measure)(&answer, &reference)
        };
        Ok(pairs.par_iter().map(one).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_are_ascii_stems() {
        assert_eq!(
            tokens("3.5 cm X-ray; naïve lesions, the 日本"),
            ["3", "5", "cm", "x", "ray", "na", "ve", "lesion", "the"]
        );
    }

    #[test]
    fn overlaps_are_clipped_and_ordered() {
        let words = |text: &'static str| text.split(' ').collect::<Vec<_>>();
        let one = ngrams(&words("a a a b"), &words("a b c"), 1);
        assert_eq!((one.precision, one.recall), (0.5, 2.0 / 3.0));
        assert_eq!(ngrams(&words("a"), &words("a"), 2), Overlap::default());
        let l = longest(&words("a x b y c"), &words("c a b z"));
        assert_eq!((l.precision, l.recall), (0.4, 0.5));
        assert_eq!(longest::<u8>(&[], &[]), Overlap::default());
    }
}
