//! Random checkpoints in the files of a release, what is said about them, and what happens when they are damaged.

use std::{
    fs,
    path::{Path, PathBuf},
};

use medtune::models::MODELS;
use serde_json::Value;

use super::{Said, medtune};

/// A directory with a small random checkpoint of a family in `c`.
struct Bench(tempfile::TempDir);

impl Bench {
    fn new(family: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let bench = Self(dir);
        bench.run(&["models", "synth", &format!("{family}/tiny"), "c", "--quiet"]).code(0);
        bench
    }

    fn run(&self, args: &[&str]) -> Said {
        medtune(self.0.path(), args)
    }

    fn inspect(&self) -> Value {
        self.run(&["models", "inspect", "c", "--json", "--quiet"]).code(0).json()
    }

    fn answer(&self) -> Said {
        self.run(&["generate", "--model", "c", "--question", "Why?", "--max-new-tokens", "3", "--quiet", "--json"])
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join("c").join(name)
    }

    /// Puts the weights of the single file into an index, as a release has them.
    fn index(&self, file: &str, shard: &str, index: &str) {
        fs::rename(self.path(file), self.path(shard)).unwrap();
        let names = self.inspect_names(shard);
        let map: serde_json::Map<String, Value> = names.into_iter().map(|n| (n, shard.into())).collect();
        fs::write(self.path(index), serde_json::json!({ "weight_map": map }).to_string()).unwrap();
    }

    fn inspect_names(&self, shard: &str) -> Vec<String> {
        let checkpoint = medtune::weights::Checkpoint::open(&self.path(shard)).unwrap();
        checkpoint.names().map(str::to_string).collect()
    }
}

/// What, where, found or expected, and what to do.
fn complete(said: Said, parts: &[&str]) {
    said.code(2).blames(&[&["error", "help"], parts].concat());
}

fn weights(dir: &Path) -> String {
    let names = fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap());
    names.into_iter().find(|n| n.ends_with(".safetensors") || n.ends_with(".bin")).unwrap()
}

#[test]
fn every_family_can_be_made_up_inspected_run_and_exported() {
    for def in MODELS {
        let bench = Bench::new(def.name);
        let found = bench.inspect();
        assert_eq!((&found["family"], &found["preset"]), (&def.name.into(), &"tiny".into()));
        assert_eq!(found["family_of_weights"][0], def.name);
        assert!(found["fit"].as_object().unwrap().values().all(|v| v.as_array().unwrap().is_empty()), "{found:#}");
        let (ids, embeddings) = (found["vocabulary"][0].as_u64().unwrap(), found["vocabulary"][1].as_u64().unwrap());
        assert!(ids <= embeddings && ids > 200, "{ids} ids, {embeddings} embeddings");
        let train = found["memory_to_train"]["peak"].as_u64().unwrap();
        assert!(train > found["memory_to_answer"].as_u64().unwrap());
        let answer = bench.answer().code(0).json();
        let said = bench.run(&["models", "inspect", "c", "--load"]).code(0);
        assert!(said.out.contains("every tensor is used") && said.out.contains("resident"), "{}", said.out);
        bench.run(&["export", "c", "--out", "half", "--dtype", "bfloat16", "--quiet"]).code(0);
        bench.run(&["export", "half", "--out", "again", "--quiet"]).code(0);
        let again = bench.run(&["models", "inspect", "again", "--json"]).code(0).json();
        assert_eq!(again["dtypes"].as_object().unwrap().keys().collect::<Vec<_>>(), ["bf16"]);
        assert_eq!(again["parameters"], found["parameters"]);
        let other = tempfile::tempdir().unwrap();
        fs::rename(bench.path(""), other.path().join("c")).unwrap();
        fs::rename(bench.0.path().join("again"), bench.path("")).unwrap();
        assert_eq!(bench.answer().code(0).json()["tokens"], answer["tokens"]);
    }
}

#[test]
fn the_same_seed_gives_the_same_files_and_nothing_is_overwritten() {
    let bench = Bench::new("llava_med");
    let again = ["models", "synth", "llava_med/tiny", "d", "--quiet"];
    bench.run(&again).code(0);
    let read = |dir: &str| fs::read(bench.0.path().join(dir).join("model.safetensors")).unwrap();
    assert!(read("c") == read("d"));
    complete(bench.run(&again), &["there is a checkpoint already"]);
    bench.run(&["models", "synth", "llava_med/tiny", "e", "--quiet", "--seed", "7"]).code(0);
    assert!(read("c") != read("e"));
    complete(bench.run(&["models", "synth", "tiny", "f"]), &["two families", "llava_med/tiny", "qwen_vl/tiny"]);
    complete(bench.run(&["models", "synth", "gpt2", "f"]), &["unknown preset", "gpt2", "llava_med/v1.5-7b"]);
}

