//! METEOR as nltk computes it (`nltk.translate.meteor_score.single_meteor_score` with its defaults), on words between
//! white space.
//!
//! Words are matched from the last to the first: equal words, then equal stems, then stems that share a WordNet synset.
//! The third stage looks up stems, not words, as the original does; most stems are in no dictionary, so it finds less
//! than the published metric describes. Nothing here minimises crossings, as nothing there does.

use std::hash::Hash;

use rayon::prelude::*;
use rustc_hash::FxHashMap;

use super::{
    porter::stem,
    text::{Pair, TextMetric, TextMetricDef, TextMetricOptions, words},
    wordnet::WordNet,
};
use crate::error::Result;

/// METEOR.
pub const METEOR: TextMetricDef = TextMetricDef {
    key: "meteor",
    name: "METEOR",
    about: "Harmonic mean of precision and recall over words matched by form, stem or synonym, less a penalty for broken order.",
    signature: SIGNATURE,
    open: |_: &TextMetricOptions| Ok(Box::new(Meteor { wordnet: WordNet::embedded()? })),
};

const SIGNATURE: &str = "meteor|v1|rule=nltk 3.9 single_meteor_score alpha 0.9 beta 3 gamma 0.5|words=white space, lower case|stem=Porter nltk|synonyms=WordNet 3.0";

/// Weight of recall against precision.
const ALPHA: f64 = 0.9;
/// Exponent of the share of chunks.
const BETA: i32 = 3;
/// Largest penalty.
const GAMMA: f64 = 0.5;

/// METEOR with its WordNet table.
#[derive(Debug)]
pub struct Meteor {
    wordnet: &'static WordNet,
}

/// How the words of an answer are matched with those of the reference.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Alignment {
    /// Pairs matched by form.
    pub exact: usize,
    /// Pairs matched by stem.
    pub stem: usize,
    /// Pairs matched by synonym.
    pub synonym: usize,
    /// Positions in answer and reference, in the order of the answer.
    pub pairs: Vec<(usize, usize)>,
    /// Runs of pairs that are neighbours on both sides.
    pub chunks: usize,
    /// Words of the answer.
    pub answer_words: usize,
    /// Words of the reference.
    pub reference_words: usize,
}

impl Alignment {
    /// The score, from 0 to 1.
    #[must_use]
    pub fn score(&self) -> f64 {
        if self.pairs.is_empty() {
            return 0.0;
        }
        let matches = self.pairs.len() as f64;
        let (precision, recall) = (matches / self.answer_words as f64, matches / self.reference_words as f64);
        let mean = precision * recall / (ALPHA * precision + (1.0 - ALPHA) * recall);
        (1.0 - GAMMA * (self.chunks as f64 / matches).powi(BETA)) * mean
    }
}

impl Meteor {
    /// METEOR with the embedded table.
    ///
    /// # Errors
    /// The table is damaged.
    pub fn new() -> Result<Self> {
        Ok(Self { wordnet: WordNet::embedded()? })
    }

    /// Matches the words of `answer` with those of `reference`.
    #[must_use]
    pub fn align(&self, answer: &str, reference: &str) -> Alignment {
        let (answer, reference) = (answer.to_lowercase(), reference.to_lowercase());
        let mut said: Vec<(usize, &str)> = words(&answer).enumerate().collect();
        let mut wanted: Vec<(usize, &str)> = words(&reference).enumerate().collect();
        let mut found = Alignment { answer_words: said.len(), reference_words: wanted.len(), ..Alignment::default() };
        found.exact = equal(&mut said, &mut wanted, &mut found.pairs);
        let stems = |words: Vec<(usize, &str)>| words.into_iter().map(|(i, w)| (i, stem(w))).collect::<Vec<_>>();
        let (mut said, mut wanted) = (stems(said), stems(wanted));
        found.stem = equal(&mut said, &mut wanted, &mut found.pairs);
        found.synonym = self.synonyms(&said, &wanted, &mut found.pairs);
        found.pairs.sort_unstable();
        let broken = |w: &[(usize, usize)]| w[1].0 != w[0].0 + 1 || w[1].1 != w[0].1 + 1;
        found.chunks = usize::from(!found.pairs.is_empty()) + found.pairs.windows(2).filter(|w| broken(w)).count();
        found
    }

