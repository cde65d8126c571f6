//! Devices, the doctor, and run directories that cannot be used.

use std::{fs, path::Path};

use medtune::run_dir::RunDir;

use super::medtune;

#[test]
fn devices_and_doctor_speak_json() {
    let dir = tempfile::tempdir().unwrap();
    let devices = medtune(dir.path(), &["devices", "--json"]).code(0).json();
    let kinds: Vec<_> = devices.as_array().unwrap().iter().map(|d| d["kind"].as_str().unwrap()).collect();
    assert_eq!(kinds, ["cpu", "wgpu", "vulkan", "cuda"]);
    assert_eq!(devices[0]["compiled"], true);
    let cpu = &devices[0]["devices"][0];
    assert!(cpu["limits"]["memory_bytes"].as_u64().unwrap() > 0);
    assert_eq!(cpu["limits"]["dtypes"][0], "float32");
    for kind in devices.as_array().unwrap() {
        let missing = kind["devices"].as_array().unwrap().is_empty();
        assert_eq!(kind["unavailable"].is_string(), missing, "{kind}");
    }
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
fn auto_runs_on_whatever_there_is_and_an_unknown_device_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let doctor = medtune(dir.path(), &["doctor", "--json", "--device", "auto"]).code(0).json();
    let device = doctor.as_array().unwrap().iter().find(|c| c["name"] == "device").unwrap()["found"].to_string();
    assert!(device.contains("known answers, all right"), "{device}");
    medtune(dir.path(), &["doctor", "--device", "gpu"]).code(2).blames(&["unknown device", "wgpu[:i]", "auto"]);
}

#[test]
fn a_device_is_compared_with_the_cpu_and_the_matrix_says_so() {
    let dir = tempfile::tempdir().unwrap();
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/llava_med");
    let (model, tower) = (golden.join("checkpoint"), golden.join("vision_tower"));
    let device = medtune::device::DeviceSpec::from_env().unwrap().to_string();
    let mut args = vec!["verify", model.to_str().unwrap(), "--vision-tower", tower.to_str().unwrap(), "--json"];
    args.extend(["--quiet", "--matrix", "matrix.md", "--device", &device]);
    let found = medtune(dir.path(), &args).code(0).json();
    let lines = found[0]["lines"].as_array().unwrap();
    let parts: Vec<_> = lines.iter().map(|l| l["part"].as_str().unwrap()).collect();
    assert_eq!(parts, medtune::verify::PARTS);
    assert!(lines.iter().all(|l| l["right"] == true), "{found}");
    let matrix = fs::read_to_string(dir.path().join("matrix.md")).unwrap();
    assert!(matrix.contains(&format!("| {device} |")) && !matrix.contains("wrong"), "{matrix}");
    medtune(dir.path(), &["verify", "nowhere"]).code(2).blames(&["config.json", "nowhere", "help: "]);
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
