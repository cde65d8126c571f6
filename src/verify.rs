//! Does this device compute this model right? Logits, loss, gradients and ten optimizer steps on a device, beside the
//! same on the CPU.
//!
//! Both start from the same numbers: an adapter whose second factors are not zero, so that every trained tensor has a
//! gradient, and rows with and without an image, padded to one length.

use rand::RngExt;
use serde::Serialize;

use burn::tensor::{Tensor, TensorData};

use crate::{
    adapter::AdapterConfig,
    device::tolerance::Tolerance,
    error::{Error, Kind, Result},
    loader::{Position, StepRows},
    models::AnyVlm,
    nn::cast,
    random,
    run_dir::RunDir,
    stage::Ctx,
    train::{
        Recompute, SchedulerType, TrainConfig,
        loss::Targets,
        params::{self, GradientSum, Trained},
        step::{self, Vision},
        trainer::{Job, Session},
    },
    vlm::{Batch, Vlm},
};

/// Optimizer steps that are compared.
pub const STEPS: usize = 10;

/// Seed of the adapter.
const SEED: u64 = 11;

/// Names of what is compared, in order.
pub const PARTS: [&str; 4] = ["logits", "loss", "gradient", "10 steps"];

/// What a device has computed.
#[derive(Debug, Clone)]
pub struct Measured {
    /// Logits of the supervised positions, row-major.
    logits: Vec<f32>,
    /// Ids of the vocabulary.
    width: usize,
    /// Mean negative log-likelihood, in nats.
    loss: f64,
    /// Gradient of every trained tensor by its name.
    gradients: Vec<(String, Vec<f32>)>,
    /// Loss of each optimizer step.
    curve: Vec<f64>,
}

/// One compared part.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Line {
    /// One of [`PARTS`].
    pub part: &'static str,
    /// Largest relative difference; infinite where something is no number.
    pub difference: f64,
    /// What it may be.
    pub limit: f64,
    /// Whether it is within the limit.
    pub right: bool,
    /// Where it is largest, or what else there is to say.
    pub detail: String,
}

/// Computes everything with `model`, which lives on the device of `ctx` and is without autodiff. `dir` is scratch space.
///
/// # Errors
/// A batch that does not fit the model, or a loss that is not finite.
pub fn measure(model: AnyVlm, batch: &Batch, ctx: &Ctx, dir: &RunDir) -> Result<Measured> {
    let config = TrainConfig {
        learning_rate: 1e-3,
        lr_scheduler_type: SchedulerType::Constant,
        recompute: Recompute::Always,
        max_steps: STEPS,
        ..TrainConfig::default()
    };
    let adapter = AdapterConfig::default();
    let job = Job {
        config: &config,
        adapter: &adapter,
        seed: SEED,
        dir,
        ctx,
        fingerprint: String::new(),
        log: Default::default(),
        pages: None,
    };
    let mut session = Session::new(&job, model)?;
    session.model = params::update(session.model, |i, value| stirred(&session.trained[i], i, value));

    let (logits, width) = logits(&session.model, batch, ctx)?;
    let mut sums = GradientSum::new(&session.model);
    let loss = session.accumulate(std::slice::from_ref(batch), &mut sums)?.loss;
    let gradients = session.trained.iter().zip(sums.sums);
    let gradients =
        gradients.map(|(t, g)| Ok((t.name.clone(), g.map_or(Ok(Vec::new()), host)?))).collect::<Result<_>>()?;
    let mut curve = Vec::new();
    for _ in 0..STEPS {
        let rows = StepRows { micro_batches: vec![batch.clone()], next: Position::default() };
        curve.push(session.step(&rows, 1.0)?.loss);
        session.state.step += 1;
    }
    Ok(Measured { logits, width, loss, gradients, curve })
}

