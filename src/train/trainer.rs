//! The loop: steps, evaluations, checkpoints, and the ways out.

use std::{collections::HashMap, time::Instant};

use burn::{
    module::Module,
    tensor::{DType, Device, Tensor},
};
use sha2::{Digest, Sha256};

use super::{
    checkpoint::{self, Best, State},
    clip::{clip_factor, first_non_finite, global_norm},
    config::{LossReduction, Recompute, TowerMode, TrainConfig},
    live::Live,
    log::{self, LogLine},
    loss::{Loss, Targets},
    objective::Objective,
    optimizer::AdamW,
    params::{self, GradientSum, Trained},
    schedule::Schedule,
    step::{self, Saving, Vision},
};
use crate::{
    adapter::{AdapterConfig, inject::prepare, lora::DropoutClock, target::Coverage},
    error::{Error, Kind, Result},
    loader::{Batching, Loader, Rows, StepRows},
    run_dir::{JsonlWriter, RunDir},
    stage::Ctx,
    vlm::{Batch, Pixels, Vlm},
    weights::Pages,
};

/// Device memory for features of a frozen vision tower.
pub(super) const FEATURE_BYTES: usize = 512 << 20;

/// Above this estimate of kept activations, `recompute = "auto"` recomputes.
pub(super) const ACTIVATION_BYTES: u64 = 1 << 30;

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
    let total = job.config.total_steps(rows.lengths.len());
    let batching = Batching {
        seed: job.seed,
        batch_size: job.config.per_device_train_batch_size,
        accumulation: job.config.gradient_accumulation_steps,
        group_by_length: job.config.group_by_length,
        multiple: job.config.pad_to_multiple_of,
    };
    let steps_per_epoch = job.config.steps_per_epoch(rows.lengths.len());
    let position = session.state.position;
    std::thread::scope(|scope| {
        let mut loader = Loader::start(scope, rows, batching, position, job.config.dataloader_num_workers);
        session.run(&mut loader, validation, total, steps_per_epoch)
    })?;
    session.finish()
}

