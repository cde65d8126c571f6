//! InternVL-Chat-V1.5 and its Mini versions (arXiv 2404.16821; github.com/OpenGVLab/InternVL): InternViT, pixel shuffle,
//! a projector, and Phi-3 or InternLM2. One image becomes up to a dozen tiles and a thumbnail.
//!
//! What differs from the original unless [`Compat`] asks for it:
//!
//! | original | here |
//! |---|---|
//! | one long row of a batch, or its padding, changes the rotations of all rows | each row follows its own length |
//! | cached keys keep an old rotation when the text crosses the original length | the text is read again: a cached step equals a recomputation |
//! | InternLM2's tables stay at the longest length ever seen, in later texts too | the length of each text decides |
//! | more image features than positions make the loss zero | an error before the batch is built |
//! | a mismatch of counted lengths silently drops a row | the row is refused by name |
//! | a bf16 checkpoint rotates with bf16-rounded tables | tables are f32 |

use std::{
    borrow::Cow,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
};

use burn::{
    module::Module,
    nn::Linear,
    tensor::{Device, FloatDType, Int, Tensor},
};

use crate::{
    error::Result,
    kernel::pixel_shuffle::pixel_shuffle,
    models::{AnyVlm, Compat, ModelDef, Preset, Release, TokenizerDef, TokenizerFiles},
    nn::{
        attention::{AttentionMask, Columns, Text},
        decoder::{DecoderContext, LayerCache},
        intern_vit::InternVit,
        internlm2::InternLm2,
        linear::{embedding_forward, linear_forward, linear_module},
        norm::LayerNorm,
        phi3::Phi3,
        projector::{ExactGelu, ProjectorLayer, project},
        rope::Rope,
    },
    vlm::{Batch, IGNORE, Tower, Vlm},
    weights::{Layout, SaveOptions},
};

pub mod config;
pub mod processor;
pub mod weights;

pub use config::{InternVlConfig, LlmKind};
pub use processor::InternVlProcessor;

/// The family.
pub static DEF: ModelDef = ModelDef {
    name: "internvl",
    about: "InternVL-Chat-V1.5: InternViT, dynamic tiles, Phi-3 or InternLM2",
    model_types: &["internvl_chat"],
    presets: &[
        Preset {
            name: "4b",
            about: "OpenGVLab/Mini-InternVL-Chat-4B-V1-5",
            vocab_size: 32020,
            max_tiles: 13,
            lora_targets: PHI3_TARGETS,
        },
        Preset {
            name: "2b",
            about: "OpenGVLab/Mini-InternVL-Chat-2B-V1-5",
            vocab_size: 92553,
            max_tiles: 13,
            lora_targets: INTERNLM2_TARGETS,
        },
        Preset {
            name: "26b",
            about: "OpenGVLab/InternVL-Chat-V1-5",
            vocab_size: 92553,
            max_tiles: 13,
            lora_targets: INTERNLM2_TARGETS,
        },
        Preset {
            name: "tiny",
            about: "the architecture of 4b, trained in minutes on two CPU cores",
            vocab_size: 1536,
            max_tiles: 5,
            lora_targets: PHI3_TARGETS,
        },
    ],
    init: |preset, vocab_size, seed, device| weights::init(preset, vocab_size, seed, device).map(AnyVlm::InternVl),
    empty: |preset, device| {
        let config = InternVlConfig::preset(preset)?;
        Ok((AnyVlm::InternVl(InternVl::new(&config, device)?), config.tokens_per_tile()))
    },
    shape: |dir, _options, device| InternVl::new(&InternVlConfig::open(dir)?, device).map(AnyVlm::InternVl),
    weights: |dir, options| weights::open(dir, options),
    load: |dir, options, device| weights::load_dir(dir, options, device).map(AnyVlm::InternVl),
    processor: |dir, _options| Ok(Box::new(InternVlProcessor::load(dir)?)),
    tokenizer: TokenizerDef { file: "tokenizer_config.json", train: processor::train_tokenizer },
    release: Release {
        layout: Layout::Safetensors,
        max_shard_bytes: 5_000_000_000,
        tokenizer: |preset, texts| processor::release_tokenizer(&InternVlConfig::preset(preset)?.llm_config, texts),
    },
};

/// The modules of Phi-3 that `wrap_llm_lora` adapts.
const PHI3_TARGETS: &[&str] = &["self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj"];

