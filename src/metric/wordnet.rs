//! The part of WordNet 3.0 that METEOR asks for: which single words share a synset with a word, after nltk's `morphy`.
//!
//! `wordnet/synonyms.tsv.zst` and `wordnet/exceptions.tsv.zst` are extracts of the data files of WordNet 3.0; the
//! licence beside them goes with every copy. A line of the first is `lemma TAB tag[:word,word,..] TAB ..` with one tag
//! for each part of speech (`n`, `v`, `a`, `r`); a tag in upper case says that the lemma itself is written with a capital
//! letter in all synsets, so that no lower-case word equals it. Names of several words and names with capitals are left
//! out, because no lower-case word can equal them. A line of the second is `tag TAB inflected TAB base[,base..]`.

use std::sync::LazyLock;

use rustc_hash::FxHashMap;

use crate::error::{Error, Kind, Result};

const SYNONYMS: &[u8] = include_bytes!("wordnet/synonyms.tsv.zst");
const EXCEPTIONS: &[u8] = include_bytes!("wordnet/exceptions.tsv.zst");

/// Endings and what replaces them, by part of speech.
const DETACHMENTS: [(char, &[(&str, &str)]); 4] = [
    (
        'n',
        &[
            ("s", ""),
            ("ses", "s"),
            ("ves", "f"),
            ("xes", "x"),
            ("zes", "z"),
            ("ches", "ch"),
            ("shes", "sh"),
            ("men", "man"),
            ("ies", "y"),
        ],
    ),
    ('v', &[("s", ""), ("ies", "y"), ("es", "e"), ("es", ""), ("ed", "e"), ("ed", ""), ("ing", "e"), ("ing", "")]),
    ('a', &[("er", ""), ("est", ""), ("er", "e"), ("est", "e")]),
    ('r', &[]),
];

/// Synonyms by word.
#[derive(Debug)]
pub struct WordNet {
    /// Lemma to the rest of its line.
    synonyms: FxHashMap<&'static str, &'static str>,
    /// Inflected forms that follow no rule, with their part of speech, to their base forms.
    exceptions: FxHashMap<(char, &'static str), Vec<&'static str>>,
}

impl WordNet {
    /// The tables in this program, read once.
    ///
    /// # Errors
    /// The tables are damaged; METEOR must then not be computed, because it would be lower without a sign of it.
    pub fn embedded() -> Result<&'static Self> {
        static EMBEDDED: LazyLock<Option<WordNet>> = LazyLock::new(|| WordNet::from_compressed(SYNONYMS, EXCEPTIONS));
        EMBEDDED.as_ref().ok_or_else(|| {
            Error::new(Kind::Data, "the WordNet table in this program is damaged, so METEOR cannot be computed")
                .help("build the program again from complete sources")
        })
    }

    fn from_compressed(synonyms: &[u8], exceptions: &[u8]) -> Option<Self> {
        let text = |bytes| String::from_utf8(zstd::decode_all(bytes).ok()?).ok();
        Self::parse(text(synonyms)?.leak(), text(exceptions)?.leak())
    }

    /// None unless both tables have lines and every line its fields.
    fn parse(synonyms: &'static str, exceptions: &'static str) -> Option<Self> {
        let mut table = Self { synonyms: FxHashMap::default(), exceptions: FxHashMap::default() };
        table.synonyms.reserve(synonyms.len() / 20);
        for line in synonyms.lines() {
            let (lemma, rest) = line.split_once('\t')?;
            table.synonyms.insert(lemma, rest);
        }
        for line in exceptions.lines() {
            let mut fields = line.split('\t');
            let (tag, inflected) = (fields.next()?.chars().next()?, fields.next()?);
            table.exceptions.entry((tag, inflected)).or_default().extend(fields.next()?.split(','));
        }
        (!table.synonyms.is_empty() && !table.exceptions.is_empty()).then_some(table)
    }

