//! Every sample file of every data set format is read, and what comes out is compared with what a second, plain way of
//! reading finds in the file.
//!
//! The samples are enumerated: `MEDTUNE_GOLDEN` may name another folder of the same layout.

use std::{
    collections::HashSet,
    path::{Path, PathBuf},
};

use medtune::{
    datasets,
    error::Result,
    run_dir::files_below,
    sample::{AnswerType, Sample, meta},
    source::{DataConfig, Note},
};
use parquet::file::reader::{FileReader, SerializedFileReader};
use serde_json::Value;

use crate::parity::fixture::root;

/// Sample folder and the reader for it; other folders carry the name of their reader.
const OTHER_NAMES: [(&str, &str); 2] = [("llava_conversation", "llava"), ("llavamed_vqa", "llava")];

/// Files of the samples that are not lists of rows, by the end of their names.
const NO_ROWS: [&str; 7] = [
    "detection.json",
    "question.json",
    "candidate.json",
    "answer-file.jsonl",
    "image_urls.jsonl",
    "_concepts.csv",
    "_qa50_qa.csv",
];

struct Read {
    rows: Vec<Result<Sample>>,
    notes: Vec<Note>,
}

impl Read {
    fn good(&self) -> Vec<&Sample> {
        self.rows.iter().flatten().collect()
    }
}

fn read(source: &str, config: DataConfig) -> Read {
    let work = tempfile::tempdir().unwrap();
    let samples = datasets::find(source).unwrap().open(&config, 0, work.path());
    let mut samples = samples.unwrap_or_else(|e| panic!("{source} {:?}: {e:?}", config.path));
    let notes = samples.notes();
    let rows: Vec<Result<Sample>> = samples.by_ref().collect();
    for sample in rows.iter().flatten() {
        for image in &sample.images {
            medtune::image::open(&image.path).unwrap_or_else(|e| panic!("{source} {}: {e:?}", sample.id));
        }
    }
    Read { rows, notes: notes.all() }
}

fn config(path: &Path) -> DataConfig {
    DataConfig { path: Some(path.to_path_buf()), ..DataConfig::default() }
}

/// Name, reader and folder of every sample data set.
fn folders() -> Vec<(String, String, PathBuf)> {
    let mut found: Vec<_> = std::fs::read_dir(root("metrics").join("samples"))
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.is_dir())
        .map(|path| {
            let name = path.file_name().unwrap().to_string_lossy().into_owned();
            let other = OTHER_NAMES.iter().find(|(folder, _)| *folder == name).map(|(_, source)| *source);
            (name.clone(), other.unwrap_or(&name).to_string(), path)
        })
        .collect();
    found.sort();
    assert!(!found.is_empty());
    found
}

/// Rows of a file, counted and as JSON where that is easy, without the code under test.
fn plain(path: &Path) -> Option<(usize, Vec<Value>)> {
    let name = path.file_name()?.to_str()?;
    if NO_ROWS.iter().any(|end| name.ends_with(end)) {
        return None;
    }
    match path.extension()?.to_str()? {
        "json" => {
            let rows = match serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap() {
                Value::Array(rows) => rows,
                Value::Object(lists) => lists.values().flat_map(|l| l.as_array().unwrap().clone()).collect(),
                other => panic!("{other}"),
            };
            Some((rows.len(), rows))
        }
        "jsonl" => {
            let text = std::fs::read_to_string(path).unwrap();
            let rows: Vec<Value> = text.lines().map(|l| serde_json::from_str(l).unwrap()).collect();
            Some((rows.len(), rows))
        }
        "csv" => {
            let mut reader = csv::Reader::from_path(path).unwrap();
            let rows: Vec<Value> = reader
                .deserialize::<std::collections::BTreeMap<String, String>>()
                .map(|row| serde_json::to_value(row.unwrap()).unwrap())
                .collect();
            Some((rows.len(), rows))
        }
        "parquet" => {
            let reader = SerializedFileReader::new(std::fs::File::open(path).unwrap()).unwrap();
            Some((reader.metadata().file_metadata().num_rows() as usize, Vec::new()))
        }
        "txt" if name == "captions.txt" => {
            let lines = std::fs::read_to_string(path).unwrap().lines().count();
            Some((lines, Vec::new()))
        }
        _ => None,
    }
}

