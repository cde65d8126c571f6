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

use super::{Ctx, Summary, encode::base_dir};
use crate::{
    adapter::{inject, merge, peft},
    error::{Error, Kind, Result},
    loader::{Rejected, Rows},
    models::{self, AnyVlm, LoadOptions, ModelConfig},
    plan::Plan,
    progress::Progress,
    run_dir::{self, RunDir},
    sample::{Sample, Split},
    train::{
        TowerMode, TrainConfig,
        checkpoint::Best,
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
    let samples: Vec<Sample> = dir.read_jsonl("kept.jsonl")?;
    let split = |split| samples.iter().filter(|s| s.split == split).cloned().collect::<Vec<_>>();
    let (training, validation) = (split(Split::Train), split(Split::Validation));
    let rows_in = training.len();
    let (rows, rejected) = survey("read training rows", training, processor.as_ref(), &plan.train, ctx.progress);
    assert_eq!(rows_in, rows.lengths.len() + rejected.len(), "a row was lost before training");
    if rows.lengths.is_empty() {
        return Err(Error::new(Kind::Data, "no row to train on").found(format!("{rows_in} rows, all rejected")));
    }
    let (validation, _) = survey("read validation rows", validation, processor.as_ref(), &plan.train, ctx.progress);
    let (model, pages) = load_model(plan, &base, options, &ctx.device)?;
    let job = Job {
        config: &plan.train,
        adapter: &plan.adapter,
        seed: plan.seed,
        dir,
        ctx,
        fingerprint: fingerprint(plan, dir, &base, processor.as_ref())?,
        pages,
    };
    let finished = train(&job, model, &rows, &validation)?;
    let output = write(plan, dir, ctx, &base, processor.as_ref(), &finished)?;
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
        tokens: finished.state.tokens,
        trainable_parameters: finished.trained.iter().map(Trained::len).sum(),
        coverage: finished.coverage.towers.iter().map(|(t, a, n)| ((*t).to_string(), *a, *n)).collect(),
        seconds: started.elapsed().as_secs_f64(),
        output: output.to_string(),
    };
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
        return Ok(((family.load)(base, &options, device)?, None));
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
    Ok((model, Some(pages)))
}

fn survey<'a>(
    what: &str,
    samples: Vec<Sample>,
    processor: &'a dyn Processor,
    config: &TrainConfig,
    progress: Progress,
) -> (Rows<'a>, Vec<Rejected>) {
    let task = Mutex::new(progress.start(what, samples.len() as u64));
    let done = || task.lock().map_or_else(|e| e.into_inner().advance(1), |mut t| t.advance(1));
    let outcome = Rows::survey(samples, processor, config.max_length, done);
    if let Ok(task) = task.into_inner() {
        task.finish();
    }
    outcome
}

/// Hash of everything that decides the trained weights. Weights are told apart by name and size; their content is
/// hashed where the stage's inputs are compared.
fn fingerprint(plan: &Plan, dir: &RunDir, base: &Path, processor: &dyn Processor) -> Result<String> {
    let mut files = Vec::new();
    for path in run_dir::files_below(base)? {
        let size = fs::metadata(&path).map_err(|e| Error::io(&path, e))?.len();
        files.push((path.strip_prefix(base).unwrap_or(&path).to_path_buf(), size));
    }
    // How often is logged and saved, and by how many threads rows are read, changes no weight.
    let train = TrainConfig {
        logging_steps: 1,
        save_steps: 0,
        save_total_limit: 1,
        dataloader_num_workers: 1,
        offload_params: false,
        offload_activations: false,
        ..plan.train.clone()
    };
    let all = json!({
        "version": env!("CARGO_PKG_VERSION"),
        "seed": plan.seed,
        "model": plan.model,
        "adapter": plan.adapter,
        "train": train,
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
    ctx: &Ctx,
    base: &Path,
    processor: &dyn Processor,
    finished: &Finished<AnyVlm>,
) -> Result<&'static str> {
    if plan.train.language == TowerMode::Full {
        write_model(dir, ctx, base, &plan.model, finished)?;
        return Ok("model");
    }
    let notes = [
        ("recipe".to_string(), plan.recipe.clone()),
        ("steps".to_string(), finished.weights_of_step.to_string()),
        ("seed".to_string(), plan.seed.to_string()),
    ];
    let name = plan.model.checkpoint.as_deref().unwrap_or(base).display().to_string();
    let signature = processor.signature();
    let info = peft::AdapterInfo { config: &plan.adapter, base: &name, signature: &signature, notes: &notes };
    let towers = finished.model.towers();
    peft::save(&finished.model, &finished.trained, towers, &info, &dir.path("adapter"))?;
    Ok("adapter")
}

/// A whole checkpoint in Hugging Face layout, with the processor's files of the base. It appears whole.
fn write_model(dir: &RunDir, ctx: &Ctx, base: &Path, config: &ModelConfig, finished: &Finished<AnyVlm>) -> Result<()> {
    let mut model = finished.model.valid();
    if finished.trained.iter().any(|t| t.lora) {
        (model, _) = merge::merge(model, &[], &ctx.device)?;
    }
    let (place, beside) = (dir.path("model"), dir.path(".tmp-model"));
    dir.remove(".tmp-model")?;
    model.save(&beside, &SaveOptions { dtype: written_dtype(config.dtype, base)?, ..SaveOptions::default() })?;
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

/// Estimates a training of `rows` rows; `model` may be without weights.
///
/// # Errors
/// A target pattern cannot be understood or matches nothing.
pub fn estimate(plan: &Plan, model: &AnyVlm, rows: usize) -> Result<Estimate> {
    let sizes = inject::sizes(model, &plan.train, &plan.adapter)?;
    let steps = plan.train.total_steps(rows);
    Ok(Estimate {
        steps,
        warmup_steps: plan.train.warmup(steps),
        epochs: steps as f64 / plan.train.steps_per_epoch(rows).max(1) as f64,
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
    if report.stopped_early {
        summary.line("stopped early", "yes");
    }
    summary.line("written", format!("{}/", report.output));
    summary
}
