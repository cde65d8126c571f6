//! Merging updates into the weights, proven before anything is written.

use burn::{
    module::Module,
    tensor::{DType, Device, Tensor},
};

use crate::{
    error::{Error, Kind, Result},
    nn::visit::named_params,
    vlm::{Batch, Vlm},
};

/// Adds every update to its weight and removes it, then compares the logits of `probes` before and after.
///
/// # Errors
/// There is nothing to merge, or the merged model answers differently.
pub fn merge<M: Vlm + Module>(model: M, probes: &[Batch], device: &Device) -> Result<M> {
    if !named_params(&model).iter().any(|p| p.adapter) {
        return Err(Error::new(Kind::Checkpoint, "the model has no adapter to merge"));
    }
    let before: Vec<Tensor<2>> = probes.iter().map(|p| logits(&model, p, device)).collect();
    let merged = model.materialize();
    for (probe, before) in probes.iter().zip(before) {
        let after = logits(&merged, probe, device);
        let tolerance = if after.dtype() == DType::F32 { 1e-4 } else { 5e-2 };
        let scale: f32 = before.clone().abs().max().into_scalar();
        let worst: f32 = (after - before).abs().max().into_scalar();
        // A merge that yields NaN must fail as well.
        if worst.is_nan() || worst > tolerance * scale.max(1.0) {
            return Err(Error::new(Kind::Numeric, "the merged model differs from the adapted one")
                .at(probe.ids.join(", "))
                .expected(format!("logits within {}", tolerance * scale.max(1.0)))
                .found(format!("a difference of {worst}"))
                .help("keep the adapter separate, or load the base in f32"));
        }
    }
    Ok(merged)
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
