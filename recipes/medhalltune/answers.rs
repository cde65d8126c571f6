//! What the rehearsal server says to requests of this recipe: pairs, verdicts and scores by rule, a share of them bad on
//! purpose. The rules know phantom images by their annotations, and other images by the sentences of theirs.

use rand::{RngExt, seq::IndexedRandom};
use rand_chacha::ChaCha8Rng;
use serde_json::{Value, json};

use super::{ANNOTATION, categories, prompt};
use crate::{
    datasets::phantom::{check::assertions, truth::Truth},
    judge::{Stance, messages::SYSTEM},
    llm::mock::{Asked, Rules, Said},
    metric::closed_accuracy::stance,
    recipes::phantom::{answers, claims, questions},
};

/// The rules.
#[derive(Debug)]
pub struct RehearsalAnswers;

/// Share of replies that are malformed.
const MALFORMED: f64 = 0.08;

/// Share of pairs that are wrong.
const WRONG: f64 = 0.08;

impl Rules for RehearsalAnswers {
    fn name(&self) -> &'static str {
        "medhalltune"
    }

    fn about(&self) -> &'static str {
        "Answers the requests of the medhalltune recipe from the annotation in them, a share of them badly on purpose."
    }

    fn answer(&self, asked: &Asked, draw: &mut ChaCha8Rng) -> Said {
        let text = asked.last();
        let reply = match (prompt::read_block(ANNOTATION, text), prompt::read_block("answer", text)) {
            (Some(annotation), Some(answer)) => {
                let question = prompt::read_block("question", text).unwrap_or_default();
                verdict(annotation, question, answer, draw)
            }
            (Some(annotation), None) => pairs(annotation, text, draw),
            _ if asked.system() == SYSTEM => scores(asked, draw),
            _ => "This server only rehearses the medhalltune recipe.".into(),
        };
        Said::text(reply)
    }
}

/// A question with its answer, before it is written down.
struct Pair {
    category: String,
    question: String,
    answer: String,
    evidence: String,
}

/// The reply to a construction request.
fn pairs(annotation: &str, text: &str, draw: &mut ChaCha8Rng) -> String {
    let negative = text.contains(categories::NEGATIVE[0]);
    let count = number_after(text, "Write ").unwrap_or(6);
    let truth = phantom_truth(annotation);
    let facts = facts(annotation);
    let items: Vec<Value> = (0..count)
        .map(|i| {
            let wrong = draw.random_bool(WRONG);
            let category = categories::NEGATIVE[i % categories::NEGATIVE.len()];
            let pair = match (&truth, negative) {
                (Some(truth), true) => phantom(truth, Some(category), i, wrong, draw),
                (Some(truth), false) => phantom(truth, None, i, wrong, draw),
                (None, true) => false_premise(&facts, category, i, wrong, draw),
                (None, false) => ordinary(&facts, i, wrong, draw),
            };
            json!({
                "category": pair.category, "question": pair.question, "answer": pair.answer, "evidence": pair.evidence,
            })
        })
        .collect();
    let reply = json!({ "items": items }).to_string();
    if draw.random_bool(MALFORMED) { spoil(&reply, draw) } else { reply }
}

/// The truth of a phantom image by its annotation; none for other images, of whose annotations it would understand
/// only a part.
fn phantom_truth(annotation: &str) -> Option<Truth> {
    let understood = |sentence: &str| !assertions(sentence).is_empty() || sentence == "No other finding";
    let whole = annotation.split(['.', '\n', ';']).map(str::trim).filter(|s| !s.is_empty()).all(understood);
    Truth::from_annotation(annotation).filter(|_| whole && !annotation.contains('?'))
}

fn number_after(text: &str, words: &str) -> Option<usize> {
    let rest = &text[text.rfind(words)? + words.len()..];
    rest.split(|c: char| !c.is_ascii_digit()).next()?.parse().ok()
}

