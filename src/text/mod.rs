//! Tokenizers, chat templates, label masks.

pub mod chatml;
pub mod grounding;
pub mod merge;
pub mod mpt_chat;
pub mod qwen;
pub mod sentencepiece;
pub mod slow_tokenizer;
pub mod tiktoken;
