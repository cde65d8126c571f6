//! Builds hallucination-aware instruction data for medical vision-language models, checks it, fine-tunes on it and
//! judges the result.
//!
//! The data path, one module an arrow: [`plan`] -> [`stage::build`] -> [`stage::qc`] -> [`stage::encode`] ->
//! [`stage::train`] -> [`stage::eval`] -> [`stage::judge`] -> [`stage::report`].

pub mod ablate;
pub mod adapter;
pub mod batching;
pub mod bench;
pub mod cli;
pub mod commands;
pub mod config;
pub mod device;
pub mod error;
pub mod export;
pub mod fit;
pub mod generate;
pub mod hub;
pub mod image;
pub mod judge;
pub mod kernel;
pub mod leak;
pub mod llm;
pub mod loader;
pub mod manifest;
pub mod metric;
pub mod nn;
pub mod parallel;
pub mod plan;
pub mod progress;
pub mod qc;
pub mod random;
pub mod recipe;
pub mod registry;
pub mod repro;
pub mod resident;
pub mod review;
pub mod row_file;
pub mod run;
pub mod run_dir;
pub mod sample;
pub mod score;
pub mod source;
pub mod stage;
pub mod statistics;
pub mod text;
pub mod train;
pub mod verify;
pub mod vlm;
pub mod weights;

#[path = "../datasets/mod.rs"]
pub mod datasets;
#[path = "../models/mod.rs"]
pub mod models;
#[path = "../recipes/mod.rs"]
pub mod recipes;

pub use error::{Error, Kind, Result};
pub use registry::Registry;
