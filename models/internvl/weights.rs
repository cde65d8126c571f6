//! Checkpoint directories of InternVL: loading, random initialisation, saving.

use std::path::Path;

use burn::{
    module::{Module, ModuleMapper, Param},
    tensor::{DType, Device, FloatDType, Tensor},
};
use serde_json::json;

use super::{InternVl, InternVlConfig};
use crate::{
    adapter::peft::attach_updates,
    error::{Error, Kind, Result},
    models::{LoadOptions, TokenizerFiles},
    nn::visit::PathStack,
    run_dir::{json_file, write_files},
    weights::{Checkpoint, SaveOptions, default_dtype, init_random, load, save, torch_dtype},
};

/// A checkpoint directory, opened.
struct Opened {
    config: InternVlConfig,
    checkpoint: Checkpoint,
    /// Adapters that the original's fine-tuning left un-merged, with their ranks.
    updates: [(Checkpoint, usize); 2],
}

fn opened(dir: &Path, options: &LoadOptions) -> Result<Opened> {
    let mut config = InternVlConfig::open(dir)?;
    if let Some(tower) = &options.vision_tower {
        return Err(Error::new(Kind::Config, "InternVL has its vision tower inside the checkpoint")
            .at("model.vision_tower")
            .found(tower.display())
            .help("leave model.vision_tower out"));
    }
    let mut checkpoint = Checkpoint::open(dir)?;
    let ranks = [
        ("language_model.", std::mem::take(&mut config.use_llm_lora)),
        ("vision_model.", std::mem::take(&mut config.use_backbone_lora)),
    ];
    let updates = ranks.map(|(tower, r)| (take_updates(&mut checkpoint, tower, r), r));
    Ok(Opened { config, checkpoint, updates })
}

/// The tensors of a checkpoint directory, without un-merged adapters.
///
/// # Errors
/// An unreadable config or file, or a separate vision tower: there is none in this family.
pub fn open(dir: &Path, options: &LoadOptions) -> Result<Checkpoint> {
    Ok(opened(dir, options)?.checkpoint)
}

/// Loads a checkpoint directory. Adapters that the original's fine-tuning left un-merged in it are merged.
///
/// # Errors
/// An unreadable or unsupported config, or weights that do not fit it.
pub fn load_dir(dir: &Path, options: &LoadOptions, device: &Device) -> Result<InternVl> {
    let Opened { config, checkpoint, updates } = opened(dir, options)?;
    let stored = checkpoint.info("mlp1.1.weight").map(|i| i.dtype);
    let dtype =
        options.dtype.unwrap_or_else(|| stored.map_or(FloatDType::F32, |d| default_dtype(&checkpoint, d, device)));
    let model = InternVl::new(&config, device)?.with_compat(options.compat);
    let mut model = load(model, &checkpoint, dtype, options.progress)?;
    for (files, r) in updates.into_iter().filter(|(_, r)| *r > 0) {
        // The original's scale: alpha is twice the rank.
        model = attach_updates(model, files, r, 2.0 * r as f64)?.materialize();
    }
    Ok(model)
}

/// Takes the un-merged updates of a tower out of `checkpoint` and gives its base weights their usual names.
fn take_updates(checkpoint: &mut Checkpoint, tower: &str, r: usize) -> Checkpoint {
    if r == 0 {
        return Checkpoint::default();
    }
    let wrapped = format!("{tower}base_model.model.");
    checkpoint.rename(|name| match name.strip_prefix(&wrapped) {
        Some(rest) => format!("{tower}{}", rest.replace(".base_layer.", ".").replace(".default.", ".")),
        None => name.to_string(),
    });
    let update = |name: &str| name.starts_with(tower) && name.contains(".lora_");
    let mut updates = checkpoint.clone();
    updates.retain(update);
    checkpoint.retain(|name| !update(name));
    updates
}

/// A preset with random weights; `vocab_size` replaces the preset's.
///
/// # Errors
/// No preset of this name.
pub fn init(preset: &str, vocab_size: Option<usize>, seed: u64, device: &Device) -> Result<InternVl> {
    let mut config = InternVlConfig::preset(preset)?;
    if let Some(vocab_size) = vocab_size {
        config.llm_config.vocab_size = vocab_size;
    }
    let model = init_random(InternVl::new(&config, device)?, seed, config.llm_config.initializer_range);
    Ok(model
        .map(&mut LayerScales { value: config.vision_config.initializer_factor as f32, path: PathStack::default() }))
}

