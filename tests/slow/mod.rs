//! What is too slow for every edit; compiled with the feature `slow`, listed in `docs/slow_checks.md`.

mod browser;
#[cfg(feature = "wgpu")]
mod lavapipe;
#[cfg(feature = "vulkan")]
mod swiftshader;
