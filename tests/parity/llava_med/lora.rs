//! Adapters: PEFT directories, logits, loss, gradients, optimizer steps, merge, and the way back to disk.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use burn::{
    module::Module,
    tensor::{Device, Tensor, TensorData},
};
use medtune::{
    adapter::{AdapterConfig, merge, peft},
    loader::{Position, StepRows},
    models::{AnyVlm, LoadOptions, load},
    nn::visit::named_params,
    progress::Progress,
    run_dir::RunDir,
    sample::{ImageRef, Role, Sample, Turn},
    stage::Ctx,
    text::merge::{MergeRules, RawRow, merge as splice},
    train::{
        LossReduction, SchedulerType, TowerMode, TrainConfig, log,
        loss::Targets,
        optimizer, params,
        params::GradientSum,
        schedule::Schedule,
        trainer::{Job, Session},
    },
    vlm::{Batch, Encoded, PaddingSide, Pixels, Processor, Vlm, row_segments},
};
use serde_json::{Value, json};

use crate::parity::fixture::{self, Checks, Tensors, json as read_json, root};

const LOGITS: f32 = 5e-4;
const LOSS: f64 = 1e-5;
const MERGED: f32 = 1e-6;
const GRADIENT: f32 = 1e-4;
const NORM: f64 = 1e-3;

pub(super) fn check(checks: &mut Checks) {
    let fixture = Fixture::open();
    fixture.collated(checks);
    fixture.read_and_write(checks);
    fixture.forward(checks);
    fixture.merged(checks);
    fixture.groups(checks);
    for recompute in [medtune::train::Recompute::Never, medtune::train::Recompute::Always] {
        fixture.gradients(checks, recompute);
        fixture.accumulation(checks, recompute);
    }
    for (name, run) in fixture.golden["optimizer_runs"].as_object().unwrap() {
        fixture.optimizer(checks, name, run);
    }
}

struct Fixture {
    root: PathBuf,
    device: Device,
    /// lora.json
    golden: Value,
    /// lora.safetensors
    tensors: Tensors,
    rows: Vec<RawRow>,
    images: Vec<Pixels>,
}

fn no_signature() -> Value {
    json!({})
}

fn floats<const D: usize>(t: Tensor<D>) -> Vec<f32> {
    t.into_data().try_to_vec().unwrap()
}

impl Fixture {
    fn open() -> Self {
        let root = root("llava_med");
        let tensors = Tensors::open(&root.join("golden/lora.safetensors"));
        let [count, length] = tensors.shape("batch.input_ids")[..] else { panic!("batch.input_ids is a matrix") };
        let (ids, labels) = (tensors.ints("batch.input_ids"), tensors.ints("batch.labels"));
        let mask = tensors.ints("batch.attention_mask");
        let rows = (0..count)
            .map(|r| {
                let row = r * length..(r + 1) * length;
                RawRow {
                    input_ids: ids[row.clone()].to_vec(),
                    labels: Some(labels[row.clone()].to_vec()),
                    mask: Some(mask[row].iter().map(|m| *m == 1).collect()),
                }
            })
            .collect();
        Self {
            golden: read_json(&root.join("golden/lora.json")),
            device: fixture::device(),
            images: pixels(&tensors, "batch.images"),
            rows,
            tensors,
            root,
        }
    }

    fn load(&self) -> (AnyVlm, Box<dyn Processor>) {
        let options = LoadOptions { vision_tower: Some(self.root.join("vision_tower")), ..LoadOptions::default() };
        load(&self.root.join("checkpoint"), &options, &self.device).unwrap()
    }

    fn base(&self) -> AnyVlm {
        self.load().0
    }

