//! Adapter directories as PEFT and LLaVA write them.
//!
//! `adapter_config.json` and `adapter_model.safetensors` (or `.bin`) hold the low-rank updates under PEFT's names and
//! shapes, and weights that were trained in full (`modules_to_save`). LLaVA keeps the latter in a file of its own,
//! `non_lora_trainables.bin`, which is read as well. `preprocess.json` records how inputs were prepared in training.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    path::{Path, PathBuf},
};

use burn::{
    module::{Module, ModuleMapper, Param, ParamId},
    tensor::{FloatDType, Tensor},
};
use regex::Regex;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::{
    AdapterConfig,
    inject::attach_specs,
    lora::{Dropout, DropoutClock, LoraSpec},
    target::{LinearModule, linears},
    tensors::{self, HostTensor},
};
use crate::{
    error::{Error, Kind, Result},
    nn::visit::{NamedParam, named_params},
    run_dir,
    train::params::{self, Trained},
    vlm::{Tower, Vlm},
    weights::{Checkpoint, keeps_half, tensor_from},
};

/// In front of every name in a PEFT file.
const PREFIX: &str = "base_model.model.";
const CONFIG: &str = "adapter_config.json";
const WEIGHTS: &str = "adapter_model.safetensors";
const PREPROCESS: &str = "preprocess.json";

/// The keys of `adapter_config.json` that decide something here.
#[derive(Debug, Clone, Deserialize)]
#[serde(default)]
struct PeftConfig {
    peft_type: String,
    r: usize,
    lora_alpha: f64,
    lora_dropout: f64,
    bias: String,
    fan_in_fan_out: bool,
    use_dora: bool,
    use_rslora: bool,
    rank_pattern: BTreeMap<String, usize>,
    alpha_pattern: BTreeMap<String, f64>,
    layers_to_transform: Option<Value>,
    target_modules: Option<Value>,
}

impl Default for PeftConfig {
    /// PEFT's defaults.
    fn default() -> Self {
        Self {
            peft_type: "LORA".into(),
            r: 8,
            lora_alpha: 8.0,
            lora_dropout: 0.0,
            bias: "none".into(),
            fan_in_fan_out: false,
            use_dora: false,
            use_rslora: false,
            rank_pattern: BTreeMap::new(),
            alpha_pattern: BTreeMap::new(),
            layers_to_transform: None,
            target_modules: None,
        }
    }
}

impl PeftConfig {
    fn open(dir: &Path) -> Result<Self> {
        let path = dir.join(CONFIG);
        let text = std::fs::read_to_string(&path).map_err(|e| Error::io(&path, e))?;
        let config: Self = serde_json::from_str(&text).map_err(|e| {
            Error::new(Kind::Checkpoint, "cannot read the adapter's configuration").at(path.display()).source(e)
        })?;
        let unsupported = [
            (config.peft_type != "LORA", format!("peft_type {}", config.peft_type)),
            (config.use_dora, "use_dora".into()),
            (config.fan_in_fan_out, "fan_in_fan_out".into()),
            (config.bias != "none", format!("bias {}", config.bias)),
        ];
        match unsupported.into_iter().find(|(is, _)| *is) {
            Some((_, what)) => Err(Error::new(Kind::Checkpoint, "this kind of adapter is not supported")
                .at(path.display())
                .found(what)),
            None => Ok(config),
        }
    }

    /// Rank and scale of the update of `module`. Keys of the patterns are regular expressions of a name's end.
    fn rank_and_scale(&self, module: &str) -> (usize, f64) {
        let fits = |key: &str| Regex::new(&format!(r"(^|.*\.){key}$")).is_ok_and(|r| r.is_match(module));
        let r = self.rank_pattern.iter().find(|(k, _)| fits(k)).map_or(self.r, |(_, r)| *r);
        let alpha = self.alpha_pattern.iter().find(|(k, _)| fits(k)).map_or(self.lora_alpha, |(_, a)| *a);
        (r, if self.use_rslora { alpha / (r as f64).sqrt() } else { alpha / r as f64 })
    }

