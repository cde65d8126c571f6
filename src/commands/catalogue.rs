//! Verbs that list and explain what is built in.

use serde::Serialize;
use serde_json::{Value, json};

use super::{columns, count, emit, first_line, print};
use crate::{
    cli::Global,
    config::{Config, inline},
    error::{Error, Kind, Result},
    metric::{
        METRICS,
        choice::{CHOICE_RULES, medevalkit, prefix},
        text::TEXT_METRICS,
    },
    models::{self, MODELS, embedded::EMBEDDED},
    plan::Plan,
    qc::RULES,
    registry,
    source::Source,
    stage::STAGES,
};

/// Something that has a name.
#[derive(Debug, Clone, Serialize)]
struct Entry {
    kind: &'static str,
    name: String,
    doc: String,
    #[serde(flatten)]
    more: serde_json::Map<String, Value>,
}

impl Entry {
    fn new(kind: &'static str, name: impl Into<String>, doc: impl Into<String>) -> Self {
        Self { kind, name: name.into(), doc: doc.into(), more: serde_json::Map::new() }
    }

    fn with(mut self, key: &str, value: impl Into<Value>) -> Self {
        self.more.insert(key.into(), value.into());
        self
    }

    fn text(&self) -> String {
        let mut text = format!("{} ({})\n\n{}\n", self.name, self.kind, self.doc.trim());
        if !self.more.is_empty() {
            text.push('\n');
            let shown = |v: &Value| match v {
                Value::String(s) => s.clone(),
                Value::Array(all) => all.iter().filter_map(Value::as_str).collect::<Vec<_>>().join(", "),
                other => inline(other).unwrap_or_else(|| "not set".into()),
            };
            let rows: Vec<_> = self.more.iter().map(|(k, v)| vec![format!("{k}:"), shown(v)]).collect();
            text.push_str(&columns(&rows));
        }
        text
    }
}

fn list(global: &Global, entries: &[Entry], help: &str) -> Result<()> {
    emit(global, entries, || {
        let rows: Vec<_> = entries.iter().map(|e| vec![e.name.clone(), first_line(&e.doc).to_string()]).collect();
        format!("{}\n{help}", columns(&rows))
    })
}

fn model_entries() -> Vec<Entry> {
    let entry = |m: &&models::ModelDef| {
        let presets: Vec<_> = m.presets.iter().map(|p| format!("{} ({})", p.name, p.about)).collect();
        let mut targets: Vec<_> = m.presets.iter().flat_map(|p| p.lora_targets).copied().collect();
        targets.sort_unstable();
        targets.dedup();
        Entry::new("model family", m.name, m.about)
            .with("model_type", m.model_types)
            .with("presets", presets)
            .with("adapter targets", targets)
    };
    MODELS.iter().map(entry).collect()
}

fn dataset_entries() -> Vec<Entry> {
    registry::datasets().map(dataset_entry).collect()
}

fn dataset_entry(reader: &dyn Source) -> Entry {
    let facts = reader.facts();
    let mut entry = Entry::new("data set reader", reader.name(), reader.doc());
    for (key, value) in [("licence", facts.licence), ("home", facts.home)] {
        if !value.is_empty() {
            entry = entry.with(key, value);
        }
    }
    for release in facts.releases {
        let rows = release.rows.iter().map(|(split, n)| format!("{} {n}", format!("{split:?}").to_lowercase()));
        entry = entry.with(&format!("rows of {}", release.name), rows.collect::<Vec<_>>().join(", "));
    }
    if let Some(download) = facts.download {
        entry = entry.with("download", format!("medtune data get {} ({})", reader.name(), download.repo));
    }
    entry
}

fn metric_entries() -> Vec<Entry> {
    let judged = METRICS.iter().map(|m| ("metric", m.key, m.name, m.about, m.signature));
    let text = TEXT_METRICS.iter().map(|m| ("text metric", m.key, m.name, m.about, m.signature));
    let choice = CHOICE_RULES.iter().map(|m| ("rule for multiple choice", m.key, m.name, m.about, m.signature));
    let likelihood = ("rule for multiple choice", prefix::KEY, prefix::NAME, prefix::ABOUT, prefix::SIGNATURE);
    let c = medevalkit::CLOSED;
    let closed = ("rule for closed questions", c.key, c.name, c.about, c.signature);
    let entry = |(kind, key, name, about, signature): (&'static str, &str, &str, &str, &str)| {
        Entry::new(kind, key, about).with("name", name).with("signature", signature)
    };
    judged.chain(text).chain([closed]).chain(choice).chain([likelihood]).map(entry).collect()
}

/// Every metric with the line that says exactly what it computes.
pub(super) fn metrics(global: &Global) -> Result<()> {
    let entries = metric_entries();
    emit(global, &entries, || {
        let signature = |e: &Entry| e.more.get("signature").and_then(Value::as_str).unwrap_or_default().to_string();
        let rows =
            entries.iter().flat_map(|e| [vec![e.name.clone(), e.doc.clone()], vec![String::new(), signature(e)]]);
        format!("{}\n`medtune explain NAME` says more", columns(&rows.collect::<Vec<_>>()))
    })
}

fn recipe_entries() -> Vec<Entry> {
    registry::recipes().map(|r| Entry::new("recipe", r.name(), r.about())).collect()
}