    /// The fixture's training rows through the processor are its collated batch.
    fn collated(&self, checks: &mut Checks) {
        let (model, processor) = self.load();
        let data = read_json(&self.root.join("lora/train_data.json"));
        let rows: Vec<Encoded> = data
            .as_array()
            .unwrap()
            .iter()
            .map(|row| processor.encode(&sample(row, &self.root.join("images"))).unwrap())
            .collect();
        let found = Batch::collate(&rows, processor.pad_id(), PaddingSide::Right, 1);
        let expected = self.whole(&model);
        checks.equal("input ids of the batch", &found.input_ids, &expected.input_ids);
        checks.equal("labels of the batch", &found.labels, &expected.labels);
        checks.equal("mask of the batch", &found.mask, &expected.mask);
        checks.equal("positions of the batch", &found.positions, &expected.positions);
        checks.equal("image positions of the batch", &found.feature_index, &expected.feature_index);
        let flat = |batch: &Batch| batch.pixels.iter().flat_map(|p| p.data.clone()).collect::<Vec<f32>>();
        checks.close("pixels of the batch", &flat(&found), &flat(&expected), 1e-6);
    }

    fn adapted(&self) -> AnyVlm {
        peft::load(self.base(), &self.root.join("lora"), &no_signature()).unwrap()
    }

    /// The rows at `indices` with their images in place; a row without an image uses up its dummy.
    fn batch(&self, model: &AnyVlm, indices: &[usize]) -> Batch {
        let rows: Vec<RawRow> = indices.iter().map(|i| self.rows[*i].clone()).collect();
        let images: Vec<Pixels> = indices.iter().map(|i| self.images[*i].clone()).collect();
        collate(model, &rows, &images, &self.device)
    }

    fn whole(&self, model: &AnyVlm) -> Batch {
        self.batch(model, &(0..self.rows.len()).collect::<Vec<_>>())
    }

    /// Logits of a prompt of model.json.
    fn prompt_logits(&self, model: &AnyVlm, prompt: &str, extra: &[i32]) -> Tensor<2> {
        let description = read_json(&self.root.join("golden/model.json"));
        let mut ids: Vec<i32> = serde_json::from_value(description["prompts"][prompt]["input_ids"].clone()).unwrap();
        ids.extend(extra);
        let all = pixels(&Tensors::open(&self.root.join("golden/vision.safetensors")), "pixel_values");
        let shown = description["merge"][prompt]["images"].as_array().unwrap();
        let images: Vec<Pixels> = shown.iter().map(|i| all[i.as_u64().unwrap() as usize].clone()).collect();
        let row = RawRow { input_ids: ids, labels: None, mask: None };
        let batch = collate(model, &[row], &images, &self.device);
        logits(model, &batch, &self.device)
    }

    /// The directory as it is, and with PyTorch files only; writing it again gives the same tensors.
    fn read_and_write(&self, checks: &mut Checks) {
        let pickled = tempfile::tempdir().unwrap();
        for file in ["adapter_config.json", "adapter_model.bin", "non_lora_trainables.bin"] {
            std::fs::copy(self.root.join("lora").join(file), pickled.path().join(file)).unwrap();
        }
        let config = read_json(&self.root.join("lora/adapter_config.json"));
        let adapter = adapter_config(&config);
        let base = config["base_model_name_or_path"].as_str().unwrap();
        for dir in [self.root.join("lora"), pickled.path().to_path_buf()] {
            let model = peft::load(self.base(), &dir, &no_signature()).unwrap();
            let opened = open_trained(model);
            let trained = params::trained(&opened, opened.towers());
            checks.equal("trainable tensors", trained.len() as u64, self.golden["trainable_tensors"].as_u64().unwrap());
            let parameters: usize = trained.iter().map(params::Trained::len).sum();
            checks.equal("trainable parameters", parameters as u64, self.golden["trainable_params"].as_u64().unwrap());
            let written = tempfile::tempdir().unwrap();
            let out = written.path().join("adapter");
            let signature = json!({"size": 1});
            let info = peft::AdapterInfo { config: &adapter, base, signature: &signature, notes: &[] };
            peft::save(&opened, &trained, opened.towers(), &info, &out).unwrap();
            self.compare_written(checks, &out);
            let again = peft::load(self.base(), &out, &signature).unwrap();
            let found = floats(logits(&again, &self.whole(&again), &self.device));
            let expected = floats(logits(&self.adapted(), &self.whole(&again), &self.device));
            checks.close("logits of the written adapter", &found, &expected, 0.0);
            let error = peft::load(self.base(), &out, &json!({"size": 2})).unwrap_err();
            checks.equal("another preprocessing is refused", error.to_string().contains("prepared"), true);
        }
        self.refused(checks);
    }

