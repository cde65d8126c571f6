//! LLaVA-Med v1.5 (arXiv 2306.00890; github.com/microsoft/LLaVA-Med): CLIP ViT-L/14-336, a two-layer projector, and
//! Mistral-7B, whose token embeddings the projected patches are spliced into.

use std::path::Path;

use burn::{
    module::Module,
    nn::{Embedding, Linear},
    tensor::{Device, FloatDType, Int, Tensor},
};

use crate::{
    error::{Error, Kind, Result},
    models::{AnyVlm, ModelDef, Preset, Release, TokenizerDef, TokenizerFiles},
    nn::{
        attention::Columns,
        decoder::{DecoderContext, DecoderLayer, LayerCache},
        linear::{embedding_forward, linear_forward, linear_module},
        norm::RmsNorm,
        parameter,
        projector::{ProjectorLayer, mlp_gelu, project},
        rope::inverse_frequencies,
        vit::ClipVisionTransformer,
    },
    text::bpe::train_bpe,
    vlm::{Tower, Vlm},
    weights::{Layout, SaveOptions},
};

pub mod config;
pub mod processor;
pub mod weights;

pub use config::LlavaMedConfig;
use processor::Overflow;

/// The family.
pub static DEF: ModelDef = ModelDef {
    name: "llava_med",
    about: "LLaVA-Med v1.5: CLIP ViT, MLP projector, Mistral",
    model_types: &["llava_mistral"],
    presets: &[
        Preset {
            name: "v1.5-7b",
            about: "microsoft/llava-med-v1.5-mistral-7b",
            vocab_size: 32_000,
            max_tiles: 1,
            lora_targets: LORA_TARGETS,
        },
        Preset {
            name: "0.5b",
            about: "the same architecture with half a billion parameters, never published; for measuring",
            vocab_size: 32_000,
            max_tiles: 1,
            lora_targets: LORA_TARGETS,
        },
        Preset {
            name: "tiny",
            about: "the same architecture, trained in minutes on two CPU cores",
            vocab_size: 1536,
            max_tiles: 1,
            lora_targets: LORA_TARGETS,
        },
    ],
    init: |preset, vocab_size, seed, device| weights::init(preset, vocab_size, seed, device).map(AnyVlm::LlavaMed),
    empty: |preset, device| {
        let config = LlavaMedConfig::preset(preset)?;
        let tokens = config.vision_config.as_ref().map_or(0, |vision| config.tokens_per_image(vision));
        Ok((AnyVlm::LlavaMed(LlavaMed::new(&config, device)?), tokens))
    },
    shape: |dir, options, device| {
        let (config, _) = weights::open_config(dir, options.vision_tower.as_deref())?;
        LlavaMed::new(&config, device).map(AnyVlm::LlavaMed)
    },
    weights: |dir, options| Ok(weights::open(dir, options)?.1),
    load: |dir, options, device| weights::load_dir(dir, options, device).map(AnyVlm::LlavaMed),
    processor: |dir, options| {
        let processor = processor::LlavaMedProcessor::load(dir, options.vision_tower.as_deref())?;
        let overflow = if options.compat.cut_long_rows { Overflow::CutText } else { Overflow::Error };
        Ok(Box::new(processor.with_overflow(overflow)))
    },
    tokenizer: TokenizerDef {
        file: "tokenizer.json",
        train: |texts, vocab_size| Ok(vec![("tokenizer.json", train_bpe(texts, vocab_size)?)]),
    },
    release: Release {
        layout: Layout::Safetensors,
        max_shard_bytes: 5_000_000_000,
        tokenizer: |preset, texts| processor::release_tokenizer(texts, LlavaMedConfig::preset(preset)?.vocab_size),
    },
};

/// All linear layers of the decoder.
const LORA_TARGETS: &[&str] = &["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"];

const TOWERS: &[Tower] = &[
    Tower { name: "vision", prefix: "model.vision_tower." },
    Tower { name: "projector", prefix: "model.mm_projector." },
    Tower { name: "language", prefix: "" },
];

/// `CLIPVisionModel`.
#[derive(Module, Debug)]
pub struct ClipVisionModel {
    /// Its only member.
    pub vision_model: ClipVisionTransformer,
}

/// LLaVA's wrapper of the vision tower.
#[derive(Module, Debug)]
pub struct ClipVisionTower {
    /// Its only member.
    pub vision_tower: ClipVisionModel,
}

/// `LlavaMistralModel`: everything below the head.
#[derive(Module, Debug)]
pub struct LlavaMistralModel {
    /// Token embeddings.
    pub embed_tokens: Embedding,
    /// Decoder layers.
    pub layers: Vec<DecoderLayer>,
    /// Final norm.
    pub norm: RmsNorm,
    /// Projector.
    pub mm_projector: Vec<ProjectorLayer>,
    /// Vision tower.
    pub vision_tower: ClipVisionTower,
}

