//! Speed and memory of training steps of one shape, on the trainer itself.
//!
//! Every row holds one image and words up to a fixed length, so that all steps have the same shapes. Pixels differ a
//! little from step to step, so that features of a frozen vision tower are computed and not remembered.

use std::{
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use burn::tensor::{DType, Device, Distribution, Tensor};
use serde::Serialize;

use crate::{
    adapter::Quantization,
    error::{Error, Kind, Result},
    loader::{Position, StepRows},
    models::{self, AnyVlm, LoadOptions},
    nn::visit::named_params,
    plan::Plan,
    resident,
    run_dir::RunDir,
    sample::Sample,
    stage::{Ctx, train::load_model},
    train::{
        flops::flops,
        memory::{Held, Load, Machine, account},
        trainer::{Job, Session},
    },
    vlm::{Batch, Encoded, IGNORE, PaddingSide, Processor},
    weights::torch_dtype,
};

/// What is measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Settings {
    /// Rows of a micro-batch.
    pub rows: usize,
    /// Positions of a row; 0 means the image, its question and a short answer, rounded up to a multiple of 64.
    pub length: usize,
    /// Micro-batches of a step.
    pub micro_batches: usize,
    /// Steps that are not counted: the first one, which is reported apart, among them.
    pub warmup: usize,
    /// Steps that are counted.
    pub steps: usize,
}

/// What was measured. Times are in milliseconds, memory in bytes.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Report {
    /// Checkpoint.
    pub checkpoint: PathBuf,
    /// Device, as the user wrote it.
    pub device: String,
    /// Type of the matrices in memory.
    pub dtype: &'static str,
    /// How the linear modules of the language model are held, if not in that type.
    pub quantization: Quantization,
    /// Parameters.
    pub parameters: usize,
    /// Those that are trained.
    pub trainable_parameters: usize,
    /// Rows of a micro-batch.
    pub rows: usize,
    /// Positions of a row.
    pub length: usize,
    /// Tiles of a micro-batch.
    pub tiles: usize,
    /// Supervised positions of a micro-batch.
    pub supervised: usize,
    /// Micro-batches of a step.
    pub micro_batches: usize,
    /// Time to load the model.
    pub load_ms: f64,
    /// The first step, which compiles, tunes and reads weights.
    pub first_step_ms: f64,
    /// Median of the counted steps.
    pub step_ms: f64,
    /// Every counted step.
    pub step_ms_all: Vec<f64>,
    /// Positions of a step over the median time.
    pub tokens_per_second: f64,
    /// Loss of the first step.
    pub loss_first: f64,
    /// Loss of the last step.
    pub loss_last: f64,
    /// Loss of every step.
    pub losses: Vec<f64>,
    /// Floating-point operations of a step.
    pub flops_per_step: f64,
    /// What they count.
    pub flops_convention: &'static str,
    /// The most operations a second that a large product of this device reached.
    pub peak_flops: f64,
    /// How that was measured.
    pub peak_flops_of: String,
    /// Share of `peak_flops` that the steps reach.
    pub model_flop_utilisation: f64,
    /// Largest memory: on the CPU that of the process, mapped files included; else what the device reserved.
    pub peak_memory_bytes: Option<u64>,
    /// The same as `medtune plan` predicts it.
    pub predicted_memory_bytes: u64,
    /// Largest memory of the process that belongs to no file, sampled.
    pub peak_anonymous_bytes: Option<u64>,
    /// Largest memory of the process when the model was loaded.
    pub loaded_memory_bytes: Option<u64>,
    /// Programs that wanted a processor in the last minute, this one included; on an idle machine the number of cores
    /// at most.
    pub load_average: Option<f64>,
}

/// How operations are counted.
const CONVENTION: &str = "2 a weight and position forwards and 2 backwards, 2 more for weights that are trained; the \
                          head at supervised positions; causal attention at half its square; a frozen vision tower \
                          forwards; nothing for what is computed again";

