//! The rules of MedEvalKit (9b12e3b), misjudgements included: `The correct answer is: A` is wrong because of a blank,
//! and a reply that resembles no option counts as the first.

use super::{Choice, ChoiceRule, ClosedRule, letters};
use crate::metric::similarity::most_similar;

/// Multiple choice.
pub const MEDEVALKIT: ChoiceRule = ChoiceRule {
    key: "mcq_medevalkit",
    compat: Some("medevalkit"),
    name: "Multiple choice, MedEvalKit rule",
    about: "Share of questions whose reply gives the right letter or option by MedEvalKit's parser, with the most similar option as a last resort.",
    signature: "mcq_medevalkit|v1|rule=MedEvalKit 9b12e3b judge_multi_choice|cells='A. text'|similarity=difflib|none=first option",
    judge: |reply, options, right| {
        let cells: Vec<String> = options.iter().zip(letters()).map(|(o, letter)| format!("{letter}. {o}")).collect();
        let key = letters().nth(right).unwrap_or('?').to_string();
        multiple_choice(reply, &cells, &key)
    },
};

/// Closed questions.
pub const CLOSED: ClosedRule = ClosedRule {
    key: "closed_accuracy_medevalkit",
    compat: "medevalkit",
    name: "Closed accuracy, MedEvalKit rule",
    about: "Share of closed questions counted as right by MedEvalKit's rules, for comparison with published numbers only.",
    signature: "closed_accuracy_medevalkit|v1|rule=MedEvalKit 9b12e3b, substrings for yes and no, else equality|rows=answer_type CLOSED",
    judge: |reply, answer| match answer.trim().to_lowercase().as_str() {
        yes_no @ ("yes" | "no") => yes_or_no(reply, yes_no),
        other => closed_text(reply, other),
    },
};

/// What introduces an answer; the text behind the last one of each counts, in this order.
const INTRODUCTIONS: [&str; 9] = [
    "**answer**:",
    "**answer**",
    "*answer*:",
    "**answer:**",
    "answer is",
    "answer:",
    "答案:",
    "final answer",
    "final answer is",
];

/// MedEvalKit's multiple choice on cells as its readers make them (`A. text`, or ` A:text ` for PMC-VQA); `answer` is the
/// right letter or cell.
#[must_use]
pub fn multiple_choice(reply: &str, cells: &[String], answer: &str) -> Choice {
    let letters: Vec<String> = letters().take(cells.len()).map(|l| l.to_lowercase().to_string()).collect();
    let cells: Vec<String> = cells.iter().map(|c| c.to_lowercase()).collect();
    let answer = answer.trim().to_lowercase();
    let reply = lone_letter(&reply.to_lowercase(), &letters);
    let reply = introduced(&reply).trim().replace('\n', "");
    let said = reply.split('.').next().unwrap_or_default();
    let said = said.rsplit(':').next().unwrap_or_default();
    let letter = letters.iter().position(|l| l == said);
    let cell = cells.iter().position(|c| c == said);
    if said == answer {
        Choice { chosen: letter.or(cell), correct: true }
    } else if let Some(i) = letter {
        Choice { chosen: Some(i), correct: cells[i] == answer }
    } else if let Some(i) = cell {
        Choice { chosen: Some(i), correct: letters[i] == answer }
    } else {
        let chosen = most_similar(&cells, &reply).unwrap_or(0);
        let correct = letters.get(chosen) == Some(&answer) || cells.get(chosen) == Some(&answer);
        Choice { chosen: Some(chosen).filter(|c| *c < cells.len()), correct }
    }
}

/// The first paragraph if it is a letter, else the last one's beginning if that is one, else everything.
fn lone_letter(reply: &str, letters: &[String]) -> String {
    let paragraphs: Vec<&str> = reply.split("\n\n").collect();
    let first = paragraphs.first().copied().unwrap_or_default();
    let last = paragraphs.last().and_then(|p| p.split('.').next()).unwrap_or_default();
    [first, last].into_iter().find(|p| letters.iter().any(|l| l == p)).unwrap_or(reply).to_string()
}

/// The part of a lower-case reply that is its answer.
fn introduced(reply: &str) -> String {
    let mut answer = if reply.contains("boxed") {
        super::boxed(reply).unwrap_or("none").to_string()
    } else if reply.contains("<answer>") {
        super::answer_tag(reply).unwrap_or_default().to_string()
    } else {
        reply.to_string()
    };
    for introduction in INTRODUCTIONS {
        if let Some((_, rest)) = answer.rsplit_once(introduction) {
            answer = rest.to_string();
        }
    }
    answer
}

/// MedEvalKit's yes/no: exactly one of the two found anywhere in the reply, and the answer found too.
#[must_use]
pub fn yes_or_no(reply: &str, answer: &str) -> bool {
    let reply = bare(reply);
    reply.contains("yes") != reply.contains("no") && reply.contains(&answer.to_lowercase())
}

/// MedEvalKit's rule for other closed questions: equality but for case, full stops and line ends.
#[must_use]
pub fn closed_text(reply: &str, answer: &str) -> bool {
    bare(reply) == answer.to_lowercase()
}

fn bare(reply: &str) -> String {
    introduced(&reply.to_lowercase()).replace(['\n', '.'], "")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn substrings_fool_it_as_they_fool_the_original() {
        assert!(yes_or_no("the nodule is present", "no"));
        assert!(yes_or_no("adenocarcinoma, normal, unknown diagnosis", "no"));
        assert!(!yes_or_no("yes and no", "yes"));
        assert!(!closed_text("2.5", "2.5"));
    }

    #[test]
    fn a_reply_like_no_option_is_the_first() {
        let cells = ["A. CT".to_string(), "B. MRI".to_string()];
        assert!(multiple_choice("", &cells, "A").correct);
        assert!(!multiple_choice("", &cells, "B").correct);
    }
}
