//! `config.json` of Qwen-VL checkpoints, and presets.

use std::path::Path;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::{
    error::{Error, Kind, Result},
    generate::GenerateConfig,
    models::named,
    nn::{open_clip::OpenClipConfig, rope::inverse_frequencies},
};

/// The keys of `config.json` that decide something here; a missing key takes the default of `QWenConfig`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct QwenVlConfig {
    /// `qwen`.
    pub model_type: String,
    /// `["QWenLMHeadModel"]`.
    pub architectures: Vec<String>,
    /// Token embeddings; more than the tokenizer has ids.
    pub vocab_size: usize,
    /// Width of the decoder.
    pub hidden_size: usize,
    /// Twice the width inside the decoder's MLP.
    pub intermediate_size: usize,
    /// Decoder layers.
    pub num_hidden_layers: usize,
    /// Heads.
    pub num_attention_heads: usize,
    /// Width of a head.
    pub kv_channels: usize,
    /// Added to the mean square in norms.
    pub layer_norm_epsilon: f64,
    /// Base of the rotary frequencies.
    pub rotary_emb_base: f64,
    /// Share of a head that is rotated; 1.
    pub rotary_pct: f64,
    /// Length the positions were trained for; longer inputs get another rotary base and sharper queries.
    pub seq_length: usize,
    /// Longest sequence.
    pub max_position_embeddings: usize,
    /// Whether the rotary base grows with the length.
    pub use_dynamic_ntk: bool,
    /// Whether queries behind `seq_length` are scaled by the logarithm of their position.
    pub use_logn_attn: bool,
    /// Whether linear layers other than `c_attn` have no bias; true.
    pub no_bias: bool,
    /// Whether scores are divided by the root of the head's width; true.
    pub scale_attn_weights: bool,
    /// Dropout of attention probabilities; 0.
    pub attn_dropout_prob: f64,
    /// Dropout of embeddings; 0.
    pub emb_dropout_prob: f64,
    /// Whether logits share the embedding; false.
    pub tie_word_embeddings: bool,
    /// Standard deviation of random initialisation.
    pub initializer_range: f64,
    /// Type of the stored weights.
    pub torch_dtype: Option<String>,
    /// Shape of the vision tower.
    pub visual: OpenClipConfig,
    /// Keys without a meaning here, kept for saving.
    #[serde(flatten)]
    pub rest: Map<String, Value>,
}

impl Default for QwenVlConfig {
    fn default() -> Self {
        Self {
            model_type: "qwen".into(),
            architectures: vec!["QWenLMHeadModel".into()],
            vocab_size: 151_936,
            hidden_size: 4096,
            intermediate_size: 22016,
            num_hidden_layers: 32,
            num_attention_heads: 32,
            kv_channels: 128,
            layer_norm_epsilon: 1e-6,
            rotary_emb_base: 10000.0,
            rotary_pct: 1.0,
            seq_length: 2048,
            max_position_embeddings: 8192,
            use_dynamic_ntk: true,
            use_logn_attn: true,
            no_bias: true,
            scale_attn_weights: true,
            attn_dropout_prob: 0.0,
            emb_dropout_prob: 0.0,
            tie_word_embeddings: false,
            initializer_range: 0.02,
            torch_dtype: None,
            visual: OpenClipConfig::default(),
            rest: Map::new(),
        }
    }
}

impl QwenVlConfig {
    /// Qwen/Qwen-VL-Chat (its config.json).
    #[must_use]
    pub fn chat_9_6b() -> Self {
        Self { torch_dtype: Some("bfloat16".into()), ..Self::default() }
    }

    /// The same architecture at a size that two CPU cores train in minutes; 16 queries an image instead of 256.
    #[must_use]
    pub fn tiny() -> Self {
        Self {
            vocab_size: 1536,
            hidden_size: 128,
            intermediate_size: 704,
            num_hidden_layers: 4,
            num_attention_heads: 4,
            kv_channels: 32,
            seq_length: 512,
            max_position_embeddings: 2048,
            torch_dtype: Some("float32".into()),
            visual: OpenClipConfig {
                image_size: 64,
                patch_size: 8,
                width: 96,
                layers: 4,
                heads: 4,
                mlp_ratio: 4.0,
                output_dim: 128,
                image_start_id: None,
                n_queries: 16,
            },
            ..Self::default()
        }
    }

