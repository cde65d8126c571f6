//! Random checkpoints at full size, in the files, types and shards of a release: for tests of loading, memory and speed
//! without a download. Written value by value, so a few megabytes of memory are enough for any size.

use std::{
    fs::{self, File},
    io::{BufWriter, Read, Write},
    path::Path,
    sync::Arc,
};

use burn::{module::Module, tensor::FloatDType};
use half::{bf16, f16};
use rand::Rng;
use rayon::prelude::*;

use super::{
    pickle,
    save::{Layout, Shard, header, index, shards, stored_as},
};
use crate::{
    error::{Error, Result},
    nn::visit::{NamedParam, named_params},
    progress::Progress,
    random,
    run_dir::{finish, temporary_for, write_atomic},
};

/// Values drawn from one stream.
const CHUNK: usize = 1 << 16;

/// Chunks that are held at one time: 8 MiB of bf16.
const CHUNKS: usize = 64;

/// How a checkpoint is made up.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Synth {
    /// Every value is a function of the seed, the tensor's name and the place in it.
    pub seed: u64,
    /// Standard deviation of weights; biases are 0, norms 1, layer scales 0.1.
    pub std: f64,
    /// Type in the files.
    pub dtype: FloatDType,
    /// Kind of the files.
    pub layout: Layout,
    /// Largest file.
    pub max_shard_bytes: u64,
}

/// What was written.
#[derive(Debug, Clone, Default, PartialEq, Eq, serde::Serialize)]
pub struct Synthesised {
    /// Files with weights, in order.
    pub files: Vec<String>,
    /// Files among them that an earlier attempt had written.
    pub reused: usize,
    /// Bytes of all tensors.
    pub bytes: u64,
    /// Values of all tensors.
    pub parameters: u64,
}

impl Synth {
    /// Writes weights for `module`, which takes no memory, to `dir`. A shard appears whole; the same call after an
    /// interruption keeps the shards that are there.
    ///
    /// # Errors
    /// An unwritable directory, a full disk, or what `stop` returns, which is asked between tensors.
    pub fn write<M: Module>(
        &self,
        module: &M,
        dir: &Path,
        progress: Progress,
        stop: &dyn Fn() -> Result<()>,
    ) -> Result<Synthesised> {
        let (_, size) = stored_as(self.dtype)?;
        let params: Vec<NamedParam> = named_params(module).into_iter().filter(|p| !p.adapter).collect();
        let shards = shards(params, size, self.max_shard_bytes, self.layout);
        let bytes = shards.iter().map(|s| s.bytes).sum::<u64>();
        fs::create_dir_all(dir).map_err(|e| Error::io(dir, e))?;
        let mut done = Synthesised { bytes, parameters: bytes / size, ..Synthesised::default() };
        let mut job = Job {
            synth: self,
            table: table(self.std, self.dtype).into(),
            task: progress.start("write weights (MB)", bytes.div_ceil(1_000_000)),
            bytes: 0,
            stop,
        };
        for shard in &shards {
            let path = dir.join(&shard.file);
            if job.complete(shard, &path)? {
                job.count(shard.bytes);
                done.reused += 1;
            } else {
                job.shard(shard, &path)?;
            }
            done.files.push(shard.file.clone());
        }
        job.task.finish();
        if let Some(text) = index(&shards) {
            write_atomic(&dir.join(self.layout.index()), text.as_bytes())?;
        }
        Ok(done)
    }

    fn notes(&self) -> String {
        format!("random weights: medtune models synth, seed {}, standard deviation {}", self.seed, self.std)
    }
}

struct Job<'a> {
    synth: &'a Synth,
    /// Bytes of 65,536 values of a normal distribution.
    table: Arc<[Vec<u8>]>,
    task: crate::progress::Task,
    bytes: u64,
    stop: &'a dyn Fn() -> Result<()>,
}