    fn compare_written(&self, checks: &mut Checks, out: &Path) {
        let written = Tensors::open(&out.join("adapter_model.safetensors"));
        let mut names = Vec::new();
        for file in ["adapter_model.safetensors", "non_lora_trainables.safetensors"] {
            let original = Tensors::open(&self.root.join("lora").join(file));
            for name in original.names() {
                checks.equal(&format!("shape of {name}"), written.shape(&name), original.shape(&name));
                checks.close(&name, &written.f32(&name), &original.f32(&name), 0.0);
                names.push(name);
            }
        }
        names.sort();
        checks.equal("names in the written adapter", written.names(), names);
        let (written, original) =
            (read_json(&out.join("adapter_config.json")), read_json(&self.root.join("lora/adapter_config.json")));
        for key in ["r", "lora_alpha", "target_modules", "peft_type", "bias", "task_type", "base_model_name_or_path"] {
            checks.equal(&format!("adapter_config.json: {key}"), &written[key], &original[key]);
        }
    }

    /// A missing, an extra and a wrongly shaped tensor are named.
    fn refused(&self, checks: &mut Checks) {
        let source = Tensors::open(&self.root.join("lora/adapter_model.safetensors"));
        let names = source.names();
        let victim = names.iter().find(|n| n.contains("lora_B")).unwrap().clone();
        for case in ["missing", "extra", "wrong shape"] {
            let mut tensors: BTreeMap<String, medtune::adapter::tensors::HostTensor> = names
                .iter()
                .map(|n| {
                    let tensor =
                        medtune::adapter::tensors::HostTensor { shape: source.shape(n), values: source.f32(n) };
                    (n.clone(), tensor)
                })
                .collect();
            let mut named = victim.clone();
            match case {
                "missing" => drop(tensors.remove(&victim)),
                "extra" => {
                    named = victim.replace("_proj", "_other");
                    let tensor = tensors[&victim].clone();
                    tensors.insert(named.clone(), tensor);
                }
                _ => {
                    let tensor = tensors[&victim].transposed();
                    tensors.insert(victim.clone(), tensor);
                }
            }
            let dir = tempfile::tempdir().unwrap();
            let config = "adapter_config.json";
            std::fs::copy(self.root.join("lora").join(config), dir.path().join(config)).unwrap();
            medtune::adapter::tensors::write(&dir.path().join("adapter_model.safetensors"), &tensors).unwrap();
            let error = peft::load(self.base(), dir.path(), &no_signature()).unwrap_err().to_string();
            checks.equal(&format!("{case} tensor: {error}"), error.contains(case) && error.contains(&named), true);
        }
    }

    fn forward(&self, checks: &mut Checks) {
        let model = self.adapted();
        let merged = merge::merge(self.adapted(), &[self.whole(&model)], &self.device).unwrap().0;
        for name in self.tensors.names() {
            let Some(rest) = name.strip_prefix("forward.") else { continue };
            if rest.starts_with("batch.") {
                continue;
            }
            let (prompt, what) = rest.split_once('.').unwrap();
            let model = if what.starts_with("merged_") { &merged } else { &model };
            let last = self.tensors.shape(&name)[1];
            let all = self.prompt_logits(model, prompt, &[]);
            let [n, vocabulary] = all.dims();
            let found = floats(all.slice([n - last..n, 0..vocabulary]));
            checks.close(&name, &found, &self.tensors.f32(&name), LOGITS);
        }
        self.batch_forward(checks, &model);
        let greedy = &self.golden["greedy_with_adapter"];
        let expected: Vec<i32> = serde_json::from_value(greedy["new_token_ids"].clone()).unwrap();
        // The fixture's greedy run continues the prompt whose adapter logits it stores for generation.
        let prompt = self.tensors.names().into_iter().find_map(|n| {
            let (prompt, what) = n.strip_prefix("forward.")?.split_once('.')?;
            what.starts_with("merged_").then(|| prompt.to_string())
        });
        let prompt = prompt.unwrap();
        let mut found: Vec<i32> = Vec::new();
        for _ in 0..expected.len() {
            let all = self.prompt_logits(&model, &prompt, &found);
            let [n, vocabulary] = all.dims();
            found.push(all.slice([n - 1..n, 0..vocabulary]).argmax(1).into_scalar::<i32>());
        }
        checks.equal("greedy ids with the adapter", found, expected);
    }

