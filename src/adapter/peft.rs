//! Adapter directories as PEFT and LLaVA write them.
//!
//! `adapter_config.json` and `adapter_model.safetensors` (or `.bin`) hold the low-rank updates under PEFT's names and
//! shapes, and weights that were trained in full (`modules_to_save`). LLaVA keeps the latter in a file of its own,
//! `non_lora_trainables.bin`, which is read as well. `preprocess.json` records how inputs were prepared in training.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    path::{Path, PathBuf},
    str::FromStr,
};

use burn::{
    module::{Module, ModuleMapper, Param, ParamId},
    tensor::{DType, Tensor, TensorData},
};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::{
    AdapterConfig,
    attachment::attachments,
    in_saved,
    inject::{attach_specs, spec},
    lora::{DropoutClock, LoraSpec},
    peft_config::{self, CONFIG, Described, Rule},
    quantized::{Packing, Quantization},
    target::{Coverage, LinearModule, linears},
    tensors::{self, HostTensor},
};
use crate::{
    error::{Error, Kind, Result},
    nn::visit::{NamedParam, named_params},
    run_dir,
    train::params::{self, Trained},
    vlm::{Tower, Vlm},
    weights::{Checkpoint, keeps_half},
};

/// In front of every name in a PEFT file.
const PREFIX: &str = "base_model.model.";
const WEIGHTS: &str = "adapter_model.safetensors";
const PREPROCESS: &str = "preprocess.json";

/// Names in the files of one update.
#[derive(Debug, Clone, Default)]
struct Stored {
    a: Option<String>,
    b: Option<String>,
    magnitude: Option<String>,
}

/// Tensors of an adapter directory, by the names of the model.
struct Contents {
    /// By module.
    updates: BTreeMap<String, Stored>,
    /// Parameter -> name in the files.
    full: BTreeMap<String, String>,
    files: Checkpoint,
}

impl Contents {
    fn open(dir: &Path) -> Result<Self> {
        let all = tensor_files(dir)?;
        let mut files = Checkpoint::open(&all[0])?;
        for path in &all[1..] {
            files.merge(Checkpoint::open(path)?);
        }
        Ok(Self::of(files))
    }

    fn of(files: Checkpoint) -> Self {
        let (mut updates, mut full) = (BTreeMap::<String, Stored>::new(), BTreeMap::new());
        for stored in files.names() {
            let name = model_name(stored);
            let magnitude = name.strip_suffix(".weight").unwrap_or(&name);
            if let Some(module) = name.strip_suffix(".lora_A.weight") {
                updates.entry(module.into()).or_default().a = Some(stored.into());
            } else if let Some(module) = name.strip_suffix(".lora_B.weight") {
                updates.entry(module.into()).or_default().b = Some(stored.into());
            } else if let Some(module) = magnitude.strip_suffix(".lora_magnitude_vector") {
                updates.entry(module.into()).or_default().magnitude = Some(stored.into());
            } else {
                full.insert(name, stored.to_string());
            }
        }
        Self { updates, full, files }
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

    /// A tensor of the files as it is.
    fn tensor(&self, stored: &str) -> Result<HostTensor> {
        let shape = self.files.info(stored).map(|i| i.shape.clone()).unwrap_or_default();
        Ok(HostTensor { shape, values: self.files.read_f32(stored)? })
    }
}

/// The model's name of a name in an adapter file.
fn model_name(stored: &str) -> String {
    let name = stored.strip_prefix(PREFIX).or_else(|| stored.strip_prefix("base_model.")).unwrap_or(stored);
    let name = name.replace(".modules_to_save", "").replace(".base_layer.", ".");
    name.replace(".default.", ".")
}

/// An adapter directory and how much of it counts.
#[derive(Debug, Clone, PartialEq)]
pub struct AdapterRef {
    /// Directory in PEFT layout.
    pub dir: PathBuf,
    /// Factor on what it adds.
    pub weight: f64,
}

impl From<PathBuf> for AdapterRef {
    fn from(dir: PathBuf) -> Self {
        Self { dir, weight: 1.0 }
    }
}

impl FromStr for AdapterRef {
    type Err = String;

