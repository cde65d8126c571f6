//! A recipe, a reader, a rule and a judge from outside of the crate run like built-in ones.

use std::path::Path;

use medtune::{
    Registry, Result,
    judge::{Judge, JudgeDef, Judged, Outcome, Ruling, Stance},
    plan::Plan,
    qc::{QcContext, QcRule, Verdict},
    recipe::Recipe,
    sample::{ImageRef, Role, Sample, Split, Turn},
    source::{DataConfig, Samples, Source},
};

/// Two questions about each image.
struct Focus;

impl Recipe for Focus {
    fn name(&self) -> &'static str {
        "focus"
    }

    fn about(&self) -> &'static str {
        "Two questions an image, one of which its own rule rejects."
    }

    fn template(&self) -> &'static str {
        "recipe = \"focus\"\nextends = \"phantom\"\n[data]\nsource = \"grey\"\nimages = 12\n[judge]\nname = \"short\"\n\
         [qc]\nmax_drop_rate = 1.0\nmax_repeats = 0\nreject_duplicate_images = false\n[train]\nmax_steps = 2\nsave_steps = 1\neval_steps = 1\n[generate]\nmax_new_tokens = 4\n"
    }

    fn construct(&self, _plan: &Plan, sample: Sample) -> Result<Vec<Sample>> {
        let row = |i: usize, question: &str| {
            let mut row = sample.clone();
            row.id = format!("{}-{i}", sample.id);
            row.turns[0].text = format!("<image>\n{question}");
            row
        };
        Ok(vec![row(0, "Is this image in focus at all?"), row(1, "Is this image in frobnicated focus?")])
    }

    fn judge(&self, plan: &Plan) -> Result<Box<dyn Judge>> {
        Short.open(plan)
    }
}

/// Grey images.
struct Grey;

impl Source for Grey {
    fn name(&self) -> &'static str {
        "grey"
    }

    fn doc(&self) -> &'static str {
        "Draws grey images."
    }

    fn open(&self, config: &DataConfig, _seed: u64, work_dir: &Path) -> Result<Samples> {
        let dir = work_dir.join("images");
        std::fs::create_dir_all(&dir).unwrap();
        let rows: Vec<Result<Sample>> = (0..config.images)
            .map(|i| {
                let path = dir.join(format!("{i}.png"));
                let shade = image::Rgb([20 * i as u8, 10, 255 - 20 * i as u8]);
                image::RgbImage::from_fn(64, 64, |x, y| {
                    if (x * (i as u32 + 3) + y) % 7 > 3 { shade } else { image::Rgb([0; 3]) }
                })
                .save(&path)
                .unwrap();
                let turn = |role, text: &str| Turn { role, text: text.into() };
                Ok(Sample {
                    id: format!("grey-{i}"),
                    group: format!("grey-{i}"),
                    images: vec![ImageRef { path }],
                    turns: vec![
                        turn(Role::User, "<image>\nWhat?"),
                        turn(Role::Assistant, "Yes, this image is in focus."),
                    ],
                    ..Sample::default()
                })
            })
            .collect();
        Ok(Samples::new(rows.into_iter()))
    }
}

/// Rejects a word.
struct Frob;

impl QcRule for Frob {
    fn code(&self) -> &'static str {
        "frob"
    }

    fn doc(&self) -> &'static str {
        "Rejects rows that speak of frobnication. Example: \"frobnicated\"."
    }

    fn check(&self, sample: &Sample, _context: &QcContext) -> Result<Verdict> {
        let found = sample.question().contains("frobnicated");
        let detail = "it speaks of frobnication".to_string();
        Ok(if found { Verdict::Reject { code: "frob", detail } } else { Verdict::Keep })
    }
}

/// Likes short answers.
struct Short;

impl JudgeDef for Short {
    fn name(&self) -> &'static str {
        "short"
    }

    fn about(&self) -> &'static str {
        "An answer is right when it has fewer than ten words."
    }

    fn open(&self, _plan: &Plan) -> Result<Box<dyn Judge>> {
        Ok(Box::new(Self))
    }
}

impl Judge for Short {
    fn signature(&self) -> serde_json::Value {
        serde_json::json!({ "kind": "short" })
    }

    fn judge(&self, judged: Judged<'_>) -> Result<Ruling> {
        let correct = judged.answer.split_whitespace().count() < 10;
        let (stance, expected, reason) = (Stance::Unclear, Stance::Unclear, "short".to_string());
        Ok(Outcome::Scored { scores: None, agreement: None, stance, expected, correct, reason }.into())
    }
}

#[test]
fn plug_ins_from_outside_run_like_built_in_ones() {
    let twice = Registry::default().recipe(&medhalltune_again::Again).install().unwrap_err();
    assert!(twice.to_string().contains("medhalltune"), "{twice}");
    Registry::default().recipe(&Focus).dataset(&Grey).rule(&Frob).judge(&Short).install().unwrap();
    assert!(Registry::default().install().is_err(), "installed once");
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("run");
    let out = out.to_str().unwrap();
    for verb in [vec!["explain", "focus"], vec!["explain", "frob"], vec!["explain", "short"], vec!["explain", "grey"]] {
        medtune::registry::run([vec!["medtune"], verb, vec!["--quiet"]].concat()).unwrap();
    }
    medtune::registry::run(["medtune", "run", "focus", "--out", out, "--quiet", "--set", "data.test_fraction=0.25"])
        .unwrap();
    let rows = |name: &str| -> Vec<serde_json::Value> {
        let text = std::fs::read_to_string(Path::new(out).join(name)).unwrap();
        text.lines().map(|l| serde_json::from_str(l).unwrap()).collect()
    };
    let (kept, rejected, verdicts) = (rows("kept.jsonl"), rows("rejected.jsonl"), rows("verdicts.jsonl"));
    assert_eq!((kept.len(), rejected.len()), (12, 12));
    assert!(rejected.iter().all(|r| r["code"] == "frob"), "{rejected:?}");
    let test = kept.iter().filter(|r| r["split"] == serde_json::to_value(Split::Test).unwrap()).count();
    assert_eq!(verdicts.len(), 2 * test);
    assert!(test > 0 && verdicts.iter().all(|v| v["outcome"] == "scored" && v["reason"] == "short"));
    let report = std::fs::read_to_string(Path::new(out).join("report.json")).unwrap();
    assert!(report.contains("\"short\""), "the report names the judge");
}

mod medhalltune_again {
    use super::*;

    /// Takes a name that is taken.
    pub(super) struct Again;

    impl Recipe for Again {
        fn name(&self) -> &'static str {
            "medhalltune"
        }

        fn about(&self) -> &'static str {
            "A second one."
        }

        fn template(&self) -> &'static str {
            ""
        }

        fn judge(&self, plan: &Plan) -> Result<Box<dyn Judge>> {
            Short.open(plan)
        }
    }
}
