//! Reads the verdict of a quality-control reply: a reason, then a judgement, as text or as JSON.

use std::sync::LazyLock;

use regex::Regex;
use serde_json::{Map, Value};

use super::{Finding, Judgement};

static VERDICT: LazyLock<Regex> =
    LazyLock::new(|| regex(r"(?i)^(?:[-\d.)\s]*)(?:final\s+)?(?:judge?ment|verdict|decision)\s*[:=\-–—]+\s*(.*)$"));
static REASON: LazyLock<Regex> =
    LazyLock::new(|| regex(r"(?i)^(?:[-\d.)\s]*)(?:reason(?:ing)?|explanation)\s*[:=\-–—]+\s*(.*)$"));
static OPPOSITE: LazyLock<Regex> = LazyLock::new(|| {
    regex(
        r"(?i)\banswer\s+(?:\w+ly\s+)?(?:contradicts|disagrees|is\s+(?:\w+ly\s+)?(?:incorrect|wrong|false|inconsistent)|does\s+not\s+(?:match|agree))",
    )
});

fn regex(pattern: &str) -> Regex {
    Regex::new(pattern).expect("the pattern is a constant that the tests compile")
}

/// The finding of a reply.
///
/// # Errors
/// It is empty, has no verdict, has verdicts that disagree, or gives a reason that says the opposite of its verdict; in
/// a few words, which.
pub fn finding(reply: &str) -> Result<Finding, String> {
    let text: String =
        reply.replace("\r\n", "\n").chars().filter(|c| !matches!(c, '*' | '`' | '#' | '>' | '\u{feff}')).collect();
    let text = text.trim();
    if text.is_empty() {
        return Err("the reply is empty".into());
    }
    let found = match object(text) {
        Some(map) => from_object(&map)?,
        None => from_lines(text)?,
    };
    if found.judgement == Judgement::Consistent && OPPOSITE.is_match(&found.reason) {
        return Err("the reason says the opposite of the judgement".into());
    }
    Ok(found)
}

/// The first JSON object of a reply.
fn object(text: &str) -> Option<Map<String, Value>> {
    let (start, end) = (text.find('{')?, text.rfind('}')?);
    match serde_json::from_str(text.get(start..=end)?) {
        Ok(Value::Object(map)) => Some(map),
        _ => None,
    }
}

fn from_object(map: &Map<String, Value>) -> Result<Finding, String> {
    let get = |names: &[&str]| {
        let entry = map.iter().find(|(key, _)| names.contains(&key.trim().to_lowercase().as_str()));
        entry.and_then(|(_, value)| value.as_str()).unwrap_or_default()
    };
    let said = get(&["judgement", "judgment", "verdict", "decision"]);
    let judgement = verdict(said).ok_or_else(|| no_verdict(said))?;
    Ok(Finding { judgement, reason: get(&["reason", "reasoning", "explanation"]).trim().to_string() })
}

fn from_lines(text: &str) -> Result<Finding, String> {
    let lines: Vec<&str> = text.lines().map(|l| l.trim().trim_matches('_').trim()).filter(|l| !l.is_empty()).collect();
    let (mut judgement, mut reason) = (None, Vec::new());
    let mut i = 0;
    while i < lines.len() {
        if let Some(captures) = VERDICT.captures(lines[i]) {
            let mut said = captures.get(1).map_or("", |m| m.as_str());
            if said.is_empty() && i + 1 < lines.len() {
                i += 1;
                said = lines[i];
            }
            let this = verdict(said).ok_or_else(|| no_verdict(said))?;
            if judgement.is_some_and(|before| before != this) {
                return Err("the verdicts disagree".into());
            }
            judgement = Some(this);
        } else {
            let words = REASON.captures(lines[i]).and_then(|c| c.get(1)).map_or(lines[i], |m| m.as_str());
            reason.push(words);
        }
        i += 1;
    }
    let judgement = judgement.ok_or_else(|| no_verdict(""))?;
    Ok(Finding { judgement, reason: reason.join(" ").trim().to_string() })
}

