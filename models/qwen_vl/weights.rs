//! Checkpoint directories of Qwen-VL: loading (PyTorch `.bin` shards or safetensors), random initialisation, saving.

use std::path::Path;

use burn::tensor::{Device, FloatDType};
use serde_json::json;

use super::{QwenVl, QwenVlConfig};
use crate::{
    error::{Error, Kind, Result},
    models::{LoadOptions, TokenizerFiles},
    nn::resampler::sincos_table,
    run_dir::{json_file, write_files},
    weights::{Checkpoint, SaveOptions, default_dtype, init_random, load, save, torch_dtype},
};

/// The tensors of a checkpoint directory.
///
/// # Errors
/// An unreadable file, or a separate vision tower: there is none in this family.
pub fn open(dir: &Path, options: &LoadOptions) -> Result<Checkpoint> {
    if let Some(tower) = &options.vision_tower {
        return Err(Error::new(Kind::Config, "Qwen-VL has no separate vision tower")
            .at("model.vision_tower")
            .found(tower.display())
            .help("remove model.vision_tower; the checkpoint holds the tower"));
    }
    Checkpoint::open(dir)
}

/// Loads a checkpoint directory.
///
/// # Errors
/// An unreadable or unsupported config, a separate vision tower, or weights that do not fit the config.
pub fn load_dir(dir: &Path, options: &LoadOptions, device: &Device) -> Result<QwenVl> {
    let config = QwenVlConfig::open(dir)?;
    let checkpoint = open(dir, options)?;
    let stored = checkpoint.info("transformer.wte.weight").map(|i| i.dtype);
    let dtype =
        options.dtype.unwrap_or_else(|| stored.map_or(FloatDType::F32, |d| default_dtype(&checkpoint, d, device)));
    let model = QwenVl::new(&config, device)?.with_compat(options.compat);
    load(model, &checkpoint, dtype, options.progress)
}

/// A preset with random weights; `vocab_size` replaces the preset's. The resampler's positions are its sine-cosine
/// table, as in the original.
///
/// # Errors
/// No preset of this name.
pub fn init(preset: &str, vocab_size: Option<usize>, seed: u64, device: &Device) -> Result<QwenVl> {
    let mut config = QwenVlConfig::preset(preset)?;
    if let Some(vocab_size) = vocab_size {
        config.vocab_size = vocab_size;
    }
    // A random model gets a new tokenizer, which puts <img> where its own vocabulary ends.
    config.visual.image_start_id = None;
    let mut model = init_random(QwenVl::new(&config, device)?, seed, config.initializer_range);
    let pool = &mut model.transformer.visual.attn_pool;
    let id = pool.pos_embed.id;
    let table = sincos_table(config.visual.output_dim, config.visual.n_queries.isqrt(), device);
    pool.pos_embed = pool.pos_embed.clone().transform_for_load(table, id);
    Ok(model)
}

/// generation_config.json and config.json.
///
/// # Errors
/// The config has no JSON form.
pub fn config_files(model: &QwenVl, dtype: FloatDType) -> Result<TokenizerFiles> {
    let config = QwenVlConfig { torch_dtype: Some(torch_dtype(dtype).into()), ..model.config().clone() };
    let generation = json!({ "chat_format": "chatml" });
    Ok(vec![("generation_config.json", json_file(&generation)?), ("config.json", json_file(&config)?)])
}

/// Writes the weights, generation_config.json and config.json.
///
/// # Errors
/// An unwritable directory, or a model with adapters that were not merged.
pub fn save_dir(model: &QwenVl, dir: &Path, options: &SaveOptions) -> Result<()> {
    save(model, dir, options)?;
    write_files(dir, &config_files(model, options.dtype)?)
}
