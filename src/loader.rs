//! Deterministic batches with bounded prefetch.
//!
//! The order of rows depends on seed and epoch alone; threads only decide how early a batch is ready. Batches stay in
//! host memory until the training thread uploads them.

use std::{
    borrow::Cow,
    fs::File,
    io::{Read, Seek, SeekFrom},
    path::{Path, PathBuf},
    sync::{
        Mutex, OnceLock, PoisonError,
        mpsc::{Receiver, SyncSender, sync_channel},
    },
    thread::Scope,
};

use burn::data::dataset::Dataset;
use rayon::prelude::*;

use crate::{
    batching::{Batching, MicroBatch},
    error::{Error, Kind, Result},
    parallel::{CHUNK, ordered},
    run_dir::Lines,
    sample::{Sample, Split},
    vlm::{Batch, Encoded, PaddingSide, Processor},
};

/// Host memory for encoded rows that are kept for the next epoch.
pub(crate) const CACHE_BYTES: usize = 512 << 20;

/// Steps that a worker may be ahead.
pub(crate) const AHEAD: usize = 2;

/// A row that cannot be trained on.
#[derive(Debug, Clone, PartialEq, serde::Serialize)]
pub struct Rejected {
    /// Id of the sample.
    pub id: String,
    /// Why.
    pub reason: String,
}

/// Where the samples are.
enum Samples {
    /// In memory.
    Memory(Vec<Sample>),
    /// In a JSONL file: first byte and length of each line.
    File { path: PathBuf, file: Mutex<File>, places: Vec<(u64, usize)> },
}

impl Samples {
    fn get(&self, index: usize) -> Result<Cow<'_, Sample>> {
        match self {
            Self::Memory(samples) => Ok(Cow::Borrowed(&samples[index])),
            Self::File { path, file, places } => {
                let (start, length) = places[index];
                let mut line = vec![0; length];
                {
                    let mut file = file.lock().unwrap_or_else(PoisonError::into_inner);
                    file.seek(SeekFrom::Start(start))
                        .and_then(|_| file.read_exact(&mut line))
                        .map_err(|e| Error::io(path, e))?;
                }
                let sample = serde_json::from_slice(&line).map_err(|e| {
                    Error::new(Kind::Run, "a row changed while it was being used").at(path.display()).source(e)
                })?;
                Ok(Cow::Owned(sample))
            }
        }
    }

    fn len(&self) -> usize {
        match self {
            Self::Memory(samples) => samples.len(),
            Self::File { places, .. } => places.len(),
        }
    }
}

/// Rows that can be trained on, each one sample, or a pair of them: a chosen answer and a rejected one. A [`Dataset`] of
/// encoded samples.
pub struct Rows<'a> {
    samples: Samples,
    per_row: usize,
    processor: &'a dyn Processor,
    max_length: usize,
    /// Positions of each row, images included; of a pair the longer one.
    pub lengths: Vec<usize>,
    /// Supervised positions of each row.
    pub supervised: Vec<usize>,
    cache: Vec<OnceLock<Encoded>>,
}

/// What one sample turned out to be.
struct Seen {
    length: usize,
    supervised: usize,
    cached: OnceLock<Encoded>,
}

impl<'a> Rows<'a> {
    fn empty(samples: Samples, per_row: usize, processor: &'a dyn Processor, max_length: usize) -> Self {
        let (lengths, supervised, cache) = (Vec::new(), Vec::new(), Vec::new());
        Self { samples, per_row, processor, max_length, lengths, supervised, cache }
    }

    /// Encodes every sample once: those that fail, are longer than `max_length` positions (0: no limit) or have nothing
    /// to learn from are returned with their reasons. `progress` is told of every row.
    pub fn survey(
        samples: Vec<Sample>,
        processor: &'a dyn Processor,
        max_length: usize,
        progress: impl Fn() + Sync,
    ) -> (Self, Vec<Rejected>) {
        Self::survey_groups(samples, 1, processor, max_length, progress)
    }

