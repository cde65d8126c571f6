//! BERT and RoBERTa encoders (arXiv 1810.04805, 1907.11692; transformers `modeling_bert.py`, `modeling_roberta.py`):
//! post-norm blocks over learned positions. The two differ in where positions start and in their tokenizers.

use burn::{
    module::Module,
    nn::{Embedding, Linear},
    tensor::{Device, Int, Tensor},
};
use serde::{Deserialize, Serialize};

use super::{
    attention::{AttentionMask, attend},
    linear::{linear_forward, linear_module},
    norm::LayerNorm,
    parameter,
};
use crate::{
    error::{Error, Kind, Result},
    kernel::gelu::gelu,
    weights::Checkpoint,
};

/// The keys of config.json that decide something; defaults are those of transformers.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct BertConfig {
    /// `bert` or `roberta`.
    pub model_type: String,
    /// Tokens.
    pub vocab_size: usize,
    /// Width.
    pub hidden_size: usize,
    /// Blocks.
    pub num_hidden_layers: usize,
    /// Heads.
    pub num_attention_heads: usize,
    /// Width inside the MLP.
    pub intermediate_size: usize,
    /// Activation of the MLP.
    pub hidden_act: String,
    /// Learned positions.
    pub max_position_embeddings: usize,
    /// How positions enter.
    pub position_embedding_type: String,
    /// Kinds of text; only the first is used.
    pub type_vocab_size: usize,
    /// Added to the variance in norms.
    pub layer_norm_eps: f64,
    /// Id that fills padded positions.
    pub pad_token_id: usize,
}

impl Default for BertConfig {
    fn default() -> Self {
        Self {
            model_type: "bert".into(),
            vocab_size: 30522,
            hidden_size: 768,
            num_hidden_layers: 12,
            num_attention_heads: 12,
            intermediate_size: 3072,
            hidden_act: "gelu".into(),
            max_position_embeddings: 512,
            position_embedding_type: "absolute".into(),
            type_vocab_size: 2,
            layer_norm_eps: 1e-12,
            pad_token_id: 0,
        }
    }
}

impl BertConfig {
    /// FacebookAI/roberta-large.
    #[must_use]
    pub fn roberta_large() -> Self {
        Self {
            model_type: "roberta".into(),
            vocab_size: 50265,
            hidden_size: 1024,
            num_hidden_layers: 24,
            num_attention_heads: 16,
            intermediate_size: 4096,
            max_position_embeddings: 514,
            type_vocab_size: 1,
            layer_norm_eps: 1e-5,
            pad_token_id: 1,
            ..Self::default()
        }
    }

    /// Position of each token. RoBERTa counts no pad token, not even one that is written out in a text.
    #[must_use]
    pub fn positions(&self, input_ids: &[i32]) -> Vec<i32> {
        if self.model_type != "roberta" {
            return (0..).take(input_ids.len()).collect();
        }
        let pad = self.pad_token_id as i32;
        let mut next = pad;
        let position = |id: &i32| {
            next += i32::from(*id != pad);
            if *id == pad { pad } else { next }
        };
        input_ids.iter().map(position).collect()
    }

    /// Longest text in tokens, special ones included.
    #[must_use]
    pub fn max_length(&self) -> usize {
        let first = if self.model_type == "roberta" { self.pad_token_id + 1 } else { 0 };
        self.max_position_embeddings.saturating_sub(first)
    }

    /// Refuses what the encoder does not compute.
    ///
    /// # Errors
    /// Another family, activation or kind of positions, or heads that do not divide the width.
    pub fn check(&self) -> Result<()> {
        let wrong = |key: &str, expected: &str, found: &str| {
            Err(Error::new(Kind::Checkpoint, "this text encoder is not supported")
                .at(format!("{key} of config.json"))
                .expected(expected)
                .found(found))
        };
        if !["bert", "roberta"].contains(&self.model_type.as_str()) {
            return wrong("model_type", "bert or roberta", &self.model_type);
        }
        if self.hidden_act != "gelu" {
            return wrong("hidden_act", "gelu", &self.hidden_act);
        }
        if self.position_embedding_type != "absolute" {
            return wrong("position_embedding_type", "absolute", &self.position_embedding_type);
        }
        if self.num_attention_heads == 0 || !self.hidden_size.is_multiple_of(self.num_attention_heads) {
            return wrong("num_attention_heads", "a divisor of hidden_size", &self.num_attention_heads.to_string());
        }
        Ok(())
    }
}

