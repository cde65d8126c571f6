//! Source rows to instruction rows: `samples.jsonl` and rendered images. Rows that cannot be read or used go to
//! `unread.jsonl`, from where quality control takes them over; none is lost.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    path::PathBuf,
};

use rand::seq::SliceRandom;

use super::{Ctx, Summary, encode::RejectedRow};
use crate::{
    datasets::{self, MARKED_SPLIT},
    error::{Error, Kind, Result},
    leak::content_hashes,
    plan::Plan,
    random::stream,
    run_dir::RunDir,
    sample::{Origin, Sample, Split},
    source::{Note, SplitPolicy},
};

/// Makes `samples.jsonl`.
///
/// # Errors
/// The source as a whole cannot be read, no row can, or the directory cannot be written.
pub fn run(plan: &Plan, dir: &RunDir, ctx: &Ctx) -> Result<Summary> {
    let built = build(plan, dir.root(), ctx)?;
    dir.write_jsonl("unread.jsonl", &built.unread)?;
    if built.samples.is_empty() {
        return Err(nothing(&built));
    }
    dir.write_jsonl("samples.jsonl", &built.samples)?;
    Ok(summary(&built))
}

/// What building gave.
#[derive(Debug, Default)]
pub struct Built {
    /// Rows of the source.
    pub rows_in: usize,
    /// Source rows left out because `data.images` was reached.
    pub beyond_limit: usize,
    /// Instruction rows.
    pub samples: Vec<Sample>,
    /// Rows that cannot be used.
    pub unread: Vec<RejectedRow>,
    /// What the reader says about the data set.
    pub notes: Vec<Note>,
}

/// Reads, constructs and splits, without writing anything but rendered images into `work_dir`.
///
/// # Errors
/// The source as a whole cannot be read, or the split is contradictory.
pub fn build(plan: &Plan, work_dir: &std::path::Path, ctx: &Ctx) -> Result<Built> {
    let recipe = plan.recipe()?;
    let source = datasets::find(&plan.data.source)?;
    let mut built = Built::default();
    let mut groups = HashSet::new();
    let mut ids = HashSet::new();
    let mut task = ctx.progress.start("read rows", plan.data.images as u64);
    let rows = source.open(&plan.data, plan.seed, work_dir)?;
    let notes = rows.notes();
    for (row, item) in rows.enumerate() {
        ctx.check()?;
        task.advance(1);
        built.rows_in += 1;
        let sample = match item {
            Ok(sample) => sample,
            Err(e) => {
                built.unread.push(unreadable(&plan.data.source, row, &e));
                continue;
            }
        };
        if !groups.contains(&sample.group) {
            if plan.data.images > 0 && groups.len() == plan.data.images {
                built.beyond_limit += 1;
                continue;
            }
            groups.insert(sample.group.clone());
        }
        if !ids.insert(sample.id.clone()) {
            let detail = format!("another row has the id {}", sample.id);
            built.unread.push(RejectedRow { sample, code: "duplicate_id".into(), detail });
            continue;
        }
        match recipe.construct(plan, sample.clone()) {
            Ok(rows) => built.samples.extend(rows),
            Err(e) => built.unread.push(RejectedRow { sample, code: e.reason().into(), detail: e.to_string() }),
        }
    }
    task.finish();
    built.notes = notes.all();
    split(plan, &mut built.samples)?;
    Ok(built)
}

/// A row that the source could not even turn into a sample: its place and the error stand for it.
fn unreadable(source: &str, row: usize, error: &Error) -> RejectedRow {
    let sample = Sample {
        id: format!("{source}-unread-{row}"),
        images: Vec::new(),
        turns: Vec::new(),
        origin: Origin { dataset: source.into(), file: PathBuf::new(), row },
        split: Split::default(),
        group: String::new(),
        polarity: None,
        category: None,
        answer_type: None,
        options: Vec::new(),
        annotation: None,
        meta: serde_json::Map::new(),
    };
    RejectedRow { sample, code: error.reason().into(), detail: error.to_string() }
}

/// Assigns a split to every row. By image: rows that share a group, or an image of the same bytes, stay together.
///
/// # Errors
/// An image cannot be read, or marks are followed and a row has none.
pub fn split(plan: &Plan, samples: &mut [Sample]) -> Result<()> {
    if plan.data.split == SplitPolicy::Marked {
        return follow_marks(samples);
    }
    let clusters = clusters(samples)?;
    let mut order: Vec<usize> = Vec::new();
    let mut seen = HashSet::new();
    for cluster in &clusters {
        if seen.insert(*cluster) {
            order.push(*cluster);
        }
    }
    order.shuffle(&mut stream(plan.seed, "split", 0));
    let count = |share: f64| (share * order.len() as f64).round() as usize;
    let test = count(plan.data.test_fraction);
    let validation = count(plan.data.validation_fraction);
    let split_of: HashMap<usize, Split> = order
        .iter()
        .enumerate()
        .map(|(i, cluster)| {
            let split = match i {
                i if i < test => Split::Test,
                i if i < test + validation => Split::Validation,
                _ => Split::Train,
            };
            (*cluster, split)
        })
        .collect();
    for (sample, cluster) in samples.iter_mut().zip(clusters) {
        sample.split = split_of.get(&cluster).copied().unwrap_or_default();
    }
    Ok(())
}

