//! The kernels that are written by hand for every kind of device against the forms Burn composes them of, on the device
//! that `MEDTUNE_DEVICE` names.
//!
//! `MEDTUNE_DEVICE=wgpu cargo bench --features wgpu --bench device_kernels`; words behind `--` choose by name. Each run
//! ends with an element read back and a synchronisation: what nobody reads, a device may never compute.

use std::time::Instant;

use burn::tensor::{DType, Device, Distribution, Int, Tensor, TensorData, activation, module};
use medtune::{
    device::DeviceSpec,
    kernel::{
        attention::attention,
        cross_entropy::cross_entropy,
        norm::{layer_norm, rms_norm},
    },
};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Runs that are measured.
const RUNS: usize = 9;
/// Runs before them, in which the device compiles.
const WARM: usize = 3;

fn values<const D: usize>(shape: [usize; D], device: &Device) -> Tensor<D> {
    Tensor::random(shape, Distribution::Normal(0.0, 1.0), device)
}

fn read<const D: usize>(tensor: Tensor<D>) {
    let count: usize = tensor.dims().iter().product();
    std::hint::black_box(tensor.reshape([count]).narrow(0, count / 2, 1).into_scalar::<f32>());
}

/// Milliseconds of one run.
fn time(device: &Device, run: &mut impl FnMut()) -> f64 {
    device.sync().expect("the device answers");
    let start = Instant::now();
    run();
    device.sync().expect("the device answers");
    start.elapsed().as_secs_f64() * 1e3
}

/// One line of a table: both medians with their ranges, and how often the composed form's holds the kernel's. They run
/// in turns, so that whatever else the machine does meets both.
fn line(name: &str, device: &Device, mut kernel: impl FnMut(), mut composed: impl FnMut()) {
    let words: Vec<_> = std::env::args().skip(1).filter(|word| !word.starts_with("--")).collect();
    if !words.is_empty() && !words.iter().any(|word| name.contains(word.as_str())) {
        return;
    }
    let runs = (0..RUNS + WARM).map(|_| (time(device, &mut kernel), time(device, &mut composed)));
    let (mut kernel, mut composed): (Vec<f64>, Vec<f64>) = runs.skip(WARM).unzip();
    kernel.sort_by(f64::total_cmp);
    composed.sort_by(f64::total_cmp);
    let shown = |t: &[f64]| format!("{:.1} ({:.1} to {:.1})", t[RUNS / 2], t[0], t[RUNS - 1]);
    let ratio = composed[RUNS / 2] / kernel[RUNS / 2];
    let text = format!("| {name} | {} | {} | {ratio:.1} |\n", shown(&kernel), shown(&composed));
    std::io::Write::write_all(&mut std::io::stdout(), text.as_bytes()).expect("standard output is open");
}

/// An operation alone, and with the gradients of its product with known values.
fn both<const D: usize>(
    name: &str,
    device: &Device,
    inputs: &[Tensor<D>],
    kernel: impl Fn(&[Tensor<D>]) -> Tensor<D>,
    composed: impl Fn(&[Tensor<D>]) -> Tensor<D>,
) {
    line(&format!("{name}, forward"), device, || read(kernel(inputs)), || read(composed(inputs)));
    let slope = values(kernel(inputs).dims(), &device.clone().autodiff());
    let backward = |op: &dyn Fn(&[Tensor<D>]) -> Tensor<D>| {
        let leaves: Vec<_> = inputs.iter().map(|t| t.clone().autodiff().require_grad()).collect();
        let mut grads = (op(&leaves) * slope.clone()).sum().backward();
        for leaf in leaves {
            read(leaf.grad_remove(&mut grads).expect("tracked"));
        }
    };
    line(&format!("{name}, with gradients"), device, || backward(&kernel), || backward(&composed));
}

