//! Adapters: PEFT directories, un-merged checkpoints, logits, loss, gradients, optimizer steps, merge.

use std::{
    collections::{BTreeMap, HashMap},
    path::{Path, PathBuf},
};

use burn::{
    module::{Module, ModuleMapper, Param, ParamGroup},
    tensor::{Device, Tensor},
};
use medtune::{
    adapter::{
        AdapterConfig, merge, peft,
        tensors::{HostTensor, write},
    },
    loader::{Position, StepRows},
    models::{
        AnyVlm, Compat,
        internvl::{InternVl, InternVlProcessor, weights::load_dir},
    },
    nn::visit::named_params,
    progress::Progress,
    run_dir::RunDir,
    stage::Ctx,
    train::{
        LossReduction, Recompute, SchedulerType, TowerMode, TrainConfig, clip, optimizer, params,
        params::GradientSum,
        schedule::Schedule,
        trainer::{Job, Session},
    },
    vlm::{Batch, Encoded, PaddingSide, Vlm},
    weights::SaveOptions,
};
use serde_json::{Value, json};

use super::{
    files::{self, Tensors},
    forward::{decode, losses, values},
    text::records,
};
use crate::parity::fixture::{self, Checks};

const LOGITS: f32 = 5e-4;
const LOSS: f64 = 1e-4;
const TRAJECTORY: f64 = 2e-3;
const GRADIENT: f64 = 1e-3;
const UPDATE: f64 = 1e-3;
/// Updates at the published script's tiny learning rate, where rounding weighs more.
const SCRIPT_UPDATE: f64 = 1e-2;
const MERGED: f32 = 1e-5;

pub(super) fn check(checks: &mut Checks) {
    for (golden, checkpoint) in files::kinds() {
        let description: Value = files::json(&golden.join("lora.json"));
        let names: Vec<String> = scenarios(&description);
        for name in &names {
            let scenario = Scenario::open(&golden, &checkpoint, name, &names, &description);
            scenario.forward(checks);
            for recompute in [Recompute::Never, Recompute::Always] {
                scenario.gradients(recompute, checks);
            }
            for (run, description) in scenario.description.as_object().unwrap() {
                match run.strip_prefix("run_") {
                    Some(run) if description["micro_log"].is_array() => scenario.accumulation(run, description, checks),
                    Some(run) => scenario.steps(run, description, checks),
                    None => {}
                }
            }
            if scenario.description["merged_tensors"].is_array() {
                scenario.merged(checks);
                scenario.unmerged(checks);
            }
        }
    }
}

fn scenarios(description: &Value) -> Vec<String> {
    let entries = description.as_object().unwrap().iter();
    entries.filter(|(_, v)| v["trainable"].is_object()).map(|(k, _)| k.clone()).collect()
}

/// Our name of the original's name of a parameter.
fn name_of(original: &str) -> String {
    original.replacen("base_model.model.", "", 1).replace(".default.", ".")
}

struct Scenario<'a> {
    name: &'a str,
    golden: &'a Path,
    checkpoint: &'a Path,
    description: &'a Value,
    /// PEFT directories.
    adapters: Vec<PathBuf>,
    base: InternVl,
    rows: Vec<Encoded>,
    tensors: Tensors,
    device: Device,
}

impl<'a> Scenario<'a> {
    fn open(golden: &'a Path, checkpoint: &'a Path, name: &'a str, all: &[String], description: &'a Value) -> Self {
        // `adapter_<tower>_<scenario>`; the scenario whose name no directory has owns those without one.
        let ends = |p: &Path, s: &str| p.file_name().unwrap().to_string_lossy().ends_with(&format!("_{s}"));
        let entries = std::fs::read_dir(golden).unwrap().map(|e| e.unwrap().path());
        let mut dirs: Vec<PathBuf> = entries.filter(|p| p.join("adapter_config.json").is_file()).collect();
        dirs.sort();
        let own: Vec<PathBuf> = dirs.iter().filter(|d| ends(d, name)).cloned().collect();
        let rest: Vec<PathBuf> = dirs.into_iter().filter(|d| !all.iter().any(|s| ends(d, s))).collect();
        let device = fixture::device();
        let base = load_dir(checkpoint, &Default::default(), &device).unwrap();
        Self {
            name,
            golden,
            checkpoint,
            description: &description[name],
            adapters: if own.is_empty() { rest } else { own },
            base: base.with_compat(Compat { mixed_rotations: true, ..Compat::default() }),
            rows: records(golden, InternVlProcessor::load(checkpoint).unwrap()),
            tensors: Tensors::open(&golden.join(format!("lora_{name}.safetensors"))),
            device,
        }
    }