    fn batch_forward(&self, checks: &mut Checks, model: &AnyVlm) {
        let batch = self.whole(model);
        let found: Vec<i32> = batch.mask.iter().map(|m| i32::from(*m)).collect();
        checks.equal("batch.merged_attention_mask", found, self.tensors.ints("batch.merged_attention_mask"));
        checks.equal("batch.merged_labels", batch.labels.clone(), self.tensors.ints("batch.merged_labels"));
        let targets = Targets::of(&batch);
        let index: Vec<i32> =
            targets.states.iter().flat_map(|s| [s / batch.length as i32, s % batch.length as i32]).collect();
        checks.equal("positions at labels", index, self.tensors.ints("forward.batch.logits_at_labels_index"));
        let context = model.context(&batch, &self.device);
        let mut x = model.embed(&batch, model.features(&batch, &self.device), &self.device);
        for i in 0..model.num_layers() {
            x = model.layer(i, x, &context, None);
        }
        let picked = targets.select(model.final_norm(x), &self.device);
        let found = floats(model.logits(picked));
        checks.close("logits at labels", &found, &self.tensors.f32("forward.batch.logits_at_labels"), LOGITS);
    }

    fn merged(&self, checks: &mut Checks) {
        let model = self.adapted();
        let probe = self.whole(&model);
        let merged = merge::merge(model, &[probe], &self.device).unwrap().0;
        assert!(named_params(&merged).iter().all(|p| !p.adapter));
        let dir = tempfile::tempdir().unwrap();
        merged.save(dir.path(), &medtune::weights::SaveOptions::default()).unwrap();
        let saved = Tensors::open(&dir.path().join("model.safetensors"));
        let expected = Tensors::open(&self.root.join("golden/lora_merged.safetensors"));
        for name in expected.names() {
            checks.close(&format!("merged {name}"), &saved.f32(&name), &expected.f32(&name), MERGED);
        }
    }

    fn groups(&self, checks: &mut Checks) {
        let opened = open_trained(self.adapted());
        let trained = params::trained(&opened, opened.towers());
        for (group, decayed) in [("decay", true), ("no_decay", false)] {
            let mut expected: Vec<String> = serde_json::from_value(self.golden["param_groups"][group].clone()).unwrap();
            let mut found: Vec<String> = trained
                .iter()
                .filter(|t| optimizer::decays(t) == decayed)
                .map(|t| format!("base_model.model.{}", t.name))
                .collect();
            expected.sort();
            found.sort();
            checks.equal(&format!("parameter group {group}"), found, expected);
        }
    }

    fn gradients(&self, checks: &mut Checks, recompute: medtune::train::Recompute) {
        let config = TrainConfig { recompute, ..TrainConfig::default() };
        self.with_session(&config, |session| {
            let batch = self.whole(&session.model);
            let mut sum = GradientSum::new(&session.model);
            let loss = session.accumulate(&[batch], &mut sum).unwrap().loss;
            relative(checks, "loss", loss, self.golden["loss"].as_f64().unwrap(), LOSS);
            let stored = f64::from(self.tensors.f32("forward.batch.loss")[0]);
            relative(checks, "forward.batch.loss", loss, stored, LOSS);
            let norm = medtune::train::clip::global_norm(&sum.sums);
            relative(checks, "gradient norm", norm, self.golden["grad_norm"].as_f64().unwrap(), NORM);
            let expected = Tensors::open(&self.root.join("golden/lora_grads.safetensors"));
            let found = named(&session.trained, sum.sums.into_iter().map(|g| floats(g.unwrap())).collect());
            checks.equal("names of gradients", found.keys().cloned().collect::<Vec<_>>(), expected.names());
            for (name, values) in found {
                compare_gradient(checks, &name, &values, &expected.f32(&name));
            }
        });
    }

