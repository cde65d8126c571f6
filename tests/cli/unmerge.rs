//! Taking an adapter off a model that it was merged into, on the small LLaVA-Med of the fixture and adapters of peft.

use std::{
    fs,
    path::{Path, PathBuf},
};

use burn::tensor::{Device, FloatDType};
use medtune::{
    adapter::{
        AdapterConfig, InitLoraWeights,
        attachment::Mode,
        inject::prepare,
        merge::{Answers, Record},
        peft,
    },
    models::{self, LoadOptions},
    train::{TowerMode, TrainConfig, params},
    vlm::{Batch, Encoded, PaddingSide, Vlm},
    weights::Checkpoint,
};
use serde_json::{Value, json};

use super::{Said, medtune};
use crate::parity::fixture::root;

/// A directory for the results, and the fixtures.
struct Bench(tempfile::TempDir);

fn text(path: &Path) -> String {
    path.display().to_string()
}

fn base() -> PathBuf {
    root("llava_med").join("checkpoint")
}

fn tower() -> PathBuf {
    root("llava_med").join("vision_tower")
}

fn variant(name: &str) -> PathBuf {
    root("peft").join(name)
}

/// What the model in `dir` predicts for a row of text.
fn answers(dir: &Path) -> Answers {
    let ids: Vec<i32> = (0..120).map(|i| (i * 37 + 11) % 500).collect();
    let row = Encoded { id: "r".into(), labels: ids.clone(), input_ids: ids, spans: Vec::new(), pixels: Vec::new() };
    let options = LoadOptions { vision_tower: Some(tower()), dtype: Some(FloatDType::F32), ..LoadOptions::default() };
    let device = Device::flex();
    let (model, _) = models::load(dir, &options, &device).unwrap();
    Answers::of(&model, Mode::Bare, &[Batch::collate(&[row], 0, PaddingSide::Right, 1)], &device)
}

/// Largest difference of a weight of the base, as a share of the largest weight of its tensor.
fn weights_apart(dir: &Path) -> f32 {
    let (old, new) = (Checkpoint::open(&base()).unwrap(), Checkpoint::open(dir).unwrap());
    let mut worst = 0f32;
    for name in old.names() {
        let (a, b) = (old.read_f32(name).unwrap(), new.read_f32(name).unwrap());
        let scale = a.iter().fold(1e-9f32, |m, x| m.max(x.abs()));
        worst = a.iter().zip(&b).fold(worst, |m, (x, y)| m.max((x - y).abs() / scale));
    }
    worst
}

impl Bench {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn run(&self, args: &[&str]) -> Said {
        medtune(self.0.path(), &[args, &["--quiet"]].concat())
    }

    fn merge(&self, adapter: &Path, out: &str, more: &[&str]) -> Said {
        let (model, vision, adapter) = (text(&base()), text(&tower()), text(adapter));
        let args = ["merge", "--model", &model, "--vision-tower", &vision, "--adapter", &adapter, "--out", out];
        self.run(&[&args[..], more].concat()).code(0)
    }

    fn unmerge(&self, more: &[&str]) -> Said {
        self.run(&[&["unmerge", "--model", "merged", "--out", "base", "--json"], more].concat())
    }