    /// As [`Rows::survey`], for pairs of a chosen and a rejected answer; both are left out if one is.
    pub fn survey_pairs(
        pairs: Vec<[Sample; 2]>,
        processor: &'a dyn Processor,
        max_length: usize,
        progress: impl Fn() + Sync,
    ) -> (Self, Vec<Rejected>) {
        Self::survey_groups(pairs.into_iter().flatten().collect(), 2, processor, max_length, progress)
    }

    fn survey_groups(
        samples: Vec<Sample>,
        per_row: usize,
        processor: &'a dyn Processor,
        max_length: usize,
        progress: impl Fn() + Sync,
    ) -> (Self, Vec<Rejected>) {
        let room = Mutex::new(CACHE_BYTES);
        let outcomes: Vec<Result<Vec<Seen>>> = samples
            .par_chunks(per_row)
            .map(|group| {
                let row = group.iter().map(|s| see(processor, s, max_length, &room)).collect();
                progress();
                row
            })
            .collect();
        let mut rows = Self::empty(Samples::Memory(Vec::new()), per_row, processor, max_length);
        let (mut kept, mut rejected) = (Vec::new(), Vec::new());
        let mut samples = samples.into_iter();
        for outcome in outcomes {
            let group: Vec<Sample> = samples.by_ref().take(per_row).collect();
            match outcome {
                Ok(seen) => {
                    rows.add(seen);
                    kept.extend(group);
                }
                Err(e) => rejected
                    .push(Rejected { id: group.first().map(|s| s.id.clone()).unwrap_or_default(), reason: reason(&e) }),
            }
        }
        rows.samples = Samples::Memory(kept);
        (rows, rejected)
    }

    /// As [`Rows::survey`], for the samples of `split` in a JSONL file, of which only the places are kept in memory.
    ///
    /// # Errors
    /// The file cannot be read, or a line is no sample.
    pub fn survey_file(
        path: &Path,
        split: Split,
        processor: &'a dyn Processor,
        max_length: usize,
        progress: impl Fn() + Sync,
    ) -> Result<(Self, Vec<Rejected>)> {
        let room = Mutex::new(CACHE_BYTES);
        let mut places = Vec::new();
        let mut rows = Self::empty(Samples::Memory(Vec::new()), 1, processor, max_length);
        let mut rejected = Vec::new();
        let outcomes = ordered(Lines::open(path)?, CHUNK, |line| {
            let line = line?;
            let sample: Sample = line.parse(path)?;
            if sample.split != split {
                return Ok(None);
            }
            let seen = see(processor, &sample, max_length, &room);
            progress();
            Ok(Some(match seen {
                Ok(seen) => Ok(((line.offset, line.bytes.len()), seen)),
                Err(e) => Err(Rejected { id: sample.id, reason: reason(&e) }),
            }))
        });
        for outcome in outcomes {
            match outcome? {
                None => {}
                Some(Ok((place, seen))) => {
                    places.push(place);
                    rows.add(vec![seen]);
                }
                Some(Err(row)) => rejected.push(row),
            }
        }
        let file = Mutex::new(File::open(path).map_err(|e| Error::io(path, e))?);
        rows.samples = Samples::File { path: path.to_path_buf(), file, places };
        Ok((rows, rejected))
    }

    fn add(&mut self, seen: Vec<Seen>) {
        self.lengths.push(seen.iter().map(|s| s.length).max().unwrap_or(0));
        self.supervised.push(seen.iter().map(|s| s.supervised).sum());
        self.cache.extend(seen.into_iter().map(|s| s.cached));
    }

    /// Reads, pads and stacks the rows at `indices`; both answers of a pair, the chosen one first.
    ///
    /// # Errors
    /// A row that could be encoded before no longer can.
    pub fn batch(&self, indices: &[usize], multiple: usize) -> Result<Batch> {
        let samples = indices.iter().flat_map(|i| i * self.per_row..(i + 1) * self.per_row);
        let rows: Vec<Encoded> = samples.map(|i| self.get(i)).collect::<Result<_>>()?;
        Ok(Batch::collate(&rows, self.processor.pad_id(), PaddingSide::Right, multiple))
    }

