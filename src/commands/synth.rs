//! Random checkpoints in the files of a release.

use serde_json::json;

use super::{bytes, columns, context, count, emit};
use crate::{
    cli::{Global, SynthArgs},
    device::DeviceSpec,
    error::{Error, Kind, Result},
    models::{self, LoadOptions, MODELS, ModelDef, Preset, TokenizerFiles},
    run_dir::{write_atomic, write_files},
    stage::{Ctx, train::copy_processor_files},
    weights::{Dtype, Synth, Synthesised, torch_dtype},
};

/// What a made-up tokenizer learns its first pieces from.
const TEXTS: [&str; 6] = [
    "Describe this image. What does this image show? Is there a nodule in the left lung?",
    "The chest radiograph shows no focal consolidation, no pleural effusion and no pneumothorax.",
    "There is a nodule in the upper lobe of the right lung. The heart is of normal size.",
    "The image shows an axial slice of the abdomen. The liver and the spleen are normal.",
    "There is no fracture. There is no evidence of disease in this image of the left hand.",
    "The premise of the question is wrong: the image does not show a mass in the left kidney.",
];

/// Standard deviation of random weights in all families.
const STD: f64 = 0.02;

/// The preset called `name`, alone or behind its family.
pub(super) fn find(name: &str) -> Result<(&'static ModelDef, &'static Preset)> {
    let all = MODELS.iter().flat_map(|def| def.presets.iter().map(move |p| (*def, p)));
    let long = |(def, preset): &(&ModelDef, &Preset)| format!("{}/{}", def.name, preset.name);
    let found: Vec<_> = all.clone().filter(|x| x.1.name == name || long(x) == name).collect();
    match found[..] {
        [one] => Ok(one),
        _ => Err(Error::new(Kind::Config, if found.is_empty() { "unknown preset" } else { "two families have it" })
            .expected(all.map(|x| long(&x)).collect::<Vec<_>>().join(", "))
            .found(name)
            .help("`medtune models` lists the presets")),
    }
}

/// Writes the checkpoint; config.json comes last, so that a directory with one is complete.
pub(super) fn synth(global: &Global, args: &SynthArgs) -> Result<()> {
    let (def, preset) = find(&args.preset)?;
    if args.dir.join("config.json").exists() {
        return Err(Error::new(Kind::Run, "there is a checkpoint already")
            .at(args.dir.display())
            .help("remove it, or choose another directory"));
    }
    let dtype = dtype(args.dtype, preset);
    let (done, tokenizer) = write(def, preset, args, &context(global)?)?;
    // what reads it must accept it
    let processor = models::processor(&args.dir, &LoadOptions::default())?;
    let value = json!({
        "dir": args.dir, "family": def.name, "preset": preset.name, "seed": args.seed, "dtype": torch_dtype(dtype),
        "files": done.files, "reused": done.reused, "bytes": done.bytes, "parameters": done.parameters,
        "tokenizer": tokenizer, "vocabulary": processor.vocab_size(),
    });
    emit(global, value, || {
        let kept = if done.reused > 0 { format!(", {} of them from before", done.reused) } else { String::new() };
        let rows = [
            ("family", format!("{}, {} ({})", def.name, preset.name, preset.about)),
            ("parameters", format!("{}, random, seed {}", count(done.parameters as usize), args.seed)),
            ("weights", format!("{} in {} files{kept}, {}", bytes(done.bytes), done.files.len(), torch_dtype(dtype))),
            ("tokenizer", format!("{tokenizer}, {} ids", processor.vocab_size())),
            ("written", args.dir.display().to_string()),
        ];
        columns(&rows.map(|(name, value)| vec![name.to_string(), value]))
    })
}

/// Writes all files of a random checkpoint; returns what was written and where its tokenizer is from.
pub(super) fn write(def: &ModelDef, preset: &Preset, args: &SynthArgs, ctx: &Ctx) -> Result<(Synthesised, String)> {
    let (model, _) = (def.empty)(preset.name, &DeviceSpec::Cpu.open()?)?;
    let dtype = dtype(args.dtype, preset);
    let job = Synth {
        seed: args.seed,
        std: STD,
        dtype,
        layout: def.release.layout,
        max_shard_bytes: def.release.max_shard_bytes,
    };
    let done = job.write(&model, &args.dir, ctx.progress, &|| ctx.check())?;
    let tokenizer = tokenizer(def, preset, args)?;
    write_atomic(&args.dir.join("README.md"), readme(def, preset, args, &tokenizer).as_bytes())?;
    write_files(&args.dir, &model.config_files(dtype)?)?;
    Ok((done, tokenizer))
}

/// Releases are in bf16, the tiny presets in f32.
fn dtype(wanted: Dtype, preset: &Preset) -> burn::tensor::FloatDType {
    let usual = if preset.name == "tiny" { Dtype::Float32 } else { Dtype::Bfloat16 };
    let dtype = wanted.explicit().or(usual.explicit());
    dtype.unwrap_or(burn::tensor::FloatDType::F32)
}

/// Puts tokenizer files beside the weights and says where they are from.
fn tokenizer(def: &ModelDef, preset: &Preset, args: &SynthArgs) -> Result<String> {
    if let Some(dir) = &args.tokenizer {
        copy_processor_files(dir, None, &args.dir)?;
        return Ok(format!("copied from {}", dir.display()));
    }
    let texts = TEXTS.map(String::from);
    let files: TokenizerFiles = (def.release.tokenizer)(preset.name, &texts)?;
    write_files(&args.dir, &files)?;
    Ok("made up: a few learnt pieces, filled up to the size of the embeddings".into())
}

fn readme(def: &ModelDef, preset: &Preset, args: &SynthArgs, tokenizer: &str) -> String {
    format!(
        "# Random weights\n\nA checkpoint in the files and shapes of {} ({} {}), made by `medtune models synth` with \
         seed {}. Its answers mean nothing; it serves to test loading, memory and speed.\n\nTokenizer: {tokenizer}.\n",
        preset.about, def.name, preset.name, args.seed
    )
}