#[test]
fn every_row_of_every_sample_file_is_a_row_or_a_named_failure() {
    for (name, source, folder) in folders() {
        let mut files = 0;
        for file in files_below(&folder).unwrap() {
            let Some((count, rows)) = plain(&file) else { continue };
            let found = read(&source, config(&file));
            let good = found.good();
            println!(
                "datasets {name}/{}: {count} rows, {} usable",
                file.strip_prefix(&folder).unwrap().display(),
                good.len()
            );
            assert!(count > 0);
            assert_eq!(found.rows.len(), count, "{}", file.display());
            for error in found.rows.iter().filter_map(|r| r.as_ref().err()) {
                // Fixtures leave images out where the real data sets do.
                assert_eq!(error.reason(), "image_missing", "{error:?}");
                assert!(error.to_string().contains("row "), "{error}");
            }
            let ids: HashSet<&str> = good.iter().map(|s| s.id.as_str()).collect();
            assert_eq!(ids.len(), good.len(), "{}: ids repeat", file.display());
            for sample in &good {
                assert!(!sample.group.is_empty() && !sample.question().is_empty(), "{}", sample.id);
                assert_eq!(
                    sample.answer_type == Some(AnswerType::Mcq),
                    sample.right_option().is_some(),
                    "{}",
                    sample.id
                );
                assert_eq!((&sample.origin.file, sample.origin.dataset.as_str()), (&file, source.as_str()));
                if let Some(row) = rows.get(sample.origin.row) {
                    compare(&name, sample, row);
                }
            }
            files += 1;
        }
        assert!(files > 0, "{name} has no file of rows");
    }
}

/// What a row says in the words of its file, beside what the reader made of it.
fn compare(name: &str, sample: &Sample, row: &Value) {
    let text = |key: &str| match &row[key] {
        Value::String(text) => text.split_whitespace().collect::<Vec<_>>().join(" "),
        Value::Null => String::new(),
        other => other.to_string(),
    };
    let answer = sample.answer().split_whitespace().collect::<Vec<_>>().join(" ");
    let stored = |key: &str| sample.meta.get(key).and_then(Value::as_str).unwrap_or_default().to_string();
    match name {
        "vqa_rad" => {
            assert_eq!((answer, stored(meta::LOCATION)), (text("answer"), text("image_organ")));
            let closed = text("answer_type") == "CLOSED";
            assert_eq!(sample.answer_type == Some(AnswerType::Closed), closed, "{}", sample.id);
        }
        "slake" => {
            assert_eq!((answer, stored(meta::LANGUAGE)), (text("answer"), text("q_lang")));
            assert_eq!((stored(meta::MODALITY), stored(meta::CONTENT_TYPE)), (text("modality"), text("content_type")));
        }
        "omnimedvqa" => {
            assert_eq!((answer, stored(meta::QUESTION_TYPE)), (text("gt_answer"), text("question_type")));
            let modality = text("modality_type") + &text("modality");
            assert_eq!(stored(meta::MODALITY), modality);
            let options =
                ["option_A", "option_B", "option_C", "option_D"].iter().filter(|o| row[**o].is_string()).count();
            assert_eq!((sample.options.len(), sample.bare_question()), (options, text("question")));
        }
        "pmc_vqa" => {
            let letter = text("Answer_label") + if row["Answer_label"].is_null() { "" } else { "!" };
            let letter = if letter.is_empty() { text("Answer") } else { letter.replace('!', "") };
            let cell = text(&format!("Choice {letter}"));
            let bare = cell.split_once(':').map_or(cell.clone(), |(_, rest)| rest.trim().to_string());
            assert_eq!((answer, sample.options.len()), (bare, 4));
            assert!(stored(meta::ARTICLE).starts_with("pmcid:PMC"), "{:?}", sample.meta);
            assert!(sample.turns[0].text.ends_with(&format!("\nD. {}", sample.options[3])));
        }
        "medhalltune" => {
            assert_eq!((answer, stored("prediction")), (text("gpt4_answer"), text("answer")));
            assert_eq!(sample.annotation.clone().unwrap_or_default(), text("fig_caption"));
            assert!(sample.polarity.is_some());
        }
        "pubmedvision" => {
            assert_eq!(sample.images.len(), row["image"].as_array().unwrap().len());
            assert_eq!((stored(meta::MODALITY), stored(meta::LOCATION)), (text("modality"), text("body_part")));
        }
        "llava_med" => {
            let said = row["conversations"].as_array().or(row["conversatons"].as_array()).map(Vec::len);
            assert_eq!(said.unwrap_or(2), sample.turns.len());
            assert_eq!(sample.annotation.clone().unwrap_or_default(), text("fig_caption"));
            assert!(stored(meta::ARTICLE).starts_with("pmid:"));
        }
        "rocov2" => assert_eq!(sample.annotation.as_deref().unwrap_or_default(), text("Caption")),
        _ => {}
    }
}

