//! Our rule for multiple choice: what a reader would take the reply to say, and no answer where a reader would not know.
//!
//! In this order: what `\boxed{}` or `<answer>` holds; a letter that stands for an option, at the start or behind
//! "answer is"; an option word for word; the one option that the reply contains as whole words; the option that the
//! reply resembles by far the most. It does not understand negation ("not CT" means CT when no other option is named).

use std::sync::LazyLock;

use regex::Regex;

use super::{Choice, ChoiceRule, answer_tag, boxed};
use crate::metric::similarity::ratio;

/// Multiple choice.
pub const MCQ: ChoiceRule = ChoiceRule {
    key: "mcq",
    compat: None,
    name: "Multiple choice",
    about: "Share of questions whose reply means the right option by letter, by words or by clear resemblance; replies that mean none are wrong.",
    signature: "mcq|v1|rule=letter, equal text, one option in whole words, difflib >= 0.6 and 0.1 ahead|no answer=wrong",
    judge: |reply, options, right| Choice::of(choose(reply, options), right),
};

/// Least similarity of a reply that neither names nor quotes an option.
const SIMILAR: f64 = 0.6;
/// What the best option must be ahead of the next.
const AHEAD: f64 = 0.1;

/// The option that a reply means.
#[must_use]
pub fn choose(reply: &str, options: &[String]) -> Option<usize> {
    let reply = reply.trim();
    let reply = boxed(reply).or_else(|| answer_tag(reply)).unwrap_or(reply);
    match letters(reply, options.len())[..] {
        [] => {}
        [one] => return Some(one),
        _ => return None,
    }
    let (reply, options) = (plain(reply), options.iter().map(|o| plain(o)).collect::<Vec<_>>());
    only(&options, |o| *o == reply)
        .or_else(|| only(&options, |o| !o.is_empty() && format!(" {reply} ").contains(&format!(" {o} "))))
        .or_else(|| resembling(&options, &reply))
}

/// Options whose letters the reply gives as its answer: at the start, or behind "answer is".
fn letters(reply: &str, count: usize) -> Vec<usize> {
    static LETTER: LazyLock<Regex> = LazyLock::new(|| {
        // a letter, bracketed or not, that ends the reply or is followed by a mark
        let letter = r"(?:[(\[]\s*([A-Za-z])\s*[)\]]|([A-Za-z])\s*(?:[.):,;*]|$))";
        let lead = r"(?:(?i:(?:the\s+)?(?:correct\s+|final\s+)?(?:answer|option|choice)(?:\s+is)?)[\s:*]*)?";
        // more letters may follow: "A, D" or "A or B"
        let more = r"(?:\s*(?:,|;|/|&|and|or)?\s*[(\[]?([A-Za-z])(?:[)\].,]|$))?";
        let start = format!(r"^[\s*]*{lead}{letter}{more}");
        Regex::new(&start).unwrap_or_else(|e| unreachable!("constant pattern: {e}"))
    });
    static BEHIND: LazyLock<Regex> = LazyLock::new(|| {
        let pattern =
            r"(?i)\banswer(?:\s+is)?[\s:*]+(?:(?:option|choice)\s+)?(?-i)[(\[]?([A-Za-z])(?:\s*[).\],:;*]|\s*$)";
        Regex::new(pattern).unwrap_or_else(|e| unreachable!("constant pattern: {e}"))
    });
    let captures = LETTER.captures(reply).or_else(|| BEHIND.captures_iter(reply).last());
    let Some(captures) = captures else { return Vec::new() };
    let index = |text: &str| text.chars().next().map(|c| usize::from(c.to_ascii_uppercase() as u8 - b'A'));
    let groups = captures.iter().skip(1).flatten().filter_map(|m| index(m.as_str()));
    let mut found: Vec<usize> = groups.filter(|i| *i < count).collect();
    found.dedup();
    found
}

/// Lower case, marks as blanks, one blank between words.
fn plain(text: &str) -> String {
    let text = text.to_lowercase();
    text.split(|c: char| !c.is_alphanumeric()).filter(|w| !w.is_empty()).collect::<Vec<_>>().join(" ")
}

/// The only option that fits.
fn only(options: &[String], fits: impl Fn(&String) -> bool) -> Option<usize> {
    let mut found = options.iter().enumerate().filter(|(_, o)| fits(o)).map(|(i, _)| i);
    found.next().filter(|_| found.next().is_none())
}

fn resembling(options: &[String], reply: &str) -> Option<usize> {
    let mut ranked: Vec<(f64, usize)> = options.iter().enumerate().map(|(i, o)| (ratio(o, reply), i)).collect();
    ranked.sort_by(|a, b| b.0.total_cmp(&a.0));
    let (best, index) = *ranked.first()?;
    let second = ranked.get(1).map_or(0.0, |r| r.0);
    (best >= SIMILAR && best - second >= AHEAD && !reply.is_empty()).then_some(index)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chosen(reply: &str, options: &[&str]) -> Option<usize> {
        choose(reply, &options.iter().map(|o| (*o).to_string()).collect::<Vec<_>>())
    }

    #[test]
    fn letters_are_read_where_they_are_the_answer() {
        let options = ["CT", "MRI", "Ultrasound", "X-ray"];
        for reply in [
            "B",
            "b",
            "B.",
            "(B)",
            "B: MRI",
            "B) x",
            "**B**",
            "The answer is B",
            "The correct answer is: B",
            "Answer: (B)",
            "Option B",
            "\\boxed{B}",
            "<answer>B. MRI</answer>",
            "I see a bright ring. The answer is B.",
            " B\n",
            "Final answer: **B**",
        ] {
            assert_eq!(chosen(reply, &options), Some(1), "{reply:?}");
        }
        for reply in ["A, D", "A or B", "E", "", "I cannot answer.", "It could be MRI or CT", "None of the above"] {
            assert_eq!(chosen(reply, &options), None, "{reply:?}");
        }
        // an article is no letter
        assert_eq!(chosen("A MRI scan", &options), Some(1));
    }

    #[test]
    fn medical_words_are_whole_words() {
        let options =
            ["Normal", "Abnormal", "Adenocarcinoma", "Carcinoma", "Nodule", "No nodule", "Unknown", "Diagnosis"];
        for (i, option) in options.iter().enumerate() {
            assert_eq!(chosen(option, &options), Some(i), "{option}");
            assert_eq!(chosen(&format!("{}.", option.to_lowercase()), &options), Some(i), "{option}");
        }
        assert_eq!(chosen("It looks abnormal", &options), Some(1));
        assert_eq!(chosen("This is an adenocarcinoma", &options), Some(2));
        assert_eq!(chosen("A diagnosis cannot be made", &options), Some(7));
        assert_eq!(chosen("noncontrast nodes", &["No", "Yes"]), None);
        assert_eq!(chosen("the nodule is unknown", &["No", "Yes"]), None);
    }

    #[test]
    fn misspellings_count_only_where_they_resemble_one_option() {
        assert_eq!(chosen("pneumothrax", &["Pneumothorax", "Pleural effusion"]), Some(0));
        assert_eq!(chosen("hypotension", &["Hypertension", "Hypotensions"]), None);
    }
}
