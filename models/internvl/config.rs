//! `config.json` of the InternVL-Chat-V1.5 family: a vision config, a language model config, and how they meet.

use std::path::Path;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use crate::{
    error::{Error, Kind, Result},
    models::named,
    nn::{decoder::DecoderShape, intern_vit::InternVitShape, rope::inverse_frequencies},
};

/// `InternVisionConfig`; defaults are those of the original.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct VisionConfig {
    /// Width.
    pub hidden_size: usize,
    /// Width inside the MLP.
    pub intermediate_size: usize,
    /// Blocks.
    pub num_hidden_layers: usize,
    /// Heads.
    pub num_attention_heads: usize,
    /// Colour channels.
    pub num_channels: usize,
    /// Side of the square that the table of positions was made for, pixels.
    pub image_size: usize,
    /// Side of a patch, pixels.
    pub patch_size: usize,
    /// `layer_norm` or `rms_norm`.
    pub norm_type: String,
    /// Whether the fused projection of queries, keys and values has a bias.
    pub qkv_bias: bool,
    /// Whether queries and keys are normed over the whole width.
    pub qk_normalization: bool,
    /// Activation of the MLP.
    pub hidden_act: String,
    /// Added to the variance or mean square in norms.
    pub layer_norm_eps: f64,
    /// Initial value of the layer scales.
    pub initializer_factor: f64,
    /// Everything else, kept for saving.
    #[serde(flatten)]
    pub extra: Map<String, Value>,
}

impl Default for VisionConfig {
    fn default() -> Self {
        Self {
            hidden_size: 3200,
            intermediate_size: 12800,
            num_hidden_layers: 48,
            num_attention_heads: 25,
            num_channels: 3,
            image_size: 224,
            patch_size: 14,
            norm_type: "rms_norm".into(),
            qkv_bias: false,
            qk_normalization: true,
            hidden_act: "gelu".into(),
            layer_norm_eps: 1e-6,
            initializer_factor: 0.1,
            extra: Map::new(),
        }
    }
}

/// `rope_scaling` of the language model.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "lowercase")]
pub enum RopeScaling {
    /// LongRoPE: one set of factors up to the original length, another beyond it.
    #[serde(alias = "longrope")]
    Su {
        /// Divides the frequencies of texts within the original length; one number for each pair of a head.
        short_factor: Vec<f32>,
        /// The same for longer texts.
        long_factor: Vec<f32>,
    },
    /// As `su` with another temperature.
    Yarn {
        /// As in `su`.
        short_factor: Vec<f32>,
        /// As in `su`.
        long_factor: Vec<f32>,
    },
    /// The base grows with the length beyond `max_position_embeddings`.
    Dynamic {
        /// How fast.
        factor: f64,
    },
    /// Positions are divided.
    Linear {
        /// By what.
        factor: f64,
    },
}

/// Which language model it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LlmKind {
    /// Phi-3: fused queries, keys and values one after the other; fused gate and up.
    Phi3,
    /// InternLM2: queries, keys and values grouped by key-value head.
    InternLm2,
}

/// `Phi3Config` or `InternLM2Config`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct LlmConfig {
    /// The class decides which model it is.
    #[serde(default)]
    pub architectures: Vec<String>,
    /// `phi3` or `internlm2`.
    #[serde(default)]
    pub model_type: String,
    /// Rows of the token embeddings.
    pub vocab_size: usize,
    /// Width.
    pub hidden_size: usize,
    /// Width inside the MLP.
    pub intermediate_size: usize,
    /// Layers.
    pub num_hidden_layers: usize,
    /// Query heads.
    pub num_attention_heads: usize,
    /// Key-value heads; as many as query heads when absent.
    #[serde(default)]
    pub num_key_value_heads: Option<usize>,
    /// Added to the mean square in norms.
    pub rms_norm_eps: f64,
    /// Base of the rotary frequencies.
    pub rope_theta: f64,
    /// Longest text.
    pub max_position_embeddings: usize,
    /// Longest text before the frequencies were stretched.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub original_max_position_embeddings: Option<usize>,
    /// How the frequencies were stretched.
    #[serde(default)]
    pub rope_scaling: Option<RopeScaling>,
    /// Keys that a query sees, itself included.
    #[serde(default)]
    pub sliding_window: Option<usize>,
    /// Whether the linear layers of InternLM2's attention have biases; true when absent, as in its class.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bias: Option<bool>,
    /// Activation of the MLP.
    #[serde(default = "silu")]
    pub hidden_act: String,
    /// Whether the head is the transposed embedding.
    #[serde(default)]
    pub tie_word_embeddings: bool,
    /// Standard deviation of random weights.
    #[serde(default = "initializer_range")]
    pub initializer_range: f64,
    /// Id that fills generated rows.
    #[serde(default)]
    pub pad_token_id: Option<i32>,
    /// Everything else, kept for saving.
    #[serde(flatten)]
    pub extra: Map<String, Value>,
}

