//! The one training loop, for every model.

pub mod config;
pub mod schedule;

pub use config::{LossReduction, Recompute, SchedulerType, TowerMode, TrainConfig};
