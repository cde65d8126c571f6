//! ROCO: captions of radiology and other figures of PubMed Central articles.
//!
//! Pelka et al., LABELS 2018. `data/{train,validation,test}/{radiology,non-radiology}/captions.txt` with `cuis.txt`,
//! `keywords.txt`, `semtypes.txt` and `licences.txt` beside it, and the images in `images/` once the release's script
//! has fetched them. Re-exports as CSV (`id, name, caption`) and as parquet files of the hub are read, too.

use std::{
    collections::HashMap,
    path::{Path, PathBuf},
};

use serde_json::{Value, json};

use super::io::{
    self, Record,
    driver::{Images, Part, Reading, article_of, caption, nothing_to_read, root, with_article},
    layout,
};
use crate::{
    error::Result,
    sample::{Sample, Split, meta},
    source::{DataConfig, Facts, Release, Samples, Source},
};

/// The reader.
pub struct Roco;

const FACTS: Facts = Facts {
    licence: "by figure: `licence` in meta, where the release states it",
    home: "https://github.com/razorx89/roco-dataset",
    releases: &[
        Release { name: "the radiology part", rows: &[(Split::Validation, 8180), (Split::Test, 8179)] },
        Release { name: "the whole", rows: &[(Split::Validation, 8791), (Split::Test, 8791)] },
        Release { name: "a radiology re-export", rows: &[(Split::Train, 65_423)] },
    ],
    download: None,
};

impl Source for Roco {
    fn name(&self) -> &'static str {
        "roco"
    }

    fn doc(&self) -> &'static str {
        "ROCO: captions of radiology and other figures of PubMed Central articles.\n\
         `data.path` is the repository's folder (with data/), a folder inside it such as data/test/radiology, one \
         captions.txt, or a folder with CSV or parquet re-exports. Images are expected in images/ beside captions.txt. \
         CUIs, keywords, semantic types and licence go to meta; `radiology` or `non-radiology` to meta.content_type; rows \
         are kept together by article."
    }

    fn facts(&self) -> &'static Facts {
        &FACTS
    }

    fn open(&self, config: &DataConfig, _seed: u64, work_dir: &Path) -> Result<Samples> {
        let root = root(config)?;
        let files = files(&root)?;
        let (config_, work) = (config.clone(), work_dir.to_path_buf());
        let mut beside = Beside::default();
        let parts = files.into_iter().map(|path| {
            let split = path.ancestors().find_map(layout::split_of);
            Part { tag: kind(&path), path, split }
        });
        let reading = Reading { source: self, config, work_dir, answers_optional: false };
        reading.parts(parts.collect(), move |record, part| {
            let dir = part.path.parent().unwrap_or(Path::new(""));
            if beside.dir != dir {
                beside = Beside::load(dir)?;
            }
            let images = Images::new(&config_, &work, vec![dir.join("images"), dir.to_path_buf()]);
            read(record, part, &images, &beside)
        })
    }
}

fn files(root: &Path) -> Result<Vec<PathBuf>> {
    if root.is_file() {
        return Ok(vec![root.to_path_buf()]);
    }
    let mut text = layout::with_extension(root, "txt", 3)?;
    text.retain(|p| p.file_name().is_some_and(|n| n == "captions.txt"));
    text.sort_by_cached_key(|p| (p.ancestors().find_map(layout::split_of), p.clone()));
    if !text.is_empty() {
        return Ok(text);
    }
    for extension in ["parquet", "csv"] {
        let found = layout::with_extension(root, extension, 3)?;
        if !found.is_empty() {
            return Ok(found);
        }
    }
    Err(nothing_to_read(root, "captions.txt, CSV or parquet files", "roco"))
}

fn kind(path: &Path) -> &'static str {
    let named = |name: &str| path.ancestors().any(|dir| dir.file_name().is_some_and(|n| n == name));
    match () {
        () if named("non-radiology") => "non-radiology",
        () if named("radiology") => "radiology",
        () => "",
    }
}

/// What the files beside `captions.txt` say, by id.
#[derive(Default)]
struct Beside {
    dir: PathBuf,
    lists: Vec<(&'static str, HashMap<String, Value>)>,
    licences: HashMap<String, (String, String)>,
}

impl Beside {
    fn load(dir: &Path) -> Result<Self> {
        let mut beside = Self { dir: dir.to_path_buf(), ..Self::default() };
        for (key, file) in [("cuis", "cuis.txt"), ("keywords", "keywords.txt"), ("semtypes", "semtypes.txt")] {
            let path = dir.join(file);
            if path.is_file() {
                let mut all = HashMap::new();
                // An empty list is a line whose tab may have been trimmed away: then there is nothing to tell.
                for record in io::open(&path)?.flatten() {
                    let values = record.fields.get("values").cloned().unwrap_or_default();
                    all.insert(record.need(&["id"])?, values);
                }
                beside.lists.push((key, all));
            }
        }
        let licences = dir.join("licences.txt");
        if licences.is_file() {
            for record in io::open_csv(&licences)?.flatten() {
                let (id, article) = (record.need(&["ROCO_ID"])?, record.scalar("PMC_ID").unwrap_or_default());
                beside.licences.insert(id, (article, record.scalar("CC").unwrap_or_default()));
            }
        }
        Ok(beside)
    }
}

fn read(record: &Record, part: &Part, images: &Images, beside: &Beside) -> Result<Sample> {
    let id = record.need(&["id", "image_id", "ID"])?;
    let text = record.need(&["text", "caption", "Caption"])?;
    let image = match record.text("name") {
        _ if record.fields.contains_key("image") => images.of(record, "image")?,
        Some(name) => vec![images.find(name)],
        None => vec![images.find_stem(&id, &["jpg", "png", "jpeg"])],
    };
    let kind = if part.tag.is_empty() { String::new() } else { format!("{}-", part.tag) };
    let sample = caption(format!("roco-{}-{kind}{id}", part.split_name()), image, &text);
    let licence = beside.licences.get(&id);
    let mut sample = with_article(sample, licence.and_then(|(article, _)| article_of(article)));
    if let Some((_, licence)) = licence {
        sample.meta.insert("licence".into(), json!(licence));
    }
    for (key, all) in &beside.lists {
        if let Some(values) = all.get(&id) {
            sample.meta.insert((*key).into(), values.clone());
        }
    }
    if let Some(values) = record.fields.get("cui") {
        sample.meta.insert("cuis".into(), values.clone());
    }
    if !part.tag.is_empty() {
        sample.meta.insert(meta::CONTENT_TYPE.into(), json!(part.tag));
    }
    Ok(sample)
}
