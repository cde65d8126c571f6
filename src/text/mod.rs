//! Tokenizers, chat templates, label masks.

pub mod bpe;
pub mod chat;
pub mod chatml;
pub mod grounding;
pub mod grouping;
pub mod merge;
pub mod mpt_chat;
pub mod qwen;
pub mod sentencepiece;
pub mod slow_tokenizer;
pub mod tiktoken;
pub mod tokenizer;
pub mod turns;
