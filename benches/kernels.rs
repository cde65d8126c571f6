//! Fused operations against the forms Burn composes them of, forward and backward.
//!
//! `cargo bench` runs all; `cargo bench -- swiglu` one group; `RAYON_NUM_THREADS=1` on one core; `MEDTUNE_DEVICE=wgpu` (of
//! a build with that feature) on another device.

#![expect(clippy::print_stdout, reason = "a benchmark says how much memory it took")]

use std::time::Duration;

use burn::tensor::{DType, Distribution, FloatDType, Int, Tensor, TensorData, activation, module};
use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use medtune::{
    device::policy::Policy,
    kernel::{
        attention::attention,
        cross_entropy::cross_entropy,
        gelu::{gelu, quick_gelu},
        linear::{linear, low_rank_linear},
        norm::{add_rms_norm, layer_norm, rms_norm},
        pixel_shuffle::pixel_shuffle,
        rope::rotate,
        softmax::masked_softmax,
        swiglu::swiglu,
    },
};

use timing::{device, print_memory, read, timed};

mod timing;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Rows of a small batch.
const ROWS: usize = 1024;
/// Width inside an MLP.
const INNER: usize = 1408;
/// Width of the residual stream.
const WIDTH: usize = 512;

fn values<const D: usize>(shape: [usize; D]) -> Tensor<D> {
    Tensor::random(shape, Distribution::Normal(0.0, 1.0), &device().autodiff()).require_grad()
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
    let gradient = |out: Tensor<D>| {
        let mut gradients = out.sum().backward();
        read(input.grad_remove(&mut gradients).expect("the operation depends on its input"));
    };
    group.bench_function("fused", |b| timed(b, &device(), || gradient(fused(input.clone()))));
    group.bench_function("composed", |b| timed(b, &device(), || gradient(composed(input.clone()))));
    group.finish();
    print_memory(name);
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
    let branch = values([ROWS, WIDTH]);
    let fused = |x: Tensor<2>| {
        let (sum, normed) = add_rms_norm(x, branch.clone(), weight.clone(), 1e-5);
        sum + normed
    };
    let apart = |x: Tensor<2>| {
        let sum = x + branch.clone();
        sum.clone() + composed(sum)
    };
    compare(criterion, "add_rms_norm", &x, fused, apart);
    let composed = |x| module::layer_norm(x, weight.clone(), Some(bias.clone()), 1e-5);
    compare(criterion, "layer_norm", &x, |x| layer_norm(x, weight.clone(), bias.clone(), 1e-5), composed);

    // a tile of InternVL: 32 x 32 patches
    let patches = values([1, 1024, 1024]);
    let composed =
        |x: Tensor<3>| x.reshape([1, 16, 2, 16, 2, 1024]).permute([0, 1, 3, 2, 4, 5]).reshape([1, 256, 4096]);
    compare(criterion, "pixel_shuffle", &patches, |x| pixel_shuffle(x, 2, false), composed);

    let (scores, mask) = (values([4, 8, 256, 256]), Tensor::<4>::zeros([1, 1, 256, 256], &device()));
    let composed = |x| activation::softmax(x + mask.clone(), 3);
    compare(criterion, "masked_softmax", &scores, |x| masked_softmax(x, mask.clone()), composed);
}

/// A frozen weight without autodiff.
fn frozen(shape: [usize; 2]) -> Tensor<2> {
    values(shape).without_autodiff()
}

/// Products: of a small batch, of a layer of a 7B model with its weight in a half type (bf16 on the CPU), of a cached step of eight rows.
fn products(criterion: &mut Criterion) {
    let half = Policy::of(&device()).halves(&device()).first().copied().unwrap_or(FloatDType::F32);
    for (name, rows, d_input, d_output, dtype) in [
        ("linear_f32_1024x512x1408", ROWS, WIDTH, INNER, FloatDType::F32),
        ("linear_half_256x4096x4096", 256, 4096, 4096, half),
        ("linear_f32_8x512x1408", 8, WIDTH, INNER, FloatDType::F32),
    ] {
        // as checkpoints have it: `[d_output, d_input]`
        let weight = frozen([d_output, d_input]).cast(dtype).transpose();
        let composed = |x: Tensor<2>| x.matmul(weight.clone().cast(FloatDType::F32).autodiff());
        compare(criterion, name, &values([rows, d_input]), |x| linear(x, weight.clone()), composed);
    }
    let (weight, a, b) = (frozen([WIDTH, INNER]), values([WIDTH, 16]), values([16, INNER]));
    let composed = |x: Tensor<2>| {
        x.clone().matmul(weight.clone().autodiff()) + x.matmul(a.clone()).mul_scalar(2.0).matmul(b.clone())
    };
    let fused = |x| low_rank_linear(x, weight.clone(), a.clone(), b.clone(), 2.0);
    compare(criterion, "low_rank_linear_1024x512x1408", &values([ROWS, WIDTH]), fused, composed);
}