/// The modules of InternLM2 that `wrap_llm_lora` adapts.
const INTERNLM2_TARGETS: &[&str] =
    &["attention.wqkv", "attention.wo", "feed_forward.w1", "feed_forward.w2", "feed_forward.w3"];

const TOWERS: &[Tower] = &[
    Tower { name: "vision", prefix: "vision_model." },
    Tower { name: "projector", prefix: "mlp1." },
    Tower { name: "language", prefix: "language_model." },
];

/// Added to the variance in the projector's norm; PyTorch's default.
const PROJECTOR_EPS: f64 = 1e-5;

/// The language model.
#[derive(Module, Debug)]
pub enum LanguageModel {
    /// Phi-3.
    Phi3(Phi3),
    /// InternLM2.
    InternLm2(InternLm2),
}

/// `InternVLChatModel`. Paths of parameters are the checkpoint's names.
#[derive(Module, Debug)]
pub struct InternVl {
    /// Vision tower.
    pub vision_model: InternVit,
    /// Language model.
    pub language_model: LanguageModel,
    /// Projector: norm, linear, activation, linear.
    pub mlp1: Vec<ProjectorLayer>,
    #[module(skip)]
    config: InternVlConfig,
    #[module(skip)]
    compat: Compat,
    /// Longest length seen, for [`Compat::mixed_rotations`] alone.
    #[module(skip)]
    longest: Arc<AtomicUsize>,
}

impl InternVl {
    /// A model without weights; takes no memory until it is loaded or run.
    ///
    /// # Errors
    /// A config that [`InternVlConfig::check`] refuses.
    pub fn new(config: &InternVlConfig, device: &Device) -> Result<Self> {
        config.check()?;
        let llm = &config.llm_config;
        let (shape, layers) = (llm.decoder_shape(), llm.num_hidden_layers);
        let language_model = match llm.kind() {
            Some(LlmKind::InternLm2) => {
                LanguageModel::InternLm2(InternLm2::new(&shape, llm.bias(), layers, llm.vocab_size, device))
            }
            _ => LanguageModel::Phi3(Phi3::new(&shape, layers, llm.vocab_size, device)),
        };
        let width = config.vision_config.hidden_size * config.block().pow(2);
        Ok(Self {
            vision_model: InternVit::new(&config.vision_config.shape(), device),
            language_model,
            mlp1: vec![
                ProjectorLayer::Norm(LayerNorm::new(width, PROJECTOR_EPS, device)),
                ProjectorLayer::Linear(linear_module(width, llm.hidden_size, true, device)),
                ProjectorLayer::Gelu(ExactGelu::default()),
                ProjectorLayer::Linear(linear_module(llm.hidden_size, llm.hidden_size, true, device)),
            ],
            config: config.clone(),
            compat: Compat::default(),
            longest: Arc::default(),
        })
    }

    /// What the model was built from.
    #[must_use]
    pub fn config(&self) -> &InternVlConfig {
        &self.config
    }

    /// The same weights under another config of the same shape.
    #[must_use]
    pub fn with_config(mut self, config: InternVlConfig) -> Self {
        self.config = config;
        self.longest = Arc::default();
        self
    }

    /// The same model with quirks of the original.
    #[must_use]
    pub fn with_compat(mut self, compat: Compat) -> Self {
        self.compat = compat;
        self
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

    fn head(&self) -> &Linear {
        match &self.language_model {
            LanguageModel::Phi3(m) => &m.lm_head,
            LanguageModel::InternLm2(m) => &m.output,
        }
    }

    /// Length that decides the rotations of each text.
    fn lengths(&self, columns: &Columns, texts: &[Text]) -> Vec<usize> {
        let end = |positions: &[i32]| positions.iter().max().map_or(0, |p| *p as usize + 1);
        if !self.compat.mixed_rotations {
            let mut rest = columns.positions.as_slice();
            let own = texts.iter().map(|text| rest.split_off(..text.columns).map_or(0, end));
            return own.collect();
        }
        let length = match self.config.llm_config.kind() {
            Some(LlmKind::InternLm2) => {
                let now = columns.start + columns.length;
                now.max(self.longest.fetch_max(now, Ordering::Relaxed))
            }
            _ => end(&columns.positions),
        };
        vec![length; texts.len()]
    }

    fn rope(&self, columns: &Columns, device: &Device) -> Rope {
        let llm = &self.config.llm_config;
        let texts = columns.texts();
        let lengths = self.lengths(columns, &texts);
        let tables: Vec<Vec<f32>> = lengths.iter().map(|length| llm.frequencies(*length)).collect();
        let (positions, length) = (&columns.positions, columns.length);
        let rope = match tables.first() {
            Some(first) if tables.iter().all(|t| t == first) => Rope::new(positions, length, first, device),
            _ => {
                let texts: Vec<_> = texts.iter().zip(&tables).map(|(t, f)| (t.columns, f.as_slice())).collect();
                Rope::by_text(positions, length, &texts, device)
            }
        };
        rope.scaled(llm.rotation_scale())
    }
}

impl Vlm for InternVl {
    fn towers(&self) -> &'static [Tower] {
        TOWERS
    }

