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
    adapter::merge::{self, Proof},
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
    /// The adapter as it is, beside the model.
    adapter: Option<PathBuf>,
    /// How the folded model compares with the adapted one.
    merged: Option<Proof>,
}

/// Where a model and its adapter are.
struct Source {
    model: PathBuf,
    adapter: Option<PathBuf>,
}

/// Folds an adapter into its model.
pub(super) fn fold(global: &Global, args: &MergeArgs) -> Result<()> {
    let source = Source { model: args.checkpoint.model.clone(), adapter: Some(args.adapter.clone()) };
    write(global, &source, &args.checkpoint, &args.out, SaveOptions::default())
}

/// Writes a checkpoint or the result of a run in Hugging Face layout.
pub(super) fn export(global: &Global, args: &ExportArgs) -> Result<()> {
    let source = Source::find(&args.dir, args.adapter.as_deref())?;
    let checkpoint =
        CheckpointArgs { model: source.model.clone(), vision_tower: args.vision_tower.clone(), dtype: args.dtype };
    if !args.max_shard_size.is_finite() || args.max_shard_size <= 0.0 {
        return Err(Error::new(Kind::Config, "--max-shard-size must be above 0").found(args.max_shard_size));
    }
    let max_shard_bytes = (args.max_shard_size * 1e9) as u64;
    let options = SaveOptions { max_shard_bytes, ..SaveOptions::default() };
    write(global, &source, &checkpoint, &args.out, options)
}

impl Source {
    /// A checkpoint directory, or the directory of a run with what it has trained.
    fn find(dir: &Path, adapter: Option<&Path>) -> Result<Self> {
        let is_model = |dir: &Path| dir.join("config.json").is_file();
        if is_model(dir) {
            return Ok(Self { model: dir.to_path_buf(), adapter: adapter.map(Path::to_path_buf) });
        }
        if is_model(&dir.join("model")) {
            return Ok(Self { model: dir.join("model"), adapter: adapter.map(Path::to_path_buf) });
        }
        let trained = adapter.map_or_else(|| dir.join("adapter"), Path::to_path_buf);
        if !trained.join("adapter_config.json").is_file() {
            return Err(Error::new(Kind::Checkpoint, "neither a checkpoint nor a finished run")
                .at(dir.display())
                .expected("config.json, or model/ or adapter/ of a run")
                .help("finish the training first, or give the checkpoint with `--adapter DIR`"));
        }
        let base = dir.join("base");
        let model = if is_model(&base) { base } else { base_of(&trained)? };
        Ok(Self { model, adapter: Some(trained) })
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
    let ctx = context(global)?;
    let (model, processor) = load(checkpoint, source.adapter.as_deref(), &ctx)?;
    let (model, merged) = match &source.adapter {
        Some(_) => {
            let (model, proof) = merge::merge(model, &[probe(processor.as_ref())?], &ctx.device)?;
            (model, Some(proof))
        }
        None => (model, None),
    };
    ctx.check()?;
    // A folded model is written as it was compared; another one as its checkpoint is.
    let dtype = match &merged {
        Some(_) => checkpoint.dtype.explicit().unwrap_or_else(|| held_dtype(&model)),
        None => written_dtype(checkpoint.dtype, &source.model)?,
    };
    model.save(out, &SaveOptions { dtype, ..options })?;
    copy_processor_files(&source.model, checkpoint.vision_tower.as_deref(), out)?;
    keep_config(&source.model, out)?;
    let adapter = source.adapter.as_deref().map(|a| copy_adapter(a, &out.join("adapter"))).transpose()?;
    report(global, source, out, torch_dtype(dtype), adapter, merged)
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
    adapter: Option<PathBuf>,
    merged: Option<Proof>,
) -> Result<()> {
    let mut total = 0;
    let mut files = Vec::new();
    for file in files_below(out)? {
        total += fs::metadata(&file).map_err(|e| Error::io(&file, e))?.len();
        files.push(file.strip_prefix(out).unwrap_or(&file).display().to_string());
    }
    let model = source.model.clone();
    let written = Written { out: out.to_path_buf(), model, dtype, files, bytes: total, adapter, merged };
    emit(global, &written, || {
        let mut rows = vec![
            vec!["model".into(), written.model.display().to_string()],
            vec![
                "written".into(),
                format!("{}, {} in {} files", written.out.display(), bytes(total), written.files.len()),
            ],
            vec!["type".into(), dtype.into()],
        ];
        if let Some(p) = &written.merged {
            let difference = format!("{:.2e} of logits up to {:.1}", p.max_difference, p.max_logit);
            rows.push(vec![
                "folded".into(),
                format!("the largest difference is {difference}, over {} tokens", p.tokens),
            ]);
            let same = format!("{:.1} % of next tokens are the same", 100.0 * p.same_prediction);
            rows.push(vec![String::new(), same]);
        }
        if let Some(adapter) = &written.adapter {
            rows.push(vec!["adapter".into(), adapter.display().to_string()]);
        }
        let warning = match written.merged {
            Some(p) if p.same_prediction < 1.0 => "warning: folding changes answers; `--dtype float32` rounds less\n",
            _ => "",
        };
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
