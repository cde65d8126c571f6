//! Low-rank adapters on any `Linear` of any model: targets, injection, forward, merge, PEFT files.

use std::{collections::BTreeMap, path::PathBuf};

use regex::Regex;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::error::{Error, Kind, Result};

pub mod attachment;
pub mod decompose;
pub mod init;
pub mod inject;
pub mod lora;
pub mod merge;
pub mod peft;
pub mod peft_config;
pub mod quantized;
pub mod target;
pub mod tensors;

pub use init::InitLoraWeights;
pub use quantized::Quantization;

/// Which biases are trained beside the updates.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum BiasMode {
    /// None.
    #[default]
    None,
    /// Every bias of the towers that `[train]` sets to `lora`.
    All,
    /// Those of the linear modules that have an update.
    LoraOnly,
}

/// `[adapter]` of a recipe. Names and meanings as in PEFT's `LoraConfig`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct AdapterConfig {
    /// Rank of the update.
    pub r: usize,
    /// The update is scaled by `lora_alpha / r`.
    pub lora_alpha: f64,
    /// Share of inputs of the update that is zeroed in training.
    pub lora_dropout: f64,
    /// Linear modules that get an update: names as in PEFT (`q_proj`), globs (`model.layers.*.mlp.*`), regular
    /// expressions of the whole name (`re:...`), or `all-linear` (all but `lm_head`). A tower in front keeps to that
    /// tower: `language:q_proj`. Only towers that `[train]` sets to `lora` take part.
    pub target_modules: Vec<String>,
    /// Linear modules that get none although a target matches, written like `target_modules`.
    pub exclude_modules: Vec<String>,
    /// Numbers of the layers whose modules may get an update; empty means all.
    pub layers_to_transform: Vec<usize>,
    /// What stands in front of the number in `layers_to_transform` (`layers`, `blocks`); empty takes the first number of
    /// a name.
    pub layers_pattern: Vec<String>,
    /// Other ranks, by regular expressions of the end of a module's name: `{ "q_proj" = 4 }`.
    pub rank_pattern: BTreeMap<String, usize>,
    /// Other values of `lora_alpha`, likewise.
    pub alpha_pattern: BTreeMap<String, f64>,
    /// Scales by `lora_alpha / sqrt(r)` instead, so that high ranks learn as fast (rsLoRA, arXiv 2312.03732).
    pub use_rslora: bool,
    /// Trains the length of every output's weights apart from their direction (DoRA, arXiv 2402.09353).
    pub use_dora: bool,
    /// Start of the updates: `true` (no change at first), `"gaussian"` (likewise), `"pissa"` (arXiv 2404.02948),
    /// `"pissa_niter_16"` (a quick approximation by as many iterations) or `"olora"` (arXiv 2406.01775).
    pub init_lora_weights: InitLoraWeights,
    /// Biases that are trained as well: `none`, `all` or `lora_only`.
    pub bias: BiasMode,
    /// Modules that are trained in full, by the ends of their names, in the towers that are not frozen:
    /// `["embed_tokens", "lm_head"]`.
    pub modules_to_save: Vec<String>,
    /// The learning rate of B over that of A, and of biases and norms (LoRA+, arXiv 2402.12354; 16 is usual). When
    /// absent, all learn at the same rate.
    pub loraplus_lr_ratio: Option<f64>,
    /// Continues the adapter in this directory, written by this program or by PEFT. Ranks, scales and modules are then
    /// those of the directory.
    pub adapter_name_or_path: Option<PathBuf>,
    /// How the frozen weights are held: `model.quantization`, put here where a model is prepared.
    #[serde(skip)]
    pub quantization: Quantization,
}

