//! Means with intervals, and paired differences with p-values, for rows that come in clusters.
//!
//! Rows of one image are not independent, so images are what is resampled and what is permuted. Every draw comes from
//! [`crate::random::stream`], so a report of the same verdicts is the same to the last digit.
//!
//! Metrics that are shown together are corrected together ([`correct`], Holm 1979): a difference counts as shown only if
//! it stays below [`ALPHA`] after the correction. What a data set of this size could have shown at all is
//! [`Difference::detectable`].

use std::collections::BTreeMap;

use rand::RngExt;
use serde::{Deserialize, Serialize};

use crate::{metric::Unit, random::stream};

/// Resamples of a bootstrap interval.
const RESAMPLES: usize = 2000;
/// Random sign flips of a permutation test.
const PERMUTATIONS: usize = 9999;
/// Up to this many images, all sign flips are enumerated instead.
const ENUMERATED: usize = 13;
/// A difference is called shown below this p-value.
pub const ALPHA: f64 = 0.05;

/// One row's value and the image it belongs to.
#[derive(Debug, Clone, PartialEq)]
pub struct Observation<'a> {
    /// Cluster, mostly the image.
    pub cluster: &'a str,
    /// Value of the row.
    pub value: f64,
}

/// One row's values for two models.
#[derive(Debug, Clone, PartialEq)]
pub struct Pair<'a> {
    /// Cluster, mostly the image.
    pub cluster: &'a str,
    /// Value before.
    pub base: f64,
    /// Value after.
    pub tuned: f64,
}

/// A mean with its 95 % interval.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct Estimate {
    /// Rows that count.
    pub n: usize,
    /// Images they come from.
    pub clusters: usize,
    /// Sum of their values.
    pub sum: f64,
    /// Mean; none without rows.
    pub value: Option<f64>,
    /// 95 % interval, lower and upper end; none with fewer than two images.
    pub interval: Option<[f64; 2]>,
}

/// What a difference amounts to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Finding {
    /// Shown: the tuned model's value is lower.
    Lower,
    /// Shown: the tuned model's value is higher.
    Higher,
    /// The data do not show a difference, which is not the same as showing none.
    NotShown,
    /// No row differs.
    Identical,
    /// Fewer than two images, so nothing can be said.
    TooFew,
}

impl Finding {
    /// The words of tables and sentences.
    #[must_use]
    pub fn words(self) -> &'static str {
        match self {
            Self::Lower => "lower",
            Self::Higher => "higher",
            Self::NotShown => "difference not shown",
            Self::Identical => "no row differs",
            Self::TooFew => "too few images",
        }
    }
}

/// A paired difference, tuned minus base.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Difference {
    /// Rows that both models have a value for.
    pub n: usize,
    /// Images they come from.
    pub clusters: usize,
    /// Mean difference; none without rows.
    pub value: Option<f64>,
    /// 95 % interval, lower and upper end; none with fewer than two images.
    pub interval: Option<[f64; 2]>,
    /// Two-sided p-value of a permutation test that swaps the models image by image.
    pub p: Option<f64>,
    /// The p-value after Holm's correction for all differences shown together; none before [`correct`].
    #[serde(default)]
    pub p_holm: Option<f64>,
    /// Smallest true difference that rows like these would show in 80 % of all data sets of this size, before any
    /// correction; none with fewer than two images.
    #[serde(default)]
    pub detectable: Option<f64>,
    /// What it amounts to.
    pub finding: Finding,
}

/// How intervals and p-values are made, for `report.json`.
#[must_use]
pub fn signature() -> String {
    format!(
        "interval=95% cluster bootstrap, {RESAMPLES} resamples, percentiles widened for few clusters, exact binomial on \
         clusters at 0 and 1|p=two-sided cluster sign-flip permutation, {PERMUTATIONS} draws or all up to \
         {ENUMERATED} clusters|correction=Holm over the differences of one table|shown=corrected p<{ALPHA} and interval \
         without 0|detectable=80% power, two-sided {ALPHA}, cluster standard error, Student t|v2"
    )
}

