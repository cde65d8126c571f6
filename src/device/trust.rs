//! A device is used only after it has computed known answers right.
//!
//! The check runs in a process of its own, so that a driver that crashes is an error and not the end of the program.
//! Its outcome is kept in the user's cache directory for this driver and this program; a device that failed is checked
//! again the next time.

use std::{
    env,
    path::{Path, PathBuf},
    process::{Command, ExitStatus},
};

use burn::tensor::Device;
use serde::{Deserialize, Serialize};

use super::{
    DeviceSpec, cuda,
    known::{Finding, compute},
    list::{self, Adapter, Limits},
};
use crate::{
    error::{Error, Kind, Result},
    progress::Progress,
    run_dir::{sha256_bytes, write_atomic},
};

/// Name of the verb that the process of the check runs; it is not listed.
pub const VERB: &str = "probe-device";

/// What the check found.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Probe {
    /// Version and features of the program that checked.
    pub program: String,
    /// The device and its driver.
    pub adapter: Adapter,
    /// What the device can do.
    pub limits: Limits,
    /// How far each computation was off.
    pub findings: Vec<Finding>,
}

impl Probe {
    /// Opens the device in this process, asks it, and computes.
    ///
    /// # Errors
    /// There is no such device. A driver may end the process.
    pub fn here(spec: &DeviceSpec) -> Result<Self> {
        let device = spec.open()?;
        let adapter = adapter(spec)?;
        Ok(Self { program: program(), adapter, limits: list::limits(&device), findings: compute(&device) })
    }

    /// # Errors
    /// A computation was further off than its limit.
    fn verdict(&self) -> Result<()> {
        let Some(wrong) = self.findings.iter().find(|f| !f.right()) else { return Ok(()) };
        let count = self.findings.iter().filter(|f| !f.right()).count();
        let off = if wrong.worst == f64::MAX { "no number".into() } else { format!("{:.1e}", wrong.worst) };
        Err(Error::new(Kind::Device, "this device computes wrong numbers and is not used")
            .at(place(&self.adapter))
            .expected(format!("a relative difference of at most {:.0e} in {}", wrong.limit, wrong.name))
            .found(format!("{off}; {count} of {} known answers are wrong", self.findings.len()))
            .help(HELP))
    }
}

const HELP: &str = "update the driver, or use another device (`medtune devices`); on a software driver, use a build with \
                    the feature `wgpu` and without `vulkan`";

fn place(adapter: &Adapter) -> String {
    let driver = adapter.driver.as_deref().unwrap_or("no known driver");
    format!("{} ({}, {driver})", adapter.device, adapter.name)
}

/// Version and backends of this program: what is compiled in decides which compiler a driver gets to see.
fn program() -> String {
    let features: Vec<&str> = super::KINDS.iter().filter(|k| k.compiled()).map(|k| k.feature()).collect();
    format!("{} {}", env!("CARGO_PKG_VERSION"), features.join(","))
}

fn adapter(spec: &DeviceSpec) -> Result<Adapter> {
    let spec = spec.resolve();
    let index = spec.index().unwrap_or_default();
    let missing = || Error::new(Kind::Device, "no such device on this machine").at(format!("--device {spec}"));
    list::adapters(&spec).into_iter().nth(index).ok_or_else(missing)
}

/// Opens the device that `spec` names, checked; for [`DeviceSpec::Auto`] the best one that passes.
///
/// # Errors
/// There is no such device, it crashed, or it computes wrong numbers.
pub fn open(spec: &DeviceSpec, progress: Progress) -> Result<(DeviceSpec, Device)> {
    if *spec != DeviceSpec::Auto {
        check(spec, progress)?;
        return Ok((spec.clone(), spec.open()?));
    }
    let mut candidates = DeviceSpec::candidates().into_iter();
    loop {
        let Some(spec) = candidates.next() else { return Ok((DeviceSpec::Cpu, DeviceSpec::Cpu.open()?)) };
        match check(&spec, progress) {
            Ok(_) => {
                progress.say(&format!("device: {spec}"));
                return Ok((spec.clone(), spec.open()?));
            }
            Err(error) => progress.say(&format!("{error}; not used")),
        }
    }
}

