//! Frozen weights that stay in their file: read part by part as a pass needs them, and dropped behind it.
//!
//! The parts are those in which a [`Vlm`](crate::vlm::Vlm) is driven: vision tower, projector, each decoder layer, and
//! what is around the layers. Which pages are in memory changes no result, only the time.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
};

use super::{map, read::Checkpoint};
use crate::{
    error::{Error, Kind, Result},
    vlm::Tower,
};

/// A part of a model that is used as one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Part {
    /// The vision tower.
    Vision,
    /// The projector.
    Projector,
    /// Embeddings, final norm and head.
    Ends,
    /// A decoder layer.
    Layer(usize),
}

impl Part {
    /// The part that the parameter called `name` belongs to.
    #[must_use]
    pub fn of(towers: &[Tower], name: &str) -> Self {
        match Tower::of(towers, name) {
            Some(tower) if tower.name == "vision" => Self::Vision,
            Some(tower) if tower.name == "projector" => Self::Projector,
            tower => {
                let rest = name.strip_prefix(tower.map_or("", |t| t.prefix)).unwrap_or(name);
                rest.split('.').find_map(|s| s.parse().ok()).map_or(Self::Ends, Self::Layer)
            }
        }
    }
}

/// The mapped weights of a model, by part.
pub struct Pages {
    parts: BTreeMap<Part, Vec<map::Part>>,
}

impl fmt::Debug for Pages {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Pages({} parts, {} bytes)", self.parts.len(), self.num_bytes())
    }
}

impl Pages {
    /// The mapped tensors of `checkpoint`. From now on its files are not read ahead; a model that is loaded from them
    /// later takes no memory for what stays in them.
    ///
    /// # Errors
    /// The weights do not lie in a file that can be mapped.
    pub fn of(checkpoint: &Checkpoint, towers: &[Tower]) -> Result<Self> {
        let mut parts = BTreeMap::<Part, Vec<map::Part>>::new();
        let mut unmapped = BTreeSet::new();
        for name in checkpoint.names() {
            match checkpoint.mapped(name) {
                Some(part) => {
                    part.stream();
                    parts.entry(Part::of(towers, name)).or_default().push(part.clone());
                }
                None => unmapped.extend(checkpoint.info(name).map(|i| i.file.display().to_string())),
            }
        }
        if let Some(file) = unmapped.first() {
            return Err(Error::new(Kind::Config, "weights in a PyTorch file cannot stay on disk")
                .at(file)
                .expected("safetensors, because train.offload_params is on")
                .help("`medtune export DIR --out OTHER` writes the checkpoint as safetensors"));
        }
        Ok(Self { parts })
    }

    /// These without the decoder layers, whose weights are held otherwise.
    #[must_use]
    pub fn without_layers(mut self) -> Self {
        self.parts.retain(|part, _| !matches!(part, Part::Layer(_)));
        self
    }

    /// Bytes of all parts.
    #[must_use]
    pub fn num_bytes(&self) -> u64 {
        self.parts.values().flatten().map(map::Part::num_bytes).sum()
    }

    /// Says that `part` is used soon.
    pub fn expect(&self, part: Part) {
        self.parts.get(&part).into_iter().flatten().for_each(map::Part::expect);
    }

    /// Says that `part` is not used for now.
    pub fn release(&self, part: Part) {
        self.parts.get(&part).into_iter().flatten().for_each(map::Part::release);
    }

    /// Says that nothing is used for now.
    pub fn release_all(&self) {
        self.parts.values().flatten().for_each(map::Part::release);
    }
}

/// Says that no weight that stays in its file is used for now.
pub fn release_streamed() {
    map::release_streamed();
}

#[cfg(test)]
mod tests {
    use burn::tensor::{Device, FloatDType};

    use super::*;
    use crate::{
        models::llava_med::{LlavaMed, LlavaMedConfig},
        vlm::Vlm,
        weights::{SaveOptions, init_random},
    };

    #[test]
    fn parameters_belong_to_the_part_that_uses_them() {
        let model = LlavaMed::new(&LlavaMedConfig::tiny(), &Device::flex()).unwrap();
        let part = |name| Part::of(model.towers(), name);
        assert_eq!(part("model.vision_tower.vision_tower.vision_model.encoder.layers.1.mlp.fc1.weight"), Part::Vision);
        assert_eq!(part("model.mm_projector.2.weight"), Part::Projector);
        assert_eq!(part("model.layers.3.mlp.up_proj.weight"), Part::Layer(3));
        assert_eq!((part("model.norm.weight"), part("lm_head.weight")), (Part::Ends, Part::Ends));
    }

    #[test]
    fn a_file_is_mapped_once_and_reads_the_same_after_its_pages_were_dropped() {
        let device = Device::flex();
        let dir = tempfile::tempdir().unwrap();
        let model = init_random(LlavaMed::new(&LlavaMedConfig::tiny(), &device).unwrap(), 3, 0.1);
        model.save(dir.path(), &SaveOptions { dtype: FloatDType::BF16, ..SaveOptions::default() }).unwrap();
        let (first, second) = (Checkpoint::open(dir.path()).unwrap(), Checkpoint::open(dir.path()).unwrap());
        let name = "model.layers.0.mlp.up_proj.weight";
        let at = |c: &Checkpoint| c.mapped(name).unwrap().as_ref().as_ptr();
        if cfg!(unix) {
            assert_eq!(at(&first), at(&second));
        }
        let before = first.read_f32(name).unwrap();
        let pages = Pages::of(&second, model.towers()).unwrap();
        assert_eq!(pages.num_bytes(), first.num_bytes());
        assert!(!cfg!(unix) || first.mapped(name).unwrap().is_streamed());
        pages.release(Part::Layer(0));
        pages.release_all();
        pages.expect(Part::Layer(0));
        assert_eq!(first.read_f32(name).unwrap(), before);
        release_streamed();
        assert_eq!(first.read_f32(name).unwrap(), before);
        let kept = pages.num_bytes();
        assert!(pages.without_layers().num_bytes() < kept);
    }
}
