//! Intervals of a share, and agreement of two raters.

use rand::RngExt;
use serde::Serialize;

use crate::random::stream;

/// Standard normal quantile of a two-sided 95 % interval.
const Z: f64 = 1.959_963_984_540_054;

/// Resamples of a bootstrap interval.
const RESAMPLES: usize = 2000;

/// A share with its 95 % intervals.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Share {
    /// Rows that have what is counted.
    pub count: usize,
    /// All rows.
    pub of: usize,
    /// The share, 0 to 1; none without rows.
    pub value: Option<f64>,
    /// Wilson's score interval.
    pub wilson: [f64; 2],
    /// Clopper and Pearson's exact interval, which is never too narrow.
    pub exact: [f64; 2],
}

impl Share {
    /// Of counts.
    #[must_use]
    pub fn new(count: usize, of: usize) -> Self {
        let value = (of > 0).then(|| count as f64 / of as f64);
        Self { count, of, value, wilson: wilson(count, of), exact: exact(count, of) }
    }
}

/// Wilson's score interval, 95 %; everything without rows.
#[must_use]
pub fn wilson(count: usize, of: usize) -> [f64; 2] {
    if of == 0 {
        return [0.0, 1.0];
    }
    let (n, p) = (of as f64, count as f64 / of as f64);
    let middle = p + Z * Z / (2.0 * n);
    let half = Z * (p * (1.0 - p) / n + Z * Z / (4.0 * n * n)).sqrt();
    let scale = 1.0 + Z * Z / n;
    [((middle - half) / scale).max(0.0), ((middle + half) / scale).min(1.0)]
}

/// Clopper and Pearson's interval, 95 %; everything without rows.
#[must_use]
pub fn exact(count: usize, of: usize) -> [f64; 2] {
    if of == 0 {
        return [0.0, 1.0];
    }
    // At the lower end so many or more are as unlikely as they may be, at the upper end so many or fewer.
    let low = if count == 0 { 0.0 } else { bisect(|p| 1.0 - at_most(count - 1, of, p) < 0.025) };
    let high = if count == of { 1.0 } else { bisect(|p| at_most(count, of, p) > 0.025) };
    [low, high]
}

/// The point in 0 to 1 up to which `holds` is true.
fn bisect(holds: impl Fn(f64) -> bool) -> f64 {
    let (mut low, mut high) = (0.0, 1.0);
    for _ in 0..60 {
        let middle = (low + high) / 2.0;
        if holds(middle) { low = middle } else { high = middle }
    }
    (low + high) / 2.0
}

/// Probability of at most `count` of `of` when each has probability `p`, strictly between 0 and 1.
fn at_most(count: usize, of: usize, p: f64) -> f64 {
    let (mut term, mut sum) = (of as f64 * (1.0 - p).ln(), 0.0);
    for i in 0..=count {
        sum += term.exp();
        term += ((of - i) as f64 / (i + 1) as f64).ln() + (p / (1.0 - p)).ln();
    }
    sum.min(1.0)
}

/// Agreement of two raters.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Agreement {
    /// Rows that both rated.
    pub rows: usize,
    /// Of these, rated alike.
    pub alike: usize,
    /// Cohen's kappa; none when both always say the same one thing.
    pub kappa: Option<f64>,
    /// 95 % bootstrap interval over rows; none with fewer than two rows.
    pub interval: Option<[f64; 2]>,
}

/// Agreement of two raters on the same rows, each a pair of classes.
#[must_use]
pub fn agreement(pairs: &[(usize, usize)], seed: u64) -> Agreement {
    let mut draws: Vec<f64> = Vec::new();
    if pairs.len() >= 2 {
        let mut rng = stream(seed, "review/kappa", pairs.len() as u64);
        for _ in 0..RESAMPLES {
            let again: Vec<(usize, usize)> =
                (0..pairs.len()).map(|_| pairs[rng.random_range(0..pairs.len())]).collect();
            draws.extend(kappa(&again));
        }
        draws.sort_by(f64::total_cmp);
    }
    let at = |q: f64| draws[((draws.len() - 1) as f64 * q).round() as usize];
    Agreement {
        rows: pairs.len(),
        alike: pairs.iter().filter(|(a, b)| a == b).count(),
        kappa: kappa(pairs),
        interval: (!draws.is_empty()).then(|| [at(0.025), at(0.975)]),
    }
}

fn kappa(pairs: &[(usize, usize)]) -> Option<f64> {
    let n = pairs.len() as f64;
    let classes = pairs.iter().flat_map(|(a, b)| [*a, *b]).max()? + 1;
    let observed = pairs.iter().filter(|(a, b)| a == b).count() as f64 / n;
    let share = |class: usize, first: bool| {
        pairs.iter().filter(|(a, b)| if first { *a == class } else { *b == class }).count() as f64 / n
    };
    let expected: f64 = (0..classes).map(|c| share(c, true) * share(c, false)).sum();
    (expected < 1.0).then(|| (observed - expected) / (1.0 - expected))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn near(a: [f64; 2], b: [f64; 2]) -> bool {
        a.iter().zip(b).all(|(x, y)| (x - y).abs() < 5e-4)
    }

    #[test]
    fn intervals_equal_published_ones() {
        // 81 of 263 and 0 of 20: Newcombe (1998), table I, methods 3 and 5.
        assert!(near(wilson(81, 263), [0.2553, 0.3662]), "{:?}", wilson(81, 263));
        assert!(near(exact(81, 263), [0.2527, 0.3676]), "{:?}", exact(81, 263));
        assert!(near(wilson(0, 20), [0.0, 0.1611]) && near(exact(0, 20), [0.0, 0.1684]), "{:?}", exact(0, 20));
        assert!(near(exact(20, 20), [0.8316, 1.0]));
        assert_eq!(Share::new(0, 0).value, None);
    }

    #[test]
    fn kappa_equals_the_textbook() {
        // Two readers of 50 proposals: 20 both yes, 15 both no, 5 and 10 split; kappa is 0.4.
        let table = [((0, 0), 20), ((0, 1), 5), ((1, 0), 10), ((1, 1), 15)];
        let pairs: Vec<(usize, usize)> = table.iter().flat_map(|(pair, n)| vec![*pair; *n]).collect();
        let found = agreement(&pairs, 1);
        assert!((found.kappa.unwrap() - 0.4).abs() < 1e-12 && found.alike == 35);
        let [low, high] = found.interval.unwrap();
        assert!(low > 0.1 && low < 0.3 && high > 0.5 && high < 0.75, "{low} {high}");
        assert_eq!(agreement(&pairs, 1), found);
        assert_eq!(agreement(&[(0, 0), (0, 0)], 1).kappa, None);
        assert_eq!(agreement(&[(0, 0), (1, 1)], 1).kappa, Some(1.0));
    }
}
