//! Views of a data set for ablations: one polarity only, without quality control, or a part of the images.
//!
//! A view changes what is trained on and never what is tested: rows of the test split are the same in every view.
//! Parts are drawn by image and nested: the images of 25 % are among those of 50 %.

use std::{collections::HashMap, fmt, str::FromStr};

use rand::Rng;

use crate::{
    error::{Error, Kind, Result},
    qc::hash::hash,
    random::stream,
    sample::{Polarity, Role, Sample, Split},
    stage::encode::RejectedRow,
};

/// Reasons of rejected rows that no view brings back: there is nothing to train on, or it would leak.
const NEVER: [&str; 10] = [
    "image_missing",
    "image_tiny",
    "image_error",
    "image_count",
    "image_span",
    "roles",
    "empty",
    "malformed",
    "duplicate_id",
    "eval_leak",
];

/// Which rows are trained on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct View {
    /// Only rows of this polarity; rows that state none are left out too.
    pub polarity: Option<Polarity>,
    /// Whether quality control counts; without it, rows that its rules rejected are trained on as well.
    pub qc: bool,
    /// Share of the training images, 1 to 100 %.
    pub percent: u8,
}

impl Default for View {
    fn default() -> Self {
        Self { polarity: None, qc: true, percent: 100 }
    }
}

/// The views that the paper's ablation compares, everything first.
#[must_use]
pub fn ablations() -> Vec<View> {
    let all = View::default();
    let only = |polarity| View { polarity: Some(polarity), ..all };
    let part = |percent| View { percent, ..all };
    vec![
        all,
        only(Polarity::NonHallucination),
        only(Polarity::Hallucination),
        View { qc: false, ..all },
        part(25),
        part(50),
        part(75),
    ]
}

impl fmt::Display for View {
    /// `all`, or what differs from it joined by `+`: `positive`, `negative`, `no-qc`, `50%`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut parts: Vec<String> = Vec::new();
        match self.polarity {
            Some(Polarity::Hallucination) => parts.push("negative".into()),
            Some(Polarity::NonHallucination) => parts.push("positive".into()),
            None => {}
        }
        if !self.qc {
            parts.push("no-qc".into());
        }
        if self.percent != 100 {
            parts.push(format!("{}%", self.percent));
        }
        f.write_str(&if parts.is_empty() { "all".into() } else { parts.join("+") })
    }
}

impl FromStr for View {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let bad = || {
            Error::new(Kind::Config, "unknown view")
                .expected("all, positive, negative, no-qc, a share such as 25%, or several of them joined by +")
                .found(text)
        };
        let mut view = Self::default();
        for part in text.split('+') {
            match part.trim() {
                "all" => {}
                "positive" => view.polarity = Some(Polarity::NonHallucination),
                "negative" => view.polarity = Some(Polarity::Hallucination),
                "no-qc" => view.qc = false,
                share => {
                    let percent = share.strip_suffix('%').and_then(|n| n.parse().ok()).ok_or_else(bad)?;
                    if !(1..=100).contains(&percent) {
                        return Err(bad());
                    }
                    view.percent = percent;
                }
            }
        }
        Ok(view)
    }
}

impl View {
    /// The view of rows in memory, in their order; rows that come back without quality control follow.
    #[must_use]
    pub fn apply(&self, kept: Vec<Sample>, rejected: &[RejectedRow], seed: u64) -> Vec<Sample> {
        let groups = kept.iter().map(|s| (s.split, s.group.as_str()));
        let back = rejected.iter().map(|r| (r.sample.split, r.sample.group.as_str()));
        let chosen = Chosen::new(*self, groups.chain(back), seed);
        let mut rows: Vec<Sample> = kept.into_iter().filter(|s| chosen.takes(s)).collect();
        rows.extend(rejected.iter().filter(|r| chosen.takes_back(r)).map(|r| r.sample.clone()));
        rows
    }
}

/// A view of one data set: which of its images it takes.
#[derive(Debug, Clone)]
pub struct Chosen {
    view: View,
    /// Training images of the part, by the hash of their group; none when it takes all.
    groups: Option<HashMap<u64, ()>>,
}

