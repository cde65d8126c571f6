//! How far a kind of device may differ from the CPU: one table for the known answers at its start, for
//! `medtune verify`, and for the tests against the original code.

use serde::Serialize;

use super::DeviceSpec;

/// Largest differences, relative to the largest magnitude of what is compared.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Tolerance {
    /// Kind of device.
    pub kind: &'static str,
    /// Of one operation in f32 on numbers of magnitude one.
    pub operation: f64,
    /// Of one operation in a half type.
    pub half_operation: f64,
    /// Of logits.
    pub logits: f64,
    /// Of the loss.
    pub loss: f64,
    /// Of the gradient of any trained tensor.
    pub gradient: f64,
    /// Of the loss after any of ten optimizer steps.
    pub curve: f64,
    /// What the limits of the tests against the original code are multiplied by.
    pub parity: f32,
}

/// Shaders, in whichever language, add in another order than the CPU.
const SHADERS: Tolerance = Tolerance {
    kind: "wgpu",
    operation: 3e-5,
    half_operation: 1e-2,
    logits: 5e-4,
    loss: 1e-4,
    gradient: 5e-3,
    curve: 2e-3,
    parity: 4.0,
};

/// The table. The CPU's own line bounds what its vector instructions and thread count may change. A GPU adds in another
/// order; CUDA multiplies f32 matrices in TF32 (10 bits of fraction) where that is faster, and large models in bf16.
pub const TOLERANCES: [Tolerance; 4] = [
    Tolerance {
        kind: "cpu",
        operation: 1e-5,
        half_operation: 1e-2,
        logits: 1e-4,
        loss: 1e-5,
        gradient: 1e-3,
        curve: 1e-4,
        parity: 1.0,
    },
    SHADERS,
    Tolerance { kind: "vulkan", ..SHADERS },
    Tolerance {
        kind: "cuda",
        operation: 3e-3,
        half_operation: 2e-2,
        logits: 3e-2,
        loss: 5e-3,
        gradient: 5e-2,
        curve: 2e-2,
        parity: 100.0,
    },
];

impl Tolerance {
    /// The line of a device.
    #[must_use]
    pub fn of(spec: &DeviceSpec) -> Self {
        Self::of_kind(spec.resolve().kind())
    }

    /// The line of a kind of device.
    pub(super) fn of_kind(kind: &str) -> Self {
        TOLERANCES.into_iter().find(|t| t.kind == kind).expect("every kind of device has a line, as a test asserts")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::KINDS;

    #[test]
    fn every_kind_has_a_line_and_none_is_stricter_than_the_cpu() {
        let kinds: Vec<_> = KINDS.iter().map(DeviceSpec::kind).collect();
        assert_eq!(TOLERANCES.map(|t| t.kind).to_vec(), kinds);
        let cpu = Tolerance::of(&DeviceSpec::Cpu);
        for t in TOLERANCES {
            assert!(t.operation >= cpu.operation && t.logits >= cpu.logits && t.curve >= cpu.curve, "{t:?}");
            assert!(t.loss >= cpu.loss && t.gradient >= cpu.gradient && t.parity >= cpu.parity, "{t:?}");
        }
    }
}
