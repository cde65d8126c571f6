//! The small decoder that the step benchmarks train and question, and its peer in PyTorch loads: 8 layers of width 512,
//! 8 query and 4 key-value heads, SwiGLU of 1408, 8192 tokens, f32, rank 16 on all seven projections.
//!
//! Weights, adapter and tokens follow from names and indices, so both sides start from the same numbers.

use burn::tensor::Device;
use medtune::{
    adapter::AdapterConfig,
    device::DeviceSpec,
    loader::{Position, StepRows},
    models::{
        AnyVlm,
        llava_med::{LlavaMed, LlavaMedConfig},
    },
    nn::vit::ClipVisionConfig,
    progress::Progress,
    run_dir::RunDir,
    stage::Ctx,
    train::{
        SchedulerType, TowerMode, TrainConfig,
        trainer::{Job, Session},
    },
    vlm::{Batch, Encoded, PaddingSide},
    weights::init_random,
};

/// Rows of a training batch.
pub(crate) const ROWS: usize = 4;
/// Tokens of a training row.
pub(crate) const LENGTH: usize = 256;
/// Rows that are answered together.
pub(crate) const ANSWERS: usize = 8;
/// Tokens of a prompt.
pub(crate) const PROMPT: usize = 64;
/// Tokens of an answer.
pub(crate) const NEW_TOKENS: usize = 64;
const VOCAB: usize = 8192;

/// The shape; the vision tower is the smallest that there can be, since no row has an image.
pub(crate) fn config() -> LlavaMedConfig {
    LlavaMedConfig {
        vocab_size: VOCAB,
        hidden_size: 512,
        intermediate_size: 1408,
        num_hidden_layers: 8,
        num_attention_heads: 8,
        num_key_value_heads: Some(4),
        max_position_embeddings: 2048,
        sliding_window: None,
        vision_config: Some(ClipVisionConfig {
            hidden_size: 64,
            intermediate_size: 64,
            num_hidden_layers: 2,
            num_attention_heads: 1,
            image_size: 28,
            patch_size: 14,
            ..ClipVisionConfig::default()
        }),
        ..LlavaMedConfig::tiny()
    }
}

/// The base model with its weights.
pub(crate) fn model(device: &Device) -> AnyVlm {
    let model = LlavaMed::new(&config(), device).expect("the shape is complete");
    AnyVlm::LlavaMed(init_random(model, 1, 0.02))
}

/// Low-rank updates of the decoder alone, constant learning rate.
pub(crate) fn train_config() -> TrainConfig {
    TrainConfig {
        vision: TowerMode::Frozen,
        projector: TowerMode::Frozen,
        language: TowerMode::Lora,
        learning_rate: 1e-3,
        lr_scheduler_type: SchedulerType::Constant,
        ..TrainConfig::default()
    }
}

/// Rank 16.
pub(crate) fn adapter_config() -> AdapterConfig {
    let names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"];
    AdapterConfig {
        r: 16,
        lora_alpha: 32.0,
        target_modules: names.iter().map(|name| format!("language:{name}")).collect(),
        ..AdapterConfig::default()
    }
}

/// Token `index` of a stream without end.
fn token(index: usize) -> i32 {
    ((index as u32).wrapping_add(1).wrapping_mul(2_654_435_761) >> 16) as i32 % VOCAB as i32
}

/// `count` rows of `length` tokens, the first of which is token `from`; every position is supervised.
pub(crate) fn rows(count: usize, length: usize, from: usize) -> Vec<Encoded> {
    let row = |row: usize| {
        let ids: Vec<i32> = (0..length).map(|i| token(from + row * length + i)).collect();
        Encoded { id: row.to_string(), labels: ids.clone(), input_ids: ids, spans: Vec::new(), pixels: Vec::new() }
    };
    (0..count).map(row).collect()
}

/// The rows of training step `index`; there are four batches, so that the loss falls.
pub(crate) fn step_rows(index: usize) -> StepRows {
    let rows = rows(ROWS, LENGTH, index % 4 * ROWS * LENGTH);
    let batch = Batch::collate(&rows, 0, PaddingSide::Right, 1);
    StepRows { micro_batches: vec![batch], next: Position::default() }
}

/// A training in progress on `base`, which is without autodiff.
pub(crate) fn with_session<T>(base: AnyVlm, then: impl FnOnce(&mut Session<'_, AnyVlm>) -> T) -> T {
    let (config, adapter) = (train_config(), adapter_config());
    let temporary = tempfile::tempdir().expect("a temporary directory");
    let dir = RunDir::open(temporary.path()).expect("an empty directory");
    let spec = DeviceSpec::from_env().expect("MEDTUNE_DEVICE names a device");
    let ctx = Ctx::new(spec, Progress::Silent).expect("the device that the model is on");
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
    then(&mut Session::new(&job, base).expect("the targets are there"))
}
