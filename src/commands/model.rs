//! Answers to one question.

use std::path::Path;

use serde_json::{Map, json};

use super::{context, emit};
use crate::{
    adapter::peft::{self, AdapterRef},
    cli::{CheckpointArgs, GenerateArgs, Global},
    error::Result,
    generate::{GenerateConfig, generate},
    models::{self, AnyVlm, LoadOptions},
    sample::{ImageRef, Origin, Role, Sample, Split, Turn},
    stage::Ctx,
    vlm::Processor,
    weights::Dtype,
};

/// Mark of an image in a user's words.
const MARK: &str = "<image>";

pub(super) fn load(args: &CheckpointArgs, adapters: &[AdapterRef], ctx: &Ctx) -> Result<(AnyVlm, Box<dyn Processor>)> {
    let options = load_options(args.vision_tower.as_deref(), args.dtype, ctx);
    let (model, processor) = models::load(&args.model, &options, &ctx.device)?;
    let model = peft::load_onto(model, adapters, &processor.signature(), args.quantization)?;
    Ok((model, processor))
}

/// How a checkpoint that was named on the command line is loaded.
pub(super) fn load_options(vision_tower: Option<&Path>, dtype: Dtype, ctx: &Ctx) -> LoadOptions {
    LoadOptions {
        vision_tower: vision_tower.map(Path::to_path_buf),
        dtype: dtype.explicit(),
        progress: ctx.progress,
        ..LoadOptions::default()
    }
}

/// A question about images as a sample.
pub(super) fn question(images: &[impl AsRef<Path>], text: &str) -> Sample {
    let marks = if text.contains(MARK) { String::new() } else { format!("{MARK}\n").repeat(images.len()) };
    Sample {
        id: "question".into(),
        images: images.iter().map(|p| ImageRef { path: p.as_ref().to_path_buf() }).collect(),
        turns: vec![Turn { role: Role::User, text: format!("{marks}{text}") }],
        origin: Origin::default(),
        split: Split::Test,
        group: String::new(),
        polarity: None,
        category: None,
        answer_type: None,
        options: Vec::new(),
        annotation: None,
        meta: Map::new(),
    }
}

/// Answers one question.
pub(super) fn answer(global: &Global, args: &GenerateArgs) -> Result<()> {
    let config = GenerateConfig {
        max_new_tokens: args.max_new_tokens,
        temperature: args.temperature,
        num_beams: args.num_beams,
        ..GenerateConfig::default()
    };
    let ctx = context(global)?;
    let sample = question(&args.image, &args.question);
    let (model, processor) = load(&args.checkpoint, &args.adapter, &ctx)?;
    let prompt = processor.prompt(&sample)?;
    let (pad, stop) = (processor.pad_id(), processor.stop_ids());
    let ids = generate(&model, &[prompt], pad, stop, &config, args.seed, &ctx.device, &mut |_, _| {})?.concat();
    let stopped = ids.last().is_some_and(|id| stop.contains(id));
    let answer = processor.decode(&ids);
    emit(global, json!({ "answer": answer, "tokens": ids.len(), "complete": stopped }), || answer.clone())
}
