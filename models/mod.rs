//! The model families: registry, and the closed enum the rest of the program holds.

use std::{
    borrow::Cow,
    collections::BTreeSet,
    path::{Path, PathBuf},
};

use burn::{
    module::Module,
    tensor::{Device, FloatDType, Int, Tensor},
};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::{
    adapter::Quantization,
    error::{Error, Kind, Result},
    nn::{
        attention::Columns,
        decoder::{DecoderContext, LayerCache},
        visit::{NamedParam, named_params},
    },
    progress::Progress,
    vlm::{Batch, Processor, Tower, Vlm},
    weights::{Checkpoint, Dtype, Layout, SaveOptions},
};

pub mod compat;
pub mod embedded;
pub mod internvl;
pub mod llava_med;
pub mod qwen_vl;
#[cfg(test)]
pub mod siglip_qwen2;

#[cfg(test)]
mod contract;

pub use compat::Compat;

/// `[model]` of a recipe.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct ModelConfig {
    /// Family, as `medtune models` lists it.
    pub name: String,
    /// Checkpoint directory in Hugging Face layout; when absent, `preset` is initialised at random.
    pub checkpoint: Option<PathBuf>,
    /// Shape of a model without a checkpoint: `tiny` is initialised at random, the others are for planning.
    pub preset: String,
    /// Directory with other weights for the vision tower.
    pub vision_tower: Option<PathBuf>,
    /// Type in which weights are held and written: `float32`, `bfloat16`, `float16`, or `auto`, which is that of the
    /// checkpoint, except that the CPU holds a checkpoint of less than 2 GB in float32. What is trained in full is
    /// always float32 in memory.
    pub dtype: Dtype,
    /// How the frozen linear modules of the language model are held: `none` (as they are), `int8`, `nf4` or
    /// `nf4_double`, in blocks of 64. They are packed when they are loaded, and one panel at a time is dense.
    pub quantization: Quantization,
    /// Behaviour of the originals that harms, for reproducing their numbers.
    pub compat: Compat,
}

impl ModelConfig {
    /// How its checkpoint is loaded.
    #[must_use]
    pub fn load_options(&self) -> LoadOptions {
        LoadOptions {
            vision_tower: self.vision_tower.clone(),
            dtype: self.dtype.explicit(),
            progress: Progress::Silent,
            compat: self.compat,
        }
    }

    /// The preset that is initialised when there is no checkpoint.
    ///
    /// # Errors
    /// There is no such family or preset.
    pub fn preset(&self) -> Result<&'static Preset> {
        let presets = find(&self.name)?.presets;
        let found = presets.iter().find(|p| p.name == self.preset);
        found.ok_or_else(|| unknown_preset(presets.iter().map(|p| p.name), &self.preset))
    }
}

impl Default for ModelConfig {
    fn default() -> Self {
        Self {
            name: "llava_med".into(),
            checkpoint: None,
            preset: TINY.into(),
            vision_tower: None,
            dtype: Dtype::Auto,
            quantization: Quantization::None,
            compat: Compat::default(),
        }
    }
}

/// A model of any family.
#[derive(Module, Debug)]
#[expect(clippy::large_enum_variant, reason = "a program holds one or two models, never an array of them")]
pub enum AnyVlm {
    /// LLaVA-Med v1.5.
    LlavaMed(llava_med::LlavaMed),
    /// Qwen-VL-Chat.
    QwenVl(qwen_vl::QwenVl),
    /// InternVL-Chat-V1.5.
    InternVl(internvl::InternVl),
    /// The example of the guide.
    #[cfg(test)]
    SiglipQwen2(siglip_qwen2::SiglipQwen2),
}

/// Calls a method on whichever family is there.
macro_rules! dispatch {
    ($self:expr, $model:ident => $call:expr) => {
        match $self {
            AnyVlm::LlavaMed($model) => $call,
            AnyVlm::QwenVl($model) => $call,
            AnyVlm::InternVl($model) => $call,
            #[cfg(test)]
            AnyVlm::SiglipQwen2($model) => $call,
        }
    };
}

