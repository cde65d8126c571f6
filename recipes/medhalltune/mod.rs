//! Instruction pairs with and without false premises from images and their annotations, made, checked and judged by
//! language models: the method of MedHallTune (arXiv 2502.20780).
//!
//! The paper's generation prompts are not published; the texts in `prompts/` are this program's own, and their hashes
//! are part of every run.

use std::{
    collections::BTreeMap,
    sync::{Arc, LazyLock},
};

use serde_json::{Value, json};

use crate::{
    error::{Error, Kind, Result},
    judge::{Judge, llm::LlmJudge},
    llm::{EndpointRole, Message, Part, Reply, ReplySchema, Request, Sampling, Speaker},
    plan::Plan,
    recipe::{Author, Made, PolarityPolicy, Recipe, Task, Verifier},
    run_dir::{sha256, sha256_bytes},
    sample::{Polarity, Role, Sample, Turn, meta},
    stage::verify::{self, Finding},
};

pub mod answers;
pub mod categories;
pub mod parse;
pub mod prompt;
pub mod rehearsal;

/// The recipe.
pub struct MedHallTune;

/// Shorter annotations leave nothing to check an answer against.
const MIN_ANNOTATION_WORDS: usize = 5;

/// A reply with fewer items than this, where more were asked for, is asked for again.
const MIN_ITEMS: usize = 3;

/// Most items that are asked for in one request.
const MAX_ITEMS: usize = 30;

impl Recipe for MedHallTune {
    fn name(&self) -> &'static str {
        "medhalltune"
    }

    fn about(&self) -> &'static str {
        "Builds MedHallTune-like data from images with annotations through a language-model server, tunes and judges.\n\
         A model that sees image and annotation writes pairs with a false premise (nonexistent_object, \
         existent_manipulation, knowledge_distortion) and ordinary ones; a second pass that sees the annotation alone \
         drops pairs that disagree with it; answers are judged on four clinical criteria beside the base model's.\n\
         Servers are set in [llm]; `medtune run rehearsal` does all of it without a server or a key."
    }

    fn template(&self) -> &'static str {
        include_str!("medhalltune.toml")
    }

    fn check(&self, plan: &Plan) -> Vec<String> {
        let construct = &plan.construct;
        let (negatives, positives) = (construct.negatives_per_image, construct.positives_per_image);
        let mut problems = Vec::new();
        if negatives.max(positives) > MAX_ITEMS {
            problems.push(format!("construct: expected at most {MAX_ITEMS} pairs of each polarity an image"));
        }
        if negatives + positives == 0 {
            problems.push("construct: no pairs are made: both numbers of pairs an image are 0".into());
        }
        problems
    }

    fn author(&self) -> Option<&dyn Author> {
        Some(self)
    }

    fn verifier(&self) -> Option<&dyn Verifier> {
        Some(self)
    }

    fn prompts(&self) -> BTreeMap<String, String> {
        prompt::ALL.iter().map(|p| (p.file.to_string(), p.sha256())).collect()
    }

    fn judge(&self, plan: &Plan) -> Result<Box<dyn Judge>> {
        Ok(Box::new(LlmJudge::new(plan, prompt::JUDGE.text, None)?))
    }

    fn controls(&self) -> &'static str {
        include_str!("controls.jsonl")
    }

    fn panel(&self, plan: &Plan) -> Result<Vec<(String, Box<dyn Judge>)>> {
        let judge = |model: &String| {
            let judge = LlmJudge::new(plan, prompt::JUDGE.text, Some(model))?;
            Ok((model.clone(), Box::new(judge) as Box<dyn Judge>))
        };
        plan.judge.panel.iter().map(judge).collect()
    }
}