/// Loss and norms of one optimizer step.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct StepReport {
    /// Loss per supervised token.
    pub loss: f64,
    /// Global gradient norm before clipping.
    pub grad_norm: f64,
    /// Learning rate.
    pub learning_rate: f64,
    /// Real tokens.
    pub tokens: usize,
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
    features: FeatureCache,
    saved_step: Option<usize>,
    hidden_size: usize,
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
        Ok(Self {
            job,
            device: job.ctx.device.clone(),
            optimizer: AdamW::new(job.config, &trained),
            model: prepared.model,
            clock: prepared.clock,
            coverage: prepared.coverage,
            trained,
            state: State { fingerprint: job.fingerprint.clone(), ..State::default() },
            features: FeatureCache::default(),
            saved_step: None,
            hidden_size,
        })
    }

    /// Continues from the newest usable checkpoint, if there is one.
    ///
    /// # Errors
    /// The run directory cannot be read.
    pub fn resume(&mut self) -> Result<()> {
        let (loaded, refused) = checkpoint::newest(self.job.dir, &self.trained, &self.job.fingerprint);
        for error in refused {
            self.job.ctx.progress.say(&format!("{error}; not used"));
        }
        let Some(mut loaded) = loaded else { return Ok(()) };
        loaded.restore(&mut self.optimizer, &self.trained, &self.device);
        let mut values: Vec<Option<Tensor<1>>> =
            loaded.values(&self.trained, &self.device).into_iter().map(Some).collect();
        self.model = params::update(self.model.clone(), |i, old| values[i].take().unwrap_or(old));
        self.state = loaded.state;
        self.saved_step = Some(self.state.step);
        self.job.ctx.progress.say(&format!("continuing from {}{}", checkpoint::PREFIX, self.state.step));
        Ok(())
    }

    fn run(&mut self, loader: &mut Loader, validation: &Rows<'_>, total: usize, steps_per_epoch: usize) -> Result<()> {
        let config = self.job.config;
        let schedule = Schedule { kind: config.lr_scheduler_type, warmup: config.warmup(total), total };
        let mut log = log::open(self.job.dir, self.state.step)?;
        let ctx = self.job.ctx;
        let mut live = Live::start(ctx.progress, total, self.state.step, ctx.stop.clone());
        let mut meter = Meter::new(steps_per_epoch);
        while self.state.step < total && !self.state.stopped_early {
            if ctx.stopped() {
                self.save()?;
                live.finish();
                return ctx.check();
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
                self.evaluate_and_note(validation, &mut log, &mut live, &meter)?;
            }
            if last || (config.save_steps > 0 && self.state.step.is_multiple_of(config.save_steps)) {
                self.save()?;
            }
        }
        log.sync()?;
        live.finish();
        Ok(())
    }

    /// One optimizer step with `factor` on the peak learning rates.
    ///
    /// # Errors
    /// A loss or gradient that is not finite.
    pub fn step(&mut self, rows: &StepRows, factor: f64) -> Result<StepReport> {
        let micro = &rows.micro_batches;
        let tokens = micro.iter().map(Batch::tokens).sum();
        let mut gradients = GradientSum::new(&self.model);
        let loss = self.accumulate(micro, &mut gradients)?;
        let grad_norm = global_norm(&gradients.sums);
        if !grad_norm.is_finite() {
            return Err(self.bad_gradient(micro, &gradients));
        }
        let clip = clip_factor(grad_norm, self.job.config.max_grad_norm);
        let (optimizer, mut sums) = (&mut self.optimizer, gradients.sums);
        self.model = params::update(self.model.clone(), |i, value| match sums[i].take() {
            Some(gradient) => optimizer.update(i, value, gradient, factor, clip),
            None => value,
        });
        Ok(StepReport { loss, grad_norm, learning_rate: self.job.config.learning_rate * factor, tokens })
    }

    /// Loss of the micro-batches, their gradients added to `gradients`.
    ///
    /// # Errors
    /// A batch whose images do not fit their positions, or a loss that is not finite.
    pub fn accumulate(&mut self, micro: &[Batch], gradients: &mut GradientSum) -> Result<f64> {
        let micro = micro.iter().map(|batch| self.model.reconcile(batch)).collect::<Result<Vec<_>>>()?;
        let supervised: usize = micro.iter().map(|batch| batch.supervised()).sum();
        let mut total = 0.0;
        for (k, batch) in micro.iter().enumerate() {
            let weight = match self.job.config.loss_reduction {
                LossReduction::Token => 1.0 / supervised.max(1) as f64,
                LossReduction::MicroMean => 1.0 / (batch.supervised().max(1) * micro.len()) as f64,
            };
            let vision = self.vision(batch);
            let saving = self.saving(batch);
            self.clock.start((self.state.step * self.job.config.gradient_accumulation_steps + k) as u64);
            let loss = step::backward(
                &self.model,
                batch,
                &vision,
                &Objective::Tokens(weight),
                saving,
                &self.device,
                gradients,
            )?;
            self.clock.stop();
            if !loss.sum().is_finite() {
                return Err(self.bad_loss(batch, &loss));
            }
            total += weight * loss.sum();
        }
        Ok(total)
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

    /// Loss per supervised token of `rows`.
    ///
    /// # Errors
    /// An unreadable row, or an interruption.
    pub fn evaluate(&mut self, rows: &Rows<'_>) -> Result<f64> {
        let plain = self.model.valid();
        let indices: Vec<usize> = (0..rows.lengths.len()).collect();
        let (mut sum, mut count) = (0.0, 0usize);
        for chunk in indices.chunks(self.job.config.per_device_eval_batch_size) {
            self.job.ctx.check()?;
            let batch = rows.batch(chunk, self.job.config.pad_to_multiple_of)?;
            let vision = match self.vision(&batch) {
                Vision::Pixels(pixels) => Vision::Features(plain.vision(pixels)),
                other => other,
            };
            let loss = step::evaluate(&plain, &batch, &vision, self.saving(&batch), &self.device);
            sum += loss.sum();
            count += loss.nll.len();
        }
        Ok(sum / count.max(1) as f64)
    }

    fn evaluate_and_note(
        &mut self,
        validation: &Rows<'_>,
        log: &mut JsonlWriter,
        live: &mut Live,
        meter: &Meter,
    ) -> Result<()> {
        let eval_loss = self.evaluate(validation)?;
        let step = self.state.step;
        let line = LogLine { step, epoch: meter.epoch(step), eval_loss: Some(eval_loss), ..LogLine::default() };
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
        checkpoint::save(self.job.dir, &self.state, &self.trained, params::values(&self.model), &self.optimizer)?;
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

    fn bad_loss(&self, batch: &Batch, loss: &Loss) -> Error {
        let targets = Targets::of(batch);
        let mut rows: Vec<&str> = Vec::new();
        for (state, nll) in targets.states.iter().zip(&loss.nll) {
            let id = batch.id_at(*state as usize).unwrap_or_default();
            if !nll.is_finite() && !rows.contains(&id) {
                rows.push(id);
            }
        }
        self.numeric("loss is not finite").found(format!("rows {}", rows.join(", ")))
    }

    fn bad_gradient(&self, micro: &[Batch], gradients: &GradientSum) -> Error {
        let ids: Vec<&str> = micro.iter().flat_map(|b| b.ids.iter().map(String::as_str)).collect();
        let name = first_non_finite(&gradients.sums).map_or("the sum of squares", |i| &self.trained[i].name);
        self.numeric("gradient is not finite").found(format!("tensor {name}, rows {}", ids.join(", ")))
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

/// Features of images that a frozen tower has already seen. Every image passes the tower alone, so that its features
/// do not depend on what else is in the batch, or on what the cache holds.
#[derive(Default)]
struct FeatureCache {
    seen: HashMap<[u8; 32], Tensor<3>>,
    bytes: usize,
}

impl FeatureCache {
    fn get<M: Vlm + Module>(&mut self, model: &M, batch: &Batch, device: &Device) -> Tensor<3> {
        let mut plain: Option<M> = None;
        let features: Vec<Tensor<3>> = batch
            .pixels
            .iter()
            .map(|pixels| {
                let key = key(pixels);
                if let Some(features) = self.seen.get(&key) {
                    return features.clone();
                }
                let plain = plain.get_or_insert_with(|| model.valid());
                let [c, h, w] = pixels.shape;
                let data = burn::tensor::TensorData::new(pixels.data.clone(), [1, c, h, w]);
                let features = plain.vision(Tensor::from_data(data, device));
                let bytes = 4 * features.shape().num_elements();
                if self.bytes + bytes <= FEATURE_BYTES {
                    self.bytes += bytes;
                    self.seen.insert(key, features.clone());
                }
                features
            })
            .collect();
        Tensor::cat(features, 0)
    }
}

fn key(pixels: &Pixels) -> [u8; 32] {
    let mut hash = Sha256::new();
    for n in pixels.shape {
        hash.update((n as u64).to_le_bytes());
    }
    let bytes: Vec<u8> = pixels.data.iter().flat_map(|v| v.to_le_bytes()).collect();
    hash.update(&bytes);
    hash.finalize().into()
}

/// Turns steps into log lines.
struct Meter {
    steps_per_epoch: usize,
    since: Instant,
    tokens: usize,
    losses: Vec<f64>,
}

impl Meter {
    fn new(steps_per_epoch: usize) -> Self {
        Self { steps_per_epoch, since: Instant::now(), tokens: 0, losses: Vec::new() }
    }

    fn epoch(&self, step: usize) -> f64 {
        step as f64 / self.steps_per_epoch.max(1) as f64
    }

    /// The line of a step that is logged; the loss is the mean since the line before.
    fn line(&mut self, report: &StepReport, step: usize, every: usize, last: bool) -> Option<LogLine> {
        self.tokens += report.tokens;
        self.losses.push(report.loss);
        if !step.is_multiple_of(every) && !last {
            return None;
        }
        let seconds = self.since.elapsed().as_secs_f64().max(1e-9);
        let line = LogLine {
            step,
            epoch: self.epoch(step),
            loss: Some(self.losses.iter().sum::<f64>() / self.losses.len() as f64),
            grad_norm: Some(report.grad_norm),
            learning_rate: Some(report.learning_rate),
            tokens_per_second: Some((self.tokens as f64 / seconds).round()),
            eval_loss: None,
        };
        (self.since, self.tokens) = (Instant::now(), 0);
        self.losses.clear();
        Some(line)
    }
}
