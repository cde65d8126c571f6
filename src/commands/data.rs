//! Verbs that look at data.

use std::{
    io::IsTerminal,
    path::{Path, PathBuf},
};

use rayon::prelude::*;
use serde_json::json;

use super::{
    columns, context, emit,
    run::{out_dir, resolve},
};
use crate::{
    cli::{DataExportArgs, Global, RecipeArgs, ReviewArgs},
    datasets::{self, MARKED_SPLIT},
    error::{Error, Kind, Result},
    export::{self, Options, View},
    models,
    recipe::Recipe,
    recipes::vqa::Vqa,
    review::{
        self,
        interval::{Agreement, Share},
        marks,
    },
    run_dir::{RunDir, stream_jsonl},
    sample::{Sample, Split},
    source::Note,
    stage::{build, encode::base_dir, qc},
    vlm::{Encoded, IGNORE, Processor},
};

/// Problems that are printed; all are counted.
const SHOWN: usize = 20;

/// Rows decoded at once.
const CHUNK: usize = 256;

/// Reads every row and image of the source.
pub(super) fn check(global: &Global, args: &RecipeArgs) -> Result<()> {
    let (resolved, _) = resolve(global, args)?;
    let ctx = context(global)?;
    let plan = &resolved.plan;
    let source = datasets::find(&plan.data.source)?;
    let scratch = tempfile::tempdir().map_err(|e| Error::io(std::env::temp_dir(), e))?;
    let mut samples = source.open(&plan.data, plan.seed, scratch.path())?;
    let notes = samples.notes();
    let mut tally = Tally::default();
    let task = &mut ctx.progress.start("check rows", 0);
    loop {
        ctx.check()?;
        let rows: Vec<Result<Sample>> = samples.by_ref().take(CHUNK).collect();
        if rows.is_empty() {
            break;
        }
        tally.add(&rows);
        task.advance(rows.len() as u64);
    }
    tally.notes = notes.all();
    emit(global, tally.json(), || tally.text())?;
    match tally.bad_rows + tally.bad_images {
        0 => Ok(()),
        n => Err(Error::new(Kind::Gate, format!("{n} rows or images of {} cannot be used", plan.data.source))
            .help("repair or remove them; a run would keep them apart in rejected.jsonl")),
    }
}

#[derive(Default)]
struct Tally {
    rows: usize,
    bad_rows: usize,
    images: usize,
    bad_images: usize,
    problems: Vec<String>,
    notes: Vec<Note>,
}

impl Tally {
    fn add(&mut self, rows: &[Result<Sample>]) {
        let unreadable = rows.iter().filter_map(|row| row.as_ref().err());
        self.problems.extend(unreadable.clone().map(ToString::to_string));
        self.bad_rows += unreadable.count();
        self.rows += rows.len();
        let images: Vec<_> = rows.iter().flatten().flat_map(|s| s.images.iter().map(move |i| (&s.id, i))).collect();
        let bad: Vec<String> = images
            .par_iter()
            .filter_map(|(id, image)| crate::image::open(&image.path).err().map(|e| format!("row {id}: {e}")))
            .collect();
        self.images += images.len();
        self.bad_images += bad.len();
        self.problems.extend(bad);
    }

    fn json(&self) -> serde_json::Value {
        json!({
            "rows": self.rows, "bad_rows": self.bad_rows, "images": self.images, "bad_images": self.bad_images,
            "problems": self.problems, "notes": self.notes,
        })
    }

    fn text(&self) -> String {
        let rows = [
            vec!["rows".into(), self.rows.to_string(), format!("{} unreadable", self.bad_rows)],
            vec!["images".into(), self.images.to_string(), format!("{} unreadable", self.bad_images)],
        ];
        let mut text = columns(&rows);
        for note in &self.notes {
            text.push_str(&format!("{}{}\n", if note.warning { "warning: " } else { "" }, note.text));
        }
        for problem in self.problems.iter().take(SHOWN) {
            text.push_str(&format!("{problem}\n"));
        }
        if self.problems.len() > SHOWN {
            text.push_str(&format!("and {} more; --json lists all\n", self.problems.len() - SHOWN));
        }
        text
    }
}

/// Shows one row as the model sees it.
pub(super) fn show(global: &Global, args: &RecipeArgs, row: usize) -> Result<()> {
    let (resolved, _) = resolve(global, args)?;
    let ctx = context(global)?;
    let run = RunDir::open(out_dir(args, &resolved))?;
    crate::run::run(&resolved, &run, &ctx, "encode", false)?;
    let samples: Vec<Sample> = run.read_jsonl("kept.jsonl")?;
    let sample = samples.get(row).ok_or_else(|| {
        Error::new(Kind::Config, "no such row")
            .at("--row")
            .expected(format!("a number below {}, the rows of kept.jsonl", samples.len()))
            .found(row)
    })?;
    let base = base_dir(&resolved.plan, &run)?;
    let processor = models::processor(&base, &resolved.plan.model.load_options())?;
    let encoded = match sample.split {
        Split::Test => processor.prompt(sample)?,
        _ => processor.encode(sample)?,
    };
    let tokens = Tokens { sample, row: &encoded, processor: processor.as_ref() };
    let color = std::io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none();
    emit(global, tokens.json(), || tokens.text(color))
}

