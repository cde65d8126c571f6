//! Rows of a JSONL file that are read one at a time, in any order: memory holds their places, not the rows.

use std::{
    borrow::Cow,
    cell::RefCell,
    fs::File,
    io::{BufRead, BufReader, Read, Seek, SeekFrom, Write},
    marker::PhantomData,
    path::{Path, PathBuf},
};

use rustc_hash::FxHashMap;
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use sha2::{Digest, Sha256};

use crate::error::{Error, Kind, Result};

/// Bytes that a growing file keeps in memory before it writes them.
const PENDING: usize = 1 << 18;

/// Rows by position.
#[derive(Debug)]
pub struct RowFile<T> {
    path: PathBuf,
    file: RefCell<File>,
    /// Where each row begins.
    places: Vec<u64>,
    /// Length of everything, `pending` included.
    end: u64,
    /// Rows that are not in the file yet.
    pending: Vec<u8>,
    of: PhantomData<T>,
}

impl<T: Serialize + DeserializeOwned> RowFile<T> {
    /// Opens a file of rows, whose lines are not parsed yet.
    ///
    /// # Errors
    /// It cannot be read.
    pub fn open(path: impl Into<PathBuf>) -> Result<Self> {
        Self::scan(path.into(), |_, _| Ok(()))
    }

    /// A file without a name, for rows that do not fit into memory; it is gone with the value.
    ///
    /// # Errors
    /// `dir` cannot be written.
    pub fn scratch(dir: &Path) -> Result<Self> {
        let file = tempfile::tempfile_in(dir).map_err(|e| Error::io(dir, e))?;
        Ok(Self::empty(dir.join("(temporary file)"), file))
    }

    fn empty(path: PathBuf, file: File) -> Self {
        Self { path, file: RefCell::new(file), places: Vec::new(), end: 0, pending: Vec::new(), of: PhantomData }
    }

    /// Finds the rows of a file; `each` sees every line with its number in the file, from 1.
    fn scan(path: PathBuf, mut each: impl FnMut(usize, &[u8]) -> Result<()>) -> Result<Self> {
        let file = File::open(&path).map_err(|e| Error::io(&path, e))?;
        let mut lines = BufReader::with_capacity(PENDING, file.try_clone().map_err(|e| Error::io(&path, e))?);
        let mut rows = Self::empty(path, file);
        let mut line = Vec::new();
        for number in 1.. {
            line.clear();
            let length = lines.read_until(b'\n', &mut line).map_err(|e| Error::io(&rows.path, e))?;
            if length == 0 {
                break;
            }
            if !line.trim_ascii().is_empty() {
                rows.places.push(rows.end);
                each(number, &line)?;
            }
            rows.end += length as u64;
        }
        Ok(rows)
    }

    /// Number of rows.
    #[must_use]
    pub fn len(&self) -> usize {
        self.places.len()
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.places.is_empty()
    }

    /// Row `i`, from 0.
    ///
    /// # Errors
    /// There is no such row, it is not a value of this type, or the file cannot be read.
    pub fn row(&self, i: usize) -> Result<T> {
        let bad = || Error::new(Kind::Run, "line is not a valid row").at(format!("{}, row {i}", self.path.display()));
        let start = *self.places.get(i).ok_or_else(|| bad().found("no such row"))?;
        let end = self.places.get(i + 1).copied().unwrap_or(self.end);
        let written = self.end - self.pending.len() as u64;
        let parsed = if start >= written {
            serde_json::from_slice(&self.pending[(start - written) as usize..(end - written) as usize])
        } else {
            let mut line = vec![0; (end - start) as usize];
            let mut file = self.file.borrow_mut();
            file.seek(SeekFrom::Start(start))
                .and_then(|_| file.read_exact(&mut line))
                .map_err(|e| Error::io(&self.path, e))?;
            serde_json::from_slice(&line)
        };
        parsed.map_err(|e| bad().help("repair or delete the file, then run the same command again").source(e))
    }

    /// All rows in order.
    ///
    /// # Errors
    /// Items are errors as of [`RowFile::row`].
    pub fn iter(&self) -> impl Iterator<Item = Result<T>> + '_ {
        (0..self.len()).map(|i| self.row(i))
    }

    /// Adds a row to a scratch file and returns its position.
    ///
    /// # Errors
    /// The disk is full, or the row has no JSON form.
    pub fn push(&mut self, row: &T) -> Result<usize> {
        let before = self.pending.len();
        serde_json::to_writer(&mut self.pending, row)
            .map_err(|e| Error::new(Kind::Run, "value has no JSON form").at(self.path.display()).source(e))?;
        self.places.push(self.end);
        self.end += (self.pending.len() - before) as u64;
        if self.pending.len() >= PENDING {
            let mut file = self.file.borrow_mut();
            file.seek(SeekFrom::End(0))
                .and_then(|_| file.write_all(&self.pending))
                .map_err(|e| Error::io(&self.path, e))?;
            self.pending.clear();
        }
        Ok(self.places.len() - 1)
    }
}

