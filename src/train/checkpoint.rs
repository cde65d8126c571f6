//! `checkpoint-<step>/`: everything a run needs to continue as if it had never stopped.
//!
//! A checkpoint holds the trained tensors, the optimizer, and the state of the loop; never the frozen weights. It is
//! written beside its place, its manifest last, and renamed there, so that a directory named `checkpoint-<step>` is
//! complete; hashes find damage that came later.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

use burn::tensor::{Device, Tensor, TensorData};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{
    log::hf_state,
    optimizer::{AdamW, Moments},
    params::Trained,
};
use crate::{
    adapter::tensors::{self, HostTensor},
    error::{Error, Kind, Result},
    loader::Position,
    run_dir::{self, RunDir},
    weights::Checkpoint as Tensors,
};

/// Start of the directories' names.
pub const PREFIX: &str = "checkpoint-";

const TRAINED: &str = "trained.safetensors";
const OPTIMIZER: &str = "optimizer.safetensors";
const STATE: &str = "state.json";
/// The state once more, in Hugging Face's layout, for tools that read it.
const HF_STATE: &str = hf_state::FILE;
/// Start of the names of checkpoints that cannot be used.
pub const UNUSABLE: &str = "unusable-checkpoint-";
const MANIFEST: &str = "MANIFEST.json";

/// Everything that a manifest vouches for.
const FILES: [&str; 4] = [TRAINED, OPTIMIZER, STATE, HF_STATE];

/// The best evaluation so far.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Best {
    /// Step it was made after.
    pub step: usize,
    /// Its loss.
    pub eval_loss: f64,
}

/// State of the loop.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct State {
    /// Optimizer steps done.
    pub step: usize,
    /// Where the loader continues.
    pub position: Position,
    /// Real tokens seen.
    pub tokens: u64,
    /// The best evaluation so far.
    pub best: Option<Best>,
    /// Evaluations since then.
    pub evaluations_without_gain: usize,
    /// Whether early stopping has ended the training.
    pub stopped_early: bool,
    /// Whether an evaluation after this step was interrupted.
    #[serde(default)]
    pub evaluation_due: bool,
    /// Losses that a spike is measured by, oldest first; kept only where spikes are left out.
    #[serde(default)]
    pub recent_losses: Vec<f64>,
    /// Steps whose update was left out because their loss was a spike.
    #[serde(default)]
    pub skipped_steps: usize,
    /// How many of them the training has just made in a row.
    #[serde(default)]
    pub skipped_in_a_row: usize,
    /// The checkpoint of another run that this training was told to continue from.
    #[serde(default)]
    pub resumed_from: Option<String>,
    /// Hash of everything the training depends on.
    pub fingerprint: String,
    /// Updates done per trained tensor.
    pub updates: BTreeMap<String, u64>,
}

/// A checkpoint in host memory.
#[derive(Debug)]
pub struct Loaded {
    /// State of the loop.
    pub state: State,
    /// Trained tensors by name, in module layout.
    pub trained: BTreeMap<String, Vec<f32>>,
    /// Means of gradients and of squared gradients by name.
    pub moments: BTreeMap<String, (Vec<f32>, Vec<f32>)>,
}

impl Loaded {
    /// Puts the optimizer back where it was.
    pub fn restore(&mut self, optimizer: &mut AdamW, trained: &[Trained], device: &Device) {
        for (i, t) in trained.iter().enumerate() {
            optimizer.steps[i] = self.state.updates.get(&t.name).copied().unwrap_or(0);
            optimizer.moments[i] =
                self.moments.remove(&t.name).map(|(m, v)| Moments { m: flat(m, device), v: flat(v, device) });
        }
    }

    /// The trained tensors on `device`, in the order of `trained`.
    #[must_use]
    pub fn values(&mut self, trained: &[Trained], device: &Device) -> Vec<Tensor<1>> {
        trained.iter().map(|t| flat(self.trained.remove(&t.name).unwrap_or_default(), device)).collect()
    }
}