/// Words, positions, kind of text.
#[derive(Module, Debug)]
pub struct BertEmbeddings {
    /// `[vocab_size, hidden_size]`
    pub word_embeddings: Embedding,
    /// `[max_position_embeddings, hidden_size]`
    pub position_embeddings: Embedding,
    /// `[type_vocab_size, hidden_size]`
    pub token_type_embeddings: Embedding,
    /// Norm of their sum.
    pub layer_norm: LayerNorm,
}

impl BertEmbeddings {
    fn new(config: &BertConfig, device: &Device) -> Self {
        let table = |n| Embedding { weight: parameter([n, config.hidden_size], 0.0, device) };
        Self {
            word_embeddings: table(config.vocab_size),
            position_embeddings: table(config.max_position_embeddings),
            token_type_embeddings: table(config.type_vocab_size),
            layer_norm: LayerNorm::new(config.hidden_size, config.layer_norm_eps, device),
        }
    }

    fn forward(&self, input_ids: Tensor<2, Int>, positions: Tensor<2, Int>) -> Tensor<3> {
        let kind = self.token_type_embeddings.weight.val().narrow(0, 0, 1).unsqueeze();
        let words = self.word_embeddings.forward(input_ids) + self.position_embeddings.forward(positions);
        self.layer_norm.forward(words + kind)
    }
}

/// Bidirectional attention and the norm behind it.
#[derive(Module, Debug)]
pub struct BertAttention {
    /// Queries.
    pub query: Linear,
    /// Keys.
    pub key: Linear,
    /// Values.
    pub value: Linear,
    /// Output.
    pub dense: Linear,
    /// Norm of input plus output.
    pub layer_norm: LayerNorm,
    /// Heads.
    pub num_heads: usize,
}

impl BertAttention {
    fn forward(&self, x: Tensor<3>, mask: Option<&AttentionMask>) -> Tensor<3> {
        let [rows, length, hidden] = x.dims();
        let heads = |y: Tensor<3>| y.reshape([rows, length, self.num_heads, hidden / self.num_heads]);
        let q = heads(linear_forward(&self.query, x.clone()));
        let k = heads(linear_forward(&self.key, x.clone())).swap_dims(1, 2);
        let v = heads(linear_forward(&self.value, x.clone())).swap_dims(1, 2);
        self.layer_norm.forward(linear_forward(&self.dense, attend(q, k, v, mask)) + x)
    }
}

/// Post-norm block.
#[derive(Module, Debug)]
pub struct BertLayer {
    /// Attention.
    pub attention: BertAttention,
    /// `hidden_size -> intermediate_size`
    pub intermediate: Linear,
    /// `intermediate_size -> hidden_size`
    pub output: Linear,
    /// Norm of input plus output.
    pub layer_norm: LayerNorm,
}

impl BertLayer {
    fn new(config: &BertConfig, device: &Device) -> Self {
        let hidden = config.hidden_size;
        let square = || linear_module(hidden, hidden, true, device);
        let norm = || LayerNorm::new(hidden, config.layer_norm_eps, device);
        Self {
            attention: BertAttention {
                query: square(),
                key: square(),
                value: square(),
                dense: square(),
                layer_norm: norm(),
                num_heads: config.num_attention_heads,
            },
            intermediate: linear_module(hidden, config.intermediate_size, true, device),
            output: linear_module(config.intermediate_size, hidden, true, device),
            layer_norm: norm(),
        }
    }

