//! Kept rows in the forms that others read, and the views of them that ablations compare.
//!
//! An export is a folder that appears as a whole: rows by split, their images, and a data card as the Hugging Face hub
//! has them (`README.md`). Rows are streamed; memory does not grow with their number.

use std::{
    collections::{BTreeMap, HashSet},
    fs,
    io::{BufWriter, Write},
    path::{Path, PathBuf},
};

use clap::ValueEnum;
use serde::Serialize;
use serde_json::{Value, json};

use crate::{
    error::{Error, Kind, Result},
    run_dir::JsonlReplacement,
    sample::{Polarity, Role, Sample, Split},
};

pub mod card;
mod parquet;
pub mod preference;
pub mod rows;
pub mod view;

use rows::{Names, files};
pub use view::{Chosen, View};

/// Forms of an export.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Format {
    /// LLaVA conversations: train.json, validation.json, test.json and images/.
    Llava,
    /// Chat messages, one row a line: train.jsonl, validation.jsonl, test.jsonl and images/.
    Jsonl,
    /// Tables that `datasets.load_dataset` reads: data/*.parquet, images inside.
    Parquet,
    /// As MedHallTune is released: train.json, and the test as {positive,negative}_qa.jsonl, without answers, and as
    /// val_{positive,negative}_qa-filtered.jsonl, with them.
    Medhalltune,
    /// Preference pairs from rows that quality control rejected: dpo.jsonl with chosen and rejected answers.
    Dpo,
}

/// What to export.
#[derive(Debug, Clone, Copy)]
pub struct Options {
    /// In which form.
    pub format: Format,
    /// Which rows.
    pub view: View,
}

/// What was exported.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Exported {
    /// Rows by file.
    pub files: BTreeMap<String, usize>,
    /// Image files.
    pub images: usize,
    /// Rows that the form has no place for, by reason.
    pub left_out: BTreeMap<String, usize>,
}

/// Writes the rows of a run directory into `out`, which must not exist yet or be empty.
///
/// # Errors
/// The run has no kept rows, an image cannot be read, or the folder cannot be written; nothing is left behind then.
pub fn export(run: &Path, out: &Path, options: Options) -> Result<Exported> {
    if !run.join("kept.jsonl").exists() {
        return Err(Error::new(Kind::Run, "there are no kept rows to export")
            .at(run.display())
            .help("run `medtune qc RECIPE --out DIR` first"));
    }
    if fs::read_dir(out).is_ok_and(|mut entries| entries.next().is_some()) {
        return Err(Error::new(Kind::Run, "the folder is not empty").at(out.display()).help("choose another one"));
    }
    let parent = out.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    fs::create_dir_all(parent).map_err(|e| Error::io(parent, e))?;
    let scratch =
        tempfile::Builder::new().prefix(".tmp-export-").tempdir_in(parent).map_err(|e| Error::io(parent, e))?;
    let facts = card::Facts::read(run)?;
    let mut export = Export {
        dir: scratch.path().to_path_buf(),
        names: Names::of(run)?,
        copied: HashSet::new(),
        done: Exported::default(),
        counts: card::Counts::default(),
    };
    match options.format {
        Format::Llava => export.llava(run, options.view, facts.seed())?,
        Format::Jsonl => export.jsonl(run, options.view, facts.seed())?,
        Format::Parquet => export.parquet(run, options.view, facts.seed())?,
        Format::Medhalltune => export.medhalltune(run, options.view, facts.seed())?,
        Format::Dpo => export.dpo(run)?,
    }
    let text = card::card(&facts, &export.counts, Some((&options, &export.done)));
    fs::write(scratch.path().join("README.md"), text).map_err(|e| Error::io(scratch.path(), e))?;
    if out.exists() {
        fs::remove_dir(out).map_err(|e| Error::io(out, e))?;
    }
    let path = scratch.keep();
    fs::rename(&path, out).map_err(|e| {
        // Best effort: the error that matters is the one of the renaming.
        let _ = fs::remove_dir_all(&path);
        Error::io(out, e)
    })?;
    open_to_all(out);
    Ok(export.done)
}

