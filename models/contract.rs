//! What every family must do, whatever it is made of: each test goes through the registry.

use std::path::Path;

use crate::{
    adapter::{
        AdapterConfig,
        target::{linears, select},
    },
    device::DeviceSpec,
    generate::{GenerateConfig, argmax, generate},
    loader::{Position, StepRows},
    models::{AnyVlm, LoadOptions, MODELS, ModelDef, load},
    nn::visit::named_params,
    progress::Progress,
    run_dir::RunDir,
    sample::Sample,
    stage::Ctx,
    train::{
        Recompute, SchedulerType, TowerMode, TrainConfig,
        params::GradientSum,
        trainer::{Job, Session},
    },
    vlm::{Batch, Encoded, PaddingSide, Processor, Vlm},
    weights::{Checkpoint, SaveOptions},
};
use burn::tensor::{Device, Tensor};
use serde_json::json;

/// A tiny random model of a family in a directory, loaded from there.
struct Family {
    dir: tempfile::TempDir,
    device: Device,
    /// As it was before it was saved.
    initial: AnyVlm,
    model: AnyVlm,
    processor: Box<dyn Processor>,
}

const ROWS: [(&str, &str, bool); 3] = [
    ("<image>\nIs there a nodule in the left lung?", "Yes, a small nodule.", true),
    ("Which organ is shown in a chest radiograph?", "The lungs and the heart.", false),
    ("<image>\nNormal?", "No.", true),
];

impl Family {
    fn open(def: &ModelDef) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let device = DeviceSpec::Cpu.open().unwrap();
        let initial = (def.init)("tiny", None, 7, &device).unwrap();
        initial.save(dir.path(), &SaveOptions::default()).unwrap();
        let texts: Vec<String> = ROWS.iter().flat_map(|r| [r.0, r.1]).map(|t| t.replace("<image>", "")).collect();
        let vocab_size = def.presets.iter().find(|p| p.name == "tiny").unwrap().vocab_size;
        for (name, bytes) in (def.tokenizer.train)(&texts, vocab_size).unwrap() {
            std::fs::write(dir.path().join(name), bytes).unwrap();
        }
        let (model, processor) = load(dir.path(), &LoadOptions::default(), &device).unwrap();
        Self { dir, device, initial, model, processor }
    }

    fn samples(&self) -> Vec<Sample> {
        let path = self.dir.path().join("image.png");
        let pixel = |x: u32, y: u32| image::Rgb([(x * 6) as u8, (y * 5) as u8, (x * y) as u8]);
        image::RgbImage::from_fn(40, 30, pixel).save(&path).unwrap();
        let row = |(i, (question, answer, shown)): (usize, &(&str, &str, bool))| {
            let images = if *shown { vec![json!({ "path": path })] } else { vec![] };
            let turns = json!([{"role": "user", "text": question}, {"role": "assistant", "text": answer}]);
            serde_json::from_value(json!({"id": i.to_string(), "images": images, "turns": turns})).unwrap()
        };
        ROWS.iter().enumerate().map(row).collect()
    }

    fn rows(&self) -> Vec<Encoded> {
        self.samples().iter().map(|s| self.processor.encode(s).unwrap()).collect()
    }

    fn batch(&self, rows: &[Encoded], side: PaddingSide) -> Batch {
        Batch::collate(rows, self.processor.pad_id(), side, 1)
    }

    /// Logits at the real tokens of a batch, row after row.
    fn logits(&self, model: &AnyVlm, batch: &Batch) -> Vec<Vec<f32>> {
        let context = model.context(batch, &self.device);
        let mut x = model.embed(batch, model.features(batch, &self.device), &self.device);
        for i in 0..model.num_layers() {
            x = model.layer(i, x, &context, None);
        }
        let [rows, length, hidden] = x.dims();
        let logits = model.logits(model.final_norm(x).reshape([rows * length, hidden]));
        let width = logits.dims()[1];
        let values = floats(logits);
        let real = (0..rows * length).filter(|cell| batch.mask[*cell]);
        real.map(|cell| values[cell * width..(cell + 1) * width].to_vec()).collect()
    }

    fn with_session<T>(&self, config: &TrainConfig, then: impl FnOnce(&mut Session<'_, AnyVlm>) -> T) -> T {
        let config = TrainConfig {
            vision: TowerMode::Full,
            projector: TowerMode::Full,
            language: TowerMode::Full,
            lr_scheduler_type: SchedulerType::Constant,
            ..config.clone()
        };
        let temporary = tempfile::tempdir().unwrap();
        let dir = RunDir::open(temporary.path()).unwrap();
        let ctx = Ctx::new(DeviceSpec::Cpu, Progress::Silent).unwrap();
        let adapter = AdapterConfig::default();
        let job = Job {
            config: &config,
            adapter: &adapter,
            seed: 1,
            dir: &dir,
            ctx: &ctx,
            fingerprint: String::new(),
            pages: None,
            log: Default::default(),
        };
        then(&mut Session::new(&job, self.model.clone()).unwrap())
    }
}

fn floats<const D: usize>(tensor: Tensor<D>) -> Vec<f32> {
    tensor.into_data().try_to_vec().unwrap()
}

fn worst(a: &[Vec<f32>], b: &[Vec<f32>]) -> f32 {
    assert_eq!(a.len(), b.len());
    let pairs = a.iter().flatten().zip(b.iter().flatten());
    pairs.map(|(x, y)| (x - y).abs()).fold(0.0, f32::max)
}

