//! Adapters: logits, merged weights, gradients, optimizer steps, and full fine-tuning.

use std::collections::BTreeMap;

use burn::tensor::{Device, Tensor};
use medtune::{
    adapter::{
        AdapterConfig, merge, peft,
        target::{linears, select},
        tensors::HostTensor,
    },
    loader::{Position, StepRows},
    models::{Compat, qwen_vl::QwenVl},
    progress::Progress,
    run_dir::RunDir,
    stage::Ctx,
    train::{
        LossReduction, Recompute, SchedulerType, TowerMode, TrainConfig,
        clip::global_norm,
        optimizer, params,
        params::{GradientSum, Trained},
        schedule::Schedule,
        step,
        trainer::{Job, Session},
    },
    vlm::{Batch, Vlm, row_segments},
    weights::SaveOptions,
};
use serde_json::{Value, json};

use super::{
    Family, floats,
    forward::{Case, LOGITS, logits},
    text::{ints, list, text},
};
use crate::parity::fixture::{self, Checks, Tensors, json as read_json};

const MERGED: f32 = 1e-6;
const GRADIENT: f32 = 2e-5;
const STEP: f32 = 3e-5;
const LOSS: f64 = 1e-5;
const NORM: f64 = 3e-5;
const FULL_NORM: f64 = 1e-4;
const FULL_VALUE: f32 = 3e-4;

/// Rows that the fixture keeps of a merged weight.
const EVERY: usize = 7;

pub(super) fn check(checks: &mut Checks) {
    let family = Family::open();
    let fixture = Fixture {
        golden: read_json(&family.golden("lora.json")),
        cases: read_json(&family.golden("forward_cases.json")),
        forward: Tensors::open(&family.golden("lora_forward.safetensors")),
        train: Tensors::open(&family.golden("lora_train.safetensors")),
        device: fixture::device(),
        family,
    };
    fixture.targets(checks);
    for dir in ["adapter", "adapter_bin"] {
        fixture.forward(checks, dir);
        fixture.merged(checks, dir);
    }
    for recompute in [Recompute::Never, Recompute::Always] {
        fixture.gradients(checks, recompute);
        fixture.accumulation(checks, recompute);
    }
    fixture.steps(checks);
    fixture.trajectory(checks);
    fixture.full(checks);
}

struct Fixture {
    family: Family,
    /// lora.json
    golden: Value,
    /// forward_cases.json
    cases: Value,
    forward: Tensors,
    train: Tensors,
    device: Device,
}

/// Which parts of the model a test trains.
#[derive(Clone, Copy)]
struct Modes {
    vision: TowerMode,
    projector: TowerMode,
    language: TowerMode,
}

const LORA: Modes = Modes { vision: TowerMode::Frozen, projector: TowerMode::Frozen, language: TowerMode::Lora };

impl Fixture {
    fn base(&self) -> QwenVl {
        self.family.model(&self.device)
    }

    fn adapted(&self, dir: &str) -> QwenVl {
        peft::load(self.base(), &self.family.root.join(dir), &json!({})).unwrap()
    }

    fn case(&self, id: &str) -> Case {
        let description = list(&self.cases).iter().find(|c| c["id"] == id).unwrap_or_else(|| panic!("no case {id}"));
        Case::open(&self.family, description)
    }

    /// The batch of all training goldens: the supervised case in training mode with several rows.
    fn training(&self) -> Case {
        let trained = list(&self.cases)
            .iter()
            .find(|c| c["mode"] == "train" && c["loss"].is_number() && c["batch"].as_u64() > Some(1));
        Case::open(&self.family, trained.expect("a training batch"))
    }

    fn adapter_config(&self) -> AdapterConfig {
        let file = read_json(&self.family.root.join("adapter/adapter_config.json"));
        AdapterConfig {
            r: file["r"].as_u64().unwrap() as usize,
            lora_alpha: file["lora_alpha"].as_f64().unwrap(),
            lora_dropout: file["lora_dropout"].as_f64().unwrap(),
            target_modules: list(&file["target_modules"]).iter().map(|t| text(t).to_string()).collect(),
            ..AdapterConfig::default()
        }
    }

