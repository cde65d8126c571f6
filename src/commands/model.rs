//! Verbs that work on a checkpoint: generation and merging.

use std::path::Path;

use serde_json::{Map, json};

use super::{context, emit};
use crate::{
    adapter::{merge, peft},
    cli::{CheckpointArgs, GenerateArgs, Global, MergeArgs},
    error::{Error, Kind, Result},
    generate::{GenerateConfig, generate},
    models::{self, AnyVlm, LoadOptions},
    sample::{ImageRef, Origin, Role, Sample, Split, Turn},
    stage::{Ctx, train::copy_processor_files},
    vlm::{Batch, Encoded, PaddingSide, Processor},
    weights::SaveOptions,
};

/// Mark of an image in a user's words.
const MARK: &str = "<image>";

fn load(args: &CheckpointArgs, adapter: Option<&Path>, ctx: &Ctx) -> Result<(AnyVlm, Box<dyn Processor>)> {
    let options = LoadOptions {
        vision_tower: args.vision_tower.clone(),
        dtype: args.dtype.explicit(),
        progress: ctx.progress,
        ..LoadOptions::default()
    };
    let (model, processor) = models::load(&args.model, &options, &ctx.device)?;
    let model = match adapter {
        Some(dir) => peft::load(model, dir, &processor.signature())?,
        None => model,
    };
    Ok((model, processor))
}

/// A question about images as a sample.
fn question(images: &[impl AsRef<Path>], text: &str) -> Sample {
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
    let (model, processor) = load(&args.checkpoint, args.adapter.as_deref(), &ctx)?;
    let prompt = processor.prompt(&sample)?;
    let (pad, stop) = (processor.pad_id(), processor.stop_ids());
    let ids = generate(&model, &[prompt], pad, stop, &config, args.seed, &ctx.device, &mut |_, _| {})?.concat();
    let stopped = ids.last().is_some_and(|id| stop.contains(id));
    let answer = processor.decode(&ids);
    emit(global, json!({ "answer": answer, "tokens": ids.len(), "complete": stopped }), || answer.clone())
}

/// Folds an adapter into its model.
pub(super) fn fold(global: &Global, args: &MergeArgs) -> Result<()> {
    if args.out.join("config.json").exists() {
        return Err(Error::new(Kind::Run, "there is a checkpoint already")
            .at(args.out.display())
            .help("remove it, or choose another directory with `--out DIR`"));
    }
    let ctx = context(global)?;
    let (model, processor) = load(&args.checkpoint, Some(&args.adapter), &ctx)?;
    let merged = merge::merge(model, &[probe(processor.as_ref())?], &ctx.device)?;
    ctx.check()?;
    let tower = args.checkpoint.vision_tower.as_deref();
    merged.save(&args.out, &SaveOptions::default())?;
    copy_processor_files(&args.checkpoint.model, tower, &args.out)?;
    emit(global, json!({ "out": args.out }), || format!("merged checkpoint in {}", args.out.display()))
}

/// Rows on which the merged model must agree with the adapted one: with an image and without.
fn probe(processor: &dyn Processor) -> Result<Batch> {
    let dir = tempfile::tempdir().map_err(|e| Error::io(std::env::temp_dir(), e))?;
    let path = dir.path().join("probe.png");
    let ramp = image::RgbImage::from_fn(96, 64, |x, y| image::Rgb([(2 * x) as u8, (3 * y) as u8, (x + y) as u8]));
    ramp.save(&path).map_err(|e| Error::new(Kind::Image, "cannot write the probe image").source(e))?;
    let rows = [
        question(&[&path], "Describe this image."),
        question(&[&path], "Is there a nodule in the left lung?"),
        question(&[] as &[&Path], "What is pneumonia?"),
    ];
    let rows: Vec<Encoded> = rows.iter().map(|row| processor.prompt(row)).collect::<Result<_>>()?;
    Ok(Batch::collate(&rows, processor.pad_id(), PaddingSide::Right, 1))
}