/// A row beside its tokens.
struct Tokens<'a> {
    sample: &'a Sample,
    row: &'a Encoded,
    processor: &'a dyn Processor,
}

/// What stands at a position.
enum Place {
    /// The image of this number begins here and takes so many positions.
    Image(usize, usize),
    /// A token of text.
    Text,
}

impl Tokens<'_> {
    /// Positions in order, each image once.
    fn places(&self) -> Vec<(usize, Place)> {
        let mut places = Vec::new();
        let mut at = 0;
        while at < self.row.input_ids.len() {
            match self.row.spans.iter().enumerate().find(|(_, s)| s.start == at && s.len > 0) {
                Some((i, span)) => {
                    places.push((at, Place::Image(i, span.len)));
                    at += span.len;
                }
                None => {
                    places.push((at, Place::Text));
                    at += 1;
                }
            }
        }
        places
    }

    fn json(&self) -> serde_json::Value {
        let tokens: Vec<_> = (self.row.input_ids.iter().zip(&self.row.labels).enumerate())
            .map(|(at, (id, label))| {
                let image = self.row.spans.iter().position(|s| (s.start..s.start + s.len).contains(&at));
                let piece = image.is_none().then(|| self.processor.piece(*id));
                json!({ "position": at, "id": id, "piece": piece, "label": label, "image": image })
            })
            .collect();
        json!({
            "id": self.sample.id, "split": self.sample.split, "images": self.sample.images,
            "supervised": self.row.supervised(), "tokens": tokens,
        })
    }

    fn text(&self, color: bool) -> String {
        let paint = |text: String, code: &str| if color { format!("\x1b[{code}m{text}\x1b[0m") } else { text };
        let split = format!("{:?}", self.sample.split).to_lowercase();
        let mut text = format!(
            "row {} ({split}): {} positions, {} supervised, {} images\n\n{:>8}  {:>7}  {:>7}  piece\n",
            self.sample.id,
            self.row.input_ids.len(),
            self.row.supervised(),
            self.row.spans.len(),
            "position",
            "id",
            "label"
        );
        for (at, place) in self.places() {
            let line = match place {
                Place::Image(i, len) => {
                    let path = self.sample.images.get(i).map(|i| i.path.display().to_string()).unwrap_or_default();
                    let span = format!("{at}-{}", at + len - 1);
                    paint(format!("{span:>8}  {:>7}  {:>7}  image {i}, {len} positions: {path}", "", "masked"), "36")
                }
                Place::Text => {
                    let (id, label) = (self.row.input_ids[at], self.row.labels[at]);
                    let piece = self.processor.piece(id).escape_debug().to_string();
                    let masked = label == IGNORE;
                    let label = if masked { "masked".to_string() } else { label.to_string() };
                    paint(format!("{at:>8}  {id:>7}  {label:>7}  {piece}"), if masked { "2" } else { "32" })
                }
            };
            text.push_str(&line);
            text.push('\n');
        }
        text
    }
}

/// Looks for test images in the training rows.
pub(super) fn leak(global: &Global, args: &RecipeArgs) -> Result<()> {
    let (resolved, _) = resolve(global, args)?;
    let ctx = context(global)?;
    let mut plan = resolved.plan.clone();
    if plan.recipe()?.author().is_some() {
        // Images and questions of the source are what can leak, and to look at them is no reason to pay for more.
        plan.recipe = Vqa.name().into();
    }
    let scratch = tempfile::tempdir().map_err(|e| Error::io(std::env::temp_dir(), e))?;
    let dir = RunDir::open(scratch.path())?;
    build::run(&plan, &dir, &ctx)?;
    let own = qc::leaks(&plan, &dir, &ctx, |s| s.split)?;
    // Marks are worth a look even where this program splits by image.
    let marked = stream_jsonl::<Sample>(&dir.path("samples.jsonl"))?.any(|s| s.is_ok_and(|s| mark(&s).is_some()));
    let marks = marked.then(|| qc::leaks(&plan, &dir, &ctx, |s| mark(s).unwrap_or(s.split))).transpose()?;
    emit(global, json!({ "split": own, "marked_split": marks }), || {
        let marks = marks.as_ref().map(|m| format!("\n\nthe data set's own split\n{m}")).unwrap_or_default();
        format!("this run's split\n{own}{marks}")
    })?;
    own.gate()
}

