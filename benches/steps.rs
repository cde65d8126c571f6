//! Whole steps on the CPU: a decoder layer, a vision tower, a LoRA step, cached generation.
//!
//! `cargo bench --bench steps`; the model is that of `benches/train_step.rs`, the tower CLIP's ViT-B/16.

use std::{hint::black_box, time::Duration};

use burn::{
    module::Module,
    tensor::{Device, Distribution, Tensor},
};
use common::{ANSWERS, LENGTH, NEW_TOKENS, PROMPT, ROWS};
use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use medtune::{
    generate::{GenerateConfig, generate},
    kernel::pull_back::pull_back,
    nn::vit::{ClipVisionConfig, ClipVisionTransformer},
    vlm::{Batch, PaddingSide, Vlm},
    weights::init_random,
};

mod common;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn layer(criterion: &mut Criterion) {
    let device = Device::flex();
    let model = common::model(&device);
    let batch = Batch::collate(&common::rows(ROWS, LENGTH, 0), 0, PaddingSide::Right, 1);
    let context = model.context(&batch, &device);
    let x = Tensor::<3>::random([ROWS, LENGTH, 512], Distribution::Normal(0.0, 1.0), &device);
    let mut group = criterion.benchmark_group("decoder_layer");
    group.throughput(Throughput::Elements((ROWS * LENGTH) as u64));
    group.bench_function("forward", |b| b.iter(|| black_box(model.layer(0, x.clone(), &context, None))));
    group.bench_function("forward_backward", |b| {
        b.iter(|| {
            let y = model.layer(0, x.clone().autodiff().require_grad(), &context, None);
            black_box(pull_back(y, x.clone()))
        });
    });
    group.finish();
}

fn vision(criterion: &mut Criterion) {
    let device = Device::flex();
    let config = ClipVisionConfig { patch_size: 16, ..ClipVisionConfig::default() };
    let tower = init_random(ClipVisionTransformer::new(&config, &device), 1, 0.02).valid();
    let side = config.image_size;
    let pixels = Tensor::<4>::random([1, 3, side, side], Distribution::Normal(0.0, 1.0), &device);
    let mut group = criterion.benchmark_group("vision_tower");
    group.throughput(Throughput::Elements(1));
    group.bench_function("image", |b| b.iter(|| black_box(tower.forward(pixels.clone(), config.num_hidden_layers))));
    group.finish();
}

fn session(criterion: &mut Criterion) {
    common::with_session(common::model(&Device::flex()), |session| {
        let mut group = criterion.benchmark_group("lora_step");
        group.throughput(Throughput::Elements((ROWS * LENGTH) as u64));
        let rows = common::step_rows(0);
        group.bench_function("tokens", |b| b.iter(|| session.step(&rows, 1.0).expect("a finite loss")));
        group.finish();
        let config = GenerateConfig { max_new_tokens: NEW_TOKENS, batch_size: ANSWERS, ..GenerateConfig::default() };
        let prompts = common::rows(ANSWERS, PROMPT, 0);
        let mut group = criterion.benchmark_group("generation");
        group.throughput(Throughput::Elements((ANSWERS * NEW_TOKENS) as u64));
        group.bench_function("tokens", |b| {
            b.iter(|| generate(&session.model, &prompts, 0, &[], &config, 1, &Device::flex(), &mut |_, _| {}));
        });
        group.finish();
    });
}

criterion_group! {
    name = benches;
    config = Criterion::default().sample_size(10).measurement_time(Duration::from_secs(5));
    targets = layer, vision, session
}
criterion_main!(benches);
