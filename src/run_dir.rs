//! The only writer of run artefacts: atomic replacement, hashes, one run at a time in a directory.

use std::{
    fs::{self, File, OpenOptions, TryLockError},
    io::{BufRead, BufReader, BufWriter, Read, Seek, SeekFrom, Write},
    path::{Path, PathBuf},
};

use serde::{Serialize, de::DeserializeOwned};
use sha2::{Digest, Sha256};

use crate::error::{Error, Kind, Result};

/// File that holds the lock; its content says who holds it.
const LOCK: &str = ".lock";

/// A run directory, held exclusively until dropped.
#[derive(Debug)]
pub struct RunDir {
    root: PathBuf,
    // The lock lives as long as this handle, and the kernel drops it even when the process is killed.
    _lock: File,
}

impl RunDir {
    /// Creates the directory if needed and locks it.
    ///
    /// # Errors
    /// It cannot be created or written, or another process works in it.
    pub fn open(root: impl Into<PathBuf>) -> Result<Self> {
        let root = root.into();
        let unwritable = |e| {
            Error::new(Kind::Run, "cannot write the run directory")
                .at(root.display())
                .help("choose another directory with `--out DIR`")
                .source(e)
        };
        fs::create_dir_all(&root).map_err(unwritable)?;
        let path = root.join(LOCK);
        let mut lock =
            OpenOptions::new().create(true).truncate(false).read(true).write(true).open(&path).map_err(unwritable)?;
        match lock.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                let mut holder = String::new();
                let _ = lock.read_to_string(&mut holder);
                return Err(Error::new(Kind::Run, "another run is using this directory")
                    .at(root.display())
                    .found(format!("a lock held by process {}", holder.trim()))
                    .help("wait for it to end, or choose another directory with `--out DIR`"));
            }
            Err(TryLockError::Error(e)) => return Err(Error::io(&path, e)),
        }
        lock.set_len(0)
            .and_then(|()| lock.write_all(std::process::id().to_string().as_bytes()))
            .map_err(|e| Error::io(&path, e))?;
        Ok(Self { root, _lock: lock })
    }

    /// The directory itself.
    #[must_use]
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Path of `name` inside the directory.
    #[must_use]
    pub fn path(&self, name: impl AsRef<Path>) -> PathBuf {
        self.root.join(name)
    }

    /// Writes a whole file: temporary file beside it, flush, rename.
    ///
    /// # Errors
    /// The file cannot be written; an older version stays as it was.
    pub fn write(&self, name: &str, bytes: &[u8]) -> Result<()> {
        write_atomic(&self.path(name), bytes)
    }

    /// Writes a value as indented JSON, whole or not at all.
    ///
    /// # Errors
    /// The file cannot be written, or the value has no JSON form.
    pub fn write_json(&self, name: &str, value: &impl Serialize) -> Result<()> {
        let mut text = serde_json::to_vec_pretty(value).map_err(|e| no_json(&self.path(name), e))?;
        text.push(b'\n');
        self.write(name, &text)
    }

    /// Reads a JSON file of this directory.
    ///
    /// # Errors
    /// It is absent, not JSON, or not of this type.
    pub fn read_json<T: DeserializeOwned>(&self, name: &str) -> Result<T> {
        read_json(&self.path(name))
    }

    /// Writes rows, one JSON value a line, whole file or nothing.
    ///
    /// # Errors
    /// The file cannot be written, or a row has no JSON form.
    pub fn write_jsonl<T: Serialize>(&self, name: &str, rows: impl IntoIterator<Item = T>) -> Result<()> {
        let path = self.path(name);
        let mut temporary = temporary_for(&path)?;
        {
            let mut out = BufWriter::new(temporary.as_file_mut());
            for row in rows {
                serde_json::to_writer(&mut out, &row).map_err(|e| write_failed(&path, e))?;
                out.write_all(b"\n").map_err(|e| Error::io(&path, e))?;
            }
            out.flush().map_err(|e| Error::io(&path, e))?;
        }
        finish(temporary, &path)
    }

    /// Reads all rows of a JSONL file.
    ///
    /// # Errors
    /// It is absent, or a line is not a value of this type; the error names file and line.
    pub fn read_jsonl<T: DeserializeOwned>(&self, name: &str) -> Result<Vec<T>> {
        read_jsonl(&self.path(name))
    }

    /// Starts a JSONL file that takes its place when it is finished.
    ///
    /// # Errors
    /// The directory cannot be written.
    pub fn replace_jsonl(&self, name: &str) -> Result<JsonlReplacement> {
        JsonlReplacement::new(self.path(name))
    }

    /// Opens a JSONL file to continue it: returns the complete rows already there and a writer that adds more. A last
    /// line that a crash left half-written is cut off first.
    ///
    /// # Errors
    /// The file cannot be opened, or a complete line is not a value of this type.
    pub fn continue_jsonl<T: DeserializeOwned>(&self, name: &str) -> Result<(Vec<T>, JsonlWriter)> {
        let writer = self.append_jsonl(name)?;
        Ok((self.read_jsonl(name)?, writer))
    }

    /// As [`RunDir::continue_jsonl`], without reading the rows.
    ///
    /// # Errors
    /// The file cannot be opened.
    pub fn append_jsonl(&self, name: &str) -> Result<JsonlWriter> {
        let path = self.path(name);
        let mut file = OpenOptions::new()
            .create(true)
            .truncate(false)
            .read(true)
            .write(true)
            .open(&path)
            .map_err(|e| Error::io(&path, e))?;
        let end = end_of_last_line(&mut file).map_err(|e| Error::io(&path, e))?;
        file.set_len(end).and_then(|()| file.seek(SeekFrom::End(0))).map_err(|e| Error::io(&path, e))?;
        Ok(JsonlWriter { path, file })
    }

    /// Removes a file or a directory with all its content; nothing happens if it is absent.
    ///
    /// # Errors
    /// It cannot be removed.
    pub fn remove(&self, name: &str) -> Result<()> {
        let path = self.path(name);
        let outcome = if path.is_dir() { fs::remove_dir_all(&path) } else { fs::remove_file(&path) };
        match outcome {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(Error::io(&path, e)),
            _ => Ok(()),
        }
    }
}

