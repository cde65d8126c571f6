//! Text as the rules compare it.

use std::{collections::HashSet, ops::Deref, sync::LazyLock};

use super::hash::hash;

/// Share of common words from which two texts count as the same.
const SAME_WORDS: f64 = 0.8;

/// ROUGE-L, the F measure of the longest common subsequence, from which two texts count as the same.
const SAME_ORDER: f64 = 0.85;

/// Words of which one decides what is said: texts that differ in them are different, however much else they share.
const TELLING: &str = "no not none without never neither nor absent present yes left right bilateral unilateral both \
    upper lower middle mid top bottom anterior posterior medial lateral superior inferior proximal distal central \
    peripheral apical basal dorsal ventral frontal occipital temporal parietal axial coronal sagittal small tiny large \
    big huge larger smaller mild moderate severe minimal massive single solitary multiple several one two three four \
    five six seven eight nine ten zero first second third normal abnormal benign malignant acute chronic increased \
    decreased enlarged reduced dilated narrowed hyperdense hypodense hyperintense hypointense high low bright dark \
    white black grey red blue green yellow brown male female";

static TELLING_WORDS: LazyLock<HashSet<&str>> = LazyLock::new(|| TELLING.split_whitespace().collect());

/// Bit of a code that marks a telling word.
const TELLS: u16 = 1 << 15;

/// Lower case, without marks, single blanks.
#[must_use]
pub fn normal(text: &str) -> String {
    let text = text.replace("<image>", " ");
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        if c.is_alphanumeric() {
            out.push(c.to_lowercase().next().unwrap_or(c));
        } else if !out.is_empty() && !out.ends_with(' ') {
            out.push(' ');
        }
    }
    if out.ends_with(' ') {
        out.pop();
    }
    out
}

/// All messages of a row in one lower-case text with single blanks and their marks.
#[must_use]
pub fn spoken(sample: &crate::sample::Sample) -> String {
    let all: Vec<&str> = sample.turns.iter().flat_map(|t| t.text.split_whitespace()).collect();
    all.join(" ").to_lowercase().replace('\u{2019}', "'")
}

/// The words of a text in order, as codes of 16 bits: 15 of a hash, and one that says whether the word is telling.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Codes(Vec<u16>);

impl Deref for Codes {
    type Target = [u16];

    fn deref(&self) -> &[u16] {
        &self.0
    }
}

/// Codes of the words of a normalised text.
#[must_use]
pub fn codes(normal: &str) -> Codes {
    let code = |word: &str| {
        let telling = TELLING_WORDS.contains(word) || word.bytes().any(|b| b.is_ascii_digit());
        (hash(word.as_bytes()) as u16 & !TELLS) | if telling { TELLS } else { 0 }
    };
    Codes(normal.split_whitespace().map(code).collect())
}

impl Codes {
    /// Whether `other` says the same with nearly the same words: most words in common, or most of them in the same
    /// order, and every telling word.
    #[must_use]
    pub fn is_near(&self, other: &[u16]) -> bool {
        if self.0 == other {
            return true;
        }
        let (a, b) = (set(&self.0), set(other));
        let common = common(&a, &b);
        let jaccard = common as f64 / (a.len() + b.len() - common).max(1) as f64;
        // No subsequence is longer than the words in common, which is quicker to know.
        let most = |n: usize| 2.0 * n as f64 / (self.0.len() + other.len()).max(1) as f64;
        let near = jaccard >= SAME_WORDS
            || most(self.0.len().min(other.len())) >= SAME_ORDER
                && jaccard >= 0.5
                && most(longest_common(&self.0, other)) >= SAME_ORDER;
        near && self.same_facts(other)
    }

    /// Whether both have the same telling words.
    #[must_use]
    pub fn same_facts(&self, other: &[u16]) -> bool {
        let telling = |codes: &[u16]| set(codes).into_iter().filter(|c| c & TELLS != 0).collect::<Vec<_>>();
        telling(&self.0) == telling(other)
    }
}

fn set(codes: &[u16]) -> Vec<u16> {
    let mut set = codes.to_vec();
    set.sort_unstable();
    set.dedup();
    set
}

/// Length of the longest common subsequence.
fn longest_common(a: &[u16], b: &[u16]) -> usize {
    let mut row = vec![0usize; b.len() + 1];
    for x in a {
        let mut diagonal = 0;
        for (j, y) in b.iter().enumerate() {
            let above = row[j + 1];
            row[j + 1] = if x == y { diagonal + 1 } else { above.max(row[j]) };
            diagonal = above;
        }
    }
    row[b.len()]
}

/// Neighbouring words of a question and of its answer, sorted, each once.
#[must_use]
pub fn pairs(question: &[u16], answer: &[u16]) -> Vec<u32> {
    let neighbours =
        |text: &[u16]| -> Vec<u32> { text.windows(2).map(|w| u32::from(w[0]) << 16 | u32::from(w[1])).collect() };
    let mut all = neighbours(question);
    all.extend(neighbours(answer));
    all.sort_unstable();
    all.dedup();
    all
}

/// Share of items that two sorted sets have in common, 0 to 1; 0 if both are empty.
#[must_use]
pub fn overlap(a: &[u32], b: &[u32]) -> f64 {
    let common = common(a, b);
    common as f64 / (a.len() + b.len() - common).max(1) as f64
}

/// Items that two sorted sets have in common.
fn common<T: Ord>(a: &[T], b: &[T]) -> usize {
    let (mut i, mut j, mut n) = (0, 0, 0);
    while i < a.len() && j < b.len() {
        match a[i].cmp(&b[j]) {
            std::cmp::Ordering::Less => i += 1,
            std::cmp::Ordering::Greater => j += 1,
            std::cmp::Ordering::Equal => (i, j, n) = (i + 1, j + 1, n + 1),
        }
    }
    n
}

#[cfg(test)]
mod tests {
    use super::*;

    fn near(a: &str, b: &str) -> bool {
        codes(&normal(a)).is_near(&codes(&normal(b)))
    }

    #[test]
    fn normal_text_has_single_blanks_and_no_marks() {
        assert_eq!(normal("  <image>\nIs it -- LARGE? Ja, Größe 3.5 "), "is it large ja größe 3 5");
        assert_eq!(normal("..."), "");
    }

    #[test]
    fn paraphrases_are_near_and_other_facts_are_not() {
        assert!(near("Can you see a nodule here?", "Can you see a nodule in here?"));
        assert!(near("The heart is of the usual size and shape here", "The heart is here of the usual size and shape"));
        assert!(!near("There is a nodule in the left lung.", "There is a nodule in the right lung."));
        assert!(!near(
            "A mass of 3 cm is seen in the liver of this patient",
            "A mass of 5 cm is seen in the liver of this patient"
        ));
        assert!(!near("There is a nodule there.", "There is no nodule there."));
    }

    #[test]
    fn subsequences_and_overlaps() {
        assert_eq!(longest_common(&[1, 2, 3, 4], &[2, 4, 3]), 2);
        assert_eq!(overlap(&[1, 2, 3], &[2, 3, 4]), 0.5);
        assert_eq!((overlap(&[], &[]), pairs(&[1, 2], &[]).len()), (0.0, 1));
    }
}
