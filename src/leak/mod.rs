//! Looks for test images and test questions in the training data: same bytes, nearly the same picture, same words.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    fmt,
    path::PathBuf,
};

use serde::{Deserialize, Serialize};

use crate::{
    error::{Error, Kind, Result},
    qc::{
        hash::{hash, hash_parts},
        words::normal,
    },
    sample::{Sample, Split},
};

pub mod firewall;
pub mod identity;
pub mod picture;

use firewall::Firewall;
use picture::{LookIndex, Pictures, alike};

/// Words of an n-gram that must not occur on both sides.
const NGRAM: usize = 8;

/// What training and test have in common.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct LeakReport {
    /// Different images of training and validation rows, by content.
    pub train_images: usize,
    /// Different images of test rows, by content.
    pub test_images: usize,
    /// Files whose exact content is in both, one path an image.
    pub shared_images: Vec<PathBuf>,
    /// Pairs (training file, test file) that look the same and are not byte for byte.
    pub similar_images: Vec<(PathBuf, PathBuf)>,
    /// Test rows whose image, question and answer are all in training.
    pub shared_rows: usize,
    /// Test questions of eight words or more.
    pub long_questions: usize,
    /// Of these, the ones that share eight words in a row with a training question.
    pub shared_questions: usize,
    /// The evaluation sets of `data.firewall.eval_sets`.
    #[serde(default)]
    pub eval_sets: Vec<EvalSetReport>,
}

/// What training has in common with an evaluation set.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct EvalSetReport {
    /// As the recipe names it.
    pub name: String,
    /// Rows that it tests.
    pub rows: usize,
    /// Rows of it that could not be read, and so not be compared.
    pub unreadable: usize,
    /// Its images.
    pub images: usize,
    /// Images of the whole data set, before quality control, that are among them.
    pub images_found: usize,
    /// Rows about such images that are still trained on; 0 when quality control is on.
    pub rows_trained_on: usize,
    /// Its questions of eight words or more.
    pub long_questions: usize,
    /// Of these, the ones that share eight words in a row with a training question.
    pub shared_questions: usize,
}

impl LeakReport {
    /// Whether images or rows are shared, which makes test numbers worthless.
    #[must_use]
    pub fn leaks(&self) -> bool {
        !self.shared_images.is_empty()
            || self.shared_rows > 0
            || self.eval_sets.iter().any(|set| set.rows_trained_on > 0)
    }

    /// The result in one line, to stand beside scores.
    #[must_use]
    pub fn line(&self) -> String {
        let verdict = if self.leaks() { "Leak found" } else { "No leak found" };
        let mut text = format!(
            "{verdict}: {} of {} test images are in training, {} look like a training image; {} of {} long test questions \
             share {NGRAM} words with one.",
            self.shared_images.len(),
            self.test_images,
            self.similar_images.iter().map(|(_, test)| test).collect::<BTreeSet<_>>().len(),
            self.shared_questions,
            self.long_questions,
        );
        for set in &self.eval_sets {
            text.push_str(&format!(
                " {}: {} of its images found, {} rows about them trained on; {} of {} long questions shared.",
                set.name, set.images_found, set.rows_trained_on, set.shared_questions, set.long_questions
            ));
        }
        text
    }

    /// The error of a run whose test split leaks.
    ///
    /// # Errors
    /// Images or rows are shared.
    pub fn gate(&self) -> Result<()> {
        if !self.leaks() {
            return Ok(());
        }
        if let Some(set) = self.eval_sets.iter().find(|set| set.rows_trained_on > 0) {
            return Err(Error::new(Kind::Gate, "training rows are about images of an evaluation set")
                .at(&set.name)
                .expected("none")
                .found(format!("{} rows", set.rows_trained_on))
                .help("turn quality control on, which rejects them, or set qc.allow_leaks = true"));
        }
        let example = self.shared_images.first().map_or_else(String::new, |p| format!(", for example {}", p.display()));
        Err(Error::new(Kind::Gate, "training and test share images")
            .expected("none in common")
            .found(format!("{} images{example}", self.shared_images.len()))
            .help("let medtune split by image (data.split = \"by_image\"), or set qc.allow_leaks = true"))
    }
}

