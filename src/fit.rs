//! What a plan needs in memory, and the plan that fits into less: which things to give up, in which order.

use std::{fmt, str::FromStr};

use serde::Serialize;

use crate::{
    adapter::Quantization,
    device::{DeviceSpec, policy::LARGE},
    error::{Error, Kind, Result},
    models::{self, AnyVlm, ModelDef},
    nn::visit::named_params,
    plan::{Plan, embedded_name},
    stage::encode::EncodeReport,
    train::{
        Recompute, TowerMode,
        memory::{Held, Load, Machine, Memory, account},
    },
    vlm::Vlm,
    weights::{Checkpoint, Layout},
};

/// An amount of memory as a user writes it: `20GiB`, `8GB`, `512MiB`, or bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Size {
    /// As it was written.
    pub text: String,
    /// Bytes.
    pub bytes: u64,
}

impl FromStr for Size {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let units = [("KiB", 10), ("MiB", 20), ("GiB", 30), ("TiB", 40)].map(|(u, shift)| (u, (1u64 << shift) as f64));
        let decimal = [("kB", 1e3), ("MB", 1e6), ("GB", 1e9), ("TB", 1e12), ("B", 1.0)];
        let found = units.into_iter().chain(decimal).find_map(|(unit, n)| Some((text.strip_suffix(unit)?, n)));
        let (number, unit) = found.unwrap_or((text, 1.0));
        let bytes = number.trim().parse::<f64>().ok().filter(|n| n.is_finite() && *n > 0.0).map(|n| (n * unit) as u64);
        let bytes = bytes.ok_or_else(|| {
            Error::new(Kind::Config, "not an amount of memory").expected("for example 20GiB, 8GB or 512MiB").found(text)
        })?;
        Ok(Self { text: text.to_string(), bytes })
    }
}

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

/// What a plan does not say and its memory depends on.
#[derive(Debug)]
pub struct Situation {
    /// The network, without weights.
    model: AnyVlm,
    cpu: bool,
    stored: Stored,
    /// The longest row.
    pub row: LongestRow,
    /// Rows to train on, if they are known.
    rows: Option<usize>,
}

/// Weights as the checkpoint has them.
#[derive(Debug, Clone, Copy)]
struct Stored {
    /// In a half type.
    half: bool,
    /// In files that can be mapped.
    mappable: bool,
    bytes: u64,
}

/// The row that needs most.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct LongestRow {
    /// Positions, images included.
    pub length: usize,
    /// Supervised positions.
    pub supervised: usize,
    /// Image tiles.
    pub tiles: usize,
    /// Where that is known from.
    pub known_from: &'static str,
}

/// Positions of the longest row where nothing says it.
const UNKNOWN_LENGTH: usize = 1024;

impl Situation {
    /// Of `plan` on `device`, which need not be there. `model` is its network without weights, `encoded` what is known
    /// of its rows, `rows` their number.
    ///
    /// # Errors
    /// The checkpoint's files cannot be read.
    pub fn new(
        plan: &Plan,
        model: AnyVlm,
        device: &DeviceSpec,
        encoded: Option<&EncodeReport>,
        rows: Option<usize>,
    ) -> Result<Self> {
        let family = models::find(&plan.model.name)?;
        let stored = stored(plan, family, &model)?;
        let row = longest(plan, family, &model, encoded);
        Ok(Self { model, cpu: *device == DeviceSpec::Cpu, stored, row, rows })
    }

    /// How frozen matrices are held.
    #[must_use]
    pub fn machine(&self, plan: &Plan) -> Machine {
        let Stored { half, mappable, bytes } = self.stored;
        let wanted = plan.model.dtype.explicit();
        let kept = match wanted {
            Some(dtype) => dtype != burn::tensor::FloatDType::F32,
            // What is packed is read from its file once.
            None => half && (!self.cpu || bytes >= LARGE || plan.train.offload_params || (packs(plan) && mappable)),
        };
        let held = match kept {
            false => Held::Float32,
            true if self.cpu && half && mappable => Held::Mapped,
            true => Held::Half,
        };
        Machine { cpu: self.cpu, held }
    }

    /// The largest micro-batch of `plan`.
    #[must_use]
    pub fn load(&self, plan: &Plan) -> Load {
        let rows = plan.train.per_device_train_batch_size;
        let all = self.rows.unwrap_or(usize::MAX / 1_000_000);
        Load {
            rows,
            length: self.row.length.next_multiple_of(plan.train.pad_to_multiple_of.max(1)),
            supervised: rows * self.row.supervised,
            tiles: rows * self.row.tiles,
            micro_batches: plan.train.gradient_accumulation_steps,
            all_rows: all,
            all_tiles: all * self.row.tiles,
        }
    }

