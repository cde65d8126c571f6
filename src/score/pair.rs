//! Pairs predictions with reference answers. Ids of the two parts collide, so a prediction that belongs to the other
//! part finds a reference of the same id about another image; such rows are told by their question and image.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
};

use super::read::{Part, Row, Rows, SetAside};
use crate::sample::AnswerType;

/// What a row is known by.
pub type Key = (Option<Part>, String);

/// A prediction with its reference, ready to be scored.
#[derive(Debug, Clone, PartialEq)]
pub struct Item {
    /// Part and id.
    pub key: Key,
    /// Number of the file among the predictions.
    pub file: usize,
    /// Line in it.
    pub line: usize,
    /// Image, where one is named; rows of one image are one cluster.
    pub image: Option<String>,
    /// The question.
    pub question: String,
    /// The reference answer.
    pub reference: String,
    /// The answer.
    pub answer: String,
    /// Ground-truth text about the image.
    pub caption: Option<String>,
    /// A judge's reply that came with the prediction.
    pub result: Option<String>,
    /// Why there is no reply of a judge that was asked.
    pub unjudged: Option<String>,
    /// Open or closed.
    pub answer_type: Option<AnswerType>,
    /// Options of a multiple-choice question.
    pub options: Vec<String>,
}

impl Item {
    /// What its interval is clustered by.
    #[must_use]
    pub fn cluster(&self) -> &str {
        self.image.as_deref().unwrap_or(&self.key.1)
    }
}

/// Everything that came of pairing: every row of every file is an item or set aside.
#[derive(Debug, Clone, Default)]
pub struct Paired {
    /// In file order.
    pub items: Vec<Item>,
    /// In file order.
    pub set_aside: Vec<SetAside>,
    /// References of the parts that were predicted that have no prediction.
    pub missing: Vec<Key>,
    /// Rows whose own reference differs from that of the reference file, which counts.
    pub other_reference: usize,
    /// What the user should know of whole files.
    pub notes: Vec<String>,
}

/// Pairs the rows of `predictions` with `references`; `part` is what the user says of all of them.
#[must_use]
pub fn pair(predictions: &[Rows], references: &[Rows], part: Option<Part>) -> Paired {
    let mut paired = Paired::default();
    let book = Book::new(references, part, &mut paired);
    let mut seen: BTreeMap<Key, (usize, usize, String)> = BTreeMap::new();
    for (file, rows) in predictions.iter().enumerate() {
        paired.set_aside.extend(rows.set_aside.iter().cloned());
        let of_file = Part::of_file(&rows.path);
        if let (Some(said), Some(named)) = (part, of_file)
            && said != named
        {
            paired.notes.push(format!(
                "{} is called {}, and was scored as {}, as asked",
                rows.path.display(),
                named.name(),
                said.name()
            ));
        }
        for (row, raw) in &rows.rows {
            match item(row, file, part, of_file, &book, &mut paired) {
                Ok(item) => match seen.get(&item.key) {
                    Some((other_file, line, answer)) => {
                        let same = if *answer == item.answer { "the same answer" } else { "another answer" };
                        let place = predictions[*other_file].path.display();
                        let detail = format!("{place}:{line} has this id too, with {same}; that one counts");
                        paired.set_aside.push(aside(&rows.path, row, raw, "duplicate_id", detail));
                    }
                    None => {
                        seen.insert(item.key.clone(), (file, item.line, item.answer.clone()));
                        paired.items.push(item);
                    }
                },
                Err((code, detail)) => paired.set_aside.push(aside(&rows.path, row, raw, code, detail)),
            }
        }
    }
    let parts: BTreeSet<Option<Part>> = paired.items.iter().map(|i| i.key.0).collect();
    let wanted = book.rows.keys().filter(|(part, _)| parts.contains(part));
    paired.missing = wanted.filter(|key| !seen.contains_key(*key)).cloned().collect();
    whole_files(&mut paired);
    paired
}

/// A sentence where one cause explains most of what was set aside.
fn whole_files(paired: &mut Paired) {
    let wrong: Vec<&SetAside> = paired.set_aside.iter().filter(|s| s.code == "wrong_split").collect();
    if wrong.len() > paired.items.len() {
        paired.notes.push(format!(
            "{} rows belong to the other part; check --split and --reference (the ids of both parts collide)",
            wrong.len()
        ));
    }
}

fn aside(file: &Path, row: &Row, raw: &str, code: &str, detail: String) -> SetAside {
    SetAside { file: file.into(), line: row.line, id: row.id.clone(), code: code.into(), detail, raw: raw.into() }
}