impl Author for MedHallTune {
    fn tasks(&self, plan: &Plan, sample: &Sample) -> Result<Vec<Task>> {
        let annotation = annotation(sample)?;
        let Some(image) = sample.images.first() else {
            return Err(Error::new(Kind::Data, "the row has no image").code("image_missing").at(&sample.id));
        };
        let sha256 = sha256(&image.path).map_err(|e| {
            Error::new(Kind::Image, "cannot read an image").code("image_error").at(image.path.display()).source(e)
        })?;
        let tasks = wanted(plan, sample).into_iter().filter(|(_, count)| *count > 0);
        Ok(tasks
            .map(|(polarity, count)| {
                let text = format!(
                    "The annotation of the image stands between two marker lines.\n\n{}\n\n{}",
                    prompt::block(ANNOTATION, annotation),
                    task(polarity, count, sample.origin.row)
                );
                let parts =
                    vec![Part::Text { text }, Part::Image { path: image.path.clone(), sha256: Some(sha256.clone()) }];
                let messages = vec![
                    Message::text(Speaker::System, prompt::SYSTEM.text.trim_end()),
                    Message { role: Speaker::User, parts },
                ];
                let mut request = Request::new(EndpointRole::Generate, messages);
                request.sampling = Sampling {
                    temperature: Some(plan.construct.temperature),
                    max_tokens: plan.construct.max_tokens,
                    seed: Some(plan.seed),
                    ..Sampling::default()
                };
                request.schema = Some(schema(polarity));
                Task { name: name_of(polarity), request }
            })
            .collect())
    }

    fn read(&self, plan: &Plan, sample: &Sample, task: &Task, reply: &Reply) -> Made {
        let polarity = polarity_of(task.name);
        let asked = wanted(plan, sample).iter().find(|(p, _)| *p == polarity).map_or(0, |(_, n)| *n);
        let parsed = parse::parse(&reply.text, reply.finish_reason.as_deref(), reply.refusal.as_deref(), polarity);
        let mut made = Made { faults: parsed.faults, ..Made::default() };
        made.again = parsed.items.len() < MIN_ITEMS.min(asked);
        for (i, item) in parsed.items.into_iter().enumerate() {
            if i < asked {
                made.rows.push(row(sample, task, reply, polarity, i, item));
            } else {
                let detail = format!("item {} of {asked} that were asked for", i + 1);
                let raw = format!("{}\n{}", item.question, item.answer);
                made.faults.push(crate::recipe::Fault { code: "surplus", detail, raw });
            }
        }
        made
    }
}

impl Verifier for MedHallTune {
    fn request(&self, _plan: &Plan, sample: &Sample) -> Result<Request> {
        let text = format!(
            "{}\n\n{}\n\n{}\n\n{}",
            prompt::block(ANNOTATION, annotation(sample)?),
            prompt::block("question", &sample.question()),
            prompt::block("answer", sample.answer()),
            prompt::VERIFY.fill(&[])
        );
        let messages = vec![
            Message::text(Speaker::System, prompt::VERIFY_SYSTEM.text.trim_end()),
            Message::text(Speaker::User, text),
        ];
        let mut request = Request::new(EndpointRole::Qc, messages);
        request.sampling = Sampling { temperature: Some(0.0), max_tokens: 300, ..Sampling::default() };
        Ok(request)
    }

    fn read(&self, reply: &Reply) -> Result<Finding, String> {
        verify::parse::finding(&reply.text)
    }
}

/// Label of the block that holds the annotation.
pub const ANNOTATION: &str = "annotation";

/// The annotation of a row.
fn annotation(sample: &Sample) -> Result<&str> {
    let text = sample.annotation.as_deref().unwrap_or_default().trim();
    let words = text.split_whitespace().count();
    if words < MIN_ANNOTATION_WORDS {
        return Err(Error::new(Kind::Data, "the annotation is too short to check answers against")
            .code("annotation_short")
            .at(&sample.id)
            .expected(format!("{MIN_ANNOTATION_WORDS} words or more"))
            .found(words));
    }
    Ok(text)
}

/// How many items of each polarity an image gets.
fn wanted(plan: &Plan, sample: &Sample) -> [(Polarity, usize); 2] {
    let construct = &plan.construct;
    let (negatives, positives) = match construct.polarity {
        PolarityPolicy::Both => (construct.negatives_per_image, construct.positives_per_image),
        PolarityPolicy::Alternate if sample.origin.row.is_multiple_of(2) => (construct.negatives_per_image, 0),
        PolarityPolicy::Alternate | PolarityPolicy::PositiveOnly => (0, construct.positives_per_image),
    };
    [(Polarity::Hallucination, negatives), (Polarity::NonHallucination, positives)]
}

