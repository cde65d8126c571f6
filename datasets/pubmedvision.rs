//! PubMedVision: conversations about figures of PubMed articles, rewritten from captions by GPT-4V.
//!
//! Chen et al., arXiv:2406.19280. `PubMedVision_Alignment_VQA.json` and `PubMedVision_InstructionTuning_VQA.json`. The
//! image of a row is a list, questions have no `<image>` mark, a few of the images named are missing from the release.

use std::path::Path;

use serde_json::json;

use super::{
    io::{
        Record,
        driver::{Images, Part, Reading, article_of, nothing_to_read, root, with_article},
        layout,
    },
    llava,
};
use crate::{
    error::Result,
    sample::{Sample, Split, meta},
    source::{DataConfig, Download, Facts, Release, Samples, Source},
};

/// The reader.
pub struct PubMedVision;

const FILES: [&str; 2] = ["PubMedVision_Alignment_VQA.json", "PubMedVision_InstructionTuning_VQA.json"];

const FACTS: Facts = Facts {
    licence: "Apache-2.0",
    home: "https://huggingface.co/datasets/FreedomIntelligence/PubMedVision",
    releases: &[
        Release { name: "both files", rows: &[(Split::Train, 1_294_062)] },
        Release { name: "one of the two files", rows: &[(Split::Train, 647_031)] },
    ],
    download: Some(Download {
        repo: "FreedomIntelligence/PubMedVision",
        files: &["PubMedVision_*_VQA.json", "images_*.zip"],
    }),
};

impl Source for PubMedVision {
    fn name(&self) -> &'static str {
        "pubmedvision"
    }

    fn doc(&self) -> &'static str {
        "PubMedVision: conversations about figures of PubMed articles, some with several images.\n\
         `data.path` is the folder that holds PubMedVision_Alignment_VQA.json, PubMedVision_InstructionTuning_VQA.json \
         and images/, or one of the files. The answer of an alignment row describes the image and becomes its \
         annotation. Rows are kept together by article, as far as image names tell; files are streamed."
    }

    fn facts(&self) -> &'static Facts {
        &FACTS
    }

    fn open(&self, config: &DataConfig, _seed: u64, work_dir: &Path) -> Result<Samples> {
        let root = root(config)?;
        let files = if root.is_file() { vec![root.clone()] } else { layout::existing(&root, &FILES) };
        let Some(dir) = files.first().and_then(|f| f.parent()) else {
            return Err(nothing_to_read(&root, &FILES.join(" or "), "pubmedvision"));
        };
        let images = Images::new(config, work_dir, vec![dir.to_path_buf(), dir.join("images")]);
        let parts = files.iter().map(|path| Part { path: path.clone(), split: Some(Split::Train), tag: "" });
        let reading = Reading { source: self, config, work_dir, answers_optional: false };
        reading.parts(parts.collect(), move |record, part| read(record, part, &images))
    }
}

fn read(record: &Record, part: &Part, images: &Images) -> Result<Sample> {
    let mut sample = llava::read(record, images)?;
    let first = record.fields.get("image").and_then(|v| v.get(0).unwrap_or(v).as_str());
    sample = with_article(sample, first.and_then(article_of));
    if part.path.to_string_lossy().contains("Alignment") {
        sample.annotation = Some(sample.answer().to_string());
    }
    for (key, field) in [(meta::MODALITY, "modality"), (meta::LOCATION, "body_part")] {
        sample.meta.remove(field);
        if let Some(value) = record.scalar(field) {
            sample.meta.insert(key.into(), json!(value));
        }
    }
    Ok(sample)
}
