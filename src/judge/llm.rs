//! A language model as judge: the four clinical criteria, beside a sample answer and its scores.
//!
//! The model answers with four numbers and an explanation. Hallucination metrics also need to know whether an answer is
//! right and what it does with the premise; a right answer is one whose accuracy is 7 or more ("right, with small
//! errors"), and the stance is read from yes and no in the answer itself.

use std::path::Path;

use serde_json::{Value, json};

use super::{
    AnchorPolicy, Judge, JudgeDef, Judged, Outcome, Ruling, Stance, last_answer, last_question,
    messages::{Case, Order, SYSTEM, messages},
    parse::{self, Unread},
};
use crate::{
    error::{Error, Kind, Result},
    llm::{EndpointRole, Reply, Request, Sampling},
    metric::closed_accuracy,
    plan::Plan,
    run_dir::sha256_bytes,
    sample::Polarity,
};

/// From this accuracy on an answer counts as right.
const RIGHT: f64 = 7.0;

/// A judge that asks the model of `[llm.judge]`, or another one of the same server.
#[derive(Debug, Clone)]
pub struct LlmJudge {
    instructions: String,
    alone: String,
    model: Option<String>,
    endpoint: Value,
    sampling: Sampling,
    anchor: AnchorPolicy,
    order: Order,
}

impl LlmJudge {
    /// The judge of a plan; `own` is the instruction where `judge.prompt` names no other, `model` another model than
    /// the endpoint's.
    ///
    /// # Errors
    /// The file with the instruction cannot be read.
    pub fn new(plan: &Plan, own: &str, model: Option<&str>) -> Result<Self> {
        let instructions = match &plan.judge.prompt {
            None => own.trim().to_string(),
            Some(path) => read(path)?,
        };
        let endpoint = &plan.llm.judge;
        Ok(Self {
            alone: without_last_sentence(&instructions).to_string(),
            instructions,
            model: model.map(String::from),
            endpoint: json!({
                "base_url": endpoint.base_url.as_ref().or(plan.llm.generate.base_url.as_ref()),
                "model": model.map(String::from).or_else(|| endpoint.model.clone()).or_else(|| plan.llm.generate.model.clone()),
            }),
            sampling: Sampling {
                temperature: Some(plan.judge.temperature),
                max_tokens: plan.judge.max_tokens,
                ..Sampling::default()
            },
            anchor: plan.judge.anchor,
            order: Order::default(),
        })
    }

    /// The request to judge a case.
    #[must_use]
    pub fn request(&self, case: &Case) -> Request {
        let instructions = if case.anchor.is_some() { &self.instructions } else { &self.alone };
        let mut request = Request::new(EndpointRole::Judge, messages(instructions, case, self.order));
        request.model.clone_from(&self.model);
        request.sampling = self.sampling;
        request
    }
}

impl Judge for LlmJudge {
    fn signature(&self) -> Value {
        json!({
            "kind": "llm",
            "version": 1,
            "endpoint": self.endpoint,
            "system": SYSTEM,
            "prompt_sha256": sha256_bytes(self.instructions.as_bytes()),
            "prompt_without_sample_sha256": sha256_bytes(self.alone.as_bytes()),
            "sampling": self.sampling,
            "anchor": self.anchor,
        })
    }

    fn judge(&self, judged: Judged<'_>) -> Result<Ruling> {
        let reference = last_answer(judged.sample);
        if reference.trim().is_empty() {
            return Ok(Outcome::NoReference.into());
        }
        let case = Case {
            caption: judged.sample.annotation.clone(),
            question: last_question(judged.sample),
            answer: judged.answer.to_string(),
            reference: reference.to_string(),
            anchor: judged.anchor.cloned(),
        };
        Ok(Ruling::Ask(Box::new(self.request(&case))))
    }

    fn read(&self, judged: Judged<'_>, reply: &Reply) -> Outcome {
        if let Some(words) = &reply.refusal {
            return Outcome::Refused { reply: words.clone() };
        }
        match parse::scores(&reply.text) {
            Ok(scores) => {
                let stance = closed_accuracy::stance(judged.answer);
                let expected = match judged.sample.polarity {
                    Some(Polarity::Hallucination) => Stance::Denies,
                    _ => closed_accuracy::stance(last_answer(judged.sample)),
                };
                let correct = scores.accuracy >= RIGHT;
                let reason = explanation(&reply.text);
                Outcome::Scored { scores: Some(scores), agreement: None, stance, expected, correct, reason }
            }
            Err(Unread::Refusal) => Outcome::Refused { reply: reply.text.clone() },
            Err(_) => Outcome::Unparsable { reply: reply.text.clone() },
        }
    }

    fn anchor(&self) -> AnchorPolicy {
        self.anchor
    }

    fn asks(&self) -> bool {
        true
    }

    fn reversed(&self) -> Option<Box<dyn Judge>> {
        let anchored = self.anchor != AnchorPolicy::None;
        anchored.then(|| Box::new(Self { order: Order::SampleFirst, ..self.clone() }) as Box<dyn Judge>)
    }
}

/// The judge by its name.
pub struct Llm;

