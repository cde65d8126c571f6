//! Source rows to instruction rows: `samples.jsonl`, rendered images, and `images.jsonl`, what is known of every image
//! file. Rows that cannot be read or used go to `unread.jsonl`, from where quality control takes them over; none is
//! lost.
//!
//! Rows pass through in blocks; what stays in memory is one number a row, and what is known of each image.

use std::{
    collections::{BTreeMap, HashSet},
    path::{Path, PathBuf},
};

use rayon::prelude::*;

use super::{Ctx, Summary, construct, encode::RejectedRow};
use crate::{
    datasets::{self, MARKED_SPLIT},
    error::{Error, Kind, Result},
    leak::{identity::article, picture::Pictures},
    parallel::{CHUNK, ordered},
    plan::Plan,
    qc::hash::{hash, hash_parts},
    recipe::Recipe,
    run_dir::{JsonlReplacement, Line, Lines, RunDir},
    sample::{ImageRef, Origin, Sample, Split},
    source::{Note, SplitPolicy},
};

mod split;

use split::Clusters;

/// Instruction rows in the order of the source, before they have a split.
const PART: &str = ".tmp-samples.jsonl";

/// Source rows that are worked on at once.
const BLOCK: usize = 256;

/// Makes `samples.jsonl`.
///
/// # Errors
/// The source as a whole cannot be read, no row can, or the directory cannot be written.
pub fn run(plan: &Plan, dir: &RunDir, ctx: &Ctx) -> Result<Summary> {
    let built = build(plan, dir, ctx)?;
    dir.remove(PART)?;
    Ok(summary(&built))
}

/// Rows and images of a split.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Share {
    /// Rows.
    pub rows: usize,
    /// Groups: images, or rows without one.
    pub groups: usize,
}

/// What building counted.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Built {
    /// Rows of the source.
    pub rows_in: usize,
    /// Source rows left out because `data.images` was reached.
    pub beyond_limit: usize,
    /// Instruction rows.
    pub rows: usize,
    /// Rows that cannot be used.
    pub unread: usize,
    /// Of these, by reason code.
    pub codes: BTreeMap<String, usize>,
    /// Instruction rows by split.
    pub splits: BTreeMap<Split, Share>,
    /// Instruction rows by task or hallucination category.
    pub categories: BTreeMap<String, usize>,
    /// What the reader says about the data set.
    pub notes: Vec<Note>,
    /// What asking a language model came to, as lines of a summary.
    pub asked: Vec<(String, String)>,
    /// The first row that cannot be used.
    first_problem: Option<String>,
}

/// Reads, constructs and splits.
///
/// # Errors
/// The source as a whole cannot be read, no row can, or the directory cannot be written.
pub fn build(plan: &Plan, dir: &RunDir, ctx: &Ctx) -> Result<Built> {
    let recipe = plan.recipe()?;
    let mut gate = Gate::default();
    let mut writer = Writer::new(dir)?;
    let source = datasets::find(&plan.data.source)?.open(&plan.data, plan.seed, dir.root())?;
    let notes = source.notes();
    let mut maker = recipe.author().map(|author| construct::Maker::open(plan, author, dir.root(), ctx)).transpose()?;
    let size = maker.as_ref().map_or(BLOCK, construct::Maker::block);
    let mut samples: Box<dyn Iterator<Item = Result<Sample>>> =
        if maker.is_some() { Box::new(construct::gather(source)) } else { Box::new(source) };
    // With a limit images count, without one nobody knows how many rows there are.
    let limit = plan.data.images as u64;
    let mut task = ctx.progress.start(if limit > 0 { "read images" } else { "read rows" }, limit);
    loop {
        ctx.check()?;
        let block: Vec<Result<Sample>> = samples.by_ref().take(size).collect();
        if block.is_empty() {
            break;
        }
        let (rows, images) = (block.len(), gate.groups.len());
        let taken = block.into_iter().filter_map(|item| gate.admit(plan, item)).collect();
        let made = match &mut maker {
            None => instructions(plan, recipe, taken),
            Some(maker) => ask(maker, taken)?,
        };
        for made in made {
            writer.write(plan, made)?;
        }
        task.advance(if limit > 0 { gate.groups.len() - images } else { rows } as u64);
    }
    task.finish();
    let (mut built, clusters) = writer.finish(plan, dir)?;
    built.rows_in = gate.rows_in;
    built.beyond_limit = gate.beyond_limit;
    built.notes = notes.all();
    built.asked = maker.map_or_else(|| Ok(Vec::new()), construct::Maker::finish)?;
    if built.rows == 0 {
        return Err(nothing(&built));
    }
    let splits = clusters.splits(plan);
    assign(dir, &splits, &mut built, ctx)?;
    Ok(built)
}

