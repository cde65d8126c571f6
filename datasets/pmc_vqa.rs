//! PMC-VQA: multiple-choice questions about figures of PubMed Central articles, versions 1 and 2.
//!
//! Zhang et al., arXiv:2305.10415. Cells look like ` A:Focal uptake pattern `; the letter, the colon and the blanks are
//! taken off. Version 1 names the right letter `Answer_label`, version 2 `Answer`; early files spell `Anwser`.

use std::path::{Path, PathBuf};

use serde_json::json;

use super::io::{
    Record,
    driver::{Images, Part, Reading, article_of, nothing_to_read, question, root, with_article, with_options},
    layout,
};
use crate::{
    error::Result,
    sample::{Sample, Split, meta},
    source::{DataConfig, Download, Facts, Release, Samples, Source},
};

/// The reader.
pub struct PmcVqa;

/// Columns of the choices, in order.
const CHOICES: [&str; 4] = ["Choice A", "Choice B", "Choice C", "Choice D"];

/// Files of a folder that belong together; of the two test files of version 1, the checked one.
const VERSIONS: [&[&str]; 4] =
    [&["train.csv", "test_clean.csv"], &["train.csv", "test.csv"], &["train_2.csv", "test_2.csv"], &["test.csv"]];

const FACTS: Facts = Facts {
    licence: "CC BY-SA 4.0",
    home: "https://huggingface.co/datasets/RadGenome/PMC-VQA",
    releases: &[
        Release { name: "test_clean.csv of version 1", rows: &[(Split::Test, 2000)] },
        Release { name: "version 2", rows: &[(Split::Train, 176_948)] },
    ],
    download: Some(Download { repo: "RadGenome/PMC-VQA", files: &["*.csv", "images*.zip"] }),
};

impl Source for PmcVqa {
    fn name(&self) -> &'static str {
        "pmc_vqa"
    }

    fn doc(&self) -> &'static str {
        "PMC-VQA: multiple-choice questions about figures of PubMed Central articles.\n\
         `data.path` is a folder with train.csv and test_clean.csv (else test.csv) of version 1, or train_2.csv and \
         test_2.csv of version 2, or one of the files; images lie in images/ or figures/ beside them. Options come without \
         letters, the answer is the text of one of them. Rows are kept together by article. Version 2 has captions, which \
         become annotations."
    }

    fn facts(&self) -> &'static Facts {
        &FACTS
    }

    fn open(&self, config: &DataConfig, _seed: u64, work_dir: &Path) -> Result<Samples> {
        let root = root(config)?;
        let files = files(&root)?;
        let dir = files[0].parent().unwrap_or(Path::new("")).to_path_buf();
        let folders = vec![dir.join("images"), dir.join("figures"), dir.join("images_2/figures"), dir];
        let images = Images::new(config, work_dir, folders);
        let options = config.clone();
        let reading = Reading { source: self, config, work_dir, answers_optional: false };
        reading.parts(files.into_iter().map(Part::named).collect(), move |record, part| {
            read(record, part, &images, &options)
        })
    }
}

fn files(root: &Path) -> Result<Vec<PathBuf>> {
    if root.is_file() {
        return Ok(vec![root.to_path_buf()]);
    }
    let whole = VERSIONS.iter().map(|names| (layout::existing(root, names), names.len()));
    let mut found: Vec<(Vec<PathBuf>, usize)> = whole.filter(|(files, _)| !files.is_empty()).collect();
    let best = found.iter().position(|(files, n)| files.len() == *n).unwrap_or(0);
    match found.is_empty() {
        true => Err(nothing_to_read(root, "train.csv, test_clean.csv, train_2.csv or test_2.csv", "pmc_vqa")),
        false => Ok(found.swap_remove(best).0),
    }
}

fn read(record: &Record, part: &Part, images: &Images, config: &DataConfig) -> Result<Sample> {
    let figure = record.need(&["Figure_path"])?;
    let choices: Vec<String> = CHOICES.iter().zip('A'..).map(|(name, letter)| choice(record, name, letter)).collect();
    let options: Vec<String> = choices.iter().filter(|c| !c.is_empty()).cloned().collect();
    let right = right(record, &choices)?;
    let stem = part.path.file_stem().unwrap_or_default().to_string_lossy();
    let id = format!("pmc_vqa-{stem}-{}", record.scalar("index").unwrap_or_else(|| record.row.to_string()));
    let sample = question(id, vec![images.find(&figure)], &record.need(&["Question"])?, &choices[right]);
    let mut sample = with_article(with_options(sample, options, config), article_of(&figure));
    sample.annotation = record.text("Caption").map(String::from);
    sample.meta.insert(meta::QUESTION_ID.into(), json!(format!("{stem}-{}", record.row)));
    Ok(sample)
}

/// A choice without its letter and the blanks around; empty where the cell is.
fn choice(record: &Record, column: &str, letter: char) -> String {
    let cell = record.text(column).unwrap_or_default();
    let bare = cell.strip_prefix(letter).and_then(|rest| rest.trim_start().strip_prefix(':'));
    bare.unwrap_or(cell).trim().to_string()
}

/// Position of the right choice: by its letter, and by its text where there is no letter.
fn right(record: &Record, choices: &[String]) -> Result<usize> {
    let stated = record.need(&["Answer_label", "Answer", "Anwser"])?;
    let letter = match stated.trim_end_matches([':', '.', ')']).as_bytes() {
        [byte] => usize::from(byte.to_ascii_uppercase()).checked_sub(usize::from(b'A')),
        _ => None,
    };
    let place = letter.or_else(|| choices.iter().position(|c| *c == stated));
    place.filter(|at| choices.get(*at).is_some_and(|c| !c.is_empty())).ok_or_else(|| {
        record
            .error("options", "the answer of a row is none of its choices")
            .expected(choices.join(" | "))
            .found(stated)
    })
}