fn silu() -> String {
    "silu".into()
}

fn initializer_range() -> f64 {
    0.02
}

/// Divisors of the frequencies of Phi-3-mini-128k for texts of up to 4096 tokens.
const SHORT_FACTOR: [f32; 48] = [
    1.05, 1.05, 1.05, 1.1, 1.1, 1.15, 1.2, 1.25, 1.3, 1.35, 1.5, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0,
    2.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.05, 2.05, 2.05, 2.1, 2.1, 2.1, 2.15, 2.15, 2.35, 2.55, 2.6,
    2.6, 2.75, 2.85, 2.85, 2.95,
];

/// The same for longer texts.
const LONG_FACTOR: [f32; 48] = [
    1.03, 1.05, 1.05, 1.0799999, 1.2299999, 1.2299999, 1.3, 1.4499999, 1.5999999, 1.6499999, 1.8999999, 2.86,
    3.6899998, 5.4199996, 5.49, 5.49, 9.09, 11.58, 15.66, 15.7699995, 15.79, 18.36, 21.99, 23.08, 30.009998, 32.350002,
    32.590004, 35.560005, 39.950005, 53.840004, 56.200005, 57.950005, 59.290005, 59.770004, 59.920006, 61.190006,
    61.960007, 62.500008, 63.370007, 63.480007, 63.480007, 63.660007, 63.850006, 64.08001, 64.76001, 64.80001,
    64.81001, 64.81001,
];

/// `InternVLChatConfig`; defaults are those of the original.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct InternVlConfig {
    /// `internvl_chat`.
    pub model_type: String,
    /// Vision tower.
    pub vision_config: VisionConfig,
    /// Language model.
    pub llm_config: LlmConfig,
    /// Side of a tile, pixels; that of the vision config when absent.
    #[serde(default)]
    pub force_image_size: Option<usize>,
    /// Side of the grid of features over the side of the grid of patches.
    #[serde(default = "half")]
    pub downsample_ratio: f64,
    /// State of the vision tower that features are taken from; -1 is the last.
    #[serde(default = "last")]
    pub select_layer: i64,
    /// `v1` or `v2`.
    #[serde(default = "v1")]
    pub ps_version: String,
    /// Chat template.
    #[serde(default)]
    pub template: String,
    /// System message, where it is not the template's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub system_message: Option<String>,
    /// Whether an image becomes several tiles.
    #[serde(default)]
    pub dynamic_image_size: bool,
    /// Whether the whole image follows its tiles.
    #[serde(default)]
    pub use_thumbnail: bool,
    /// Fewest tiles of an image.
    #[serde(default = "one")]
    pub min_dynamic_patch: usize,
    /// Most tiles of a sample's images.
    #[serde(default = "six")]
    pub max_dynamic_patch: usize,
    /// Whether images are padded to a square before they are resized.
    #[serde(default)]
    pub pad2square: bool,
    /// Rank of un-merged adapters on the vision tower.
    #[serde(default)]
    pub use_backbone_lora: usize,
    /// Rank of un-merged adapters on the language model.
    #[serde(default)]
    pub use_llm_lora: usize,
    /// Type of the stored weights.
    #[serde(default)]
    pub torch_dtype: Option<String>,
    /// Everything else, kept for saving.
    #[serde(flatten)]
    pub extra: Map<String, Value>,
}

