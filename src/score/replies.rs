//! Replies of a judge that are already there: beside the prediction (`result`) or in a file of an earlier evaluation.

use std::{collections::HashMap, path::PathBuf};

use super::{
    pair::Item,
    read::{self, Part},
};
use crate::{error::Result, judge::Scores};

/// Replies by id, from files.
#[derive(Debug, Clone, Default)]
pub struct Replies {
    /// Part, id, the answer that was judged where the file says so, the reply.
    rows: HashMap<String, Vec<Reply>>,
    unreadable: usize,
}

#[derive(Debug, Clone)]
struct Reply {
    part: Option<Part>,
    answer: Option<String>,
    text: String,
}

impl Replies {
    /// Reads the files; lines that cannot be read are counted, and those after them still count.
    ///
    /// # Errors
    /// A file cannot be read at all.
    pub fn read(paths: &[PathBuf], part: Option<Part>) -> Result<Self> {
        let mut found = Self::default();
        for path in paths {
            let file = read::read(path)?;
            found.unreadable += file.set_aside.len();
            for (row, _) in file.rows {
                let (Some(id), Some(text)) = (row.id, row.result) else { continue };
                let part = row.part.or(Part::of_file(path)).or(part);
                found.rows.entry(id).or_default().push(Reply { part, answer: row.answer, text });
            }
        }
        Ok(found)
    }

    /// The reply to this very answer: the prediction's own, else the last one of the files that is about the same part
    /// and the same words.
    #[must_use]
    pub fn of(&self, item: &Item) -> Option<String> {
        if let Some(own) = &item.result {
            return Some(own.clone());
        }
        let fits = |r: &&Reply| {
            (r.part.is_none() || item.key.0.is_none() || r.part == item.key.0)
                && r.answer.as_ref().is_none_or(|a| *a == item.answer)
        };
        self.rows.get(&item.key.1)?.iter().rev().find(fits).map(|r| r.text.clone())
    }

    /// What the user should know of the files.
    pub(super) fn notes(&self) -> Vec<String> {
        match self.unreadable {
            0 => Vec::new(),
            n => vec![format!("{n} lines of reply files cannot be read; the others count")],
        }
    }
}

/// The four scores of a reply.
///
/// # Errors
/// Why it has none, as one word.
pub fn scores(reply: &str) -> std::result::Result<Scores, String> {
    crate::judge::parse::scores(reply).map_err(|why| why.name().to_string())
}
