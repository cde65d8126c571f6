//! Questions with a few possible answers: which option a reply means, by our own rule and by those of published
//! evaluations.

use std::sync::LazyLock;

use regex::Regex;

use super::similarity::most_similar;

pub mod medevalkit;
pub mod own;
pub mod prefix;

/// What a rule makes of a reply.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Choice {
    /// Index of the option that the reply means; none if the rule finds none. Such a reply is wrong.
    pub chosen: Option<usize>,
    /// Whether the rule counts the reply as right.
    pub correct: bool,
}

impl Choice {
    fn of(chosen: Option<usize>, right: usize) -> Self {
        Self { chosen, correct: chosen == Some(right) }
    }
}

/// A rule.
#[derive(Debug)]
pub struct ChoiceRule {
    /// Stable key in result files.
    pub key: &'static str,
    /// Name after `--compat`; none for our own rule, which is always applied.
    pub compat: Option<&'static str>,
    /// Name in tables.
    pub name: &'static str,
    /// What it measures, one sentence.
    pub about: &'static str,
    /// Exact definition. Numbers with different signatures are not comparable.
    pub signature: &'static str,
    /// Reads a reply, given the options without letters and the index of the right one.
    pub judge: fn(reply: &str, options: &[String], right: usize) -> Choice,
}

/// A published rule for closed questions.
#[derive(Debug)]
pub struct ClosedRule {
    /// Stable key in result files.
    pub key: &'static str,
    /// Name after `--compat`.
    pub compat: &'static str,
    /// Name in tables.
    pub name: &'static str,
    /// What it measures, one sentence.
    pub about: &'static str,
    /// Exact definition. Numbers with different signatures are not comparable.
    pub signature: &'static str,
    /// Whether a reply counts as right for a reference answer.
    pub judge: fn(reply: &str, answer: &str) -> bool,
}

/// All rules, our own first.
pub const CHOICE_RULES: &[&ChoiceRule] = &[&own::MCQ, &medevalkit::MEDEVALKIT, &OMNIMEDVQA, &PMC_VQA];

/// OmniMedVQA's question-answering score.
pub const OMNIMEDVQA: ChoiceRule = ChoiceRule {
    key: "mcq_omnimedvqa",
    compat: Some("omnimedvqa"),
    name: "Multiple choice, OmniMedVQA rule",
    about: "Share of questions whose right option is the one most similar to the reply, by characters; a letter alone is rarely understood.",
    signature: "mcq_omnimedvqa|v1|rule=Multi-Modality-Arena bd2999a question-answering score|similarity=difflib|no answer=wrong",
    judge: |reply, options, right| {
        let chosen = most_similar(options, reply);
        let same_text = |i: usize| options.get(i) == options.get(right) && right < options.len();
        Choice { chosen, correct: chosen.is_some_and(same_text) }
    },
};

/// PMC-VQA's rule.
pub const PMC_VQA: ChoiceRule = ChoiceRule {
    key: "mcq_pmc_vqa",
    compat: Some("pmc-vqa"),
    name: "Multiple choice, PMC-VQA rule",
    about: "Share of questions whose right option is the one most similar to the last character of the reply; for models that end with the letter.",
    signature: "mcq_pmc_vqa|v1|rule=PMC-VQA 1678ec2 last character|similarity=difflib to cells ' A:text '|empty reply=wrong",
    judge: |reply, options, right| {
        let cells: Vec<String> = options.iter().zip(letters()).map(|(o, letter)| format!(" {letter}:{o} ")).collect();
        match cells.get(right) {
            Some(label) => pmc_vqa(reply, &cells, label),
            None => Choice { chosen: None, correct: false },
        }
    },
};

/// PMC-VQA's rule on cells as its files have them (` A:text `): the last character of the reply and the cell that is
/// the label, each compared with all cells.
#[must_use]
pub fn pmc_vqa(reply: &str, cells: &[String], label: &str) -> Choice {
    let last = reply.chars().next_back().map(String::from);
    let chosen = last.and_then(|c| most_similar(cells, &c));
    Choice { chosen, correct: chosen.is_some() && chosen == most_similar(cells, label) }
}

/// `A`, `B`, `C`, ...
fn letters() -> impl Iterator<Item = char> {
    'A'..='Z'
}

/// Content of the last `\boxed{..}` with balanced braces, trimmed.
fn boxed(text: &str) -> Option<&str> {
    let content = text.rsplit_once("\\boxed{")?.1;
    let mut depth = 0usize;
    for (i, c) in content.char_indices() {
        match (c, depth) {
            ('{', _) => depth += 1,
            ('}', 0) => return Some(content[..i].trim()),
            ('}', _) => depth -= 1,
            _ => {}
        }
    }
    None
}

/// Content of the first `<answer>..</answer>`, trimmed.
fn answer_tag(text: &str) -> Option<&str> {
    static TAG: LazyLock<Regex> = LazyLock::new(|| {
        Regex::new(r"(?is)<answer>(.*?)</answer>").unwrap_or_else(|e| unreachable!("constant pattern: {e}"))
    });
    TAG.captures(text).and_then(|c| c.get(1)).map(|m| m.as_str().trim())
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    fn options(texts: &[&str]) -> Vec<String> {
        texts.iter().map(|t| (*t).to_string()).collect()
    }

    #[test]
    fn rules_are_told_apart_and_never_panic() {
        let keys: BTreeSet<_> = CHOICE_RULES.iter().map(|r| r.key).collect();
        let names: BTreeSet<_> = CHOICE_RULES.iter().map(|r| r.compat).collect();
        assert_eq!((keys.len(), names.len()), (CHOICE_RULES.len(), CHOICE_RULES.len()));
        for rule in CHOICE_RULES {
            assert!(rule.signature.starts_with(&format!("{}|v", rule.key)), "{}", rule.signature);
            for reply in ["", " ", "A", "\\boxed{", "<answer>", "肺", "A)", "\u{1c}"] {
                for texts in [&[][..], &["CT"], &["", ""]] {
                    let found = (rule.judge)(reply, &options(texts), 0);
                    assert!(found.chosen.is_none_or(|c| c < texts.len()), "{} {reply:?} {texts:?}", rule.key);
                    (rule.judge)(reply, &options(texts), 7);
                }
            }
        }
    }

    #[test]
    fn each_rule_finds_an_option_that_is_spelled_out() {
        let options = options(&["Pleural effusion", "Nodule"]);
        for rule in CHOICE_RULES.iter().filter(|r| r.key != PMC_VQA.key) {
            assert_eq!((rule.judge)("Nodule", &options, 1), Choice { chosen: Some(1), correct: true }, "{}", rule.key);
        }
        assert!((PMC_VQA.judge)("B", &options, 1).correct);
    }

    #[test]
    fn wrappers_are_opened() {
        assert_eq!(boxed(r"so \boxed{\text{A}} ."), Some(r"\text{A}"));
        assert_eq!(boxed(r"\boxed{A"), None);
        assert_eq!(answer_tag("<think>B</think><Answer> A\n</answer>"), Some("A"));
        assert_eq!(answer_tag("A</answer>"), None);
    }
}