    fn what(&self, part: &str) -> String {
        format!("{} {}: {part}", self.golden.display(), self.name)
    }

    /// The base with all adapters of the scenario.
    fn adapted(&self) -> AnyVlm {
        let base = AnyVlm::InternVl(self.base.clone());
        if let [dir] = self.adapters.as_slice() {
            return peft::load(base, dir, &json!({})).unwrap();
        }
        // Several towers: one directory with the names of the whole model.
        let mut all = BTreeMap::new();
        for dir in &self.adapters {
            let single = peft::load(base.clone(), dir, &json!({})).unwrap();
            let stored = Tensors::open(&dir.join("adapter_model.safetensors"));
            let adapted = named_params(&single).into_iter().filter(|p| p.adapter);
            let prefix = base.towers().iter().map(|t| t.prefix);
            let names: Vec<String> = adapted.map(|p| p.name).collect();
            let prefix = prefix.into_iter().find(|p| !p.is_empty() && names.iter().all(|n| n.starts_with(p))).unwrap();
            for name in stored.names() {
                let tensor = HostTensor { shape: stored.shape(&name), values: stored.f32(&name) };
                let module = name.strip_prefix("base_model.model.").unwrap();
                all.insert(format!("base_model.model.{prefix}{module}"), tensor);
            }
        }
        let dir = tempfile::tempdir().unwrap();
        let config = self.adapters[0].join("adapter_config.json");
        let mut config: Value = files::json(&config);
        config["target_modules"] = Value::Null;
        std::fs::write(dir.path().join("adapter_config.json"), config.to_string()).unwrap();
        write(&dir.path().join("adapter_model.safetensors"), &all).unwrap();
        peft::load(base, dir.path(), &json!({})).unwrap()
    }

    fn batch(&self, indices: impl IntoIterator<Item = usize>) -> Batch {
        let rows: Vec<Encoded> = indices.into_iter().map(|i| self.rows[i].clone()).collect();
        Batch::collate(&rows, 0, PaddingSide::Right, 1)
    }

    fn whole(&self) -> Batch {
        self.batch(0..self.rows.len())
    }

    fn logits(&self, model: &AnyVlm, batch: &Batch) -> Tensor<3> {
        let AnyVlm::InternVl(model) = model else { panic!("the family that was loaded") };
        decode(model, model.embed(batch, model.features(batch, &self.device), &self.device), batch, &self.device).1
    }

    fn forward(&self, checks: &mut Checks) {
        let model = self.adapted();
        for key in self.tensors.names() {
            let Some((case, part)) = key.split_once('.').filter(|(case, _)| *case != "grad") else { continue };
            let batch = match self.rows.iter().position(|r| r.id == case) {
                Some(i) => self.batch([i]),
                None => self.whole(),
            };
            let logits = self.logits(&model, &batch);
            if part.starts_with("logits_last") {
                let [_, length, _] = logits.dims();
                let last = self.tensors.shape(&key)[1];
                let found = values(logits.narrow(1, length - last, last));
                checks.close(&self.what(&key), &found, &self.tensors.f32(&key), LOGITS);
            } else {
                assert_eq!(part, "token_nll", "unknown tensor {key}");
                let (nll, loss) = losses(&logits, &batch);
                checks.close(&self.what(&key), &nll, &self.tensors.f32(&key), 1e-3);
                let expected = self.description[format!("{case}_loss")].as_f64().unwrap();
                absolute(checks, &self.what(&format!("{case} loss")), loss, expected, LOSS);
            }
        }
    }

