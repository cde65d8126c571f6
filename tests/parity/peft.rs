//! Every kind of adapter against peft itself: reading, logits, loss, gradients, an optimizer step, merging, writing.
//!
//! The variants are the folders of `tests/golden/peft`, each as peft wrote it; `make.py` there made them. With
//! `MEDTUNE_HANDOVER=DIR` the adapters that `benches/peers/peft_handover.py` has put into DIR are taken over as well, trained
//! on, and handed back.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::{Path, PathBuf},
};

use burn::{
    module::Module,
    tensor::{Device, FloatDType, Tensor, TensorData},
};
use medtune::{
    adapter::{
        AdapterConfig, Quantization,
        inject::{Prepared, prepare, sizes},
        merge,
        peft::{self, AdapterRef},
        quantized::packed_bytes,
        target::{Limits, linears, select_within},
        tensors::{HostTensor, write},
    },
    kernel::quant::Packed,
    models::{AnyVlm, LoadOptions, load},
    nn::visit::{NamedParam, named_params},
    train::{
        TowerMode, TrainConfig,
        objective::Objective,
        optimizer::AdamW,
        params::{self, GradientSum, Trained},
        step::{self, Saving, Vision},
    },
    vlm::{Batch, Encoded, ImageSpan, PaddingSide, Vlm},
    weights::SaveOptions,
};
use serde_json::{Value, json};

use super::fixture::{Checks, Tensors, json as read_json, root};

const LOGITS: f32 = 2e-4;
const LOSS: f64 = 2e-5;
const GRADIENT: f32 = 2e-4;
const STEPPED: f32 = 2e-5;

struct Fixture {
    root: PathBuf,
    inputs: Value,
    base: AnyVlm,
    batch: Batch,
    features: Tensor<3>,
    device: Device,
}

fn options(dtype: FloatDType) -> LoadOptions {
    let vision_tower = Some(root("llava_med").join("vision_tower"));
    LoadOptions { vision_tower, dtype: Some(dtype), ..LoadOptions::default() }
}

fn load_base(dtype: FloatDType) -> AnyVlm {
    load(&root("llava_med").join("checkpoint"), &options(dtype), &Device::flex()).unwrap().0
}

fn numbers<T: serde::de::DeserializeOwned>(value: &Value) -> Vec<T> {
    serde_json::from_value(value.clone()).unwrap()
}

fn floats<const D: usize>(t: Tensor<D>) -> Vec<f32> {
    t.into_data().try_to_vec().unwrap()
}

impl Fixture {
    fn open() -> Self {
        let root = root("peft");
        let inputs = read_json(&root.join("inputs.json"));
        let device = Device::flex();
        let base = load_base(FloatDType::F32);
        let patches = inputs["patches"].as_u64().unwrap() as usize;
        let features: Vec<f32> = numbers(&inputs["features"]);
        let width = features.len() / patches;
        Self {
            batch: batch(&inputs, patches),
            features: Tensor::from_data(TensorData::new(features, [1, patches, width]), &device),
            root,
            inputs,
            base,
            device,
        }
    }

    /// Folders that hold a variant.
    fn variants(&self) -> Vec<(String, PathBuf)> {
        let entries = std::fs::read_dir(&self.root).unwrap().map(|e| e.unwrap());
        let mut found: Vec<(String, PathBuf)> = entries
            .filter(|e| e.path().join("case.json").is_file())
            .map(|e| (e.file_name().into_string().unwrap(), e.path()))
            .collect();
        found.sort();
        found
    }

    fn vision(&self) -> Vision {
        Vision::Features(self.features.clone())
    }

    /// Logits as the fixture keeps them: the last positions, every so many tokens.
    fn logits(&self, model: &AnyVlm) -> Vec<f32> {
        let context = model.context(&self.batch, &self.device);
        let mut x = step::inputs(model, &self.batch, &self.vision(), &self.device);
        for i in 0..model.num_layers() {
            x = model.layer(i, x, &context, None);
        }
        let [rows, length, hidden] = x.dims();
        let all = model.logits(model.final_norm(x).reshape([rows * length, hidden]));
        let (shown, every) = (self.count("shown"), self.count("every"));
        let width = all.dims()[1];
        let values = floats(all);
        (length - shown..length)
            .flat_map(|i| values[i * width..(i + 1) * width].iter().step_by(every).copied().collect::<Vec<_>>())
            .collect()
    }

