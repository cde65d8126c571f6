//! Merging updates into the weights, proven before anything is written.

use burn::{
    module::Module,
    tensor::{DType, Device, Tensor},
};
use serde::Serialize;

use super::attachment::attachments;
use crate::{
    error::{Error, Kind, Result},
    nn::visit::named_params,
    vlm::{Batch, Vlm},
};

/// How the merged model compares with the adapted one on probe inputs.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
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

/// Compares the logits of `probes` with updates beside their weights and folded into them. Weights are folded where they
/// are used and dropped again, so that one matrix at a time is there twice.
///
/// # Errors
/// There is nothing to fold, or the folded model answers differently.
pub fn prove<M: Vlm + Module>(model: &M, probes: &[Batch], device: &Device) -> Result<Proof> {
    let hung = attachments(model);
    let Some((_, first)) = hung.first() else {
        return Err(Error::new(Kind::Checkpoint, "the model has no adapter to merge"));
    };
    let half = holds_half(model);
    let (mut proof, mut same) = (Proof::default(), 0);
    for probe in probes {
        let before = logits(model, probe, device);
        let after = first.folding.during(|| logits(model, probe, device));
        same += check(probe, half, before, after, &mut proof)?;
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
fn check(probe: &Batch, half: bool, before: Tensor<2>, after: Tensor<2>, proof: &mut Proof) -> Result<usize> {
    // A sum in f32 rounds once; one that goes back into a half type moves every weight by up to half its spacing.
    let tolerance = if half { 5e-2 } else { 1e-4 };
    let scale: f32 = before.clone().abs().max().into_scalar();
    let same = before.clone().argmax(1).equal(after.clone().argmax(1)).int().sum().into_scalar::<i32>();
    proof.tokens += before.dims()[0];
    let worst: f32 = (after - before).abs().max().into_scalar();
    proof.max_difference = proof.max_difference.max(worst);
    proof.max_logit = proof.max_logit.max(scale);
    // A merge that yields NaN must fail as well.
    if worst.is_nan() || worst > tolerance * scale.max(1.0) {
        return Err(Error::new(Kind::Numeric, "the merged model differs from the adapted one")
            .at(probe.ids.join(", "))
            .expected(format!("logits within {}", tolerance * scale.max(1.0)))
            .found(format!("a difference of {worst}"))
            .help("keep the adapter separate, or load the base in f32 with `--dtype float32`"));
    }
    Ok(same as usize)
}

/// Whether a weight is of a half type.
fn holds_half<M: Module>(model: &M) -> bool {
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