fn half() -> f64 {
    0.5
}

fn last() -> i64 {
    -1
}

fn v1() -> String {
    "v1".into()
}

fn one() -> usize {
    1
}

fn six() -> usize {
    6
}

impl VisionConfig {
    /// InternViT-300M-448px.
    #[must_use]
    pub fn intern_vit_300m() -> Self {
        Self {
            hidden_size: 1024,
            intermediate_size: 4096,
            num_hidden_layers: 24,
            num_attention_heads: 16,
            image_size: 448,
            norm_type: "layer_norm".into(),
            qkv_bias: true,
            qk_normalization: false,
            ..Self::default()
        }
    }

    /// InternViT-6B-448px-V1-5.
    #[must_use]
    pub fn intern_vit_6b() -> Self {
        Self { num_hidden_layers: 45, image_size: 448, ..Self::default() }
    }

    /// Shape of the tower.
    #[must_use]
    pub fn shape(&self) -> InternVitShape {
        InternVitShape {
            hidden_size: self.hidden_size,
            intermediate_size: self.intermediate_size,
            num_hidden_layers: self.num_hidden_layers,
            num_attention_heads: self.num_attention_heads,
            num_channels: self.num_channels,
            patch_size: self.patch_size,
            grid: self.image_size / self.patch_size,
            rms_norm: self.norm_type == "rms_norm",
            qkv_bias: self.qkv_bias,
            qk_normalization: self.qk_normalization,
            eps: self.layer_norm_eps,
        }
    }

    fn problem(&self) -> Option<(&'static str, &'static str, String)> {
        let heads = self.num_attention_heads;
        if heads == 0 || !self.hidden_size.is_multiple_of(heads) {
            return Some((
                "vision_config.hidden_size",
                "a multiple of num_attention_heads",
                self.hidden_size.to_string(),
            ));
        }
        if self.patch_size == 0 || !self.image_size.is_multiple_of(self.patch_size) {
            return Some(("vision_config.image_size", "a multiple of patch_size", self.image_size.to_string()));
        }
        if self.hidden_act != "gelu" {
            return Some(("vision_config.hidden_act", "gelu", self.hidden_act.clone()));
        }
        let known = ["layer_norm", "rms_norm"].contains(&self.norm_type.as_str());
        (!known).then(|| ("vision_config.norm_type", "layer_norm or rms_norm", self.norm_type.clone()))
    }
}

impl LlmConfig {
    fn base(kind: LlmKind) -> Self {
        let (class, model_type) = match kind {
            LlmKind::Phi3 => ("Phi3ForCausalLM", "phi3"),
            LlmKind::InternLm2 => ("InternLM2ForCausalLM", "internlm2"),
        };
        Self {
            architectures: vec![class.into()],
            model_type: model_type.into(),
            vocab_size: 0,
            hidden_size: 0,
            intermediate_size: 0,
            num_hidden_layers: 0,
            num_attention_heads: 0,
            num_key_value_heads: None,
            rms_norm_eps: 1e-5,
            rope_theta: 10000.0,
            max_position_embeddings: 4096,
            original_max_position_embeddings: None,
            rope_scaling: None,
            sliding_window: None,
            bias: (kind == LlmKind::InternLm2).then_some(false),
            hidden_act: silu(),
            tie_word_embeddings: false,
            initializer_range: initializer_range(),
            pad_token_id: None,
            extra: Map::new(),
        }
    }