    /// The requested patterns match what PEFT matched, and nothing of the vision tower even where it is open.
    fn targets(&self, checks: &mut Checks) {
        let targets = &self.golden["target_modules"];
        let names = |value: &Value| list(value).iter().map(|t| text(t).to_string()).collect::<Vec<_>>();
        let model = self.base();
        let coverage = select(&names(&targets["requested"]), &linears(&model, model.towers()), |_| true).unwrap();
        let mut found: Vec<String> = coverage.modules.iter().map(|m| m.name.clone()).collect();
        let mut expected = names(&targets["matched"]);
        found.sort();
        expected.sort();
        checks.equal("matched modules", &found, &expected);
        for name in names(&targets["vision_linear_like_modules_not_matched"]) {
            checks.equal(&name, found.contains(&name), false);
        }
        let adapter = self.adapter_config();
        let r = self.golden["lora"]["r"].as_u64().unwrap() as usize;
        checks.equal("rank", adapter.r, r);
        for module in &coverage.modules {
            for (part, shape) in [("lora_A", [r, module.d_in]), ("lora_B", [module.d_out, r])] {
                let expected = &self.golden["lora"]["trainable"][format!("{}.{part}", module.name)];
                checks.equal(&format!("{} {part}", module.name), shape.map(|n| n as i32).to_vec(), ints(expected));
            }
        }
    }

    fn forward(&self, checks: &mut Checks, dir: &str) {
        let plain = self.adapted(dir);
        let merged = merge::merge(self.adapted(dir), &[self.case("text").batch], &self.device).unwrap().0;
        for name in self.forward.names() {
            let Some(id) = name.strip_suffix(".adapter_logits") else { continue };
            let case = self.case(id);
            for model in [&plain, &merged] {
                let model = model.clone().with_config(case.config.clone()).with_compat(case.compat);
                let found = logits(&model, &case.batch, &self.device);
                let golden = self.forward.f32(&name);
                case.close(checks, "adapter_logits", &found, &golden, case.vocab_size(), LOGITS);
            }
        }
    }

    fn merged(&self, checks: &mut Checks, dir: &str) {
        let model = merge::merge(self.adapted(dir), &[self.case("text").batch], &self.device).unwrap().0;
        let saved = tempfile::tempdir().unwrap();
        model.save(saved.path(), &SaveOptions::default()).unwrap();
        let saved = Tensors::open(&saved.path().join("model.safetensors"));
        for name in self.forward.names() {
            let Some(weight) = name.strip_prefix("merged.").and_then(|n| n.strip_suffix(".rows")) else { continue };
            let width = saved.shape(weight)[1];
            let all = saved.f32(weight);
            let rows: Vec<f32> = all.chunks(width).step_by(EVERY).flatten().copied().collect();
            checks.close(&name, &rows, &self.forward.f32(&name), MERGED);
        }
    }

