//! Rows of a run as others shall see them: without what only the making of them needed, images by their new names.

use std::path::{Path, PathBuf};

use serde_json::{Map, Value, json};

use super::view::{Chosen, View};
use crate::{
    datasets::MARKED_SPLIT,
    error::Result,
    leak::picture::Pictures,
    parallel::{CHUNK, ordered},
    run_dir::Lines,
    sample::{ImageRef, Role, Sample, Split},
    stage::encode::RejectedRow,
};

/// Keys of `meta` that are not handed on: the piece of the annotation that an answer was made from, and marks of this
/// program.
const PRIVATE: [&str; 3] = ["evidence", "wrong_pair", MARKED_SPLIT];

/// Rows of a view, read as they are needed: kept ones, then those that come back without quality control.
///
/// # Errors
/// A file of the run is missing or malformed.
pub fn rows(run: &Path, view: View, seed: u64) -> Result<impl Iterator<Item = Result<Sample>>> {
    let (kept, rejected) = (run.join("kept.jsonl"), run.join("rejected.jsonl"));
    let chosen = choose(view, seed, &kept, &rejected)?;
    let again = chosen.clone();
    let path = kept.clone();
    let stay = ordered(Lines::open(&kept)?, CHUNK, move |line| line?.parse::<Sample>(&path))
        .filter(move |row| row.as_ref().map_or(true, |s| chosen.takes(s)));
    let lines = (!view.qc && rejected.exists()).then(|| Lines::open(&rejected)).transpose()?;
    let back = ordered(lines.into_iter().flatten(), CHUNK, move |line| line?.parse::<RejectedRow>(&rejected))
        .filter(move |row| row.as_ref().map_or(true, |r| again.takes_back(r)))
        .map(|row| row.map(|r| r.sample));
    Ok(stay.chain(back))
}

fn choose(view: View, seed: u64, kept: &Path, rejected: &Path) -> Result<Chosen> {
    if view.percent >= 100 {
        return Ok(Chosen::new(view, [], seed));
    }
    let mut groups: Vec<(Split, String)> = Vec::new();
    let mut last = String::new();
    let mut add = |sample: Sample| {
        // Rows of an image stand together; what is left are a few repetitions.
        if sample.group != last {
            last.clone_from(&sample.group);
            groups.push((sample.split, sample.group));
        }
    };
    for line in Lines::open(kept)? {
        add(line?.parse(kept)?);
    }
    if rejected.exists() {
        for line in Lines::open(rejected)? {
            add(line?.parse::<RejectedRow>(rejected)?.sample);
        }
    }
    Ok(Chosen::new(view, groups.iter().map(|(split, group)| (*split, group.as_str())), seed))
}

/// New names of a run's images: their paths below the folder that all of them share.
#[derive(Debug, Default)]
pub struct Names {
    base: PathBuf,
}

impl Names {
    /// Names for all images of a run.
    ///
    /// # Errors
    /// `images.jsonl` cannot be read.
    pub fn of(run: &Path) -> Result<Self> {
        let known = run.join("images.jsonl");
        let pictures = if known.exists() { Pictures::load(&known)? } else { Pictures::default() };
        Ok(Self::new(pictures.all().iter().map(|p| p.path.as_path())))
    }

    fn new<'a>(paths: impl Iterator<Item = &'a Path>) -> Self {
        let mut base: Option<PathBuf> = None;
        for path in paths {
            let dir = path.parent().unwrap_or(Path::new(""));
            base = Some(match base {
                None => dir.to_path_buf(),
                Some(base) => common(&base, dir),
            });
        }
        Self { base: base.unwrap_or_default() }
    }

    /// New name of an image, with `/` between its parts.
    #[must_use]
    pub fn name(&self, path: &Path) -> String {
        let own = path.strip_prefix(&self.base).unwrap_or(path);
        let parts = own.components().filter_map(|c| match c {
            std::path::Component::Normal(part) => Some(part.to_string_lossy().into_owned()),
            _ => None,
        });
        parts.collect::<Vec<_>>().join("/")
    }
}

fn common(a: &Path, b: &Path) -> PathBuf {
    a.components().zip(b.components()).take_while(|(x, y)| x == y).map(|(x, _)| x).collect()
}