    /// Phi-3-mini-128k-instruct with the vocabulary of Mini-InternVL-Chat-4B-V1-5
    /// (huggingface.co/OpenGVLab/Mini-InternVL-Chat-4B-V1-5/blob/main/config.json). The factors are those of the first
    /// release of Phi-3-mini-128k-instruct, as torchtune's builder `phi3_mini_128k` has them
    /// (torchtune/models/phi3/_model_builders.py); later revisions have others, and a checkpoint brings its own.
    #[must_use]
    pub fn phi3_mini_128k() -> Self {
        let (short_factor, long_factor) = (SHORT_FACTOR.to_vec(), LONG_FACTOR.to_vec());
        Self {
            vocab_size: 32020,
            hidden_size: 3072,
            intermediate_size: 8192,
            num_hidden_layers: 32,
            num_attention_heads: 32,
            num_key_value_heads: Some(32),
            max_position_embeddings: 131_072,
            original_max_position_embeddings: Some(4096),
            rope_scaling: Some(RopeScaling::Su { short_factor, long_factor }),
            sliding_window: Some(262_144),
            pad_token_id: Some(32000),
            ..Self::base(LlmKind::Phi3)
        }
    }

    /// InternLM2-chat-1.8B with the vocabulary of Mini-InternVL-Chat-2B-V1-5.
    #[must_use]
    pub fn internlm2_1_8b() -> Self {
        Self {
            vocab_size: 92553,
            hidden_size: 2048,
            intermediate_size: 8192,
            num_hidden_layers: 24,
            num_attention_heads: 16,
            num_key_value_heads: Some(8),
            rope_theta: 1e6,
            max_position_embeddings: 32768,
            rope_scaling: Some(RopeScaling::Dynamic { factor: 2.0 }),
            pad_token_id: Some(2),
            ..Self::base(LlmKind::InternLm2)
        }
    }

    /// InternLM2-chat-20B with the vocabulary of InternVL-Chat-V1-5.
    #[must_use]
    pub fn internlm2_20b() -> Self {
        Self {
            hidden_size: 6144,
            intermediate_size: 16384,
            num_hidden_layers: 48,
            num_attention_heads: 48,
            rope_scaling: Some(RopeScaling::Dynamic { factor: 3.0 }),
            ..Self::internlm2_1_8b()
        }
    }

    /// Which model it is; none if it is neither.
    #[must_use]
    pub fn kind(&self) -> Option<LlmKind> {
        match self.architectures.first().map(String::as_str).unwrap_or(&self.model_type) {
            "Phi3ForCausalLM" | "phi3" => Some(LlmKind::Phi3),
            "InternLM2ForCausalLM" | "internlm2" => Some(LlmKind::InternLm2),
            _ => None,
        }
    }

    /// Key-value heads.
    #[must_use]
    pub fn num_key_value_heads(&self) -> usize {
        self.num_key_value_heads.unwrap_or(self.num_attention_heads)
    }

    /// Width of a head.
    #[must_use]
    pub fn head_dim(&self) -> usize {
        self.hidden_size / self.num_attention_heads
    }

    /// Whether the linear layers of attention have biases.
    #[must_use]
    pub fn bias(&self) -> bool {
        self.kind() == Some(LlmKind::InternLm2) && self.bias.unwrap_or(true)
    }

    /// Shape of a decoder layer.
    #[must_use]
    pub fn decoder_shape(&self) -> DecoderShape {
        DecoderShape {
            hidden_size: self.hidden_size,
            intermediate_size: self.intermediate_size,
            num_attention_heads: self.num_attention_heads,
            num_key_value_heads: self.num_key_value_heads(),
            head_dim: self.head_dim(),
            rms_norm_eps: self.rms_norm_eps,
            attention_bias: false,
        }
    }

    /// Whether texts of two lengths have the same rotations.
    #[must_use]
    pub fn same_rotations(&self, a: usize, b: usize) -> bool {
        match &self.rope_scaling {
            Some(RopeScaling::Su { .. } | RopeScaling::Yarn { .. }) => {
                (a > self.original_length()) == (b > self.original_length())
            }
            Some(RopeScaling::Dynamic { .. }) => a == b || a.max(b) <= self.max_position_embeddings,
            Some(RopeScaling::Linear { .. }) | None => true,
        }
    }

    fn original_length(&self) -> usize {
        self.original_max_position_embeddings.unwrap_or(self.max_position_embeddings)
    }

