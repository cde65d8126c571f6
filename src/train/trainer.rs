//! The loop: steps, evaluations, checkpoints, and the ways out.

use std::{
    collections::{BTreeMap, HashMap},
    path::PathBuf,
};

use burn::{
    module::Module,
    tensor::{DType, Device, Tensor},
};

use super::{
    checkpoint::{self, Best, Loaded, State},
    clip::{clip_factor, global_norm},
    config::{LossReduction, ObjectiveType, Recompute, TowerMode, TrainConfig},
    diagnose,
    features::FeatureCache,
    live::Live,
    log::{self, Log, LogLine, hf_state, mlflow::End},
    loss::{Loss, Targets},
    meter::Meter,
    objective::{Objective, Pair, Preference, is_chosen, row_logps},
    optimizer::AdamW,
    params::{self, GradientSum, Trained},
    schedule::Schedule,
    step::{self, Saving, Vision},
};
use crate::{
    adapter::{AdapterConfig, inject::prepare, lora::DropoutClock, target::Coverage},
    batching::Batching,
    error::{Error, Kind, Result},
    loader::{Loader, Rows, StepRows},
    run_dir::{RunDir, json_file},
    stage::Ctx,
    vlm::{Batch, Vlm},
    weights::Pages,
};

/// Above this estimate of kept activations, `recompute = "auto"` recomputes.
pub(super) const ACTIVATION_BYTES: u64 = 1 << 30;

/// Spikes in a row after which a training is given up: its loss will not come back.
const MOST_SKIPPED: usize = 10;

/// What a training depends on besides model and rows.
pub struct Job<'a> {
    /// `[train]`
    pub config: &'a TrainConfig,
    /// `[adapter]`
    pub adapter: &'a AdapterConfig,
    /// Seed of every draw.
    pub seed: u64,
    /// Where checkpoints and log go.
    pub dir: &'a RunDir,
    /// Device, progress, interruption.
    pub ctx: &'a Ctx,
    /// Hash of everything that decides the result; checkpoints of another one are not continued.
    pub fingerprint: String,
    /// Mapped weights that are read and dropped layer by layer.
    pub pages: Option<Pages>,
    /// Where the log goes besides its file.
    pub log: log::Targets,
}

/// A finished training.
#[derive(Debug)]
pub struct Finished<M> {
    /// The trained model with its adapters, on the autodiff device.
    pub model: M,
    /// What was trained.
    pub trained: Vec<Trained>,
    /// What the target patterns matched.
    pub coverage: Coverage,
    /// State at the end.
    pub state: State,
    /// Step whose weights `model` has.
    pub weights_of_step: usize,
}

/// Trains `model` on `rows`; continues from the newest usable checkpoint.
///
/// # Errors
/// A bad target pattern, a loss or gradient that is not finite, an unwritable run directory, an unreadable row, or an
/// interruption by the user. The last good checkpoint stays.
pub fn train<M: Vlm + Module>(job: &Job<'_>, model: M, rows: &Rows<'_>, validation: &Rows<'_>) -> Result<Finished<M>> {
    let mut session = Session::new(job, model)?;
    session.resume()?;
    let batching = Batching::of(job.config, job.seed);
    session.steps_per_epoch = batching.steps_per_epoch(&rows.lengths);
    session.total = job.config.total_steps(session.steps_per_epoch);
    let position = session.state.position;
    std::thread::scope(|scope| {
        let mut loader = Loader::start(scope, rows, batching, position, job.config.dataloader_num_workers);
        session.run(&mut loader, validation)
    })?;
    session.finish()
}

/// Loss and norms of one optimizer step.
#[derive(Debug, Clone, PartialEq)]
pub struct StepReport {
    /// Loss per supervised token; of preferences, per pair.
    pub loss: f64,
    /// Global gradient norm before clipping.
    pub grad_norm: f64,
    /// Learning rate.
    pub learning_rate: f64,
    /// Real tokens.
    pub tokens: usize,
    /// Steps so far whose update was left out.
    pub skipped_steps: usize,
    /// What else the objective measures.
    pub more: BTreeMap<String, f64>,
}

