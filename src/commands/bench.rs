//! Speed and memory of training steps.

use super::{bytes, columns, context, count, emit, run, synth};
use crate::{
    adapter::Quantization,
    bench::{self, Report, Settings},
    cli::{BenchArgs, Global, Overrides, RecipeArgs, SynthArgs},
    error::{Error, Kind, Result},
    models::{self, ModelDef, Preset, tower_sizes},
    plan::Plan,
    run_dir::RunDir,
    stage::{Ctx, encode::base_dir},
    weights::Dtype,
};

/// Parameters up to which a checkpoint is made up on the way.
const SMALL: usize = 1_000_000_000;

/// Measures.
pub(super) fn bench(global: &Global, args: &BenchArgs) -> Result<()> {
    let plan = plan(global, args)?;
    let ctx = context(global)?;
    let scratch = tempfile::tempdir().map_err(|e| Error::io(std::env::temp_dir(), e))?;
    let dir = RunDir::open(scratch.path())?;
    let base = match plan.model.checkpoint {
        Some(_) => base_dir(&plan, &dir)?,
        None => made_up(models::find(&plan.model.name)?, plan.model.preset()?, &dir, &ctx)?,
    };
    let settings = Settings {
        rows: plan.train.per_device_train_batch_size,
        length: args.length,
        micro_batches: args.micro_batches as usize,
        warmup: args.warmup as usize,
        steps: args.steps as usize,
    };
    let report = bench::run(&plan, &base, settings, &dir, &ctx)?;
    emit(global, &report, || text(&report))
}

/// The plan that is measured.
fn plan(global: &Global, args: &BenchArgs) -> Result<Plan> {
    let mut overrides = Vec::new();
    let recipe = match (&args.recipe, &args.preset) {
        (_, Some(name)) => {
            let (def, preset) = synth::find(name)?;
            overrides.extend([
                format!("model.name={}", def.name),
                format!("model.preset={}", preset.name),
                "model.checkpoint=".into(),
                "adapter.r=16".into(),
                "adapter.lora_alpha=32".into(),
                "adapter.target_modules=[\"language:all-linear\"]".into(),
                "train.vision=frozen".into(),
                "train.projector=frozen".into(),
                "train.language=lora".into(),
                "train.per_device_train_batch_size=1".into(),
            ]);
            "phantom"
        }
        (Some(recipe), None) => recipe.as_str(),
        (None, None) => unreachable!("the command line asks for one of them"),
    };
    overrides.extend(args.model.iter().map(|dir| format!("model.checkpoint={}", dir.display())));
    overrides.extend(args.rows.iter().map(|n| format!("train.per_device_train_batch_size={n}")));
    overrides.extend(args.set.iter().cloned());
    let args = RecipeArgs {
        recipe: recipe.into(),
        out: None,
        changes: Overrides { set: overrides, ..Overrides::default() },
        fit: args.fit.clone(),
    };
    Ok(run::resolve_to_measure(global, &args)?.plan)
}

/// A random checkpoint of a preset without one, if it is small.
fn made_up(def: &ModelDef, preset: &Preset, dir: &RunDir, ctx: &Ctx) -> Result<std::path::PathBuf> {
    let (model, _) = (def.empty)(preset.name, &ctx.device)?;
    let parameters: usize = tower_sizes(&model).iter().map(|(_, n)| n).sum();
    let name = format!("{}/{}", def.name, preset.name);
    if parameters > SMALL {
        return Err(Error::new(Kind::Config, "this preset is too large to be made up on the way")
            .at(&name)
            .found(format!("{} parameters", count(parameters)))
            .help(format!("`medtune models synth {name} DIR` once, then --model DIR")));
    }
    let args = SynthArgs { preset: name, dir: dir.path("base"), seed: 42, dtype: Dtype::Auto, tokenizer: None };
    synth::write(def, preset, &args, ctx)?;
    Ok(args.dir)
}

fn text(r: &Report) -> String {
    let memory = |n: Option<u64>| n.map_or("unknown".into(), bytes);
    let spread = |all: &[f64]| {
        let (least, most) = all.iter().fold((f64::INFINITY, 0f64), |(a, b), x| (a.min(*x), b.max(*x)));
        format!("{:.0} to {:.0}", least, most)
    };
    let busy = r.load_average.map_or(String::new(), |x| format!(", load average {x:.1}"));
    let packed = match r.quantization {
        Quantization::None => String::new(),
        kind => format!(", linear modules of the language model in {kind}"),
    };
    let rows = [
        ("model", format!("{} parameters in {}{packed}, {}", count(r.parameters), r.dtype, r.checkpoint.display())),
        ("device", format!("{}{busy}", r.device)),
        ("trained", count(r.trainable_parameters)),
        (
            "step",
            format!(
                "{} x {} rows of {} positions, {} supervised, {} image tiles",
                r.micro_batches, r.rows, r.length, r.supervised, r.tiles
            ),
        ),
        ("loading", format!("{:.0} ms", r.load_ms)),
        ("first step", format!("{:.0} ms", r.first_step_ms)),
        ("steps", format!("median {:.0} ms of {} ({})", r.step_ms, r.step_ms_all.len(), spread(&r.step_ms_all))),
        ("tokens a second", format!("{:.1}", r.tokens_per_second)),
        ("operations a step", format!("{:.3} TFLOP: {}", r.flops_per_step / 1e12, r.flops_convention)),
        (
            "of the peak",
            format!(
                "{:.1} % of {:.1} GFLOP/s ({})",
                100.0 * r.model_flop_utilisation,
                r.peak_flops / 1e9,
                r.peak_flops_of
            ),
        ),
        (
            "memory",
            format!(
                "at most {} ({} predicted), of it {} not in mapped files; {} when loaded",
                memory(r.peak_memory_bytes),
                bytes(r.predicted_memory_bytes),
                memory(r.peak_anonymous_bytes),
                memory(r.loaded_memory_bytes)
            ),
        ),
        ("loss", format!("{:.4} in the first step, {:.4} in the last", r.loss_first, r.loss_last)),
    ];
    columns(&rows.map(|(name, value)| vec![name.to_string(), value]))
}
