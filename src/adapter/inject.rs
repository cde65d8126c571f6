//! Hangs updates on a built model and freezes everything that is not trained.

use std::collections::{BTreeSet, HashMap};

use burn::{
    module::{Module, ModuleMapper, Param, ParamId, Reparameterizer},
    tensor::{DType, Tensor},
};

use super::{
    AdapterConfig, BiasMode,
    attachment::{Attachment, Folding},
    decompose, in_saved,
    lora::{Dropout, DropoutClock, Lora, LoraSpec},
    peft,
    quantized::{Packing, matrix, same},
    target::{Coverage, Limits, linears, select_within, tower_of},
};
use crate::{
    error::{Error, Kind, Result},
    nn::visit::{NamedParam, PathStack, named_params},
    train::{TowerMode, TrainConfig},
    vlm::{Tower, Vlm},
    weights::keeps_half,
};

/// Attaches updates to the modules of `coverage`; all other parameters keep their state. The updates share one clock.
///
/// # Errors
/// The patterns of `config` contradict each other, or a weight is too large for its start.
pub fn attach<M: Module>(
    model: M,
    coverage: &Coverage,
    config: &AdapterConfig,
    seed: u64,
    packing: Packing,
) -> Result<(M, DropoutClock)> {
    let clock = DropoutClock::default();
    let mut specs = HashMap::new();
    for m in &coverage.modules {
        let smaller = m.d_in.min(m.d_out);
        if config.init_lora_weights.decomposes_all() && smaller > decompose::EXACT {
            return Err(Error::new(Kind::Config, "a weight is too large for all its singular vectors")
                .at(&m.name)
                .expected(format!("a side of at most {}", decompose::EXACT))
                .found(smaller)
                .help("adapter.init_lora_weights = \"pissa_niter_16\" finds the leading ones"));
        }
        specs.insert(m.id, spec(config, &m.name, seed, &clock)?);
    }
    Ok((attach_specs(model, specs, packing), clock))
}

/// The update of `module` as `config` describes it.
///
/// # Errors
/// The patterns contradict each other.
pub fn spec(config: &AdapterConfig, module: &str, seed: u64, clock: &DropoutClock) -> Result<LoraSpec> {
    let (r, scale) = config.rank_and_scale(module)?;
    let dropout = Dropout { rate: config.lora_dropout, seed, module: module.into(), clock: clock.clone() };
    Ok(LoraSpec { r, scale, init: config.init_lora_weights.clone(), use_dora: config.use_dora, dropout })
}

/// Attaches a new update to each weight that `specs` names, and packs those that `packing` names.
#[must_use]
pub fn attach_specs<M: Module>(model: M, specs: HashMap<ParamId, LoraSpec>, packing: Packing) -> M {
    model.apply_reparameterization(Attach { specs, packing, folding: Folding::default() })
}

struct Attach {
    specs: HashMap<ParamId, LoraSpec>,
    packing: Packing,
    folding: Folding,
}

impl Reparameterizer for Attach {
    type Reparam = Attachment;

