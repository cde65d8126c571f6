//! The data card: what the rows are, how many of which kind, where they came from, what was dropped, and what they cannot
//! show. Markdown with the YAML header that the Hugging Face hub reads.

use std::{
    collections::{BTreeMap, HashSet},
    fmt::Write,
    path::Path,
};

use super::{Exported, Format, Options, View, rows::rows, split_name};
use crate::{
    datasets,
    error::Result,
    plan::Plan,
    qc::hash::hash,
    run_dir::{read_json, sha256},
    sample::{Polarity, Sample, Split, meta},
    stage::qc::QcReport,
};

/// What a run says about its rows.
#[derive(Debug, Default)]
pub struct Facts {
    /// How it was planned, if its directory still says so.
    pub plan: Option<Plan>,
    /// What quality control counted.
    pub qc: Option<QcReport>,
    /// Name and SHA-256 of the files the rows came from.
    files: Vec<(&'static str, String)>,
}

impl Facts {
    /// Reads them from a run directory; what is not there is left out.
    ///
    /// # Errors
    /// A file is there and cannot be read.
    pub fn read(run: &Path) -> Result<Self> {
        let plan = std::fs::read_to_string(run.join("plan.toml")).ok().and_then(|text| toml::from_str(&text).ok());
        let qc = run.join("qc.json");
        let qc = if qc.exists() { Some(read_json(&qc)?) } else { None };
        let mut files = Vec::new();
        for name in ["samples.jsonl", "kept.jsonl", "rejected.jsonl"] {
            if run.join(name).exists() {
                files.push((name, sha256(&run.join(name))?));
            }
        }
        Ok(Self { plan, qc, files })
    }

    /// Seed of the run.
    #[must_use]
    pub fn seed(&self) -> u64 {
        self.plan.as_ref().map_or_else(|| Plan::default().seed, |p| p.seed)
    }
}

/// Rows by what they are.
#[derive(Debug, Default)]
pub struct Counts {
    splits: BTreeMap<Split, usize>,
    images: BTreeMap<Split, HashSet<u64>>,
    all_images: HashSet<u64>,
    /// By title of a table, then by value and split.
    tables: BTreeMap<&'static str, BTreeMap<String, BTreeMap<Split, usize>>>,
    bytes: u64,
}

impl Counts {
    /// Of all rows of a view.
    ///
    /// # Errors
    /// A file of the run cannot be read.
    pub fn of(run: &Path, view: View, seed: u64) -> Result<Self> {
        let mut counts = Self::default();
        for row in rows(run, view, seed)? {
            counts.add(&row?);
        }
        Ok(counts)
    }

    /// Counts a row.
    pub fn add(&mut self, sample: &Sample) {
        *self.splits.entry(sample.split).or_default() += 1;
        for image in &sample.images {
            let key = hash(image.path.as_os_str().as_encoded_bytes());
            self.images.entry(sample.split).or_default().insert(key);
            self.all_images.insert(key);
        }
        self.bytes += sample.turns.iter().map(|t| t.text.len() as u64).sum::<u64>();
        let polarity = match sample.polarity {
            Some(Polarity::Hallucination) => "hallucination (false premise)",
            Some(Polarity::NonHallucination) => "non-hallucination",
            None => "not stated",
        };
        let modality = sample.meta.get(meta::MODALITY).and_then(|m| m.as_str()).unwrap_or("not stated");
        let language = sample.meta.get(meta::LANGUAGE).and_then(|m| m.as_str()).unwrap_or("en");
        let values = [
            ("Polarity", polarity),
            ("Category", sample.category.as_deref().unwrap_or("not stated")),
            ("Modality", modality),
            ("Source", if sample.origin.dataset.is_empty() { "not stated" } else { &sample.origin.dataset }),
            ("Language", language),
        ];
        for (title, value) in values {
            let table = self.tables.entry(title).or_default();
            *table.entry(value.to_string()).or_default().entry(sample.split).or_default() += 1;
        }
    }