impl Default for AdapterConfig {
    fn default() -> Self {
        Self {
            r: 8,
            lora_alpha: 16.0,
            lora_dropout: 0.0,
            target_modules: vec!["all-linear".into()],
            exclude_modules: Vec::new(),
            layers_to_transform: Vec::new(),
            layers_pattern: Vec::new(),
            rank_pattern: BTreeMap::new(),
            alpha_pattern: BTreeMap::new(),
            use_rslora: false,
            use_dora: false,
            init_lora_weights: InitLoraWeights::default(),
            bias: BiasMode::None,
            modules_to_save: Vec::new(),
            loraplus_lr_ratio: None,
            adapter_name_or_path: None,
            quantization: Quantization::None,
        }
    }
}

impl AdapterConfig {
    /// Everything that is wrong with the values, in words.
    #[must_use]
    pub fn problems(&self) -> Vec<String> {
        let mut problems = Vec::new();
        let mut require = |ok: bool, what: String| {
            if !ok {
                problems.push(format!("adapter.{what}"));
            }
        };
        let positive = |x: f64| x.is_finite() && x > 0.0;
        require(self.r > 0, "r must be at least 1".into());
        require(positive(self.lora_alpha), "lora_alpha must be above 0".into());
        require((0.0..1.0).contains(&self.lora_dropout), "lora_dropout must be at least 0 and below 1".into());
        require(self.rank_pattern.values().all(|r| *r > 0), "rank_pattern must have ranks of at least 1".into());
        require(self.alpha_pattern.values().all(|a| positive(*a)), "alpha_pattern must have values above 0".into());
        require(self.loraplus_lr_ratio.is_none_or(positive), "loraplus_lr_ratio must be above 0".into());
        require(
            self.layers_pattern.is_empty() || !self.layers_to_transform.is_empty(),
            "layers_pattern means nothing without layers_to_transform".into(),
        );
        let keys = self.rank_pattern.keys().map(|k| ("rank_pattern", k));
        for (name, key) in keys.chain(self.alpha_pattern.keys().map(|k| ("alpha_pattern", k))) {
            if let Err(e) = ending(key) {
                require(false, format!("{name} has a key that is no regular expression: {e}"));
            }
        }
        if let Some(problem) = self.init_lora_weights.problem() {
            require(false, format!("init_lora_weights {problem}"));
        }
        let path = self.adapter_name_or_path.as_deref();
        require(
            path.is_none_or(|p| p.join("adapter_config.json").is_file()),
            format!(
                "adapter_name_or_path has no adapter_config.json: {}",
                path.map_or_else(String::new, |p| p.display().to_string())
            ),
        );
        problems
    }

    /// Rank and scale of the update of `module`.
    ///
    /// # Errors
    /// Several keys of a pattern with different values match the module: PEFT would take the first, and TOML and JSON
    /// objects have no order.
    pub fn rank_and_scale(&self, module: &str) -> Result<(usize, f64)> {
        let r = looked_up("rank_pattern", &self.rank_pattern, module)?.unwrap_or(self.r);
        let alpha = looked_up("alpha_pattern", &self.alpha_pattern, module)?.unwrap_or(self.lora_alpha);
        Ok((r, if self.use_rslora { alpha / (r as f64).sqrt() } else { alpha / r as f64 }))
    }

    /// Whether `parameter` belongs to one of the modules that are trained in full: as in PEFT, those whose name ends with
    /// one of `modules_to_save`, and what is inside them.
    #[must_use]
    pub fn saves(&self, parameter: &str) -> bool {
        self.modules_to_save.iter().any(|name| in_saved(parameter, name))
    }

    /// Whether `parameter` is a bias that is trained; `adapted` says which modules have an update.
    #[must_use]
    pub fn trains_bias(&self, parameter: &str, adapted: impl Fn(&str) -> bool) -> bool {
        match self.bias {
            BiasMode::None => false,
            BiasMode::All => parameter.ends_with("bias"),
            BiasMode::LoraOnly => parameter.strip_suffix(".bias").is_some_and(adapted),
        }
    }
}

/// Whether `parameter` is inside a module whose name ends with `name`.
fn in_saved(parameter: &str, name: &str) -> bool {
    let ends = parameter.match_indices('.').map(|(end, _)| &parameter[..end]);
    ends.into_iter().any(|module| module.ends_with(name))
}

