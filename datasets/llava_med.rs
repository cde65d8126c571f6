//! LLaVA-Med's own files: the alignment and instruction conversations, the figure captions they were made from, and the
//! evaluation questions.
//!
//! Li et al., arXiv:2306.00890. The key of a conversation is `conversatons` in older files; mentions in the text are
//! strings or objects with `tokens`; the caption file is an object of lists by domain.

use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use super::{
    io::{
        Record,
        driver::{Images, Part, Reading, article_of, caption, nothing_to_read, question, root, with_article},
        layout,
    },
    llava,
};
use crate::{
    error::{Error, Kind, Result},
    sample::{Sample, Split, meta},
    source::{DataConfig, Facts, Release, Samples, Source},
};

/// The reader.
pub struct LlavaMed;

const FACTS: Facts = Facts {
    licence: "CC BY-NC 4.0",
    home: "https://github.com/microsoft/LLaVA-Med",
    releases: &[
        Release { name: "llava_med_instruct_10k.json", rows: &[(Split::Train, 10_000)] },
        Release { name: "llava_med_instruct_60k.json", rows: &[(Split::Train, 60_000)] },
        Release { name: "llava_med_alignment_500k.json", rows: &[(Split::Train, 500_000)] },
    ],
    download: None,
};

impl Source for LlavaMed {
    fn name(&self) -> &'static str {
        "llava_med"
    }

    fn doc(&self) -> &'static str {
        "LLaVA-Med's files: alignment and instruction conversations, figure captions, evaluation questions.\n\
         `data.path` is one of the JSON files (or a folder that holds a single one), `data.image_dir` the folder of the \
         images, by default images/ beside the file or one or two levels above. Captions become annotations, with the \
         mentions in the article's text in meta.in_text_mention; domains become meta.modality; rows are kept together by \
         article. Files are streamed. The copies on GitHub are Git LFS pointers; the published counts are rounded."
    }

    fn facts(&self) -> &'static Facts {
        &FACTS
    }

    fn open(&self, config: &DataConfig, _seed: u64, work_dir: &Path) -> Result<Samples> {
        let file = file(root(config)?)?;
        let mut folders: Vec<PathBuf> = Vec::new();
        for dir in file.ancestors().skip(1).take(3) {
            folders.push(dir.join("images"));
        }
        folders.extend(file.parent().map(Path::to_path_buf));
        let images = Images::new(config, work_dir, folders);
        let evaluation = file.file_name().is_some_and(|n| n.to_string_lossy().contains("eval"));
        let split = Some(if evaluation { Split::Test } else { Split::Train });
        let reading = Reading { source: self, config, work_dir, answers_optional: false };
        reading.parts(vec![Part { path: file, split, tag: "" }], move |record, _| read(record, &images))
    }
}

fn file(root: PathBuf) -> Result<PathBuf> {
    if root.is_file() {
        return Ok(root);
    }
    let found = layout::with_extension(&root, "json", 2)?;
    match found.as_slice() {
        [] => Err(nothing_to_read(&root, "a JSON file of LLaVA-Med", "llava_med")),
        [only] => Ok(only.clone()),
        several => Err(Error::new(Kind::Config, "the folder holds several files of LLaVA-Med")
            .at("data.path")
            .found(several.iter().map(|p| p.display().to_string()).collect::<Vec<_>>().join(", "))
            .help("name one of them; they hold different kinds of rows about the same images")),
    }
}

fn read(record: &Record, images: &Images) -> Result<Sample> {
    let mut sample = match () {
        () if record.fields.contains_key("conversations") || record.fields.contains_key("conversatons") => {
            llava::read(record, images)?
        }
        () if record.fields.contains_key("text") => evaluation(record, images)?,
        () => figure(record, images)?,
    };
    let stem = sample.images.first().and_then(|i| Some(i.path.file_name()?.to_string_lossy().into_owned()));
    let stated = record.scalar("pmid").map(|pmid| format!("pmid:{pmid}"));
    sample = with_article(sample, stated.or_else(|| article_of(&stem?)));
    if let Some(modality) = domains(record) {
        sample.meta.insert(meta::MODALITY.into(), json!(modality));
    }
    Ok(sample)
}

/// A figure with its caption and the mentions of it in the article.
fn figure(record: &Record, images: &Images) -> Result<Sample> {
    let pair = record.need(&["pair_id"])?;
    let image = images.find_stem(&pair, &["jpg", "png"]);
    let mut sample = caption(format!("llava_med-{pair}"), vec![image], &record.need(&["fig_caption"])?);
    let mentions = mentions(record.fields.get("in_text_mention"));
    sample.meta.insert("in_text_mention".into(), json!(mentions));
    for key in ["fig_label", "fig_id"] {
        if let Some(value) = record.scalar(key) {
            sample.meta.insert(key.into(), json!(value));
        }
    }
    Ok(sample)
}

fn evaluation(record: &Record, images: &Images) -> Result<Sample> {
    let qid = record.need(&["question_id"])?;
    let image = match record.text("image") {
        Some(name) => images.find(name),
        None => images.find_stem(&record.need(&["pair_id"])?, &["jpg", "png"]),
    };
    let answer = record.need(&["gpt4_answer"])?;
    let mut sample = question(format!("llava_med-eval-{qid}"), vec![image], &record.need(&["text"])?, &answer);
    sample.annotation = record.scalar("fig_caption");
    sample.category = record.scalar("type");
    sample.meta.insert(meta::QUESTION_ID.into(), json!(qid));
    sample.meta.insert("in_text_mention".into(), json!(mentions(record.fields.get("in_text_mention"))));
    Ok(sample)
}

fn mentions(value: Option<&Value>) -> Vec<String> {
    let one = |value: &Value| value.as_str().or_else(|| value.get("tokens")?.as_str()).map(String::from);
    match value {
        Some(Value::Array(list)) => list.iter().filter_map(one).collect(),
        Some(value) => one(value).into_iter().collect(),
        None => Vec::new(),
    }
}

/// Names of the domains that are true; the list a caption stands in where it says none.
fn domains(record: &Record) -> Option<String> {
    let all = record.fields.get("domain").and_then(Value::as_object);
    let stated: Vec<&str> =
        all.into_iter().flatten().filter(|(_, on)| *on == &json!(true)).map(|(name, _)| name.as_str()).collect();
    if stated.is_empty() { record.key.clone() } else { Some(stated.join(", ")) }
}
