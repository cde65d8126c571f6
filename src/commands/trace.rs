//! Everything that a run directory knows of one row: image, source, request and reply, checks, split, training steps,
//! answers, verdicts.

use std::path::Path;

use serde::de::DeserializeOwned;
use serde_json::{Map, Value, json};

use super::emit;
use crate::{
    batching::Batching,
    cli::Global,
    error::{Error, Kind, Result},
    llm::Recorded,
    loader::Rows,
    models,
    plan::{Plan, Resolved, embedded_name},
    run_dir::{read_json, read_jsonl, sha256},
    sample::{Sample, Split},
    stage::{
        construct::LEDGER,
        encode::RejectedRow,
        eval::Answer,
        judge::{PanelVerdict, Verdict},
        train::{TrainReport, preference_pairs},
    },
    train::ObjectiveType,
};

/// Keys of `meta` that a request made, with what it was for.
const REQUESTS: [(&str, &str); 2] = [("construct", "construction"), ("qc", "quality control")];

/// Prints what is known of row `id` in the run directory `run`.
pub(super) fn trace(global: &Global, id: &str, run: &Path) -> Result<()> {
    if !run.join("samples.jsonl").exists() && !run.join("rejected.jsonl").exists() {
        return Err(Error::new(Kind::Config, "this is no run directory")
            .at(run.display())
            .expected("samples.jsonl")
            .help("name the directory that `medtune run` printed"));
    }
    let story = Story::read(id, run)?;
    emit(global, &story.value, || story.text())
}

struct Story {
    value: Value,
}

/// Rows of a file of the run directory; none where it is absent.
fn rows<T: DeserializeOwned>(run: &Path, name: &str) -> Result<Vec<T>> {
    let path = run.join(name);
    if path.exists() { read_jsonl(&path) } else { Ok(Vec::new()) }
}

impl Story {
    fn read(id: &str, run: &Path) -> Result<Self> {
        let kept = rows::<Sample>(run, "kept.jsonl")?.into_iter().find(|s| s.id == id);
        let rejected = rows::<RejectedRow>(run, "rejected.jsonl")?.into_iter().find(|r| r.sample.id == id);
        let built = rows::<Sample>(run, "samples.jsonl")?.into_iter().find(|s| s.id == id);
        let state = match (&kept, &rejected) {
            (Some(_), _) => json!({ "kept": true }),
            (None, Some(r)) => json!({ "kept": false, "code": r.code, "detail": r.detail }),
            (None, None) => json!({ "kept": null }),
        };
        let Some(sample) = kept.clone().or(rejected.map(|r| r.sample)).or(built) else {
            return Err(unknown(id, run));
        };
        let images: Vec<Value> =
            sample.images.iter().map(|i| json!({ "path": i.path, "sha256": sha256(&i.path).ok() })).collect();
        let mut value = json!({
            "id": sample.id, "state": state, "split": sample.split, "group": sample.group, "origin": sample.origin,
            "images": images, "annotation": sample.annotation, "polarity": sample.polarity,
            "category": sample.category, "turns": sample.turns, "meta": sample.meta,
        });
        let ledger = run.join(LEDGER);
        let requests: Vec<Value> =
            keys(&sample.meta).into_iter().map(|(what, key)| exchange(what, &key, &ledger)).collect::<Result<_>>()?;
        value["requests"] = requests.into();
        value["training_steps"] = match kept.filter(|s| s.split == Split::Train) {
            Some(_) => json!(steps(id, run)?),
            None => Value::Null,
        };
        let verdicts: Vec<Verdict> = rows(run, "verdicts.jsonl")?;
        let panel: Vec<PanelVerdict> = rows(run, "panel.jsonl")?;
        let answers = rows::<Answer>(run, "answers.jsonl")?.into_iter().filter(|a| a.id == id);
        let judged = |answer: Answer| -> Result<Value> {
            let own = verdicts.iter().find(|v| v.id == id && v.model == answer.model);
            let others: Vec<_> =
                panel.iter().filter(|p| p.verdict.id == id && p.verdict.model == answer.model).collect();
            let exchanges: Vec<Value> = own
                .into_iter()
                .chain(others.iter().map(|p| &p.verdict))
                .flat_map(|v| &v.requests)
                .map(|key| exchange("judge", &key.to_string(), &ledger))
                .collect::<Result<_>>()?;
            Ok(json!({
                "model": answer.model, "answer": answer.answer, "verdict": own, "panel": others, "requests": exchanges,
            }))
        };
        value["answers"] = answers.map(judged).collect::<Result<Vec<_>>>()?.into();
        Ok(Self { value })
    }

