//! What quality control remembers of the rows it has kept, to compare later ones with: hashes and short codes of words,
//! never the rows themselves. About 300 bytes a row.

use std::collections::{HashMap, HashSet};

use rand::Rng;

use super::{
    QcConfig,
    hash::{hash, hash_parts, mix},
    is_constructed, template,
    words::{Codes, codes, normal, overlap, pairs},
};
use crate::{
    random::stream,
    sample::{Role, Sample},
};

/// Bands of a signature; rows that agree in one of them are compared.
const BANDS: usize = 10;

/// Hashes of a band: with ten bands of four, 99.5 % of the pairs that share 80 % of their word pairs are compared, and
/// 2 % of those that share 20 %.
const BAND_ROWS: usize = 4;

/// Share of common word pairs from which two long texts count as the same.
pub const SAME_TEXT: f64 = 0.8;

/// Rows of one image that a row is compared with, the latest ones; more only occur where a group is no image.
const WITHIN_GROUP: usize = 512;

/// Rows that are remembered under one band; a hundred copies of one text need no hundred entries.
const PER_BAND: usize = 8;

/// The hash functions of signatures.
#[derive(Debug, Clone)]
pub struct MinHash {
    seeds: [u64; BANDS * BAND_ROWS],
    long_text_words: usize,
}

impl MinHash {
    fn new(seed: u64, long_text_words: usize) -> Self {
        let mut rng = stream(seed, "minhash", 0);
        Self { seeds: std::array::from_fn(|_| rng.next_u64()), long_text_words }
    }

    /// Hash of each band; two texts agree in a band with the fourth power of the share of word pairs they have in common.
    fn bands(&self, shingles: &[u32]) -> [u64; BANDS] {
        let least = |seed: u64| shingles.iter().map(|s| mix(u64::from(*s) ^ seed)).min().unwrap_or(seed);
        std::array::from_fn(|band| {
            let part = &self.seeds[band * BAND_ROWS..(band + 1) * BAND_ROWS];
            part.iter().fold(band as u64, |h, seed| mix(h.rotate_left(17) ^ least(*seed)))
        })
    }
}

/// A row as it is compared with others.
#[derive(Debug, Clone)]
pub struct Row {
    /// Hash of its group.
    pub(super) group: u64,
    /// Hash of group, question and answer.
    pub(super) pair: u64,
    /// Hash of question and answer.
    pub(super) text: u64,
    /// Words of all questions and of all answers; empty for rows of visual question answering.
    pub(super) question: Codes,
    pub(super) answer: Codes,
    /// First words of the answer.
    pub(super) opening: Option<String>,
    /// Bands of its signature, when it is long.
    pub(super) bands: Option<[u64; BANDS]>,
}

impl Row {
    /// What of `sample` is compared.
    #[must_use]
    pub fn new(sample: &Sample, hashes: &MinHash) -> Self {
        let said = |role: Role| {
            let texts = sample.turns.iter().filter(|t| t.role == role).map(|t| normal(&t.text));
            texts.collect::<Vec<_>>().join("\n")
        };
        let (question, answer) = (said(Role::User), said(Role::Assistant));
        let compared = is_constructed(sample);
        let words = |text: &str| if compared { codes(text) } else { Codes::default() };
        let (asked, answered) = (words(&question), words(&answer));
        let length = asked.len() + answered.len();
        let long = compared && hashes.long_text_words > 0 && length >= hashes.long_text_words;
        Self {
            group: hash(sample.group.as_bytes()),
            pair: hash_parts(&[&sample.group, &question, &answer]),
            text: hash_parts(&[&question, &answer]),
            bands: long.then(|| hashes.bands(&pairs(&asked, &answered))),
            question: asked,
            answer: answered,
            opening: template::opening(sample),
        }
    }

    /// Whether it is a constructed instruction.
    pub(super) fn is_constructed(&self) -> bool {
        !self.answer.is_empty()
    }
}

/// The rows kept so far.
#[derive(Debug)]
pub struct Memory {
    pub(super) pairs: HashSet<u64>,
    pub(super) texts: HashMap<u64, u32>,
    pub(super) openings: HashMap<u64, u32>,
    /// Most rows that may share an opening.
    pub(super) opening_limit: usize,
    /// Most rows of different images that may be the same text.
    pub(super) max_repeats: usize,
    rows: Vec<Text>,
    last_of_group: HashMap<u64, u32>,
    bands: Bands,
    hashes: MinHash,
}

/// Words of a kept row.
#[derive(Debug)]
struct Text {
    /// Codes of the question, then of the answer.
    words: Box<[u16]>,
    answer_at: u16,
    /// The row of the same group before it, counted from 1; 0 for none.
    before: u32,
}

impl Text {
    fn parts(&self) -> (&[u16], &[u16]) {
        self.words.split_at(usize::from(self.answer_at).min(self.words.len()))
    }
}