    /// Targets given as a list of names.
    fn targets(&self) -> Vec<&str> {
        let list = self.target_modules.as_ref().and_then(Value::as_array);
        list.into_iter().flatten().filter_map(Value::as_str).filter(|t| *t != "all-linear").collect()
    }
}

/// Tensors of an adapter directory, by the names of the model.
struct Contents {
    /// Module -> names in the files of `lora_A` and `lora_B`.
    updates: BTreeMap<String, (Option<String>, Option<String>)>,
    /// Parameter -> name in the files.
    full: BTreeMap<String, String>,
    files: Checkpoint,
}

impl Contents {
    fn open(dir: &Path) -> Result<Self> {
        let pick = |names: &[&str]| names.iter().map(|n| dir.join(n)).find(|p| p.is_file());
        let Some(weights) = pick(&[WEIGHTS, "adapter_model.bin"]) else {
            return Err(Error::new(Kind::Checkpoint, "no adapter in this directory")
                .at(dir.display())
                .expected("adapter_model.safetensors or adapter_model.bin"));
        };
        let mut files = Checkpoint::open(&weights)?;
        if let Some(path) = pick(&["non_lora_trainables.safetensors", "non_lora_trainables.bin"]) {
            files.merge(Checkpoint::open(&path)?);
        }
        Ok(Self::of(files))
    }

    fn of(files: Checkpoint) -> Self {
        let mut contents = Self { updates: BTreeMap::new(), full: BTreeMap::new(), files: Checkpoint::default() };
        for stored in files.names() {
            let name = model_name(stored);
            if let Some(module) = name.strip_suffix(".lora_A.weight") {
                contents.updates.entry(module.into()).or_default().0 = Some(stored.into());
            } else if let Some(module) = name.strip_suffix(".lora_B.weight") {
                contents.updates.entry(module.into()).or_default().1 = Some(stored.into());
            } else {
                contents.full.insert(name, stored.into());
            }
        }
        contents.files = files;
        contents
    }

    /// Adapters of one tower alone name its modules from the tower on; puts the tower's prefix in front of them.
    fn find_tower(&mut self, modules: &[LinearModule], towers: &[Tower]) {
        let known = |prefix: &str, name: &str| modules.iter().any(|m| m.name.strip_prefix(prefix) == Some(name));
        if self.updates.is_empty() || self.updates.keys().any(|name| known("", name)) {
            return;
        }
        let Some(tower) = towers.iter().find(|t| self.updates.keys().all(|name| known(t.prefix, name))) else { return };
        let prefixed = |name: &String| format!("{}{name}", tower.prefix);
        self.updates = std::mem::take(&mut self.updates).into_iter().map(|(k, v)| (prefixed(&k), v)).collect();
        self.full = std::mem::take(&mut self.full).into_iter().map(|(k, v)| (prefixed(&k), v)).collect();
    }
}

/// The model's name of a name in an adapter file.
fn model_name(stored: &str) -> String {
    let name = stored.strip_prefix(PREFIX).or_else(|| stored.strip_prefix("base_model.")).unwrap_or(stored);
    let name = name.replace(".modules_to_save", "");
    name.replace(".default.", ".")
}

/// Attaches the adapter in `dir` to `model`, which is without autodiff, and replaces the weights that were trained in
/// full. `signature` is the processor's; it must be the one the adapter was trained with, if the directory records it.
///
/// # Errors
/// An unsupported or damaged adapter, one of another model (every missing, extra and wrongly shaped tensor is listed),
/// or one trained on differently prepared inputs.
pub fn load<M: Vlm + Module>(model: M, dir: &Path, signature: &Value) -> Result<M> {
    check_signature(dir, signature)?;
    attach_contents(model, dir, &PeftConfig::open(dir)?, Contents::open(dir)?)
}

/// Attaches the updates among `files`, whose names are those of PEFT or of modules inside a model: all of rank `r`,
/// scaled by `lora_alpha / r`.
///
/// # Errors
/// As [`load`].
pub fn attach_updates<M: Vlm + Module>(model: M, files: Checkpoint, r: usize, lora_alpha: f64) -> Result<M> {
    let origin = files.origin().to_path_buf();
    let config = PeftConfig { r, lora_alpha, ..PeftConfig::default() };
    attach_contents(model, &origin, &config, Contents::of(files))
}