/// What decides how a checkpoint is loaded, besides itself.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct LoadOptions {
    /// Folder with other weights for the vision tower.
    pub vision_tower: Option<PathBuf>,
    /// Type of the weights in memory; by default [`crate::weights::default_dtype`] of the stored type.
    pub dtype: Option<FloatDType>,
    /// How loading a large checkpoint is shown.
    pub progress: Progress,
    /// Quirks of the original that are switched on.
    pub compat: Compat,
}

/// Name of a preset, and its configuration.
pub type PresetConfig<C> = (&'static str, fn() -> C);

/// The configuration called `name` among a family's presets.
///
/// # Errors
/// There is none.
pub fn named<C>(presets: &[PresetConfig<C>], name: &str) -> Result<C> {
    let found = presets.iter().find(|(known, _)| *known == name).map(|(_, config)| config());
    found.ok_or_else(|| unknown_preset(presets.iter().map(|(known, _)| *known), name))
}

fn unknown_preset<'a>(known: impl Iterator<Item = &'a str>, found: &str) -> Error {
    Error::new(Kind::Config, "unknown preset")
        .at("model.preset")
        .expected(known.collect::<Vec<_>>().join(", "))
        .found(found)
        .help("`medtune models` lists the presets")
}

/// A shape of a family.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Preset {
    /// Name, as `model.preset` takes it.
    pub name: &'static str,
    /// One line about it.
    pub about: &'static str,
    /// Tokens of its vocabulary.
    pub vocab_size: usize,
    /// Most tiles of one image; each takes its positions.
    pub max_tiles: usize,
    /// Linear modules that the original's fine-tuning puts adapters on, by the last parts of their names.
    pub lora_targets: &'static [&'static str],
}

/// Name of the presets that are trained from random weights; the others have the shape of a published model.
pub const TINY: &str = "tiny";

/// A model family.
#[derive(Debug)]
pub struct ModelDef {
    /// Name, as `model.name` takes it.
    pub name: &'static str,
    /// One line about it.
    pub about: &'static str,
    /// Values of `model_type` in config.json that belong to it.
    pub model_types: &'static [&'static str],
    /// Shapes it comes in.
    pub presets: &'static [Preset],
    /// A preset with random weights; the vocabulary size may be replaced.
    pub init: fn(preset: &str, vocab_size: Option<usize>, seed: u64, device: &Device) -> Result<AnyVlm>,
    /// A preset without weights, and the features of one image.
    pub empty: fn(preset: &str, device: &Device) -> Result<(AnyVlm, usize)>,
    /// The network of a checkpoint directory, without its weights.
    pub shape: fn(dir: &Path, options: &LoadOptions, device: &Device) -> Result<AnyVlm>,
    /// The tensors of a checkpoint directory under the names of the network; nothing is read.
    pub weights: fn(dir: &Path, options: &LoadOptions) -> Result<Checkpoint>,
    /// The network of a checkpoint directory.
    pub load: fn(dir: &Path, options: &LoadOptions, device: &Device) -> Result<AnyVlm>,
    /// The host side of a checkpoint directory.
    pub processor: fn(dir: &Path, options: &LoadOptions) -> Result<Box<dyn Processor>>,
    /// How a tokenizer is made for a model that is initialised at random.
    pub tokenizer: TokenizerDef,
    /// Files that its published checkpoints consist of.
    pub release: Release,
}

/// Files of a published checkpoint.
#[derive(Debug)]
pub struct Release {
    /// Kind of the files with weights.
    pub layout: Layout,
    /// Largest of them.
    pub max_shard_bytes: u64,
    /// Tokenizer files as the publisher names them, made from a few texts and filled up to the ids that the preset's
    /// network has rows for.
    pub tokenizer: fn(preset: &str, texts: &[String]) -> Result<TokenizerFiles>,
}