/// Everything about a row besides its conversation and images, one level deep.
#[must_use]
pub fn extras(sample: &Sample) -> Map<String, Value> {
    let mut extras = Map::new();
    extras.insert("split".into(), json!(sample.split));
    let mut put = |key: &str, value: Value| {
        if !value.is_null() && value != json!([]) {
            extras.insert(key.into(), value);
        }
    };
    put("group", json!(sample.group));
    put("polarity", json!(sample.polarity));
    put("category", json!(sample.category));
    put("answer_type", json!(sample.answer_type));
    put("options", json!(sample.options));
    put("annotation", json!(sample.annotation));
    put("source", json!(sample.origin.dataset));
    for (key, value) in &sample.meta {
        if !PRIVATE.contains(&key.as_str()) && !RESERVED.contains(&key.as_str()) && !extras.contains_key(key) {
            extras.insert(key.clone(), value.clone());
        }
    }
    extras
}

/// Keys that formats use themselves.
const RESERVED: [&str; 6] = ["id", "image", "images", "conversations", "conversatons", "messages"];

/// A row in LLaVA's form; `image` turns a path into the name to write.
#[must_use]
pub fn llava(sample: &Sample, image: impl Fn(&Path) -> String) -> Value {
    let turns = sample.turns.iter().map(|t| {
        let from = match t.role {
            Role::User => "human",
            Role::Assistant => "gpt",
            Role::System => "system",
        };
        json!({ "from": from, "value": t.text })
    });
    let mut row = Map::new();
    row.insert("id".into(), json!(sample.id));
    match sample.images.as_slice() {
        [] => {}
        [one] => drop(row.insert("image".into(), json!(image(&one.path)))),
        many => drop(row.insert("image".into(), many.iter().map(|i| image(&i.path)).collect())),
    }
    row.insert("conversations".into(), turns.collect());
    row.extend(extras(sample));
    Value::Object(row)
}

/// A row as chat messages.
#[must_use]
pub fn messages(sample: &Sample, image: impl Fn(&Path) -> String) -> Value {
    let mut row = Map::new();
    row.insert("id".into(), json!(sample.id));
    row.insert("images".into(), sample.images.iter().map(|i| image(&i.path)).collect());
    row.insert("messages".into(), sample.turns.iter().map(|t| json!({ "role": t.role, "content": t.text })).collect());
    row.extend(extras(sample));
    Value::Object(row)
}

/// The row with its image marks behind the question, as MedHallTune has them everywhere.
#[must_use]
pub fn suffixed(mut sample: Sample) -> Sample {
    for turn in sample.turns.iter_mut().filter(|t| t.role == Role::User) {
        let marks = turn.text.matches("<image>").count();
        if marks > 0 {
            let words = turn.text.replace("<image>", "");
            turn.text = format!("{}{}", words.trim(), "\n<image>".repeat(marks));
        }
    }
    sample
}

/// Files of the images of a row.
pub(super) fn files(sample: &Sample) -> impl Iterator<Item = &Path> {
    sample.images.iter().map(|ImageRef { path }| path.as_path())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{qc::tests::row, sample::Polarity};

    #[test]
    fn names_are_paths_below_the_common_folder() {
        let paths = ["/data/slake/xmlab1/source.jpg", "/data/slake/xmlab2/source.jpg"].map(Path::new);
        let names = Names::new(paths.into_iter());
        assert_eq!(paths.map(|p| names.name(p)), ["xmlab1/source.jpg", "xmlab2/source.jpg"]);
        let one = Names::new([Path::new("a/b/c.png")].into_iter());
        assert_eq!(one.name(Path::new("a/b/c.png")), "c.png");
    }

    #[test]
    fn evidence_stays_here_and_marks_go_behind() {
        let mut sample = row("<image>\nIs it large?", "It is small.");
        sample.images = vec![ImageRef { path: "d/a.png".into() }];
        sample.polarity = Some(Polarity::Hallucination);
        sample.meta.insert("evidence".into(), "a small nodule".into());
        sample.meta.insert("modality".into(), "CT".into());
        sample.meta.insert("id".into(), "other".into());
        let sample = suffixed(sample);
        let got = llava(&sample, |p| p.file_name().unwrap().to_string_lossy().into_owned());
        assert_eq!(got["conversations"][0]["value"], "Is it large?\n<image>");
        assert_eq!((&got["id"], &got["image"]), (&json!("row"), &json!("a.png")));
        assert_eq!((&got["polarity"], &got["modality"]), (&json!("hallucination"), &json!("CT")));
        assert!(got.get("evidence").is_none());
        assert_eq!(messages(&sample, |_| "x".into())["messages"][1]["content"], "It is small.");
    }
}
