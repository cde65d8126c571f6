//! The trainer as a whole: resuming, determinism, accumulation, early stopping, and stopping on bad numbers.

use std::{
    fs,
    path::Path,
    sync::atomic::{AtomicUsize, Ordering},
};

use medtune::{
    Error, Kind, Result,
    adapter::AdapterConfig,
    device::DeviceSpec,
    loader::{Position, Rows, StepRows},
    models::{
        AnyVlm,
        llava_med::{LlavaMed, LlavaMedConfig},
    },
    nn::vit::ClipVisionConfig,
    progress::Progress,
    run_dir::RunDir,
    sample::{Role, Sample, Turn},
    stage::Ctx,
    train::{
        Recompute, SchedulerType, TowerMode, TrainConfig, checkpoint,
        log::{self, LogLine},
        trainer::{Finished, Job, Session, train},
    },
    vlm::{Encoded, ImageSpan, Pixels, Processor},
    weights::init_random,
};

/// Turns the number in a sample's id into tokens that follow a rule, every other row with an image.
#[derive(Default)]
struct Toy {
    encoded: AtomicUsize,
}

const PATCHES: usize = 4;

impl Processor for Toy {
    fn signature(&self) -> serde_json::Value {
        serde_json::json!({ "toy": 1 })
    }

    fn encode(&self, sample: &Sample) -> Result<Encoded> {
        self.encoded.fetch_add(1, Ordering::Relaxed);
        let id: usize = sample.id.parse().map_err(|_| Error::new(Kind::Image, "image is broken").at(&sample.id))?;
        let span = if id.is_multiple_of(2) { PATCHES } else { 0 };
        let length = span + 6 + id % 4;
        Ok(Encoded {
            id: sample.id.clone(),
            input_ids: (0..length).map(|i| (3 + (i + id) % 7) as i32).collect(),
            labels: (0..length).map(|i| if i > span + 1 { (3 + (i + id) % 7) as i32 } else { -100 }).collect(),
            spans: if span > 0 { vec![ImageSpan { start: 0, len: span }] } else { vec![] },
            pixels: if span > 0 {
                let data = (0..192).map(|i| ((i * (id + 1)) as f32 * 0.13).sin()).collect();
                vec![Pixels { data, shape: [3, 8, 8] }]
            } else {
                vec![]
            },
        })
    }

    fn prompt(&self, sample: &Sample) -> Result<Encoded> {
        self.encode(sample)
    }

    fn decode(&self, _ids: &[i32]) -> String {
        String::new()
    }

    fn piece(&self, _id: i32) -> String {
        String::new()
    }

    fn stop_ids(&self) -> &[i32] {
        &[]
    }

    fn pad_id(&self) -> i32 {
        0
    }

    fn vocab_size(&self) -> usize {
        16
    }
}

fn samples(ids: std::ops::Range<usize>) -> Vec<Sample> {
    ids.map(|i| {
        let turns = vec![Turn { role: Role::User, text: "?".into() }];
        serde_json::from_value(serde_json::json!({ "id": i.to_string(), "turns": turns })).unwrap()
    })
    .collect()
}

fn model() -> AnyVlm {
    let config = LlavaMedConfig {
        vocab_size: 16,
        hidden_size: 16,
        intermediate_size: 24,
        num_hidden_layers: 2,
        num_attention_heads: 4,
        num_key_value_heads: Some(2),
        vision_config: Some(ClipVisionConfig {
            hidden_size: 8,
            intermediate_size: 12,
            num_hidden_layers: 3,
            num_attention_heads: 2,
            image_size: 8,
            patch_size: 4,
            ..ClipVisionConfig::default()
        }),
        ..LlavaMedConfig::tiny()
    };
    let device = DeviceSpec::Cpu.open().unwrap();
    init_random(AnyVlm::LlavaMed(LlavaMed::new(&config, &device).unwrap()), 3, 0.2)
}

fn config() -> TrainConfig {
    TrainConfig {
        learning_rate: 1e-2,
        lr_scheduler_type: SchedulerType::Cosine,
        max_steps: 9,
        per_device_train_batch_size: 2,
        gradient_accumulation_steps: 2,
        eval_steps: 4,
        save_steps: 2,
        save_total_limit: 100,
        ..TrainConfig::default()
    }
}

fn adapter() -> AdapterConfig {
    AdapterConfig { r: 2, lora_dropout: 0.1, ..AdapterConfig::default() }
}

struct Outcome {
    finished: Result<Finished<AnyVlm>>,
    _ctx: Ctx,
}