    /// Cases `grad_accum_<micro-batches>x<rows>`.
    fn accumulation(&self, checks: &mut Checks, recompute: medtune::train::Recompute) {
        let cases = self.golden.as_object().unwrap().iter().filter(|(k, _)| k.starts_with("grad_accum_"));
        for (case, description) in cases {
            let (count, rows) = case.trim_start_matches("grad_accum_").split_once('x').unwrap();
            let (count, rows): (usize, usize) = (count.parse().unwrap(), rows.parse().unwrap());
            let config = TrainConfig {
                recompute,
                gradient_accumulation_steps: count,
                loss_reduction: LossReduction::MicroMean,
                ..TrainConfig::default()
            };
            self.with_session(&config, |session| {
                let indices: Vec<usize> = (0..count * rows).collect();
                let micro: Vec<Batch> = indices.chunks(rows).map(|c| self.batch(&session.model, c)).collect();
                let losses = description["micro_losses"].as_array().unwrap();
                for (batch, expected) in micro.iter().zip(losses) {
                    let mut unused = GradientSum::new(&session.model);
                    let loss = session.accumulate(std::slice::from_ref(batch), &mut unused).unwrap().loss;
                    relative(checks, &format!("{case} micro loss"), loss, expected.as_f64().unwrap(), LOSS);
                }
                let mut sum = GradientSum::new(&session.model);
                session.accumulate(&micro, &mut sum).unwrap();
                let norm = medtune::train::clip::global_norm(&sum.sums);
                relative(checks, &format!("{case} norm"), norm, description["grad_norm"].as_f64().unwrap(), NORM);
                let found = named(&session.trained, sum.sums.into_iter().map(|g| floats(g.unwrap())).collect());
                for name in self.tensors.names() {
                    let Some(tensor) = name.strip_prefix(&format!("{case}.")) else { continue };
                    compare_gradient(checks, &name, &found[tensor], &self.tensors.f32(&name));
                }
            });
        }
    }

    fn optimizer(&self, checks: &mut Checks, name: &str, run: &Value) {
        let number = |key: &str| run[key].as_f64().unwrap();
        let (kind, warmup, total) = schedule(run["schedule"].as_str().unwrap());
        let config = TrainConfig {
            learning_rate: number("lr"),
            mm_projector_lr: Some(number("mm_projector_lr")),
            weight_decay: number("weight_decay"),
            adam_beta1: run["betas"][0].as_f64().unwrap(),
            adam_beta2: run["betas"][1].as_f64().unwrap(),
            adam_epsilon: number("eps"),
            max_grad_norm: number("max_grad_norm"),
            lr_scheduler_type: kind,
            ..TrainConfig::default()
        };
        let schedule = Schedule { kind, warmup, total };
        let snapshots: Vec<usize> = serde_json::from_value(run["snapshots"].clone()).unwrap();
        // A large learning rate amplifies the noise of the reference itself.
        let high = config.learning_rate > 1e-3;
        let loss_tolerance = if high { 1e-3 } else { 1e-4 } * f64::from(fixture::slack());
        self.with_session(&config, |session| {
            for line in run["log"].as_array().unwrap() {
                let step = line["step"].as_u64().unwrap() as usize;
                let micro_batches = vec![self.whole(&session.model)];
                let expected = line["loss"].as_f64().unwrap();
                let what = format!("{name} step {step}");
                let Some(norm) = line["grad_norm"].as_f64() else {
                    let mut unused = GradientSum::new(&session.model);
                    let loss = session.accumulate(&micro_batches, &mut unused).unwrap().loss;
                    checks.equal(
                        &format!("{what} loss {loss} {expected}"),
                        (loss - expected).abs() <= loss_tolerance,
                        true,
                    );
                    continue;
                };
                let factor = schedule.factor(step - 1);
                let rates = [factor * config.learning_rate, factor * config.mm_projector_lr.unwrap()];
                let expected_rates = [line["lr"].as_f64().unwrap(), line["projector_lr"].as_f64().unwrap()];
                for (found, expected) in rates.into_iter().zip(expected_rates) {
                    checks.equal(&format!("{what} rate {found} {expected}"), (found - expected).abs() <= 1e-12, true);
                }
                let rows = StepRows { micro_batches, next: Position::default() };
                let report = session.step(&rows, factor).unwrap();
                session.state.step += 1;
                let off = (report.loss - expected).abs();
                checks.equal(&format!("{what} loss {} {expected}", report.loss), off <= loss_tolerance, true);
                relative(checks, &format!("{what} norm"), report.grad_norm, norm, NORM);
                if snapshots.contains(&step) {
                    let expected = self.root.join(format!("golden/lora_{name}_step{step}.safetensors"));
                    let tolerance = if high { 1e-4 } else { 1e-6 } * fixture::slack();
                    compare_params(checks, &what, session, &Tensors::open(&expected), (tolerance, &config, step));
                }
            }
        });
    }

