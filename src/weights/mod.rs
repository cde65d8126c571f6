//! Checkpoint files to tensors and back, with a strict report.
//!
//! Reads safetensors (memory-mapped; one file, or shards by `model.safetensors.index.json`) and PyTorch `.bin` (by
//! `pytorch-reader`, which executes nothing), writes safetensors. Names in a checkpoint are the names of
//! [`crate::nn::visit`]; the weight of a `Linear` is `[d_output, d_input]` in files and transposed in memory.

mod convert;
mod init;
mod load;
mod map;
mod pages;
mod pickle;
mod read;
mod save;
mod synth;

pub use init::init_random;
pub use load::{Fit, compare, load, tensor_from};
pub use pages::{Pages, Part, release_streamed};
pub use read::{Checkpoint, TensorInfo};
pub use save::{Layout, SaveOptions, save};
pub use synth::{Synth, Synthesised};

use burn::tensor::{DType, Device, FloatDType};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::{device::policy::Policy, error::Result};

/// Type of weights, in the words of `torch_dtype`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
#[value(rename_all = "lower")]
pub enum Dtype {
    /// That of the checkpoint.
    #[default]
    Auto,
    /// 32 bits.
    Float32,
    /// 16 bits with the range of f32.
    Bfloat16,
    /// 16 bits of IEEE 754.
    Float16,
}

impl Dtype {
    /// The type, unless it is that of the checkpoint.
    #[must_use]
    pub fn explicit(self) -> Option<FloatDType> {
        match self {
            Self::Auto => None,
            Self::Float32 => Some(FloatDType::F32),
            Self::Bfloat16 => Some(FloatDType::BF16),
            Self::Float16 => Some(FloatDType::F16),
        }
    }
}

/// Type in which a model made from the checkpoint at `base` is written.
///
/// # Errors
/// `wanted` is [`Dtype::Auto`] and the checkpoint cannot be opened.
pub fn written_dtype(wanted: Dtype, base: &std::path::Path) -> Result<FloatDType> {
    if let Some(dtype) = wanted.explicit() {
        return Ok(dtype);
    }
    Ok(match Checkpoint::open(base)?.dtype() {
        Some(dtype @ (DType::F16 | DType::BF16)) => dtype.into(),
        _ => FloatDType::F32,
    })
}

/// What `torch_dtype` in a config.json calls the type that weights are written in.
#[must_use]
pub fn torch_dtype(dtype: FloatDType) -> &'static str {
    match dtype {
        FloatDType::BF16 => "bfloat16",
        FloatDType::F16 => "float16",
        _ => "float32",
    }
}

/// Whether matrices may be kept in a half type on `device` while everything is computed in f32;
/// [`crate::kernel::linear`] widens them.
#[must_use]
pub fn keeps_half(device: &Device) -> bool {
    Policy::of(device).wide_activations
}

/// Type in which the weights of a checkpoint that are stored as `stored` are held on `device`, by its [`Policy`].
#[must_use]
pub fn default_dtype(checkpoint: &Checkpoint, stored: DType, device: &Device) -> FloatDType {
    Policy::of(device).default_dtype(stored, checkpoint.num_bytes(), device)
}

#[cfg(test)]
mod tests {
    use std::{fs, path::Path};

    use burn::tensor::Tensor;

    use super::*;
    use crate::{
        models::{
            AnyVlm, LoadOptions,
            llava_med::{LlavaMed, LlavaMedConfig, weights::load_dir},
        },
        nn::{visit::named_params, vit::ClipVisionConfig},
        progress::Progress,
        vlm::{Batch, Encoded, PaddingSide, Vlm},
    };

    fn config() -> LlavaMedConfig {
        LlavaMedConfig {
            vocab_size: 40,
            hidden_size: 16,
            intermediate_size: 24,
            num_hidden_layers: 2,
            num_attention_heads: 4,
            vision_config: Some(ClipVisionConfig {
                hidden_size: 12,
                intermediate_size: 20,
                num_hidden_layers: 3,
                num_attention_heads: 2,
                image_size: 8,
                patch_size: 4,
                ..ClipVisionConfig::default()
            }),
            num_key_value_heads: Some(2),
            mm_hidden_size: 12,
            ..LlavaMedConfig::tiny()
        }
    }

    fn model(device: &Device) -> LlavaMed {
        init_random(LlavaMed::new(&config(), device).unwrap(), 3, 0.1)
    }

    fn states(model: &LlavaMed, device: &Device) -> Vec<f32> {
        let pixels = Tensor::<4>::ones([1, 3, 8, 8], device);
        model.project(model.vision(pixels)).into_data().as_slice::<f32>().unwrap().to_vec()
    }