/// A source row: to be made instructions of, or set aside already.
enum Item {
    Use(Box<Sample>),
    Reject(Box<RejectedRow>),
}

/// Instruction rows of one source row, and what of it cannot be used.
#[derive(Default)]
struct Made {
    rows: Vec<Sample>,
    unread: Vec<RejectedRow>,
}

/// Instruction rows of a block of source rows, in their order.
fn instructions(plan: &Plan, recipe: &dyn Recipe, block: Vec<Item>) -> Vec<Made> {
    let make = |item: Item| match item {
        Item::Reject(row) => Made { unread: vec![*row], ..Made::default() },
        Item::Use(sample) => match recipe.construct(plan, (*sample).clone()) {
            Ok(rows) => Made { rows, ..Made::default() },
            Err(e) => {
                let row = RejectedRow { sample: *sample, code: e.reason().into(), detail: e.to_string() };
                Made { unread: vec![row], ..Made::default() }
            }
        },
    };
    block.into_par_iter().map(make).collect()
}

/// Instruction rows of a block of source rows, made by a language model, in their order.
///
/// # Errors
/// Work has to end; a request that fails is no error.
fn ask(maker: &mut construct::Maker<'_>, block: Vec<Item>) -> Result<Vec<Made>> {
    let mut all: Vec<Made> = Vec::with_capacity(block.len());
    let (mut places, mut sources) = (Vec::new(), Vec::new());
    for (i, item) in block.into_iter().enumerate() {
        all.push(match item {
            Item::Reject(row) => Made { unread: vec![*row], ..Made::default() },
            Item::Use(sample) => {
                places.push(i);
                sources.push(*sample);
                Made::default()
            }
        });
    }
    for (i, made) in places.into_iter().zip(maker.make(sources)?) {
        all[i] = Made { rows: made.rows, unread: made.rejected };
    }
    Ok(all)
}

/// Counts source rows, and keeps those that are beyond the limit or named twice out.
#[derive(Default)]
struct Gate {
    rows_in: usize,
    beyond_limit: usize,
    groups: HashSet<u64>,
    ids: HashSet<u64>,
}

impl Gate {
    fn admit(&mut self, plan: &Plan, item: Result<Sample>) -> Option<Item> {
        let row = self.rows_in;
        self.rows_in += 1;
        let sample = match item {
            Ok(sample) => sample,
            Err(e) => return Some(Item::Reject(Box::new(unreadable(&plan.data.source, row, &e)))),
        };
        let group = hash(sample.group.as_bytes());
        if plan.data.images > 0 && !self.groups.contains(&group) {
            if self.groups.len() == plan.data.images {
                self.beyond_limit += 1;
                return None;
            }
            self.groups.insert(group);
        }
        if !self.ids.insert(hash(sample.id.as_bytes())) {
            let detail = format!("another row has the id {}", sample.id);
            return Some(Item::Reject(Box::new(RejectedRow { sample, code: "duplicate_id".into(), detail })));
        }
        Some(Item::Use(Box::new(sample)))
    }
}

