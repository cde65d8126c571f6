//! Synthetic medical-looking images whose content is known exactly.

pub mod check;
mod lex;
mod read;
pub mod truth;
pub mod words;
