//! Devices that fail in the middle of work, and the crate that stands in for CubeCL's LLVM.

use std::{
    borrow::Cow,
    fs,
    path::Path,
    sync::atomic::{AtomicUsize, Ordering},
};

use burn::{
    module::Module,
    tensor::{Device, Int, Tensor},
};
use medtune::{
    Kind, Result,
    adapter::AdapterConfig,
    device::{DeviceSpec, guard::guard},
    loader::Rows,
    models::AnyVlm,
    nn::{
        attention::Columns,
        decoder::{DecoderContext, LayerCache},
    },
    progress::Progress,
    run_dir::RunDir,
    stage::Ctx,
    train::{
        TrainConfig,
        trainer::{Job, train},
    },
    vlm::{Batch, Tower, Vlm},
};

use super::training::{Toy, adapter, bytes, config, model, samples};

/// A model whose device fails at a chosen layer call, in the words in which Burn reports a lost device.
#[derive(Module, Debug)]
enum Failing {
    Real(AnyVlm),
}

/// Calls of a layer until the device fails.
static CALLS: AtomicUsize = AtomicUsize::new(usize::MAX);

impl Failing {
    fn real(&self) -> &AnyVlm {
        let Self::Real(model) = self;
        model
    }
}

impl Vlm for Failing {
    fn towers(&self) -> &'static [Tower] {
        self.real().towers()
    }

    fn vision(&self, pixels: Tensor<4>) -> Tensor<3> {
        self.real().vision(pixels)
    }

    fn project(&self, features: Tensor<3>) -> Tensor<3> {
        self.real().project(features)
    }

    fn tile_features(&self) -> usize {
        self.real().tile_features()
    }

    fn tile_values(&self) -> usize {
        self.real().tile_values()
    }

    fn num_attention_heads(&self) -> usize {
        self.real().num_attention_heads()
    }

    fn reconcile<'b>(&self, batch: &'b Batch) -> Result<Cow<'b, Batch>> {
        self.real().reconcile(batch)
    }

    fn embed_tokens(&self, input_ids: Tensor<2, Int>) -> Tensor<3> {
        self.real().embed_tokens(input_ids)
    }

    fn columns_context(&self, columns: &Columns, device: &Device) -> DecoderContext {
        self.real().columns_context(columns, device)
    }

    fn num_layers(&self) -> usize {
        self.real().num_layers()
    }

    fn layer(&self, index: usize, x: Tensor<3>, context: &DecoderContext, cache: Option<&mut LayerCache>) -> Tensor<3> {
        if CALLS.fetch_sub(1, Ordering::Relaxed) == 0 {
            panic!(
                "Error while reading data: use `try_into_data` instead to catch the error at runtime: DevicePoisoned {{ \
                 reason: \"Unknown: the device was lost\" }}"
            );
        }
        self.real().layer(index, x, context, cache)
    }

    fn final_norm(&self, x: Tensor<3>) -> Tensor<3> {
        self.real().final_norm(x)
    }

    fn logits(&self, hidden: Tensor<2>) -> Tensor<2> {
        self.real().logits(hidden)
    }
}

/// A training in `dir` whose device fails after `calls` calls of a layer.
fn run(dir: &Path, calls: usize) -> Result<()> {
    CALLS.store(calls, Ordering::Relaxed);
    let processor = Toy::default();
    let (rows, _) = Rows::survey(samples(0..11), &processor, 0, || {});
    let (validation, _) = Rows::survey(samples(20..24), &processor, 0, || {});
    let ctx = Ctx::new(DeviceSpec::Cpu, Progress::Silent)?;
    let (dir, adapter, config): (_, AdapterConfig, TrainConfig) = (RunDir::open(dir)?, adapter(), config());
    let job = Job {
        config: &config,
        adapter: &adapter,
        seed: 5,
        dir: &dir,
        ctx: &ctx,
        fingerprint: "f".into(),
        pages: None,
        log: Default::default(),
    };
    guard(&ctx.device_spec, || None, || train(&job, Failing::Real(model()), &rows, &validation)).map(drop)
}

#[test]
fn a_device_that_is_lost_leaves_a_checkpoint_from_which_the_same_bytes_follow() {
    let whole = tempfile::tempdir().unwrap();
    run(whole.path(), usize::MAX).unwrap();
    let lost = tempfile::tempdir().unwrap();
    // A step has two micro-batches of two layers, forward at least: this is within the sixth.
    let error = run(lost.path(), 23).unwrap_err();
    assert_eq!(error.kind(), Kind::Device);
    assert!(error.to_string().starts_with("the device was lost"), "{error}");
    assert!(error.help_line().unwrap().contains("last checkpoint"), "{error:?}");
    let kept: Vec<_> = fs::read_dir(lost.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert!(kept.iter().any(|n| n.to_string_lossy().starts_with("checkpoint-")), "{kept:?}");
    assert!(!lost.path().join("checkpoint-9").exists());
    run(lost.path(), usize::MAX).unwrap();
    assert!(bytes(whole.path(), 9) == bytes(lost.path(), 9));
}

/// Name, version and whether it comes from a registry, of every package of Cargo.lock.
fn locked() -> Vec<(String, String, bool)> {
    let text = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("Cargo.lock")).unwrap();
    let lock: toml::Table = toml::from_str(&text).unwrap();
    let word = |p: &toml::Value, key: &str| p.get(key).and_then(|v| v.as_str()).unwrap_or_default().to_string();
    let packages = lock["package"].as_array().unwrap().iter();
    packages.map(|p| (word(p, "name"), word(p, "version"), p.get("source").is_some())).collect()
}

/// The stand-in has the names of one version of the real crate: when CubeCL moves, it must be looked at again.
#[test]
fn the_stand_in_for_llvm_has_the_version_of_cubecl_and_is_the_one_that_is_built() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("vendor/cubecl-llvm/Cargo.toml");
    let manifest: toml::Table = toml::from_str(&fs::read_to_string(path).unwrap()).unwrap();
    let version = manifest["package"]["version"].as_str().unwrap();
    let locked = locked();
    for name in ["cubecl", "cubecl-core", "cubecl-server", "cubecl-cuda", "cubecl-llvm"] {
        let found: Vec<_> = locked.iter().filter(|(n, ..)| n == name).collect();
        assert_eq!(found.len(), 1, "{name}: {found:?}");
        assert_eq!(found[0].1, version, "{name} has moved; look at vendor/cubecl-llvm again");
        assert_eq!(found[0].2, name != "cubecl-llvm", "{name} comes from the wrong place");
    }
    let llvm = |name: &str| name.starts_with("llvm-sys") || name.starts_with("tracel-llvm");
    assert!(!locked.iter().any(|(name, ..)| llvm(name)), "a build would download LLVM");
}