/// Loss of some batches, and what else the objective measures.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Measured {
    /// The loss.
    pub loss: f64,
    /// Means over the pairs.
    pub more: BTreeMap<String, f64>,
}

/// A training in progress.
pub struct Session<'a, M> {
    job: &'a Job<'a>,
    device: Device,
    /// The model on the autodiff device.
    pub model: M,
    clock: DropoutClock,
    /// What the target patterns matched.
    pub coverage: Coverage,
    /// What is trained.
    pub trained: Vec<Trained>,
    /// Optimizer.
    pub optimizer: AdamW,
    /// State of the loop.
    pub state: State,
    /// The model as it was before the first step, for preferences. Everything that is not trained is shared.
    reference: Option<M>,
    features: FeatureCache,
    saved_step: Option<usize>,
    hidden_size: usize,
    total: usize,
    steps_per_epoch: usize,
}

impl<'a, M: Vlm + Module> Session<'a, M> {
    /// Prepares a model that is without autodiff.
    ///
    /// # Errors
    /// A target pattern cannot be understood or matches nothing.
    pub fn new(job: &'a Job<'a>, model: M) -> Result<Self> {
        let prepared = prepare(model, job.config, job.adapter, job.seed)?;
        let trained = params::trained(&prepared.model, prepared.model.towers());
        let first = Tensor::zeros([1, 1], (&job.ctx.device, DType::I32));
        let hidden_size = prepared.model.embed_tokens(first).dims()[2];
        let reference = (job.config.objective == ObjectiveType::Dpo).then(|| prepared.model.valid());
        Ok(Self {
            job,
            device: job.ctx.device.clone(),
            optimizer: AdamW::new(job.config, job.adapter.loraplus_lr_ratio, &trained),
            model: prepared.model,
            clock: prepared.clock,
            coverage: prepared.coverage,
            trained,
            state: State { fingerprint: job.fingerprint.clone(), ..State::default() },
            reference,
            features: FeatureCache::default(),
            saved_step: None,
            hidden_size,
            total: job.config.max_steps,
            steps_per_epoch: 0,
        })
    }

    /// Continues from the checkpoint that the configuration names, else from the newest usable one, if there is one.
    ///
    /// # Errors
    /// The run directory or the named checkpoint cannot be read.
    pub fn resume(&mut self) -> Result<()> {
        let say = |line: &str| self.job.ctx.progress.say(line);
        let (own, refused) = checkpoint::newest(self.job.dir, &self.trained, &self.job.fingerprint);
        for error in &refused {
            let instead = own.as_ref().map_or("starts from the beginning".to_string(), |l| {
                format!("falls back to {}{}", checkpoint::PREFIX, l.state.step)
            });
            say(&format!("{error}; {instead}"));
        }
        let loaded = match self.named_checkpoint() {
            // What was done since then is of the same training.
            Some(name) if own.as_ref().is_some_and(|l| l.state.resumed_from.as_ref() == Some(&name)) => own,
            Some(name) => Some(self.load_named(name)?),
            None => own,
        };
        checkpoint::set_aside_after(self.job.dir, loaded.as_ref().map_or(0, |l| l.state.step))?;
        let Some(mut loaded) = loaded else { return Ok(()) };
        loaded.restore(&mut self.optimizer, &self.trained, &self.device);
        let mut values: Vec<Option<Tensor<1>>> =
            loaded.values(&self.trained, &self.device).into_iter().map(Some).collect();
        self.model = params::update(self.model.clone(), |i, old| values[i].take().unwrap_or(old));
        self.state = loaded.state;
        let own = self.job.dir.path(format!("{}{}", checkpoint::PREFIX, self.state.step)).exists();
        self.saved_step = own.then_some(self.state.step);
        self.job.ctx.progress.say(&format!("continuing from {}{}", checkpoint::PREFIX, self.state.step));
        Ok(())
    }

    fn named_checkpoint(&self) -> Option<String> {
        self.job.config.resume_from_checkpoint.clone().filter(|name| name != "latest")
    }