impl fmt::Display for LeakReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "images: {} train, {} test", self.train_images, self.test_images)?;
        writeln!(f, "shared images: {}", self.shared_images.len())?;
        writeln!(f, "similar images: {}", self.similar_images.len())?;
        writeln!(f, "shared rows: {}", self.shared_rows)?;
        write!(f, "shared questions: {} of {} with {NGRAM} words or more", self.shared_questions, self.long_questions)?;
        for set in &self.eval_sets {
            write!(f, "\n\nevaluation set {}\nrows: {}, images: {}", set.name, set.rows, set.images)?;
            if set.unreadable > 0 {
                write!(f, "\nunreadable rows: {}", set.unreadable)?;
            }
            write!(f, "\nof its images in this data set: {}", set.images_found)?;
            write!(f, "\ntraining rows about them: {}", set.rows_trained_on)?;
            write!(
                f,
                "\nshared questions: {} of {} with {NGRAM} words or more",
                set.shared_questions, set.long_questions
            )?;
        }
        Ok(())
    }
}

/// Looks for what test rows have in common with all others.
#[must_use]
pub fn check(samples: &[Sample]) -> LeakReport {
    check_as(samples, |s| s.split)
}

/// As [`check`], with the split of each sample as `mark` gives it.
#[must_use]
pub fn check_as(samples: &[Sample], mark: impl Fn(&Sample) -> Split) -> LeakReport {
    let mut pictures = Pictures::default();
    pictures.look_at(samples.iter().flat_map(|s| &s.images).map(|i| i.path.as_path()));
    let firewall = Firewall::default();
    let (test, train): (Vec<&Sample>, Vec<&Sample>) = samples.iter().partition(|s| mark(s) == Split::Test);
    let mut check = LeakCheck::new(&pictures, &firewall);
    test.into_iter().for_each(|s| check.test(s));
    train.into_iter().for_each(|s| check.train(s));
    check.finish(true)
}

/// The comparison of training with test, row by row: first all rows of the test, then all others. Memory grows with the
/// test, not with training.
#[derive(Debug)]
pub struct LeakCheck<'a> {
    pictures: &'a Pictures,
    firewall: &'a Firewall,
    /// Positions of the pictures of either side.
    test_images: BTreeSet<usize>,
    train_images: BTreeSet<usize>,
    /// Test rows by image content, question and answer.
    rows: HashMap<u64, usize>,
    shared_rows: usize,
    grams: Grams,
    eval: Vec<(Grams, usize)>,
}

impl<'a> LeakCheck<'a> {
    /// Before the first row. `pictures` has every image of the rows; `firewall` has looked for them.
    #[must_use]
    pub fn new(pictures: &'a Pictures, firewall: &'a Firewall) -> Self {
        Self {
            pictures,
            firewall,
            test_images: BTreeSet::new(),
            train_images: BTreeSet::new(),
            rows: HashMap::new(),
            shared_rows: 0,
            grams: Grams::default(),
            eval: firewall.sets.iter().map(|set| (set.grams.clone(), 0)).collect(),
        }
    }

    /// Adds a row of the test.
    pub fn test(&mut self, sample: &Sample) {
        self.test_images.extend(sample.images.iter().filter_map(|i| self.pictures.index(&i.path)));
        *self.rows.entry(self.key(sample)).or_default() += 1;
        self.grams.add(grams(sample));
    }

    /// Adds a row that is trained on; every row of the test must have been added before.
    pub fn train(&mut self, sample: &Sample) {
        self.train_images.extend(sample.images.iter().filter_map(|i| self.pictures.index(&i.path)));
        self.shared_rows += self.rows.remove(&self.key(sample)).unwrap_or(0);
        let own = grams(sample);
        self.grams.see(&own);
        for (grams, _) in &mut self.eval {
            grams.see(&own);
        }
        if let Some(set) = self.firewall.set_of(sample, self.pictures) {
            self.eval[set].1 += 1;
        }
    }