    /// What `plan` needs.
    ///
    /// # Errors
    /// A target pattern cannot be understood or matches nothing.
    pub fn predict(&self, plan: &Plan) -> Result<Memory> {
        account(&self.model, &plan.train, &plan.adapter_config(), self.machine(plan), &self.load(plan))
    }
}

fn packs(plan: &Plan) -> bool {
    plan.model.quantization != Quantization::None
}

/// How the checkpoint of `plan` stores its weights; without one, how its release does.
fn stored(plan: &Plan, family: &ModelDef, model: &AnyVlm) -> Result<Stored> {
    let parameters: usize = named_params(model).iter().map(|p| p.num_elements()).sum();
    match plan.model.checkpoint.as_deref() {
        Some(dir) if embedded_name(dir).is_none() => {
            // Their config.json is enough for a plan.
            let Ok(weights) = (family.weights)(dir, &plan.model.load_options()) else {
                return Ok(released(family, parameters));
            };
            Ok(of_files(&weights))
        }
        Some(_) => Ok(Stored { half: false, mappable: true, bytes: 4 * parameters as u64 }),
        None if plan.model.preset == models::TINY => {
            Ok(Stored { half: false, mappable: true, bytes: 4 * parameters as u64 })
        }
        None => Ok(released(family, parameters)),
    }
}

fn released(family: &ModelDef, parameters: usize) -> Stored {
    let mappable = matches!(family.release.layout, Layout::Safetensors);
    Stored { half: true, mappable, bytes: 2 * parameters as u64 }
}

fn of_files(weights: &Checkpoint) -> Stored {
    let half = weights.dtype().is_some_and(|d| d.size() == 2);
    Stored { half, mappable: weights.is_mapped(), bytes: weights.num_bytes() }
}

fn longest(plan: &Plan, family: &ModelDef, model: &AnyVlm, encoded: Option<&EncodeReport>) -> LongestRow {
    let features = model.tile_features().max(1);
    let most_tiles = family.presets.iter().map(|p| p.max_tiles).max().unwrap_or(1);
    if let Some(found) = encoded.filter(|e| e.rows_ok > 0) {
        let images = found.image_positions.max.div_ceil(features);
        return LongestRow {
            length: found.positions.max,
            supervised: found.supervised.max,
            tiles: images,
            known_from: "the encoded rows",
        };
    }
    let (length, known_from) = match plan.train.max_length {
        0 => (UNKNOWN_LENGTH.max(most_tiles * features + 256), "a guess, as train.max_length is 0"),
        n => (n, "train.max_length"),
    };
    let tiles = (length / features).clamp(1, most_tiles);
    LongestRow { length, supervised: length.saturating_sub(tiles * features), tiles, known_from }
}

/// A plan that fits.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Fit {
    /// Overrides that make it fit, as `--set` takes them.
    pub overrides: Vec<String>,
    /// What they cost, in words; empty if the plan fitted as it was.
    pub gave_up: Vec<String>,
    /// What it needs then.
    pub peak: u64,
    /// What would fit as well if weights in few bits took the place of weights that stay on disk: the override, and what
    /// is needed then.
    pub instead: Option<(String, u64)>,
}

impl Fit {
    /// What was done for `limit`, for people.
    #[must_use]
    pub fn lines(&self, limit: &Size) -> Vec<String> {
        let gibibytes = self.peak as f64 / (1u64 << 30) as f64;
        let mut lines = vec![match self.gave_up.is_empty() {
            true => format!("fits into {limit} as it is: {gibibytes:.1} GiB predicted"),
            false => format!("made to fit into {limit}: {gibibytes:.1} GiB predicted; given up:"),
        }];
        lines.extend(self.gave_up.iter().map(|cost| format!("  {cost}")));
        lines.extend(self.instead.iter().map(|(set, peak)| {
            let gibibytes = *peak as f64 / (1u64 << 30) as f64;
            format!("weights in memory fit as well in few bits, which changes what is learnt: --set {set}, {gibibytes:.1} GiB")
        }));
        lines
    }
}