/// The split that the data set itself marks.
fn mark(sample: &Sample) -> Option<Split> {
    serde_json::from_value(sample.meta.get(MARKED_SPLIT)?.clone()).ok()
}

/// Draws a sample for reviewers, or reads their marks.
pub(super) fn review(global: &Global, args: &ReviewArgs) -> Result<()> {
    let Some(run) = &args.run else { return audit(global, &args.read) };
    let review = review::write(run, &args.out, args.n, args.seed)?;
    let kept = review.items.iter().filter(|i| i.kept).count();
    let page = args.out.join("index.html");
    let value = json!({
        "page": page, "review": review.review, "kept": kept, "rejected": review.items.len() - kept,
        "of_kept": review.rows[0], "of_rejected": review.rows[1],
    });
    emit(global, value, || {
        format!(
            "{kept} of {} kept rows and {} of {} rejected ones\nopen {} in a browser; `medtune data review --read FILE` \
             reads the marks that it saves",
            review.rows[0],
            review.items.len() - kept,
            review.rows[1],
            page.display()
        )
    })
}

fn audit(global: &Global, files: &[PathBuf]) -> Result<()> {
    let audit = marks::read(files)?;
    emit(global, &audit, || {
        let mut text = String::new();
        for found in &audit.findings {
            let [right, wrong, unsure] = found.marks;
            let mut rows = vec![
                vec!["marks".into(), format!("{right} right, {wrong} wrong, {unsure} unsure")],
                vec!["error left in kept rows".into(), share(&found.residual_error)],
            ];
            rows.extend(found.categories.iter().map(|(name, s)| vec![format!("  {name}"), share(s)]));
            rows.push(vec!["right rows rejected".into(), share(&found.false_rejections)]);
            rows.push(vec!["agreement with quality control".into(), agreement(&found.with_quality_control)]);
            text.push_str(&format!("{}\n{}\n", found.reviewer, columns(&rows)));
        }
        for between in &audit.between {
            let [a, b] = &between.reviewers;
            text.push_str(&format!("{a} and {b}: {}\n", agreement(&between.agreement)));
        }
        text
    })
}

fn share(s: &Share) -> String {
    let Some(value) = s.value else { return "no clear mark".into() };
    let range = |[low, high]: [f64; 2]| format!("[{:.1}, {:.1}]", 100.0 * low, 100.0 * high);
    let (wilson, exact) = (range(s.wilson), range(s.exact));
    format!("{:.1} % ({} of {}), 95 % {wilson} Wilson, {exact} exact", 100.0 * value, s.count, s.of)
}

fn agreement(a: &Agreement) -> String {
    let kappa = a.kappa.map_or("not defined".into(), |k| format!("{k:.2}"));
    let range = a.interval.map(|[low, high]| format!(" [{low:.2}, {high:.2}]")).unwrap_or_default();
    format!("kappa {kappa}{range}, {} of {} rows alike", a.alike, a.rows)
}

/// Writes rows in a form that others read.
pub(super) fn export(global: &Global, args: &DataExportArgs) -> Result<()> {
    let _lock = lock(&args.run)?;
    let done = export::export(&args.run, &args.dir, Options { format: args.format, view: args.view })?;
    emit(global, &done, || {
        let mut rows: Vec<Vec<String>> =
            done.files.iter().map(|(name, n)| vec![name.clone(), format!("{n} rows")]).collect();
        rows.push(vec!["images".into(), format!("{} files", done.images)]);
        rows.push(vec!["README.md".into(), "data card".into()]);
        for (why, n) in done.left_out.iter().filter(|(_, n)| **n > 0) {
            rows.push(vec!["left out".into(), format!("{n}: {why}")]);
        }
        format!("{}in {}", columns(&rows), args.dir.display())
    })
}

/// Prints the data card of a run.
pub(super) fn card(global: &Global, run: &Path) -> Result<()> {
    let _lock = lock(run)?;
    let facts = export::card::Facts::read(run)?;
    let counts = export::card::Counts::of(run, View::default(), facts.seed())?;
    let text = export::card::card(&facts, &counts, None);
    emit(global, json!({ "card": text }), || text.clone())
}

/// Holds a run directory, so that nothing changes it meanwhile; one that is not there is not made.
fn lock(run: &Path) -> Result<RunDir> {
    if !run.join("kept.jsonl").exists() {
        return Err(Error::new(Kind::Run, "there are no kept rows")
            .at(run.display())
            .expected("a run directory with kept.jsonl")
            .help("run `medtune qc RECIPE --out DIR` first"));
    }
    RunDir::open(run)
}
