//! What is exported can be read again, by this program and in the forms that others expect.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
};

use medtune::{
    datasets,
    device::DeviceSpec,
    error::Kind,
    export::{Exported, Format, Options, View, export},
    plan::Plan,
    progress::Progress,
    run_dir::{RunDir, read_jsonl},
    sample::{Polarity, Sample, Split},
    source::DataConfig,
    stage::{Ctx, build, qc},
};
use parquet::{
    file::reader::{FileReader, SerializedFileReader},
    record::{Field, Row},
};

/// A run of synthetic images up to quality control.
struct Run {
    root: tempfile::TempDir,
    kept: Vec<Sample>,
}

impl Run {
    fn new() -> Self {
        let root = tempfile::tempdir().unwrap();
        let mut plan = Plan::default();
        plan.data.images = 36;
        plan.construct.wrong_pair_rate = 0.2;
        plan.qc.max_template_share = 1.0;
        plan.qc.min_question_words = 3;
        plan.qc.min_answer_words = 2;
        let ctx = Ctx::new(DeviceSpec::Cpu, Progress::Silent).unwrap();
        let dir = RunDir::open(root.path().join("run")).unwrap();
        build::run(&plan, &dir, &ctx).unwrap();
        qc::run(&plan, &dir, &ctx).unwrap();
        let kept = dir.read_jsonl("kept.jsonl").unwrap();
        Self { root, kept }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.root.path().join(name)
    }

    fn export(&self, format: Format, view: &str) -> (PathBuf, Exported) {
        let out = self.path(&format!("{format:?}-{view}"));
        let options = Options { format, view: view.parse().unwrap() };
        let done = export(&self.path("run"), &out, options).unwrap();
        assert!(fs::read_dir(self.root.path()).unwrap().all(|e| {
            let name = e.unwrap().file_name();
            !name.to_string_lossy().starts_with(".tmp")
        }));
        (out, done)
    }
}

fn read(source: &str, file: &Path, image_dir: Option<PathBuf>) -> Vec<Sample> {
    let config = DataConfig { source: source.into(), path: Some(file.into()), image_dir, ..DataConfig::default() };
    let rows = datasets::find(source).unwrap().open(&config, 0, Path::new("")).unwrap();
    rows.map(Result::unwrap).collect()
}

/// What must survive of a row; images as bytes, because their names change.
type Essence = (String, Vec<Vec<u8>>, Vec<String>, Option<Polarity>, Option<String>, Option<String>, String);

fn essence(sample: &Sample) -> Essence {
    let images = sample.images.iter().map(|i| fs::read(&i.path).unwrap()).collect();
    let turns = sample.turns.iter().map(|t| format!("{:?} {}", t.role, t.text)).collect();
    let (category, annotation) = (sample.category.clone(), sample.annotation.clone());
    (sample.id.clone(), images, turns, sample.polarity, category, annotation, sample.group.clone())
}

fn of(rows: &[Sample], split: Split) -> Vec<Essence> {
    rows.iter().filter(|s| s.split == split).map(essence).collect()
}

const SPLITS: [(Split, &str); 3] = [(Split::Train, "train"), (Split::Validation, "validation"), (Split::Test, "test")];

#[test]
fn conversations_and_messages_come_back_the_same() {
    let run = Run::new();
    for (format, source, ending) in [(Format::Llava, "llava", "json"), (Format::Jsonl, "messages", "jsonl")] {
        let (out, done) = run.export(format, "all");
        assert_eq!(done.files.values().sum::<usize>(), run.kept.len());
        for (split, name) in SPLITS {
            let again = read(source, &out.join(format!("{name}.{ending}")), None);
            assert_eq!(again.iter().map(essence).collect::<Vec<_>>(), of(&run.kept, split), "{format:?} {name}");
            assert!(again.iter().all(|s| s.meta["marked_split"] == name && !s.meta.contains_key("wrong_pair")));
        }
        let card = fs::read_to_string(out.join("README.md")).unwrap();
        for part in
            ["---\nlicense: other", "size_categories:\n- n<1K", "| train |", "| `truth_mismatch` |", "No leak found"]
        {
            assert!(card.contains(part), "{part}\n{card}");
        }
        let again = export(&run.path("run"), &out, Options { format, view: View::default() });
        assert!(again.unwrap_err().to_string().contains("not empty"));
    }
}

#[test]
fn medhalltune_files_are_those_of_the_release() {
    let run = Run::new();
    let (out, done) = run.export(Format::Medhalltune, "all");
    let train = read("llava", &out.join("train.json"), Some(out.join("images")));
    let expected = run.kept.iter().filter(|s| s.split != Split::Test).count();
    assert_eq!((train.len(), done.files["train.json"]), (expected, expected));
    assert!(train.iter().all(|s| s.turns[0].text.ends_with("\n<image>") && s.polarity.is_some()));
    let mut ids = BTreeSet::new();
    for (polarity, name) in [(Polarity::Hallucination, "negative"), (Polarity::NonHallucination, "positive")] {
        let mut test = run.kept.iter().filter(|s| s.split == Split::Test && s.polarity == Some(polarity));
        let questions: Vec<serde_json::Value> = read_jsonl(&out.join(format!("{name}_qa.jsonl"))).unwrap();
        let answers: Vec<serde_json::Value> = read_jsonl(&out.join(format!("val_{name}_qa-filtered.jsonl"))).unwrap();
        assert!(!questions.is_empty() && questions.len() == answers.len());
        for (question, answer) in questions.iter().zip(&answers) {
            let sample = test.next().unwrap();
            let keys = |v: &serde_json::Value| v.as_object().unwrap().keys().cloned().collect::<Vec<_>>();
            assert_eq!(keys(question), ["question_id", "image", "question"]);
            assert_eq!(keys(answer), ["question_id", "image", "text", "gpt4_answer", "fig_caption"]);
            assert_eq!(question["question"], format!("{}\n<image>", sample.question()));
            assert_eq!((&question["question"], &question["question_id"]), (&answer["text"], &answer["question_id"]));
            assert_eq!(answer["gpt4_answer"], sample.answer());
            assert!(out.join("images").join(question["image"].as_str().unwrap()).is_file());
            assert!(ids.insert(question["question_id"].as_u64().unwrap()), "ids are unique over both files");
        }
        assert!(test.next().is_none());
    }
}

