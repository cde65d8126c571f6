//! Numbers as text, and the sentences that they support.

use super::{ControlRow, Inputs, MetricRow, Report};
use crate::{
    judge::Outcome,
    metric::{Better, Unit},
    stage::{controls::Control, eval::Which, judge::Verdict},
    statistics::{Difference, Estimate, Finding},
};

/// Below this many images an interval is called approximate.
const FEW_IMAGES: usize = 20;

/// Recipe, model, data, device.
pub(super) fn facts(inputs: &Inputs) -> Vec<(String, String)> {
    let plan = &inputs.plan;
    let model = match &plan.model.checkpoint {
        Some(path) => format!("{}, {}", plan.model.name, path.display()),
        None => format!("{}, preset {} from random weights", plan.model.name, plan.model.preset),
    };
    let data = match &plan.data.path {
        Some(path) => format!("{}, {}", plan.data.source, path.display()),
        None => plan.data.source.clone(),
    };
    [
        ("recipe", plan.recipe.clone()),
        ("model", model),
        ("data", data),
        ("judge", judge_name(judge_kind(inputs))),
        ("device", inputs.device.clone()),
        ("seed", plan.seed.to_string()),
    ]
    .map(|(name, value)| (name.to_string(), value))
    .to_vec()
}

/// What the scores come from: the judge's kind, unless no row gave it what it needs.
fn judge_kind(inputs: &Inputs) -> &str {
    let rated = |v: &Verdict| matches!(v.outcome, Outcome::Scored { scores: Some(_), .. });
    let compared = |v: &Verdict| matches!(v.outcome, Outcome::Scored { agreement: Some(_), .. });
    if inputs.verdicts.iter().any(compared) && !inputs.verdicts.iter().any(rated) {
        return "reference";
    }
    inputs.judge["kind"].as_str().unwrap_or("unnamed")
}

fn judge_name(kind: &str) -> String {
    match kind {
        "rubric" => "rule-based rubric that reads the truth of each image".into(),
        "reference" => "agreement with the reference answers".into(),
        other => other.into(),
    }
}

/// A value with its unit: `71.2 %` or `6.27`.
pub(crate) fn value(v: Option<f64>, unit: Unit) -> String {
    match (v, unit) {
        (None, _) => "–".into(),
        (Some(v), Unit::Share) => format!("{:.1}\u{a0}%", 100.0 * v),
        (Some(v), Unit::Score) => format!("{v:.2}"),
    }
}

/// A number without its unit, with a true minus sign and, for differences, a plus sign.
pub(crate) fn number(v: f64, unit: Unit, sign: bool) -> String {
    let text = match unit {
        Unit::Share => format!("{:.1}", 100.0 * v.abs()),
        Unit::Score => format!("{:.2}", v.abs()),
    };
    let zero = text.chars().all(|c| matches!(c, '0' | '.'));
    let mark = match v {
        v if zero || v == 0.0 => "",
        v if v < 0.0 => "\u{2212}",
        _ if sign => "+",
        _ => "",
    };
    format!("{mark}{text}")
}

/// An interval: `65.0 to 77.1`.
pub(crate) fn interval(ends: Option<[f64; 2]>, unit: Unit, sign: bool) -> String {
    match ends {
        Some([low, high]) => format!("{} to {}", number(low, unit, sign), number(high, unit, sign)),
        None => "no interval".into(),
    }
}

/// A value with its interval for terminals: `57.3 [53.0, 61.6]`, shares in per cent.
pub(crate) fn with_interval(e: &Estimate, unit: Unit) -> String {
    let plain = |v: f64| number(v, unit, false).replace('\u{2212}', "-");
    match (e.value, e.interval) {
        (None, _) => "-".into(),
        (Some(v), None) => plain(v),
        (Some(v), Some([a, b])) => format!("{} [{}, {}]", plain(v), plain(a), plain(b)),
    }
}

/// A p-value: `< 0.001` or `0.034`.
pub(crate) fn p_value(p: Option<f64>) -> String {
    match p {
        None => "–".into(),
        Some(p) if p < 0.001 => "< 0.001".into(),
        Some(p) => format!("{p:.3}"),
    }
}

/// Whether a shown difference is an improvement; none if no difference is shown.
pub(crate) fn improvement(finding: Finding, better: Better) -> Option<bool> {
    match (finding, better) {
        (Finding::Lower, Better::Lower) | (Finding::Higher, Better::Higher) => Some(true),
        (Finding::Lower, Better::Higher) | (Finding::Higher, Better::Lower) => Some(false),
        _ => None,
    }
}