impl Job<'_> {
    fn count(&mut self, bytes: u64) {
        let before = self.bytes / 1_000_000;
        self.bytes += bytes;
        self.task.advance(self.bytes / 1_000_000 - before);
    }

    /// Whether an earlier attempt with the same seed left this file.
    fn complete(&self, shard: &Shard, path: &Path) -> Result<bool> {
        let Ok(mut file) = File::open(path) else { return Ok(false) };
        let notes = self.synth.notes();
        match self.synth.layout {
            Layout::Safetensors => {
                let expected = header(shard, self.synth.dtype, &[("made_by", notes)])?;
                let mut found = vec![0; expected.len()];
                let size = file.metadata().map_err(|e| Error::io(path, e))?.len();
                let same = file.read_exact(&mut found).is_ok() && found == expected;
                Ok(same && size == expected.len() as u64 + shard.bytes)
            }
            Layout::PyTorch => {
                let Ok(archive) = zip::ZipArchive::new(file) else { return Ok(false) };
                Ok(archive.comment() == notes.as_bytes() && archive.len() == shard.tensors.len() + 2)
            }
        }
    }

    fn shard(&mut self, shard: &Shard, path: &Path) -> Result<()> {
        let temporary = temporary_for(path)?;
        let mut stopped = None;
        let notes = self.synth.notes();
        let failed = |e: std::io::Error| Error::io(path, e);
        let outcome = match self.synth.layout {
            Layout::Safetensors => {
                let mut out = BufWriter::with_capacity(1 << 20, temporary);
                out.write_all(&header(shard, self.synth.dtype, &[("made_by", notes)])?).map_err(failed)?;
                let written = shard.tensors.iter().try_for_each(|t| self.tensor(t, &mut out, &mut stopped));
                written.and_then(|()| out.into_inner().map_err(std::io::IntoInnerError::into_error))
            }
            Layout::PyTorch => {
                let out = BufWriter::with_capacity(1 << 20, temporary);
                let archive = pickle::write(out, shard, self.synth.dtype, &notes, |i, out| {
                    self.tensor(&shard.tensors[i], out, &mut stopped)
                });
                let out = archive.map_err(std::io::Error::other);
                out.and_then(|out| out.into_inner().map_err(std::io::IntoInnerError::into_error))
            }
        };
        match (stopped, outcome) {
            (Some(error), _) => Err(error),
            (None, Err(e)) => Err(failed(e)),
            (None, Ok(temporary)) => finish(temporary, path),
        }
    }

    /// Writes one tensor; what `stop` returns goes to `stopped`.
    fn tensor(&mut self, tensor: &NamedParam, out: &mut dyn Write, stopped: &mut Option<Error>) -> std::io::Result<()> {
        if let Err(error) = (self.stop)() {
            *stopped = Some(error);
            return Err(std::io::Error::other("stopped"));
        }
        let count = tensor.num_elements();
        let fixed = fixed(tensor).map(|value| encode(value, self.synth.dtype));
        let purpose = format!("synth/{}", tensor.name);
        let (table, seed) = (&*self.table.clone(), self.synth.seed);
        let (first, size) = (0..count.div_ceil(CHUNK), table[0].len());
        for start in first.step_by(CHUNKS) {
            let values = (count - start * CHUNK).min(CHUNK * CHUNKS);
            let mut buffer = vec![0u8; values * size];
            buffer.par_chunks_mut(CHUNK * size).enumerate().for_each(|(i, chunk)| match &fixed {
                Some(value) => chunk.chunks_mut(size).for_each(|out| out.copy_from_slice(value)),
                None => draw(table, &mut random::stream(seed, &purpose, (start + i) as u64), chunk),
            });
            out.write_all(&buffer)?;
            self.count((values * size) as u64);
        }
        Ok(())
    }
}

/// Fills `out` with values of `table`, four for each word of the stream.
fn draw(table: &[Vec<u8>], stream: &mut impl Rng, out: &mut [u8]) {
    let size = table[0].len();
    for values in out.chunks_mut(4 * size) {
        let word = stream.next_u64().to_le_bytes();
        for (value, draw) in values.chunks_mut(size).zip(word.as_chunks::<2>().0) {
            value.copy_from_slice(&table[usize::from(u16::from_le_bytes(*draw))]);
        }
    }
}

/// Value of a tensor that is not random.
fn fixed(tensor: &NamedParam) -> Option<f32> {
    if tensor.name.ends_with("bias") {
        return Some(0.0);
    }
    if tensor.norm {
        return Some(1.0);
    }
    (tensor.name.ends_with(".ls1") || tensor.name.ends_with(".ls2")).then_some(0.1)
}

fn encode(value: f32, dtype: FloatDType) -> Vec<u8> {
    match dtype {
        FloatDType::BF16 => bf16::from_f32(value).to_le_bytes().to_vec(),
        FloatDType::F16 => f16::from_f32(value).to_le_bytes().to_vec(),
        _ => value.to_le_bytes().to_vec(),
    }
}

/// Quantiles of the normal distribution in the middle of 65,536 equal shares.
fn table(std: f64, dtype: FloatDType) -> Vec<Vec<u8>> {
    let shares = f64::from(1u32 << 16);
    (0..1u32 << 16).map(|i| encode((std * quantile((f64::from(i) + 0.5) / shares)) as f32, dtype)).collect()
}

/// The value below which a share `p` of a standard normal distribution lies, by bisection of its Taylor-series integral.
fn quantile(p: f64) -> f64 {
    if p > 0.5 {
        return -quantile(1.0 - p);
    }
    let (mut low, mut high) = (-5.0, 0.0);
    for _ in 0..40 {
        let middle = f64::midpoint(low, high);
        if cumulative(middle) < p { low = middle } else { high = middle }
    }
    f64::midpoint(low, high)
}

