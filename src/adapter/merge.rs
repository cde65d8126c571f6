//! Merging updates into the weights and taking them off again, proven before anything is written.

use std::path::PathBuf;

use burn::{
    module::Module,
    tensor::{DType, Device, Tensor},
};
use serde::{Deserialize, Serialize};

use super::{
    attachment::{Folding, Mode, attachments},
    quantized::Quantization,
};
use crate::{
    error::{Error, Kind, Result},
    nn::visit::named_params,
    vlm::{Batch, Vlm},
};

/// How two ways to compute with one adapter compare on probe inputs.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct Proof {
    /// Largest difference of a logit.
    pub max_difference: f32,
    /// Largest magnitude of a logit.
    pub max_logit: f32,
    /// Share of tokens at which both predict the same next token.
    pub same_prediction: f64,
    /// Tokens compared.
    pub tokens: usize,
}

impl Proof {
    /// What the user should know before the folded model is used, if anything.
    #[must_use]
    pub fn warning(&self) -> Option<&'static str> {
        let same = self.same_prediction >= 1.0;
        (!same).then_some("folding changes answers; `--dtype float32` rounds less")
    }
}

/// Name of the file in a merged checkpoint that says what was merged.
pub const RECORD: &str = "merge.json";

/// What was folded into a checkpoint: enough to take it off again, and to notice another adapter.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Record {
    /// Directory of the base model.
    pub base: PathBuf,
    /// How its weights were held; of packed ones the unpacked values were merged.
    pub quantization: Quantization,
    /// The adapters.
    pub adapters: Vec<MergedAdapter>,
    /// What the base answered to the probes; none if its adapters cannot be taken off again.
    pub base_answers: Option<Answers>,
    /// What had been folded into the base before.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub before: Option<Box<Self>>,
}

/// An adapter that was merged.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct MergedAdapter {
    /// Its copy, in the merged checkpoint.
    pub dir: PathBuf,
    /// Factor on what it adds.
    pub weight: f64,
    /// SHA-256 of its tensors.
    pub sha256: String,
}

/// What a model predicts at every token of the probes.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Answers {
    /// The most likely next tokens.
    pub tokens: Vec<i32>,
    /// Their logits.
    pub logits: Vec<f32>,
}

impl Answers {
    /// Of `model` in `mode`; without adapters there is only one.
    #[must_use]
    pub fn of<M: Vlm + Module>(model: &M, mode: Mode, probes: &[Batch], device: &Device) -> Self {
        let folding = folding(model).unwrap_or_default();
        let mut all = Self::default();
        for probe in probes {
            let (best, at) = folding.during(mode, || logits(model, probe, device)).max_dim_with_indices(1);
            all.logits.extend(best.into_data().convert::<f32>().try_to_vec::<f32>().expect("converted to f32"));
            all.tokens.extend(at.into_data().convert::<i32>().try_to_vec::<i32>().expect("converted to i32"));
        }
        all
    }

    /// How `found` compares with these.
    ///
    /// # Errors
    /// They differ by more than rounding: another adapter was taken off, or one in another way.
    pub fn compare(&self, found: &Self, half: bool) -> Result<Proof> {
        let count = self.tokens.len();
        let pairs = self.logits.iter().zip(&found.logits);
        let proof = Proof {
            max_difference: pairs
                .fold(0f32, |m, (a, b)| if (a - b).is_nan() { f32::NAN } else { m.max((a - b).abs()) }),
            max_logit: self.logits.iter().fold(0f32, |m, x| m.max(x.abs())),
            same_prediction: self.tokens.iter().zip(&found.tokens).filter(|(a, b)| a == b).count() as f64
                / count.max(1) as f64,
            tokens: count,
        };
        let limit = tolerance(half) * proof.max_logit.max(1.0);
        if found.tokens.len() == count && proof.max_difference <= limit {
            return Ok(proof);
        }
        Err(Error::new(Kind::Checkpoint, "what is left is not the model that the adapter was merged into")
            .at(RECORD)
            .expected(format!("logits within {limit} of its, at {count} tokens"))
            .found(format!("a difference of {}, at {} tokens", proof.max_difference, found.tokens.len()))
            .help("take off the adapters that were merged, with their weights and configuration, from the checkpoint as it was written"))
    }
}

/// Compares the logits of `probes` with updates beside their weights and folded into them. Weights are folded where they
/// are used and dropped again, so that one matrix at a time is there twice.
///
/// # Errors
/// There is nothing to fold, or the folded model answers differently.
pub fn prove<M: Vlm + Module>(model: &M, probes: &[Batch], device: &Device) -> Result<Proof> {
    compare(model, probes, device, [Mode::Beside, Mode::Folded], "the merged model differs from the adapted one")
}