fn attach_contents<M: Vlm + Module>(model: M, dir: &Path, config: &PeftConfig, mut contents: Contents) -> Result<M> {
    let modules = linears(&model, model.towers());
    contents.find_tower(&modules, model.towers());
    let params: HashMap<String, NamedParam> = named_params(&model).into_iter().map(|p| (p.name.clone(), p)).collect();
    check(dir, config, &contents, &modules, &params)?;
    let clock = DropoutClock::default();
    let mut specs = HashMap::new();
    let mut values = HashMap::new();
    for module in &modules {
        let Some((Some(a), Some(b))) = contents.updates.get(&module.name) else { continue };
        let (r, scale) = config.rank_and_scale(&module.name);
        let dropout = Dropout { rate: config.lora_dropout, seed: 0, module: module.name.clone(), clock: clock.clone() };
        specs.insert(module.id, LoraSpec { r, scale, dropout });
        values.insert(format!("{}.weight.lora.a", module.name), (a.clone(), true));
        values.insert(format!("{}.weight.lora.b", module.name), (b.clone(), true));
    }
    for (name, stored) in &contents.full {
        values.insert(name.clone(), (stored.clone(), params[name].linear_weight));
    }
    let model = attach_specs(model, specs);
    let by_id = named_params(&model).into_iter().filter_map(|p| Some((p.id, values.remove(&p.name)?))).collect();
    let mut filler = Fill { files: &contents.files, by_id, failure: None };
    let model = model.map(&mut filler);
    filler.failure.map_or(Ok(model), Err)
}

struct Fill<'a> {
    files: &'a Checkpoint,
    /// Name in the files, and whether the file holds it transposed.
    by_id: HashMap<ParamId, (String, bool)>,
    failure: Option<Error>,
}

impl ModuleMapper for Fill<'_> {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        let Some((name, transposed)) = self.by_id.remove(&param.id) else { return param };
        // Whole weights of an adapter were trained in f32, and stay so where types may be mixed.
        let mixed = keeps_half(&param.lazy_device());
        let dtype = if mixed { FloatDType::F32 } else { FloatDType::from(param.dtype()) };
        match tensor_from::<D>(self.files, &name, transposed, dtype, &param.lazy_device()) {
            Ok(tensor) => param.map(|_| tensor),
            Err(e) => {
                self.failure.get_or_insert(e);
                param
            }
        }
    }
}

fn check(
    dir: &Path,
    config: &PeftConfig,
    contents: &Contents,
    modules: &[LinearModule],
    params: &HashMap<String, NamedParam>,
) -> Result<()> {
    let known: BTreeMap<&str, &LinearModule> = modules.iter().map(|m| (m.name.as_str(), m)).collect();
    let (mut missing, mut extra, mut wrong) = (Vec::new(), Vec::new(), Vec::new());
    let mut shape = |stored: &str, expected: Vec<usize>| {
        let found = contents.files.info(stored).map(|i| i.shape.clone()).unwrap_or_default();
        if found != expected {
            wrong.push(format!("{stored} (expected {expected:?}, found {found:?})"));
        }
    };
    for (name, (a, b)) in &contents.updates {
        let Some(module) = known.get(name.as_str()) else {
            extra.extend(a.iter().chain(b).cloned());
            continue;
        };
        let (r, _) = config.rank_and_scale(name);
        match a {
            Some(stored) => shape(stored, vec![r, module.d_in]),
            None => missing.push(format!("{PREFIX}{name}.lora_A.weight")),
        }
        match b {
            Some(stored) => shape(stored, vec![module.d_out, r]),
            None => missing.push(format!("{PREFIX}{name}.lora_B.weight")),
        }
    }
    for (name, stored) in &contents.full {
        match params.get(name) {
            Some(param) => shape(stored, param.checkpoint_shape()),
            None => extra.push(stored.clone()),
        }
    }
    missing.extend(incomplete(config, contents, modules));
    let complaints: Vec<String> = [("missing", missing), ("extra", extra), ("wrong shape", wrong)]
        .into_iter()
        .filter(|(_, names)| !names.is_empty())
        .map(|(what, names)| format!("{} {what}: {}", names.len(), some(&names)))
        .collect();
    if complaints.is_empty() {
        return Ok(());
    }
    Err(Error::new(Kind::Checkpoint, "the adapter does not fit the model")
        .at(dir.display())
        .found(complaints.join("; "))
        .help("use the adapter with the base model named in its adapter_config.json"))
}

