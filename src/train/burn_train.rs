//! Models in burn-train: its `SupervisedTraining` can drive any family, with batches from its own data loaders.

use burn::{
    data::dataloader::batcher::Batcher,
    module::{Module, ModuleVisitor, Param},
    optim::GradientsParams,
    tensor::{Device, ExecutionError, Tensor, TensorData},
    train::{
        InferenceStep, ItemLazy, TrainOutput, TrainStep,
        metric::{Adaptor, LossInput},
    },
};

use super::{
    loss::Loss,
    objective::Objective,
    params::{GradientSum, trained},
    step::{self, Saving, Vision},
};
use crate::{
    models::AnyVlm,
    vlm::{Batch, Encoded, PaddingSide, Vlm},
};

/// Loss of a batch, as burn-train's metrics take it.
#[derive(Debug)]
pub struct TokenLoss {
    /// Mean over the supervised positions, `[1]`.
    pub loss: Tensor<1>,
}

impl TokenLoss {
    fn new(loss: &Loss, device: &Device) -> Self {
        let mean = (loss.sum() / loss.nll.len().max(1) as f64) as f32;
        Self { loss: Tensor::from_data(TensorData::new(vec![mean], [1]), device) }
    }
}

impl Adaptor<LossInput> for TokenLoss {
    fn adapt(&self) -> LossInput {
        LossInput::new(self.loss.clone())
    }
}

impl ItemLazy for TokenLoss {
    fn sync(self) -> Result<Self, ExecutionError> {
        Ok(self)
    }
}

/// Pads encoded rows for training. A burn [`Batcher`].
#[derive(Debug, Clone)]
pub struct RowBatcher {
    /// Id that fills padded positions.
    pub pad_id: i32,
    /// Lengths are padded to a multiple of this.
    pub multiple: usize,
}

impl Batcher<Encoded, Batch> for RowBatcher {
    /// Rows stay in host memory; the step uploads them.
    fn batch(&self, items: Vec<Encoded>, _device: &Device) -> Batch {
        Batch::collate(&items, self.pad_id, PaddingSide::Right, self.multiple)
    }
}

impl TrainStep for AnyVlm {
    type Input = Batch;
    type Output = TokenLoss;

    /// Mean loss of the batch and its gradients. Whatever requires gradients is trained; see
    /// [`prepare`](crate::adapter::inject::prepare).
    fn step(&self, batch: Batch) -> TrainOutput<TokenLoss> {
        let device = device_of(self);
        let mut gradients = GradientSum::new(self);
        let objective = Objective::Tokens(1.0 / batch.supervised().max(1) as f64);
        let frozen = trained(self, self.towers()).iter().all(|t| t.tower != "vision");
        let vision = match batch.pixels(&device) {
            None => Vision::None,
            Some(pixels) if frozen => Vision::Features(self.valid().vision(pixels)),
            Some(pixels) => Vision::Pixels(pixels),
        };
        let loss = step::backward(self, &batch, &vision, &objective, Saving::RECOMPUTE, &device, &mut gradients)
            .expect("inputs of layers stay in memory");
        let item = TokenLoss::new(&loss, &device);
        let mut grads = Registered { sums: gradients.sums.into_iter(), params: GradientsParams::new() };
        self.visit(&mut grads);
        TrainOutput { grads: grads.params, item }
    }
}

impl InferenceStep for AnyVlm {
    type Input = Batch;
    type Output = TokenLoss;

    fn step(&self, batch: Batch) -> TokenLoss {
        let device = device_of(self);
        let plain = self.valid();
        let vision = batch.pixels(&device).map_or(Vision::None, |p| Vision::Features(plain.vision(p)));
        TokenLoss::new(&step::evaluate(&plain, &batch, &vision, Saving::default(), &device), &device)
    }
}

fn device_of(model: &AnyVlm) -> Device {
    let devices = model.collect_devices(Vec::new());
    devices.into_iter().next().expect("a model has parameters").without_autodiff()
}

/// Gives flat gradients, in module order, their shapes and ids back.
struct Registered<I> {
    sums: I,
    params: GradientsParams,
}

impl<I: Iterator<Item = Option<Tensor<1>>>> ModuleVisitor for Registered<I> {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        if param.is_require_grad()
            && let Some(Some(gradient)) = self.sums.next()
        {
            self.params.register::<D>(param.id, gradient.reshape(param.shape()));
        }
    }
}

#[cfg(test)]
mod tests {
    use burn::{
        data::{dataloader::DataLoaderBuilder, dataset::InMemDataset},
        optim::AdamWConfig,
        train::{Learner, SupervisedTraining, metric::LossMetric},
    };

    use super::*;
    use crate::{
        adapter::{AdapterConfig, inject::prepare},
        models::find,
        progress::Progress,
        train::{TowerMode, TrainConfig, live::BarRenderer},
        vlm::{ImageSpan, Pixels},
    };

    /// Rows with a rule that can be learnt: each token is followed by the next number.
    fn rows(tiles: usize, patches: usize, size: usize) -> Vec<Encoded> {
        (0..6)
            .map(|id| {
                let text = 10;
                let span = if tiles > 0 { patches } else { 0 };
                let input_ids: Vec<i32> = (0..span + text).map(|i| ((i + id) % 9) as i32 + 3).collect();
                Encoded {
                    id: id.to_string(),
                    labels: input_ids.iter().enumerate().map(|(i, t)| if i > span { *t } else { -100 }).collect(),
                    input_ids,
                    spans: if span > 0 { vec![ImageSpan { start: 0, len: span }] } else { vec![] },
                    pixels: vec![
                        Pixels {
                            data: (0..3 * size * size).map(|i| ((i + id) as f32 * 0.1).sin()).collect(),
                            shape: [3, size, size]
                        };
                        tiles
                    ],
                }
            })
            .collect()
    }

    #[test]
    fn burns_own_training_trains_the_tiny_preset() {
        let device = Device::flex();
        let def = find("llava_med").unwrap();
        let model = (def.init)("tiny", Some(32), 1, &device).unwrap();
        let (_, patches) = (def.empty)("tiny", &device).unwrap();
        let config = TrainConfig { language: TowerMode::Full, ..TrainConfig::default() };
        let model = prepare(model, &config, &AdapterConfig::default(), 1).unwrap().model;
        let rows = rows(1, patches, 64);
        let batcher = RowBatcher { pad_id: 0, multiple: 8 };
        let whole = batcher.batch(rows.clone(), &device);
        let mean = |m: &AnyVlm| InferenceStep::step(m, whole.clone()).loss.into_scalar::<f32>();
        let before = mean(&model);
        let loader =
            || DataLoaderBuilder::new(batcher.clone()).batch_size(3).shuffle(7).build(InMemDataset::new(rows.clone()));
        let dir = tempfile::tempdir().unwrap();
        let result = SupervisedTraining::new(dir.path(), loader(), loader())
            .metrics((LossMetric::new(),))
            .num_epochs(8)
            .with_application_logger(None)
            .renderer(Box::new(BarRenderer::new(Progress::Silent)))
            .launch(Learner::new(model, AdamWConfig::new().with_epsilon(1e-8).init(), 2e-3));
        assert!(result.error.is_none(), "{:?}", result.error);
        let after = mean(&result.model);
        assert!(after < 0.75 * before, "loss {before} -> {after}");
    }
}
