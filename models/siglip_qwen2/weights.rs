//! Checkpoint directories: loading, random initialisation, saving.

use std::path::Path;

use burn::tensor::{Device, FloatDType};
use serde_json::json;

use super::{SiglipQwen2, SiglipQwen2Config};
use crate::{
    error::{Error, Kind, Result},
    models::{LoadOptions, TokenizerFiles},
    run_dir::{json_file, write_files},
    weights::{Checkpoint, SaveOptions, default_dtype, init_random, load, save, torch_dtype},
};

/// Loads a checkpoint directory.
///
/// # Errors
/// An unreadable or unsupported config, or weights that do not fit it.
pub fn load_dir(dir: &Path, options: &LoadOptions, device: &Device) -> Result<SiglipQwen2> {
    let config = SiglipQwen2Config::open(dir)?;
    let checkpoint = Checkpoint::open(dir)?;
    let stored = checkpoint.info("language_model.lm_head.weight").map(|i| i.dtype);
    let dtype =
        options.dtype.unwrap_or_else(|| stored.map_or(FloatDType::F32, |d| default_dtype(&checkpoint, d, device)));
    load(SiglipQwen2::new(&config, device), &checkpoint, dtype, options.progress)
}

/// A preset with random weights; `vocab_size` replaces the preset's.
///
/// # Errors
/// No preset of this name.
pub fn init(preset: &str, vocab_size: Option<usize>, seed: u64, device: &Device) -> Result<SiglipQwen2> {
    let mut config = SiglipQwen2Config::preset(preset)?;
    if let Some(vocab_size) = vocab_size {
        config.text_config.vocab_size = vocab_size;
    }
    Ok(init_random(SiglipQwen2::new(&config, device), seed, config.text_config.initializer_range))
}

/// config.json.
///
/// # Errors
/// The config has no JSON form.
pub fn config_files(model: &SiglipQwen2, dtype: FloatDType) -> Result<TokenizerFiles> {
    let mut value = serde_json::to_value(model.config())
        .map_err(|e| Error::new(Kind::Checkpoint, "config has no JSON form").source(e))?;
    value["architectures"] = json!(["LlavaForConditionalGeneration"]);
    value["dtype"] = json!(torch_dtype(dtype));
    value["vision_config"]["model_type"] = json!("siglip_vision_model");
    value["vision_config"]["vision_use_head"] = json!(false);
    value["text_config"]["model_type"] = json!("qwen2");
    Ok(vec![("config.json", json_file(&value)?)])
}

/// Writes the weights and config.json.
///
/// # Errors
/// An unwritable directory, or a model with adapters that were not merged.
pub fn save_dir(model: &SiglipQwen2, dir: &Path, options: &SaveOptions) -> Result<()> {
    save(model, dir, options)?;
    write_files(dir, &config_files(model, options.dtype)?)
}
