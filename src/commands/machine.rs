//! Verbs about this machine and this build.

use std::path::Path;

use burn::tensor::{Device, Tensor};
use serde::Serialize;

use super::{columns, emit};
use crate::{
    cli::Global,
    device::backends,
    error::{Error, Kind, Result},
};

pub(super) fn devices(global: &Global) -> Result<()> {
    let backends = backends();
    emit(global, &backends, || {
        let mut rows = vec![vec!["DEVICE".into(), "WHAT".into(), "FOUND".into()]];
        for backend in &backends {
            if !backend.compiled {
                let how = format!("not in this build (cargo feature `{}`)", backend.feature);
                rows.push(vec![backend.kind.into(), backend.about.into(), how]);
            } else if backend.devices.is_empty() {
                rows.push(vec![backend.kind.into(), backend.about.into(), "none on this machine".into()]);
            }
            for (i, name) in backend.devices.iter().enumerate() {
                let device = if backend.kind == "cpu" { "cpu".into() } else { format!("{}:{i}", backend.kind) };
                rows.push(vec![device, backend.about.into(), name.clone()]);
            }
        }
        columns(&rows)
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
    let checks = [
        Check::fact("version", env!("CARGO_PKG_VERSION")),
        Check::fact("system", format!("{} {}", std::env::consts::OS, std::env::consts::ARCH)),
        Check::fact("features", features.join(", ")),
        Check::of(
            "device",
            global.device.open().and_then(|d| compute(&d)).map(|how| format!("{}: {how}", global.device)),
        ),
        Check::fact("threads", rayon::current_num_threads().to_string()),
        memory(),
        Check::of("write access", writable(out)),
    ];
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

/// Multiplies two matrices on the device and compares with the known result.
fn compute(device: &Device) -> Result<String> {
    const N: usize = 64;
    let wrong = |e: String| Error::new(Kind::Device, "device computes nothing usable").found(e);
    let ones = Tensor::<2>::ones([N, N], device);
    let product = ones.clone().matmul(ones).into_data();
    let values = product.try_to_vec::<f32>().map_err(|e| wrong(format!("{e:?}")))?;
    match values.iter().find(|v| **v != N as f32) {
        None => Ok("a matrix product is right".into()),
        Some(value) => Err(wrong(format!("{value} instead of {N} in a matrix product"))),
    }
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
