//! Whole checkpoints for other programs: an adapter folded into its model, and Hugging Face layout.

use std::{
    fs,
    path::{Path, PathBuf},
};

use burn::tensor::FloatDType;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use super::{
    bytes, columns, context, emit,
    model::{load, question},
};
use crate::{
    adapter::{
        Quantization,
        attachment::Mode,
        merge::{self, Answers, MergedAdapter, Proof, Record},
        peft::{self, AdapterRef},
    },
    cli::{CheckpointArgs, ExportArgs, Global, MergeArgs},
    error::{Error, Kind, Result},
    models::AnyVlm,
    nn::visit::named_params,
    run_dir::{files_below, json_file, read_json, write_atomic},
    stage::train::copy_processor_files,
    vlm::{Batch, Encoded, PaddingSide, Processor},
    weights::{SaveOptions, torch_dtype, written_dtype},
};

/// What was written.
#[derive(Debug, Serialize)]
struct Written {
    out: PathBuf,
    /// Directory of the base model.
    model: PathBuf,
    /// Type in the files.
    dtype: &'static str,
    files: Vec<String>,
    bytes: u64,
    /// The adapters as they are, beside the model.
    adapter: Vec<PathBuf>,
    /// How the folded model compares with the adapted one.
    merged: Option<Proof>,
    /// How the weights were held: what is written are the values that they had so.
    quantization: Quantization,
}

/// Where a model and its adapters are.
struct Source {
    model: PathBuf,
    adapters: Vec<AdapterRef>,
}

/// Folds adapters into their model.
pub(super) fn fold(global: &Global, args: &MergeArgs) -> Result<()> {
    let source = Source { model: args.checkpoint.model.clone(), adapters: args.adapter.clone() };
    write(global, &source, &args.checkpoint, &args.out, SaveOptions::default())
}

/// Writes a checkpoint or the result of a run in Hugging Face layout.
pub(super) fn export(global: &Global, args: &ExportArgs) -> Result<()> {
    let source = Source::find(&args.dir, &args.adapter)?;
    let checkpoint = CheckpointArgs {
        model: source.model.clone(),
        vision_tower: args.vision_tower.clone(),
        dtype: args.dtype,
        quantization: args.quantization,
    };
    if !args.max_shard_size.is_finite() || args.max_shard_size <= 0.0 {
        return Err(Error::new(Kind::Config, "--max-shard-size must be above 0").found(args.max_shard_size));
    }
    let max_shard_bytes = (args.max_shard_size * 1e9) as u64;
    let options = SaveOptions { max_shard_bytes, ..SaveOptions::default() };
    write(global, &source, &checkpoint, &args.out, options)
}

impl Source {
    /// A checkpoint directory, or the directory of a run with what it has trained.
    fn find(dir: &Path, adapters: &[AdapterRef]) -> Result<Self> {
        let is_model = |dir: &Path| dir.join("config.json").is_file();
        let with = |model: PathBuf| Self { model, adapters: adapters.to_vec() };
        if is_model(dir) {
            return Ok(with(dir.to_path_buf()));
        }
        if is_model(&dir.join("model")) {
            return Ok(with(dir.join("model")));
        }
        let own = [AdapterRef::from(dir.join("adapter"))];
        let adapters = if adapters.is_empty() { own.as_slice() } else { adapters };
        if !adapters[0].dir.join("adapter_config.json").is_file() {
            return Err(Error::new(Kind::Checkpoint, "neither a checkpoint nor a finished run")
                .at(dir.display())
                .expected("config.json, or model/ or adapter/ of a run")
                .help("finish the training first, or give the checkpoint with `--adapter DIR`"));
        }
        let base = dir.join("base");
        let model = if is_model(&base) { base } else { base_of(&adapters[0].dir)? };
        Ok(Self { model, adapters: adapters.to_vec() })
    }
}

/// Base model that an adapter names.
fn base_of(adapter: &Path) -> Result<PathBuf> {
    #[derive(Deserialize)]
    struct Config {
        base_model_name_or_path: Option<PathBuf>,
    }
    let path = adapter.join("adapter_config.json");
    let Config { base_model_name_or_path } = read_json(&path)?;
    base_model_name_or_path.filter(|p| p.join("config.json").is_file()).ok_or_else(|| {
        Error::new(Kind::Checkpoint, "the base model of this adapter is not here")
            .at(path.display())
            .help("give its directory: `medtune export MODEL --adapter DIR --out DIR`")
    })
}

