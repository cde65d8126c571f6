//! How much memory a training needs, from shapes alone.
//!
//! Something is there all the time: the program, weights, what is trained with its optimizer, and what is remembered of
//! rows and images. On top comes the largest of a few moments: the vision tower, the loss, the backward pass of a decoder
//! layer, the update. Their sizes follow from what the passes keep; the few factors that no shape tells were measured
//! (`benches/RESULTS.md`).

use std::collections::BTreeMap;

use burn::module::Module;
use serde::Serialize;

use super::{
    TowerMode, TrainConfig, config::Recompute, features::FEATURE_BYTES, loss, step::activation_bytes,
    trainer::ACTIVATION_BYTES,
};
use crate::{
    adapter::{
        AdapterConfig,
        inject::{Sizes, sizes},
        peft,
        target::tower_of,
    },
    error::Result,
    kernel::quant::PANEL,
    loader,
    nn::{
        attention::QUERY_CHUNK,
        visit::{NamedParam, named_params},
    },
    vlm::{Tower, Vlm},
    weights::Part,
};

/// Bytes of what is trained, and of activations on the CPU.
const F32: u64 = 4;

/// The program before it has loaded anything, with its threads: measured.
const PROGRAM: u64 = 42_000_000;

/// What the allocator holds back of freed blocks, at most, and as a share of the largest moment: measured.
const HELD_BACK: (f64, f64) = (33e6, 2.7);

/// What a CUDA context takes beside the tensors; not measured.
const CONTEXT: u64 = 600_000_000;

/// Tensors as wide as inputs and outputs of the linear modules that the backward pass of a layer holds: measured.
const WIDTHS: f64 = 1.3;

/// More of these where an update is not added within the product, beside packed weights and starts that are taken off the
/// weight: measured.
const BESIDE: f64 = 0.24;

/// More of these with dropout, which makes inputs of its own: measured.
const DROPPED: f64 = 0.62;

/// Tensors as wide as the residual stream that it holds besides: measured.
const STREAMS: f64 = 2.8;

/// Bytes for every pair of positions of a row, on the CPU, whose attention holds no scores: measured.
const PAIRS: f64 = 2.5;

/// Score matrices that it holds elsewhere: measured on the CPU before it did without.
const SCORES: f64 = 1.96;

/// Share of this that every layer holds where none is computed again: measured.
const KEPT: f64 = 0.66;

/// Tensors as wide as the vocabulary that a chunk of the loss holds; not the largest moment in what was measured.
const LOGITS: f64 = 5.0;

/// Tensors as wide as its widest module that the forward pass of a vision block holds; likewise.
const VISION: f64 = 3.0;

/// Tensors as large as the one that is updated that the optimizer holds; likewise.
const UPDATE: f64 = 5.0;

/// How frozen matrices are held.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Held {
    /// In float32.
    Float32,
    /// In a half type.
    Half,
    /// In a half type, in the pages of a mapped file.
    Mapped,
}

/// Where a training runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Machine {
    /// Whether it is the CPU: then what counts is the process, else the memory of the device.
    pub cpu: bool,
    /// How frozen matrices are held.
    pub held: Held,
}

impl Machine {
    /// Bytes of an activation.
    fn activation(self) -> u64 {
        if self.cpu || self.held == Held::Float32 { F32 } else { 2 }
    }

    /// Bytes of a parameter at rest, and whether they lie in a mapped file. On the CPU only matrices keep a half type.
    fn bytes(self, p: &NamedParam) -> (u64, bool) {
        let n = p.num_elements() as u64;
        match self.held {
            Held::Float32 => (F32 * n, false),
            _ if self.cpu && !(p.linear_weight || p.embedding) => (F32 * n, false),
            Held::Half => (2 * n, false),
            Held::Mapped => (2 * n, true),
        }
    }
}