    /// Base forms of `word` that WordNet knows as this part of speech (`n`, `v`, `a` or `r`); `word` itself comes first
    /// if it is one.
    #[must_use]
    pub fn morphy(&self, word: &str, part_of_speech: char) -> Vec<String> {
        let mut found = Vec::new();
        self.forms(word, part_of_speech, |form, _| {
            if !found.iter().any(|f| f == form) {
                found.push(form.to_string());
            }
        });
        found
    }

    /// Calls `visit` with each known base form and its synonyms as this part of speech.
    fn forms(&self, word: &str, part_of_speech: char, mut visit: impl FnMut(&str, Entry)) {
        let mut known = |form: &str| {
            if let Some(entry) = self.entry(form, part_of_speech) {
                visit(form, entry);
            }
        };
        known(word);
        if let Some(bases) = self.exceptions.get(&(part_of_speech, word)) {
            bases.iter().for_each(|base| known(base));
            return;
        }
        let rules = DETACHMENTS.iter().find(|(tag, _)| *tag == part_of_speech).map_or(&[][..], |(_, rules)| rules);
        let mut form = String::new();
        for (old, new) in rules {
            if let Some(stem) = word.strip_suffix(old) {
                form.clear();
                form.push_str(stem);
                form.push_str(new);
                known(&form);
            }
        }
    }

    fn entry(&self, form: &str, part_of_speech: char) -> Option<Entry> {
        let (lemma, rest) = self.synonyms.get_key_value(form)?;
        let field = rest.split('\t').find(|f| f.starts_with(|c: char| c.to_ascii_lowercase() == part_of_speech))?;
        let lower = field.starts_with(part_of_speech);
        let names = field.split_once(':').map_or("", |(_, names)| names);
        Some(Entry { lemma: (lower && !lemma.contains('_')).then_some(lemma), names })
    }

    /// Calls `visit` with each single lower-case word that shares a synset with `word`, in any part of speech; some
    /// come more than once.
    pub fn synonyms(&self, word: &str, mut visit: impl FnMut(&'static str)) {
        let lower = word.to_lowercase();
        for (tag, _) in DETACHMENTS {
            self.forms(&lower, tag, |_, entry| {
                entry.lemma.into_iter().for_each(&mut visit);
                entry.names.split(',').filter(|n| !n.is_empty()).for_each(&mut visit);
            });
        }
    }
}

/// What the table says of a lemma as one part of speech.
struct Entry {
    /// The lemma, if it can equal a word.
    lemma: Option<&'static str>,
    /// Its synonyms, separated by commas.
    names: &'static str,
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    fn synonyms(word: &str) -> BTreeSet<&'static str> {
        let mut found = BTreeSet::new();
        WordNet::embedded().unwrap().synonyms(word, |s| {
            found.insert(s);
        });
        found
    }

    #[test]
    fn words_share_synsets_with_their_base_forms() {
        assert_eq!(synonyms("tumours"), BTreeSet::from(["neoplasm", "tumor", "tumour"]));
        assert!(synonyms("opacities").contains("opaqueness"));
        assert_eq!(synonyms("pictur"), BTreeSet::new());
        // only the porcelain: the country has a capital letter
        assert_eq!(synonyms("china"), BTreeSet::from(["china", "chinaware"]));
        let wordnet = WordNet::embedded().unwrap();
        assert_eq!(wordnet.morphy("metastases", 'n'), ["metastasis"]);
        assert_eq!(wordnet.morphy("axes", 'n'), ["ax", "axis"]);
        assert!(wordnet.morphy("quickly", 'n').is_empty());
    }

    #[test]
    fn a_damaged_table_is_no_table() {
        assert!(WordNet::from_compressed(&SYNONYMS[..SYNONYMS.len() / 2], EXCEPTIONS).is_none());
        assert!(WordNet::from_compressed(SYNONYMS, b"").is_none());
        assert!(WordNet::parse("", "n\ta\tb").is_none());
        assert!(WordNet::parse("no tab", "n\ta\tb").is_none());
        assert!(WordNet::parse("a\tn", "n\ta").is_none());
    }
}
