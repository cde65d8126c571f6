//! Porter's stemmer (1980) with the deviations that nltk's `PorterStemmer` makes by default (`NLTK_EXTENSIONS`).
//!
//! METEOR and ROUGE are defined by it. Snowball's English stemmer ("Porter2") gives other stems.

/// Words with a stem of their own.
const IRREGULAR: [(&str, &str); 16] = [
    ("sky", "sky"),
    ("skies", "sky"),
    ("dying", "die"),
    ("lying", "lie"),
    ("tying", "tie"),
    ("news", "news"),
    ("innings", "inning"),
    ("inning", "inning"),
    ("outings", "outing"),
    ("outing", "outing"),
    ("cannings", "canning"),
    ("canning", "canning"),
    ("howe", "howe"),
    ("proceed", "proceed"),
    ("exceed", "exceed"),
    ("succeed", "succeed"),
];

/// The stem of a word, lower-cased first.
///
/// ```
/// # use medtune::metric::porter::stem;
/// assert_eq!(stem("calcifications"), "calcif");
/// ```
#[must_use]
pub fn stem(word: &str) -> String {
    let lower = word.to_lowercase();
    if let Some((_, stem)) = IRREGULAR.iter().find(|(w, _)| *w == lower) {
        return (*stem).to_string();
    }
    if word.chars().nth(2).is_none() {
        return lower;
    }
    if lower.is_ascii() {
        let mut word = Word(lower.into_bytes());
        word.reduce();
        word.0.into_iter().map(char::from).collect()
    } else {
        let mut word = Word(lower.chars().collect());
        word.reduce();
        word.0.into_iter().collect()
    }
}

/// A letter; one outside ASCII is a consonant that no rule names.
trait Letter: Copy + PartialEq {
    fn ascii(self) -> u8;
    fn of(ascii: u8) -> Self;
}

impl Letter for u8 {
    fn ascii(self) -> u8 {
        self
    }
    fn of(ascii: u8) -> Self {
        ascii
    }
}

impl Letter for char {
    fn ascii(self) -> u8 {
        if self.is_ascii() { self as u8 } else { 0 }
    }
    fn of(ascii: u8) -> Self {
        ascii as char
    }
}

/// The word so far.
struct Word<L>(Vec<L>);

/// A suffix, what replaces it, and whether it may, given the word and the length without the suffix.
type Rule<L> = (&'static str, &'static str, fn(&Word<L>, usize) -> bool);

impl<L: Letter> Word<L> {
    fn reduce(&mut self) {
        self.plural();
        self.past();
        self.final_y();
        self.long_suffix();
        self.middle_suffix();
        self.last_suffix();
        self.final_e();
        self.final_ll();
    }

    fn consonant(&self, i: usize) -> bool {
        match self.0[i].ascii() {
            b'a' | b'e' | b'i' | b'o' | b'u' => false,
            b'y' => i == 0 || !self.consonant(i - 1),
            _ => true,
        }
    }

    /// Number of vowel-consonant sequences in the first `n` letters.
    fn measure(&self, n: usize) -> usize {
        let mut count = 0;
        let mut vowel = false;
        for i in 0..n {
            let consonant = self.consonant(i);
            count += usize::from(vowel && consonant);
            vowel = !consonant;
        }
        count
    }

    fn has_vowel(&self, n: usize) -> bool {
        (0..n).any(|i| !self.consonant(i))
    }

    fn double_consonant(&self) -> bool {
        let n = self.0.len();
        n >= 2 && self.0[n - 1] == self.0[n - 2] && self.consonant(n - 1)
    }

    /// Whether the first `n` letters end in consonant, vowel, consonant other than w, x and y, or are a vowel and a
    /// consonant.
    fn short(&self, n: usize) -> bool {
        let ends = n >= 3
            && self.consonant(n - 3)
            && !self.consonant(n - 2)
            && self.consonant(n - 1)
            && !matches!(self.0[n - 1].ascii(), b'w' | b'x' | b'y');
        ends || (n == 2 && !self.consonant(0) && self.consonant(1))
    }

    fn ends(&self, suffix: &str) -> Option<usize> {
        let n = self.0.len().checked_sub(suffix.len())?;
        self.0[n..].iter().zip(suffix.bytes()).all(|(l, s)| l.ascii() == s).then_some(n)
    }

    fn replace(&mut self, n: usize, with: &str) {
        self.0.truncate(n);
        self.0.extend(with.bytes().map(L::of));
    }

    /// Applies the first rule whose suffix fits, if its condition holds.
    fn apply(&mut self, rules: &[Rule<L>]) {
        let found = rules.iter().find_map(|rule| self.ends(rule.0).map(|n| (n, rule)));
        if let Some((n, (_, with, condition))) = found
            && condition(self, n)
        {
            self.replace(n, with);
        }
    }