/// Causal attention of grouped heads: of a small batch, and of one long row of a 7B model's width.
fn attentions(criterion: &mut Criterion) {
    for (name, rows, length, heads, kv_heads, dim) in
        [("attention_4x256", 4, 256, 8, 4, 64), ("attention_1x2048", 1, 2048, 8, 2, 128)]
    {
        let (k, v) = (values([rows, kv_heads, length, dim]), values([rows, kv_heads, length, dim]));
        let ends: Vec<i32> = (1..=length as i32).flat_map(|end| [0, end]).collect();
        let ranges = TensorData::new(ends, [1, length, 2]);
        let ranges = Tensor::<3, Int>::from_data(ranges, (&device(), DType::I32));
        let seen = Tensor::<2>::ones([length, length], &device()).tril(0);
        let bias = (seen - 1.0).mul_scalar(1e30).reshape([1, 1, length, length]);
        let scale = (dim as f64).powf(-0.5);
        let composed = |q: Tensor<4>| {
            let groups = heads / kv_heads;
            let q = q.swap_dims(1, 2).reshape([rows, kv_heads, groups * length, dim]);
            let scores = q.matmul(k.clone().swap_dims(2, 3)).mul_scalar(scale).reshape([rows, heads, length, length]);
            let weights = activation::softmax(scores + bias.clone().autodiff(), 3);
            weights.reshape([rows, kv_heads, groups * length, length]).matmul(v.clone())
        };
        let fused = |q| attention(q, k.clone(), v.clone(), ranges.clone(), scale);
        compare(criterion, name, &values([rows, length, heads, dim]), fused, composed);
    }
}

fn rows(criterion: &mut Criterion) {
    let x = values([4, 256, 8, 64]);
    let (cos, sin) = (values([1, 256, 1, 32]).without_autodiff(), values([1, 256, 1, 32]).without_autodiff());
    let composed = |x: Tensor<4>| {
        let (cos, sin) = (cos.clone().autodiff(), sin.clone().autodiff());
        let (low, high) = (x.clone().narrow(3, 0, 32), x.narrow(3, 32, 32));
        let turned = low.clone() * cos.clone() - high.clone() * sin.clone();
        Tensor::cat(vec![turned, high * cos + low * sin], 3)
    };
    compare(criterion, "rope", &x, |x| rotate(x, cos.clone(), sin.clone()), composed);
    compare(criterion, "gelu", &values([ROWS, INNER]), gelu, activation::gelu);

    let mut group = criterion.benchmark_group("cross_entropy_1024x8192");
    let logits = values([ROWS, 8192]).without_autodiff();
    let labels: Vec<i32> = (0..ROWS as i32).map(|i| i * 7 % 8192).collect();
    let labels = Tensor::<1, Int>::from_data(TensorData::new(labels, [ROWS]), (&device(), DType::I32));
    group.throughput(Throughput::Elements((ROWS * 8192) as u64));
    group.bench_function("fused", |b| {
        timed(b, &device(), || read(cross_entropy(logits.clone(), labels.clone()).1));
    });
    group.bench_function("composed", |b| {
        timed(b, &device(), || {
            let leaf = logits.clone().autodiff().require_grad();
            let picked = activation::log_softmax(leaf.clone(), 1).gather(1, labels.clone().unsqueeze_dim(1));
            let mut gradients = picked.sum().neg().backward();
            read(leaf.grad_remove(&mut gradients).expect("the loss depends on its logits"));
        });
    });
    group.finish();
    print_memory("cross-entropy");
}

criterion_group! {
    name = benches;
    config = Criterion::default().sample_size(20).measurement_time(Duration::from_secs(3));
    targets = kernels, products, attentions, rows
}
criterion_main!(benches);
