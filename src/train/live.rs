//! The live view of training: burn-train's metrics, shown by burn-train's full-screen renderer (feature `tui`, on a
//! terminal) or by a progress bar or plain lines.

use std::sync::{Arc, atomic::AtomicBool};

use burn::{
    data::dataloader::Progress as Done,
    tensor::TensorReadError,
    train::{
        LearnerSummary,
        logger::{EvaluationProgressLogger, TrainingProgressLogger},
        metric::{
            Metric, MetricAttributes, MetricDefinition, MetricEntry, MetricId, MetricMetadata, MetricName, Numeric,
            NumericAttributes, NumericEntry, SerializedEntry,
            state::{FormatOptions, NumericMetricState},
        },
        renderer::{EvaluationName, MetricState, MetricsRenderer, MetricsRendererEvaluation, MetricsRendererTraining},
    },
};

use super::log::LogLine;
use crate::progress::{Progress, Task};

/// A number per step as a burn-train metric.
#[derive(Clone)]
pub struct ScalarMetric {
    name: MetricName,
    higher_is_better: bool,
    state: NumericMetricState,
}

impl ScalarMetric {
    /// A metric called `name`.
    #[must_use]
    pub fn new(name: &str, higher_is_better: bool) -> Self {
        Self { name: Arc::new(name.to_string()), higher_is_better, state: NumericMetricState::new() }
    }

    fn format(&self) -> FormatOptions {
        FormatOptions::new(self.name.clone()).precision(4)
    }
}

impl Metric for ScalarMetric {
    type Input = f64;

    fn update(&mut self, value: &f64, _metadata: &MetricMetadata) -> Result<SerializedEntry, TensorReadError> {
        self.state.update(*value, 1);
        Ok(self.state.compute_update(self.format()))
    }

    fn compute(&mut self) -> Result<SerializedEntry, TensorReadError> {
        let format = self.format();
        Ok(self.state.compute_final(format))
    }

    fn clear(&mut self) {
        self.state.reset();
    }

    fn name(&self) -> MetricName {
        self.name.clone()
    }

    fn attributes(&self) -> MetricAttributes {
        NumericAttributes { unit: None, higher_is_better: self.higher_is_better }.into()
    }
}

impl Numeric for ScalarMetric {
    fn value(&self) -> Option<NumericEntry> {
        Some(self.state.current_value())
    }

    fn running_value(&self) -> Option<NumericEntry> {
        Some(self.state.running_value())
    }

    fn final_value(&self) -> NumericEntry {
        self.state.final_value()
    }
}

/// Metrics of a running training and the renderer that shows them.
pub struct Live {
    renderer: Box<dyn MetricsRenderer>,
    metrics: [ScalarMetric; 4],
    evaluation: ScalarMetric,
    total: usize,
}

impl Live {
    /// Begins to show a training of `total` steps of which `done` are done. A user who stops it in the full-screen view
    /// sets `stop`.
    #[must_use]
    pub fn start(progress: Progress, total: usize, done: usize, stop: Arc<AtomicBool>) -> Self {
        Self::with(renderer(progress, stop), total, done)
    }

    /// As [`Live::start`], with any renderer.
    #[must_use]
    pub fn with(mut renderer: Box<dyn MetricsRenderer>, total: usize, done: usize) -> Self {
        let metrics = [
            ScalarMetric::new("loss", false),
            ScalarMetric::new("learning_rate", false),
            ScalarMetric::new("grad_norm", false),
            ScalarMetric::new("tokens_per_second", true),
        ];
        // The validation loss continues the training loss in the same plot.
        let evaluation = ScalarMetric::new("loss", false);
        for metric in &metrics {
            renderer.register_metric(MetricDefinition::new(MetricId::new(metric.name()), metric));
        }
        renderer.start(1, 1, Some(total), Some("train"));
        renderer.start_split("train", total);
        renderer.update_split(done);
        Self { renderer, metrics, evaluation, total }
    }

    /// Shows what `line` holds.
    pub fn show(&mut self, line: &LogLine) {
        let metadata = metadata(line.step, self.total);
        let values = [line.loss, line.learning_rate, line.grad_norm, line.tokens_per_second];
        for (metric, value) in self.metrics.iter_mut().zip(values) {
            if let Some(state) = value.and_then(|v| state(metric, v, &metadata)) {
                self.renderer.update_train(state);
            }
        }
        if let Some(state) = line.eval_loss.and_then(|v| state(&mut self.evaluation, v, &metadata)) {
            self.renderer.update_valid(state);
        }
    }

    /// `steps` steps are done.
    pub fn done(&mut self, steps: usize) {
        self.renderer.update_split(steps);
    }

    /// Ends the view.
    pub fn finish(mut self) {
        self.renderer.end_split();
        self.renderer.end();
        // A view that cannot be closed properly is no reason to lose the training.
        let _ = self.renderer.on_train_end(None);
    }
}

fn metadata(step: usize, total: usize) -> MetricMetadata {
    let progress = Done::new(step, total, Some("steps".to_string()));
    MetricMetadata { progress, iteration: Some(step), lr: None }
}

fn state(metric: &mut ScalarMetric, value: f64, metadata: &MetricMetadata) -> Option<MetricState> {
    let entry = metric.update(&value, metadata).ok()?;
    Some(MetricState::Numeric(MetricEntry::new(MetricId::new(metric.name()), entry), metric.value()))
}