    /// A training session on the fixture's model in the state of its training mode.
    fn with_session(&self, config: &TrainConfig, modes: Modes, then: impl FnOnce(&mut Session<'_, QwenVl>)) {
        let adapter = self.adapter_config();
        let config = TrainConfig {
            vision: modes.vision,
            projector: modes.projector,
            language: modes.language,
            ..config.clone()
        };
        let temporary = tempfile::tempdir().unwrap();
        let dir = RunDir::open(temporary.path()).unwrap();
        let ctx = Ctx::new(fixture::spec(), Progress::Silent).unwrap();
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
        let compat = self.training().compat;
        let mut session = Session::new(&job, self.base().with_compat(compat)).unwrap();
        if modes.language == TowerMode::Lora {
            let values = session.trained.iter().map(|t| (t.name.clone(), self.start(t))).collect();
            session.model = params::replace(session.model, &session.trained, values);
        }
        then(&mut session);
    }

    /// The fixture's own adapter, where its training starts.
    fn start(&self, t: &Trained) -> Tensor<1> {
        let file = Tensors::open(&self.family.root.join("adapter/adapter_model.safetensors"));
        let name = format!("base_model.model.{}", t.name);
        let tensor = HostTensor { shape: file.shape(&name), values: file.f32(&name) };
        let values = if t.transposed { tensor.transposed().values } else { tensor.values };
        Tensor::from_data(&values[..], &self.device)
    }

    fn gradients(&self, checks: &mut Checks, recompute: Recompute) {
        let first = &self.golden["steps"][0];
        self.with_session(&TrainConfig { recompute, ..TrainConfig::default() }, LORA, |session| {
            let (loss, sums) = gradient(session, &[self.training().batch]);
            near(checks, "loss", loss, number(first, "loss"), LOSS);
            near(checks, "norm", global_norm(&sums.sums), number(first, "grad_norm_before_clip"), NORM);
            let found = named(&session.trained, sums.sums.into_iter().map(|g| floats(g.unwrap())).collect());
            self.compare(checks, "grad.", &found, GRADIENT);
        });
    }

    fn accumulation(&self, checks: &mut Checks, recompute: Recompute) {
        let golden = &self.golden["grad_accumulation"];
        let micro: Vec<Vec<i32>> = list(&golden["micro_batches"]).iter().map(ints).collect();
        let config = TrainConfig {
            recompute,
            gradient_accumulation_steps: micro.len(),
            loss_reduction: LossReduction::MicroMean,
            ..TrainConfig::default()
        };
        self.with_session(&config, LORA, |session| {
            let batch = self.training().batch;
            let parts: Vec<Batch> = micro.iter().map(|rows| part(&batch, rows)).collect();
            let (loss, sums) = gradient(session, &parts);
            near(checks, "mean loss of micro-batches", loss, number(golden, "mean_loss"), LOSS);
            near(checks, "norm of micro-batches", global_norm(&sums.sums), number(golden, "grad_norm"), NORM);
            let found = named(&session.trained, sums.sums.into_iter().map(|g| floats(g.unwrap())).collect());
            self.compare(checks, "accum_grad.", &found, GRADIENT);
            for (part, expected) in parts.iter().zip(list(&golden["losses"])) {
                let found = step::evaluate(
                    &burn::module::Module::valid(&session.model),
                    part,
                    &vision(session, part, &self.device),
                    step::Saving::default(),
                    &self.device,
                );
                near(
                    checks,
                    "loss of a micro-batch",
                    found.sum() / part.supervised() as f64,
                    expected.as_f64().unwrap(),
                    LOSS,
                );
            }
        });
    }

    fn config(&self, learning_rate: f64, kind: SchedulerType) -> TrainConfig {
        let t = &self.golden["trajectory"];
        TrainConfig {
            learning_rate,
            lr_scheduler_type: kind,
            weight_decay: number(t, "weight_decay"),
            adam_beta1: t["betas"][0].as_f64().unwrap(),
            adam_beta2: t["betas"][1].as_f64().unwrap(),
            adam_epsilon: number(t, "eps"),
            max_grad_norm: number(t, "max_grad_norm"),
            ..TrainConfig::default()
        }
    }

    fn steps(&self, checks: &mut Checks) {
        let config = self.config(number(&self.golden, "constant_lr"), SchedulerType::Constant);
        self.with_session(&config, LORA, |session| {
            for row in list(&self.golden["steps"]) {
                self.one_step(checks, session, row, 1.0);
                let found = named(&session.trained, params::values(&session.model).into_iter().map(floats).collect());
                self.compare(checks, &format!("step{}.", row["step"]), &found, STEP);
            }
        });
    }

    fn one_step(&self, checks: &mut Checks, session: &mut Session<'_, QwenVl>, row: &Value, factor: f64) {
        let rows = StepRows { micro_batches: vec![self.training().batch], next: Position::default() };
        let report = session.step(&rows, factor).unwrap();
        session.state.step += 1;
        let what = format!("step {}", row["step"]);
        near(checks, &format!("{what} loss"), report.loss, number(row, "loss"), LOSS);
        near(checks, &format!("{what} norm"), report.grad_norm, number(row, "grad_norm_before_clip"), NORM);
        if let Some(rate) = row["lr"].as_f64() {
            near(checks, &format!("{what} rate"), report.learning_rate, rate, 1e-9);
        }
    }

    fn trajectory(&self, checks: &mut Checks) {
        let golden = &self.golden["trajectory"];
        assert_eq!(text(&golden["scheduler"]), "cosine");
        let config = self.config(number(golden, "lr"), SchedulerType::Cosine);
        let total = golden["total_steps"].as_u64().unwrap() as usize;
        let warmup = (number(golden, "warmup_ratio") * total as f64).ceil() as usize;
        checks.equal("warm-up", Some(warmup as u64), golden["warmup_steps"].as_u64());
        let schedule = Schedule { kind: SchedulerType::Cosine, warmup, total };
        self.with_session(&config, LORA, |session| {
            for (step, row) in list(&golden["rows"]).iter().enumerate() {
                self.one_step(checks, session, row, schedule.factor(step));
            }
            let found = named(&session.trained, params::values(&session.model).into_iter().map(floats).collect());
            for (name, norm) in golden["final_param_l2"].as_object().unwrap() {
                near(checks, name, l2(&found[name]), norm.as_f64().unwrap(), NORM);
            }
            let compat = Compat { padded_columns: true, ..Compat::default() };
            let model = burn::module::Module::valid(&session.model).with_compat(compat);
            let batch = self.training().batch;
            let vision = vision(session, &batch, &self.device);
            let loss = step::evaluate(&model, &batch, &vision, step::Saving::default(), &self.device);
            let mean = loss.sum() / batch.supervised() as f64;
            near(checks, "loss after training", mean, number(golden, "final_eval_mode_loss"), LOSS);
        });
    }

    /// Without adapters: everything trained, and everything but the vision tower without its resampler.
    fn full(&self, checks: &mut Checks) {
        let golden = read_json(&self.family.golden("full_finetune_grads.json"));
        let full = TowerMode::Full;
        let frozen = Modes { vision: TowerMode::Frozen, projector: full, language: full };
        let all = Modes { vision: full, projector: full, language: full };
        for (key, modes) in [("fix_vit_grads", frozen), ("all_trainable_grads", all)] {
            for recompute in [Recompute::Never, Recompute::Always] {
                let config = TrainConfig { recompute, ..TrainConfig::default() };
                self.with_session(&config, modes, |session| {
                    let (loss, sums) = gradient(session, &[self.training().batch]);
                    near(checks, key, loss, number(&golden, "loss"), LOSS);
                    let values = sums.sums.into_iter().map(|g| g.map_or_else(Vec::new, floats)).collect();
                    compare_full(checks, key, &named_plain(&session.trained, values), &golden[key]);
                    if modes.vision == full {
                        decayed(checks, &session.trained, &golden["weight_decay_excluded"]);
                    } else {
                        opened(checks, &session.trained, &golden["trainable_vision_params_with_fix_vit"]);
                    }
                });
            }
        }
    }

    /// Compares every tensor of the fixture whose name starts with `prefix`.
    fn compare(&self, checks: &mut Checks, prefix: &str, found: &BTreeMap<String, Vec<f32>>, tolerance: f32) {
        for name in self.train.names() {
            if let Some(tensor) = name.strip_prefix(prefix) {
                checks.close(&name, &found[tensor], &self.train.f32(&name), tolerance);
            }
        }
    }
}

fn gradient(session: &mut Session<'_, QwenVl>, micro: &[Batch]) -> (f64, GradientSum) {
    let mut sums = GradientSum::new(&session.model);
    let loss = session.accumulate(micro, &mut sums).unwrap().loss;
    (loss, sums)
}

fn vision(session: &Session<'_, QwenVl>, batch: &Batch, device: &Device) -> step::Vision {
    batch.pixels(device).map_or(step::Vision::None, |pixels| {
        step::Vision::Features(burn::module::Module::valid(&session.model).vision(pixels))
    })
}

/// Some rows of a batch, with its padding.
fn part(batch: &Batch, rows: &[i32]) -> Batch {
    let length = batch.length;
    let cells: Vec<usize> = rows.iter().flat_map(|r| *r as usize * length..(*r as usize + 1) * length).collect();
    let images = |row: usize| {
        let cells = row * length..(row + 1) * length;
        batch.feature_index.iter().filter(|i| cells.contains(&(**i as usize))).count()
    };
    let each = batch.feature_index.len() / batch.pixels.len().max(1);
    let mut pixels = Vec::new();
    let mut feature_index = Vec::new();
    for (to, row) in rows.iter().enumerate() {
        let before: usize = (0..*row as usize).map(&images).sum();
        let here = images(*row as usize);
        pixels.extend(batch.pixels[before / each..(before + here) / each].iter().cloned());
        let shift = (to as i32 - row) * length as i32;
        feature_index.extend(batch.feature_index[before..before + here].iter().map(|i| i + shift));
    }
    let take = |values: &[i32]| cells.iter().map(|c| values[*c]).collect::<Vec<_>>();
    Batch {
        ids: rows.iter().map(|r| batch.ids[*r as usize].clone()).collect(),
        input_ids: take(&batch.input_ids),
        labels: take(&batch.labels),
        mask: cells.iter().map(|c| batch.mask[*c]).collect(),
        positions: take(&batch.positions),
        segments: row_segments(&cells.iter().map(|c| batch.mask[*c]).collect::<Vec<_>>(), length),
        feature_index,
        pixels,
        rows: rows.len(),
        length,
    }
}

/// Values by the fixture's names (without `.weight` of an update) in PEFT's layout.
fn named(trained: &[Trained], values: Vec<Vec<f32>>) -> BTreeMap<String, Vec<f32>> {
    let plain = named_plain(trained, values);
    plain.into_iter().map(|(name, values)| (name.trim_end_matches(".weight").to_string(), values)).collect()
}

/// Values by name in the checkpoint's layout.
fn named_plain(trained: &[Trained], values: Vec<Vec<f32>>) -> BTreeMap<String, Vec<f32>> {
    let layout = |t: &Trained, values: Vec<f32>| {
        if values.is_empty() {
            return values;
        }
        let tensor = HostTensor { shape: t.shape.clone(), values };
        if t.transposed { tensor.transposed().values } else { tensor.values }
    };
    trained.iter().zip(values).map(|(t, v)| (t.name.clone(), layout(t, v))).collect()
}

/// Norm, and values at some places, of every gradient; a tensor that the original does not train has none.
fn compare_full(checks: &mut Checks, key: &str, found: &BTreeMap<String, Vec<f32>>, golden: &Value) {
    for (name, expected) in golden.as_object().unwrap() {
        let what = format!("{key} {name}");
        if !expected["l2"].is_number() {
            checks.equal(&what, found.get(name).is_none_or(Vec::is_empty), true);
            continue;
        }
        let values = &found[name];
        let (norm, stated) = (l2(values), number(expected, "l2"));
        checks.equal(
            &format!("{what} norm {norm} {stated}"),
            (norm - stated).abs() <= FULL_NORM * stated.max(1e-6),
            true,
        );
        let at: Vec<f32> = ints(&expected["at"]).into_iter().map(|i| values[i as usize]).collect();
        let golden: Vec<f32> = list(&expected["values"]).iter().map(|v| v.as_f64().unwrap() as f32).collect();
        checks.close(&what, &at, &golden, FULL_VALUE);
    }
}

/// The original decays the weights of root-mean-square norms, whose class it does not know; they are left out here.
fn decayed(checks: &mut Checks, trained: &[Trained], excluded: &Value) {
    let excluded: Vec<&str> = list(excluded).iter().map(text).collect();
    for t in trained {
        let rms = !t.name.contains(".visual.") && t.shape.len() == 1 && t.name.ends_with(".weight");
        let expected = !excluded.contains(&t.name.as_str()) && !rms;
        checks.equal(&format!("{} is decayed", t.name), optimizer::decays(t), expected);
    }
}

fn opened(checks: &mut Checks, trained: &[Trained], vision: &Value) {
    let mut found: Vec<&str> = trained.iter().map(|t| t.name.as_str()).filter(|n| n.contains(".visual.")).collect();
    let mut expected: Vec<&str> = list(vision).iter().map(text).collect();
    found.sort_unstable();
    expected.sort_unstable();
    checks.equal("trained with fix_vit", found, expected);
}

fn l2(values: &[f32]) -> f64 {
    values.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>().sqrt()
}

fn number(value: &Value, key: &str) -> f64 {
    value[key].as_f64().unwrap_or_else(|| panic!("{key} is no number"))
}

fn near(checks: &mut Checks, what: &str, found: f64, expected: f64, tolerance: f64) {
    let off = (found - expected).abs();
    checks.equal(&format!("{what}: {found} for {expected}"), off <= tolerance * f64::from(fixture::slack()), true);
}
