//! What `export` writes loads as the model it was made of, and so does an adapter that is written again.
//!
//! With `MEDTUNE_INTERCHANGE=DIR` the exported models, the adapters and the logits are left in `DIR`, so that the
//! original programs can be run on them (docs/checkpoints.md).

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

use burn::{
    module::{Module, ModuleMapper, Param},
    tensor::{Device, Tensor},
};
use medtune::{
    adapter::{
        AdapterConfig, peft,
        tensors::{HostTensor, write},
    },
    models::{self, AnyVlm, LoadOptions},
    nn::visit::PathStack,
    sample::{ImageRef, Origin, Role, Sample, Split, Turn},
    train::params,
    vlm::{Batch, Encoded, PaddingSide, Processor, Vlm},
};
use serde_json::{Value, json};

use crate::{
    cli::medtune,
    parity::fixture::{Checks, root},
};

/// One model of a fixture.
struct Case {
    name: &'static str,
    family: &'static str,
    checkpoint: &'static str,
    adapter: &'static str,
    vision_tower: Option<&'static str>,
    images: &'static str,
}

const CASES: [Case; 4] = [
    Case {
        name: "llava_med",
        family: "llava_med",
        checkpoint: "checkpoint",
        adapter: "lora",
        vision_tower: Some("vision_tower"),
        images: "images",
    },
    Case {
        name: "qwen_vl",
        family: "qwen_vl",
        checkpoint: "checkpoint",
        adapter: "adapter",
        vision_tower: None,
        images: "images",
    },
    Case {
        name: "internvl_phi3",
        family: "internvl",
        checkpoint: "checkpoint_phi3",
        adapter: "golden/phi3/adapter_llm",
        vision_tower: None,
        images: "images",
    },
    Case {
        name: "internvl_internlm2",
        family: "internvl",
        checkpoint: "checkpoint_internlm2",
        adapter: "golden/internlm2/adapter_llm",
        vision_tower: None,
        images: "images",
    },
];

#[test]
fn an_exported_model_and_a_written_adapter_give_the_logits_of_the_adapted_base() {
    let mut checks = Checks::of_file("interchange", "export and adapter");
    let scratch = tempfile::tempdir().unwrap();
    let place = std::env::var_os("MEDTUNE_INTERCHANGE").map_or_else(|| scratch.path().to_path_buf(), PathBuf::from);
    for case in &CASES {
        case.check(&place.join(case.name), &mut checks);
    }
}

impl Case {
    fn path(&self, part: &str) -> PathBuf {
        root(self.family).join(part)
    }

    fn options(&self) -> LoadOptions {
        LoadOptions { vision_tower: self.vision_tower.map(|t| self.path(t)), ..LoadOptions::default() }
    }

    fn check(&self, place: &Path, checks: &mut Checks) {
        let device = Device::flex();
        let (base, processor) = models::load(&self.path(self.checkpoint), &self.options(), &device).unwrap();
        let adapted = peft::load(base, &self.path(self.adapter), &processor.signature()).unwrap();
        let row = self.row(processor.as_ref());
        let expected = logits(&adapted, &row, &device);
        self.exported(place, &row, &expected, checks);
        let written = self.written(place, adapted, &row, &expected, checks);
        self.leave(place, &row, &expected, &written);
    }

    /// A question about the first image of the fixture.
    fn row(&self, processor: &dyn Processor) -> Encoded {
        let mut images: Vec<PathBuf> =
            fs::read_dir(self.path(self.images)).unwrap().map(|e| e.unwrap().path()).collect();
        images.sort();
        let sample = Sample {
            id: self.name.into(),
            images: vec![ImageRef { path: images[0].clone() }],
            turns: vec![Turn { role: Role::User, text: "<image>\nIs there a nodule?".into() }],
            origin: Origin::default(),
            split: Split::Test,
            group: String::new(),
            polarity: None,
            category: None,
            answer_type: None,
            annotation: None,
            options: Vec::new(),
            meta: serde_json::Map::new(),
        };
        processor.prompt(&sample).unwrap()
    }

