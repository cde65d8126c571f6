//! The table that a run prints at its end; the same numbers as `report.json`.

use super::{Report, words};
use crate::{
    metric::Unit,
    statistics::{Difference, Estimate, Finding},
};

/// Columns that a line may take.
const WIDTH: usize = 100;

/// Base against tuned as plain text, at most 100 columns wide.
#[must_use]
pub fn table(report: &Report) -> String {
    let header = ["", "rows", "base", "tuned", "difference", "p", ""].map(String::from);
    let mut lines = vec![header];
    for m in &report.metrics {
        lines.push([
            short(&m.name),
            m.tuned.n.to_string(),
            estimate(&m.base, m.unit),
            estimate(&m.tuned, m.unit),
            difference(&m.difference, m.unit),
            words::p_value(m.difference.p).replace("< 0.001", "<.001").replace('–', "-"),
            finding(m.difference.finding, words::improvement(m.difference.finding, m.better)).into(),
        ]);
    }
    let mut text = layout(&lines);
    text.push('\n');
    for line in notes(report) {
        text.push_str(&line);
        text.push('\n');
    }
    text
}

fn layout(lines: &[[String; 7]]) -> String {
    let widths: Vec<usize> = (0..7).map(|c| lines.iter().map(|l| l[c].chars().count()).max().unwrap_or(0)).collect();
    // Wide values squeeze out the p column first; the page has it.
    let total: usize = widths.iter().sum::<usize>() + 12;
    let gap = if total <= WIDTH { "  " } else { " " };
    let without_p = total - 6 > WIDTH;
    let mut text = String::new();
    for line in lines {
        let mut row = String::new();
        for (c, cell) in line.iter().enumerate().filter(|(c, _)| !(without_p && *c == 5)) {
            if c > 0 {
                row.push_str(gap);
            }
            let pad = " ".repeat(widths[c] - cell.chars().count());
            if matches!(c, 0 | 6) {
                row.push_str(&format!("{cell}{pad}"))
            } else {
                row.push_str(&format!("{pad}{cell}"))
            }
        }
        text.push_str(row.trim_end());
        text.push('\n');
    }
    text
}

fn notes(report: &Report) -> Vec<String> {
    let counts = &report.counts;
    let mut notes = vec![format!(
        "{} rows of {} held-out images; {} answers, {} scored. Brackets: 95 % interval; shares in %.",
        counts.rows, counts.images, counts.answers, counts.scored
    )];
    if let Some(q) = &report.quality {
        notes.push(format!(
            "Quality control dropped {} of {} rows ({}).",
            q.rejected,
            q.rows,
            words::value(q.drop_rate.value, Unit::Share).replace('–', "-").replace('\u{a0}', " ")
        ));
        if let Some(planted) = q.planted {
            notes.push(format!("Of {} rows made wrong on purpose it found {}.", planted.rows, planted.found));
        }
    }
    for b in report.metrics.iter().filter_map(|m| m.baseline.as_ref()) {
        notes.push(format!(
            "Always \"{}\": {:.1} in closed accuracy; tuned minus that: {}, {}.",
            b.answer.chars().take(16).collect::<String>(),
            100.0 * b.value,
            difference(&b.difference, Unit::Share),
            if b.difference.finding == Finding::Higher { "above" } else { "not shown to be above" },
        ));
    }
    notes
}

fn short(name: &str) -> String {
    name.replace(", LLaVA-Med rule", " (orig.)")
}

fn plain(v: f64, unit: Unit, sign: bool) -> String {
    words::number(v, unit, sign).replace('\u{2212}', "-")
}

fn with_interval(v: Option<f64>, ends: Option<[f64; 2]>, unit: Unit, sign: bool) -> String {
    match (v, ends) {
        (None, _) => "-".into(),
        (Some(v), None) => plain(v, unit, sign),
        (Some(v), Some([a, b])) => {
            format!("{} [{}, {}]", plain(v, unit, sign), plain(a, unit, sign), plain(b, unit, sign))
        }
    }
}

fn estimate(e: &Estimate, unit: Unit) -> String {
    with_interval(e.value, e.interval, unit, false)
}

fn difference(d: &Difference, unit: Unit) -> String {
    with_interval(d.value, d.interval, unit, true)
}

fn finding(finding: Finding, improvement: Option<bool>) -> &'static str {
    match (improvement, finding) {
        (Some(true), _) => "better",
        (Some(false), _) => "worse",
        (None, Finding::Identical) => "same",
        (None, Finding::TooFew) => "too few",
        (None, _) => "not shown",
    }
}