fn no_verdict(said: &str) -> String {
    if said.is_empty() { "there is no judgement".into() } else { format!("{said:?} is no judgement") }
}

/// What the words behind "Judgement:" mean; none if that is not clear.
fn verdict(said: &str) -> Option<Judgement> {
    let words: Vec<String> =
        said.split(|c: char| !c.is_alphanumeric()).filter(|w| !w.is_empty()).map(str::to_lowercase).collect();
    let has = |all: &[&str]| words.iter().any(|w| all.contains(&w.as_str()));
    let right = has(&["correct", "consistent", "yes", "true", "pass", "passed"]);
    let wrong = has(&["incorrect", "inconsistent", "contradicted", "contradiction", "no", "false", "fail", "failed"]);
    let open = has(&["unverifiable", "unverified", "undetermined", "uncertain", "unclear"]);
    // The template itself, with its choices.
    if usize::from(right) + usize::from(wrong) + usize::from(open) > 1 {
        return None;
    }
    let first = words.first().map(String::as_str);
    // "No contradiction" is no "no".
    if first == Some("no") && has(&["contradiction", "inconsistency", "error", "errors"]) {
        return None;
    }
    let hedged = has(&["partially", "partly", "mostly", "but", "however", "although", "except"]);
    match () {
        () if open => Some(Judgement::Unverifiable),
        () if right && has(&["not"]) => Some(Judgement::Contradicted),
        () if right && hedged => Some(Judgement::Partial),
        () if wrong && has(&["not"]) => None,
        () if wrong => Some(Judgement::Contradicted),
        () if right && words.len() <= 6 => Some(Judgement::Consistent),
        () if right && matches!(first, Some("correct" | "consistent" | "yes" | "true" | "pass")) => {
            Some(Judgement::Consistent)
        }
        () => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn is(reply: &str, judgement: Judgement) {
        assert_eq!(finding(reply).map(|f| f.judgement), Ok(judgement), "{reply}");
    }

    #[test]
    fn verdicts_are_read() {
        use Judgement::{Consistent, Contradicted, Partial, Unverifiable};
        is("Reason: It says so.\nJudgement: Correct", Consistent);
        is("**Reason:** It says so.\n**Judgment:** correct.", Consistent);
        is("Reason: a\n\nJudgement:\n\n`Incorrect`", Contradicted);
        is("Verdict - pass", Consistent);
        is("Decision: NOT correct", Contradicted);
        is("Judgement: Partially correct", Partial);
        is("Judgement: Correct, but the side is wrong.", Partial);
        is("Judgement: Unverifiable", Unverifiable);
        is("Judgement: No", Contradicted);
        is("Judgement: Correct\nOn reflection it still is.\nJudgement: correct", Consistent);
        is("```json\n{\"reason\": \"x\", \"Judgement\": \"inconsistent\"}\n```", Contradicted);
        is("Reason: The question is wrong and the answer corrects it.\nJudgement: Correct", Consistent);
    }

    #[test]
    fn what_is_unclear_has_no_verdict() {
        for reply in [
            "",
            " \n",
            "The answer is right.",
            "Judgement: Correct / Incorrect",
            "Judgement: perhaps",
            "Judgement: Correct\nJudgement: Incorrect",
            "Reason: The answer contradicts the annotation.\nJudgement: Correct.",
            "Reason: The answer is clearly incorrect.\nJudgement: Correct",
            "{\"reason\": \"x\"}",
        ] {
            assert!(finding(reply).is_err(), "{reply}: {:?}", finding(reply));
        }
    }

    #[test]
    fn the_reason_is_kept() {
        let found = finding("Reason: It denies\nthe nodule.\nJudgement: Incorrect").unwrap();
        assert_eq!(found.reason, "It denies the nodule.");
    }
}