impl JudgeDef for Llm {
    fn name(&self) -> &'static str {
        "llm"
    }

    fn about(&self) -> &'static str {
        "Asks the language model of [llm.judge] for four clinical criteria from 1 to 10, as MedHallTune does.\n\
         It sees the annotation in place of the image, the reference answer, and (judge.anchor) a sample answer with its \
         scores. The instruction is this program's own, or the file of judge.prompt; its hash is part of the judge's \
         signature. Replies that cannot be read are asked for again (judge.retries) and never become numbers."
    }

    fn open(&self, plan: &Plan) -> Result<Box<dyn Judge>> {
        Ok(Box::new(LlmJudge::new(plan, crate::recipes::medhalltune::prompt::JUDGE.text, None)?))
    }
}

fn read(path: &Path) -> Result<String> {
    let text = std::fs::read_to_string(path).map_err(|e| {
        Error::new(Kind::Config, "cannot read the judge's prompt")
            .at(path.display())
            .help("check judge.prompt")
            .source(e)
    })?;
    match text.trim() {
        "" => Err(Error::new(Kind::Config, "the judge's prompt is empty").at(path.display())),
        text => Ok(text.to_string()),
    }
}

/// An instruction without its last sentence, the one about the sample answer; the whole if it is a single sentence.
fn without_last_sentence(text: &str) -> &str {
    let text = text.trim();
    let mut ends = text
        .char_indices()
        .filter(|(i, c)| matches!(c, '.' | '!' | '?') && text[i + 1..].starts_with(char::is_whitespace));
    match ends.next_back() {
        Some((i, _)) => text[..=i].trim_end(),
        None => text,
    }
}

/// What a reply says behind its first line.
fn explanation(reply: &str) -> String {
    reply.trim().split_once('\n').map_or("", |(_, rest)| rest).trim().to_string()
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::{
        judge::Anchor,
        llm::{Key, Part, Usage},
        recipes::medhalltune::prompt,
        sample::{Role, Sample, Turn},
    };

    fn row(answer: &str) -> Sample {
        let turn = |role, text: &str| Turn { role, text: text.into() };
        let turns = vec![turn(Role::User, "Which lung is it?\n<image>"), turn(Role::Assistant, answer)];
        Sample { turns, annotation: Some("A film of the chest.".into()), ..Sample::default() }
    }

    fn judge() -> LlmJudge {
        LlmJudge::new(&Plan::default(), prompt::JUDGE.text, None).unwrap()
    }

    pub(crate) fn reply(text: &str) -> Reply {
        Reply {
            key: Key([0; 32]),
            text: text.into(),
            finish_reason: Some("stop".into()),
            refusal: None,
            usage: Usage::default(),
            usd: 0.0,
            latency_ms: 0,
            model: None,
            fingerprint: None,
            from_cache: false,
        }
    }

    fn texts(request: &Request) -> Vec<String> {
        let text = |p: &Part| match p {
            Part::Text { text } => text.clone(),
            Part::Image { .. } => panic!("the judge sees no image"),
        };
        request.messages.iter().flat_map(|m| &m.parts).map(text).collect()
    }

    #[test]
    fn without_a_sample_the_instruction_does_not_speak_of_one() {
        let sample = row("The left lung.");
        let ask = |anchor: Option<&Anchor>| match judge().judge(Judged { sample: &sample, answer: "left", anchor }) {
            Ok(Ruling::Ask(request)) => texts(&request),
            other => panic!("{other:?}"),
        };
        let alone = ask(None);
        assert_eq!(alone.len(), 2);
        assert!(!alone[1].contains("sample answer") && alone[1].contains("Risk Level"), "{}", alone[1]);
        let beside = ask(Some(&Anchor { answer: "right".into(), reply: "1 1 1 1\nNo.".into() }));
        assert!(beside[1].contains("sample answer"));
        assert_eq!(beside[2], "Sample Answer: right\n\nSample Scores: 1 1 1 1\nNo.\n\n");
        assert_eq!(without_last_sentence("One. Two? Three."), "One. Two?");
        assert_eq!(without_last_sentence("One 1.5"), "One 1.5");
    }

    #[test]
    fn replies_become_outcomes() {
        let mut sample = row("No, it is the left lung.");
        sample.polarity = Some(Polarity::Hallucination);
        let read = |text: &str| judge().read(Judged { sample: &sample, answer: "No.", anchor: None }, &reply(text));
        let Outcome::Scored { correct, stance, expected, reason, scores, .. } = read("8 7 6 9\n\nIt is right.") else {
            panic!("not scored")
        };
        assert_eq!((correct, stance, expected), (true, Stance::Denies, Stance::Denies));
        assert_eq!((reason.as_str(), scores.unwrap().risk), ("It is right.", 9.0));
        assert!(matches!(read("6 7 6 9"), Outcome::Scored { correct: false, .. }));
        assert!(matches!(read("I'm sorry, I cannot."), Outcome::Refused { .. }));
        assert!(matches!(read("11 7 6 9"), Outcome::Unparsable { .. }));
    }

    #[test]
    fn the_signature_changes_with_the_prompt() {
        let dir = tempfile::tempdir().unwrap();
        let mut plan = Plan::default();
        let path = dir.path().join("p.txt");
        std::fs::write(&path, "Rate it. Compare it.").unwrap();
        plan.judge.prompt = Some(path.clone());
        let other = LlmJudge::new(&plan, prompt::JUDGE.text, None).unwrap();
        assert_ne!(other.signature(), judge().signature());
        assert_eq!(other.alone, "Rate it.");
        std::fs::write(&path, " ").unwrap();
        assert!(LlmJudge::new(&plan, "", None).is_err());
    }
}