impl Chosen {
    /// Draws the images of a view. `rows` are split and group of all rows, kept and rejected, in any order: every view
    /// of one data set and one seed ranks the images alike.
    pub fn new<'a>(view: View, rows: impl IntoIterator<Item = (Split, &'a str)>, seed: u64) -> Self {
        if view.percent >= 100 {
            return Self { view, groups: None };
        }
        let mut draws: HashMap<u64, u64> = HashMap::new();
        for (_, group) in rows.into_iter().filter(|(split, _)| *split == Split::Train) {
            let key = hash(group.as_bytes());
            draws.entry(key).or_insert_with(|| stream(seed, "view", key).next_u64());
        }
        let mut order: Vec<(u64, u64)> = draws.into_iter().map(|(key, draw)| (draw, key)).collect();
        order.sort_unstable();
        let count = (order.len() * usize::from(view.percent)).div_ceil(100);
        Self { view, groups: Some(order[..count].iter().map(|(_, key)| (*key, ())).collect()) }
    }

    /// Whether a kept row belongs to the view.
    #[must_use]
    pub fn takes(&self, sample: &Sample) -> bool {
        if sample.split == Split::Test {
            return true;
        }
        let polarity = self.view.polarity.is_none() || sample.polarity == self.view.polarity;
        let part = sample.split != Split::Train
            || self.groups.as_ref().is_none_or(|g| g.contains_key(&hash(sample.group.as_bytes())));
        polarity && part
    }

    /// Whether a rejected row belongs to the view: only without quality control, only to train on, and only if the row
    /// is whole and leaks nothing.
    #[must_use]
    pub fn takes_back(&self, row: &RejectedRow) -> bool {
        let sample = &row.sample;
        let whole = [Role::User, Role::Assistant].iter().all(|r| sample.turns.iter().any(|t| t.role == *r));
        !self.view.qc
            && whole
            && sample.split == Split::Train
            && !NEVER.contains(&row.code.as_str())
            && self.takes(sample)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use crate::qc::tests::row;

    fn rows() -> (Vec<Sample>, Vec<RejectedRow>) {
        let kept = (0..400).map(|i| Sample {
            id: format!("r{i}"),
            group: format!("g{}", i / 4),
            split: [Split::Train, Split::Train, Split::Train, Split::Validation, Split::Test][(i / 4) % 5],
            polarity: Some([Polarity::Hallucination, Polarity::NonHallucination][i % 2]),
            ..row("Is it large?", "It is small.")
        });
        let rejected = ["length", "image_missing", "eval_leak", "duplicate"].map(|code| RejectedRow {
            sample: Sample { id: code.into(), group: "g1".into(), ..row("Is it large?", "It is small.") },
            code: code.into(),
            detail: String::new(),
        });
        (kept.collect(), rejected.to_vec())
    }

    fn ids(view: &str, seed: u64) -> BTreeSet<String> {
        let (kept, rejected) = rows();
        let view: View = view.parse().unwrap();
        view.apply(kept, &rejected, seed).into_iter().map(|s| s.id).collect()
    }

    #[test]
    fn views_change_training_and_never_the_test() {
        let (kept, _) = rows();
        let test: BTreeSet<String> = kept.iter().filter(|s| s.split == Split::Test).map(|s| s.id.clone()).collect();
        for view in ablations() {
            assert_eq!(view.to_string().parse::<View>().unwrap(), view);
            let got = ids(&view.to_string(), 1);
            assert!(test.is_subset(&got), "{view}");
        }
        assert_eq!(ids("all", 1).len(), 400);
        assert_eq!((ids("positive", 1).len() - 80, ids("negative", 1).len() - 80), (160, 160));
        let back: Vec<String> = ids("no-qc", 1).difference(&ids("all", 1)).cloned().collect();
        assert_eq!(back, ["duplicate", "length"]);
        assert_eq!(ids("negative+50%", 1).len(), 80 + 40 + 60);
    }

    #[test]
    fn parts_are_nested_whole_images_and_depend_on_the_seed() {
        let parts: Vec<BTreeSet<String>> = ["25%", "50%", "75%", "100%"].map(|p| ids(p, 3)).to_vec();
        // 60 training images of four rows beside 160 rows of the other splits.
        assert_eq!(parts.iter().map(BTreeSet::len).collect::<Vec<_>>(), [220, 280, 340, 400]);
        assert!(parts.windows(2).all(|p| p[0].is_subset(&p[1])));
        assert_ne!(ids("25%", 4), parts[0]);
    }

    #[test]
    fn nonsense_is_refused() {
        for text in ["", "0%", "101%", "half", "25", "positive,negative"] {
            assert!(text.parse::<View>().is_err(), "{text}");
        }
    }
}
