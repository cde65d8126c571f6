//! Multiple choice without a reply: the option that a model finds the most likely answer, which is OmniMedVQA's
//! "prefix-based score".
//!
//! Each option is put behind the question as the whole answer, `option.`, and the cross-entropy of its tokens is
//! averaged; what ends the turn does not count. So the length of an option matters little, and no parser is involved.

use burn::tensor::{DType, Device, Int, Tensor, TensorData, activation::log_softmax};
use rayon::prelude::*;

use super::Choice;
use crate::{
    error::{Error, Kind, Result},
    nn::cast,
    sample::{Role, Sample, Turn},
    vlm::{Batch, Encoded, IGNORE, PaddingSide, Processor, Vlm},
};

/// Key in result files.
pub const KEY: &str = "mcq_prefix";
/// Name in tables.
pub const NAME: &str = "Multiple choice by likelihood";
/// What it measures.
pub const ABOUT: &str = "Share of questions whose right option has the lowest mean cross-entropy as the answer; needs the model, not its reply.";
/// Exact definition.
pub const SIGNATURE: &str = "mcq_prefix|v1|rule=OmniMedVQA prefix-based score, mean token cross-entropy|answer='option.'|end of turn=not counted|ties=first";

/// Positions whose logits are held at once.
const POSITIONS: usize = 256;

/// The options of one question.
#[derive(Debug, Clone, PartialEq)]
pub struct Likelihoods {
    /// Mean cross-entropy of each option's tokens, nats.
    pub losses: Vec<f64>,
    /// The option with the lowest, the first of equals.
    pub choice: Choice,
}

/// Which option the model finds most likely for each multiple-choice sample. `model` is without autodiff.
///
/// # Errors
/// A sample without options or without a question, a row that cannot be encoded, or logits that are not finite.
pub fn likelihoods<V: Vlm>(
    model: &V,
    processor: &dyn Processor,
    samples: &[&Sample],
    batch_size: usize,
    device: &Device,
) -> Result<Vec<Likelihoods>> {
    let rows: Vec<Sample> =
        samples.iter().map(|s| answered(s)).collect::<Result<Vec<_>>>()?.into_iter().flatten().collect();
    let encoded: Vec<Encoded> = rows.par_iter().map(|row| processor.encode(row)).collect::<Result<_>>()?;
    let mut losses = losses(model, &encoded, processor.stop_ids(), processor.pad_id(), batch_size, device)?.into_iter();
    let one = |sample: &&Sample| {
        let losses: Vec<f64> = losses.by_ref().take(sample.options.len()).collect();
        let best = losses.iter().enumerate().min_by(|a, b| a.1.total_cmp(b.1)).map(|(i, _)| i);
        let correct = best.is_some_and(|i| sample.options[i] == sample.answer());
        Likelihoods { losses, choice: Choice { chosen: best, correct } }
    };
    Ok(samples.iter().map(one).collect())
}

/// The sample with each of its options as its only answer.
fn answered(sample: &Sample) -> Result<Vec<Sample>> {
    let wrong = |what: &str| Error::new(Kind::Data, what).at(&sample.id);
    if sample.options.is_empty() {
        return Err(wrong("a question without options cannot be scored by likelihood"));
    }
    let asked = sample.turns.iter().position(|t| t.role == Role::User);
    let asked = asked.ok_or_else(|| wrong("a row has no question"))?;
    let with = |option: &String| {
        let mut turns = sample.turns[..=asked].to_vec();
        turns.push(Turn { role: Role::Assistant, text: format!("{}.", option.trim().trim_end_matches('.')) });
        Sample { turns, ..sample.clone() }
    };
    Ok(sample.options.iter().map(with).collect())
}

/// Mean cross-entropy of the supervised tokens of each row before the first of `stop_ids`, in nats. No row's value
/// depends on the other rows.
///
/// # Errors
/// A row without such tokens, or logits that are not finite.
pub fn losses<V: Vlm>(
    model: &V,
    rows: &[Encoded],
    stop_ids: &[i32],
    pad_id: i32,
    batch_size: usize,
    device: &Device,
) -> Result<Vec<f64>> {
    let mut order: Vec<usize> = (0..rows.len()).collect();
    order.sort_by_key(|i| (rows[*i].input_ids.len(), *i));
    let mut found = vec![0.0; rows.len()];
    for batch in order.chunks(batch_size.max(1)) {
        let members: Vec<Encoded> = batch.iter().map(|i| rows[*i].clone()).collect();
        for (i, loss) in batch.iter().zip(batch_losses(model, &members, stop_ids, pad_id, device)?) {
            found[*i] = loss;
        }
    }
    Ok(found)
}

fn batch_losses<V: Vlm>(
    model: &V,
    rows: &[Encoded],
    stop_ids: &[i32],
    pad_id: i32,
    device: &Device,
) -> Result<Vec<f64>> {
    let batch = Batch::collate(rows, pad_id, PaddingSide::Right, 1);
    let context = model.context(&batch, device);
    let mut x = model.embed(&batch, model.features(&batch, device), device);
    for layer in 0..model.num_layers() {
        x = model.layer(layer, x, &context, None);
    }
    let width = x.dims()[2];
    let x = x.reshape([batch.rows * batch.length, width]);
    let mut means = Vec::with_capacity(rows.len());
    for (r, row) in rows.iter().enumerate() {
        let places = scored(row, stop_ids);
        if places.is_empty() {
            return Err(Error::new(Kind::Data, "an option has no token to be scored").at(&row.id));
        }
        let mut sum = 0.0;
        for places in places.chunks(POSITIONS) {
            let before = places.iter().map(|p| (r * batch.length + p - 1) as i32).collect::<Vec<_>>();
            let labels = places.iter().map(|p| row.labels[*p]).collect::<Vec<_>>();
            sum += cross_entropy(model, x.clone(), before, labels, device);
        }
        let mean = sum / places.len() as f64;
        if !mean.is_finite() {
            return Err(Error::new(Kind::Numeric, "the likelihood of an option is not finite").at(&row.id));
        }
        means.push(mean);
    }
    Ok(means)
}

