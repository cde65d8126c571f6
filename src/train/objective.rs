//! What a step minimises: the negative log-likelihood of the answers, or direct preference optimisation (Rafailov et al.,
//! arXiv 2305.18290) of pairs of answers.
//!
//! Both are functions of the negative log-likelihoods of the supervised tokens, so both reach the model as one factor
//! for every token; the names and formulas of the preference loss are those of TRL's `DPOTrainer`.

/// How the supervised tokens of a batch weigh in the gradient.
#[derive(Debug, Clone, Copy)]
pub enum Objective<'a> {
    /// This factor on the sum of the negative log-likelihoods.
    Tokens(f64),
    /// Preferences: rows are chosen and rejected answers in turn.
    Preference(Preference<'a>),
}

impl Objective<'_> {
    /// The factors, when they do not depend on the likelihoods.
    #[must_use]
    pub fn constant(&self) -> Option<f64> {
        match self {
            Self::Tokens(weight) => Some(*weight),
            Self::Preference(_) => None,
        }
    }

    /// Derivative of the loss of the whole step with respect to each token's negative log-likelihood, in nats; `rows` has
    /// the row of each token.
    #[must_use]
    pub fn weights(&self, nll: &[f32], rows: &[usize]) -> Vec<f32> {
        match self {
            Self::Tokens(weight) => vec![*weight as f32; nll.len()],
            Self::Preference(preference) => preference.weights(nll, rows),
        }
    }
}

/// Settings of the preference loss, and what it needs to know about the step.
#[derive(Debug, Clone, Copy)]
pub struct Preference<'a> {
    /// How far the model may move from its reference: large keeps it close.
    pub beta: f64,
    /// Share of pairs that are assumed to be the wrong way round.
    pub label_smoothing: f64,
    /// Weight of the likelihood of the chosen answers beside the preference.
    pub rpo_alpha: f64,
    /// Log-likelihood of each row under the reference model.
    pub reference: &'a [f64],
    /// Pairs of the whole step, over which the loss is a mean.
    pub pairs: usize,
    /// Supervised tokens of the chosen rows of the whole step.
    pub chosen_tokens: usize,
}

/// What a pair contributes.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Pair {
    /// Its loss, without the likelihood term.
    pub loss: f64,
    /// `beta` times how much likelier the chosen answer is than under the reference.
    pub chosen_reward: f64,
    /// The same of the rejected answer.
    pub rejected_reward: f64,
    /// Derivative of the loss with respect to the difference of the two log-likelihoods.
    slope: f64,
}

impl Preference<'_> {
    /// The pairs of a batch whose rows have the log-likelihoods `logps`.
    #[must_use]
    pub fn pairs_of(&self, logps: &[f64]) -> Vec<Pair> {
        let (own, reference) = (logps.as_chunks::<2>().0, self.reference.as_chunks::<2>().0);
        own.iter().zip(reference).map(|(own, reference)| self.pair(*own, *reference)).collect()
    }

    fn pair(&self, [chosen, rejected]: [f64; 2], [chosen_reference, rejected_reference]: [f64; 2]) -> Pair {
        let (beta, flipped) = (self.beta, self.label_smoothing);
        let z = beta * ((chosen - rejected) - (chosen_reference - rejected_reference));
        Pair {
            loss: (1.0 - flipped) * softplus(-z) + flipped * softplus(z),
            chosen_reward: beta * (chosen - chosen_reference),
            rejected_reward: beta * (rejected - rejected_reference),
            slope: beta * (flipped * sigmoid(z) - (1.0 - flipped) * sigmoid(-z)),
        }
    }

    fn weights(&self, nll: &[f32], rows: &[usize]) -> Vec<f32> {
        let pairs = self.pairs_of(&row_logps(nll, rows, self.reference.len()));
        let likelihood = self.rpo_alpha / self.chosen_tokens.max(1) as f64;
        let mean = 1.0 / self.pairs.max(1) as f64;
        let weight = |row: usize| {
            let slope = mean * pairs.get(row / 2).map_or(0.0, |p| p.slope);
            if is_chosen(row) { likelihood - slope } else { slope }
        };
        rows.iter().map(|row| weight(*row) as f32).collect()
    }
}