/// A thing to give up: whether it is still there, how to give it up, what that costs.
struct Step {
    applies: fn(&Plan, &Situation) -> bool,
    apply: fn(&mut Plan, &mut Vec<String>),
    cost: &'static str,
}

/// From the least to the most that is given up. Only the last three change what is learnt by more than rounding: so the
/// disk comes before them.
const STEPS: [Step; 7] = [
    Step {
        applies: |plan, _| plan.train.recompute != Recompute::Always,
        apply: |plan, all| {
            plan.train.recompute = Recompute::Always;
            all.push("train.recompute=always".into());
        },
        cost: "decoder layers are computed again in the backward pass: about a third more time",
    },
    Step {
        applies: |plan, s| s.cpu && s.stored.half && s.machine(plan).held == Held::Float32,
        apply: |plan, all| {
            plan.model.dtype = crate::weights::Dtype::Bfloat16;
            all.push("model.dtype=bfloat16".into());
        },
        cost: "weights stay in the half type of their file and become float32 in each product: slower",
    },
    Step {
        applies: |plan, s| s.cpu && !plan.train.offload_activations,
        apply: |plan, all| {
            plan.train.offload_activations = true;
            all.push("train.offload_activations=true".into());
        },
        cost: "inputs of the decoder layers wait in a file of the run directory: the disk is written and read each step",
    },
    Step {
        applies: |plan, s| s.cpu && s.stored.half && s.stored.mappable && !plan.train.offload_params,
        apply: |plan, all| {
            plan.train.offload_params = true;
            all.push("train.offload_params=true".into());
        },
        cost: "frozen weights are read from their file layer by layer, twice a pass: as fast as the disk, or the \
               system's cache of it",
    },
    Step {
        applies: |plan, s| can_pack(plan, s) && plan.model.quantization == Quantization::None,
        apply: |plan, all| pack(plan, all, Quantization::Int8),
        cost: "the frozen linear modules of the language model are rounded to 8 bits: another base, and so another \
               result, a little",
    },
    Step {
        applies: |plan, s| can_pack(plan, s) && plan.model.quantization == Quantization::Int8,
        apply: |plan, all| pack(plan, all, Quantization::Nf4),
        cost: "to 4 bits (QLoRA's NF4) instead: more so",
    },
    Step {
        applies: |plan, s| can_pack(plan, s) && plan.model.quantization == Quantization::Nf4,
        apply: |plan, all| pack(plan, all, Quantization::Nf4Double),
        cost: "and the scales of their blocks to 8 bits",
    },
];

/// Whether weights in few bits are worth a try: not where they stay in their file, which takes less and is exact. On other
/// devices than the CPU every product would fetch its weight from the host.
fn can_pack(plan: &Plan, situation: &Situation) -> bool {
    situation.cpu && !plan.train.offload_params && plan.train.language != TowerMode::Full
}

fn pack(plan: &mut Plan, all: &mut Vec<String>, kind: Quantization) {
    plan.model.quantization = kind;
    all.retain(|set| !set.starts_with("model.quantization="));
    all.push(format!("model.quantization={kind}"));
}

/// Single changes that lower what `plan` needs by more than a hundredth: overrides, and the peak with them.
///
/// # Errors
/// A target pattern cannot be understood or matches nothing.
pub fn alternatives(plan: &Plan, situation: &Situation) -> Result<Vec<(Vec<String>, u64)>> {
    let now = situation.predict(plan)?.peak;
    let mut found = Vec::new();
    let mut consider = |trial: Plan, overrides: Vec<String>| -> Result<()> {
        let peak = situation.predict(&trial)?.peak;
        if peak < now - now / 100 {
            found.push((overrides, peak));
        }
        Ok(())
    };
    let (rows, passes) = (plan.train.per_device_train_batch_size, plan.train.gradient_accumulation_steps);
    if rows > 1 {
        let mut trial = plan.clone();
        (trial.train.per_device_train_batch_size, trial.train.gradient_accumulation_steps) = (1, rows * passes);
        let overrides = vec![
            "train.per_device_train_batch_size=1".into(),
            format!("train.gradient_accumulation_steps={}", rows * passes),
        ];
        consider(trial, overrides)?;
    }
    for step in STEPS.iter().filter(|s| (s.applies)(plan, situation)) {
        let (mut trial, mut overrides) = (plan.clone(), Vec::new());
        (step.apply)(&mut trial, &mut overrides);
        consider(trial, overrides)?;
    }
    if can_pack(plan, situation) && !packs(plan) {
        let (mut trial, mut overrides) = (plan.clone(), Vec::new());
        pack(&mut trial, &mut overrides, Quantization::Nf4);
        consider(trial, overrides)?;
    }
    Ok(found)
}

