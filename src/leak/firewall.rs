//! Evaluation sets that must not be trained on, and what of the data is in them.

use std::{
    collections::{BTreeSet, HashMap},
    path::{Path, PathBuf},
};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{
    Grams,
    identity::image_names,
    picture::{LookIndex, Pictures, alike},
};
use crate::{
    datasets::{self, MARKED_SPLIT},
    error::{Error, Kind, Result},
    qc::hash::hash,
    sample::{ImageRef, Sample},
    source::DataConfig,
};

/// `[data.firewall]` of a recipe: what keeps tests out of training.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct FirewallConfig {
    /// Sets that a model will be tested on elsewhere, each as SOURCE:PATH, for example "slake:data/slake". Rows about
    /// their images are not trained on. Where a set marks splits, only its test rows count.
    pub eval_sets: Vec<String>,
    /// Whether pictures that look the same count as one, also when their bytes differ: they stay in one split, and are
    /// recognised in evaluation sets.
    pub similar_images: bool,
}

impl Default for FirewallConfig {
    fn default() -> Self {
        Self { eval_sets: Vec::new(), similar_images: true }
    }
}

impl FirewallConfig {
    /// Reader and path of every evaluation set.
    ///
    /// # Errors
    /// An entry is not SOURCE:PATH.
    pub fn parsed(&self) -> Result<Vec<(&str, PathBuf)>> {
        self.eval_sets.iter().map(|entry| parse(entry)).collect()
    }
}

fn parse(entry: &str) -> Result<(&str, PathBuf)> {
    let (source, path) = entry.split_once(':').filter(|(_, path)| !path.is_empty()).ok_or_else(|| {
        Error::new(Kind::Config, "an evaluation set is not SOURCE:PATH")
            .at("data.firewall.eval_sets")
            .expected("for example \"slake:data/slake\"")
            .found(entry)
            .help("`medtune datasets` lists the sources")
    })?;
    datasets::find(source)?;
    Ok((source, PathBuf::from(path)))
}

/// An evaluation set as it is compared with training rows.
#[derive(Debug, Default)]
pub struct EvalSet {
    /// As the recipe names it.
    pub name: String,
    /// Rows that are tested.
    pub rows: usize,
    /// Rows of it that cannot be read, and so not be compared.
    pub unreadable: usize,
    /// Their images.
    pub pictures: Pictures,
    /// Their questions.
    pub(super) grams: Grams,
}

/// All evaluation sets, and which of the data's images are in them.
#[derive(Debug, Default)]
pub struct Firewall {
    /// In the order of the recipe.
    pub sets: Vec<EvalSet>,
    /// Names of evaluation images, with the number of their set.
    names: HashMap<u64, usize>,
    /// The data's images that are in a set: position, number of the set, and how it was found.
    found: HashMap<usize, (usize, String)>,
}

impl Firewall {
    /// Reads the evaluation sets of a recipe; what their readers unpack goes below `work_dir`.
    ///
    /// # Errors
    /// A set cannot be read at all.
    pub fn load(config: &FirewallConfig, seed: u64, work_dir: &Path) -> Result<Self> {
        let mut firewall = Self::default();
        for (number, (source, path)) in config.parsed()?.into_iter().enumerate() {
            let set = DataConfig { source: source.into(), path: Some(path), ..DataConfig::default() };
            let dir = work_dir.join(format!("{number}"));
            let name = config.eval_sets[number].clone();
            firewall.read(name, datasets::find(source)?.open(&set, seed, &dir)?);
        }
        Ok(firewall)
    }

    fn read(&mut self, name: String, samples: impl Iterator<Item = Result<Sample>>) {
        struct Row {
            marked: bool,
            images: Vec<ImageRef>,
            names: Vec<String>,
            grams: Vec<u64>,
        }
        let mut set = EvalSet { name, ..EvalSet::default() };
        let mut rows = Vec::new();
        for sample in samples {
            let Ok(sample) = sample else {
                set.unreadable += 1;
                continue;
            };
            rows.push(Row {
                marked: sample.meta.get(MARKED_SPLIT).is_some_and(|m| m == "test"),
                names: image_names(&sample),
                grams: super::grams(&sample),
                images: sample.images,
            });
        }
        if rows.iter().any(|r| r.marked) {
            rows.retain(|r| r.marked);
        }
        let number = self.sets.len();
        set.rows = rows.len();
        set.pictures.look_at(rows.iter().flat_map(|r| &r.images).map(|i| i.path.as_path()));
        for row in rows {
            set.grams.add(row.grams);
            self.names.extend(row.names.iter().map(|name| (hash(name.as_bytes()), number)));
        }
        self.sets.push(set);
    }

