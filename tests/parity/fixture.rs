//! Reading fixtures and counting checks.

use std::path::PathBuf;

/// Directory of one family's fixture.
pub(crate) fn root(family: &str) -> PathBuf {
    let base = std::env::var_os("MEDTUNE_GOLDEN")
        .map_or_else(|| PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/golden"), PathBuf::from);
    let dir = base.join(family);
    assert!(dir.is_dir(), "no fixture at {}", dir.display());
    dir
}

/// Checks of one subject; dropping it without any check is a failure.
pub(crate) struct Checks {
    name: &'static str,
    count: usize,
}

impl Checks {
    pub(crate) fn new(name: &'static str) -> Self {
        Self { name, count: 0 }
    }

    /// One exact comparison.
    #[track_caller]
    pub(crate) fn equal<T: PartialEq + std::fmt::Debug>(&mut self, what: &str, found: T, expected: T) {
        assert!(found == expected, "{}: {what}: found {found:?}, expected {expected:?}", self.name);
        self.count += 1;
    }

    /// Largest absolute difference at most `tolerance`.
    #[track_caller]
    pub(crate) fn close(&mut self, what: &str, found: &[f32], expected: &[f32], tolerance: f32) {
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
        println!("parity {}: {} checks", self.name, self.count);
        self.count
    }
}
