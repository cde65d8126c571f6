//! Behaviour across modules, in one test binary.

#![expect(clippy::print_stdout, reason = "the parity tests say how many checks they made")]

mod ablate;
mod batching;
mod cli;
mod datasets;
mod device;
mod dicom;
mod eval;
mod export;
mod interchange;
mod judge;
mod llm;
mod parity;
mod plugin;
mod preference;
mod real_vqa;
mod report;
mod score;
#[cfg(feature = "slow")]
mod slow;
mod tracking;
mod training;
