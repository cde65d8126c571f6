//! The full-size model, built without memory, against the list of the released tensors.

use std::collections::BTreeMap;

use burn::tensor::Device;
use medtune::{
    models::qwen_vl::{QwenVl, QwenVlConfig},
    nn::visit::named_params,
};

use super::Family;
use crate::parity::fixture::{Checks, json};

pub(super) fn check(checks: &mut Checks) {
    let release = json(&Family::open().root.join("real_weight_index.json"));
    let model = QwenVl::new(&QwenVlConfig::chat_9_6b(), &Device::flex()).unwrap();
    let params = named_params(&model);
    let total: usize = params.iter().map(|p| p.num_elements()).sum();
    checks.equal("parameters of the release", Some(total as u64), release["total_parameters"].as_u64());
    checks.equal("bytes of the release", Some(2 * total as u64), release["total_size_bytes"].as_u64());
    let found: BTreeMap<String, Vec<usize>> =
        params.into_iter().map(|p| (p.name.clone(), p.checkpoint_shape())).collect();
    let expected = release["tensors"].as_object().unwrap();
    checks.equal("tensors of the release", found.len(), expected.len());
    for (name, tensor) in expected {
        let shape: Vec<usize> = serde_json::from_value(tensor[0].clone()).unwrap();
        checks.equal(name, found.get(name), Some(&shape));
    }
}
