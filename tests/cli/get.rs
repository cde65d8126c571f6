//! `data get` against a hub on the loopback device.

use std::{
    io::{BufRead, BufReader, Write},
    net::{TcpListener, TcpStream},
    path::{Path, PathBuf},
    process::{Command, Output},
    sync::{Arc, Mutex},
};

use medtune::{
    hub::{Fetched, RECORD},
    run_dir::sha256_bytes,
};
use serde_json::{Value, json};

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";
const REPO: &str = "flaviagiammarino/vqa-rad";

/// How the hub behaves.
#[derive(Default, Clone)]
struct Manners {
    /// Status of every answer.
    refuse: Option<u16>,
    /// Checksums it states are of something else.
    lie: bool,
    /// The first download of each file ends after this many bytes.
    cut: Option<usize>,
}

struct Hub {
    endpoint: String,
    /// Path, range and authorization of each request.
    requests: Arc<Mutex<Vec<(String, String, String)>>>,
}

fn files() -> Vec<(&'static str, Vec<u8>)> {
    let big: Vec<u8> = (0..200_000u32).map(|i| (i * 7 % 251) as u8).collect();
    vec![
        ("README.md", b"# data".to_vec()),
        ("data/test-00000-of-00001-ab.parquet", b"PAR1 small PAR1".to_vec()),
        ("data/train-00000-of-00001-cd.parquet", big),
    ]
}

impl Hub {
    fn start(manners: Manners) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let endpoint = format!("http://{}", listener.local_addr().unwrap());
        let requests = Arc::new(Mutex::new(Vec::new()));
        let seen = requests.clone();
        std::thread::spawn(move || {
            let mut cut: Vec<String> = Vec::new();
            for stream in listener.incoming() {
                let _ = answer(stream.unwrap(), &manners, &seen, &mut cut);
            }
        });
        Self { endpoint, requests }
    }

    fn ranges(&self, file: &str) -> Vec<String> {
        let seen = self.requests.lock().unwrap();
        seen.iter().filter(|(path, ..)| path.ends_with(file)).map(|(_, range, _)| range.clone()).collect()
    }
}

fn answer(
    mut stream: TcpStream,
    manners: &Manners,
    seen: &Mutex<Vec<(String, String, String)>>,
    cut: &mut Vec<String>,
) -> std::io::Result<()> {
    let mut lines = BufReader::new(stream.try_clone()?).lines();
    let first = lines.next().unwrap_or(Ok(String::new()))?;
    let path = first.split(' ').nth(1).unwrap_or_default().to_string();
    let (mut range, mut authorization) = (String::new(), String::new());
    for line in lines {
        let line = line?;
        if line.is_empty() {
            break;
        }
        let (name, value) = line.split_once(": ").unwrap_or_default();
        match name.to_lowercase().as_str() {
            "range" => range = value.to_string(),
            "authorization" => authorization = value.to_string(),
            _ => {}
        }
    }
    seen.lock().unwrap().push((path.clone(), range.clone(), authorization));
    if let Some(status) = manners.refuse {
        return write!(stream, "HTTP/1.1 {status} No\r\nContent-Length: 0\r\nConnection: close\r\n\r\n");
    }
    if path.starts_with("/api/datasets/") {
        let entry = |(name, bytes): &(&str, Vec<u8>)| {
            let stated = if manners.lie { sha256_bytes(b"something else") } else { sha256_bytes(bytes) };
            let large = name.ends_with(".parquet");
            let lfs = if large { json!({ "sha256": stated, "size": bytes.len() }) } else { Value::Null };
            json!({ "rfilename": name, "size": bytes.len(), "blobId": "b", "lfs": lfs })
        };
        let list: Vec<Value> = files().iter().map(entry).collect();
        let body = json!({ "sha": COMMIT, "siblings": list }).to_string();
        return write!(stream, "HTTP/1.1 200 OK\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{body}", body.len());
    }
    let prefix = format!("/datasets/{REPO}/resolve/{COMMIT}/");
    let found = files().into_iter().find(|(name, _)| path.strip_prefix(&prefix) == Some(name));
    let Some((name, bytes)) = found else {
        return write!(stream, "HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\nConnection: close\r\n\r\n");
    };
    let (from, to) = range.strip_prefix("bytes=").and_then(|r| r.split_once('-')).unwrap_or(("0", ""));
    let from: usize = from.parse().unwrap();
    let to: usize = to.parse::<usize>().map_or(bytes.len(), |to| to + 1);
    let part = &bytes[from..to];
    write!(
        stream,
        "HTTP/1.1 206 Partial Content\r\nx-repo-commit: {COMMIT}\r\netag: \"{}\"\r\nContent-Range: bytes {from}-{}/{}\r\n\
         Content-Length: {}\r\nConnection: close\r\n\r\n",
        sha256_bytes(&bytes),
        to - 1,
        bytes.len(),
        part.len()
    )?;
    match manners.cut.filter(|n| part.len() > *n && !cut.iter().any(|c| c == name)) {
        Some(n) => {
            cut.push(name.to_string());
            stream.write_all(&part[..n])
        }
        None => stream.write_all(part),
    }
}