/// Mean and interval of `rows`; `purpose` names the draw site.
#[must_use]
pub fn estimate(rows: &[Observation<'_>], unit: Unit, seed: u64, purpose: &str) -> Estimate {
    let clusters = totals(rows.iter().map(|r| (r.cluster, r.value)));
    let (n, sum) = (rows.len(), clusters.iter().map(|c| c.sum).sum::<f64>());
    if n == 0 {
        return Estimate::default();
    }
    let value = sum / n as f64;
    let interval = (clusters.len() > 1).then(|| {
        let k = clusters.len() as f64;
        // A bootstrap of rows that are all 0 or all 1 has no width, which would claim certainty.
        match unit {
            Unit::Share if sum == 0.0 => [0.0, 1.0 - 0.025f64.powf(1.0 / k)],
            Unit::Share if sum == n as f64 => [0.025f64.powf(1.0 / k), 1.0],
            _ => bootstrap(&clusters, seed, purpose),
        }
    });
    Estimate { n, clusters: clusters.len(), sum, value: Some(value), interval }
}

/// Mean difference of `pairs`, its interval and p-value; `purpose` names the draw site.
#[must_use]
pub fn difference(pairs: &[Pair<'_>], seed: u64, purpose: &str) -> Difference {
    let clusters = totals(pairs.iter().map(|p| (p.cluster, p.tuned - p.base)));
    let (n, sum) = (pairs.len(), clusters.iter().map(|c| c.sum).sum::<f64>());
    let mut result = Difference {
        n,
        clusters: clusters.len(),
        value: (n > 0).then(|| sum / n as f64),
        interval: None,
        p: None,
        p_holm: None,
        detectable: None,
        finding: Finding::TooFew,
    };
    if clusters.len() < 2 {
        return result;
    }
    let interval = bootstrap(&clusters, seed, purpose);
    let p = permutation(&clusters, seed, purpose);
    result.interval = Some(interval);
    result.p = Some(p);
    result.detectable = Some(detectable(&clusters));
    result.finding = if pairs.iter().all(|p| p.base == p.tuned) {
        Finding::Identical
    } else if p < ALPHA && interval[1] < 0.0 {
        Finding::Lower
    } else if p < ALPHA && interval[0] > 0.0 {
        Finding::Higher
    } else {
        Finding::NotShown
    };
    result
}

/// Corrects differences that are shown together by Holm's step-down method: sets [`Difference::p_holm`] and takes back
/// findings that do not survive it. Differences without a p-value do not count.
pub fn correct<'a>(family: impl IntoIterator<Item = &'a mut Difference>) {
    let mut family: Vec<&mut Difference> = family.into_iter().filter(|d| d.p.is_some()).collect();
    family.sort_by(|a, b| a.p.unwrap_or(1.0).total_cmp(&b.p.unwrap_or(1.0)));
    let tests = family.len();
    let mut largest = 0f64;
    for (rank, d) in family.into_iter().enumerate() {
        largest = largest.max(d.p.unwrap_or(1.0) * (tests - rank) as f64).min(1.0);
        d.p_holm = Some(largest);
        if largest >= ALPHA && matches!(d.finding, Finding::Lower | Finding::Higher) {
            d.finding = Finding::NotShown;
        }
    }
}

/// The most frequent class: its name and its share of `classes`. Ties go to the first in alphabetical order.
#[must_use]
pub fn majority<'a>(classes: impl IntoIterator<Item = &'a str>) -> Option<(String, f64)> {
    let mut counts = BTreeMap::new();
    let mut n = 0usize;
    for class in classes {
        *counts.entry(class).or_insert(0usize) += 1;
        n += 1;
    }
    let (class, count) = counts.into_iter().rev().max_by_key(|(_, c)| *c)?;
    Some((class.to_string(), count as f64 / n as f64))
}

/// Rows of one cluster.
#[derive(Debug, Clone, Copy, Default)]
struct Total {
    sum: f64,
    n: f64,
}

fn totals<'a>(rows: impl Iterator<Item = (&'a str, f64)>) -> Vec<Total> {
    let mut totals: BTreeMap<&str, Total> = BTreeMap::new();
    for (cluster, value) in rows {
        let total = totals.entry(cluster).or_default();
        total.sum += value;
        total.n += 1.0;
    }
    totals.into_values().collect()
}

/// Percentile interval of the ratio of sums over resampled clusters, with percentiles moved outwards so that few
/// clusters do not make it too narrow (Hesterberg, "What Teachers Should Know about the Bootstrap", 2015).
fn bootstrap(clusters: &[Total], seed: u64, purpose: &str) -> [f64; 2] {
    let k = clusters.len();
    let mut random = stream(seed, &format!("bootstrap {purpose}"), 0);
    let mut means: Vec<f64> = (0..RESAMPLES)
        .map(|_| {
            let mut total = Total::default();
            for _ in 0..k {
                let c = clusters[random.random_range(0..k)];
                total.sum += c.sum;
                total.n += c.n;
            }
            total.sum / total.n
        })
        .collect();
    means.sort_by(f64::total_cmp);
    let k = k as f64;
    let tail = normal_cdf(-(k / (k - 1.0)).sqrt() * t_quantile_975(k - 1.0));
    [quantile(&means, tail), quantile(&means, 1.0 - tail)]
}

