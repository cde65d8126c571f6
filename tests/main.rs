//! Behaviour across modules, in one test binary.

#![expect(clippy::print_stdout, reason = "the parity tests say how many checks they made")]

mod cli;
mod eval;
mod judge;
mod llm;
mod parity;
mod plugin;
mod report;
#[cfg(feature = "slow")]
mod slow;
mod training;
