//! Checkpoint files to tensors and back, with a strict report.