#[cfg(feature = "tui")]
fn renderer(progress: Progress, stop: Arc<AtomicBool>) -> Box<dyn MetricsRenderer> {
    use std::{io::IsTerminal, sync::atomic::Ordering};

    use burn::train::{Interrupter, renderer::tui::TuiMetricsRendererWrapper};

    if progress != Progress::Bar || !std::io::stdout().is_terminal() {
        return Box::new(BarRenderer::new(progress));
    }
    let interrupter = Interrupter::new();
    let watched = interrupter.clone();
    std::thread::spawn(move || {
        while !stop.load(Ordering::Relaxed) {
            if watched.should_stop() {
                stop.store(true, Ordering::Relaxed);
            }
            std::thread::sleep(std::time::Duration::from_millis(200));
        }
    });
    Box::new(TuiMetricsRendererWrapper::new(interrupter, None))
}

#[cfg(not(feature = "tui"))]
fn renderer(progress: Progress, _stop: Arc<AtomicBool>) -> Box<dyn MetricsRenderer> {
    Box::new(BarRenderer::new(progress))
}

/// A burn-train renderer on this program's progress bar or lines.
pub struct BarRenderer {
    progress: Progress,
    task: Option<Task>,
    done: usize,
    names: Vec<(MetricId, MetricName)>,
    /// Latest text of each metric, in order of appearance.
    latest: Vec<(String, String)>,
}

impl BarRenderer {
    /// Nothing is shown before the training starts.
    #[must_use]
    pub fn new(progress: Progress) -> Self {
        Self { progress, task: None, done: 0, names: Vec::new(), latest: Vec::new() }
    }

    fn note(&mut self, prefix: &str, state: &MetricState) {
        let MetricState::Numeric(entry, Some(value)) = state else { return };
        let Some((_, name)) = self.names.iter().find(|(id, _)| *id == entry.metric_id) else { return };
        let name = format!("{prefix}{name}");
        let text = short(value.current());
        match self.latest.iter_mut().find(|(n, _)| *n == name) {
            Some((_, old)) => *old = text,
            None => self.latest.push((name, text)),
        }
        let shown: Vec<String> = self
            .latest
            .iter()
            .filter(|(n, _)| n.ends_with("loss") || n == "tokens_per_second")
            .map(|(n, v)| format!("{} {v}", n.replace("tokens_per_second", "tokens/s")))
            .collect();
        if let Some(task) = &mut self.task {
            task.message(shown.join(", "));
        }
    }
}

fn short(value: f64) -> String {
    if value.abs() >= 100.0 { format!("{value:.0}") } else { format!("{value:.4}") }
}

impl MetricsRendererTraining for BarRenderer {
    fn update_train(&mut self, state: MetricState) {
        self.note("", &state);
    }

    fn update_valid(&mut self, state: MetricState) {
        self.note("validation ", &state);
    }

    fn on_train_end(&mut self, _summary: Option<LearnerSummary>) -> Result<(), Box<dyn std::error::Error>> {
        Ok(())
    }
}

impl TrainingProgressLogger for BarRenderer {
    fn start(&mut self, _epochs: usize, _first: usize, items: Option<usize>, label: Option<&str>) {
        self.task = Some(self.progress.start(label.unwrap_or("train"), items.unwrap_or(0) as u64));
    }

    fn update_epoch(&mut self, _epoch: usize) {}

    fn start_split(&mut self, _split: &str, _items: usize) {}

    fn update_split(&mut self, done: usize) {
        let new = done.saturating_sub(self.done);
        self.done = done;
        if let Some(task) = &mut self.task {
            task.advance(new as u64);
        }
    }

    fn end_split(&mut self) {}

    fn end(&mut self) {
        if let Some(task) = self.task.take() {
            task.finish();
        }
    }

    fn log_event_training(&mut self, event: String) {
        self.progress.say(&event);
    }
}

impl EvaluationProgressLogger for BarRenderer {
    fn start_global_progress(&mut self, _tests: usize) {}

    fn start_test(&mut self, _name: &str, _items: usize) {}

    fn update_test_progress(&mut self, _items: usize) {}

    fn end_test(&mut self) {}

    fn end_global_progress(&mut self) {}

    fn log_event_evaluation(&mut self, event: String) {
        self.progress.say(&event);
    }
}

impl MetricsRendererEvaluation for BarRenderer {
    fn update_test(&mut self, _name: EvaluationName, _state: MetricState) {}
}

impl MetricsRenderer for BarRenderer {
    fn manual_close(&mut self) {}

    fn register_metric(&mut self, definition: MetricDefinition) {
        self.names.push((definition.metric_id, definition.name));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_bar_shows_the_latest_losses() {
        let mut bar = BarRenderer::new(Progress::Silent);
        let mut metric = ScalarMetric::new("loss", false);
        bar.register_metric(MetricDefinition::new(MetricId::new(metric.name()), &metric));
        for (step, loss) in [(1, 3.0), (2, 1.5)] {
            bar.update_train(state(&mut metric, loss, &metadata(step, 2)).unwrap());
        }
        bar.update_valid(state(&mut ScalarMetric::new("loss", false), 250.0, &metadata(2, 2)).unwrap());
        let expected = [("loss", "1.5000"), ("validation loss", "250")].map(|(n, v)| (n.to_string(), v.to_string()));
        assert_eq!(bar.latest, expected);
    }
}
