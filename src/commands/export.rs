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
        merge::{self, Proof},
        peft::AdapterRef,
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
    if out.join("config.json").exists() {
        return Err(Error::new(Kind::Run, "there is a checkpoint already")
            .at(out.display())
            .help("remove it, or choose another directory with `--out DIR`"));
    }
    let packed = checkpoint.quantization != Quantization::None;
    if packed && matches!(checkpoint.dtype.explicit(), Some(FloatDType::BF16 | FloatDType::F16)) {
        return Err(Error::new(Kind::Config, "packed weights are written in float32, as they are compared")
            .at("--dtype")
            .help("leave --dtype out, or leave --quantization out to keep the weights of the checkpoint"));
    }
    let ctx = context(global)?;
    let (model, processor) = load(checkpoint, &source.adapters, &ctx)?;
    let merged = match source.adapters.as_slice() {
        [] => None,
        _ => Some(merge::prove(&model, &[probe(processor.as_ref())?], &ctx.device)?),
    };
    ctx.check()?;
    // A folded model is written as it was compared; another one as its checkpoint is.
    let dtype = match &merged {
        _ if packed => FloatDType::F32,
        Some(_) => checkpoint.dtype.explicit().unwrap_or_else(|| held_dtype(&model)),
        None => written_dtype(checkpoint.dtype, &source.model)?,
    };
    model.save(out, &SaveOptions { dtype, fold: true, ..options })?;
    copy_processor_files(&source.model, checkpoint.vision_tower.as_deref(), out)?;
    keep_config(&source.model, out)?;
    let place = |i: usize| if source.adapters.len() == 1 { "adapter".into() } else { format!("adapter-{}", i + 1) };
    let adapters = source.adapters.iter().enumerate();
    let adapter = adapters.map(|(i, a)| copy_adapter(&a.dir, &out.join(place(i)))).collect::<Result<Vec<_>>>()?;
    report(global, source, out, torch_dtype(dtype), adapter, merged, checkpoint.quantization)
}

/// Type of the weights in memory.
fn held_dtype(model: &AnyVlm) -> FloatDType {
    let held = named_params(model).into_iter().filter(|p| p.linear_weight).find_map(|p| p.dtype);
    held.map_or(FloatDType::F32, FloatDType::from)
}

/// Puts the base's own configuration in the place of the written one, with what has changed: type of the weights, ranks
/// of adapters that are folded now, and keys that only this program adds. Other programs read keys that this one ignores.
fn keep_config(base: &Path, out: &Path) -> Result<()> {
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

fn copy_adapter(from: &Path, to: &Path) -> Result<PathBuf> {
    fs::create_dir_all(to).map_err(|e| Error::io(to, e))?;
    for file in files_below(from)?.iter().filter(|f| f.parent() == Some(from)) {
        let copy = to.join(file.file_name().unwrap_or_default());
        fs::copy(file, &copy).map_err(|e| Error::io(&copy, e))?;
    }
    Ok(to.to_path_buf())
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
    let mut total = 0;
    let mut files = Vec::new();
    for file in files_below(out)? {
        total += fs::metadata(&file).map_err(|e| Error::io(&file, e))?.len();
        files.push(file.strip_prefix(out).unwrap_or(&file).display().to_string());
    }
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
            let difference = format!("{:.2e} of logits up to {:.1}", p.max_difference, p.max_logit);
            rows.push(vec![
                "folded".into(),
                format!("the largest difference is {difference}, over {} tokens", p.tokens),
            ]);
            let same = format!("{:.1} % of next tokens are the same", 100.0 * p.same_prediction);
            rows.push(vec![String::new(), same]);
        }
        for adapter in &written.adapter {
            rows.push(vec!["adapter".into(), adapter.display().to_string()]);
        }
        let warning = written.merged.and_then(|p| p.warning()).map_or(String::new(), |w| format!("warning: {w}\n"));
        format!("{}{warning}", columns(&rows))
    })
}

/// Rows on which the merged model must agree with the adapted one: with an image and without.
fn probe(processor: &dyn Processor) -> Result<Batch> {
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