/// Modules that must have an update because the same module of another layer has one, and targets without any update.
fn incomplete(config: &PeftConfig, contents: &Contents, modules: &[LinearModule]) -> Vec<String> {
    let kind = |name: &str| -> String {
        name.split('.')
            .map(|s| if s.bytes().all(|b| b.is_ascii_digit()) { "*" } else { s })
            .collect::<Vec<_>>()
            .join(".")
    };
    let kinds: BTreeSet<String> = contents.updates.keys().map(|m| kind(m)).collect();
    let mut missing = Vec::new();
    if config.layers_to_transform.is_none() {
        let lost = modules.iter().filter(|m| kinds.contains(&kind(&m.name)) && !contents.updates.contains_key(&m.name));
        missing.extend(lost.map(|m| format!("{PREFIX}{}.lora_A.weight", m.name)));
    }
    for target in config.targets() {
        let hit = |name: &String| name == target || name.ends_with(&format!(".{target}"));
        if !contents.updates.keys().any(hit) {
            missing.push(format!("every update of target {target}"));
        }
    }
    missing
}

fn some(names: &[String]) -> String {
    let mut text = names.iter().take(8).cloned().collect::<Vec<_>>().join(", ");
    if names.len() > 8 {
        text.push_str(&format!(" and {} more", names.len() - 8));
    }
    text
}

#[derive(Serialize, Deserialize)]
struct Preprocess {
    sha256: String,
    signature: Value,
}

/// Hash of a processor's signature.
#[must_use]
pub fn signature_hash(signature: &Value) -> String {
    run_dir::sha256_bytes(signature.to_string().as_bytes())
}

fn check_signature(dir: &Path, signature: &Value) -> Result<()> {
    let path = dir.join(PREPROCESS);
    if !path.is_file() {
        return Ok(());
    }
    let recorded: Preprocess = run_dir::read_json(&path)?;
    if recorded.sha256 == signature_hash(signature) {
        return Ok(());
    }
    let differs: Vec<String> = signature
        .as_object()
        .into_iter()
        .flatten()
        .filter(|(k, v)| recorded.signature.get(k.as_str()) != Some(v))
        .map(|(k, v)| format!("{k}: {v}, in training {}", recorded.signature.get(k.as_str()).unwrap_or(&Value::Null)))
        .collect();
    Err(Error::new(Kind::Checkpoint, "inputs are not prepared as when this adapter was trained")
        .at(path.display())
        .found(if differs.is_empty() { "another signature".into() } else { some(&differs) })
        .help("use the processor files (tokenizer, preprocessor_config.json) of the base model of the training"))
}

/// What a written adapter records besides its tensors.
#[derive(Debug, Clone)]
pub struct AdapterInfo<'a> {
    /// `[adapter]`
    pub config: &'a AdapterConfig,
    /// Base model, as a name or path.
    pub base: &'a str,
    /// Processor's signature.
    pub signature: &'a Value,
    /// Lines for the README.
    pub notes: &'a [(String, String)],
}