fn norms(device: &Device) {
    for (rows, width) in [(512, 2048), (2048, 128)] {
        let x = [values([rows, width], device)];
        let (weight, bias) = (values([width], device), values([width], device));
        let like = |t: &Tensor<1>, x: &Tensor<2>| if x.is_autodiff() { t.clone().autodiff() } else { t.clone() };
        let composed = |x: &[Tensor<2>]| {
            let scale = x[0].clone().square().mean_dim(1).add_scalar(1e-5).sqrt().recip();
            x[0].clone() * scale * like(&weight, &x[0]).unsqueeze()
        };
        let name = format!("RMSNorm {rows} x {width}");
        both(&name, device, &x, |x| rms_norm(x[0].clone(), like(&weight, &x[0]), 1e-5), composed);
        let composed =
            |x: &[Tensor<2>]| module::layer_norm(x[0].clone(), like(&weight, &x[0]), Some(like(&bias, &x[0])), 1e-5);
        let kernel = |x: &[Tensor<2>]| layer_norm(x[0].clone(), like(&weight, &x[0]), like(&bias, &x[0]), 1e-5);
        both(&format!("LayerNorm {rows} x {width}"), device, &x, kernel, composed);
    }
}

fn losses(device: &Device) {
    for (rows, classes) in [(64, 32_000), (16, 151_936)] {
        let logits = values::<2>([rows, classes], device);
        let labels: Vec<i32> = (0..rows as i32).map(|i| i * 7 % classes as i32).collect();
        let labels = Tensor::<1, Int>::from_data(TensorData::new(labels, [rows]), (device, DType::I32));
        let kernel = || {
            let (nll, gradient) = cross_entropy(logits.clone(), labels.clone());
            read(nll);
            read(gradient);
        };
        let composed = || {
            let leaf = logits.clone().autodiff().require_grad();
            let picked = activation::log_softmax(leaf.clone(), 1).gather(1, labels.clone().unsqueeze_dim(1));
            let mut grads = picked.clone().sum().neg().backward();
            read(picked.without_autodiff());
            read(leaf.grad_remove(&mut grads).expect("tracked"));
        };
        line(&format!("cross-entropy {rows} x {classes}, loss and gradient"), device, kernel, composed);
    }
}

/// `[queries, 2]`: the queries are the last of the keys.
fn causal(queries: usize, keys: usize, device: &Device) -> Tensor<3, Int> {
    let ends: Vec<i32> = (keys - queries + 1..=keys).flat_map(|end| [0, end as i32]).collect();
    Tensor::from_data(TensorData::new(ends, [1, queries, 2]), (device, DType::I32))
}

fn attentions(device: &Device) {
    for (rows, queries, keys, heads, kv_heads, dim) in
        [(1, 256, 256, 8, 2, 64), (1, 512, 512, 4, 1, 128), (1, 200, 200, 4, 4, 80), (4, 1, 512, 8, 2, 128)]
    {
        let shapes = [[rows, queries, heads, dim], [rows, kv_heads, keys, dim], [rows, kv_heads, keys, dim]];
        let inputs = shapes.map(|shape| values(shape, device));
        let ranges = causal(queries, keys, device);
        let seen = Tensor::<2>::ones([queries, keys], device).tril((keys - queries) as i64);
        let bias = (seen - 1.0).mul_scalar(1e30).reshape([1, 1, queries, keys]);
        let scale = (dim as f64).powf(-0.5);
        let composed = |x: &[Tensor<4>]| {
            let folded = [rows, kv_heads, heads / kv_heads * queries, dim];
            let q = x[0].clone().swap_dims(1, 2).reshape(folded);
            let scores = q.matmul(x[1].clone().swap_dims(2, 3)).mul_scalar(scale);
            let bias = if x[0].is_autodiff() { bias.clone().autodiff() } else { bias.clone() };
            let weights = activation::softmax(scores.reshape([rows, heads, queries, keys]) + bias, 3);
            let out = weights.reshape([rows, kv_heads, heads / kv_heads * queries, keys]).matmul(x[2].clone());
            out.reshape([rows, heads, queries, dim]).swap_dims(1, 2)
        };
        let kernel = |x: &[Tensor<4>]| attention(x[0].clone(), x[1].clone(), x[2].clone(), ranges.clone(), scale);
        let name =
            format!("attention of {rows} x {queries} queries to {keys} keys, {heads} heads on {kv_heads} of {dim}");
        both(&name, device, &inputs, kernel, composed);
    }
}

fn main() {
    let device = DeviceSpec::from_env().and_then(|spec| spec.open()).expect("a device that `medtune devices` lists");
    norms(&device);
    losses(&device);
    attentions(&device);
}
