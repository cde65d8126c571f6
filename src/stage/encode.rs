//! Token and pixel check of every kept row, before a device is touched.
//!
//! What cannot be encoded moves from `kept.jsonl` to `rejected.jsonl` with its reason; `encode.json` has the counts.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};

use super::{Ctx, Summary};
use crate::{
    device::DeviceSpec,
    error::{Error, Kind, Result},
    models::{self, embedded},
    parallel::{CHUNK, ordered},
    plan::{Plan, embedded_name},
    run_dir::{JsonlReplacement, Lines, RunDir, stream_jsonl},
    sample::{Sample, Split},
    vlm::{Encoded, Processor},
    weights::SaveOptions,
};

/// A row that was taken out of the data.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RejectedRow {
    /// The row.
    pub sample: Sample,
    /// Reason code.
    pub code: String,
    /// What exactly was wrong.
    pub detail: String,
}

/// Smallest, middle and largest of some counts.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct Spread {
    /// Smallest.
    pub min: usize,
    /// Half of the counts are below.
    pub median: usize,
    /// Largest.
    pub max: usize,
    /// Sum.
    pub sum: usize,
}

impl Spread {
    /// Of counts in any order; zeros for none.
    #[must_use]
    pub fn of(mut counts: Vec<usize>) -> Self {
        counts.sort_unstable();
        match counts.as_slice() {
            [] => Self::default(),
            all => Self { min: all[0], median: all[all.len() / 2], max: all[all.len() - 1], sum: all.iter().sum() },
        }
    }
}

/// `encode.json`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct EncodeReport {
    /// Rows of `kept.jsonl` before.
    pub rows_in: usize,
    /// Rows that can be encoded.
    pub rows_ok: usize,
    /// Rows that moved to `rejected.jsonl`.
    pub rows_rejected: usize,
    /// Rejected rows by reason code.
    pub codes: BTreeMap<String, usize>,
    /// Rows by split.
    pub splits: BTreeMap<String, usize>,
    /// Positions of a row, images included.
    pub positions: Spread,
    /// Positions of a row that images take.
    pub image_positions: Spread,
    /// Supervised positions of a row to train on.
    pub supervised: Spread,
    /// What decides how a row becomes numbers.
    pub signature: serde_json::Value,
}

/// What is counted of a row.
#[derive(Debug, Clone, Copy)]
struct Counts {
    positions: usize,
    image_positions: usize,
    supervised: usize,
}

/// Counts over all rows.
#[derive(Debug, Default)]
struct Tally {
    counts: Vec<Counts>,
    splits: BTreeMap<String, usize>,
    codes: BTreeMap<String, usize>,
}

impl Tally {
    fn keep(&mut self, split: Split, counts: Counts) {
        self.counts.push(counts);
        *self.splits.entry(format!("{split:?}").to_lowercase()).or_default() += 1;
    }

    fn reject(&mut self, code: &str) {
        *self.codes.entry(code.to_string()).or_default() += 1;
    }

    fn rows(&self) -> usize {
        self.counts.len() + self.codes.values().sum::<usize>()
    }

    fn report(&self, signature: serde_json::Value) -> EncodeReport {
        let spread = |f: fn(&Counts) -> usize| Spread::of(self.counts.iter().map(f).collect());
        EncodeReport {
            rows_in: self.rows(),
            rows_ok: self.counts.len(),
            rows_rejected: self.codes.values().sum(),
            codes: self.codes.clone(),
            splits: self.splits.clone(),
            positions: spread(|c| c.positions),
            image_positions: spread(|c| c.image_positions),
            supervised: Spread::of(self.counts.iter().map(|c| c.supervised).filter(|n| *n > 0).collect()),
            signature,
        }
    }
}

/// Encodes every kept row through the model's processor; rows that fail move to `rejected.jsonl`.
///
/// # Errors
/// No row to train on is left, the model's host side cannot be read, or the directory cannot be written.
pub fn run(plan: &Plan, dir: &RunDir, ctx: &Ctx) -> Result<Summary> {
    let base = base_dir(plan, dir)?;
    let processor = models::processor(&base, &plan.model.load_options())?;
    let report = encode_all(dir, processor.as_ref(), plan.train.max_length, ctx)?.report(processor.signature());
    dir.write_json("encode.json", &report)?;
    gate(plan, &report)?;
    Ok(summary(&report))
}

