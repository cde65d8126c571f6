//! The one training loop, for every model.

pub mod burn_train;
pub mod checkpoint;
pub mod clip;
pub mod config;
pub mod diagnose;
mod features;
pub mod flops;
pub mod live;
pub mod log;
pub mod loss;
pub mod memory;
mod meter;
pub mod objective;
mod offload;
pub mod optimizer;
pub mod params;
pub mod schedule;
pub mod step;
pub mod trainer;

pub use config::{LossReduction, ObjectiveType, Recompute, SchedulerType, TowerMode, TrainConfig};