fn flat(values: Vec<f32>, device: &Device) -> Tensor<1> {
    let n = values.len();
    Tensor::from_data(TensorData::new(values, [n]), device)
}

/// Writes `checkpoint-<step>`.
///
/// # Errors
/// The disk is full or not writable. Earlier checkpoints stay as they are.
pub fn save(
    dir: &RunDir,
    state: &State,
    trained: &[Trained],
    values: Vec<Tensor<1>>,
    optimizer: &AdamW,
    hf_state: &Value,
) -> Result<PathBuf> {
    let place = dir.path(format!("{PREFIX}{}", state.step));
    let beside = dir.path(format!(".tmp-{PREFIX}{}", state.step));
    let outcome = write(&beside, state, trained, values, optimizer, hf_state).and_then(|()| {
        if place.exists() {
            fs::remove_dir_all(&place).map_err(|e| Error::io(&place, e))?;
        }
        fs::rename(&beside, &place).map_err(|e| Error::io(&place, e))
    });
    match outcome {
        Ok(()) => Ok(place),
        Err(e) => {
            // What was written so far only takes space that the user is asked to free.
            let _ = fs::remove_dir_all(&beside);
            let last = steps(dir).last().map_or("the beginning".to_string(), |s| format!("{PREFIX}{s}"));
            Err(Error::new(Kind::Run, "cannot write a checkpoint")
                .at(place.display())
                .help(format!(
                    "make room or repair permissions, then run the same command again; it continues from {last}"
                ))
                .source(e))
        }
    }
}

fn write(
    dir: &Path,
    state: &State,
    trained: &[Trained],
    values: Vec<Tensor<1>>,
    optimizer: &AdamW,
    hf_state: &Value,
) -> Result<()> {
    if dir.exists() {
        fs::remove_dir_all(dir).map_err(|e| Error::io(dir, e))?;
    }
    fs::create_dir_all(dir).map_err(|e| Error::io(dir, e))?;
    let mut state = state.clone();
    let (mut weights, mut moments) = (BTreeMap::new(), BTreeMap::new());
    for (i, (t, value)) in trained.iter().zip(values).enumerate() {
        let tensor = |x: Tensor<1>| HostTensor { shape: t.shape.clone(), values: host(x) };
        weights.insert(t.name.clone(), tensor(value));
        state.updates.insert(t.name.clone(), optimizer.steps[i]);
        if let Some(Moments { m, v }) = &optimizer.moments[i] {
            moments.insert(format!("m.{}", t.name), tensor(m.clone()));
            moments.insert(format!("v.{}", t.name), tensor(v.clone()));
        }
    }
    tensors::write(&dir.join(TRAINED), &weights)?;
    tensors::write(&dir.join(OPTIMIZER), &moments)?;
    run_dir::write_atomic(&dir.join(STATE), &run_dir::json_file(&state)?)?;
    run_dir::write_atomic(&dir.join(HF_STATE), &run_dir::json_file(hf_state)?)?;
    let mut manifest = BTreeMap::new();
    for name in FILES {
        manifest.insert(name, run_dir::sha256(&dir.join(name))?);
    }
    run_dir::write_atomic(&dir.join(MANIFEST), &run_dir::json_file(&manifest)?)
}

fn host(x: Tensor<1>) -> Vec<f32> {
    x.into_data().try_to_vec().expect("trained tensors are f32")
}

/// Steps of all checkpoints, ascending.
#[must_use]
pub fn steps(dir: &RunDir) -> Vec<usize> {
    let entries = fs::read_dir(dir.root()).into_iter().flatten().flatten();
    let mut steps: Vec<usize> =
        entries.filter_map(|e| e.file_name().to_str()?.strip_prefix(PREFIX)?.parse().ok()).collect();
    steps.sort_unstable();
    steps
}

