//! LLaVA-Med v1.5.

pub mod processor;