/// Runs `test` on every family and names the one it fails for.
fn each(test: impl Fn(&ModelDef, &Family)) {
    assert!(MODELS.len() > 1);
    for def in MODELS {
        test(def, &Family::open(def));
    }
}

/// Names in a file of weights, sorted.
fn stored(dir: &Path) -> Vec<String> {
    Checkpoint::open(dir).unwrap().names().map(String::from).collect()
}

#[test]
fn saved_and_loaded_a_model_is_the_same() {
    each(|def, family| {
        let batch = family.batch(&family.rows(), PaddingSide::Right);
        let (before, after) = (family.logits(&family.initial, &batch), family.logits(&family.model, &batch));
        assert_eq!(before, after, "{}", def.name);
        let mut names: Vec<String> = named_params(&family.model).into_iter().map(|p| p.name).collect();
        names.sort();
        assert_eq!(stored(family.dir.path()), names, "{}: every weight has a name in the file", def.name);
        let again = tempfile::tempdir().unwrap();
        family.model.save(again.path(), &SaveOptions::default()).unwrap();
        let config = |dir: &Path| std::fs::read_to_string(dir.join("config.json")).unwrap();
        assert_eq!(config(family.dir.path()), config(again.path()), "{}", def.name);
    });
}

#[test]
fn a_row_does_not_depend_on_padding_or_on_its_neighbours() {
    each(|def, family| {
        let rows = family.rows();
        let alone: Vec<Vec<f32>> = rows
            .iter()
            .flat_map(|row| family.logits(&family.model, &family.batch(std::slice::from_ref(row), PaddingSide::Right)))
            .collect();
        for side in [PaddingSide::Right, PaddingSide::Left] {
            let off = worst(&family.logits(&family.model, &family.batch(&rows, side)), &alone);
            assert!(off < 1e-4, "{} {side:?}: {off}", def.name);
        }
    });
}

#[test]
fn cached_generation_is_recomputation() {
    each(|def, family| {
        let prompts: Vec<Encoded> = family.samples().iter().map(|s| family.processor.prompt(s).unwrap()).collect();
        let config = GenerateConfig { max_new_tokens: 6, batch_size: prompts.len(), ..GenerateConfig::default() };
        let pad = family.processor.pad_id();
        let found = generate(&family.model, &prompts, pad, &[], &config, 0, &family.device, &mut |_, _| {}).unwrap();
        for (prompt, found) in prompts.iter().zip(found) {
            let mut row = prompt.clone();
            for token in found {
                let logits =
                    family.logits(&family.model, &family.batch(std::slice::from_ref(&row), PaddingSide::Right));
                assert_eq!(
                    argmax(logits.last().unwrap()) as i32,
                    token,
                    "{} after {} tokens",
                    def.name,
                    row.labels.len()
                );
                row.input_ids.push(token);
                row.labels.push(crate::vlm::IGNORE);
            }
        }
    });
}

#[test]
fn layer_by_layer_gradients_are_those_of_one_graph() {
    each(|def, family| {
        let batch = family.batch(&family.rows(), PaddingSide::Right);
        let gradients = |recompute| {
            family.with_session(&TrainConfig { recompute, ..TrainConfig::default() }, |session| {
                let mut sums = GradientSum::new(&session.model);
                session.accumulate(std::slice::from_ref(&batch), &mut sums).unwrap();
                let names: Vec<String> = session.trained.iter().map(|t| t.name.clone()).collect();
                names.into_iter().zip(sums.sums.into_iter().map(|g| g.map(floats))).collect::<Vec<_>>()
            })
        };
        for ((name, whole), (_, layered)) in gradients(Recompute::Never).into_iter().zip(gradients(Recompute::Always)) {
            assert_eq!(whole.is_some(), layered.is_some(), "{} {name}", def.name);
            let (Some(whole), Some(layered)) = (whole, layered) else { continue };
            let scale = whole.iter().fold(0f32, |m, v| m.max(v.abs()));
            let off = whole.iter().zip(&layered).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
            assert!(off <= 1e-4 * scale + 1e-7, "{} {name}: {off} of {scale}", def.name);
        }
    });
}

#[test]
fn one_batch_is_learnt_by_heart() {
    each(|def, family| {
        let config = TrainConfig { learning_rate: 3e-3, ..TrainConfig::default() };
        let batch = family.batch(&family.rows(), PaddingSide::Right);
        let losses: Vec<f64> = family.with_session(&config, |session| {
            let mut step = || {
                let rows = StepRows { micro_batches: vec![batch.clone()], next: Position::default() };
                let report = session.step(&rows, 1.0).unwrap();
                session.state.step += 1;
                report.loss
            };
            (0..30).map(|_| step()).collect()
        });
        let (first, last) = (losses[0], losses[losses.len() - 1]);
        assert!(last < 0.3 * first, "{}: loss went from {first} to {last}", def.name);
    });
}

#[test]
fn adapter_targets_of_every_preset_match() {
    let device = DeviceSpec::Cpu.open().unwrap();
    for def in MODELS {
        for preset in def.presets {
            let (model, _) = (def.empty)(preset.name, &device).unwrap();
            let patterns: Vec<String> = preset.lora_targets.iter().map(ToString::to_string).collect();
            let coverage = select(&patterns, &linears(&model, model.towers()), |tower| tower == "language");
            assert!(!coverage.unwrap().modules.is_empty(), "{} {}", def.name, preset.name);
        }
    }
}