/// Encodes the rows of `kept.jsonl` as they are read; the file is replaced only if a row has to leave it.
fn encode_all(dir: &RunDir, processor: &dyn Processor, max_length: usize, ctx: &Ctx) -> Result<Tally> {
    let path = dir.path("kept.jsonl");
    let rows_in = Lines::open(&path)?.count();
    let mut task = ctx.progress.start("encode rows", rows_in as u64);
    let mut tally = Tally::default();
    let mut kept = dir.replace_jsonl("kept.jsonl")?;
    let mut rejected: Option<JsonlReplacement> = None;
    let rows = ordered(Lines::open(&path)?, CHUNK, |line| -> Result<_> {
        ctx.check()?;
        let line = line?;
        let sample: Sample = line.parse(&path)?;
        let outcome = encode(&sample, processor, max_length);
        Ok((line, sample, outcome))
    });
    for row in rows {
        let (line, sample, outcome) = row?;
        task.advance(1);
        match outcome {
            Ok(counts) => {
                tally.keep(sample.split, counts);
                kept.push_line(&line.bytes)?;
            }
            Err(e) => {
                tally.reject(e.reason());
                let file = match &mut rejected {
                    Some(file) => file,
                    none => none.insert(earlier_rejected(dir)?),
                };
                file.push(&RejectedRow { sample, code: e.reason().into(), detail: e.to_string() })?;
            }
        }
    }
    task.finish();
    assert_eq!(rows_in, tally.rows(), "a row was lost while encoding");
    if let Some(rejected) = rejected {
        // In this order: a row is never in neither file, whenever the program ends.
        rejected.finish()?;
        kept.finish()?;
    }
    Ok(tally)
}

/// A new `rejected.jsonl` that begins with the rows of the present one.
fn earlier_rejected(dir: &RunDir) -> Result<JsonlReplacement> {
    let mut file = dir.replace_jsonl("rejected.jsonl")?;
    let present = dir.path("rejected.jsonl");
    if present.exists() {
        for line in Lines::open(&present)? {
            file.push_line(&line?.bytes)?;
        }
    }
    Ok(file)
}

/// Encodes one row as its split will need it and checks the result.
fn encode(sample: &Sample, processor: &dyn Processor, max_length: usize) -> Result<Counts> {
    let answered_only = sample.split == Split::Test;
    let row = if answered_only { processor.prompt(sample)? } else { processor.encode(sample)? };
    let wrong = |code, what: &str| Error::new(Kind::Data, what).code(code).at(&sample.id);
    let length = row.input_ids.len();
    if row.spans.len() != sample.images.len() {
        return Err(wrong("image_count", "row does not hold every image once")
            .expected(sample.images.len())
            .found(row.spans.len()));
    }
    if row.labels.len() != length || row.spans.iter().any(|s| s.len == 0 || s.start + s.len > length) {
        return Err(wrong("image_span", "an image does not lie inside its row"));
    }
    if max_length > 0 && length > max_length {
        return Err(wrong("over_long", "row is too long")
            .expected(format!("at most {max_length} positions, train.max_length"))
            .found(length));
    }
    if !answered_only && row.supervised() == 0 {
        return Err(wrong("no_supervised", "row has no supervised token"));
    }
    Ok(count(&row))
}

fn count(row: &Encoded) -> Counts {
    Counts {
        positions: row.input_ids.len(),
        image_positions: row.spans.iter().map(|s| s.len).sum(),
        supervised: row.supervised(),
    }
}

fn gate(plan: &Plan, report: &EncodeReport) -> Result<()> {
    let reasons = || {
        let list: Vec<_> = report.codes.iter().map(|(code, n)| format!("{n} {code}")).collect();
        if list.is_empty() { "none kept by quality control".to_string() } else { list.join(", ") }
    };
    if !report.splits.contains_key("train") {
        return Err(Error::new(Kind::Gate, "no row is left to train on")
            .found(reasons())
            .help("rejected.jsonl has every row with its reason"));
    }
    let share = report.rows_rejected as f64 / report.rows_in.max(1) as f64;
    if share > plan.qc.max_drop_rate {
        return Err(Error::new(Kind::Gate, "too many rows cannot be encoded")
            .expected(format!("a share of at most {}, qc.max_drop_rate", plan.qc.max_drop_rate))
            .found(format!("{share:.3}: {}", reasons()))
            .help("rejected.jsonl has every row with its reason"));
    }
    Ok(())
}