fn points(unit: Unit) -> &'static str {
    match unit {
        Unit::Share => " points",
        Unit::Score => "",
    }
}

/// A difference with its interval and p-value.
pub(crate) fn difference(d: &Difference, unit: Unit) -> String {
    let corrected = if d.p_holm.is_some() { "corrected " } else { "" };
    let p = match d.p_holm.or(d.p) {
        Some(p) if p < 0.001 => format!("{corrected}p\u{a0}<\u{a0}0.001"),
        Some(p) => format!("{corrected}p\u{a0}=\u{a0}{p:.3}"),
        None => "no p-value".into(),
    };
    format!(
        "{}{} (95\u{a0}% interval {}; {p})",
        d.value.map_or("–".into(), |v| number(v, unit, true)),
        points(unit),
        interval(d.interval, unit, true)
    )
}

fn rows_of(e: &Estimate) -> String {
    format!("{} rows of {} images", e.n, e.clusters)
}

/// What the numbers show.
pub(super) fn shows(report: &Report) -> Vec<String> {
    let mut out = Vec::new();
    for m in &report.metrics {
        if let Some(good) = improvement(m.difference.finding, m.better) {
            out.push(format!(
                "{} is {} after tuning, which is {}: {} before, {} after, a difference of {}, on {}.",
                m.name,
                m.difference.finding.words(),
                if good { "better" } else { "worse" },
                value(m.base.value, m.unit),
                value(m.tuned.value, m.unit),
                difference(&m.difference, m.unit),
                rows_of(&m.tuned),
            ));
        }
        if let Some(b) = m.baseline.as_ref().filter(|b| b.difference.finding == Finding::Higher) {
            out.push(format!(
                "{} of the tuned model is above what the constant answer \u{201c}{}\u{201d} reaches ({}), by {}.",
                m.name,
                b.answer,
                value(Some(b.value), m.unit),
                difference(&b.difference, m.unit),
            ));
        }
    }
    let differences = out.len();
    out.extend(looking(report, true));
    if differences == 0 {
        out.push("No difference between the base and the tuned model is shown by these rows.".into());
    }
    out
}

/// What the numbers do not show.
pub(super) fn does_not_show(report: &Report, inputs: &Inputs) -> Vec<String> {
    let mut out: Vec<String> = report.metrics.iter().filter_map(not_shown).collect();
    for m in &report.metrics {
        if let Some(b) = m.baseline.as_ref().filter(|b| b.difference.finding != Finding::Higher) {
            out.push(format!(
                "That the tuned model beats the constant answer \u{201c}{}\u{201d} ({}) in {}: {}.",
                b.answer,
                value(Some(b.value), m.unit),
                m.name.to_lowercase(),
                difference(&b.difference, m.unit),
            ));
        }
    }
    out.extend(looking(report, false));
    if let Some(warning) = trade(report) {
        out.push(warning);
    }
    caveats(report, inputs, &mut out);
    out
}

fn not_shown(m: &MetricRow) -> Option<String> {
    let name = m.name.to_lowercase();
    match m.difference.finding {
        Finding::NotShown => Some(format!(
            "A change of {name}: difference not shown, {}. Changes inside that interval remain possible{}.",
            difference(&m.difference, m.unit),
            detectable(&m.difference, m.unit)
        )),
        Finding::Identical => Some(format!("A change of {name}: no row differs, on {}.", rows_of(&m.tuned))),
        Finding::TooFew => Some(format!("A change of {name}: {} are too few.", rows_of(&m.tuned))),
        Finding::Lower | Finding::Higher => None,
    }
}

/// What the rows could have shown.
fn detectable(d: &Difference, unit: Unit) -> String {
    let small = |size: f64| {
        format!(
            "; rows like these show a change of {}{} in four cases of five",
            number(size, unit, false),
            points(unit)
        )
    };
    d.detectable.filter(|size| *size > 0.0).map_or_else(String::new, small)
}

