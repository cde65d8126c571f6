//! Streams through all threads in order: memory holds one chunk, and the number of threads never changes a result.

use rayon::prelude::*;

/// Items that are in memory at once.
pub const CHUNK: usize = 2048;

/// `items` with `map` applied in parallel, in their order.
pub fn ordered<T: Send, U: Send>(
    items: impl Iterator<Item = T>,
    chunk: usize,
    map: impl Fn(T) -> U + Sync,
) -> impl Iterator<Item = U> {
    let mut items = items.fuse();
    std::iter::from_fn(move || {
        let part: Vec<T> = items.by_ref().take(chunk.max(1)).collect();
        (!part.is_empty()).then(|| part.into_par_iter().map(&map).collect::<Vec<U>>())
    })
    .flatten()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn order_stays_and_only_a_chunk_is_taken_ahead() {
        let mut taken = 0;
        let mut out = ordered((0..1000).inspect(|_| taken += 1), 16, |i| i * 2);
        assert_eq!(out.next(), Some(0));
        assert_eq!(out.by_ref().take(20).last(), Some(40));
        drop(out);
        assert_eq!(taken, 32);
        assert!(ordered(0..1000, 7, |i| i).eq(0..1000));
    }
}
