//! Data set readers, one a file.

use crate::source::Source;

pub mod phantom;

/// All readers.
pub const DATASETS: &[&dyn Source] = &[];
