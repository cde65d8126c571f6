//! Beam search as transformers' `BeamSearchScorer` does it with `early_stopping = false`.

use super::{GenerateConfig, sampling::log_softmax, session::Session};
use crate::error::Result;

/// A finished or cut answer.
#[derive(Debug, Clone, PartialEq)]
pub struct Hypothesis {
    /// Generated ids, with the stop id if there was one.
    pub ids: Vec<i32>,
    /// Sum of log-probabilities over `length ^ length_penalty`, the stop id counted.
    pub score: f64,
}

/// Continues the single row of `session` and returns the `num_beams` best answers, best first.
///
/// In each step the best `2 * num_beams` continuations are ranked; one that ends in a stop id is finished if it ranks
/// among the first `num_beams`, and the search ends when the worst of `num_beams` finished answers is at least as good
/// as the best continuation would be at its current length.
///
/// # Errors
/// Logits that are not finite.
pub fn beam_search(
    session: &mut Session<'_>,
    first_logits: &[f32],
    stop_ids: &[i32],
    config: &GenerateConfig,
) -> Result<Vec<Hypothesis>> {
    let beams = config.num_beams;
    let mut finished = Finished { best: Vec::new(), room: beams };
    let mut running = vec![(Vec::<i32>::new(), 0f64)];
    let mut logits = vec![first_logits.to_vec()];
    session.select(&vec![0; beams]);
    for length in 1..=config.max_new_tokens {
        let score = |sum: f64| sum / (length as f64).powf(config.length_penalty);
        let ranked = rank(&running, &logits, 2 * beams);
        let mut next = Vec::with_capacity(beams);
        for (place, (sum, beam, token)) in ranked.iter().enumerate() {
            let ids: Vec<i32> = running[*beam].0.iter().copied().chain([*token]).collect();
            if stop_ids.contains(token) {
                if place < beams {
                    finished.add(Hypothesis { ids, score: score(*sum) });
                }
            } else if next.len() < beams {
                next.push((*beam, (ids, *sum)));
            }
        }
        let attainable = ranked.first().map_or(f64::NEG_INFINITY, |r| score(r.0));
        let done = finished.worst().is_some_and(|worst| worst >= attainable);
        if done || next.is_empty() {
            return Ok(finished.best);
        }
        if length == config.max_new_tokens {
            for (_, (ids, sum)) in next {
                finished.add(Hypothesis { ids, score: score(sum) });
            }
            return Ok(finished.best);
        }
        // every step runs `beams` rows; a vocabulary smaller than that repeats the last one, which is not read
        let parents: Vec<usize> = (0..beams).map(|i| next[i.min(next.len() - 1)].0).collect();
        running = next.into_iter().map(|(_, r)| r).collect();
        session.select(&parents);
        let last = |i: usize| running[i.min(running.len() - 1)].0.last().copied().unwrap_or_default();
        let tokens: Vec<i32> = (0..beams).map(last).collect();
        logits = session.step(&tokens)?;
    }
    Ok(finished.best)
}

/// The best `count` continuations as (sum, beam, token), best first.
fn rank(running: &[(Vec<i32>, f64)], logits: &[Vec<f32>], count: usize) -> Vec<(f64, usize, i32)> {
    let mut all = Vec::new();
    for (beam, (_, sum)) in running.iter().enumerate() {
        let scores = log_softmax(&logits[beam]);
        let mut order: Vec<usize> = (0..scores.len()).collect();
        let better = |a: &usize, b: &usize| scores[*b].total_cmp(&scores[*a]).then(a.cmp(b));
        if count < order.len() {
            order.select_nth_unstable_by(count, better);
            order.truncate(count);
        }
        all.extend(order.into_iter().map(|token| (sum + scores[token], beam, token as i32)));
    }
    all.sort_by(|a, b| b.0.total_cmp(&a.0).then((a.1, a.2).cmp(&(b.1, b.2))));
    all.truncate(count);
    all
}

struct Finished {
    /// Best first.
    best: Vec<Hypothesis>,
    room: usize,
}

impl Finished {
    fn add(&mut self, hypothesis: Hypothesis) {
        let place = self.best.partition_point(|h| h.score >= hypothesis.score);
        self.best.insert(place, hypothesis);
        self.best.truncate(self.room);
    }

    /// Score of the worst, once there is no more room.
    fn worst(&self) -> Option<f64> {
        if self.best.len() < self.room { None } else { self.best.last().map(|h| h.score) }
    }
}
