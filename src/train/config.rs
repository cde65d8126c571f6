//! `[train]` of a recipe.

use std::path::PathBuf;

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

/// What training minimises.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum ObjectiveType {
    /// The negative log-likelihood of the answers.
    Sft,
    /// Direct preference optimisation: chosen answers are to become likelier than rejected ones to the same question.
    Dpo,
}

/// `[train]` of a recipe. Names and defaults as in Hugging Face's `TrainingArguments` where it has the value.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct TrainConfig {
    /// `sft`, or `dpo` on pairs of a kept and a rejected answer.
    pub objective: ObjectiveType,
    /// Preference pairs in JSONL as `medtune data export --format dpo` writes them, for `objective = "dpo"`; when
    /// absent, the answers that quality control rejected for what they say, beside those it kept.
    pub preference_data: Option<PathBuf>,
    /// How far `dpo` lets the model move from where it started: large keeps it close.
    pub beta: f64,
    /// Share of pairs that `dpo` assumes to be the wrong way round.
    pub label_smoothing: f64,
    /// Weight of the likelihood of the chosen answers beside the preference; 0 leaves it out.
    pub rpo_alpha: f64,
    /// What happens to the vision tower: `frozen`, `lora` or `full`.
    pub vision: TowerMode,
    /// What happens to the projector between vision and language: `frozen`, `lora` or `full`.
    pub projector: TowerMode,
    /// What happens to the language model: `frozen`, `lora` or `full`.
    pub language: TowerMode,
    /// Peak learning rate.
    pub learning_rate: f64,
    /// Peak learning rate of what is trained of the projector; the common one when absent.
    pub mm_projector_lr: Option<f64>,
    /// Peak learning rate of what is trained of the vision tower; the common one when absent.
    pub mm_vision_tower_lr: Option<f64>,
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
    /// Several rows, each with its images, share a sequence of up to `packing_length` positions, without seeing each
    /// other: less padding, the same gradients. `per_device_train_batch_size` then counts sequences.
    pub packing: bool,
    /// Positions of a packed sequence; 0 means `max_length`. A longer row is a sequence of its own.
    pub packing_length: usize,
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
    /// A step whose loss is above this many times the median of the last `loss_spike_window` losses changes no weight, and
    /// is counted; 0 lets every step count.
    pub loss_spike_factor: f64,
    /// Losses that a spike is measured by; none is found before there are as many.
    pub loss_spike_window: usize,
    /// A checkpoint directory to continue from, of this run or of another with the same trained tensors. `latest` or
    /// nothing means the newest of this run that can be used.
    pub resume_from_checkpoint: Option<String>,
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
            objective: ObjectiveType::Sft,
            preference_data: None,
            beta: 0.1,
            label_smoothing: 0.0,
            rpo_alpha: 0.0,
            vision: TowerMode::Frozen,
            projector: TowerMode::Full,
            language: TowerMode::Lora,
            learning_rate: 2e-4,
            mm_projector_lr: None,
            mm_vision_tower_lr: None,
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
            packing: false,
            packing_length: 0,
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
            loss_spike_factor: 0.0,
            loss_spike_window: 32,
            resume_from_checkpoint: None,
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
        require(self.mm_vision_tower_lr.is_none_or(rate), "mm_vision_tower_lr must be a number from 0");
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
        let dpo = self.objective == ObjectiveType::Dpo;
        require(self.beta.is_finite() && self.beta > 0.0, "beta must be above 0");
        require((0.0..0.5).contains(&self.label_smoothing), "label_smoothing must be at least 0 and below 0.5");
        require(rate(self.rpo_alpha), "rpo_alpha must be a number from 0");
        require(dpo || self.preference_data.is_none(), "preference_data is for objective = \"dpo\"");
        require(!(dpo && self.packing), "packing must be off for objective = \"dpo\", whose rows are pairs");
        require(!self.packing || self.packed_positions() > 0, "packing needs packing_length or max_length");
        require(
            self.loss_spike_factor == 0.0 || (self.loss_spike_factor.is_finite() && self.loss_spike_factor > 1.0),
            "loss_spike_factor must be above 1, or 0",
        );
        require(self.loss_spike_window > 0, "loss_spike_window must be at least 1");
        require(
            [self.vision, self.projector, self.language].iter().any(|m| *m != TowerMode::Frozen),
            "vision, projector and language are all frozen: nothing would be trained",
        );
        problems
    }

    /// Positions that packed rows may take together.
    #[must_use]
    pub fn packed_positions(&self) -> usize {
        if self.packing_length > 0 { self.packing_length } else { self.max_length }
    }

    /// The values that decide the trained weights: how often is logged and saved, by how many threads rows are read, and
    /// where memory is saved change nothing, and have one value here.
    #[must_use]
    pub fn deciding(&self) -> Self {
        Self {
            logging_steps: 1,
            save_steps: 0,
            save_total_limit: 1,
            dataloader_num_workers: 1,
            offload_params: false,
            offload_activations: false,
            resume_from_checkpoint: None,
            ..self.clone()
        }
    }

    /// Optimizer steps of the whole training, of `steps_per_epoch` a pass.
    #[must_use]
    pub fn total_steps(&self, steps_per_epoch: usize) -> usize {
        if self.max_steps > 0 {
            self.max_steps
        } else {
            (self.num_train_epochs * steps_per_epoch as f64).ceil() as usize
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
    fn steps_are_rounded_up() {
        let c = TrainConfig { num_train_epochs: 2.5, ..TrainConfig::default() };
        assert_eq!((c.total_steps(3), c.warmup(100)), (8, 3));
    }

    #[test]
    fn what_changes_no_weight_does_not_decide() {
        let a = TrainConfig { save_steps: 7, resume_from_checkpoint: Some("latest".into()), ..TrainConfig::default() };
        let b = TrainConfig { learning_rate: 1.0, ..TrainConfig::default() };
        assert_eq!(a.deciding(), TrainConfig::default().deciding());
        assert_ne!(b.deciding(), TrainConfig::default().deciding());
    }
}