    /// `DIR`, or `DIR:WEIGHT`.
    fn from_str(text: &str) -> std::result::Result<Self, String> {
        match text.rsplit_once(':').filter(|_| !Path::new(text).exists()) {
            Some((dir, weight)) => match weight.parse::<f64>() {
                Ok(w) if w.is_finite() && !dir.is_empty() => Ok(Self { dir: dir.into(), weight: w }),
                _ => Err(format!("`{weight}` is no weight: write DIR or DIR:NUMBER")),
            },
            None => Ok(PathBuf::from(text).into()),
        }
    }
}

/// An adapter that was opened.
struct Opened {
    dir: PathBuf,
    weight: f64,
    described: Described,
    contents: Contents,
}

impl Opened {
    fn new<M: Vlm + Module>(model: &M, adapter: &AdapterRef) -> Result<Self> {
        let mut contents = Contents::open(&adapter.dir)?;
        contents.find_tower(&linears(model, model.towers()), model.towers());
        let described = Described::open(&adapter.dir)?;
        Ok(Self { dir: adapter.dir.clone(), weight: adapter.weight, described, contents })
    }
}

/// Attaches the adapter in `dir` to `model`, which is without autodiff, and replaces the weights that were trained in
/// full. `signature` is the processor's; it must be the one the adapter was trained with, if the directory records it.
///
/// # Errors
/// An unsupported or damaged adapter, one of another model (every missing, extra and wrongly shaped tensor is listed),
/// or one trained on differently prepared inputs.
pub fn load<M: Vlm + Module>(model: M, dir: &Path, signature: &Value) -> Result<M> {
    load_all(model, &[dir.to_path_buf().into()], signature)
}

/// Attaches several adapters at once: what they add is added, each times its weight (what PEFT's
/// `add_weighted_adapter` calls `cat`; its `linear` multiplies sums of factors and is another thing). None leave the model
/// as it is.
///
/// # Errors
/// As [`load`]; several adapters of which one cannot be added: magnitudes, whole weights and biases, or a start that
/// changed the weight.
pub fn load_all<M: Vlm + Module>(model: M, adapters: &[AdapterRef], signature: &Value) -> Result<M> {
    load_onto(model, adapters, signature, Quantization::None)
}

/// [`load_all`] on a base whose frozen weights are packed as `quantization` says.
///
/// # Errors
/// As [`load_all`].
pub fn load_onto<M: Vlm + Module>(
    model: M,
    adapters: &[AdapterRef],
    signature: &Value,
    quantization: Quantization,
) -> Result<M> {
    for adapter in adapters {
        check_signature(&adapter.dir, signature)?;
    }
    let opened = adapters.iter().map(|a| Opened::new(&model, a)).collect::<Result<Vec<_>>>()?;
    if opened.is_empty() && quantization == Quantization::None {
        return Ok(model);
    }
    let whole = |name: &str| opened.iter().any(|o| o.contents.full.contains_key(name));
    let packing = Packing::of(&model, quantization, whole);
    Ok(attach_opened(model, &opened, 0, packing)?.0)
}

/// Attaches the adapter in `dir` to continue its training: dropout and draws are those of `config` and `seed`. `trains`
/// says which parameters of the model itself are trained.
///
/// # Errors
/// As [`load`], or the adapter holds a weight that would not be trained, and so would be lost.
pub(super) fn load_to_train<M: Vlm + Module>(
    model: M,
    dir: &Path,
    config: &AdapterConfig,
    seed: u64,
    trains: impl Fn(&str) -> bool,
    packing: Packing,
) -> Result<(M, DropoutClock)> {
    let mut opened = Opened::new(&model, &dir.to_path_buf().into())?;
    opened.described.config.lora_dropout = config.lora_dropout;
    if let Some(lost) = opened.contents.full.keys().find(|name| !trains(name)) {
        return Err(Error::new(Kind::Config, "the adapter holds a weight that this training leaves frozen")
            .at(dir.display())
            .found(lost)
            .help("train its tower in full, or name its module in adapter.modules_to_save"));
    }
    attach_opened(model, &[opened], seed, packing)
}

/// `config` with the ranks, scales and kinds of the adapter that it continues, if it continues one.
///
/// # Errors
/// The adapter's configuration cannot be read or is not supported.
pub fn resolved(config: &AdapterConfig) -> Result<AdapterConfig> {
    let Some(dir) = &config.adapter_name_or_path else { return Ok(config.clone()) };
    let described = Described::open(dir)?.config;
    Ok(AdapterConfig {
        loraplus_lr_ratio: config.loraplus_lr_ratio,
        adapter_name_or_path: Some(dir.clone()),
        quantization: config.quantization,
        ..described
    })
}

/// The modules that the adapter in `dir` updates.
///
/// # Errors
/// It cannot be read, or updates a tower that `adapted` does not allow.
pub(super) fn coverage(
    dir: &Path,
    modules: &[LinearModule],
    towers: &[Tower],
    adapted: impl Fn(&str) -> bool,
) -> Result<Coverage> {
    let mut contents = Contents::open(dir)?;
    contents.find_tower(modules, towers);
    let hit = |m: &LinearModule| contents.updates.contains_key(&m.name);
    if let Some(closed) = modules.iter().find(|m| hit(m) && !adapted(m.tower)) {
        return Err(Error::new(Kind::Config, "the adapter updates a tower that is not adapted")
            .at(dir.display())
            .found(&closed.name)
            .help(format!("set train.{} = \"lora\"", closed.tower)));
    }
    Ok(Coverage::of(modules, hit))
}

/// Attaches the updates among `files`, whose names are those of PEFT or of modules inside a model: all of rank `r`,
/// scaled by `lora_alpha / r`.
///
/// # Errors
/// As [`load`].
pub fn attach_updates<M: Vlm + Module>(model: M, files: Checkpoint, r: usize, lora_alpha: f64) -> Result<M> {
    let config = AdapterConfig { r, lora_alpha, ..AdapterConfig::default() };
    let dir = files.origin().to_path_buf();
    let mut contents = Contents::of(files);
    contents.find_tower(&linears(&model, model.towers()), model.towers());
    let described = Described { config, ..Described::default() };
    Ok(attach_opened(model, &[Opened { dir, weight: 1.0, described, contents }], 0, Packing::default())?.0)
}

fn attach_opened<M: Vlm + Module>(
    model: M,
    adapters: &[Opened],
    seed: u64,
    packing: Packing,
) -> Result<(M, DropoutClock)> {
    let modules = linears(&model, model.towers());
    let params: HashMap<String, NamedParam> = named_params(&model).into_iter().map(|p| (p.name.clone(), p)).collect();
    for adapter in adapters {
        check(adapter, &modules, &params)?;
        addable(adapters, adapter)?;
    }
    let clock = DropoutClock::default();
    let (mut specs, mut values) = (HashMap::new(), HashMap::new());
    for module in &modules {
        let Some((spec, update)) = update_of(adapters, &module.name, seed, &clock)? else { continue };
        specs.insert(module.id, spec);
        let path = |end: &str| format!("{}.weight.adapter.lora.{end}", module.name);
        values.extend(update.into_iter().map(|(end, tensor)| (path(end), tensor)));
    }
    for adapter in adapters {
        for (name, stored) in &adapter.contents.full {
            let tensor = adapter.contents.tensor(stored)?;
            values.insert(name.clone(), if params[name].linear_weight { tensor.transposed() } else { tensor });
        }
    }
    let model = attach_specs(model, specs, packing);
    let by_id = named_params(&model).into_iter().filter_map(|p| Some((p.id, values.remove(&p.name)?))).collect();
    Ok((model.map(&mut Fill { by_id }), clock))
}

/// What can be added to others, or taken in part.
fn addable(all: &[Opened], adapter: &Opened) -> Result<()> {
    if all.len() == 1 && adapter.weight == 1.0 {
        return Ok(());
    }
    let Some(what) = more_than_added(adapter) else { return Ok(()) };
    Err(Error::new(Kind::Checkpoint, "this adapter cannot be weighted or added to others")
        .at(adapter.dir.display())
        .found(what)
        .help("use it alone, or merge it into the base first"))
}

/// What an adapter does besides adding to weights, if anything.
fn more_than_added(adapter: &Opened) -> Option<String> {
    let config = &adapter.described.config;
    if config.use_dora {
        Some("magnitudes (DoRA)".to_string())
    } else if let Some(name) = adapter.contents.full.keys().next() {
        Some(format!("the whole of {name}"))
    } else if config.init_lora_weights.changes_the_weight() {
        Some(format!("a start that changed the weight ({})", config.init_lora_weights))
    } else {
        None
    }
}

/// Refuses adapters that a merged `model` does not let go of: what they put in the place of the base's values, or computed
/// from them, is not in their files.
///
/// # Errors
/// One has magnitudes, whole weights or biases, or a start that changed the weight; or one cannot be read.
pub fn check_reversible<M: Vlm + Module>(model: &M, adapters: &[AdapterRef]) -> Result<()> {
    for adapter in adapters {
        let opened = Opened::new(model, adapter)?;
        let Some(what) = more_than_added(&opened) else { continue };
        return Err(Error::new(Kind::Checkpoint, "this adapter cannot be taken off a model it was merged into")
            .at(adapter.dir.display())
            .expected("updates that were added to the weights, and nothing else")
            .found(what)
            .help(
                "the base's own values are neither in the merged model nor in the adapter: keep a copy of the base",
            ));
    }
    Ok(())
}

/// SHA-256 of the files with the tensors of the adapter in `dir`.
///
/// # Errors
/// There are none, or they cannot be read.
pub fn tensors_hash(dir: &Path) -> Result<String> {
    let hashes = tensor_files(dir)?.iter().map(|file| run_dir::sha256(file)).collect::<Result<Vec<_>>>()?;
    Ok(match hashes.as_slice() {
        [one] => one.clone(),
        all => run_dir::sha256_bytes(all.concat().as_bytes()),
    })
}

/// The files with the tensors of the adapter in `dir`: updates first, then whole weights.
fn tensor_files(dir: &Path) -> Result<Vec<PathBuf>> {
    let pick = |names: &[&str]| names.iter().map(|n| dir.join(n)).find(|p| p.is_file());
    let Some(weights) = pick(&[WEIGHTS, "adapter_model.bin"]) else {
        return Err(Error::new(Kind::Checkpoint, "no adapter in this directory")
            .at(dir.display())
            .expected("adapter_model.safetensors or adapter_model.bin"));
    };
    let more = pick(&["non_lora_trainables.safetensors", "non_lora_trainables.bin"]);
    Ok(std::iter::once(weights).chain(more).collect())
}

/// How an update is made, and its parameters by their names in the module.
type Update = (LoraSpec, Vec<(&'static str, HostTensor)>);

/// The update of `module` by all adapters that have one, in the module's layout.
fn update_of(adapters: &[Opened], module: &str, seed: u64, clock: &DropoutClock) -> Result<Option<Update>> {
    let with = |o: &&Opened| o.contents.updates.contains_key(module);
    let owners: Vec<&Opened> = adapters.iter().filter(with).collect();
    let Some(first) = owners.first() else { return Ok(None) };
    let mut spec = spec(&first.described.config, module, seed, clock)?;
    let stored = |o: &Opened| -> Result<(HostTensor, HostTensor)> {
        let names = &o.contents.updates[module];
        let read = |name: &Option<String>| o.contents.tensor(name.as_deref().unwrap_or_default());
        Ok((read(&names.a)?, read(&names.b)?.transposed()))
    };
    let (a, b) = if let ([only], true) = (owners.as_slice(), adapters.len() == 1 && first.weight == 1.0) {
        stored(only)?
    } else {
        // Rows of A and of B stand for ranks: the ranks of all stand one after the other, each with its scale.
        (spec.r, spec.scale) = (0, 1.0);
        let mut all = (HostTensor::default(), HostTensor::default());
        for owner in &owners {
            let (r, scale) = owner.described.config.rank_and_scale(module)?;
            let (a, mut b) = stored(owner)?;
            let factor = (scale * owner.weight) as f32;
            b.values.iter_mut().for_each(|v| *v *= factor);
            for (all, part) in [(&mut all.0, a), (&mut all.1, b)] {
                all.shape = vec![spec.r + r, part.shape[1]];
                all.values.extend(part.values);
            }
            spec.r += r;
        }
        all
    };
    let mut tensors = vec![("a", a.transposed()), ("b", b)];
    if let Some(name) = first.contents.updates[module].magnitude.as_deref() {
        tensors.push(("magnitude", first.contents.tensor(name)?));
    }
    Ok(Some((spec, tensors)))
}

struct Fill {
    by_id: HashMap<ParamId, HostTensor>,
}

impl ModuleMapper for Fill {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        let Some(HostTensor { shape, values }) = self.by_id.remove(&param.id) else { return param };
        // Whole weights of an adapter were trained in f32, and stay so where types may be mixed.
        let device = param.lazy_device();
        let dtype = if keeps_half(&device) { DType::F32 } else { param.dtype() };
        let tensor = Tensor::from_data(TensorData::new(values, shape), (&device, dtype));
        param.map(|_| tensor)
    }
}

fn check(adapter: &Opened, modules: &[LinearModule], params: &HashMap<String, NamedParam>) -> Result<()> {
    let Opened { dir, described: Described { config, rule }, contents, .. } = adapter;
    let known: BTreeMap<&str, &LinearModule> = modules.iter().map(|m| (m.name.as_str(), m)).collect();
    let (mut missing, mut extra, mut wrong) = (Vec::new(), Vec::new(), Vec::new());
    for (name, stored) in &contents.updates {
        let all = [&stored.a, &stored.b, &stored.magnitude];
        let Some(module) = known.get(name.as_str()) else {
            extra.extend(all.into_iter().flatten().cloned());
            continue;
        };
        let (r, _) = config.rank_and_scale(name)?;
        let shapes = [vec![r, module.d_in], vec![module.d_out, r], vec![module.d_out]];
        let ends = ["lora_A.weight", "lora_B.weight", "lora_magnitude_vector"];
        for (i, (stored, expected)) in all.into_iter().zip(shapes).enumerate() {
            let wanted = i < 2 || config.use_dora;
            match stored {
                Some(stored) if wanted => wrong.extend(misshapen(contents, stored, &expected)),
                Some(stored) => extra.push(stored.clone()),
                None if wanted => missing.push(format!("{PREFIX}{name}.{}", ends[i])),
                None => {}
            }
        }
    }
    for (name, stored) in &contents.full {
        match params.get(name) {
            Some(param) => wrong.extend(misshapen(contents, stored, &param.checkpoint_shape())),
            None => extra.push(stored.clone()),
        }
    }
    missing.extend(incomplete(rule, contents, modules));
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

fn misshapen(contents: &Contents, stored: &str, expected: &[usize]) -> Option<String> {
    let found = contents.files.info(stored).map(|i| i.shape.clone()).unwrap_or_default();
    (found != expected).then(|| format!("{stored} (expected {expected:?}, found {found:?})"))
}

/// Modules that must have an update because the same module of another layer has one, and targets without any update.
fn incomplete(rule: &Rule, contents: &Contents, modules: &[LinearModule]) -> Vec<String> {
    let kind = |name: &str| -> String {
        name.split('.')
            .map(|s| if s.bytes().all(|b| b.is_ascii_digit()) { "*" } else { s })
            .collect::<Vec<_>>()
            .join(".")
    };
    let kinds: BTreeSet<String> = contents.updates.keys().map(|m| kind(m)).collect();
    let lost = modules
        .iter()
        .filter(|m| kinds.contains(&kind(&m.name)) && rule.fits(&m.name) && !contents.updates.contains_key(&m.name));
    let mut missing: Vec<String> = lost.map(|m| format!("{PREFIX}{}.lora_A.weight", m.name)).collect();
    for target in rule.listed() {
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

/// Refuses an adapter whose inputs were prepared otherwise than `signature` says, if its directory records it.
///
/// # Errors
/// They were, or the record cannot be read.
pub fn check_signature(dir: &Path, signature: &Value) -> Result<()> {
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
    towers: &'static [Tower],
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
    for (name, value) in [(CONFIG, config_file(model, trained, towers, info)), (PREPROCESS, preprocess)] {
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

/// Trained tensors under PEFT's names and shapes. An update that takes its start off the weight is written with the
/// start in it, at twice the rank, as PEFT converts it: so it fits the weight as it was.
#[must_use]
pub fn exported<M: Module>(model: &M, trained: &[Trained]) -> BTreeMap<String, HostTensor> {
    let host = |values: Tensor<1>| values.into_data().convert::<f32>().try_to_vec().expect("converted to f32");
    let adapted: BTreeSet<&str> = trained.iter().filter_map(|t| t.name.strip_suffix(".lora_A.weight")).collect();
    let mut tensors: BTreeMap<String, HostTensor> = trained
        .iter()
        .zip(params::values(model))
        .map(|(t, value)| {
            let tensor = HostTensor { shape: t.shape.clone(), values: host(value) };
            let name = match t.name.strip_suffix(".bias").filter(|module| adapted.contains(module)) {
                Some(module) => format!("{PREFIX}{module}.base_layer.bias"),
                None => format!("{PREFIX}{}", t.name),
            };
            (name, if t.transposed { tensor.transposed() } else { tensor })
        })
        .collect();
    for (name, attachment) in attachments(model) {
        let Some(lora) = attachment.lora.filter(|l| l.fixed.initial.is_some()) else { continue };
        let module = name.trim_end_matches(".weight");
        let (a, b) = lora.factors();
        for (end, factor) in [("lora_A", a), ("lora_B", b)] {
            let [rows, columns] = factor.dims();
            let values = host(factor.reshape([rows * columns]));
            let tensor = HostTensor { shape: vec![rows, columns], values }.transposed();
            tensors.insert(format!("{PREFIX}{module}.{end}.weight"), tensor);
        }
    }
    tensors
}

fn config_file<M: Module>(model: &M, trained: &[Trained], towers: &'static [Tower], info: &AdapterInfo<'_>) -> Value {
    let updated = trained.iter().filter_map(|t| t.name.strip_suffix(".lora_A.weight"));
    let adapted: BTreeSet<String> = updated.map(str::to_string).collect();
    let full = trained.iter().filter(|t| !t.lora && !info.config.trains_bias(&t.name, |m| adapted.contains(m)));
    let saved = |name: &str| {
        let listed = info.config.modules_to_save.iter().find(|m| in_saved(name, m));
        listed.cloned().unwrap_or_else(|| module_to_save(towers, name))
    };
    let saved: BTreeSet<String> = full.map(|t| saved(&t.name)).collect();
    let doubled = attachments(model).iter().any(|(_, a)| a.lora.as_ref().is_some_and(|l| l.fixed.initial.is_some()));
    peft_config::written(info.config, info.base, &adapted, &linears(model, towers), &saved, doubled)
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
