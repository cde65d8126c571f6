//! Trains on the kept rows of the train split: `adapter/`, or `model/` when the language model is trained in full.
//!
//! The same command continues an interrupted training from its newest checkpoint. `train.json` has the numbers.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::Mutex,
    time::Instant,
};

use burn::{
    module::Module,
    tensor::{DType, Device, FloatDType},
};
use serde::{Deserialize, Serialize};
use serde_json::json;

use super::{Ctx, Summary, encode::base_dir, report::chart};
use crate::{
    adapter::{Quantization, inject, peft},
    error::{Error, Kind, Result},
    export::preference,
    loader::{Rejected, Rows},
    models::{self, AnyVlm, LoadOptions, ModelConfig, ModelDef},
    parallel::{CHUNK, ordered},
    plan::Plan,
    progress::Progress,
    run_dir::{self, Lines, RunDir},
    sample::{Sample, Split},
    train::{
        ObjectiveType, TowerMode,
        checkpoint::Best,
        log,
        params::Trained,
        trainer::{Finished, Job, train},
    },
    vlm::{Processor, Vlm},
    weights::{Pages, SaveOptions, keeps_half, written_dtype},
};

/// `train.json`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TrainReport {
    /// Rows of the train split.
    pub rows_in: usize,
    /// Rows trained on.
    pub rows_trained: usize,
    /// Rows left out.
    pub rows_rejected: usize,
    /// Why, by id.
    pub rejected: Vec<(String, String)>,
    /// Rows of the validation split that are evaluated.
    pub validation_rows: usize,
    /// Optimizer steps.
    pub steps: usize,
    /// Step whose weights were kept.
    pub weights_of_step: usize,
    /// The best evaluation.
    pub best: Option<Best>,
    /// Whether training ended early.
    pub stopped_early: bool,
    /// Steps whose update was left out because their loss was a spike.
    #[serde(default)]
    pub skipped_steps: usize,
    /// Real tokens trained on, images included.
    pub tokens: u64,
    /// Trained parameters.
    pub trainable_parameters: usize,
    /// Tower, adapted linear modules, all its linear modules.
    pub coverage: Vec<(String, usize, usize)>,
    /// Seconds of the last attempt.
    pub seconds: f64,
    /// `adapter` or `model`.
    pub output: String,
}

/// Trains, or continues.
///
/// # Errors
/// No row to train on, a base model that cannot be loaded, a bad target pattern, a loss or gradient that is not finite,
/// an unwritable directory, or an interruption.
pub fn run(plan: &Plan, dir: &RunDir, ctx: &Ctx) -> Result<Summary> {
    let started = Instant::now();
    let base = base_dir(plan, dir)?;
    let options = LoadOptions { progress: ctx.progress, ..plan.model.load_options() };
    let processor = models::processor(&base, &options)?;
    let (rows, rejected) = survey(Split::Train, plan, dir, processor.as_ref(), ctx.progress)?;
    let rows_in = rows.lengths.len() + rejected.len();
    if rows.lengths.is_empty() {
        let (what, help) = match plan.train.objective {
            ObjectiveType::Sft => ("no row to train on", "train.json and rejected.jsonl say why rows were left out"),
            ObjectiveType::Dpo => (
                "no preference pair to train on",
                "a pair is a kept answer and one that quality control rejected for what it says; or name train.preference_data",
            ),
        };
        return Err(Error::new(Kind::Data, what).found(format!("{rows_in}, all rejected")).help(help));
    }
    let (validation, _) = survey(Split::Validation, plan, dir, processor.as_ref(), ctx.progress)?;
    if let Some(adapter) = &plan.adapter.adapter_name_or_path {
        peft::check_signature(adapter, &processor.signature())?;
    }
    let (model, pages) = load_model(plan, &base, options, &ctx.device)?;
    let adapter = plan.adapter_config();
    let job = Job {
        config: &plan.train,
        adapter: &adapter,
        seed: plan.seed,
        dir,
        ctx,
        fingerprint: fingerprint(plan, dir, &base, processor.as_ref())?,
        pages,
        log: log_targets(plan, dir, ctx)?,
    };
    let finished = train(&job, model, &rows, &validation)?;
    let output = write(plan, dir, &base, processor.as_ref(), &finished)?;
    let report = TrainReport {
        rows_in,
        rows_trained: rows.lengths.len(),
        rows_rejected: rejected.len(),
        rejected: rejected.into_iter().map(|Rejected { id, reason }| (id, reason)).collect(),
        validation_rows: validation.lengths.len(),
        steps: finished.state.step,
        weights_of_step: finished.weights_of_step,
        best: finished.state.best,
        stopped_early: finished.state.stopped_early,
        skipped_steps: finished.state.skipped_steps,
        tokens: finished.state.tokens,
        trainable_parameters: finished.trained.iter().map(Trained::len).sum(),
        coverage: finished.coverage.towers.iter().map(|(t, a, n)| ((*t).to_string(), *a, *n)).collect(),
        seconds: started.elapsed().as_secs_f64(),
        output: output.to_string(),
    };
    if let Some(svg) = chart::loss_file(&dir.read_jsonl(log::FILE)?) {
        dir.write("loss.svg", svg.as_bytes())?;
    }
    dir.write_json("train.json", &report)?;
    Ok(summary(&report))
}

