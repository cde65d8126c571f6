//! The device, fixtures, and counting checks.

use std::path::PathBuf;

use burn::tensor::Device;
use medtune::device::{DeviceSpec, tolerance::Tolerance};

/// The device that `MEDTUNE_DEVICE` names; the CPU without it.
pub(crate) fn spec() -> DeviceSpec {
    DeviceSpec::from_env().unwrap()
}

/// As [`spec`], opened.
pub(crate) fn device() -> Device {
    spec().open().unwrap()
}

/// What limits are multiplied by on this device: 1 on the CPU.
pub(crate) fn slack() -> f32 {
    Tolerance::of(&spec()).parity
}

/// Fixtures that were made for this project alone; other sets need not have them.
const OWN: [&str; 1] = ["peft"];

/// Directory of one family's fixture.
pub(crate) fn root(family: &str) -> PathBuf {
    let own = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/golden");
    let named = std::env::var_os("MEDTUNE_GOLDEN").map(|base| PathBuf::from(base).join(family));
    let dir = named.filter(|dir| dir.is_dir() || !OWN.contains(&family)).unwrap_or_else(|| own.join(family));
    assert!(dir.is_dir(), "no fixture at {}", dir.display());
    dir
}

/// Checks of one subject; dropping it without any check is a failure.
pub(crate) struct Checks {
    name: String,
    count: usize,
}

impl Checks {
    pub(crate) fn new(name: &str) -> Self {
        Self::of_file("parity", name)
    }

    /// Checks of one file of `group`.
    pub(crate) fn of_file(group: &str, file: &str) -> Self {
        Self { name: format!("{group} {file}"), count: 0 }
    }

    /// One exact comparison.
    #[track_caller]
    pub(crate) fn equal<T: PartialEq + std::fmt::Debug>(&mut self, what: &str, found: T, expected: T) {
        assert!(found == expected, "{}: {what}: found {found:?}, expected {expected:?}", self.name);
        self.count += 1;
    }

    /// Absolute difference at most `tolerance`.
    #[track_caller]
    pub(crate) fn near(&mut self, what: &str, found: f64, expected: f64, tolerance: f64) {
        let near = (found - expected).abs() <= tolerance * f64::from(slack());
        assert!(near, "{}: {what}: found {found}, expected {expected}", self.name);
        self.count += 1;
    }

    /// Largest absolute difference at most `tolerance`.
    #[track_caller]
    pub(crate) fn close(&mut self, what: &str, found: &[f32], expected: &[f32], tolerance: f32) {
        let tolerance = tolerance * slack();
        assert_eq!(found.len(), expected.len(), "{}: {what}: number of values", self.name);
        let (mut worst, mut at) = (0f32, 0);
        for (i, (f, e)) in found.iter().zip(expected).enumerate() {
            assert!(f.is_finite() || f == e, "{}: {what}[{i}]: found {f}, expected {e}", self.name);
            let d = if f == e { 0.0 } else { (f - e).abs() };
            if d > worst {
                (worst, at) = (d, i);
            }
        }
        assert!(
            worst <= tolerance,
            "{}: {what}[{at}]: found {}, expected {}, differs by {worst} > {tolerance}",
            self.name,
            found[at],
            expected[at]
        );
        self.count += 1;
    }

    /// Prints the count, which must not be zero.
    pub(crate) fn finish(self) -> usize {
        assert!(self.count > 0, "{}: no check ran", self.name);
        println!("{}: {} checks", self.name, self.count);
        self.count
    }
}

/// Tensors of one safetensors file.
pub(crate) struct Tensors {
    bytes: Vec<u8>,
}

impl Tensors {
    pub(crate) fn open(path: &std::path::Path) -> Self {
        Self { bytes: std::fs::read(path).unwrap_or_else(|e| panic!("{}: {e}", path.display())) }
    }

    fn parsed(&self) -> safetensors::SafeTensors<'_> {
        safetensors::SafeTensors::deserialize(&self.bytes).unwrap()
    }

    /// Names in order.
    pub(crate) fn names(&self) -> Vec<String> {
        let mut names: Vec<String> = self.parsed().names().into_iter().map(String::from).collect();
        names.sort();
        names
    }

    pub(crate) fn has(&self, name: &str) -> bool {
        self.parsed().tensor(name).is_ok()
    }

    pub(crate) fn shape(&self, name: &str) -> Vec<usize> {
        self.parsed().tensor(name).unwrap_or_else(|e| panic!("{name}: {e}")).shape().to_vec()
    }

    pub(crate) fn f32(&self, name: &str) -> Vec<f32> {
        let parsed = self.parsed();
        let view = parsed.tensor(name).unwrap_or_else(|e| panic!("{name}: {e}"));
        assert_eq!(view.dtype(), safetensors::Dtype::F32, "{name}");
        view.data().as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect()
    }

    /// Integers of any width.
    pub(crate) fn ints(&self, name: &str) -> Vec<i32> {
        use safetensors::Dtype;
        let parsed = self.parsed();
        let view = parsed.tensor(name).unwrap_or_else(|e| panic!("{name}: {e}"));
        match view.dtype() {
            Dtype::I64 => view.data().as_chunks().0.iter().map(|b| i64::from_le_bytes(*b) as i32).collect(),
            Dtype::I32 => view.data().as_chunks().0.iter().map(|b| i32::from_le_bytes(*b)).collect(),
            Dtype::I8 => view.data().iter().map(|b| i32::from(b.cast_signed())).collect(),
            Dtype::U8 | Dtype::BOOL => view.data().iter().map(|b| i32::from(*b)).collect(),
            other => panic!("{name} is {other:?}"),
        }
    }

    pub(crate) fn bytes(&self, name: &str) -> Vec<u8> {
        let parsed = self.parsed();
        let view = parsed.tensor(name).unwrap_or_else(|e| panic!("{name}: {e}"));
        assert_eq!(view.dtype(), safetensors::Dtype::U8, "{name}");
        view.data().to_vec()
    }

    pub(crate) fn i32(&self, name: &str) -> Vec<i32> {
        let parsed = self.parsed();
        let view = parsed.tensor(name).unwrap_or_else(|e| panic!("{name}: {e}"));
        assert_eq!(view.dtype(), safetensors::Dtype::I32, "{name}");
        view.data().as_chunks().0.iter().map(|b| i32::from_le_bytes(*b)).collect()
    }
}

/// A JSON file of a fixture.
pub(crate) fn json(path: &std::path::Path) -> serde_json::Value {
    let text = std::fs::read_to_string(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    serde_json::from_str(&text).unwrap()
}
