//! Whether a device computes a model right.

use std::path::{Path, PathBuf};

use serde::Serialize;

use super::{columns, context, emit, model::question};
use crate::{
    cli::{Global, VerifyArgs},
    device::{
        DeviceSpec,
        guard::guard,
        list::{self, Adapter},
        tolerance::Tolerance,
    },
    error::{Error, Kind, Result},
    models::{self, LoadOptions, embedded::EMBEDDED},
    plan::embedded_name,
    run_dir::{RunDir, write_atomic},
    sample::{Role, Sample, Turn},
    stage::Ctx,
    verify::{Line, Measured, PARTS, compare, measure},
    vlm::{Batch, PaddingSide, Processor},
};

/// One model on one device.
#[derive(Debug, Serialize)]
struct Verified {
    model: String,
    family: &'static str,
    device: String,
    adapter: Option<Adapter>,
    version: &'static str,
    /// Positions of the batch, image included.
    positions: usize,
    lines: Vec<Line>,
}

impl Verified {
    fn right(&self) -> bool {
        self.lines.iter().all(|l| l.right)
    }

    fn text(&self) -> String {
        let mut rows = vec![["PART", "DIFFERENCE", "LIMIT", "", "DETAIL"].map(String::from).to_vec()];
        for l in &self.lines {
            let mark = if l.right { "ok" } else { "WRONG" };
            let row = [
                l.part.into(),
                format!("{:.1e}", l.difference),
                format!("{:.0e}", l.limit),
                mark.into(),
                l.detail.clone(),
            ];
            rows.push(row.to_vec());
        }
        let part = self.adapter.as_ref().map_or_else(String::new, |a| match &a.driver {
            Some(driver) => format!(" ({}, {driver})", a.name),
            None => format!(" ({})", a.name),
        });
        format!("{} on {}{part}, beside the CPU\n{}", self.model, self.device, columns(&rows))
    }
}

pub(super) fn verify(global: &Global, args: &VerifyArgs) -> Result<()> {
    let ctx = context(global)?;
    let mut all = Vec::new();
    match embedded_name(&args.dir) {
        None => all.push(one(&args.dir, &args.dir.display().to_string(), args, &ctx)?),
        Some(name) => {
            for model in EMBEDDED.iter().filter(|e| e.name == name) {
                let dir = scratch()?;
                model.unpack(dir.path())?;
                all.push(one(dir.path(), &format!("embedded:{name} of {}", model.family), args, &ctx)?);
            }
            if all.is_empty() {
                models::embedded::find(name, "any family")?;
            }
        }
    }
    if let Some(path) = &args.matrix {
        write_matrix(path, &all)?;
    }
    emit(global, &all, || all.iter().map(Verified::text).collect::<Vec<_>>().join("\n"))?;
    match all.iter().filter(|v| !v.right()).count() {
        0 => Ok(()),
        n => Err(Error::new(
            Kind::Gate,
            format!("{n} of {} models are computed wrong on {}", all.len(), ctx.device_spec),
        )
        .help("use another device or driver; `--json` has every number")),
    }
}

fn scratch() -> Result<tempfile::TempDir> {
    tempfile::tempdir().map_err(|e| Error::io(std::env::temp_dir(), e))
}

fn one(dir: &Path, name: &str, args: &VerifyArgs, ctx: &Ctx) -> Result<Verified> {
    let def = models::detect(dir)?;
    let options = LoadOptions {
        vision_tower: args.vision_tower.clone(),
        dtype: args.dtype.explicit(),
        progress: ctx.progress,
        ..LoadOptions::default()
    };
    let processor = (def.processor)(dir, &options)?;
    let batch = rows(processor.as_ref())?;
    let on = |ctx: &Ctx| -> Result<Measured> {
        ctx.progress.say(&format!("{name}: {}", ctx.device_spec));
        let place = scratch()?;
        let model = (def.load)(dir, &options, &ctx.device)?;
        measure(model, &batch, ctx, &RunDir::open(place.path())?)
    };
    let reference = on(&Ctx::new(DeviceSpec::Cpu, ctx.progress)?)?;
    let found = match ctx.device_spec {
        // Beside itself, with another number of threads.
        DeviceSpec::Cpu => one_thread()?.install(|| on(ctx))?,
        _ => guard(&ctx.device_spec, || None, || on(ctx))?,
    };
    let index = list::adapters(&ctx.device_spec).into_iter().find(|a| a.device == ctx.device_spec.to_string());
    Ok(Verified {
        model: name.to_string(),
        family: def.name,
        device: ctx.device_spec.to_string(),
        adapter: index,
        version: env!("CARGO_PKG_VERSION"),
        positions: batch.tokens(),
        lines: compare(&reference, &found, &Tolerance::of(&ctx.device_spec)),
    })
}