/// `LlavaMistralForCausalLM`. Paths of parameters are the checkpoint's names.
#[derive(Module, Debug)]
pub struct LlavaMed {
    /// Everything below the head.
    pub model: LlavaMistralModel,
    /// States to logits.
    pub lm_head: Linear,
    #[module(skip)]
    config: LlavaMedConfig,
    /// Vision blocks that features pass through.
    vision_layers: usize,
}

impl LlavaMed {
    /// A model without weights; takes no memory until it is loaded or run.
    ///
    /// # Errors
    /// No `vision_config`, or a feature layer outside the tower.
    pub fn new(config: &LlavaMedConfig, device: &Device) -> Result<Self> {
        let vision = config.vision_config.as_ref().ok_or_else(|| {
            Error::new(Kind::Checkpoint, "the shape of the vision tower is unknown")
                .expected("vision_config in config.json, or a folder with the tower's config.json")
                .help("give the CLIP folder as `model.vision_tower`")
        })?;
        let depth = config.projector_depth().ok_or_else(|| {
            Error::new(Kind::Checkpoint, "unknown mm_projector_type").found(&config.mm_projector_type)
        })?;
        let shape = config.decoder_shape();
        Ok(Self {
            model: LlavaMistralModel {
                embed_tokens: Embedding { weight: parameter([config.vocab_size, config.hidden_size], 0.0, device) },
                layers: (0..config.num_hidden_layers).map(|_| DecoderLayer::new(&shape, device)).collect(),
                norm: RmsNorm::new(config.hidden_size, config.rms_norm_eps, device),
                mm_projector: mlp_gelu(vision.hidden_size, config.hidden_size, depth, device),
                vision_tower: ClipVisionTower {
                    vision_tower: ClipVisionModel { vision_model: ClipVisionTransformer::new(vision, device) },
                },
            },
            lm_head: linear_module(config.hidden_size, config.vocab_size, false, device),
            vision_layers: config.vision_layers(vision)?,
            config: config.clone(),
        })
    }

    /// What the model was built from.
    #[must_use]
    pub fn config(&self) -> &LlavaMedConfig {
        &self.config
    }

    /// Writes a checkpoint directory; see [`weights::save_dir`].
    ///
    /// # Errors
    /// An unwritable directory, or a model with adapters.
    pub fn save(&self, dir: &Path, options: &SaveOptions) -> Result<()> {
        weights::save_dir(self, dir, options)
    }

    /// config.json and its companion; see [`weights::config_files`].
    ///
    /// # Errors
    /// The config has no JSON form.
    pub fn config_files(&self, dtype: FloatDType) -> Result<TokenizerFiles> {
        weights::config_files(self, dtype)
    }

    /// The vision transformer.
    #[must_use]
    pub fn vision_model(&self) -> &ClipVisionTransformer {
        &self.model.vision_tower.vision_tower.vision_model
    }
}

impl Vlm for LlavaMed {
    fn towers(&self) -> &'static [Tower] {
        TOWERS
    }

    fn vision(&self, pixels: Tensor<4>) -> Tensor<3> {
        let states = self.vision_model().forward(pixels, self.vision_layers);
        if self.config.mm_vision_select_feature == "cls_patch" {
            return states;
        }
        let length = states.dims()[1];
        states.narrow(1, 1, length - 1)
    }

    fn project(&self, features: Tensor<3>) -> Tensor<3> {
        project(&self.model.mm_projector, features)
    }

    fn tile_features(&self) -> usize {
        self.config.vision_config.as_ref().map_or(0, |vision| self.config.tokens_per_image(vision))
    }

    fn tile_values(&self) -> usize {
        self.config.vision_config.as_ref().map_or(0, |vision| vision.num_channels * vision.image_size.pow(2))
    }

    fn num_attention_heads(&self) -> usize {
        self.config.num_attention_heads
    }

    fn embed_tokens(&self, input_ids: Tensor<2, Int>) -> Tensor<3> {
        embedding_forward(&self.model.embed_tokens, input_ids)
    }

    fn columns_context(&self, columns: &Columns, device: &Device) -> DecoderContext {
        let frequencies = inverse_frequencies(self.config.head_dim(), self.config.rope_theta);
        DecoderContext::causal(columns, &frequencies, self.config.sliding_window, device)
    }

    fn num_layers(&self) -> usize {
        self.model.layers.len()
    }

    fn layer(&self, index: usize, x: Tensor<3>, context: &DecoderContext, cache: Option<&mut LayerCache>) -> Tensor<3> {
        self.model.layers[index].forward(x, context, cache)
    }

    fn final_norm(&self, x: Tensor<3>) -> Tensor<3> {
        self.model.norm.forward(x)
    }

    fn logits(&self, hidden: Tensor<2>) -> Tensor<2> {
        linear_forward(&self.lm_head, hidden)
    }
}