/// Checks a device unless this driver has been checked before; the CPU is not checked.
///
/// # Errors
/// There is no such device, it crashed, or it computes wrong numbers.
pub fn check(spec: &DeviceSpec, progress: Progress) -> Result<Option<Probe>> {
    if *spec == DeviceSpec::Cpu {
        return Ok(None);
    }
    spec.open()?;
    if matches!(spec, DeviceSpec::Cuda(_)) {
        cuda::check()?;
    }
    let adapter = adapter(spec)?;
    let place = cache_dir().map(|dir| dir.join("devices").join(file_name(&adapter)));
    if let Some(probe) = place.as_deref().and_then(|p| remembered(p, &adapter)) {
        return Ok(Some(probe));
    }
    progress.say(&format!("checking {spec} ({}) against known answers, once for this driver", adapter.name));
    let probe = ask(spec, &adapter)?;
    probe.verdict()?;
    if let Some(place) = place {
        remember(&place, &probe);
    }
    Ok(Some(probe))
}

/// A name that changes with the driver, its version and this program.
fn file_name(adapter: &Adapter) -> String {
    let identity = serde_json::json!({ "adapter": adapter, "program": program() });
    format!("{}.json", &sha256_bytes(identity.to_string().as_bytes())[..32])
}

/// An earlier outcome, if it is whole, of this driver and program, and good. Anything else is checked again.
fn remembered(place: &Path, adapter: &Adapter) -> Option<Probe> {
    let probe: Probe = serde_json::from_slice(&std::fs::read(place).ok()?).ok()?;
    let same = probe.adapter == *adapter && probe.program == program() && !probe.findings.is_empty();
    (same && probe.verdict().is_ok()).then_some(probe)
}

/// Keeps an outcome. A cache that cannot be written costs the next start a check, and nothing else.
fn remember(place: &Path, probe: &Probe) {
    let dir = place.parent().unwrap_or(place);
    let written = serde_json::to_vec_pretty(probe).map(|bytes| {
        std::fs::create_dir_all(dir).map_err(|e| Error::io(dir, e)).and_then(|()| write_atomic(place, &bytes))
    });
    drop(written);
}

/// The user's directory for what can be made again.
fn cache_dir() -> Option<PathBuf> {
    let home = || env::var_os("HOME").map(PathBuf::from);
    let base = if cfg!(windows) {
        env::var_os("LOCALAPPDATA").map(PathBuf::from)
    } else if cfg!(target_os = "macos") {
        home().map(|h| h.join("Library/Caches"))
    } else {
        env::var_os("XDG_CACHE_HOME")
            .map(PathBuf::from)
            .filter(|p| p.is_absolute())
            .or_else(|| home().map(|h| h.join(".cache")))
    };
    base.map(|b| b.join("medtune"))
}

/// Runs the check in a process of its own.
fn ask(spec: &DeviceSpec, adapter: &Adapter) -> Result<Probe> {
    let failed = |what: &str| Error::new(Kind::Device, what).at(place(adapter)).help(HELP);
    let program = env::current_exe().map_err(|e| failed("cannot start the check of this device").source(e))?;
    let output = Command::new(program)
        .args([VERB, "--device", &spec.to_string(), "--json"])
        .env("RUST_BACKTRACE", "0")
        .output()
        .map_err(|e| failed("cannot start the check of this device").source(e))?;
    if let Ok(probe) = serde_json::from_slice::<Probe>(&output.stdout) {
        return Ok(probe);
    }
    let found = [ending(output.status), last_words(&output.stdout, &output.stderr)];
    let found = found.into_iter().filter(|s| !s.is_empty()).collect::<Vec<_>>().join(": ");
    Err(failed("this device failed while it computed known answers and is not used").found(found))
}

/// What a process of the check said before it failed: the error that it printed as JSON, or its last lines.
fn last_words(out: &[u8], err: &[u8]) -> String {
    let printed: Option<serde_json::Value> = serde_json::from_slice(out).ok();
    if let Some(error) = printed.as_ref().and_then(|v| v["error"].as_str()) {
        return error.to_string();
    }
    let said = String::from_utf8_lossy(err);
    let lines: Vec<&str> = said.lines().filter(|l| !l.trim().is_empty() && !l.starts_with("note:")).collect();
    lines[lines.len().saturating_sub(3)..].join("; ")
}

