//! `config.json` of LLaVA-Med checkpoints, and presets.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::{
    error::{Error, Kind, Result},
    models::{PresetConfig, named},
    nn::{decoder::DecoderShape, vit::ClipVisionConfig},
};

/// The keys of `config.json` that decide something here. A missing key takes transformers' `MistralConfig` default,
/// which is not the model's value for every key: an absent `sliding_window` means 4096, an absent `rope_theta` 1e4.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct LlavaMedConfig {
    /// `llava_mistral`.
    pub model_type: String,
    /// `["LlavaMistralForCausalLM"]`.
    pub architectures: Vec<String>,
    /// Token embeddings.
    pub vocab_size: usize,
    /// Width of the decoder.
    pub hidden_size: usize,
    /// Width inside the decoder's MLP.
    pub intermediate_size: usize,
    /// Decoder layers.
    pub num_hidden_layers: usize,
    /// Query heads.
    pub num_attention_heads: usize,
    /// Key-value heads; null means as many as query heads.
    pub num_key_value_heads: Option<usize>,
    /// Activation of the decoder's MLP; `silu`.
    pub hidden_act: String,
    /// Longest sequence the positions were trained for.
    pub max_position_embeddings: usize,
    /// Standard deviation of random initialisation.
    pub initializer_range: f64,
    /// Added to the mean square in norms.
    pub rms_norm_eps: f64,
    /// Whether logits share the embedding.
    pub tie_word_embeddings: bool,
    /// Base of the rotary frequencies.
    pub rope_theta: f64,
    /// Keys a query sees, itself included; null means all.
    pub sliding_window: Option<usize>,
    /// First token of a sequence.
    pub bos_token_id: i32,
    /// Last token of an answer.
    pub eos_token_id: i32,
    /// Hub name or path of the vision tower.
    pub mm_vision_tower: Option<String>,
    /// Width of vision features.
    pub mm_hidden_size: usize,
    /// `linear` or `mlp<depth>x_gelu`.
    pub mm_projector_type: String,
    /// Index into the vision tower's hidden states, of which the first is the input of the first block.
    pub mm_vision_select_layer: i64,
    /// `patch` or `cls_patch`.
    pub mm_vision_select_feature: String,
    /// Whether images are wrapped in start and end tokens.
    pub mm_use_im_start_end: bool,
    /// Whether a patch token was added to the vocabulary; absent means yes.
    pub mm_use_im_patch_token: bool,
    /// `pad` makes images square before resizing.
    pub image_aspect_ratio: Option<String>,
    /// Longest expanded sequence; longer ones are cut.
    pub tokenizer_model_max_length: Option<usize>,
    /// Side on which merged rows are filled.
    pub tokenizer_padding_side: String,
    /// Type of the stored weights.
    pub torch_dtype: Option<String>,
    /// Shape of the vision tower. Checkpoints of the original do not have it; those written here do.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub vision_config: Option<ClipVisionConfig>,
}

impl Default for LlavaMedConfig {
    fn default() -> Self {
        Self {
            model_type: "llava_mistral".into(),
            architectures: vec!["LlavaMistralForCausalLM".into()],
            vocab_size: 32000,
            hidden_size: 4096,
            intermediate_size: 14336,
            num_hidden_layers: 32,
            num_attention_heads: 32,
            num_key_value_heads: Some(8),
            hidden_act: "silu".into(),
            max_position_embeddings: 4096 * 32,
            initializer_range: 0.02,
            rms_norm_eps: 1e-6,
            tie_word_embeddings: false,
            rope_theta: 10000.0,
            sliding_window: Some(4096),
            bos_token_id: 1,
            eos_token_id: 2,
            mm_vision_tower: None,
            mm_hidden_size: 1024,
            mm_projector_type: "linear".into(),
            mm_vision_select_layer: -2,
            mm_vision_select_feature: "patch".into(),
            mm_use_im_start_end: false,
            mm_use_im_patch_token: true,
            image_aspect_ratio: None,
            tokenizer_model_max_length: None,
            tokenizer_padding_side: "right".into(),
            torch_dtype: None,
            vision_config: None,
        }
    }
}

