//! Numbers with intervals, tables and samples: `report.json` and `report.html`.

use super::{Ctx, Summary};
use crate::{error::Result, plan::Plan, run_dir::RunDir};

/// Writes the report of a judged run.
///
/// # Errors
/// A file is missing or does not belong to the others, or the directory cannot be written.
pub fn run(plan: &Plan, dir: &RunDir, ctx: &Ctx) -> Result<Summary> {
    let _ = (plan, dir, ctx);
    Ok(Summary::default())
}
