//! `trainer_state.json` in the layout of Hugging Face's `TrainerState`, for tools that read it.

use serde_json::{Map, Value, json};

use super::LogLine;
use crate::train::{TrainConfig, checkpoint::State};

/// Name of the file.
pub const FILE: &str = "trainer_state.json";

/// The state after `state.step` of `total` steps, whose log lines so far are `log`.
#[must_use]
pub fn trainer_state(
    config: &TrainConfig,
    state: &State,
    total: usize,
    steps_per_epoch: usize,
    log: &[LogLine],
) -> Value {
    let checkpoint = |step: usize| format!("{}{step}", crate::train::checkpoint::PREFIX);
    json!({
        "best_global_step": state.best.map(|b| b.step),
        "best_metric": state.best.map(|b| b.eval_loss),
        "best_model_checkpoint": state.best.map(|b| checkpoint(b.step)),
        "epoch": state.step as f64 / steps_per_epoch.max(1) as f64,
        "eval_steps": config.eval_steps,
        "global_step": state.step,
        "is_hyper_param_search": false,
        "is_local_process_zero": true,
        "is_world_process_zero": true,
        "log_history": log.iter().filter(|l| l.step <= state.step).map(entry).collect::<Vec<_>>(),
        "logging_steps": config.logging_steps,
        "max_steps": total,
        "num_input_tokens_seen": state.tokens,
        "num_train_epochs": total.div_ceil(steps_per_epoch.max(1)),
        "save_steps": config.save_steps,
        "stateful_callbacks": {},
        "total_flos": 0.0,
        "train_batch_size": config.per_device_train_batch_size,
        "trial_name": null,
        "trial_params": null,
    })
}

/// A line of the log with its keys in alphabetical order, as Hugging Face writes them.
fn entry(line: &LogLine) -> Value {
    let Ok(Value::Object(map)) = serde_json::to_value(line) else { return Value::Null };
    let mut pairs: Vec<(String, Value)> = map.into_iter().collect();
    pairs.sort_by(|a, b| a.0.cmp(&b.0));
    Value::Object(pairs.into_iter().collect::<Map<_, _>>())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::train::checkpoint::Best;

    #[test]
    fn the_history_ends_at_the_step() {
        let line = |step, loss| LogLine { step, epoch: 0.5, loss, ..LogLine::default() };
        let log = [line(5, Some(2.0)), line(10, Some(1.0)), line(15, Some(0.5))];
        let state = State { step: 10, best: Some(Best { step: 5, eval_loss: 1.5 }), ..State::default() };
        let value = trainer_state(&TrainConfig::default(), &state, 15, 20, &log);
        assert_eq!(value["log_history"].as_array().unwrap().len(), 2);
        assert_eq!((&value["log_history"][1]["loss"], &value["epoch"]), (&json!(1.0), &json!(0.5)));
        assert_eq!(value["best_model_checkpoint"], "checkpoint-5");
    }
}
