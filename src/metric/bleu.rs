//! Sentence BLEU as nltk computes it with one reference and smoothing method 1, on words between white space: what
//! MedHallTune's evaluation computes, though it never reports it.

use rayon::prelude::*;

use super::text::{Pair, TextMetric, TextMetricDef, numbered, shared_ngrams, words};
use crate::error::Result;

/// BLEU-4.
pub const BLEU: TextMetricDef = TextMetricDef {
    key: "bleu",
    name: "BLEU",
    about: "Geometric mean of the precisions of one to four words in a row, less a penalty for short answers.",
    signature: SIGNATURE,
    open: |_| Ok(Box::new(Bleu)),
};

const SIGNATURE: &str = "bleu|v1|rule=nltk 3.9 sentence_bleu method1 orders 1-4|words=white space, case kept";

/// Takes the place of a count of 0 beyond single words.
const EPSILON: f64 = 0.1;

/// Sentence BLEU of an answer, equal weights on the orders 1 to `orders`.
///
/// ```
/// # use medtune::metric::bleu::sentence_bleu;
/// // three words have no four in a row
/// assert!((sentence_bleu("no acute fracture", "no acute fracture", 4) - 0.1f64.powf(0.25)).abs() < 1e-12);
/// ```
#[must_use]
pub fn sentence_bleu(answer: &str, reference: &str, orders: usize) -> f64 {
    let [answer, reference] = numbered([answer, reference].map(words));
    let mut sum = 0.0;
    for order in 1..=orders {
        let hits = shared_ngrams(&answer, &reference, order);
        if order == 1 && hits == 0 {
            return 0.0;
        }
        let count = (answer.len() + 1).saturating_sub(order).max(1) as f64;
        let hits = if hits == 0 { EPSILON } else { hits as f64 };
        sum += (hits / count).ln();
    }
    brevity(answer.len(), reference.len()) * (sum / orders as f64).exp()
}

/// Sentence BLEU without smoothing: an order of which nothing is found makes the score as good as 0 unless its weight
/// is 0.
#[must_use]
pub fn unsmoothed_bleu(answer: &str, reference: &str, weights: [f64; 4]) -> f64 {
    let [answer, reference] = numbered([answer, reference].map(words));
    let mut sum = 0.0;
    for (order, weight) in (1..).zip(weights) {
        let hits = shared_ngrams(&answer, &reference, order);
        if order == 1 && hits == 0 {
            return 0.0;
        }
        let count = (answer.len() + 1).saturating_sub(order).max(1) as f64;
        let precision = if hits == 0 { f64::MIN_POSITIVE } else { hits as f64 / count };
        sum += weight * precision.ln();
    }
    brevity(answer.len(), reference.len()) * sum.exp()
}

fn brevity(answer: usize, reference: usize) -> f64 {
    if answer > reference { 1.0 } else { (1.0 - reference as f64 / answer as f64).exp() }
}

struct Bleu;

impl TextMetric for Bleu {
    fn signature(&self) -> String {
        SIGNATURE.into()
    }

    fn score_pairs(&self, pairs: &[Pair<'_>]) -> Result<Vec<f64>> {
        Ok(pairs.par_iter().map(|p| sentence_bleu(p.answer, p.reference, 4)).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn short_and_empty_answers() {
        assert_eq!(sentence_bleu("", "a b", 4), 0.0);
        assert_eq!(sentence_bleu("a b", "", 4), 0.0);
        assert_eq!(sentence_bleu("Normal", "normal", 4), 0.0);
        assert!((sentence_bleu("a b", "a b c d", 1) - (-1f64).exp()).abs() < 1e-12);
        assert!((sentence_bleu("a a a a", "a b", 1) - 0.25).abs() < 1e-12);
    }
}
