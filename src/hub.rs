//! Downloads of data sets from the Hugging Face hub, each file checked and recorded. The only network access of this
//! program besides language-model servers, and only by `medtune data get`.
//!
//! `HF_ENDPOINT`, `HF_HOME`, `HF_TOKEN` and `HF_HUB_OFFLINE` mean what they mean to the hub's own tools; files land in the
//! same cache, so that nothing is fetched twice, and interrupted downloads continue.

use std::{
    fs,
    path::{Component, Path, PathBuf},
};

use hf_hub::{
    Cache, Repo, RepoType,
    api::sync::{ApiBuilder, ApiError, ApiRepo},
};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::{
    error::{Error, Kind, Result},
    progress::Progress,
    run_dir::{read_json, sha256, write_atomic},
};

/// Name of the record beside the data.
pub const RECORD: &str = "SOURCE.json";

/// Attempts to continue a download within one call.
const RETRIES: usize = 3;

/// What was downloaded, from where, and what it is: `SOURCE.json` beside the data.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Fetched {
    /// Repository, `owner/name`.
    pub repo: String,
    /// Revision that was asked for.
    pub revision: String,
    /// Commit that it was.
    pub commit: String,
    /// Files in order.
    pub files: Vec<FetchedFile>,
    /// When the download was complete, UTC.
    pub fetched: String,
}

/// A downloaded file.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct FetchedFile {
    /// Path in the repository and below the folder.
    pub path: String,
    /// Bytes.
    pub size: u64,
    /// SHA-256 of the content in hexadecimal digits.
    pub sha256: String,
    /// Whether the hub states the same hash; it does for large files.
    pub verified: bool,
}

/// A file as the hub lists it.
struct Listed {
    path: String,
    size: Option<u64>,
    sha256: Option<String>,
}

/// Fetches the files of a data set repository that match `patterns` (all, where there are none) into `dir`.
///
/// # Errors
/// The repository, revision or a file is not there, needs terms to be accepted, cannot be reached, or differs from what
/// the hub says of it; `HF_HUB_OFFLINE` is set and the files are not here already; the folder cannot be written.
pub fn fetch(repo: &str, revision: &str, patterns: &[&str], dir: &Path, progress: Progress) -> Result<Fetched> {
    let cache = Cache::from_env();
    if offline() {
        return from_record(repo, revision, dir);
    }
    let token = std::env::var("HF_TOKEN").ok().filter(|t| !t.trim().is_empty()).or_else(|| cache.token());
    let api = ApiBuilder::from_env().with_progress(false).with_retries(RETRIES).with_token(token);
    let api = api.build().map_err(|e| failed(e, repo, revision, None))?;
    let asked = Repo::with_revision(repo.to_string(), RepoType::Dataset, revision.to_string());
    let (commit, listed) = list(&api.repo(asked), repo, revision)?;
    let wanted = select(listed, patterns, repo)?;
    let pinned = Repo::with_revision(repo.to_string(), RepoType::Dataset, commit.clone());
    let remote = api.repo(pinned.clone());
    let mut files = Vec::new();
    let mut task = progress.start("download files", wanted.len() as u64);
    for file in &wanted {
        let path = remote.get(&file.path).or_else(|e| retry_whole(e, &remote, &cache, &pinned, file));
        let path = path.map_err(|e| failed(e, repo, revision, Some(&file.path)))?;
        files.push(check(file, &path, repo)?);
        place(&path, &dir.join(&file.path))?;
        task.advance(1);
    }
    task.finish();
    let fetched = Fetched {
        repo: repo.into(),
        revision: revision.into(),
        commit,
        files,
        fetched: jiff::Timestamp::now().strftime("%Y-%m-%dT%H:%M:%SZ").to_string(),
    };
    let mut text = serde_json::to_vec_pretty(&fetched)
        .map_err(|e| Error::new(Kind::Run, "the record of a download has no JSON form").source(e))?;
    text.push(b'\n');
    write_atomic(&dir.join(RECORD), &text)?;
    Ok(fetched)
}