/// Positions of a row that count: the answer, which is the last run of supervised tokens (chat formats also supervise
/// marks of the turns before it), up to the end of its turn.
fn scored(row: &Encoded, stop_ids: &[i32]) -> Vec<usize> {
    let supervised = |p: &usize| row.labels[*p] != IGNORE;
    let Some(last) = (1..row.labels.len()).rev().find(supervised) else { return Vec::new() };
    let first = (1..=last).rev().take_while(supervised).last().unwrap_or(last);
    (first..=last).take_while(|p| !stop_ids.contains(&row.labels[*p])).collect()
}

/// Sum over `labels`, each predicted from the state at its place in `before`.
fn cross_entropy<V: Vlm>(model: &V, x: Tensor<2>, before: Vec<i32>, labels: Vec<i32>, device: &Device) -> f64 {
    let n = labels.len();
    let index = |values: Vec<i32>| Tensor::<1, Int>::from_data(TensorData::new(values, [n]), device);
    let width = x.dims()[1];
    let states = model.final_norm(x.select(0, index(before)).reshape([1, n, width])).reshape([n, width]);
    let logits = cast(model.logits(states), DType::F32);
    let picked = log_softmax(logits, 1).gather(1, index(labels).reshape([n, 1]));
    picked.into_data().iter::<f32>().map(|v| -f64::from(v)).sum()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::models::{AnyVlm, llava_med::DEF};

    const STOP: i32 = 59;

    fn model(device: &Device) -> AnyVlm {
        crate::weights::init_random((DEF.empty)("tiny", device).unwrap().0, 11, 0.15)
    }

    /// `prompt` tokens, then an answer of `answer` tokens and the end of the turn.
    fn row(id: &str, prompt: i32, answer: i32) -> Encoded {
        let mut input_ids: Vec<i32> = (0..prompt + answer).map(|i| (i * 7 + prompt) % 58).collect();
        let mut labels = input_ids.clone();
        labels[..prompt as usize].fill(IGNORE);
        input_ids.push(STOP);
        labels.push(STOP);
        Encoded { id: id.into(), input_ids, labels, spans: Vec::new(), pixels: Vec::new() }
    }

    #[test]
    fn losses_are_those_of_each_row_alone_by_the_definition() {
        let device = Device::flex();
        let model = model(&device);
        let rows = [row("a", 9, 3), row("b", 20, 1), row("c", 4, 6), row("d", 15, 2)];
        let alone = losses(&model, &rows, &[STOP], 0, 1, &device).unwrap();
        for (row, loss) in rows.iter().zip(&alone) {
            let batch = Batch::collate(std::slice::from_ref(row), 0, PaddingSide::Right, 1);
            let context = model.context(&batch, &device);
            let x = (0..model.num_layers())
                .fold(model.embed(&batch, None, &device), |x, layer| model.layer(layer, x, &context, None));
            let [_, length, width] = x.dims();
            let logits = model.logits(model.final_norm(x).reshape([length, width]));
            let values: Vec<f32> = logits.into_data().try_into_vec().unwrap();
            let vocabulary = values.len() / length;
            let places: Vec<usize> = (1..length - 1).filter(|p| row.labels[*p] != IGNORE).collect();
            let entropy = |p: &usize| {
                let logits = &values[(p - 1) * vocabulary..][..vocabulary];
                let sum: f64 = logits.iter().map(|l| f64::from(*l).exp()).sum();
                sum.ln() - f64::from(logits[row.labels[*p] as usize])
            };
            let expected = places.iter().map(entropy).sum::<f64>() / places.len() as f64;
            assert!((loss - expected).abs() < 1e-4, "{}: {loss}, expected {expected}", row.id);
        }
        for size in [2, 3, 8] {
            let together = losses(&model, &rows, &[STOP], 0, size, &device).unwrap();
            assert!(alone.iter().zip(&together).all(|(a, b)| (a - b).abs() < 1e-5), "{alone:?} {together:?}");
        }
    }

    #[test]
    fn an_option_without_tokens_is_an_error() {
        let device = Device::flex();
        let error = losses(&model(&device), &[row("x", 5, 0)], &[STOP], 0, 4, &device).unwrap_err();
        assert!(error.to_string().contains("at x"), "{error}");
        let sample = Sample { id: "y".into(), ..Sample::default() };
        assert!(answered(&sample).unwrap_err().to_string().contains("without options"));
    }

    #[test]
    fn options_become_answers() {
        let turn = |role, text: &str| Turn { role, text: text.into() };
        let sample = Sample {
            turns: vec![turn(Role::User, "What is it?"), turn(Role::Assistant, "Nodule")],
            options: vec!["Normal".into(), "Nodule.".into()],
            ..Sample::default()
        };
        let rows = answered(&sample).unwrap();
        let texts: Vec<&str> = rows.iter().map(|r| r.answer()).collect();
        assert_eq!(texts, ["Normal.", "Nodule."]);
        assert!(rows.iter().all(|r| r.question() == "What is it?" && r.turns.len() == 2));
    }
}