/// The least changes with which `plan` needs at most `limit`. The rows of an optimizer step stay as many as they are.
///
/// # Errors
/// Nothing helps; the error says what is needed at least.
pub fn choose(plan: &Plan, situation: &Situation, limit: &Size) -> Result<Fit> {
    let mut trial = plan.clone();
    let (mut overrides, mut gave_up) = (Vec::new(), Vec::new());
    let mut least = u64::MAX;
    for step in std::iter::once(None).chain(STEPS.iter().map(Some)) {
        if let Some(step) = step {
            if !(step.applies)(&trial, situation) {
                continue;
            }
            (step.apply)(&mut trial, &mut overrides);
            gave_up.push(step.cost.to_string());
        }
        let global = plan.train.per_device_train_batch_size * plan.train.gradient_accumulation_steps;
        let most = plan.train.per_device_train_batch_size;
        for rows in (1..=most).rev().filter(|rows| global.is_multiple_of(*rows)) {
            trial.train.per_device_train_batch_size = rows;
            trial.train.gradient_accumulation_steps = global / rows;
            let peak = situation.predict(&trial)?.peak;
            least = least.min(peak);
            if peak > limit.bytes {
                continue;
            }
            if rows < most {
                overrides.push(format!("train.per_device_train_batch_size={rows}"));
                overrides.push(format!("train.gradient_accumulation_steps={}", global / rows));
                gave_up.push(format!(
                    "passes of {rows} rows instead of {most}, {} a step: still {global} rows a step",
                    global / rows
                ));
            }
            let instead = instead(plan, &trial, situation, limit)?;
            return Ok(Fit { overrides, gave_up, peak, instead });
        }
    }
    Err(Error::new(Kind::Config, "this training does not fit")
        .at(format!("--fit {limit}"))
        .expected(format!("at least {:.1} GiB, with everything given up that can be", least as f64 / f64::from(1 << 30)))
        .help("lower train.max_length or adapter.r, train fewer towers, or take a smaller model; `medtune plan` shows what needs the memory"))
}

