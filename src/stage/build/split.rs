//! Which rows stay together when data are split: those of one group, of one article, or of one picture, and everything
//! that is connected through them.

use std::collections::{HashMap, HashSet};

use rand::seq::SliceRandom;

use crate::{leak::picture::Pictures, plan::Plan, qc::hash::hash_parts, random::stream, sample::Split};

/// Rows as members of clusters. A few bytes a row, and a few more for each group, article and picture.
#[derive(Debug, Default)]
pub(super) struct Clusters {
    /// Node of each row.
    rows: Vec<u32>,
    /// Split that each row is marked with, where marks are followed.
    marks: Vec<Split>,
    /// Node that each node was joined to; a root is its own.
    parent: Vec<u32>,
    nodes: HashMap<u64, u32>,
    /// Pictures and the node of a row that shows them.
    shown: HashMap<usize, u32>,
}

impl Clusters {
    /// Adds the next row: its group, its article, the positions of its pictures, and the split it is marked with.
    pub(super) fn add(
        &mut self,
        group: &str,
        article: Option<&str>,
        images: impl Iterator<Item = usize>,
        mark: Option<Split>,
    ) {
        let node = self.node(hash_parts(&["group", group]));
        if let Some(article) = article {
            let other = self.node(hash_parts(&["article", article]));
            self.union(node, other);
        }
        for image in images {
            let other = *self.shown.entry(image).or_insert(node);
            self.union(node, other);
        }
        self.rows.push(node);
        self.marks.extend(mark);
    }

    /// Joins the rows of pictures that are copies of each other.
    pub(super) fn join(&mut self, pictures: &Pictures) {
        for (i, picture) in pictures.all().iter().enumerate() {
            let original = picture.copy_of.as_deref().and_then(|path| pictures.index(path));
            if let (Some(original), Some(a)) = (original, self.shown.get(&i).copied())
                && let Some(b) = self.shown.get(&original).copied()
            {
                self.union(a, b);
            }
        }
    }

    /// Split of every row: clusters in random order, the first of them for the test, then those for validation.
    pub(super) fn splits(mut self, plan: &Plan) -> Vec<Split> {
        if self.marks.len() == self.rows.len() {
            return self.marks;
        }
        let roots: Vec<u32> = (0..self.rows.len()).map(|i| self.root(self.rows[i])).collect();
        let mut seen = HashSet::new();
        let mut order: Vec<u32> = roots.iter().copied().filter(|root| seen.insert(*root)).collect();
        order.shuffle(&mut stream(plan.seed, "split", 0));
        let count = |share: f64| (share * order.len() as f64).round() as usize;
        let test = count(plan.data.test_fraction);
        let validation = test + count(plan.data.validation_fraction);
        let split = |i: usize| match i {
            i if i < test => Split::Test,
            i if i < validation => Split::Validation,
            _ => Split::Train,
        };
        let of: HashMap<u32, Split> = order.iter().enumerate().map(|(i, root)| (*root, split(i))).collect();
        roots.iter().map(|root| of.get(root).copied().unwrap_or_default()).collect()
    }

    fn node(&mut self, key: u64) -> u32 {
        let next = self.parent.len() as u32;
        let node = *self.nodes.entry(key).or_insert(next);
        if node == next {
            self.parent.push(node);
        }
        node
    }

    fn union(&mut self, a: u32, b: u32) {
        let (a, b) = (self.root(a), self.root(b));
        // The smaller number is the earlier row's: which cluster is which does not depend on the order of joining.
        self.parent[a.max(b) as usize] = a.min(b);
    }

    fn root(&mut self, mut i: u32) -> u32 {
        while self.parent[i as usize] != i {
            self.parent[i as usize] = self.parent[self.parent[i as usize] as usize];
            i = self.parent[i as usize];
        }
        i
    }
}