/// Runs training steps of `plan` on the checkpoint at `base`; files go to `dir`.
///
/// # Errors
/// A checkpoint that cannot be loaded, a length below that of one image with its question, or a step that fails.
pub fn run(plan: &Plan, base: &Path, settings: Settings, dir: &RunDir, ctx: &Ctx) -> Result<Report> {
    let sampler = Sampler::start();
    let options = LoadOptions { progress: ctx.progress, ..plan.model.load_options() };
    let processor = models::processor(base, &options)?;
    let row = row(processor.as_ref(), settings.length, dir)?;
    let started = Instant::now();
    let (model, pages) = load_model(plan, base, options, &ctx.device)?;
    let load_ms = millis(started);
    let loaded_memory_bytes = resident::peak_bytes();
    let (parameters, dtype) = facts(&model);
    let predicted_memory_bytes =
        predict(plan, base, &model, &batches(&row, settings, 0, processor.pad_id()), settings, ctx)?;
    let fingerprint = String::new();
    let adapter = plan.adapter_config();
    let job = Job {
        config: &plan.train,
        adapter: &adapter,
        seed: plan.seed,
        dir,
        ctx,
        fingerprint,
        pages,
        log: Default::default(),
    };
    let mut session = Session::new(&job, model)?;
    let (mut times, mut losses) = (Vec::new(), Vec::new());
    let task = ctx.progress.start("steps", (settings.warmup + settings.steps) as u64);
    let mut task = task;
    for step in 0..settings.warmup + settings.steps {
        ctx.check()?;
        let rows =
            StepRows { micro_batches: batches(&row, settings, step, processor.pad_id()), next: Position::default() };
        let started = Instant::now();
        let report = session.step(&rows, 1.0)?;
        session.state.step += 1;
        times.push(millis(started));
        losses.push(report.loss);
        task.advance(1);
    }
    task.finish();
    let batch = &batches(&row, settings, 0, processor.pad_id())[0];
    let trainable_parameters = session.trained.iter().map(crate::train::params::Trained::len).sum();
    let flops_per_step =
        settings.micro_batches as f64 * flops(&session.model, &plan.train, &session.coverage, plan.adapter.r, batch);
    drop(session);
    let peak_memory_bytes = peak_memory(&ctx.device);
    let peak_anonymous_bytes = sampler.stop();
    let (peak_flops, peak_flops_of) = peak_flops(&ctx.device);
    let counted = times.split_off(settings.warmup.min(times.len() - 1));
    let first_step_ms = times.first().or(counted.first()).copied().unwrap_or_default();
    let step_ms = median(counted.clone());
    Ok(Report {
        checkpoint: base.to_path_buf(),
        device: ctx.device_spec.to_string(),
        dtype,
        quantization: plan.model.quantization,
        parameters,
        trainable_parameters,
        rows: batch.rows,
        length: batch.length,
        tiles: batch.pixels.len(),
        supervised: batch.supervised(),
        micro_batches: settings.micro_batches,
        load_ms,
        first_step_ms,
        step_ms,
        tokens_per_second: (settings.micro_batches * batch.rows * batch.length) as f64 / step_ms * 1e3,
        step_ms_all: counted,
        loss_first: losses[0],
        loss_last: losses[losses.len() - 1],
        losses,
        flops_per_step,
        flops_convention: CONVENTION,
        peak_flops,
        peak_flops_of,
        model_flop_utilisation: flops_per_step / (step_ms / 1e3) / peak_flops,
        peak_memory_bytes,
        predicted_memory_bytes,
        peak_anonymous_bytes,
        loaded_memory_bytes,
        load_average: load_average(),
    })
}

fn millis(since: Instant) -> f64 {
    since.elapsed().as_secs_f64() * 1e3
}

/// The middle value; of an even number the mean of the two in the middle.
fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    let n = values.len();
    if n == 0 { f64::NAN } else { f64::midpoint(values[(n - 1) / 2], values[n / 2]) }
}

fn facts(model: &AnyVlm) -> (usize, &'static str) {
    let params = named_params(model);
    let dtype = params.iter().filter(|p| p.linear_weight).find_map(|p| p.dtype).unwrap_or(DType::F32);
    (params.iter().map(|p| p.num_elements()).sum(), torch_dtype(dtype.into()))
}

/// The account of these steps: nothing is read by a loader, and every image is a new one.
fn predict(plan: &Plan, base: &Path, model: &AnyVlm, micro: &[Batch], settings: Settings, ctx: &Ctx) -> Result<u64> {
    let cpu = crate::weights::keeps_half(&ctx.device);
    let kept = named_params(model).iter().filter(|p| p.linear_weight).any(|p| p.dtype != Some(DType::F32));
    let mapped = || Ok((models::detect(base)?.weights)(base, &plan.model.load_options())?.is_mapped());
    let held = match (kept, cpu) {
        (false, _) => Held::Float32,
        (true, true) if mapped()? => Held::Mapped,
        _ => Held::Half,
    };
    let batch = &micro[0];
    let load = Load {
        rows: batch.rows,
        length: batch.length,
        supervised: batch.supervised(),
        tiles: batch.pixels.len(),
        micro_batches: micro.len(),
        all_rows: 0,
        all_tiles: batch.pixels.len() * micro.len() * (settings.warmup + settings.steps),
    };
    Ok(account(model, &plan.train, &plan.adapter_config(), Machine { cpu, held }, &load)?.peak)
}