/// Adds rows to a JSONL file. Each row reaches the operating system as one write, so a killed process leaves at most
/// one incomplete line at the end.
#[derive(Debug)]
pub struct JsonlWriter {
    path: PathBuf,
    file: File,
}

impl JsonlWriter {
    /// Adds a row.
    ///
    /// # Errors
    /// The disk is full, or the row has no JSON form.
    pub fn push(&mut self, row: &impl Serialize) -> Result<()> {
        let mut line = serde_json::to_vec(row).map_err(|e| no_json(&self.path, e))?;
        line.push(b'\n');
        self.file.write_all(&line).map_err(|e| Error::io(&self.path, e))
    }

    /// Waits until everything is on the disk.
    ///
    /// # Errors
    /// The disk failed.
    pub fn sync(&self) -> Result<()> {
        self.file.sync_all().map_err(|e| Error::io(&self.path, e))
    }
}

/// A JSONL file that is written row by row and appears as a whole: dropped unfinished, it leaves nothing.
#[derive(Debug)]
pub struct JsonlReplacement {
    path: PathBuf,
    out: BufWriter<tempfile::NamedTempFile>,
}

impl JsonlReplacement {
    /// Starts the file that will be `path`.
    ///
    /// # Errors
    /// The directory cannot be written.
    pub fn new(path: impl Into<PathBuf>) -> Result<Self> {
        let path = path.into();
        let out = BufWriter::with_capacity(1 << 18, temporary_for(&path)?);
        Ok(Self { path, out })
    }

    /// Adds a row.
    ///
    /// # Errors
    /// The disk is full, or the row has no JSON form.
    pub fn push(&mut self, row: &impl Serialize) -> Result<()> {
        serde_json::to_writer(&mut self.out, row).map_err(|e| write_failed(&self.path, e))?;
        self.out.write_all(b"\n").map_err(|e| Error::io(&self.path, e))
    }