/// Whether `module` is the module that `name` names, or inside it.
#[must_use]
pub fn within(module: &str, name: &str) -> bool {
    format!(".{module}.").contains(&format!(".{name}."))
}

/// The regular expression for a key of a pattern: it fits the end of a name.
fn ending(key: &str) -> std::result::Result<Regex, regex::Error> {
    Regex::new(&format!(r"^(?:.*\.)?(?:{key})$"))
}

/// Whether a key of a pattern fits `module`.
fn fits_end(key: &str, module: &str) -> bool {
    ending(key).is_ok_and(|r| r.is_match(module))
}

fn looked_up<T: Copy + PartialEq>(what: &str, pattern: &BTreeMap<String, T>, module: &str) -> Result<Option<T>> {
    let mut fits = pattern.iter().filter(|(key, _)| fits_end(key, module));
    let Some((first, value)) = fits.next() else { return Ok(None) };
    match fits.find(|(_, other)| *other != value) {
        None => Ok(Some(*value)),
        Some((second, _)) => Err(Error::new(Kind::Config, "two keys of a pattern fit one module")
            .at(format!("adapter.{what}"))
            .found(format!("`{first}` and `{second}` for {module}"))
            .help("write longer keys, so that one fits")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranks_and_scales_follow_the_patterns() {
        let config = AdapterConfig {
            r: 8,
            lora_alpha: 16.0,
            rank_pattern: [("q_proj".to_string(), 4), (r"layers\.1\.mlp\..*".to_string(), 2)].into(),
            alpha_pattern: [("k_proj".to_string(), 4.0)].into(),
            ..AdapterConfig::default()
        };
        assert_eq!(config.rank_and_scale("model.layers.0.self_attn.q_proj").unwrap(), (4, 4.0));
        assert_eq!(config.rank_and_scale("model.layers.0.self_attn.k_proj").unwrap(), (8, 0.5));
        assert_eq!(config.rank_and_scale("model.layers.1.mlp.up_proj").unwrap(), (2, 8.0));
        assert_eq!(config.rank_and_scale("model.layers.0.self_attn.my_q_proj").unwrap(), (8, 2.0));
        let rs = AdapterConfig { use_rslora: true, ..config.clone() };
        assert_eq!(rs.rank_and_scale("q_proj").unwrap(), (4, 8.0));
        let twice = AdapterConfig {
            rank_pattern: [("q_proj".to_string(), 4), ("self_attn.q_proj".to_string(), 2)].into(),
            ..config
        };
        let error = twice.rank_and_scale("model.layers.0.self_attn.q_proj").unwrap_err();
        assert!(error.to_string().contains("self_attn.q_proj"), "{error}");
    }

    #[test]
    fn every_bad_value_is_reported() {
        assert_eq!(AdapterConfig::default().problems(), Vec::<String>::new());
        let bad = AdapterConfig {
            r: 0,
            lora_dropout: 1.0,
            rank_pattern: [("(".to_string(), 0)].into(),
            layers_pattern: vec!["layers".into()],
            loraplus_lr_ratio: Some(0.0),
            init_lora_weights: InitLoraWeights::Name("eva".into()),
            adapter_name_or_path: Some("/nowhere".into()),
            ..AdapterConfig::default()
        };
        assert_eq!(bad.problems().len(), 8, "{:#?}", bad.problems());
    }

    #[test]
    fn modules_to_save_are_ends_of_names() {
        let config =
            AdapterConfig { modules_to_save: vec!["norm".into(), "mm_projector".into()], ..Default::default() };
        for (name, saved) in [
            ("model.norm.weight", true),
            ("model.mm_projector.0.bias", true),
            ("model.layers.0.input_layernorm.weight", true),
            ("model.norm2.weight", false),
            ("norm.weight", true),
            ("model.norm", false),
        ] {
            assert_eq!(config.saves(name), saved, "{name}");
        }
    }
}
