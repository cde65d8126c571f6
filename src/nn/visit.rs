//! Names of parameters: the path in the module without enum variants, which is the checkpoint's name.

use burn::{
    module::{Module, ModuleVisitor, Param, ParamId},
    tensor::{Bool, DType, Int, Tensor},
};

/// What Burn calls the container of what hangs on a parameter.
const REPARAMETERIZATION: &str = "Reparameterization";

/// Where a visitor or mapper is. Feed it `enter_module` and `exit_module`.
#[derive(Debug, Default, Clone)]
pub struct PathStack {
    segments: Vec<(String, Box<str>)>,
}

impl PathStack {
    /// Call from `enter_module`.
    pub fn enter(&mut self, name: &str, container: &str) {
        self.segments.push((name.to_string(), container.into()));
    }

    /// Call from `exit_module`.
    pub fn exit(&mut self) {
        self.segments.pop();
    }

    /// Checkpoint name of the current parameter.
    #[must_use]
    pub fn name(&self) -> String {
        let segments: Vec<&str> =
            self.segments.iter().filter(|(_, c)| !c.starts_with("Enum:")).map(|(name, _)| name.as_str()).collect();
        segments.join(".")
    }

    /// Whether the current parameter is the weight of a `Linear`, which checkpoints hold transposed.
    #[must_use]
    pub fn is_linear_weight(&self) -> bool {
        self.segments.last().is_some_and(|(name, container)| name == "weight" && &**container == "Struct:Linear")
    }

    /// Whether the current parameter is the table of an `Embedding`.
    #[must_use]
    pub fn is_embedding(&self) -> bool {
        self.segments.last().is_some_and(|(name, container)| name == "weight" && &**container == "Struct:Embedding")
    }

    /// Whether the current parameter is a table that is indexed by tokens; tables of positions are small, and added.
    #[must_use]
    pub fn is_token_embedding(&self) -> bool {
        self.is_embedding() && !self.segments.iter().any(|(name, _)| name.contains("position"))
    }

    /// Whether the current parameter belongs to a norm.
    #[must_use]
    pub fn is_norm(&self) -> bool {
        self.segments.last().is_some_and(|(_, container)| container.ends_with("Norm"))
    }

    /// Whether the current parameter belongs to an adapter.
    #[must_use]
    pub fn is_adapter(&self) -> bool {
        self.segments.iter().any(|(_, container)| &**container == REPARAMETERIZATION)
    }
}

/// Checkpoint name of a path that Burn gives as one string: enum variants, the only segments that start with a capital
/// letter, are left out.
#[must_use]
pub fn checkpoint_name(path: &str) -> String {
    let segments: Vec<&str> = path.split('.').filter(|s| !s.starts_with(|c: char| c.is_ascii_uppercase())).collect();
    segments.join(".")
}

/// One float parameter of a module.
#[derive(Debug, Clone, PartialEq)]
pub struct NamedParam {
    /// Checkpoint name, for example `model.layers.0.self_attn.q_proj.weight`.
    pub name: String,
    /// Id that optimizers and gradients are keyed by.
    pub id: ParamId,
    /// Shape in the module; a `Linear` weight is `[d_input, d_output]`.
    pub shape: Vec<usize>,
    /// Type of the values; none while the parameter holds no memory.
    pub dtype: Option<DType>,
    /// Whether gradients are computed; false while the parameter holds no memory.
    pub require_grad: bool,
    /// Whether checkpoints hold it transposed.
    pub linear_weight: bool,
    /// Whether it belongs to an adapter.
    pub adapter: bool,
    /// Whether it belongs to a norm.
    pub norm: bool,
    /// Whether it is a table that rows are looked up in, by tokens and not by places.
    pub embedding: bool,
    /// Whether an [attachment](crate::adapter::attachment::Attachment) hangs on it.
    pub attached: bool,
}

impl NamedParam {
    /// Shape in a checkpoint.
    #[must_use]
    pub fn checkpoint_shape(&self) -> Vec<usize> {
        if self.linear_weight { self.shape.iter().rev().copied().collect() } else { self.shape.clone() }
    }

    /// Number of values.
    #[must_use]
    pub fn num_elements(&self) -> usize {
        self.shape.iter().product()
    }
}

/// All float parameters of `module` in the order of its fields, without reading or allocating any.
#[must_use]
pub fn named_params<M: Module>(module: &M) -> Vec<NamedParam> {
    let mut visitor = Names::default();
    module.visit(&mut visitor);
    visitor.found
}

#[derive(Default)]
struct Names {
    path: PathStack,
    found: Vec<NamedParam>,
}

impl ModuleVisitor for Names {
    fn enter_module(&mut self, name: &str, container: &str) {
        self.path.enter(name, container);
        // What hangs on a parameter is visited right after it.
        if let (REPARAMETERIZATION, Some(last)) = (container, self.found.last_mut()) {
            last.attached = true;
        }
    }

    fn exit_module(&mut self, _name: &str, _container: &str) {
        self.path.exit();
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        let ready = param.is_initialized();
        self.found.push(NamedParam {
            name: self.path.name(),
            id: param.id,
            shape: param.lazy_shape().to_vec(),
            dtype: ready.then(|| param.dtype()),
            require_grad: ready && param.is_require_grad(),
            linear_weight: self.path.is_linear_weight(),
            adapter: self.path.is_adapter(),
            norm: self.path.is_norm(),
            embedding: self.path.is_token_embedding(),
            attached: false,
        });
    }

    fn visit_int<const D: usize>(&mut self, _param: &Param<Tensor<D, Int>>) {}

    fn visit_bool<const D: usize>(&mut self, _param: &Param<Tensor<D, Bool>>) {}
}