    fn text(&self) -> String {
        let v = &self.value;
        let mut out = String::new();
        let mut line = |name: &str, text: &str| {
            let text = text.trim_end().replace('\n', &format!("\n{:17}", ""));
            out.push_str(&format!("{name:<16} {text}\n"));
        };
        line("row", plain(&v["id"]).as_str());
        match v["state"]["kept"].as_bool() {
            Some(true) => line("state", "kept"),
            Some(false) => {
                line("state", &format!("rejected, {}: {}", plain(&v["state"]["code"]), plain(&v["state"]["detail"])))
            }
            None => line("state", "built, not checked yet"),
        }
        line("split", &plain(&v["split"]));
        let file = plain(&v["origin"]["file"]);
        line("source", &format!("{} {file} row {}", plain(&v["origin"]["dataset"]), v["origin"]["row"]));
        for image in v["images"].as_array().into_iter().flatten() {
            line("image", &format!("{}\nsha256 {}", plain(&image["path"]), plain(&image["sha256"])));
        }
        line("annotation", &plain(&v["annotation"]));
        line("category", &format!("{} {}", plain(&v["polarity"]), plain(&v["category"])));
        for turn in v["turns"].as_array().into_iter().flatten() {
            line(&plain(&turn["role"]), &plain(&turn["text"]));
        }
        let check = &v["meta"]["qc"];
        if !check.is_null() {
            line("checked", &format!("{}: {}", plain(&check["judgement"]), plain(&check["reason"])));
        }
        for request in v["requests"].as_array().into_iter().flatten() {
            describe(request, &mut line);
        }
        match &v["training_steps"] {
            Value::Array(all) => {
                let all: Vec<String> = all.iter().map(Value::to_string).collect();
                line("training steps", if all.is_empty() { "none yet".into() } else { all.join(", ") }.as_str());
            }
            _ => line("training steps", "none, the row is not in the training split"),
        }
        for answer in v["answers"].as_array().into_iter().flatten() {
            line(&format!("answer, {}", plain(&answer["model"])), &plain(&answer["answer"]));
            let verdict = &answer["verdict"];
            if !verdict.is_null() {
                let scores = &verdict["scores"];
                let scores = if scores.is_null() { String::new() } else { format!(" {scores}") };
                let why = ["reason", "reply", "message"].map(|k| plain(&verdict[k])).concat();
                line("verdict", &format!("{}{scores}\n{why}", plain(&verdict["outcome"])));
            }
            for request in answer["requests"].as_array().into_iter().flatten() {
                describe(request, &mut line);
            }
        }
        out
    }
}

/// A request and its reply on a few lines.
fn describe(request: &Value, line: &mut impl FnMut(&str, &str)) {
    let name = format!("request, {}", plain(&request["for"]).replace("quality control", "check"));
    line(&name, &format!("{} {}", plain(&request["key"]), plain(&request["model"])));
    let reply = &request["reply"];
    match reply["choices"][0]["message"]["content"].as_str() {
        Some(text) => line("reply", text),
        None if reply.is_null() => line("reply", "not in the ledger"),
        None => line("reply", &reply.to_string()),
    }
}

/// A value without the quotes of JSON; empty for null.
fn plain(value: &Value) -> String {
    match value {
        Value::Null => String::new(),
        Value::String(text) => text.clone(),
        other => other.to_string(),
    }
}