fn write(
    global: &Global,
    source: &Source,
    checkpoint: &CheckpointArgs,
    out: &Path,
    options: SaveOptions,
) -> Result<()> {
    let staged = Staged::new(out)?;
    let packed = checkpoint.quantization != Quantization::None;
    if packed && matches!(checkpoint.dtype.explicit(), Some(FloatDType::BF16 | FloatDType::F16)) {
        return Err(Error::new(Kind::Config, "packed weights are written in float32, as they are compared")
            .at("--dtype")
            .help("leave --dtype out, or leave --quantization out to keep the weights of the checkpoint"));
    }
    let ctx = context(global)?;
    let (model, processor) = load(checkpoint, &source.adapters, &ctx)?;
    let probes = [probe(processor.as_ref())?];
    let merged = match source.adapters.as_slice() {
        [] => None,
        _ => Some(merge::prove(&model, &probes, &ctx.device)?),
    };
    ctx.check()?;
    // A folded model is written as it was compared; another one as its checkpoint is.
    let dtype = match &merged {
        _ if packed => FloatDType::F32,
        Some(_) => checkpoint.dtype.explicit().unwrap_or_else(|| held_dtype(&model)),
        None => written_dtype(checkpoint.dtype, &source.model)?,
    };
    let place = staged.place();
    model.save(place, &SaveOptions { dtype, fold: true, ..options })?;
    copy_processor_files(&source.model, checkpoint.vision_tower.as_deref(), place)?;
    keep_config(&source.model, place)?;
    let mut adapters = Vec::new();
    for (i, adapter) in source.adapters.iter().enumerate() {
        let dir =
            PathBuf::from(if source.adapters.len() == 1 { "adapter".into() } else { format!("adapter-{}", i + 1) });
        copy_adapter(&adapter.dir, &place.join(&dir))?;
        adapters.push(MergedAdapter { dir, weight: adapter.weight, sha256: peft::tensors_hash(&adapter.dir)? });
    }
    let adapter = adapters.iter().map(|a| out.join(&a.dir)).collect();
    if merged.is_some() {
        let reversible = peft::check_reversible(&model, &source.adapters).is_ok();
        let record = Record {
            base: source.model.clone(),
            quantization: checkpoint.quantization,
            adapters,
            base_answers: reversible.then(|| Answers::of(&model, Mode::Bare, &probes, &ctx.device)),
            before: record_of(&source.model)?.map(Box::new),
        };
        write_atomic(&place.join(merge::RECORD), &json_file(&record)?)?;
    }
    staged.settle()?;
    report(global, source, out, torch_dtype(dtype), adapter, merged, checkpoint.quantization)
}

/// What was merged into the checkpoint in `dir`, if that is recorded.
pub(super) fn record_of(dir: &Path) -> Result<Option<Record>> {
    let path = dir.join(merge::RECORD);
    path.is_file().then(|| read_json(&path)).transpose()
}

/// A directory that appears whole.
pub(super) struct Staged<'a> {
    out: &'a Path,
    place: PathBuf,
}

impl<'a> Staged<'a> {
    /// For `out`, which must not hold anything yet. What an interrupted attempt has left is removed.
    pub(super) fn new(out: &'a Path) -> Result<Self> {
        let there = |what: &str| {
            Error::new(Kind::Run, what)
                .at(out.display())
                .help("remove it, or choose another directory with `--out DIR`")
        };
        if out.join("config.json").exists() {
            return Err(there("there is a checkpoint already"));
        }
        if out.exists() && !out.is_dir() {
            return Err(there("there is something already that is no directory"));
        }
        if fs::read_dir(out).is_ok_and(|mut entries| entries.next().is_some()) {
            return Err(there("the directory is not empty"));
        }
        let name = out.file_name().map_or_else(|| "out".into(), |n| n.to_string_lossy().into_owned());
        let place = out.with_file_name(format!(".tmp-{name}"));
        if place.exists() {
            fs::remove_dir_all(&place).map_err(|e| Error::io(&place, e))?;
        }
        Ok(Self { out, place })
    }

    /// Where it is written.
    pub(super) fn place(&self) -> &Path {
        &self.place
    }

    /// Puts it where it belongs.
    pub(super) fn settle(self) -> Result<()> {
        if self.out.exists() {
            fs::remove_dir(self.out).map_err(|e| Error::io(self.out, e))?;
        }
        fs::rename(&self.place, self.out).map_err(|e| Error::io(self.out, e))
    }
}

/// Type of the weights in memory.
pub(super) fn held_dtype(model: &AnyVlm) -> FloatDType {
    let held = named_params(model).into_iter().filter(|p| p.linear_weight).find_map(|p| p.dtype);
    held.map_or(FloatDType::F32, FloatDType::from)
}

