//! `adapter_config.json` of PEFT.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
};

use regex::Regex;
use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::{
    AdapterConfig, BiasMode, InitLoraWeights,
    target::{Limits, LinearModule},
};
use crate::error::{Error, Kind, Result};

/// Name of the file.
pub(super) const CONFIG: &str = "adapter_config.json";

/// Keys that decide nothing about the tensors, or that only say how another one is to be understood.
const HARMLESS: [&str; 9] = [
    "auto_mapping",
    "base_model_name_or_path",
    "inference_mode",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
    "task_type",
];

/// One name, or several.
#[derive(Debug, Clone, Deserialize)]
#[serde(untagged)]
enum OneOrMany<T> {
    One(T),
    Many(Vec<T>),
}

impl<T> OneOrMany<T> {
    fn list(this: Option<Self>) -> Vec<T> {
        match this {
            None => Vec::new(),
            Some(Self::One(x)) => vec![x],
            Some(Self::Many(all)) => all,
        }
    }
}

/// The keys that decide something here, with PEFT's defaults.
#[derive(Debug, Clone, Deserialize)]
#[serde(default)]
struct Keys {
    peft_type: String,
    r: usize,
    lora_alpha: f64,
    lora_dropout: f64,
    bias: BiasMode,
    use_dora: bool,
    use_rslora: bool,
    rank_pattern: Option<BTreeMap<String, usize>>,
    alpha_pattern: Option<BTreeMap<String, f64>>,
    init_lora_weights: Option<InitLoraWeights>,
    target_modules: Option<OneOrMany<String>>,
    exclude_modules: Option<OneOrMany<String>>,
    layers_to_transform: Option<OneOrMany<usize>>,
    layers_pattern: Option<OneOrMany<String>>,
    modules_to_save: Option<Vec<String>>,
}

impl Default for Keys {
    fn default() -> Self {
        Self {
            peft_type: "LORA".into(),
            r: 8,
            lora_alpha: 8.0,
            lora_dropout: 0.0,
            bias: BiasMode::None,
            use_dora: false,
            use_rslora: false,
            rank_pattern: None,
            alpha_pattern: None,
            init_lora_weights: None,
            target_modules: None,
            exclude_modules: None,
            layers_to_transform: None,
            layers_pattern: None,
            modules_to_save: None,
        }
    }
}

/// Which modules have updates, in PEFT's own terms.
#[derive(Debug, Clone, Default)]
pub(super) struct Rule {
    /// A list of names, or one regular expression of the whole name.
    targets: Option<OneOrMany<String>>,
    exclude: Option<OneOrMany<String>>,
    layers: Vec<usize>,
    layers_pattern: Vec<String>,
    saved: Vec<String>,
}

impl Rule {
    /// Whether PEFT would put an update on `module`.
    pub(super) fn fits(&self, module: &str) -> bool {
        let limits = Limits {
            layers_to_transform: &self.layers,
            layers_pattern: &self.layers_pattern,
            modules_to_save: &self.saved,
            ..Limits::default()
        };
        let excluded = self.exclude.as_ref().is_some_and(|e| named(e, module));
        let hit = match &self.targets {
            Some(OneOrMany::One(all)) if all == "all-linear" => !module.ends_with("lm_head"),
            // A regular expression is not narrowed by layers.
            Some(expression @ OneOrMany::One(_)) => named(expression, module),
            Some(list) => named(list, module) && limits.allows_layer(module),
            None => true,
        };
        hit && !excluded && !limits.saves(module)
    }

    /// Targets given as a list of names.
    pub(super) fn listed(&self) -> Vec<&str> {
        match &self.targets {
            Some(OneOrMany::Many(all)) => all.iter().map(String::as_str).collect(),
            _ => Vec::new(),
        }
    }
}

