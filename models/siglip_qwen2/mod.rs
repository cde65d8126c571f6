//! SigLIP (arXiv 2303.15343), a two-layer projector and Qwen2 (arXiv 2407.10671), in the layout of transformers'
//! `LlavaForConditionalGeneration`: the example of the guide "Add a model", compiled for tests only.

use std::path::Path;

use burn::{
    module::Module,
    nn::{Embedding, Linear},
    tensor::{Device, FloatDType, Int, Tensor, activation::gelu_approximate},
};

use crate::{
    error::Result,
    kernel::gelu::gelu,
    models::{AnyVlm, ModelDef, Preset, Release, TokenizerDef, TokenizerFiles},
    nn::{
        attention::{Columns, attend},
        decoder::{DecoderContext, DecoderLayer, LayerCache},
        linear::{embedding_forward, linear_forward, linear_module},
        norm::{LayerNorm, RmsNorm},
        parameter,
        rope::inverse_frequencies,
        vit::PatchEmbedding,
    },
    vlm::{Tower, Vlm},
    weights::{Checkpoint, Layout, SaveOptions},
};

pub mod config;
pub mod processor;
pub mod weights;

pub use config::{SiglipConfig, SiglipQwen2Config};

/// The family.
pub static DEF: ModelDef = ModelDef {
    name: "siglip_qwen2",
    about: "SigLIP, MLP projector, Qwen2: the example of the guide",
    model_types: &["llava"],
    presets: &[Preset {
        name: "tiny",
        about: "for tests",
        vocab_size: 320,
        max_tiles: 1,
        lora_targets: &["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    }],
    init: |preset, vocab_size, seed, device| weights::init(preset, vocab_size, seed, device).map(AnyVlm::SiglipQwen2),
    empty: |preset, device| {
        let config = SiglipQwen2Config::preset(preset)?;
        Ok((AnyVlm::SiglipQwen2(SiglipQwen2::new(&config, device)), config.tokens_per_image()))
    },
    shape: |dir, _, device| Ok(AnyVlm::SiglipQwen2(SiglipQwen2::new(&SiglipQwen2Config::open(dir)?, device))),
    weights: |dir, _| Checkpoint::open(dir),
    load: |dir, options, device| weights::load_dir(dir, options, device).map(AnyVlm::SiglipQwen2),
    processor: |dir, _| Ok(Box::new(processor::SiglipQwen2Processor::load(dir)?)),
    tokenizer: TokenizerDef { file: "tokenizer.json", train: processor::train_tokenizer },
    release: Release {
        layout: Layout::Safetensors,
        max_shard_bytes: 5_000_000_000,
        tokenizer: |preset, texts| {
            processor::train_tokenizer(texts, SiglipQwen2Config::preset(preset)?.text_config.vocab_size)
        },
    },
};

const TOWERS: &[Tower] = &[
    Tower { name: "vision", prefix: "vision_tower." },
    Tower { name: "projector", prefix: "multi_modal_projector." },
    Tower { name: "language", prefix: "language_model." },
];

/// Patches with a bias, and a learnt position for each; no class token.
#[derive(Module, Debug)]
pub struct SiglipEmbeddings {
    patch_embedding: PatchEmbedding,
    position_embedding: Embedding,
}

/// Self-attention of a block.
#[derive(Module, Debug)]
pub struct SiglipAttention {
    q_proj: Linear,
    k_proj: Linear,
    v_proj: Linear,
    out_proj: Linear,
    num_heads: usize,
}

impl SiglipAttention {
    fn forward(&self, x: Tensor<3>) -> Tensor<3> {
        let [tiles, length, hidden] = x.dims();
        let heads = |linear: &Linear| {
            linear_forward(linear, x.clone()).reshape([tiles, length, self.num_heads, hidden / self.num_heads])
        };
        let (k, v) = (heads(&self.k_proj).swap_dims(1, 2), heads(&self.v_proj).swap_dims(1, 2));
        linear_forward(&self.out_proj, attend(heads(&self.q_proj), k, v, None))
    }
}

/// MLP of a block.
#[derive(Module, Debug)]
pub struct SiglipMlp {
    fc1: Linear,
    fc2: Linear,
}

/// A block.
#[derive(Module, Debug)]
pub struct SiglipLayer {
    layer_norm1: LayerNorm,
    self_attn: SiglipAttention,
    layer_norm2: LayerNorm,
    mlp: SiglipMlp,
}

impl SiglipLayer {
    fn new(config: &SiglipConfig, device: &Device) -> Self {
        let (hidden, inner) = (config.hidden_size, config.intermediate_size);
        let norm = || LayerNorm::new(hidden, config.layer_norm_eps, device);
        let linear = |from, to| linear_module(from, to, true, device);
        let (q_proj, k_proj, v_proj) = (linear(hidden, hidden), linear(hidden, hidden), linear(hidden, hidden));
        let (out_proj, num_heads) = (linear(hidden, hidden), config.num_attention_heads);
        Self {
            layer_norm1: norm(),
            self_attn: SiglipAttention { q_proj, k_proj, v_proj, out_proj, num_heads },
            layer_norm2: norm(),
            mlp: SiglipMlp { fc1: linear(hidden, inner), fc2: linear(inner, hidden) },
        }
    }

    fn forward(&self, x: Tensor<3>) -> Tensor<3> {
        let branch = self.self_attn.forward(self.layer_norm1.forward(x.clone()));
        let (x, normed) = self.layer_norm2.add_forward(x, branch);
        let inner = gelu_approximate(linear_forward(&self.mlp.fc1, normed));
        x + linear_forward(&self.mlp.fc2, inner)
    }
}

/// The blocks.
#[derive(Module, Debug)]
pub struct SiglipEncoder {
    layers: Vec<SiglipLayer>,
}

/// `SiglipVisionModel` without its pooling head.
#[derive(Module, Debug)]
pub struct SiglipVisionModel {
    embeddings: SiglipEmbeddings,
    encoder: SiglipEncoder,
    post_layernorm: LayerNorm,
}

/// Two linear layers with an exact GELU between them.
#[derive(Module, Debug)]
pub struct Projector {
    linear_1: Linear,
    linear_2: Linear,
}

/// `Qwen2Model`.
#[derive(Module, Debug)]
pub struct Qwen2Model {
    embed_tokens: Embedding,
    layers: Vec<DecoderLayer>,
    norm: RmsNorm,
}

/// `Qwen2ForCausalLM`.
#[derive(Module, Debug)]
pub struct Qwen2 {
    model: Qwen2Model,
    lm_head: Linear,
}

/// `LlavaForConditionalGeneration`. Paths of parameters are the checkpoint's names.
#[derive(Module, Debug)]
pub struct SiglipQwen2 {
    vision_tower: SiglipVisionModel,
    multi_modal_projector: Projector,
    language_model: Qwen2,
    #[module(skip)]
    config: SiglipQwen2Config,
}

impl SiglipQwen2 {
    /// A model without weights; takes no memory until it is loaded or run.
    #[must_use]
    pub fn new(config: &SiglipQwen2Config, device: &Device) -> Self {
        let (vision, text, shape) = (&config.vision_config, &config.text_config, config.decoder_shape());
        let (width, hidden) = (vision.hidden_size, text.hidden_size);
        Self {
            vision_tower: SiglipVisionModel {
                embeddings: SiglipEmbeddings {
                    patch_embedding: PatchEmbedding {
                        weight: parameter([width, 3, vision.patch_size, vision.patch_size], 0.0, device),
                        bias: Some(parameter([width], 0.0, device)),
                    },
                    position_embedding: Embedding {
                        weight: parameter([config.tokens_per_image(), width], 0.0, device),
                    },
                },
                encoder: SiglipEncoder {
                    layers: (0..vision.num_hidden_layers).map(|_| SiglipLayer::new(vision, device)).collect(),
                },
                post_layernorm: LayerNorm::new(width, vision.layer_norm_eps, device),
            },
            multi_modal_projector: Projector {
                linear_1: linear_module(width, hidden, true, device),
                linear_2: linear_module(hidden, hidden, true, device),
            },
            language_model: Qwen2 {
                model: Qwen2Model {
                    embed_tokens: Embedding { weight: parameter([text.vocab_size, hidden], 0.0, device) },
                    layers: (0..text.num_hidden_layers).map(|_| DecoderLayer::new(&shape, device)).collect(),
                    norm: RmsNorm::new(hidden, text.rms_norm_eps, device),
                },
                lm_head: linear_module(hidden, text.vocab_size, false, device),
            },
            config: config.clone(),
        }
    }

    /// What the model was built from.
    #[must_use]
    pub fn config(&self) -> &SiglipQwen2Config {
        &self.config
    }

    /// Writes a checkpoint directory; see [`weights::save_dir`].
    ///
    /// # Errors
    /// An unwritable directory, or a model with adapters.
    pub fn save(&self, dir: &Path, options: &SaveOptions) -> Result<()> {
        weights::save_dir(self, dir, options)
    }

    /// config.json; see [`weights::config_files`].
    ///
    /// # Errors
    /// The config has no JSON form.
    pub fn config_files(&self, dtype: FloatDType) -> Result<TokenizerFiles> {
        weights::config_files(self, dtype)
    }
}

impl Vlm for SiglipQwen2 {
    fn towers(&self) -> &'static [Tower] {
        TOWERS
    }

    fn vision(&self, pixels: Tensor<4>) -> Tensor<3> {
        let embeddings = &self.vision_tower.embeddings;
        let x = embeddings.patch_embedding.forward(pixels) + embeddings.position_embedding.weight.val().unsqueeze();
        self.vision_tower.encoder.layers.iter().fold(x, |x, layer| layer.forward(x))
    }

    fn project(&self, features: Tensor<3>) -> Tensor<3> {
        let projector = &self.multi_modal_projector;
        linear_forward(&projector.linear_2, gelu(linear_forward(&projector.linear_1, features)))
    }

    fn tile_features(&self) -> usize {
        self.config.tokens_per_image()
    }

    fn tile_values(&self) -> usize {
        3 * self.config.vision_config.image_size.pow(2)
    }

    fn num_attention_heads(&self) -> usize {
        self.config.text_config.num_attention_heads
    }

    fn embed_tokens(&self, input_ids: Tensor<2, Int>) -> Tensor<3> {
        embedding_forward(&self.language_model.model.embed_tokens, input_ids)
    }

    fn columns_context(&self, columns: &Columns, device: &Device) -> DecoderContext {
        let text = &self.config.text_config;
        let head_dim = text.hidden_size / text.num_attention_heads;
        let frequencies = inverse_frequencies(head_dim, text.rope_parameters.rope_theta);
        DecoderContext::causal(columns, &frequencies, None, device)
    }

    fn num_layers(&self) -> usize {
        self.language_model.model.layers.len()
    }

    fn layer(&self, index: usize, x: Tensor<3>, context: &DecoderContext, cache: Option<&mut LayerCache>) -> Tensor<3> {
        self.language_model.model.layers[index].forward(x, context, cache)
    }

    fn final_norm(&self, x: Tensor<3>) -> Tensor<3> {
        self.language_model.model.norm.forward(x)
    }

    fn logits(&self, hidden: Tensor<2>) -> Tensor<2> {
        linear_forward(&self.language_model.lm_head, hidden)
    }
}

#[cfg(test)]
mod tests {
    use burn::tensor::TensorData;
    use safetensors::SafeTensors;
    use serde_json::{Value, json};

    use super::*;
    use crate::{
        generate::{GenerateConfig, generate},
        models::{LoadOptions, load},
        sample::Sample,
        vlm::{Batch, Encoded, IGNORE, PaddingSide},
    };

    /// A row of the fixture as a sample.
    fn sample(dir: &Path, row: &Value) -> Sample {
        let turns = row["turns"].as_array().unwrap().iter().enumerate();
        let role = |i: usize| if i.is_multiple_of(2) { "user" } else { "assistant" };
        let turns: Vec<Value> = turns.map(|(i, text)| json!({"role": role(i), "text": text})).collect();
        let images: Vec<Value> =
            row["image"].as_str().map(|name| json!({"path": dir.join(name)})).into_iter().collect();
        serde_json::from_value(json!({"id": "row", "turns": turns, "images": images})).unwrap()
    }

    fn ids(value: &Value) -> Vec<i32> {
        serde_json::from_value(value.clone()).unwrap()
    }

    fn cross_entropy(logits: TensorData, labels: &[i32]) -> f64 {
        let width = logits.shape()[1];
        let values: Vec<f32> = logits.try_to_vec().unwrap();
        let (mut sum, mut count) = (0.0, 0);
        for (row, label) in values.chunks(width).zip(&labels[1..]).filter(|(_, label)| **label != IGNORE) {
            let largest = row.iter().fold(f32::MIN, |m, v| m.max(*v));
            let total: f64 = row.iter().map(|v| f64::from(v - largest).exp()).sum();
            sum += total.ln() - f64::from(row[*label as usize] - largest);
            count += 1;
        }
        sum / f64::from(count)
    }

    #[test]
    fn it_computes_what_transformers_computes() {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/siglip_qwen2");
        let device = Device::flex();
        let (model, processor) = load(&dir, &LoadOptions::default(), &device).unwrap();
        let cases: Value = serde_json::from_slice(&std::fs::read(dir.join("cases.json")).unwrap()).unwrap();
        let states = std::fs::read(dir.join("states.safetensors")).unwrap();
        let states = SafeTensors::deserialize(&states).unwrap();
        let mut checks = 0;
        let mut close = |name: &str, found: TensorData| {
            let Ok(view) = states.tensor(name) else { return };
            let found: Vec<f32> = found.try_to_vec().unwrap();
            let expected = view.data().chunks(4).map(|b| f32::from_le_bytes(b.try_into().unwrap()));
            assert_eq!(found.len(), view.data().len() / 4, "{name}");
            let off = found.iter().zip(expected).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
            assert!(off < 2e-5, "{name}: {off}");
            checks += 1;
        };
        for (i, row) in cases["rows"].as_array().unwrap().iter().enumerate() {
            let sample = sample(&dir, row);
            let encoded: Encoded = processor.encode(&sample).unwrap();
            assert_eq!(encoded.input_ids, ids(&row["input_ids"]));
            assert_eq!(encoded.labels, ids(&row["labels"]));
            let batch = Batch::collate(std::slice::from_ref(&encoded), processor.pad_id(), PaddingSide::Right, 1);
            if let Some(pixels) = batch.pixels(&device) {
                close(&format!("{i}.pixels"), pixels.clone().into_data());
                let features = model.vision(pixels);
                close(&format!("{i}.vision"), features.clone().into_data());
                close(&format!("{i}.projected"), model.project(features).into_data());
            }
            let context = model.context(&batch, &device);
            let mut x = model.embed(&batch, model.features(&batch, &device), &device);
            for layer in 0..model.num_layers() {
                close(&format!("{i}.hidden.{layer}"), x.clone().into_data());
                x = model.layer(layer, x, &context, None);
            }
            let x = model.final_norm(x);
            close(&format!("{i}.hidden.{}", model.num_layers()), x.clone().into_data());
            let [_, length, hidden] = x.dims();
            let logits = model.logits(x.reshape([length, hidden])).into_data();
            close(&format!("{i}.logits"), logits.clone());
            assert!((cross_entropy(logits, &encoded.labels) - row["loss"].as_f64().unwrap()).abs() < 1e-5);

            let prompt = processor.prompt(&sample).unwrap();
            assert_eq!(prompt.input_ids, ids(&row["prompt"]));
            let expected = ids(&row["generated"]);
            let config = GenerateConfig { max_new_tokens: expected.len(), ..GenerateConfig::default() };
            let pad = processor.pad_id();
            let found = generate(&model, &[prompt], pad, &[], &config, 0, &device, &mut |_, _| {}).unwrap();
            assert_eq!(found[0], expected);
        }
        assert_eq!(checks, states.len(), "every recorded state was compared");
    }
}