    fn key(&self, sample: &Sample) -> u64 {
        let contents = sample.images.iter().filter_map(|i| self.pictures.get(&i.path)?.sha256.clone());
        let texts = [normal(&sample.question()), normal(sample.answer())];
        let parts: Vec<String> = contents.chain(texts).collect();
        hash_parts(&parts.iter().map(String::as_str).collect::<Vec<_>>())
    }

    /// The result; with `similar`, pictures that look alike are listed too.
    #[must_use]
    pub fn finish(self, similar: bool) -> LeakReport {
        let (train, test) = (self.by_content(&self.train_images), self.by_content(&self.test_images));
        let path = |i: &usize| self.pictures.all()[*i].path.clone();
        let mut shared: Vec<PathBuf> =
            test.iter().filter(|(content, _)| train.contains_key(*content)).map(|(_, i)| path(i)).collect();
        shared.sort();
        let sets = self.firewall.sets.iter().zip(self.firewall.images_found()).zip(&self.eval);
        LeakReport {
            train_images: train.len(),
            test_images: test.len(),
            shared_images: shared,
            similar_images: if similar { self.similar(&train, &test) } else { Vec::new() },
            shared_rows: self.shared_rows,
            long_questions: self.grams.questions(),
            shared_questions: self.grams.seen(),
            eval_sets: sets
                .map(|((set, images_found), (grams, rows_trained_on))| EvalSetReport {
                    name: set.name.clone(),
                    rows: set.rows,
                    unreadable: set.unreadable,
                    images: set.pictures.all().len(),
                    images_found,
                    rows_trained_on: *rows_trained_on,
                    long_questions: grams.questions(),
                    shared_questions: grams.seen(),
                })
                .collect(),
        }
    }

    /// The last picture of each content; files that cannot be read have none.
    fn by_content(&self, images: &BTreeSet<usize>) -> BTreeMap<&str, usize> {
        images.iter().filter_map(|i| Some((self.pictures.all()[*i].sha256.as_deref()?, *i))).collect()
    }

    fn similar(&self, train: &BTreeMap<&str, usize>, test: &BTreeMap<&str, usize>) -> Vec<(PathBuf, PathBuf)> {
        let all = self.pictures.all();
        let mut looks = LookIndex::default();
        for i in train.values() {
            if let Some(hash) = all[*i].hash {
                looks.add(*i, hash);
            }
        }
        let likely = test
            .iter()
            .filter(|(content, _)| !train.contains_key(*content))
            .filter_map(|(_, j)| Some((*j, all[*j].hash?)))
            .flat_map(|(j, hash)| looks.near(&hash).into_iter().map(move |i| (i, j)))
            .collect();
        let pairs = alike(all, all, likely).into_iter();
        let mut found: Vec<_> = pairs.map(|(i, j)| (all[i].path.clone(), all[j].path.clone())).collect();
        found.sort();
        found
    }
}

/// Word n-grams of questions, and which of them have been seen elsewhere.
#[derive(Debug, Clone, Default)]
pub struct Grams {
    /// N-grams of each question that has any.
    questions: Vec<Box<[u64]>>,
    known: HashMap<u64, bool>,
}

impl Grams {
    fn add(&mut self, grams: Vec<u64>) {
        if !grams.is_empty() {
            self.known.extend(grams.iter().map(|g| (*g, false)));
            self.questions.push(grams.into());
        }
    }

    fn see(&mut self, grams: &[u64]) {
        for gram in grams {
            if let Some(seen) = self.known.get_mut(gram) {
                *seen = true;
            }
        }
    }

    fn questions(&self) -> usize {
        self.questions.len()
    }

    /// Questions with an n-gram that has been seen.
    fn seen(&self) -> usize {
        self.questions.iter().filter(|grams| grams.iter().any(|g| self.known.get(g) == Some(&true))).count()
    }
}

