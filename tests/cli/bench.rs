//! `medtune bench`, and the memory that `medtune plan` predicts against what a process takes.

use serde_json::Value;

use super::{Said, command, medtune};

fn bench(args: &[&str]) -> Value {
    bench_with(None, args)
}

/// With freed memory handed back after `purge` milliseconds, or when the allocator sees fit.
fn bench_with(purge: Option<&str>, args: &[&str]) -> Value {
    let dir = tempfile::tempdir().unwrap();
    let args = [&["bench"], args, &["--json", "--quiet", "--warmup", "1", "--steps", "2"]].concat();
    let mut command = command(dir.path(), &args);
    command.env_remove("MIMALLOC_PURGE_DELAY").envs(purge.map(|delay| ("MIMALLOC_PURGE_DELAY", delay)));
    Said::of(command.output().unwrap()).code(0).json()
}

fn number(value: &Value, key: &str) -> f64 {
    value[key].as_f64().unwrap_or_else(|| panic!("{key} in {value}"))
}

#[test]
fn steps_are_timed_counted_and_learn() {
    let found = bench(&["--preset", "llava_med/tiny", "--rows", "2", "--set", "train.learning_rate=1e-2"]);
    assert_eq!(found["step_ms_all"].as_array().unwrap().len(), 2);
    assert!(number(&found, "loss_last") < number(&found, "loss_first"), "{found}");
    let tokens = number(&found, "rows") * number(&found, "length");
    let seconds = number(&found, "step_ms") / 1e3;
    assert!((number(&found, "tokens_per_second") * seconds / tokens - 1.0).abs() < 1e-6, "{found}");
    let share = number(&found, "flops_per_step") / seconds / number(&found, "peak_flops");
    assert!((number(&found, "model_flop_utilisation") / share - 1.0).abs() < 1e-6 && share > 0.0, "{found}");
    let dir = tempfile::tempdir().unwrap();
    let said = medtune(dir.path(), &["bench", "--preset", "v1.5-7b"]).code(2);
    said.blames(&["too large", "models synth", "--model"]);
    let said = medtune(dir.path(), &["bench", "--preset", "llava_med/tiny", "--length", "3", "--quiet"]).code(2);
    said.blames(&["--length 3", "at least"]);
}

/// How much freed memory the allocator keeps is decided by time, so the prediction has to lie between what lives and what
/// is kept at most, each with a tenth of room.
#[cfg(target_os = "linux")]
#[test]
fn the_memory_of_a_small_training_is_predicted_between_what_lives_and_what_is_kept() {
    let shapes: [(&str, &[&str]); 3] = [
        ("none", &[]),
        ("int8", &["--rows", "16", "--length", "384", "--set", "train.recompute=always"]),
        ("nf4_double", &["--rows", "16", "--length", "384", "--set", "train.recompute=always"]),
    ];
    for (kind, shape) in shapes {
        let set = format!("model.quantization={kind}");
        let held = ["--preset", "llava_med/tiny", "--set", "model.dtype=bfloat16", "--set", &set];
        let run = |purge: Option<&str>| {
            let found = bench_with(purge, &[&held[..], shape].concat());
            assert_eq!(found["quantization"], kind);
            (number(&found, "predicted_memory_bytes"), number(&found, "peak_memory_bytes"))
        };
        let ((predicted, kept), (same, lives)) = (run(None), run(Some("0")));
        assert_eq!(predicted, same);
        let between = 0.9 * lives <= predicted && predicted <= 1.1 * kept.max(lives);
        assert!(between, "{kind}: {predicted} predicted, {lives} lives, {kept} kept");
    }
    let losses = |kind: &str| {
        let set = format!("model.quantization={kind}");
        bench(&["--preset", "llava_med/tiny", "--set", &set])["losses"].clone()
    };
    assert_ne!(losses("nf4"), losses("none"), "the benchmark packs as the training does");
}
