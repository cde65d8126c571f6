//! A driver that computes wrong numbers without an error: SwiftShader under shaders in SPIR-V. Needs Debian's `chromium`
//! package, or another `vk_swiftshader_icd.json` named by `SWIFTSHADER_ICD`.

use std::path::PathBuf;

use crate::cli::{Said, command};

/// The driver's description for the Vulkan loader.
fn icd() -> PathBuf {
    let place = std::env::var_os("SWIFTSHADER_ICD")
        .map_or_else(|| "/usr/lib/chromium/vk_swiftshader_icd.json".into(), PathBuf::from);
    assert!(place.is_file(), "{} is not there; install chromium or set SWIFTSHADER_ICD", place.display());
    place
}

#[test]
fn a_driver_that_computes_wrong_numbers_is_refused_before_anything_is_written() {
    let dir = tempfile::tempdir().unwrap();
    let on_it = |args: &[&str]| {
        let mut command = command(dir.path(), args);
        command.env("VK_DRIVER_FILES", icd()).env("XDG_CACHE_HOME", dir.path().join("cache"));
        command.env("CUBECL_AUTOTUNE_LEVEL", "minimal");
        Said::of(command.output().unwrap())
    };
    let said = on_it(&["run", "phantom", "--device", "vulkan"]).code(2);
    said.blames(&["known answers", "vulkan", "SwiftShader", "help: ", "without `vulkan`"]);
    assert!(!dir.path().join("run").exists(), "nothing is written before the device is there");
    let doctor = on_it(&["doctor", "--device", "vulkan"]).code(1);
    assert!(doctor.out.contains("FAIL  device"), "{}", doctor.out);
}