/// Hashes of the word n-grams of a row's question.
fn grams(sample: &Sample) -> Vec<u64> {
    let text = normal(&sample.bare_question());
    let words: Vec<&str> = text.split(' ').collect();
    words.windows(NGRAM).map(|w| hash(w.join(" ").as_bytes())).collect()
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::{
        datasets::{MARKED_SPLIT, SampleSet},
        leak::picture::tests::picture,
        source::DataConfig,
    };

    fn row(path: &Path, question: &str, split: Split) -> Sample {
        let images = vec![crate::sample::ImageRef { path: path.into() }];
        Sample { images, split, ..crate::qc::tests::row(question, "Yes it is.") }
    }

    #[test]
    fn same_bytes_similar_pictures_and_same_words_are_found() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        picture(&path("a.png"), 1, 0);
        picture(&path("b.png"), 2, 0);
        picture(&path("b_brighter.png"), 2, 2);
        picture(&path("c.png"), 3, 0);
        std::fs::copy(path("a.png"), path("a_again.png")).unwrap();
        let long = "is there any sign of a tumor in the left lung";
        let rows = [
            row(&path("a.png"), "Is it large?", Split::Train),
            row(&path("b.png"), long, Split::Validation),
            row(&path("a_again.png"), "Is it large", Split::Test),
            row(&path("b_brighter.png"), &format!("Please say: {long}?"), Split::Test),
            row(&path("c.png"), "Is it on the left side of this new image?", Split::Test),
        ];
        let report = check(&rows);
        assert_eq!((report.train_images, report.test_images), (2, 3));
        assert_eq!(report.shared_images, [path("a_again.png")]);
        assert_eq!(report.similar_images, [(path("b.png"), path("b_brighter.png"))]);
        assert_eq!((report.shared_rows, report.long_questions, report.shared_questions), (1, 2, 1));
        assert!(report.leaks() && report.gate().is_err());
        let clean = check(&[rows[0].clone(), rows[1].clone(), rows[4].clone()]);
        assert!(clean.gate().is_ok() && clean.similar_images.is_empty());
    }

    #[test]
    fn different_phantoms_are_not_similar() {
        let dir = tempfile::tempdir().unwrap();
        let config = DataConfig { images: 90, ..DataConfig::default() };
        let set = SampleSet::load(&config, 4, dir.path()).unwrap();
        let report = check_as(set.samples(), |s| if s.origin.row % 2 == 0 { Split::Test } else { Split::Train });
        assert_eq!((report.train_images, report.test_images), (45, 45));
        assert!(!report.leaks());
        assert!(report.similar_images.len() < 9, "{:?}", report.similar_images);
    }

    /// With `MEDTUNE_VQA_RAD` set to a folder of the public release.
    #[test]
    fn vqa_rads_own_marks_share_as_many_images_as_its_json_says() {
        let Some(path) = std::env::var_os("MEDTUNE_VQA_RAD").map(PathBuf::from) else { return };
        let text = std::fs::read_to_string(path.join("VQA_RAD Dataset Public.json")).unwrap();
        let rows: Vec<serde_json::Value> = serde_json::from_str(&text).unwrap();
        let mut sides: HashMap<&str, [bool; 2]> = HashMap::new();
        for row in &rows {
            let test = row["phrase_type"].as_str().unwrap().starts_with("test");
            sides.entry(row["image_name"].as_str().unwrap()).or_default()[usize::from(test)] = true;
        }
        let expected = sides.values().filter(|s| s[0] && s[1]).count();
        let config = DataConfig { source: "vqa_rad".into(), path: Some(path), ..DataConfig::default() };
        let set = SampleSet::load(&config, 0, Path::new("")).unwrap();
        assert_eq!(set.samples().len(), rows.len());
        let marked = |s: &Sample| if s.meta[MARKED_SPLIT] == "test" { Split::Test } else { Split::Train };
        let report = check_as(set.samples(), marked);
        assert_eq!(report.shared_images.len(), expected);
        assert!(report.gate().is_err());
    }
}
