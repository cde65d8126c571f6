//! Preference tuning against its definition, recomputed in f64 from logits.

use burn::{
    module::Module,
    tensor::{Tensor, TensorData},
};
use medtune::{
    loader::Rows,
    models::{AnyVlm, embedded::EMBEDDED},
    sample::Sample,
    train::{
        ObjectiveType, Recompute, TrainConfig,
        params::{self, GradientSum},
    },
    vlm::{Batch, IGNORE, Vlm},
};

use super::batching::{Family, assert_same, gradient, row, stirred, with_session};

const BETA: f64 = 0.3;

fn config(label_smoothing: f64, rpo_alpha: f64) -> TrainConfig {
    TrainConfig {
        objective: ObjectiveType::Dpo,
        beta: BETA,
        label_smoothing,
        rpo_alpha,
        recompute: Recompute::Always,
        ..TrainConfig::default()
    }
}

/// Pairs of answers of different length to the same question about the same picture.
fn pairs(dir: &std::path::Path) -> Vec<[Sample; 2]> {
    (0..3)
        .map(|i| {
            let chosen = row(dir, i, 3, 2 + i);
            let mut rejected = Sample { id: format!("bad-{i}"), ..chosen.clone() };
            rejected.turns[1].text = format!("yes {}", "large ".repeat(1 + 2 * i));
            [chosen, rejected]
        })
        .collect()
}

/// Log-likelihood of every row, and the number of supervised tokens of the chosen ones, from all logits in f64.
fn logps(model: &AnyVlm, batch: &Batch) -> (Vec<f64>, usize) {
    let device = medtune::device::DeviceSpec::Cpu.open().unwrap();
    let context = model.context(batch, &device);
    let mut x = model.embed(batch, model.features(batch, &device), &device);
    for i in 0..model.num_layers() {
        x = model.layer(i, x, &context, None);
    }
    let hidden = x.dims()[2];
    let logits = model.logits(model.final_norm(x).reshape([batch.rows * batch.length, hidden]));
    let vocab = logits.dims()[1];
    let logits: Vec<f32> = logits.into_data().try_to_vec().unwrap();
    let (mut sums, mut chosen_tokens) = (vec![0.0; batch.rows], 0);
    for cell in (0..batch.rows * batch.length).filter(|c| c % batch.length > 0 && batch.labels[*c] != IGNORE) {
        let row: Vec<f64> = logits[(cell - 1) * vocab..cell * vocab].iter().map(|v| f64::from(*v)).collect();
        let most = row.iter().copied().fold(f64::MIN, f64::max);
        let sum: f64 = row.iter().map(|v| (v - most).exp()).sum();
        sums[cell / batch.length] += row[batch.labels[cell] as usize] - most - sum.ln();
        chosen_tokens += usize::from((cell / batch.length).is_multiple_of(2));
    }
    (sums, chosen_tokens)
}

/// The loss as arXiv 2305.18290 and TRL's documentation have it, with its likelihood term.
fn definition(model: &AnyVlm, reference: &[f64], batch: &Batch, config: &TrainConfig) -> f64 {
    let (own, chosen_tokens) = logps(model, batch);
    let log_sigmoid = |x: f64| -(1.0 + (-x).exp()).ln();
    let pairs = own.len() / 2;
    let loss: f64 = (0..pairs)
        .map(|p| {
            let ratio = |side: usize| own[2 * p + side] - reference[2 * p + side];
            let z = config.beta * (ratio(0) - ratio(1));
            -(1.0 - config.label_smoothing) * log_sigmoid(z) - config.label_smoothing * log_sigmoid(-z)
        })
        .sum();
    let chosen: f64 = own.iter().step_by(2).sum();
    loss / pairs as f64 - config.rpo_alpha * chosen / chosen_tokens as f64
}