    fn count(&self, key: &str) -> usize {
        self.inputs[key].as_u64().unwrap() as usize
    }

    fn train_config(&self, case: &Value) -> TrainConfig {
        TrainConfig {
            vision: TowerMode::Frozen,
            projector: TowerMode::Lora,
            language: TowerMode::Lora,
            learning_rate: case["learning_rate"].as_f64().unwrap(),
            ..TrainConfig::default()
        }
    }

    /// The adapter in `dir`, ready to be trained on.
    fn continued(&self, dir: &Path, case: &Value) -> (Prepared<AnyVlm>, Vec<Trained>, AdamW) {
        let config = self.train_config(case);
        let adapter = AdapterConfig {
            adapter_name_or_path: Some(dir.to_path_buf()),
            loraplus_lr_ratio: case["loraplus_lr_ratio"].as_f64(),
            ..AdapterConfig::default()
        };
        let prepared = prepare(self.base.clone(), &config, &adapter, 7).unwrap();
        let trained = params::trained(&prepared.model, prepared.model.towers());
        let parameters: usize = trained.iter().map(Trained::len).sum();
        assert_eq!(sizes(&self.base, &config, &adapter).unwrap().trained, parameters);
        let optimizer = AdamW::new(&config, adapter.loraplus_lr_ratio, &trained);
        (prepared, trained, optimizer)
    }

    fn gradients(&self, model: &AnyVlm, recompute: bool) -> (f64, Vec<Tensor<1>>) {
        let mut sums = GradientSum::new(model);
        let weight = 1.0 / self.batch.supervised() as f64;
        let loss = step::backward(
            model,
            &self.batch,
            &self.vision(),
            &Objective::Tokens(weight),
            Saving { recompute, ..Saving::default() },
            &self.device,
            &mut sums,
        );
        (
            loss.unwrap().sum() * weight,
            sums.sums.into_iter().map(|g| g.expect("everything trained is reached")).collect(),
        )
    }

    fn step(&self, model: AnyVlm, optimizer: &mut AdamW) -> AnyVlm {
        let (_, gradients) = self.gradients(&model, true);
        params::update(model, |i, value| optimizer.update(i, value, gradients[i].clone(), 1.0, 1.0))
    }
}

fn batch(inputs: &Value, patches: usize) -> Batch {
    let row = Encoded {
        id: "row".into(),
        input_ids: numbers(&inputs["input_ids"]),
        labels: numbers(&inputs["labels"]),
        spans: vec![ImageSpan { start: 0, len: patches }],
        pixels: Vec::new(),
    };
    Batch::collate(&[row], 0, PaddingSide::Right, 1)
}

/// Names as the program has them.
fn plain(name: &str) -> String {
    name.strip_prefix("base_model.model.").unwrap().replace(".base_layer", "")
}

/// Values in the layout of the files.
fn host(t: &Trained, values: Tensor<1>) -> Vec<f32> {
    let tensor = HostTensor { shape: t.shape.clone(), values: floats(values) };
    if t.transposed { tensor.transposed().values } else { tensor.values }
}

/// `[adapter]` as a user would write what peft was told.
fn as_recipe(settings: &Value) -> AdapterConfig {
    let mut settings = settings.clone();
    for key in ["target_modules", "layers_pattern"] {
        if let Some(text) = settings[key].as_str() {
            settings[key] = json!([if key == "target_modules" { format!("re:{text}") } else { text.to_string() }]);
        }
    }
    serde_json::from_value(settings).unwrap()
}

