//! OmniMedVQA: multiple-choice questions from 73 medical image data sets.
//!
//! Hu et al., CVPR 2024, arXiv:2402.09181. `QA_information/{Open-access,Restricted-access}/<data set>.json` and
//! `Images/`. Questions have two to four options; the answer is the text of one; a record spells `modality` for
//! `modality_type`. Images of the restricted part have to be fetched from their own publishers.

use std::path::{Path, PathBuf};

use serde_json::json;

use super::io::{
    Record,
    driver::{Images, Part, Reading, nothing_to_read, question, root, with_options},
    layout,
};
use crate::{
    error::Result,
    sample::{Sample, Split, meta},
    source::{DataConfig, Download, Facts, Release, Samples, Source},
};

/// The reader.
pub struct OmniMedVqa;

const OPTIONS: [&str; 4] = ["option_A", "option_B", "option_C", "option_D"];

const FACTS: Facts = Facts {
    licence: "CC BY 4.0 for the open-access part; each image under the terms of its own data set",
    home: "https://github.com/OpenGVLab/Multi-Modality-Arena",
    releases: &[
        Release { name: "the open-access part", rows: &[(Split::Test, 88_996)] },
        Release { name: "the whole", rows: &[(Split::Test, 127_995)] },
    ],
    download: Some(Download { repo: "foreverbeliever/OmniMedVQA", files: &["OmniMedVQA.zip"] }),
};

impl Source for OmniMedVqa {
    fn name(&self) -> &'static str {
        "omnimedvqa"
    }

    fn doc(&self) -> &'static str {
        "OmniMedVQA: multiple-choice questions from many medical image data sets; a test set only.\n\
         `data.path` is the folder that holds QA_information/ and Images/: of it the open-access part is read. A folder \
         inside QA_information, or one JSON file, reads just that. Rows whose image is absent (the restricted part comes \
         without images) are counted and set aside."
    }

    fn facts(&self) -> &'static Facts {
        &FACTS
    }

    fn open(&self, config: &DataConfig, _seed: u64, work_dir: &Path) -> Result<Samples> {
        let root = root(config)?;
        let files = files(&root)?;
        let home = files[0].ancestors().skip(1).find(|dir| dir.join("Images").is_dir()).unwrap_or(&root);
        let images = Images::new(config, work_dir, vec![home.to_path_buf()]);
        let parts = files.iter().map(|path| Part { path: path.clone(), split: Some(Split::Test), tag: "" });
        let options = config.clone();
        let reading = Reading { source: self, config, work_dir, answers_optional: false };
        reading.parts(parts.collect(), move |record, _| read(record, &images, &options))
    }
}

fn files(root: &Path) -> Result<Vec<PathBuf>> {
    if root.is_file() {
        return Ok(vec![root.to_path_buf()]);
    }
    let folders = [root.join("QA_information/Open-access"), root.join("Open-access"), root.to_path_buf()];
    let folder = folders.iter().find(|dir| dir.is_dir()).unwrap_or(&folders[2]);
    let found = layout::with_extension(folder, "json", 0)?;
    if found.is_empty() {
        return Err(nothing_to_read(root, "QA_information/Open-access/*.json", "omnimedvqa"));
    }
    Ok(found)
}

fn read(record: &Record, images: &Images, config: &DataConfig) -> Result<Sample> {
    let image = record.need(&["image_path"])?;
    let qid = record.need(&["question_id"])?;
    let options: Vec<String> = OPTIONS.iter().filter_map(|key| record.scalar(key)).collect();
    let stated = record.need(&["gt_answer"])?;
    let right = right(&options, &stated).ok_or_else(|| {
        record
            .error("options", "the answer of a row is none of its options")
            .expected(options.join(" | "))
            .found(&stated)
    })?;
    let text = record.need(&["question"])?;
    let sample = question(format!("omnimedvqa-{qid}"), vec![images.find(&image)], &text, &options[right]);
    let mut sample = with_options(sample, options, config);
    sample.group = format!("omnimedvqa:{image}");
    sample.category = record.scalar("question_type");
    let known = [
        (meta::QUESTION_ID, Some(qid)),
        (meta::QUESTION_TYPE, record.scalar("question_type")),
        (meta::MODALITY, record.scalar("modality_type").or_else(|| record.scalar("modality"))),
        ("dataset", record.scalar("dataset")),
    ];
    for (key, value) in known {
        if let Some(value) = value {
            sample.meta.insert(key.into(), json!(value));
        }
    }
    Ok(sample)
}

/// Position of the answer: word for word, else the only option that differs in case and punctuation alone.
fn right(options: &[String], answer: &str) -> Option<usize> {
    if let Some(exact) = options.iter().position(|option| option == answer) {
        return Some(exact);
    }
    let plain =
        |text: &str| -> String { text.chars().filter(|c| c.is_alphanumeric()).flat_map(char::to_lowercase).collect() };
    let wanted = plain(answer);
    let mut alike = options.iter().enumerate().filter(|(_, option)| plain(option) == wanted).map(|(at, _)| at);
    let first = alike.next()?;
    alike.next().is_none().then_some(first)
}
