//! Fused operations against the forms Burn composes them of, forward and backward, on the CPU.
//!
//! `cargo bench` runs all; `cargo bench -- swiglu` one group; `RAYON_NUM_THREADS=1` on one core.

use std::{hint::black_box, time::Duration};

use burn::tensor::{Device, Distribution, Tensor, activation, module};
use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use medtune::kernel::{
    norm::{layer_norm, rms_norm},
    quick_gelu::quick_gelu,
    softmax::masked_softmax,
    swiglu::swiglu,
};

/// Rows of a small batch.
const ROWS: usize = 1024;
/// Width inside an MLP.
const INNER: usize = 1408;
/// Width of the residual stream.
const WIDTH: usize = 512;

fn values<const D: usize>(shape: [usize; D]) -> Tensor<D> {
    Tensor::random(shape, Distribution::Normal(0.0, 1.0), &Device::flex().autodiff()).require_grad()
}

/// Times an operation and the gradients of its sum, in both forms.
fn compare<const D: usize>(
    criterion: &mut Criterion,
    name: &str,
    input: &Tensor<D>,
    fused: impl Fn(Tensor<D>) -> Tensor<D>,
    composed: impl Fn(Tensor<D>) -> Tensor<D>,
) {
    let mut group = criterion.benchmark_group(name);
    group.throughput(Throughput::Elements(input.dims().iter().product::<usize>() as u64));
    group.bench_function("fused", |b| b.iter(|| black_box(fused(input.clone()).sum().backward())));
    group.bench_function("composed", |b| b.iter(|| black_box(composed(input.clone()).sum().backward())));
    group.finish();
}

fn kernels(criterion: &mut Criterion) {
    let (gate, up) = (values([ROWS, INNER]), values([ROWS, INNER]));
    compare(criterion, "swiglu", &gate, |x| swiglu(x, up.clone()), |x| activation::silu(x) * up.clone());
    let composed = |x: Tensor<2>| x.clone() * activation::sigmoid(x.mul_scalar(1.702));
    compare(criterion, "quick_gelu", &gate, quick_gelu, composed);

    let (x, weight, bias) = (values([ROWS, WIDTH]), values([WIDTH]), values([WIDTH]));
    let composed = |x: Tensor<2>| {
        let scale = x.clone().square().mean_dim(1).add_scalar(1e-5).sqrt().recip();
        x * scale * weight.clone().unsqueeze()
    };
    compare(criterion, "rms_norm", &x, |x| rms_norm(x, weight.clone(), 1e-5), composed);
    let composed = |x| module::layer_norm(x, weight.clone(), Some(bias.clone()), 1e-5);
    compare(criterion, "layer_norm", &x, |x| layer_norm(x, weight.clone(), bias.clone(), 1e-5), composed);

    let (scores, mask) = (values([4, 8, 256, 256]), Tensor::<4>::zeros([1, 1, 256, 256], &Device::flex()));
    let composed = |x| activation::softmax(x + mask.clone(), 3);
    compare(criterion, "masked_softmax", &scores, |x| masked_softmax(x, mask.clone()), composed);
}

criterion_group! {
    name = benches;
    config = Criterion::default().sample_size(20).measurement_time(Duration::from_secs(3));
    targets = kernels
}
criterion_main!(benches);
