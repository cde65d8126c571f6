//! Whole steps: a decoder layer, a vision tower, a LoRA step, cached generation.
//!
//! `cargo bench --bench steps`; the model is that of `benches/train_step.rs`, the tower CLIP's ViT-B/16.
//! `MEDTUNE_DEVICE=cuda` (of a build with that feature) measures another device.

#![expect(clippy::print_stdout, reason = "a benchmark says how much memory it took")]

use std::time::Duration;

use burn::{
    module::Module,
    tensor::{Distribution, Tensor},
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
use timing::{device, print_memory, read, timed};

mod common;
mod timing;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn layer(criterion: &mut Criterion) {
    let device = device();
    let model = common::model(&device);
    let batch = Batch::collate(&common::rows(ROWS, LENGTH, 0), 0, PaddingSide::Right, 1);
    let context = model.context(&batch, &device);
    let x = Tensor::<3>::random([ROWS, LENGTH, 512], Distribution::Normal(0.0, 1.0), &device);
    let mut group = criterion.benchmark_group("decoder_layer");
    group.throughput(Throughput::Elements((ROWS * LENGTH) as u64));
    group.bench_function("forward", |b| timed(b, &device, || read(model.layer(0, x.clone(), &context, None))));
    group.bench_function("forward_backward", |b| {
        timed(b, &device, || {
            let input = x.clone().autodiff().require_grad();
            let mut gradients = pull_back(model.layer(0, input.clone(), &context, None), x.clone());
            read(input.grad_remove(&mut gradients).expect("the layer depends on its input"));
        });
    });
    group.finish();
    print_memory("the decoder layer");
}

fn vision(criterion: &mut Criterion) {
    let device = device();
    let config = ClipVisionConfig { patch_size: 16, ..ClipVisionConfig::default() };
    let tower = init_random(ClipVisionTransformer::new(&config, &device), 1, 0.02).valid();
    let side = config.image_size;
    let pixels = Tensor::<4>::random([1, 3, side, side], Distribution::Normal(0.0, 1.0), &device);
    let mut group = criterion.benchmark_group("vision_tower");
    group.throughput(Throughput::Elements(1));
    group.bench_function("image", |b| {
        timed(b, &device, || read(tower.forward(pixels.clone(), config.num_hidden_layers)));
    });
    group.finish();
    print_memory("the vision tower");
}

fn session(criterion: &mut Criterion) {
    let device = device();
    common::with_session(common::model(&device), |session| {
        let mut group = criterion.benchmark_group("lora_step");
        group.throughput(Throughput::Elements((ROWS * LENGTH) as u64));
        let rows = common::step_rows(0);
        // a step ends with its loss on the host
        group
            .bench_function("tokens", |b| timed(b, &device, || drop(session.step(&rows, 1.0).expect("a finite loss"))));
        group.finish();
        print_memory("the LoRA step");
        let config = GenerateConfig { max_new_tokens: NEW_TOKENS, batch_size: ANSWERS, ..GenerateConfig::default() };
        let prompts = common::rows(ANSWERS, PROMPT, 0);
        let mut group = criterion.benchmark_group("generation");
        group.throughput(Throughput::Elements((ANSWERS * NEW_TOKENS) as u64));
        group.bench_function("tokens", |b| {
            timed(b, &device, || {
                let answers = generate(&session.model, &prompts, 0, &[], &config, 1, &device, &mut |_, _| {});
                assert!(answers.expect("finite logits").iter().all(|a| a.len() == NEW_TOKENS));
            });
        });
        group.finish();
        print_memory("generation");
    });
}

criterion_group! {
    name = benches;
    config = Criterion::default().sample_size(10).measurement_time(Duration::from_secs(5));
    targets = layer, vision, session
}
criterion_main!(benches);