    fn trainable(&self) -> BTreeMap<String, Vec<usize>> {
        let entries = self.description["trainable"].as_object().unwrap().iter();
        entries.map(|(k, v)| (name_of(k), serde_json::from_value(v.clone()).unwrap())).collect()
    }

    /// A training session that starts from the adapters.
    fn with_session(&self, config: &TrainConfig, then: impl FnOnce(&mut Session<'_, AnyVlm>)) {
        let trainable = self.trainable();
        let mode = |prefix: &str| {
            let mut own = trainable.keys().filter(|n| n.starts_with(prefix));
            match own.next() {
                None => TowerMode::Frozen,
                Some(name) if name.contains(".lora_") => TowerMode::Lora,
                Some(_) => TowerMode::Full,
            }
        };
        let tower = |name: &str| {
            let towers = self.base.towers();
            mode(towers.iter().find(|t| t.name == name).unwrap().prefix)
        };
        let config = TrainConfig {
            vision: tower("vision"),
            projector: tower("projector"),
            language: tower("language"),
            ..config.clone()
        };
        let adapter = self.adapter_config();
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
        let mut session = Session::new(&job, AnyVlm::InternVl(self.base.clone())).unwrap();
        let loaded = opened(self.adapted(), &trainable);
        let names = params::trained(&loaded, loaded.towers()).into_iter().map(|t| t.name);
        let start: HashMap<String, Tensor<1>> = names.zip(params::values(&loaded)).collect();
        session.model = params::replace(session.model, &session.trained, start);
        then(&mut session);
    }

    fn adapter_config(&self) -> AdapterConfig {
        let configs: Vec<Value> = self.adapters.iter().map(|d| files::json(&d.join("adapter_config.json"))).collect();
        let targets = configs.iter().flat_map(|c| c["target_modules"].as_array().unwrap());
        AdapterConfig {
            r: configs[0]["r"].as_u64().unwrap() as usize,
            lora_alpha: configs[0]["lora_alpha"].as_f64().unwrap(),
            lora_dropout: configs[0]["lora_dropout"].as_f64().unwrap(),
            target_modules: targets.map(|t| t.as_str().unwrap().to_string()).collect(),
            ..AdapterConfig::default()
        }
    }

    fn gradients(&self, recompute: Recompute, checks: &mut Checks) {
        let config = TrainConfig { recompute, ..TrainConfig::default() };
        self.with_session(&config, |session| {
            let found: BTreeMap<String, Vec<usize>> = session
                .trained
                .iter()
                .map(|t| {
                    let mut shape = t.shape.clone();
                    if t.transposed {
                        shape.reverse();
                    }
                    (t.name.clone(), shape)
                })
                .collect();
            checks.equal(&self.what("what is trained"), found, self.trainable());
            let count: usize = session.trained.iter().map(|t| t.len()).sum();
            checks.equal(
                &self.what("trained parameters"),
                count as u64,
                self.description["num_trainable"].as_u64().unwrap(),
            );
            let mut sum = GradientSum::new(&session.model);
            let loss = session.accumulate(&[self.whole()], &mut sum).unwrap().loss;
            absolute(checks, &self.what("loss"), loss, self.description["batch_loss"].as_f64().unwrap(), LOSS);
            let norm = clip::global_norm(&sum.sums);
            let expected = self.description["grad_norm"].as_f64().unwrap();
            absolute(checks, &self.what("gradient norm"), norm, expected, GRADIENT * expected);
            let found = named(&session.trained, sum.sums.into_iter().map(|g| values(g.unwrap())).collect());
            for key in self.tensors.names() {
                let Some(original) = key.strip_prefix("grad.") else { continue };
                let expected = self.tensors.f32(&key);
                let off = relative(&found[&name_of(original)], &expected, &vec![0.0; expected.len()]);
                checks.equal(&self.what(&format!("gradient of {original} off by {off}")), off <= GRADIENT, true);
            }
        });
    }

    fn config(&self, run: &Value) -> TrainConfig {
        let number = |key: &str, default: f64| run[key].as_f64().unwrap_or(default);
        TrainConfig {
            learning_rate: number("lr", 0.0),
            weight_decay: number("weight_decay", 0.05),
            adam_beta1: run["betas"][0].as_f64().unwrap_or(0.9),
            adam_beta2: run["betas"][1].as_f64().unwrap_or(0.999),
            adam_epsilon: number("eps", 1e-8),
            max_grad_norm: number("max_grad_norm", 1.0),
            warmup_ratio: number("warmup_ratio", 0.0),
            lr_scheduler_type: match run["scheduler"].as_str() {
                None | Some("cosine") => SchedulerType::Cosine,
                Some(other) => panic!("unknown schedule {other}"),
            },
            gradient_accumulation_steps: number("grad_accum", 1.0) as usize,
            loss_reduction: LossReduction::MicroMean,
            ..TrainConfig::default()
        }
    }

    fn schedule(&self, config: &TrainConfig, run: &Value) -> Schedule {
        let total = run["steps"].as_u64().unwrap() as usize;
        Schedule { kind: config.lr_scheduler_type, warmup: config.warmup(total), total }
    }

    fn steps(&self, run: &str, description: &Value, checks: &mut Checks) {
        let config = self.config(description);
        let schedule = self.schedule(&config, description);
        let size = description["batch_size"].as_u64().unwrap() as usize;
        assert_eq!(size, self.rows.len(), "a run of {size} rows");
        let snapshots = Tensors::open(&self.golden.join(format!("lora_run_{run}.safetensors")));
        self.with_session(&config, |session| {
            self.groups(description, session, checks);
            let start = named(&session.trained, params::values(&session.model).into_iter().map(values).collect());
            for (i, line) in description["steps_log"].as_array().unwrap().iter().enumerate() {
                let what = |part: &str| self.what(&format!("{run} step {}: {part}", i + 1));
                let factor = schedule.factor(i);
                let rate = line["lr"].as_f64().unwrap();
                absolute(checks, &what("rate"), factor * config.learning_rate, rate, 1e-12);
                let rows = StepRows { micro_batches: vec![self.whole()], next: Position::default() };
                let report = session.step(&rows, factor).unwrap();
                session.state.step += 1;
                absolute(checks, &what("loss"), report.loss, line["loss"].as_f64().unwrap(), TRAJECTORY);
                let norm = line["grad_norm"].as_f64().unwrap();
                absolute(checks, &what("norm"), report.grad_norm, norm, 1e-2 * norm);
                self.snapshot(run, i + 1, session, &start, &snapshots, checks);
            }
        });
    }

    fn groups(&self, description: &Value, session: &Session<'_, AnyVlm>, checks: &mut Checks) {
        for group in description["param_groups"].as_array().into_iter().flatten() {
            let decayed = group["weight_decay"].as_f64().unwrap() > 0.0;
            let found = session.trained.iter().filter(|t| optimizer::decays(t) == decayed).count();
            checks.equal(
                &self.what(&format!("tensors with decay {decayed}")),
                found as u64,
                group["num_tensors"].as_u64().unwrap(),
            );
        }
    }

    /// Compares the way that the parameters have gone.
    fn snapshot(
        &self,
        run: &str,
        step: usize,
        session: &Session<'_, AnyVlm>,
        start: &BTreeMap<String, Vec<f32>>,
        snapshots: &Tensors,
        checks: &mut Checks,
    ) {
        let prefix = format!("step{step}.");
        let keys: Vec<String> = snapshots.names().into_iter().filter(|k| k.starts_with(&prefix)).collect();
        if keys.is_empty() {
            return;
        }
        let found = named(&session.trained, params::values(&session.model).into_iter().map(values).collect());
        // The run that is named after the scenario `script` has the published script's learning rate.
        let limit = if run == "script" { SCRIPT_UPDATE } else { UPDATE };
        for key in keys {
            let name = name_of(&key[prefix.len()..]);
            let off = relative(&found[&name], &snapshots.f32(&key), &start[&name]);
            checks.equal(
                &self.what(&format!("{run} {key}: update off by {off}")),
                off <= limit * f64::from(fixture::slack()),
                true,
            );
        }
    }

    fn accumulation(&self, run: &str, description: &Value, checks: &mut Checks) {
        let config = self.config(description);
        let schedule = self.schedule(&config, description);
        let size = description["batch_size"].as_u64().unwrap() as usize;
        let count = config.gradient_accumulation_steps;
        let snapshots = Tensors::open(&self.golden.join(format!("lora_run_{run}.safetensors")));
        let log = description["micro_log"].as_array().unwrap();
        self.with_session(&config, |session| {
            let start = named(&session.trained, params::values(&session.model).into_iter().map(values).collect());
            for (step, lines) in log.chunks(count).enumerate() {
                let micro: Vec<Batch> = (0..count).map(|k| self.batch(k * size..(k + 1) * size)).collect();
                let mut running = GradientSum::new(&session.model);
                for (batch, line) in micro.iter().zip(lines) {
                    // Losses of the log are divided by the number of micro-batches; the norm is of the running sum.
                    let what = |part: &str| self.what(&format!("{run} step {}: {part}", step + 1));
                    let loss = session.accumulate(std::slice::from_ref(batch), &mut running).unwrap().loss;
                    let expected = line["loss"].as_f64().unwrap();
                    absolute(checks, &what("micro loss"), loss / count as f64, expected, TRAJECTORY);
                    let norm = clip::global_norm(&running.sums) / count as f64;
                    let expected = line["grad_norm"].as_f64().unwrap();
                    absolute(checks, &what("norm"), norm, expected, 1e-2 * expected);
                    let rate = schedule.factor(step) * config.learning_rate;
                    absolute(checks, &what("rate"), rate, line["lr"].as_f64().unwrap(), 1e-12);
                }
                let rows = StepRows { micro_batches: micro, next: Position::default() };
                session.step(&rows, schedule.factor(step)).unwrap();
                session.state.step += 1;
                self.snapshot(run, step + 1, session, &start, &snapshots, checks);
            }
        });
    }

    fn merged(&self, checks: &mut Checks) {
        let adapted = self.adapted();
        let before = values(self.logits(&adapted, &self.whole()));
        let merged = merge::merge(adapted, &[self.whole()], &self.device).unwrap().0;
        checks.close(&self.what("logits after merging"), &values(self.logits(&merged, &self.whole())), &before, LOGITS);
        let dir = tempfile::tempdir().unwrap();
        merged.save(dir.path(), &SaveOptions::default()).unwrap();
        self.compare_merged(dir.path(), checks);
    }

    fn compare_merged(&self, dir: &Path, checks: &mut Checks) {
        let saved = Tensors::open(&dir.join("model.safetensors"));
        let expected = Tensors::open(&self.golden.join("lora_merged_weights.safetensors"));
        for name in expected.names() {
            let what = self.what(&format!("merged {name}"));
            checks.close(&what, &saved.f32(&name), &expected.f32(&name), MERGED);
        }
        for name in self.description["merged_tensors"].as_array().unwrap() {
            let name = name.as_str().unwrap();
            checks.equal(&self.what(&format!("{name} is saved")), saved.has(name), true);
        }
    }

    /// A checkpoint as the original's fine-tuning leaves it, updates beside their weights, gives the merged weights.
    fn unmerged(&self, checks: &mut Checks) {
        let adapted = self.adapted();
        let wrapped: Vec<&str> = ["language_model.", "vision_model."].to_vec();
        let mut tensors = BTreeMap::new();
        let trained = opened(adapted, &self.trainable());
        let updates: BTreeMap<String, HostTensor> =
            peft::exported(&trained, &params::trained(&trained, trained.towers()));
        let base_dir = tempfile::tempdir().unwrap();
        self.base.save(base_dir.path(), &SaveOptions::default()).unwrap();
        let base = Tensors::open(&base_dir.path().join("model.safetensors"));
        let updated = |module: &str| updates.contains_key(&format!("base_model.model.{module}.lora_A.weight"));
        let wrap = |name: &str| {
            let tower = wrapped.iter().find(|t| name.starts_with(**t));
            tower.map_or_else(|| name.to_string(), |t| format!("{t}base_model.model.{}", &name[t.len()..]))
        };
        for name in base.names() {
            let (module, part) = name.rsplit_once('.').unwrap();
            let stored = if updated(module) { format!("{module}.base_layer.{part}") } else { name.clone() };
            tensors.insert(wrap(&stored), HostTensor { shape: base.shape(&name), values: base.f32(&name) });
        }
        for (name, tensor) in updates {
            let Some(name) = name.strip_prefix("base_model.model.").filter(|n| n.contains(".lora_")) else { continue };
            let name = name.replace(".lora_A.weight", ".lora_A.default.weight");
            tensors.insert(wrap(&name.replace(".lora_B.weight", ".lora_B.default.weight")), tensor);
        }
        let keys: BTreeMap<String, Value> = files::json(&self.golden.join("lora_full_state_keys.json"));
        let found: BTreeMap<String, Vec<usize>> = tensors.iter().map(|(k, t)| (k.clone(), t.shape.clone())).collect();
        let expected: BTreeMap<String, Vec<usize>> =
            keys.into_iter().map(|(k, v)| (k, serde_json::from_value(v[0].clone()).unwrap())).collect();
        checks.equal(&self.what("names of an un-merged checkpoint"), found, expected);

        let r = self.adapter_config().r;
        let mut config: Value = files::json(&self.checkpoint.join("config.json"));
        (config["use_llm_lora"], config["use_backbone_lora"]) = (json!(r), json!(r));
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
        write(&dir.path().join("model.safetensors"), &tensors).unwrap();
        let loaded = load_dir(dir.path(), &Default::default(), &self.device).unwrap();
        checks.equal(&self.what("adapters are merged"), loaded.config().use_llm_lora, 0);
        let merged = tempfile::tempdir().unwrap();
        loaded.save(merged.path(), &SaveOptions::default()).unwrap();
        self.compare_merged(merged.path(), checks);
    }
}

/// `model` on the autodiff device with the named parameters open for training, the rest frozen.
fn opened(model: AnyVlm, trainable: &BTreeMap<String, Vec<usize>>) -> AnyVlm {
    struct Freeze;
    impl ModuleMapper for Freeze {
        fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
            param.set_require_grad(false)
        }
    }
    let open = named_params(&model).into_iter().filter(|p| p.adapter || trainable.contains_key(&p.name));
    let group = ParamGroup::from_ids(open.map(|p| p.id).collect::<Vec<_>>());
    model.train().map(&mut Freeze).set_require_grad_group(group, true)
}

/// Values by name in the layout of checkpoints.
fn named(trained: &[params::Trained], values: Vec<Vec<f32>>) -> BTreeMap<String, Vec<f32>> {
    let entries = trained.iter().zip(values).map(|(t, values)| {
        let tensor = HostTensor { shape: t.shape.clone(), values };
        let tensor = if t.transposed { tensor.transposed() } else { tensor };
        (t.name.clone(), tensor.values)
    });
    entries.collect()
}

/// Norm of the difference over the norm of `expected - start`.
fn relative(found: &[f32], expected: &[f32], start: &[f32]) -> f64 {
    assert_eq!(found.len(), expected.len());
    let norm = |values: &mut dyn Iterator<Item = f64>| values.map(|v| v * v).sum::<f64>().sqrt();
    let off = norm(&mut found.iter().zip(expected).map(|(f, e)| f64::from(f - e)));
    let size = norm(&mut expected.iter().zip(start).map(|(e, s)| f64::from(e - s)));
    off / size.max(1e-12)
}

fn absolute(checks: &mut Checks, what: &str, found: f64, expected: f64, tolerance: f64) {
    checks.near(what, found, expected, tolerance);
}
