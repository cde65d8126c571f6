//! Generation, merging and damaged checkpoints, on the small LLaVA-Med of the fixture.

use std::{fs, path::Path};

use super::{Said, medtune};
use crate::parity::fixture::root;

fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let path = entry.unwrap().path();
        fs::copy(&path, to.join(path.file_name().unwrap())).unwrap();
    }
}

/// The fixture's checkpoint, tower and adapter, copied to be damaged.
struct Bench {
    dir: tempfile::TempDir,
    image: String,
}

impl Bench {
    fn new() -> Self {
        let (dir, fixture) = (tempfile::tempdir().unwrap(), root("llava_med"));
        for part in ["checkpoint", "vision_tower", "lora"] {
            copy(&fixture.join(part), &dir.path().join(part));
        }
        let mut images: Vec<_> = fs::read_dir(fixture.join("images")).unwrap().map(|e| e.unwrap().path()).collect();
        images.sort();
        Self { dir, image: images[0].display().to_string() }
    }

    fn generate(&self, more: &[&str]) -> Said {
        let args = ["generate", "--quiet", "--image", &self.image, "--question", "What is shown?"];
        let args = [&args[..], &["--vision-tower", "vision_tower", "--max-new-tokens", "12"], more].concat();
        medtune(self.dir.path(), &args)
    }

    fn file(&self, name: &str) -> std::path::PathBuf {
        self.dir.path().join("checkpoint").join(name)
    }

    /// Rewrites the tensors of the first shard or file that `edit` wants to change.
    fn edit_header(&self, edit: impl Fn(&mut serde_json::Map<String, serde_json::Value>) -> bool) {
        let mut files: Vec<_> =
            fs::read_dir(self.dir.path().join("checkpoint")).unwrap().map(|e| e.unwrap().path()).collect();
        files.retain(|p| p.extension().is_some_and(|e| e == "safetensors"));
        files.sort();
        for path in files {
            let bytes = fs::read(&path).unwrap();
            let length = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
            let mut header: serde_json::Map<_, _> = serde_json::from_slice(&bytes[8..8 + length]).unwrap();
            if edit(&mut header) {
                let header = serde_json::to_vec(&header).unwrap();
                let mut out = (header.len() as u64).to_le_bytes().to_vec();
                out.extend(header);
                out.extend(&bytes[8 + length..]);
                fs::write(&path, out).unwrap();
                return;
            }
        }
        panic!("no file has the tensor");
    }
}

#[test]
fn a_merged_checkpoint_answers_as_the_adapter_does() {
    let bench = Bench::new();
    let adapted = bench.generate(&["--model", "checkpoint", "--adapter", "lora", "--json"]).code(0).json();
    assert!(adapted["tokens"].as_u64().unwrap() > 0);
    let merge = ["merge", "--model", "checkpoint", "--vision-tower", "vision_tower", "--adapter", "lora"];
    medtune(bench.dir.path(), &[&merge[..], &["--out", "merged"]].concat()).code(0);
    let merged = bench.generate(&["--model", "merged", "--json"]).code(0).json();
    assert_eq!(adapted, merged);
    let again = medtune(bench.dir.path(), &[&merge[..], &["--out", "merged"]].concat()).code(2);
    again.blames(&["there is a checkpoint already at merged", "--out DIR"]);
}

#[test]
fn a_checkpoint_can_be_inspected() {
    let bench = Bench::new();
    let said = medtune(bench.dir.path(), &["models", "inspect", "checkpoint", "--json"]).code(0).json();
    assert_eq!(said["family"], "llava_med");
    assert!(!said["tensors"].as_array().unwrap().is_empty());
    medtune(bench.dir.path(), &["models", "inspect", "nowhere"]).code(2).blames(&["nowhere", "config.json"]);
}

