//! Verbs about this machine and this build.

use std::path::Path;

use serde::Serialize;

use super::{bytes, columns, emit, progress};
use crate::{
    cli::Global,
    device::{
        DeviceSpec, cuda, known,
        list::{self, Adapter, Limits, backends},
        trust::{self, Probe},
    },
    error::{Error, Kind, Result},
};

/// A device as `devices` shows it.
#[derive(Debug, Serialize)]
struct Listed {
    #[serde(flatten)]
    adapter: Adapter,
    /// What it can do; none when it failed.
    limits: Option<Limits>,
    /// Why it is not used.
    refused: Option<String>,
}

/// A kind of device as `devices` shows it.
#[derive(Debug, Serialize)]
struct ListedKind {
    kind: &'static str,
    about: &'static str,
    compiled: bool,
    unavailable: Option<String>,
    devices: Vec<Listed>,
}

pub(super) fn devices(global: &Global) -> Result<()> {
    let ask = |adapter: Adapter| -> Result<Listed> {
        let spec: DeviceSpec = adapter.device.parse()?;
        let (limits, refused) = match trust::check(&spec, progress(global)) {
            Ok(Some(probe)) => (Some(probe.limits), None),
            Ok(None) => (Some(list::limits(&spec.open()?)), None),
            Err(error) => (None, Some(error.to_string())),
        };
        Ok(Listed { adapter, limits, refused })
    };
    let mut kinds = Vec::new();
    for backend in backends() {
        let devices = backend.devices.into_iter().map(ask).collect::<Result<_>>()?;
        let list::Backend { kind, about, compiled, unavailable, .. } = backend;
        kinds.push(ListedKind { kind, about, compiled, unavailable, devices });
    }
    emit(global, &kinds, || table(&kinds))
}

/// The devices, and below them why others are not there or not used.
fn table(kinds: &[ListedKind]) -> String {
    let header = ["DEVICE", "NAME", "MEMORY", "LARGEST BUFFER", "TYPES", "DRIVER"];
    let mut rows = vec![header.map(String::from).to_vec()];
    let mut reasons = String::new();
    for kind in kinds {
        if let Some(why) = &kind.unavailable {
            reasons.push_str(&format!("\n{}: {why}", kind.kind));
        }
        for Listed { adapter, limits, refused } in &kind.devices {
            let size = |n: Option<u64>| n.map_or_else(|| "-".into(), bytes);
            let driver = adapter.driver.clone().unwrap_or_else(|| "-".into());
            let mut row = vec![adapter.device.clone(), adapter.name.clone()];
            row.extend(match limits {
                Some(l) => [size(l.memory_bytes), size(l.max_buffer_bytes), l.dtypes.join(" "), driver],
                None => ["-".into(), "-".into(), "refused".into(), driver],
            });
            rows.push(row);
            if let Some(why) = refused {
                reasons.push_str(&format!("\n{}: {why}", adapter.device));
            }
        }
    }
    columns(&rows) + &reasons
}

/// What [`trust::check`] runs in a process of its own.
pub(super) fn probe(global: &Global) -> Result<()> {
    let probe = Probe::here(&global.device)?;
    emit(global, &probe, || {
        let row = |f: &known::Finding| {
            let mark = if f.right() { "ok" } else { "WRONG" };
            vec![mark.into(), f.name.clone(), format!("{:.1e}", f.worst), format!("{:.0e}", f.limit)]
        };
        columns(&probe.findings.iter().map(row).collect::<Vec<_>>())
    })
}

/// One thing that `doctor` looked at.
#[derive(Debug, Serialize)]
struct Check {
    name: &'static str,
    ok: bool,
    found: String,
}

impl Check {
    fn fact(name: &'static str, found: impl Into<String>) -> Self {
        Self { name, ok: true, found: found.into() }
    }

    /// A part that CUDA needs at run time. Where another device is `wanted`, nothing is wrong with its absence.
    fn part(part: cuda::Part, wanted: bool) -> Self {
        let ok = part.found.is_some() || !wanted;
        let found = part.found.map_or_else(|| format!("not found; {}", part.help), |p| p.display().to_string());
        Self { name: part.name, ok, found }
    }

    fn of(name: &'static str, outcome: Result<String>) -> Self {
        match outcome {
            Ok(found) => Self { name, ok: true, found },
            Err(e) => Self { name, ok: false, found: e.to_string() },
        }
    }
}

/// Least free memory to run the embedded recipe, in bytes.
const ENOUGH_MEMORY: u64 = 3 << 30;

pub(super) fn doctor(global: &Global, out: &Path) -> Result<()> {
    let features: Vec<_> = backends().into_iter().filter(|b| b.compiled).map(|b| b.feature).collect();
    let mut checks = vec![
        Check::fact("version", env!("CARGO_PKG_VERSION")),
        Check::fact("system", format!("{} {}", std::env::consts::OS, std::env::consts::ARCH)),
        Check::fact("features", features.join(", ")),
        Check::of("device", device(global)),
        Check::fact("threads", rayon::current_num_threads().to_string()),
        memory(),
        Check::of("write access", writable(out)),
    ];
    if cfg!(feature = "cuda") {
        let wanted = matches!(global.device.resolve(), DeviceSpec::Cuda(_));
        checks.extend(cuda::parts().into_iter().map(|part| Check::part(part, wanted)));
    }
    emit(global, &checks, || {
        let mark = |ok| if ok { "ok" } else { "FAIL" }.to_string();
        let rows: Vec<_> = checks.iter().map(|c| vec![mark(c.ok), c.name.into(), c.found.clone()]).collect();
        columns(&rows)
    })?;
    match checks.iter().filter(|c| !c.ok).count() {
        0 => Ok(()),
        n => Err(Error::new(Kind::Gate, format!("{n} of {} checks failed", checks.len()))),
    }
}

/// What the check of the device against known answers has found.
fn device(global: &Global) -> Result<String> {
    let (spec, device) = trust::open(&global.device, progress(global))?;
    let findings = match trust::check(&spec, progress(global))? {
        Some(probe) => probe.findings,
        None => known::compute(&device),
    };
    if let Some(wrong) = findings.iter().find(|f| !f.right()) {
        return Err(Error::new(Kind::Device, "device computes wrong numbers").at(&wrong.name).found(wrong.worst));
    }
    let worst = findings.iter().map(|f| f.worst).fold(0.0, f64::max);
    Ok(format!("{spec}: {} known answers, all right; largest relative difference {worst:.0e}", findings.len()))
}

fn writable(dir: &Path) -> Result<String> {
    let probe = dir.join(".medtune-doctor");
    crate::run_dir::write_atomic(&probe, b"")?;
    std::fs::remove_file(&probe).map_err(|e| Error::io(&probe, e))?;
    Ok(dir.display().to_string())
}

fn memory() -> Check {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let kib = |name: &str| {
        let line = text.lines().find(|l| l.starts_with(name))?;
        line.split_whitespace().nth(1)?.parse::<u64>().ok()
    };
    match (kib("MemAvailable:"), kib("MemTotal:")) {
        (Some(free), Some(total)) => {
            let gib = |kib: u64| kib as f64 / f64::from(1 << 20);
            let found = format!("{:.1} of {:.1} GiB available", gib(free), gib(total));
            Check { name: "memory", ok: free * 1024 >= ENOUGH_MEMORY, found }
        }
        _ => Check::fact("memory", "unknown on this system"),
    }
}