    fn plural(&mut self) {
        if self.0.len() == 4
            && let Some(n) = self.ends("ies")
        {
            return self.replace(n, "ie");
        }
        let always = |_: &Self, _| true;
        self.apply(&[("sses", "ss", always), ("ies", "i", always), ("ss", "ss", always), ("s", "", always)]);
    }

    fn past(&mut self) {
        if let Some(n) = self.ends("ied") {
            return self.replace(n, if n == 1 { "ie" } else { "i" });
        }
        if let Some(n) = self.ends("eed") {
            if self.measure(n) > 0 {
                self.replace(n, "ee");
            }
            return;
        }
        let stem = ["ed", "ing"].iter().filter_map(|suffix| self.ends(suffix)).find(|n| self.has_vowel(*n));
        let Some(n) = stem else { return };
        self.0.truncate(n);
        if ["at", "bl", "iz"].iter().any(|end| self.ends(end).is_some()) {
            self.0.push(L::of(b'e'));
        } else if self.double_consonant() {
            if !matches!(self.0[n - 1].ascii(), b'l' | b's' | b'z') {
                self.0.pop();
            }
        } else if self.measure(n) == 1 && self.short(n) {
            self.0.push(L::of(b'e'));
        }
    }

    fn final_y(&mut self) {
        self.apply(&[("y", "i", |w, n| n > 1 && w.consonant(n - 1))]);
    }

    fn long_suffix(&mut self) {
        while let Some(n) = self.ends("alli").filter(|n| self.measure(*n) > 0) {
            self.replace(n, "al");
        }
        let some: fn(&Self, usize) -> bool = |w, n| w.measure(n) > 0;
        self.apply(&[
            ("ational", "ate", some),
            ("tional", "tion", some),
            ("enci", "ence", some),
            ("anci", "ance", some),
            ("izer", "ize", some),
            ("bli", "ble", some),
            ("alli", "al", some),
            ("entli", "ent", some),
            ("eli", "e", some),
            ("ousli", "ous", some),
            ("ization", "ize", some),
            ("ation", "ate", some),
            ("ator", "ate", some),
            ("alism", "al", some),
            ("iveness", "ive", some),
            ("fulness", "ful", some),
            ("ousness", "ous", some),
            ("aliti", "al", some),
            ("iviti", "ive", some),
            ("biliti", "ble", some),
            ("fulli", "ful", some),
            // the l counts as part of the stem
            ("logi", "log", |w, n| w.measure(n + 1) > 0),
        ]);
    }

    fn middle_suffix(&mut self) {
        let some: fn(&Self, usize) -> bool = |w, n| w.measure(n) > 0;
        self.apply(&[
            ("icate", "ic", some),
            ("ative", "", some),
            ("alize", "al", some),
            ("iciti", "ic", some),
            ("ical", "ic", some),
            ("ful", "", some),
            ("ness", "", some),
        ]);
    }

    fn last_suffix(&mut self) {
        let two: fn(&Self, usize) -> bool = |w, n| w.measure(n) > 1;
        let after_s_or_t: fn(&Self, usize) -> bool =
            |w, n| w.measure(n) > 1 && matches!(w.0[n - 1].ascii(), b's' | b't');
        self.apply(&[
            ("al", "", two),
            ("ance", "", two),
            ("ence", "", two),
            ("er", "", two),
            ("ic", "", two),
            ("able", "", two),
            ("ible", "", two),
            ("ant", "", two),
            ("ement", "", two),
            ("ment", "", two),
            ("ent", "", two),
            ("ion", "", after_s_or_t),
            ("ou", "", two),
            ("ism", "", two),
            ("ate", "", two),
            ("iti", "", two),
            ("ous", "", two),
            ("ive", "", two),
            ("ize", "", two),
        ]);
    }

    fn final_e(&mut self) {
        self.apply(&[("e", "", |w, n| {
            let measure = w.measure(n);
            measure > 1 || (measure == 1 && !w.short(n))
        })]);
    }

    fn final_ll(&mut self) {
        // the first l counts as part of the stem
        self.apply(&[("ll", "l", |w, n| w.measure(n + 1) > 1)]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn deviations_of_nltk() {
        for (word, expected) in [
            ("dies", "die"),
            ("flies", "fli"),
            ("died", "die"),
            ("spied", "spi"),
            ("enjoy", "enjoy"),
            ("by", "by"),
            ("happy", "happi"),
            ("Skies", "sky"),
            ("geologically", "geolog"),
            ("radiology", "radiolog"),
            ("fully", "fulli"),
            ("hopefully", "hope"),
            ("abnormally", "abnorm"),
            ("use", "use"),
            ("as", "as"),
        ] {
            assert_eq!(stem(word), expected, "{word}");
        }
    }

    #[test]
    fn letters_outside_ascii_are_consonants() {
        assert_eq!(stem("naïves"), "naïv");
        assert_eq!(stem("日本語"), "日本語");
        assert_eq!(stem(""), "");
    }
}