fn run_in(dir: &Path, config: &TrainConfig, ctx: Ctx) -> Outcome {
    let processor = Toy::default();
    let (rows, rejected) = Rows::survey(samples(0..11), &processor, 0, || {});
    assert!(rejected.is_empty());
    let (validation, _) = Rows::survey(samples(20..24), &processor, 0, || {});
    let dir = RunDir::open(dir).unwrap();
    let adapter = adapter();
    let job = Job { config, adapter: &adapter, seed: 5, dir: &dir, ctx: &ctx, fingerprint: "f".into(), pages: None };
    let finished = train(&job, model(), &rows, &validation);
    Outcome { finished, _ctx: ctx }
}

fn quiet() -> Ctx {
    Ctx::new(DeviceSpec::Cpu, Progress::Silent).unwrap()
}

fn run(dir: &Path, config: &TrainConfig) -> Finished<AnyVlm> {
    run_in(dir, config, quiet()).finished.unwrap()
}

/// Bytes of the tensors of a checkpoint.
fn bytes(dir: &Path, step: usize) -> [Vec<u8>; 2] {
    ["trained.safetensors", "optimizer.safetensors"]
        .map(|f| fs::read(dir.join(format!("checkpoint-{step}")).join(f)).unwrap())
}

fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let path = entry.unwrap().path();
        fs::copy(&path, to.join(path.file_name().unwrap())).unwrap();
    }
}

fn steps_logged(dir: &Path) -> Vec<(usize, bool)> {
    let lines: Vec<LogLine> = medtune::run_dir::read_jsonl(&dir.join(log::FILE)).unwrap();
    lines.iter().map(|l| (l.step, l.eval_loss.is_some())).collect()
}

#[test]
fn a_killed_run_continues_to_the_same_bytes_from_every_checkpoint() {
    for recompute in [Recompute::Never, Recompute::Always] {
        let config = TrainConfig { recompute, ..config() };
        let whole = tempfile::tempdir().unwrap();
        run(whole.path(), &config);
        for from in [2, 4, 6, 8] {
            let killed = tempfile::tempdir().unwrap();
            let name = format!("checkpoint-{from}");
            copy(&whole.path().join(&name), &killed.path().join(&name));
            // A kill leaves lines of steps that will be done again, and half a checkpoint.
            fs::copy(whole.path().join(log::FILE), killed.path().join(log::FILE)).unwrap();
            fs::create_dir(killed.path().join(".tmp-checkpoint-8")).unwrap();
            fs::write(killed.path().join(".tmp-checkpoint-8/trained.safetensors"), "half").unwrap();
            run(killed.path(), &config);
            assert!(bytes(whole.path(), 9) == bytes(killed.path(), 9), "from step {from}");
            assert_eq!(steps_logged(whole.path()), steps_logged(killed.path()));
        }
    }
}

#[test]
fn a_user_who_interrupts_loses_nothing() {
    let whole = tempfile::tempdir().unwrap();
    run(whole.path(), &config());
    let stopped = tempfile::tempdir().unwrap();
    let ctx = quiet();
    ctx.stop.store(true, Ordering::Relaxed);
    let outcome = run_in(stopped.path(), &config(), ctx);
    assert_eq!(outcome.finished.unwrap_err().kind(), Kind::Interrupted);
    run(stopped.path(), &config());
    assert!(bytes(whole.path(), 9) == bytes(stopped.path(), 9));
}

#[test]
fn threads_change_no_byte() {
    let results: Vec<_> = [(1, 1), (2, 1), (2, 3)]
        .into_iter()
        .map(|(threads, workers)| {
            let dir = tempfile::tempdir().unwrap();
            let config = TrainConfig { dataloader_num_workers: workers, ..config() };
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| run(dir.path(), &config));
            bytes(dir.path(), 9)
        })
        .collect();
    assert!(results[0] == results[1] && results[1] == results[2]);
}

#[test]
fn training_lowers_the_loss_and_keeps_the_best() {
    let dir = tempfile::tempdir().unwrap();
    let config = TrainConfig {
        max_steps: 40,
        eval_steps: 5,
        save_total_limit: 1,
        learning_rate: 3e-2,
        load_best_model_at_end: true,
        ..config()
    };
    let finished = run(dir.path(), &config);
    let lines: Vec<LogLine> = medtune::run_dir::read_jsonl(&dir.path().join(log::FILE)).unwrap();
    let losses: Vec<f64> = lines.iter().filter_map(|l| l.loss).collect();
    assert!(losses[35..].iter().sum::<f64>() < 0.8 * losses[..5].iter().sum::<f64>(), "{losses:?}");
    let best = lines.iter().filter_map(|l| Some((l.step, l.eval_loss?))).min_by(|a, b| a.1.total_cmp(&b.1)).unwrap();
    assert_eq!(finished.weights_of_step, best.0);
    assert!(lines.iter().all(|l| l.loss.is_none() || (l.grad_norm.is_some() && l.tokens_per_second.is_some())));
    // The best stays beside the newest.
    let run_dir = RunDir::open(dir.path()).unwrap();
    let mut kept = vec![best.0, 40];
    kept.dedup();
    assert_eq!(checkpoint::steps(&run_dir), kept);
}

