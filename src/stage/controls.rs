//! Controls of an evaluation: the same questions without their image, and with another image. A model whose answers
//! stay the same does not look.

use std::collections::{BTreeMap, BTreeSet};

use rand::seq::SliceRandom;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::eval::Which;
use crate::{
    random::stream,
    sample::{ImageRef, Role, Sample, meta},
};

/// What is done to the image.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Control {
    /// The question is asked without an image.
    Blind,
    /// The question is asked about the image of another case, of the same kind where there is one.
    Swapped,
}

impl Control {
    /// Word of tables.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Blind => "blind",
            Self::Swapped => "swapped",
        }
    }
}

/// A row of `controls.jsonl`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ControlAnswer {
    /// Id of the sample.
    pub id: String,
    /// Who answered.
    pub model: Which,
    /// What was done to the image.
    pub control: Control,
    /// What was answered.
    pub answer: String,
}

/// The rows of `samples` that have an image, changed as `control` says; ids stay.
#[must_use]
pub fn changed(samples: &[&Sample], control: Control, seed: u64) -> Vec<Sample> {
    let donors = match control {
        Control::Blind => BTreeMap::new(),
        Control::Swapped => donors(samples, seed),
    };
    let with_image = samples.iter().filter(|s| !s.images.is_empty());
    with_image
        .filter_map(|sample| {
            let mut row = (*sample).clone();
            match control {
                Control::Blind => {
                    row.images.clear();
                    for turn in row.turns.iter_mut().filter(|t| t.role == Role::User) {
                        turn.text = turn.text.replace("<image>", "").trim().to_string();
                    }
                }
                Control::Swapped => {
                    let donor = donors.get(cluster(sample))?;
                    row.images = (0..row.images.len()).map(|i| donor[i % donor.len()].clone()).collect();
                }
            }
            Some(row)
        })
        .collect()
}

/// For each case the images of the next one, in a seeded order of all cases of its kind; cases that are the only one of
/// their kind take turns among all. None where there is only one case at all.
fn donors(samples: &[&Sample], seed: u64) -> BTreeMap<String, Vec<ImageRef>> {
    let mut images: BTreeMap<&str, &Vec<ImageRef>> = BTreeMap::new();
    let mut kinds: BTreeMap<&str, BTreeSet<&str>> = BTreeMap::new();
    for sample in samples.iter().filter(|s| !s.images.is_empty()) {
        images.entry(cluster(sample)).or_insert(&sample.images);
        kinds.entry(modality(sample).unwrap_or_default()).or_default().insert(cluster(sample));
    }
    let all: Vec<&str> = images.keys().copied().collect();
    let mut found = BTreeMap::new();
    for (number, group) in kinds.into_values().enumerate() {
        let mut order: Vec<&str> = group.into_iter().collect();
        order.shuffle(&mut stream(seed, "control/swapped", number as u64));
        for (i, case) in order.iter().enumerate() {
            let mut donor = order[(i + 1) % order.len()];
            if donor == *case {
                let at = all.partition_point(|c| c < case);
                donor = all[(at + 1) % all.len()];
            }
            if donor != *case {
                found.entry((*case).to_string()).or_insert_with(|| images[donor].clone());
            }
        }
    }
    found
}

fn cluster(sample: &Sample) -> &str {
    if sample.group.is_empty() { &sample.id } else { &sample.group }
}

/// The kind of image a row is about (X-ray, CT, microscopy, ..), where its source says so.
#[must_use]
pub fn modality(sample: &Sample) -> Option<&str> {
    let direct = sample.meta.get(meta::MODALITY).and_then(|m| m.as_str());
    direct.or_else(|| sample.meta.get("truth")?.get("modality")?.as_str()).map(str::trim).filter(|m| !m.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{metric::clinical::tests::row, sample::Turn};

    fn case(id: &str, group: &str, kind: &str) -> Sample {
        let mut sample = Sample { id: id.into(), group: group.into(), ..row(None) };
        sample.images = vec![ImageRef { path: format!("{group}.png").into() }];
        sample.turns = vec![
            Turn { role: Role::User, text: "<image>\nIs it?".into() },
            Turn { role: Role::Assistant, text: "No.".into() },
        ];
        sample.meta.insert("modality".into(), kind.into());
        sample
    }

    fn path(sample: &Sample) -> String {
        sample.images[0].path.display().to_string()
    }

    #[test]
    fn a_swap_changes_every_image_within_its_kind_and_is_the_same_again() {
        let mut samples: Vec<Sample> =
            (0..9).map(|i| case(&format!("r{i}"), &format!("g{}", i / 2), ["ct", "mr"][i / 2 % 2])).collect();
        samples.push(case("lone", "lone", "us"));
        samples.push(Sample { images: Vec::new(), ..case("text", "text", "ct") });
        let all: Vec<&Sample> = samples.iter().collect();
        let swapped = changed(&all, Control::Swapped, 7);
        assert_eq!(swapped.len(), 10, "a row without an image has no control");
        for (before, after) in samples.iter().zip(&swapped) {
            assert_eq!((&before.id, &before.turns), (&after.id, &after.turns));
            assert_ne!(path(before), path(after), "{}", before.id);
            if before.id != "lone" {
                let donor = samples.iter().find(|s| path(s) == path(after)).unwrap();
                assert_eq!(modality(donor), modality(before));
            }
        }
        // Rows of one image stay together.
        assert_eq!(path(&swapped[0]), path(&swapped[1]));
        assert_eq!(changed(&all, Control::Swapped, 7), swapped);
        assert!(changed(&all[..1], Control::Swapped, 7).is_empty(), "one case has no other");
    }

    #[test]
    fn a_blind_row_has_neither_image_nor_mark() {
        let sample = case("r", "g", "ct");
        let blind = changed(&[&sample], Control::Blind, 1);
        assert!(blind[0].images.is_empty());
        assert_eq!(blind[0].turns[0].text, "Is it?");
        assert_eq!(blind[0].turns[1].text, "No.");
    }

    #[test]
    fn the_kind_of_image_is_found_where_sources_put_it() {
        let mut sample = row(None);
        assert_eq!(modality(&sample), None);
        sample.meta.insert("truth".into(), serde_json::json!({"modality": "chest_xray"}));
        assert_eq!(modality(&sample), Some("chest_xray"));
        sample.meta.insert(meta::MODALITY.into(), "CT".into());
        assert_eq!(modality(&sample), Some("CT"));
    }
}