    /// The preset called `name`.
    ///
    /// # Errors
    /// There is none.
    pub fn preset(name: &str) -> Result<Self> {
        named(&[("chat-9.6b", Self::chat_9_6b as fn() -> Self), ("tiny", Self::tiny as fn() -> Self)], name)
    }

    /// Reads `config.json` of a checkpoint directory.
    ///
    /// # Errors
    /// An unreadable file, no vision tower, or a value this program does not compute.
    pub fn open(dir: &Path) -> Result<Self> {
        let path = dir.join("config.json");
        let text = std::fs::read_to_string(&path).map_err(|e| Error::io(&path, e))?;
        let bad = |e| Error::new(Kind::Checkpoint, "cannot read config.json").at(path.display()).source(e);
        let value: Value = serde_json::from_str(&text).map_err(bad)?;
        if value.get("visual").is_none() {
            return Err(Error::new(Kind::Checkpoint, "a Qwen model without a vision tower")
                .at(path.display())
                .expected("the key `visual`")
                .help("this family covers Qwen-VL; the text-only models have the same model_type"));
        }
        let config: Self = serde_json::from_value(value).map_err(bad)?;
        config.check().map_err(|e| e.at(path.display()))?;
        Ok(config)
    }

    /// Refuses shapes that do not fit together and options that no released model uses.
    ///
    /// # Errors
    /// The first of them.
    pub fn check(&self) -> Result<()> {
        let visual = &self.visual;
        let grid = visual.patch_size > 0 && visual.image_size.is_multiple_of(visual.patch_size);
        let rules = [
            (
                self.kv_channels * self.num_attention_heads == self.hidden_size,
                "kv_channels * num_attention_heads = hidden_size",
            ),
            (self.kv_channels.is_multiple_of(2) && self.kv_channels > 2, "an even kv_channels above 2"),
            (self.intermediate_size.is_multiple_of(2), "an even intermediate_size"),
            (self.seq_length > 1, "seq_length above 1"),
            (self.rotary_pct == 1.0, "rotary_pct = 1"),
            (self.no_bias, "no_bias = true"),
            (self.scale_attn_weights, "scale_attn_weights = true"),
            (self.attn_dropout_prob == 0.0 && self.emb_dropout_prob == 0.0, "dropout 0"),
            (!self.tie_word_embeddings, "tie_word_embeddings = false"),
            (visual.output_dim == self.hidden_size, "visual.output_dim = hidden_size"),
            (visual.heads > 0 && visual.width.is_multiple_of(visual.heads), "visual.width a multiple of visual.heads"),
            (grid, "visual.image_size a multiple of visual.patch_size"),
            (visual.n_queries.isqrt().pow(2) == visual.n_queries, "a square number of visual.n_queries"),
            (
                visual.output_dim.is_multiple_of(4 * visual.pool_heads()),
                "visual.output_dim a multiple of 4 and of its heads",
            ),
        ];
        match rules.into_iter().find(|(holds, _)| !holds) {
            None => Ok(()),
            Some((_, expected)) => Err(Error::new(Kind::Checkpoint, "unsupported values in config.json")
                .expected(expected)
                .help("this family covers Qwen-VL and Qwen-VL-Chat")),
        }
    }

    /// Width inside the decoder's MLP.
    #[must_use]
    pub fn mlp_width(&self) -> usize {
        self.intermediate_size / 2
    }

    /// Factor of the rotary base for rows of `length` tokens: 1 up to `seq_length`, 3 up to twice that, then 7, 15, ...
    #[must_use]
    pub fn ntk_alpha(&self, length: usize) -> f64 {
        if !self.use_dynamic_ntk || length == 0 {
            return 1.0;
        }
        let doublings = ((length as f64 / self.seq_length as f64).log2() + 1.0).ceil();
        (doublings.exp2() - 1.0).max(1.0)
    }

    /// Inverse rotary frequencies under `alpha`.
    #[must_use]
    pub fn frequencies(&self, alpha: f64) -> Vec<f32> {
        let dim = self.kv_channels as f64;
        inverse_frequencies(self.kv_channels, self.rotary_emb_base * alpha.powf(dim / (dim - 2.0)))
    }