/// What the largest micro-batch is made of, and what is remembered besides it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Load {
    /// Rows of a micro-batch.
    pub rows: usize,
    /// Positions of a row, images included.
    pub length: usize,
    /// Supervised positions of a micro-batch.
    pub supervised: usize,
    /// Image tiles of a micro-batch.
    pub tiles: usize,
    /// Micro-batches of a step.
    pub micro_batches: usize,
    /// Rows that the loader may remember; a step of one row more is read ahead.
    pub all_rows: usize,
    /// Tiles of all images, whose features a frozen vision tower makes once.
    pub all_tiles: usize,
}

/// One line of the account.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Item {
    /// What it is.
    pub name: String,
    /// Its bytes.
    pub bytes: u64,
}

/// What there is of one tower.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct TowerMemory {
    /// `vision`, `projector` or `language`.
    pub tower: &'static str,
    /// Its weights.
    pub weights: u64,
    /// What is trained besides its weights: low-rank updates, float32 copies of weights of a half type.
    pub trained: u64,
    /// Gradients of what is trained; they grow during a step.
    pub gradients: u64,
    /// Two moments of each trained value.
    pub optimizer: u64,
}

/// What a training needs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Memory {
    /// By tower.
    pub towers: Vec<TowerMemory>,
    /// What else is there all the time.
    pub stays: Vec<Item>,
    /// What is there for a time; only the largest counts. Gradients and inputs of layers are part of each.
    pub moments: Vec<Item>,
    /// Inputs of the decoder layers.
    pub layer_inputs: u64,
    /// Weights that lie in mapped files. They count, and the system takes them back when other programs need memory.
    pub mapped: u64,
    /// The most that is there at one time.
    pub peak: u64,
}

impl Memory {
    /// The moment that decides the peak.
    #[must_use]
    pub fn largest(&self) -> Option<&Item> {
        self.moments.iter().max_by_key(|i| i.bytes)
    }
}

/// Shapes of the layers of a tower.
#[derive(Debug, Default)]
struct Layers {
    /// Width of the residual stream.
    hidden: u64,
    /// Sum of the widths in and out of the linear modules of one layer.
    widths: u64,
    /// Widest of them.
    widest: u64,
    /// Their number.
    count: u64,
}

impl Layers {
    fn of(params: &[NamedParam], towers: &'static [Tower], name: &str) -> Self {
        let prefix = towers.iter().find(|t| t.name == name).map_or("", |t| t.prefix);
        let (mut layers, mut numbers) = (Self { hidden: u64::MAX, ..Self::default() }, Vec::new());
        for p in params.iter().filter(|p| tower_of(towers, &p.name) == name) {
            let number = p.name.strip_prefix(prefix).unwrap_or(&p.name).split('.').find_map(|s| s.parse::<u64>().ok());
            let Some(n) = number else { continue };
            numbers.push(n);
            if n == 0 && p.linear_weight {
                layers.widths += (p.shape[0] + p.shape[1]) as u64;
                layers.hidden = layers.hidden.min(p.shape[0] as u64);
                layers.widest = layers.widest.max(p.shape[1] as u64);
            }
        }
        numbers.sort_unstable();
        numbers.dedup();
        layers.count = numbers.len() as u64;
        if layers.hidden == u64::MAX { Self::default() } else { layers }
    }

    /// What the backward pass of one layer holds for `positions`, in values, without scores. `beside` is what updates
    /// add that have products of their own, as a share of the widths.
    fn graph(&self, positions: u64, beside: f64) -> u64 {
        (positions as f64 * ((WIDTHS + beside) * self.widths as f64 + STREAMS * self.hidden as f64)) as u64
    }
}

/// Everything that the account of a training is made from.
struct Account<'a, M> {
    model: &'a M,
    config: &'a TrainConfig,
    machine: Machine,
    load: &'a Load,
    language: Layers,
    vision: Layers,
    /// Mapped bytes of each part.
    parts: BTreeMap<Part, u64>,
    packing: PackedWeights,
    /// What updates add to the graph of a layer, as a share of its widths.
    beside: f64,
    /// Widest output of a module beside the layers.
    vocabulary: u64,
    /// Bytes of all gradients, and of the largest.
    gradients: u64,
    largest_trained: u64,
}

