//! Vision tower, position tables, resampler.

use burn::{
    module::{Module, ModuleMapper, Param},
    tensor::{Device, Int, Tensor, TensorData},
};
use medtune::{
    image::Rgb8,
    models::qwen_vl::{QwenVl, processor::pixels},
    nn::{
        interpolate::bicubic_table,
        linear::linear_forward,
        resampler::{Resampler, sincos_table},
    },
    progress::Progress,
    vlm::Vlm,
    weights::{Checkpoint, load},
};

use super::{Family, floats};
use crate::parity::fixture::{self, Checks, Tensors, json};

const VALUES: f32 = 1e-5;
const NORMED: f32 = 5e-5;
const SUMS: f32 = 5e-4;
const TABLES: f32 = 5e-6;

pub(super) fn check(checks: &mut Checks) {
    let family = Family::open();
    let tensors = Tensors::open(&family.golden("vision.safetensors"));
    let plain = fixture::device();
    // The composed attention runs with autodiff, the fused one without.
    for device in [plain.clone(), plain.clone().autodiff()] {
        let model = family.model(&device);
        let input = input(&family, &tensors, &device);
        let case = Case { tensors: &tensors, patches: model.vision(input.clone()), input, model };
        for name in tensors.names() {
            case.compare(checks, &name);
        }
    }
    component(checks, &family, &plain);
    formats(checks, &family, &plain);
}

fn input(family: &Family, tensors: &Tensors, device: &Device) -> Tensor<4> {
    let name = "input.resized_u8";
    let shape = tensors.shape(name);
    let (tiles, side) = (shape[0], shape[1]);
    let data: Vec<f32> = tensors
        .bytes(name)
        .chunks(side * side * 3)
        .flat_map(|data| pixels(&Rgb8 { width: side, height: side, data: data.to_vec() }, side).data)
        .collect();
    assert_eq!(side, family.config.visual.image_size);
    Tensor::from_data(TensorData::new(data, [tiles, 3, side, side]), device)
}

struct Case<'a> {
    tensors: &'a Tensors,
    model: QwenVl,
    input: Tensor<4>,
    /// After all blocks.
    patches: Tensor<3>,
}

impl Case<'_> {
    fn compare(&self, checks: &mut Checks, name: &str) {
        let visual = &self.model.transformer.visual;
        let pool = &visual.attn_pool;
        let (found, tolerance) = match name.split_once('.') {
            _ if name == "input.resized_u8" || name == "query_rows" => return,
            None => match name {
                "patch_embed" => (floats(visual.conv1.forward(self.input.clone())), VALUES),
                "with_pos" => (floats(visual.with_positions(visual.conv1.forward(self.input.clone()))), VALUES),
                "ln_pre" => (floats(visual.embed(self.input.clone())), VALUES),
                "ln_post_rows" => (self.rows(visual.ln_post.forward(pool.forward(self.patches.clone()))), NORMED),
                "output_rows" => (self.rows(self.output()), VALUES),
                "output_row_sums" => (floats(self.output().sum_dim(2)), SUMS),
                "output_col_sums" => (floats(self.output().sum_dim(1)), SUMS),
                _ => panic!("unknown tensor {name}"),
            },
            Some(("pool", "kv_proj")) => {
                let kv_proj = pool.kv_proj.as_ref().expect("the fixture has one");
                (floats(linear_forward(kv_proj, self.patches.clone())), VALUES)
            }
            Some(("pool", "ln_kv")) => (floats(pool.keys(self.patches.clone())), NORMED),
            Some(("pool", "ln_q_rows")) => (self.rows(pool.ln_q.forward(pool.query.val()).unsqueeze()), NORMED),
            Some(("pool", "out_rows")) => (self.rows(pool.forward(self.patches.clone())), VALUES),
            Some(("block", rest)) => (self.block(rest), VALUES),
            Some(("pos_interp", rest)) => (self.table(rest), TABLES),
            Some(("sincos", rest)) => (sincos(rest, &self.tensors.shape(name)), TABLES),
            Some((image, "output_rows")) => (self.image(image), VALUES),
            _ => panic!("unknown tensor {name}"),
        };
        checks.close(&format!("vision {name}"), &found, &self.tensors.f32(name), tolerance);
    }

    fn output(&self) -> Tensor<3> {
        self.model.project(self.patches.clone())
    }

    /// The rows of `[tiles, queries, width]` that the fixture keeps.
    fn rows(&self, x: Tensor<3>) -> Vec<f32> {
        let rows = self.tensors.ints("query_rows");
        let rows = Tensor::<1, Int>::from_data(TensorData::new(rows.clone(), [rows.len()]), &x.device());
        floats(x.select(1, rows))
    }

    fn block(&self, rest: &str) -> Vec<f32> {
        let blocks = &self.model.transformer.visual.transformer.resblocks;
        let (index, part) = rest.split_once('.').unwrap_or((rest, ""));
        let index: usize = index.parse().unwrap();
        let start = self.model.transformer.visual.embed(self.input.clone());
        let before = blocks[..index].iter().fold(start, |x, b| b.forward(x));
        match part {
            "" => floats(blocks[index].forward(before)),
            "attn_out" => floats(blocks[index].attention(before)),
            _ => panic!("unknown part {rest}"),
        }
    }

    /// First six channels; every fourth row of the resampler's table from a grid of 16 on.
    fn table(&self, rest: &str) -> Vec<f32> {
        let visual = &self.model.transformer.visual;
        let (table, grid) = rest.split_once('.').unwrap();
        let grid: usize = grid.parse().unwrap();
        let (table, step) = match table {
            "positional_embedding" => (visual.positional_embedding.val(), 1),
            "pos_embed" => (visual.attn_pool.pos_embed.val(), if grid >= 16 { 4 } else { 1 }),
            _ => panic!("unknown table {rest}"),
        };
        let width = table.dims()[1];
        let values = floats(bicubic_table(table, grid));
        values.chunks(width).step_by(step).flat_map(|row| row[..6].to_vec()).collect()
    }

    fn image(&self, name: &str) -> Vec<f32> {
        let digits = name.find(|c: char| c.is_ascii_digit()).expect("the side of an image");
        let side: usize = name[digits..].parse().unwrap();
        let device = self.input.device();
        let pixels = match &name[..digits] {
            "zeros" => Tensor::zeros([1, 3, side, side], &device),
            "synth" => Tensor::from_data(TensorData::new(synthetic(side), [1, 3, side, side]), &device),
            _ => panic!("unknown image {name}"),
        };
        self.rows(self.model.project(self.model.vision(pixels)))
    }
}