/// Temporary folders are private; results are for everybody who may read the folder above.
fn open_to_all(dir: &Path) {
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt;
        let _ = fs::set_permissions(dir, fs::Permissions::from_mode(0o755));
    }
    #[cfg(not(unix))]
    let _ = dir;
}

/// Name of a split in file names.
pub(crate) fn split_name(split: Split) -> &'static str {
    match split {
        Split::Train => "train",
        Split::Validation => "validation",
        Split::Test => "test",
    }
}

/// An export while it is written.
struct Export {
    dir: PathBuf,
    names: Names,
    copied: HashSet<String>,
    done: Exported,
    counts: card::Counts,
}

impl Export {
    fn llava(&mut self, run: &Path, view: View, seed: u64) -> Result<()> {
        let mut out: BTreeMap<Split, JsonArray> = BTreeMap::new();
        for sample in rows::rows(run, view, seed)? {
            let sample = sample?;
            let row = rows::llava(&sample, |path| format!("images/{}", self.names.name(path)));
            self.count(&sample)?;
            self.array(&mut out, sample.split)?.push(&row)?;
        }
        out.into_values().try_for_each(JsonArray::finish)
    }

    fn array<'a>(&mut self, out: &'a mut BTreeMap<Split, JsonArray>, split: Split) -> Result<&'a mut JsonArray> {
        let name = format!("{}.json", split_name(split));
        *self.done.files.entry(name.clone()).or_default() += 1;
        match out.entry(split) {
            std::collections::btree_map::Entry::Occupied(entry) => Ok(entry.into_mut()),
            std::collections::btree_map::Entry::Vacant(entry) => Ok(entry.insert(JsonArray::new(self.dir.join(name))?)),
        }
    }

    fn jsonl(&mut self, run: &Path, view: View, seed: u64) -> Result<()> {
        let mut out = Files::default();
        for sample in rows::rows(run, view, seed)? {
            let sample = sample?;
            let row = rows::messages(&sample, |path| format!("images/{}", self.names.name(path)));
            self.count(&sample)?;
            out.push(self, &format!("{}.jsonl", split_name(sample.split)), &row)?;
        }
        out.finish()
    }

    fn medhalltune(&mut self, run: &Path, view: View, seed: u64) -> Result<()> {
        let mut train = JsonArray::new(self.dir.join("train.json"))?;
        let mut out = Files::default();
        let mut number = 0;
        for sample in rows::rows(run, view, seed)? {
            let sample = rows::suffixed(sample?);
            let row = rows::llava(&sample, |path| self.names.name(path));
            if sample.split != Split::Test {
                self.count(&sample)?;
                *self.done.files.entry("train.json".into()).or_default() += 1;
                train.push(&row)?;
                continue;
            }
            let polarity = match (sample.polarity, sample.images.len(), sample.turns.len()) {
                (Some(Polarity::Hallucination), 1, 2) => "negative",
                (Some(Polarity::NonHallucination), 1, 2) => "positive",
                (None, ..) => {
                    self.leave_out("test row without polarity");
                    continue;
                }
                _ => {
                    self.leave_out("test row with several questions, or not with one image");
                    continue;
                }
            };
            self.count(&sample)?;
            let asked = sample.turns.iter().find(|t| t.role == Role::User).map_or("", |t| t.text.as_str());
            let question = json!({ "question_id": number, "image": row["image"], "question": asked });
            out.push(self, &format!("{polarity}_qa.jsonl"), &question)?;
            let answered = json!({
                "question_id": number, "image": row["image"], "text": asked, "gpt4_answer": sample.answer(),
                "fig_caption": sample.annotation.clone().unwrap_or_default(),
            });
            out.push(self, &format!("val_{polarity}_qa-filtered.jsonl"), &answered)?;
            // One count for both files: numbers are unique over the polarities.
            number += 1;
        }
        train.finish()?;
        out.finish()
    }

    fn parquet(&mut self, run: &Path, view: View, seed: u64) -> Result<()> {
        let several = rows::rows(run, view, seed)?.any(|row| row.is_ok_and(|s| s.images.len() > 1));
        let mut tables: BTreeMap<Split, parquet::Tables> = BTreeMap::new();
        for sample in rows::rows(run, view, seed)? {
            let sample = sample?;
            self.counts.add(&sample);
            let split = sample.split;
            let dir = self.dir.join("data");
            let table = tables.entry(split).or_insert_with(|| parquet::Tables::new(dir, split_name(split), several));
            table.push(&sample, &self.names)?;
        }
        for table in tables.into_values() {
            self.done.files.extend(table.finish()?);
        }
        self.done.images = self.counts.images();
        Ok(())
    }

    fn dpo(&mut self, run: &Path) -> Result<()> {
        let mut file = JsonlReplacement::new(self.dir.join("dpo.jsonl"))?;
        let found = preference::pairs(run, |chosen, pair| {
            let row = preference::record(chosen, &pair, |path| format!("images/{}", self.names.name(path)));
            self.copy(chosen)?;
            self.counts.add(chosen);
            file.push(&row)
        })?;
        self.done.files.insert("dpo.jsonl".into(), found.pairs);
        self.done.left_out.insert("rejected answer without an accepted one to its question".into(), found.unmatched);
        file.finish()
    }

    fn leave_out(&mut self, why: &str) {
        *self.done.left_out.entry(why.into()).or_default() += 1;
    }

    /// Counts a row and copies its images.
    fn count(&mut self, sample: &Sample) -> Result<()> {
        self.counts.add(sample);
        self.copy(sample)
    }

    fn copy(&mut self, sample: &Sample) -> Result<()> {
        for path in files(sample) {
            let name = self.names.name(path);
            if !self.copied.insert(name.clone()) {
                continue;
            }
            let to = self.dir.join("images").join(&name);
            let folder = to.parent().unwrap_or(&self.dir);
            fs::create_dir_all(folder).map_err(|e| Error::io(folder, e))?;
            fs::copy(path, &to).map_err(|e| {
                Error::new(Kind::Image, "cannot copy an image").at(path.display()).help("check the file").source(e)
            })?;
            self.done.images += 1;
        }
        Ok(())
    }
}