/// Second factors of updates are zero at first, and with them the gradients of the first factors.
fn stirred(trained: &Trained, index: usize, value: Tensor<1>) -> Tensor<1> {
    if !trained.name.ends_with(".lora_B.weight") {
        return value;
    }
    let mut draws = random::stream(SEED, "verify", index as u64);
    let values: Vec<f32> = (0..trained.len()).map(|_| draws.random_range(-0.02f32..0.02)).collect();
    Tensor::from_data(TensorData::new(values, [trained.len()]), (&value.device(), value.dtype()))
}

/// Logits of the supervised positions, and the size of the vocabulary.
fn logits(model: &AnyVlm, batch: &Batch, ctx: &Ctx) -> Result<(Vec<f32>, usize)> {
    use burn::module::Module;
    let (plain, device) = (model.valid(), &ctx.device);
    let batch = plain.reconcile(batch)?;
    let vision = batch.pixels(device).map_or(Vision::None, |pixels| Vision::Features(plain.vision(pixels)));
    let context = plain.context(&batch, device);
    let embedded = step::inputs(&plain, &batch, &vision, device);
    let x = (0..plain.num_layers()).fold(embedded, |x, i| plain.layer(i, x, &context, None));
    let states = Targets::of(&batch).select(x, device);
    let normed: Tensor<3> = plain.final_norm(states.unsqueeze_dim(0));
    let logits = plain.logits(normed.squeeze_dim(0));
    let width = logits.dims()[1];
    Ok((host(logits)?, width))
}

fn host<const D: usize>(tensor: Tensor<D>) -> Result<Vec<f32>> {
    let unreadable = |e: String| Error::new(Kind::Device, "cannot read from the device").found(e);
    let data = cast(tensor, burn::tensor::DType::F32).try_into_data().map_err(|e| unreadable(e.to_string()))?;
    data.try_to_vec().map_err(|e| unreadable(format!("{e:?}")))
}

/// How far `found` is from `reference`.
#[must_use]
pub fn compare(reference: &Measured, found: &Measured, tolerance: &Tolerance) -> Vec<Line> {
    let line = |part, (difference, detail): (f64, String), limit| Line {
        part,
        difference,
        limit,
        right: difference <= limit,
        detail,
    };
    vec![
        line(PARTS[0], logits_off(reference, found), tolerance.logits),
        line(PARTS[1], loss_off(reference, found), tolerance.loss),
        line(PARTS[2], gradients_off(reference, found), tolerance.gradient),
        line(PARTS[3], curve_off(reference, found), tolerance.curve),
    ]
}

/// Largest difference of values that belong together, and its place; infinite where one is no number.
fn worst<'a>(pairs: impl Iterator<Item = (&'a f32, &'a f32)>) -> (f64, usize) {
    let off = |(a, b): (&f32, &f32)| {
        let off = (f64::from(*a) - f64::from(*b)).abs();
        if off.is_finite() { off } else { f64::INFINITY }
    };
    pairs.map(off).enumerate().fold((0.0, 0), |best, (i, off)| if off > best.0 { (off, i) } else { best })
}

fn magnitude(values: &[f32]) -> f64 {
    values.iter().fold(0.0, |m: f64, v| m.max(f64::from(v.abs())))
}

fn logits_off(reference: &Measured, found: &Measured) -> (f64, String) {
    if (reference.logits.len(), reference.width) != (found.logits.len(), found.width) {
        return (f64::INFINITY, format!("{} instead of {}", found.logits.len(), reference.logits.len()));
    }
    let (off, _) = worst(reference.logits.iter().zip(&found.logits));
    let best = |row: &[f32]| (0..row.len()).max_by(|a, b| row[*a].total_cmp(&row[*b]));
    let rows = reference.logits.chunks(reference.width).zip(found.logits.chunks(found.width));
    let (same, all) = rows.fold((0, 0), |(same, all), (a, b)| (same + usize::from(best(a) == best(b)), all + 1));
    (
        off / magnitude(&reference.logits).max(f64::MIN_POSITIVE),
        format!("same first choice at {same} of {all} positions"),
    )
}

