//! Which rows a report shows: a seeded choice of improved, worsened and unchanged ones.

use rand::seq::SliceRandom;
use serde::{Deserialize, Serialize};

use super::numbers::{Judged, correct};
use crate::random::stream;

/// Rows shown of each kind of change, in this order.
const SHOWN: [(Change, usize); 4] =
    [(Change::Improved, 60), (Change::Worsened, 60), (Change::BothWrong, 40), (Change::BothRight, 40)];

/// What tuning did to a row.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Change {
    /// Wrong before, right after.
    Improved,
    /// Right before, wrong after.
    Worsened,
    /// Wrong before and after.
    BothWrong,
    /// Right before and after.
    BothRight,
}

impl Change {
    /// Words of the page.
    #[must_use]
    pub fn words(self) -> &'static str {
        match self {
            Self::Improved => "improved",
            Self::Worsened => "worsened",
            Self::BothWrong => "still wrong",
            Self::BothRight => "still right",
        }
    }

    fn of(row: &Judged<'_>) -> Option<Self> {
        match row.outcomes.map(correct) {
            [Some(false), Some(true)] => Some(Self::Improved),
            [Some(true), Some(false)] => Some(Self::Worsened),
            [Some(false), Some(false)] => Some(Self::BothWrong),
            [Some(true), Some(true)] => Some(Self::BothRight),
            _ => None,
        }
    }
}

/// A row that a report shows.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Example {
    /// Id of the sample.
    pub id: String,
    /// What tuning did to it.
    pub change: Change,
    /// Rows of this kind that it was drawn from.
    pub of: usize,
}

/// Draws the rows to show. Kinds alternate; within a kind rows stand in file order.
pub(super) fn choose(rows: &[Judged<'_>], seed: u64) -> Vec<Example> {
    let mut shown: Vec<(usize, usize, Example)> = Vec::new();
    for (kind, (change, most)) in SHOWN.into_iter().enumerate() {
        let mut all: Vec<usize> = (0..rows.len()).filter(|i| Change::of(&rows[*i]) == Some(change)).collect();
        let of = all.len();
        all.shuffle(&mut stream(seed, "report examples", kind as u64));
        all.truncate(most);
        all.sort_unstable();
        let examples = all.into_iter().map(|i| Example { id: rows[i].sample.id.clone(), change, of });
        shown.extend(examples.enumerate().map(|(turn, example)| (turn, kind, example)));
    }
    shown.sort_by_key(|(turn, kind, _)| (*turn, *kind));
    shown.into_iter().map(|(_, _, example)| example).collect()
}