/// Starts of names in `values`: `grad.` and so on.
fn values_of(tensors: &Tensors, start: &str) -> BTreeMap<String, Vec<f32>> {
    let names = tensors.names();
    let of = |n: &String| Some((plain(n.strip_prefix(start)?), tensors.f32(n)));
    names.iter().filter_map(of).collect()
}

fn check(fixture: &Fixture, name: &str, dir: &Path) {
    let mut checks = Checks::of_file("peft", name);
    let (case, values) = (read_json(&dir.join("case.json")), Tensors::open(&dir.join("values.safetensors")));
    let adapted = peft::load(fixture.base.clone(), dir, &json!({})).unwrap();
    checks.close("logits", &fixture.logits(&adapted), &values.f32("logits.adapted"), LOGITS);
    targets(fixture, &mut checks, dir, &case["settings"]);
    let gradients = values_of(&values, "grad.");
    for recompute in [false, true] {
        let (prepared, trained, _) = fixture.continued(dir, &case);
        let (loss, found) = fixture.gradients(&prepared.model, recompute);
        checks.near("loss", loss, case["loss"].as_f64().unwrap(), LOSS);
        let names: BTreeSet<String> = trained.iter().map(|t| t.name.clone()).collect();
        checks.equal("trained tensors", names, gradients.keys().cloned().collect());
        for (t, gradient) in trained.iter().zip(found) {
            let expected = &gradients[&t.name];
            let scale = expected.iter().fold(0f32, |m, v| m.max(v.abs()));
            checks.close(&format!("gradient of {}", t.name), &host(t, gradient), expected, GRADIENT * scale);
        }
    }
    let (prepared, trained, mut optimizer) = fixture.continued(dir, &case);
    let stepped = fixture.step(prepared.model, &mut optimizer);
    let expected = values_of(&values, "stepped.");
    for (t, value) in trained.iter().zip(params::values(&stepped)) {
        // The first step of Adam has the sign of the gradient, whose noise counts where it is next to nothing.
        let gradient = &gradients[&t.name];
        let scale = gradient.iter().fold(0f32, |m, v| m.max(v.abs()));
        let sure = |(i, v): (usize, &f32)| (gradient[i].abs() > 1e-2 * scale).then_some(*v);
        let found: Vec<f32> = host(t, value).iter().enumerate().filter_map(sure).collect();
        let wanted: Vec<f32> = expected[&t.name].iter().enumerate().filter_map(sure).collect();
        assert!(!found.is_empty());
        checks.close(&format!("step of {}", t.name), &found, &wanted, STEPPED);
    }
    checks.close(
        "logits after a step",
        &fixture.logits(&stepped.valid()),
        &values.f32("logits.stepped"),
        10.0 * LOGITS,
    );
    merged(fixture, &mut checks, &stepped, &values);
    written(fixture, &mut checks, dir, &stepped, &trained);
    checks.finish();
}

/// The recipe's rules choose the modules that peft's do.
fn targets(fixture: &Fixture, checks: &mut Checks, dir: &Path, settings: &Value) {
    let config = as_recipe(settings);
    checks.equal("problems of the recipe", config.problems(), Vec::<String>::new());
    let modules = linears(&fixture.base, fixture.base.towers());
    let found = select_within(&config.target_modules, Limits::of(&config), &modules, |t| t != "vision").unwrap();
    let mut found: Vec<String> = found.modules.into_iter().map(|m| m.name).collect();
    found.sort();
    let files = Tensors::open(&dir.join("adapter_model.safetensors"));
    let of = |n: &String| Some(plain(n.strip_suffix(".lora_A.weight")?));
    checks.equal("adapted modules", found, files.names().iter().filter_map(of).collect::<Vec<_>>());
    let case = json!({"learning_rate": 1e-3});
    let fresh = prepare(fixture.base.clone(), &fixture.train_config(&case), &config, 7).unwrap().model;
    let trained = params::trained(&fresh, fresh.towers());
    let mut names: Vec<String> = trained.iter().map(|t| t.name.clone()).collect();
    names.sort();
    let mut expected: Vec<String> = files.names().iter().map(|n| plain(n)).collect();
    expected.sort();
    checks.equal("tensors of a new adapter", names, expected);
    let start = fixture.logits(&fresh.valid());
    checks.close("a new adapter changes nothing", &start, &fixture.logits(&fixture.base), LOGITS);
}