    fn refused(&self, more: &[&str], parts: &[&str]) {
        self.unmerge(more).code(2).blames(parts);
        let left: Vec<_> = fs::read_dir(self.0.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
        assert!(!self.path("base").exists() && left.iter().all(|n| !n.to_string_lossy().starts_with('.')), "{left:?}");
    }
}

/// An adapter with the start of `init`, changed as if it had been trained, as this program writes it.
fn trained(init: &str, out: &Path) {
    let options = LoadOptions { vision_tower: Some(tower()), ..LoadOptions::default() };
    let (model, processor) = models::load(&base(), &options, &Device::flex()).unwrap();
    let config = AdapterConfig {
        r: 2,
        init_lora_weights: InitLoraWeights::Name(init.into()),
        target_modules: vec!["language:all-linear".into()],
        ..AdapterConfig::default()
    };
    let train = TrainConfig { projector: TowerMode::Frozen, ..TrainConfig::default() };
    let prepared = prepare(model, &train, &config, 3).unwrap();
    let trained = params::trained(&prepared.model, prepared.model.towers());
    let model = params::update(prepared.model, |i, t| if trained[i].lora { t.mul_scalar(1.1) } else { t });
    let info = peft::AdapterInfo { config: &config, base: "base", signature: &processor.signature(), notes: &[] };
    peft::save(&model, &trained, model.towers(), &info, out).unwrap();
}

#[test]
fn the_base_comes_back_out_of_a_merged_model() {
    let made = tempfile::tempdir().unwrap();
    let pissa = made.path().join("pissa");
    trained("pissa", &pissa);
    for adapter in [variant("lora"), variant("rslora"), variant("patterns"), pissa] {
        let bench = Bench::new();
        bench.merge(&adapter, "merged", &[]);
        let said = bench.unmerge(&[]).code(0).json();
        let merged = weights_apart(&bench.path("merged"));
        assert!(merged > 1e-3, "{}: the merge changed weights by {merged}", adapter.display());
        assert!(weights_apart(&bench.path("base")) < 1e-6, "{}", adapter.display());
        let (was, is) = (answers(&base()), answers(&bench.path("base")));
        assert_eq!(was.tokens, is.tokens, "{}", adapter.display());
        let off = was.logits.iter().zip(&is.logits).fold(0f32, |m, (a, b)| m.max((a - b).abs()));
        assert!(off < 1e-4, "{}: {off}", adapter.display());
        for part in ["unmerged", "base"] {
            assert_eq!(said[part]["same_prediction"], 1.0, "{said:#}");
            assert!(said[part]["max_difference"].as_f64().unwrap() < 1e-4, "{said:#}");
            assert!(said[part]["tokens"].as_u64().unwrap() > 10, "{said:#}");
        }
        assert_eq!((&said["dtype"], said["warnings"].as_array().unwrap().len()), (&json!("float32"), 0), "{said:#}");
        assert!(!bench.path("base/merge.json").exists() && !bench.path("base/adapter").exists());
        bench.unmerge(&[]).code(2).blames(&["there is a checkpoint already", "--out DIR"]);
        let text = bench.run(&["unmerge", "--model", "merged", "--out", "again"]).code(0).out;
        for part in ["taken off", "with it again", "as the base was", "100.0 % of next tokens are the same"] {
            assert!(text.contains(part), "no {part:?} in {text}");
        }
    }
}

#[test]
fn several_weighted_adapters_come_off_and_what_lies_below_is_remembered() {
    let bench = Bench::new();
    bench.merge(&variant("lora"), "first", &[]);
    let weighted = format!("{}:0.5", text(&variant("rslora")));
    let more = text(&variant("patterns"));
    let args = ["merge", "--model", "first", "--adapter", &weighted, "--adapter", &more, "--out", "merged"];
    bench.run(&args).code(0);
    bench.unmerge(&[]).code(0);
    let record = |dir: &str| -> Record {
        serde_json::from_str(&fs::read_to_string(bench.path(dir).join("merge.json")).unwrap()).unwrap()
    };
    assert_eq!(record("base"), record("first"));
    assert_eq!(record("merged").adapters.len(), 2);
    let whole = text(&variant("rslora"));
    let said = bench.run(&["unmerge", "--model", "merged", "--adapter", &whole, "--adapter", &more, "--out", "other"]);
    said.code(2).blames(&["not what was merged", "with weight 0.5", "with weight 1"]);
}

#[test]
fn a_half_type_loses_little_and_says_what() {
    let bench = Bench::new();
    bench.merge(&variant("lora"), "merged", &["--dtype", "bfloat16"]);
    let said = bench.unmerge(&["--dtype", "bfloat16"]).code(0).json();
    assert_eq!(said["dtype"], "bfloat16");
    assert!(weights_apart(&bench.path("base")) < 1.0 / 128.0);
    let same =
        said["unmerged"]["same_prediction"].as_f64().unwrap().min(said["base"]["same_prediction"].as_f64().unwrap());
    assert_eq!(said["warnings"].as_array().unwrap().is_empty(), same == 1.0, "{said:#}");
}

#[test]
fn what_cannot_be_taken_off_is_refused_with_the_reason() {
    for (name, reason) in [("dora", "DoRA"), ("modules_to_save", "the whole of"), ("pissa", "pissa")] {
        let bench = Bench::new();
        bench.merge(&variant(name), "merged", &[]);
        bench.refused(&[], &["cannot be taken off", reason, "copy of the base"]);
    }
}

#[test]
fn another_adapter_is_noticed() {
    let bench = Bench::new();
    bench.merge(&variant("rslora"), "merged", &[]);
    let other = text(&variant("loraplus"));
    bench.refused(&["--adapter", &other], &["not what was merged", "merged/adapter"]);
    bench.refused(&["--adapter", "nowhere"], &["nowhere", "adapter_model.safetensors"]);
    bench.refused(&["--adapter", "merged"], &["no adapter in this directory"]);

    // The same tensors under another scale.
    let config = bench.path("merged/adapter/adapter_config.json");
    let whole = fs::read_to_string(&config).unwrap();
    let mut changed: Value = serde_json::from_str(&whole).unwrap();
    changed["lora_alpha"] = 60.into();
    fs::write(&config, changed.to_string()).unwrap();
    bench.refused(&[], &["not the model that the adapter was merged into", "a difference of"]);
    changed["r"] = 7.into();
    fs::write(&config, changed.to_string()).unwrap();
    bench.refused(&[], &["does not fit the model", "wrong shape"]);
    fs::write(&config, whole).unwrap();

    // A checkpoint that has been changed since.
    let file = bench.path("merged/model.safetensors");
    let mut bytes = fs::read(&file).unwrap();
    let end = bytes.len();
    bytes[end / 2..].chunks_exact_mut(4).for_each(|b| b.copy_from_slice(&0.01f32.to_le_bytes()));
    fs::write(&file, bytes).unwrap();
    bench.refused(&[], &["not the model that the adapter was merged into"]);
}

#[test]
fn without_a_record_the_adapter_must_be_named_and_is_taken_on_trust() {
    let bench = Bench::new();
    bench.merge(&variant("rslora"), "merged", &[]);
    fs::remove_file(bench.path("merged/merge.json")).unwrap();
    bench.refused(&[], &["does not say what was merged", "--adapter DIR"]);
    let adapter = text(&variant("rslora"));
    let said = bench.unmerge(&["--adapter", &adapter]).code(0).json();
    assert!(said["base"].is_null() && said["warnings"][0].as_str().unwrap().contains("merge.json"), "{said:#}");
    assert!(weights_apart(&bench.path("base")) < 1e-6);
    fs::write(bench.path("merged/merge.json"), "{").unwrap();
    medtune(bench.0.path(), &["unmerge", "--model", "merged", "--out", "x"]).code(2).blames(&["merge.json"]);
    medtune(bench.0.path(), &["unmerge", "--model", "gone", "--out", "x", "--adapter", &adapter])
        .code(2)
        .blames(&["gone"]);
}