/// The first kind of few bits with which `plan` fits without the weights on disk that `fitted` needs, if it has not asked
/// for these itself.
fn instead(plan: &Plan, fitted: &Plan, situation: &Situation, limit: &Size) -> Result<Option<(String, u64)>> {
    if !fitted.train.offload_params || plan.train.offload_params || packs(plan) || !can_pack(plan, situation) {
        return Ok(None);
    }
    for kind in [Quantization::Int8, Quantization::Nf4, Quantization::Nf4Double] {
        let mut trial = plan.clone();
        trial.model.quantization = kind;
        let Ok(fit) = choose(&trial, situation, limit) else { continue };
        if fit.overrides.iter().all(|set| set != "train.offload_params=true") {
            return Ok(Some((format!("model.quantization={kind}"), fit.peak)));
        }
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::Resolved;

    fn size(text: &str) -> Size {
        text.parse().unwrap()
    }

    #[test]
    fn sizes_are_read_as_people_write_them() {
        let all = [("20GiB", 20 << 30), ("1.5 GB", 1_500_000_000), ("512MiB", 512 << 20), ("7", 7), ("3kB", 3000)];
        for (text, bytes) in all {
            assert_eq!(size(text).bytes, bytes, "{text}");
        }
        for text in ["", "GiB", "-1GB", "many", "20 gibibytes", "infGB"] {
            assert!(text.parse::<Size>().is_err(), "{text}");
        }
    }

    fn seven_b(device: DeviceSpec) -> (Plan, Situation) {
        large("llava_med", "v1.5-7b", device)
    }

    fn large(family: &str, preset: &str, device: DeviceSpec) -> (Plan, Situation) {
        let (name, shape) = (format!("model.name={family}"), format!("model.preset={preset}"));
        let overrides = [
            name.as_str(),
            shape.as_str(),
            "model.checkpoint=",
            "train.max_length=1024",
            "train.per_device_train_batch_size=8",
            "train.gradient_accumulation_steps=2",
        ];
        let overrides: Vec<String> = overrides.iter().map(ToString::to_string).collect();
        let plan = Resolved::new("phantom", &overrides).unwrap().plan;
        let family = models::find(family).unwrap();
        let (model, _) = (family.empty)(preset, &DeviceSpec::Cpu.open().unwrap()).unwrap();
        let situation = Situation::new(&plan, model, &device, None, None).unwrap();
        (plan, situation)
    }

    #[test]
    fn a_plan_gives_up_as_little_as_it_must_and_keeps_its_global_batch() {
        let (plan, situation) = seven_b(DeviceSpec::Cpu);
        let mut before = 0;
        for limit in ["200GiB", "26GiB", "20GiB", "8GiB"] {
            let fit = choose(&plan, &situation, &size(limit)).unwrap();
            assert!(fit.peak <= size(limit).bytes, "{limit}: {fit:?}");
            assert!(fit.overrides.len() >= before, "{limit}: {fit:?}");
            before = fit.overrides.len();
            let overrides: Vec<String> = fit.overrides.clone();
            let value = |key: &str| {
                overrides.iter().find_map(|o| o.strip_prefix(key)?.strip_prefix('=')?.parse::<usize>().ok())
            };
            let rows = value("train.per_device_train_batch_size").unwrap_or(8);
            assert_eq!(rows * value("train.gradient_accumulation_steps").unwrap_or(2), 16, "{fit:?}");
            let streams = overrides.iter().any(|o| o == "train.offload_params=true");
            assert_eq!(streams, limit == "8GiB", "{limit}: {fit:?}");
            assert!(overrides.iter().all(|o| !o.starts_with("model.quantization")), "exact where it can be: {fit:?}");
            // What QLoRA would do in its place is said.
            assert_eq!(fit.instead.as_ref().map(|(set, _)| set.as_str()), streams.then_some("model.quantization=nf4"));
            let lines = fit.lines(&size(limit)).join("\n");
            assert_eq!(lines.contains("--set model.quantization=nf4"), streams, "{lines}");
        }
        let error = choose(&plan, &situation, &size("100MB")).unwrap_err().to_string();
        assert!(error.contains("does not fit") && error.contains("at least"), "{error}");
    }

    #[test]
    fn few_bits_that_are_asked_for_come_before_the_disk() {
        let (mut plan, situation) = seven_b(DeviceSpec::Cpu);
        plan.model.quantization = Quantization::Nf4;
        let fit = choose(&plan, &situation, &size("8GiB")).unwrap();
        assert!(fit.overrides.iter().all(|o| !o.contains("offload_params") && !o.contains("quantization")), "{fit:?}");
        assert!(fit.peak <= size("8GiB").bytes && fit.peak > 4_000_000_000, "{fit:?}");
    }

    #[test]
    fn weights_that_cannot_stay_on_disk_are_rounded_last() {
        let family = models::MODELS.iter().find(|d| d.release.layout == Layout::PyTorch).unwrap();
        let preset = family.presets.iter().find(|p| p.name != models::TINY).unwrap();
        let (plan, situation) = large(family.name, preset.name, DeviceSpec::Cpu);
        let mut exact = plan.clone();
        exact.train.per_device_train_batch_size = 1;
        exact.train.gradient_accumulation_steps = 16;
        let mut overrides = Vec::new();
        for step in STEPS.iter().take(4) {
            if (step.applies)(&exact, &situation) {
                (step.apply)(&mut exact, &mut overrides);
            }
        }
        assert!(!exact.train.offload_params, "its files cannot be mapped");
        let least = situation.predict(&exact).unwrap().peak;
        let fit = choose(&plan, &situation, &size(&(least - 1).to_string())).unwrap();
        assert!(fit.overrides.contains(&"model.quantization=int8".to_string()), "{fit:?}");
        assert!(fit.gave_up.iter().any(|cost| cost.contains("8 bits")) && fit.peak < least, "{fit:?}");
        let found = alternatives(&plan, &situation).unwrap();
        assert!(found.iter().all(|(set, _)| set != &["train.offload_params=true"]), "{found:?}");
    }

    #[test]
    fn a_gpu_keeps_weights_in_their_type_and_cannot_stream_them() {
        let (plan, situation) = seven_b(DeviceSpec::Cuda(0));
        let memory = situation.predict(&plan).unwrap();
        assert_eq!((situation.machine(&plan).held, memory.mapped), (Held::Half, 0));
        assert!(choose(&plan, &situation, &size("8GiB")).is_err());
        let fit = choose(&plan, &situation, &size("24GiB")).unwrap();
        assert!(fit.overrides.iter().all(|o| !o.contains("offload")), "{fit:?}");
    }
}
