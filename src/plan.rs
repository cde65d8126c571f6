//! From a recipe file and overrides to a resolved plan; all errors at once.

use std::path::{Path, PathBuf};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::{
    adapter::{AdapterConfig, Quantization},
    config::{Config, Document, Origin, Setting, to_toml},
    device::DeviceSpec,
    error::{Error, Kind, Result},
    generate::GenerateConfig,
    judge::{AnchorPolicy, Judge, JudgeConfig},
    llm::LlmConfig,
    models::{self, AnyVlm, MODELS, ModelConfig, embedded},
    qc::QcConfig,
    recipe::ConstructConfig,
    recipe::Recipe,
    registry,
    source::DataConfig,
    stage::eval::EvalConfig,
    train::{TowerMode, TrainConfig, log::LogConfig},
};

/// A resolved recipe: every value a run depends on, except the device and the output directory.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Plan {
    /// Recipe plug-in, as `medtune recipes` lists it.
    pub recipe: String,
    /// Seed of every random draw.
    pub seed: u64,
    /// Which samples.
    pub data: DataConfig,
    /// How instruction pairs are made from images.
    pub construct: ConstructConfig,
    /// Which rows are kept.
    pub qc: QcConfig,
    /// Which model.
    pub model: ModelConfig,
    /// Where the progress of training is written besides `log.jsonl`.
    pub log: LogConfig,
    /// Which weights are adapted.
    pub adapter: AdapterConfig,
    /// How they are trained.
    pub train: TrainConfig,
    /// How answers are generated.
    pub generate: GenerateConfig,
    /// What is answered.
    pub eval: EvalConfig,
    /// Who judges.
    pub judge: JudgeConfig,
    /// Language-model servers, limits and prices.
    pub llm: LlmConfig,
}

impl Default for Plan {
    fn default() -> Self {
        Self {
            recipe: "phantom".into(),
            seed: 42,
            data: DataConfig::default(),
            construct: ConstructConfig::default(),
            qc: QcConfig::default(),
            model: ModelConfig::default(),
            log: LogConfig::default(),
            adapter: AdapterConfig::default(),
            train: TrainConfig::default(),
            generate: GenerateConfig::default(),
            eval: EvalConfig::default(),
            judge: JudgeConfig::default(),
            llm: LlmConfig::default(),
        }
    }
}

/// A plan with the history of its values.
#[derive(Debug, Clone)]
pub struct Resolved {
    /// The plan.
    pub plan: Plan,
    /// What the user called the recipe: the name of the run directory.
    pub name: String,
    /// Every value with where it came from.
    pub settings: Vec<Setting>,
    /// Inputs that are not there, with the places where they are named.
    pub missing: Vec<String>,
}

impl Resolved {
    /// Resolves a recipe (a registered name, or the path of a TOML file) with overrides `key=value` on top.
    ///
    /// # Errors
    /// Everything that is wrong with the configuration, in one error.
    pub fn new(recipe: &str, overrides: &[String]) -> Result<Self> {
        let resolved = Self::for_planning(recipe, overrides, None)?;
        match resolved.missing.is_empty() {
            true => Ok(resolved),
            false => Err(configuration_error(&resolved.missing)),
        }
    }

    /// As [`Resolved::new`], for looking at a plan: inputs that are not there are listed, not refused. What was `chosen`
    /// for a limit of memory goes on top.
    ///
    /// # Errors
    /// Everything else that is wrong with the configuration, in one error.
    pub fn for_planning(recipe: &str, overrides: &[String], chosen: Option<(&str, &[String])>) -> Result<Self> {
        let mut config = Config::new::<Plan>();
        let chain = chain(recipe, &mut config.problems);
        for file in chain.iter().rev() {
            let mut document = Document::parse(file.name.clone(), &file.text);
            document.take(EXTENDS);
            config.layer::<Plan>(&document);
        }
        for text in overrides {
            config.set::<Plan>(text);
        }
        if let Some((limit, texts)) = chosen {
            texts.iter().for_each(|text| config.set_from::<Plan>(text, Origin::Fit(limit.into())));
        }
        let mut missing = Vec::new();
        let plan = config.finish::<Plan>();
        // Checks across keys would only add noise to a recipe that was not found.
        if let Some(plan) = plan.as_ref().filter(|_| !chain.is_empty()) {
            for (key, problem) in plan.problems() {
                config.object(&key, &problem);
            }
            let place = |(key, problem): (&str, String)| format!("{}: {key}: {problem}", config.origin(key));
            missing = plan.missing().into_iter().map(place).collect();
        }
        match plan.filter(|_| config.problems.is_empty()) {
            Some(plan) => Ok(Self { plan, name: stem(recipe), settings: config.settings().to_vec(), missing }),
            None => Err(configuration_error(&config.problems)),
        }
    }