/// Rows by their id; of several with one id the last.
#[derive(Debug)]
pub struct RowsById<T> {
    rows: RowFile<T>,
    /// Hash of an id, long enough that no two of a file are equal, and its row.
    at: FxHashMap<[u64; 2], u32>,
}

/// What a line is found by.
#[derive(Deserialize)]
struct Id<'a> {
    #[serde(borrow)]
    id: Cow<'a, str>,
}

fn hash(id: &str) -> [u64; 2] {
    let digest = Sha256::digest(id.as_bytes());
    let word = |from: usize| u64::from_le_bytes(std::array::from_fn(|i| digest[from + i]));
    [word(0), word(8)]
}

fn position(row: usize) -> Result<u32> {
    u32::try_from(row).map_err(|_| Error::new(Kind::Data, "a file has more than four thousand million rows"))
}

impl<T: Serialize + DeserializeOwned> RowsById<T> {
    /// Opens a file whose rows are objects with the text `id`.
    ///
    /// # Errors
    /// It cannot be read, or a line has no id.
    pub fn open(path: impl Into<PathBuf>) -> Result<Self> {
        let path = path.into();
        let (mut at, mut row, place) = (FxHashMap::default(), 0, path.clone());
        let rows = RowFile::scan(path, |number, line| {
            let id: Id<'_> = serde_json::from_slice(line).map_err(|e| {
                Error::new(Kind::Run, "line is not a valid row")
                    .at(format!("{}:{number}", place.display()))
                    .help("repair or delete the file, then run the same command again")
                    .source(e)
            })?;
            at.insert(hash(&id.id), position(row)?);
            row += 1;
            Ok(())
        })?;
        Ok(Self { rows, at })
    }

    /// As [`RowFile::scratch`].
    ///
    /// # Errors
    /// `dir` cannot be written.
    pub fn scratch(dir: &Path) -> Result<Self> {
        Ok(Self { rows: RowFile::scratch(dir)?, at: FxHashMap::default() })
    }

    /// Adds a row to a scratch file.
    ///
    /// # Errors
    /// The disk is full, or the row has no JSON form.
    pub fn push(&mut self, id: &str, row: &T) -> Result<()> {
        let row = position(self.rows.push(row)?)?;
        self.at.insert(hash(id), row);
        Ok(())
    }

    /// Number of different ids.
    #[must_use]
    pub fn len(&self) -> usize {
        self.at.len()
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.at.is_empty()
    }

    /// Whether there is a row of this id.
    #[must_use]
    pub fn contains(&self, id: &str) -> bool {
        self.at.contains_key(&hash(id))
    }

    /// The row of an id, if there is one.
    ///
    /// # Errors
    /// It is not a value of this type, or the file cannot be read.
    pub fn get(&self, id: &str) -> Result<Option<T>> {
        self.at.get(&hash(id)).map(|i| self.rows.row(*i as usize)).transpose()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, PartialEq, Serialize, Deserialize)]
    struct Row {
        id: String,
        text: String,
    }

    fn row(i: usize) -> Row {
        Row { id: format!("row \"{i}\""), text: "x".repeat(i % 700) }
    }

    #[test]
    fn rows_come_back_by_position_and_by_id_from_memory_and_disk() {
        let dir = tempfile::tempdir().unwrap();
        let mut rows = RowsById::scratch(dir.path()).unwrap();
        let count = 3000;
        for i in 0..count {
            rows.push(&row(i).id, &row(i)).unwrap();
            // Reading between writes must not disturb either.
            assert_eq!(rows.get(&row(i / 2).id).unwrap(), Some(row(i / 2)));
        }
        assert!(rows.rows.end > 2 * PENDING as u64 && !rows.rows.pending.is_empty(), "on disk and in memory");
        assert_eq!(rows.rows.iter().map(Result::unwrap).collect::<Vec<_>>(), (0..count).map(row).collect::<Vec<_>>());
        assert!(!rows.contains("row") && rows.get("row").unwrap().is_none() && rows.rows.row(count).is_err());
        rows.push(&row(7).id, &row(8)).unwrap();
        assert_eq!(rows.get(&row(7).id).unwrap(), Some(row(8)), "the last of an id");
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0, "a scratch file has no name");
    }

    #[test]
    fn a_file_is_read_with_its_empty_lines_and_a_bad_line_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("rows.jsonl");
        let line = |i: usize| serde_json::to_string(&row(i)).unwrap();
        std::fs::write(&path, format!("{}\n\n  \n{}\r\n{}", line(1), line(2), line(1))).unwrap();
        let rows = RowsById::<Row>::open(&path).unwrap();
        assert_eq!((rows.rows.len(), rows.rows.is_empty()), (3, false));
        assert_eq!(rows.get(&row(2).id).unwrap(), Some(row(2)));
        assert_eq!(RowFile::<Row>::open(&path).unwrap().row(2).unwrap(), row(1));
        std::fs::write(&path, format!("{}\n\n{{\"text\": \"\"}}\n", line(1))).unwrap();
        assert!(RowsById::<Row>::open(&path).unwrap_err().to_string().contains("rows.jsonl:3"));
    }
}
