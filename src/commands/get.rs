//! `medtune data get`: the one verb that downloads data.

use std::path::PathBuf;

use serde_json::json;

use super::{columns, emit};
use crate::{
    cli::{GetArgs, Global},
    datasets,
    error::{Error, Kind, Result},
    hub,
    progress::Progress,
    registry,
};

/// Downloads a data set and records what it is.
pub(super) fn get(global: &Global, args: &GetArgs) -> Result<()> {
    let (repo, patterns, reader) = match args.name.contains('/') {
        true => (args.name.as_str(), &[][..], None),
        false => {
            let source = datasets::find(&args.name)?;
            let download = source.facts().download.ok_or_else(|| no_download(source))?;
            (download.repo, download.files, Some(source))
        }
    };
    let folder = args.name.rsplit('/').next().unwrap_or(&args.name);
    let dir = args.out.clone().unwrap_or_else(|| PathBuf::from("data").join(folder));
    let progress = if global.quiet { Progress::Silent } else { Progress::detect() };
    let fetched = hub::fetch(repo, &args.revision, patterns, &dir, progress)?;
    let archives: Vec<&str> =
        fetched.files.iter().map(|f| f.path.as_str()).filter(|path| path.ends_with(".zip")).collect();
    let licence = reader.map_or("", |r| r.facts().licence);
    let value = json!({ "dir": dir, "licence": licence, "archives": archives, "record": fetched });
    emit(global, value, || {
        let mut rows: Vec<Vec<String>> = fetched
            .files
            .iter()
            .map(|f| {
                let checked = if f.verified { "checksum as the hub states it" } else { "checksum recorded" };
                vec![f.path.clone(), f.size.to_string(), f.sha256[..16].to_string(), checked.into()]
            })
            .collect();
        rows.insert(0, ["FILE", "BYTES", "SHA-256", ""].map(String::from).to_vec());
        let mut text = format!("{} at commit {} is in {}\n", fetched.repo, fetched.commit, dir.display());
        text.push_str(&columns(&rows));
        if !licence.is_empty() {
            text.push_str(&format!("licence: {licence}\n"));
        }
        for archive in &archives {
            text.push_str(&format!("unpack it: unzip -n {0}/{archive} -d {0}\n", dir.display()));
        }
        if let Some(reader) = reader {
            text.push_str(&format!("use it: data.source = \"{}\", data.path = \"{}\"\n", reader.name(), dir.display()));
        }
        text
    })
}

fn no_download(source: &dyn crate::source::Source) -> Error {
    let names: Vec<&str> = registry::datasets().filter(|d| d.facts().download.is_some()).map(|d| d.name()).collect();
    let error = Error::new(Kind::Config, "this data set cannot be downloaded from the hub")
        .at(source.name())
        .expected(format!("one of {}, or a repository as owner/name", names.join(", ")));
    match source.facts().home {
        "" => error.help("it reads files of your own"),
        home => error.help(format!("it is published at {home}")),
    }
}
