//! Qwen-VL-Chat (arXiv 2308.12966; Qwen/Qwen-VL-Chat): OpenCLIP's ViT-bigG, a resampler to 256 features an image, and
//! Qwen-7B, in whose token rows the features stand between `<img>` and `</img>`.

use std::path::Path;

use burn::{
    module::Module,
    nn::{Embedding, Linear},
    tensor::{DType, Device, FloatDType, Int, Tensor, TensorData, activation::silu},
};

use crate::{
    error::Result,
    models::{AnyVlm, Compat, ModelDef, Preset, Release, TokenizerDef, TokenizerFiles},
    nn::{
        attention::{AttentionMask, Columns, Text},
        decoder::{DecoderContext, FusedHeads, LayerCache, fused_attention},
        linear::{embedding_forward, linear_forward, linear_module},
        norm::RmsNorm,
        open_clip::OpenClipVision,
        parameter,
        rope::Rope,
    },
    text::{
        qwen::{IMAGE_START, SPECIALS},
        tiktoken,
    },
    vlm::{Tower, Vlm},
    weights::{Layout, SaveOptions},
};

pub mod config;
pub mod processor;
pub mod weights;

pub use config::QwenVlConfig;

/// The family.
pub static DEF: ModelDef = ModelDef {
    name: "qwen_vl",
    about: "Qwen-VL-Chat: OpenCLIP ViT, resampler, Qwen",
    model_types: &["qwen"],
    presets: &[
        Preset {
            name: "chat-9.6b",
            about: "Qwen/Qwen-VL-Chat",
            vocab_size: 151_936,
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
    init: |preset, vocab_size, seed, device| weights::init(preset, vocab_size, seed, device).map(AnyVlm::QwenVl),
    empty: |preset, device| {
        let config = QwenVlConfig::preset(preset)?;
        Ok((AnyVlm::QwenVl(QwenVl::new(&config, device)?), config.visual.n_queries))
    },
    shape: |dir, _options, device| QwenVl::new(&QwenVlConfig::open(dir)?, device).map(AnyVlm::QwenVl),
    weights: |dir, options| weights::open(dir, options),
    load: |dir, options, device| weights::load_dir(dir, options, device).map(AnyVlm::QwenVl),
    processor: |dir, _options| Ok(Box::new(processor::QwenVlProcessor::load(dir)?)),
    tokenizer: TokenizerDef {
        file: "qwen.tiktoken",
        train: |texts, vocab_size| {
            let ranks = tiktoken::train(texts, vocab_size.saturating_sub(SPECIALS))?;
            Ok(vec![("qwen.tiktoken", ranks.into_bytes())])
        },
    },
    release: Release {
        layout: Layout::PyTorch,
        max_shard_bytes: 2_000_000_000,
        tokenizer: |preset, texts| {
            let config = QwenVlConfig::preset(preset)?;
            let room = config.vocab_size.saturating_sub(SPECIALS);
            // The release has more embeddings than tokens; its config says where <img> is.
            let ranks = config.visual.image_start_id.map_or(room, |id| id as usize - IMAGE_START);
            Ok(vec![("qwen.tiktoken", tiktoken::train_filled(texts, ranks)?.into_bytes())])
        },
    },
};

/// The modules of the original's LoRA fine-tuning.
const LORA_TARGETS: &[&str] = &["c_attn", "attn.c_proj", "w1", "w2"];

/// As in the original's fine-tuning, `ln_post` and `proj` count as vision, so training the projector trains the
/// resampler alone.
const TOWERS: &[Tower] = &[
    Tower { name: "vision", prefix: "transformer.visual." },
    Tower { name: "projector", prefix: "transformer.visual.attn_pool." },
    Tower { name: "language", prefix: "" },
];

/// Self-attention with one fused projection: all queries, all keys, all values.
#[derive(Module, Debug)]
pub struct QwenAttention {
    /// `hidden_size -> 3 * hidden_size`
    pub c_attn: Linear,
    /// `hidden_size -> hidden_size`
    pub c_proj: Linear,
    /// Width of a head.
    pub head_dim: usize,
}

impl QwenAttention {
    /// # Shapes
    /// `[rows, length, hidden_size]` -> same
    #[must_use]
    pub fn forward(&self, x: Tensor<3>, context: &DecoderContext, cache: Option<&mut LayerCache>) -> Tensor<3> {
        let heads = x.dims()[2] / self.head_dim;
        let heads = FusedHeads { groups: 1, queries: heads, keys: heads };
        fused_attention([&self.c_attn, &self.c_proj], heads, x, context, cache)
    }
}

/// `c_proj(w1(x) * silu(w2(x)))`: the second projection is the gate.
#[derive(Module, Debug)]
pub struct QwenMlp {
    /// `hidden_size -> mlp_width`
    pub w1: Linear,
    /// `hidden_size -> mlp_width`
    pub w2: Linear,
    /// `mlp_width -> hidden_size`
    pub c_proj: Linear,
}

impl QwenMlp {
    fn forward(&self, x: Tensor<3>) -> Tensor<3> {
        let gate = silu(linear_forward(&self.w2, x.clone()));
        linear_forward(&self.c_proj, linear_forward(&self.w1, x) * gate)
    }
}

/// Pre-norm decoder layer.
#[derive(Module, Debug)]
pub struct QwenBlock {
    /// Norm before attention.
    pub ln_1: RmsNorm,
    /// Attention.
    pub attn: QwenAttention,
    /// Norm before the MLP.
    pub ln_2: RmsNorm,
    /// MLP.
    pub mlp: QwenMlp,
}

impl QwenBlock {
    fn new(config: &QwenVlConfig, device: &Device) -> Self {
        let (hidden, inner) = (config.hidden_size, config.mlp_width());
        let norm = || RmsNorm::new(hidden, config.layer_norm_epsilon, device);
        Self {
            ln_1: norm(),
            attn: QwenAttention {
                c_attn: linear_module(hidden, 3 * hidden, true, device),
                c_proj: linear_module(hidden, hidden, false, device),
                head_dim: config.kv_channels,
            },
            ln_2: norm(),
            mlp: QwenMlp {
                w1: linear_module(hidden, inner, false, device),
                w2: linear_module(hidden, inner, false, device),
                c_proj: linear_module(inner, hidden, false, device),
            },
        }
    }

    fn forward(&self, x: Tensor<3>, context: &DecoderContext, cache: Option<&mut LayerCache>) -> Tensor<3> {
        let branch = self.attn.forward(self.ln_1.forward(x.clone()), context, cache);
        let (x, normed) = self.ln_2.add_forward(x, branch);
        x + self.mlp.forward(normed)
    }
}

/// `QWenModel`: everything below the head.
#[derive(Module, Debug)]
pub struct QwenTransformer {
    /// Token embeddings.
    pub wte: Embedding,
    /// Decoder layers.
    pub h: Vec<QwenBlock>,
    /// Final norm.
    pub ln_f: RmsNorm,
    /// Vision tower and resampler.
    pub visual: OpenClipVision,
}

/// `QWenLMHeadModel`. Paths of parameters are the checkpoint's names.
#[derive(Module, Debug)]
pub struct QwenVl {
    /// Everything below the head.
    pub transformer: QwenTransformer,
    /// States to logits.
    pub lm_head: Linear,
    #[module(skip)]
    config: QwenVlConfig,
    #[module(skip)]
    compat: Compat,
}

impl QwenVl {
    /// A model without weights; takes no memory until it is loaded or run.
    ///
    /// # Errors
    /// Shapes that do not fit together, see [`QwenVlConfig::check`].
    pub fn new(config: &QwenVlConfig, device: &Device) -> Result<Self> {
        config.check()?;
        let (vocab, hidden) = (config.vocab_size, config.hidden_size);
        Ok(Self {
            transformer: QwenTransformer {
                wte: Embedding { weight: parameter([vocab, hidden], 0.0, device) },
                h: (0..config.num_hidden_layers).map(|_| QwenBlock::new(config, device)).collect(),
                ln_f: RmsNorm::new(hidden, config.layer_norm_epsilon, device),
                visual: OpenClipVision::new(&config.visual, device),
            },
            lm_head: linear_module(hidden, vocab, false, device),
            config: config.clone(),
            compat: Compat::default(),
        })
    }

    /// What the model was built from.
    #[must_use]
    pub fn config(&self) -> &QwenVlConfig {
        &self.config
    }

    /// The same weights under another config of the same shape.
    #[must_use]
    pub fn with_config(mut self, config: QwenVlConfig) -> Self {
        self.config = config;
        self
    }

    /// The same model with quirks of the original.
    #[must_use]
    pub fn with_compat(mut self, compat: Compat) -> Self {
        self.compat = compat;
        self
    }

    /// Writes a checkpoint directory, see [`weights::save_dir`].
    ///
    /// # Errors
    /// An unwritable directory, or a model with adapters that were not merged.
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

    /// Rotary position of each query.
    fn positions(&self, columns: &Columns) -> Vec<i32> {
        if !self.compat.padded_columns {
            return columns.positions.clone();
        }
        let row: Vec<i32> = (columns.start..columns.start + columns.length).map(|c| c as i32).collect();
        row.repeat(columns.rows)
    }

    /// Factor of the rotary base of each text.
    fn alphas(&self, columns: &Columns, texts: &[Text]) -> Vec<f64> {
        let alpha = |text: &Text| match (self.compat.training_alpha, self.compat.padded_columns) {
            (Some(alpha), _) => alpha,
            (None, true) => self.config.ntk_alpha(columns.prefill),
            (None, false) => self.config.ntk_alpha(text.tokens),
        };
        texts.iter().map(alpha).collect()
    }

    fn rope(&self, positions: &[i32], columns: &Columns, device: &Device) -> Rope {
        let texts = columns.texts();
        let alphas = self.alphas(columns, &texts);
        let tables: Vec<Vec<f32>> = alphas.iter().map(|a| self.config.frequencies(*a)).collect();
        match tables.first() {
            Some(first) if alphas.iter().all(|a| *a == alphas[0]) => {
                Rope::new(positions, columns.length, first, device)
            }
            _ => {
                let texts: Vec<_> = texts.iter().zip(&tables).map(|(t, f)| (t.columns, f.as_slice())).collect();
                Rope::by_text(positions, columns.length, &texts, device)
            }
        }
    }

    fn query_scale(&self, positions: &[i32], columns: &Columns, device: &Device) -> Option<Tensor<4>> {
        let factors: Vec<f32> = positions.iter().map(|p| self.config.query_factor(*p)).collect();
        if self.compat.training_alpha.is_some() || factors.iter().all(|f| *f == 1.0) {
            return None;
        }
        let shape = [columns.rows, columns.length, 1, 1];
        Some(Tensor::from_data(TensorData::new(factors, shape), (device, DType::F32)))
    }
}

impl Vlm for QwenVl {
    fn towers(&self) -> &'static [Tower] {
        TOWERS
    }

    fn vision(&self, pixels: Tensor<4>) -> Tensor<3> {
        self.transformer.visual.patches(pixels)
    }

    fn project(&self, features: Tensor<3>) -> Tensor<3> {
        self.transformer.visual.pool(features)
    }

    fn tile_features(&self) -> usize {
        self.config.visual.n_queries
    }

    fn tile_patches(&self) -> usize {
        (self.config.visual.image_size / self.config.visual.patch_size.max(1)).pow(2)
    }

    fn tile_values(&self) -> usize {
        3 * self.config.visual.image_size.pow(2)
    }

    fn num_attention_heads(&self) -> usize {
        self.config.num_attention_heads
    }

    fn embed_tokens(&self, input_ids: Tensor<2, Int>) -> Tensor<3> {
        embedding_forward(&self.transformer.wte, input_ids)
    }

    fn columns_context(&self, columns: &Columns, device: &Device) -> DecoderContext {
        let positions = self.positions(columns);
        DecoderContext {
            rope: self.rope(&positions, columns, device),
            mask: AttentionMask::causal(columns, None, device),
            query_scale: self.query_scale(&positions, columns, device),
        }
    }

    fn num_layers(&self) -> usize {
        self.transformer.h.len()
    }

    fn layer(&self, index: usize, x: Tensor<3>, context: &DecoderContext, cache: Option<&mut LayerCache>) -> Tensor<3> {
        self.transformer.h[index].forward(x, context, cache)
    }

    fn final_norm(&self, x: Tensor<3>) -> Tensor<3> {
        self.transformer.ln_f.forward(x)
    }

    fn logits(&self, hidden: Tensor<2>) -> Tensor<2> {
        linear_forward(&self.lm_head, hidden)
    }
}