/// What there is of weights in few bits while a training starts and runs.
#[derive(Debug, Default)]
struct PackedWeights {
    /// Bytes that they take before they are packed, and are not in a mapped file, less those they take afterwards.
    shrink: u64,
    /// Values of the largest.
    largest: u64,
    /// Width out of the widest.
    widest: u64,
}

/// Accounts for a training of `model`, which may be without weights.
///
/// # Errors
/// A target pattern cannot be understood or matches nothing.
pub fn account<M: Module + Vlm>(
    model: &M,
    config: &TrainConfig,
    adapter: &AdapterConfig,
    machine: Machine,
    load: &Load,
) -> Result<Memory> {
    let all = towers_of(model);
    let adapter = &peft::resolved(adapter)?;
    let params: Vec<NamedParam> = named_params(model).into_iter().filter(|p| !p.adapter).collect();
    let Sizes { coverage, packing, .. } = sizes(model, config, adapter)?;
    let (mut parts, mut largest_trained, mut packed) = (BTreeMap::<Part, u64>::new(), 0, PackedWeights::default());
    let mut towers = Vec::new();
    for tower in all {
        let full = config.mode(tower.name) == TowerMode::Full;
        let mut updates = 0;
        for module in coverage.modules.iter().filter(|m| m.tower == tower.name) {
            let (rank, _) = adapter.rank_and_scale(&module.name)?;
            updates += (rank * (module.d_in + module.d_out)) as u64;
            largest_trained = largest_trained.max(F32 * (rank * module.d_in.max(module.d_out)) as u64);
        }
        // A start that was taken off the weight stays beside it.
        let kept = if adapter.init_lora_weights.changes_the_weight() { 2 * updates } else { updates };
        let mut sum = TowerMemory { tower: tower.name, weights: 0, trained: F32 * kept, gradients: 0, optimizer: 0 };
        let mut values = updates;
        for p in params.iter().filter(|p| tower_of(all, &p.name) == tower.name) {
            let (bytes, mapped) = machine.bytes(p);
            if let Some(few) = packing.num_bytes(p) {
                // Elsewhere than on the CPU they wait in the memory of the host.
                let few = if machine.cpu { few } else { 0 };
                sum.weights += few;
                packed.shrink += if mapped { 0 } else { bytes.saturating_sub(few) };
                packed.largest = packed.largest.max(p.num_elements() as u64);
                packed.widest = packed.widest.max(p.shape[1] as u64);
                continue;
            }
            sum.weights += bytes;
            *parts.entry(Part::of(all, &p.name)).or_default() += if mapped { bytes } else { 0 };
            if full {
                let n = p.num_elements() as u64;
                values += n;
                // A wide copy takes the place of one of a half type, but not that of a page.
                let wide = machine.cpu && bytes < F32 * n;
                sum.trained += if wide { F32 * n } else { 0 };
                sum.weights -= if wide && !mapped { bytes } else { 0 };
                largest_trained = largest_trained.max(F32 * n);
            }
        }
        (sum.gradients, sum.optimizer) = (F32 * values, 2 * F32 * values);
        towers.push(sum);
    }
    let vocabulary = params.iter().filter(|p| p.linear_weight && Part::of(all, &p.name) == Part::Ends);
    let account = Account {
        model,
        config,
        machine,
        load,
        language: Layers::of(&params, all, "language"),
        vision: Layers::of(&params, all, "vision"),
        vocabulary: vocabulary.map(|p| p.shape[1]).max().unwrap_or(0) as u64,
        gradients: towers.iter().map(|t| t.gradients).sum(),
        largest_trained,
        parts,
        packing: packed,
        beside: beside(adapter),
    };
    Ok(account.sum(towers))
}