impl LlavaMedConfig {
    /// microsoft/llava-med-v1.5-mistral-7b: Mistral-7B-Instruct-v0.2 (its config.json) with
    /// openai/clip-vit-large-patch14-336.
    #[must_use]
    pub fn v1_5_7b() -> Self {
        Self {
            max_position_embeddings: 32768,
            rms_norm_eps: 1e-5,
            rope_theta: 1e6,
            sliding_window: None,
            mm_vision_tower: Some("openai/clip-vit-large-patch14-336".into()),
            mm_projector_type: "mlp2x_gelu".into(),
            mm_use_im_patch_token: false,
            image_aspect_ratio: Some("pad".into()),
            tokenizer_model_max_length: Some(2048),
            torch_dtype: Some("bfloat16".into()),
            vision_config: Some(ClipVisionConfig {
                hidden_size: 1024,
                intermediate_size: 4096,
                num_hidden_layers: 24,
                num_attention_heads: 16,
                image_size: 336,
                patch_size: 14,
                ..ClipVisionConfig::default()
            }),
            ..Self::default()
        }
    }

    /// The same architecture with half a billion parameters, between the release and `tiny`: for measuring.
    #[must_use]
    pub fn half_b() -> Self {
        Self {
            hidden_size: 1024,
            intermediate_size: 3072,
            num_hidden_layers: 28,
            num_attention_heads: 16,
            num_key_value_heads: Some(4),
            mm_vision_tower: None,
            mm_hidden_size: 768,
            vision_config: Some(ClipVisionConfig {
                hidden_size: 768,
                intermediate_size: 3072,
                num_hidden_layers: 12,
                num_attention_heads: 12,
                image_size: 336,
                patch_size: 14,
                ..ClipVisionConfig::default()
            }),
            ..Self::v1_5_7b()
        }
    }

    /// The same architecture at a size that two CPU cores train in minutes.
    #[must_use]
    pub fn tiny() -> Self {
        Self {
            vocab_size: 1536,
            hidden_size: 128,
            intermediate_size: 352,
            num_hidden_layers: 4,
            num_attention_heads: 4,
            num_key_value_heads: Some(2),
            max_position_embeddings: 2048,
            rope_theta: 10000.0,
            mm_vision_tower: None,
            mm_hidden_size: 96,
            tokenizer_model_max_length: Some(512),
            torch_dtype: Some("float32".into()),
            vision_config: Some(ClipVisionConfig {
                hidden_size: 96,
                intermediate_size: 384,
                num_hidden_layers: 4,
                num_attention_heads: 4,
                image_size: 64,
                patch_size: 8,
                ..ClipVisionConfig::default()
            }),
            ..Self::v1_5_7b()
        }
    }

    /// The preset called `name`.
    ///
    /// # Errors
    /// There is none.
    pub fn preset(name: &str) -> Result<Self> {
        let presets: [PresetConfig<Self>; 3] =
            [("v1.5-7b", Self::v1_5_7b), ("0.5b", Self::half_b), ("tiny", Self::tiny)];
        named(&presets, name)
    }

    /// Reads `config.json` of a checkpoint directory.
    ///
    /// # Errors
    /// An unreadable file, or a value this program does not compute.
    pub fn open(dir: &Path) -> Result<Self> {
        let path = dir.join("config.json");
        let text = std::fs::read_to_string(&path).map_err(|e| Error::io(&path, e))?;
        let config: Self = serde_json::from_str(&text)
            .map_err(|e| Error::new(Kind::Checkpoint, "cannot read config.json").at(path.display()).source(e))?;
        config.check(&path)?;
        Ok(config)
    }

    fn check(&self, path: &Path) -> Result<()> {
        let refuse = |key: &str, expected: &str, found: String| {
            Err(Error::new(Kind::Checkpoint, format!("unsupported value of {key}"))
                .at(path.display())
                .expected(expected)
                .found(found)
                .help("this family covers LLaVA-Med v1.5; other LLaVA variants need their own family"))
        };
        let kv = self.num_key_value_heads();
        if self.num_attention_heads == 0 || !self.hidden_size.is_multiple_of(2 * self.num_attention_heads) {
            return refuse("hidden_size", "an even multiple of num_attention_heads", self.hidden_size.to_string());
        }
        if kv == 0 || !self.num_attention_heads.is_multiple_of(kv) {
            return refuse("num_key_value_heads", "a divisor of num_attention_heads", kv.to_string());
        }
        if self.hidden_act != "silu" {
            return refuse("hidden_act", "silu", self.hidden_act.clone());
        }
        if self.tie_word_embeddings {
            return refuse("tie_word_embeddings", "false", "true".into());
        }
        if self.mm_use_im_start_end || self.mm_use_im_patch_token {
            return refuse("mm_use_im_start_end, mm_use_im_patch_token", "false", "true or absent".into());
        }
        if !["patch", "cls_patch"].contains(&self.mm_vision_select_feature.as_str()) {
            return refuse("mm_vision_select_feature", "patch or cls_patch", self.mm_vision_select_feature.clone());
        }
        if self.projector_depth().is_none() {
            return refuse("mm_projector_type", "linear or mlp<depth>x_gelu", self.mm_projector_type.clone());
        }
        Ok(())
    }

