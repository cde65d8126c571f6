//! The model card: `README.md` of the adapter, with what the report found.

use std::fmt::Write;

use super::{Report, words};
use crate::{
    error::{Error, Result},
    metric::Unit,
    plan::Plan,
    run_dir::RunDir,
    statistics::Finding,
};

/// What stands before the part that a report writes.
const MARK: &str = "<!-- evaluation by medtune report -->";

/// Adds the evaluation to the adapter's README, in the place of an earlier one; nothing happens without an adapter.
///
/// # Errors
/// The file cannot be read or written.
pub(super) fn write(dir: &RunDir, plan: &Plan, report: &Report) -> Result<()> {
    let path = dir.path("adapter/README.md");
    if !path.is_file() {
        return Ok(());
    }
    let before = std::fs::read_to_string(&path).map_err(|e| Error::io(&path, e))?;
    let before = before.split(MARK).next().unwrap_or_default().trim_end();
    dir.write("adapter/README.md", format!("{before}\n\n{MARK}\n{}", evaluation(plan, report)).as_bytes())
}

/// The part itself.
fn evaluation(plan: &Plan, report: &Report) -> String {
    let mut text = String::from("## Evaluation\n\n");
    let c = &report.counts;
    let _ = writeln!(
        text,
        "Recipe `{}`, data `{}`, seed {}: {} held-out rows of {} images, {} of {} answers scored. Brackets: 95 % interval over images; \
         shares in %.\n",
        plan.recipe, plan.data.source, plan.seed, c.rows, c.images, c.scored, c.answers
    );
    let _ = writeln!(text, "| metric | base | tuned | difference | finding |\n|---|---|---|---|---|");
    for m in &report.metrics {
        let finding = match words::improvement(m.difference.finding, m.better) {
            Some(true) => "better",
            Some(false) => "worse",
            None => m.difference.finding.words(),
        };
        let sign = m.difference.value.map_or("–".into(), |v| words::number(v, m.unit, true));
        let _ = writeln!(
            text,
            "| {} | {} | {} | {sign} [{}] | {finding} |",
            m.name,
            words::with_interval(&m.base, m.unit),
            words::with_interval(&m.tuned, m.unit),
            words::interval(m.difference.interval, m.unit, true),
        );
    }
    let _ = writeln!(text, "\n### What this does not show\n");
    for sentence in &report.does_not_show {
        let _ = writeln!(text, "- {}", sentence.replace('\u{a0}', " "));
    }
    if !report.leak.is_empty() {
        let leaks: Vec<String> = report.leak.iter().map(|(name, value)| format!("{name} {value}")).collect();
        let _ = writeln!(text, "\nLeak check of training against test: {}.", leaks.join(", "));
    }
    let probes = report.probes[1].as_ref().and_then(|p| p.tells_apart.value);
    if let Some(share) = probes {
        let _ = writeln!(
            text,
            "\nOf pairs of a false and a true premise about one image it tells {} apart.",
            words::value(Some(share), Unit::Share)
        );
    }
    let _ = writeln!(
        text,
        "\n## Limits\n\nNot a medical device and not tested on patients. {} of the metrics above show a difference after correction for \
         their number (Holm). Numbers of other programs are comparable only where the signatures in `report.json` are the same.",
        report.metrics.iter().filter(|m| matches!(m.difference.finding, Finding::Lower | Finding::Higher)).count()
    );
    text
}
