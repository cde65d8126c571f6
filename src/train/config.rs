//! `[train]` of a recipe.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// What happens to the weights of one tower.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum TowerMode {
    /// Nothing changes; runs without gradients.
    Frozen,
    /// The targets of `[adapter]` get low-rank updates.
    Lora,
    /// Every weight is trained.
    Full,
}

/// How the learning rate moves after the warm-up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum SchedulerType {
    /// Straight down to zero.
    Linear,
    /// Half a cosine wave down to zero.
    Cosine,
    /// Stays.
    Constant,
}

/// How the losses of the supervised tokens of one optimizer step become one number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum LossReduction {
    /// Mean over all supervised tokens of the step: every token weighs the same, however rows are split into batches.
    Token,
    /// Mean of the means of the micro-batches, as Hugging Face's trainer of 2024 had it.
    MicroMean,
}

/// `[train]` of a recipe. Names and defaults as in Hugging Face's `TrainingArguments` where it has the value.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct TrainConfig {
    /// What happens to the vision tower: `frozen`, `lora` or `full`.
    pub vision: TowerMode,
    /// What happens to the projector between vision and language: `frozen`, `lora` or `full`.
    pub projector: TowerMode,
    /// What happens to the language model: `frozen`, `lora` or `full`.
    pub language: TowerMode,
    /// Peak learning rate.
    pub learning_rate: f64,
    /// Peak learning rate of the projector when it is trained in full; the common one when absent.
    pub mm_projector_lr: Option<f64>,
    /// Decoupled weight decay; biases and norms are left out.
    pub weight_decay: f64,
    /// Decay of AdamW's mean of gradients.
    pub adam_beta1: f64,
    /// Decay of AdamW's mean of squared gradients.
    pub adam_beta2: f64,
    /// Added to AdamW's denominator.
    pub adam_epsilon: f64,
    /// Gradients are scaled down to this global norm; 0 turns clipping off.
    pub max_grad_norm: f64,
    /// `linear`, `cosine` or `constant`, after the warm-up.
    pub lr_scheduler_type: SchedulerType,
    /// Share of all steps in which the learning rate rises from zero; used when `warmup_steps` is 0.
    pub warmup_ratio: f64,
    /// Steps in which the learning rate rises from zero.
    pub warmup_steps: usize,
    /// Passes over the training rows; used when `max_steps` is 0.
    pub num_train_epochs: f64,
    /// Optimizer steps; 0 means `num_train_epochs` decides.
    pub max_steps: usize,
    /// Rows of one forward pass.
    pub per_device_train_batch_size: usize,
    /// Forward passes of one optimizer step.
    pub gradient_accumulation_steps: usize,
    /// Rows of one forward pass of an evaluation.
    pub per_device_eval_batch_size: usize,
    /// `token`, or `micro_mean` for parity with older Hugging Face trainers.
    pub loss_reduction: LossReduction,
    /// Longest row in positions, images included; longer rows are rejected and counted. 0 means the model's own limit.
    pub max_length: usize,
    /// Rows of similar length share a batch.
    pub group_by_length: bool,
    /// Rows are padded to a multiple of this many positions.
    pub pad_to_multiple_of: usize,
    /// Recompute each decoder layer in the backward pass instead of keeping its activations: far less memory, about a
    /// third more time. `auto` recomputes when the activations of a batch are estimated above 1 GiB.
    pub recompute: Recompute,
    /// Frozen weights stay in their file: each layer is read when it is used and dropped afterwards. Needs a checkpoint
    /// in safetensors of a half type, and the CPU.
    pub offload_params: bool,
    /// The inputs of the decoder layers wait for the backward pass in a file of the run directory.
    pub offload_activations: bool,
    /// Steps between two lines of log.jsonl.
    pub logging_steps: usize,
    /// Steps between two evaluations of the validation rows; 0 means none.
    pub eval_steps: usize,
    /// Steps between two checkpoints; 0 means only at the end of training and at the best evaluation.
    pub save_steps: usize,
    /// Checkpoints that are kept besides the best one.
    pub save_total_limit: usize,
    /// Evaluations without improvement after which training stops; 0 means never.
    pub early_stopping_patience: usize,
    /// Ends with the weights of the best evaluation instead of the last step.
    pub load_best_model_at_end: bool,
    /// Threads that read and encode rows.
    pub dataloader_num_workers: usize,
}

/// Whether activations are kept or computed again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Recompute {
    /// By the estimated size of the activations.
    Auto,
    /// Always layer by layer.
    Always,
    /// Never; one graph for the whole model.
    Never,
}

