//! Recipes and overrides: errors all at once, and where every value came from.

use std::fs;

use super::medtune;

#[test]
fn every_error_of_a_recipe_is_reported_at_once_with_its_line() {
    let dir = tempfile::tempdir().unwrap();
    let recipe = "extends = \"phantom\"\nsede = 1\n\n[train]\nlerning_rate = 1e-4\nmax_steps = \"many\"\n[data]\n\
                  test_fraction = -0.5\n";
    fs::write(dir.path().join("r.toml"), recipe).unwrap();
    let said = medtune(dir.path(), &["plan", "r.toml", "--set", "adapter.r=0", "--set", "model.name=gpt"]).code(2);
    let said = said.blames(&[
        "r.toml:2: unknown key `sede`; did you mean `seed`? known keys of the top level: recipe, seed",
        "r.toml:5: unknown key `train.lerning_rate`; did you mean `train.learning_rate`? known keys of [train]: ",
        "r.toml:6: train.max_steps: expected a whole number, 0 or more, found \"many\"",
        "--set adapter.r=0: adapter.r: must be at least 1",
        "--set model.name=gpt: model.name: expected one of llava_med",
        "help: ",
    ]);
    assert!(said.out.is_empty(), "{}", said.out);
    assert!(!dir.path().join("run").exists(), "nothing is written before the plan stands");
}

#[test]
fn a_plan_says_where_each_value_came_from() {
    let dir = tempfile::tempdir().unwrap();
    fs::create_dir(dir.path().join("sub")).unwrap();
    fs::write(dir.path().join("sub/base.toml"), "extends = \"phantom\"\nseed = 5\n[train]\nmax_steps = 7\n").unwrap();
    fs::write(dir.path().join("sub/r.toml"), "extends = \"base.toml\"\n# more\n[train]\nmax_steps = 9\n").unwrap();
    let args = ["plan", "sub/r.toml", "--json", "--set", "train.learning_rate=3e-5", "--set", "model.preset=tiny"];
    let said = medtune(dir.path(), &args).code(0);
    let plan = said.json();
    let setting = |key: &str| {
        let all = plan["settings"].as_array().unwrap();
        all.iter().find(|s| s["key"] == key).unwrap_or_else(|| panic!("no {key}")).clone()
    };
    assert_eq!((&setting("seed")["value"], &setting("seed")["origin"]), (&5.into(), &"sub/base.toml:2".into()));
    assert_eq!(setting("train.max_steps")["value"], 9);
    assert_eq!(setting("train.max_steps")["origin"], "sub/r.toml:4");
    assert_eq!(setting("train.learning_rate")["value"], 3e-5);
    assert_eq!(setting("train.learning_rate")["origin"], "--set train.learning_rate=3e-5");
    assert_eq!(setting("train.adam_beta2")["origin"], "default");
    assert_eq!(plan["out"], "run/r");
    let text = medtune(dir.path(), &args[..2]).code(0).out;
    let line = text.lines().find(|l| l.starts_with("train.max_steps")).unwrap();
    assert!(line.contains('9') && line.ends_with("sub/r.toml:4"), "{line}");
}

#[test]
fn recipes_that_build_on_each_other_in_a_circle_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("a.toml"), "extends = \"b.toml\"\n").unwrap();
    fs::write(dir.path().join("b.toml"), "extends = \"a.toml\"\n").unwrap();
    medtune(dir.path(), &["plan", "a.toml"]).code(2).blames(&["b.toml:1: extends:", "circle"]);
    medtune(dir.path(), &["plan", "nowhere.toml"]).code(2).blames(&["1 problem", "nowhere.toml", "phantom"]);
}

#[test]
fn every_recipe_prints_and_plans() {
    let dir = tempfile::tempdir().unwrap();
    // where recipes look for their files
    for folder in ["VQA_RAD", "images"] {
        fs::create_dir(dir.path().join(folder)).unwrap();
    }
    fs::write(dir.path().join("llava_med_alignment.json"), "[]").unwrap();
    let list = medtune(dir.path(), &["recipes", "--json"]).code(0).json();
    let list = list.as_array().unwrap();
    assert!(!list.is_empty());
    for recipe in list {
        let name = recipe["name"].as_str().unwrap();
        let text = medtune(dir.path(), &["recipes", "show", name]).code(0).out;
        fs::write(dir.path().join("copy.toml"), text).unwrap();
        let own = medtune(dir.path(), &["plan", name, "--json"]).code(0).json();
        let copy = medtune(dir.path(), &["plan", "copy.toml", "--json"]).code(0).json();
        let values = |plan: &serde_json::Value| -> Vec<serde_json::Value> {
            plan["settings"].as_array().unwrap().iter().map(|s| s["value"].clone()).collect()
        };
        assert_eq!(values(&own), values(&copy), "{name}");
    }
    medtune(dir.path(), &["recipes", "show", "nothing"]).code(2).blames(&["nothing", "phantom"]);
}

#[test]
fn everything_that_is_listed_is_explained() {
    let dir = tempfile::tempdir().unwrap();
    for verb in ["recipes", "datasets"] {
        for entry in medtune(dir.path(), &[verb, "--json"]).code(0).json().as_array().unwrap() {
            let name = entry["name"].as_str().unwrap();
            assert!(medtune(dir.path(), &["explain", name]).code(0).out.contains(name));
        }
    }
    for row in medtune(dir.path(), &["models", "--json"]).code(0).json().as_array().unwrap() {
        medtune(dir.path(), &["explain", row["family"].as_str().unwrap()]).code(0);
    }
    let plan = medtune(dir.path(), &["plan", "phantom", "--json"]).code(0).json();
    let config = medtune::config::Config::new::<medtune::plan::Plan>();
    assert_eq!(plan["settings"].as_array().unwrap().len(), config.keys().len());
    for key in config.keys() {
        assert!(key.doc.len() > 5, "{} has no documentation", key.path);
    }
    let said = medtune(dir.path(), &["explain", "learning_rate"]).code(0);
    assert!(said.out.contains("train.learning_rate") && said.out.contains("default:"), "{}", said.out);
    medtune(dir.path(), &["explain", "lerning"]).code(2).blames(&["nothing is called `lerning`"]);
}
