//! The base again, from a checkpoint that an adapter was folded into.

use std::{
    fs,
    path::{Path, PathBuf},
};

use serde::Serialize;

use super::{
    bytes, columns, context, emit,
    export::{Staged, contents, held_dtype, keep_config, probe, proof_rows, record_of},
    model::load_options,
};
use crate::{
    adapter::{
        attachment::Mode,
        merge::{self, Answers, Proof, Record},
        peft::{self, AdapterRef},
    },
    cli::{Global, UnmergeArgs},
    error::{Error, Kind, Result},
    models,
    run_dir::{json_file, write_atomic},
    stage::train::copy_processor_files,
    weights::{SaveOptions, torch_dtype},
};

/// What was written.
#[derive(Debug, Serialize)]
struct Written {
    out: PathBuf,
    /// The merged checkpoint.
    model: PathBuf,
    /// Type in the files.
    dtype: &'static str,
    files: Vec<String>,
    bytes: u64,
    /// What was taken off.
    adapter: Vec<PathBuf>,
    /// How the base with the adapter compares with the merged model.
    unmerged: Proof,
    /// How the base compares with what was recorded of it when the adapter was merged, if that is known.
    base: Option<Proof>,
    /// What the user should know.
    warnings: Vec<String>,
}

/// Takes adapters off.
pub(super) fn unmerge(global: &Global, args: &UnmergeArgs) -> Result<()> {
    let staged = Staged::new(&args.out)?;
    let record = record_of(&args.model)?;
    let adapters = adapters(args, record.as_ref())?;
    if let Some(record) = &record {
        same_adapters(&adapters, record, &args.model)?;
    }
    let ctx = context(global)?;
    let options = load_options(args.vision_tower.as_deref(), args.dtype, &ctx);
    let (model, processor) = models::load(&args.model, &options, &ctx.device)?;
    peft::check_reversible(&model, &adapters)?;
    let model = peft::load_all(model, &adapters, &processor.signature())?;
    let probes = [probe(processor.as_ref())?];
    let unmerged = merge::prove_reverse(&model, &probes, &ctx.device)?;
    ctx.check()?;
    let known = record.as_ref().and_then(|r| r.base_answers.as_ref());
    let half = merge::holds_half(&model);
    let compare = |known: &Answers| known.compare(&Answers::of(&model, Mode::Unfolded, &probes, &ctx.device), half);
    let base = known.map(compare).transpose()?;
    ctx.check()?;
    let (place, dtype) = (staged.place(), held_dtype(&model));
    let folding = merge::folding(&model).expect("something was taken off, so there are adapters");
    let options = SaveOptions { dtype, fold: true, ..SaveOptions::default() };
    folding.during(Mode::Unfolded, || model.save(place, &options))?;
    copy_processor_files(&args.model, args.vision_tower.as_deref(), place)?;
    keep_config(&args.model, place)?;
    keep_record(record.as_ref(), place)?;
    staged.settle()?;
    let (files, total) = contents(&args.out)?;
    let written = Written {
        out: args.out.clone(),
        model: args.model.clone(),
        dtype: torch_dtype(dtype),
        files,
        bytes: total,
        adapter: adapters.into_iter().map(|a| a.dir).collect(),
        warnings: warnings(&unmerged, base.as_ref()),
        unmerged,
        base,
    };
    emit(global, &written, || text(&written))
}

/// The adapters that the user names, or those that lie beside the merged model.
fn adapters(args: &UnmergeArgs, record: Option<&Record>) -> Result<Vec<AdapterRef>> {
    if !args.adapter.is_empty() {
        return Ok(args.adapter.clone());
    }
    let Some(record) = record else {
        return Err(Error::new(Kind::Config, "the checkpoint does not say what was merged into it")
            .at(args.model.display())
            .expected(merge::RECORD)
            .help("give the adapter with `--adapter DIR`"));
    };
    Ok(record.adapters.iter().map(|a| AdapterRef { dir: args.model.join(&a.dir), weight: a.weight }).collect())
}

/// Refuses adapters that are not those that were merged.
fn same_adapters(adapters: &[AdapterRef], record: &Record, model: &Path) -> Result<()> {
    let sorted = |mut all: Vec<(String, f64)>| {
        all.sort_by(|a, b| a.0.cmp(&b.0).then(a.1.total_cmp(&b.1)));
        all
    };
    let given = adapters.iter().map(|a| Ok((peft::tensors_hash(&a.dir)?, a.weight))).collect::<Result<Vec<_>>>()?;
    let merged = sorted(record.adapters.iter().map(|a| (a.sha256.clone(), a.weight)).collect());
    if sorted(given.clone()) == merged {
        return Ok(());
    }
    let listed = |all: &[(String, f64)]| {
        let short = all.iter().map(|(hash, weight)| format!("{} with weight {weight}", &hash[..hash.len().min(12)]));
        short.collect::<Vec<_>>().join(" and ")
    };
    let copies = record.adapters.iter().map(|a| model.join(&a.dir).display().to_string());
    Err(Error::new(Kind::Checkpoint, "this is not what was merged into the checkpoint")
        .at(adapters.iter().map(|a| a.dir.display().to_string()).collect::<Vec<_>>().join(", "))
        .expected(listed(&merged))
        .found(listed(&given))
        .help(format!("leave --adapter out; what was merged lies in {}", copies.collect::<Vec<_>>().join(", "))))
}

/// What had been merged before is all that is left to say.
fn keep_record(record: Option<&Record>, place: &Path) -> Result<()> {
    let path = place.join(merge::RECORD);
    if path.exists() {
        fs::remove_file(&path).map_err(|e| Error::io(&path, e))?;
    }
    match record.and_then(|r| r.before.as_ref()) {
        Some(before) => write_atomic(&path, &json_file(before)?),
        None => Ok(()),
    }
}

fn warnings(unmerged: &Proof, base: Option<&Proof>) -> Vec<String> {
    let mut all = Vec::new();
    if unmerged.same_prediction < 1.0 || base.is_some_and(|b| b.same_prediction < 1.0) {
        all.push("taking the adapter off changes answers; `--dtype float32` rounds less".to_string());
    }
    if base.is_none() {
        all.push(format!(
            "without {} nothing says which adapter was merged: any other of the same shape would pass as well",
            merge::RECORD
        ));
    }
    all
}

fn text(written: &Written) -> String {
    let mut rows = vec![
        vec!["merged model".into(), written.model.display().to_string()],
        vec![
            "written".into(),
            format!("{}, {} in {} files", written.out.display(), bytes(written.bytes), written.files.len()),
        ],
        vec!["type".into(), written.dtype.into()],
    ];
    rows.extend(written.adapter.iter().map(|a| vec!["taken off".into(), a.display().to_string()]));
    rows.extend(proof_rows("with it again", &written.unmerged));
    rows.extend(written.base.iter().flat_map(|p| proof_rows("as the base was", p)));
    let warnings: String = written.warnings.iter().map(|w| format!("warning: {w}\n")).collect();
    format!("{}{warnings}", columns(&rows))
}