fn towers_of<M: Vlm>(model: &M) -> &'static [Tower] {
    model.towers()
}

/// What updates of `adapter` add to the graph of a layer, as a share of its widths.
fn beside(adapter: &AdapterConfig) -> f64 {
    if adapter.lora_dropout > 0.0 {
        DROPPED
    } else if adapter.init_lora_weights.changes_the_weight() {
        BESIDE
    } else {
        0.0
    }
}

impl<M: Vlm> Account<'_, M> {
    fn sum(&self, towers: Vec<TowerMemory>) -> Memory {
        let (mut stays, mut moments) = (self.stays(), self.moments());
        let later: u64 = towers.iter().map(|t| t.trained + t.optimizer).sum();
        moments.push(Item { name: "packing of the weights".into(), bytes: self.while_packing().saturating_sub(later) });
        stays.retain(|i| i.bytes > 0);
        moments.retain(|i| i.bytes > 0);
        let in_files: u64 = self.parts.values().sum();
        // Streamed weights are part of the moments that use them.
        let mapped =
            if self.config.offload_params { self.parts.values().copied().max().unwrap_or(0) } else { in_files };
        let gone = if self.config.offload_params { in_files } else { 0 };
        let fixed: u64 = towers.iter().map(|t| t.weights + t.trained + t.optimizer).sum();
        let moment = moments.iter().map(|i| i.bytes).max().unwrap_or(0);
        if self.machine.cpu {
            let bytes = HELD_BACK.0.min(HELD_BACK.1 * moment as f64) as u64;
            stays.push(Item { name: "freed memory that the allocator holds back".into(), bytes });
        }
        let rest: u64 = stays.iter().map(|i| i.bytes).sum();
        let layer_inputs = self.inputs();
        Memory { towers, stays, moments, layer_inputs, mapped, peak: fixed - gone + rest + moment }
    }

    fn positions(&self) -> u64 {
        (self.load.rows * self.load.length) as u64
    }

    fn recompute(&self) -> bool {
        let layers = self.language.count as usize;
        let estimate = activation_bytes(self.load.rows, self.load.length, layers, self.language.hidden as usize);
        match self.config.recompute {
            _ if self.config.offload_params || self.config.offload_activations => true,
            Recompute::Always => true,
            Recompute::Never => false,
            Recompute::Auto => estimate > ACTIVATION_BYTES,
        }
    }

    /// Inputs of the layers, in memory.
    fn inputs(&self) -> u64 {
        if self.config.offload_activations || !self.recompute() {
            return 0;
        }
        self.language.count * self.positions() * self.language.hidden * self.machine.activation()
    }

    /// Pages of a part that is streamed.
    fn pages(&self, part: Part) -> u64 {
        if self.config.offload_params { self.parts.get(&part).copied().unwrap_or(0) } else { 0 }
    }

    fn stays(&self) -> Vec<Item> {
        let load = self.load;
        let item = |name: &str, bytes: u64| Item { name: name.into(), bytes };
        let features = (load.all_tiles * self.model.tile_patches()) as u64 * self.vision.hidden;
        let features = (features * self.machine.activation()).min(FEATURE_BYTES as u64);
        let frozen = self.config.vision == TowerMode::Frozen;
        let features = item("features of images that were seen", if frozen { features } else { 0 });
        if !self.machine.cpu {
            return vec![item("context of the device", CONTEXT), features];
        }
        let tiles = load.tiles.div_ceil(load.rows.max(1));
        let row = (tiles * self.model.tile_values() * F32 as usize + 8 * load.length) as u64;
        let remembered = (load.all_rows as u64).saturating_mul(row).min(loader::CACHE_BYTES as u64);
        let ahead = (loader::AHEAD + 1) * load.micro_batches * load.rows;
        vec![
            item("program", PROGRAM),
            features,
            item("rows that were read", if load.all_rows > 0 { remembered } else { 0 }),
            item("steps that are read ahead", if load.all_rows > 0 { ahead as u64 * row } else { row }),
        ]
    }

    fn moments(&self) -> Vec<Item> {
        let item = |name: &str, bytes: u64| Item { name: name.into(), bytes };
        // With one micro-batch, inputs go as gradients come.
        let (inputs, gradients) = (self.inputs(), self.gradients);
        let both = if self.load.micro_batches > 1 { inputs + gradients } else { inputs.max(gradients) };
        let before = if self.load.micro_batches > 1 { inputs + gradients } else { inputs };
        let (name, layer) = self.layer();
        vec![
            item(self.vision_name(), self.vision_pass() + self.pages(Part::Vision)),
            item("loss, a chunk of logits and its gradients", before + self.loss() + self.pages(Part::Ends)),
            item(name, both + layer + self.pages(Part::Layer(0))),
            item("update of the trained values", gradients + (UPDATE * self.largest_trained as f64) as u64),
        ]
    }

    fn vision_name(&self) -> &'static str {
        match self.config.vision {
            TowerMode::Frozen => "vision tower, one tile",
            _ => "vision tower, its graph",
        }
    }

    fn vision_pass(&self) -> u64 {
        let (load, vision) = (self.load, &self.vision);
        if load.tiles == 0 {
            return 0;
        }
        let patches = self.model.tile_patches() as u64;
        let values = match self.config.vision {
            TowerMode::Frozen => (patches as f64 * VISION * vision.widest as f64) as u64,
            _ => vision.count * vision.graph(load.tiles as u64 * patches, self.beside),
        };
        values * self.machine.activation()
    }

    /// The graph that the backward pass through the decoder holds at one time.
    fn layer(&self) -> (&'static str, u64) {
        let beside = if self.packing.largest > 0 { self.beside.max(BESIDE) } else { self.beside };
        let graph = self.language.graph(self.positions(), beside) * self.machine.activation() + self.pairs();
        let one = graph + self.unpacked();
        match self.recompute() {
            true => ("one layer, forwards and backwards", one),
            false => {
                let others = KEPT * (self.language.count.max(1) - 1) as f64 * graph as f64;
                ("graph of all layers", one + others as u64)
            }
        }
    }

    /// What is there before any weight is packed, and for the largest while it is; before there are updates and moments.
    fn while_packing(&self) -> u64 {
        let largest = self.packing.largest;
        if largest == 0 { 0 } else { self.packing.shrink + (F32 + 2) * largest }
    }

    /// Frozen weights that are dense at one time: a panel on the CPU, with its part of the product, else a whole matrix.
    fn unpacked(&self) -> u64 {
        let PackedWeights { largest, widest, .. } = self.packing;
        if !self.machine.cpu {
            return F32 * largest;
        }
        let panel = largest.min(PANEL as u64);
        let rows = (panel * widest).checked_div(largest).map_or(0, |rows| rows.max(1));
        F32 * (panel + rows * self.positions())
    }

    /// What attention holds for pairs of positions.
    fn pairs(&self) -> u64 {
        let (load, heads) = (self.load, self.model.num_attention_heads() as u64);
        if self.machine.cpu {
            return (PAIRS * (load.rows * load.length * load.length) as f64) as u64;
        }
        // Queries go in chunks, which see only the keys before them.
        let chunk =
            |begin: usize| (QUERY_CHUNK.min(load.length - begin) * (begin + QUERY_CHUNK).min(load.length)) as u64;
        let seen: u64 = (0..load.length).step_by(QUERY_CHUNK).map(chunk).sum();
        (SCORES * (load.rows as u64 * heads * seen * F32) as f64) as u64
    }

    fn loss(&self) -> u64 {
        let chunk = self.load.supervised.min(loss::CHUNK) as u64;
        (LOGITS * (chunk * self.vocabulary * F32) as f64) as u64
    }
}