    /// Adds a row that is JSON already, without a line feed.
    ///
    /// # Errors
    /// The disk is full.
    pub fn push_line(&mut self, line: &[u8]) -> Result<()> {
        self.out.write_all(line).and_then(|()| self.out.write_all(b"\n")).map_err(|e| Error::io(&self.path, e))
    }

    /// Puts the file in its place, flushed to disk.
    ///
    /// # Errors
    /// The disk is full; an older version stays as it was.
    pub fn finish(self) -> Result<()> {
        let temporary = self.out.into_inner().map_err(|e| Error::io(&self.path, e.into_error()))?;
        finish(temporary, &self.path)
    }
}

/// Lines of a JSONL file, read as they are needed; empty lines are skipped.
#[derive(Debug)]
pub struct Lines {
    path: PathBuf,
    file: BufReader<File>,
    number: usize,
    offset: u64,
}

/// A line of a JSONL file with its place.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Line {
    /// Line number, from 1.
    pub number: usize,
    /// Place of its first byte in the file.
    pub offset: u64,
    /// Its bytes, without the line feed.
    pub bytes: Vec<u8>,
}

impl Lines {
    /// Opens a file.
    ///
    /// # Errors
    /// It cannot be opened.
    pub fn open(path: impl Into<PathBuf>) -> Result<Self> {
        let path = path.into();
        let file = File::open(&path).map_err(|e| Error::io(&path, e))?;
        Ok(Self { path, file: BufReader::with_capacity(1 << 18, file), number: 0, offset: 0 })
    }
}

impl Iterator for Lines {
    type Item = Result<Line>;

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            let mut bytes = Vec::new();
            match self.file.read_until(b'\n', &mut bytes) {
                Ok(0) => return None,
                Err(e) => return Some(Err(Error::io(&self.path, e))),
                Ok(_) => {}
            }
            self.number += 1;
            let offset = self.offset;
            self.offset += bytes.len() as u64;
            if bytes.last() == Some(&b'\n') {
                bytes.pop();
            }
            if !bytes.trim_ascii().is_empty() {
                return Some(Ok(Line { number: self.number, offset, bytes }));
            }
        }
    }
}

impl Line {
    /// The row it holds; `path` is the file it is from.
    ///
    /// # Errors
    /// It is not a value of this type; the error names file and line.
    pub fn parse<T: DeserializeOwned>(&self, path: &Path) -> Result<T> {
        serde_json::from_slice(&self.bytes).map_err(|e| {
            Error::new(Kind::Run, "line is not a valid row")
                .at(format!("{}:{}", path.display(), self.number))
                .help("repair or delete the file, then run the same command again")
                .source(e)
        })
    }
}

/// Rows of a JSONL file, read as they are needed, so that memory does not grow with the file.
///
/// # Errors
/// It is absent; items are errors where a line is not a value of this type.
pub fn stream_jsonl<T: DeserializeOwned>(path: &Path) -> Result<impl Iterator<Item = Result<T>> + use<T>> {
    let owned = path.to_path_buf();
    Ok(Lines::open(path)?.map(move |line| line?.parse(&owned)))
}

/// Reads a JSON file.
///
/// # Errors
/// It is absent, not JSON, or not of this type.
pub fn read_json<T: DeserializeOwned>(path: &Path) -> Result<T> {
    let file = File::open(path).map_err(|e| Error::io(path, e))?;
    serde_json::from_reader(BufReader::new(file)).map_err(|e| {
        Error::new(Kind::Run, "file is not what it should be")
            .at(format!("{}:{}", path.display(), e.line()))
            .help("delete it and run the same command again")
            .source(e)
    })
}

/// Reads all rows of a JSONL file; empty lines are skipped.
///
/// # Errors
/// It is absent, or a line is not a value of this type; the error names file and line.
pub fn read_jsonl<T: DeserializeOwned>(path: &Path) -> Result<Vec<T>> {
    stream_jsonl(path)?.collect()
}

/// Writes a whole file next to its place and renames it there, so that a reader sees the old or the new content.
///
/// # Errors
/// The directory cannot be written or the disk is full; an older version stays as it was.
pub fn write_atomic(path: &Path, bytes: &[u8]) -> Result<()> {
    let mut temporary = temporary_for(path)?;
    temporary.write_all(bytes).map_err(|e| Error::io(path, e))?;
    finish(temporary, path)
}