fn field<'a>(row: &'a Row, name: &str) -> &'a Field {
    row.get_column_iter().find(|(key, _)| *key == name).map(|(_, value)| value).unwrap()
}

fn text(field: &Field) -> Option<String> {
    match field {
        Field::Str(text) => Some(text.clone()),
        Field::Null => None,
        other => panic!("{other:?}"),
    }
}

#[test]
fn tables_hold_the_images_and_say_so() {
    let run = Run::new();
    let (out, done) = run.export(Format::Parquet, "all");
    for (split, name) in SPLITS {
        let file = format!("data/{name}-00000-of-00001.parquet");
        let reader = SerializedFileReader::new(fs::File::open(out.join(&file)).unwrap()).unwrap();
        let metadata = reader.metadata().file_metadata();
        let features = metadata.key_value_metadata().unwrap().iter().find(|kv| kv.key == "huggingface").unwrap();
        let features: serde_json::Value = serde_json::from_str(features.value.as_deref().unwrap()).unwrap();
        assert_eq!(features["info"]["features"]["image"]["_type"], "Image");
        let expected: Vec<&Sample> = run.kept.iter().filter(|s| s.split == split).collect();
        assert_eq!((metadata.num_rows() as usize, done.files[&file]), (expected.len(), expected.len()));
        for (row, sample) in reader.get_row_iter(None).unwrap().zip(expected) {
            let row = row.unwrap();
            assert_eq!(text(field(&row, "id")).unwrap(), sample.id);
            assert_eq!(text(field(&row, "question")).unwrap(), sample.question());
            assert_eq!(text(field(&row, "answer")).unwrap(), sample.answer());
            assert_eq!(text(field(&row, "category")), sample.category);
            let Field::Group(image) = field(&row, "image") else { panic!("no image") };
            let Field::Bytes(bytes) = field(image, "bytes") else { panic!("no bytes") };
            assert_eq!(bytes.data(), fs::read(&sample.images[0].path).unwrap());
            let Field::ListInternal(messages) = field(&row, "messages") else { panic!("no messages") };
            let said: Vec<String> = messages
                .elements()
                .iter()
                .map(|m| match m {
                    Field::Group(m) => text(field(m, "content")).unwrap(),
                    other => panic!("{other:?}"),
                })
                .collect();
            assert_eq!(said, sample.turns.iter().map(|t| t.text.clone()).collect::<Vec<_>>());
        }
    }
}

#[test]
fn views_keep_the_test_and_shrink_the_training() {
    let run = Run::new();
    let rows = |view: &str| -> BTreeMap<String, usize> { run.export(Format::Jsonl, view).1.files };
    let all = rows("all");
    for view in ["positive", "negative", "50%"] {
        let files = rows(view);
        assert_eq!(files["test.jsonl"], all["test.jsonl"]);
        assert!(files["train.jsonl"] < all["train.jsonl"], "{view}");
    }
    assert!(rows("no-qc")["train.jsonl"] > all["train.jsonl"]);
}

#[test]
fn preference_pairs_prefer_the_accepted_answer() {
    let run = Run::new();
    let (out, done) = run.export(Format::Dpo, "all");
    let rows: Vec<serde_json::Value> = read_jsonl(&out.join("dpo.jsonl")).unwrap();
    assert_eq!(rows.len(), done.files["dpo.jsonl"]);
    let answers: BTreeSet<&str> = run.kept.iter().map(Sample::answer).collect();
    for row in &rows {
        assert!(answers.contains(row["chosen"][0]["content"].as_str().unwrap()));
        assert_ne!(row["chosen"], row["rejected"]);
        assert!(out.join(row["images"][0].as_str().unwrap()).is_file());
    }
}

#[test]
fn a_folder_without_rows_is_refused_and_nothing_is_left() {
    let root = tempfile::tempdir().unwrap();
    let options = Options { format: Format::Llava, view: View::default() };
    let error = export(root.path(), &root.path().join("out"), options).unwrap_err();
    assert_eq!(error.kind(), Kind::Run);
    let run = Run::new();
    fs::remove_file(&run.kept[0].images[0].path).unwrap();
    let out = run.path("out");
    assert_eq!(export(&run.path("run"), &out, options).unwrap_err().kind(), Kind::Image);
    assert!(!out.exists() && fs::read_dir(run.root.path()).unwrap().count() == 1);
}