/// Whether the environment forbids the network, as the hub's own tools read it.
fn offline() -> bool {
    let value = std::env::var("HF_HUB_OFFLINE").unwrap_or_default().to_uppercase();
    matches!(value.as_str(), "1" | "ON" | "YES" | "TRUE")
}

/// What an earlier download left, checked again.
fn from_record(repo: &str, revision: &str, dir: &Path) -> Result<Fetched> {
    let missing = |found: String| {
        Error::new(Kind::Data, "HF_HUB_OFFLINE is set, and the data set is not here")
            .at(dir.display())
            .expected(format!("{repo} at {revision}"))
            .found(found)
            .help("unset HF_HUB_OFFLINE to download it")
    };
    let path = dir.join(RECORD);
    if !path.is_file() {
        return Err(missing(format!("no {RECORD}")));
    }
    let fetched: Fetched = read_json(&path)?;
    if fetched.repo != repo || ![&fetched.revision, &fetched.commit].contains(&&revision.to_string()) {
        return Err(missing(format!("{} at {}", fetched.repo, fetched.revision)));
    }
    for file in &fetched.files {
        let path = dir.join(&file.path);
        if !path.is_file() || sha256(&path)? != file.sha256 {
            return Err(missing(format!("{} missing or changed", file.path)));
        }
    }
    Ok(fetched)
}

/// The commit of a revision and its files.
fn list(remote: &ApiRepo, repo: &str, revision: &str) -> Result<(String, Vec<Listed>)> {
    let reply = remote.info_request().query("blobs", "true").call();
    let reply = reply.map_err(|e| failed(ApiError::RequestError(Box::new(e)), repo, revision, None))?;
    let strange = || Error::new(Kind::Data, "the hub's list of files is not what it should be").at(repo);
    let text = reply.into_string().map_err(|e| strange().source(e))?;
    let value: Value = serde_json::from_str(&text).map_err(|e| strange().source(e))?;
    let commit = value["sha"].as_str().filter(|s| !s.is_empty()).ok_or_else(|| strange().expected("a commit"))?;
    let one = |entry: &Value| {
        let path = entry["rfilename"].as_str()?.to_string();
        let lfs = &entry["lfs"];
        let size = entry["size"].as_u64().or_else(|| lfs["size"].as_u64());
        Some(Listed { path, size, sha256: lfs["sha256"].as_str().map(str::to_lowercase) })
    };
    let files: Option<Vec<Listed>> = value["siblings"].as_array().and_then(|all| all.iter().map(one).collect());
    Ok((commit.to_string(), files.ok_or_else(|| strange().expected("a list of files"))?))
}

/// Files that match a pattern, none of which may leave the folder.
fn select(listed: Vec<Listed>, patterns: &[&str], repo: &str) -> Result<Vec<Listed>> {
    let mut set = globset::GlobSetBuilder::new();
    for pattern in patterns {
        let glob = globset::Glob::new(pattern);
        set.add(glob.map_err(|e| Error::new(Kind::Config, "not a pattern of file names").found(pattern).source(e))?);
    }
    let set = set.build().map_err(|e| Error::new(Kind::Config, "too many patterns").source(e))?;
    let housekeeping = |path: &str| path.starts_with('.') || path == RECORD;
    let wanted: Vec<Listed> = listed
        .into_iter()
        .filter(|f| !housekeeping(&f.path) && (patterns.is_empty() || set.is_match(&f.path)))
        .collect();
    if let Some(bad) =
        wanted.iter().find(|f| !Path::new(&f.path).components().all(|c| matches!(c, Component::Normal(_))))
    {
        return Err(Error::new(Kind::Data, "the hub lists a file outside its repository").at(repo).found(&bad.path));
    }
    if wanted.is_empty() {
        return Err(Error::new(Kind::Data, "the repository has none of the files that are needed")
            .at(repo)
            .expected(patterns.join(", "))
            .help("the repository may have changed: `--revision` names an older state"));
    }
    Ok(wanted)
}

