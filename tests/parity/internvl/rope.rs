//! Rotary embeddings of the language model alone: scaling, sliding window, padding, caches.

use std::path::Path;

use burn::tensor::{Device, Int, Tensor, TensorData};
use medtune::{
    generate::Session,
    models::{
        AnyVlm, Compat,
        internvl::{InternVl, InternVlConfig, weights::load_dir},
    },
    nn::{attention::Columns, decoder::LayerCache},
    vlm::{Encoded, IGNORE, Vlm},
};
use serde::Deserialize;
use serde_json::{Map, Value};

use super::{
    files::{self, Tensors},
    forward::values,
};
use crate::parity::fixture::{self, Checks};

#[derive(Deserialize)]
struct Cases {
    cases: Map<String, Value>,
    attention_scaling: Option<f64>,
}

#[derive(Deserialize)]
struct Case {
    length: usize,
    overrides: Map<String, Value>,
    prefill: Option<usize>,
    reused_module: bool,
    position_ids: Option<String>,
}

/// Rows of token ids with their positions and mask, `[rows, length]` each.
struct Input {
    rows: usize,
    length: usize,
    ids: Vec<i32>,
    positions: Vec<i32>,
    mask: Vec<bool>,
}

pub(super) fn check(checks: &mut Checks) {
    let device = fixture::device();
    for (golden, checkpoint) in files::kinds() {
        let model = load_dir(&checkpoint, &Default::default(), &device).unwrap();
        check_cases(&golden, &model, &device, checks);
    }
}

fn check_cases(golden: &Path, model: &InternVl, device: &Device, checks: &mut Checks) {
    let expected = Tensors::open(&golden.join("rope.safetensors"));
    let cases: Cases = files::json(&golden.join("rope.json"));
    let mut previous = model.clone();
    for (name, case) in &cases.cases {
        let case: Case = serde_json::from_value(case.clone()).unwrap();
        let what = |part: &str| format!("{} {name}: {part}", golden.display());
        let config = overridden(model.config(), &case.overrides);
        let plain = model.clone().with_config(config.clone());
        let mixed = if case.reused_module {
            previous.clone()
        } else {
            plain.clone().with_compat(Compat { mixed_rotations: true, ..Compat::default() })
        };
        let input = input(name, &case, &expected);
        let wanted = expected.f32(&format!("{name}.logits_last2"));
        let last = expected.shape(&format!("{name}.logits_last2"))[1];
        let found = run(&mixed, &input, case.prefill, last, device);
        checks.close(&what("as the original"), &found, &wanted, 5e-4);
        // Without the quirks, a cached step is a recomputation, and nothing is left of earlier texts.
        let whole = run(&plain, &input, None, last, device);
        if case.position_ids.is_none() {
            let cached = cached(&plain, &input, case.prefill.unwrap_or(input.length / 2), device);
            let expected = run(&plain, &input, None, 1, device);
            checks.close(&what("cached and recomputed"), &cached, &expected, 5e-4);
        }
        if case.prefill.is_none() && !case.reused_module && case.position_ids.is_none() {
            checks.close(&what("without quirks"), &whole, &wanted, 5e-4);
        }
        previous = mixed;
    }
    check_tables(&cases, &expected, model, device, checks);
}

fn overridden(config: &InternVlConfig, overrides: &Map<String, Value>) -> InternVlConfig {
    let mut value = serde_json::to_value(config).unwrap();
    for (key, v) in overrides {
        value["llm_config"][key] = v.clone();
    }
    serde_json::from_value(value).unwrap()
}

fn input(name: &str, case: &Case, tensors: &Tensors) -> Input {
    let [rows, all] = tensors.shape("input_ids")[..] else { panic!("input_ids is a matrix") };
    let ids = tensors.ints("input_ids");
    let ids = ids.chunks(all).flat_map(|row| row[..case.length].to_vec()).collect();
    let mut positions: Vec<i32> = (0..case.length as i32).collect::<Vec<_>>().repeat(rows);
    let mut mask = vec![true; rows * case.length];
    // Tensors `<prefix>.attention_mask` and `<prefix>.position_ids` belong to the cases with that prefix.
    for key in tensors.names() {
        let Some((prefix, part)) = key.split_once('.') else { continue };
        if name.starts_with(prefix) && part == "attention_mask" {
            mask = tensors.ints(&key).iter().map(|m| *m == 1).collect();
        } else if name.starts_with(prefix) && part == "position_ids" {
            positions = tensors.ints(&key);
        }
    }
    for (i, real) in mask.iter().enumerate() {
        if !real {
            positions[i] = 0;
        }
    }
    // `row 0: 0..39, row 1: 50..89 (a remark)`
    if let Some(text) = &case.position_ids {
        let pattern = regex::Regex::new(r"row (\d+): (\d+)\.\.(\d+)").unwrap();
        for found in pattern.captures_iter(text) {
            let number = |i: usize| found[i].parse::<usize>().unwrap();
            let range: Vec<i32> = (number(2) as i32..=number(3) as i32).collect();
            positions[number(1) * case.length..][..case.length].copy_from_slice(&range);
        }
    }
    Input { rows, length: case.length, ids, positions, mask }
}