/// Whether a row of a batch of pairs holds the chosen answer.
#[must_use]
pub fn is_chosen(row: usize) -> bool {
    row.is_multiple_of(2)
}

/// Log-likelihood of each of `count` rows from the negative log-likelihoods of their tokens.
#[must_use]
pub fn row_logps(nll: &[f32], rows: &[usize], count: usize) -> Vec<f64> {
    let mut sums = vec![0.0; count];
    for (nll, row) in nll.iter().zip(rows) {
        sums[*row] -= f64::from(*nll);
    }
    sums
}

/// `log(1 + exp(x))`
fn softplus(x: f64) -> f64 {
    x.max(0.0) + (-x.abs()).exp().ln_1p()
}

fn sigmoid(x: f64) -> f64 {
    if x >= 0.0 { 1.0 / (1.0 + (-x).exp()) } else { x.exp() / (1.0 + x.exp()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Loss of a step whose rows have these token losses, as the definition has it.
    fn loss(p: &Preference<'_>, nll: &[f32], rows: &[usize]) -> f64 {
        let pairs = p.pairs_of(&row_logps(nll, rows, p.reference.len()));
        let chosen: f64 = nll.iter().zip(rows).filter(|(_, r)| is_chosen(**r)).map(|(n, _)| f64::from(*n)).sum();
        pairs.iter().map(|p| p.loss).sum::<f64>() / p.pairs as f64 + p.rpo_alpha * chosen / p.chosen_tokens as f64
    }

    #[test]
    fn a_model_that_is_its_reference_has_the_loss_of_a_coin() {
        let reference = [-3.0, -5.0];
        let p = Preference {
            beta: 0.1,
            label_smoothing: 0.0,
            rpo_alpha: 0.0,
            reference: &reference,
            pairs: 1,
            chosen_tokens: 2,
        };
        let pair = p.pairs_of(&reference)[0];
        assert!((pair.loss - std::f64::consts::LN_2).abs() < 1e-12);
        assert_eq!((pair.chosen_reward, pair.rejected_reward), (0.0, 0.0));
        // A better chosen answer lowers the loss: softplus(-0.1 * 2).
        let better = p.pairs_of(&[-1.0, -5.0])[0];
        assert!((better.loss - (-0.2f64).exp().ln_1p()).abs() < 1e-12 && (better.chosen_reward - 0.2).abs() < 1e-12);
    }

    #[test]
    fn weights_are_the_slopes_of_the_loss() {
        let (nll, rows) = ([0.5f32, 1.0, 2.0, 0.25, 3.0, 0.75], [0, 0, 1, 2, 3, 3]);
        let reference = [-1.0, -2.5, -0.5, -3.0];
        for (label_smoothing, rpo_alpha, beta) in [(0.0, 0.0, 0.5), (0.2, 0.0, 2.0), (0.1, 1.5, 0.7)] {
            let p = Preference { beta, label_smoothing, rpo_alpha, reference: &reference, pairs: 2, chosen_tokens: 3 };
            let weights = Objective::Preference(p).weights(&nll, &rows);
            for (i, weight) in weights.iter().enumerate() {
                let moved = |h: f32| {
                    let mut nll = nll;
                    nll[i] += h;
                    loss(&p, &nll, &rows)
                };
                let numeric = (moved(1.0 / 64.0) - moved(-1.0 / 64.0)) * 32.0;
                assert!((numeric - f64::from(*weight)).abs() < 1e-3, "{i}: {numeric} {weight}");
            }
        }
    }

    #[test]
    fn extremes_stay_finite() {
        for x in [-1e4, -40.0, 0.0, 40.0, 1e4] {
            assert!(softplus(x).is_finite() && (0.0..=1.0).contains(&sigmoid(x)));
        }
        assert_eq!(softplus(1e4), 1e4);
    }
}
