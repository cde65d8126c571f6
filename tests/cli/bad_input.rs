//! Bad rows and bad images: each ends in rejected.jsonl with its reason, and nothing is lost.

use std::{collections::BTreeMap, fs, path::Path};

use serde_json::{Value, json};

use super::medtune;

/// Good rows beside the bad ones.
const GOOD: usize = 24;

fn crc(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(!0u32, |crc, b| {
        (0..8).fold(crc ^ u32::from(*b), |c, _| if c & 1 == 1 { (c >> 1) ^ 0xEDB8_8320 } else { c >> 1 })
    })
}

/// A PNG file that claims to be 40,000 pixels wide and high.
fn giant(path: &Path) {
    picture(path, 0);
    let mut bytes = fs::read(path).unwrap();
    bytes[16..20].copy_from_slice(&40_000u32.to_be_bytes());
    bytes[20..24].copy_from_slice(&40_000u32.to_be_bytes());
    let sum = crc(&bytes[12..29]);
    bytes[29..33].copy_from_slice(&sum.to_be_bytes());
    fs::write(path, bytes).unwrap();
}

/// A picture that differs from the pictures of other seeds.
fn picture(path: &Path, seed: u32) {
    let pixel = |x: u32, y: u32| {
        let wave = ((x * (3 + seed % 7) + y * (5 + seed % 11) + seed * 37) % 256) as u8;
        image::Rgb([wave, wave.wrapping_mul(3), (x * y + seed) as u8])
    };
    image::RgbImage::from_fn(80, 72, pixel).save(path).unwrap();
}

fn row(id: &str, image: &Value, question: &str, answer: &str) -> Value {
    json!({ "id": id, "image": image, "conversations": [
        { "from": "human", "value": question }, { "from": "gpt", "value": answer },
    ]})
}

/// A data set with every kind of bad row, and the file that selects it.
fn data(dir: &Path) -> Vec<Value> {
    let images = dir.join("images");
    fs::create_dir(&images).unwrap();
    let mut rows = Vec::new();
    for i in 0..GOOD {
        let name = format!("good{i}.png");
        picture(&images.join(&name), i as u32);
        let organ = ["lung", "liver", "heart", "kidney", "spleen", "brain"][i % 6];
        let question = format!("<image>\nWhat does study number {i} show in the {organ}?");
        rows.push(row(
            &format!("good{i}"),
            &json!(name),
            &question,
            &format!("The {organ} has a finding of size {i}."),
        ));
    }
    picture(&images.join("whole.jpg"), 90);
    let jpeg = fs::read(images.join("whole.jpg")).unwrap();
    fs::write(images.join("truncated.jpg"), &jpeg[..jpeg.len() / 2]).unwrap();
    giant(&images.join("giant.png"));
    fs::write(images.join("text.png"), "this is no picture").unwrap();
    picture(&images.join("spare.png"), 91);
    let question = "<image>\nIs the heart of normal size?";
    let answer = "The heart is slightly enlarged.";
    rows.push(row("missing", &json!("nowhere.png"), question, answer));
    rows.push(row("truncated", &json!("truncated.jpg"), "<image>\nIs the aorta visible?", "The aorta is visible."));
    rows.push(row("giant", &json!("giant.png"), "<image>\nIs the trachea central?", "The trachea is central."));
    rows.push(row("no_picture", &json!("text.png"), "<image>\nIs a catheter present?", "No catheter is present."));
    rows.push(row("two_marks", &json!("spare.png"), "<image> <image>\nCompare both sides.", "Both sides are equal."));
    rows.push(row("masked", &json!("spare.png"), "<image>\nWhat about the pleura?", "   "));
    let long = (0..4000).map(|i| format!("finding {i} ")).collect::<String>();
    rows.push(row("over_long", &json!("spare.png"), "<image>\nList every detail.", &long));
    rows
}

const RECIPE: &str = "extends = \"phantom\"\n[data]\nsource = \"llava\"\npath = \"data.json\"\nimage_dir = \"images\"\n\
                      images = 0\n[model]\ncheckpoint = \"\"\npreset = \"tiny\"\n[qc]\nmax_drop_rate = 0.5\n";

fn ids(rows: &[Value], pointer: &str) -> Vec<String> {
    let mut ids: Vec<_> = rows.iter().map(|r| r.pointer(pointer).unwrap().as_str().unwrap().to_string()).collect();
    ids.sort();
    ids
}

fn jsonl(path: &Path) -> Vec<Value> {
    fs::read_to_string(path).unwrap().lines().map(|l| serde_json::from_str(l).unwrap()).collect()
}