#[test]
fn damaged_checkpoints_are_refused_by_name() {
    let bench = Bench::new();
    let norm = |name: &String| name.ends_with("input_layernorm.weight");
    bench.edit_header(|header| {
        let Some(name) = header.keys().find(|n| norm(n)).cloned() else { return false };
        let value = header.remove(&name).unwrap();
        header.insert(format!("{name}_of_something_else"), value);
        true
    });
    let index = bench.file("model.safetensors.index.json");
    if index.exists() {
        bench.generate(&["--model", "checkpoint"]).code(2).blames(&["input_layernorm.weight"]);
        // Without the index the shards are no checkpoint; a matching index leaves one missing and one extra tensor.
        let text = fs::read_to_string(&index).unwrap();
        let changed = fs::read_to_string(&index)
            .unwrap()
            .lines()
            .find(|l| l.contains("input_layernorm.weight"))
            .map(|l| text.replacen(l, &l.replace("layernorm.weight", "layernorm.weight_of_something_else"), 1));
        fs::write(&index, changed.unwrap()).unwrap();
    }
    bench.generate(&["--model", "checkpoint"]).code(2).blames(&[
        "error: ",
        "input_layernorm.weight",
        "input_layernorm.weight_of_something_else",
    ]);
}

#[test]
fn a_tensor_of_another_shape_is_refused_by_name() {
    let bench = Bench::new();
    bench.edit_header(|header| {
        let Some(tensor) = header.get_mut("model.norm.weight") else { return false };
        let n = tensor["shape"][0].as_u64().unwrap();
        tensor["shape"] = serde_json::json!([n / 2, 2]);
        true
    });
    bench.generate(&["--model", "checkpoint"]).code(2).blames(&["model.norm.weight", "expected", "found"]);
}

#[test]
fn a_corrupt_header_is_refused_with_its_file() {
    let bench = Bench::new();
    let mut files: Vec<_> =
        fs::read_dir(bench.dir.path().join("checkpoint")).unwrap().map(|e| e.unwrap().path()).collect();
    files.retain(|p| p.extension().is_some_and(|e| e == "safetensors"));
    files.sort();
    let whole = fs::read(&files[0]).unwrap();
    let name = files[0].file_name().unwrap().to_str().unwrap().to_string();
    let mut huge = whole.clone();
    huge[..8].copy_from_slice(&u64::MAX.to_le_bytes());
    let mut garbled = whole.clone();
    garbled[20..40].fill(b'#');
    for bytes in [huge, garbled, whole[..whole.len() / 2].to_vec(), Vec::new()] {
        fs::write(&files[0], bytes).unwrap();
        bench.generate(&["--model", "checkpoint"]).code(2).blames(&[&name]);
    }
    fs::write(&files[0], whole).unwrap();
    bench.generate(&["--model", "checkpoint"]).code(0);
}

#[test]
fn a_question_with_a_wrong_number_of_images_is_refused() {
    let bench = Bench::new();
    let ask = |question: &str| {
        let args = ["generate", "--model", "checkpoint", "--vision-tower", "vision_tower", "--image", &bench.image];
        medtune(bench.dir.path(), &[&args[..], &["--question", question]].concat())
    };
    ask("<image> and <image>?").code(2).blames(&["<image>", "expected", "found"]);
    let missing = ["generate", "--model", "checkpoint", "--vision-tower", "vision_tower", "--image", "gone.png"];
    let said = medtune(bench.dir.path(), &[&missing[..], &["--question", "What?"]].concat());
    said.code(2).blames(&["gone.png"]);
}

#[test]
fn either_kind_of_kernels_answers_the_same() {
    let bench = Bench::new();
    let answer = |kernels: &str| bench.generate(&["--model", "checkpoint", "--kernels", kernels]);
    let fused = answer("fused").code(0).out;
    assert!(!fused.trim().is_empty());
    assert_eq!(answer("composed").code(0).out, fused);
    answer("none").code(2).blames(&["--kernels", "fused", "composed"]);
}