/// What is asked for. The categories of false premises share the items evenly; images take turns with the remainder.
fn task(polarity: Polarity, count: usize, row: usize) -> String {
    match polarity {
        Polarity::NonHallucination => prompt::POSITIVE.fill(&[("count", count)]),
        Polarity::Hallucination => {
            let kinds = categories::NEGATIVE;
            let share = |i: usize| count / kinds.len() + usize::from((i + row) % kinds.len() < count % kinds.len());
            let mut values = vec![("count", count)];
            values.extend(kinds.iter().enumerate().map(|(i, name)| (*name, share(i))));
            prompt::NEGATIVE.fill(&values)
        }
    }
}

fn name_of(polarity: Polarity) -> &'static str {
    match polarity {
        Polarity::Hallucination => "negative",
        Polarity::NonHallucination => "positive",
    }
}

fn polarity_of(task: &str) -> Polarity {
    if task == "negative" { Polarity::Hallucination } else { Polarity::NonHallucination }
}

/// The shape of a reply.
fn schema(polarity: Polarity) -> ReplySchema {
    static SCHEMAS: LazyLock<[Arc<Value>; 2]> = LazyLock::new(|| {
        [Polarity::Hallucination, Polarity::NonHallucination].map(|polarity| {
            let text = json!({ "type": "string" });
            let item = json!({
                "type": "object",
                "properties": {
                    "category": { "type": "string", "enum": categories::of(polarity) },
                    "question": text, "answer": text, "evidence": text,
                },
                "required": ["category", "question", "answer", "evidence"],
                "additionalProperties": false,
            });
            Arc::new(json!({
                "type": "object",
                "properties": { "items": { "type": "array", "items": item } },
                "required": ["items"],
                "additionalProperties": false,
            }))
        })
    });
    let i = usize::from(polarity == Polarity::NonHallucination);
    ReplySchema { name: "items".into(), schema: Arc::clone(&SCHEMAS[i]) }
}

/// Key in `meta` of how a row was made. It never leaves the run directory.
pub const CONSTRUCT: &str = "construct";

/// Key in `meta` of the words of the annotation that support the answer. It never leaves the run directory.
pub const EVIDENCE: &str = "evidence";

fn row(image: &Sample, task: &Task, reply: &Reply, polarity: Polarity, i: usize, item: parse::Item) -> Sample {
    let letter = &task.name[..1];
    let mut sample = Sample {
        id: format!("{}-{letter}{i}", image.id),
        turns: vec![
            // Behind the question, as in all released rows.
            Turn { role: Role::User, text: format!("{}\n<image>", item.question) },
            Turn { role: Role::Assistant, text: item.answer },
        ],
        images: image.images.iter().take(1).cloned().collect(),
        polarity: Some(polarity),
        category: Some(item.category.into()),
        answer_type: None,
        options: Vec::new(),
        ..image.clone()
    };
    // What a question-answering set says of its own question is not so of this one.
    for key in [meta::QUESTION, meta::QUESTION_ID, meta::QUESTION_TYPE, meta::CONTENT_TYPE] {
        sample.meta.remove(key);
    }
    let prompts = [prompt::SYSTEM, if letter == "n" { prompt::NEGATIVE } else { prompt::POSITIVE }];
    let annotation = image.annotation.as_deref().unwrap_or_default();
    let file = task.request.messages.iter().flat_map(|m| &m.parts).find_map(|p| match p {
        Part::Image { sha256, .. } => sha256.clone(),
        Part::Text { .. } => None,
    });
    sample.meta.insert(
        CONSTRUCT.into(),
        json!({
            "task": task.name,
            "item": i,
            "request": reply.key,
            "model": reply.model,
            "fingerprint": reply.fingerprint,
            "prompts": prompts.iter().map(|p| (p.file.to_string(), Value::from(p.sha256()))).collect::<serde_json::Map<_, _>>(),
            "annotation_sha256": sha256_bytes(annotation.as_bytes()),
            "image_sha256": file,
        }),
    );
    if !item.evidence.is_empty() {
        sample.meta.insert(EVIDENCE.into(), item.evidence.into());
    }
    sample
}
