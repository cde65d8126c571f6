//! What a program is made of besides what is built in: recipes, readers, rules and judges of a crate of your own.
//!
//! A crate that depends on medtune, with this as its `main.rs`, is medtune with one recipe, one rule and one judge more.
//! They are listed, explained, selected in recipe files and run like the built-in ones.
//!
//! ```no_run
//! use medtune::{
//!     Registry, Result,
//!     judge::{Judge, Judged, JudgeDef, Outcome, Ruling, Stance},
//!     plan::Plan,
//!     recipe::Recipe,
//!     sample::Sample,
//! };
//!
//! /// Asks about every image whether it is in focus.
//! struct Focus;
//!
//! impl Recipe for Focus {
//!     fn name(&self) -> &'static str {
//!         "focus"
//!     }
//!
//!     fn about(&self) -> &'static str {
//!         "One question an image: whether it is in focus."
//!     }
//!
//!     fn template(&self) -> &'static str {
//!         "recipe = \"focus\"\nextends = \"phantom\"\n[judge]\nname = \"short\"\n"
//!     }
//!
//!     fn construct(&self, _plan: &Plan, mut sample: Sample) -> Result<Vec<Sample>> {
//!         sample.turns[0].text = "<image>\nIs this image in focus?".into();
//!         sample.turns[1].text = "Yes, this image is in focus.".into();
//!         Ok(vec![sample])
//!     }
//!
//!     fn judge(&self, plan: &Plan) -> Result<Box<dyn Judge>> {
//!         Short.open(plan)
//!     }
//! }
//!
//! /// Likes short answers.
//! struct Short;
//!
//! impl JudgeDef for Short {
//!     fn name(&self) -> &'static str {
//!         "short"
//!     }
//!
//!     fn about(&self) -> &'static str {
//!         "An answer is right when it has fewer than ten words."
//!     }
//!
//!     fn open(&self, _plan: &Plan) -> Result<Box<dyn Judge>> {
//!         Ok(Box::new(Self))
//!     }
//! }
//!
//! impl Judge for Short {
//!     fn signature(&self) -> serde_json::Value {
//!         serde_json::json!({ "kind": "short", "version": 1 })
//!     }
//!
//!     fn judge(&self, judged: Judged<'_>) -> Result<Ruling> {
//!         let correct = judged.answer.split_whitespace().count() < 10;
//!         let (stance, expected, reason) = (Stance::Unclear, Stance::Unclear, String::new());
//!         Ok(Outcome::Scored { scores: None, agreement: None, stance, expected, correct, reason }.into())
//!     }
//! }
//!
//! fn main() -> std::process::ExitCode {
//!     Registry::default().recipe(&Focus).judge(&Short).main()
//! }
//! ```

use std::{ffi::OsString, process::ExitCode, sync::OnceLock};

use clap::Parser;

use crate::{
    cli::Cli,
    commands,
    datasets::DATASETS,
    error::{Error, Kind, Result},
    judge::{JUDGES, JudgeDef},
    qc::QcRule,
    recipe::Recipe,
    recipes::RECIPES,
    source::Source,
};

/// Plug-ins from outside. [`Registry::default`] has none; each method adds one.
#[derive(Clone, Default)]
pub struct Registry {
    recipes: Vec<&'static dyn Recipe>,
    datasets: Vec<&'static dyn Source>,
    rules: Vec<&'static dyn QcRule>,
    judges: Vec<&'static dyn JudgeDef>,
}

/// Those of this process.
static INSTALLED: OnceLock<Registry> = OnceLock::new();

impl Registry {
    /// Adds a recipe.
    #[must_use]
    pub fn recipe(mut self, recipe: &'static dyn Recipe) -> Self {
        self.recipes.push(recipe);
        self
    }

    /// Adds a data set reader, for `data.source`.
    #[must_use]
    pub fn dataset(mut self, dataset: &'static dyn Source) -> Self {
        self.datasets.push(dataset);
        self
    }

    /// Adds a rule of quality control; it comes after the rules of every recipe.
    #[must_use]
    pub fn rule(mut self, rule: &'static dyn QcRule) -> Self {
        self.rules.push(rule);
        self
    }

    /// Adds a judge, for `judge.name`.
    #[must_use]
    pub fn judge(mut self, judge: &'static dyn JudgeDef) -> Self {
        self.judges.push(judge);
        self
    }

    /// Makes these the plug-ins of this process.
    ///
    /// # Errors
    /// Two have one name, or this process has its plug-ins already.
    pub fn install(self) -> Result<()> {
        let twice = |kind: &str, mut names: Vec<&str>| {
            names.sort_unstable();
            match names.windows(2).find(|pair| pair[0] == pair[1]) {
                Some(pair) => {
                    Err(Error::new(Kind::Config, format!("two plug-ins of one kind have one name: {kind}")).at(pair[0]))
                }
                None => Ok(()),
            }
        };
        twice("recipe", RECIPES.iter().chain(&self.recipes).map(|r| r.name()).collect())?;
        twice("data set", DATASETS.iter().chain(&self.datasets).map(|d| d.name()).collect())?;
        twice("rule", crate::qc::RULES.iter().chain(&self.rules).map(|r| r.code()).collect())?;
        twice("judge", JUDGES.iter().chain(&self.judges).map(|j| j.name()).collect())?;
        INSTALLED
            .set(self)
            .map_err(|_| Error::new(Kind::Config, "the plug-ins of a process are installed once, before anything else"))
    }

    /// The whole program: parses the command line, does what it says, prints what went wrong.
    #[must_use]
    pub fn main(self) -> ExitCode {
        let cli = Cli::parse();
        let json = cli.global.json;
        match self.install().and_then(|()| commands::run(cli)) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => {
                commands::print_error(&error, json);
                ExitCode::from(error.kind().exit_code())
            }
        }
    }
}

/// Runs a command line with the plug-ins that are installed; `args` begin with the name of the program.
///
/// # Errors
/// The command line is not understood, or whatever stopped it.
pub fn run(args: impl IntoIterator<Item = impl Into<OsString> + Clone>) -> Result<()> {
    let cli = Cli::try_parse_from(args)
        .map_err(|e| Error::new(Kind::Config, "the command line is not understood").source(e))?;
    commands::run(cli)
}

fn installed() -> &'static Registry {
    static NONE: Registry =
        Registry { recipes: Vec::new(), datasets: Vec::new(), rules: Vec::new(), judges: Vec::new() };
    INSTALLED.get().unwrap_or(&NONE)
}

/// All recipes: built in, then from outside.
pub fn recipes() -> impl Iterator<Item = &'static dyn Recipe> + Clone {
    RECIPES.iter().chain(&installed().recipes).copied()
}

/// All data set readers.
pub fn datasets() -> impl Iterator<Item = &'static dyn Source> + Clone {
    DATASETS.iter().chain(&installed().datasets).copied()
}

/// All judges that have a name.
pub fn judges() -> impl Iterator<Item = &'static dyn JudgeDef> + Clone {
    JUDGES.iter().chain(&installed().judges).copied()
}

/// The rules of a recipe, and those from outside.
#[must_use]
pub fn rules(recipe: &dyn Recipe) -> Vec<&'static dyn QcRule> {
    recipe.rules().iter().chain(&installed().rules).copied().collect()
}