/// Like [`write_atomic`], without waiting for the disk: for files that are compared before they are used again.
///
/// # Errors
/// As [`write_atomic`].
pub(crate) fn write_unsynced(path: &Path, bytes: &[u8]) -> Result<()> {
    let mut temporary = temporary_for(path)?;
    temporary.write_all(bytes).map_err(|e| Error::io(path, e))?;
    persist(temporary, path)
}

/// The bytes of a JSON file: indented, with a line feed at its end.
///
/// # Errors
/// The value has no JSON form.
pub fn json_file(value: &impl Serialize) -> Result<Vec<u8>> {
    let mut text = serde_json::to_vec_pretty(value).map_err(|e| no_json(Path::new("a JSON file"), e))?;
    text.push(b'\n');
    Ok(text)
}

/// Writes several files to a directory, each whole or not at all, in order.
///
/// # Errors
/// As [`write_atomic`].
pub fn write_files(dir: &Path, files: &[(&str, Vec<u8>)]) -> Result<()> {
    files.iter().try_for_each(|(name, bytes)| write_atomic(&dir.join(name), bytes))
}

/// SHA-256 of a file in lower-case hexadecimal digits; of a directory, over the names and hashes of all files in it.
///
/// # Errors
/// Something cannot be read.
pub fn sha256(path: &Path) -> Result<String> {
    let mut hash = Sha256::new();
    if path.is_dir() {
        for file in files_below(path)? {
            let name = file.strip_prefix(path).unwrap_or(&file);
            hash.update(name.to_string_lossy().as_bytes());
            hash.update([0]);
            hash.update(sha256(&file)?.as_bytes());
            hash.update([0]);
        }
    } else {
        let mut file = File::open(path).map_err(|e| Error::io(path, e))?;
        let mut buffer = vec![0; 1 << 20];
        loop {
            let n = file.read(&mut buffer).map_err(|e| Error::io(path, e))?;
            if n == 0 {
                break;
            }
            hash.update(&buffer[..n]);
        }
    }
    Ok(hex(&hash.finalize()))
}

/// SHA-256 of bytes in lower-case hexadecimal digits.
#[must_use]
pub fn sha256_bytes(bytes: &[u8]) -> String {
    hex(&Sha256::digest(bytes))
}

/// All files below a directory, sorted.
///
/// # Errors
/// A directory cannot be listed.
pub fn files_below(dir: &Path) -> Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    let mut open = vec![dir.to_path_buf()];
    while let Some(dir) = open.pop() {
        for entry in fs::read_dir(&dir).map_err(|e| Error::io(&dir, e))? {
            let path = entry.map_err(|e| Error::io(&dir, e))?.path();
            if path.is_dir() { open.push(path) } else { files.push(path) }
        }
    }
    files.sort();
    Ok(files)
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

/// A temporary file beside `path`, whose directory is created if needed.
pub(crate) fn temporary_for(path: &Path) -> Result<tempfile::NamedTempFile> {
    let dir = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    fs::create_dir_all(dir).map_err(|e| Error::io(dir, e))?;
    tempfile::Builder::new().prefix(".tmp-").tempfile_in(dir).map_err(|e| Error::io(dir, e))
}

/// Puts a temporary file in the place of `path`, flushed to disk.
pub(crate) fn finish(temporary: tempfile::NamedTempFile, path: &Path) -> Result<()> {
    temporary.as_file().sync_all().map_err(|e| Error::io(path, e))?;
    persist(temporary, path)
}

fn persist(temporary: tempfile::NamedTempFile, path: &Path) -> Result<()> {
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt;
        // Temporary files are private; results are for everybody who may read the directory.
        let _ = temporary.as_file().set_permissions(fs::Permissions::from_mode(0o644));
    }
    temporary.persist(path).map_err(|e| Error::io(path, e.error))?;
    Ok(())
}

fn no_json(path: &Path, source: serde_json::Error) -> Error {
    Error::new(Kind::Run, "value has no JSON form").at(path.display()).source(source)
}