    /// Matches each word, last first, with the last free one that is a synonym of it.
    fn synonyms(&self, said: &[(usize, String)], wanted: &[(usize, String)], pairs: &mut Vec<(usize, usize)>) -> usize {
        if said.is_empty() || wanted.is_empty() {
            return 0;
        }
        let mut free = places(wanted.iter().map(|(i, w)| (*i, w.as_str())));
        let before = pairs.len();
        for (i, word) in said.iter().rev() {
            let mut best: Option<(usize, &str)> = None;
            let mut offer = |synonym: &str| {
                if let Some((key, stack)) = free.get_key_value(synonym)
                    && let Some(&last) = stack.last()
                    && best.is_none_or(|(place, _)| last > place)
                {
                    best = Some((last, key));
                }
            };
            offer(word);
            self.wordnet.synonyms(word, offer);
            if let Some((place, key)) = best {
                free.get_mut(key).map(Vec::pop);
                pairs.push((*i, place));
            }
        }
        pairs.len() - before
    }
}

/// Positions of each word, ascending.
fn places<K: Hash + Eq>(words: impl Iterator<Item = (usize, K)>) -> FxHashMap<K, Vec<usize>> {
    let mut places: FxHashMap<K, Vec<usize>> = FxHashMap::default();
    for (i, word) in words {
        places.entry(word).or_default().push(i);
    }
    places
}

/// Matches each word, last first, with the last free one that equals it; both leave their lists.
fn equal<W: Hash + Eq + Clone>(
    said: &mut Vec<(usize, W)>,
    wanted: &mut Vec<(usize, W)>,
    pairs: &mut Vec<(usize, usize)>,
) -> usize {
    let mut free = places(wanted.iter().map(|(i, w)| (*i, w)));
    let before = pairs.len();
    let mut rest = Vec::new();
    for (i, word) in said.drain(..).rev() {
        match free.get_mut(&word).and_then(Vec::pop) {
            Some(place) => pairs.push((i, place)),
            None => rest.push((i, word)),
        }
    }
    rest.reverse();
    *said = rest;
    let mut taken: Vec<usize> = pairs[before..].iter().map(|(_, place)| *place).collect();
    taken.sort_unstable();
    wanted.retain(|(i, _)| taken.binary_search(i).is_err());
    taken.len()
}

impl TextMetric for Meteor {
    fn signature(&self) -> String {
        SIGNATURE.into()
    }

    fn score_pairs(&self, pairs: &[Pair<'_>]) -> Result<Vec<f64>> {
        Ok(pairs.par_iter().map(|p| self.align(p.answer, p.reference).score()).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn align(answer: &str, reference: &str) -> Alignment {
        Meteor::new().unwrap().align(answer, reference)
    }

    #[test]
    fn an_identical_sentence_lacks_the_penalty_of_one_chunk() {
        assert_eq!(align("nodule", "Nodule").score(), 0.5);
        assert!((align("no nodule is seen", "no nodule is seen").score() - (1.0 - 0.5 / 64.0)).abs() < 1e-12);
        assert_eq!(align("", "nodule").score(), 0.0);
        assert_eq!(align("nodule", " \u{1c}").score(), 0.0);
        assert_eq!(align("abnormal", "normal").score(), 0.0);
    }

    #[test]
    fn stages_match_the_last_free_word() {
        let found = align("the cat the", "the the cat sat the");
        assert_eq!((found.exact, found.pairs, found.chunks), (3, vec![(0, 1), (1, 2), (2, 4)], 2));
        let found = align("tumors shown", "a tumour shows");
        assert_eq!((found.exact, found.stem, found.synonym), (0, 0, 2));
        let found = align("calcified nodules", "nodule calcifications");
        assert_eq!((found.exact, found.stem, found.synonym), (0, 1, 0));
    }
}
