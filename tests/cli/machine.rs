//! Devices, the doctor, and run directories that cannot be used.

use std::fs;

use medtune::run_dir::RunDir;

use super::medtune;

#[test]
fn devices_and_doctor_speak_json() {
    let dir = tempfile::tempdir().unwrap();
    let devices = medtune(dir.path(), &["devices", "--json"]).code(0).json();
    let kinds: Vec<_> = devices.as_array().unwrap().iter().map(|d| d["kind"].as_str().unwrap()).collect();
    assert_eq!(kinds, ["cpu", "wgpu", "vulkan", "cuda"]);
    assert_eq!(devices[0]["compiled"], true);
    let doctor = medtune(dir.path(), &["doctor", "--json"]).json();
    let check = |name: &str| doctor.as_array().unwrap().iter().find(|c| c["name"] == name).unwrap().clone();
    assert_eq!(check("device")["ok"], true);
    assert_eq!(check("write access")["ok"], true);
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0, "the doctor leaves nothing behind");
}

#[test]
fn a_device_that_is_not_compiled_in_says_how_to_get_it() {
    if cfg!(feature = "cuda") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let said = medtune(dir.path(), &["run", "phantom", "--device", "cuda:1"]).code(2);
    said.blames(&["error: this build has no such backend at --device cuda:1", "help: ", "--features cuda"]);
    assert!(!dir.path().join("run").exists(), "nothing is written before the device is there");
}

#[test]
fn the_doctor_fails_where_nothing_can_be_written() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("file"), "").unwrap();
    let said = medtune(dir.path(), &["doctor", "--out", "file/below"]).code(1);
    assert!(said.out.contains("FAIL  write access"), "{}", said.out);
}

#[test]
fn a_directory_that_cannot_be_written_is_an_error_with_its_path() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("file"), "").unwrap();
    let said = medtune(dir.path(), &["build", "phantom", "--out", "file/run"]).code(2);
    said.blames(&["error: cannot write the run directory at file/run", "caused by: ", "help: ", "--out DIR"]);
}

#[test]
fn two_runs_in_one_directory_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let held = RunDir::open(dir.path().join("held")).unwrap();
    let said = medtune(dir.path(), &["build", "phantom", "--out", "held"]).code(2);
    said.blames(&["another run is using this directory", &std::process::id().to_string(), "help: "]);
    drop(held);
    let said = medtune(dir.path(), &["build", "phantom", "--out", "held", "--json", "--device", "cpu"]);
    assert!(!said.out.contains("another run"), "{}", said.out);
}

#[test]
fn errors_are_json_where_results_are() {
    let dir = tempfile::tempdir().unwrap();
    let said = medtune(dir.path(), &["plan", "nowhere.toml", "--json"]).code(2);
    let error = said.json();
    assert!(error["error"].as_str().unwrap().contains("nowhere.toml"));
    assert_eq!(error["exit_code"], 2);
    assert!(error["help"].is_string());
    assert!(said.err.is_empty(), "{}", said.err);
}
