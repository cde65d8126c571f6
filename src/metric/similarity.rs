//! Similarity of two texts as Python's `difflib.SequenceMatcher(None, a, b).ratio()` computes it: Ratcliff and
//! Obershelp's matching blocks over characters, with difflib's habit of ignoring what is frequent in long texts.
//!
//! The evaluation scripts of OmniMedVQA, PMC-VQA and MedEvalKit find the option that a reply means by it.

use std::collections::HashMap;

/// From this length on, frequent characters of `b` start no match.
const AUTOJUNK_LENGTH: usize = 200;

/// `2 M / T`, where `M` characters match and both texts have `T` together; 1 for two empty texts.
///
/// ```
/// # use medtune::metric::similarity::ratio;
/// assert_eq!(ratio("normal", "abnormal"), 12.0 / 14.0);
/// ```
#[must_use]
pub fn ratio(a: &str, b: &str) -> f64 {
    let (a, b): (Vec<char>, Vec<char>) = (a.chars().collect(), b.chars().collect());
    let total = a.len() + b.len();
    if total == 0 {
        return 1.0;
    }
    let matcher = Matcher { places: places(&b), a: &a, b: &b };
    2.0 * matcher.matched() as f64 / total as f64
}

/// Index of the text most similar to `reply`, the first of equals; none if nothing is similar at all.
#[must_use]
pub fn most_similar<S: AsRef<str>>(texts: &[S], reply: &str) -> Option<usize> {
    let mut best = (None, 0.0);
    for (i, text) in texts.iter().enumerate() {
        let found = ratio(text.as_ref(), reply);
        if found > best.1 {
            best = (Some(i), found);
        }
    }
    best.0
}

/// Places of each character of `b` that may start a match, ascending.
fn places(b: &[char]) -> HashMap<char, Vec<usize>> {
    let mut places: HashMap<char, Vec<usize>> = HashMap::new();
    for (i, c) in b.iter().enumerate() {
        places.entry(*c).or_default().push(i);
    }
    if b.len() >= AUTOJUNK_LENGTH {
        places.retain(|_, found| found.len() <= b.len() / 100 + 1);
    }
    places
}

struct Matcher<'a> {
    places: HashMap<char, Vec<usize>>,
    a: &'a [char],
    b: &'a [char],
}

impl Matcher<'_> {
    /// Characters in matching blocks: the longest block, then those on its left and right.
    fn matched(&self) -> usize {
        let mut open = vec![(0, self.a.len(), 0, self.b.len())];
        let mut matched = 0;
        while let Some((a_from, a_to, b_from, b_to)) = open.pop() {
            let (i, j, size) = self.longest(a_from, a_to, b_from, b_to);
            if size > 0 {
                matched += size;
                open.push((a_from, i, b_from, j));
                open.push((i + size, a_to, j + size, b_to));
            }
        }
        matched
    }

    /// Longest block in the ranges, the earliest in `a` and then in `b`.
    fn longest(&self, a_from: usize, a_to: usize, b_from: usize, b_to: usize) -> (usize, usize, usize) {
        let (mut i, mut j, mut size) = (a_from, b_from, 0);
        let mut ending: HashMap<usize, usize> = HashMap::new();
        for at in a_from..a_to {
            let mut next = HashMap::new();
            for &place in self.places.get(&self.a[at]).map_or(&[][..], |p| p) {
                if place < b_from {
                    continue;
                }
                if place >= b_to {
                    break;
                }
                let length = place.checked_sub(1).and_then(|p| ending.get(&p)).copied().unwrap_or(0) + 1;
                next.insert(place, length);
                if length > size {
                    (i, j, size) = (at + 1 - length, place + 1 - length, length);
                }
            }
            ending = next;
        }
        // What starts no match may still lengthen one.
        while i > a_from && j > b_from && self.a[i - 1] == self.b[j - 1] {
            (i, j, size) = (i - 1, j - 1, size + 1);
        }
        while i + size < a_to && j + size < b_to && self.a[i + size] == self.b[j + size] {
            size += 1;
        }
        (i, j, size)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ratios_and_ties() {
        assert_eq!(ratio("", ""), 1.0);
        assert_eq!(ratio("CT", "TC"), 0.5);
        assert_eq!(most_similar(&["CT", "MRI"], "?"), None);
        assert_eq!(most_similar(&["ab", "ba"], "a"), Some(0));
    }

    #[test]
    fn frequent_characters_of_a_long_text_start_no_match() {
        assert_eq!(ratio("aaa", &format!("b{}", "a".repeat(198))), 6.0 / 202.0);
        assert_eq!(ratio("aaa", &format!("b{}", "a".repeat(199))), 0.0);
        // but they lengthen one, even one of no characters
        assert_eq!(ratio("aaa", &"a".repeat(200)), 6.0 / 203.0);
    }
}