/// Writes what `model` (on the autodiff device) has trained as a PEFT directory: updates, and fully trained weights as
/// `modules_to_save`. The directory appears whole.
///
/// # Errors
/// The directory cannot be written.
pub fn save<M: Module>(
    model: &M,
    trained: &[Trained],
    towers: &[Tower],
    info: &AdapterInfo<'_>,
    dir: &Path,
) -> Result<()> {
    let beside = beside(dir);
    if beside.exists() {
        std::fs::remove_dir_all(&beside).map_err(|e| Error::io(&beside, e))?;
    }
    std::fs::create_dir_all(&beside).map_err(|e| Error::io(&beside, e))?;
    tensors::write(&beside.join(WEIGHTS), &exported(model, trained))?;
    let preprocess = json!({"sha256": signature_hash(info.signature), "signature": info.signature});
    for (name, value) in [(CONFIG, peft_config(trained, towers, info)), (PREPROCESS, preprocess)] {
        run_dir::write_atomic(&beside.join(name), format!("{value:#}\n").as_bytes())?;
    }
    run_dir::write_atomic(&beside.join("README.md"), readme(trained, info).as_bytes())?;
    if dir.exists() {
        std::fs::remove_dir_all(dir).map_err(|e| Error::io(dir, e))?;
    }
    std::fs::rename(&beside, dir).map_err(|e| Error::io(dir, e))
}

fn beside(dir: &Path) -> PathBuf {
    let name = dir.file_name().map_or_else(String::new, |n| n.to_string_lossy().into_owned());
    dir.with_file_name(format!(".tmp-{name}"))
}

/// Trained tensors under PEFT's names and shapes.
#[must_use]
pub fn exported<M: Module>(model: &M, trained: &[Trained]) -> BTreeMap<String, HostTensor> {
    trained
        .iter()
        .zip(params::values(model))
        .map(|(t, value)| {
            let values = value.into_data().convert::<f32>().try_to_vec().expect("converted to f32");
            let tensor = HostTensor { shape: t.shape.clone(), values };
            (format!("{PREFIX}{}", t.name), if t.transposed { tensor.transposed() } else { tensor })
        })
        .collect()
}

fn peft_config(trained: &[Trained], towers: &[Tower], info: &AdapterInfo<'_>) -> Value {
    let last = |name: &str| name.rsplit('.').next().unwrap_or(name).to_string();
    let updated = trained.iter().filter_map(|t| t.name.strip_suffix(".lora_A.weight"));
    // Bare names when they say the same, so that PEFT finds the modules in a model that is nested differently.
    let targets: BTreeSet<String> = updated.map(last).collect();
    let full: BTreeSet<String> = trained.iter().filter(|t| !t.lora).map(|t| module_to_save(towers, &t.name)).collect();
    json!({
        "base_model_name_or_path": info.base,
        "bias": "none",
        "fan_in_fan_out": false,
        "inference_mode": true,
        "init_lora_weights": true,
        "lora_alpha": whole(info.config.lora_alpha),
        "lora_dropout": info.config.lora_dropout,
        "modules_to_save": if full.is_empty() { Value::Null } else { json!(full) },
        "peft_type": "LORA",
        "r": info.config.r,
        "target_modules": targets,
        "task_type": "CAUSAL_LM",
        "use_dora": false,
        "use_rslora": false,
    })
}

/// An integer where it is one, as PEFT's configuration has it.
fn whole(x: f64) -> Value {
    if x.fract() == 0.0 && x.abs() < 1e15 { json!(x as i64) } else { json!(x) }
}

/// Name of the module that holds a fully trained parameter: its tower, or a child of the language model.
fn module_to_save(towers: &[Tower], name: &str) -> String {
    match Tower::of(towers, name) {
        Some(tower) if !tower.prefix.is_empty() => {
            let path = tower.prefix.trim_end_matches('.');
            path.rsplit('.').next().unwrap_or(path).to_string()
        }
        _ => name.strip_prefix("model.").unwrap_or(name).split('.').next().unwrap_or(name).to_string(),
    }
}

fn readme(trained: &[Trained], info: &AdapterInfo<'_>) -> String {
    let parameters: usize = trained.iter().map(Trained::len).sum();
    let mut text = format!(
        "---\nlibrary_name: peft\nbase_model: {}\n---\n\n# Adapter made by medtune\n\n\
         A low-rank adapter (r = {}, alpha = {}) with {parameters} trained parameters. Load it with PEFT, or with \
         `medtune generate --adapter`.\n\nInputs must be prepared as `preprocess.json` says.\n",
        info.base, info.config.r, info.config.lora_alpha
    );
    for (name, value) in info.notes {
        text.push_str(&format!("\n- {name}: {value}"));
    }
    text.push('\n');
    text
}