/// Logits of the last `last` positions, `[rows, last, vocab]`; after `prefill` positions one at a time from a cache.
fn run(model: &InternVl, input: &Input, prefill: Option<usize>, last: usize, device: &Device) -> Vec<f32> {
    let length = input.length;
    let first = prefill.unwrap_or(length);
    let mut caches: Vec<LayerCache> = (0..model.num_layers()).map(|_| LayerCache::new(length)).collect();
    let mut logits: Vec<Tensor<3>> = Vec::new();
    let mut start = 0;
    while start < length {
        let end = if start == 0 { first } else { start + 1 };
        let columns =
            |values: &[i32]| -> Vec<i32> { values.chunks(length).flat_map(|row| row[start..end].to_vec()).collect() };
        let context = model.columns_context(
            &Columns {
                rows: input.rows,
                length: end - start,
                positions: columns(&input.positions),
                keys: end,
                start,
                prefill: first,
                mask: input.mask.chunks(length).flat_map(|row| row[..end].to_vec()).collect(),
                segments: None,
            },
            device,
        );
        let ids = TensorData::new(columns(&input.ids), [input.rows, end - start]);
        let mut x = model.embed_tokens(Tensor::<2, Int>::from_data(ids, device));
        for (i, cache) in caches.iter_mut().enumerate() {
            x = model.layer(i, x, &context, prefill.map(|_| cache));
        }
        let [rows, length, hidden] = x.dims();
        let all = model.logits(model.final_norm(x).reshape([rows * length, hidden]));
        let vocab = all.dims()[1];
        logits.push(all.reshape([rows, length, vocab]));
        start = end;
    }
    values(Tensor::cat(logits, 1).narrow(1, length - last, last))
}

/// Logits of the last position of each row, read from the position `prefill` on one token at a time.
fn cached(model: &InternVl, input: &Input, prefill: usize, device: &Device) -> Vec<f32> {
    let model = AnyVlm::InternVl(model.clone());
    let row = |row: usize| -> Vec<i32> {
        let cells = row * input.length..(row + 1) * input.length;
        cells.filter(|cell| input.mask[*cell]).map(|cell| input.ids[cell]).collect()
    };
    let rows: Vec<Vec<i32>> = (0..input.rows).map(row).collect();
    // Rows end together; a short one starts later.
    let steps = (input.length - prefill).min(rows.iter().map(|r| r.len() - 1).min().unwrap());
    let prompts: Vec<Encoded> = rows
        .iter()
        .map(|ids| Encoded {
            id: String::new(),
            input_ids: ids[..ids.len() - steps].to_vec(),
            labels: vec![IGNORE; ids.len() - steps],
            spans: Vec::new(),
            pixels: Vec::new(),
        })
        .collect();
    let (mut session, mut logits) = Session::start(&model, &prompts, 0, steps, device).unwrap();
    for step in 0..steps {
        let tokens: Vec<i32> = rows.iter().map(|ids| ids[ids.len() - steps + step]).collect();
        logits = session.step(&tokens).unwrap();
    }
    logits.concat()
}

/// Tensors `<prefix>_cos_len<n>` are the tables of the case `<prefix>_len<n>`, both halves of a head written out.
fn check_tables(cases: &Cases, expected: &Tensors, model: &InternVl, device: &Device, checks: &mut Checks) {
    let mut scales = Vec::new();
    for key in expected.names() {
        let Some((kind, (prefix, length))) =
            ["cos", "sin"].into_iter().find_map(|k| Some((k, key.split_once(&format!("_{k}_len"))?)))
        else {
            continue;
        };
        let case: Case = serde_json::from_value(cases.cases[&format!("{prefix}_len{length}")].clone()).unwrap();
        let config = overridden(model.config(), &case.overrides);
        scales.push(config.llm_config.rotation_scale());
        let model = model.clone().with_config(config);
        let columns = Columns {
            rows: 1,
            length: case.length,
            positions: (0..case.length as i32).collect(),
            keys: case.length,
            start: 0,
            prefill: case.length,
            mask: vec![true; case.length],
            segments: None,
        };
        let rope = model.columns_context(&columns, device).rope;
        let table = if kind == "cos" { rope.cos } else { rope.sin };
        let both = Tensor::cat(vec![table.clone(), table], 3);
        checks.close(&key, &values(both), &expected.f32(&key), 1e-5);
    }
    if let Some(scale) = cases.attention_scaling {
        checks.equal("a scale was stored with tables", scales.is_empty(), false);
        for found in scales {
            checks.close("rotation scale", &[found as f32], &[scale as f32], 1e-6);
        }
    }
}
