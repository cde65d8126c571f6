//! The memory that a plan needs, as a table.

use std::path::Path;

use serde::Serialize;

use super::{bytes, columns};
use crate::{
    adapter::Quantization,
    cli::Global,
    error::Result,
    fit::{LongestRow, Situation, alternatives},
    plan::Plan,
    run_dir::read_json,
    train::memory::{Machine, Memory},
};

/// What is predicted, and from what.
#[derive(Debug, Serialize)]
pub(super) struct Prediction {
    device: String,
    machine: Machine,
    /// How the linear modules of the language model are held, if not as the rest.
    quantization: Quantization,
    /// The row that needs most.
    longest_row: LongestRow,
    /// Rows of a micro-batch.
    rows: usize,
    memory: Memory,
    /// Single changes that need less.
    less: Vec<Less>,
}

#[derive(Debug, Serialize)]
struct Less {
    set: Vec<String>,
    peak: u64,
}

impl Prediction {
    /// Of `plan`, whose results are in `out`.
    pub(super) fn new(global: &Global, plan: &Plan, out: &Path, rows: Option<usize>) -> Result<Self> {
        let encoded = read_json(&out.join("encode.json")).ok();
        let situation = Situation::new(plan, plan.network()?, &global.device, encoded.as_ref(), rows)?;
        let less = alternatives(plan, &situation)?.into_iter().map(|(set, peak)| Less { set, peak }).collect();
        Ok(Self {
            device: global.device.to_string(),
            machine: situation.machine(plan),
            quantization: plan.model.quantization,
            rows: plan.train.per_device_train_batch_size,
            memory: situation.predict(plan)?,
            longest_row: situation.row,
            less,
        })
    }

    pub(super) fn text(&self) -> String {
        let (memory, row) = (&self.memory, &self.longest_row);
        let amount = |n: u64| if n == 0 { "-".to_string() } else { bytes(n) };
        let held = match self.machine.held {
            crate::train::memory::Held::Float32 => "float32",
            crate::train::memory::Held::Half => "a half type",
            crate::train::memory::Held::Mapped => "the half type of their files, which are mapped",
        };
        let packed = match self.quantization {
            Quantization::None => String::new(),
            kind => format!(", the linear modules of the language model in {kind}"),
        };
        let measured = if self.machine.cpu { "" } else { ", a prediction that no measurement on this device backs" };
        let mut text = format!(
            "memory on {}{measured}: weights in {held}{packed}; {} rows of {} positions, {} image tiles and {} supervised each ({})\n",
            self.device, self.rows, row.length, row.tiles, row.supervised, row.known_from
        );
        let mut table = vec![["", "weights", "trained", "gradients", "optimizer"].map(String::from).to_vec()];
        for t in &memory.towers {
            let cells = [t.weights, t.trained, t.gradients, t.optimizer].map(amount);
            table.push(std::iter::once(format!("  {}", t.tower)).chain(cells).collect());
        }
        text.push_str(&columns(&table));
        let mut rest: Vec<Vec<String>> = Vec::new();
        rest.extend(memory.stays.iter().map(|i| vec![format!("  {}", i.name), bytes(i.bytes), String::new()]));
        for item in &memory.moments {
            let mark = if memory.largest() == Some(item) { "the largest moment, counted" } else { "at another moment" };
            rest.push(vec![format!("  {}", item.name), bytes(item.bytes), mark.into()]);
        }
        let files = match memory.mapped {
            0 => String::new(),
            n => format!("of it {} in mapped files, which the system takes back when memory is short", bytes(n)),
        };
        rest.push(vec!["together".into(), bytes(memory.peak), files]);
        text.push_str(&columns(&rest));
        if memory.layer_inputs > 0 {
            text.push_str(&format!(
                "each moment includes gradients or {} of layer inputs\n",
                bytes(memory.layer_inputs)
            ));
        }
        if !self.less.is_empty() {
            let rows = self.less.iter().map(|l| {
                let set: Vec<String> = l.set.iter().map(|s| format!("--set {s}")).collect();
                vec![format!("  {}", set.join(" ")), bytes(l.peak)]
            });
            text.push_str(&format!(
                "less memory, one change at a time (--fit SIZE chooses):\n{}",
                columns(&rows.collect::<Vec<_>>())
            ));
        }
        text
    }
}