    /// The plan as a recipe file with origins; reading it gives the same plan.
    #[must_use]
    pub fn to_toml(&self) -> String {
        let comment = format!(
            "Resolved plan of {} by medtune {}. A recipe file itself: `medtune run` takes it.",
            self.name,
            env!("CARGO_PKG_VERSION")
        );
        to_toml(&self.settings, &comment)
    }

    /// The recipe plug-in.
    ///
    /// # Errors
    /// There is none of this name.
    pub fn recipe(&self) -> Result<&'static dyn Recipe> {
        self.plan.recipe()
    }
}

impl Plan {
    /// The recipe plug-in.
    ///
    /// # Errors
    /// There is none of this name.
    pub fn recipe(&self) -> Result<&'static dyn Recipe> {
        let found = registry::recipes().find(|r| r.name() == self.recipe);
        found.ok_or_else(|| {
            Error::new(Kind::Config, "unknown recipe plug-in")
                .expected(names(registry::recipes().map(|r| r.name())))
                .found(&self.recipe)
                .help("`medtune recipes` lists them")
        })
    }

    /// The network, without weights.
    ///
    /// # Errors
    /// There is no such model or preset, or its configuration cannot be read.
    pub fn network(&self) -> Result<AnyVlm> {
        let device = DeviceSpec::Cpu.open()?;
        let options = self.model.load_options();
        let Some(dir) = self.model.checkpoint.as_deref() else {
            return Ok((models::find(&self.model.name)?.empty)(self.model.preset()?.name, &device)?.0);
        };
        let Some(name) = embedded_name(dir) else { return (models::detect(dir)?.shape)(dir, &options, &device) };
        let scratch = tempfile::tempdir().map_err(|e| Error::io(std::env::temp_dir(), e))?;
        embedded::find(name, &self.model.name)?.unpack(scratch.path())?;
        (models::detect(scratch.path())?.shape)(scratch.path(), &options, &device)
    }

    /// `[adapter]`, with how the frozen weights are held.
    #[must_use]
    pub fn adapter_config(&self) -> AdapterConfig {
        AdapterConfig { quantization: self.model.quantization, ..self.adapter.clone() }
    }

    /// The judge that the plan names, or else its recipe's own.
    ///
    /// # Errors
    /// There is none of this name, or it cannot be set up.
    pub fn make_judge(&self) -> Result<Box<dyn Judge>> {
        let Some(name) = &self.judge.name else { return self.recipe()?.judge(self) };
        let found = registry::judges().find(|j| j.name() == name);
        let known = || names(registry::judges().map(|j| j.name()));
        found
            .ok_or_else(|| Error::new(Kind::Config, "unknown judge").at("judge.name").expected(known()).found(name))?
            .open(self)
    }

    /// Key and problem of everything that the type of a value alone does not rule out.
    fn problems(&self) -> Vec<(String, String)> {
        let mut found = Vec::new();
        let mut add = |key: &str, problem: String| found.push((key.to_string(), problem));
        match self.recipe() {
            Ok(recipe) => recipe.check(self).into_iter().for_each(|p| add("recipe", p)),
            Err(e) => add("recipe", e.to_string()),
        }
        known(&mut add, "data.source", &self.data.source, registry::datasets().map(|d| d.name()));
        if self.judge.anchor == AnchorPolicy::File && self.judge.anchor_file.is_none() {
            add("judge.anchor", "\"file\" needs judge.anchor_file".into());
        }
        if let Some(name) = &self.judge.name {
            known(&mut add, "judge.name", name, registry::judges().map(|j| j.name()));
        }
        for (key, problem) in self.model.compat.problems(&self.model.name) {
            add(&key, problem);
        }
        for (key, problem) in self.log.problems() {
            add(&key, problem);
        }
        match models::find(&self.model.name) {
            Err(_) => known(&mut add, "model.name", &self.model.name, MODELS.iter().map(|m| m.name)),
            Ok(family) if self.model.checkpoint.is_none() => {
                known(&mut add, "model.preset", &self.model.preset, family.presets.iter().map(|p| p.name));
            }
            Ok(_) => {}
        }
        if self.model.quantization != Quantization::None && self.train.language == TowerMode::Full {
            add("model.quantization", "holds frozen weights, and train.language = \"full\" trains them".into());
        }
        // Sentences that begin with the key they are about.
        for sentence in self.adapter.problems().into_iter().chain(self.train.problems()).chain(self.llm.problems()) {
            let (key, problem) = sentence.split_once(' ').unwrap_or(("recipe", &sentence));
            add(key, problem.to_string());
        }
        if let Some(name) = self.model.checkpoint.as_deref().and_then(embedded_name)
            && models::find(&self.model.name).is_ok()
            && let Err(e) = embedded::find(name, &self.model.name)
        {
            add("model.checkpoint", e.to_string());
        }
        match self.data.firewall.parsed() {
            Err(e) => add("data.firewall.eval_sets", e.to_string()),
            Ok(sets) => sets.iter().filter(|(_, path)| !path.exists()).for_each(|(_, path)| {
                add("data.firewall.eval_sets", format!("{} does not exist", path.display()));
            }),
        }
        if self.data.test_fraction + self.data.validation_fraction >= 1.0 {
            add("data.validation_fraction", "together with data.test_fraction leaves no rows to train on".into());
        }
        let paths = [("model.checkpoint", &self.model.checkpoint), ("model.vision_tower", &self.model.vision_tower)];
        found.extend(absent(&paths).into_iter().map(|(key, problem)| (key.to_string(), problem)));
        found
    }

    /// Inputs that a run needs and a plan does not, and that are not there.
    fn missing(&self) -> Vec<(&'static str, String)> {
        absent(&[
            ("data.path", &self.data.path),
            ("data.image_dir", &self.data.image_dir),
            ("train.preference_data", &self.train.preference_data),
            ("judge.prompt", &self.judge.prompt),
            ("judge.anchor_file", &self.judge.anchor_file),
            ("judge.controls_before", &self.judge.controls_before),
        ])
    }
}