    fn load_named(&self, name: String) -> Result<Loaded> {
        let within = self.job.dir.path(&name);
        let place = if within.is_dir() { within } else { PathBuf::from(&name) };
        if !place.is_dir() {
            return Err(Error::new(Kind::Config, "there is no such checkpoint")
                .at("train.resume_from_checkpoint")
                .found(place.display())
                .help("leave it out to continue from the newest of this run"));
        }
        let mut loaded = checkpoint::load_from(&place, &self.trained)?;
        if loaded.state.fingerprint != self.job.fingerprint {
            let place = place.display();
            self.job.ctx.progress.say(&format!("{place} is of other settings or data; continuing from it as asked"));
            loaded.state.fingerprint.clone_from(&self.job.fingerprint);
        }
        // The weights of a best evaluation that lie elsewhere cannot be gone back to.
        if loaded.state.best.is_some_and(|b| !self.job.dir.path(format!("{}{}", checkpoint::PREFIX, b.step)).is_dir()) {
            loaded.state.best = None;
            loaded.state.evaluations_without_gain = 0;
        }
        loaded.state.resumed_from = Some(name);
        Ok(loaded)
    }

    fn run(&mut self, loader: &mut Loader, validation: &Rows<'_>) -> Result<()> {
        let ctx = self.job.ctx;
        let mut log = Log::open(self.job.dir, self.state.step, &self.job.log, ctx.progress)?;
        let mut live = Live::start(ctx.progress, self.total, self.state.step, ctx.stop.clone());
        let outcome = self.steps(loader, validation, &mut log, &mut live);
        live.finish();
        let end = match &outcome {
            Ok(()) => End::Finished,
            Err(e) if e.kind() == Kind::Interrupted => End::Killed,
            Err(_) => End::Failed,
        };
        // What stopped the training matters more than a log that cannot be flushed.
        let flushed = log.finish(end);
        outcome.and(flushed)
    }

    fn steps(&mut self, loader: &mut Loader, validation: &Rows<'_>, log: &mut Log, live: &mut Live) -> Result<()> {
        let config = self.job.config;
        let total = self.total;
        let schedule = Schedule { kind: config.lr_scheduler_type, warmup: config.warmup(total), total };
        let mut meter = Meter::new(self.steps_per_epoch);
        if self.state.evaluation_due {
            self.evaluate_and_note(validation, log, live, &meter)?;
        }
        while self.state.step < total && !self.state.stopped_early {
            if self.job.ctx.stopped() {
                return Err(self.interrupted()?);
            }
            let step = loader.next_step()?;
            let next = step.next;
            let report = self.step(&step, schedule.factor(self.state.step))?;
            self.state.step += 1;
            self.state.position = next;
            self.state.tokens += report.tokens as u64;
            let last = self.state.step == total;
            if let Some(line) = meter.line(&report, self.state.step, config.logging_steps, last) {
                log.push(&line)?;
                live.show(&line);
            }
            live.done(self.state.step);
            let evaluates = config.eval_steps > 0 && !validation.lengths.is_empty();
            if evaluates && (self.state.step.is_multiple_of(config.eval_steps) || last) {
                self.evaluate_and_note(validation, log, live, &meter)?;
            }
            if last || (config.save_steps > 0 && self.state.step.is_multiple_of(config.save_steps)) {
                self.save()?;
            }
        }
        self.job.dir.write(hf_state::FILE, &json_file(&self.hf_state()?)?)
    }

    /// Saves, and says how to continue.
    fn interrupted(&mut self) -> Result<Error> {
        self.save()?;
        let step = self.state.step;
        let what = format!("interrupted after step {step} of {}, kept in {}{step}", self.total, checkpoint::PREFIX);
        Ok(Error::new(Kind::Interrupted, what).help("run the same command again; it continues"))
    }