fn loss_off(reference: &Measured, found: &Measured) -> (f64, String) {
    (relative(reference.loss, found.loss), format!("{:.6} and {:.6} on the CPU", found.loss, reference.loss))
}

fn relative(reference: f64, found: f64) -> f64 {
    let off = (reference - found).abs() / reference.abs().max(f64::MIN_POSITIVE);
    if off.is_finite() { off } else { f64::INFINITY }
}

/// Gradients that are much smaller than the largest are compared to a thousandth of it: they do not decide the step.
fn gradients_off(reference: &Measured, found: &Measured) -> (f64, String) {
    let names = |m: &Measured| m.gradients.iter().map(|(n, g)| (n.clone(), g.len())).collect::<Vec<_>>();
    if names(reference) != names(found) {
        return (f64::INFINITY, "other tensors".into());
    }
    let floor = reference.gradients.iter().map(|(_, g)| magnitude(g)).fold(0.0, f64::max) * 1e-3;
    let mut all = (0.0, String::new());
    for ((name, a), (_, b)) in reference.gradients.iter().zip(&found.gradients) {
        let off = worst(a.iter().zip(b)).0 / magnitude(a).max(floor).max(f64::MIN_POSITIVE);
        if off > all.0 {
            all = (off, name.clone());
        }
    }
    (all.0, format!("of {} tensors, most in {}", reference.gradients.len(), all.1))
}

fn curve_off(reference: &Measured, found: &Measured) -> (f64, String) {
    let pairs = reference.curve.iter().zip(&found.curve).map(|(a, b)| relative(*a, *b));
    let off = if reference.curve.len() == found.curve.len() { pairs.fold(0.0, f64::max) } else { f64::INFINITY };
    let ends = |m: &Measured| Some((*m.curve.first()?, *m.curve.last()?));
    let words = match (ends(found), ends(reference)) {
        (Some((first, last)), Some((_, cpu))) => format!("loss {first:.4} to {last:.4}, on the CPU to {cpu:.4}"),
        _ => "no step".into(),
    };
    (off, words)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::DeviceSpec;

    fn measured() -> Measured {
        Measured {
            logits: vec![1.0, 2.0, -3.0, 0.5, 0.1, 0.2],
            width: 3,
            loss: 1.5,
            gradients: vec![("a".into(), vec![1.0, -0.5]), ("b".into(), vec![1e-7, 0.0])],
            curve: vec![1.5, 1.4],
        }
    }

    fn lines(change: impl FnOnce(&mut Measured)) -> Vec<bool> {
        let mut found = measured();
        change(&mut found);
        let tolerance = Tolerance::of(&DeviceSpec::Wgpu(0));
        let lines = compare(&measured(), &found, &tolerance);
        assert_eq!(lines.iter().map(|l| l.part).collect::<Vec<_>>(), PARTS);
        lines.iter().map(|l| l.right).collect()
    }

    #[test]
    fn every_part_is_compared_with_its_limit() {
        assert_eq!(lines(|_| {}), [true; 4]);
        // a gradient that is nothing beside the others may differ
        assert_eq!(lines(|m| m.gradients[1].1[0] = 2e-7), [true; 4]);
        assert_eq!(lines(|m| m.logits[2] += 0.1), [false, true, true, true]);
        assert_eq!(lines(|m| m.logits[5] = f32::NAN), [false, true, true, true]);
        assert_eq!(lines(|m| m.loss = 1.51), [true, false, true, true]);
        assert_eq!(lines(|m| m.gradients[0].1[1] = -0.4), [true, true, false, true]);
        assert_eq!(lines(|m| m.gradients[0].1.clear()), [true, true, false, true]);
        assert_eq!(lines(|m| m.curve[1] = f64::NAN), [true, true, true, false]);
        assert_eq!(lines(|m| m.curve.truncate(1)), [true, true, true, false]);
    }
}