/// The fixture's formula.
fn synthetic(side: usize) -> Vec<f32> {
    let value = |c: usize, i: usize, j: usize| {
        let (c, i, j) = (c as f64, i as f64, j as f64);
        (1.5 * (0.11 * i + 0.23 * j + 0.9 * c).sin() + 0.3 * (0.031 * i * (c + 1.0)).cos()) as f32
    };
    (0..3).flat_map(|c| (0..side * side).map(move |p| value(c, p / side, p % side))).collect()
}

/// A sine-cosine table of which only every so many rows and columns are kept.
fn sincos(rest: &str, shape: &[usize]) -> Vec<f32> {
    let (width, side) = rest.split_once('.').unwrap();
    let (width, side): (usize, usize) = (width.parse().unwrap(), side.parse().unwrap());
    let step = |all: usize, kept: usize| (1..=all).find(|step| all.div_ceil(*step) == kept).unwrap();
    let (down, across) = (step(side * side, shape[0]), step(width, shape[1]));
    let values = floats(sincos_table(width, side, &fixture::device()));
    values.chunks(width).step_by(down).flat_map(|row| row.iter().step_by(across).copied().collect::<Vec<_>>()).collect()
}

/// A resampler of its own, with several heads.
fn component(checks: &mut Checks, family: &Family, device: &Device) {
    let shape = json(&family.golden("resampler_component.json"));
    let size = |key: &str| shape[key].as_u64().unwrap() as usize;
    let path = family.golden("resampler_component.safetensors");
    let mut weights = Checkpoint::open(&path).unwrap();
    weights.retain(|name| name.starts_with("weight."));
    weights.rename(|name| name.trim_start_matches("weight.").to_string());
    let empty = Resampler::new(size("grid").pow(2), size("embed_dim"), size("kv_dim"), size("heads"), 1e-6, device);
    let resampler = load(empty, &weights, burn::tensor::FloatDType::F32, Progress::Silent).unwrap();
    let tensors = Tensors::open(&path);
    let input = TensorData::new(tensors.f32("input"), tensors.shape("input"));
    let found = floats(resampler.forward(Tensor::from_data(input, device)));
    checks.close("resampler component", &found, &tensors.f32("output"), NORMED);
}

/// PyTorch shards and safetensors hold the same weights.
fn formats(checks: &mut Checks, family: &Family, device: &Device) {
    let other = family.root.join("checkpoint_safetensors");
    let other = medtune::models::qwen_vl::weights::load_dir(&other, &Default::default(), device).unwrap();
    let (pickled, other) = (values(family.model(device)), values(other));
    checks.equal("number of tensors", pickled.len(), other.len());
    for (i, (a, b)) in pickled.iter().zip(&other).enumerate() {
        checks.equal(&format!("tensor {i} of both formats"), a == b, true);
    }
}

fn values(model: QwenVl) -> Vec<Vec<f32>> {
    struct Values(Vec<Vec<f32>>);
    impl ModuleMapper for Values {
        fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
            self.0.push(floats(param.val()));
            param
        }
    }
    let mut values = Values(Vec::new());
    let _ = model.map(&mut values);
    values.0
}
