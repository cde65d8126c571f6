//! Deterministic batches with bounded prefetch.