    fn hf_state(&self) -> Result<serde_json::Value> {
        let path = self.job.dir.path(log::FILE);
        let lines = if path.exists() { self.job.dir.read_jsonl::<LogLine>(log::FILE)? } else { Vec::new() };
        Ok(hf_state::trainer_state(self.job.config, &self.state, self.total, self.steps_per_epoch, &lines))
    }

    /// One optimizer step with `factor` on the peak learning rates. A step whose loss is a spike changes no weight, if so
    /// configured.
    ///
    /// # Errors
    /// A loss or gradient that is not finite, or spikes that do not end.
    pub fn step(&mut self, rows: &StepRows, factor: f64) -> Result<StepReport> {
        let micro = &rows.micro_batches;
        let tokens = micro.iter().map(Batch::tokens).sum();
        let mut gradients = GradientSum::new(&self.model);
        let Measured { loss, more } = self.accumulate(micro, &mut gradients)?;
        let grad_norm = global_norm(&gradients.sums);
        if !grad_norm.is_finite() {
            return Err(self.bad_gradient(micro, &gradients));
        }
        if !self.is_spike(loss)? {
            let clip = clip_factor(grad_norm, self.job.config.max_grad_norm);
            let (optimizer, mut sums) = (&mut self.optimizer, gradients.sums);
            self.model = params::update(self.model.clone(), |i, value| match sums[i].take() {
                Some(gradient) => optimizer.update(i, value, gradient, factor, clip),
                None => value,
            });
        }
        let learning_rate = self.job.config.learning_rate * factor;
        Ok(StepReport { loss, grad_norm, learning_rate, tokens, skipped_steps: self.state.skipped_steps, more })
    }

    /// Whether the step must be left out, which is counted.
    fn is_spike(&mut self, loss: f64) -> Result<bool> {
        let config = self.job.config;
        if config.loss_spike_factor == 0.0 {
            return Ok(false);
        }
        let recent = &mut self.state.recent_losses;
        let mut sorted = recent.clone();
        sorted.sort_by(f64::total_cmp);
        let full = sorted.len() >= config.loss_spike_window;
        let median = sorted.get(sorted.len() / 2).copied().unwrap_or_default();
        if !full || loss <= config.loss_spike_factor * median {
            if full {
                recent.remove(0);
            }
            recent.push(loss);
            self.state.skipped_in_a_row = 0;
            return Ok(false);
        }
        self.state.skipped_steps += 1;
        self.state.skipped_in_a_row += 1;
        let step = self.state.step + 1;
        let found = format!("loss {loss:.4}, median of the last {} {median:.4}", sorted.len());
        self.job.ctx.progress.say(&format!("step {step}: {found}; a spike, so this step changes no weight"));
        if self.state.skipped_in_a_row >= MOST_SKIPPED {
            return Err(self.numeric(&format!("{MOST_SKIPPED} loss spikes in a row")).found(found));
        }
        Ok(true)
    }

    /// Loss of the micro-batches, their gradients added to `gradients`.
    ///
    /// # Errors
    /// A batch whose images do not fit their positions, or a loss that is not finite.
    pub fn accumulate(&mut self, micro: &[Batch], gradients: &mut GradientSum) -> Result<Measured> {
        let micro = micro.iter().map(|batch| self.model.reconcile(batch)).collect::<Result<Vec<_>>>()?;
        let batches: Vec<&Batch> = micro.iter().map(AsRef::as_ref).collect();
        let whole = Whole::of(&batches);
        let mut sums = Sums::default();
        for (k, batch) in batches.iter().enumerate() {
            let vision = self.vision(batch);
            let reference = self.reference_logps(batch, &vision);
            let objective = self.objective(batch, &reference, &whole);
            let saving = self.saving(batch);
            self.clock.start((self.state.step * self.job.config.gradient_accumulation_steps + k) as u64);
            let outcome = step::backward(&self.model, batch, &vision, &objective, saving, &self.device, gradients);
            self.clock.stop();
            let loss = outcome?;
            if !loss.sum().is_finite() {
                return Err(self.bad_loss(batch, &vision, &loss));
            }
            sums.add(&objective, batch, &loss);
        }
        Ok(sums.measured(&whole))
    }

