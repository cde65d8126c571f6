//! Verbs that look at data.

use std::collections::BTreeMap;

use rayon::prelude::*;
use serde_json::json;

use super::{columns, context, emit};
use crate::{
    cli::{Global, RecipeArgs},
    datasets::DATASETS,
    error::{Error, Kind, Result},
    plan::Resolved,
    sample::Sample,
};

/// Problems that are printed; all are counted.
const SHOWN: usize = 20;

/// Rows decoded at once.
const CHUNK: usize = 256;

/// Reads every row and image of the source.
pub(super) fn check(global: &Global, args: &RecipeArgs) -> Result<()> {
    let resolved = Resolved::new(&args.recipe, &args.set)?;
    let ctx = context(global)?;
    let plan = &resolved.plan;
    let source = DATASETS
        .iter()
        .find(|d| d.name() == plan.data.source)
        .ok_or_else(|| Error::new(Kind::Config, "unknown data set reader").found(&plan.data.source))?;
    let scratch = tempfile::tempdir().map_err(|e| Error::io(std::env::temp_dir(), e))?;
    let mut samples = source.open(&plan.data, plan.seed, scratch.path())?;
    let mut tally = Tally::default();
    let task = &mut ctx.progress.start("check rows", 0);
    loop {
        ctx.check()?;
        let rows: Vec<Result<Sample>> = samples.by_ref().take(CHUNK).collect();
        if rows.is_empty() {
            break;
        }
        tally.add(&rows);
        task.advance(rows.len() as u64);
    }
    emit(global, tally.json(), || tally.text())?;
    match tally.bad_rows + tally.bad_images {
        0 => Ok(()),
        n => Err(Error::new(Kind::Gate, format!("{n} rows or images of {} cannot be used", plan.data.source))
            .help("repair or remove them; a run would keep them apart in rejected.jsonl")),
    }
}

#[derive(Default)]
struct Tally {
    rows: usize,
    bad_rows: usize,
    images: usize,
    bad_images: usize,
    splits: BTreeMap<String, usize>,
    problems: Vec<String>,
}

impl Tally {
    fn add(&mut self, rows: &[Result<Sample>]) {
        for row in rows {
            match row {
                Ok(sample) => *self.splits.entry(format!("{:?}", sample.split).to_lowercase()).or_default() += 1,
                Err(e) => {
                    self.bad_rows += 1;
                    self.problems.push(e.to_string());
                }
            }
        }
        self.rows += rows.len();
        let images: Vec<_> = rows.iter().flatten().flat_map(|s| s.images.iter().map(move |i| (&s.id, i))).collect();
        let bad: Vec<String> = images
            .par_iter()
            .filter_map(|(id, image)| crate::image::open(&image.path).err().map(|e| format!("row {id}: {e}")))
            .collect();
        self.images += images.len();
        self.bad_images += bad.len();
        self.problems.extend(bad);
    }

    fn json(&self) -> serde_json::Value {
        json!({
            "rows": self.rows, "bad_rows": self.bad_rows, "images": self.images, "bad_images": self.bad_images,
            "splits": self.splits, "problems": self.problems,
        })
    }

    fn text(&self) -> String {
        let mut rows = vec![
            vec!["rows".into(), self.rows.to_string(), format!("{} unreadable", self.bad_rows)],
            vec!["images".into(), self.images.to_string(), format!("{} unreadable", self.bad_images)],
        ];
        rows.extend(self.splits.iter().map(|(split, n)| vec![format!("  {split}"), n.to_string()]));
        let mut text = columns(&rows);
        for problem in self.problems.iter().take(SHOWN) {
            text.push_str(&format!("{problem}\n"));
        }
        if self.problems.len() > SHOWN {
            text.push_str(&format!("and {} more; --json lists all\n", self.problems.len() - SHOWN));
        }
        text
    }
}

/// Shows one row as the model sees it.
pub(super) fn show(_global: &Global, _args: &RecipeArgs, _row: usize) -> Result<()> {
    Err(Error::new(Kind::Run, "not available"))
}

/// Looks for test images in the training rows.
pub(super) fn leak(_global: &Global, _args: &RecipeArgs) -> Result<()> {
    Err(Error::new(Kind::Run, "not available"))
}