fn summary(report: &EncodeReport) -> Summary {
    let mut summary = Summary::default();
    summary.line("rows in", report.rows_in).line("ok", report.rows_ok).line("rejected", report.rows_rejected);
    for (code, n) in &report.codes {
        summary.line(&format!("  {code}"), n);
    }
    let p = &report.positions;
    summary.line("positions", format!("{} to {}, median {}", p.min, p.max, p.median));
    summary.line("image positions", report.image_positions.sum).line("supervised tokens", report.supervised.sum);
    summary
}

/// Directory of the base model in Hugging Face layout. An embedded checkpoint is unpacked to `base/`; without a
/// checkpoint the preset is initialised there, with a tokenizer of the kept training texts. What is there already is
/// used as it is.
///
/// # Errors
/// An unknown name or preset, texts too few for a tokenizer, or an unwritable directory.
pub fn base_dir(plan: &Plan, dir: &RunDir) -> Result<PathBuf> {
    let base = dir.path("base");
    match &plan.model.checkpoint {
        Some(path) => match embedded_name(path) {
            None => return Ok(path.clone()),
            Some(name) => {
                let checkpoint = embedded::find(name, &plan.model.name)?;
                if !base.join("config.json").exists() {
                    checkpoint.unpack(&base)?;
                }
            }
        },
        None => {
            if !base.join(models::find(&plan.model.name)?.tokenizer.file).exists() {
                initialise(plan, dir, &base)?;
            }
        }
    }
    Ok(base)
}