fn named(names: &OneOrMany<String>, module: &str) -> bool {
    match names {
        OneOrMany::One(expression) => Regex::new(&format!("^(?:{expression})$")).is_ok_and(|r| r.is_match(module)),
        OneOrMany::Many(all) => all
            .iter()
            .any(|n| module.strip_suffix(n.as_str()).is_some_and(|head| head.is_empty() || head.ends_with('.'))),
    }
}

/// What a directory says about its adapter.
#[derive(Debug, Clone, Default)]
pub(super) struct Described {
    /// Ranks, scales and kinds.
    pub(super) config: AdapterConfig,
    /// Modules with updates.
    pub(super) rule: Rule,
}

impl Described {
    /// Reads `adapter_config.json`.
    ///
    /// # Errors
    /// It cannot be read, or switches on something that is not done here.
    pub(super) fn open(dir: &Path) -> Result<Self> {
        let path = dir.join(CONFIG);
        let text = std::fs::read_to_string(&path).map_err(|e| Error::io(&path, e))?;
        let unreadable = |e: serde_json::Error| {
            Error::new(Kind::Checkpoint, "cannot read the adapter's configuration").at(path.display()).source(e)
        };
        let all: Map<String, Value> = serde_json::from_str(&text).map_err(unreadable)?;
        // Every key that is switched on is one that is known here.
        let known: BTreeSet<&str> = KNOWN.iter().copied().collect();
        let unknown = all.iter().find(|(k, v)| !known.contains(k.as_str()) && !is_off(v));
        let keys: Keys = serde_json::from_value(Value::Object(
            all.iter().filter(|(k, _)| known.contains(k.as_str())).map(|(k, v)| (k.clone(), v.clone())).collect(),
        ))
        .map_err(unreadable)?;
        let init = keys.init_lora_weights.clone().unwrap_or_default();
        let refused = if keys.peft_type != "LORA" {
            Some(format!("peft_type {}", keys.peft_type))
        } else if let Some((key, value)) = unknown.filter(|(k, _)| !HARMLESS.contains(&k.as_str())) {
            Some(format!("{key} = {value}"))
        } else if !init.is_readable() {
            Some(format!("init_lora_weights {init} without the weights it left"))
        } else {
            None
        };
        match refused {
            Some(what) => Err(Error::new(Kind::Checkpoint, "this kind of adapter is not supported")
                .at(path.display())
                .found(what)
                .help("PEFT converts what changes the base weight: `save_pretrained(..., path_initial_model_for_weight_conversion=...)`")),
            None => Ok(keys.described(init)),
        }
    }
}

/// Keys that are understood here.
const KNOWN: [&str; 15] = [
    "peft_type",
    "r",
    "lora_alpha",
    "lora_dropout",
    "bias",
    "use_dora",
    "use_rslora",
    "rank_pattern",
    "alpha_pattern",
    "init_lora_weights",
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "modules_to_save",
];

impl Keys {
    fn described(self, init: InitLoraWeights) -> Described {
        // How A and B began does not matter once they are there, unless the weight was changed as well.
        let init = if init.changes_the_weight() { init } else { InitLoraWeights::default() };
        let modules_to_save = self.modules_to_save.unwrap_or_default();
        let config = AdapterConfig {
            r: self.r,
            lora_alpha: self.lora_alpha,
            lora_dropout: self.lora_dropout,
            rank_pattern: self.rank_pattern.unwrap_or_default(),
            alpha_pattern: self.alpha_pattern.unwrap_or_default(),
            use_rslora: self.use_rslora,
            use_dora: self.use_dora,
            init_lora_weights: init,
            bias: self.bias,
            modules_to_save: modules_to_save.clone(),
            ..AdapterConfig::default()
        };
        let rule = Rule {
            targets: self.target_modules,
            exclude: self.exclude_modules,
            layers: OneOrMany::list(self.layers_to_transform),
            layers_pattern: OneOrMany::list(self.layers_pattern),
            saved: modules_to_save,
        };
        Described { config, rule }
    }
}

/// Whether a value switches nothing on.
fn is_off(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => true,
        Value::Array(all) => all.is_empty(),
        Value::Object(all) => all.is_empty(),
        Value::String(text) => text.is_empty(),
        _ => false,
    }
}

