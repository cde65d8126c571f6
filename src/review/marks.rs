//! Marks that reviewers saved, and what they say: how much error is left, and how far reviewers agree.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::PathBuf,
};

use serde::{Deserialize, Serialize};

use super::interval::{Agreement, Share, agreement};
use crate::{
    error::{Error, Kind, Result},
    run_dir::read_json,
};

/// What a reviewer says of a row.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Mark {
    /// Question and answer fit the image.
    Right,
    /// They do not.
    Wrong,
    /// The reviewer cannot tell.
    Unsure,
}

/// A marked row.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Marked {
    /// Id of the row.
    pub id: String,
    /// The mark.
    pub mark: Mark,
    /// Whether quality control had kept the row.
    pub kept: bool,
    /// Task or hallucination category.
    #[serde(default)]
    pub category: String,
    /// The reviewer's words.
    #[serde(default)]
    pub note: String,
}

/// A file of marks, as the page saves it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Marks {
    /// Name of the sample.
    pub review: String,
    /// Who marked.
    pub reviewer: String,
    /// The marks.
    pub marks: Vec<Marked>,
}

/// What one reviewer, or the majority of several, found.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Findings {
    /// Who.
    pub reviewer: String,
    /// Rows marked right, wrong and unsure.
    pub marks: [usize; 3],
    /// Kept rows that are wrong, among those with a clear mark: the error that is left.
    pub residual_error: Share,
    /// Rejected rows that are right, among those with a clear mark: what was lost for nothing.
    pub false_rejections: Share,
    /// Kept rows that are wrong, by category.
    pub categories: BTreeMap<String, Share>,
    /// Agreement with quality control: kept with right, rejected with wrong.
    pub with_quality_control: Agreement,
}

/// Agreement of two reviewers.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Between {
    /// Who.
    pub reviewers: [String; 2],
    /// On rows that both marked, unsure ones included.
    pub agreement: Agreement,
}

/// What all marks say.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Audit {
    /// Name of the sample.
    pub review: String,
    /// Each reviewer, then, if there are several, their majority.
    pub findings: Vec<Findings>,
    /// Every two reviewers.
    pub between: Vec<Between>,
}

/// Reads files of marks.
///
/// # Errors
/// A file is not what the page saves, has a row twice, is about another sample than the others, or names a reviewer that
/// another one names too.
pub fn read(paths: &[PathBuf]) -> Result<Audit> {
    let mut all: Vec<Marks> = Vec::new();
    for path in paths {
        let marks: Marks = read_json(path)?;
        let wrong = |what: &str| Error::new(Kind::Data, what).at(path.display());
        if let Some(first) = all.first().filter(|first| first.review != marks.review) {
            return Err(wrong("marks are about another sample").expected(&first.review).found(&marks.review));
        }
        if all.iter().any(|other| other.reviewer == marks.reviewer) {
            return Err(wrong("two files are of one reviewer").found(&marks.reviewer).help("give one file a reviewer"));
        }
        let ids: BTreeSet<&str> = marks.marks.iter().map(|m| m.id.as_str()).collect();
        if ids.len() != marks.marks.len() {
            return Err(wrong("a row is marked twice"));
        }
        all.push(marks);
    }
    audit(all)
}

/// What marks of one sample say.
///
/// # Errors
/// There are none.
pub fn audit(all: Vec<Marks>) -> Result<Audit> {
    let Some(review) = all.first().map(|m| m.review.clone()) else {
        return Err(Error::new(Kind::Config, "no marks to read").help("name the files that the page saved"));
    };
    let mut sides: Vec<Marks> = all.clone();
    if all.len() > 1 {
        sides.push(majority(&review, &all));
    }
    let mut between = Vec::new();
    for (i, a) in all.iter().enumerate() {
        for b in &all[i + 1..] {
            let of: BTreeMap<&str, Mark> = b.marks.iter().map(|m| (m.id.as_str(), m.mark)).collect();
            let both = a.marks.iter().filter_map(|m| Some((m.mark as usize, *of.get(m.id.as_str())? as usize)));
            between.push(Between {
                reviewers: [a.reviewer.clone(), b.reviewer.clone()],
                agreement: agreement(&both.collect::<Vec<_>>(), 0),
            });
        }
    }
    Ok(Audit { review, findings: sides.iter().map(findings).collect(), between })
}

