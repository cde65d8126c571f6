//! Deterministic batches with bounded prefetch.
//!
//! The order of rows depends on seed and epoch alone; threads only decide how early a batch is ready. Batches stay in
//! host memory until the training thread uploads them.

use std::{
    sync::{
        Mutex, OnceLock,
        mpsc::{Receiver, SyncSender, sync_channel},
    },
    thread::Scope,
};

use burn::data::dataset::Dataset;
use rand::seq::SliceRandom;
use rayon::prelude::*;

use crate::{
    error::{Error, Kind, Result},
    random,
    sample::Sample,
    vlm::{Batch, Encoded, PaddingSide, Processor},
};

/// Host memory for encoded rows that are kept for the next epoch.
pub(crate) const CACHE_BYTES: usize = 512 << 20;

/// Batches of batches among which rows are sorted by length.
const SORTED_TOGETHER: usize = 50;

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

/// Rows that can be trained on. A [`Dataset`] of encoded rows.
pub struct Rows<'a> {
    samples: Vec<Sample>,
    processor: &'a dyn Processor,
    max_length: usize,
    /// Positions of each row, images included.
    pub lengths: Vec<usize>,
    /// Supervised positions of each row.
    pub supervised: Vec<usize>,
    cache: Vec<OnceLock<Encoded>>,
}

impl<'a> Rows<'a> {
    /// Encodes every sample once: those that fail, are longer than `max_length` positions (0: no limit) or have nothing
    /// to learn from are returned with their reasons. `progress` is told of every row.
    pub fn survey(
        samples: Vec<Sample>,
        processor: &'a dyn Processor,
        max_length: usize,
        progress: impl Fn() + Sync,
    ) -> (Self, Vec<Rejected>) {
        let room = Mutex::new(CACHE_BYTES);
        let seen: Vec<Result<(usize, usize, OnceLock<Encoded>)>> = samples
            .par_iter()
            .map(|sample| {
                let row = encode(processor, sample, max_length);
                progress();
                row.map(|row| (row.input_ids.len(), row.supervised(), keep(row, &room)))
            })
            .collect();
        let mut rows = Self {
            samples: Vec::new(),
            processor,
            max_length,
            lengths: Vec::new(),
            supervised: Vec::new(),
            cache: Vec::new(),
        };
        let mut rejected = Vec::new();
        for (sample, outcome) in samples.into_iter().zip(seen) {
            match outcome {
                Ok((length, supervised, cached)) => {
                    rows.samples.push(sample);
                    rows.lengths.push(length);
                    rows.supervised.push(supervised);
                    rows.cache.push(cached);
                }
                Err(e) => rejected.push(Rejected { id: sample.id, reason: reason(&e) }),
            }
        }
        (rows, rejected)
    }

    /// The samples, in order.
    #[must_use]
    pub fn samples(&self) -> &[Sample] {
        &self.samples
    }

    /// Reads, pads and stacks the rows at `indices`.
    ///
    /// # Errors
    /// A row that could be encoded before no longer can.
    pub fn batch(&self, indices: &[usize], multiple: usize) -> Result<Batch> {
        let rows: Vec<Encoded> = indices.iter().map(|i| self.get(*i)).collect::<Result<_>>()?;
        Ok(Batch::collate(&rows, self.processor.pad_id(), PaddingSide::Right, multiple))
    }
}

impl Dataset<Encoded, Error> for Rows<'_> {
    fn get(&self, index: usize) -> Result<Encoded> {
        if let Some(row) = self.cache[index].get() {
            return Ok(row.clone());
        }
        encode(self.processor, &self.samples[index], self.max_length)
    }

    fn len(&self) -> usize {
        self.samples.len()
    }
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

/// How rows become batches.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Batching {
    /// Seed of the order.
    pub seed: u64,
    /// Rows of a micro-batch.
    pub batch_size: usize,
    /// Micro-batches of a step.
    pub accumulation: usize,
    /// Whether rows of similar length share a batch.
    pub group_by_length: bool,
    /// Lengths are padded to a multiple of this.
    pub multiple: usize,
}

impl Batching {
    /// Indices of the rows of every micro-batch of every step of `epoch`.
    #[must_use]
    pub fn epoch(&self, lengths: &[usize], epoch: usize) -> Vec<Vec<Vec<usize>>> {
        let mut order: Vec<usize> = (0..lengths.len()).collect();
        let mut draws = random::stream(self.seed, "epoch order", epoch as u64);
        order.shuffle(&mut draws);
        let mut batches: Vec<Vec<usize>>;
        if self.group_by_length {
            for together in order.chunks_mut(self.batch_size * SORTED_TOGETHER) {
                together.sort_by_key(|i| std::cmp::Reverse(lengths[*i]));
            }
            batches = order.chunks(self.batch_size).map(<[usize]>::to_vec).collect();
            // Sorted rows would train long before short ones; the incomplete batch stays last.
            let full = order.len() / self.batch_size;
            batches[..full].shuffle(&mut draws);
        } else {
            batches = order.chunks(self.batch_size).map(<[usize]>::to_vec).collect();
        }
        batches.chunks(self.accumulation).map(<[Vec<usize>]>::to_vec).collect()
    }
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
                micro.iter().map(|indices| rows.batch(indices, batching.multiple)).collect();
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

    fn batching(group_by_length: bool) -> Batching {
        Batching { seed: 5, batch_size: 2, accumulation: 2, group_by_length, multiple: 4 }
    }

    fn first_steps(workers: usize, position: Position, n: usize) -> Vec<(Vec<Vec<String>>, Position)> {
        let rows = rows();
        std::thread::scope(|scope| {
            let mut loader = Loader::start(scope, &rows, batching(false), position, workers);
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
        assert_eq!(rejected.len() + rows.len(), ids.len());
        assert!(rejected[0].reason.contains("image is broken"));
        assert!(rejected[1].reason.contains("at most 8 positions, found 13"), "{}", rejected[1].reason);
        assert!(rejected[2].reason.contains("found 9"));
    }

    #[test]
    fn an_epoch_holds_every_row_once_in_another_order_each_time() {
        for group_by_length in [false, true] {
            let lengths: Vec<usize> = (2..13).collect();
            let batching = batching(group_by_length);
            let first = batching.epoch(&lengths, 0);
            assert_eq!(first.len(), 3);
            let mut all: Vec<usize> = first.concat().concat();
            assert_ne!(all, batching.epoch(&lengths, 1).concat().concat());
            assert_eq!(first, batching.epoch(&lengths, 0));
            all.sort_unstable();
            assert_eq!(all, (0..11).collect::<Vec<_>>());
            if group_by_length {
                let spread = |b: &Vec<usize>| b.iter().map(|i| lengths[*i]).max().unwrap() - lengths[b[0]];
                assert!(first.concat().iter().all(|b| spread(b) <= 1));
            }
        }
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