pub(super) fn models(global: &Global) -> Result<()> {
    let table = models::table(&global.device.open()?)?;
    emit(global, &table, || {
        let head = ["FAMILY", "PRESET", "PARAMETERS", "TOKENS/IMAGE", "WHAT"];
        let mut rows = vec![head.map(String::from).to_vec()];
        for row in &table {
            let towers: Vec<_> = row.parameters.iter().map(|(name, n)| format!("{name} {}", count(*n))).collect();
            rows.push(vec![
                row.family.into(),
                row.preset.into(),
                towers.join(", "),
                tokens(row.tokens_per_image, row.most_tokens_per_image),
                row.about.into(),
            ]);
        }
        let targets = columns(&adapter_targets(&table));
        let names: Vec<_> =
            EMBEDDED.iter().map(|e| format!("embedded:{} of {}  {}\n", e.name, e.family, e.about)).collect();
        let help = "`medtune explain FAMILY` says more; `medtune models inspect DIR` reads a checkpoint";
        format!("{}\n{targets}\n{}\n{help}", columns(&rows), names.concat())
    })
}

/// Positions of an image: one number, or from one tile to all of them.
fn tokens(least: usize, most: usize) -> String {
    if least == most { least.to_string() } else { format!("{least} to {most}") }
}

/// Lines of family, presets and adapter targets; presets with the same targets share one.
fn adapter_targets(table: &[models::ModelRow]) -> Vec<Vec<String>> {
    let mut rows: Vec<Vec<String>> = vec![["FAMILY", "PRESETS", "ADAPTER TARGETS"].map(String::from).to_vec()];
    for row in table {
        let targets = row.lora_targets.join(", ");
        match rows.last_mut() {
            Some(last) if last[0] == row.family && last[2] == targets => last[1] += &format!(", {}", row.preset),
            _ => rows.push(vec![row.family.into(), row.preset.into(), targets]),
        }
    }
    rows
}

pub(super) fn datasets(global: &Global) -> Result<()> {
    list(global, &dataset_entries(), "`medtune explain NAME` says more; a recipe selects one by `data.source`")
}

pub(super) fn recipes(global: &Global) -> Result<()> {
    list(global, &recipe_entries(), "`medtune recipes show NAME` prints the file; `medtune run NAME` runs it")
}

pub(super) fn recipe(global: &Global, name: &str) -> Result<()> {
    let found = registry::recipes().find(|r| r.name() == name).ok_or_else(|| {
        Error::new(Kind::Config, "unknown recipe")
            .expected(registry::recipes().map(|r| r.name()).collect::<Vec<_>>().join(", "))
            .found(name)
            .help("`medtune recipes` lists them")
    })?;
    match global.json {
        true => emit(global, json!({ "name": name, "toml": found.template() }), String::new),
        false => print(found.template()),
    }
}

/// Everything that `explain` knows.
fn all_entries() -> Vec<Entry> {
    let mut all = recipe_entries();
    all.extend(dataset_entries());
    all.extend(model_entries());
    for stage in STAGES {
        let entry = Entry::new("stage", stage.name, stage.about);
        all.push(entry.with("reads", stage.reads).with("writes", stage.writes).with("depends on", stage.sections));
    }
    for rule in RULES.iter().copied().chain(registry::recipes().flat_map(registry::rules)) {
        if !all.iter().any(|e| e.kind == "quality rule" && e.name == rule.code()) {
            all.push(Entry::new("quality rule", rule.code(), rule.doc()));
        }
    }
    for judge in registry::judges() {
        all.push(Entry::new("judge", judge.name(), judge.about()));
    }
    for rules in crate::llm::mock::RULES {
        all.push(Entry::new("rules of the rehearsal server", rules.name(), rules.about()));
    }
    all.extend(metric_entries());
    let config = Config::new::<Plan>();
    for key in config.keys() {
        let entry = Entry::new("key of a recipe file", key.path.clone(), key.doc.clone());
        all.push(entry.with("accepts", key.accepts.clone()).with("default", key.default.clone()));
    }
    for (section, doc) in config.sections() {
        let keys: Vec<_> = config.keys().iter().filter(|k| k.path.starts_with(&format!("{section}."))).collect();
        let mut entry = Entry::new("section of a recipe file", section, doc);
        for key in keys {
            entry = entry.with(&key.path, key.doc.clone());
        }
        all.push(entry);
    }
    all
}

pub(super) fn explain(global: &Global, name: &str) -> Result<()> {
    let all = all_entries();
    let exact: Vec<_> = all.iter().filter(|e| e.name == name).cloned().collect();
    let found = match exact.is_empty() {
        // The last part of a key is enough when nothing has the whole name.
        true => all.iter().filter(|e| e.name.rsplit('.').next() == Some(name)).cloned().collect(),
        false => exact,
    };
    if found.is_empty() {
        let near = all.iter().map(|e| (strsim::damerau_levenshtein(&e.name, name), &e.name)).min();
        let near = near.map_or(String::new(), |(_, n)| format!("; the nearest name is `{n}`"));
        return Err(Error::new(Kind::Config, format!("nothing is called `{name}`{near}"))
            .help("`medtune recipes`, `datasets`, `models` and `plan` list names"));
    }
    emit(global, &found, || found.iter().map(Entry::text).collect::<Vec<_>>().join("\n\n"))
}