    fn names(dir: &Path) -> Vec<String> {
        let mut names: Vec<String> =
            fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    #[test]
    fn a_saved_model_loads_equal_whole_and_in_shards() {
        let device = Device::flex();
        let model = model(&device);
        for (max_shard_bytes, shards) in [(u64::MAX, 1), (8000, 3)] {
            let dir = tempfile::tempdir().unwrap();
            model.save(dir.path(), &SaveOptions { max_shard_bytes, ..SaveOptions::default() }).unwrap();
            let files = names(dir.path()).iter().filter(|n| n.ends_with(".safetensors")).count();
            assert!(files >= shards, "{:?}", names(dir.path()));
            assert_eq!(dir.path().join("model.safetensors.index.json").exists(), shards > 1);
            let loaded = load_dir(dir.path(), &LoadOptions::default(), &device).unwrap();
            assert_eq!(loaded.config().vision_config, model.config().vision_config);
            assert_eq!(states(&loaded, &device), states(&model, &device));
            let (a, b) = (Checkpoint::open(dir.path()).unwrap(), named_params(&loaded));
            assert_eq!(a.names().count(), b.len());
        }
    }

    #[test]
    fn saving_twice_leaves_one_consistent_checkpoint() {
        let device = Device::flex();
        let model = model(&device);
        let dir = tempfile::tempdir().unwrap();
        model.save(dir.path(), &SaveOptions { max_shard_bytes: 8000, ..SaveOptions::default() }).unwrap();
        model.save(dir.path(), &SaveOptions { dtype: FloatDType::BF16, ..SaveOptions::default() }).unwrap();
        let checkpoint = Checkpoint::open(dir.path()).unwrap();
        assert!(checkpoint.names().all(|n| checkpoint.info(n).unwrap().dtype == DType::BF16));
        let name = "model.layers.0.self_attn.k_proj.weight";
        assert_eq!(checkpoint.info(name).unwrap().shape, [8, 16]);
        let weight = model.model.layers[0].self_attn.k_proj.weight.val().transpose().into_data();
        let found = checkpoint.read_f32(name).unwrap();
        for (found, exact) in found.iter().zip(weight.as_slice::<f32>().unwrap()) {
            assert!((found - exact).abs() <= exact.abs() / 256.0, "{found} is not {exact} rounded to bf16");
        }
    }

    /// Logits of a text, and the gradient that reaches its embeddings.
    fn logits(model: &LlavaMed, device: &Device) -> (Tensor<2>, Tensor<3>) {
        let row = Encoded {
            id: "row".into(),
            input_ids: (1..20).collect(),
            labels: vec![0; 19],
            spans: Vec::new(),
            pixels: Vec::new(),
        };
        let batch = Batch::collate(&[row], 0, PaddingSide::Right, 1);
        let device = device.clone().autodiff();
        let context = model.context(&batch, &device);
        let embedded = model.embed_tokens(batch.input_ids(&device)).without_autodiff().autodiff().require_grad();
        let x = (0..model.num_layers()).fold(embedded.clone(), |x, i| model.layer(i, x, &context, None));
        let [rows, length, width] = x.dims();
        let out = model.logits(model.final_norm(x).reshape([rows * length, width]));
        let mut grads = out.clone().square().sum().backward();
        (out.without_autodiff(), embedded.grad_remove(&mut grads).expect("tracked"))
    }

    fn worst<const D: usize>(a: Tensor<D>, b: Tensor<D>) -> f32 {
        let scale: f32 = b.clone().abs().max().into_scalar();
        (a - b).abs().max().into_scalar::<f32>() / scale
    }

    #[test]
    fn half_types_are_kept_in_place_and_compute_as_their_f32_values() {
        let device = Device::flex();
        for (dtype, max_shard_bytes) in [(FloatDType::BF16, u64::MAX), (FloatDType::F16, 5000)] {
            let dir = tempfile::tempdir().unwrap();
            let made = init_random(LlavaMed::new(&config(), &device).unwrap(), 5, 0.3);
            made.save(dir.path(), &SaveOptions { dtype, max_shard_bytes, ..SaveOptions::default() }).unwrap();
            let load = |dtype| load_dir(dir.path(), &LoadOptions { dtype, ..LoadOptions::default() }, &device).unwrap();
            let (kept, wide) = (load(Some(dtype)), load(None));
            for param in named_params(&kept) {
                let matrix = param.linear_weight || param.name.ends_with("embed_tokens.weight");
                let expected = if matrix { dtype } else { FloatDType::F32 };
                assert_eq!(param.dtype, Some(expected.into()), "{}", param.name);
            }
            let ((a, da), (b, db)) = (logits(&kept, &device), logits(&wide, &device));
            assert!(worst(a, b) < 1e-5 && worst(da, db) < 1e-5);
            assert!(states(&kept, &device).iter().zip(states(&wide, &device)).all(|(a, b)| (a - b).abs() < 1e-4));
            // written again, every byte is the same
            let again = tempfile::tempdir().unwrap();
            kept.save(again.path(), &SaveOptions { dtype, max_shard_bytes, ..SaveOptions::default() }).unwrap();
            for name in names(dir.path()) {
                assert_eq!(fs::read(dir.path().join(&name)).unwrap(), fs::read(again.path().join(&name)).unwrap());
            }
            assert_eq!(written_dtype(Dtype::Auto, dir.path()).unwrap(), dtype);
            assert_eq!(written_dtype(Dtype::Float32, dir.path()).unwrap(), FloatDType::F32);
        }
    }

    #[test]
    fn every_missing_unused_and_misshapen_tensor_is_listed() {
        let device = Device::flex();
        let dir = tempfile::tempdir().unwrap();
        model(&device).save(dir.path(), &SaveOptions::default()).unwrap();
        let mut checkpoint = Checkpoint::open(dir.path()).unwrap();
        checkpoint.retain(|name| name != "model.norm.weight" && !name.ends_with("layers.1.mlp.fc1.bias"));
        checkpoint.rename(|name| name.replace("lm_head.weight", "head.weight"));
        let other = LlavaMedConfig { intermediate_size: 32, ..config() };
        let text = load(LlavaMed::new(&other, &device).unwrap(), &checkpoint, FloatDType::F32, Progress::Silent)
            .unwrap_err()
            .to_string();
        for part in [
            "3 missing",
            "model.norm.weight",
            "lm_head.weight",
            "encoder.layers.1.mlp.fc1.bias",
            "1 unused: head.weight",
            "6 wrong shape",
            "model.layers.1.mlp.down_proj.weight (expected [16, 32], found [16, 24])",
        ] {
            assert!(text.contains(part), "{part} is not in {text}");
        }
    }

    #[test]
    fn buffers_of_older_exports_are_ignored() {
        let device = Device::flex();
        let dir = tempfile::tempdir().unwrap();
        model(&device).save(dir.path(), &SaveOptions::default()).unwrap();
        let mut extra = Checkpoint::open(dir.path()).unwrap();
        extra.retain(|name| name == "model.norm.weight");
        extra.rename(|_| "model.layers.0.self_attn.rotary_emb.inv_freq".into());
        let mut checkpoint = Checkpoint::open(dir.path()).unwrap();
        checkpoint.merge(extra);
        load(LlavaMed::new(&config(), &device).unwrap(), &checkpoint, FloatDType::F32, Progress::Silent).unwrap();
    }

    #[test]
    fn damaged_files_are_named() {
        let device = Device::flex();
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("model.safetensors");
        let refused = |what: &str, part: &str| {
            let text = load_dir(dir.path(), &LoadOptions::default(), &device).unwrap_err().to_string();
            assert!(text.contains(part) && text.contains("model"), "{what}: {text}");
        };
        model(&device).save(dir.path(), &SaveOptions::default()).unwrap();
        let whole = fs::read(&file).unwrap();
        fs::write(&file, &whole[..whole.len() - 1]).unwrap();
        refused("truncated data", "damaged");
        fs::write(&file, &whole[..100]).unwrap();
        refused("truncated header", "damaged");
        fs::write(&file, b"").unwrap();
        refused("empty", "");
        let mut corrupt = whole.clone();
        corrupt[8..40].fill(b'x');
        fs::write(&file, &corrupt).unwrap();
        refused("corrupt header", "damaged");
        corrupt[..8].fill(0xff);
        fs::write(&file, &corrupt).unwrap();
        refused("absurd header length", "damaged");
        fs::remove_file(&file).unwrap();
        refused("absent", "no weights");
        fs::write(dir.path().join("model.safetensors.index.json"), r#"{"weight_map": {"a": "model-1.safetensors"}}"#)
            .unwrap();
        refused("missing shard", "model-1.safetensors");
        fs::write(dir.path().join("model.safetensors.index.json"), r#"{"weight_map": {"a": "../x.safetensors"}}"#)
            .unwrap();
        refused("escaping shard", "outside");
        fs::write(dir.path().join("model-1.safetensors"), &whole).unwrap();
        fs::write(dir.path().join("model.safetensors.index.json"), r#"{"weight_map": {"a": "model-1.safetensors"}}"#)
            .unwrap();
        refused("index and shard disagree", "do not hold");
        fs::write(dir.path().join("model.safetensors.index.json"), "{").unwrap();
        refused("broken index", "index");
    }

    #[test]
    fn initialisation_is_a_function_of_the_seed() {
        let device = Device::flex();
        let init = |seed| {
            let any = (crate::models::llava_med::DEF.init)("tiny", Some(50), seed, &device).unwrap();
            let AnyVlm::LlavaMed(model) = any else { panic!("the family it was made from") };
            assert_eq!(model.config().vocab_size, 50);
            model.lm_head.weight.val().into_data().as_slice::<f32>().unwrap().to_vec()
        };
        assert_eq!(init(1), init(1));
        assert_ne!(init(1), init(2));
    }
}