#[test]
fn every_bad_row_is_set_aside_with_its_reason_and_none_is_lost() {
    let dir = tempfile::tempdir().unwrap();
    let rows = data(dir.path());
    fs::write(dir.path().join("data.json"), serde_json::to_vec(&rows).unwrap()).unwrap();
    fs::write(dir.path().join("r.toml"), RECIPE).unwrap();
    let said = medtune(dir.path(), &["encode", "r.toml", "--out", "run", "--json"]).code(0);
    let kept = jsonl(&dir.path().join("run/kept.jsonl"));
    let rejected = jsonl(&dir.path().join("run/rejected.jsonl"));
    assert_eq!(kept.len() + rejected.len(), rows.len(), "{}", said.err);
    let good: Vec<_> = ids(&kept, "/id");
    let expected: Vec<_> = ids(&rows[..GOOD], "/id");
    assert_eq!(good, expected, "{rejected:#?}");
    for row in &rejected {
        assert!(row["code"].as_str().is_some_and(|c| !c.is_empty()) && row["detail"].as_str().unwrap().len() > 10);
    }
    let mut codes: BTreeMap<String, usize> = BTreeMap::new();
    for row in &rejected {
        *codes.entry(row["code"].as_str().unwrap().to_string()).or_default() += 1;
    }
    let details: String = rejected.iter().map(|r| format!("{}\n", r["detail"].as_str().unwrap())).collect();
    for needle in ["nowhere.png", "truncated.jpg", "giant.png", "text.png", "<image>", "40000"] {
        assert!(details.contains(needle), "no {needle} in {details}");
    }
    assert!(codes.keys().any(|c| c.starts_with("image")), "{codes:?}");
    let stages = said.json()["stages"].clone();
    assert_eq!(stages.as_array().unwrap().last().unwrap()["stage"], "encode");
}

#[test]
fn data_check_finds_every_bad_row_before_a_run() {
    let dir = tempfile::tempdir().unwrap();
    let rows = data(dir.path());
    fs::write(dir.path().join("data.json"), serde_json::to_vec(&rows).unwrap()).unwrap();
    fs::write(dir.path().join("r.toml"), RECIPE).unwrap();
    let said = medtune(dir.path(), &["data", "check", "r.toml"]).code(1);
    let first: Vec<_> = said.out.lines().next().unwrap().split_whitespace().collect();
    assert_eq!(first, ["rows", &rows.len().to_string(), "3", "unreadable"]);
    for needle in ["nowhere.png", "truncated.jpg", "giant.png", "text.png"] {
        assert!(said.out.contains(needle), "no {needle} in {}", said.out);
    }
    assert!(!dir.path().join("run").exists());
    fs::write(dir.path().join("data.json"), serde_json::to_vec(&rows[..GOOD]).unwrap()).unwrap();
    medtune(dir.path(), &["data", "check", "r.toml"]).code(0);
}

#[test]
fn too_many_bad_rows_fail_the_gate() {
    let dir = tempfile::tempdir().unwrap();
    let rows = data(dir.path());
    fs::write(dir.path().join("data.json"), serde_json::to_vec(&rows).unwrap()).unwrap();
    fs::write(dir.path().join("r.toml"), RECIPE).unwrap();
    let args = ["encode", "r.toml", "--out", "run", "--set", "qc.max_drop_rate=0.01"];
    let said = medtune(dir.path(), &args).code(1);
    said.blames(&["error: ", "help: "]);
    assert!(dir.path().join("run/rejected.jsonl").exists(), "the reasons are there to be read");
}

#[test]
fn a_row_is_shown_with_labels_and_image_span() {
    let dir = tempfile::tempdir().unwrap();
    let rows = data(dir.path());
    fs::write(dir.path().join("data.json"), serde_json::to_vec(&rows[..GOOD]).unwrap()).unwrap();
    fs::write(dir.path().join("r.toml"), RECIPE).unwrap();
    medtune(dir.path(), &["encode", "r.toml", "--out", "run"]).code(0);
    let kept = jsonl(&dir.path().join("run/kept.jsonl"));
    let row = kept.iter().position(|r| r["split"] == "train").unwrap();
    let args = ["data", "show", "r.toml", "--out", "run", "--row", &row.to_string()];
    let shown = medtune(dir.path(), &[&args[..], &["--json"]].concat()).code(0).json();
    let tokens = shown["tokens"].as_array().unwrap();
    let image: Vec<_> = tokens.iter().filter(|t| t["image"] == 0).collect();
    assert!(image.len() > 1 && image.iter().all(|t| t["label"] == -100));
    let supervised: Vec<_> = tokens.iter().filter(|t| t["label"] != -100).collect();
    assert_eq!(supervised.len() as u64, shown["supervised"].as_u64().unwrap());
    assert!(supervised.iter().all(|t| t["label"] == t["id"]));
    let words: String = supervised.iter().map(|t| t["piece"].as_str().unwrap().replace('\u{2581}', " ")).collect();
    let answer = kept[row]["turns"][1]["text"].as_str().unwrap();
    assert!(words.contains(answer), "{answer:?} in {words:?}");
    let text = medtune(dir.path(), &args).code(0).out;
    assert!(text.contains("masked") && text.contains("image 0, "), "{text}");
    assert!(!text.contains('\x1b'), "no colours where nobody sees them");
    let far = medtune(dir.path(), &["data", "show", "r.toml", "--out", "run", "--row", "9999"]).code(2);
    far.blames(&["no such row at --row", "expected a number below"]);
}