#[test]
fn a_truncated_file_is_named_with_both_sizes() {
    let bench = Bench::new("llava_med");
    let file = bench.path("model.safetensors");
    let whole = fs::read(&file).unwrap();
    fs::write(&file, &whole[..whole.len() - 5000]).unwrap();
    let (expected, found) = (whole.len().to_string(), (whole.len() - 5000).to_string());
    for said in [bench.answer(), bench.run(&["models", "inspect", "c"])] {
        complete(said, &["damaged", "model.safetensors", &expected, &found, "download"]);
    }
    let bench = Bench::new("qwen_vl");
    let file = bench.path("pytorch_model.bin");
    let whole = fs::read(&file).unwrap();
    fs::write(&file, &whole[..whole.len() - 5000]).unwrap();
    complete(bench.answer(), &["damaged", "pytorch_model.bin", "download"]);
}

#[test]
fn an_index_that_names_a_missing_file_says_which() {
    for (family, file, shard, index) in [
        ("internvl", "model.safetensors", "model-00001-of-00002.safetensors", "model.safetensors.index.json"),
        ("qwen_vl", "pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "pytorch_model.bin.index.json"),
    ] {
        let bench = Bench::new(family);
        bench.index(file, shard, index);
        bench.answer().code(0);
        fs::remove_file(bench.path(shard)).unwrap();
        for said in [bench.answer(), bench.run(&["models", "inspect", "c"])] {
            complete(said, &["shard", "missing", shard, index, "download"]);
        }
    }
}

#[test]
fn a_pickle_that_asks_to_run_code_is_refused_and_not_run() {
    let bench = Bench::new("qwen_vl");
    let proof = bench.0.path().join("executed");
    let command = format!("touch {}", proof.display());
    let call =
        [b"cos\nsystem\nX".as_slice(), &(command.len() as u32).to_le_bytes(), command.as_bytes(), b"\x85R"].concat();
    fs::write(bench.path("pytorch_model.bin"), [b"\x80\x02".as_slice(), &call, b"."].concat()).unwrap();
    for said in [bench.answer(), bench.run(&["models", "inspect", "c"])] {
        complete(said, &["asks to run code", "pytorch_model.bin", "os.system", "publisher"]);
    }
    assert!(!proof.exists());
}

#[test]
fn the_family_is_that_of_config_and_weights_and_never_of_the_path() {
    let bench = Bench::new("llava_med");
    let config = fs::read_to_string(bench.path("config.json")).unwrap();
    let named = |name: &str| config.replace("\"llava_mistral\"", &format!("{name:?}"));
    fs::write(bench.path("config.json"), named("gpt_neox")).unwrap();
    complete(bench.answer(), &["unknown family", "config.json", "llava_mistral", "gpt_neox"]);
    let said = bench.run(&["models", "inspect", "c"]);
    complete(said, &["unknown family", "gpt_neox", "weights are named like those of llava_med"]);
    let other = Bench::new("internvl");
    fs::copy(other.path("config.json"), bench.path("config.json")).unwrap();
    let said = bench.run(&["models", "inspect", "c"]);
    complete(said, &["two families", "internvl", "llava_med"]);
}

#[test]
fn what_is_missing_is_reported_and_the_gate_closes() {
    let bench = Bench::new("llava_med");
    let config: Value = serde_json::from_str(&fs::read_to_string(bench.path("config.json")).unwrap()).unwrap();
    let mut deeper = config.clone();
    deeper["num_hidden_layers"] = (config["num_hidden_layers"].as_u64().unwrap() + 1).into();
    fs::write(bench.path("config.json"), deeper.to_string()).unwrap();
    let said = bench.run(&["models", "inspect", "c"]).code(1);
    assert!(said.out.contains("missing 9") && said.out.contains("model.layers.4.mlp.down_proj.weight"), "{}", said.out);
    said.blames(&["would not load"]);
    fs::write(bench.path("config.json"), config.to_string()).unwrap();
    fs::remove_file(bench.path("tokenizer.model")).unwrap();
    let said = bench.run(&["models", "inspect", "c"]).code(1);
    assert!(said.out.contains("no tokenizer"), "{}", said.out);
    assert_eq!(weights(&bench.path("")), "model.safetensors");
}

#[test]
fn a_tokenizer_with_more_ids_than_embeddings_is_refused() {
    let bench = Bench::new("llava_med");
    let mut config: Value = serde_json::from_str(&fs::read_to_string(bench.path("config.json")).unwrap()).unwrap();
    config["vocab_size"] = 700.into();
    fs::write(bench.path("config.json"), config.to_string()).unwrap();
    complete(bench.answer(), &["tokenizer", "700", "1536"]);
}
