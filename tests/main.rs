//! Behaviour across modules, in one test binary.

mod parity;
mod report;