/// A reply as models write it on a bad day.
fn spoil(reply: &str, draw: &mut ChaCha8Rng) -> String {
    match draw.random_range(0..8) {
        0 => format!("```json\n{reply}\n```"),
        1 => format!("Here are the items:\n\n{reply}\n\nTell me if you need more."),
        2 => reply.replace("}]}", "},]}"),
        3 => reply.chars().take(reply.chars().count() * 2 / 3).collect(),
        4 => reply.replacen("\"answer\":\"", "\"answer\":null,\"was\":\"", 1),
        5 => reply.replace('"', "&quot;"),
        6 => "I'm sorry, I can't help with medical images.".into(),
        _ => String::new(),
    }
}

/// A pair about a phantom image.
fn phantom(truth: &Truth, category: Option<&str>, turn: usize, wrong: bool, draw: &mut ChaCha8Rng) -> Pair {
    let start = draw.random_range(0..8);
    let (category, claim) = match category {
        Some(category) => (category, claims::negative(truth, category, draw)),
        None => {
            let (task, claim) = claims::positive(truth, start + turn, false, draw);
            let category = match task {
                "caption" => "caption",
                "presence" | "absence" | "normality" => "detection",
                "knowledge" => "reasoning",
                "modality" => "modality",
                _ => "attribute",
            };
            (category, claim)
        }
    };
    let (question, _) = questions::question(truth, &claim, draw);
    let answer = if wrong { answers::wrong_answer(truth, &claim, draw) } else { answers::answer(truth, &claim, draw) };
    Pair { category: category.into(), question, answer, evidence: String::new() }
}

/// What an annotation says: a question with its answer, or a sentence.
struct Fact<'a> {
    question: Option<&'a str>,
    says: &'a str,
}

fn facts(annotation: &str) -> Vec<Fact<'_>> {
    let lines = annotation.lines().flat_map(|line| match line.split_once("? ") {
        Some((question, says)) => vec![Fact { question: Some(question), says: says.trim() }],
        None => line.split(". ").map(|says| Fact { question: None, says: says.trim().trim_end_matches('.') }).collect(),
    });
    lines.filter(|f| !f.says.is_empty()).collect()
}

/// Things that a question can speak of as if they were there.
const OBJECTS: [&str; 8] = [
    "pacemaker",
    "feeding tube",
    "metal clip",
    "fracture line",
    "chest drain",
    "calcified cyst",
    "air pocket",
    "surgical plate",
];

/// Openings of questions, the same for both polarities.
const OPENINGS: [&str; 4] = ["", "I was wondering: ", "Looking at this image, ", "Please tell me: "];

fn fact<'a>(facts: &'a [Fact<'a>], i: usize, draw: &mut ChaCha8Rng) -> &'a Fact<'a> {
    const NONE: &Fact<'static> = &Fact { question: None, says: "a part of the body" };
    let start = draw.random_range(0..facts.len().max(1));
    facts.get((start + i) % facts.len().max(1)).unwrap_or(NONE)
}

/// What a fact says, as the end of a sentence.
fn said(fact: &Fact<'_>) -> String {
    match (fact.question, stance(fact.says)) {
        (Some(question), Stance::Affirms) => format!("it is so that asking \u{201c}{question}\u{201d} gets a yes"),
        (Some(question), Stance::Denies) => format!("asking \u{201c}{question}\u{201d} gets a no"),
        (Some(question), _) => format!("asking \u{201c}{question}\u{201d} gets {}", fact.says),
        _ => fact.says.to_string(),
    }
}