/// Loads the model that is trained, and says which of its weights stay in their file.
///
/// # Errors
/// A checkpoint that cannot be loaded, or weights that cannot stay on disk although they should.
pub fn load_model(
    plan: &Plan,
    base: &Path,
    mut options: LoadOptions,
    device: &Device,
) -> Result<(AnyVlm, Option<Pages>)> {
    let family = models::detect(base)?;
    if !plan.train.offload_params {
        let streamed = match plan.model.quantization {
            Quantization::None => None,
            _ => to_pack(family, base, &mut options, device)?,
        };
        let model = (family.load)(base, &options, device)?;
        drop(streamed);
        return Ok((model, None));
    }
    let cannot = |why: &str| {
        Error::new(Kind::Config, "weights cannot stay on disk")
            .at("train.offload_params")
            .expected("a checkpoint of bfloat16 or float16 that is trained on the CPU in that type")
            .found(why)
    };
    if !keeps_half(device) {
        return Err(cannot("another device"));
    }
    let checkpoint = (family.weights)(base, &options)?;
    let stored = checkpoint.dtype().filter(|d| matches!(d, DType::BF16 | DType::F16)).map(FloatDType::from);
    let stored = stored.ok_or_else(|| cannot("weights stored in float32"))?;
    if options.dtype.is_some_and(|wanted| wanted != stored) {
        return Err(cannot("another type as model.dtype"));
    }
    options.dtype = Some(stored);
    let towers = (family.shape)(base, &options, device)?.towers();
    let pages = Pages::of(&checkpoint, towers)?;
    let model = (family.load)(base, &options, device)?;
    // Norms and biases have been copied; nothing else has been used.
    pages.release_all();
    let packed = plan.model.quantization != Quantization::None;
    Ok((model, Some(if packed { pages.without_layers() } else { pages })))
}

/// Weights that are packed are read once: where they can be used as they lie in their file, they are not read before, and
/// not widened. Returns what must be open until the model is loaded.
fn to_pack(family: &ModelDef, base: &Path, options: &mut LoadOptions, device: &Device) -> Result<Option<Pages>> {
    let checkpoint = (family.weights)(base, options)?;
    let stored = checkpoint.dtype().filter(|d| matches!(d, DType::BF16 | DType::F16)).map(FloatDType::from);
    let Some(stored) = stored.filter(|_| keeps_half(device) && checkpoint.is_mapped()) else { return Ok(None) };
    if options.dtype.is_some_and(|wanted| wanted != stored) {
        return Ok(None);
    }
    options.dtype = Some(stored);
    let towers = (family.shape)(base, options, device)?.towers();
    Ok(Some(Pages::of(&checkpoint, towers)?))
}

fn survey<'a>(
    split: Split,
    plan: &Plan,
    dir: &RunDir,
    processor: &'a dyn Processor,
    progress: Progress,
) -> Result<(Rows<'a>, Vec<Rejected>)> {
    let kept = dir.path("kept.jsonl");
    let max_length = plan.train.max_length;
    let pairs = match plan.train.objective {
        ObjectiveType::Sft => None,
        ObjectiveType::Dpo => Some(preference_pairs(plan, dir.root(), split)?),
    };
    let total = match &pairs {
        Some(pairs) => pairs.len(),
        None => count_split(&kept, split)?,
    };
    let name = if split == Split::Train { "read training rows" } else { "read validation rows" };
    let task = Mutex::new(progress.start(name, total as u64));
    let done = || task.lock().map_or_else(|e| e.into_inner().advance(1), |mut t| t.advance(1));
    let outcome = match pairs {
        Some(pairs) => Rows::survey_pairs(pairs, processor, max_length, done),
        None => Rows::survey_file(&kept, split, processor, max_length, done)?,
    };
    assert_eq!(total, outcome.0.lengths.len() + outcome.1.len(), "a row was lost before training");
    if let Ok(task) = task.into_inner() {
        task.finish();
    }
    Ok(outcome)
}

fn count_split(kept: &Path, split: Split) -> Result<usize> {
    #[derive(Deserialize)]
    struct Row {
        #[serde(default)]
        split: Split,
    }
    let rows = ordered(Lines::open(kept)?, CHUNK, |line| Ok(line?.parse::<Row>(kept)?.split == split));
    rows.map(|own: Result<bool>| own.map(usize::from)).sum()
}

