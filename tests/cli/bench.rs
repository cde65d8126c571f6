//! `medtune bench`, and the memory that `medtune plan` predicts against what a process takes.

use serde_json::Value;

use super::medtune;

fn bench(args: &[&str]) -> Value {
    let dir = tempfile::tempdir().unwrap();
    let args = [&["bench"], args, &["--json", "--quiet", "--warmup", "1", "--steps", "2"]].concat();
    medtune(dir.path(), &args).code(0).json()
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

#[cfg(target_os = "linux")]
#[test]
fn the_memory_of_a_small_training_is_predicted_within_a_tenth() {
    let found = bench(&["--preset", "llava_med/tiny"]);
    let ratio = number(&found, "predicted_memory_bytes") / number(&found, "peak_memory_bytes");
    assert!((ratio - 1.0).abs() <= 0.1, "{ratio:.3} of the measured peak was predicted: {found}");
}
