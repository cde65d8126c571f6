//! What asking a language model would say and cost, with nothing sent.

use serde_json::json;

use super::{
    columns, context, emit,
    run::{out_dir, resolve},
};
use crate::{
    cli::{Global, RecipeArgs},
    error::{Error, Kind, Result},
    judge::{Anchor, AnchorPolicy, Judged, Ruling},
    llm::{Estimate, Message, Part, Request, Speaker},
    plan::Plan,
    registry,
    row_file::RowsById,
    run_dir::stream_jsonl,
    sample::Sample,
    stage::{
        Ctx,
        construct::{self, LEDGER},
        eval::{Answer, Which},
    },
};

/// Requests of construction.
pub(super) fn build(global: &Global, args: &RecipeArgs) -> Result<()> {
    let (resolved, _) = resolve(global, args)?;
    let plan = &resolved.plan;
    let Some(author) = plan.recipe()?.author() else { return Err(asks_nobody(plan)) };
    let ctx = Ctx { offline: true, ..context(global)? };
    let scratch = tempfile::tempdir().map_err(|e| Error::io(std::env::temp_dir(), e))?;
    let source = registry::datasets().find(|d| d.name() == plan.data.source);
    let source = source.ok_or_else(|| Error::new(Kind::Config, "unknown data source").found(&plan.data.source))?;
    let rows = construct::gather(source.open(&plan.data, plan.seed, scratch.path())?);
    let (mut unusable, mut images) = (0usize, 0usize);
    let limit = if plan.data.images == 0 { usize::MAX } else { plan.data.images };
    let requests = rows.take(limit).flat_map(|row| match row.and_then(|row| author.tasks(plan, &row)) {
        Ok(tasks) => {
            images += 1;
            tasks.into_iter().map(|task| Ok(task.request)).collect()
        }
        Err(_) => {
            unusable += 1;
            Vec::new()
        }
    });
    let estimate = estimate(plan, &out_dir(args, &resolved), &ctx, requests)?;
    print(global, &estimate, &[("images", images), ("source rows that cannot be used", unusable)])
}

/// Requests of judging the answers that are there.
pub(super) fn judge(global: &Global, args: &RecipeArgs) -> Result<()> {
    let (resolved, _) = resolve(global, args)?;
    let plan = &resolved.plan;
    let judge = plan.make_judge()?;
    if !judge.asks() {
        return Err(asks_nobody(plan));
    }
    let ctx = Ctx { offline: true, ..context(global)? };
    let out = out_dir(args, &resolved);
    let samples = RowsById::<Sample>::open(out.join("kept.jsonl"))?;
    // What a reply will be like in length.
    let reply = "7 8 6 9\n\nThe answer says what the image shows, with little detail and without any risk.";
    let mut answers = 0;
    let requests = stream_jsonl::<Answer>(&out.join("answers.jsonl"))?.filter_map(|answer| {
        let request = (|| -> Result<Option<Request>> {
            answers += 1;
            let Answer { id, model, answer } = answer?;
            let Some(sample) = samples.get(&id)? else { return Ok(None) };
            let anchor = Anchor { answer: answer.clone(), reply: reply.into() };
            let alone = match judge.anchor() {
                AnchorPolicy::None => true,
                AnchorPolicy::Base => model == Which::Base,
                AnchorPolicy::File | AnchorPolicy::Reference => false,
            };
            let anchor = (!alone).then_some(&anchor);
            Ok(match judge.judge(Judged { sample: &sample, answer: &answer, anchor })? {
                Ruling::Ask(request) => Some(*request),
                Ruling::Settled(_) => None,
            })
        })();
        request.transpose()
    });
    let estimate = estimate(plan, &out, &ctx, requests)?;
    print(global, &estimate, &[("answers", answers)])
}

