//! Blocks that models share.

pub mod decoder;