struct Place {
    _dir: tempfile::TempDir,
    out: PathBuf,
    home: PathBuf,
}

fn place() -> Place {
    let dir = tempfile::tempdir().unwrap();
    Place { out: dir.path().join("out"), home: dir.path().join("home"), _dir: dir }
}

fn get(endpoint: &str, place: &Place, more: &[(&str, &str)]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_medtune"))
        .args(["data", "get", "vqa_rad", "--json", "--quiet", "--out"])
        .arg(&place.out)
        .env("HF_ENDPOINT", endpoint)
        .env("HF_HOME", &place.home)
        .env_remove("HF_TOKEN")
        .env_remove("HF_HUB_OFFLINE")
        .envs(more.iter().copied())
        .output()
        .unwrap()
}

fn result(output: &Output) -> Value {
    serde_json::from_slice(&output.stdout).unwrap_or_else(|_| panic!("{output:?}"))
}

fn record(out: &Path) -> Fetched {
    serde_json::from_slice(&std::fs::read(out.join(RECORD)).unwrap()).unwrap()
}

#[test]
fn files_are_fetched_verified_and_recorded_once() {
    let (hub, place) = (Hub::start(Manners::default()), place());
    let output = get(&hub.endpoint, &place, &[("HF_TOKEN", "hf_planted_token")]);
    assert!(output.status.success(), "{output:?}");
    let record = record(&place.out);
    assert_eq!((record.repo.as_str(), record.revision.as_str(), record.commit.as_str()), (REPO, "main", COMMIT));
    // The patterns of the reader leave the README out.
    assert_eq!(record.files.len(), 2);
    for (file, (name, bytes)) in record.files.iter().zip(files().into_iter().skip(1)) {
        assert_eq!(
            (file.path.as_str(), file.sha256.as_str(), file.verified),
            (name, sha256_bytes(&bytes).as_str(), true)
        );
        assert_eq!(std::fs::read(place.out.join(name)).unwrap(), bytes);
    }
    assert_eq!(result(&output)["licence"], "CC0 1.0");
    let seen = hub.requests.lock().unwrap().clone();
    assert!(seen.iter().all(|(_, _, authorization)| authorization == "Bearer hf_planted_token"));
    let everything = format!("{output:?}") + &std::fs::read_to_string(place.out.join(RECORD)).unwrap();
    assert!(!everything.contains("hf_planted_token"));
    // What is in the cache is not fetched again; without a network the record is enough.
    let before = hub.ranges("parquet").len();
    assert!(get(&hub.endpoint, &place, &[]).status.success());
    assert_eq!(hub.ranges("parquet").len(), before);
    let offline = [("HF_HUB_OFFLINE", "1")];
    assert!(get("http://127.0.0.1:1", &place, &offline).status.success());
    std::fs::remove_file(place.out.join(&record.files[0].path)).unwrap();
    let output = get("http://127.0.0.1:1", &place, &offline);
    assert!(result(&output)["error"].as_str().unwrap().contains("HF_HUB_OFFLINE"), "{output:?}");
}

#[test]
fn an_interrupted_download_continues_where_it_was_cut() {
    let (hub, place) = (Hub::start(Manners { cut: Some(70_000), ..Manners::default() }), place());
    let output = get(&hub.endpoint, &place, &[]);
    assert!(output.status.success(), "{output:?}");
    let ranges = hub.ranges("train-00000-of-00001-cd.parquet");
    assert!(ranges.contains(&"bytes=0-".to_string()) && ranges.contains(&"bytes=70000-".to_string()), "{ranges:?}");
    let (name, bytes) = files().swap_remove(2);
    assert_eq!(std::fs::read(place.out.join(name)).unwrap(), bytes);
}

#[test]
fn a_file_that_differs_from_its_checksum_is_removed_and_refused() {
    let (hub, place) = (Hub::start(Manners { lie: true, ..Manners::default() }), place());
    for _ in 0..2 {
        let before = hub.ranges("ab.parquet").len();
        let output = get(&hub.endpoint, &place, &[]);
        assert_eq!(output.status.code(), Some(2));
        assert!(result(&output)["error"].as_str().unwrap().contains("checksum"), "{output:?}");
        assert!(hub.ranges("ab.parquet").len() > before, "a refused file is fetched anew");
        assert!(!place.out.join(RECORD).exists());
    }
}

#[test]
fn refusals_say_what_to_do() {
    for (status, help) in [(401, "HF_TOKEN"), (403, "accept the terms"), (404, "--revision"), (503, "later")] {
        let (hub, place) = (Hub::start(Manners { refuse: Some(status), ..Manners::default() }), place());
        let output = get(&hub.endpoint, &place, &[]);
        assert_eq!(output.status.code(), Some(2), "{status}");
        assert!(result(&output)["help"].as_str().unwrap().contains(help), "{status}: {output:?}");
    }
    let nobody = get("http://127.0.0.1:1", &place(), &[]);
    assert!(result(&nobody)["help"].as_str().unwrap().contains("HF_ENDPOINT"), "{nobody:?}");
}
