//! Text metrics in pairs per second and the encoder of BERTScore in tokens per second, on the CPU.
//!
//! `cargo bench --bench metrics`; `benches/peers/metrics.py` times the Python originals on the same texts.
//! `MEDTUNE_BENCH_PAIRS=FILE` takes the pairs from a JSON-lines file with `hypothesis` and `reference`.

use std::{hint::black_box, time::Duration};

use burn::tensor::{Device, Int, Tensor, TensorData};
use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use medtune::{
    metric::text::{Pair, TEXT_METRICS, TextMetricOptions},
    nn::bert::{Bert, BertConfig},
    weights::init_random,
};
use serde_json::Value;

/// Texts encoded at once and tokens of each: a batch of answers of usual length.
const ROWS: usize = 16;
const LENGTH: usize = 64;

fn text_metrics(criterion: &mut Criterion) {
    let file = std::env::var("MEDTUNE_BENCH_PAIRS")
        .unwrap_or_else(|_| concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/metrics/meteor.jsonl").into());
    let text = std::fs::read_to_string(&file).expect("a file of pairs");
    let rows: Vec<Value> = text.lines().map(|l| serde_json::from_str(l).expect("a JSON object a line")).collect();
    let field = |row: &'_ Value, key: &str| row[key].as_str().expect("a text").to_string();
    let texts: Vec<(String, String)> = rows.iter().map(|r| (field(r, "hypothesis"), field(r, "reference"))).collect();
    let pairs: Vec<Pair<'_>> = texts.iter().map(|(answer, reference)| Pair { answer, reference }).collect();
    let options = TextMetricOptions::new(Device::flex());
    let mut group = criterion.benchmark_group("pairs");
    group.throughput(Throughput::Elements(pairs.len() as u64));
    for def in TEXT_METRICS.iter().filter(|m| m.key != "bertscore") {
        let metric = (def.open)(&options).expect("needs no files");
        group.bench_function(def.key, |b| b.iter(|| black_box(metric.score_pairs(&pairs))));
    }
    group.finish();
}

/// The first 17 layers of roberta-large, random weights.
fn encoder(criterion: &mut Criterion) {
    let device = Device::flex();
    let config = BertConfig::roberta_large();
    let model = init_random(Bert::new(&config, 17, &device), 1, 0.02);
    let row: Vec<i32> = (0..LENGTH).map(|i| 4 + (i * 7919 % 50_000) as i32).collect();
    let table = |row: &[i32]| Tensor::<2, Int>::from_data(TensorData::new(row.repeat(ROWS), [ROWS, LENGTH]), &device);
    let (ids, positions) = (table(&row), table(&config.positions(&row)));
    let mut group = criterion.benchmark_group("tokens");
    group.throughput(Throughput::Elements((ROWS * LENGTH) as u64));
    group.sample_size(10).measurement_time(Duration::from_secs(20));
    group.bench_function("roberta_large_17", |b| {
        b.iter(|| black_box(model.forward(ids.clone(), positions.clone(), &[LENGTH; ROWS]).into_data()));
    });
    group.finish();
}

criterion_group! {
    name = benches;
    config = Criterion::default().sample_size(20).measurement_time(Duration::from_secs(3));
    targets = text_metrics, encoder
}
criterion_main!(benches);