/// A tokenizer's files, and how it is trained.
#[derive(Debug)]
pub struct TokenizerDef {
    /// Name in a checkpoint directory of the file that is written last.
    pub file: &'static str,
    /// The files in the order in which they are written, trained on texts for a vocabulary of the given size.
    pub train: fn(texts: &[String], vocab_size: usize) -> Result<TokenizerFiles>,
}

/// Names and bytes of files; a directory that has the last one has all.
pub type TokenizerFiles = Vec<(&'static str, Vec<u8>)>;

/// All families.
pub const MODELS: &[&ModelDef] = &[
    &llava_med::DEF,
    &qwen_vl::DEF,
    &internvl::DEF,
    #[cfg(test)]
    &siglip_qwen2::DEF,
];

/// The family called `name`.
///
/// # Errors
/// There is none.
pub fn find(name: &str) -> Result<&'static ModelDef> {
    MODELS.iter().find(|m| m.name == name).copied().ok_or_else(|| {
        Error::new(Kind::Config, "unknown model family")
            .at("model.name")
            .expected(MODELS.iter().map(|m| m.name).collect::<Vec<_>>().join(", "))
            .found(name)
            .help("`medtune models` lists the families")
    })
}

/// The family of the checkpoint at `dir`, by `model_type` in its config.json.
///
/// # Errors
/// No readable config.json, or a model of no family here.
pub fn detect(dir: &Path) -> Result<&'static ModelDef> {
    #[derive(Deserialize)]
    struct Config {
        model_type: String,
    }
    let path = dir.join("config.json");
    let text = std::fs::read_to_string(&path).map_err(|e| {
        Error::new(Kind::Checkpoint, "no readable config.json in the checkpoint directory")
            .at(path.display())
            .help("give a directory in Hugging Face layout")
            .source(e)
    })?;
    let Config { model_type } = serde_json::from_str(&text).map_err(|e| {
        Error::new(Kind::Checkpoint, "cannot read model_type from config.json").at(path.display()).source(e)
    })?;
    MODELS.iter().find(|m| m.model_types.contains(&model_type.as_str())).copied().ok_or_else(|| {
        Error::new(Kind::Checkpoint, "a model of an unknown family")
            .at(path.display())
            .expected(MODELS.iter().flat_map(|m| m.model_types).copied().collect::<Vec<_>>().join(", "))
            .found(model_type)
            .help("`medtune models` lists the families; other models cannot be loaded")
    })
}

/// The family whose tensors are named like those of a checkpoint, and the share of names that agree; none if less than
/// half do. Numbers of layers and blocks do not matter.
///
/// # Errors
/// A preset that cannot be built.
pub fn family_of_weights(names: &[&str], device: &Device) -> Result<Option<(&'static ModelDef, f64)>> {
    let kind = |name: &str| -> String {
        let part = |s: &str| if s.bytes().all(|b| b.is_ascii_digit()) { "*".to_string() } else { s.to_string() };
        name.split('.').map(part).collect::<Vec<_>>().join(".")
    };
    let found: BTreeSet<String> = names.iter().map(|n| kind(n)).collect();
    let mut best: Option<(&'static ModelDef, f64)> = None;
    for def in MODELS {
        for preset in def.presets {
            let (model, _) = (def.empty)(preset.name, device)?;
            let known: BTreeSet<String> = named_params(&model).iter().map(|p| kind(&p.name)).collect();
            let share = found.intersection(&known).count() as f64 / found.union(&known).count().max(1) as f64;
            if share >= 0.5 && best.is_none_or(|(_, s)| share > s) {
                best = Some((def, share));
            }
        }
    }
    Ok(best)
}

/// Loads the checkpoint at `dir`, whatever its family: the network and its host side.
///
/// # Errors
/// As [`detect`]; an unsupported config, weights that do not fit it, or a missing tokenizer.
pub fn load(dir: &Path, options: &LoadOptions, device: &Device) -> Result<(AnyVlm, Box<dyn Processor>)> {
    let def = detect(dir)?;
    // the cheap half first: a missing tokenizer is reported before gigabytes are read
    let processor = (def.processor)(dir, options)?;
    Ok(((def.load)(dir, options, device)?, processor))
}

/// Reads the host side (tokenizer, prompts, image rules) of the checkpoint at `dir`, whatever its family.
///
/// # Errors
/// As [`detect`]; files that are missing or do not fit each other.
pub fn processor(dir: &Path, options: &LoadOptions) -> Result<Box<dyn Processor>> {
    (detect(dir)?.processor)(dir, options)
}

/// One line of the table of models.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ModelRow {
    /// Family.
    pub family: &'static str,
    /// Shape.
    pub preset: &'static str,
    /// One line about it.
    pub about: &'static str,
    /// Parameters of each tower, in order.
    pub parameters: Vec<(&'static str, usize)>,
    /// Positions that one image takes, at least.
    pub tokens_per_image: usize,
    /// Positions that one image takes at most, which is more where images are cut into tiles.
    pub most_tokens_per_image: usize,
    /// Adapter targets of the original's fine-tuning.
    pub lora_targets: &'static [&'static str],
}

