//! Checkpoint directories of LLaVA-Med: loading, random initialisation, saving.

use std::path::{Path, PathBuf};

use burn::tensor::{Device, FloatDType};
use serde_json::json;

use super::{
    LlavaMed, LlavaMedConfig,
    config::{read_vision_config, vision_tower_dir},
};
use crate::{
    error::{Error, Kind, Result},
    models::{LoadOptions, TokenizerFiles},
    nn::vit::ClipVisionConfig,
    run_dir::{json_file, write_files},
    weights::{Checkpoint, SaveOptions, default_dtype, init_random, load, save, torch_dtype},
};

/// Prefix of the vision tower's tensors in a LLaVA-Med checkpoint.
const TOWER: &str = "model.vision_tower.vision_tower.";

/// Config of the checkpoint at `dir` with the shape of its vision tower filled in, and the folder of a separate tower
/// if there is one.
///
/// # Errors
/// An unreadable config, or a tower whose shape is nowhere to be found.
pub fn open_config(dir: &Path, vision_tower: Option<&Path>) -> Result<(LlavaMedConfig, Option<PathBuf>)> {
    let mut config = LlavaMedConfig::open(dir)?;
    let tower = vision_tower_dir(dir, &config, vision_tower);
    if let Some(tower) = &tower {
        config.vision_config = Some(read_vision_config(tower)?);
    } else if config.vision_config.is_none() {
        config.vision_config = Some(infer_vision_config(&Checkpoint::open(dir)?)?);
    }
    Ok((config, tower))
}

/// The tensors of a checkpoint directory, with those of a separate tower, if there is one, in the place of its own; a
/// tower folder without weights gives only the shape.
///
/// # Errors
/// An unreadable config or file.
pub fn open(dir: &Path, options: &LoadOptions) -> Result<(LlavaMedConfig, Checkpoint)> {
    let (config, tower) = open_config(dir, options.vision_tower.as_deref())?;
    let mut checkpoint = Checkpoint::open(dir)?;
    if let Some(tower) = tower {
        match (Checkpoint::open(&tower), options.vision_tower.is_some()) {
            (Ok(weights), _) => replace_tower(&mut checkpoint, weights),
            (Err(error), true) => return Err(error),
            (Err(error), false) if has_weights(&tower) => return Err(error),
            (Err(_), false) => {}
        }
    }
    Ok((config, checkpoint))
}

/// Loads a checkpoint directory.
///
/// # Errors
/// An unreadable or unsupported config, or weights that do not fit it.
pub fn load_dir(dir: &Path, options: &LoadOptions, device: &Device) -> Result<LlavaMed> {
    let (config, checkpoint) = open(dir, options)?;
    let stored = checkpoint.info("model.embed_tokens.weight").map(|i| i.dtype);
    let dtype =
        options.dtype.unwrap_or_else(|| stored.map_or(FloatDType::F32, |d| default_dtype(&checkpoint, d, device)));
    load(LlavaMed::new(&config, device)?, &checkpoint, dtype, options.progress)
}

fn has_weights(dir: &Path) -> bool {
    let named = |e: &std::fs::DirEntry| e.path().extension().is_some_and(|x| x == "safetensors" || x == "bin");
    std::fs::read_dir(dir).is_ok_and(|entries| entries.flatten().any(|e| named(&e)))
}

/// Only CLIP's vision half is used; its text half and projections are left out without complaint.
fn replace_tower(checkpoint: &mut Checkpoint, mut tower: Checkpoint) {
    tower.retain(|name| name.starts_with("vision_model."));
    tower.rename(|name| format!("{TOWER}{name}"));
    checkpoint.retain(|name| !name.starts_with(TOWER));
    checkpoint.merge(tower);
}

/// Shape of the tower inside a checkpoint. The number of heads leaves no trace in the tensors; every published CLIP
/// vision transformer has heads of width 64.
fn infer_vision_config(checkpoint: &Checkpoint) -> Result<ClipVisionConfig> {
    let unknown = || {
        Error::new(Kind::Checkpoint, "the shape of the vision tower is unknown")
            .at(checkpoint.origin().display())
            .help("give the CLIP folder as `model.vision_tower`")
    };
    let shape = |name: &str| {
        let info = checkpoint.info(&format!("{TOWER}vision_model.{name}"));
        info.map(|i| i.shape.as_slice()).ok_or_else(unknown)
    };
    let [hidden_size, num_channels, patch_size, _] = *shape("embeddings.patch_embedding.weight")? else {
        return Err(unknown());
    };
    let positions = shape("embeddings.position_embedding.weight")?.first().copied().unwrap_or(0);
    let side = positions.saturating_sub(1).isqrt();
    let fc1 = shape("encoder.layers.0.mlp.fc1.weight")?.first().copied().unwrap_or(0);
    if side * side + 1 != positions || hidden_size % 64 != 0 {
        return Err(unknown());
    }
    let blocks = (0..).take_while(|i| shape(&format!("encoder.layers.{i}.layer_norm1.weight")).is_ok()).count();
    Ok(ClipVisionConfig {
        hidden_size,
        intermediate_size: fc1,
        num_hidden_layers: blocks,
        num_attention_heads: hidden_size / 64,
        num_channels,
        image_size: side * patch_size,
        patch_size,
        ..ClipVisionConfig::default()
    })
}

/// A preset with random weights; `vocab_size` replaces the preset's.
///
/// # Errors
/// No preset of this name.
pub fn init(preset: &str, vocab_size: Option<usize>, seed: u64, device: &Device) -> Result<LlavaMed> {
    let mut config = LlavaMedConfig::preset(preset)?;
    if let Some(vocab_size) = vocab_size {
        config.vocab_size = vocab_size;
    }
    let std = config.initializer_range;
    Ok(init_random(LlavaMed::new(&config, device)?, seed, std))
}

/// generation_config.json and config.json, which has `vision_config` added, so that the directory needs no other to be
/// loaded.
///
/// # Errors
/// The config has no JSON form.
pub fn config_files(model: &LlavaMed, dtype: FloatDType) -> Result<TokenizerFiles> {
    let config = LlavaMedConfig { torch_dtype: Some(torch_dtype(dtype).into()), ..model.config().clone() };
    let generation = json!({ "bos_token_id": config.bos_token_id, "eos_token_id": config.eos_token_id });
    Ok(vec![("generation_config.json", json_file(&generation)?), ("config.json", json_file(&config)?)])
}

/// Writes the weights, generation_config.json and config.json.
///
/// # Errors
/// An unwritable directory, or a model with adapters that were not merged.
pub fn save_dir(model: &LlavaMed, dir: &Path, options: &SaveOptions) -> Result<()> {
    save(model, dir, options)?;
    write_files(dir, &config_files(model, options.dtype)?)
}