#[test]
fn early_stopping_ends_a_training_that_gets_worse() {
    let dir = tempfile::tempdir().unwrap();
    // No learning rate, no improvement after the first evaluation.
    let config =
        TrainConfig { learning_rate: 0.0, max_steps: 50, eval_steps: 2, early_stopping_patience: 3, ..config() };
    let finished = run(dir.path(), &config);
    assert!(finished.state.stopped_early);
    assert_eq!(finished.state.step, 8);
    assert_eq!(run(dir.path(), &config).state.step, 8);
}

#[test]
fn a_loss_that_is_not_finite_stops_with_rows_and_the_last_good_checkpoint() {
    let dir = tempfile::tempdir().unwrap();
    let config = TrainConfig { learning_rate: 1e30, warmup_steps: 5, save_steps: 1, ..config() };
    let error = run_in(dir.path(), &config, quiet()).finished.unwrap_err();
    assert_eq!(error.kind(), Kind::Numeric);
    assert!(error.to_string().contains("rows "), "{error}");
    let help = error.help_line().unwrap();
    let run_dir = RunDir::open(dir.path()).unwrap();
    let last = *checkpoint::steps(&run_dir).last().unwrap();
    assert!(help.contains(&format!("checkpoint-{last} is the last good checkpoint")), "{help}");
}

#[test]
fn a_pattern_that_matches_nothing_is_an_error_before_any_step() {
    let dir = tempfile::tempdir().unwrap();
    let dir = RunDir::open(dir.path()).unwrap();
    let ctx = quiet();
    let adapter = AdapterConfig { target_modules: vec!["q_porj".into()], ..adapter() };
    let config = config();
    let job =
        Job { config: &config, adapter: &adapter, seed: 5, dir: &dir, ctx: &ctx, fingerprint: "f".into(), pages: None };
    let error = Session::new(&job, model()).err().unwrap();
    assert!(error.help_line().unwrap().contains("q_proj"), "{error:?}");
}

#[test]
fn one_step_of_four_rows_equals_four_accumulated_rows() {
    let processor = Toy::default();
    let (rows, _) = Rows::survey(samples(0..4), &processor, 0, || {});
    let reports: Vec<_> = [4, 2, 1]
        .into_iter()
        .map(|size| {
            let dir = tempfile::tempdir().unwrap();
            let dir = RunDir::open(dir.path()).unwrap();
            let ctx = quiet();
            let adapter = AdapterConfig { lora_dropout: 0.0, ..adapter() };
            let config = config();
            let job = Job {
                config: &config,
                adapter: &adapter,
                seed: 5,
                dir: &dir,
                ctx: &ctx,
                fingerprint: "f".into(),
                pages: None,
            };
            let mut session = Session::new(&job, model()).unwrap();
            let all: Vec<usize> = (0..4).collect();
            let micro_batches = all.chunks(size).map(|c| rows.batch(c, 1).unwrap()).collect();
            session.step(&StepRows { micro_batches, next: Position::default() }, 1.0).unwrap()
        })
        .collect();
    for other in &reports[1..] {
        assert!((reports[0].loss - other.loss).abs() < 1e-6, "{reports:?}");
        assert!((reports[0].grad_norm / other.grad_norm - 1.0).abs() < 1e-5, "{reports:?}");
        assert_eq!(reports[0].tokens, other.tokens);
    }
}

#[test]
fn every_tower_mode_trains_and_only_what_it_opens() {
    use TowerMode::{Frozen, Full, Lora};
    for (vision, projector, language) in [(Lora, Frozen, Frozen), (Full, Full, Full), (Frozen, Lora, Lora)] {
        let dir = tempfile::tempdir().unwrap();
        let config = TrainConfig { vision, projector, language, max_steps: 2, ..config() };
        let finished = run(dir.path(), &config);
        for (tower, mode) in [("vision", vision), ("projector", projector), ("language", language)] {
            let own: Vec<_> = finished.trained.iter().filter(|t| t.tower == tower).collect();
            assert_eq!(own.is_empty(), mode == Frozen, "{tower}");
            assert!(own.iter().all(|t| t.lora == (mode == Lora)), "{tower}");
        }
    }
}