    /// Reads, pads and stacks sequences of rows.
    ///
    /// # Errors
    /// As [`Rows::batch`].
    pub fn micro_batch(&self, sequences: &MicroBatch, multiple: usize) -> Result<Batch> {
        if self.per_row > 1 || sequences.iter().all(|s| s.len() == 1) {
            return self.batch(&sequences.concat(), multiple);
        }
        let read = |sequence: &Vec<usize>| sequence.iter().map(|i| self.get(*i)).collect::<Result<Vec<_>>>();
        let rows: Vec<Vec<Encoded>> = sequences.iter().map(read).collect::<Result<_>>()?;
        let rows: Vec<&[Encoded]> = rows.iter().map(Vec::as_slice).collect();
        Ok(Batch::pack(&rows, self.processor.pad_id(), PaddingSide::Right, multiple))
    }
}

impl Dataset<Encoded, Error> for Rows<'_> {
    fn get(&self, index: usize) -> Result<Encoded> {
        if let Some(row) = self.cache[index].get() {
            return Ok(row.clone());
        }
        encode(self.processor, self.samples.get(index)?.as_ref(), self.max_length)
    }

    fn len(&self) -> usize {
        self.samples.len()
    }
}

fn see(processor: &dyn Processor, sample: &Sample, max_length: usize, room: &Mutex<usize>) -> Result<Seen> {
    let row = encode(processor, sample, max_length)?;
    Ok(Seen { length: row.input_ids.len(), supervised: row.supervised(), cached: keep(row, room) })
}

fn encode(processor: &dyn Processor, sample: &Sample, max_length: usize) -> Result<Encoded> {
    let row = processor.encode(sample)?;
    let error = |what: &str| Error::new(Kind::Data, what).at(&sample.id);
    if max_length > 0 && row.input_ids.len() > max_length {
        return Err(error("row is too long")
            .expected(format!("at most {max_length} positions"))
            .found(row.input_ids.len()));
    }
    if row.supervised() == 0 {
        return Err(error("row has nothing to learn from").expected("an answer").found("no supervised token"));
    }
    Ok(row)
}

/// Keeps `row` if there is room.
fn keep(row: Encoded, room: &Mutex<usize>) -> OnceLock<Encoded> {
    let pixels: usize = row.pixels.iter().map(|p| 4 * p.data.len()).sum();
    let bytes = pixels + 8 * row.input_ids.len() + size_of::<Encoded>();
    let cell = OnceLock::new();
    let mut room = room.lock().expect("no thread panics while it holds the room");
    if *room >= bytes {
        *room -= bytes;
        let _ = cell.set(row);
    }
    cell
}

fn reason(error: &Error) -> String {
    let mut text = error.to_string();
    let mut source = std::error::Error::source(error);
    while let Some(inner) = source {
        text.push_str(&format!("; {inner}"));
        source = inner.source();
    }
    text
}

/// Where training is in the data.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Position {
    /// Passes completed.
    pub epoch: usize,
    /// Steps done in this pass.
    pub step: usize,
}

/// Micro-batches of one optimizer step.
#[derive(Debug)]
pub struct StepRows {
    /// In order.
    pub micro_batches: Vec<Batch>,
    /// Where training is after this step.
    pub next: Position,
}

/// Hands out the steps of all epochs in order; ends never.
pub struct Loader {
    workers: Vec<Receiver<Result<StepRows>>>,
    turn: usize,
}

