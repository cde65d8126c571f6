//! Metrics that compare an answer with a reference answer, as text.

use std::{hash::Hash, path::PathBuf};

use burn::tensor::Device;
use rustc_hash::FxHashMap;

use super::{bertscore, bleu, meteor, rouge};
use crate::error::Result;

/// An answer and what it is compared with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Pair<'a> {
    /// What the model said.
    pub answer: &'a str,
    /// What is known to be right.
    pub reference: &'a str,
}

/// A metric that is ready to score: tables are read, models are loaded.
pub trait TextMetric: Send + Sync {
    /// Exact definition: rule, version, parameters, model. Numbers with different signatures are not comparable.
    fn signature(&self) -> String;

    /// One value for each pair, in their order; the value of a data set is the mean. A pair's value does not depend on
    /// the other pairs, unless the signature says otherwise.
    ///
    /// # Errors
    /// The device or the model failed; no text is an error.
    fn score_pairs(&self, pairs: &[Pair<'_>]) -> Result<Vec<f64>>;
}

/// What a text metric needs to know before it can score.
#[derive(Debug, Clone)]
pub struct TextMetricOptions {
    /// Where models run.
    pub device: Device,
    /// BERTScore: directory of a RoBERTa or BERT checkpoint in Hugging Face layout, or the name of one on the hub;
    /// `roberta-large` by default.
    pub bertscore_model: Option<String>,
    /// BERTScore: the layer whose states are compared; by default bert_score's choice for the model.
    pub bertscore_layer: Option<usize>,
    /// BERTScore: weigh tokens by their rarity among the references of one call of [`TextMetric::score_pairs`].
    pub bertscore_idf: bool,
    /// BERTScore: file with the baseline that scores are rescaled by, as bert_score has one for each model.
    pub bertscore_baseline: Option<PathBuf>,
    /// BERTScore: texts encoded at once.
    pub bertscore_batch_size: usize,
    /// Whether a model that is not on this machine may be downloaded.
    pub download: bool,
}

impl TextMetricOptions {
    /// Defaults of the original tools, on `device`; nothing is downloaded.
    #[must_use]
    pub fn new(device: Device) -> Self {
        Self {
            device,
            bertscore_model: None,
            bertscore_layer: None,
            bertscore_idf: false,
            bertscore_baseline: None,
            bertscore_batch_size: 64,
            download: false,
        }
    }
}

/// A text metric as lists show it.
#[derive(Debug)]
pub struct TextMetricDef {
    /// Stable key in result files.
    pub key: &'static str,
    /// Name in tables.
    pub name: &'static str,
    /// What it measures, one sentence.
    pub about: &'static str,
    /// The signature with default options; an open metric has its own.
    pub signature: &'static str,
    /// Makes it ready to score.
    pub open: fn(&TextMetricOptions) -> Result<Box<dyn TextMetric>>,
}

/// All text metrics in table order. Larger is better and values are shares from 0 to 1, except that BERTScore may be
/// negative.
pub const TEXT_METRICS: &[&TextMetricDef] =
    &[&bertscore::BERTSCORE, &meteor::METEOR, &rouge::ROUGE_1, &rouge::ROUGE_2, &rouge::ROUGE_L, &bleu::BLEU];

/// Words between white space, as Python's `str.split` finds them.
pub fn words(text: &str) -> impl Iterator<Item = &str> {
    text.split(is_white_space).filter(|w| !w.is_empty())
}

/// What Python takes for white space: what Unicode does, and four separators of ASCII.
pub(crate) fn is_white_space(c: char) -> bool {
    c.is_whitespace() || ('\u{1c}'..='\u{1f}').contains(&c)
}

/// Words as numbers, the same number for the same word.
pub(super) fn numbered<W: Hash + Eq>(texts: [impl IntoIterator<Item = W>; 2]) -> [Vec<u32>; 2] {
    let mut known = FxHashMap::default();
    texts.map(|words| {
        let number = |word| {
            let next = known.len() as u32;
            *known.entry(word).or_insert(next)
        };
        words.into_iter().map(number).collect()
    })
}

/// How many runs of `n` words of the answer the reference has too, each as often as the reference has it.
pub(super) fn shared_ngrams<W: Hash + Eq>(answer: &[W], reference: &[W], n: usize) -> usize {
    let mut open: FxHashMap<&[W], u32> = FxHashMap::default();
    open.reserve(reference.len());
    for gram in reference.windows(n) {
        *open.entry(gram).or_default() += 1;
    }
    let mut hits = 0;
    for gram in answer.windows(n) {
        if let Some(left) = open.get_mut(gram)
            && *left > 0
        {
            *left -= 1;
            hits += 1;
        }
    }
    hits
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn keys_and_signatures_are_unique_and_belong_together() {
        let keys: BTreeSet<_> = TEXT_METRICS.iter().map(|m| m.key).collect();
        assert_eq!(keys.len(), TEXT_METRICS.len());
        for m in TEXT_METRICS {
            assert!(m.signature.starts_with(&format!("{}|v", m.key)), "{}", m.signature);
            assert!(m.about.ends_with('.'), "{}", m.key);
        }
    }

    #[test]
    fn python_splits_at_separators_but_not_at_zero_width_characters() {
        let found: Vec<&str> = words(" a\u{1c}b\u{1f}\u{a0}c\u{85}d\u{200b}e\u{feff} ").collect();
        assert_eq!(found, ["a", "b", "c", "d\u{200b}e\u{feff}"]);
    }
}
