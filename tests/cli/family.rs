//! Every family through the phantom recipe, from the model that is compiled in, and its switches and recipes.

use medtune::models::{MODELS, compat::SWITCHES, embedded};

use super::medtune;

/// The phantom recipe at a size that takes seconds.
const SMALL: [&str; 6] = [
    "data.images=20",
    "train.max_steps=2",
    "train.per_device_train_batch_size=4",
    "eval.rows=4",
    "generate.max_new_tokens=4",
    "train.eval_steps=0",
];

#[test]
fn every_family_runs_from_its_embedded_model_to_a_table() {
    let dir = tempfile::tempdir().unwrap();
    for family in MODELS.iter().filter(|m| embedded::find("phantom", m.name).is_ok()) {
        let name = format!("model.name={}", family.name);
        let mut args = vec!["run", "phantom", "--out", family.name, "--set", &name];
        args.extend(SMALL.iter().flat_map(|s| ["--set", s]));
        let said = medtune(dir.path(), &args).code(0);
        for part in ["base", "tuned", "Hallucination rate", "Refutation accuracy", "answers scored"] {
            assert!(said.out.contains(part), "{}: no {part} in\n{}", family.name, said.out);
        }
        let base = dir.path().join(family.name).join("base");
        assert_eq!(medtune::models::detect(&base).unwrap().name, family.name);
    }
}

#[test]
fn the_three_families_of_the_paper_have_an_embedded_model() {
    let dir = tempfile::tempdir().unwrap();
    for family in ["llava_med", "qwen_vl", "internvl"] {
        let said = medtune(dir.path(), &["plan", "phantom", "--set", &format!("model.name={family}"), "--json"]);
        let plan = said.code(0).json();
        let setting =
            |key: &str| plan["settings"].as_array().unwrap().iter().find(|s| s["key"] == key).unwrap()["value"].clone();
        assert_eq!((setting("model.name"), setting("model.checkpoint")), (family.into(), "embedded:phantom".into()));
        assert!(embedded::find("phantom", family).unwrap().files.iter().any(|(name, _)| *name == "config.json"));
    }
    let said = medtune(dir.path(), &["plan", "phantom", "--set", "model.checkpoint=embedded:x"]);
    said.code(2).blames(&["model.checkpoint", "x of llava_med", "phantom of qwen_vl"]);
}

#[test]
fn a_switch_of_another_family_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    for switch in SWITCHES {
        let value = if switch.name == "training_alpha" { "3.0" } else { "true" };
        let set = format!("model.compat.{}={value}", switch.name);
        for family in MODELS {
            let name = format!("model.name={}", family.name);
            let args = ["plan", "phantom", "--set", "model.checkpoint=", "--set", &name, "--set", &set];
            let said = medtune(dir.path(), &args);
            if family.name == switch.family {
                said.code(0);
            } else {
                said.code(2).blames(&[switch.name, switch.family]);
            }
        }
    }
}

#[test]
fn a_published_shape_is_planned_and_not_trained_from_random_weights() {
    let dir = tempfile::tempdir().unwrap();
    let args = |verb| {
        let set = ["model.checkpoint=", "model.preset=v1.5-7b", "data.images=4"];
        [&[verb, "phantom"][..], &set.map(|s| ["--set", s]).concat()].concat()
    };
    assert!(medtune(dir.path(), &args("plan")).code(0).out.contains("7566219264"));
    medtune(dir.path(), &args("encode")).code(2).blames(&["model.preset", "v1.5-7b", "model.checkpoint"]);
}
