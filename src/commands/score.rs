//! `medtune score`: scores of anybody's predictions.

use std::path::PathBuf;

use super::{columns, context, emit};
use crate::{
    cli::{Global, ScoreArgs},
    error::{Error, Kind, Result},
    metric::text::TextMetricOptions,
    run_dir::RunDir,
    score::{self, Options, ScoreReport},
    stage::report::words,
};

/// Scores the files and prints the table; a gate says no when lines were set aside.
pub(super) fn score(global: &Global, args: &ScoreArgs) -> Result<()> {
    let ctx = context(global)?;
    let stem = args.files[0].file_stem().map_or_else(|| "predictions".into(), |s| s.to_string_lossy().into_owned());
    let out = args.out.clone().unwrap_or_else(|| PathBuf::from("score").join(stem));
    let mut text = TextMetricOptions::new(ctx.device.clone());
    text.bertscore_model = args.bertscore_model.clone();
    text.bertscore_layer = args.bertscore_layer;
    text.bertscore_idf = args.bertscore_idf;
    text.bertscore_baseline = args.bertscore_baseline.clone();
    text.download = args.download;
    if args.judge.is_none() && !args.changes.all().is_empty() {
        return Err(Error::new(Kind::Config, "overrides are for the judge's recipe, and no judge is asked")
            .at("--set, --max-usd, --max-requests")
            .help("name the recipe with --judge, for example --judge medhalltune"));
    }
    let judge = args.judge.as_deref().map(|recipe| score::judge_plan(recipe, &args.changes.all())).transpose()?;
    let options = Options {
        predictions: args.files.clone(),
        references: args.reference.clone(),
        against: args.against.clone(),
        replies: args.replies.clone(),
        judge: judge.map(Box::new),
        part: args.split,
        metrics: args.metrics.clone(),
        compat: args.compat.clone(),
        text,
        seed: args.seed,
    };
    let dir = RunDir::open(&out)?;
    let report = score::run(&options, &dir, &ctx)?;
    emit(global, &report, || format!("{}\nresults in {}", table(&report), out.display()))?;
    let aside = report.lines - report.scored;
    if aside > 0 {
        let codes: Vec<String> = report.set_aside.iter().map(|(code, n)| format!("{n} {code}")).collect();
        return Err(Error::new(Kind::Gate, "lines were set aside; the others are scored")
            .expected(format!("{} scored lines", report.lines))
            .found(format!("{} scored, {}", report.scored, codes.join(", ")))
            .help(format!("{} has every line with its reason", out.join("set_aside.jsonl").display())));
    }
    Ok(())
}

fn table(report: &ScoreReport) -> String {
    let parts = score::parts(report);
    let mut rows = vec![vec!["METRIC".to_string()]];
    rows[0].extend(parts.iter().map(|p| p.to_uppercase()));
    let mut count = vec!["rows".to_string()];
    count.extend(parts.iter().map(|p| report.parts.get(*p).unwrap_or(&report.scored).to_string()));
    rows.push(count);
    for m in &report.metrics {
        let mut row = vec![m.name.clone()];
        row.extend(parts.iter().map(|part| match m.estimates.get(*part) {
            Some(e) => words::with_interval(e, m.unit),
            None => "-".into(),
        }));
        rows.push(row);
    }
    let mut text = columns(&rows);
    for m in &report.metrics {
        for (part, d) in &m.differences {
            let difference = words::difference(d, m.unit).replace(['\u{a0}'], " ").replace('\u{2212}', "-");
            text.push_str(&format!("{}, {part}, minus the other: {difference}, {}\n", m.name, d.finding.words()));
        }
    }
    let judged: Vec<String> = report.judge.iter().map(|(what, n)| format!("{n} {}", what.replace('_', " "))).collect();
    text.push_str(&format!(
        "\n{} of {} lines scored ({} from an earlier call); judge: {}. Brackets: 95 % interval over images; shares in %.\n",
        report.scored,
        report.lines,
        report.taken_over,
        judged.join(", ")
    ));
    if report.missing > 0 {
        text.push_str(&format!(
            "{} reference questions have no prediction: {}{}\n",
            report.missing,
            report.missing_examples.join(", "),
            if report.missing > report.missing_examples.len() { ", .." } else { "" }
        ));
    }
    for note in &report.notes {
        text.push_str(&format!("note: {note}\n"));
    }
    text
}
