//! What a checkpoint directory holds, from its config and its weights; its path says nothing.

use std::{collections::BTreeMap, path::Path, time::Instant};

use burn::tensor::{DType, FloatDType};
use serde::Serialize;
use serde_json::Value;

use super::{bytes, columns, context, count, emit, model::load_options};
use crate::{
    adapter::AdapterConfig,
    cli::{Global, InspectArgs},
    device::DeviceSpec,
    error::{Error, Kind, Result},
    models::{self, AnyVlm, LoadOptions, ModelDef, tower_sizes},
    nn::visit::{NamedParam, named_params},
    resident,
    stage::Ctx,
    train::{
        Recompute, TowerMode, TrainConfig,
        memory::{Held, Load, Machine, Memory, account, to_answer},
    },
    vlm::{Processor, Tower, Vlm},
    weights::{Checkpoint, Fit, compare, default_dtype, torch_dtype},
};

/// Positions of the row that memory is estimated for.
const LENGTH: usize = 1024;
/// Rank of the adapter that memory is estimated for.
const RANK: usize = 16;

/// Everything that is found.
#[derive(Debug, Serialize)]
struct Report {
    dir: std::path::PathBuf,
    family: &'static str,
    about: &'static str,
    /// Family whose tensors have these names, and the share of names that agree.
    family_of_weights: Option<(&'static str, f64)>,
    /// Preset of the same shapes.
    preset: Option<&'static str>,
    parameters: Vec<(&'static str, usize)>,
    dtypes: BTreeMap<&'static str, u64>,
    files: Vec<FileReport>,
    fit: Fit,
    tensors: Vec<TensorReport>,
    processor: Value,
    /// Ids of the tokenizer, and rows of the embeddings.
    vocabulary: Option<(usize, usize)>,
    /// Bytes to answer a row of 1,024 positions.
    memory_to_answer: u64,
    memory_to_train: Memory,
    loaded: Option<Loaded>,
}

#[derive(Debug, Serialize)]
struct FileReport {
    file: String,
    tensors: usize,
    bytes: u64,
}

#[derive(Debug, Serialize)]
struct TensorReport {
    name: String,
    shape: Vec<usize>,
    dtype: &'static str,
    file: String,
}

#[derive(Debug, Serialize)]
struct Loaded {
    dtype: &'static str,
    seconds: f64,
    /// Largest memory of this process so far; none where the system does not say.
    peak_bytes: Option<u64>,
}

/// Reads a checkpoint directory, without its weights unless asked to.
pub(super) fn inspect(global: &Global, args: &InspectArgs) -> Result<()> {
    let ctx = context(global)?;
    let options = load_options(args.vision_tower.as_deref(), args.dtype, &ctx);
    let mut report = read(&args.dir, &options)?;
    if args.load && report.fit.is_complete() {
        report.loaded = Some(load(&args.dir, &options, &ctx)?);
    }
    emit(global, &report, || report.text())?;
    if report.fit.is_complete() && report.processor.get("error").is_none() {
        return Ok(());
    }
    Err(Error::new(Kind::Gate, "this checkpoint would not load")
        .at(args.dir.display())
        .help("the report above says what is missing; download the checkpoint completely"))
}

fn load(dir: &Path, options: &LoadOptions, ctx: &Ctx) -> Result<Loaded> {
    let started = Instant::now();
    let model = (models::detect(dir)?.load)(dir, options, &ctx.device)?;
    let held = named_params(&model).into_iter().filter(|p| p.linear_weight).find_map(|p| p.dtype);
    let dtype = held.map_or(FloatDType::F32, FloatDType::from);
    Ok(Loaded {
        dtype: torch_dtype(dtype),
        seconds: started.elapsed().as_secs_f64(),
        peak_bytes: resident::peak_bytes(),
    })
}

fn read(dir: &Path, options: &LoadOptions) -> Result<Report> {
    let device = DeviceSpec::Cpu.open()?;
    let family = family(dir)?;
    let weights = (family.weights)(dir, options)?;
    let names: Vec<&str> = weights.names().collect();
    let by_weights = models::family_of_weights(&names, &device)?;
    if let Some((other, share)) = by_weights.filter(|(other, _)| other.name != family.name) {
        return Err(Error::new(Kind::Checkpoint, "config.json and weights are of two families")
            .at(dir.display())
            .expected(format!("tensors of {}, which config.json names", family.name))
            .found(format!("tensors of {} ({:.0} % of the names)", other.name, 100.0 * share))
            .help("put the config.json of the weights beside them"));
    }
    let model = (family.shape)(dir, options, &device)?;
    let processor = models::processor(dir, options);
    let embeddings = vocabulary_rows(&model);
    let vocabulary = processor.as_ref().ok().map(|p| p.vocab_size()).zip(embeddings);
    let machine = machine(&weights, options)?;
    Ok(Report {
        dir: dir.to_path_buf(),
        family: family.name,
        about: family.about,
        family_of_weights: by_weights.map(|(def, share)| (def.name, share)),
        preset: preset(&model, family)?,
        parameters: tower_sizes(&model),
        dtypes: dtypes(&weights),
        files: files(&weights),
        fit: compare(&model, &weights),
        tensors: tensors(&weights),
        processor: signature(processor),
        vocabulary,
        memory_to_answer: to_answer(&model, machine, LENGTH),
        memory_to_train: to_train(&model, machine)?,
        loaded: None,
    })
}

/// Tokens that the head tells apart: it is the linear module of the language tower outside its layers.
fn vocabulary_rows(model: &AnyVlm) -> Option<usize> {
    let language = |name: &str| Tower::of(model.towers(), name).is_some_and(|t| t.name == "language");
    let numbered = |name: &str| name.split('.').any(|s| s.bytes().all(|b| b.is_ascii_digit()));
    let head = |p: &NamedParam| p.linear_weight && language(&p.name) && !numbered(&p.name);
    named_params(model).into_iter().find(head).map(|p| p.shape[1])
}

/// The family that config.json names; without one, that of the weights is said.
fn family(dir: &Path) -> Result<&'static ModelDef> {
    let error = match models::detect(dir) {
        Ok(def) => return Ok(def),
        Err(error) => error,
    };
    let device = DeviceSpec::Cpu.open()?;
    let Ok(weights) = Checkpoint::open(dir) else { return Err(error) };
    match models::family_of_weights(&weights.names().collect::<Vec<_>>(), &device)? {
        Some((def, share)) => {
            let share = 100.0 * share;
            Err(error.help(format!("the weights are named like those of {} ({share:.0} % of the names)", def.name)))
        }
        None => Err(error),
    }
}

/// Training of rank [`RANK`] on the language model, with a row of [`LENGTH`] positions and one image.
fn to_train(model: &AnyVlm, machine: Machine) -> Result<Memory> {
    let config = TrainConfig { projector: TowerMode::Frozen, recompute: Recompute::Always, ..TrainConfig::default() };
    let adapter =
        AdapterConfig { r: RANK, target_modules: vec!["language:all-linear".into()], ..AdapterConfig::default() };
    let supervised = LENGTH.saturating_sub(model.tile_features());
    let load = Load { rows: 1, length: LENGTH, supervised, tiles: 1, micro_batches: 1, all_rows: 0, all_tiles: 1 };
    account(model, &config, &adapter, machine, &load)
}

/// How the CPU holds the weights.
fn machine(weights: &Checkpoint, options: &LoadOptions) -> Result<Machine> {
    let device = DeviceSpec::Cpu.open()?;
    let stored = weights.dtype().unwrap_or(DType::F32);
    let dtype = options.dtype.unwrap_or_else(|| default_dtype(weights, stored, &device));
    let held = match dtype {
        FloatDType::F32 => Held::Float32,
        kept if weights.is_mapped() && DType::from(kept) == stored => Held::Mapped,
        _ => Held::Half,
    };
    Ok(Machine { cpu: true, held })
}

fn preset(model: &AnyVlm, family: &ModelDef) -> Result<Option<&'static str>> {
    let device = DeviceSpec::Cpu.open()?;
    let shapes = |m: &AnyVlm| named_params(m).into_iter().map(|p| (p.name, p.shape)).collect::<BTreeMap<_, _>>();
    let own = shapes(model);
    for preset in family.presets {
        if shapes(&(family.empty)(preset.name, &device)?.0) == own {
            return Ok(Some(preset.name));
        }
    }
    Ok(None)
}