/// What answering takes: weights, and one layer of a row of `length` positions with its keys and values.
#[must_use]
pub fn to_answer<M: Module + Vlm>(model: &M, machine: Machine, length: usize) -> u64 {
    let towers = model.towers();
    let params: Vec<NamedParam> = named_params(model).into_iter().filter(|p| !p.adapter).collect();
    let weights: u64 = params.iter().map(|p| machine.bytes(p).0).sum();
    let language = Layers::of(&params, towers, "language");
    let program = if machine.cpu { PROGRAM } else { CONTEXT };
    let cached = 2 * language.count * length as u64 * language.hidden;
    weights + program + machine.activation() * (cached + language.graph(length as u64, 0.0) / 2)
}

#[cfg(test)]
mod tests {
    use burn::tensor::Device;

    use super::*;
    use crate::models::MODELS;

    const CPU: Machine = Machine { cpu: true, held: Held::Mapped };

    fn load() -> Load {
        Load { rows: 2, length: 640, supervised: 60, tiles: 2, micro_batches: 4, all_rows: 100, all_tiles: 100 }
    }

    #[test]
    fn what_saves_memory_is_accounted_for_in_every_preset() {
        let device = Device::flex();
        let adapter = AdapterConfig::default();
        for def in MODELS {
            for preset in def.presets {
                let (model, _) = (def.empty)(preset.name, &device).unwrap();
                let need = |config: &TrainConfig, load: &Load| account(&model, config, &adapter, CPU, load).unwrap();
                let config = TrainConfig { recompute: Recompute::Always, ..TrainConfig::default() };
                let usual = need(&config, &load());
                assert!(usual.peak > usual.mapped && usual.mapped > 0, "{}: {usual:?}", preset.name);
                assert!(usual.peak > to_answer(&model, CPU, 64), "{}", preset.name);
                let at_rest: u64 = usual.towers.iter().map(|t| t.weights + t.trained + t.optimizer).sum();
                let stays: u64 = usual.stays.iter().map(|i| i.bytes).sum();
                let largest = usual.largest().unwrap().bytes;
                assert_eq!(usual.peak, at_rest + stays + largest, "{}: every line is counted", preset.name);
                for (less, what) in [
                    (need(&config, &Load { rows: 1, tiles: 1, ..load() }), "fewer rows"),
                    (need(&config, &Load { length: 320, ..load() }), "shorter rows"),
                    (need(&TrainConfig { offload_activations: true, ..config.clone() }, &load()), "inputs on disk"),
                    (need(&TrainConfig { offload_params: true, ..config.clone() }, &load()), "weights on disk"),
                    (need(&TrainConfig { projector: TowerMode::Frozen, ..config.clone() }, &load()), "less trained"),
                ] {
                    assert!(less.peak < usual.peak, "{}, {what}: {} {}", preset.name, less.peak, usual.peak);
                }
                let all = need(&TrainConfig { recompute: Recompute::Never, ..config.clone() }, &load());
                assert!(all.peak > usual.peak && all.layer_inputs == 0, "{}", preset.name);
            }
        }
    }