/// Folded into the weights, the adapter computes what peft's merged model does, and it is proven before.
fn merged(fixture: &Fixture, checks: &mut Checks, model: &AnyVlm, values: &Tensors) {
    let text = Batch { feature_index: Vec::new(), ..fixture.batch.clone() };
    let (merged, proof) = merge::merge(model.valid(), &[text], &fixture.device).unwrap();
    checks.equal("tokens compared", proof.tokens, fixture.batch.length);
    checks.equal("same predictions", proof.same_prediction, 1.0);
    checks.equal("nothing hangs on the merged model", named_params(&merged).iter().any(|p| p.attached), false);
    checks.close("logits of the merged model", &fixture.logits(&merged), &values.f32("logits.merged"), 10.0 * LOGITS);
}

/// What is written is read again as what it was, with or without a start that changed the weight.
fn written(fixture: &Fixture, checks: &mut Checks, dir: &Path, model: &AnyVlm, trained: &[Trained]) {
    let temporary = tempfile::tempdir().unwrap();
    let out = temporary.path().join("adapter");
    save(dir, model, trained, &out);
    let again = peft::load(fixture.base.clone(), &out, &json!({})).unwrap();
    checks.close("logits of the written adapter", &fixture.logits(&again), &fixture.logits(&model.valid()), 2e-5);
    let (before, after) = (read_json(&dir.join("adapter_config.json")), read_json(&out.join("adapter_config.json")));
    let start = before["init_lora_weights"].is_string();
    let keys: &[&str] =
        if start { &["use_dora", "bias"] } else { &["r", "lora_alpha", "use_rslora", "use_dora", "bias"] };
    for key in keys {
        checks.equal(key, &after[key], &before[key]);
    }
    if !start {
        let names = |dir: &Path| Tensors::open(&dir.join("adapter_model.safetensors")).names();
        checks.equal("names in the file", names(&out), names(dir));
    }
}

fn save(settings: &Path, model: &AnyVlm, trained: &[Trained], out: &Path) {
    let config = AdapterConfig { adapter_name_or_path: Some(settings.to_path_buf()), ..AdapterConfig::default() };
    let config = peft::resolved(&config).unwrap();
    let info = peft::AdapterInfo { config: &config, base: "base", signature: &json!({}), notes: &[] };
    peft::save(model, trained, model.towers(), &info, out).unwrap();
}

#[test]
fn every_variant_is_pefts() {
    let fixture = Fixture::open();
    let variants = fixture.variants();
    assert!(variants.len() > 5, "{variants:?}");
    for (name, dir) in &variants {
        check(&fixture, name, dir);
    }
}

#[test]
fn several_adapters_add_up_as_in_peft() {
    let fixture = Fixture::open();
    let mut checks = Checks::of_file("peft", "weighted");
    let described = read_json(&fixture.root.join("weighted.json"));
    let all: Vec<AdapterRef> = described["adapters"]
        .as_object()
        .unwrap()
        .iter()
        .map(|(name, weight)| AdapterRef { dir: fixture.root.join(name), weight: weight.as_f64().unwrap() })
        .collect();
    let model = peft::load_all(fixture.base.clone(), &all, &json!({})).unwrap();
    let expected = Tensors::open(&fixture.root.join("weighted.safetensors")).f32("logits.sum");
    checks.close("logits", &fixture.logits(&model), &expected, LOGITS);
    for (name, _) in fixture.variants() {
        let alone = [AdapterRef { dir: fixture.root.join(&name), weight: 0.5 }];
        let addable = !["dora", "bias", "modules", "pissa", "olora"].iter().any(|kind| name.contains(kind));
        let outcome = peft::load_all(fixture.base.clone(), &alone, &json!({}));
        checks.equal(&format!("{name} can be weighted"), outcome.is_ok(), addable);
    }
    checks.finish();
}

