//! `config.json` of transformers' `LlavaConfig` with a SigLIP tower and a Qwen2 decoder.

use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::{
    error::{Error, Kind, Result},
    models::named,
    nn::decoder::DecoderShape,
};

/// The keys that decide something here; defaults are transformers'.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct SiglipQwen2Config {
    /// `llava`.
    pub model_type: String,
    /// Id of the image token.
    pub image_token_index: i32,
    /// Index into the vision tower's hidden states; -1 is the last block's output.
    pub vision_feature_layer: i64,
    /// `full`: SigLIP has no class token to leave out.
    pub vision_feature_select_strategy: String,
    /// The tower.
    pub vision_config: SiglipConfig,
    /// The decoder.
    pub text_config: Qwen2Config,
}

/// `SiglipVisionConfig`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct SiglipConfig {
    /// Width.
    pub hidden_size: usize,
    /// Width inside the MLP.
    pub intermediate_size: usize,
    /// Blocks.
    pub num_hidden_layers: usize,
    /// Heads.
    pub num_attention_heads: usize,
    /// Side of the square input in pixels.
    pub image_size: usize,
    /// Side of a patch in pixels.
    pub patch_size: usize,
    /// Added to the variance in norms.
    pub layer_norm_eps: f64,
}

/// `Qwen2Config`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Qwen2Config {
    /// Token embeddings.
    pub vocab_size: usize,
    /// Width.
    pub hidden_size: usize,
    /// Width inside the MLP.
    pub intermediate_size: usize,
    /// Layers.
    pub num_hidden_layers: usize,
    /// Query heads.
    pub num_attention_heads: usize,
    /// Key-value heads.
    pub num_key_value_heads: usize,
    /// Longest sequence the positions were trained for.
    pub max_position_embeddings: usize,
    /// Added to the mean square in norms.
    pub rms_norm_eps: f64,
    /// Standard deviation of random initialisation.
    pub initializer_range: f64,
    /// Rotary settings.
    pub rope_parameters: RopeParameters,
}

/// `rope_parameters`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RopeParameters {
    /// Base of the rotary frequencies.
    pub rope_theta: f64,
}

impl Default for SiglipQwen2Config {
    fn default() -> Self {
        Self {
            model_type: "llava".into(),
            image_token_index: 32000,
            vision_feature_layer: -2,
            vision_feature_select_strategy: "default".into(),
            vision_config: SiglipConfig::default(),
            text_config: Qwen2Config::default(),
        }
    }
}

impl Default for SiglipConfig {
    fn default() -> Self {
        Self {
            hidden_size: 768,
            intermediate_size: 3072,
            num_hidden_layers: 12,
            num_attention_heads: 12,
            image_size: 224,
            patch_size: 16,
            layer_norm_eps: 1e-6,
        }
    }
}

impl Default for Qwen2Config {
    fn default() -> Self {
        Self {
            vocab_size: 151_936,
            hidden_size: 4096,
            intermediate_size: 22016,
            num_hidden_layers: 32,
            num_attention_heads: 32,
            num_key_value_heads: 32,
            max_position_embeddings: 32768,
            rms_norm_eps: 1e-6,
            initializer_range: 0.02,
            rope_parameters: RopeParameters { rope_theta: 10000.0 },
        }
    }
}

impl SiglipQwen2Config {
    /// A size that tests run in seconds; no published checkpoint has it.
    #[must_use]
    pub fn tiny() -> Self {
        Self {
            image_token_index: 3,
            vision_feature_layer: -1,
            vision_feature_select_strategy: "full".into(),
            vision_config: SiglipConfig {
                hidden_size: 32,
                intermediate_size: 64,
                num_hidden_layers: 2,
                num_attention_heads: 4,
                image_size: 32,
                patch_size: 8,
                ..SiglipConfig::default()
            },
            text_config: Qwen2Config {
                vocab_size: 320,
                hidden_size: 48,
                intermediate_size: 96,
                num_hidden_layers: 2,
                num_attention_heads: 4,
                num_key_value_heads: 2,
                max_position_embeddings: 512,
                ..Qwen2Config::default()
            },
            ..Self::default()
        }
    }

    /// The preset called `name`.
    ///
    /// # Errors
    /// There is none.
    pub fn preset(name: &str) -> Result<Self> {
        named(&[("tiny", Self::tiny as fn() -> Self)], name)
    }

    /// Reads `config.json` of a checkpoint directory.
    ///
    /// # Errors
    /// An unreadable file, or features that this family does not take.
    pub fn open(dir: &Path) -> Result<Self> {
        let path = dir.join("config.json");
        let text = std::fs::read_to_string(&path).map_err(|e| Error::io(&path, e))?;
        let config: Self = serde_json::from_str(&text)
            .map_err(|e| Error::new(Kind::Checkpoint, "cannot read config.json").at(path.display()).source(e))?;
        if (config.vision_feature_layer, config.vision_feature_select_strategy.as_str()) == (-1, "full") {
            return Ok(config);
        }
        Err(Error::new(Kind::Checkpoint, "unsupported vision features")
            .at(path.display())
            .expected("vision_feature_layer -1, vision_feature_select_strategy full")
            .found(format!("{}, {}", config.vision_feature_layer, config.vision_feature_select_strategy)))
    }

    /// Features of one image.
    #[must_use]
    pub fn tokens_per_image(&self) -> usize {
        (self.vision_config.image_size / self.vision_config.patch_size).pow(2)
    }

    /// Shape of a decoder layer.
    #[must_use]
    pub fn decoder_shape(&self) -> DecoderShape {
        let text = &self.text_config;
        DecoderShape {
            hidden_size: text.hidden_size,
            intermediate_size: text.intermediate_size,
            num_attention_heads: text.num_attention_heads,
            num_key_value_heads: text.num_key_value_heads,
            head_dim: text.hidden_size / text.num_attention_heads,
            rms_norm_eps: text.rms_norm_eps,
            attention_bias: true,
        }
    }
}