    /// Inverse frequencies for a text of `length` tokens, one for each pair of a head.
    #[must_use]
    pub fn frequencies(&self, length: usize) -> Vec<f32> {
        let dim = self.head_dim();
        let plain = |theta: f64| inverse_frequencies(dim, theta);
        match &self.rope_scaling {
            None => plain(self.rope_theta),
            Some(RopeScaling::Su { short_factor, long_factor } | RopeScaling::Yarn { short_factor, long_factor }) => {
                let factors = if length > self.original_length() { long_factor } else { short_factor };
                let power = |i: usize| (self.rope_theta as f32).powf((2 * i) as f32 / dim as f32);
                factors.iter().enumerate().map(|(i, factor)| 1.0 / (factor * power(i))).collect()
            }
            Some(RopeScaling::Dynamic { factor }) => {
                let over = length as f64 / self.max_position_embeddings as f64;
                let growth = if over > 1.0 { factor * over - (factor - 1.0) } else { 1.0 };
                plain(self.rope_theta * growth.powf(dim as f64 / (dim as f64 - 2.0)))
            }
            Some(RopeScaling::Linear { factor }) => {
                plain(self.rope_theta).into_iter().map(|f| (f64::from(f) / factor) as f32).collect()
            }
        }
    }

    /// Factor of cosines and sines, for short texts too.
    #[must_use]
    pub fn rotation_scale(&self) -> f64 {
        let original = self.original_length() as f64;
        let stretch = self.max_position_embeddings as f64 / original;
        match &self.rope_scaling {
            Some(RopeScaling::Su { .. }) if stretch > 1.0 => (1.0 + stretch.ln() / original.ln()).sqrt(),
            Some(RopeScaling::Yarn { .. }) if stretch > 1.0 => 0.1 * stretch.ln() + 1.0,
            _ => 1.0,
        }
    }

    fn problem(&self) -> Option<(&'static str, &'static str, String)> {
        if self.kind().is_none() {
            let found = self.architectures.first().unwrap_or(&self.model_type).clone();
            return Some(("llm_config.architectures", "Phi3ForCausalLM or InternLM2ForCausalLM", found));
        }
        let (heads, kv) = (self.num_attention_heads, self.num_key_value_heads());
        if heads == 0 || !self.hidden_size.is_multiple_of(2 * heads) {
            return Some((
                "llm_config.hidden_size",
                "an even multiple of num_attention_heads",
                self.hidden_size.to_string(),
            ));
        }
        if kv == 0 || !heads.is_multiple_of(kv) {
            return Some(("llm_config.num_key_value_heads", "a divisor of num_attention_heads", kv.to_string()));
        }
        if self.hidden_act != "silu" {
            return Some(("llm_config.hidden_act", "silu", self.hidden_act.clone()));
        }
        if self.tie_word_embeddings {
            return Some(("llm_config.tie_word_embeddings", "false", "true".into()));
        }
        let half = self.head_dim() / 2;
        match &self.rope_scaling {
            Some(RopeScaling::Su { short_factor, long_factor } | RopeScaling::Yarn { short_factor, long_factor }) => {
                let found = if short_factor.len() == half { long_factor.len() } else { short_factor.len() };
                let what = "one factor for each pair of a head";
                (found != half).then(|| ("llm_config.rope_scaling", what, format!("{found} for {half} pairs")))
            }
            _ => None,
        }
    }
}

impl InternVlConfig {
    fn with(vision_config: VisionConfig, llm_config: LlmConfig, template: &str) -> Self {
        let extra = json!({"architectures": ["InternVLChatModel"], "hidden_size": llm_config.hidden_size});
        Self {
            model_type: "internvl_chat".into(),
            force_image_size: Some(vision_config.image_size),
            vision_config,
            llm_config,
            downsample_ratio: half(),
            select_layer: last(),
            ps_version: "v2".into(),
            template: template.into(),
            system_message: None,
            dynamic_image_size: true,
            use_thumbnail: true,
            min_dynamic_patch: 1,
            max_dynamic_patch: 12,
            pad2square: false,
            use_backbone_lora: 0,
            use_llm_lora: 0,
            torch_dtype: Some("bfloat16".into()),
            extra: extra.as_object().cloned().unwrap_or_default(),
        }
    }