/// Reads one checkpoint of a run.
///
/// # Errors
/// It is incomplete, damaged, or of other settings or tensors.
pub fn load(dir: &RunDir, step: usize, trained: &[Trained], fingerprint: &str) -> Result<Loaded> {
    let place = dir.path(format!("{PREFIX}{step}"));
    let loaded = load_from(&place, trained)?;
    if loaded.state.fingerprint != fingerprint {
        return Err(Error::new(Kind::Run, "checkpoint belongs to other settings or data").at(place.display()));
    }
    Ok(loaded)
}

/// Reads the checkpoint in directory `place`, of whatever settings.
///
/// # Errors
/// It is incomplete, damaged, or of other tensors.
pub fn load_from(place: &Path, trained: &[Trained]) -> Result<Loaded> {
    let manifest: BTreeMap<String, String> = run_dir::read_json(&place.join(MANIFEST))?;
    let damaged = |file: &Path| Error::new(Kind::Run, "checkpoint is damaged").at(file.display());
    for name in FILES {
        let file = place.join(name);
        if manifest.get(name) != Some(&run_dir::sha256(&file)?) {
            return Err(damaged(&file).expected("the content its manifest describes"));
        }
    }
    let state: State = run_dir::read_json(&place.join(STATE))?;
    let (weights, optimizer) = (Tensors::open(&place.join(TRAINED))?, Tensors::open(&place.join(OPTIMIZER))?);
    let mut loaded = Loaded { state, trained: BTreeMap::new(), moments: BTreeMap::new() };
    for t in trained {
        let read = |from: &Tensors, name: &str| -> Result<Vec<f32>> {
            let shape = from.info(name).map(|i| i.shape.clone());
            if shape.as_ref() != Some(&t.shape) {
                return Err(damaged(place).expected(format!("{name} {:?}", t.shape)).found(format!("{shape:?}")));
            }
            from.read_f32(name)
        };
        loaded.trained.insert(t.name.clone(), read(&weights, &t.name)?);
        let (m, v) = (format!("m.{}", t.name), format!("v.{}", t.name));
        if optimizer.info(&m).is_some() {
            loaded.moments.insert(t.name.clone(), (read(&optimizer, &m)?, read(&optimizer, &v)?));
        }
    }
    Ok(loaded)
}

/// The newest checkpoint that can be used, and why newer ones could not.
pub fn newest(dir: &RunDir, trained: &[Trained], fingerprint: &str) -> (Option<Loaded>, Vec<Error>) {
    let mut refused = Vec::new();
    for step in steps(dir).into_iter().rev() {
        match load(dir, step, trained, fingerprint) {
            Ok(loaded) => return (Some(loaded), refused),
            Err(e) => refused.push(e),
        }
    }
    (None, refused)
}

/// Renames the checkpoints of steps after `step`, so that nothing takes them for newer ones than those written from now
/// on.
///
/// # Errors
/// The directory cannot be written.
pub fn set_aside_after(dir: &RunDir, step: usize) -> Result<()> {
    for later in steps(dir).into_iter().filter(|s| *s > step) {
        let (from, to) = (format!("{PREFIX}{later}"), format!("{UNUSABLE}{later}"));
        dir.remove(&to)?;
        fs::rename(dir.path(&from), dir.path(&to)).map_err(|e| Error::io(dir.path(&from), e))?;
    }
    Ok(())
}