/// Share of sign flips, image by image, whose total difference is at least as large as the one observed.
fn permutation(clusters: &[Total], seed: u64, purpose: &str) -> f64 {
    let sums: Vec<f64> = clusters.iter().map(|c| c.sum).collect();
    let scale: f64 = sums.iter().map(|s| s.abs()).sum();
    let reached = sums.iter().sum::<f64>().abs() - 1e-9 * scale;
    if sums.len() <= ENUMERATED {
        let all = 1u32 << sums.len();
        let flip =
            |bits: u32| -> f64 { sums.iter().enumerate().map(|(i, s)| if bits >> i & 1 == 1 { -s } else { *s }).sum() };
        let hits = (0..all).filter(|bits| flip(*bits).abs() >= reached).count();
        return hits as f64 / f64::from(all);
    }
    let mut random = stream(seed, &format!("permutation {purpose}"), 0);
    let hits = (0..PERMUTATIONS)
        .filter(|_| {
            let total: f64 = sums.iter().map(|s| if random.random::<bool>() { -s } else { *s }).sum();
            total.abs() >= reached
        })
        .count();
    (hits + 1) as f64 / (PERMUTATIONS + 1) as f64
}

/// Smallest mean difference that a two-sided test at [`ALPHA`] finds with 80 % probability: the sum of both quantiles
/// times the standard error of a ratio of cluster sums.
fn detectable(clusters: &[Total]) -> f64 {
    const Z_80: f64 = 0.841_621_234;
    let (k, n) = (clusters.len() as f64, clusters.iter().map(|c| c.n).sum::<f64>());
    let mean = clusters.iter().map(|c| c.sum).sum::<f64>() / n;
    let squares: f64 = clusters.iter().map(|c| (c.sum - c.n * mean).powi(2)).sum();
    (t_quantile_975(k - 1.0) + Z_80) * (k / (k - 1.0) * squares).sqrt() / n
}

/// Linear interpolation between order statistics.
fn quantile(sorted: &[f64], q: f64) -> f64 {
    let at = q.clamp(0.0, 1.0) * (sorted.len() - 1) as f64;
    let (low, high) = (sorted[at.floor() as usize], sorted[at.ceil() as usize]);
    low + (high - low) * at.fract()
}

/// Abramowitz and Stegun 26.2.17; error below 7.5e-8.
fn normal_cdf(x: f64) -> f64 {
    let t = 1.0 / (1.0 + 0.231_641_9 * x.abs());
    let poly =
        t * (0.319_381_530 + t * (-0.356_563_782 + t * (1.781_477_937 + t * (-1.821_255_978 + t * 1.330_274_429))));
    let upper = (-x * x / 2.0).exp() / (2.0 * std::f64::consts::PI).sqrt() * poly;
    if x >= 0.0 { 1.0 - upper } else { upper }
}

