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
        log::{self, LogLine, Targets},
        trainer::{Finished, Job, Session, train},
    },
    vlm::{Encoded, ImageSpan, Pixels, Processor},
    weights::init_random,
};

/// Turns the number in a sample's id into tokens that follow a rule, every other row with an image.
#[derive(Default)]
pub(crate) struct Toy {
    encoded: AtomicUsize,
    /// Id of a row whose pixels are not finite.
    poisoned: Option<usize>,
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
                let bad = if self.poisoned == Some(id) { f32::NAN } else { 0.0 };
                let data = (0..192).map(|i| ((i * (id + 1)) as f32 * 0.13).sin() + bad).collect();
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

pub(crate) fn samples(ids: std::ops::Range<usize>) -> Vec<Sample> {
    ids.map(|i| {
        let turns = vec![Turn { role: Role::User, text: "?".into() }];
        serde_json::from_value(serde_json::json!({ "id": i.to_string(), "turns": turns })).unwrap()
    })
    .collect()
}

pub(crate) fn model() -> AnyVlm {
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

pub(crate) fn config() -> TrainConfig {
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

pub(crate) fn adapter() -> AdapterConfig {
    AdapterConfig { r: 2, lora_dropout: 0.1, ..AdapterConfig::default() }
}

pub(crate) struct Outcome {
    pub(crate) finished: Result<Finished<AnyVlm>>,
    _ctx: Ctx,
}

fn run_in(dir: &Path, config: &TrainConfig, ctx: Ctx) -> Outcome {
    run_logged(dir, config, ctx, Targets::default(), Toy::default())
}

pub(crate) fn run_logged(dir: &Path, config: &TrainConfig, ctx: Ctx, log: Targets, processor: Toy) -> Outcome {
    let (rows, rejected) = Rows::survey(samples(0..11), &processor, 0, || {});
    assert!(rejected.is_empty());
    let (validation, _) = Rows::survey(samples(20..24), &processor, 0, || {});
    let dir = RunDir::open(dir).unwrap();
    let adapter = adapter();
    let job =
        Job { config, adapter: &adapter, seed: 5, dir: &dir, ctx: &ctx, fingerprint: "f".into(), pages: None, log };
    let finished = train(&job, model(), &rows, &validation);
    Outcome { finished, _ctx: ctx }
}

pub(crate) fn quiet() -> Ctx {
    Ctx::new(DeviceSpec::Cpu, Progress::Silent).unwrap()
}

fn run(dir: &Path, config: &TrainConfig) -> Finished<AnyVlm> {
    run_in(dir, config, quiet()).finished.unwrap()
}

/// Bytes of the tensors of a checkpoint.
pub(crate) fn bytes(dir: &Path, step: usize) -> [Vec<u8>; 2] {
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
    let job = Job {
        config: &config,
        adapter: &adapter,
        seed: 5,
        dir: &dir,
        ctx: &ctx,
        fingerprint: "f".into(),
        pages: None,
        log: Default::default(),
    };
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
                log: Default::default(),
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

/// Everything that makes resuming hard.
fn hard() -> TrainConfig {
    TrainConfig {
        packing: true,
        packing_length: 32,
        dataloader_num_workers: 3,
        save_steps: 1,
        eval_steps: 3,
        ..config()
    }
}

#[test]
fn packing_dropout_accumulation_and_threads_resume_to_the_same_bytes() {
    let whole = tempfile::tempdir().unwrap();
    run(whole.path(), &hard());
    let packed: Vec<LogLine> = medtune::run_dir::read_jsonl(&whole.path().join(log::FILE)).unwrap();
    let plain = tempfile::tempdir().unwrap();
    run(plain.path(), &config());
    assert_ne!(bytes(whole.path(), 9), bytes(plain.path(), 9), "packing changes which rows share a step");
    assert!(packed.len() > 9);
    for from in [1, 2, 5, 8] {
        let killed = tempfile::tempdir().unwrap();
        let name = format!("checkpoint-{from}");
        copy(&whole.path().join(&name), &killed.path().join(&name));
        fs::copy(whole.path().join(log::FILE), killed.path().join(log::FILE)).unwrap();
        run(killed.path(), &TrainConfig { dataloader_num_workers: 1 + from % 3, ..hard() });
        assert!(bytes(whole.path(), 9) == bytes(killed.path(), 9), "from step {from}");
        assert_eq!(steps_logged(whole.path()), steps_logged(killed.path()));
    }
}

#[test]
fn a_damaged_newest_checkpoint_falls_back_and_is_never_taken_for_a_new_one() {
    let whole = tempfile::tempdir().unwrap();
    let config = TrainConfig { save_steps: 3, save_total_limit: 1, eval_steps: 0, ..config() };
    run(whole.path(), &config);
    let dir = tempfile::tempdir().unwrap();
    run(dir.path(), &TrainConfig { save_total_limit: 5, ..config.clone() });
    let newest = dir.path().join("checkpoint-9/optimizer.safetensors");
    let half = fs::read(&newest).unwrap();
    fs::write(&newest, &half[..half.len() / 2]).unwrap();
    run(dir.path(), &TrainConfig { save_steps: 1, ..config });
    assert!(bytes(whole.path(), 9) == bytes(dir.path(), 9));
    let run_dir = RunDir::open(dir.path()).unwrap();
    assert_eq!(checkpoint::steps(&run_dir), [9]);
    assert!(dir.path().join("unusable-checkpoint-9").exists());
}

#[test]
fn a_named_checkpoint_of_another_run_is_continued() {
    let (whole, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    run(whole.path(), &config());
    let from = whole.path().join("checkpoint-4").display().to_string();
    let config = TrainConfig { resume_from_checkpoint: Some(from), ..config() };
    run(other.path(), &config);
    assert!(bytes(whole.path(), 9) == bytes(other.path(), 9));
    assert_eq!(steps_logged(other.path())[0].0, 5);
    // The same command again continues from where it got to, not from the named one.
    assert_eq!(run(other.path(), &config).state.step, 9);
    let missing = TrainConfig { resume_from_checkpoint: Some("nowhere".into()), ..config };
    let error = run_in(tempfile::tempdir().unwrap().path(), &missing, quiet()).finished.unwrap_err();
    assert!(error.to_string().contains("nowhere"), "{error}");
}

#[test]
fn a_checkpoint_is_as_large_as_what_is_trained() {
    let dir = tempfile::tempdir().unwrap();
    let config = TrainConfig { projector: TowerMode::Frozen, ..config() };
    let finished = run(dir.path(), &config);
    let trained: usize = finished.trained.iter().map(medtune::train::params::Trained::len).sum();
    let place = dir.path().join("checkpoint-9");
    let size = |name: &str| fs::metadata(place.join(name)).unwrap().len() as usize;
    // f32 values, and two moments each; the rest is names.
    let names = 200 * finished.trained.len();
    assert!((4 * trained..4 * trained + names).contains(&size("trained.safetensors")));
    assert!((8 * trained..8 * trained + 2 * names).contains(&size("optimizer.safetensors")));
}

#[test]
fn a_loss_spike_changes_no_weight_and_is_counted() {
    let config = TrainConfig {
        // Whatever is above the loss before is a spike.
        loss_spike_factor: 1.0 + 1e-9,
        loss_spike_window: 1,
        save_steps: 1,
        eval_steps: 0,
        ..config()
    };
    let whole = tempfile::tempdir().unwrap();
    let finished = run(whole.path(), &config);
    let lines: Vec<LogLine> = medtune::run_dir::read_jsonl(&whole.path().join(log::FILE)).unwrap();
    let skipped: Vec<usize> = lines.iter().map(|l| l.skipped_steps.unwrap_or(0)).collect();
    assert_eq!(*skipped.last().unwrap(), finished.state.skipped_steps);
    let mut level = f64::INFINITY;
    let (mut found, mut left_out) = (0, Vec::new());
    for line in &lines {
        let loss = line.loss.unwrap();
        if loss > level {
            found += 1;
            left_out.push(line.step);
        } else {
            level = loss;
        }
        assert_eq!(line.skipped_steps.unwrap_or(0), found, "step {}", line.step);
    }
    assert!(!left_out.is_empty() && left_out.len() < 8, "{lines:?}");
    for step in left_out {
        assert!(bytes(whole.path(), step) == bytes(whole.path(), step - 1), "step {step}");
    }
    let killed = tempfile::tempdir().unwrap();
    copy(&whole.path().join("checkpoint-4"), &killed.path().join("checkpoint-4"));
    assert_eq!(run(killed.path(), &config).state.skipped_steps, finished.state.skipped_steps);
    assert!(bytes(whole.path(), 9) == bytes(killed.path(), 9));
}

#[test]
fn spikes_that_do_not_end_stop_the_training() {
    let dir = tempfile::tempdir().unwrap();
    let config = TrainConfig {
        loss_spike_factor: 1.0 + 1e-9,
        loss_spike_window: 1,
        max_steps: 400,
        // Rows differ, so that some step has a loss that none after it reaches again.
        learning_rate: 0.0,
        save_steps: 0,
        eval_steps: 0,
        ..config()
    };
    let error = run_in(dir.path(), &config, quiet()).finished.unwrap_err();
    assert_eq!(error.kind(), Kind::Numeric);
    assert!(error.to_string().contains("10 loss spikes in a row"), "{error}");
}

#[test]
fn a_number_that_is_not_finite_is_traced_to_where_it_began() {
    let stop = |config: &TrainConfig, poisoned| {
        let dir = tempfile::tempdir().unwrap();
        let toy = Toy { poisoned, ..Toy::default() };
        run_logged(dir.path(), config, quiet(), Targets::default(), toy).finished.unwrap_err().to_string()
    };
    let pixels = stop(&config(), Some(4));
    assert!(pixels.contains("first in: pixels of an image of row 4"), "{pixels}");
    assert!(pixels.contains("rows 4"), "{pixels}");
    let weights = stop(&TrainConfig { learning_rate: f64::MAX, warmup_steps: 1, ..config() }, None);
    assert!(weights.contains("first in: trained tensor "), "{weights}");
    let large = stop(&TrainConfig { learning_rate: 1e30, warmup_steps: 1, ..config() }, None);
    assert!(large.contains("first in: "), "{large}");
}

#[test]
fn an_interrupted_evaluation_is_made_when_the_training_continues() {
    let config = TrainConfig { eval_steps: 3, save_steps: 0, ..config() };
    let whole = tempfile::tempdir().unwrap();
    run(whole.path(), &config);
    let dir = tempfile::tempdir().unwrap();
    let name = "checkpoint-3";
    copy(&whole.path().join(name), &dir.path().join(name));
    // As the interrupt leaves it: the step is done, its evaluation is not.
    let state = dir.path().join(name).join("state.json");
    let mut value: serde_json::Value = serde_json::from_slice(&fs::read(&state).unwrap()).unwrap();
    value["evaluation_due"] = true.into();
    value["best"] = serde_json::Value::Null;
    fs::write(&state, serde_json::to_vec(&value).unwrap()).unwrap();
    let manifest = dir.path().join(name).join("MANIFEST.json");
    let mut hashes: serde_json::Value = serde_json::from_slice(&fs::read(&manifest).unwrap()).unwrap();
    hashes["state.json"] = medtune::run_dir::sha256(&state).unwrap().into();
    fs::write(&manifest, serde_json::to_vec(&hashes).unwrap()).unwrap();
    let finished = run(dir.path(), &config);
    assert_eq!(steps_logged(dir.path())[0], (3, true));
    assert!(bytes(whole.path(), 9) == bytes(dir.path(), 9));
    assert!(!finished.state.evaluation_due);
}

#[test]
fn the_state_is_also_there_as_hugging_face_has_it() {
    let dir = tempfile::tempdir().unwrap();
    let finished = run(dir.path(), &config());
    for (place, step) in [("checkpoint-4/trainer_state.json", 4), ("trainer_state.json", 9)] {
        let state: serde_json::Value = serde_json::from_slice(&fs::read(dir.path().join(place)).unwrap()).unwrap();
        assert_eq!((state["global_step"].as_u64(), state["max_steps"].as_u64()), (Some(step), Some(9)));
        let history = state["log_history"].as_array().unwrap();
        assert!(history.iter().all(|l| l["step"].as_u64().unwrap() <= step));
        assert_eq!(history.iter().filter(|l| l["eval_loss"].is_number()).count(), if step == 4 { 1 } else { 3 });
        assert!(history[0]["learning_rate"].is_number() && history[0]["grad_norm"].is_number());
    }
    assert!(finished.state.tokens > 0);
}