/// A row with one image, a question, and an answer that fills it up to `length` positions.
fn row(processor: &dyn Processor, length: usize, dir: &RunDir) -> Result<Encoded> {
    let path = dir.path("image.png");
    let image = ::image::RgbImage::from_fn(448, 448, |x, y| {
        ::image::Rgb([(x * 7 + y) as u8, (x ^ y) as u8, (x * y / 64) as u8])
    });
    image.save(&path).map_err(|e| Error::new(Kind::Run, "cannot write an image").at(path.display()).source(e))?;
    let sample: Sample = serde_json::from_value(serde_json::json!({
        "id": "bench",
        "images": [{ "path": path }],
        "turns": [
            { "role": "user", "text": "<image>\nWhat does this image show?" },
            { "role": "assistant", "text": "The image shows a nodule in the upper lobe of the right lung." },
        ],
    }))
    .map_err(|e| Error::new(Kind::Run, "the row of the benchmark has another form than rows").source(e))?;
    let mut row = processor.encode(&sample)?;
    let answer: Vec<i32> = row.labels.iter().copied().filter(|l| *l != IGNORE).collect();
    let own = row.input_ids.len();
    let length = if length == 0 { own.next_multiple_of(64) } else { length };
    if length < own {
        return Err(Error::new(Kind::Config, "a row of this model is longer")
            .at(format!("--length {length}"))
            .expected(format!("at least {own}: one image, a question and a short answer")));
    }
    let filler: Vec<i32> = answer.iter().copied().cycle().take(length - own).collect();
    row.input_ids.extend(&filler);
    row.labels.extend(&filler);
    Ok(row)
}

/// The micro-batches of a step.
fn batches(row: &Encoded, settings: Settings, step: usize, pad_id: i32) -> Vec<Batch> {
    let batch = |index: usize| {
        let rows: Vec<Encoded> = (0..settings.rows)
            .map(|i| {
                let mut row = row.clone();
                let shift = ((step * settings.micro_batches + index) * settings.rows + i) as f32 * 1e-4;
                row.pixels.iter_mut().for_each(|p| p.data[0] += shift);
                row
            })
            .collect();
        Batch::collate(&rows, pad_id, PaddingSide::Right, 1)
    };
    (0..settings.micro_batches).map(batch).collect()
}

/// Most operations a second of a square product in the type that the device computes in.
fn peak_flops(device: &Device) -> (f64, String) {
    let cpu = crate::weights::keeps_half(device);
    let (n, dtype) = if cpu { (2048, DType::F32) } else { (8192, DType::BF16) };
    let dtype = if cpu || device.supports_dtype(dtype) { dtype } else { DType::F32 };
    let random = || Tensor::<2>::random([n, n], Distribution::Normal(0.0, 1.0), (device, dtype));
    let (a, b) = (random(), random());
    let times = if cpu { 1 } else { 10 };
    let run = || {
        let started = Instant::now();
        let mut out = a.clone().matmul(b.clone());
        for _ in 1..times {
            out = a.clone().matmul(b.clone()) + out.mul_scalar(0.0);
        }
        // Reading waits for the device.
        let _ = out.slice([0..1, 0..1]).into_data();
        started.elapsed().as_secs_f64()
    };
    run();
    let best = (0..5).map(|_| run()).fold(f64::INFINITY, f64::min);
    let each = 2.0 * (n as f64).powi(3) * f64::from(times);
    (each / best, format!("best of 5 products of {n} x {n} in {}", torch_dtype(dtype.into())))
}

fn peak_memory(device: &Device) -> Option<u64> {
    if crate::weights::keeps_half(device) {
        return resident::peak_bytes();
    }
    device.memory_pool_usage().map(|usage| usage.bytes_reserved)
}

fn load_average() -> Option<f64> {
    std::fs::read_to_string("/proc/loadavg").ok()?.split_whitespace().next()?.parse().ok()
}

/// Watches the memory of this process.
struct Sampler {
    stop: Arc<AtomicBool>,
    most: Arc<AtomicU64>,
    thread: std::thread::JoinHandle<()>,
}

impl Sampler {
    fn start() -> Self {
        let (stop, most) = (Arc::<AtomicBool>::default(), Arc::<AtomicU64>::default());
        let (stopped, seen) = (stop.clone(), most.clone());
        let thread = std::thread::spawn(move || {
            while !stopped.load(Ordering::Relaxed) {
                seen.fetch_max(resident::anonymous_bytes().unwrap_or(0), Ordering::Relaxed);
                std::thread::sleep(Duration::from_millis(10));
            }
        });
        Self { stop, most, thread }
    }

    /// The most that was seen; none where the system does not say.
    fn stop(self) -> Option<u64> {
        self.stop.store(true, Ordering::Relaxed);
        // It cannot panic, and without it there is nothing to say.
        self.thread.join().ok()?;
        Some(self.most.load(Ordering::Relaxed)).filter(|n| *n > 0)
    }
}