/// JSONL files of an export, by name.
#[derive(Default)]
struct Files(BTreeMap<String, JsonlReplacement>);

impl Files {
    fn push(&mut self, export: &mut Export, name: &str, row: &Value) -> Result<()> {
        if !self.0.contains_key(name) {
            self.0.insert(name.into(), JsonlReplacement::new(export.dir.join(name))?);
        }
        *export.done.files.entry(name.into()).or_default() += 1;
        self.0.get_mut(name).map_or(Ok(()), |file| file.push(row))
    }

    fn finish(self) -> Result<()> {
        self.0.into_values().try_for_each(JsonlReplacement::finish)
    }
}

/// A JSON array, one row a line.
struct JsonArray {
    path: PathBuf,
    out: BufWriter<fs::File>,
    empty: bool,
}

impl JsonArray {
    fn new(path: PathBuf) -> Result<Self> {
        let file = fs::File::create(&path).map_err(|e| Error::io(&path, e))?;
        let mut out = BufWriter::new(file);
        out.write_all(b"[").map_err(|e| Error::io(&path, e))?;
        Ok(Self { path, out, empty: true })
    }

    fn push(&mut self, row: &Value) -> Result<()> {
        let start: &[u8] = if self.empty { b"\n" } else { b",\n" };
        self.empty = false;
        let row = row.to_string();
        self.out
            .write_all(start)
            .and_then(|()| self.out.write_all(row.as_bytes()))
            .map_err(|e| Error::io(&self.path, e))
    }

    fn finish(mut self) -> Result<()> {
        let ended = self.out.write_all(b"\n]\n").and_then(|()| self.out.flush());
        ended.and_then(|()| self.out.get_ref().sync_all()).map_err(|e| Error::io(&self.path, e))
    }
}