fn dtypes(weights: &Checkpoint) -> BTreeMap<&'static str, u64> {
    let mut found = BTreeMap::new();
    for info in weights.names().filter_map(|n| weights.info(n)) {
        *found.entry(info.dtype.name()).or_default() += info.num_bytes();
    }
    found
}

fn file_name(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

fn files(weights: &Checkpoint) -> Vec<FileReport> {
    let mut found = BTreeMap::<String, (usize, u64)>::new();
    for info in weights.names().filter_map(|n| weights.info(n)) {
        let (tensors, bytes) = found.entry(file_name(&info.file)).or_default();
        *tensors += 1;
        *bytes += info.num_bytes();
    }
    found.into_iter().map(|(file, (tensors, bytes))| FileReport { file, tensors, bytes }).collect()
}

fn tensors(weights: &Checkpoint) -> Vec<TensorReport> {
    let all = weights.names().filter_map(|name| Some((name, weights.info(name)?)));
    all.map(|(name, info)| TensorReport {
        name: name.to_string(),
        shape: info.shape.clone(),
        dtype: info.dtype.name(),
        file: file_name(&info.file),
    })
    .collect()
}

fn signature(processor: Result<Box<dyn Processor>>) -> Value {
    match processor {
        Ok(processor) => processor.signature(),
        Err(e) => serde_json::json!({ "error": e.to_string(), "help": e.help_line() }),
    }
}

impl Report {
    fn text(&self) -> String {
        let row = |name: &str, value: String| vec![name.to_string(), value];
        let sum = |m: &BTreeMap<&str, u64>| m.values().sum::<u64>();
        let agree = self.family_of_weights.map_or("its tensors have other names".into(), |(_, share)| {
            format!("config.json; {:.0} % of the tensor names agree", 100.0 * share)
        });
        let towers: Vec<String> = self.parameters.iter().map(|(name, n)| format!("{name} {}", count(*n))).collect();
        let total: usize = self.parameters.iter().map(|(_, n)| n).sum();
        let types: Vec<String> = self.dtypes.iter().map(|(name, n)| format!("{name} {}", bytes(*n))).collect();
        let mut rows = vec![
            row("family", format!("{} ({})", self.family, self.about)),
            row("known by", agree),
            row("preset", self.preset.unwrap_or("none of the same shapes").to_string()),
            row("parameters", format!("{}: {}", count(total), towers.join(", "))),
            row("types", types.join(", ")),
            row(
                "files",
                format!("{} with {} tensors, {}", self.files.len(), self.tensors.len(), bytes(sum(&self.dtypes))),
            ),
        ];
        rows.extend(
            self.files.iter().map(|f| row("", format!("{}  {} tensors, {}", f.file, f.tensors, bytes(f.bytes)))),
        );
        rows.extend(self.fit_rows());
        for (key, value) in self.processor.as_object().into_iter().flatten().filter(|(k, _)| *k != "family") {
            rows.push(row(key, value.as_str().map_or_else(|| value.to_string(), String::from)));
        }
        if let Some((ids, embeddings)) = self.vocabulary {
            rows.push(row("vocabulary", format!("{ids} ids of the tokenizer, {embeddings} embeddings")));
        }
        let (answer, train) = (&self.memory_to_answer, &self.memory_to_train);
        rows.push(row("memory", format!("{} to answer a row of {LENGTH} positions with one image", bytes(*answer))));
        rows.push(row("", format!("{} to train it, layer by layer, with r = {RANK} on all layers", bytes(train.peak))));
        if let Some(loaded) = &self.loaded {
            let peak = loaded.peak_bytes.map_or(String::new(), |n| format!(", at most {} resident", bytes(n)));
            rows.push(row("loaded", format!("as {} in {:.1} s{peak}", loaded.dtype, loaded.seconds)));
        }
        format!("{}\nevery tensor: --json", columns(&rows))
    }

    fn fit_rows(&self) -> Vec<Vec<String>> {
        let mut rows = Vec::new();
        if self.fit.is_complete() {
            rows.push(vec!["fit".to_string(), "every parameter has its tensor, and every tensor is used".to_string()]);
        }
        for (what, names) in [
            ("missing", &self.fit.missing),
            ("unused", &self.fit.unused),
            ("wrong shape", &self.fit.wrong_shape),
            ("ignored", &self.fit.ignored),
        ] {
            for (i, name) in names.iter().enumerate().take(12) {
                rows.push(vec![if i == 0 { format!("{what} {}", names.len()) } else { String::new() }, name.clone()]);
            }
        }
        rows
    }
}