fn one_thread() -> Result<rayon::ThreadPool> {
    let pool = rayon::ThreadPoolBuilder::new().num_threads(1).build();
    pool.map_err(|e| Error::new(Kind::Run, "cannot start a thread").source(e))
}

/// A short conversation about an image, and a shorter one without.
fn rows(processor: &dyn Processor) -> Result<Batch> {
    let dir = scratch()?;
    let picture = dir.path().join("picture.png");
    let pixel = |x: u32, y: u32| image::Rgb([(x * 7 + y) as u8, (x + y * 5) as u8, (x * y / 16) as u8]);
    image::RgbImage::from_fn(96, 80, pixel)
        .save(&picture)
        .map_err(|e| Error::new(Kind::Run, "cannot write a picture").at(picture.display()).source(e))?;
    let row = |images: &[PathBuf], asked: &str, answered: &str| -> Sample {
        let mut sample = question(images, asked);
        sample.turns.push(Turn { role: Role::Assistant, text: answered.into() });
        sample
    };
    let samples = [
        row(
            &[picture],
            "Is there a nodule in the left lung?",
            "No. The left lung is clear, and the heart is of normal size.",
        ),
        row(&[], "What is a nodule?", "A small round growth."),
    ];
    let encoded = samples.iter().map(|s| processor.encode(s)).collect::<Result<Vec<_>>>()?;
    Ok(Batch::collate(&encoded, processor.pad_id(), PaddingSide::Right, 8))
}

const MATRIX_HEAD: &str = "# Which devices compute which models right

Written by `medtune verify MODEL --device DEVICE --matrix FILE`, which replaces the line of the same model and device and
keeps the others. Each cell is the largest relative difference from the CPU, with the limit for this kind of device in
brackets: logits, loss, the gradient of every trained tensor, and the loss over ten optimizer steps. The CPU beside
itself differs by what another number of threads changes.
";

/// Replaces the lines of these models on this device, and keeps those of others.
fn write_matrix(path: &Path, all: &[Verified]) -> Result<()> {
    let before = match std::fs::read_to_string(path) {
        Ok(text) => text,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => String::new(),
        Err(e) => return Err(Error::io(path, e)),
    };
    write_atomic(path, matrix(&before, all, &jiff::Timestamp::now().strftime("%Y-%m-%d").to_string()).as_bytes())
}

fn matrix(before: &str, all: &[Verified], date: &str) -> String {
    let key = |line: &str| line.split('|').map(str::trim).skip(1).take(2).map(String::from).collect::<Vec<_>>();
    let mut lines: Vec<String> = before.lines().filter(|l| l.starts_with('|')).skip(2).map(String::from).collect();
    for v in all {
        let cells = v.lines.iter().map(|l| {
            let mark = if l.right { "" } else { "**wrong** " };
            format!("{mark}{:.0e} ({:.0e})", l.difference, l.limit)
        });
        let driver = v.adapter.as_ref().map_or_else(String::new, |a| {
            format!("{}{}", a.name, a.driver.as_ref().map_or_else(String::new, |d| format!(", {d}")))
        });
        let cells: Vec<String> = cells.collect();
        let line = format!("| {} | {} | {} | {driver}, {} {date} |", v.model, v.device, cells.join(" | "), v.version);
        lines.retain(|l| key(l) != key(&line));
        lines.push(line);
    }
    lines.sort();
    let head =
        format!("| model | device | {} | driver, version, date |\n|---|---|---|---|---|---|---|", PARTS.join(" | "));
    format!("{MATRIX_HEAD}\n{head}\n{}\n", lines.join("\n"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn verified(model: &str, device: &str, difference: f64) -> Verified {
        let line = |part| Line { part, difference, limit: 1e-4, right: difference <= 1e-4, detail: String::new() };
        Verified {
            model: model.into(),
            family: "llava_med",
            device: device.into(),
            adapter: None,
            version: "0.1.0",
            positions: 3,
            lines: PARTS.map(line).to_vec(),
        }
    }

    #[test]
    fn the_matrix_replaces_its_own_lines_and_keeps_the_others() {
        let first = matrix("", &[verified("a", "cpu", 0.0), verified("a", "wgpu:0", 0.5)], "2026-01-01");
        assert_eq!(first.matches("**wrong**").count(), 4);
        let second = matrix(&first, &[verified("a", "wgpu:0", 1e-6)], "2026-01-02");
        assert_eq!(second.matches("**wrong**").count(), 0);
        assert_eq!(second.lines().filter(|l| l.starts_with("| a |")).count(), 2);
        assert!(second.contains("2026-01-01") && second.contains("2026-01-02"), "{second}");
        assert_eq!(matrix(&second, &[], "2026-01-03"), second);
    }
}
