//! Order of rows that puts rows of one kind and similar length into one batch (LLaVA's `group_by_modality_length`).

use crate::sample::Sample;

/// Number of whitespace-separated words of a row; negative for a row without images.
#[must_use]
pub fn modality_length(sample: &Sample) -> i64 {
    let words: usize = sample.turns.iter().map(|t| t.text.split_whitespace().count()).sum();
    if sample.images.is_empty() { -(words as i64) } else { words as i64 }
}

/// Order of rows with the given lengths, whose sign tells the kind. `chunks` is the number of processes times
/// accumulation steps; `permutation(n)` draws an order of `n` things.
///
/// Rows with images, rows without, and the big batches of both are permuted in this order; with rows of one kind only,
/// just those. What does not fill a big batch comes last, in order of index.
pub fn modality_grouped(
    lengths: &[i64],
    batch_size: usize,
    chunks: usize,
    permutation: &mut dyn FnMut(usize) -> Vec<usize>,
) -> Vec<usize> {
    let (with, without): (Vec<usize>, Vec<usize>) = (0..lengths.len()).partition(|i| lengths[*i] > 0);
    if with.is_empty() || without.is_empty() {
        return length_grouped(lengths, batch_size, chunks, permutation);
    }
    let big = (batch_size * chunks).max(1);
    let (mut batches, mut rest) = (Vec::new(), Vec::new());
    for rows in [with, without] {
        let lengths: Vec<i64> = rows.iter().map(|i| lengths[*i].abs()).collect();
        let order: Vec<usize> =
            length_grouped(&lengths, batch_size, chunks, permutation).into_iter().map(|i| rows[i]).collect();
        let mut split: Vec<Vec<usize>> = order.chunks(big).map(<[usize]>::to_vec).collect();
        rest.extend(split.pop().unwrap_or_default());
        batches.extend(split);
    }
    rest.sort_unstable();
    let order = permutation(batches.len());
    order.into_iter().flat_map(|i| batches[i].clone()).chain(rest).collect()
}

/// A random order, cut into big batches that are sorted by falling length and dealt out evenly to `chunks`.
pub fn length_grouped(
    lengths: &[i64],
    batch_size: usize,
    chunks: usize,
    permutation: &mut dyn FnMut(usize) -> Vec<usize>,
) -> Vec<usize> {
    let order = permutation(lengths.len());
    let mut out = Vec::with_capacity(order.len());
    for batch in order.chunks((batch_size * chunks).max(1)) {
        let mut batch = batch.to_vec();
        batch.sort_by_key(|i| std::cmp::Reverse(lengths[*i]));
        out.extend(even_chunks(&batch, lengths, chunks.max(1)).into_iter().flatten());
    }
    out
}

/// Deals `rows` out so that the sums of lengths are close: each to the chunk with the smallest sum that is not full.
fn even_chunks(rows: &[usize], lengths: &[i64], chunks: usize) -> Vec<Vec<usize>> {
    if !rows.len().is_multiple_of(chunks) {
        return (0..chunks).map(|k| rows.iter().copied().skip(k).step_by(chunks).collect()).collect();
    }
    let full = rows.len() / chunks;
    let mut out = vec![Vec::with_capacity(full); chunks];
    let mut sums = vec![0i64; chunks];
    for &row in rows {
        let open = (0..chunks).filter(|k| out[*k].len() < full);
        let Some(shortest) = open.min_by_key(|k| sums[*k]) else { break };
        out[shortest].push(row);
        sums[shortest] += lengths[row];
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn batches_hold_one_kind_and_every_row_comes_once() {
        let lengths = [5, -1, 7, -4, 3, 9, -2, 8, 1];
        let order = modality_grouped(&lengths, 2, 1, &mut |n| (0..n).rev().collect());
        let mut sorted = order.clone();
        sorted.sort_unstable();
        assert_eq!(sorted, (0..lengths.len()).collect::<Vec<_>>());
        for batch in order[..6].chunks(2) {
            assert_eq!(lengths[batch[0]] > 0, lengths[batch[1]] > 0, "{order:?}");
            assert!(lengths[batch[0]].abs() >= lengths[batch[1]].abs());
        }
    }
}