fn false_premise(facts: &[Fact<'_>], category: &str, i: usize, wrong: bool, draw: &mut ChaCha8Rng) -> Pair {
    let absent: Vec<&str> =
        OBJECTS.into_iter().filter(|o| !facts.iter().any(|f| f.says.to_lowercase().contains(o))).collect();
    let object = absent.choose(draw).copied().unwrap_or("surgical plate");
    let opening = OPENINGS.choose(draw).copied().unwrap_or_default();
    let fact = fact(facts, i, draw);
    let (question, right) = match category {
        "nonexistent_object" => (
            format!("{opening}is the {object} in its usual place here?"),
            format!("There is no {object} to be seen; what is seen is this: {}.", said(fact)),
        ),
        "existent_manipulation" => (
            format!("{opening}there is a second {object} beside the first one, right?"),
            format!("Neither a first nor a second one is there: no {object} can be made out, while {}.", said(fact)),
        ),
        _ => (
            format!("{opening}does the {object} in it prove that the person is cured?"),
            format!("Nothing of the kind follows, and no {object} is present; rather, {}.", said(fact)),
        ),
    };
    let answer = if wrong { format!("Yes, the {object} is there, exactly as you say it is.") } else { right };
    Pair { category: category.into(), question, answer, evidence: fact.says.into() }
}

fn ordinary(facts: &[Fact<'_>], i: usize, wrong: bool, draw: &mut ChaCha8Rng) -> Pair {
    let opening = OPENINGS.choose(draw).copied().unwrap_or_default();
    let fact = fact(facts, i, draw);
    let (category, question) = match fact.question {
        Some(question) => ("attribute", format!("{opening}{question}?")),
        None => ("caption", format!("{opening}what can be made out in this image, point {}?", i + 1)),
    };
    let asked = fact.question.map_or(Stance::Unclear, |_| stance(fact.says));
    let right = match asked {
        Stance::Affirms => "Yes, this is what the image shows.".to_string(),
        Stance::Denies => "No, the image does not show this.".to_string(),
        Stance::Unclear => format!("What can be seen is this: {}.", fact.says),
    };
    let answer = match (wrong, asked) {
        (false, _) => right,
        (true, Stance::Affirms) => "No, the image does not show this.".into(),
        (true, Stance::Denies) => "Yes, this is what the image shows.".into(),
        (true, Stance::Unclear) => "What can be seen is something else altogether.".into(),
    };
    Pair { category: category.into(), question, answer, evidence: fact.says.into() }
}

/// The reply to a quality-control request.
fn verdict(annotation: &str, question: &str, answer: &str, draw: &mut ChaCha8Rng) -> String {
    let (reason, verdict) = match phantom_truth(annotation) {
        Some(truth) => by_truth(&truth, answer),
        None => by_facts(&facts(annotation), question, answer),
    };
    match draw.random_range(0..100) {
        0 => format!("Reason: {reason}"),
        1 => "Judgement: Correct / Incorrect / Unverifiable".into(),
        2..5 => format!("**Reason:** {reason}\n\n**Judgement:** {verdict}."),
        5..8 => json!({ "reason": reason, "judgement": verdict }).to_string(),
        _ => format!("Reason: {reason}\nJudgement: {verdict}"),
    }
}

fn by_truth(truth: &Truth, answer: &str) -> (String, &'static str) {
    let said = assertions(answer);
    match said.iter().find(|a| !truth.agrees(a)) {
        Some(wrong) => (format!("It says {wrong}, which is not so."), "Incorrect"),
        None if said.is_empty() => ("It says nothing that the annotation speaks of.".into(), "Unverifiable"),
        None => ("What it says is what the annotation says.".into(), "Correct"),
    }
}

fn by_facts(facts: &[Fact<'_>], question: &str, answer: &str) -> (String, &'static str) {
    let (asks, says) = (question.to_lowercase(), answer.to_lowercase());
    if let Some(object) = OBJECTS.iter().find(|o| asks.contains(*o)) {
        let refused = says.contains(&format!("no {object}"));
        return match refused {
            true => (format!("It refuses the {object}, which the annotation does not know."), "Correct"),
            false => (format!("It speaks of a {object} that is not there."), "Incorrect"),
        };
    }
    let about = facts.iter().filter(|f| f.question.is_some_and(|q| asks.contains(&q.to_lowercase())));
    // Of two questions of which one holds the other, the longer one is meant.
    let fact = about.max_by_key(|f| f.question.map_or(0, str::len));
    match fact {
        Some(fact) if stance(fact.says) == Stance::Unclear && says.contains(&fact.says.to_lowercase()) => {
            ("It gives what the annotation gives.".into(), "Correct")
        }
        Some(fact) if stance(fact.says) != Stance::Unclear && stance(fact.says) == stance(answer) => {
            ("It says yes or no as the annotation does.".into(), "Correct")
        }
        Some(fact) => (format!("The annotation says {} instead.", fact.says), "Incorrect"),
        None if facts.iter().any(|f| says.contains(&f.says.to_lowercase())) => {
            ("It repeats a statement of the annotation.".into(), "Correct")
        }
        None => ("The annotation does not speak of it.".into(), "Unverifiable"),
    }
}

/// The reply to a request for scores.
fn scores(asked: &Asked, draw: &mut ChaCha8Rng) -> String {
    let judged = asked.messages.iter().find(|m| m.text.starts_with("Figure Caption: ")).map_or("", |m| &m.text);
    let between = |from: &str, to: &str| {
        let start = judged.find(from).map_or(0, |i| i + from.len());
        let end = judged[start..].find(to).map_or(judged.len(), |i| start + i);
        &judged[start..end]
    };
    let caption = between("Figure Caption: ", "\n\n[Question]: ");
    let answer = between("\n\n[Answer]: ", "\n [End of Answer]");
    let reference = between("\n\n[Ground Truth Answer]: ", "\n [End of Ground Truth Answer]");
    let (recall, conflicts) = (recall(answer, reference), conflicts(caption, answer, reference));
    let cap = |x: f64| x.round().clamp(1.0, 10.0);
    let right = conflicts == 0 && recall >= 0.4;
    let accuracy = if right { cap(8.0 + 2.0 * recall) } else { cap(1.0 + 5.0 * recall - 3.0 * conflicts as f64) };
    let relevance = cap(3.0 + 7.0 * recall);
    let detail = cap(1.0 + 9.0 * recall);
    let risk = if right { 9.0 } else { cap(5.0 - 4.0 * conflicts as f64 + 3.0 * recall) };
    let why = match (right, conflicts) {
        (true, _) => "The answer says what the ground truth says.",
        (false, 0) => "The answer has little of the ground truth.",
        (false, _) => "The answer contradicts the ground truth.",
    };
    match draw.random_range(0..50) {
        0 => {
            format!("Accuracy: {accuracy}/10\nRelevance: {relevance}/10\nDetail: {detail}/10\nRisk: {risk}/10\n\n{why}")
        }
        1 => format!("The answer deserves good marks. {why}"),
        _ => format!("{accuracy} {relevance} {detail} {risk}\n\n{why}"),
    }
}

/// Words that carry no meaning of their own.
const STOP: [&str; 22] = [
    "the", "a", "an", "is", "are", "it", "its", "this", "that", "of", "in", "on", "to", "and", "or", "there", "here",
    "has", "have", "been", "be", "by",
];

fn words(text: &str) -> Vec<String> {
    let all = text.split(|c: char| !c.is_alphanumeric()).filter(|w| !w.is_empty()).map(str::to_lowercase);
    all.filter(|w| !STOP.contains(&w.as_str())).collect()
}

/// Share of the reference's words that the answer has.
fn recall(answer: &str, reference: &str) -> f64 {
    let (answer, mut reference) = (words(answer), words(reference));
    reference.sort_unstable();
    reference.dedup();
    let found = reference.iter().filter(|w| answer.contains(w)).count();
    if reference.is_empty() { 0.0 } else { found as f64 / reference.len() as f64 }
}

/// Number of things in which an answer and the truth exclude each other.
fn conflicts(caption: &str, answer: &str, reference: &str) -> usize {
    let mut count = 0;
    let (said, wanted) = (opening(answer), opening(reference));
    count += usize::from(said != Stance::Unclear && wanted != Stance::Unclear && said != wanted);
    if let Some(truth) = phantom_truth(caption) {
        return count + assertions(answer).iter().filter(|a| !truth.agrees(a)).count();
    }
    let (answer, reference) = (words(answer), words(reference));
    let has = |all: &[String], word: &str| all.iter().any(|w| w == word);
    for (one, other) in [("left", "right"), ("normal", "abnormal"), ("small", "large")] {
        for (a, b) in [(one, other), (other, one)] {
            count += usize::from(has(&answer, a) && !has(&answer, b) && has(&reference, b) && !has(&reference, a));
        }
    }
    count
}

/// Yes or no at the start of an answer, or the denial that a first sentence is.
fn opening(text: &str) -> Stance {
    let first = text.split(['.', ';']).next().unwrap_or_default();
    let words = words(first);
    match words.first().map(String::as_str) {
        Some("yes") => Stance::Affirms,
        Some("no" | "neither" | "nothing") => Stance::Denies,
        _ if words.iter().any(|w| w == "no" || w == "not") => Stance::Denies,
        _ => Stance::Unclear,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        judge::{
            Judge, Judged, Outcome, Ruling,
            llm::{LlmJudge, tests::reply},
            measure::{Control, controls},
        },
        llm::mock::Spoken,
        plan::Plan,
        random::stream,
        recipes::medhalltune::parse::parse,
        sample::Polarity,
        stage::verify::{Judgement, parse::finding},
    };

    const FACTS: &str = "What modality is used? MRI\nIs the liver normal? No\nWhich organ is the largest? Liver";

    #[test]
    fn pairs_can_be_read_and_are_mostly_right() {
        let phantom = "This is a chest film. There is a small nodule in the left lung. No other finding.";
        assert!(phantom_truth(phantom).is_some() && phantom_truth(FACTS).is_none());
        let mut faults = 0;
        for annotation in [phantom, FACTS, "A slide of skin. The dermis is thick. No tumour is seen."] {
            for (task, polarity) in
                [(prompt::NEGATIVE, Polarity::Hallucination), (prompt::POSITIVE, Polarity::NonHallucination)]
            {
                let (mut items, mut right) = (0, 0);
                for seed in 0..40 {
                    let text = format!("{}\n\n{}", prompt::block(ANNOTATION, annotation), task.fill(&[("count", 6)]));
                    let reply = pairs(annotation, &text, &mut stream(seed, "test/pairs", 0));
                    let parsed = parse(&reply, Some("stop"), None, polarity);
                    items += parsed.items.len();
                    faults += parsed.faults.len();
                    for item in parsed.items {
                        let draw = &mut stream(1000, "test/verdict", 7);
                        let said = verdict(annotation, &item.question, &item.answer, draw);
                        let judgement = finding(&said).map(|f| f.judgement);
                        right += usize::from(judgement == Ok(Judgement::Consistent));
                    }
                }
                assert!(items > 180, "{annotation}: {items} items");
                let share = right as f64 / items as f64;
                assert!((0.6..0.99).contains(&share), "{annotation}, {polarity:?}: {share} consistent");
            }
        }
        assert!(faults > 0, "no reply was bad");
    }

    #[test]
    fn scores_follow_the_worth_of_answers() {
        let judge = LlmJudge::new(&Plan::default(), prompt::JUDGE.text, None).unwrap();
        let set = Control::read(include_str!("controls.jsonl")).unwrap();
        let outcome = |control: &Control| {
            let sample = control.sample();
            let judged = Judged { sample: &sample, answer: &control.answer, anchor: None };
            let Ruling::Ask(request) = judge.judge(judged).unwrap() else { panic!("it does not ask") };
            let spoken = |m: &crate::llm::Message| {
                let value = serde_json::to_value(m).unwrap();
                Spoken {
                    role: value["role"].as_str().unwrap().into(),
                    text: value["parts"][0]["text"].as_str().unwrap().into(),
                    images: 0,
                }
            };
            let messages = request.messages.iter().map(spoken).collect();
            let asked = Asked { model: String::new(), messages, schema: None, json: false };
            let said = (2..60).map(|seed| RehearsalAnswers.answer(&asked, &mut stream(seed, "test", 0)).text);
            let outcomes = said.map(|text| judge.read(judged, &reply(&text)));
            outcomes.into_iter().find(|o| matches!(o, Outcome::Scored { .. })).unwrap()
        };
        let outcomes: Vec<Outcome> = set.iter().map(outcome).collect();
        let result = controls(&set, &outcomes, None);
        assert!(result.drift.unwrap() < 1.0, "{result:#?}");
    }
}