#[test]
fn a_folder_is_enough_and_the_splits_found_are_named() {
    for (name, source, folder) in folders() {
        if source == "llava_med" {
            // Its files hold different kinds of rows about the same images.
            let error = datasets::find(&source).unwrap().open(&config(&folder), 0, &folder).unwrap_err();
            assert!(error.to_string().contains("several files"), "{error}");
            continue;
        }
        let found = read(&source, config(&folder));
        assert!(!found.rows.is_empty(), "{name}");
        let reads: Vec<&str> =
            found.notes.iter().map(|n| n.text.as_str()).filter(|n| n.starts_with("reads ")).collect();
        assert!(!reads.is_empty(), "{name}: {:?}", found.notes);
        // The samples are not the published data, and a reader that knows the published sizes says so.
        let sizes = datasets::find(&source).unwrap().facts().releases;
        if !sizes.is_empty() {
            let text = |n: &Note| n.text.contains("but published are");
            assert!(found.notes.iter().any(|n| n.warning && text(n)), "{name}: {:?}", found.notes);
        }
    }
}

#[test]
fn languages_splits_and_images_can_be_chosen() {
    let folder = root("metrics").join("samples/slake");
    let all = read("slake", config(&folder));
    let mut total = 0;
    for language in ["en", "zh"] {
        let one = read("slake", DataConfig { language: Some(language.into()), ..config(&folder) });
        assert!(one.good().iter().all(|s| s.meta[meta::LANGUAGE] == language));
        assert!(one.notes.iter().any(|n| n.text.contains("left out") && n.text.contains(language)));
        total += one.rows.len();
    }
    assert_eq!(total, all.rows.len());
    let splits = vec![medtune::sample::Split::Test];
    let test = read("slake", DataConfig { splits, ..config(&folder) });
    assert!(!test.rows.is_empty() && test.good().iter().all(|s| s.meta[meta::MARKED_SPLIT] == "test"));
    let images = read("slake", DataConfig { by_image: true, ..config(&folder.join("test.json")) });
    let groups: HashSet<&str> = images.good().iter().map(|s| s.group.as_str()).collect();
    assert_eq!(groups.len(), images.rows.len());
    let lines: usize = images.good().iter().map(|s| s.annotation.as_ref().unwrap().lines().count()).sum();
    assert_eq!(lines, read("slake", config(&folder.join("test.json"))).rows.len());
}

