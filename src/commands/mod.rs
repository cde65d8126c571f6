//! One function per verb. This module is the only writer to standard output: results and nothing else, as text or, with
//! `--json`, as one JSON value.

use std::{error::Error as _, io::Write};

use serde::Serialize;
use serde_json::json;

use crate::{
    cli::{Cli, DataVerb, Global, ModelsVerb, RecipesVerb, Verb},
    error::{Error, Kind, Result},
    kernel,
    progress::Progress,
    stage::Ctx,
};

mod ablate;
mod bench;
mod catalogue;
mod data;
mod dry;
mod export;
mod get;
mod inspect;
mod machine;
mod mock;
mod model;
mod prediction;
mod repro;
mod run;
mod score;
mod synth;
mod trace;
mod unmerge;
mod verify;

/// Does what the command line asks for.
///
/// # Errors
/// Whatever stopped it; [`Kind::exit_code`] says with which code to exit.
pub fn run(cli: Cli) -> Result<()> {
    let g = &cli.global;
    if let Some(kernels) = g.kernels {
        kernel::choose(kernels);
    }
    match cli.verb {
        Verb::Run(args) => run::stages(g, &args, "report", false),
        Verb::Repro(args) => repro::repro(g, &args),
        Verb::Build(a) if a.dry_run => dry::build(g, &a.stage.recipe),
        Verb::Build(a) => run::stages(g, &a.stage.recipe, "build", a.stage.force),
        Verb::Qc(a) if a.dry_run => dry::qc(g, &a.stage.recipe),
        Verb::Qc(a) => run::stages(g, &a.stage.recipe, "qc", a.stage.force),
        Verb::Encode(a) => run::stages(g, &a.recipe, "encode", a.force),
        Verb::Train(a) => run::stages(g, &a.recipe, "train", a.force),
        Verb::Eval(a) => run::stages(g, &a.recipe, "eval", a.force),
        Verb::Judge(a) => run::judge(g, &a),
        Verb::Report(a) => run::stages(g, &a.recipe, "report", a.force),
        Verb::Score(args) => score::score(g, &args),
        Verb::Ablate(args) => ablate::ablate(g, &args),
        Verb::Plan(args) => run::plan(g, &args),
        Verb::Bench(args) => bench::bench(g, &args),
        Verb::Generate(args) => model::answer(g, &args),
        Verb::Merge(args) => export::fold(g, &args),
        Verb::Unmerge(args) => unmerge::unmerge(g, &args),
        Verb::Export(args) => export::export(g, &args),
        Verb::Data(DataVerb::Check(args)) => data::check(g, &args),
        Verb::Data(DataVerb::Show { recipe, row }) => data::show(g, &recipe, row),
        Verb::Data(DataVerb::Leak(args)) => data::leak(g, &args),
        Verb::MockLlm(args) => mock::serve(g, &args),
        Verb::Data(DataVerb::Get(args)) => get::get(g, &args),
        Verb::Data(DataVerb::Review(args)) => data::review(g, &args),
        Verb::Data(DataVerb::Export(args)) => data::export(g, &args),
        Verb::Data(DataVerb::Card { run }) => data::card(g, &run),
        Verb::Models { verb: None } => catalogue::models(g),
        Verb::Metrics => catalogue::metrics(g),
        Verb::Models { verb: Some(ModelsVerb::Inspect(args)) } => inspect::inspect(g, &args),
        Verb::Models { verb: Some(ModelsVerb::Synth(args)) } => synth::synth(g, &args),
        Verb::Datasets => catalogue::datasets(g),
        Verb::Recipes { verb: None } => catalogue::recipes(g),
        Verb::Recipes { verb: Some(RecipesVerb::Show { name }) } => catalogue::recipe(g, &name),
        Verb::Verify(args) => verify::verify(g, &args),
        Verb::Devices => machine::devices(g),
        Verb::ProbeDevice => machine::probe(g),
        Verb::Doctor { out } => machine::doctor(g, &out),
        Verb::Explain { name } => catalogue::explain(g, &name),
        Verb::Trace { row, run } => trace::trace(g, &row, &run),
    }
}