    /// Key-value heads.
    #[must_use]
    pub fn num_key_value_heads(&self) -> usize {
        self.num_key_value_heads.unwrap_or(self.num_attention_heads)
    }

    /// Width of a decoder head.
    #[must_use]
    pub fn head_dim(&self) -> usize {
        self.hidden_size / self.num_attention_heads
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

    /// Linear layers of the projector; none if its type is unknown.
    #[must_use]
    pub fn projector_depth(&self) -> Option<usize> {
        match self.mm_projector_type.as_str() {
            "linear" => Some(1),
            other => other.strip_prefix("mlp")?.strip_suffix("x_gelu")?.parse().ok().filter(|depth| *depth > 0),
        }
    }

    /// Blocks of the vision tower that features pass through.
    ///
    /// # Errors
    /// `mm_vision_select_layer` lies outside the tower.
    pub fn vision_layers(&self, vision: &ClipVisionConfig) -> Result<usize> {
        let states = vision.num_hidden_layers as i64 + 1;
        let index = self.mm_vision_select_layer;
        let layer = if index < 0 { states + index } else { index };
        if (0..states).contains(&layer) {
            return Ok(layer as usize);
        }
        Err(Error::new(Kind::Checkpoint, "mm_vision_select_layer lies outside the vision tower")
            .expected(format!("-{states}..={}", states - 1))
            .found(index))
    }

    /// Features of one image.
    #[must_use]
    pub fn tokens_per_image(&self, vision: &ClipVisionConfig) -> usize {
        vision.num_patches() + usize::from(self.mm_vision_select_feature == "cls_patch")
    }
}

/// Folder with the vision tower's own config and weights, if there is one: `explicit`; else, unless config.json holds
/// the tower's shape, what `mm_vision_tower` names relative to the checkpoint or its parent; else `vision_tower/` there.
#[must_use]
pub fn vision_tower_dir(dir: &Path, config: &LlavaMedConfig, explicit: Option<&Path>) -> Option<PathBuf> {
    if let Some(explicit) = explicit {
        return Some(explicit.to_path_buf());
    }
    if config.vision_config.is_some() {
        return None;
    }
    let places = [Some(dir.to_path_buf()), dir.canonicalize().ok().and_then(|d| Some(d.parent()?.to_path_buf()))];
    let names = config.mm_vision_tower.as_deref().into_iter().chain(["vision_tower"]);
    names
        .flat_map(|name| places.iter().flatten().map(move |place| place.join(name)))
        .find(|candidate| candidate.join("config.json").is_file())
}

/// Reads the vision config of a CLIP folder, nested in a `CLIPModel` config or flat.
///
/// # Errors
/// An unreadable file, or an activation other than quick GELU.
pub fn read_vision_config(dir: &Path) -> Result<ClipVisionConfig> {
    #[derive(Deserialize)]
    struct Nested {
        vision_config: serde_json::Value,
    }
    let path = dir.join("config.json");
    let text = std::fs::read_to_string(&path).map_err(|e| Error::io(&path, e))?;
    let bad =
        |e| Error::new(Kind::Checkpoint, "cannot read the vision tower's config.json").at(path.display()).source(e);
    let value = match serde_json::from_str::<Nested>(&text) {
        Ok(nested) => nested.vision_config,
        Err(_) => serde_json::from_str(&text).map_err(bad)?,
    };
    let config: ClipVisionConfig = serde_json::from_value(value).map_err(bad)?;
    if config.hidden_act != "quick_gelu" {
        return Err(Error::new(Kind::Checkpoint, "unsupported activation of the vision tower")
            .at(path.display())
            .expected("quick_gelu")
            .found(config.hidden_act));
    }
    Ok(config)
}
