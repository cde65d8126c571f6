//! Where the files of a data set lie: folders, snapshots of the Hugging Face hub, splits in file names.

use std::{
    fs,
    path::{Path, PathBuf},
};

use crate::{
    error::{Error, Kind, Result},
    sample::Split,
};

/// The folder that holds the files: `path` itself, or the snapshot inside a repository of the hub's cache
/// (`datasets--owner--name`), the one `refs/main` names or the only one.
///
/// # Errors
/// A repository of the cache with several snapshots of which none is main.
pub(crate) fn snapshot(path: &Path) -> Result<PathBuf> {
    let snapshots = path.join("snapshots");
    if !snapshots.is_dir() {
        return Ok(path.to_path_buf());
    }
    if let Ok(main) = fs::read_to_string(path.join("refs/main")) {
        let main = snapshots.join(main.trim());
        if main.is_dir() {
            return Ok(main);
        }
    }
    match entries(&snapshots)?.as_slice() {
        [only] => Ok(only.clone()),
        several => Err(Error::new(Kind::Data, "cannot tell which snapshot of the hub's cache to read")
            .at(snapshots.display())
            .found(format!("{} snapshots", several.len()))
            .help("name the folder of one of them as data.path")),
    }
}

/// The split that a file name states as a word of its own, for example `train-00000-of-00001.parquet`, `testset.json`,
/// `valid_captions.csv`; by the name of the folder where the file's says nothing.
pub(crate) fn split_of(path: &Path) -> Option<Split> {
    let stem = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
    let folder = path.parent().and_then(Path::file_name).unwrap_or_default().to_string_lossy().into_owned();
    [stem, folder].iter().find_map(|name| name.split(|c: char| !c.is_alphanumeric()).find_map(split_word))
}

/// The split that a word means.
pub(crate) fn split_word(word: &str) -> Option<Split> {
    match word.to_lowercase().as_str() {
        "train" | "training" | "trainset" => Some(Split::Train),
        "validation" | "valid" | "validate" | "val" | "dev" | "valset" => Some(Split::Validation),
        "test" | "testing" | "testset" => Some(Split::Test),
        _ => None,
    }
}

/// Files of these names that are in `dir`, in this order.
pub(crate) fn existing(dir: &Path, names: &[&str]) -> Vec<PathBuf> {
    names.iter().map(|name| dir.join(name)).filter(|path| path.is_file()).collect()
}

/// All files with an extension in `dir` and `depth` levels of folders below it: train before validation before test,
/// then by name. Hidden folders are left out.
///
/// # Errors
/// A folder cannot be listed.
pub(crate) fn with_extension(dir: &Path, extension: &str, depth: usize) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    let mut open = vec![(dir.to_path_buf(), depth)];
    while let Some((dir, depth)) = open.pop() {
        for path in entries(&dir)? {
            let hidden = path.file_name().is_some_and(|n| n.to_string_lossy().starts_with('.'));
            if path.is_dir() {
                if depth > 0 && !hidden {
                    open.push((path, depth - 1));
                }
            } else if !hidden && path.extension().is_some_and(|e| e.eq_ignore_ascii_case(extension)) {
                found.push(path);
            }
        }
    }
    found.sort_by_cached_key(|path| (split_of(path), path.clone()));
    Ok(found)
}

fn entries(dir: &Path) -> Result<Vec<PathBuf>> {
    let failed = |e| {
        Error::new(Kind::Data, "cannot list a folder of the data set")
            .at(dir.display())
            .help("check data.path")
            .source(e)
    };
    let mut paths: Vec<PathBuf> = fs::read_dir(dir)
        .map_err(failed)?
        .map(|entry| entry.map(|e| e.path()).map_err(failed))
        .collect::<Result<_>>()?;
    paths.sort();
    Ok(paths)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn splits_are_words_of_names() {
        let split = |name: &str| split_of(Path::new(name));
        assert_eq!(split("data/train-00000-of-00001-ab12.parquet"), Some(Split::Train));
        assert_eq!(split("validate.json"), Some(Split::Validation));
        assert_eq!(split("val_vqa.json"), Some(Split::Validation));
        assert_eq!(split("testset.json"), Some(Split::Test));
        assert_eq!(split("valid/0000.parquet"), Some(Split::Validation));
        assert_eq!(split("contest.json"), None);
    }

    #[test]
    fn the_hubs_cache_is_looked_through() {
        let dir = tempfile::tempdir().unwrap();
        let repository = dir.path().join("datasets--a--b");
        for name in ["one", "two"] {
            fs::create_dir_all(repository.join("snapshots").join(name)).unwrap();
        }
        assert!(snapshot(&repository).is_err());
        fs::create_dir(repository.join("refs")).unwrap();
        fs::write(repository.join("refs/main"), "two\n").unwrap();
        assert_eq!(snapshot(&repository).unwrap(), repository.join("snapshots/two"));
        assert_eq!(snapshot(dir.path()).unwrap(), dir.path());
    }
}