#[test]
fn pickles_are_refused_with_the_conversion() {
    let (_, source, folder) = folders().into_iter().find(|(name, _, _)| name == "pathvqa").unwrap();
    let pickles: Vec<_> = files_below(&folder).unwrap();
    let pickles: Vec<_> = pickles.into_iter().filter(|p| p.extension().is_some_and(|e| e == "pkl")).collect();
    assert!(!pickles.is_empty());
    for pickle in pickles {
        let error = datasets::find(&source).unwrap().open(&config(&pickle), 0, &folder).unwrap_err();
        assert!(error.to_string().contains("pickle"), "{error}");
        assert!(error.help_line().unwrap().contains("json.dump"), "{error:?}");
    }
}

#[test]
fn tables_have_the_columns_their_owner_gave_them() {
    let dir = tempfile::tempdir().unwrap();
    let picture = image::RgbImage::from_pixel(8, 8, image::Rgb([9, 8, 7]));
    picture.save(dir.path().join("a.png")).unwrap();
    std::fs::write(
        dir.path().join("mine.tsv"),
        "file\ttext\tpmid\tpart\tsite\na.png\tA film, \"clear\".\t17\tval\tleft\nb.png\tx y\t18\ttrain\t\na.png\tOne\t17\tholdout\t\n",
    )
    .unwrap();
    let mut config = config(dir.path());
    config.columns.image = "file".into();
    config.columns.caption = "text".into();
    config.columns.article = "pmid".into();
    config.columns.split = "part".into();
    let found = read("table", config.clone());
    let first = found.rows[0].as_ref().unwrap();
    assert_eq!(first.annotation.as_deref(), Some("A film, \"clear\"."));
    assert_eq!((first.group.as_str(), first.meta["marked_split"].as_str()), ("17", Some("validation")));
    assert_eq!(first.meta["site"], "left");
    let reasons: Vec<&str> = found.rows[1..].iter().map(|r| r.as_ref().unwrap_err().reason()).collect();
    assert_eq!(reasons, ["image_missing", "malformed"]);
    let parquet = root("metrics").join("samples/rocov2");
    let parquet = files_below(&parquet).unwrap().into_iter().find(|p| p.extension().is_some_and(|e| e == "parquet"));
    let found = read("table", DataConfig { path: parquet, ..DataConfig::default() });
    assert!(!found.rows.is_empty());
    assert_eq!(found.good().len(), found.rows.len());
}

/// Rows, images, splits and answer types of real data, printed; with the variable set to the folder of the data set.
#[test]
fn real_data_has_the_published_sizes() {
    for (variable, source) in [("MEDTUNE_VQA_RAD", "vqa_rad"), ("MEDTUNE_SLAKE", "slake")] {
        let Some(folder) = std::env::var_os(variable).map(PathBuf::from) else {
            println!("datasets {source}: {variable} is not set");
            continue;
        };
        let found = read(source, config(&folder));
        let good = found.good();
        let images: HashSet<&Path> = good.iter().map(|s| s.images[0].path.as_path()).collect();
        println!("datasets {source}: {} rows, {} usable, {} images", found.rows.len(), good.len(), images.len());
        for key in [meta::MARKED_SPLIT, meta::LANGUAGE, meta::LOCATION, meta::MODALITY] {
            let mut counts = std::collections::BTreeMap::<&str, usize>::new();
            for value in good.iter().filter_map(|s| s.meta.get(key)?.as_str()) {
                *counts.entry(value).or_default() += 1;
            }
            println!("  {key}: {counts:?}");
        }
        for kind in [AnswerType::Open, AnswerType::Closed] {
            println!("  {kind:?}: {}", good.iter().filter(|s| s.answer_type == Some(kind)).count());
        }
        found.notes.iter().for_each(|n| println!("  {}{}", if n.warning { "warning: " } else { "" }, n.text));
        found.rows.iter().filter_map(|r| r.as_ref().err()).for_each(|e| println!("  {e}"));
        let mut total = 0;
        for file in std::fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().path()) {
            if file.extension().is_some_and(|e| e == "json") {
                total += plain(&file).map_or(0, |(count, _)| count);
            }
        }
        assert_eq!(found.rows.len(), total, "{source}");
    }
}
