//! The only writer of run artefacts: atomic replacement, hashes, one run at a time in a directory.

use std::path::{Path, PathBuf};

use crate::error::Result;

/// A run directory.
#[derive(Debug)]
pub struct RunDir {
    root: PathBuf,
}

impl RunDir {
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
}

/// Writes a whole file next to its place and renames it there, so that a reader sees the old or the new content.
///
/// # Errors
/// The directory cannot be written or the disk is full; an older version stays as it was.
pub fn write_atomic(path: &Path, bytes: &[u8]) -> Result<()> {
    use std::io::Write;

    use crate::error::Error;

    let dir = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    std::fs::create_dir_all(dir).map_err(|e| Error::io(dir, e))?;
    let mut file = tempfile::NamedTempFile::new_in(dir).map_err(|e| Error::io(dir, e))?;
    file.write_all(bytes).and_then(|()| file.as_file().sync_all()).map_err(|e| Error::io(path, e))?;
    file.persist(path).map_err(|e| Error::io(path, e.error))?;
    Ok(())
}