/// The table of models, computed from the modules themselves.
///
/// # Errors
/// A preset that cannot be built.
pub fn table(device: &Device) -> Result<Vec<ModelRow>> {
    let mut rows = Vec::new();
    for def in MODELS {
        for preset in def.presets {
            let (model, tokens_per_image) = (def.empty)(preset.name, device)?;
            rows.push(ModelRow {
                family: def.name,
                preset: preset.name,
                about: preset.about,
                parameters: tower_sizes(&model),
                tokens_per_image,
                most_tokens_per_image: tokens_per_image * preset.max_tiles,
                lora_targets: preset.lora_targets,
            });
        }
    }
    Ok(rows)
}

/// Parameters of each tower, adapters left out.
#[must_use]
pub fn tower_sizes(model: &AnyVlm) -> Vec<(&'static str, usize)> {
    let towers = model.towers();
    let params = named_params(model);
    let size = |tower: &Tower| {
        let own = params.iter().filter(|p| !p.adapter && Tower::of(towers, &p.name) == Some(tower));
        own.map(NamedParam::num_elements).sum()
    };
    towers.iter().map(|t| (t.name, size(t))).collect()
}

impl AnyVlm {
    /// config.json, last, and generation_config.json of the model with weights of type `dtype`.
    ///
    /// # Errors
    /// The config has no JSON form.
    pub fn config_files(&self, dtype: FloatDType) -> Result<TokenizerFiles> {
        dispatch!(self, m => m.config_files(dtype))
    }

    /// Writes the model as a checkpoint directory in Hugging Face layout: config.json, generation_config.json, weights.
    /// The processor's files (tokenizer, preprocessor) are not part of the model.
    ///
    /// # Errors
    /// An unwritable directory, or a model with adapters that were not merged.
    pub fn save(&self, dir: &Path, options: &SaveOptions) -> Result<()> {
        dispatch!(self, m => m.save(dir, options))
    }
}

