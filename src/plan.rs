//! From a recipe file and overrides to a resolved plan; all errors at once.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::{
    adapter::AdapterConfig, generate::GenerateConfig, judge::JudgeConfig, models::ModelConfig, qc::QcConfig,
    source::DataConfig, stage::eval::EvalConfig, train::TrainConfig,
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
    /// Which rows are kept.
    pub qc: QcConfig,
    /// Which model.
    pub model: ModelConfig,
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
}

impl Default for Plan {
    fn default() -> Self {
        Self {
            recipe: "phantom".into(),
            seed: 42,
            data: DataConfig::default(),
            qc: QcConfig::default(),
            model: ModelConfig::default(),
            adapter: AdapterConfig::default(),
            train: TrainConfig::default(),
            generate: GenerateConfig::default(),
            eval: EvalConfig::default(),
            judge: JudgeConfig::default(),
        }
    }
}
