//! Decoder blocks: context of a batch, key-value cache.

/// Rotary tables and attention mask of a batch.
#[derive(Debug, Clone)]
pub struct DecoderContext {}

/// Keys and values of earlier positions of one layer.
#[derive(Debug, Clone)]
pub struct LayerCache {}
