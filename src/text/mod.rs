//! Tokenizers, chat templates, label masks.