fn ending(status: ExitStatus) -> String {
    #[cfg(unix)]
    if let Some(signal) = std::os::unix::process::ExitStatusExt::signal(&status) {
        let name = match signal {
            4 => " (illegal instruction)",
            6 => " (abort)",
            7 => " (bus error)",
            8 => " (arithmetic)",
            9 => " (killed)",
            11 => " (segmentation fault)",
            _ => "",
        };
        return format!("the driver ended the process by signal {signal}{name}");
    }
    status.to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn probe(worst: f64) -> Probe {
        Probe {
            program: program(),
            adapter: Adapter { device: "wgpu:0".into(), name: "a part".into(), driver: Some("driver 1.2".into()) },
            limits: Limits { memory_bytes: None, max_buffer_bytes: Some(1 << 27), dtypes: vec!["float32".into()] },
            findings: vec![
                Finding { name: "softmax over 7".into(), worst: 0.0, limit: 1e-5 },
                Finding { name: "3x5 by 5x7".into(), worst, limit: 1e-5 },
            ],
        }
    }

    #[test]
    fn a_good_outcome_is_remembered_until_driver_or_program_change() {
        let dir = tempfile::tempdir().unwrap();
        let good = probe(1e-7);
        let place = dir.path().join("below").join(file_name(&good.adapter));
        remember(&place, &good);
        assert_eq!(remembered(&place, &good.adapter), Some(good.clone()));
        let newer = Adapter { driver: Some("driver 1.3".into()), ..good.adapter.clone() };
        assert_ne!(file_name(&newer), file_name(&good.adapter));
        assert_eq!(remembered(&place, &newer), None);
        let other = Probe { program: "0.0.9 flex".into(), ..good.clone() };
        remember(&place, &other);
        assert_eq!(remembered(&place, &good.adapter), None);
    }

    #[test]
    fn a_damaged_or_bad_outcome_is_not_believed() {
        let dir = tempfile::tempdir().unwrap();
        let place = dir.path().join("x.json");
        let good = probe(1e-7);
        for text in ["", "{", "[]", "{\"findings\": []}", "\u{0}\u{1}"] {
            std::fs::write(&place, text).unwrap();
            assert_eq!(remembered(&place, &good.adapter), None, "{text:?}");
        }
        remember(&place, &probe(0.5));
        assert_eq!(remembered(&place, &good.adapter), None);
        remember(&place, &Probe { findings: Vec::new(), ..good.clone() });
        assert_eq!(remembered(&place, &good.adapter), None);
    }

    #[test]
    fn wrong_numbers_refuse_the_device_with_driver_and_numbers() {
        probe(1e-7).verdict().unwrap();
        for (worst, words) in [(0.31, "3.1e-1"), (f64::MAX, "no number")] {
            let error = probe(worst).verdict().unwrap_err();
            assert_eq!(error.kind(), Kind::Device);
            let text = error.to_string();
            for part in ["wgpu:0", "driver 1.2", "3x5 by 5x7", "1e-5", words, "1 of 2"] {
                assert!(text.contains(part), "{part} is not in {text}");
            }
        }
    }

    #[test]
    fn the_last_words_of_a_failed_check_are_its_error_or_its_last_lines() {
        assert_eq!(last_words(br#"{"error": "no such device", "help": null}"#, b"noise"), "no such device");
        let panic = b"thread 'main' panicked at x.rs:1:\nwgpu error: lost\nnote: run with RUST_BACKTRACE\n\n";
        assert_eq!(last_words(b"", panic), "thread 'main' panicked at x.rs:1:; wgpu error: lost");
        assert_eq!(last_words(b"{", b""), "");
    }

    #[cfg(unix)]
    #[test]
    fn a_process_that_a_driver_ended_says_by_which_signal() {
        let status = Command::new("sh").args(["-c", "kill -SEGV $$"]).status().unwrap();
        assert!(ending(status).contains("signal 11 (segmentation fault)"), "{}", ending(status));
        assert!(ending(Command::new("sh").args(["-c", "exit 3"]).status().unwrap()).contains('3'));
    }

    #[test]
    fn the_cpu_needs_no_check() {
        assert_eq!(check(&DeviceSpec::Cpu, Progress::Silent).unwrap(), None);
        assert_eq!(open(&DeviceSpec::Cpu, Progress::Silent).unwrap().0, DeviceSpec::Cpu);
    }
}
