//! Agreement with the original code, on fixtures that it made. The root is `MEDTUNE_GOLDEN`, by default `tests/golden`.

pub(crate) mod fixture;
mod internvl;
mod llava_med;
mod metrics;
mod peft;
mod qwen_vl;