impl Loader {
    /// Starts `workers` threads in `scope` that read ahead from `position`. They end when the loader is dropped.
    pub fn start<'scope, 'env>(
        scope: &'scope Scope<'scope, 'env>,
        rows: &'env Rows<'env>,
        batching: Batching,
        position: Position,
        workers: usize,
    ) -> Self {
        let workers = workers.max(1);
        let receivers = (0..workers)
            .map(|worker| {
                let (send, receive) = sync_channel(AHEAD);
                scope.spawn(move || produce(rows, batching, position, (worker, workers), &send));
                receive
            })
            .collect();
        Self { workers: receivers, turn: 0 }
    }

    /// The next step.
    ///
    /// # Errors
    /// A row can no longer be read.
    pub fn next_step(&mut self) -> Result<StepRows> {
        let worker = self.turn;
        self.turn = (worker + 1) % self.workers.len();
        self.workers[worker].recv().unwrap_or_else(|_| {
            Err(Error::new(Kind::Data, "the thread that reads rows has ended").help("this is a bug; please report it"))
        })
    }
}

/// Makes every `workers`-th step from the worker's own place on.
fn produce(
    rows: &Rows<'_>,
    batching: Batching,
    mut position: Position,
    (worker, workers): (usize, usize),
    send: &SyncSender<Result<StepRows>>,
) {
    let mut number = 0;
    loop {
        let steps = batching.epoch(&rows.lengths, position.epoch);
        for (step, micro) in steps.iter().enumerate().skip(position.step) {
            number += 1;
            if (number - 1) % workers != worker {
                continue;
            }
            let next = if step + 1 == steps.len() {
                Position { epoch: position.epoch + 1, step: 0 }
            } else {
                Position { epoch: position.epoch, step: step + 1 }
            };
            let micro_batches: Result<Vec<Batch>> =
                micro.iter().map(|sequences| rows.micro_batch(sequences, batching.multiple)).collect();
            let failed = micro_batches.is_err();
            let sent = send.send(micro_batches.map(|micro_batches| StepRows { micro_batches, next }));
            if failed || sent.is_err() {
                return;
            }
        }
        position = Position { epoch: position.epoch + 1, step: 0 };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{sample::Turn, vlm::IGNORE};

    /// Encodes a sample as as many tokens as its id says.
    struct Toy;

    impl Processor for Toy {
        fn signature(&self) -> serde_json::Value {
            serde_json::json!({"toy": 1})
        }

        fn encode(&self, sample: &Sample) -> Result<Encoded> {
            let n: usize = sample.id.parse().map_err(|_| Error::new(Kind::Image, "image is broken").at(&sample.id))?;
            let labels = if n == 13 { vec![IGNORE; n] } else { vec![1; n] };
            Ok(Encoded { id: sample.id.clone(), input_ids: vec![1; n], labels, spans: vec![], pixels: vec![] })
        }

        fn prompt(&self, sample: &Sample) -> Result<Encoded> {
            self.encode(sample)
        }

        fn decode(&self, _ids: &[i32]) -> String {
            String::new()
        }

        fn piece(&self, _id: i32) -> String {
            String::new()
        }

        fn stop_ids(&self) -> &[i32] {
            &[]
        }

        fn pad_id(&self) -> i32 {
            0
        }

        fn vocab_size(&self) -> usize {
            2
        }
    }

    fn sample(id: &str) -> Sample {
        Sample {
            id: id.into(),
            images: vec![],
            turns: Vec::<Turn>::new(),
            origin: Default::default(),
            split: Default::default(),
            group: String::new(),
            polarity: None,
            category: None,
            answer_type: None,
            options: Vec::new(),
            annotation: None,
            meta: Default::default(),
        }
    }

    fn rows() -> Rows<'static> {
        let samples = (2..13).map(|i| sample(&i.to_string())).collect();
        Rows::survey(samples, &Toy, 0, || {}).0
    }

    fn batching() -> Batching {
        Batching { seed: 5, batch_size: 2, accumulation: 2, group_by_length: false, packing: None, multiple: 4 }
    }

    fn first_steps(workers: usize, position: Position, n: usize) -> Vec<(Vec<Vec<String>>, Position)> {
        let rows = rows();
        std::thread::scope(|scope| {
            let mut loader = Loader::start(scope, &rows, batching(), position, workers);
            (0..n)
                .map(|_| {
                    let step = loader.next_step().unwrap();
                    (step.micro_batches.into_iter().map(|b| b.ids).collect(), step.next)
                })
                .collect()
        })
    }

    #[test]
    fn every_row_ends_in_a_batch_or_is_rejected_with_a_reason() {
        let ids = ["4", "broken", "13", "9", "3"];
        let (rows, rejected) = Rows::survey(ids.iter().map(|i| sample(i)).collect(), &Toy, 8, || {});
        assert_eq!(rows.lengths, [4, 3]);
        assert_eq!(rejected.len() + rows.lengths.len(), ids.len());
        assert!(rejected[0].reason.contains("image is broken"));
        assert!(rejected[1].reason.contains("at most 8 positions, found 13"), "{}", rejected[1].reason);
        assert!(rejected[2].reason.contains("found 9"));
    }

    #[test]
    fn rows_in_a_file_are_those_in_memory() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("kept.jsonl");
        let mut samples: Vec<Sample> = ["4", "broken", "7", "13", "9"].map(sample).to_vec();
        samples[2].split = Split::Validation;
        let lines: String = samples.iter().map(|s| serde_json::to_string(s).unwrap() + "\n\n").collect();
        std::fs::write(&path, lines).unwrap();
        let training = samples.iter().filter(|s| s.split == Split::Train).cloned().collect();
        let (memory, rejected) = Rows::survey(training, &Toy, 8, || {});
        let (file, also) = Rows::survey_file(&path, Split::Train, &Toy, 8, || {}).unwrap();
        assert_eq!((&memory.lengths, &rejected), (&file.lengths, &also));
        let uncached = Rows { cache: vec![OnceLock::new()], ..file };
        assert_eq!(uncached.batch(&[0], 1).unwrap(), memory.batch(&[0], 1).unwrap());
    }

    #[test]
    fn packed_rows_lie_one_after_the_other() {
        let rows = rows();
        let batch = rows.micro_batch(&vec![vec![0, 2], vec![1]], 4).unwrap();
        assert_eq!((batch.rows, batch.length, batch.ids.len(), batch.tokens()), (2, 8, 3, 9));
        assert_eq!(batch.segments[..8], [0, 0, 1, 1, 1, 1, -1, -1]);
        assert_eq!(batch.positions[..8], [0, 1, 0, 1, 2, 3, 0, 0]);
        // The first token of a text is predicted by nothing.
        assert_eq!(batch.labels[..8], [1, 1, IGNORE, 1, 1, 1, IGNORE, IGNORE]);
        assert_eq!((batch.id_at(3), batch.id_at(7)), (Some("4"), None));
        assert_eq!(batch.supervised(), rows.supervised[..3].iter().sum::<usize>());
    }

    #[test]
    fn a_pair_is_left_out_as_a_whole() {
        let pairs = vec![[sample("4"), sample("6")], [sample("5"), sample("broken")]];
        let (rows, rejected) = Rows::survey_pairs(pairs, &Toy, 0, || {});
        assert_eq!((rows.lengths.as_slice(), rejected.len()), (&[6][..], 1));
        assert_eq!(rows.batch(&[0], 1).unwrap().ids, ["4", "6"]);
    }

    #[test]
    fn the_number_of_threads_changes_nothing() {
        let one = first_steps(1, Position::default(), 8);
        assert_eq!(one, first_steps(2, Position::default(), 8));
        assert_eq!(one, first_steps(3, Position::default(), 8));
        assert_eq!(one[2].1, Position { epoch: 1, step: 0 });
    }

    #[test]
    fn reading_continues_from_a_saved_position() {
        let all = first_steps(1, Position::default(), 8);
        assert_eq!(all[4..], first_steps(2, all[3].1, 4)[..]);
    }
}