    /// Factor of a query at `position` (from 0).
    #[must_use]
    pub fn query_factor(&self, position: i32) -> f32 {
        let (at, trained) = (f64::from(position) + 1.0, self.seq_length as f64);
        if self.use_logn_attn && at > trained { (at.ln() / trained.ln()) as f32 } else { 1.0 }
    }
}

/// Reads `generation_config.json` of a checkpoint directory. `do_sample = false` means greedy; a missing key takes the
/// value of transformers' `GenerationConfig`.
///
/// # Errors
/// An unreadable file, or another chat format than ChatML.
pub fn generation(dir: &Path) -> Result<GenerateConfig> {
    #[derive(Deserialize)]
    #[serde(default)]
    struct File {
        chat_format: String,
        do_sample: bool,
        temperature: f64,
        top_k: usize,
        top_p: f64,
        repetition_penalty: f64,
        num_beams: usize,
        length_penalty: f64,
        max_new_tokens: usize,
    }
    impl Default for File {
        fn default() -> Self {
            Self {
                chat_format: "chatml".into(),
                do_sample: false,
                temperature: 1.0,
                top_k: 50,
                top_p: 1.0,
                repetition_penalty: 1.0,
                num_beams: 1,
                length_penalty: 1.0,
                max_new_tokens: 512,
            }
        }
    }
    let path = dir.join("generation_config.json");
    let text = std::fs::read_to_string(&path).map_err(|e| Error::io(&path, e))?;
    let file: File = serde_json::from_str(&text)
        .map_err(|e| Error::new(Kind::Checkpoint, "cannot read generation_config.json").at(path.display()).source(e))?;
    if file.chat_format != "chatml" {
        return Err(Error::new(Kind::Checkpoint, "unsupported chat_format")
            .at(path.display())
            .expected("chatml")
            .found(file.chat_format)
            .help("use the chat model; the base model has no turns"));
    }
    Ok(GenerateConfig {
        max_new_tokens: file.max_new_tokens,
        temperature: if file.do_sample { file.temperature } else { 0.0 },
        top_k: file.top_k,
        top_p: file.top_p,
        repetition_penalty: file.repetition_penalty,
        num_beams: file.num_beams,
        length_penalty: file.length_penalty,
        ..GenerateConfig::default()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn alpha_doubles_with_the_length() {
        let config = QwenVlConfig { seq_length: 32, ..QwenVlConfig::tiny() };
        let alphas = [1, 32, 33, 64, 65, 128, 129].map(|n| config.ntk_alpha(n));
        assert_eq!(alphas, [1.0, 1.0, 3.0, 3.0, 7.0, 7.0, 15.0]);
        assert_eq!(QwenVlConfig { use_dynamic_ntk: false, ..config }.ntk_alpha(129), 1.0);
    }

    #[test]
    fn only_queries_behind_the_trained_length_are_scaled() {
        let config = QwenVlConfig { seq_length: 32, ..QwenVlConfig::tiny() };
        assert_eq!(config.query_factor(31), 1.0);
        assert!((config.query_factor(32) - (33f32.ln() / 32f32.ln())).abs() < 1e-6);
    }

    #[test]
    fn a_written_config_is_read_back() {
        for config in [QwenVlConfig::tiny(), QwenVlConfig::chat_9_6b()] {
            let dir = tempfile::tempdir().unwrap();
            std::fs::write(dir.path().join("config.json"), serde_json::to_string(&config).unwrap()).unwrap();
            assert_eq!(QwenVlConfig::open(dir.path()).unwrap(), config);
        }
    }

    #[test]
    fn presets_are_consistent_and_odd_configs_are_refused() {
        for name in ["chat-9.6b", "tiny"] {
            QwenVlConfig::preset(name).unwrap().check().unwrap();
        }
        let odd = QwenVlConfig { no_bias: false, ..QwenVlConfig::tiny() };
        assert!(odd.check().unwrap_err().to_string().contains("no_bias"));
        assert!(QwenVlConfig::preset("huge").is_err());
    }
}
