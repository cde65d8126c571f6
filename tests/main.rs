//! Behaviour across modules, in one test binary.

mod cli;
mod parity;
mod report;