/// Pairs of a chosen and a rejected answer of one split: those of the plan's file, or of the run in `run` itself.
///
/// # Errors
/// A file cannot be read, or a line is no pair.
pub fn preference_pairs(plan: &Plan, run: &Path, split: Split) -> Result<Vec<[Sample; 2]>> {
    let mut pairs = match &plan.train.preference_data {
        Some(file) => preference::read(file)?,
        None => {
            let mut pairs = Vec::new();
            preference::pairs(run, |chosen, rejected| {
                pairs.push(preference::samples(chosen, &rejected));
                Ok(())
            })?;
            pairs
        }
    };
    pairs.retain(|[chosen, _]| chosen.split == split);
    Ok(pairs)
}

fn log_targets(plan: &Plan, dir: &RunDir, ctx: &Ctx) -> Result<log::Targets> {
    let name = dir.root().file_name().map_or_else(|| plan.recipe.clone(), |n| n.to_string_lossy().into_owned());
    let mlflow = log::mlflow::Target::of(&plan.log, &name, parameters(plan), ctx.progress)?;
    Ok(log::Targets { tensorboard: plan.log.tensorboard, mlflow })
}

/// The settings of a training, flat, as a tracking server wants them.
fn parameters(plan: &Plan) -> Vec<(String, String)> {
    fn flatten(prefix: &str, value: &serde_json::Value, out: &mut Vec<(String, String)>) {
        match value {
            serde_json::Value::Object(map) => {
                map.iter().for_each(|(key, value)| flatten(&format!("{prefix}.{key}"), value, out));
            }
            serde_json::Value::Null => {}
            serde_json::Value::String(text) => out.push((prefix.to_string(), text.clone())),
            other => out.push((prefix.to_string(), other.to_string())),
        }
    }
    let mut out = vec![("recipe".to_string(), plan.recipe.clone()), ("seed".to_string(), plan.seed.to_string())];
    for (section, value) in
        [("model", json!(plan.model)), ("adapter", json!(plan.adapter)), ("train", json!(plan.train))]
    {
        flatten(section, &value, &mut out);
    }
    out
}

/// Hash of everything that decides the trained weights. Weights are told apart by name and size; their content is
/// hashed where the stage's inputs are compared.
fn fingerprint(plan: &Plan, dir: &RunDir, base: &Path, processor: &dyn Processor) -> Result<String> {
    let mut files = Vec::new();
    for path in run_dir::files_below(base)? {
        let size = fs::metadata(&path).map_err(|e| Error::io(&path, e))?.len();
        files.push((path.strip_prefix(base).unwrap_or(&path).to_path_buf(), size));
    }
    let continued = plan.adapter.adapter_name_or_path.as_deref().map(run_dir::files_below).transpose()?;
    let continued: Vec<String> =
        continued.into_iter().flatten().map(|file| run_dir::sha256(&file)).collect::<Result<_>>()?;
    let pairs = match (plan.train.objective, &plan.train.preference_data) {
        (ObjectiveType::Sft, _) => None,
        (ObjectiveType::Dpo, Some(file)) => Some(run_dir::sha256(file)?),
        (ObjectiveType::Dpo, None) => Some(run_dir::sha256(&dir.path("rejected.jsonl"))?),
    };
    let all = json!({
        "version": env!("CARGO_PKG_VERSION"),
        "seed": plan.seed,
        "model": plan.model,
        "adapter": plan.adapter,
        "continued": continued,
        "train": plan.train.deciding(),
        "pairs": pairs,
        "rows": run_dir::sha256(&dir.path("kept.jsonl"))?,
        "base": files,
        "config": run_dir::sha256(&base.join("config.json"))?,
        "signature": processor.signature(),
    });
    Ok(run_dir::sha256_bytes(all.to_string().as_bytes()))
}

/// Writes the result and returns the name of its directory.
fn write(
    plan: &Plan,
    dir: &RunDir,
    base: &Path,
    processor: &dyn Processor,
    finished: &Finished<AnyVlm>,
) -> Result<&'static str> {
    if plan.train.language == TowerMode::Full {
        write_model(dir, base, &plan.model, finished)?;
        return Ok("model");
    }
    let notes = [
        ("recipe".to_string(), plan.recipe.clone()),
        ("steps".to_string(), finished.weights_of_step.to_string()),
        ("seed".to_string(), plan.seed.to_string()),
    ];
    let name = plan.model.checkpoint.as_deref().unwrap_or(base).display().to_string();
    let signature = processor.signature();
    let adapter = peft::resolved(&plan.adapter)?;
    let info = peft::AdapterInfo { config: &adapter, base: &name, signature: &signature, notes: &notes };
    let towers = finished.model.towers();
    peft::save(&finished.model, &finished.trained, towers, &info, &dir.path("adapter"))?;
    Ok("adapter")
}