/// Requests of the check against annotations, as if the rules dropped none of the rows that were built.
pub(super) fn qc(global: &Global, args: &RecipeArgs) -> Result<()> {
    let (resolved, _) = resolve(global, args)?;
    let plan = &resolved.plan;
    let verifier = plan.recipe()?.verifier().filter(|_| plan.qc.enabled && plan.qc.verify.enabled);
    let Some(verifier) = verifier else { return Err(asks_nobody(plan)) };
    let ctx = Ctx { offline: true, ..context(global)? };
    let out = out_dir(args, &resolved);
    let built = out.join("samples.jsonl");
    if !built.exists() {
        return Err(Error::new(Kind::Run, "there are no rows to check yet")
            .at(built.display())
            .help("run `medtune build` first; `medtune build --dry-run` shows what that would ask"));
    }
    let (mut rows, mut unusable) = (0usize, 0usize);
    let requests = stream_jsonl::<Sample>(&built)?.filter_map(|row| match row {
        Err(e) => Some(Err(e)),
        Ok(row) if row.polarity.is_none() => None,
        Ok(row) => {
            rows += 1;
            let request = verifier.request(plan, &row).ok();
            unusable += usize::from(request.is_none());
            request.map(Ok)
        }
    });
    let estimate = estimate(plan, &out, &ctx, requests)?;
    let counts = [("rows before the rules, which drop some of them", rows), ("rows without a request", unusable)];
    print(global, &estimate, &counts)
}

fn asks_nobody(plan: &Plan) -> Error {
    Error::new(Kind::Config, "nothing would be asked: this needs no language model").at(&plan.recipe)
}

/// What requests would take; replies that are in the ledger of the run directory cost nothing.
fn estimate(
    plan: &Plan,
    out: &std::path::Path,
    ctx: &Ctx,
    requests: impl Iterator<Item = Result<Request>>,
) -> Result<Estimate> {
    let scratch = tempfile::tempdir().map_err(|e| Error::io(std::env::temp_dir(), e))?;
    let dir = if out.join(LEDGER).exists() { out } else { scratch.path() };
    let client = construct::client(plan, dir, ctx)?;
    client.run(requests.map(|request| Ok(((), request?))), |(), _| Ok(()))?;
    client.estimate().ok_or_else(|| Error::new(Kind::Run, "a dry run gave no estimate"))
}

fn print(global: &Global, estimate: &Estimate, counts: &[(&str, usize)]) -> Result<()> {
    let all: serde_json::Map<_, _> = counts.iter().map(|(k, n)| ((*k).to_string(), (*n).into())).collect();
    emit(global, json!({ "counts": all, "estimate": estimate }), || {
        let mut text = String::new();
        for request in &estimate.examples {
            text.push_str(&format!("request to [llm.{}]\n", request.endpoint.name()));
            request.messages.iter().for_each(|message| text.push_str(&shown(message)));
            text.push('\n');
        }
        let mut rows: Vec<Vec<String>> =
            counts.iter().map(|(name, n)| vec![(*name).to_string(), n.to_string()]).collect();
        rows.push(vec!["requests".into(), estimate.requests.to_string()]);
        rows.push(vec!["  already answered".into(), estimate.cached.to_string()]);
        rows.push(vec!["images sent".into(), estimate.images.to_string()]);
        rows.push(vec!["tokens of prompts, about".into(), estimate.prompt_tokens.to_string()]);
        rows.push(vec!["tokens of replies, at most".into(), estimate.completion_tokens.to_string()]);
        for (model, share) in &estimate.models {
            let usd = share.usd.map_or("no price in the recipe".into(), |usd| format!("{usd:.2} US dollars"));
            rows.push(vec![format!("  {model}"), format!("{} requests, {usd}", share.requests)]);
        }
        rows.push(vec!["cost, at most".into(), format!("{:.2} US dollars", estimate.usd)]);
        format!("{text}{}nothing was sent", columns(&rows))
    })
}

/// A message as a reader sees it.
fn shown(message: &Message) -> String {
    let who = match message.role {
        Speaker::System => "system",
        Speaker::User => "user",
        Speaker::Assistant => "assistant",
    };
    let mut text = format!("--- {who}\n");
    for part in &message.parts {
        match part {
            Part::Text { text: words } => text.push_str(&format!("{}\n", words.trim_end())),
            Part::Image { path, .. } => text.push_str(&format!("[image {}]\n", path.display())),
        }
    }
    text
}