/// Packed weights have the values that bitsandbytes gives them.
#[test]
fn packed_weights_are_those_of_bitsandbytes() {
    let file = Tensors::open(&root("peft").join("quantized.safetensors"));
    let mut checks = Checks::of_file("peft", "quantized");
    let shape: [usize; 2] = file.shape("weight").try_into().unwrap();
    let weight = TensorData::new(file.f32("weight"), shape);
    let weight = Tensor::<2>::from_data(weight, &Device::flex()).transpose();
    for name in file.names().iter().filter(|n| *n != "weight") {
        let kind: Quantization = serde_json::from_value(json!(name)).unwrap();
        let packed = Packed::new(weight.clone(), kind.format().unwrap());
        let found = floats(packed.dense(&Device::flex()).transpose());
        checks.close(name, &found, &file.f32(name), 1e-7);
    }
    checks.finish();
}

/// Training on packed weights is close to training on the weights themselves; what is kept is as small as it should be,
/// and the adapter fits the original base.
#[test]
fn a_packed_base_trains_like_the_base() {
    let fixture = Fixture::open();
    let mut checks = Checks::of_file("peft", "packed base");
    let case = json!({"learning_rate": 1e-2});
    let config = fixture.train_config(&case);
    let run = |quantization: Quantization| {
        let adapter = AdapterConfig {
            r: 2,
            use_dora: true,
            target_modules: vec!["language:q_proj".into(), "down_proj".into()],
            quantization,
            ..AdapterConfig::default()
        };
        let Prepared { model, .. } = prepare(fixture.base.clone(), &config, &adapter, 7).unwrap();
        let trained = params::trained(&model, model.towers());
        let mut optimizer = AdamW::new(&config, None, &trained);
        let (first, one) = fixture.gradients(&model, false);
        let (_, layered) = fixture.gradients(&model, true);
        for ((t, a), b) in trained.iter().zip(one).zip(layered) {
            let (a, b) = (floats(a), floats(b));
            let scale = a.iter().fold(1e-6f32, |m, v| m.max(v.abs()));
            let worst = a.iter().zip(&b).fold(0f32, |m, (a, b)| m.max((a - b).abs()));
            assert!(worst < 1e-4 * scale, "{}: {worst} of {scale}", t.name);
        }
        let model = (0..5).fold(model, |model, _| fixture.step(model, &mut optimizer));
        let last = fixture.gradients(&model, true).0;
        (model, trained, adapter, first, last)
    };
    let (.., first, last) = run(Quantization::None);
    for kind in [Quantization::Int8, Quantization::Nf4, Quantization::Nf4Double] {
        let (model, trained, adapter, start, end) = run(kind);
        // Steps of Adam amplify small differences of gradients.
        let tolerance = if kind == Quantization::Int8 { 0.02 } else { 0.06 };
        checks.near(&format!("{kind:?} first loss"), start, first, tolerance * first);
        checks.near(&format!("{kind:?} last loss"), end, last, tolerance * first);
        let weights = named_params(&model);
        let packed = |p: &&NamedParam| p.linear_weight && p.attached;
        let bytes = |p: &NamedParam| kind.format().unwrap().num_bytes(p.num_elements());
        // Seven modules a layer; down_proj of the projector's tower is none of them.
        let expected: usize = weights.iter().filter(packed).map(bytes).sum();
        checks.equal("packed bytes", packed_bytes(&model), (expected, 7 * model.num_layers()));
        let temporary = tempfile::tempdir().unwrap();
        let out = temporary.path().join("adapter");
        let info = peft::AdapterInfo { config: &adapter, base: "base", signature: &json!({}), notes: &[] };
        peft::save(&model, &trained, model.towers(), &info, &out).unwrap();
        let refused = model.valid().save(temporary.path(), &SaveOptions::default());
        checks.equal("a packed model is not written by accident", refused.is_err(), true);
        let adapters = [AdapterRef::from(out)];
        let on = |quantization| peft::load_onto(fixture.base.clone(), &adapters, &json!({}), quantization).unwrap();
        let found = fixture.logits(&on(kind));
        checks.close("the written adapter on the packed base", &found, &fixture.logits(&model.valid()), 1e-4);
        // Merged into the values of the packed base, in f32, it computes the same.
        let text = Batch { feature_index: Vec::new(), ..fixture.batch.clone() };
        let (merged, _) = merge::merge(on(kind), std::slice::from_ref(&text), &fixture.device).unwrap();
        checks.close("merged into the packed base", &fixture.logits(&merged), &found, 1e-4);
        let saved = temporary.path().join("merged");
        let fold = SaveOptions { fold: true, ..SaveOptions::default() };
        on(kind).save(&saved, &fold).unwrap();
        let whole = temporary.path().join("whole");
        merged.save(&whole, &SaveOptions::default()).unwrap();
        let bytes = |dir: &Path| std::fs::read(dir.join("model.safetensors")).unwrap();
        checks.equal("written while it is folded", bytes(&saved) == bytes(&whole), true);
        merge::merge(on(Quantization::None), &[text], &fixture.device).unwrap();
    }
    checks.finish();
}

