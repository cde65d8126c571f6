//! Behaviour across modules, in one test binary.

mod cli;
mod contract;
mod eval;
mod parity;
mod report;
mod training;