    fn vision(&self, pixels: Tensor<4>) -> Tensor<3> {
        let states = self.vision_model.forward(pixels, self.config.vision_layers());
        let length = states.dims()[1];
        states.narrow(1, 1, length - 1)
    }

    fn project(&self, features: Tensor<3>) -> Tensor<3> {
        let features = pixel_shuffle(features, self.config.block(), self.config.ps_version == "v1");
        project(&self.mlp1, features)
    }

    fn tile_features(&self) -> usize {
        self.config.tokens_per_tile()
    }

    fn tile_patches(&self) -> usize {
        self.config.grid().pow(2)
    }

    fn tile_values(&self) -> usize {
        3 * self.config.image_size().pow(2)
    }

    fn num_attention_heads(&self) -> usize {
        self.config.llm_config.num_attention_heads
    }

    fn reconcile<'b>(&self, batch: &'b Batch) -> Result<Cow<'b, Batch>> {
        let (count, positions) = (self.tile_features(), batch.feature_index.len());
        let surplus = batch.pixels.len() * count > positions && positions.is_multiple_of(count);
        if !surplus || !self.compat.surplus_zeroes_loss {
            return batch.check_features(count).map(|()| Cow::Borrowed(batch));
        }
        let mut batch = batch.clone();
        batch.pixels.truncate(positions / count);
        batch.labels.fill(IGNORE);
        Ok(Cow::Owned(batch))
    }

    fn embed_tokens(&self, input_ids: Tensor<2, Int>) -> Tensor<3> {
        match &self.language_model {
            LanguageModel::Phi3(m) => embedding_forward(&m.model.embed_tokens, input_ids),
            LanguageModel::InternLm2(m) => embedding_forward(&m.model.tok_embeddings, input_ids),
        }
    }

    fn columns_context(&self, columns: &Columns, device: &Device) -> DecoderContext {
        DecoderContext {
            rope: self.rope(columns, device),
            mask: AttentionMask::causal(columns, self.config.llm_config.sliding_window, device),
            query_scale: None,
        }
    }

    fn cache_expires(&self, columns: &Columns) -> bool {
        let changes = |positions: &[i32]| {
            let (before, now) = (positions.iter().min(), positions.iter().max());
            let (before, now) = (before.map_or(0, |p| *p as usize), now.map_or(0, |p| *p as usize + 1));
            !self.config.llm_config.same_rotations(before, now)
        };
        !self.compat.mixed_rotations && columns.positions.chunks(columns.length.max(1)).any(changes)
    }

    fn num_layers(&self) -> usize {
        self.config.llm_config.num_hidden_layers
    }

    fn layer(&self, index: usize, x: Tensor<3>, context: &DecoderContext, cache: Option<&mut LayerCache>) -> Tensor<3> {
        match &self.language_model {
            LanguageModel::Phi3(m) => m.model.layers[index].forward(x, context, cache),
            LanguageModel::InternLm2(m) => m.model.layers[index].forward(x, context, cache),
        }
    }

    fn final_norm(&self, x: Tensor<3>) -> Tensor<3> {
        match &self.language_model {
            LanguageModel::Phi3(m) => m.model.norm.forward(x),
            LanguageModel::InternLm2(m) => m.model.norm.forward(x),
        }
    }

    fn logits(&self, hidden: Tensor<2>) -> Tensor<2> {
        linear_forward(self.head(), hidden)
    }
}