/// Puts the base's own configuration in the place of the written one, with what has changed: type of the weights, ranks
/// of adapters that are folded now, and keys that only this program adds. Other programs read keys that this one ignores.
pub(super) fn keep_config(base: &Path, out: &Path) -> Result<()> {
    const CHANGED: [&str; 3] = ["torch_dtype", "use_llm_lora", "use_backbone_lora"];
    let path = out.join("config.json");
    let (mut config, written): (Map<String, Value>, Map<String, Value>) =
        (read_json(&base.join("config.json"))?, read_json(&path)?);
    let dtype = written.get("torch_dtype").and_then(Value::as_str).unwrap_or_default().to_string();
    for (key, value) in written {
        if CHANGED.contains(&key.as_str()) || !config.contains_key(&key) {
            config.insert(key, value);
        }
    }
    for (key, name) in [("bf16", "bfloat16"), ("fp16", "float16"), ("fp32", "float32")] {
        if let Some(value) = config.get_mut(key) {
            *value = json!(dtype == name);
        }
    }
    if let Some(language) = config.get_mut("llm_config").and_then(Value::as_object_mut) {
        language.insert("torch_dtype".into(), json!(dtype));
    }
    let generation = base.join("generation_config.json");
    if generation.is_file() {
        let copy = out.join("generation_config.json");
        fs::copy(&generation, &copy).map_err(|e| Error::io(&copy, e))?;
    }
    write_atomic(&path, &json_file(&config)?)
}

fn copy_adapter(from: &Path, to: &Path) -> Result<()> {
    fs::create_dir_all(to).map_err(|e| Error::io(to, e))?;
    for file in files_below(from)?.iter().filter(|f| f.parent() == Some(from)) {
        let copy = to.join(file.file_name().unwrap_or_default());
        fs::copy(file, &copy).map_err(|e| Error::io(&copy, e))?;
    }
    Ok(())
}

fn report(
    global: &Global,
    source: &Source,
    out: &Path,
    dtype: &'static str,
    adapter: Vec<PathBuf>,
    merged: Option<Proof>,
    quantization: Quantization,
) -> Result<()> {
    let (files, total) = contents(out)?;
    let model = source.model.clone();
    let written = Written { out: out.to_path_buf(), model, dtype, files, bytes: total, adapter, merged, quantization };
    emit(global, &written, || {
        let mut rows = vec![
            vec!["model".into(), written.model.display().to_string()],
            vec![
                "written".into(),
                format!("{}, {} in {} files", written.out.display(), bytes(total), written.files.len()),
            ],
            vec!["type".into(), dtype.into()],
        ];
        if quantization != Quantization::None {
            let values = "the language model has the values of its packed weights, not those of the checkpoint";
            rows.push(vec!["weights".into(), values.into()]);
        }
        if let Some(p) = &written.merged {
            rows.extend(proof_rows("folded", p));
        }
        for adapter in &written.adapter {
            rows.push(vec!["adapter".into(), adapter.display().to_string()]);
        }
        let warning = written.merged.and_then(|p| p.warning()).map_or(String::new(), |w| format!("warning: {w}\n"));
        format!("{}{warning}", columns(&rows))
    })
}

/// What a proof found.
pub(super) fn proof_rows(name: &str, p: &Proof) -> [Vec<String>; 2] {
    let difference = format!("{:.2e} of logits up to {:.1}", p.max_difference, p.max_logit);
    let same = format!("{:.1} % of next tokens are the same", 100.0 * p.same_prediction);
    [
        vec![name.into(), format!("the largest difference is {difference}, over {} tokens", p.tokens)],
        vec![String::new(), same],
    ]
}

/// Files below `dir`, by their paths in it, and their bytes.
pub(super) fn contents(dir: &Path) -> Result<(Vec<String>, u64)> {
    let (mut files, mut total) = (Vec::new(), 0);
    for file in files_below(dir)? {
        total += fs::metadata(&file).map_err(|e| Error::io(&file, e))?.len();
        files.push(file.strip_prefix(dir).unwrap_or(&file).display().to_string());
    }
    Ok((files, total))
}

/// Rows on which the merged model must agree with the adapted one: with an image and without.
pub(super) fn probe(processor: &dyn Processor) -> Result<Batch> {
    let dir = tempfile::tempdir().map_err(|e| Error::io(std::env::temp_dir(), e))?;
    let path = dir.path().join("probe.png");
    let ramp = image::RgbImage::from_fn(96, 64, |x, y| image::Rgb([(2 * x) as u8, (3 * y) as u8, (x + y) as u8]));
    ramp.save(&path).map_err(|e| Error::new(Kind::Image, "cannot write the probe image").source(e))?;
    let rows = [
        question(&[&path], "Describe this image."),
        question(&[&path], "Is there a nodule in the left lung?"),
        question(&[] as &[&Path], "What is pneumonia?"),
    ];
    let rows: Vec<Encoded> = rows.iter().map(|row| processor.prompt(row)).collect::<Result<_>>()?;
    Ok(Batch::collate(&rows, processor.pad_id(), PaddingSide::Right, 1))
}