    fn reparameterize<const D: usize>(
        &mut self,
        _path: &str,
        param: Param<Tensor<D>>,
    ) -> (Param<Tensor<D>>, Option<Attachment>) {
        let packed = self.packing.pack(&param);
        let spec = self.specs.remove(&param.id);
        if spec.is_none() && packed.is_none() {
            return (param, None);
        }
        let (shape, device) = (param.lazy_shape(), param.lazy_device());
        let lora = spec.map(|spec| {
            let plain = device.clone().without_autodiff();
            let weight = || match &packed {
                Some(packed) => packed.dense(&plain),
                None => matrix(param.base().without_autodiff()),
            };
            Lora::init(&spec, shape[0], shape[1], &device, weight)
        });
        let param = match &packed {
            // One zero stands for all values.
            Some(_) => {
                let place = Tensor::<2>::zeros([1, 1], (&device, DType::F32)).expand([shape[0], shape[1]]);
                param.map(|_| same(place))
            }
            None => param,
        };
        (param, Some(Attachment { lora, packed, folding: self.folding.clone() }))
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
/// A target pattern cannot be understood or matches nothing, or an adapter that is continued does not fit.
pub fn prepare<M: Module + Vlm>(
    model: M,
    train: &TrainConfig,
    adapter: &AdapterConfig,
    seed: u64,
) -> Result<Prepared<M>> {
    let adapter = &peft::resolved(adapter)?;
    let towers = model.towers();
    let coverage = targets(&model, train, adapter)?;
    let opened = Opened::new(&model, train, adapter, &coverage)?;
    let trains = |name: &str| opened.trains(towers, name);
    let packing = Packing::of(&model, adapter.quantization, trains);
    let (model, clock) = match &adapter.adapter_name_or_path {
        None => {
            let model = model.train().map(&mut opened.mapper(towers));
            attach(model, &coverage, adapter, seed, packing)?
        }
        Some(dir) => {
            let (model, clock) = peft::load_to_train(model, dir, adapter, seed, trains, packing)?;
            (model.train().map(&mut opened.mapper(towers)), clock)
        }
    };
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
    /// Which weights are packed.
    pub packing: Packing,
}

/// Counts what [`prepare`] would train, without allocating anything.
///
/// # Errors
/// A target pattern cannot be understood or matches nothing.
pub fn sizes<M: Module + Vlm>(model: &M, train: &TrainConfig, adapter: &AdapterConfig) -> Result<Sizes> {
    let adapter = &peft::resolved(adapter)?;
    let towers = model.towers();
    let coverage = targets(model, train, adapter)?;
    let opened = Opened::new(model, train, adapter, &coverage)?;
    let params = named_params(model);
    let full = params.iter().filter(|p| opened.trains(towers, &p.name));
    let trained = coverage.parameters(adapter)? + full.map(NamedParam::num_elements).sum::<usize>();
    let packing = Packing::of(model, adapter.quantization, |name| opened.trains(towers, name));
    Ok(Sizes { trained, all: params.iter().map(NamedParam::num_elements).sum(), packing, coverage })
}

fn targets<M: Module + Vlm>(model: &M, train: &TrainConfig, adapter: &AdapterConfig) -> Result<Coverage> {
    let towers = model.towers();
    let modules = linears(model, towers);
    let has_lora = |tower: &str| train.mode(tower) == TowerMode::Lora;
    let coverage = match &adapter.adapter_name_or_path {
        Some(dir) => peft::coverage(dir, &modules, towers, has_lora)?,
        None => {
            let any = towers.iter().any(|t| has_lora(t.name));
            let patterns: &[String] = if any { &adapter.target_modules } else { &[] };
            let limits = if any { Limits::of(adapter) } else { Limits::default() };
            select_within(patterns, limits, &modules, has_lora)?
        }
    };
    let unused = |key: &str, fits: &dyn Fn(&str) -> bool| {
        let hit = coverage.modules.is_empty() || coverage.modules.iter().any(|m| fits(&m.name));
        let error = || Error::new(Kind::Config, "a key of a pattern fits no adapted module").at(key.to_string());
        if hit { Ok(()) } else { Err(error()) }
    };
    for key in adapter.rank_pattern.keys() {
        unused(&format!("adapter.rank_pattern.{key}"), &|m| super::fits_end(key, m))?;
    }
    for key in adapter.alpha_pattern.keys() {
        unused(&format!("adapter.alpha_pattern.{key}"), &|m| super::fits_end(key, m))?;
    }
    Ok(coverage)
}

/// Which parameters of the model itself are trained.
struct Opened<'a> {
    train: &'a TrainConfig,
    adapter: &'a AdapterConfig,
    adapted: BTreeSet<String>,
}

impl<'a> Opened<'a> {
    fn new<M: Module + Vlm>(
        model: &M,
        train: &'a TrainConfig,
        adapter: &'a AdapterConfig,
        coverage: &Coverage,
    ) -> Result<Self> {
        let adapted = coverage.modules.iter().map(|m| m.name.clone()).collect();
        let opened = Self { train, adapter, adapted };
        let names: Vec<String> = named_params(model).into_iter().map(|p| p.name).collect();
        opened.check(model.towers(), &names)?;
        Ok(opened)
    }

    /// Every wish is granted somewhere, and where it can be.
    fn check(&self, towers: &'static [Tower], names: &[String]) -> Result<()> {
        for module in &self.adapter.modules_to_save {
            let at = format!("adapter.modules_to_save = \"{module}\"");
            let Some(name) = names.iter().find(|n| in_saved(n, module)) else {
                return Err(Error::new(Kind::Config, "a module to save is not in the model").at(at));
            };
            let open = |n: &String| self.train.mode(tower_of(towers, n)) != TowerMode::Frozen;
            if !names.iter().any(|n| in_saved(n, module) && open(n)) {
                let tower = tower_of(towers, name);
                return Err(Error::new(Kind::Config, "a module to save lies in a tower that is frozen")
                    .at(at)
                    .found(format!("{name}, in the {tower} tower"))
                    .help(format!("set train.{tower} = \"lora\"")));
            }
        }
        let biases = self.adapter.bias == BiasMode::None
            || self.adapted.is_empty()
            || names.iter().any(|n| self.bias(towers, n));
        if biases {
            return Ok(());
        }
        Err(Error::new(Kind::Config, "the adapted modules have no bias to train")
            .at("adapter.bias")
            .help("leave adapter.bias out; Mistral and LLaMA layers have none"))
    }

    fn bias(&self, towers: &'static [Tower], name: &str) -> bool {
        self.train.mode(tower_of(towers, name)) == TowerMode::Lora
            && self.adapter.trains_bias(name, |module| self.adapted.contains(module))
    }

    fn trains(&self, towers: &'static [Tower], name: &str) -> bool {
        match self.train.mode(tower_of(towers, name)) {
            TowerMode::Frozen => false,
            TowerMode::Lora => self.adapter.saves(name) || self.bias(towers, name),
            TowerMode::Full => true,
        }
    }

    fn mapper(&'a self, towers: &'static [Tower]) -> Open<'a> {
        Open { path: PathStack::default(), towers, opened: self }
    }
}

struct Open<'a> {
    path: PathStack,
    towers: &'static [Tower],
    opened: &'a Opened<'a>,
}

impl ModuleMapper for Open<'_> {
    fn enter_module(&mut self, name: &str, container: &str) {
        self.path.enter(name, container);
    }

    fn exit_module(&mut self, _name: &str, _container: &str) {
        self.path.exit();
    }

    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        if self.path.is_adapter() {
            return param.set_require_grad(true);
        }
        let trained = self.opened.trains(self.towers, &self.path.name());
        // Steps are smaller than the spacing of a half type.
        let half = trained && matches!(param.dtype(), DType::BF16 | DType::F16) && keeps_half(&param.lazy_device());
        // Tracked, the cast would be part of the graph instead of its start.
        let wide = |value: Tensor<D>| value.set_require_grad(false).cast(DType::F32);
        let param = if half { param.map(wide) } else { param };
        param.set_require_grad(trained)
    }
}
