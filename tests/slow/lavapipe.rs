//! The GPU path on a machine without a GPU: the phantom recipe, small, on the software driver and on the CPU.

use std::path::Path;

use serde_json::Value;

use crate::cli::medtune;

const PLAN: [&str; 14] = [
    "--set",
    "data.images=60",
    "--set",
    "train.max_steps=12",
    "--set",
    "train.per_device_train_batch_size=8",
    "--set",
    "train.logging_steps=1",
    "--set",
    "train.eval_steps=0",
    "--set",
    "generate.max_new_tokens=24",
    "--set",
    "eval.rows=24",
];

/// Metrics by key, for the base and the tuned model.
type Values = Vec<(String, [Option<f64>; 2])>;

/// Losses of the log, and base and tuned value of every metric.
fn run(dir: &Path, device: &str) -> (Vec<f64>, Values) {
    let args = [&["run", "phantom", "--out", device, "--device", device, "--quiet"][..], &PLAN].concat();
    medtune(dir, &args).code(0);
    let out = dir.join(device);
    let lines = std::fs::read_to_string(out.join("log.jsonl")).unwrap();
    let losses = lines.lines().filter_map(|l| serde_json::from_str::<Value>(l).unwrap()["loss"].as_f64()).collect();
    let report: Value = serde_json::from_slice(&std::fs::read(out.join("report.json")).unwrap()).unwrap();
    let values = |m: &Value| ["base", "tuned"].map(|side| m[side]["value"].as_f64());
    let metrics = report["metrics"].as_array().unwrap().iter();
    (losses, metrics.map(|m| (m["key"].as_str().unwrap().to_string(), values(m))).collect())
}

/// Losses agree closely. Answers are greedy, so a near-tie of two tokens may turn a few of them; a mean over the rows
/// moves little.
#[test]
fn a_run_on_a_software_gpu_ends_with_the_table_of_the_cpu() {
    let dir = tempfile::tempdir().unwrap();
    let (cpu, wgpu) = (run(dir.path(), "cpu"), run(dir.path(), "wgpu"));
    assert!(!cpu.0.is_empty() && cpu.0.len() == wgpu.0.len());
    for (a, b) in cpu.0.iter().zip(&wgpu.0) {
        assert!((a - b).abs() <= 2e-3 * a.abs(), "{:?} {:?}", cpu.0, wgpu.0);
    }
    assert!(cpu.1.iter().any(|(_, values)| values[1].is_some()), "{:?}", cpu.1);
    for ((key, a), (other, b)) in cpu.1.iter().zip(&wgpu.1) {
        assert_eq!(key, other);
        for (a, b) in a.iter().zip(b) {
            let near = match (a, b) {
                (Some(a), Some(b)) => (a - b).abs() <= 0.1 * a.abs().max(1.0),
                (a, b) => a == b,
            };
            assert!(near, "{key}: {a:?} on the CPU, {b:?} on the GPU");
        }
    }
}