/// What image controls show, or do not.
fn looking(report: &Report, shown: bool) -> Vec<String> {
    let name = |c: &ControlRow| match (c.model, c.control) {
        (Which::Base, Control::Blind) => "the base model without the image",
        (Which::Tuned, Control::Blind) => "the tuned model without the image",
        (Which::Base, Control::Swapped) => "the base model with another image",
        (Which::Tuned, Control::Swapped) => "the tuned model with another image",
    };
    let sentence = |c: &ControlRow| {
        let changed = format!("{} of the answers of {} differ", value(c.changed.value, Unit::Share), name(c));
        match &c.gain {
            Some(gain) if (gain.finding == Finding::Higher) == shown => Some(format!(
                "{}{changed}; the right image adds to right answers {}.",
                if shown { "" } else { "That the image helps: " },
                difference(gain, Unit::Share)
            )),
            None if shown => Some(format!("{changed}.")),
            _ => None,
        }
    };
    report.controls.iter().filter_map(sentence).collect()
}

/// Fewer hallucinations that go with more refusals.
fn trade(report: &Report) -> Option<String> {
    let finding = |key: &str| report.metrics.iter().find(|m| m.key == key).map(|m| m.difference.finding);
    let fewer = finding("hallucination_rate")? == Finding::Lower;
    let refuses = finding("over_refusal_rate")? == Finding::Higher;
    (fewer && refuses).then(|| {
        "That the model sees better: it hallucinates less but also denies more true findings, so part of the gain may \
         be a habit of denying."
            .into()
    })
}

fn caveats(report: &Report, inputs: &Inputs, out: &mut Vec<String>) {
    let counts = &report.counts;
    match judge_kind(inputs) {
        "rubric" => out.push(
            "What clinicians would say: the scores come from fixed rules that compare each answer with the known \
             content of the image, not from people and not from a language model."
                .into(),
        ),
        "reference" => out.push(
            "Answers that are right in other words: an answer counts by the words it shares with the reference, and \
             clinical criteria were not rated."
                .into(),
        ),
        _ => {}
    }
    if inputs.plan.data.source == "phantom" {
        out.push("Anything about patients: the images are drawn by a program, as a test of method.".into());
    }
    if counts.images > 0 && counts.images < FEW_IMAGES {
        out.push(format!("Precise intervals: they rest on {} images and are approximate.", counts.images));
    }
    if counts.shared_images > 0 {
        out.push(format!(
            "Performance on new images: {} images of the test split also occur in training or validation.",
            counts.shared_images
        ));
    }
    let unscored = counts.verdicts - counts.scored;
    if unscored > 0 {
        out.push(format!(
            "Anything about the {unscored} of {} answers that were not scored; they are left out of every mean.",
            counts.verdicts
        ));
    }
    if report.metrics.len() > 1 {
        out.push(format!(
            "Anything by one uncorrected p-value: the {} metrics were corrected together (Holm), and so were the \
             categories; a difference counts as shown below {} after that.",
            report.metrics.len(),
            crate::statistics::ALPHA
        ));
    }
    out.push("How much other seeds would differ: this is one training run with one seed.".into());
}

/// Stance and reason of a verdict, or why there is none.
pub(crate) fn reason(outcome: &Outcome) -> String {
    match outcome {
        Outcome::Scored { reason, .. } => reason.clone(),
        Outcome::Refused { reply } => format!("The judge declined: {reply}"),
        Outcome::Unparsable { reply } => format!("The judge's reply could not be read: {reply}"),
        Outcome::ApiError { message } => format!("The judge could not be reached: {message}"),
        Outcome::OverBudget => "Not judged, because the budget was spent.".into(),
        Outcome::NoReference => "Not judged, because the row has no reference.".into(),
    }
}

/// `nonexistent_object` as words.
pub(crate) fn plain(name: &str) -> String {
    name.replace(['_', '-'], " ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_read_well() {
        assert_eq!(value(Some(0.7123), Unit::Share), "71.2\u{a0}%");
        assert_eq!(value(Some(6.266), Unit::Score), "6.27");
        assert_eq!(value(None, Unit::Share), "–");
        assert_eq!(number(-0.591, Unit::Share, true), "\u{2212}59.1");
        assert_eq!(number(0.02, Unit::Score, true), "+0.02");
        assert_eq!(number(-0.000_1, Unit::Share, true), "0.0");
        assert_eq!(interval(Some([-0.1, 0.2]), Unit::Share, true), "\u{2212}10.0 to +20.0");
        assert_eq!(p_value(Some(0.000_1)), "< 0.001");
        assert_eq!(p_value(Some(0.034_2)), "0.034");
    }
}