    /// OpenGVLab/Mini-InternVL-Chat-4B-V1-5 (its config.json on huggingface.co).
    #[must_use]
    pub fn mini_4b() -> Self {
        Self::with(VisionConfig::intern_vit_300m(), LlmConfig::phi3_mini_128k(), "phi3-chat")
    }

    /// OpenGVLab/Mini-InternVL-Chat-2B-V1-5 (its config.json on huggingface.co).
    #[must_use]
    pub fn mini_2b() -> Self {
        Self::with(VisionConfig::intern_vit_300m(), LlmConfig::internlm2_1_8b(), "internlm2-chat")
    }

    /// OpenGVLab/InternVL-Chat-V1-5 (its config.json on huggingface.co).
    #[must_use]
    pub fn chat_26b() -> Self {
        Self::with(VisionConfig::intern_vit_6b(), LlmConfig::internlm2_20b(), "internlm2-chat")
    }

    /// The architecture of the 4B model at a size that two CPU cores train in minutes.
    #[must_use]
    pub fn tiny() -> Self {
        let vision = VisionConfig {
            hidden_size: 96,
            intermediate_size: 384,
            num_hidden_layers: 4,
            num_attention_heads: 4,
            image_size: 64,
            patch_size: 8,
            ..VisionConfig::intern_vit_300m()
        };
        let llm = LlmConfig {
            vocab_size: 1536,
            hidden_size: 128,
            intermediate_size: 352,
            num_hidden_layers: 4,
            num_attention_heads: 4,
            num_key_value_heads: Some(2),
            max_position_embeddings: 2048,
            original_max_position_embeddings: Some(1024),
            rope_scaling: Some(RopeScaling::Su { short_factor: vec![1.0; 16], long_factor: vec![2.0; 16] }),
            sliding_window: None,
            pad_token_id: None,
            ..LlmConfig::phi3_mini_128k()
        };
        Self {
            max_dynamic_patch: 4,
            system_message: Some("You are a helpful assistant.".into()),
            torch_dtype: Some("float32".into()),
            ..Self::with(vision, llm, "phi3-chat")
        }
    }

    /// The preset called `name`.
    ///
    /// # Errors
    /// There is none.
    pub fn preset(name: &str) -> Result<Self> {
        named(
            &[
                ("4b", Self::mini_4b as fn() -> Self),
                ("2b", Self::mini_2b as fn() -> Self),
                ("26b", Self::chat_26b as fn() -> Self),
                ("tiny", Self::tiny as fn() -> Self),
            ],
            name,
        )
    }

    /// Reads `config.json` of a checkpoint directory.
    ///
    /// # Errors
    /// An unreadable file, or a value that this program does not compute.
    pub fn open(dir: &Path) -> Result<Self> {
        let path = dir.join("config.json");
        let text = std::fs::read_to_string(&path).map_err(|e| Error::io(&path, e))?;
        let config: Self = serde_json::from_str(&text)
            .map_err(|e| Error::new(Kind::Checkpoint, "cannot read config.json").at(path.display()).source(e))?;
        config.check().map_err(|e| e.at(path.display()))?;
        Ok(config)
    }

    /// Whether everything in it is computed here.
    ///
    /// # Errors
    /// The first value that is not.
    pub fn check(&self) -> Result<()> {
        let problem = self.vision_config.problem().or_else(|| self.llm_config.problem()).or_else(|| self.problem());
        match problem {
            None => Ok(()),
            Some((key, expected, found)) => Err(Error::new(Kind::Checkpoint, format!("unsupported value of {key}"))
                .expected(expected)
                .found(found)
                .help("this family covers InternVL-Chat-V1.5 and its Mini versions")),
        }
    }

