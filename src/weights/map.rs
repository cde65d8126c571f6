//! Files that are mapped into memory, and which of their pages are there.
//!
//! A file is mapped once, however often it is opened, so that whoever opens it again can say of the same pages that they
//! are not needed for now.

use std::{
    fs::File,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use memmap2::Mmap;

use crate::error::{Error, Result};

/// No page is smaller.
const PAGE: usize = 4096;

/// A file in memory.
#[derive(Debug)]
pub(super) struct MappedFile {
    map: Mmap,
    /// Whether its pages are read when they are used and dropped afterwards.
    streamed: AtomicBool,
}

impl MappedFile {
    /// The map of the file at `path`; the one that is there already, if it is open.
    pub(super) fn open(path: &Path) -> Result<Arc<Self>> {
        let file = File::open(path).map_err(|e| Error::io(path, e))?;
        known::find_or(&file, || {
            let map = map(&file).map_err(|e| Error::io(path, e))?;
            Ok(Arc::new(Self { map, streamed: AtomicBool::new(false) }))
        })
    }

    pub(super) fn bytes(&self) -> &[u8] {
        &self.map
    }

    pub(super) fn part(self: &Arc<Self>, start: usize, end: usize) -> Part {
        Part { file: self.clone(), start, end }
    }
}

#[cfg(unix)]
mod known {
    use std::{
        fs::File,
        os::unix::fs::MetadataExt,
        sync::{Arc, Mutex, PoisonError, Weak},
    };

    use super::{MappedFile, Result};

    /// The files that are open.
    pub(super) fn all() -> Vec<Arc<MappedFile>> {
        OPEN.lock().unwrap_or_else(PoisonError::into_inner).iter().filter_map(|(_, file)| file.upgrade()).collect()
    }

    /// Device, number and length of a file. While a map holds the file, no other one gets its number.
    type Identity = (u64, u64, u64);

    static OPEN: Mutex<Vec<(Identity, Weak<MappedFile>)>> = Mutex::new(Vec::new());

    pub(super) fn find_or(file: &File, open: impl FnOnce() -> Result<Arc<MappedFile>>) -> Result<Arc<MappedFile>> {
        let Ok(meta) = file.metadata() else { return open() };
        let identity = (meta.dev(), meta.ino(), meta.len());
        let mut all = OPEN.lock().unwrap_or_else(PoisonError::into_inner);
        all.retain(|(_, file)| file.strong_count() > 0);
        if let Some(found) = all.iter().filter(|(known, _)| *known == identity).find_map(|(_, file)| file.upgrade()) {
            return Ok(found);
        }
        let opened = open()?;
        all.push((identity, Arc::downgrade(&opened)));
        Ok(opened)
    }
}

#[cfg(not(unix))]
mod known {
    use std::{fs::File, sync::Arc};

    use super::{MappedFile, Result};

    pub(super) fn all() -> Vec<Arc<MappedFile>> {
        Vec::new()
    }

    pub(super) fn find_or(_file: &File, open: impl FnOnce() -> Result<Arc<MappedFile>>) -> Result<Arc<MappedFile>> {
        open()
    }
}

#[expect(unsafe_code, reason = "a memory map is the way to read 15 GB of weights without a copy")]
fn map(file: &File) -> std::io::Result<Mmap> {
    // SAFETY: the file is only read; a checkpoint that another process shortens meanwhile ends this process, as it
    // would end any program that maps it.
    unsafe { Mmap::map(file) }
}

/// Takes the pages of all files that are streamed out of this process; the next use reads them again.
pub(super) fn release_streamed() {
    for file in known::all() {
        let whole = file.part(0, file.map.len());
        if whole.is_streamed() {
            whole.release();
        }
    }
}

/// A part of a mapped file that keeps the map alive.
#[derive(Debug, Clone)]
pub(super) struct Part {
    file: Arc<MappedFile>,
    start: usize,
    end: usize,
}

impl AsRef<[u8]> for Part {
    fn as_ref(&self) -> &[u8] {
        &self.file.map[self.start..self.end]
    }
}

impl Part {
    pub(super) fn num_bytes(&self) -> u64 {
        (self.end - self.start) as u64
    }

    pub(super) fn is_streamed(&self) -> bool {
        self.file.streamed.load(Ordering::Relaxed)
    }

    /// From now on, its file is not read ahead of its use.
    pub(super) fn stream(&self) {
        self.file.streamed.store(true, Ordering::Relaxed);
    }

    /// Reads it into memory.
    pub(super) fn touch(&self) {
        for at in (self.start..self.end).step_by(PAGE) {
            std::hint::black_box(self.file.map[at]);
        }
    }

    /// Asks the system to read it ahead; only a hint.
    pub(super) fn expect(&self) {
        #[cfg(unix)]
        let _ = self.file.map.advise_range(memmap2::Advice::WillNeed, self.start, self.end - self.start);
    }

    /// Takes its pages out of this process; the next use reads them again, from the system's cache or the disk.
    #[cfg_attr(unix, expect(unsafe_code, reason = "the advice that drops pages is not in the safe list"))]
    pub(super) fn release(&self) {
        #[cfg(unix)]
        // SAFETY: a page of a shared map of a file that nobody writes holds the same bytes when it is read again.
        let _ = unsafe {
            let advice = memmap2::UncheckedAdvice::DontNeed;
            self.file.map.unchecked_advise_range(advice, self.start, self.end - self.start)
        };
    }
}