fn write_failed(path: &Path, source: serde_json::Error) -> Error {
    if source.is_io() { Error::io(path, source.into()) } else { no_json(path, source) }
}

/// Offset just behind the last line feed.
fn end_of_last_line(file: &mut File) -> std::io::Result<u64> {
    let mut end = file.seek(SeekFrom::End(0))?;
    let mut buffer = [0; 4096];
    while end > 0 {
        let start = end.saturating_sub(buffer.len() as u64);
        let part = &mut buffer[..(end - start) as usize];
        file.seek(SeekFrom::Start(start))?;
        file.read_exact(part)?;
        if let Some(i) = part.iter().rposition(|b| *b == b'\n') {
            return Ok(start + i as u64 + 1);
        }
        end = start;
    }
    Ok(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scratch() -> (tempfile::TempDir, RunDir) {
        let dir = tempfile::tempdir().unwrap();
        let run = RunDir::open(dir.path().join("run")).unwrap();
        (dir, run)
    }

    #[test]
    fn a_second_run_in_one_directory_is_refused_until_the_first_ends() {
        let (_dir, run) = scratch();
        let error = RunDir::open(run.root()).unwrap_err();
        assert!(error.to_string().contains("another run is using this directory"), "{error}");
        assert!(error.to_string().contains(&std::process::id().to_string()), "{error}");
        let root = run.root().to_path_buf();
        drop(run);
        RunDir::open(root).unwrap();
    }

    #[test]
    fn a_directory_that_cannot_be_made_is_an_error_with_its_path() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let error = RunDir::open(file.path().join("run")).unwrap_err();
        assert!(error.to_string().contains(file.path().to_str().unwrap()), "{error}");
        assert!(error.help_line().is_some());
    }

    #[test]
    fn a_half_written_last_line_is_cut_and_the_rest_continues() {
        let (_dir, run) = scratch();
        fs::write(run.path("a.jsonl"), format!("1\n2\n{}", "3".repeat(9000))).unwrap();
        let (rows, mut writer) = run.continue_jsonl::<u32>("a.jsonl").unwrap();
        assert_eq!(rows, [1, 2]);
        writer.push(&7).unwrap();
        assert_eq!(run.read_jsonl::<u32>("a.jsonl").unwrap(), [1, 2, 7]);
        let (rows, _) = run.continue_jsonl::<u32>("new.jsonl").unwrap();
        assert!(rows.is_empty());
    }

    #[test]
    fn a_corrupt_line_is_named() {
        let (_dir, run) = scratch();
        fs::write(run.path("a.jsonl"), "1\n\nx\n4\n").unwrap();
        let error = run.read_jsonl::<u32>("a.jsonl").unwrap_err();
        assert!(error.to_string().contains("a.jsonl:3"), "{error}");
        assert!(run.continue_jsonl::<u32>("a.jsonl").is_err());
    }

    #[test]
    fn a_failed_write_leaves_the_old_content() {
        struct Bad;
        impl Serialize for Bad {
            fn serialize<S: serde::Serializer>(&self, _: S) -> Result<S::Ok, S::Error> {
                Err(serde::ser::Error::custom("no"))
            }
        }
        let (_dir, run) = scratch();
        run.write_jsonl("a.jsonl", [1, 2]).unwrap();
        assert!(run.write_jsonl("a.jsonl", [Bad]).is_err());
        assert_eq!(run.read_jsonl::<u32>("a.jsonl").unwrap(), [1, 2]);
        let leftovers = fs::read_dir(run.root()).unwrap().count();
        assert_eq!(leftovers, 2, "the lock and a.jsonl");
    }

    #[test]
    fn the_hash_of_a_directory_depends_on_names_and_content() {
        let (_dir, run) = scratch();
        run.write("d/a", b"1").unwrap();
        let first = sha256(&run.path("d")).unwrap();
        assert_eq!(sha256_bytes(b"1"), sha256(&run.path("d/a")).unwrap());
        run.write("d/sub/b", b"2").unwrap();
        let second = sha256(&run.path("d")).unwrap();
        run.write("d/a", b"3").unwrap();
        let third = sha256(&run.path("d")).unwrap();
        assert!(first != second && second != third && first != third);
    }
}