/// A row that the source could not even turn into a sample: its place and the error stand for it, and the file that it
/// lacks, so that the stage runs again when the file is there.
fn unreadable(source: &str, row: usize, error: &Error) -> RejectedRow {
    let sample = Sample {
        id: format!("{source}-unread-{row}"),
        images: error.file().map(|path| ImageRef { path: path.to_path_buf() }).into_iter().collect(),
        origin: Origin { dataset: source.into(), file: PathBuf::new(), row },
        ..Sample::default()
    };
    RejectedRow { sample, code: error.reason().into(), detail: error.to_string() }
}

/// Writes rows as they come and remembers of each what its split depends on.
struct Writer {
    rows: JsonlReplacement,
    unread: JsonlReplacement,
    pictures: Pictures,
    /// Images of rows that could not be read: of these only the files' times matter.
    missing: Vec<PathBuf>,
    clusters: Clusters,
    built: Built,
}

impl Writer {
    fn new(dir: &RunDir) -> Result<Self> {
        Ok(Self {
            rows: dir.replace_jsonl(PART)?,
            unread: dir.replace_jsonl("unread.jsonl")?,
            pictures: Pictures::default(),
            missing: Vec::new(),
            clusters: Clusters::default(),
            built: Built::default(),
        })
    }

    fn write(&mut self, plan: &Plan, made: Made) -> Result<()> {
        for row in made.unread {
            self.built.unread += 1;
            *self.built.codes.entry(row.code.clone()).or_default() += 1;
            self.built.first_problem.get_or_insert_with(|| row.detail.clone());
            self.missing.extend(row.sample.images.iter().map(|i| i.path.clone()));
            self.unread.push(&row)?;
        }
        self.pictures.look_at(made.rows.iter().flat_map(|s| &s.images).map(|i| i.path.as_path()));
        for sample in made.rows {
            self.built.rows += 1;
            if let Some(category) = &sample.category {
                *self.built.categories.entry(category.clone()).or_default() += 1;
            }
            let mark = (plan.data.split == SplitPolicy::Marked).then(|| marked(&sample)).transpose()?;
            let images = sample.images.iter().filter_map(|i| self.pictures.index(&i.path));
            self.clusters.add(&sample.group, article(&sample).as_deref(), images, mark);
            self.rows.push(&sample)?;
        }
        Ok(())
    }

    fn finish(mut self, plan: &Plan, dir: &RunDir) -> Result<(Built, Clusters)> {
        self.rows.finish()?;
        self.unread.finish()?;
        if plan.data.compares_looks() {
            self.pictures.find_copies();
        } else {
            self.pictures.find_exact_copies();
        }
        self.clusters.join(&self.pictures);
        self.pictures.look_at(self.missing.iter().map(PathBuf::as_path));
        self.pictures.save(&dir.path("images.jsonl"))?;
        Ok((self.built, self.clusters))
    }
}

/// The split that the data set itself marks.
fn marked(sample: &Sample) -> Result<Split> {
    let mark = sample.meta.get(MARKED_SPLIT).and_then(|m| serde_json::from_value(m.clone()).ok());
    mark.ok_or_else(|| {
        Error::new(Kind::Data, "a row is not marked with a split")
            .at(&sample.id)
            .expected("train, validation or test")
            .help("set data.split = \"by_image\"")
    })
}

/// Gives every row its split.
fn assign(dir: &RunDir, splits: &[Split], built: &mut Built, ctx: &Ctx) -> Result<()> {
    let part = dir.path(PART);
    let mut out = dir.replace_jsonl("samples.jsonl")?;
    let mut groups: HashSet<u64> = HashSet::new();
    let rows = Lines::open(&part)?.zip(splits.iter().copied());
    for row in ordered(rows, CHUNK, |(line, split)| with_split(&part, &line?, split)) {
        ctx.check()?;
        let (split, group, bytes) = row?;
        let share = built.splits.entry(split).or_default();
        share.rows += 1;
        share.groups += usize::from(groups.insert(group));
        out.push_line(&bytes)?;
    }
    out.finish()
}