/// A whole checkpoint in Hugging Face layout, with the processor's files of the base. It appears whole.
fn write_model(dir: &RunDir, base: &Path, config: &ModelConfig, finished: &Finished<AnyVlm>) -> Result<()> {
    let model = finished.model.valid();
    let (place, beside) = (dir.path("model"), dir.path(".tmp-model"));
    dir.remove(".tmp-model")?;
    model.save(
        &beside,
        &SaveOptions { dtype: written_dtype(config.dtype, base)?, fold: true, ..SaveOptions::default() },
    )?;
    copy_processor_files(base, config.vision_tower.as_deref(), &beside)?;
    dir.remove("model")?;
    fs::rename(&beside, &place).map_err(|e| Error::io(&place, e))
}

/// Copies tokenizer and image rules of a checkpoint (and of a separate vision tower) beside weights that were written
/// to `target`. What is there already stays.
///
/// # Errors
/// A directory cannot be read or written.
pub fn copy_processor_files(base: &Path, vision_tower: Option<&Path>, target: &Path) -> Result<()> {
    for source in [Some(base), vision_tower].into_iter().flatten() {
        for file in processor_files(source)? {
            let copy = target.join(file.file_name().unwrap_or_default());
            if !copy.exists() {
                fs::copy(&file, &copy).map_err(|e| Error::io(&copy, e))?;
            }
        }
    }
    Ok(())
}

/// Files of a checkpoint directory besides config and weights.
fn processor_files(dir: &Path) -> Result<Vec<PathBuf>> {
    let entries = fs::read_dir(dir).map_err(|e| Error::io(dir, e))?;
    let mut files: Vec<PathBuf> = entries.flatten().map(|e| e.path()).filter(|p| p.is_file()).collect();
    files.retain(|p| {
        let name = p.file_name().unwrap_or_default().to_string_lossy();
        let weights = [".safetensors", ".bin", ".index.json"].iter().any(|end| name.ends_with(end));
        !weights && !name.starts_with('.') && name != "config.json" && name != "generation_config.json"
    });
    files.sort();
    Ok(files)
}

/// What a training will do, from shapes alone.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Estimate {
    /// Optimizer steps.
    pub steps: usize,
    /// Steps of the warm-up.
    pub warmup_steps: usize,
    /// Passes over the rows.
    pub epochs: f64,
    /// Trained parameters.
    pub trainable_parameters: usize,
    /// Parameters of the model.
    pub parameters: usize,
    /// Tower, adapted linear modules, all its linear modules.
    pub coverage: Vec<(&'static str, usize, usize)>,
}

/// Estimates a training of `rows` rows of `mean_length` positions; `model` may be without weights.
///
/// # Errors
/// A target pattern cannot be understood or matches nothing.
pub fn estimate(plan: &Plan, model: &AnyVlm, rows: usize, mean_length: f64) -> Result<Estimate> {
    let sizes = inject::sizes(model, &plan.train, &plan.adapter)?;
    let sequences = match plan.train.packing {
        true => (rows as f64 * mean_length / plan.train.packed_positions().max(1) as f64).ceil() as usize,
        false => rows,
    };
    let batches = sequences.div_ceil(plan.train.per_device_train_batch_size);
    let steps_per_epoch = batches.div_ceil(plan.train.gradient_accumulation_steps);
    let steps = plan.train.total_steps(steps_per_epoch);
    Ok(Estimate {
        steps,
        warmup_steps: plan.train.warmup(steps),
        epochs: steps as f64 / steps_per_epoch.max(1) as f64,
        trainable_parameters: sizes.trained,
        parameters: sizes.all,
        coverage: sizes.coverage.towers,
    })
}

fn summary(report: &TrainReport) -> Summary {
    let mut summary = Summary::default();
    summary.line("rows in", report.rows_in);
    summary.line("trained", report.rows_trained).line("rejected", report.rows_rejected);
    summary.line("trainable parameters", report.trainable_parameters);
    for (tower, adapted, all) in &report.coverage {
        summary.line(&format!("  {tower}"), format!("{adapted} of {all} linear modules adapted"));
    }
    summary.line("steps", report.steps).line("tokens", report.tokens);
    if let Some(best) = report.best {
        summary.line("best validation loss", format!("{:.4} at step {}", best.eval_loss, best.step));
    }
    if report.skipped_steps > 0 {
        summary.line("steps left out as loss spikes", report.skipped_steps);
    }
    if report.stopped_early {
        summary.line("stopped early", "yes");
    }
    summary.line("written", format!("{}/", report.output));
    summary
}
