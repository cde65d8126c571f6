//! Floating-point operations of a training step, by the usual convention: those of the matrix products that the result
//! needs, whatever is computed again to save memory.

use burn::module::Module;

use super::{TowerMode, TrainConfig};
use crate::{
    adapter::target::Coverage,
    nn::visit::named_params,
    vlm::{Batch, Tower, Vlm},
    weights::Part,
};

/// Operations of one forward and backward pass of `batch`.
///
/// A weight takes 2 a position on the way up and 2 on the way back, and 2 more if it is trained; an update of rank `r`
/// is trained. The head takes part at supervised positions, attention with half its square because it is causal, a
/// vision tower that is frozen on the way up only.
#[must_use]
pub fn flops<M: Vlm + Module>(model: &M, config: &TrainConfig, coverage: &Coverage, r: usize, batch: &Batch) -> f64 {
    let towers = model.towers();
    let (rows, length) = (batch.rows as f64, batch.length as f64);
    let tiles = batch.pixels.len() as f64;
    let positions = |part: Part| match part {
        Part::Vision => tiles * model.tile_patches() as f64,
        Part::Projector => tiles * model.tile_features() as f64,
        Part::Ends => batch.supervised() as f64,
        Part::Layer(_) => rows * length,
    };
    // Gradients reach no further down than to the lowest tower in which something is trained.
    let trains = |tower: &str| config.mode(tower) != TowerMode::Frozen;
    let passes = |part: Part| {
        let (tower, below) = match part {
            Part::Vision => ("vision", trains("vision")),
            Part::Projector => ("projector", trains("vision") || trains("projector")),
            _ => ("language", true),
        };
        2.0 + if below { 2.0 } else { 0.0 } + if config.mode(tower) == TowerMode::Full { 2.0 } else { 0.0 }
    };
    let params = named_params(model);
    let weights: f64 = params
        .iter()
        .filter(|p| p.linear_weight && !p.adapter)
        .map(|p| (Part::of(towers, &p.name), p.num_elements() as f64))
        .map(|(part, n)| n * positions(part) * passes(part))
        .sum();
    let updates: f64 = coverage
        .modules
        .iter()
        .map(|m| 6.0 * (r * (m.d_in + m.d_out)) as f64 * positions(Part::of(towers, &format!("{}.weight", m.name))))
        .sum();
    weights + updates + attention(model, &params, rows, length, tiles, trains("vision"))
}

/// Scores and their products with the values, of all layers.
fn attention<M: Vlm>(
    model: &M,
    params: &[crate::nn::visit::NamedParam],
    rows: f64,
    length: f64,
    tiles: f64,
    vision: bool,
) -> f64 {
    let width = |tower: &str| {
        let own = params.iter().filter(|p| p.linear_weight && !p.adapter);
        let own = own.filter(|p| Tower::of(model.towers(), &p.name).is_some_and(|t| t.name == tower));
        let numbered = own.filter(|p| p.name.split('.').any(|s| s == "0"));
        numbered.map(|p| p.shape[0]).min().unwrap_or(0) as f64
    };
    let blocks = |wanted: &str| {
        let numbers = params.iter().filter(|p| p.linear_weight).filter_map(|p| {
            let tower = Tower::of(model.towers(), &p.name).filter(|t| t.name == wanted)?;
            p.name.strip_prefix(tower.prefix)?.split('.').find_map(|s| s.parse::<usize>().ok())
        });
        numbers.max().map_or(0.0, |n| n as f64 + 1.0)
    };
    let patches = model.tile_patches() as f64;
    let language = 6.0 * rows * length * length * width("language") * model.num_layers() as f64;
    let passes = if vision { 12.0 } else { 4.0 };
    language + passes * tiles * patches * patches * width("vision") * blocks("vision")
}

#[cfg(test)]
mod tests {
    use burn::tensor::Device;

    use super::*;
    use crate::{
        adapter::{AdapterConfig, inject::sizes},
        models,
        vlm::{Encoded, PaddingSide},
    };

    #[test]
    fn a_text_step_of_seven_billion_parameters_takes_four_operations_a_weight_and_position() {
        let device = Device::flex();
        let (model, _) = (models::find("llava_med").unwrap().empty)("v1.5-7b", &device).unwrap();
        let config = TrainConfig { projector: TowerMode::Frozen, ..TrainConfig::default() };
        let adapter = AdapterConfig { r: 16, ..AdapterConfig::default() };
        let coverage = sizes(&model, &config, &adapter).unwrap().coverage;
        let n = 512;
        let row = Encoded {
            id: "row".into(),
            input_ids: vec![5; n],
            labels: vec![5; n],
            spans: Vec::new(),
            pixels: Vec::new(),
        };
        let batch = Batch::collate(&[row], 0, PaddingSide::Right, 1);
        let found = flops(&model, &config, &coverage, 16, &batch);
        // Layers and head of Mistral-7B have 7.11e9 weights, the update 41.9e6; attention adds 1.5 %.
        let expected = 4.0 * 7.11e9 * 512.0 + 6.0 * 41.9e6 * 512.0 + 6.0 * 512.0 * 512.0 * 4096.0 * 32.0;
        assert!((found / expected - 1.0).abs() < 0.01, "{found} {expected}");
    }
}
