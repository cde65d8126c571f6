//! SLAKE 1.0: bilingual questions about CT, MRI and X-ray images, with knowledge-based ones.
//!
//! Liu et al., ISBI 2021, arXiv:2102.09542. `train.json`, `validate.json` (`validation.json` on the hub), `test.json`
//! and `imgs/xmlab<N>/source.jpg`. English and Chinese questions were split separately, so that the marked splits share
//! images when both languages are read.

use std::path::Path;

use serde_json::json;

use super::io::{
    Record,
    driver::{Images, Part, Reading, nothing_to_read, question, root},
    layout,
};
use crate::{
    error::Result,
    sample::{AnswerType, Sample, Split, meta},
    source::{DataConfig, Download, Facts, Release, Samples, Source},
};

/// The reader.
pub struct Slake;

const FILES: [&str; 4] = ["train.json", "validate.json", "validation.json", "test.json"];

const FACTS: Facts = Facts {
    licence: "CC BY 4.0",
    home: "https://www.med-vqa.com/slake/",
    releases: &[
        Release {
            name: "SLAKE, English",
            rows: &[(Split::Train, 4919), (Split::Validation, 1053), (Split::Test, 1061)],
        },
        Release {
            name: "SLAKE, both languages",
            rows: &[(Split::Train, 9835), (Split::Validation, 2099), (Split::Test, 2094)],
        },
    ],
    download: Some(Download { repo: "BoKelvin/SLAKE", files: &["*.json", "imgs.zip"] }),
};

impl Source for Slake {
    fn name(&self) -> &'static str {
        "slake"
    }

    fn doc(&self) -> &'static str {
        "SLAKE: questions in English and Chinese about CT, MRI and X-ray images, open and closed.\n\
         `data.path` is the folder that holds train.json, validate.json (or validation.json), test.json and imgs/, or \
         one of the files. data.language = \"en\" or \"zh\" reads one language; published results use English.\n\
         English and Chinese were split apart from each other: with both, the marked splits share images."
    }

    fn facts(&self) -> &'static Facts {
        &FACTS
    }

    fn open(&self, config: &DataConfig, _seed: u64, work_dir: &Path) -> Result<Samples> {
        let root = root(config)?;
        let files = if root.is_file() { vec![root.clone()] } else { layout::existing(&root, &FILES) };
        let Some(dir) = files.first().and_then(|f| f.parent()) else {
            return Err(nothing_to_read(&root, "train.json, validate.json, validation.json or test.json", "slake"));
        };
        let images = Images::new(config, work_dir, vec![dir.join("imgs"), dir.join("img"), dir.to_path_buf()]);
        let reading = Reading { source: self, config, work_dir, answers_optional: false };
        reading.parts(files.into_iter().map(Part::named).collect(), move |record, part| read(record, part, &images))
    }
}

fn read(record: &Record, part: &Part, images: &Images) -> Result<Sample> {
    let image = record.need(&["img_name"])?;
    let qid = record.need(&["qid"])?;
    let answer = record.need(&["answer"])?;
    let id = format!("slake-{}-{qid}", part.split_name());
    let mut sample = question(id, vec![images.find(&image)], &record.need(&["question"])?, &answer);
    sample.group = format!("slake:{}", image.split('/').next().unwrap_or(&image));
    sample.category = record.scalar("content_type");
    sample.answer_type = Some(match record.need(&["answer_type"])?.to_uppercase().as_str() {
        "OPEN" => AnswerType::Open,
        "CLOSED" => AnswerType::Closed,
        other => {
            return Err(record
                .error("malformed", "unknown answer type of a row")
                .expected("OPEN or CLOSED")
                .found(other));
        }
    });
    let known = [
        (meta::LANGUAGE, "q_lang"),
        (meta::MODALITY, "modality"),
        (meta::LOCATION, "location"),
        (meta::CONTENT_TYPE, "content_type"),
        (meta::QUESTION_TYPE, "base_type"),
    ];
    for (key, field) in known {
        if let Some(value) = record.scalar(field) {
            sample.meta.insert(key.into(), json!(value));
        }
    }
    sample.meta.insert(meta::QUESTION_ID.into(), json!(qid));
    for field in ["img_id", "triple"] {
        if let Some(value) = record.fields.get(field) {
            sample.meta.insert(field.into(), value.clone());
        }
    }
    Ok(sample)
}