/// Says what went wrong: on standard error, or with `json` as an object on standard output.
pub fn print_error(error: &Error, json: bool) {
    let mut causes = Vec::new();
    let mut next = error.source();
    while let Some(cause) = next {
        causes.push(cause.to_string());
        next = cause.source();
    }
    if json {
        let value = json!({
            "error": error.to_string(),
            "caused_by": causes,
            "help": error.help_line(),
            "exit_code": error.kind().exit_code(),
        });
        // Nothing is left to be done if even this cannot be printed.
        let _ = print(&format!("{value:#}"));
        return;
    }
    let mut text = match error.kind() {
        Kind::Interrupted => format!("{error}\n"),
        _ => format!("error: {error}\n"),
    };
    for cause in causes {
        text.push_str(&format!("caused by: {cause}\n"));
    }
    if let Some(help) = error.help_line() {
        text.push_str(&format!("help: {help}\n"));
    }
    let _ = std::io::stderr().write_all(text.as_bytes());
}

/// Prints a result: `value` for machines, `text` for people.
fn emit(global: &Global, value: impl Serialize, text: impl FnOnce() -> String) -> Result<()> {
    if global.json {
        let value = serde_json::to_string_pretty(&value)
            .map_err(|e| Error::new(Kind::Run, "result has no JSON form").source(e))?;
        print(&value)
    } else {
        print(&text())
    }
}

/// Prints to standard output; that nobody reads on is no failure.
fn print(text: &str) -> Result<()> {
    let mut out = std::io::stdout().lock();
    match writeln!(out, "{}", text.trim_end()).and_then(|()| out.flush()) {
        Err(e) if e.kind() != std::io::ErrorKind::BrokenPipe => Err(Error::io("standard output", e)),
        _ => Ok(()),
    }
}

/// How a verb shows its progress.
fn progress(global: &Global) -> Progress {
    if global.quiet { Progress::Silent } else { Progress::detect() }
}

/// Context of a verb that works on a device; signals end it at a safe point.
fn context(global: &Global) -> Result<Ctx> {
    let progress = progress(global);
    let (device_spec, _) = crate::device::trust::open(&global.device, progress)?;
    let ctx = Ctx::new(device_spec, progress)?;
    crate::run::stop_on_signals(&ctx.stop)?;
    Ok(ctx)
}

/// Columns of text, each as wide as its widest cell.
fn columns(rows: &[Vec<String>]) -> String {
    let count = rows.iter().map(Vec::len).max().unwrap_or(0);
    let width = |c: usize| rows.iter().filter_map(|r| r.get(c)).map(|s| s.chars().count()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..count).map(width).collect();
    let mut text = String::new();
    for row in rows {
        let cells = row.iter().zip(&widths).map(|(cell, w)| format!("{cell:w$}"));
        text.push_str(cells.collect::<Vec<_>>().join("  ").trim_end());
        text.push('\n');
    }
    text
}

/// A number with its order of magnitude.
fn count(n: usize) -> String {
    let x = n as f64;
    match n {
        0..10_000 => n.to_string(),
        10_000..10_000_000 => format!("{:.1}k", x / 1e3),
        10_000_000..10_000_000_000 => format!("{:.1}M", x / 1e6),
        _ => format!("{:.1}G", x / 1e9),
    }
}

/// A number of bytes in decimal units.
fn bytes(n: u64) -> String {
    let x = n as f64;
    match n {
        0..1_000_000 => format!("{:.1} kB", x / 1e3),
        1_000_000..1_000_000_000 => format!("{:.1} MB", x / 1e6),
        _ => format!("{:.2} GB", x / 1e9),
    }
}

/// First line of a doc text.
fn first_line(doc: &str) -> &str {
    doc.trim().lines().next().unwrap_or_default()
}
