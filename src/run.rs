//! Walks a plan stage by stage and skips stages whose inputs have not changed.
