//! Hangs updates on a built model and freezes everything that is not trained.

use std::collections::HashMap;

use burn::{
    module::{Module, ModuleMapper, Param, ParamId, Reparameterizer},
    tensor::{DType, Tensor},
};

use super::{
    AdapterConfig,
    lora::{Dropout, DropoutClock, Lora, LoraSpec},
    target::{Coverage, linears, select, tower_of},
};
use crate::{
    error::Result,
    nn::visit::{NamedParam, PathStack, named_params},
    train::{TowerMode, TrainConfig},
    vlm::{Tower, Vlm},
    weights::keeps_half,
};

/// Attaches updates to the modules of `coverage`; all other parameters keep their state. The updates share one clock.
#[must_use]
pub fn attach<M: Module>(model: M, coverage: &Coverage, config: &AdapterConfig, seed: u64) -> (M, DropoutClock) {
    let clock = DropoutClock::default();
    let specs: HashMap<ParamId, LoraSpec> = coverage
        .modules
        .iter()
        .map(|m| {
            let dropout = Dropout { rate: config.lora_dropout, seed, module: m.name.clone(), clock: clock.clone() };
            (m.id, LoraSpec { r: config.r, scale: config.lora_alpha / config.r as f64, dropout })
        })
        .collect();
    (attach_specs(model, specs), clock)
}

/// Attaches a new update to each weight that `specs` names.
#[must_use]
pub fn attach_specs<M: Module>(model: M, specs: HashMap<ParamId, LoraSpec>) -> M {
    model.apply_reparameterization(Attach { specs })
}

struct Attach {
    specs: HashMap<ParamId, LoraSpec>,
}

impl Reparameterizer for Attach {
    type Reparam = Lora;

    fn reparameterize<const D: usize>(
        &mut self,
        _path: &str,
        param: Param<Tensor<D>>,
    ) -> (Param<Tensor<D>>, Option<Lora>) {
        let lora = self.specs.remove(&param.id).map(|spec| {
            let shape = param.lazy_shape();
            Lora::init(&spec, shape[0], shape[1], &param.lazy_device())
        });
        (param, lora)
    }
}

/// A model ready for training.
#[derive(Debug)]
pub struct Prepared<M> {
    /// On the autodiff device; only what is trained tracks gradients.
    pub model: M,
    /// What the target patterns matched.
    pub coverage: Coverage,
    /// Decides which dropout masks the next forward pass uses.
    pub clock: DropoutClock,
}

/// Freezes, adapts or opens each tower of `model`, which is without autodiff, as `train` says.
///
/// # Errors
/// A target pattern cannot be understood or matches nothing.
pub fn prepare<M: Module + Vlm>(
    model: M,
    train: &TrainConfig,
    adapter: &AdapterConfig,
    seed: u64,
) -> Result<Prepared<M>> {
    let towers = model.towers();
    let coverage = targets(&model, train, adapter)?;
    let model = model.train();
    let model = model.map(&mut OpenTowers { path: PathStack::default(), towers, train });
    let (model, clock) = attach(model, &coverage, adapter, seed);
    Ok(Prepared { model, coverage, clock })
}

/// Sizes of a training, from shapes alone.
#[derive(Debug, Clone)]
pub struct Sizes {
    /// What the target patterns match.
    pub coverage: Coverage,
    /// Trained parameters.
    pub trained: usize,
    /// Parameters of the model.
    pub all: usize,
}

/// Counts what [`prepare`] would train, without allocating anything.
///
/// # Errors
/// A target pattern cannot be understood or matches nothing.
pub fn sizes<M: Module + Vlm>(model: &M, train: &TrainConfig, adapter: &AdapterConfig) -> Result<Sizes> {
    let towers = model.towers();
    let coverage = targets(model, train, adapter)?;
    let params = named_params(model);
    let full = params.iter().filter(|p| train.mode(tower_of(towers, &p.name)) == TowerMode::Full);
    let trained = coverage.parameters(adapter.r) + full.map(NamedParam::num_elements).sum::<usize>();
    Ok(Sizes { coverage, trained, all: params.iter().map(NamedParam::num_elements).sum() })
}

fn targets<M: Module + Vlm>(model: &M, train: &TrainConfig, adapter: &AdapterConfig) -> Result<Coverage> {
    let towers = model.towers();
    let has_lora = towers.iter().any(|t| train.mode(t.name) == TowerMode::Lora);
    let patterns: &[String] = if has_lora { &adapter.target_modules } else { &[] };
    select(patterns, &linears(model, towers), |tower| train.mode(tower) == TowerMode::Lora)
}

struct OpenTowers<'a> {
    path: PathStack,
    towers: &'static [Tower],
    train: &'a TrainConfig,
}

impl ModuleMapper for OpenTowers<'_> {
    fn enter_module(&mut self, name: &str, container: &str) {
        self.path.enter(name, container);
    }

    fn exit_module(&mut self, _name: &str, _container: &str) {
        self.path.exit();
    }

    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        let tower = tower_of(self.towers, &self.path.name());
        let trained = self.train.mode(tower) == TowerMode::Full;
        // Steps are smaller than the spacing of a half type.
        let half = trained && matches!(param.dtype(), DType::BF16 | DType::F16) && keeps_half(&param.lazy_device());
        // Tracked, the cast would be part of the graph instead of its start.
        let wide = |value: Tensor<D>| value.set_require_grad(false).cast(DType::F32);
        let param = if half { param.map(wide) } else { param };
        param.set_require_grad(trained)
    }
}
