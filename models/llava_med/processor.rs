//! Host side of LLaVA-Med: images, prompts, label masks.

pub use crate::text::merge::{IMAGE_TOKEN_INDEX, MergeRules, Merged, RawRow, merge};
