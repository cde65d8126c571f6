//! `score.html`: the numbers beside the published rows, and a seeded choice of rows to search.

use std::collections::BTreeMap;

use minijinja::Environment;
use rand::seq::SliceRandom;
use serde::Serialize;

use super::{MetricLine, ScoreReport, Scored, read::Part};
use crate::{
    error::Result,
    metric::Unit,
    random::stream,
    stage::report::{BROWSER, OurRow, STYLE, TABLES, failed, published::WHY_2, tables, words},
    statistics::{Difference, Estimate},
};

/// Rows that the page holds; the others are in `scores.jsonl`.
const SHOWN: usize = 300;

#[derive(Serialize)]
struct Page<'a> {
    style: &'static str,
    browser: &'static str,
    report: &'a ScoreReport,
    lead: String,
    parts: Vec<&'static str>,
    metrics: Vec<Line>,
    compared: bool,
    table_2: Vec<tables::Line>,
    columns_2: Vec<&'static str>,
    why_2: &'static [&'static str],
    cards: Vec<Card<'a>>,
}

#[derive(Serialize)]
struct Line {
    name: String,
    cells: Vec<Cell>,
}

/// A mean, its interval, and the difference from the other model.
#[derive(Serialize)]
struct Cell {
    value: String,
    interval: String,
    n: usize,
    difference: String,
}

#[derive(Serialize)]
struct Card<'a> {
    row: &'a Scored,
    part: &'static str,
    numbers: String,
}

/// Renders the page.
pub(super) fn html(report: &ScoreReport, rows: &[Scored], seed: u64) -> Result<String> {
    let mut environment = Environment::new();
    environment
        .add_template("score.html", include_str!("score.html"))
        .and_then(|()| environment.add_template("tables.html", TABLES))
        .map_err(|e| failed("a template is malformed", e))?;
    let template = environment.get_template("score.html").map_err(|e| failed("no template", e))?;
    let parts = parts(report);
    let ours = ours(report);
    let page = Page {
        style: STYLE,
        browser: BROWSER,
        report,
        lead: lead(report),
        metrics: report.metrics.iter().map(|m| line(m, &parts)).collect(),
        compared: report.metrics.iter().any(|m| !m.differences.is_empty()),
        parts,
        table_2: if ours.positive.is_empty() && ours.negative.is_empty() {
            Vec::new()
        } else {
            tables::table_2(&[ours])
        },
        columns_2: tables::COLUMNS.iter().map(|c| c.1).collect(),
        why_2: &WHY_2,
        cards: cards(rows, seed),
    };
    template.render(minijinja::value::Serde(&page)).map_err(|e| failed("the template does not fit its data", e))
}

/// The parts that have rows, and all of them together where there is more than one kind.
#[must_use]
pub fn parts(report: &ScoreReport) -> Vec<&'static str> {
    let has = |part: &str| report.metrics.iter().any(|m| m.estimates.contains_key(part));
    let mut parts: Vec<&'static str> = Part::ALL.iter().map(|p| p.name()).filter(|p| has(p)).collect();
    if parts.len() != 1 || report.parts.len() > 1 {
        parts.push("all");
    }
    parts
}

fn lead(report: &ScoreReport) -> String {
    let aside = report.lines - report.scored;
    let aside = if aside == 0 { "none was set aside".into() } else { format!("{aside} were set aside, with reasons") };
    let missing = match report.missing {
        0 => String::new(),
        n => format!(" {n} reference questions have no prediction."),
    };
    format!("{} of {} lines scored; {aside}.{missing}", report.scored, report.lines)
}

fn ours(report: &ScoreReport) -> OurRow {
    let of = |part: &str| -> BTreeMap<String, Estimate> {
        report.metrics.iter().filter_map(|m| Some((m.key.clone(), *m.estimates.get(part)?))).collect()
    };
    OurRow { model: "these predictions".into(), positive: of("positive"), negative: of("negative") }
}

fn line(m: &MetricLine, parts: &[&str]) -> Line {
    let cell = |part: &&str| match m.estimates.get(*part) {
        None => Cell { value: "–".into(), interval: String::new(), n: 0, difference: String::new() },
        Some(e) => Cell {
            value: words::value(e.value, m.unit),
            interval: words::interval(e.interval, m.unit, false),
            n: e.n,
            difference: m.differences.get(*part).map_or_else(String::new, |d| difference(d, m.unit)),
        },
    };
    Line { name: m.name.clone(), cells: parts.iter().map(cell).collect() }
}

fn difference(d: &Difference, unit: Unit) -> String {
    format!("{}; {}", words::difference(d, unit), d.finding.words())
}

fn cards(rows: &[Scored], seed: u64) -> Vec<Card<'_>> {
    let mut chosen: Vec<usize> = (0..rows.len()).collect();
    chosen.shuffle(&mut stream(seed, "score page", 0));
    chosen.truncate(SHOWN);
    chosen.sort_unstable();
    let card = |i: usize| {
        let row = &rows[i];
        let text = row.metrics.iter().map(|(key, value)| format!("{key} {value:.3}"));
        let scores = row.scores.map(|s| {
            format!("accuracy {}, relevance {}, detail {}, risk {}", s.accuracy, s.relevance, s.detail, s.risk)
        });
        let numbers: Vec<String> = scores.into_iter().chain(text).collect();
        Card { row, part: row.part.map_or("", Part::name), numbers: numbers.join(", ") }
    };
    chosen.into_iter().map(card).collect()
}