/// Addresses of the requests that a row's meta data names.
fn keys(meta: &Map<String, Value>) -> Vec<(&'static str, String)> {
    let nested = REQUESTS.iter().filter_map(|(key, what)| Some((*what, meta.get(*key)?.get("request")?.as_str()?)));
    let own = meta.get("request").and_then(Value::as_str).map(|key| ("construction", key));
    nested.chain(own).map(|(what, key)| (what, key.to_string())).collect()
}

fn exchange(what: &str, key: &str, ledger: &Path) -> Result<Value> {
    let found = if ledger.exists() { Recorded::find(ledger, key)? } else { None };
    Ok(match found {
        None => json!({ "for": what, "key": key, "reply": null }),
        Some(r) => json!({
            "for": what, "key": key, "endpoint": r.endpoint, "model": r.model, "body": r.body, "reply": r.reply,
            "usd": r.usd, "latency_ms": r.latency_ms,
        }),
    })
}

/// Optimizer steps, from 1, whose batches had the row; empty before training.
fn steps(id: &str, run: &Path) -> Result<Vec<usize>> {
    if !run.join("train.json").exists() {
        return Ok(Vec::new());
    }
    let report: TrainReport = read_json(&run.join("train.json"))?;
    let plan = Resolved::new(&run.join("plan.toml").display().to_string(), &[])?.plan;
    let left_out: Vec<&str> = report.rejected.iter().map(|(id, _)| id.as_str()).collect();
    // Of preference pairs, the chosen answer names the row, and either may be asked for.
    let train: Vec<[Sample; 2]> = match plan.train.objective {
        ObjectiveType::Dpo => preference_pairs(&plan, run, Split::Train)?,
        ObjectiveType::Sft => {
            let kept = rows::<Sample>(run, "kept.jsonl")?.into_iter();
            kept.filter(|s| s.split == Split::Train).map(|s| [s.clone(), s]).collect()
        }
    };
    let train: Vec<_> = train.into_iter().filter(|[row, _]| !left_out.contains(&row.id.as_str())).collect();
    let wanted: Vec<usize> = (0..train.len()).filter(|i| train[*i].iter().any(|sample| sample.id == id)).collect();
    if wanted.is_empty() {
        return Ok(Vec::new());
    }
    let config = &plan.train;
    let batching = Batching::of(config, plan.seed);
    // Only rows that are packed or grouped by length have to be looked at again.
    let lengths =
        if config.group_by_length || config.packing { lengths(&plan, run, train)? } else { vec![0; train.len()] };
    let mut found = Vec::new();
    let (mut step, mut epoch) = (0, 0);
    while step < report.steps {
        let all = batching.epoch(&lengths, epoch);
        if all.is_empty() {
            break;
        }
        for micro in all.into_iter().take(report.steps - step) {
            step += 1;
            if micro.iter().flatten().flatten().any(|i| wanted.contains(i)) {
                found.push(step);
            }
        }
        epoch += 1;
    }
    Ok(found)
}

/// Lengths of the training rows, as training saw them.
fn lengths(plan: &Plan, run: &Path, train: Vec<[Sample; 2]>) -> Result<Vec<usize>> {
    let base = match &plan.model.checkpoint {
        Some(path) if embedded_name(path).is_none() => path.clone(),
        _ => run.join("base"),
    };
    let processor = models::processor(&base, &plan.model.load_options())?;
    Ok(Rows::survey_pairs(train, processor.as_ref(), plan.train.max_length, || {}).0.lengths)
}

fn unknown(id: &str, run: &Path) -> Error {
    let near = rows::<Sample>(run, "samples.jsonl").unwrap_or_default();
    let near = near.iter().map(|s| (strsim::damerau_levenshtein(&s.id, id), &s.id)).min();
    let error = Error::new(Kind::Config, "no row has this id").at(id);
    match near {
        Some((_, id)) => error.help(format!("the nearest id is {id}")),
        None => error,
    }
}
