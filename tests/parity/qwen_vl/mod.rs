//! Qwen-VL-Chat against its original code.

use std::path::PathBuf;

use burn::tensor::{Device, Tensor};
use medtune::models::{
    LoadOptions,
    qwen_vl::{QwenVl, QwenVlConfig, processor::QwenVlProcessor, weights::load_dir},
};

use super::fixture::{Checks, root};

mod forward;
mod generation;
mod lora;
mod preprocess;
mod release;
mod text;
mod vision;

#[test]
fn qwen_vl() {
    let mut checks = Checks::new("qwen_vl");
    text::check(&mut checks);
    preprocess::check(&mut checks);
    vision::check(&mut checks);
    forward::check(&mut checks);
    generation::check(&mut checks);
    lora::check(&mut checks);
    release::check(&mut checks);
    checks.finish();
}

/// The fixture's checkpoint and what belongs to it.
struct Family {
    root: PathBuf,
    config: QwenVlConfig,
    processor: QwenVlProcessor,
}

impl Family {
    fn open() -> Self {
        let root = root("qwen_vl");
        let checkpoint = root.join("checkpoint");
        Self {
            config: QwenVlConfig::open(&checkpoint).unwrap(),
            processor: QwenVlProcessor::load(&checkpoint).unwrap(),
            root,
        }
    }

    fn golden(&self, name: &str) -> PathBuf {
        self.root.join("golden").join(name)
    }

    fn model(&self, device: &Device) -> QwenVl {
        load_dir(&self.root.join("checkpoint"), &LoadOptions::default(), device).unwrap()
    }
}

fn floats<const D: usize>(tensor: Tensor<D>) -> Vec<f32> {
    tensor.cast(burn::tensor::FloatDType::F32).into_data().try_to_vec().unwrap()
}