/// The mark that more reviewers gave than any other; unsure without one.
fn majority(review: &str, all: &[Marks]) -> Marks {
    let mut rows: BTreeMap<&str, Vec<&Marked>> = BTreeMap::new();
    for mark in all.iter().flat_map(|m| &m.marks) {
        rows.entry(&mark.id).or_default().push(mark);
    }
    let decide = |marks: &[&Marked]| {
        let count = |mark: Mark| marks.iter().filter(|m| m.mark == mark).count();
        match (count(Mark::Right), count(Mark::Wrong)) {
            (right, wrong) if right > wrong && 2 * right > marks.len() => Mark::Right,
            (right, wrong) if wrong > right && 2 * wrong > marks.len() => Mark::Wrong,
            _ => Mark::Unsure,
        }
    };
    let marks =
        rows.into_values().map(|marks| Marked { mark: decide(&marks), note: String::new(), ..marks[0].clone() });
    Marks { review: review.into(), reviewer: "majority".into(), marks: marks.collect() }
}

fn findings(marks: &Marks) -> Findings {
    let count = |kept: Option<bool>, mark: Mark| {
        marks.marks.iter().filter(|m| m.mark == mark && kept.is_none_or(|k| m.kept == k)).count()
    };
    let share = |kept: bool, mark: Mark| {
        let clear = count(Some(kept), Mark::Right) + count(Some(kept), Mark::Wrong);
        Share::new(count(Some(kept), mark), clear)
    };
    let mut categories: BTreeMap<String, (usize, usize)> = BTreeMap::new();
    for mark in marks.marks.iter().filter(|m| m.kept && m.mark != Mark::Unsure) {
        let (wrong, all) = categories.entry(mark.category.clone()).or_default();
        *wrong += usize::from(mark.mark == Mark::Wrong);
        *all += 1;
    }
    let clear = marks.marks.iter().filter(|m| m.mark != Mark::Unsure);
    let beside: Vec<(usize, usize)> = clear.map(|m| (usize::from(!m.kept), m.mark as usize)).collect();
    Findings {
        reviewer: marks.reviewer.clone(),
        marks: [Mark::Right, Mark::Wrong, Mark::Unsure].map(|mark| count(None, mark)),
        residual_error: share(true, Mark::Wrong),
        false_rejections: share(false, Mark::Right),
        categories: categories.into_iter().map(|(name, (wrong, all))| (name, Share::new(wrong, all))).collect(),
        with_quality_control: agreement(&beside, 0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn marks(reviewer: &str, marks: &[(usize, Mark)]) -> Marks {
        let one = |(i, mark): &(usize, Mark)| Marked {
            id: format!("r{i}"),
            mark: *mark,
            kept: i % 5 != 0,
            category: "a".into(),
            note: String::new(),
        };
        Marks { review: "x".into(), reviewer: reviewer.into(), marks: marks.iter().map(one).collect() }
    }

    #[test]
    fn residual_error_counts_clear_marks_of_kept_rows() {
        use Mark::{Right, Unsure, Wrong};
        let one = marks("A", &[(0, Wrong), (1, Right), (2, Wrong), (3, Unsure), (4, Right), (5, Right), (6, Right)]);
        let audit = audit(vec![one.clone()]).unwrap();
        let found = &audit.findings[0];
        assert_eq!((found.marks, audit.between.len()), ([4, 2, 1], 0));
        assert_eq!((found.residual_error.count, found.residual_error.of), (1, 4));
        assert_eq!((found.false_rejections.count, found.false_rejections.of), (1, 2));
        assert_eq!(found.with_quality_control.alike, 4);
        let two = marks("B", &[(0, Wrong), (1, Right), (2, Right), (3, Wrong), (4, Right)]);
        let audit = super::audit(vec![one, two]).unwrap();
        assert_eq!(audit.findings.iter().map(|f| f.reviewer.as_str()).collect::<Vec<_>>(), ["A", "B", "majority"]);
        assert_eq!((audit.between[0].agreement.rows, audit.between[0].agreement.alike), (5, 3));
        assert_eq!(audit.findings[2].marks, [4, 1, 2], "a row that only one saw counts as that one says");
    }

    #[test]
    fn files_must_belong_together() {
        let dir = tempfile::tempdir().unwrap();
        let write = |name: &str, marks: &Marks| {
            let path = dir.path().join(name);
            std::fs::write(&path, serde_json::to_string(marks).unwrap()).unwrap();
            path
        };
        let a = write("a.json", &marks("A", &[(1, Mark::Right)]));
        let same = write("b.json", &marks("A", &[(1, Mark::Right)]));
        let other = write("c.json", &Marks { review: "y".into(), ..marks("C", &[]) });
        let twice = write("d.json", &marks("D", &[(1, Mark::Right), (1, Mark::Wrong)]));
        assert!(read(std::slice::from_ref(&a)).is_ok());
        for (path, part) in [(same, "one reviewer"), (other, "another sample"), (twice, "twice")] {
            assert!(read(&[a.clone(), path]).unwrap_err().to_string().contains(part));
        }
        assert!(read(&[]).is_err());
    }
}