/// References by part and id.
struct Book {
    rows: BTreeMap<Key, Row>,
}

impl Book {
    fn new(files: &[Rows], part: Option<Part>, paired: &mut Paired) -> Self {
        let mut rows = BTreeMap::new();
        for file in files {
            for aside in &file.set_aside {
                paired.notes.push(format!("{}:{}: {}", file.path.display(), aside.line, aside.detail));
            }
            let of_file = Part::of_file(&file.path);
            for (row, _) in &file.rows {
                let Some(id) = &row.id else {
                    paired.notes.push(format!("{}:{}: a reference without an id", file.path.display(), row.line));
                    continue;
                };
                let mut row = row.clone();
                // A file of questions and right answers has no other name for them.
                row.reference = row.reference.or_else(|| row.answer.clone());
                let key = (row.part.or(of_file).or(part), id.clone());
                if rows.insert(key, row).is_some() {
                    paired.notes.push(format!("{}: two references have the id {id}", file.path.display()));
                }
            }
        }
        Self { rows }
    }

    fn of(&self, part: Option<Part>, id: &str) -> Option<&Row> {
        self.rows.get(&(part, id.to_string()))
    }

    /// All references of an id, with their parts.
    fn all(&self, id: &str) -> Vec<(Option<Part>, &Row)> {
        let parts = [None, Some(Part::Positive), Some(Part::Negative)];
        parts.into_iter().filter_map(|part| Some((part, self.of(part, id)?))).collect()
    }
}

/// Whether question and image of both rows can be the same; what a row does not say cannot differ.
fn fits(a: &Row, b: &Row) -> bool {
    let words = |q: &str| q.split_whitespace().collect::<Vec<_>>().join(" ").to_lowercase();
    let name = |p: &str| p.rsplit(['/', '\\']).next().unwrap_or(p).to_string();
    let same = |a: Option<&String>, b: Option<&String>, form: &dyn Fn(&str) -> String| match (a, b) {
        (Some(a), Some(b)) => form(a) == form(b),
        _ => true,
    };
    same(a.question.as_ref(), b.question.as_ref(), &words) && same(a.image.as_ref(), b.image.as_ref(), &name)
}