    #[test]
    fn packed_weights_take_their_bits_and_their_scales() {
        use crate::adapter::Quantization::{self, Int8, Nf4, Nf4Double};
        let device = Device::flex();
        let config = TrainConfig { recompute: Recompute::Always, ..TrainConfig::default() };
        for def in MODELS {
            for preset in def.presets {
                let (model, _) = (def.empty)(preset.name, &device).unwrap();
                let head = |name: &str| name == "lm_head.weight" || name.ends_with(".lm_head.weight");
                let linear = named_params(&model).into_iter().filter(|p| p.linear_weight && !head(&p.name));
                let language = linear.filter(|p| tower_of(towers_of(&model), &p.name) == "language");
                let values: f64 = language.map(|p| p.num_elements() as f64).sum();
                let need = |machine, quantization: Quantization| {
                    let adapter = AdapterConfig { quantization, ..AdapterConfig::default() };
                    account(&model, &config, &adapter, machine, &load()).unwrap()
                };
                let weights = |m: &Memory| m.towers.iter().find(|t| t.tower == "language").unwrap().weights as f64;
                let usual = need(CPU, Quantization::None);
                let mut before = f64::INFINITY;
                for (kind, bits) in [(Int8, 8.5), (Nf4, 4.5), (Nf4Double, 4.127)] {
                    let found = need(CPU, kind);
                    let saved = weights(&usual) - weights(&found);
                    let expected = values * (16.0 - bits) / 8.0;
                    assert!((saved / expected - 1.0).abs() < 0.01, "{} {kind}: {saved} {expected}", preset.name);
                    assert!(weights(&found) < before);
                    before = weights(&found);
                    let mapped = (usual.mapped - found.mapped) as f64;
                    assert!((mapped / (2.0 * values) - 1.0).abs() < 1e-6, "{}: {mapped}", preset.name);
                    // What a file does not hold is there once in full before it is packed.
                    let copied = need(Machine { held: Held::Float32, ..CPU }, kind);
                    assert!(copied.peak as f64 > 4.0 * values, "{}: {copied:?}", preset.name);
                    let gpu = need(Machine { cpu: false, held: Held::Half }, kind);
                    assert!(weights(&gpu) < weights(&found), "{}", preset.name);
                }
                if preset.name != crate::models::TINY {
                    assert!(need(CPU, Nf4).peak < usual.peak, "{}", preset.name);
                }
            }
        }
    }