fn with_split(path: &Path, line: &Line, split: Split) -> Result<(Split, u64, Vec<u8>)> {
    let mut sample: Sample = line.parse(path)?;
    sample.split = split;
    let bytes = serde_json::to_vec(&sample)
        .map_err(|e| Error::new(Kind::Run, "a row has no JSON form").at(&sample.id).source(e))?;
    Ok((split, hash_parts(&[&sample.group, &format!("{split:?}")]), bytes))
}

fn nothing(built: &Built) -> Error {
    let found = match &built.first_problem {
        Some(problem) => format!("{} rows, none usable; the first: {problem}", built.rows_in),
        None => "no rows".to_string(),
    };
    Error::new(Kind::Data, "the source gave no usable row")
        .found(found)
        .help("unread.jsonl has every row with its reason")
}

fn summary(built: &Built) -> Summary {
    let mut summary = Summary::default();
    for note in &built.notes {
        summary.line(if note.warning { "warning" } else { "source" }, &note.text);
    }
    summary.line("source rows", built.rows_in);
    if built.beyond_limit > 0 {
        summary.line("beyond data.images", built.beyond_limit);
    }
    summary.lines.extend(built.asked.iter().cloned());
    summary.line("unusable rows", built.unread);
    for (code, n) in &built.codes {
        summary.line(&format!("  {code}"), n);
    }
    summary.line("instruction rows", built.rows);
    for (split, share) in &built.splits {
        let text = format!("{} of {} images", share.rows, share.groups);
        summary.line(&format!("  {}", format!("{split:?}").to_lowercase()), text);
    }
    for (category, n) in &built.categories {
        summary.line(&format!("  {category}"), n);
    }
    summary
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use super::*;
    use crate::{device::DeviceSpec, progress::Progress};

    fn ctx() -> Ctx {
        Ctx::new(DeviceSpec::Cpu, Progress::Silent).unwrap()
    }

    fn plan(images: usize) -> Plan {
        let mut plan = Plan::default();
        plan.data.images = images;
        plan
    }

    fn samples(dir: &RunDir) -> Vec<Sample> {
        dir.read_jsonl("samples.jsonl").unwrap()
    }

    #[test]
    fn rows_of_an_image_stay_together_and_threads_do_not_matter() {
        let root = tempfile::tempdir().unwrap();
        let dir = RunDir::open(root.path().join("run")).unwrap();
        let build_with = |threads: usize| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| build(&plan(60), &dir, &ctx()).unwrap());
            (std::fs::read(dir.path("samples.jsonl")).unwrap(), std::fs::read(dir.path("images.jsonl")).unwrap())
        };
        assert_eq!(build_with(1), build_with(4));
        let rows = samples(&dir);
        let mut split_of: HashMap<&str, Split> = HashMap::new();
        for sample in &rows {
            assert_eq!(*split_of.entry(&sample.group).or_insert(sample.split), sample.split);
        }
        let images = |split| split_of.values().filter(|s| **s == split).count();
        assert_eq!((images(Split::Test), images(Split::Validation), split_of.len()), (12, 3, 60));
    }

    /// A file of questions about images that do not decode but have content.
    fn messages(dir: &Path, rows: &[(&str, &str)]) -> Plan {
        let lines: Vec<String> = rows
            .iter()
            .map(|(id, image)| {
                format!(
                    r#"{{"id": "{id}", "images": ["{image}"], "messages": [{{"role": "user", "content": "Q {id}?"}}, {{"role": "assistant", "content": "A."}}]}}"#
                )
            })
            .collect();
        std::fs::write(dir.join("d.jsonl"), lines.join("\n") + "\n").unwrap();
        let mut plan = plan(0);
        plan.data.source = "messages".into();
        plan.data.path = Some(dir.join("d.jsonl"));
        plan.data.test_fraction = 0.3;
        plan
    }

    #[test]
    fn every_row_is_a_sample_or_unread_and_copies_of_an_image_stay_together() {
        let root = tempfile::tempdir().unwrap();
        let dir = RunDir::open(root.path().join("run")).unwrap();
        let mut rows = Vec::new();
        for i in 0..40 {
            // Every image lies there twice, under two names.
            std::fs::write(root.path().join(format!("{i}.png")), [b'x', (i / 2) as u8]).unwrap();
            rows.push((format!("r{}", if i == 7 { 6 } else { i }), format!("{i}.png")));
        }
        let rows: Vec<(&str, &str)> = rows.iter().map(|(a, b)| (a.as_str(), b.as_str())).collect();
        let mut plan = messages(root.path(), &rows);
        let file = plan.data.path.clone().unwrap();
        std::fs::write(&file, std::fs::read_to_string(&file).unwrap() + "{\"id\": \"cut").unwrap();
        let built = build(&plan, &dir, &ctx()).unwrap();
        assert_eq!((built.rows_in, built.rows, built.unread), (41, 39, 2));
        let unread: Vec<RejectedRow> = dir.read_jsonl("unread.jsonl").unwrap();
        assert_eq!(unread.iter().map(|r| r.code.as_str()).collect::<Vec<_>>(), ["duplicate_id", "malformed"]);
        let rows = samples(&dir);
        for pair in rows.chunks(2).filter(|p| p.len() == 2) {
            let index = |s: &Sample| s.origin.row / 2;
            if index(&pair[0]) == index(&pair[1]) {
                assert_eq!(pair[0].split, pair[1].split);
            }
        }
        assert!(rows.iter().any(|s| s.split == Split::Test));
        plan.data.images = 5;
        let built = build(&plan, &dir, &ctx()).unwrap();
        assert_eq!((built.rows, built.beyond_limit), (5, 35));
        assert_eq!(built.rows_in, built.rows + built.unread + built.beyond_limit);
        plan.data.split = SplitPolicy::Marked;
        assert!(build(&plan, &dir, &ctx()).unwrap_err().to_string().contains("not marked"));
    }

    #[test]
    fn figures_of_one_article_stay_together() {
        let root = tempfile::tempdir().unwrap();
        let dir = RunDir::open(root.path().join("run")).unwrap();
        let mut rows = Vec::new();
        for i in 0..60 {
            let name = format!("pmc_{}_{}.png", 100 + i / 3, i % 3);
            std::fs::write(root.path().join(&name), [b'x', i as u8]).unwrap();
            rows.push((format!("r{i}"), name));
        }
        let rows: Vec<(&str, &str)> = rows.iter().map(|(a, b)| (a.as_str(), b.as_str())).collect();
        build(&messages(root.path(), &rows), &dir, &ctx()).unwrap();
        let rows = samples(&dir);
        assert!(rows.chunks(3).all(|c| c.iter().all(|s| s.split == c[0].split)));
        assert_eq!(rows.iter().filter(|s| s.split == Split::Test).count(), 18);
    }

    #[test]
    fn a_missing_image_is_named_so_that_its_arrival_is_noticed() {
        let root = tempfile::tempdir().unwrap();
        let dir = RunDir::open(root.path().join("run")).unwrap();
        std::fs::write(root.path().join("a.png"), b"a").unwrap();
        let plan = messages(root.path(), &[("1", "a.png"), ("2", "later.png")]);
        assert_eq!(build(&plan, &dir, &ctx()).unwrap().unread, 1);
        let pictures = Pictures::load(&dir.path("images.jsonl")).unwrap();
        let missing: Vec<bool> = pictures.all().iter().map(|p| p.bytes == 0).collect();
        assert_eq!(missing, [false, true]);
        assert!(pictures.all()[1].path.ends_with("later.png"));
    }
}
