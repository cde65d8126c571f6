//! Data set readers, one a file.

use crate::source::Source;

/// All readers.
pub const DATASETS: &[&dyn Source] = &[];
