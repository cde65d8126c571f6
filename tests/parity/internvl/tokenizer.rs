//! The slow tokenizers on real vocabularies.

use std::path::{Path, PathBuf};

use medtune::text::slow_tokenizer::SlowTokenizer;
use serde::Deserialize;

use crate::parity::fixture::{self, Checks};

#[derive(Deserialize)]
struct Case {
    text: String,
    ids: Vec<i32>,
    ids_no_special: Vec<i32>,
    decoded: String,
    decoded_skip_special: String,
}

pub(super) fn check(checks: &mut Checks) {
    let mut families = folders(&fixture::root("tokenizers"));
    families.retain(|dir| {
        std::fs::read_to_string(dir.join("added_tokens.json")).is_ok_and(|tokens| tokens.contains("<IMG_CONTEXT>"))
    });
    for dir in families {
        check_directory(&dir, None, checks);
        // Other revisions of the same vocabulary are folders that lack the large file.
        for revision in folders(&dir) {
            check_directory(&revision, Some(&dir.join("tokenizer.model")), checks);
        }
    }
}

fn folders(dir: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(dir).unwrap().map(|e| e.unwrap().path());
    let mut folders: Vec<PathBuf> = entries.filter(|p| p.is_dir()).collect();
    folders.sort();
    folders
}

fn check_directory(dir: &Path, vocabulary: Option<&Path>, checks: &mut Checks) {
    let cases: Vec<Case> = serde_json::from_str(&std::fs::read_to_string(dir.join("cases.json")).unwrap()).unwrap();
    let tokenizer = match vocabulary {
        None => SlowTokenizer::load(dir).unwrap(),
        Some(model) => {
            let joined = tempfile::tempdir().unwrap();
            for entry in std::fs::read_dir(dir).unwrap() {
                let entry = entry.unwrap();
                std::fs::copy(entry.path(), joined.path().join(entry.file_name())).unwrap();
            }
            std::fs::copy(model, joined.path().join("tokenizer.model")).unwrap();
            SlowTokenizer::load(joined.path()).unwrap()
        }
    };
    for case in &cases {
        let what = |part: &str| format!("{}: {part} of {:?}", dir.display(), case.text);
        checks.equal(&what("ids"), tokenizer.encode(&case.text, true), case.ids.clone());
        checks.equal(&what("plain ids"), tokenizer.encode(&case.text, false), case.ids_no_special.clone());
        checks.equal(&what("text"), tokenizer.decode(&case.ids, false), case.decoded.clone());
        checks.equal(&what("plain text"), tokenizer.decode(&case.ids, true), case.decoded_skip_special.clone());
    }
}
