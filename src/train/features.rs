//! Features of images that a frozen vision tower has already seen.

use std::collections::HashMap;

use burn::{
    module::Module,
    tensor::{Device, Tensor, TensorData},
};
use sha2::{Digest, Sha256};

use crate::vlm::{Batch, Pixels, Vlm};

/// Device memory for them.
pub(super) const FEATURE_BYTES: usize = 512 << 20;

/// Features of images that a frozen tower has already seen. Every image passes the tower alone, so that its features
/// do not depend on what else is in the batch, or on what the cache holds.
#[derive(Default)]
pub(super) struct FeatureCache {
    seen: HashMap<[u8; 32], Tensor<3>>,
    bytes: usize,
}

impl FeatureCache {
    pub(super) fn get<M: Vlm + Module>(&mut self, model: &M, batch: &Batch, device: &Device) -> Tensor<3> {
        let mut plain: Option<M> = None;
        let features: Vec<Tensor<3>> = batch
            .pixels
            .iter()
            .map(|pixels| {
                let key = key(pixels);
                if let Some(features) = self.seen.get(&key) {
                    return features.clone();
                }
                let plain = plain.get_or_insert_with(|| model.valid());
                let [c, h, w] = pixels.shape;
                let data = TensorData::new(pixels.data.clone(), [1, c, h, w]);
                let features = plain.vision(Tensor::from_data(data, device));
                let bytes = 4 * features.shape().num_elements();
                if self.bytes + bytes <= FEATURE_BYTES {
                    self.bytes += bytes;
                    self.seen.insert(key, features.clone());
                }
                features
            })
            .collect();
        Tensor::cat(features, 0)
    }
}

fn key(pixels: &Pixels) -> [u8; 32] {
    let mut hash = Sha256::new();
    for n in pixels.shape {
        hash.update((n as u64).to_le_bytes());
    }
    let bytes: Vec<u8> = pixels.data.iter().flat_map(|v| v.to_le_bytes()).collect();
    hash.update(&bytes);
    hash.finalize().into()
}