    /// # Shapes
    /// `[rows, length, hidden_size]` -> same
    #[must_use]
    pub fn forward(&self, x: Tensor<3>, mask: Option<&AttentionMask>) -> Tensor<3> {
        let x = self.attention.forward(x, mask);
        let inner = gelu(linear_forward(&self.intermediate, x.clone()));
        self.layer_norm.forward(linear_forward(&self.output, inner) + x)
    }
}

/// The encoder without a head.
#[derive(Module, Debug)]
pub struct Bert {
    /// Input.
    pub embeddings: BertEmbeddings,
    /// Blocks in order.
    pub layer: Vec<BertLayer>,
}

impl Bert {
    /// The first `layers` blocks, without memory until loaded.
    #[must_use]
    pub fn new(config: &BertConfig, layers: usize, device: &Device) -> Self {
        Self {
            embeddings: BertEmbeddings::new(config, device),
            layer: (0..layers).map(|_| BertLayer::new(config, device)).collect(),
        }
    }

    /// States after the last block for rows that are filled up with anything behind their `lengths` tokens.
    ///
    /// # Shapes
    /// `input_ids` and `positions` `[rows, length]` -> `[rows, length, hidden_size]`
    #[must_use]
    pub fn forward(&self, input_ids: Tensor<2, Int>, positions: Tensor<2, Int>, lengths: &[usize]) -> Tensor<3> {
        let [_, length] = input_ids.dims();
        let device = input_ids.device();
        let padded = lengths.iter().any(|n| *n < length);
        let mask = padded.then(|| AttentionMask::padded(lengths, length, &device));
        let x = self.embeddings.forward(input_ids, positions);
        self.layer.iter().fold(x, |x, layer| layer.forward(x, mask.as_ref()))
    }
}

/// Gives the tensors of a published checkpoint the names of [`Bert`] with `layers` blocks, and drops heads, poolers and
/// later blocks.
pub fn fit_names(checkpoint: &mut Checkpoint, layers: usize) {
    checkpoint.rename(|name| {
        let name = ["roberta.", "bert."].iter().find_map(|p| name.strip_prefix(p)).unwrap_or(name);
        let name = name.strip_prefix("encoder.").unwrap_or(name);
        let (name, kind) = name.rsplit_once('.').unwrap_or(("", name));
        // older exports have TensorFlow's names
        let kind = match kind {
            "gamma" => "weight",
            "beta" => "bias",
            other => other,
        };
        let name = name
            .replace("attention.self.", "attention.")
            .replace("attention.output.", "attention.")
            .replace("intermediate.dense", "intermediate")
            .replace("output.dense", "output")
            .replace("output.LayerNorm", "LayerNorm")
            .replace("LayerNorm", "layer_norm");
        format!("{name}.{kind}")
    });
    checkpoint.retain(|name| {
        let block = name.strip_prefix("layer.").and_then(|rest| rest.split('.').next()).and_then(|n| n.parse().ok());
        match block {
            Some(block) => (0..layers).contains(&block),
            None => name.starts_with("embeddings.") || name.starts_with("layer."),
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn roberta_counts_from_behind_its_pad_token() {
        let roberta = BertConfig::roberta_large();
        assert_eq!(roberta.positions(&[0, 9, 1, 7, 2]), [2, 3, 1, 4, 5]);
        assert_eq!(BertConfig::default().positions(&[0, 9, 1]), [0, 1, 2]);
        assert_eq!((roberta.max_length(), BertConfig::default().max_length()), (512, 512));
    }

    #[test]
    fn what_is_not_computed_is_refused() {
        for (config, key) in [
            (BertConfig { model_type: "xlnet".into(), ..BertConfig::default() }, "model_type"),
            (BertConfig { hidden_act: "relu".into(), ..BertConfig::default() }, "hidden_act"),
            (BertConfig { num_attention_heads: 7, ..BertConfig::default() }, "num_attention_heads"),
        ] {
            assert!(config.check().unwrap_err().to_string().contains(key));
        }
        BertConfig::roberta_large().check().unwrap();
    }
}
