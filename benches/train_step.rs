//! One LoRA step and cached generation of a small decoder, for comparison with PyTorch and peft on the same model.
//!
//! ```sh
//! cargo bench --bench train_step                        # one line of JSON
//! python benches/peers/train_step_pairs.py --pairs 5    # in turns with PyTorch, ratios with their range
//! ```
//!
//! `--export DIR` writes base model and fresh adapter for the peer; `--model DIR` starts from that base; `--steps N`
//! sets the steps after the first, `--generate N` the batches that are answered; `--threads N` the cores.

#![expect(clippy::print_stdout, reason = "a benchmark says what it measured")]

mod common;

use std::{path::Path, time::Instant};

use burn::tensor::{Device, FloatDType};
use common::{ANSWERS, LENGTH, NEW_TOKENS, PROMPT, ROWS};
use medtune::{
    adapter::peft,
    device::DeviceSpec,
    generate::{GenerateConfig, generate},
    models::{AnyVlm, LoadOptions, MODELS},
    train::trainer::Session,
    vlm::Vlm,
    weights::SaveOptions,
};
use serde_json::{Value, json};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let option = |name: &str| {
        let at = arguments.iter().position(|a| a == name)?;
        Some(arguments.get(at + 1).unwrap_or_else(|| panic!("{name} needs a value")).as_str())
    };
    let number = |name: &str, default: usize| {
        option(name).map_or(default, |value| value.parse().unwrap_or_else(|_| panic!("{name} needs a number")))
    };
    let quick = arguments.iter().any(|a| a == "--quick");
    rayon::ThreadPoolBuilder::new().num_threads(number("--threads", 2)).build_global().expect("no pool exists yet");
    let device = DeviceSpec::from_env().and_then(|spec| spec.open()).unwrap_or_else(|error| panic!("{error}"));
    let base = match option("--model") {
        Some(dir) => load(Path::new(dir), &device),
        None => common::model(&device),
    };
    if let Some(dir) = option("--export") {
        return export(base, Path::new(dir));
    }
    let (steps, batches) = (number("--steps", if quick { 2 } else { 8 }), number("--generate", 1));
    println!("{}", common::with_session(base, |session| measure(session, &device, steps, batches)));
}

/// The first file of the registry that can read it; the bench model is a LLaVA-Med without images.
fn load(dir: &Path, device: &Device) -> AnyVlm {
    let options = LoadOptions { dtype: Some(FloatDType::F32), ..LoadOptions::default() };
    let family = MODELS.iter().find(|family| family.name == "llava_med").expect("a family of this program");
    (family.load)(dir, &options, device).expect("a model that --export wrote")
}

/// Writes `DIR/base` and `DIR/adapter`.
fn export(base: AnyVlm, dir: &Path) {
    base.save(&dir.join("base"), &SaveOptions::default()).expect("a writable directory");
    common::with_session(base, |session| {
        let adapter = common::adapter_config();
        let info = peft::AdapterInfo { config: &adapter, base: "base", signature: &Value::Null, notes: &[] };
        let towers = session.model.towers();
        peft::save(&session.model, &session.trained, towers, &info, &dir.join("adapter"))
            .expect("a writable directory");
    });
}

/// Trains `steps` steps after a first one, then answers `batches` batches with the trained adapter.
fn measure(session: &mut Session<'_, AnyVlm>, device: &Device, steps: usize, batches: usize) -> Value {
    let (mut times, mut losses) = (Vec::new(), Vec::new());
    for index in 0..=steps {
        let rows = common::step_rows(index);
        let started = Instant::now();
        let report = session.step(&rows, 1.0).expect("a finite loss");
        times.push(started.elapsed().as_secs_f64() * 1e3);
        session.state.step += 1;
        losses.push(report.loss);
    }
    let training_peak = peak_memory();
    let first = times.remove(0);
    let median = median(&times);
    let answered: Vec<f64> = (0..batches).map(|_| answer(&session.model, device)).collect();
    let tokens = (ROWS * LENGTH) as f64;
    json!({
        "program": "medtune",
        "tokens_per_second": tokens / median * 1e3,
        "step_ms": median,
        "step_ms_all": times,
        "first_step_ms": first,
        "peak_memory_bytes": training_peak,
        "loss_first": losses[0],
        "loss_last": losses[losses.len() - 1],
        "generated_tokens_per_second": (!answered.is_empty()).then(|| self::median(&answered)),
    })
}

/// Tokens a second of answering one batch, prompts included.
fn answer(model: &AnyVlm, device: &Device) -> f64 {
    let config = GenerateConfig { max_new_tokens: NEW_TOKENS, batch_size: ANSWERS, ..GenerateConfig::default() };
    let prompts = common::rows(ANSWERS, PROMPT, 0);
    let started = Instant::now();
    let answers = generate(model, &prompts, 0, &[], &config, 1, device, &mut |_, _| {}).expect("finite logits");
    answers.iter().map(Vec::len).sum::<usize>() as f64 / started.elapsed().as_secs_f64()
}

fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let (low, high) = (sorted[(sorted.len() - 1) / 2], sorted[sorted.len() / 2]);
    f64::midpoint(low, high)
}

/// Peak resident memory of this process, bytes; 0 where the system does not tell.
fn peak_memory() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    line.and_then(|line| line.split_whitespace().next()?.parse::<u64>().ok()).unwrap_or_default() * 1024
}