/// `adapter_config.json` of an adapter on `adapted` of the linear modules `all`. `doubled` says that the updates hold
/// their start as well, and so have twice the rank.
pub(super) fn written(
    config: &AdapterConfig,
    base: &str,
    adapted: &BTreeSet<String>,
    all: &[LinearModule],
    modules_to_save: &BTreeSet<String>,
    doubled: bool,
) -> Value {
    let rule = simplest(config, adapted, all);
    // Twice the rank at the same scale.
    let (times, more) = if doubled { (2, if config.use_rslora { 2f64.sqrt() } else { 2.0 }) } else { (1, 1.0) };
    let ranks: BTreeMap<&String, usize> = config.rank_pattern.iter().map(|(k, r)| (k, r * times)).collect();
    let alphas: BTreeMap<&String, Value> = config.alpha_pattern.iter().map(|(k, a)| (k, whole(a * more))).collect();
    let list = |names: &[String]| if names.is_empty() { Value::Null } else { json!(names) };
    let layers = if rule.layers.is_empty() { Value::Null } else { json!(rule.layers) };
    json!({
        "alpha_pattern": alphas,
        "base_model_name_or_path": base,
        "bias": config.bias,
        "exclude_modules": Value::Null,
        "fan_in_fan_out": false,
        "inference_mode": true,
        "init_lora_weights": true,
        "layers_pattern": list(&rule.layers_pattern),
        "layers_to_transform": layers,
        "lora_alpha": whole(config.lora_alpha * more),
        "lora_dropout": config.lora_dropout,
        "modules_to_save": if modules_to_save.is_empty() { Value::Null } else { json!(modules_to_save) },
        "peft_type": "LORA",
        "r": config.r * times,
        "rank_pattern": ranks,
        "target_modules": rule.listed(),
        "task_type": "CAUSAL_LM",
        "use_dora": config.use_dora,
        "use_rslora": config.use_rslora,
    })
}

/// Bare names where they say the same in the towers that have updates, so that PEFT finds the modules in a model that is
/// nested differently (in another tower it makes updates that change nothing); else the layers, else the whole names.
fn simplest(config: &AdapterConfig, adapted: &BTreeSet<String>, all: &[LinearModule]) -> Rule {
    let last = |name: &String| name.rsplit('.').next().unwrap_or(name).to_string();
    let bare: BTreeSet<String> = adapted.iter().map(last).collect();
    let bare = || Some(OneOrMany::Many(bare.iter().cloned().collect()));
    let towers: BTreeSet<&str> = all.iter().filter(|m| adapted.contains(&m.name)).map(|m| m.tower).collect();
    let seen: Vec<&LinearModule> = all.iter().filter(|m| towers.contains(m.tower)).collect();
    let same = |rule: &Rule| seen.iter().all(|m| rule.fits(&m.name) == adapted.contains(&m.name));
    let plain = Rule { targets: bare(), ..Rule::default() };
    let layers = Rule {
        targets: bare(),
        layers: config.layers_to_transform.clone(),
        layers_pattern: config.layers_pattern.clone(),
        ..Rule::default()
    };
    // Names that have numbers for a last part say nothing by themselves.
    let numbered = adapted.iter().any(|n| last(n).bytes().all(|b| b.is_ascii_digit()));
    match (numbered, same(&plain), same(&layers)) {
        (false, true, _) => plain,
        (false, false, true) => layers,
        _ => Rule { targets: Some(OneOrMany::Many(adapted.iter().cloned().collect())), ..Rule::default() },
    }
}

/// An integer where it is one, as PEFT's configuration has it.
fn whole(x: f64) -> Value {
    if x.fract() == 0.0 && x.abs() < 1e15 { json!(x as i64) } else { json!(x) }
}

#[cfg(test)]
mod tests {
    use burn::module::ParamId;

    use super::*;

