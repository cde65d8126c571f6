//! How an update starts.

use std::fmt;

use burn::tensor::{DType, Device, Tensor, TensorData};
use rand::Rng;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{decompose, lora::LoraSpec};
use crate::random;

/// `init_lora_weights` of PEFT: `true`, or the name of a method.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(untagged)]
pub enum InitLoraWeights {
    /// `true`: A at random, B zero. `false` would leave both at random, and is refused.
    Switch(bool),
    /// `gaussian`, `pissa`, `pissa_niter_N` or `olora`.
    Name(String),
}

impl Default for InitLoraWeights {
    fn default() -> Self {
        Self::Switch(true)
    }
}

impl fmt::Display for InitLoraWeights {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Switch(value) => write!(f, "{value}"),
            Self::Name(name) => f.write_str(name),
        }
    }
}

/// What a name stands for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Method {
    Kaiming,
    Gaussian,
    Pissa { niter: Option<usize> },
    Olora,
}

impl InitLoraWeights {
    fn method(&self) -> Option<Method> {
        Some(match self {
            Self::Switch(true) => Method::Kaiming,
            Self::Switch(false) => return None,
            Self::Name(name) => match name.as_str() {
                "gaussian" => Method::Gaussian,
                "pissa" => Method::Pissa { niter: None },
                "olora" => Method::Olora,
                other => Method::Pissa { niter: Some(other.strip_prefix("pissa_niter_")?.parse().ok()?) },
            },
        })
    }

    /// What is wrong with it, if anything.
    #[must_use]
    pub fn problem(&self) -> Option<String> {
        match self.method() {
            Some(_) => None,
            None => Some(format!("must be true, \"gaussian\", \"pissa\", \"pissa_niter_16\" or \"olora\", not {self}")),
        }
    }

    /// Whether the start takes the update's product off the weight.
    #[must_use]
    pub fn changes_the_weight(&self) -> bool {
        matches!(self.method(), Some(Method::Pissa { .. } | Method::Olora))
    }

    /// Whether an adapter that began so is understood from its A and B, and from the weight.
    #[must_use]
    pub fn is_readable(&self) -> bool {
        match self {
            Self::Switch(_) => true,
            Self::Name(name) => ["gaussian", "eva", "orthogonal", "pissa", "olora"].contains(&name.as_str()),
        }
    }

    /// Whether the start needs all singular vectors of the weight.
    #[must_use]
    pub fn decomposes_all(&self) -> bool {
        self.method() == Some(Method::Pissa { niter: None })
    }
}

/// `A` `[d_in, r]` and `B` `[r, d_out]` of the start.
pub(super) fn factors(
    spec: &LoraSpec,
    d_in: usize,
    d_out: usize,
    device: &Device,
    weight: &dyn Fn() -> Tensor<2>,
) -> (Tensor<2>, Tensor<2>) {
    let tensor = |values: Vec<f32>, shape: [usize; 2]| {
        Tensor::<2>::from_data(TensorData::new(values, shape), (device, DType::F32))
    };
    let zeros = || Tensor::<2>::zeros([spec.r, d_out], (device, DType::F32));
    let r = spec.r;
    // Half of the square root of the scale goes to either side, so that scale * A B is what was decomposed.
    let half = (1.0 / spec.scale).sqrt();
    let host = || decompose::Matrix::new(d_in, d_out, weight().into_data().convert::<f32>());
    match spec.init.method().unwrap_or(Method::Kaiming) {
        Method::Kaiming => {
            let bound = 1.0 / (d_in.max(1) as f64).sqrt();
            (tensor(draws(spec, d_in * r, |u, _| (u * 2.0 - 1.0) * bound), [d_in, r]), zeros())
        }
        Method::Gaussian => {
            // Box and Muller's way from two uniform numbers to a normal one.
            let normal = |u: f64, v: f64| (-2.0 * u.max(1e-300).ln()).sqrt() * (std::f64::consts::TAU * v).cos();
            (tensor(draws(spec, d_in * r, |u, v| normal(u, v) / r as f64), [d_in, r]), zeros())
        }
        Method::Pissa { niter } => {
            let start = random::stream(spec.dropout.seed, &format!("pissa {}", spec.dropout.module), 0);
            let svd = match niter {
                None => decompose::singular(&host()),
                Some(niter) => decompose::low_rank(&weight(), r, niter, start),
            };
            let root = |j: usize| svd.values.get(j).map_or(0.0, |s| s.max(0.0).sqrt() * half);
            let a = (0..d_in * r).map(|i| (svd.left(i / r, i % r) * root(i % r)) as f32).collect();
            let b = (0..r * d_out).map(|i| (svd.right(i % d_out, i / d_out) * root(i / d_out)) as f32).collect();
            (tensor(a, [d_in, r]), tensor(b, [r, d_out]))
        }
        Method::Olora => {
            // PEFT decomposes the transpose, W^T = Q R, and scales neither factor.
            let (q, rest) = decompose::first_columns(&host(), r);
            (tensor(rest, [d_in, r]), tensor(q, [r, d_out]))
        }
    }
}

/// Values made from two uniform numbers in `[0, 1]` each; the first of them alone keeps the stream of one.
fn draws(spec: &LoraSpec, n: usize, value: impl Fn(f64, f64) -> f64) -> Vec<f32> {
    let stream = |name: &str| random::stream(spec.dropout.seed, &format!("{name} {}", spec.dropout.module), 0);
    let (mut first, mut second) = (stream("lora_A"), stream("lora_A gaussian"));
    let uniform = |x: u32| f64::from(x) / f64::from(u32::MAX);
    (0..n).map(|_| value(uniform(first.next_u32()), uniform(second.next_u32())) as f32).collect()
}