#[test]
fn loss_rewards_and_gradient_are_those_of_the_definition() {
    let pictures = tempfile::tempdir().unwrap();
    for embedded in EMBEDDED {
        let family = Family::open(embedded);
        let (rows, rejected) = Rows::survey_pairs(pairs(pictures.path()), family.processor.as_ref(), 0, || {});
        assert!(rejected.is_empty(), "{rejected:?}");
        let batch = rows.batch(&[0, 1, 2], 8).unwrap();
        for (label_smoothing, rpo_alpha) in [(0.0, 0.0), (0.1, 0.5)] {
            let config = config(label_smoothing, rpo_alpha);
            with_session(&family, &config, |session| {
                let mut sum = GradientSum::new(&session.model);
                let fresh = session.accumulate(std::slice::from_ref(&batch), &mut sum).unwrap();
                let margin = fresh.more["rewards/margins"];
                assert!(margin.abs() < 1e-3, "an untrained model is its reference: {margin}");
                let (reference, _) = logps(&session.model.valid(), &batch);
                session.model = stirred(session.model.clone());
                let measured = session.accumulate(std::slice::from_ref(&batch), &mut sum).unwrap();
                let plain = session.model.valid();
                let expected = definition(&plain, &reference, &batch, &config);
                let what = format!("{} {label_smoothing} {rpo_alpha}", embedded.family);
                assert!((measured.loss - expected).abs() < 2e-4, "{what}: {} {expected}", measured.loss);
                let (own, _) = logps(&plain, &batch);
                let reward = |row: usize| BETA * (own[row] - reference[row]);
                let mean = |side: usize| (0..3).map(|p| reward(2 * p + side)).sum::<f64>() / 3.0;
                let right = (0..3).filter(|p| reward(2 * p) > reward(2 * p + 1)).count() as f64 / 3.0;
                for (name, expected) in [
                    ("rewards/chosen", mean(0)),
                    ("rewards/rejected", mean(1)),
                    ("rewards/margins", mean(0) - mean(1)),
                    ("rewards/accuracies", right),
                ] {
                    let found = measured.more[name];
                    assert!((found - expected).abs() < 5e-4, "{what}: {name} {found} {expected}");
                }
                slope(&what, session, &batch, &reference, &config);
            });
        }
    }
}

/// The gradient is the slope of the definition in the direction of the gradient itself.
fn slope(
    what: &str,
    session: &mut medtune::train::trainer::Session<'_, AnyVlm>,
    batch: &Batch,
    reference: &[f64],
    config: &TrainConfig,
) {
    let (_, gradients) = gradient(session, std::slice::from_ref(batch));
    let norm: f64 = gradients.iter().flatten().map(|g| f64::from(*g).powi(2)).sum::<f64>().sqrt();
    let moved = |h: f64| {
        let model = params::update(session.model.clone(), |i, t| {
            let scale = (h / norm) as f32;
            let step: Vec<f32> = gradients[i].iter().map(|g| g * scale).collect();
            if step.is_empty() {
                return t;
            }
            let n = step.len();
            t.clone() + Tensor::<1>::from_data(TensorData::new(step, [n]), &t.device())
        });
        definition(&model.valid(), reference, batch, config)
    };
    let h = 0.02 / norm.max(1.0);
    let numeric = (moved(h) - moved(-h)) / (2.0 * h);
    assert!((numeric / norm - 1.0).abs() < 0.03, "{what}: slope {numeric}, norm of the gradient {norm}");
}

#[test]
fn pairs_may_be_split_into_any_batches_and_layers_computed_again() {
    let pictures = tempfile::tempdir().unwrap();
    let family = Family::open(&EMBEDDED[0]);
    let (rows, _) = Rows::survey_pairs(pairs(pictures.path()), family.processor.as_ref(), 0, || {});
    let run = |recompute, groups: &[&[usize]]| {
        let config = TrainConfig { recompute, ..config(0.1, 0.5) };
        with_session(&family, &config, |session| {
            session.model = stirred(session.model.clone());
            let micro: Vec<Batch> = groups.iter().map(|g| rows.batch(g, 4).unwrap()).collect();
            gradient(session, &micro)
        })
    };
    let whole = run(Recompute::Never, &[&[0, 1, 2]]);
    assert_same("layer by layer", &whole, &run(Recompute::Always, &[&[0, 1, 2]]));
    assert_same("one pair at a time", &whole, &run(Recompute::Always, &[&[0], &[1], &[2]]));
    assert_same("two and one", &whole, &run(Recompute::Always, &[&[2, 0], &[1]]));
}