impl Default for TrainConfig {
    fn default() -> Self {
        Self {
            vision: TowerMode::Frozen,
            projector: TowerMode::Full,
            language: TowerMode::Lora,
            learning_rate: 2e-4,
            mm_projector_lr: None,
            weight_decay: 0.0,
            adam_beta1: 0.9,
            adam_beta2: 0.999,
            adam_epsilon: 1e-8,
            max_grad_norm: 1.0,
            lr_scheduler_type: SchedulerType::Cosine,
            warmup_ratio: 0.03,
            warmup_steps: 0,
            num_train_epochs: 1.0,
            max_steps: 0,
            per_device_train_batch_size: 8,
            gradient_accumulation_steps: 1,
            per_device_eval_batch_size: 16,
            loss_reduction: LossReduction::Token,
            max_length: 0,
            group_by_length: false,
            pad_to_multiple_of: 8,
            recompute: Recompute::Auto,
            offload_params: false,
            offload_activations: false,
            logging_steps: 1,
            eval_steps: 0,
            save_steps: 100,
            save_total_limit: 2,
            early_stopping_patience: 0,
            load_best_model_at_end: false,
            dataloader_num_workers: 1,
        }
    }
}

impl TrainConfig {
    /// What happens to the tower called `name`.
    #[must_use]
    pub fn mode(&self, name: &str) -> TowerMode {
        match name {
            "vision" => self.vision,
            "projector" => self.projector,
            _ => self.language,
        }
    }

    /// Everything that is wrong with the values, in words.
    #[must_use]
    pub fn problems(&self) -> Vec<String> {
        let mut problems = Vec::new();
        let mut require = |ok: bool, what: &str| {
            if !ok {
                problems.push(format!("train.{what}"));
            }
        };
        let rate = |x: f64| x.is_finite() && x >= 0.0;
        require(rate(self.learning_rate), "learning_rate must be a number from 0");
        require(self.mm_projector_lr.is_none_or(rate), "mm_projector_lr must be a number from 0");
        require(rate(self.weight_decay), "weight_decay must be a number from 0");
        require((0.0..1.0).contains(&self.adam_beta1), "adam_beta1 must be at least 0 and below 1");
        require((0.0..1.0).contains(&self.adam_beta2), "adam_beta2 must be at least 0 and below 1");
        require(self.adam_epsilon > 0.0, "adam_epsilon must be above 0");
        require(rate(self.max_grad_norm), "max_grad_norm must be a number from 0");
        require((0.0..=1.0).contains(&self.warmup_ratio), "warmup_ratio must be from 0 to 1");
        require(
            self.max_steps > 0 || (self.num_train_epochs.is_finite() && self.num_train_epochs > 0.0),
            "num_train_epochs must be above 0 when max_steps is 0",
        );
        require(self.per_device_train_batch_size > 0, "per_device_train_batch_size must be at least 1");
        require(self.per_device_eval_batch_size > 0, "per_device_eval_batch_size must be at least 1");
        require(self.gradient_accumulation_steps > 0, "gradient_accumulation_steps must be at least 1");
        require(self.pad_to_multiple_of > 0, "pad_to_multiple_of must be at least 1");
        require(self.logging_steps > 0, "logging_steps must be at least 1");
        require(
            self.recompute != Recompute::Never || !(self.offload_params || self.offload_activations),
            "recompute must not be never with offload_params or offload_activations: both work layer by layer",
        );
        require(self.save_total_limit > 0, "save_total_limit must be at least 1");
        require(
            self.eval_steps > 0 || (self.early_stopping_patience == 0 && !self.load_best_model_at_end),
            "eval_steps must be set for early_stopping_patience and load_best_model_at_end",
        );
        require(
            [self.vision, self.projector, self.language].iter().any(|m| *m != TowerMode::Frozen),
            "vision, projector and language are all frozen: nothing would be trained",
        );
        problems
    }

    /// Optimizer steps of one pass over `rows` rows; an incomplete last accumulation is a step of its own.
    #[must_use]
    pub fn steps_per_epoch(&self, rows: usize) -> usize {
        rows.div_ceil(self.per_device_train_batch_size).div_ceil(self.gradient_accumulation_steps)
    }

    /// Optimizer steps of the whole training on `rows` rows.
    #[must_use]
    pub fn total_steps(&self, rows: usize) -> usize {
        if self.max_steps > 0 {
            self.max_steps
        } else {
            (self.num_train_epochs * self.steps_per_epoch(rows) as f64).ceil() as usize
        }
    }

    /// Steps of the warm-up, `warmup_ratio` rounded up as Hugging Face does.
    #[must_use]
    pub fn warmup(&self, total_steps: usize) -> usize {
        if self.warmup_steps > 0 { self.warmup_steps } else { (self.warmup_ratio * total_steps as f64).ceil() as usize }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn defaults_have_no_problem_and_bad_values_are_all_reported() {
        assert_eq!(TrainConfig::default().problems(), Vec::<String>::new());
        let bad = TrainConfig {
            learning_rate: f64::NAN,
            adam_beta1: 1.0,
            early_stopping_patience: 3,
            projector: TowerMode::Frozen,
            language: TowerMode::Frozen,
            ..TrainConfig::default()
        };
        assert_eq!(bad.problems().len(), 4, "{:?}", bad.problems());
    }

    #[test]
    fn steps_count_the_incomplete_tail() {
        let c = TrainConfig {
            per_device_train_batch_size: 4,
            gradient_accumulation_steps: 2,
            num_train_epochs: 2.0,
            ..TrainConfig::default()
        };
        assert_eq!((c.steps_per_epoch(17), c.total_steps(17), c.warmup(100)), (3, 6, 3));
    }
}