/// Random weights and a new tokenizer; the tokenizer is written last, so that a directory with one is complete.
fn initialise(plan: &Plan, dir: &RunDir, base: &Path) -> Result<()> {
    let preset = plan.model.preset()?;
    if preset.name != models::TINY {
        return Err(Error::new(
            Kind::Config,
            "this preset has the shape of a published model, whose weights are needed",
        )
        .at("model.preset")
        .found(format!("{} ({})", preset.name, preset.about))
        .help("name the directory of its checkpoint as model.checkpoint, or start from model.preset = \"tiny\""));
    }
    let mut texts: Vec<String> = Vec::new();
    for sample in stream_jsonl::<Sample>(&dir.path("kept.jsonl"))? {
        let sample = sample?;
        if sample.split == Split::Train {
            texts.extend(sample.turns.iter().map(|t| t.text.replace("<image>", "")));
        }
    }
    let family = models::find(&plan.model.name)?;
    let tokenizer = (family.tokenizer.train)(&texts, preset.vocab_size)?;
    let device = DeviceSpec::Cpu.open()?;
    let model = (family.init)(preset.name, Some(preset.vocab_size), plan.seed, &device)?;
    model.save(base, &SaveOptions::default())?;
    for (name, bytes) in &tokenizer {
        crate::run_dir::write_atomic(&base.join(name), bytes)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        progress::Progress,
        sample::{ImageRef, Origin, Role, Turn},
        vlm::{IGNORE, ImageSpan},
    };

    /// One token a letter of the answer, two positions an image; the id of a sample says what goes wrong.
    struct Letters;

    impl Processor for Letters {
        fn signature(&self) -> serde_json::Value {
            "letters".into()
        }

        fn encode(&self, sample: &Sample) -> Result<Encoded> {
            if sample.id == "broken" {
                return Err(Error::new(Kind::Image, "image cannot be read").at("x.png"));
            }
            let images = sample.images.len() - usize::from(sample.id == "forgets");
            let text: Vec<i32> = sample.answer().bytes().map(i32::from).collect();
            let input_ids = [vec![0; 2 * images], text.clone()].concat();
            let mask = if sample.id == "masked" { vec![IGNORE; text.len()] } else { text };
            let labels = [vec![IGNORE; 2 * images], mask].concat();
            let len = if sample.id == "outside" { 2000 } else { 2 };
            let spans = (0..images).map(|i| ImageSpan { start: 2 * i, len }).collect();
            Ok(Encoded { id: sample.id.clone(), input_ids, labels, spans, pixels: Vec::new() })
        }

        fn prompt(&self, sample: &Sample) -> Result<Encoded> {
            self.encode(sample)
        }

        fn decode(&self, _: &[i32]) -> String {
            String::new()
        }

        fn piece(&self, _: i32) -> String {
            String::new()
        }

        fn stop_ids(&self) -> &[i32] {
            &[]
        }

        fn pad_id(&self) -> i32 {
            0
        }

        fn vocab_size(&self) -> usize {
            256
        }
    }

    fn sample(id: &str, answer: &str, split: Split) -> Sample {
        Sample {
            id: id.into(),
            images: vec![ImageRef { path: "x.png".into() }],
            turns: vec![Turn { role: Role::Assistant, text: answer.into() }],
            origin: Origin::default(),
            split,
            group: String::new(),
            polarity: None,
            category: None,
            answer_type: None,
            options: Vec::new(),
            annotation: None,
            meta: serde_json::Map::new(),
        }
    }

    #[test]
    fn every_fault_has_its_code_and_no_row_is_lost() {
        let names = ["good", "broken", "forgets", "outside", "masked"];
        let mut samples: Vec<_> = names.map(|id| sample(id, "yes", Split::Train)).to_vec();
        samples.push(sample("long", "a long answer", Split::Train));
        // Nothing is learnt from test rows, so nothing has to be supervised.
        samples.push(sample("masked", "yes", Split::Test));
        let ctx = Ctx::new(DeviceSpec::Cpu, Progress::Silent).unwrap();
        let dir = tempfile::tempdir().unwrap();
        let run = RunDir::open(dir.path().join("run")).unwrap();
        run.write_jsonl("kept.jsonl", &samples).unwrap();
        let earlier =
            RejectedRow { sample: sample("a", "yes", Split::Train), code: "duplicate".into(), detail: "".into() };
        run.write_jsonl("rejected.jsonl", [earlier]).unwrap();
        let tally = encode_all(&run, &Letters, 8, &ctx).unwrap();
        assert_eq!((tally.counts.len(), tally.rows()), (2, samples.len()));
        let kept: Vec<Sample> = run.read_jsonl("kept.jsonl").unwrap();
        assert_eq!(kept, [samples[0].clone(), samples[6].clone()]);
        let rejected: Vec<RejectedRow> = run.read_jsonl("rejected.jsonl").unwrap();
        let codes: Vec<&str> = rejected.iter().map(|r| r.code.as_str()).collect();
        assert_eq!(codes, ["duplicate", "image_error", "image_count", "image_span", "no_supervised", "over_long"]);
        // Nothing is left to move, so nothing is written.
        let before = std::fs::metadata(run.path("kept.jsonl")).unwrap().modified().unwrap();
        assert_eq!(encode_all(&run, &Letters, 8, &ctx).unwrap().rows(), 2);
        assert_eq!(std::fs::metadata(run.path("kept.jsonl")).unwrap().modified().unwrap(), before);
        ctx.stop.store(true, std::sync::atomic::Ordering::Relaxed);
        assert_eq!(encode_all(&run, &Letters, 8, &ctx).err().unwrap().kind(), Kind::Interrupted);
    }

    #[test]
    fn gates_name_the_reasons() {
        let plan = Plan::default();
        let of = |split, n: usize| {
            let mut tally = Tally::default();
            tally.keep(split, Counts { positions: 5, image_positions: 2, supervised: 3 });
            (0..n).for_each(|_| tally.reject("over_long"));
            tally.report(serde_json::Value::Null)
        };
        assert!(gate(&plan, &of(Split::Train, 0)).is_ok());
        let error = gate(&plan, &of(Split::Train, 9)).unwrap_err();
        assert!(error.kind() == Kind::Gate && error.to_string().contains("9 over_long"), "{error}");
        assert!(gate(&plan, &of(Split::Test, 0)).unwrap_err().to_string().contains("no row is left to train on"));
        assert_eq!(Spread::of(vec![3, 1, 2]), Spread { min: 1, median: 2, max: 3, sum: 6 });
    }
}