    /// Log-likelihood of each row of a batch of pairs under the reference; empty for other objectives.
    fn reference_logps(&self, batch: &Batch, vision: &Vision) -> Vec<f64> {
        let Some(reference) = &self.reference else { return Vec::new() };
        let vision = match vision {
            Vision::Pixels(pixels) => Vision::Features(reference.vision(pixels.clone())),
            other => other.clone(),
        };
        let loss = step::evaluate(reference, batch, &vision, self.saving(batch), &self.device);
        row_logps(&loss.nll, &Targets::of(batch).rows, batch.rows)
    }

    /// How the tokens of `batch` weigh in a step of which `whole` is known.
    fn objective<'r>(&self, batch: &Batch, reference: &'r [f64], whole: &Whole) -> Objective<'r> {
        let config = self.job.config;
        match (config.objective, config.loss_reduction) {
            (ObjectiveType::Dpo, _) => Objective::Preference(Preference {
                beta: config.beta,
                label_smoothing: config.label_smoothing,
                rpo_alpha: config.rpo_alpha,
                reference,
                pairs: whole.rows / 2,
                chosen_tokens: whole.chosen_tokens,
            }),
            (ObjectiveType::Sft, LossReduction::Token) => Objective::Tokens(1.0 / whole.supervised.max(1) as f64),
            (ObjectiveType::Sft, LossReduction::MicroMean) => {
                Objective::Tokens(1.0 / (batch.supervised().max(1) * whole.batches) as f64)
            }
        }
    }

    fn vision(&mut self, batch: &Batch) -> Vision {
        if batch.pixels.is_empty() {
            return Vision::None;
        }
        if self.job.config.vision == TowerMode::Frozen {
            return Vision::Features(self.features.get(&self.model, batch, &self.device));
        }
        batch.pixels(&self.device).map_or(Vision::None, Vision::Pixels)
    }

    fn saving(&self, batch: &Batch) -> Saving<'a> {
        let pages = self.job.pages.as_ref();
        let offload = self.job.config.offload_activations.then(|| self.job.dir.root());
        let recompute = match self.job.config.recompute {
            _ if pages.is_some() || offload.is_some() => true,
            Recompute::Always => true,
            Recompute::Never => false,
            Recompute::Auto => {
                step::activation_bytes(batch.rows, batch.length, self.model.num_layers(), self.hidden_size)
                    > ACTIVATION_BYTES
            }
        };
        Saving { recompute, pages, offload }
    }

    /// Loss of `rows`, per supervised token or, of preferences, per pair.
    ///
    /// # Errors
    /// An unreadable row, or an interruption.
    pub fn evaluate(&mut self, rows: &Rows<'_>) -> Result<Measured> {
        let plain = self.model.valid();
        let indices: Vec<usize> = (0..rows.lengths.len()).collect();
        let (mut sums, mut all) = (Sums::default(), Whole::default());
        for chunk in indices.chunks(self.job.config.per_device_eval_batch_size) {
            self.job.ctx.check()?;
            let batch = rows.batch(chunk, self.job.config.pad_to_multiple_of)?;
            let vision = self.vision(&batch);
            let reference = self.reference_logps(&batch, &vision);
            let vision = match vision {
                Vision::Pixels(pixels) => Vision::Features(plain.vision(pixels)),
                other => other,
            };
            let loss = step::evaluate(&plain, &batch, &vision, self.saving(&batch), &self.device);
            let mut whole = Whole::of(&[&batch]);
            // Every token weighs the same, whatever the batches of a step weigh by.
            whole.batches = 1;
            let objective = match self.objective(&batch, &reference, &whole) {
                Objective::Tokens(_) => Objective::Tokens(1.0),
                preference => preference,
            };
            sums.add(&objective, &batch, &loss);
            all.add(&whole);
        }
        let mut measured = sums.measured(&all);
        if self.job.config.objective == ObjectiveType::Sft {
            measured.loss /= all.supervised.max(1) as f64;
        }
        Ok(measured)
    }

    fn evaluate_and_note(
        &mut self,
        validation: &Rows<'_>,
        log: &mut Log,
        live: &mut Live,
        meter: &Meter,
    ) -> Result<()> {
        let outcome = self.evaluate(validation);
        self.state.evaluation_due = outcome.as_ref().is_err_and(|e| e.kind() == Kind::Interrupted);
        if self.state.evaluation_due {
            return Err(self.interrupted()?);
        }
        let Measured { loss: eval_loss, more } = outcome?;
        let step = self.state.step;
        let more = more.into_iter().map(|(name, value)| (format!("eval_{name}"), value)).collect();
        let line = LogLine { step, epoch: meter.epoch(step), eval_loss: Some(eval_loss), more, ..LogLine::default() };
        log.push(&line)?;
        live.show(&line);
        if self.state.best.is_none_or(|b| eval_loss < b.eval_loss) {
            self.state.best = Some(Best { step, eval_loss });
            self.state.evaluations_without_gain = 0;
            return self.save();
        }
        self.state.evaluations_without_gain += 1;
        let patience = self.job.config.early_stopping_patience;
        if patience > 0 && self.state.evaluations_without_gain >= patience {
            self.state.stopped_early = true;
            self.job
                .ctx
                .progress
                .say(&format!("stopping early at step {step}: {patience} evaluations without improvement"));
            return self.save();
        }
        Ok(())
    }

    /// Writes a checkpoint of this step unless there is one, and removes old ones.
    ///
    /// # Errors
    /// The disk is full or not writable.
    pub fn save(&mut self) -> Result<()> {
        if self.saved_step == Some(self.state.step) && !self.state.stopped_early {
            return Ok(());
        }
        let hf_state = self.hf_state()?;
        let values = params::values(&self.model);
        checkpoint::save(self.job.dir, &self.state, &self.trained, values, &self.optimizer, &hf_state)?;
        self.saved_step = Some(self.state.step);
        checkpoint::prune(self.job.dir, self.job.config.save_total_limit, self.state.best.map(|b| b.step))
    }

    /// The trained model: the weights of the best evaluation if so configured, else the last ones.
    ///
    /// # Errors
    /// The best checkpoint cannot be read.
    pub fn finish(self) -> Result<Finished<M>> {
        let (mut model, mut weights_of_step) = (self.model, self.state.step);
        if let Some(best) = self.state.best.filter(|_| self.job.config.load_best_model_at_end) {
            let loaded = checkpoint::load(self.job.dir, best.step, &self.trained, &self.job.fingerprint)?;
            let values: HashMap<String, Tensor<1>> = loaded
                .trained
                .into_iter()
                .map(|(name, v)| (name, Tensor::from_data(v.as_slice(), &self.device)))
                .collect();
            model = params::replace(model, &self.trained, values);
            weights_of_step = best.step;
        }
        Ok(Finished { model, trained: self.trained, coverage: self.coverage, state: self.state, weights_of_step })
    }

    fn bad_loss(&self, batch: &Batch, vision: &Vision, loss: &Loss) -> Error {
        let rows = diagnose::bad_rows(batch, loss).join(", ");
        let first = diagnose::forward(&self.model, &self.trained, batch, vision, &self.device);
        let first = first.map_or(String::new(), |first| format!("; first in: {first}"));
        self.numeric("loss is not finite").found(format!("rows {rows}{first}"))
    }

    fn bad_gradient(&mut self, micro: &[Batch], gradients: &GradientSum) -> Error {
        let name = diagnose::first_gradient(gradients).map(|i| self.trained[i].name.clone());
        let name = name.unwrap_or_else(|| "the sum of squares, which overflows".into());
        let spoilt = self.micro_batches_with_bad_gradients(micro);
        let ids: Vec<&str> = micro
            .iter()
            .enumerate()
            .filter(|(k, _)| spoilt.is_empty() || spoilt.contains(k))
            .flat_map(|(_, b)| b.ids.iter().map(String::as_str))
            .collect();
        self.numeric("gradient is not finite").found(format!("first in: gradient of {name}; rows {}", ids.join(", ")))
    }

    /// Which micro-batches have a bad gradient of their own.
    fn micro_batches_with_bad_gradients(&mut self, micro: &[Batch]) -> Vec<usize> {
        let bad = |session: &mut Self, batch: &Batch| {
            let mut own = GradientSum::new(&session.model);
            session.accumulate(std::slice::from_ref(batch), &mut own).is_ok()
                && diagnose::first_gradient(&own).is_some()
        };
        (0..micro.len()).filter(|k| bad(self, &micro[*k])).collect()
    }

    fn numeric(&self, what: &str) -> Error {
        let kept = checkpoint::steps(self.job.dir)
            .last()
            .map_or(String::new(), |s| format!("; {}{s} is the last good checkpoint", checkpoint::PREFIX));
        Error::new(Kind::Numeric, what)
            .at(format!("step {}", self.state.step + 1))
            .help(format!("lower train.learning_rate, or look at these rows with `medtune data show`{kept}"))
    }
}