/// Removes all but the newest `keep` checkpoints and the one of step `best`.
///
/// # Errors
/// A directory cannot be removed.
pub fn prune(dir: &RunDir, keep: usize, best: Option<usize>) -> Result<()> {
    let steps = steps(dir);
    let old = steps.len().saturating_sub(keep);
    for step in &steps[..old] {
        if Some(*step) != best {
            dir.remove(&format!("{PREFIX}{step}"))?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use burn::module::ParamId;

    use super::*;
    use crate::train::TrainConfig;

    fn trained() -> Vec<Trained> {
        ["x.weight", "y.bias"]
            .iter()
            .enumerate()
            .map(|(i, name)| Trained {
                name: (*name).into(),
                shape: if i == 0 { vec![2, 3] } else { vec![4] },
                transposed: false,
                lora: false,
                tower: "language",
                id: ParamId::new(),
            })
            .collect()
    }

    fn values(x: f32) -> Vec<Tensor<1>> {
        vec![flat(vec![x; 6], &Device::flex()), flat(vec![-x; 4], &Device::flex())]
    }

    fn save_step(dir: &RunDir, step: usize) -> Result<PathBuf> {
        let mut optimizer = AdamW::new(&TrainConfig::default(), None, &trained());
        let _ = optimizer.update(0, values(1.0).remove(0), values(2.0).remove(0), 1.0, 1.0);
        let state = State { step, fingerprint: "f".into(), ..State::default() };
        save(dir, &state, &trained(), values(step as f32), &optimizer, &Value::Null)
    }

    #[test]
    fn what_is_saved_comes_back() {
        let temporary = tempfile::tempdir().unwrap();
        let dir = RunDir::open(temporary.path()).unwrap();
        save_step(&dir, 3).unwrap();
        let mut loaded = load(&dir, 3, &trained(), "f").unwrap();
        let mut optimizer = AdamW::new(&TrainConfig::default(), None, &trained());
        loaded.restore(&mut optimizer, &trained(), &Device::flex());
        assert_eq!(optimizer.steps, [1, 0]);
        assert!(optimizer.moments[0].is_some() && optimizer.moments[1].is_none());
        let values = loaded.values(&trained(), &Device::flex());
        assert_eq!(host(values[1].clone()), [-3.0; 4]);
        assert_eq!(load(&dir, 3, &trained(), "g").unwrap_err().kind(), Kind::Run);
    }

    #[test]
    fn a_damaged_checkpoint_gives_way_to_the_one_before() {
        let temporary = tempfile::tempdir().unwrap();
        let dir = RunDir::open(temporary.path()).unwrap();
        for step in [5, 10, 15] {
            save_step(&dir, step).unwrap();
        }
        let file = dir.path("checkpoint-15").join(TRAINED);
        let mut bytes = fs::read(&file).unwrap();
        *bytes.last_mut().unwrap() ^= 1;
        fs::write(&file, bytes).unwrap();
        fs::remove_file(dir.path("checkpoint-10").join(MANIFEST)).unwrap();
        let (loaded, refused) = newest(&dir, &trained(), "f");
        assert_eq!((loaded.unwrap().state.step, refused.len()), (5, 2));
        assert!(refused[0].to_string().contains("damaged"), "{}", refused[0]);
        // Else they would count as the newest when old ones are removed.
        set_aside_after(&dir, 5).unwrap();
        assert_eq!(steps(&dir), [5]);
        assert!(dir.path(format!("{UNUSABLE}15")).join(STATE).exists());
    }

    #[test]
    fn old_checkpoints_go_and_the_best_stays() {
        let temporary = tempfile::tempdir().unwrap();
        let dir = RunDir::open(temporary.path()).unwrap();
        for step in [5, 10, 15, 100] {
            save_step(&dir, step).unwrap();
        }
        prune(&dir, 2, Some(5)).unwrap();
        assert_eq!(steps(&dir), [5, 15, 100]);
    }

    #[test]
    fn a_failed_write_keeps_the_last_checkpoint_and_names_it() {
        let temporary = tempfile::tempdir().unwrap();
        let dir = RunDir::open(temporary.path()).unwrap();
        save_step(&dir, 5).unwrap();
        // A file where the temporary directory must go.
        fs::write(dir.path(".tmp-checkpoint-6"), "x").unwrap();
        let error = save_step(&dir, 6).unwrap_err();
        assert!(error.help_line().unwrap().contains("checkpoint-5"), "{error:?}");
        assert_eq!(newest(&dir, &trained(), "f").0.unwrap().state.step, 5);
    }
}
