//! The paper's Tables 2 and 3 with this program's numbers beside the published ones.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::{
    published::{Both, TABLE_2, TABLE_3, VQA_COLUMNS},
    words,
};
use crate::{metric::Unit, statistics::Estimate};

/// Columns of Table 2: key, title, range.
pub(crate) const COLUMNS: [(&str, &str, Unit); 6] = [
    ("clinical_accuracy", "Clinical accuracy", Unit::Score),
    ("clinical_relevance", "Relevance", Unit::Score),
    ("detail_level", "Detail", Unit::Score),
    ("risk_level", "Risk", Unit::Score),
    ("bertscore", "BERTScore", Unit::Share),
    ("meteor", "METEOR", Unit::Share),
];

/// One of our rows in the layout of Table 2.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct OurRow {
    /// Which model.
    pub model: String,
    /// Estimates by the key of the column, over the positive part.
    pub positive: BTreeMap<String, Estimate>,
    /// Likewise, over the negative part.
    pub negative: BTreeMap<String, Estimate>,
}

/// A row of the table as it is printed.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Line {
    model: String,
    source: String,
    ours: bool,
    cells: Vec<[Shown; 2]>,
}

/// A value with its interval.
#[derive(Debug, Clone, Serialize)]
struct Shown {
    value: String,
    interval: String,
}

/// All rows of Table 2: ours first.
pub(crate) fn table_2(ours: &[OurRow]) -> Vec<Line> {
    let own = ours.iter().map(|row| Line {
        model: row.model.clone(),
        source: "this run".into(),
        ours: true,
        cells: COLUMNS
            .iter()
            .map(|(key, _, unit)| [&row.positive, &row.negative].map(|part| shown(part.get(*key), *unit)))
            .collect(),
    });
    let published = TABLE_2.iter().map(|row| {
        let scores = row.clinical.iter().map(|b| published(b, 2));
        Line {
            model: name(row.model, row.tuned),
            source: row.source.into(),
            ours: false,
            cells: scores.chain([published(&row.bertscore, 2), published(&row.meteor, 2)]).collect(),
        }
    });
    own.chain(published).collect()
}

fn name(model: &str, tuned: bool) -> String {
    if tuned { format!("{model}, tuned") } else { model.into() }
}

fn published(both: &Both, digits: usize) -> [Shown; 2] {
    both.map(|v| Shown { value: v.map_or("–".into(), |v| format!("{v:.digits$}")), interval: String::new() })
}

/// Scores and shares alike with two decimals, as the paper prints them.
fn shown(estimate: Option<&Estimate>, unit: Unit) -> Shown {
    let digits = if unit == Unit::Score { 2 } else { 3 };
    let Some(Estimate { value: Some(v), interval, .. }) = estimate else {
        return Shown { value: "–".into(), interval: String::new() };
    };
    Shown {
        value: format!("{v:.digits$}"),
        interval: interval.map_or(String::new(), |[a, b]| format!("{a:.digits$} to {b:.digits$}")),
    }
}

/// Our numbers in the column of Table 3 that a run's data belong to.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct OurColumn {
    /// The source, one of [`VQA_COLUMNS`].
    pub source: String,
    /// Rule of the accuracy, with the estimates of the base and the tuned model.
    pub rules: Vec<(String, Estimate, Estimate)>,
}

/// A row of Table 3 as it is printed.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct VqaLine {
    model: String,
    source: String,
    ours: bool,
    cells: Vec<String>,
}

/// All rows of Table 3: ours first.
pub(crate) fn table_3(ours: Option<&OurColumn>) -> Vec<VqaLine> {
    let mut lines = Vec::new();
    if let Some(column) = ours {
        for (rule, base, tuned) in &column.rules {
            for (model, estimate) in [("base", base), ("tuned", tuned)] {
                let cell = |key: &str| {
                    if key == column.source { words::with_interval(estimate, Unit::Share) } else { "–".into() }
                };
                lines.push(VqaLine {
                    model: format!("this run, {model}"),
                    source: rule.clone(),
                    ours: true,
                    cells: VQA_COLUMNS.iter().map(|(key, _)| cell(key)).collect(),
                });
            }
        }
    }
    lines.extend(TABLE_3.iter().map(|row| VqaLine {
        model: name(row.model, row.tuned),
        source: "paper, Table 3".into(),
        ours: false,
        cells: row.values.iter().map(|v| format!("{v:.2}")).collect(),
    }));
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn own_rows_have_intervals_and_published_ones_have_none() {
        let estimate = Estimate { n: 9, clusters: 3, sum: 4.5, value: Some(0.5), interval: Some([0.25, 0.75]) };
        let row = OurRow {
            model: "mine".into(),
            positive: [("meteor".to_string(), estimate)].into(),
            negative: BTreeMap::new(),
        };
        let lines = table_2(&[row]);
        assert_eq!(lines.len(), 1 + TABLE_2.len());
        assert!(lines.iter().all(|l| l.cells.len() == COLUMNS.len()));
        assert_eq!(
            (lines[0].cells[5][0].value.as_str(), lines[0].cells[5][0].interval.as_str()),
            ("0.500", "0.250 to 0.750")
        );
        assert_eq!(lines[0].cells[5][1].value, "–");
        assert!(lines[1..].iter().flat_map(|l| l.cells.iter().flatten()).all(|c| c.interval.is_empty()));
        let ours = OurColumn { source: "slake".into(), rules: vec![("strict".into(), estimate, estimate)] };
        let lines = table_3(Some(&ours));
        assert_eq!(lines.len(), 2 + TABLE_3.len());
        assert_eq!(lines[0].cells, ["–", "50.0 [25.0, 75.0]", "–", "–"]);
    }
}
