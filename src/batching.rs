//! Which rows share a sequence, a batch and a step: decided by seed, epoch and lengths alone.

use std::collections::BTreeSet;

use rand::seq::SliceRandom;

use crate::{random, train::TrainConfig};

/// Batches of batches among which rows are sorted by length.
const SORTED_TOGETHER: usize = 50;

/// Rows that lie in one sequence, one after the other.
pub type Sequence = Vec<usize>;

/// Sequences of one forward pass.
pub type MicroBatch = Vec<Sequence>;

/// How rows become batches.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Batching {
    /// Seed of the order.
    pub seed: u64,
    /// Sequences of a micro-batch.
    pub batch_size: usize,
    /// Micro-batches of a step.
    pub accumulation: usize,
    /// Whether sequences of similar length share a batch.
    pub group_by_length: bool,
    /// Positions that packed rows may take together; none where every row is a sequence of its own.
    pub packing: Option<usize>,
    /// Lengths are padded to a multiple of this.
    pub multiple: usize,
}

impl Batching {
    /// The batching of a training.
    #[must_use]
    pub fn of(config: &TrainConfig, seed: u64) -> Self {
        Self {
            seed,
            batch_size: config.per_device_train_batch_size,
            accumulation: config.gradient_accumulation_steps,
            group_by_length: config.group_by_length,
            packing: config.packing.then(|| config.packed_positions()),
            multiple: config.pad_to_multiple_of,
        }
    }

    /// Every micro-batch of every step of `epoch`, for rows of these lengths.
    #[must_use]
    pub fn epoch(&self, lengths: &[usize], epoch: usize) -> Vec<Vec<MicroBatch>> {
        let mut draws = random::stream(self.seed, "epoch order", epoch as u64);
        let mut order: Vec<usize> = (0..lengths.len()).collect();
        order.shuffle(&mut draws);
        let mut sequences: Vec<Sequence> = match self.packing {
            None => order.into_iter().map(|row| vec![row]).collect(),
            Some(room) => {
                let mut packed = pack(&order, lengths, room);
                // The first packs hold the longest rows.
                packed.shuffle(&mut draws);
                packed
            }
        };
        let mut batches: Vec<MicroBatch>;
        if self.group_by_length {
            let length = |sequence: &Sequence| sequence.iter().map(|i| lengths[*i]).sum::<usize>();
            for together in sequences.chunks_mut(self.batch_size * SORTED_TOGETHER) {
                together.sort_by_key(|s| std::cmp::Reverse(length(s)));
            }
            batches = sequences.chunks(self.batch_size).map(<[Sequence]>::to_vec).collect();
            // Sorted rows would train long before short ones; the incomplete batch stays last.
            let full = sequences.len() / self.batch_size;
            batches[..full].shuffle(&mut draws);
        } else {
            batches = sequences.chunks(self.batch_size).map(<[Sequence]>::to_vec).collect();
        }
        batches.chunks(self.accumulation).map(<[MicroBatch]>::to_vec).collect()
    }

    /// Steps of one pass over rows of these lengths; an incomplete last accumulation is a step of its own.
    #[must_use]
    pub fn steps_per_epoch(&self, lengths: &[usize]) -> usize {
        let sequences = match self.packing {
            None => lengths.len(),
            // How many packs there are depends on the lengths alone, not on the order of rows of equal length.
            Some(room) => pack(&(0..lengths.len()).collect::<Vec<_>>(), lengths, room).len(),
        };
        sequences.div_ceil(self.batch_size).div_ceil(self.accumulation)
    }
}

/// Rows in packs of at most `room` positions, by best fit of the longest first; rows of equal length in the order of
/// `order`. A row that is longer than `room` is a pack of its own.
fn pack(order: &[usize], lengths: &[usize], room: usize) -> Vec<Sequence> {
    let mut order = order.to_vec();
    order.sort_by_key(|i| std::cmp::Reverse(lengths[*i]));
    let mut packs: Vec<Sequence> = Vec::new();
    // Room left, and number, of every pack that has any.
    let mut open: BTreeSet<(usize, usize)> = BTreeSet::new();
    for row in order {
        let length = lengths[row];
        let (left, number) = match open.range((length, 0)..).next().copied() {
            Some(best) => {
                open.remove(&best);
                best
            }
            None => {
                packs.push(Vec::new());
                (room.max(length), packs.len() - 1)
            }
        };
        packs[number].push(row);
        if left > length {
            open.insert((left - length, number));
        }
    }
    packs
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn batching(group_by_length: bool, packing: Option<usize>) -> Batching {
        Batching { seed: 5, batch_size: 2, accumulation: 2, group_by_length, packing, multiple: 4 }
    }

    #[test]
    fn an_epoch_holds_every_row_once_in_another_order_each_time() {
        for group_by_length in [false, true] {
            let lengths: Vec<usize> = (2..13).collect();
            let batching = batching(group_by_length, None);
            let first = batching.epoch(&lengths, 0);
            assert_eq!((first.len(), batching.steps_per_epoch(&lengths)), (3, 3));
            let mut all: Vec<usize> = first.concat().concat().concat();
            assert_ne!(all, batching.epoch(&lengths, 1).concat().concat().concat());
            assert_eq!(first, batching.epoch(&lengths, 0));
            all.sort_unstable();
            assert_eq!(all, (0..11).collect::<Vec<_>>());
            if group_by_length {
                let spread = |b: &[usize]| b.iter().map(|i| lengths[*i]).max().unwrap() - lengths[b[0]];
                assert!(first.concat().iter().all(|b| spread(&b.concat()) <= 1));
            }
        }
    }

    proptest! {
        #[test]
        fn packs_hold_every_row_once_and_are_full(
            lengths in prop::collection::vec(1usize..60, 1..200),
            room in 20usize..120,
            epoch in 0usize..4,
            grouped: bool,
        ) {
            let batching = batching(grouped, Some(room));
            let steps = batching.epoch(&lengths, epoch);
            prop_assert_eq!(steps.len(), batching.steps_per_epoch(&lengths));
            let packs: Vec<Sequence> = steps.concat().concat();
            let length = |pack: &Sequence| pack.iter().map(|i| lengths[*i]).sum::<usize>();
            prop_assert!(packs.iter().all(|p| length(p) <= room || p.len() == 1));
            // No two packs fit into one: the best fit would have found the room.
            let mut loads: Vec<usize> = packs.iter().map(&length).collect();
            loads.sort_unstable();
            prop_assert!(loads.len() < 2 || loads[0] + loads[1] > room);
            let mut all = packs.concat();
            all.sort_unstable();
            prop_assert_eq!(all, (0..lengths.len()).collect::<Vec<_>>());
        }
    }
}