/// Keys whose path does not exist.
fn absent(paths: &[(&'static str, &Option<PathBuf>)]) -> Vec<(&'static str, String)> {
    let there = |path: &Path| embedded_name(path).is_some() || path.exists();
    let absent = paths.iter().filter_map(|(key, path)| Some((*key, path.as_deref().filter(|p| !there(p))?)));
    absent.map(|(key, path)| (key, format!("there is no file or directory {}", path.display()))).collect()
}

/// Name of a checkpoint that is compiled in; none for a directory.
#[must_use]
pub fn embedded_name(checkpoint: &Path) -> Option<&str> {
    checkpoint.to_str()?.strip_prefix("embedded:")
}

/// Key by which a recipe file builds on another.
const EXTENDS: &str = "extends";

/// Most files that may build on each other.
const MAX_CHAIN: usize = 16;

struct RecipeFile {
    name: String,
    text: String,
}

/// The recipe's file and the files it builds on, highest first.
fn chain(recipe: &str, problems: &mut Vec<String>) -> Vec<RecipeFile> {
    let mut files: Vec<RecipeFile> = Vec::new();
    let mut next = Some((recipe.to_string(), None));
    while let Some((name, asked)) = next.take() {
        let blame = |problem: String| match &asked {
            Some(place) => format!("{place}: {EXTENDS}: {problem}"),
            None => problem,
        };
        if files.iter().any(|f| f.name == name) || files.len() == MAX_CHAIN {
            problems.push(blame(format!("recipes build on each other in a circle through {name}")));
            break;
        }
        match read(&name) {
            Ok(text) => files.push(RecipeFile { name, text }),
            Err(problem) => {
                problems.push(blame(problem));
                break;
            }
        }
        let Some(file) = files.last() else { break };
        let base = Document::parse(file.name.clone(), &file.text).take(EXTENDS);
        if let Some((value, line)) = base {
            let place = format!("{}:{line}", file.name);
            match value.as_str() {
                Some(base) => next = Some((beside(&file.name, base), Some(place))),
                None => {
                    problems.push(format!("{place}: {EXTENDS}: expected the name or path of a recipe, found {value}"))
                }
            }
        }
    }
    files
}

/// The text of a recipe: an embedded one by name, else a file.
fn read(name: &str) -> std::result::Result<String, String> {
    if let Some(recipe) = registry::recipes().find(|r| r.name() == name) {
        return Ok(recipe.template().to_string());
    }
    std::fs::read_to_string(name).map_err(|e| {
        let known = names(registry::recipes().map(|r| r.name()));
        format!("no recipe `{name}`: it is none of the names {known}, and reading it as a file failed: {e}")
    })
}

/// A base recipe as `file` names it: a registered name, or a path relative to `file`.
fn beside(file: &str, base: &str) -> String {
    if registry::recipes().any(|r| r.name() == base) {
        return base.to_string();
    }
    let path = Path::new(file).parent().map_or_else(|| PathBuf::from(base), |dir| dir.join(base));
    path.display().to_string()
}

fn stem(recipe: &str) -> String {
    Path::new(recipe).file_stem().map_or_else(|| recipe.to_string(), |s| s.to_string_lossy().into_owned())
}

fn names<'a>(all: impl Iterator<Item = &'a str>) -> String {
    all.collect::<Vec<_>>().join(", ")
}

fn known<'a>(add: &mut impl FnMut(&str, String), key: &str, value: &str, all: impl Iterator<Item = &'a str> + Clone) {
    if !all.clone().any(|name| name == value) {
        add(key, format!("expected one of {}, found {value}", names(all)));
    }
}

fn configuration_error(problems: &[String]) -> Error {
    let list: String = problems.iter().map(|p| format!("\n  {p}")).collect();
    let count = match problems.len() {
        1 => "1 problem".to_string(),
        n => format!("{n} problems"),
    };
    Error::new(Kind::Config, format!("{count} in the configuration{list}"))
        .help("`medtune plan RECIPE` shows every value and where it comes from; `medtune explain KEY` explains one")
}