/// 97.5 % quantile of Student's t: exact for one and two degrees of freedom, else Abramowitz and Stegun 26.7.5.
fn t_quantile_975(df: f64) -> f64 {
    if df < 1.5 {
        return 12.706_204_736;
    }
    if df < 2.5 {
        return 4.302_652_730;
    }
    let z = 1.959_963_985f64;
    let (z3, z5, z7) = (z.powi(3), z.powi(5), z.powi(7));
    let z9 = z.powi(9);
    z + (z3 + z) / (4.0 * df)
        + (5.0 * z5 + 16.0 * z3 + 3.0 * z) / (96.0 * df * df)
        + (3.0 * z7 + 19.0 * z5 + 17.0 * z3 - 15.0 * z) / (384.0 * df.powi(3))
        + (79.0 * z9 + 776.0 * z7 + 1482.0 * z5 - 1920.0 * z3 - 945.0 * z) / (92_160.0 * df.powi(4))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rows<'a>(names: &'a [String], values: &[f64]) -> Vec<Observation<'a>> {
        names.iter().zip(values).map(|(n, v)| Observation { cluster: n, value: *v }).collect()
    }

    fn names(n: usize, per_cluster: usize) -> Vec<String> {
        (0..n).map(|i| format!("image {}", i / per_cluster)).collect()
    }

    #[test]
    fn nothing_and_one_image_have_no_interval() {
        assert_eq!(estimate(&[], Unit::Share, 1, "x"), Estimate::default());
        let names = names(4, 4);
        let one = estimate(&rows(&names, &[0.0, 1.0, 1.0, 1.0]), Unit::Share, 1, "x");
        assert_eq!((one.n, one.clusters, one.value, one.interval), (4, 1, Some(0.75), None));
        let none = difference(&[], 1, "x");
        assert_eq!((none.value, none.p, none.finding), (None, None, Finding::TooFew));
        let one = difference(&[Pair { cluster: "a", base: 0.0, tuned: 1.0 }], 1, "x");
        assert_eq!((one.value, one.p, one.finding), (Some(1.0), None, Finding::TooFew));
    }

    #[test]
    fn all_zero_is_not_certainty() {
        let names = names(30, 1);
        let zero = estimate(&rows(&names, &[0.0; 30]), Unit::Share, 1, "x");
        let [low, high] = zero.interval.unwrap();
        assert_eq!(low, 0.0);
        // Clopper-Pearson for 0 of 30.
        assert!((high - 0.115_703).abs() < 1e-5, "{high}");
        let one = estimate(&rows(&names, &[1.0; 30]), Unit::Share, 1, "x").interval.unwrap();
        assert!((one[0] - (1.0 - high)).abs() < 1e-12 && one[1] == 1.0);
    }

    #[test]
    fn the_permutation_test_enumerates_small_cases_exactly() {
        // Five images, each better by 1: only the two extreme sign patterns of 32 reach the sum.
        let names = names(5, 1);
        let pairs: Vec<_> = names.iter().map(|n| Pair { cluster: n, base: 0.0, tuned: 1.0 }).collect();
        let d = difference(&pairs, 1, "x");
        assert_eq!(d.p, Some(2.0 / 32.0));
        assert_eq!(d.finding, Finding::NotShown);
        // With six it is 2/64 < 0.05.
        let names = super::tests::names(6, 1);
        let pairs: Vec<_> = names.iter().map(|n| Pair { cluster: n, base: 1.0, tuned: 0.0 }).collect();
        let d = difference(&pairs, 1, "x");
        assert_eq!((d.value, d.p, d.finding), (Some(-1.0), Some(2.0 / 64.0), Finding::Lower));
        let same: Vec<_> = names.iter().map(|n| Pair { cluster: n, base: 1.0, tuned: 1.0 }).collect();
        assert_eq!(difference(&same, 1, "x").finding, Finding::Identical);
        assert_eq!(difference(&same, 1, "x").p, Some(1.0));
    }

    #[test]
    fn copies_of_rows_within_an_image_add_no_confidence() {
        let (a, b) = (names(40, 1), names(400, 10));
        let values: Vec<f64> = (0..40).map(|i| f64::from(u8::from(i % 3 == 0))).collect();
        let copied: Vec<f64> = values.iter().flat_map(|v| [*v; 10]).collect();
        let single = estimate(&rows(&a, &values), Unit::Share, 1, "x");
        let many = estimate(&rows(&b, &copied), Unit::Share, 1, "x");
        assert_eq!((single.clusters, many.clusters), (40, 40));
        assert!((single.value.unwrap() - many.value.unwrap()).abs() < 1e-12);
        let width = |e: &Estimate| e.interval.unwrap()[1] - e.interval.unwrap()[0];
        assert!((width(&single) - width(&many)).abs() < 0.03, "{} {}", width(&single), width(&many));
        // Against the normal approximation with the number of images.
        let p = single.value.unwrap();
        let expected = 2.0 * 1.96 * (p * (1.0 - p) / 40.0f64).sqrt();
        assert!((width(&many) - expected).abs() < 0.05, "{} {expected}", width(&many));
    }

    #[test]
    fn intervals_cover_the_truth_about_as_often_as_they_say() {
        // 200 data sets of 25 images with 4 rows; images differ in their rate, whose mean is 0.4.
        let names = names(100, 4);
        let (mut covered, mut found) = (0, 0);
        for trial in 0..200 {
            let mut random = stream(7, "coverage", trial);
            let mut values = Vec::new();
            let mut pairs = Vec::new();
            for chunk in names.chunks(4) {
                let rate: f64 = 0.8 * random.random::<f64>();
                for name in chunk {
                    let mut draw = || f64::from(u8::from(random.random::<f64>() < rate));
                    let (base, tuned) = (draw(), draw());
                    values.push(base);
                    pairs.push(Pair { cluster: name, base, tuned });
                }
            }
            let [low, high] = estimate(&rows(&names, &values), Unit::Share, trial, "x").interval.unwrap();
            covered += usize::from(low <= 0.4 && 0.4 <= high);
            found += usize::from(matches!(difference(&pairs, trial, "x").finding, Finding::Lower | Finding::Higher));
        }
        assert!((180..=199).contains(&covered), "{covered} of 200");
        assert!(found <= 18, "{found} of 200 false findings");
    }

    #[test]
    fn holm_steps_down_and_takes_findings_back() {
        let with = |p: f64| Difference {
            n: 10,
            clusters: 10,
            value: Some(1.0),
            interval: Some([0.5, 1.5]),
            p: Some(p),
            p_holm: None,
            detectable: None,
            finding: if p < ALPHA { Finding::Higher } else { Finding::NotShown },
        };
        // Holm's own scheme: 4 * .01, then max with 3 * .013, 2 * .02, 1 * .6.
        let mut family = [with(0.02), with(0.01), with(0.6), with(0.013)];
        let mut few = Difference { p: None, finding: Finding::TooFew, ..with(0.9) };
        correct(family.iter_mut().chain([&mut few]));
        let found: Vec<f64> = family.iter().map(|d| d.p_holm.unwrap()).collect();
        for (found, expected) in found.iter().zip([0.04, 0.04, 0.6, 0.04]) {
            assert!((found - expected).abs() < 1e-12, "{found} {expected}");
        }
        assert_eq!((few.p_holm, few.finding), (None, Finding::TooFew));
        assert_eq!(family[0].finding, Finding::Higher);
        let mut family = [with(0.03), with(0.04), with(0.001)];
        correct(&mut family);
        assert_eq!(family[0].p_holm, Some(0.06));
        assert_eq!(family.map(|d| d.finding), [Finding::NotShown, Finding::NotShown, Finding::Higher]);
    }

    #[test]
    fn a_difference_of_the_detectable_size_is_found_four_times_in_five() {
        // 40 images with one row each; noise of known spread plus a shift of what the noise alone calls detectable.
        let names = names(40, 1);
        let normal = |random: &mut rand_chacha::ChaCha8Rng| (0..12).map(|_| random.random::<f64>()).sum::<f64>() - 6.0;
        let expected = (t_quantile_975(39.0) + 0.8416) / 40f64.sqrt();
        let (mut found, mut sizes) = (0, 0.0);
        for trial in 0..200 {
            let mut random = stream(11, "power", trial);
            let shifted: Vec<Pair<'_>> =
                names.iter().map(|n| Pair { cluster: n, base: 0.0, tuned: expected + normal(&mut random) }).collect();
            let d = difference(&shifted, trial, "x");
            sizes += d.detectable.unwrap() / 200.0;
            found += usize::from(d.finding == Finding::Higher);
        }
        assert!((sizes / expected - 1.0).abs() < 0.05, "{sizes} against {expected}");
        assert!((140..=180).contains(&found), "{found} of 200");
    }

    #[test]
    fn order_of_rows_changes_nothing() {
        let names = names(60, 3);
        let values: Vec<f64> = (0..60).map(|i| f64::from(i % 7)).collect();
        let mut rows = rows(&names, &values);
        let first = estimate(&rows, Unit::Score, 3, "x");
        rows.reverse();
        assert_eq!(estimate(&rows, Unit::Score, 3, "x"), first);
        assert_ne!(estimate(&rows, Unit::Score, 4, "x").interval, first.interval);
    }

    #[test]
    fn quantiles_agree_with_tables() {
        assert!((normal_cdf(1.959_964) - 0.975).abs() < 1e-6);
        assert!((normal_cdf(-1.0) - 0.158_655).abs() < 1e-6);
        for (df, t) in [(1.0, 12.706), (2.0, 4.3027), (4.0, 2.7764), (10.0, 2.2281), (100.0, 1.9840)] {
            assert!((t_quantile_975(df) - t).abs() < 5e-3, "{df}: {}", t_quantile_975(df));
        }
    }

    #[test]
    fn majority_is_the_most_frequent_class() {
        assert_eq!(majority(["yes", "no", "no"]), Some(("no".into(), 2.0 / 3.0)));
        assert_eq!(majority(["yes", "no"]), Some(("no".into(), 0.5)));
        assert_eq!(majority(std::iter::empty()), None);
    }
}