    /// Finds the data's images in the sets: by bytes, and with `similar` by look.
    pub fn look_for(&mut self, pictures: &Pictures, similar: bool) {
        self.found.clear();
        for (number, set) in self.sets.iter().enumerate() {
            let mut contents: HashMap<&str, &Path> = HashMap::new();
            let mut looks = LookIndex::default();
            for (i, picture) in set.pictures.all().iter().enumerate() {
                contents.extend(picture.sha256.as_deref().map(|content| (content, picture.path.as_path())));
                if let Some(hash) = picture.hash.filter(|_| similar) {
                    looks.add(i, hash);
                }
            }
            let mut likely = Vec::new();
            for (i, picture) in pictures.all().iter().enumerate() {
                if let Some(path) = picture.sha256.as_deref().and_then(|content| contents.get(content)) {
                    self.found.entry(i).or_insert((number, format!("same bytes as {}", path.display())));
                } else if let Some(hash) = &picture.hash {
                    likely.extend(looks.near(hash).into_iter().map(|j| (i, j)));
                }
            }
            for (i, j) in alike(pictures.all(), set.pictures.all(), likely) {
                let path = &set.pictures.all()[j].path;
                self.found.entry(i).or_insert((number, format!("looks like {}", path.display())));
            }
        }
    }

    /// Why a row must not be trained on, if an evaluation set has one of its images.
    #[must_use]
    pub fn objection(&self, sample: &Sample, pictures: &Pictures) -> Option<String> {
        let (set, how) = self.find(sample, pictures)?;
        Some(format!("its image is in the evaluation set {}: {how}", self.sets[set].name))
    }

    fn find(&self, sample: &Sample, pictures: &Pictures) -> Option<(usize, String)> {
        if self.sets.is_empty() {
            return None;
        }
        let shown = sample.images.iter().filter_map(|i| pictures.index(&i.path));
        let seen = shown.filter_map(|i| self.found.get(&i)).next().cloned();
        seen.or_else(|| {
            let names = image_names(sample);
            let known = names.iter().find_map(|n| Some((n, *self.names.get(&hash(n.as_bytes()))?)));
            known.map(|(name, set)| (set, format!("the same name, {name}")))
        })
    }

    /// Number of the set that has an image of a row.
    pub(super) fn set_of(&self, sample: &Sample, pictures: &Pictures) -> Option<usize> {
        self.find(sample, pictures).map(|(set, _)| set)
    }

    /// The data's images that are in each set.
    pub(super) fn images_found(&self) -> Vec<usize> {
        let found: BTreeSet<(usize, usize)> = self.found.iter().map(|(image, (set, _))| (*set, *image)).collect();
        (0..self.sets.len()).map(|set| found.iter().filter(|(s, _)| *s == set).count()).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{leak::picture::tests::picture, qc::tests::row};

    fn about(path: &Path, question: &str) -> Sample {
        Sample { images: vec![ImageRef { path: path.into() }], ..row(question, "Yes, it is.") }
    }

    #[test]
    fn images_are_recognised_by_name_bytes_and_look() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        for (i, name) in ["e1.png", "e2.png", "synpic54610.png", "other.png"].iter().enumerate() {
            picture(&path(name), i as u64, 0);
        }
        std::fs::create_dir(path("train")).unwrap();
        std::fs::copy(path("e1.png"), path("train/renamed.png")).unwrap();
        image::open(path("e2.png")).unwrap().to_rgb8().save(path("train/again.jpg")).unwrap();
        picture(&path("train/synpic54610.png"), 9, 0);
        picture(&path("train/new.png"), 10, 0);
        let marked = |name: &str, split: &str| {
            let mut sample = about(&path(name), "Is there a large pleural effusion on the left side?");
            sample.meta.insert(MARKED_SPLIT.into(), split.into());
            Ok(sample)
        };
        let mut firewall = Firewall::default();
        let rows = [
            marked("e1.png", "test"),
            marked("e2.png", "test"),
            marked("synpic54610.png", "test"),
            marked("other.png", "train"),
        ];
        firewall.read("set".into(), rows.into_iter().chain([Err(Error::new(Kind::Data, "cut"))]));
        assert_eq!((firewall.sets[0].rows, firewall.sets[0].unreadable), (3, 1));
        let rows =
            ["renamed.png", "again.jpg", "synpic54610.png", "new.png"].map(|n| about(&path("train").join(n), "Q?"));
        let mut pictures = Pictures::default();
        pictures.look_at(rows.iter().flat_map(|s| &s.images).map(|i| i.path.as_path()));
        pictures.look_at([path("other.png").as_path()]);
        firewall.look_for(&pictures, true);
        let why = rows.each_ref().map(|s| firewall.objection(s, &pictures).unwrap_or_default());
        for (why, part) in why.iter().zip(["same bytes", "looks like", "the same name"]) {
            assert!(why.contains(part), "{why}");
        }
        assert_eq!(why[3], "");
        assert!(
            firewall.objection(&about(&path("other.png"), "Q?"), &pictures).is_none(),
            "a training image of the set"
        );
        assert_eq!(firewall.images_found(), [2]);
        firewall.look_for(&pictures, false);
        assert!(firewall.objection(&rows[1], &pictures).is_none());
    }

    #[test]
    fn sets_are_source_and_path() {
        let config = |entry: &str| FirewallConfig { eval_sets: vec![entry.into()], ..FirewallConfig::default() };
        assert_eq!(config("messages:a/b:c").parsed().unwrap(), [("messages", PathBuf::from("a/b:c"))]);
        for bad in ["messages", "messages:", "nonsense:x"] {
            assert!(config(bad).parsed().is_err(), "{bad}");
        }
    }
}