/// A part that is already as long as the file makes the server refuse to continue it: then it is fetched anew, once.
fn retry_whole(
    error: ApiError,
    remote: &ApiRepo,
    cache: &Cache,
    repo: &Repo,
    file: &Listed,
) -> std::result::Result<PathBuf, ApiError> {
    let Some(hash) = file.sha256.as_ref().filter(|_| status(&error) == Some(416)) else { return Err(error) };
    let part = cache.path().join(repo.folder_name()).join("blobs").join(format!("{hash}.sync.part"));
    let _ = fs::remove_file(part);
    remote.download(&file.path)
}

/// Compares a file with what the hub says of it. One that differs is removed from the cache, to be fetched anew.
fn check(listed: &Listed, path: &Path, repo: &str) -> Result<FetchedFile> {
    let size = fs::metadata(path).map_err(|e| Error::io(path, e))?.len();
    let found = sha256(path)?;
    let wrong = |what: &str, expected: String, found: String| {
        let blob = fs::canonicalize(path);
        for file in [Some(path.to_path_buf()), blob.ok()].into_iter().flatten() {
            let _ = fs::remove_file(file);
        }
        Error::new(Kind::Data, format!("a downloaded file has another {what} than the hub states"))
            .at(format!("{repo}/{}", listed.path))
            .expected(expected)
            .found(found)
            .help("it was removed; run the same command again to fetch it anew")
    };
    if let Some(expected) = listed.size.filter(|expected| *expected != size) {
        return Err(wrong("size", expected.to_string(), size.to_string()));
    }
    if let Some(expected) = listed.sha256.as_ref().filter(|expected| **expected != found) {
        return Err(wrong("checksum", expected.clone(), found));
    }
    Ok(FetchedFile { path: listed.path.clone(), size, sha256: found, verified: listed.sha256.is_some() })
}

/// Puts a file of the cache where the user wants it, without a second copy where the file system allows.
fn place(cached: &Path, target: &Path) -> Result<()> {
    let source = fs::canonicalize(cached).map_err(|e| Error::io(cached, e))?;
    if let Some(dir) = target.parent() {
        fs::create_dir_all(dir).map_err(|e| Error::io(dir, e))?;
    }
    let temporary = target.with_file_name(format!(".tmp-{}", target.file_name().unwrap_or_default().to_string_lossy()));
    let _ = fs::remove_file(&temporary);
    if fs::hard_link(&source, &temporary).is_err() {
        fs::copy(&source, &temporary).map_err(|e| Error::io(&temporary, e))?;
    }
    fs::rename(&temporary, target).map_err(|e| Error::io(target, e))?;
    // A link onto itself is left in place by rename.
    let _ = fs::remove_file(&temporary);
    Ok(())
}

/// Status of a request that a server refused.
fn status(error: &ApiError) -> Option<u16> {
    let request = match error {
        ApiError::RequestError(request) => request,
        ApiError::TooManyRetries(inner) => return status(inner),
        _ => return None,
    };
    // The message is the only part of the error that can be read without taking it apart.
    let text = request.to_string();
    let code = text.split("status code ").nth(1)?;
    code.get(..3)?.parse().ok()
}

fn failed(error: ApiError, repo: &str, revision: &str, file: Option<&str>) -> Error {
    let at = file.map_or_else(|| format!("{repo} at {revision}"), |file| format!("{repo}/{file} at {revision}"));
    let endpoint = std::env::var("HF_ENDPOINT").unwrap_or_else(|_| "https://huggingface.co".into());
    let (what, help) = match status(&error) {
        Some(401 | 403) => (
            "the hub does not let this account read the data set",
            format!(
                "accept the terms at {endpoint}/datasets/{repo}, make a token at {endpoint}/settings/tokens, and set \
                 HF_TOKEN to it (a repository that does not exist gives the same answer)"
            ),
        ),
        Some(404) => ("the hub has no such data set, revision or file", "check the name and --revision".to_string()),
        Some(_) => ("the hub refused a request", "run the same command again later; it continues".to_string()),
        None => (
            "a download did not finish",
            "check the connection and HF_ENDPOINT, then run the same command again; it continues".to_string(),
        ),
    };
    Error::new(Kind::Data, what).at(at).help(help).source(error)
}