    #[test]
    fn ranks_of_patterns_and_starts_beside_the_weight_count() {
        let (model, _) = (crate::models::find("llava_med").unwrap().empty)("v1.5-7b", &Device::flex()).unwrap();
        let config = TrainConfig::default();
        let trained = |adapter: AdapterConfig| {
            let memory = account(&model, &config, &adapter, CPU, &load()).unwrap();
            memory.towers.iter().find(|t| t.tower == "language").unwrap().trained
        };
        let only = |adapter| AdapterConfig { r: 8, target_modules: vec!["q_proj".into()], ..adapter };
        let usual = trained(only(AdapterConfig::default()));
        assert_eq!(usual, 4 * 32 * 8 * (4096 + 4096));
        let patterns = AdapterConfig { rank_pattern: [("q_proj".to_string(), 2)].into(), ..AdapterConfig::default() };
        assert_eq!(trained(only(patterns)), usual / 4);
        let start = crate::adapter::InitLoraWeights::Name("olora".into());
        assert_eq!(trained(only(AdapterConfig { init_lora_weights: start, ..AdapterConfig::default() })), 2 * usual);
    }

    #[test]
    fn towers_add_up() {
        let (model, _) = (crate::models::find("llava_med").unwrap().empty)("v1.5-7b", &Device::flex()).unwrap();
        let config = TrainConfig { projector: TowerMode::Full, ..TrainConfig::default() };
        let adapter = AdapterConfig { r: 128, ..AdapterConfig::default() };
        let memory = account(&model, &config, &adapter, CPU, &load()).unwrap();
        let tower = |name| memory.towers.iter().find(|t| t.tower == name).unwrap();
        // LLaVA's own count of what it trains.
        assert_eq!(tower("language").trained, 4 * 335_544_320);
        assert_eq!(tower("language").optimizer, 2 * tower("language").gradients);
        assert_eq!(tower("vision").trained, 0);
        // The projector is trained in float32 beside its pages.
        let values = 1024 * 4096 + 4096 * 4096 + 2 * 4096;
        assert_eq!(tower("projector").gradients, 4 * values);
        assert_eq!(tower("projector").trained, 4 * (values - 2 * 4096));
        assert!((15_000_000_000..15_200_000_000).contains(&memory.mapped), "{}", memory.mapped);
    }
}