/// What a loss is a mean over.
#[derive(Debug, Clone, Copy, Default)]
struct Whole {
    batches: usize,
    rows: usize,
    supervised: usize,
    /// Supervised tokens of the first row of each pair.
    chosen_tokens: usize,
}

impl Whole {
    fn of(batches: &[&Batch]) -> Self {
        let chosen = |batch: &Batch| Targets::of(batch).rows.iter().filter(|row| is_chosen(**row)).count();
        Self {
            batches: batches.len(),
            rows: batches.iter().map(|b| b.rows).sum(),
            supervised: batches.iter().map(|b| b.supervised()).sum(),
            chosen_tokens: batches.iter().map(|b| chosen(b)).sum(),
        }
    }

    fn add(&mut self, other: &Self) {
        self.batches += other.batches;
        self.rows += other.rows;
        self.supervised += other.supervised;
        self.chosen_tokens += other.chosen_tokens;
    }
}

/// Sums over batches, divided once.
#[derive(Debug, Default)]
struct Sums {
    /// Weighted negative log-likelihoods.
    tokens: f64,
    chosen_nll: f64,
    rpo_alpha: f64,
    pairs: Vec<Pair>,
    logps: [f64; 2],
}

impl Sums {
    fn add(&mut self, objective: &Objective<'_>, batch: &Batch, loss: &Loss) {
        let preference = match objective {
            Objective::Tokens(weight) => {
                self.tokens += weight * loss.sum();
                return;
            }
            Objective::Preference(preference) => preference,
        };
        let logps = row_logps(&loss.nll, &Targets::of(batch).rows, batch.rows);
        self.rpo_alpha = preference.rpo_alpha;
        self.pairs.extend(preference.pairs_of(&logps));
        for (row, logp) in logps.iter().enumerate() {
            self.logps[usize::from(!is_chosen(row))] += logp;
        }
        self.chosen_nll -= logps.iter().step_by(2).sum::<f64>();
    }

    fn measured(&self, whole: &Whole) -> Measured {
        if self.pairs.is_empty() {
            return Measured { loss: self.tokens, more: BTreeMap::new() };
        }
        let n = self.pairs.len() as f64;
        let mean = |f: fn(&Pair) -> f64| self.pairs.iter().map(f).sum::<f64>() / n;
        let (chosen, rejected) = (mean(|p| p.chosen_reward), mean(|p| p.rejected_reward));
        let likelihood = self.rpo_alpha * self.chosen_nll / whole.chosen_tokens.max(1) as f64;
        let more = [
            ("rewards/chosen", chosen),
            ("rewards/rejected", rejected),
            ("rewards/accuracies", mean(|p| f64::from(u8::from(p.chosen_reward > p.rejected_reward)))),
            ("rewards/margins", chosen - rejected),
            ("logps/chosen", self.logps[0] / n),
            ("logps/rejected", self.logps[1] / n),
        ];
        let more = more.into_iter().map(|(name, value)| (name.to_string(), value)).collect();
        Measured { loss: mean(|p| p.loss) + likelihood, more }
    }
}
