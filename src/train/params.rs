//! The trained tensors of a model by name, as flat vectors, in module order.

use std::collections::HashMap;

use burn::{
    module::{Module, ModuleMapper, ModuleVisitor, Param, ParamId},
    tensor::{Gradients, Tensor},
};

use crate::{adapter::target::tower_of, nn::visit::named_params, vlm::Tower};

/// One trained tensor.
#[derive(Debug, Clone, PartialEq)]
pub struct Trained {
    /// Name as in a checkpoint or a PEFT file, for example `model.layers.0.self_attn.q_proj.lora_A.weight`.
    pub name: String,
    /// Shape in the module: a linear weight is `[d_in, d_out]`.
    pub shape: Vec<usize>,
    /// Whether it belongs to the weight of a `Linear` (or to a low-rank update), whose checkpoint layout is transposed.
    pub transposed: bool,
    /// Whether it is part of a low-rank update.
    pub lora: bool,
    /// Tower it belongs to.
    pub tower: &'static str,
    /// The parameter.
    pub id: ParamId,
}

impl Trained {
    /// Number of values.
    #[must_use]
    pub fn len(&self) -> usize {
        self.shape.iter().product()
    }

    /// Whether it has no value.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// Lists what `model` trains.
#[must_use]
pub fn trained<M: Module>(model: &M, towers: &'static [Tower]) -> Vec<Trained> {
    let params = named_params(model).into_iter().filter(|p| p.require_grad);
    params
        .map(|p| {
            let (name, lora) = lora_name(&p.name);
            Trained {
                tower: tower_of(towers, &p.name),
                transposed: p.linear_weight || lora && p.shape.len() == 2,
                shape: p.shape,
                id: p.id,
                name,
                lora,
            }
        })
        .collect()
}

/// PEFT's name of a parameter path of this program, and whether it is part of an update.
fn lora_name(path: &str) -> (String, bool) {
    let Some((module, part)) = path.split_once(".weight.adapter.lora.") else { return (path.to_string(), false) };
    let name = match part {
        "a" => "lora_A.weight",
        "b" => "lora_B.weight",
        _ => "lora_magnitude_vector",
    };
    (format!("{module}.{name}"), true)
}

/// Handle of a trained parameter, to take its gradient.
#[derive(Debug)]
enum Leaf {
    R1(Tensor<1>),
    R2(Tensor<2>),
    R3(Tensor<3>),
    R4(Tensor<4>),
}

impl Leaf {
    fn take(&self, gradients: &mut Gradients) -> Option<Tensor<1>> {
        match self {
            Self::R1(t) => t.grad_remove(gradients),
            Self::R2(t) => t.grad_remove(gradients).map(flat),
            Self::R3(t) => t.grad_remove(gradients).map(flat),
            Self::R4(t) => t.grad_remove(gradients).map(flat),
        }
    }
}

fn flat<const D: usize>(t: Tensor<D>) -> Tensor<1> {
    let n = t.shape().num_elements();
    t.reshape([n])
}

/// Gradients of the trained tensors, flat, in the order of [`trained`]; `None` where no backward pass reached.
#[derive(Debug)]
pub struct GradientSum {
    leaves: Vec<Leaf>,
    /// The sums.
    pub sums: Vec<Option<Tensor<1>>>,
}

impl GradientSum {
    /// No gradient yet for the trained tensors of `model`.
    #[must_use]
    pub fn new<M: Module>(model: &M) -> Self {
        let mut visitor = Leaves(Vec::new());
        model.visit(&mut visitor);
        let sums = visitor.0.iter().map(|_| None).collect();
        Self { leaves: visitor.0, sums }
    }

    /// Adds what one backward pass found.
    pub fn add(&mut self, mut gradients: Gradients) {
        for (leaf, sum) in self.leaves.iter().zip(&mut self.sums) {
            if let Some(gradient) = leaf.take(&mut gradients) {
                *sum = Some(match sum.take() {
                    Some(s) => s + gradient,
                    None => gradient,
                });
            }
        }
    }
}

struct Leaves(Vec<Leaf>);

impl ModuleVisitor for Leaves {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        if !param.is_require_grad() {
            return;
        }
        // The rank is known per call only; ranks above 4 do not occur in any model here.
        let tensor: Box<dyn std::any::Any> = Box::new(param.base());
        let leaf = match D {
            1 => tensor.downcast().map(|t| Leaf::R1(*t)),
            2 => tensor.downcast().map(|t| Leaf::R2(*t)),
            3 => tensor.downcast().map(|t| Leaf::R3(*t)),
            _ => tensor.downcast().map(|t| Leaf::R4(*t)),
        };
        self.0.push(leaf.expect("trained tensors have rank 1 to 4"));
    }
}

/// Values of the trained tensors without autodiff, flat, in module order.
#[must_use]
pub fn values<M: Module>(model: &M) -> Vec<Tensor<1>> {
    let mut visitor = Values(Vec::new());
    model.visit(&mut visitor);
    visitor.0
}

struct Values(Vec<Tensor<1>>);

impl ModuleVisitor for Values {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        if param.is_require_grad() {
            self.0.push(flat(param.base().without_autodiff()));
        }
    }
}

/// Passes every trained tensor through `update`, which gets its index in module order and its flat value.
#[must_use]
pub fn update<M: Module>(model: M, update: impl FnMut(usize, Tensor<1>) -> Tensor<1>) -> M {
    model.map(&mut Update { index: 0, update })
}

struct Update<F> {
    index: usize,
    update: F,
}

impl<F: FnMut(usize, Tensor<1>) -> Tensor<1>> ModuleMapper for Update<F> {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        if !param.is_require_grad() {
            return param;
        }
        let index = self.index;
        self.index += 1;
        param.map(|t| {
            let shape = t.shape();
            (self.update)(index, flat(t.without_autodiff())).reshape(shape).autodiff().require_grad()
        })
    }
}

/// Replaces trained tensors by name; names that `values` lacks keep their value.
#[must_use]
pub fn replace<M: Module>(model: M, trained: &[Trained], mut values: HashMap<String, Tensor<1>>) -> M {
    update(model, |i, old| values.remove(&trained[i].name).unwrap_or(old))
}