/// Sets the layer scales of the vision tower, which do not start at random.
struct LayerScales {
    value: f32,
    path: PathStack,
}

impl ModuleMapper for LayerScales {
    fn enter_module(&mut self, name: &str, container: &str) {
        self.path.enter(name, container);
    }

    fn exit_module(&mut self, _name: &str, _container: &str) {
        self.path.exit();
    }

    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        let name = self.path.name();
        if !name.ends_with(".ls1") && !name.ends_with(".ls2") {
            return param;
        }
        let (shape, device, id) = (param.lazy_shape(), param.lazy_device(), param.id);
        param.transform_for_load(Tensor::full(shape, self.value, (&device, DType::F32)), id)
    }
}

/// generation_config.json and config.json.
///
/// # Errors
/// The config has no JSON form.
pub fn config_files(model: &InternVl, dtype: FloatDType) -> Result<TokenizerFiles> {
    let dtype = torch_dtype(dtype);
    let mut config = InternVlConfig { torch_dtype: Some(dtype.into()), ..model.config().clone() };
    config.llm_config.extra.insert("torch_dtype".into(), json!(dtype));
    let generation = json!({ "pad_token_id": config.llm_config.pad_token_id });
    Ok(vec![("generation_config.json", json_file(&generation)?), ("config.json", json_file(&config)?)])
}

/// Writes the weights, generation_config.json and config.json.
///
/// # Errors
/// An unwritable directory, or a model with adapters that were not merged.
pub fn save_dir(model: &InternVl, dir: &Path, options: &SaveOptions) -> Result<()> {
    save(model, dir, options)?;
    write_files(dir, &config_files(model, options.dtype)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nn::visit::named_params;

    #[test]
    fn full_size_presets_take_no_memory_and_have_the_published_sizes() {
        let device = Device::flex();
        // Parameters of vision tower, projector and language model in millions, and half a unit of the last digit that
        // is published of each.
        let published = [
            ("4b", [(304.0, 0.5), (22.0, 0.5), (3821.0, 0.5)]),
            ("2b", [(304.0, 0.5), (12.6, 0.05), (1889.0, 0.5)]),
            ("26b", [(5540.0, 5.0), (116.0, 0.5), (19_860.0, 5.0)]),
        ];
        for (preset, sizes) in published {
            let model = InternVl::new(&InternVlConfig::preset(preset).unwrap(), &device).unwrap();
            let params = named_params(&model);
            assert!(params.iter().all(|p| p.dtype.is_none()), "{preset} is not lazy");
            let found = ["vision_model.", "mlp1.", "language_model."].map(|prefix| {
                let tower = params.iter().filter(|p| p.name.starts_with(prefix));
                tower.map(|p| p.num_elements()).sum::<usize>() as f64 / 1e6
            });
            for (found, (expected, precision)) in found.iter().zip(sizes) {
                assert!((found - expected).abs() <= precision, "{preset}: {found} for {expected} million");
            }
        }
    }

    #[test]
    fn a_saved_model_loads_with_the_same_weights() {
        let device = Device::flex();
        let model = init("tiny", Some(300), 7, &device).unwrap();
        let dir = tempfile::tempdir().unwrap();
        model.save(dir.path(), &SaveOptions::default()).unwrap();
        let loaded = load_dir(dir.path(), &LoadOptions::default(), &device).unwrap();
        assert_eq!(loaded.config().llm_config.vocab_size, 300);
        let scale = |m: &InternVl| m.vision_model.encoder.layers[0].ls1.val().into_data();
        assert_eq!(scale(&loaded), scale(&model));
        let weight = |m: &InternVl| m.vision_model.encoder.layers[3].mlp.fc2.weight.val().into_data();
        assert_eq!(weight(&loaded), weight(&model));
        let options = LoadOptions { vision_tower: Some("elsewhere".into()), ..LoadOptions::default() };
        assert!(load_dir(dir.path(), &options, &device).unwrap_err().to_string().contains("inside the checkpoint"));
    }
}