    /// A session that starts from the fixture's adapter.
    fn with_session(&self, config: &TrainConfig, then: impl FnOnce(&mut Session<'_, AnyVlm>)) {
        let adapter = adapter_config(&read_json(&self.root.join("lora/adapter_config.json")));
        let config = TrainConfig {
            vision: TowerMode::Frozen,
            projector: TowerMode::Full,
            language: TowerMode::Lora,
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
        let mut session = Session::new(&job, self.base()).unwrap();
        let loaded = open_trained(self.adapted());
        let names = params::trained(&loaded, loaded.towers()).into_iter().map(|t| t.name);
        let values = names.zip(params::values(&loaded)).collect();
        session.model = params::replace(session.model, &session.trained, values);
        then(&mut session);
        assert!(!dir.path(log::FILE).exists());
    }
}

/// A row of LLaVA's JSON.
fn sample(row: &Value, images: &Path) -> Sample {
    let turns = row["conversations"].as_array().unwrap().iter().map(|turn| Turn {
        role: if turn["from"] == "human" { Role::User } else { Role::Assistant },
        text: turn["value"].as_str().unwrap().to_string(),
    });
    let image = row["image"].as_str().map(|name| ImageRef { path: images.join(name) });
    serde_json::from_value(json!({
        "id": row["id"],
        "images": image.into_iter().collect::<Vec<_>>(),
        "turns": turns.collect::<Vec<_>>(),
    }))
    .unwrap()
}

/// `model` on the autodiff device with the adapter and the projector open for training, the rest frozen.
fn open_trained(model: AnyVlm) -> AnyVlm {
    struct Open;
    impl burn::module::ModuleMapper for Open {
        fn map_float<const D: usize>(
            &mut self,
            param: burn::module::Param<Tensor<D>>,
        ) -> burn::module::Param<Tensor<D>> {
            param.set_require_grad(false)
        }
    }
    let keep: Vec<_> = named_params(&model)
        .into_iter()
        .filter(|p| p.adapter || p.name.contains("mm_projector"))
        .map(|p| p.id)
        .collect();
    let group = burn::module::ParamGroup::from_ids(keep);
    model.train().map(&mut Open).set_require_grad_group(group, true)
}

fn adapter_config(config: &Value) -> AdapterConfig {
    let targets: Vec<String> = serde_json::from_value(config["target_modules"].clone()).unwrap();
    AdapterConfig {
        r: config["r"].as_u64().unwrap() as usize,
        lora_alpha: config["lora_alpha"].as_f64().unwrap(),
        lora_dropout: config["lora_dropout"].as_f64().unwrap(),
        target_modules: targets,
        ..AdapterConfig::default()
    }
}

fn pixels(tensors: &Tensors, name: &str) -> Vec<Pixels> {
    let [_, c, h, w] = tensors.shape(name)[..] else { panic!("{name} is no stack of images") };
    let values = tensors.f32(name);
    values.chunks(c * h * w).map(|d| Pixels { data: d.to_vec(), shape: [c, h, w] }).collect()
}

fn collate(model: &AnyVlm, rows: &[RawRow], images: &[Pixels], device: &Device) -> Batch {
    let features = images.first().map_or(0, |image| {
        let [c, h, w] = image.shape;
        let x = Tensor::from_data(TensorData::new(image.data.clone(), [1, c, h, w]), device);
        model.clone().valid().vision(x).dims()[1]
    });
    let rules = MergeRules { max_length: None, side: PaddingSide::Right, pad_id: 0 };
    let counts = vec![features; images.len()];
    let merged = splice(rows, &counts, &rules).unwrap();
    let used = |i: usize| merged.feature_rows.iter().any(|f| *f as usize / features == i);
    Batch {
        ids: (0..rows.len()).map(|i| i.to_string()).collect(),
        input_ids: merged.input_ids.clone(),
        labels: merged.labels.clone(),
        mask: merged.valid.clone(),
        positions: merged.positions.clone(),
        segments: row_segments(&merged.valid, merged.length),
        feature_index: merged.feature_index.clone(),
        pixels: (0..images.len()).filter(|i| used(*i)).map(|i| images[i].clone()).collect(),
        rows: merged.rows,
        length: merged.length,
    }
}

/// Logits of every position of every row, packed.
fn logits(model: &AnyVlm, batch: &Batch, device: &Device) -> Tensor<2> {
    let context = model.context(batch, device);
    let mut x = model.embed(batch, model.features(batch, device), device);
    for i in 0..model.num_layers() {
        x = model.layer(i, x, &context, None);
    }
    let [rows, length, hidden] = x.dims();
    model.logits(model.final_norm(x).reshape([rows * length, hidden]))
}

/// Values by PEFT name in PEFT's layout.
fn named(trained: &[params::Trained], values: Vec<Vec<f32>>) -> BTreeMap<String, Vec<f32>> {
    trained
        .iter()
        .zip(values)
        .map(|(t, values)| {
            let tensor = medtune::adapter::tensors::HostTensor { shape: t.shape.clone(), values };
            let tensor = if t.transposed { tensor.transposed() } else { tensor };
            (format!("base_model.model.{}", t.name), tensor.values)
        })
        .collect()
}

fn compare_gradient(checks: &mut Checks, name: &str, found: &[f32], expected: &[f32]) {
    let scale = expected.iter().fold(0f32, |m, v| m.max(v.abs()));
    checks.close(&format!("gradient of {name}"), found, expected, GRADIENT * scale);
}

/// 99.9 % of all entries within the tolerance, every entry within twice the way Adam can go.
fn compare_params(
    checks: &mut Checks,
    what: &str,
    session: &Session<'_, AnyVlm>,
    expected: &Tensors,
    (tolerance, config, step): (f32, &TrainConfig, usize),
) {
    let values = params::values(&session.model).into_iter().map(floats).collect();
    let found = named(&session.trained, values);
    checks.equal(&format!("{what} names"), found.keys().cloned().collect::<Vec<_>>(), expected.names());
    let (mut all, mut within) = (0usize, 0usize);
    for (name, values) in &found {
        let reference = expected.f32(name);
        let projector = !name.contains(".lora_");
        let rate = if projector { config.mm_projector_lr.unwrap() } else { config.learning_rate };
        let limit = (2.0 * rate * step as f64) as f32;
        checks.close(&format!("{what} {name}"), values, &reference, limit);
        all += values.len();
        within += values.iter().zip(&reference).filter(|(a, b)| (*a - *b).abs() <= tolerance).count();
    }
    let share = within as f64 / all as f64;
    checks.equal(&format!("{what}: {share} of parameters within {tolerance}"), share >= 0.999, true);
}

fn relative(checks: &mut Checks, what: &str, found: f64, expected: f64, tolerance: f64) {
    let off = (found - expected).abs() / expected.abs();
    checks.equal(&format!("{what}: {found} for {expected}"), off <= tolerance * f64::from(fixture::slack()), true);
}

/// `constant`, or `cosine, warmup_steps=2, total_steps=20`.
fn schedule(text: &str) -> (SchedulerType, usize, usize) {
    let mut parts = text.split(", ");
    let kind = match parts.next().unwrap() {
        "constant" => SchedulerType::Constant,
        "cosine" => SchedulerType::Cosine,
        "linear" => SchedulerType::Linear,
        other => panic!("unknown schedule {other}"),
    };
    let (mut warmup, mut total) = (0, 0);
    for part in parts {
        match part.split_once('=').unwrap() {
            ("warmup_steps", n) => warmup = n.parse().unwrap(),
            ("total_steps", n) => total = n.parse().unwrap(),
            (other, _) => panic!("unknown part {other} of a schedule"),
        }
    }
    (kind, warmup, total)
}