    fn problem(&self) -> Option<(&'static str, &'static str, String)> {
        let (grid, block) = (self.grid(), self.block());
        if block == 0 || !grid.is_multiple_of(block) || (self.downsample_ratio * block as f64 - 1.0).abs() > 1e-9 {
            return Some((
                "downsample_ratio",
                "one over a divisor of the grid of patches",
                self.downsample_ratio.to_string(),
            ));
        }
        if !["v1", "v2"].contains(&self.ps_version.as_str()) {
            return Some(("ps_version", "v1 or v2", self.ps_version.clone()));
        }
        if self.min_dynamic_patch == 0 || self.max_dynamic_patch < self.min_dynamic_patch {
            return Some(("max_dynamic_patch", "at least min_dynamic_patch", self.max_dynamic_patch.to_string()));
        }
        let states = self.vision_config.num_hidden_layers as i64 + 1;
        if !(-states..states).contains(&self.select_layer) {
            return Some(("select_layer", "a state of the vision tower", self.select_layer.to_string()));
        }
        None
    }

    /// Side of a tile, pixels.
    #[must_use]
    pub fn image_size(&self) -> usize {
        self.force_image_size.unwrap_or(self.vision_config.image_size)
    }

    /// Patches along the side of a tile.
    #[must_use]
    pub fn grid(&self) -> usize {
        self.image_size() / self.vision_config.patch_size
    }

    /// Patches along the side of the block that becomes one feature.
    #[must_use]
    pub fn block(&self) -> usize {
        (1.0 / self.downsample_ratio).round() as usize
    }

    /// Features of one tile.
    #[must_use]
    pub fn tokens_per_tile(&self) -> usize {
        (self.grid() / self.block()).pow(2)
    }

    /// Vision blocks that features pass through.
    #[must_use]
    pub fn vision_layers(&self) -> usize {
        let states = self.vision_config.num_hidden_layers as i64 + 1;
        let layer = if self.select_layer < 0 { states + self.select_layer } else { self.select_layer };
        layer.clamp(0, states - 1) as usize
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn presets_are_consistent_and_come_back_from_json() {
        for name in ["4b", "2b", "26b", "tiny"] {
            let config = InternVlConfig::preset(name).unwrap();
            config.check().unwrap();
            let text = serde_json::to_string(&config).unwrap();
            assert_eq!(serde_json::from_str::<InternVlConfig>(&text).unwrap(), config, "{name}");
        }
        assert_eq!(InternVlConfig::mini_4b().tokens_per_tile(), 256);
        for preset in super::super::DEF.presets {
            let config = InternVlConfig::preset(preset.name).unwrap();
            assert_eq!(preset.max_tiles, config.max_dynamic_patch + usize::from(config.use_thumbnail));
            assert_eq!(preset.vocab_size, config.llm_config.vocab_size);
        }
        assert!([SHORT_FACTOR, LONG_FACTOR].iter().all(|factors| factors.is_sorted() && factors[0] >= 1.0));
        assert_eq!(InternVlConfig::chat_26b().vision_layers(), 45);
        assert!(InternVlConfig::preset("9b").is_err());
    }

    #[test]
    fn unsupported_values_are_named() {
        let mut config = InternVlConfig::tiny();
        config.llm_config.architectures = vec!["LlamaForCausalLM".into()];
        assert!(config.check().unwrap_err().to_string().contains("LlamaForCausalLM"));
        let mut config = InternVlConfig::tiny();
        config.downsample_ratio = 0.3;
        assert!(config.check().unwrap_err().to_string().contains("downsample_ratio"));
        let mut config = InternVlConfig::tiny();
        config.llm_config.rope_scaling = Some(RopeScaling::Su { short_factor: vec![1.0], long_factor: vec![1.0; 16] });
        assert!(config.check().unwrap_err().to_string().contains("1 for 16 pairs"));
    }

    #[test]
    fn longrope_is_another_name_of_su() {
        let text = r#"{"type": "longrope", "short_factor": [1.0], "long_factor": [2.0]}"#;
        assert!(matches!(serde_json::from_str::<RopeScaling>(text).unwrap(), RopeScaling::Su { .. }));
    }
}
