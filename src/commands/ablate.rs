//! `medtune ablate`: the views of one recipe, compared.

use std::path::PathBuf;

use super::{columns, context, emit, run::resolve};
use crate::{
    ablate::{self, Ablation},
    cli::{AblateArgs, Global},
    error::Result,
    stage::report::words,
};

/// Columns of the table on a terminal: key and short name.
const SHOWN: [(&str, &str); 7] = [
    ("right_answers", "right"),
    ("hallucination_rate", "halluc."),
    ("over_refusal_rate", "over-ref."),
    ("clinical_accuracy", "accuracy"),
    ("risk_level", "risk"),
    ("closed_accuracy", "closed"),
    ("open_recall", "open"),
];

/// Runs the views and prints their table.
pub(super) fn ablate(global: &Global, args: &AblateArgs) -> Result<()> {
    let (resolved, _) = resolve(global, &args.recipe)?;
    let ctx = context(global)?;
    let root =
        args.recipe.out.clone().unwrap_or_else(|| PathBuf::from("run").join(format!("{}_ablation", resolved.name)));
    let ablation = ablate::run(&resolved, &root, &args.axis, &ctx)?;
    emit(global, &ablation, || {
        format!("{}\n{}\nresults in {}", table(&ablation), ablation.sentences().join("\n"), root.display())
    })
}

fn table(ablation: &Ablation) -> String {
    let shown = SHOWN.iter().filter(|(key, _)| ablation.views.iter().any(|v| v.metrics.iter().any(|c| c.key == *key)));
    let shown: Vec<_> = shown.collect();
    let mut rows = vec![vec!["VIEW".to_string(), "ROWS".into()]];
    rows[0].extend(shown.iter().map(|(_, name)| name.to_uppercase()));
    for view in &ablation.views {
        let mut row = vec![view.name.clone(), view.train_rows.to_string()];
        row.extend(shown.iter().map(|(key, _)| match view.metrics.iter().find(|c| c.key == *key) {
            Some(c) => words::with_interval(&c.estimate, c.unit),
            None => "-".into(),
        }));
        rows.push(row);
    }
    columns(&rows)
}