/// Compares the logits of `probes` of the weights as they are, into which the updates were folded, with those of the
/// weights without them and the updates beside them again.
///
/// # Errors
/// There is nothing to take off, or rounding leaves another model.
pub fn prove_reverse<M: Vlm + Module>(model: &M, probes: &[Batch], device: &Device) -> Result<Proof> {
    let what = "the base with the adapter differs from the merged model";
    compare(model, probes, device, [Mode::Bare, Mode::Restored], what)
}

/// The switch that the modules of `model` share; none without adapters.
#[must_use]
pub fn folding<M: Module>(model: &M) -> Option<Folding> {
    attachments(model).into_iter().next().map(|(_, first)| first.folding)
}

fn compare<M: Vlm + Module>(
    model: &M,
    probes: &[Batch],
    device: &Device,
    modes: [Mode; 2],
    complaint: &str,
) -> Result<Proof> {
    let folding = folding(model)
        .ok_or_else(|| Error::new(Kind::Checkpoint, "the model has no adapter to merge, or to take off"))?;
    let half = holds_half(model);
    let (mut proof, mut same) = (Proof::default(), 0);
    for probe in probes {
        let [before, after] = modes.map(|mode| folding.during(mode, || logits(model, probe, device)));
        same += check(probe, half, before, after, &mut proof, complaint)?;
    }
    proof.same_prediction = same as f64 / proof.tokens.max(1) as f64;
    Ok(proof)
}

/// Folds every update into its weight, after [`prove`]. All folded weights are then there at once;
/// [`SaveOptions::fold`](crate::weights::SaveOptions) writes a large model without that.
///
/// # Errors
/// As [`prove`].
pub fn merge<M: Vlm + Module>(model: M, probes: &[Batch], device: &Device) -> Result<(M, Proof)> {
    let proof = prove(&model, probes, device)?;
    Ok((model.materialize(), proof))
}

/// Adds a comparison to `proof` and returns the number of equal predictions.
fn check(
    probe: &Batch,
    half: bool,
    before: Tensor<2>,
    after: Tensor<2>,
    proof: &mut Proof,
    complaint: &str,
) -> Result<usize> {
    let tolerance = tolerance(half);
    let scale: f32 = before.clone().abs().max().into_scalar();
    let same = before.clone().argmax(1).equal(after.clone().argmax(1)).int().sum().into_scalar::<i32>();
    proof.tokens += before.dims()[0];
    let worst: f32 = (after - before).abs().max().into_scalar();
    proof.max_difference = proof.max_difference.max(worst);
    proof.max_logit = proof.max_logit.max(scale);
    // A merge that yields NaN must fail as well.
    if worst.is_nan() || worst > tolerance * scale.max(1.0) {
        return Err(Error::new(Kind::Numeric, complaint)
            .at(probe.ids.join(", "))
            .expected(format!("logits within {}", tolerance * scale.max(1.0)))
            .found(format!("a difference of {worst}"))
            .help("keep the adapter as it is, or load the model in f32 with `--dtype float32`"));
    }
    Ok(same as usize)
}

/// Largest difference of logits that rounding explains, as a share of the largest. A sum in f32 rounds once; one that goes
/// back into a half type moves every weight by up to half its spacing.
fn tolerance(half: bool) -> f32 {
    if half { 5e-2 } else { 1e-4 }
}

/// Whether a weight is of a half type.
#[must_use]
pub fn holds_half<M: Module>(model: &M) -> bool {
    named_params(model).iter().any(|p| p.linear_weight && matches!(p.dtype, Some(DType::BF16 | DType::F16)))
}

/// Logits at every real token.
///
/// # Shapes
/// `[tokens, vocab_size]`
fn logits<M: Vlm>(model: &M, batch: &Batch, device: &Device) -> Tensor<2> {
    let context = model.context(batch, device);
    let mut x = model.embed(batch, model.features(batch, device), device);
    for i in 0..model.num_layers() {
        x = model.layer(i, x, &context, None);
    }
    let [rows, length, hidden] = x.dims();
    let real: Vec<i32> = (0..rows * length).filter(|i| batch.mask[*i]).map(|i| i as i32).collect();
    let real = Tensor::from_data(real.as_slice(), device);
    model.logits(model.final_norm(x).reshape([rows * length, hidden]).select(0, real))
}