impl Vlm for AnyVlm {
    fn towers(&self) -> &'static [Tower] {
        dispatch!(self, m => m.towers())
    }

    fn vision(&self, pixels: Tensor<4>) -> Tensor<3> {
        dispatch!(self, m => m.vision(pixels))
    }

    fn project(&self, features: Tensor<3>) -> Tensor<3> {
        dispatch!(self, m => m.project(features))
    }

    fn tile_features(&self) -> usize {
        dispatch!(self, m => m.tile_features())
    }

    fn tile_patches(&self) -> usize {
        dispatch!(self, m => m.tile_patches())
    }

    fn tile_values(&self) -> usize {
        dispatch!(self, m => m.tile_values())
    }

    fn num_attention_heads(&self) -> usize {
        dispatch!(self, m => m.num_attention_heads())
    }

    fn reconcile<'b>(&self, batch: &'b Batch) -> Result<Cow<'b, Batch>> {
        dispatch!(self, m => m.reconcile(batch))
    }

    fn embed_tokens(&self, input_ids: Tensor<2, Int>) -> Tensor<3> {
        dispatch!(self, m => m.embed_tokens(input_ids))
    }

    fn columns_context(&self, columns: &Columns, device: &Device) -> DecoderContext {
        dispatch!(self, m => m.columns_context(columns, device))
    }

    fn cache_expires(&self, columns: &Columns) -> bool {
        dispatch!(self, m => m.cache_expires(columns))
    }

    fn num_layers(&self) -> usize {
        dispatch!(self, m => m.num_layers())
    }

    fn layer(&self, index: usize, x: Tensor<3>, context: &DecoderContext, cache: Option<&mut LayerCache>) -> Tensor<3> {
        dispatch!(self, m => m.layer(index, x, context, cache))
    }

    fn final_norm(&self, x: Tensor<3>) -> Tensor<3> {
        dispatch!(self, m => m.final_norm(x))
    }

    fn logits(&self, hidden: Tensor<2>) -> Tensor<2> {
        dispatch!(self, m => m.logits(hidden))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::adapter::{
        AdapterConfig,
        target::{linears, select},
    };

    #[test]
    fn the_registry_has_every_folder_and_every_preset_builds_without_memory() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("models");
        let mut folders: Vec<String> = std::fs::read_dir(folder)
            .unwrap()
            .map(|e| e.unwrap())
            .filter(|e| e.path().join("mod.rs").is_file())
            .map(|e| e.file_name().into_string().unwrap())
            .collect();
        folders.sort();
        let mut names: Vec<&str> = MODELS.iter().map(|m| m.name).collect();
        names.sort_unstable();
        assert_eq!(names, folders);
        let device = Device::flex();
        for def in MODELS {
            for preset in def.presets {
                let (model, tokens) = (def.empty)(preset.name, &device).unwrap();
                assert!(named_params(&model).iter().all(|p| p.dtype.is_none()), "{} allocates", preset.name);
                assert!(tokens > 0);
                let targets = named_params(&model);
                for target in preset.lora_targets {
                    let suffix = format!(".{target}.weight");
                    assert!(targets.iter().any(|p| p.name.ends_with(&suffix)), "{target} matches nothing");
                }
            }
            assert!((def.init)("no such preset", None, 0, &device).is_err());
        }
        assert!(named(&[("a", || 1), ("b", || 2)], "c").unwrap_err().to_string().contains("expected a, b"));
        let rows = table(&device).unwrap();
        assert_eq!(rows.len(), MODELS.iter().map(|m| m.presets.len()).sum::<usize>());
        for row in rows {
            assert!(row.parameters.iter().all(|(_, count)| *count > 0), "{row:?}");
        }
    }

    /// Counts that the originals' fine-tunings print, as far as they are known.
    #[test]
    fn adapters_on_the_presets_targets_have_the_published_sizes() {
        let published = [
            ("llava_med", "v1.5-7b", 128, 224, 335_544_320),
            ("qwen_vl", "chat-9.6b", 64, 128, 112_197_632),
            ("internvl", "4b", 16, 128, 25_165_824),
        ];
        let device = Device::flex();
        for (family, preset, r, modules, parameters) in published {
            let def = find(family).unwrap();
            let preset = def.presets.iter().find(|p| p.name == preset).unwrap();
            let (model, _) = (def.empty)(preset.name, &device).unwrap();
            let patterns: Vec<String> = preset.lora_targets.iter().map(ToString::to_string).collect();
            let found = select(&patterns, &linears(&model, model.towers()), |tower| tower == "language").unwrap();
            let config = AdapterConfig { r, ..AdapterConfig::default() };
            assert_eq!((found.modules.len(), found.parameters(&config).unwrap()), (modules, parameters), "{family}");
        }
    }

    #[test]
    fn an_unknown_family_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let error = detect(dir.path()).unwrap_err();
        assert!(error.to_string().contains("config.json"), "{error}");
        std::fs::write(dir.path().join("config.json"), r#"{"model_type": "gpt2"}"#).unwrap();
        let error = detect(dir.path()).unwrap_err();
        assert!(error.to_string().contains("gpt2") && error.to_string().contains("llava_mistral"), "{error}");
    }
}