    /// Different image files.
    #[must_use]
    pub fn images(&self) -> usize {
        self.all_images.len()
    }

    fn rows(&self) -> usize {
        self.splits.values().sum()
    }

    fn values(&self, title: &str) -> Vec<&str> {
        self.tables.get(title).map(|t| t.keys().map(String::as_str).collect()).unwrap_or_default()
    }
}

/// The card as Markdown; with `export`, that of an exported folder.
#[must_use]
pub fn card(facts: &Facts, counts: &Counts, export: Option<(&Options, &Exported)>) -> String {
    let mut text = header(counts, export);
    let name = facts.plan.as_ref().map_or("medtune", |p| p.recipe.as_str());
    let _ = write!(
        text,
        "# Instruction data for medical vision-language models: {name}\n\nMade by medtune {} from {}. {} rows about {} \
         images.\n\n",
        env!("CARGO_PKG_VERSION"),
        counts.values("Source").join(", "),
        counts.rows(),
        counts.images(),
    );
    contents(&mut text, counts, export);
    tables(&mut text, counts);
    quality(&mut text, facts);
    provenance(&mut text, facts, counts);
    limits(&mut text, facts, counts);
    text
}

fn header(counts: &Counts, export: Option<(&Options, &Exported)>) -> String {
    let sizes = [(1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M")];
    let size = sizes.iter().find(|(most, _)| counts.rows() < *most).map_or("1M<n<10M", |(_, name)| name);
    let mut text = format!(
        "---\nlicense: other\nlanguage:\n{}task_categories:\n- visual-question-answering\n- image-text-to-text\ntags:\n- \
         medical\n- hallucination\nsize_categories:\n- {size}\n",
        counts.values("Language").iter().map(|l| format!("- {l}\n")).collect::<String>(),
    );
    if let Some((options, done)) = export {
        let mut files: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
        for name in done.files.keys() {
            let split = match (options.format, name.trim_start_matches("data/").split(['-', '.']).next()) {
                (Format::Dpo, _) => "train",
                (Format::Medhalltune, Some("train")) => "train",
                (Format::Medhalltune, _) => continue,
                (_, Some(split)) => split,
                (_, None) => continue,
            };
            files.entry(split).or_default().push(name);
        }
        text.push_str("configs:\n- config_name: default\n  data_files:\n");
        for (split, names) in files {
            let pattern =
                if options.format == Format::Parquet { format!("data/{split}-*") } else { names[0].to_string() };
            let _ = write!(text, "  - split: {split}\n    path: {pattern}\n");
        }
    }
    text.push_str("---\n\n");
    text
}

fn contents(text: &mut String, counts: &Counts, export: Option<(&Options, &Exported)>) {
    text.push_str("| split | rows | images |\n|---|---:|---:|\n");
    for (split, rows) in &counts.splits {
        let images = counts.images.get(split).map_or(0, HashSet::len);
        let _ = writeln!(text, "| {} | {rows} | {images} |", split_name(*split));
    }
    text.push('\n');
    let Some((options, done)) = export else { return };
    if options.view != View::default() {
        let _ =
            write!(text, "This is the view `{}` of the data: training rows only; the test is whole.\n\n", options.view);
    }
    text.push_str("| file | rows |\n|---|---:|\n");
    for (name, rows) in &done.files {
        let _ = writeln!(text, "| `{name}` | {rows} |");
    }
    if done.images > 0 && options.format != Format::Parquet {
        let _ = writeln!(text, "| `images/` | {} files |", done.images);
    }
    text.push('\n');
    for (why, n) in done.left_out.iter().filter(|(_, n)| **n > 0) {
        let _ = write!(text, "Left out, because this form has no place for them: {n} ({why}).\n\n");
    }
}

fn tables(text: &mut String, counts: &Counts) {
    let splits: Vec<Split> = counts.splits.keys().copied().collect();
    for (title, table) in &counts.tables {
        if matches!(*title, "Source" | "Language") || table.len() == 1 && table.contains_key("not stated") {
            continue;
        }
        let names: Vec<&str> = splits.iter().map(|s| split_name(*s)).collect();
        let _ = write!(
            text,
            "| {} | {} |\n|---{}|\n",
            title.to_lowercase(),
            names.join(" | "),
            "|---:".repeat(names.len())
        );
        for (value, by_split) in table {
            let cells: Vec<String> = splits.iter().map(|s| by_split.get(s).unwrap_or(&0).to_string()).collect();
            let _ = writeln!(text, "| {} | {} |", cell(value), cells.join(" | "));
        }
        text.push('\n');
    }
}

/// Text that cannot end a cell or a line of a table.
fn cell(text: &str) -> String {
    text.replace('|', "\\|").replace(['\n', '\r'], " ")
}

fn quality(text: &mut String, facts: &Facts) {
    text.push_str("## Quality control\n\n");
    let Some(qc) = &facts.qc else {
        text.push_str("No record of quality control was found beside these rows.\n\n");
        return;
    };
    let _ = write!(
        text,
        "{} of {} rows were dropped ({:.1} %; the MedHallTune paper drops 7.3 %), and {} rows of the source could not be \
         used.\n\n",
        qc.all.rejected,
        qc.all.rows,
        100.0 * qc.all.share(),
        qc.unread,
    );
    if !qc.codes.is_empty() {
        text.push_str("| reason | rows |\n|---|---:|\n");
        for (code, n) in &qc.codes {
            let _ = writeln!(text, "| `{code}` | {n} |");
        }
        text.push_str("\n`medtune explain REASON` tells what each means.\n\n");
    }
    let _ = write!(text, "{}\n\n", qc.leak.line());
    if qc.bias.warnings.is_empty() {
        return;
    }
    text.push_str("What a model could learn without looking at the images:\n\n");
    for warning in &qc.bias.warnings {
        let _ = writeln!(text, "- {}", cell(warning));
    }
    text.push('\n');
}

fn provenance(text: &mut String, facts: &Facts, counts: &Counts) {
    text.push_str("## Where it comes from\n\n");
    for source in counts.values("Source") {
        let Ok(found) = datasets::find(source) else { continue };
        let doc = found.doc().lines().next().unwrap_or_default();
        let (licence, home) = (found.facts().licence, found.facts().home);
        let licence = if licence.is_empty() { "that of the files that were read" } else { licence };
        let home = if home.is_empty() { String::new() } else { format!(" {home}.") };
        let _ = writeln!(text, "- `{source}`: {doc} Licence: {licence}.{home}");
    }
    if let Some(plan) = &facts.plan {
        let _ = writeln!(text, "- recipe `{}`, seed {}, medtune {}", plan.recipe, plan.seed, env!("CARGO_PKG_VERSION"));
    }
    for (name, sha) in &facts.files {
        let _ = writeln!(text, "- `{name}` sha256 `{sha}`");
    }
    text.push_str(
        "\nThe licences of the sources hold for the rows and images made from them; `license: other` in the header stands \
         for that, and is to be replaced by whoever publishes this folder.\n\n",
    );
}

fn limits(text: &mut String, facts: &Facts, counts: &Counts) {
    text.push_str("## Limits\n\n");
    let synthetic = counts.values("Source") == ["phantom"];
    if synthetic {
        text.push_str("- The images are drawn by a program. Nothing here was seen in a patient.\n");
    }
    text.push_str(
        "- Questions and answers were made by rule or by a language model and checked by program; a person has seen at most \
         a sample of them (`medtune data review`).\n- A check against an annotation finds contradictions with it. Of what \
         the annotation does not mention it can say nothing.\n- Not for diagnosis or treatment.\n",
    );
    if facts.qc.as_ref().is_some_and(|qc| qc.leak.eval_sets.is_empty()) {
        text.push_str(
            "- The rows were not compared with any outside evaluation set (`data.firewall.eval_sets`); a score on one may \
             be on images that are in here.\n",
        );
    }
}
