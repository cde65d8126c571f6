//! Text as the rules compare it.

use std::collections::BTreeSet;

/// Lower case, without marks, single blanks.
#[must_use]
pub fn normal(text: &str) -> String {
    let clean: String = text
        .replace("<image>", " ")
        .chars()
        .map(|c| if c.is_alphanumeric() { c.to_lowercase().next().unwrap_or(c) } else { ' ' })
        .collect();
    clean.split_whitespace().collect::<Vec<_>>().join(" ")
}

/// The different words of a normalised text.
#[must_use]
pub fn set(normal: &str) -> BTreeSet<String> {
    normal.split(' ').filter(|w| !w.is_empty()).map(str::to_string).collect()
}

/// Share of words that two sets have in common, 0 to 1; 0 if both are empty.
#[must_use]
pub fn jaccard(a: &BTreeSet<String>, b: &BTreeSet<String>) -> f64 {
    let common = a.intersection(b).count();
    let all = a.len() + b.len() - common;
    if all == 0 { 0.0 } else { common as f64 / all as f64 }
}

/// All messages of a row in one lower-case text with single blanks and their marks.
#[must_use]
pub fn spoken(sample: &crate::sample::Sample) -> String {
    let all: Vec<&str> = sample.turns.iter().flat_map(|t| t.text.split_whitespace()).collect();
    all.join(" ").to_lowercase().replace('\u{2019}', "'")
}