    /// As a user exports: with the program, in several shards.
    fn exported(&self, place: &Path, row: &Encoded, expected: &[f32], checks: &mut Checks) {
        let out = place.join("exported");
        let _ = fs::remove_dir_all(&out);
        let text = |path: &Path| path.display().to_string();
        let (checkpoint, adapter) = (text(&self.path(self.checkpoint)), text(&self.path(self.adapter)));
        let tower = self.vision_tower.map(|t| text(&self.path(t)));
        let mut args = vec!["export", &checkpoint, "--adapter", &adapter, "--max-shard-size", "0.0003", "--json"];
        let out_text = text(&out);
        args.extend(["--out", &out_text]);
        if let Some(tower) = &tower {
            args.extend(["--vision-tower", tower]);
        }
        let said = medtune(Path::new("."), &args);
        assert_eq!(said.code, 0, "{}", said.err);
        let report: Value = serde_json::from_str(&said.out).unwrap();
        assert!(report["merged"]["tokens"].as_u64().unwrap() > 10, "{report:#}");
        checks.equal("predictions of the folded model", report["merged"]["same_prediction"].as_f64(), Some(1.0));
        let shards =
            report["files"].as_array().unwrap().iter().filter(|f| f.as_str().unwrap().ends_with(".safetensors"));
        assert!(shards.count() > 2, "{report:#}");
        let device = Device::flex();
        let (model, processor) = models::load(&out, &LoadOptions::default(), &device).unwrap();
        checks.equal("input of the exported model", &self.row(processor.as_ref()), row);
        let scale = expected.iter().fold(1f32, |m, x| m.max(x.abs()));
        checks.close("logits of the exported model", &logits(&model, row, &device), expected, 2e-5 * scale);
    }

    /// Logits of the base with the updates alone, written and read again.
    fn written(&self, place: &Path, adapted: AnyVlm, row: &Encoded, expected: &[f32], checks: &mut Checks) -> Vec<f32> {
        let out = place.join("written");
        let _ = fs::remove_dir_all(&out);
        fs::create_dir_all(place).unwrap();
        let config: Value =
            serde_json::from_slice(&fs::read(self.path(self.adapter).join("adapter_config.json")).unwrap()).unwrap();
        let settings = AdapterConfig {
            r: config["r"].as_u64().unwrap() as usize,
            lora_alpha: config["lora_alpha"].as_f64().unwrap(),
            ..AdapterConfig::default()
        };
        let opened = adapted.train().map(&mut OpenAdapters(PathStack::default()));
        let trained = params::trained(&opened, opened.towers());
        let signature = json!({});
        let base = self.path(self.checkpoint).display().to_string();
        let info = peft::AdapterInfo { config: &settings, base: &base, signature: &signature, notes: &[] };
        peft::save(&opened, &trained, opened.towers(), &info, &out).unwrap();
        let device = Device::flex();
        let (base, _) = models::load(&self.path(self.checkpoint), &self.options(), &device).unwrap();
        let found = logits(&peft::load(base, &out, &signature).unwrap(), row, &device);
        // Weights that were trained in full are not part of what is written here.
        if !self.path(self.adapter).join("non_lora_trainables.bin").exists() {
            checks.close("logits of the written adapter", &found, expected, 0.0);
        }
        found
    }

    /// The input and the logits, for the original program.
    fn leave(&self, place: &Path, row: &Encoded, expected: &[f32], written: &[f32]) {
        let tensor = |shape: &[usize], values: Vec<f32>| HostTensor { shape: shape.to_vec(), values };
        let vocab = expected.len() / row.input_ids.len();
        let shape = row.pixels[0].shape;
        let mut tensors = BTreeMap::new();
        let ids = row.input_ids.iter().map(|id| *id as f32).collect();
        tensors.insert("input_ids".to_string(), tensor(&[row.input_ids.len()], ids));
        for (name, values) in [("logits", expected), ("logits_written", written)] {
            tensors.insert(name.to_string(), tensor(&[row.input_ids.len(), vocab], values.to_vec()));
        }
        let pixels = row.pixels.iter().flat_map(|p| p.data.clone()).collect();
        let shape = [row.pixels.len(), shape[0], shape[1], shape[2]];
        tensors.insert("pixels".to_string(), tensor(&shape, pixels));
        let spans: Vec<f32> = row.spans.iter().flat_map(|s| [s.start as f32, s.len as f32]).collect();
        tensors.insert("spans".to_string(), tensor(&[row.spans.len(), 2], spans));
        write(&place.join("probe.safetensors"), &tensors).unwrap();
    }
}

/// Marks every update as trained, and nothing else.
struct OpenAdapters(PathStack);

impl ModuleMapper for OpenAdapters {
    fn enter_module(&mut self, name: &str, container: &str) {
        self.0.enter(name, container);
    }

    fn exit_module(&mut self, _name: &str, _container: &str) {
        self.0.exit();
    }

    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        let adapter = self.0.is_adapter();
        param.set_require_grad(adapter)
    }
}

fn logits(model: &AnyVlm, row: &Encoded, device: &Device) -> Vec<f32> {
    let batch = Batch::collate(std::slice::from_ref(row), 0, PaddingSide::Right, 1);
    let context = model.context(&batch, device);
    let mut x = model.embed(&batch, model.features(&batch, device), device);
    for i in 0..model.num_layers() {
        x = model.layer(i, x, &context, None);
    }
    let [rows, length, hidden] = x.dims();
    let out = model.logits(model.final_norm(x).reshape([rows * length, hidden]));
    out.into_data().try_to_vec().unwrap()
}
