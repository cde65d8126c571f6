//! Tokenizers, chat templates, label masks.

pub mod merge;
pub mod sentencepiece;