impl Memory {
    /// Before the first of `rows` rows, of which `constructed` are constructed instructions.
    #[must_use]
    pub fn new(rows: usize, constructed: usize, config: &QcConfig, seed: u64) -> Self {
        let limit = (config.max_template_share * constructed as f64).ceil() as usize;
        let across = config.long_text_words > 0;
        Self {
            pairs: HashSet::new(),
            texts: HashMap::new(),
            openings: HashMap::new(),
            // A share of a handful of rows says nothing.
            opening_limit: if config.max_template_share >= 1.0 { usize::MAX } else { limit.max(10) },
            max_repeats: if config.max_repeats == 0 { usize::MAX } else { config.max_repeats },
            rows: Vec::new(),
            last_of_group: HashMap::new(),
            bands: Bands::new(if across { rows.min(constructed) } else { 0 }),
            hashes: MinHash::new(seed, config.long_text_words),
        }
    }

    /// The hash functions that rows are prepared with.
    #[must_use]
    pub fn hashes(&self) -> MinHash {
        self.hashes.clone()
    }

    /// Remembers a row that passed all rules.
    pub fn remember(&mut self, row: &Row) {
        self.pairs.insert(row.pair);
        if let Some(opening) = &row.opening {
            *self.openings.entry(hash(opening.as_bytes())).or_default() += 1;
        }
        if !row.is_constructed() {
            return;
        }
        *self.texts.entry(row.text).or_default() += 1;
        let number = self.rows.len() as u32 + 1;
        let before = self.last_of_group.insert(row.group, number).unwrap_or(0);
        let words: Box<[u16]> = row.question.iter().chain(row.answer.iter()).copied().collect();
        let answer_at = row.question.len().min(usize::from(u16::MAX)) as u16;
        self.rows.push(Text { words, answer_at, before });
        if let Some(bands) = &row.bands {
            self.bands.add(bands, number);
        }
    }

    /// Whether a kept row of the same group has nearly this question and this answer.
    pub(super) fn near_in_group(&self, row: &Row) -> bool {
        let mut next = self.last_of_group.get(&row.group).copied().unwrap_or(0);
        for _ in 0..WITHIN_GROUP {
            let Some(text) = next.checked_sub(1).and_then(|i| self.rows.get(i as usize)) else { return false };
            let (question, answer) = text.parts();
            if row.question.is_near(question) && row.answer.is_near(answer) {
                return true;
            }
            next = text.before;
        }
        false
    }

    /// Share of common word pairs of a kept row of any group that has nearly this text; none when the row is short.
    pub(super) fn near_anywhere(&self, row: &Row) -> Option<f64> {
        let candidates = self.bands.find(row.bands.as_ref()?);
        let own = pairs(&row.question, &row.answer);
        candidates.into_iter().find_map(|number| {
            let (question, answer) = self.rows.get(number as usize - 1)?.parts();
            let share = overlap(&own, &pairs(question, answer));
            let same_facts = row.question.same_facts(question) && row.answer.same_facts(answer);
            (share >= SAME_TEXT && same_facts).then_some(share)
        })
    }
}

/// Rows by the bands of their signatures: open addressing in a table of fixed size, eight bytes an entry.
#[derive(Debug)]
struct Bands {
    slots: Vec<(u32, u32)>,
}

impl Bands {
    fn new(rows: usize) -> Self {
        let size = if rows == 0 { 0 } else { rows * BANDS * 13 / 10 + 64 };
        Self { slots: vec![(0, 0); size] }
    }

    fn place(&self, key: u64) -> (usize, u32) {
        // The high bits choose the slot, the low bits tell entries of neighbouring slots apart.
        let slot = ((u128::from(key) * self.slots.len() as u128) >> 64) as usize;
        (slot, key as u32)
    }

    fn add(&mut self, bands: &[u64; BANDS], number: u32) {
        for key in bands {
            if self.slots.is_empty() {
                return;
            }
            let (mut slot, tag) = self.place(*key);
            let mut same = 0;
            while self.slots[slot].1 != 0 && same < PER_BAND {
                same += usize::from(self.slots[slot].0 == tag);
                slot = (slot + 1) % self.slots.len();
            }
            if self.slots[slot].1 == 0 && same < PER_BAND {
                self.slots[slot] = (tag, number);
            }
        }
    }

    /// Rows that agree in a band, earliest first.
    fn find(&self, bands: &[u64; BANDS]) -> Vec<u32> {
        let mut found = Vec::new();
        for key in bands {
            if self.slots.is_empty() {
                break;
            }
            let (mut slot, tag) = self.place(*key);
            let mut same = 0;
            while self.slots[slot].1 != 0 && same < PER_BAND {
                if self.slots[slot].0 == tag {
                    same += 1;
                    found.push(self.slots[slot].1);
                }
                slot = (slot + 1) % self.slots.len();
            }
        }
        found.sort_unstable();
        found.dedup();
        found
    }
}
