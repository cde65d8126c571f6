//! Generation with a key-value cache: greedy, sampling, beam search.

mod beam;
mod sampling;
mod session;

pub use beam::{Hypothesis, beam_search};
pub use sampling::{argmax, choose, process_logits, softmax};
pub use session::Session;

use burn::{module::Module, tensor::Device};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::{error::Result, models::AnyVlm, random, vlm::Encoded};

/// `[generate]` of a recipe.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct GenerateConfig {
    /// Most tokens of an answer.
    pub max_new_tokens: usize,
    /// 0 is greedy.
    pub temperature: f64,
    /// Most likely tokens that sampling draws from; 0 means all.
    pub top_k: usize,
    /// Smallest set of most likely tokens whose probability exceeds this; 1 means all.
    pub top_p: f64,
    /// Beams; 1 means no beam search.
    pub num_beams: usize,
    /// Exponent of the length that divides a beam's score.
    pub length_penalty: f64,
    /// Rows answered at once.
    pub batch_size: usize,
}

impl Default for GenerateConfig {
    fn default() -> Self {
        Self {
            max_new_tokens: 256,
            temperature: 0.0,
            top_k: 50,
            top_p: 1.0,
            num_beams: 1,
            length_penalty: 1.0,
            batch_size: 8,
        }
    }
}

/// Answers prompts: the generated ids of each row, in the order of `rows`, with the stop id if there was one.
///
/// Rows of similar length are answered together, `batch_size` at once; the draws of a row depend only on the seed and
/// the row's id, so neither the batch size nor the other rows matter. `on_done` is called with the index and ids of
/// each row when it is complete. The model runs without autodiff.
///
/// # Errors
/// An empty prompt, or logits that are not finite.
#[expect(clippy::too_many_arguments, reason = "each is a separate decision of the caller")]
pub fn generate(
    model: &AnyVlm,
    rows: &[Encoded],
    pad_id: i32,
    stop_ids: &[i32],
    config: &GenerateConfig,
    seed: u64,
    device: &Device,
    on_done: &mut dyn FnMut(usize, &[i32]),
) -> Result<Vec<Vec<i32>>> {
    let (model, device) = (model.valid(), device.clone().without_autodiff());
    let mut order: Vec<usize> = (0..rows.len()).collect();
    order.sort_by_key(|i| (rows[*i].input_ids.len(), *i));
    let mut answers = vec![Vec::new(); rows.len()];
    let at_once = if config.num_beams > 1 { 1 } else { config.batch_size.max(1) };
    if config.max_new_tokens == 0 {
        return Ok(answers);
    }
    for batch in order.chunks(at_once) {
        let prompts: Vec<Encoded> = batch.iter().map(|i| rows[*i].clone()).collect();
        let (mut session, logits) = Session::start(&model, &prompts, pad_id, config.max_new_tokens, &device)?;
        if config.num_beams > 1 {
            let best = beam_search(&mut session, &logits[0], stop_ids, config)?.into_iter().next();
            answers[batch[0]] = best.map(|h| h.ids).unwrap_or_default();
            on_done(batch[0], &answers[batch[0]]);
            continue;
        }
        answer_batch(&mut session, logits, rows, batch, stop_ids, config, seed, |i, ids| {
            on_done(i, &ids);
            answers[i] = ids;
        })?;
    }
    Ok(answers)
}

/// Greedy or sampled answers of one batch. Rows that are done leave the batch when half of it is.
#[expect(clippy::too_many_arguments, reason = "the state of one batch")]
fn answer_batch(
    session: &mut Session<'_>,
    mut logits: Vec<Vec<f32>>,
    rows: &[Encoded],
    batch: &[usize],
    stop_ids: &[i32],
    config: &GenerateConfig,
    seed: u64,
    mut done: impl FnMut(usize, Vec<i32>),
) -> Result<()> {
    struct Row<R> {
        index: usize,
        ids: Vec<i32>,
        stream: R,
        open: bool,
    }
    let stream = |i: usize| random::stream(seed, &format!("generate/{}", rows[i].id), 0);
    let mut live: Vec<_> =
        batch.iter().map(|&index| Row { index, ids: Vec::new(), stream: stream(index), open: true }).collect();
    loop {
        for (row, logits) in live.iter_mut().zip(&logits).filter(|(row, _)| row.open) {
            let token = choose(logits, config, &mut row.stream) as i32;
            row.ids.push(token);
            row.open = !stop_ids.contains(&token) && row.ids.len() < config.max_new_tokens;
            if !row.open {
                done(row.index, row.ids.clone());
            }
        }
        let open: Vec<usize> = (0..live.len()).filter(|i| live[*i].open).collect();
        if open.is_empty() {
            return Ok(());
        }
        if open.len() * 2 <= live.len() {
            session.select(&open);
            live.retain(|row| row.open);
        }
        let tokens: Vec<i32> = live.iter().map(|row| row.ids.last().copied().unwrap_or_default()).collect();
        logits = session.step(&tokens)?;
    }
}