/// Rounding the folded weights to a half type can change answers; the proof says so, and in f32 it does not.
#[test]
fn folding_into_a_half_type_warns_where_answers_change() {
    let fixture = Fixture::open();
    let mut checks = Checks::of_file("peft", "folding");
    let long: Vec<i32> = (0..300).map(|i| (i * 37 + 11) % 500).collect();
    let row =
        Encoded { id: "long".into(), labels: long.clone(), input_ids: long, spans: Vec::new(), pixels: Vec::new() };
    let probe = Batch::collate(&[row], 0, PaddingSide::Right, 1);
    for (dtype, warned) in [(FloatDType::F32, false), (FloatDType::BF16, true)] {
        let model = load_base(dtype);
        let model = peft::load(model, &fixture.root.join("dora"), &json!({})).unwrap();
        let proof = merge::prove(&model, std::slice::from_ref(&probe), &fixture.device).unwrap();
        checks.equal(&format!("{dtype:?} {proof:?}"), proof.warning().is_some(), warned);
        checks.equal("tokens", proof.tokens, 300);
    }
    checks.finish();
}

/// Steps that are trained between two hand-overs.
const HANDED: usize = 5;

#[test]
fn adapters_are_handed_over() {
    let Some(dir) = std::env::var_os("MEDTUNE_HANDOVER").map(PathBuf::from) else { return };
    let fixture = Fixture::open();
    let mut names: Vec<_> = std::fs::read_dir(&dir).unwrap().map(|e| e.unwrap().path()).collect();
    names.retain(|p| p.join("peft/adapter_config.json").is_file());
    names.sort();
    assert!(!names.is_empty(), "nothing was handed over in {}", dir.display());
    for place in names {
        let mut checks = Checks::of_file("hand-over", &place.display().to_string());
        let from = place.join("peft");
        let (prepared, trained, mut optimizer) = fixture.continued(&from, &read_json(&place.join("case.json")));
        let expected = Tensors::open(&place.join("peft.safetensors")).f32("logits");
        checks.close("logits taken over", &fixture.logits(&prepared.model.valid()), &expected, LOGITS);
        let before = fixture.gradients(&prepared.model, true).0;
        let model = (0..HANDED).fold(prepared.model, |model, _| fixture.step(model, &mut optimizer));
        let after = fixture.gradients(&model, true).0;
        checks.equal(&format!("loss {before} falls to {after}"), after < before, true);
        save(&from, &model, &trained, &place.join("medtune"));
        let logits = fixture.logits(&model.valid());
        let tensor = HostTensor { shape: vec![logits.len()], values: logits };
        write(&place.join("medtune.safetensors"), &[("logits".to_string(), tensor)].into()).unwrap();
        println!("{}: loss {before:.4} -> {after:.4}", place.display());
        checks.finish();
    }
}