/// Share of a standard normal distribution below `x`, `-6 < x <= 0`.
fn cumulative(x: f64) -> f64 {
    // phi(x) (x + x^3/3 + x^5/15 + ...) is the integral from 0 to x
    let (mut term, mut sum) = (x, x);
    for n in 1..200 {
        term *= x * x / f64::from(2 * n + 1);
        sum += term;
        if term.abs() < 1e-17 {
            break;
        }
    }
    0.5 + sum * (-0.5 * x * x).exp() / std::f64::consts::TAU.sqrt()
}

#[cfg(test)]
mod tests {
    use burn::tensor::{DType, Device};

    use super::*;
    use crate::{
        error::Kind,
        models::qwen_vl::{QwenVl, QwenVlConfig},
        weights::Checkpoint,
    };

    fn synth(layout: Layout) -> Synth {
        Synth { seed: 3, std: 0.02, dtype: FloatDType::BF16, layout, max_shard_bytes: 700_000 }
    }

    fn model() -> QwenVl {
        QwenVl::new(&QwenVlConfig::tiny(), &Device::flex()).unwrap()
    }

    #[test]
    fn quantiles_are_those_of_the_normal_distribution() {
        for (p, x) in [(0.5, 0.0), (0.975, 1.959_964), (0.001, -3.090_232), (1.0 - 1e-5, 4.264_891)] {
            assert!((quantile(p) - x).abs() < 1e-5, "{p}: {}", quantile(p));
        }
    }

    #[test]
    fn both_layouts_hold_the_same_values_and_a_second_attempt_keeps_what_is_there() {
        let (safe, torch) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let go = |layout, dir: &Path| synth(layout).write(&model(), dir, Progress::Silent, &|| Ok(())).unwrap();
        let first = go(Layout::Safetensors, safe.path());
        assert!(first.files.len() > 3 && first.reused == 0, "{first:?}");
        assert_eq!(go(Layout::PyTorch, torch.path()).files.len(), first.files.len());
        let (a, b) = (Checkpoint::open(safe.path()).unwrap(), Checkpoint::open(torch.path()).unwrap());
        assert!(crate::weights::compare(&model(), &a).is_complete());
        assert!(a.names().eq(b.names()));
        for name in a.names() {
            assert_eq!(a.info(name).unwrap().dtype, DType::BF16);
            assert_eq!(a.info(name).unwrap().shape, b.info(name).unwrap().shape);
            assert_eq!(a.read_f32(name).unwrap(), b.read_f32(name).unwrap(), "{name}");
        }
        for (layout, dir) in [(Layout::Safetensors, safe.path()), (Layout::PyTorch, torch.path())] {
            let lost = dir.join(&go(layout, dir).files[1]);
            let before = fs::read(&lost).unwrap();
            fs::remove_file(&lost).unwrap();
            assert_eq!(go(layout, dir).reused, first.files.len() - 1);
            assert_eq!(fs::read(&lost).unwrap(), before);
            let other = Synth { seed: 4, ..synth(layout) };
            assert_eq!(other.write(&model(), dir, Progress::Silent, &|| Ok(())).unwrap().reused, 0);
        }
    }

    #[test]
    fn values_are_normal_and_an_interruption_leaves_whole_files() {
        let dir = tempfile::tempdir().unwrap();
        let calls = std::cell::Cell::new(0);
        let stop = || {
            calls.set(calls.get() + 1);
            if calls.get() > 40 { Err(Error::new(Kind::Interrupted, "stopped")) } else { Ok(()) }
        };
        let error = synth(Layout::Safetensors).write(&model(), dir.path(), Progress::Silent, &stop).unwrap_err();
        assert_eq!(error.kind(), Kind::Interrupted);
        let left: Vec<_> = fs::read_dir(dir.path()).unwrap().map(|e| e.unwrap().path()).collect();
        assert!(!left.is_empty() && left.iter().all(|p| Checkpoint::open(p).is_ok()), "{left:?}");
        synth(Layout::Safetensors).write(&model(), dir.path(), Progress::Silent, &|| Ok(())).unwrap();
        let checkpoint = Checkpoint::open(dir.path()).unwrap();
        let values = checkpoint.read_f32("transformer.wte.weight").unwrap();
        let share = |limit: f32| values.iter().filter(|v| v.abs() < limit).count() as f64 / values.len() as f64;
        assert!((share(0.02) - 0.6827).abs() < 0.01 && (share(0.04) - 0.9545).abs() < 0.01);
        assert!(checkpoint.read_f32("transformer.ln_f.weight").unwrap().iter().all(|v| *v == 1.0));
        assert!(checkpoint.read_f32("transformer.h.0.attn.c_attn.bias").unwrap().iter().all(|v| *v == 0.0));
    }
}
