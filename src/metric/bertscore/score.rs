//! Greedy matching of token vectors.

use std::collections::{BTreeSet, HashMap};

use super::Baseline;

/// A text as the encoder sees it: unit vectors and weights of its tokens.
#[derive(Debug, Clone)]
pub(super) struct Encoded {
    /// `[tokens, width]`, row-major, each row of length 1.
    pub(super) vectors: Vec<f32>,
    /// Weight of each token.
    pub(super) weights: Vec<f64>,
}

/// Precision, recall and their harmonic mean of one pair.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Match {
    /// Mean over the answer's tokens of the best cosine with a token of the reference.
    pub precision: f64,
    /// Mean over the reference's tokens of the best cosine with a token of the answer.
    pub recall: f64,
    /// Harmonic mean.
    pub f1: f64,
}

impl Match {
    /// Rescaled so that unrelated texts score about 0.
    pub(super) fn rescaled(self, baseline: &Baseline) -> Self {
        let scale = |value: f64, base: f64| (value - base) / (1.0 - base);
        Self {
            precision: scale(self.precision, baseline.precision),
            recall: scale(self.recall, baseline.recall),
            f1: scale(self.f1, baseline.f1),
        }
    }
}

/// Scores a pair; a text of nothing but the two marks scores 0.
pub(super) fn matched(answer: &Encoded, reference: &Encoded) -> Match {
    if answer.weights.len() <= 2 || reference.weights.len() <= 2 {
        return Match::default();
    }
    let (rows, columns) = (answer.weights.len(), reference.weights.len());
    let width = answer.vectors.len() / rows;
    let (mut best_row, mut best_column) = (vec![f32::NEG_INFINITY; rows], vec![f32::NEG_INFINITY; columns]);
    for (a, best_row) in answer.vectors.chunks_exact(width).zip(&mut best_row) {
        for (r, best_column) in reference.vectors.chunks_exact(width).zip(&mut best_column) {
            let cosine = dot(a, r);
            *best_row = best_row.max(cosine);
            *best_column = best_column.max(cosine);
        }
    }
    let mean = |best: &[f32], weights: &[f64]| {
        let sum: f64 = best.iter().zip(weights).map(|(b, w)| f64::from(*b) * w).sum();
        sum / weights.iter().sum::<f64>()
    };
    let (precision, recall) = (mean(&best_row, &answer.weights), mean(&best_column, &reference.weights));
    let f1 = 2.0 * precision * recall / (precision + recall);
    Match { precision, recall, f1: if f1.is_nan() { 0.0 } else { f1 } }
}

/// In lanes, which a plain sum of f32 would not be computed in.
fn dot(a: &[f32], b: &[f32]) -> f32 {
    const LANES: usize = 16;
    let mut lanes = [0f32; LANES];
    let (a_chunks, a_rest) = a.as_chunks::<LANES>();
    let (b_chunks, b_rest) = b.as_chunks::<LANES>();
    for (a, b) in a_chunks.iter().zip(b_chunks) {
        for lane in 0..LANES {
            lanes[lane] += a[lane] * b[lane];
        }
    }
    lanes.iter().sum::<f32>() + a_rest.iter().zip(b_rest).map(|(a, b)| a * b).sum::<f32>()
}

/// Rarity of tokens among references.
#[derive(Debug)]
pub(super) struct Rarity {
    texts: usize,
    /// Number of references that have a token.
    found: HashMap<i32, usize>,
}

impl Rarity {
    pub(super) fn new<'a>(references: impl Iterator<Item = &'a [i32]>) -> Self {
        let mut rarity = Self { texts: 0, found: HashMap::new() };
        for ids in references {
            rarity.texts += 1;
            for id in ids.iter().collect::<BTreeSet<_>>() {
                *rarity.found.entry(*id).or_default() += 1;
            }
        }
        rarity
    }

    pub(super) fn weight(&self, id: i32) -> f64 {
        let found = self.found.get(&id).copied().unwrap_or(0);
        ((self.texts + 1) as f64 / (found + 1) as f64).ln()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_take_their_best_counterpart() {
        let text =
            |vectors: &[[f32; 2]], weights: &[f64]| Encoded { vectors: vectors.concat(), weights: weights.into() };
        let (x, y, both) = ([1.0, 0.0], [0.0, 1.0], [0.6, 0.8]);
        let answer = text(&[x, x, both, y], &[0.0, 1.0, 1.0, 0.0]);
        let reference = text(&[y, both, y], &[0.0, 1.0, 0.0]);
        let found = matched(&answer, &reference);
        assert!((found.precision - 0.8).abs() < 1e-7 && (found.recall - 1.0).abs() < 1e-7, "{found:?}");
        assert!((found.f1 - 2.0 * 0.8 / 1.8).abs() < 1e-7);
        let empty = text(&[x, y], &[0.0, 0.0]);
        assert_eq!(matched(&answer, &empty), Match::default());
        let baseline = Baseline { precision: 0.5, recall: 0.5, f1: 0.5 };
        assert!((found.rescaled(&baseline).precision - 0.6).abs() < 1e-7);
    }

    #[test]
    fn rare_tokens_weigh_more_and_marks_nothing() {
        let rarity = Rarity::new([&[0, 5, 5, 2][..], &[0, 6, 2]].into_iter());
        assert_eq!(rarity.weight(0), 0.0);
        assert!((rarity.weight(5) - 1.5f64.ln()).abs() < 1e-12);
        assert!((rarity.weight(9) - 3f64.ln()).abs() < 1e-12);
    }

    #[test]
    fn the_dot_product_takes_every_element() {
        let values: Vec<f32> = (0..37).map(|i| i as f32).collect();
        assert_eq!(dot(&values, &[1.0; 37]), 666.0);
    }
}
