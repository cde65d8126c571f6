//! Projectors from vision features to decoder embeddings, as LLaVA's `build_vision_projector` makes them.

use burn::{
    module::Module,
    nn::Linear,
    tensor::{Device, Tensor},
};

use super::{
    linear::{linear_forward, linear_module},
    norm::LayerNorm,
};
use crate::kernel::gelu::gelu;

/// The activation between two linear layers; exact (erf) GELU. It has no parameters but takes a number in the sequence.
#[derive(Module, Debug, Default)]
pub struct ExactGelu {
    _none: (),
}

/// One member of the sequence.
#[derive(Module, Debug)]
pub enum ProjectorLayer {
    /// A layer norm in front.
    Norm(LayerNorm),
    /// A linear layer.
    Linear(Linear),
    /// The activation between two of them.
    Gelu(ExactGelu),
}

/// Members of `mlp{depth}x_gelu`: linear layers at even numbers, activations at odd ones.
#[must_use]
pub fn mlp_gelu(vision_width: usize, hidden_size: usize, depth: usize, device: &Device) -> Vec<ProjectorLayer> {
    let mut layers = vec![ProjectorLayer::Linear(linear_module(vision_width, hidden_size, true, device))];
    for _ in 1..depth {
        layers.push(ProjectorLayer::Gelu(ExactGelu::default()));
        layers.push(ProjectorLayer::Linear(linear_module(hidden_size, hidden_size, true, device)));
    }
    layers
}

/// Runs the members in order.
///
/// # Shapes
/// `[tiles, patches, vision_width]` -> `[tiles, patches, hidden_size]`
#[must_use]
pub fn project(layers: &[ProjectorLayer], x: Tensor<3>) -> Tensor<3> {
    layers.iter().fold(x, |x, layer| match layer {
        ProjectorLayer::Norm(norm) => norm.forward(x),
        ProjectorLayer::Linear(linear) => linear_forward(linear, x),
        ProjectorLayer::Gelu(_) => gelu(x),
    })
}