fn follow_marks(samples: &mut [Sample]) -> Result<()> {
    for sample in samples {
        let mark = sample.meta.get(MARKED_SPLIT).cloned();
        let mark = mark.and_then(|m| serde_json::from_value(m).ok());
        sample.split = mark.ok_or_else(|| {
            Error::new(Kind::Data, "a row is not marked with a split")
                .at(&sample.id)
                .expected("train, validation or test")
                .help("set data.split = \"by_image\"")
        })?;
    }
    Ok(())
}

/// Number of each sample's cluster: the first sample that is connected to it by a group or by image content.
fn clusters(samples: &[Sample]) -> Result<Vec<usize>> {
    let hashes = content_hashes(samples)?;
    let mut parent: Vec<usize> = (0..samples.len()).collect();
    let mut first: HashMap<Vec<u8>, usize> = HashMap::new();
    for (i, sample) in samples.iter().enumerate() {
        let images = sample.images.iter().filter_map(|image| hashes.get(&image.path)).map(|h| h.to_vec());
        for key in images.chain([sample.group.as_bytes().to_vec()]) {
            let other = *first.entry(key).or_insert(i);
            let (a, b) = (root(&mut parent, i), root(&mut parent, other));
            parent[a.max(b)] = a.min(b);
        }
    }
    Ok((0..samples.len()).map(|i| root(&mut parent, i)).collect())
}

fn root(parent: &mut [usize], mut i: usize) -> usize {
    while parent[i] != i {
        parent[i] = parent[parent[i]];
        i = parent[i];
    }
    i
}

fn nothing(built: &Built) -> Error {
    let found = match built.unread.first() {
        Some(row) => format!("{} rows, none usable; the first: {}", built.rows_in, row.detail),
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
    summary.line("unusable rows", built.unread.len());
    for (code, n) in count(built.unread.iter().map(|r| r.code.clone())) {
        summary.line(&format!("  {code}"), n);
    }
    summary.line("instruction rows", built.samples.len());
    for (split, n) in count(built.samples.iter().map(|s| s.split)) {
        let images: HashSet<&str> =
            built.samples.iter().filter(|s| s.split == split).map(|s| s.group.as_str()).collect();
        summary.line(&format!("  {}", format!("{split:?}").to_lowercase()), format!("{n} of {} images", images.len()));
    }
    for (category, n) in count(built.samples.iter().filter_map(|s| s.category.clone())) {
        summary.line(&format!("  {category}"), n);
    }
    summary
}

fn count<K: Ord>(keys: impl Iterator<Item = K>) -> BTreeMap<K, usize> {
    let mut counts = BTreeMap::new();
    for key in keys {
        *counts.entry(key).or_default() += 1;
    }
    counts
}

#[cfg(test)]
mod tests {
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

    #[test]
    fn rows_of_an_image_stay_together_and_threads_do_not_matter() {
        let dir = tempfile::tempdir().unwrap();
        let build_with = |threads: usize| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| build(&plan(60), dir.path(), &ctx()).unwrap())
        };
        let (one, four) = (build_with(1), build_with(4));
        assert_eq!(one.samples, four.samples);
        let mut split_of: HashMap<&str, Split> = HashMap::new();
        for sample in &one.samples {
            assert_eq!(*split_of.entry(&sample.group).or_insert(sample.split), sample.split);
        }
        let images = |split| split_of.values().filter(|s| **s == split).count();
        assert_eq!((images(Split::Test), images(Split::Validation), split_of.len()), (12, 3, 60));
    }

    #[test]
    fn every_row_is_a_sample_or_unread_and_copies_of_an_image_stay_together() {
        let dir = tempfile::tempdir().unwrap();
        let mut lines = String::new();
        for i in 0..40 {
            // Every image lies there twice, under two names.
            let name = format!("{i}.png");
            std::fs::write(dir.path().join(&name), [b'x', (i / 2) as u8]).unwrap();
            lines += &format!(
                r#"{{"id": "r{}", "images": ["{name}"], "messages": [{{"role": "user", "content": "Q {i}?"}}, {{"role": "assistant", "content": "A."}}]}}"#,
                if i == 7 { 6 } else { i }
            );
            lines.push('\n');
        }
        lines += "{\"id\": \"cut";
        std::fs::write(dir.path().join("d.jsonl"), lines).unwrap();
        let mut plan = plan(0);
        plan.data.source = "messages".into();
        plan.data.path = Some(dir.path().join("d.jsonl"));
        plan.data.test_fraction = 0.3;
        let built = build(&plan, dir.path(), &ctx()).unwrap();
        assert_eq!((built.rows_in, built.samples.len(), built.unread.len()), (41, 39, 2));
        let codes: Vec<&str> = built.unread.iter().map(|r| r.code.as_str()).collect();
        assert_eq!(codes, ["duplicate_id", "malformed"]);
        for pair in built.samples.chunks(2).filter(|p| p.len() == 2) {
            let index = |s: &Sample| s.origin.row / 2;
            if index(&pair[0]) == index(&pair[1]) {
                assert_eq!(pair[0].split, pair[1].split);
            }
        }
        assert!(built.samples.iter().any(|s| s.split == Split::Test));
        plan.data.images = 5;
        let built = build(&plan, dir.path(), &ctx()).unwrap();
        assert_eq!((built.samples.len(), built.beyond_limit), (5, 35));
        assert_eq!(built.rows_in, built.samples.len() + built.unread.len() + built.beyond_limit);
        plan.data.split = SplitPolicy::Marked;
        assert!(build(&plan, dir.path(), &ctx()).unwrap_err().to_string().contains("not marked"));
    }
}