    fn open(text: &str) -> Result<Described> {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join(CONFIG), text).unwrap();
        Described::open(dir.path())
    }

    #[test]
    fn what_is_not_done_here_is_refused_and_what_is_off_is_not() {
        for (text, refused) in [
            (
                r#"{"peft_type": "LORA", "loftq_config": {}, "megatron_core": "m", "trainable_token_indices": null}"#,
                None,
            ),
            (r#"{"peft_type": "IA3"}"#, Some("IA3")),
            (r#"{"fan_in_fan_out": true}"#, Some("fan_in_fan_out")),
            (r#"{"lora_bias": true}"#, Some("lora_bias")),
            (r#"{"target_parameters": ["x"]}"#, Some("target_parameters")),
            (r#"{"layer_replication": [[0, 4]]}"#, Some("layer_replication")),
            (r#"{"of_the_future": 3}"#, Some("of_the_future")),
            (r#"{"init_lora_weights": "pissa_niter_4"}"#, Some("pissa_niter_4")),
            (r#"{"init_lora_weights": "pissa"}"#, None),
            (r#"{"init_lora_weights": "eva"}"#, None),
            (r#"{"init_lora_weights": "corda"}"#, Some("corda")),
        ] {
            match (open(text), refused) {
                (Ok(_), None) => {}
                (Err(e), Some(part)) => assert!(e.to_string().contains(part), "{e}"),
                (other, _) => panic!("{text}: {other:?}"),
            }
        }
    }

    #[test]
    fn rules_are_those_of_peft() {
        let fits = |text: &str, module: &str| open(text).unwrap().rule.fits(module);
        let list = r#"{"target_modules": ["q_proj"], "layers_to_transform": 1, "exclude_modules": ["x.q_proj"]}"#;
        assert!(fits(list, "model.layers.1.self_attn.q_proj"));
        assert!(!fits(list, "model.layers.0.self_attn.q_proj"));
        assert!(!fits(list, "model.layers.1.x.q_proj"));
        assert!(!fits(list, "model.layers.1.self_attn.k_proj"));
        let regex = r#"{"target_modules": ".*layers\\.0\\..*q_proj", "modules_to_save": ["self_attn"]}"#;
        assert!(!fits(regex, "model.layers.0.self_attn.q_proj"));
        assert!(fits(regex, "model.layers.0.other.q_proj"));
        assert!(
            fits(r#"{"target_modules": "all-linear"}"#, "a.b")
                && !fits(r#"{"target_modules": "all-linear"}"#, "lm_head")
        );
    }

    #[test]
    fn targets_are_written_as_short_as_they_can_be() {
        let module =
            |name: &str| LinearModule { name: name.into(), tower: "language", d_in: 1, d_out: 1, id: ParamId::new() };
        let all: Vec<LinearModule> =
            ["m.layers.0.q", "m.layers.1.q", "m.layers.1.k", "m.projector.0"].into_iter().map(module).collect();
        let written = |config: &AdapterConfig, names: &[&str]| {
            let adapted = names.iter().map(|n| (*n).to_string()).collect();
            written(config, "base", &adapted, &all, &BTreeSet::new(), false)
        };
        let config = AdapterConfig { layers_to_transform: vec![1], ..AdapterConfig::default() };
        assert_eq!(
            written(&AdapterConfig::default(), &["m.layers.0.q", "m.layers.1.q"])["target_modules"],
            json!(["q"])
        );
        let layered = written(&config, &["m.layers.1.q", "m.layers.1.k"]);
        assert_eq!((&layered["target_modules"], &layered["layers_to_transform"]), (&json!(["k", "q"]), &json!([1])));
        let one = written(&AdapterConfig::default(), &["m.layers.1.q"]);
        assert_eq!(one["target_modules"], json!(["m.layers.1.q"]));
        let numbered = written(&AdapterConfig::default(), &["m.projector.0"]);
        assert_eq!(numbered["target_modules"], json!(["m.projector.0"]));
    }
}
