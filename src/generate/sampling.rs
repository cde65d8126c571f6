//! Choosing a token from logits: repetition penalty, temperature, then top-k, then top-p, as transformers orders them.

use std::collections::BTreeSet;

use rand::Rng;

use super::GenerateConfig;

/// Index of the largest value; the first of equals.
#[must_use]
pub fn argmax(logits: &[f32]) -> usize {
    let mut best = 0;
    for (i, value) in logits.iter().enumerate() {
        if *value > logits[best] {
            best = i;
        }
    }
    best
}

/// Makes tokens that occurred less likely: their scores are divided by `penalty`, negative ones multiplied.
pub fn penalise_repeats(logits: &mut [f32], occurred: impl Iterator<Item = i32>, penalty: f64) {
    if penalty == 1.0 {
        return;
    }
    let ids: BTreeSet<usize> = occurred.filter_map(|id| usize::try_from(id).ok()).collect();
    for id in ids {
        if let Some(score) = logits.get_mut(id) {
            *score = if *score < 0.0 { *score * penalty as f32 } else { *score / penalty as f32 };
        }
    }
}

/// Logits after temperature, top-k and top-p; removed tokens become negative infinity.
#[must_use]
pub fn process_logits(logits: &[f32], config: &GenerateConfig) -> Vec<f32> {
    let mut scores: Vec<f32> = logits.iter().map(|l| l / config.temperature as f32).collect();
    if config.top_k > 0 && config.top_k < scores.len() {
        let mut sorted = scores.clone();
        let (_, kth, _) = sorted.select_nth_unstable_by(config.top_k - 1, |a, b| b.total_cmp(a));
        let kth = *kth;
        scores.iter_mut().filter(|s| **s < kth).for_each(|s| *s = f32::NEG_INFINITY);
    }
    if config.top_p < 1.0 {
        let mut order: Vec<usize> = (0..scores.len()).collect();
        order.sort_by(|a, b| scores[*a].total_cmp(&scores[*b]));
        let probabilities = softmax(&scores);
        let mut cumulative = 0.0;
        for i in &order[..order.len() - 1] {
            cumulative += probabilities[*i];
            if cumulative <= 1.0 - config.top_p {
                scores[*i] = f32::NEG_INFINITY;
            }
        }
    }
    scores
}

/// Probabilities of logits; negative infinity gives zero.
#[must_use]
pub fn softmax(logits: &[f32]) -> Vec<f64> {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let exp: Vec<f64> = logits.iter().map(|l| f64::from(l - max).exp()).collect();
    let sum: f64 = exp.iter().sum();
    exp.into_iter().map(|e| e / sum).collect()
}

/// Logarithms of the probabilities.
#[must_use]
pub(super) fn log_softmax(logits: &[f32]) -> Vec<f64> {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let normaliser = logits.iter().map(|l| f64::from(l - max).exp()).sum::<f64>().ln() + f64::from(max);
    logits.iter().map(|l| f64::from(*l) - normaliser).collect()
}

/// The next token: the most likely one at temperature 0, else one drawn from the processed distribution.
#[must_use]
pub fn choose(logits: &[f32], config: &GenerateConfig, stream: &mut impl Rng) -> usize {
    if config.temperature <= 0.0 {
        return argmax(logits);
    }
    let probabilities = softmax(&process_logits(logits, config));
    let draw = (stream.next_u64() >> 11) as f64 / (1u64 << 53) as f64;
    let mut cumulative = 0.0;
    for (i, p) in probabilities.iter().enumerate() {
        cumulative += p;
        if draw < cumulative {
            return i;
        }
    }
    // only rounding of the sum leads here
    probabilities.iter().rposition(|p| *p > 0.0).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random;

    fn config(temperature: f64, top_k: usize, top_p: f64) -> GenerateConfig {
        GenerateConfig { temperature, top_k, top_p, ..GenerateConfig::default() }
    }

    #[test]
    fn draws_follow_the_processed_distribution() {
        let logits = [1.0, 0.0, 2.0, -1.0, 1.5];
        let config = config(0.8, 3, 1.0);
        let expected = softmax(&process_logits(&logits, &config));
        assert_eq!(expected.iter().filter(|p| **p > 0.0).count(), 3);
        let mut stream = random::stream(5, "test", 0);
        let mut counts = [0usize; 5];
        for _ in 0..20_000 {
            counts[choose(&logits, &config, &mut stream)] += 1;
        }
        for (count, p) in counts.iter().zip(&expected) {
            assert!((*count as f64 / 20_000.0 - p).abs() < 0.015, "{counts:?} against {expected:?}");
        }
    }

    #[test]
    fn a_repeated_token_is_penalised_once_and_towards_less_likely() {
        let mut logits = [2.0, -1.0, 3.0];
        penalise_repeats(&mut logits, [0, 0, 1, -7, 99].into_iter(), 2.0);
        assert_eq!(logits, [1.0, -2.0, 3.0]);
    }

    #[test]
    fn top_p_keeps_the_smallest_sufficient_set_and_at_least_one() {
        let logits: Vec<f32> = [0.5f32, 0.3, 0.15, 0.05].iter().map(|p| p.ln()).collect();
        let kept = |p| process_logits(&logits, &config(1.0, 0, p)).iter().filter(|l| l.is_finite()).count();
        assert_eq!([kept(0.4), kept(0.6), kept(0.9), kept(1.0), kept(1e-9)], [1, 2, 3, 4, 1]);
    }

    #[test]
    fn greedy_takes_the_first_of_equals_and_ties_at_the_kth_place_stay() {
        assert_eq!(argmax(&[0.0, 2.0, 2.0]), 1);
        let scores = process_logits(&[3.0, 1.0, 1.0, 0.0], &config(1.0, 2, 1.0));
        assert_eq!(scores.iter().filter(|s| s.is_finite()).count(), 3);
    }
}