type Objection = (&'static str, String);

fn item(
    row: &Row,
    file: usize,
    said: Option<Part>,
    of_file: Option<Part>,
    book: &Book,
    paired: &mut Paired,
) -> Result<Item, Objection> {
    let Some(id) = row.id.clone() else {
        return Err(("no_id", "the row has no question_id".into()));
    };
    if let (Some(said), Some(own)) = (said, row.part)
        && said != own
    {
        return Err(("wrong_split", format!("the row is {}, and --split says {}", own.name(), said.name())));
    }
    let Some(answer) = row.answer.clone() else {
        return Err(("no_answer", "the row has no answer (fields answer or text)".into()));
    };
    let part = said.or(row.part).or(of_file);
    let (part, found) = reference(row, &id, part, book)?;
    let own = row.reference.clone();
    let given = found.and_then(|r| r.reference.clone());
    if let (Some(own), Some(given)) = (&own, &given) {
        paired.other_reference += usize::from(own.trim() != given.trim());
    }
    let Some(reference) = given.or(own) else {
        return Err(("no_reference", "no reference answer, in the row or in a reference file".into()));
    };
    let other = |pick: fn(&Row) -> &Option<String>| pick(row).clone().or_else(|| found.and_then(|r| pick(r).clone()));
    Ok(Item {
        key: (part, id),
        file,
        line: row.line,
        image: other(|r| &r.image),
        question: other(|r| &r.question).unwrap_or_default(),
        reference,
        answer,
        caption: other(|r| &r.caption),
        result: row.result.clone(),
        unjudged: None,
        answer_type: row.answer_type.or_else(|| found.and_then(|r| r.answer_type)),
        options: found.map(|r| &r.options).filter(|o| !o.is_empty()).unwrap_or(&row.options).clone(),
    })
}

/// The reference of a row and the part it belongs to; none where the book has none of this id.
fn reference<'a>(
    row: &Row,
    id: &str,
    part: Option<Part>,
    book: &'a Book,
) -> Result<(Option<Part>, Option<&'a Row>), Objection> {
    let all = book.all(id);
    if part.is_some() {
        let Some(found) = book.of(part, id).or_else(|| book.of(None, id)) else { return Ok((part, None)) };
        if fits(row, found) {
            return Ok((part, Some(found)));
        }
        return Err(match all.iter().find(|(other, r)| *other != part && other.is_some() && fits(row, r)) {
            Some((Some(other), _)) => {
                ("wrong_split", format!("question and image are those of the {} part", other.name()))
            }
            _ => ("wrong_reference", format!("the reference of id {id} is about another question or image")),
        });
    }
    let fitting: Vec<_> = all.iter().filter(|(_, r)| fits(row, r)).collect();
    match fitting.as_slice() {
        [] if all.is_empty() => Ok((None, None)),
        [] => Err(("wrong_reference", format!("the reference of id {id} is about another question or image"))),
        [(part, found)] => Ok((*part, Some(*found))),
        _ => Err(("ambiguous_split", format!("id {id} is in both parts and the row does not say which; use --split"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rows(name: &str, text: &str) -> Rows {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(name);
        std::fs::write(&path, text).unwrap();
        super::super::read::read(&path).unwrap()
    }

    const POSITIVE: &str = r#"{"question_id": 1, "image": "p.jpg", "question": "Where is it?", "gpt4_answer": "Right."}
{"question_id": 2, "image": "p.jpg", "question": "What is it?", "gpt4_answer": "A cyst."}"#;
    const NEGATIVE: &str = r#"{"question_id": 1, "image": "n.jpg", "question": "Is there a pacemaker?\n<image>", "gpt4_answer": "No."}
{"question_id": 3, "image": "n.jpg", "question": "Is it red?", "gpt4_answer": "No."}"#;

    fn references() -> [Rows; 2] {
        [rows("positive.jsonl", POSITIVE), rows("negative.jsonl", NEGATIVE)]
    }

    fn codes(paired: &Paired) -> Vec<&str> {
        paired.set_aside.iter().map(|s| s.code.as_str()).collect()
    }

    #[test]
    fn predictions_of_the_wrong_part_are_found_although_their_ids_exist() {
        let predictions = rows(
            "mine.jsonl",
            r#"{"question_id": 1, "image": "dir/p.jpg", "question": "where  is it?", "answer": "Left."}
{"question_id": 3, "image": "n.jpg", "question": "Is it red?", "answer": "No."}"#,
        );
        let paired = pair(std::slice::from_ref(&predictions), &references(), Some(Part::Negative));
        assert_eq!(codes(&paired), ["wrong_split"]);
        assert!(paired.set_aside[0].detail.contains("positive part"), "{}", paired.set_aside[0].detail);
        assert_eq!(paired.items.len(), 1);
        assert_eq!(paired.missing, [(Some(Part::Negative), "1".into())]);
        // Nothing said: question and image tell the parts.
        let paired = pair(&[predictions], &references(), None);
        assert_eq!(codes(&paired), [""; 0]);
        assert_eq!(paired.items[0].reference, "Right.");
        assert_eq!(paired.items[0].key, (Some(Part::Positive), "1".into()));
        assert_eq!(paired.missing.len(), 2);
    }

    #[test]
    fn a_bare_id_in_both_parts_is_ambiguous_and_one_about_something_else_is_wrong() {
        let predictions = rows(
            "mine.jsonl",
            r#"{"question_id": 1, "answer": "Left."}
{"question_id": 2, "answer": "A cyst."}
{"question_id": 3, "question": "Is it blue?", "answer": "No."}
{"question_id": 9, "answer": "No."}
{"answer": "No."}
{"question_id": 2}
{"question_id": 2, "answer": "A cyst."}
{"question_id": 2, "answer": "A tumour."}"#,
        );
        let paired = pair(&[predictions], &references(), None);
        let expected = [
            "ambiguous_split",
            "wrong_reference",
            "no_reference",
            "no_id",
            "no_answer",
            "duplicate_id",
            "duplicate_id",
        ];
        assert_eq!(codes(&paired), expected);
        assert!(paired.set_aside[5].detail.contains("the same answer"));
        assert!(paired.set_aside[6].detail.contains("another answer"));
        assert_eq!(paired.items.len(), 1);
    }

    #[test]
    fn rows_bring_their_own_reference_unless_a_file_has_one() {
        let predictions = rows(
            "negative.jsonl",
            r#"{"question_id": 1, "answer": "a", "gpt4_answer": "mine"}
{"question_id": 7, "answer": "a", "gpt4_answer": "own"}"#,
        );
        let paired = pair(&[predictions], &references(), None);
        assert_eq!(paired.items[0].reference, "No.");
        assert_eq!(paired.items[1].reference, "own");
        assert_eq!(paired.other_reference, 1);
        assert!(paired.items.iter().all(|i| i.key.0 == Some(Part::Negative)), "the file's name says so");
    }
}
