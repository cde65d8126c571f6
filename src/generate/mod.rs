//! Generation with a key-value cache: greedy, sampling, beam search.

mod beam;
mod sampling;
mod session;

pub use beam::{Hypothesis, beam_search};
pub use sampling::{argmax, choose, penalise_repeats, process_logits, softmax};
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
    /// Scores of tokens that the prompt or the answer already holds are divided by this (multiplied where negative); 1
    /// changes nothing. Not used by beam search.
    pub repetition_penalty: f64,
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
            repetition_penalty: 1.0,
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

/// Ids of a prompt without its image positions, whose ids stand for no words.
fn words(row: &Encoded) -> impl Iterator<Item = i32> {
    let inside = |i: usize| row.spans.iter().any(|s| (s.start..s.start + s.len).contains(&i));
    row.input_ids.iter().enumerate().filter(move |(i, _)| !inside(*i)).map(|(_, id)| *id)
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
        for (row, logits) in live.iter_mut().zip(&mut logits).filter(|(row, _)| row.open) {
            penalise_repeats(logits, words(&rows[row.index]).chain(row.ids.iter().copied()), config.repetition_penalty);
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        models::llava_med::DEF,
        vlm::{Batch, IGNORE, ImageSpan, PaddingSide, Pixels, Vlm},
    };

    const VOCAB: i32 = 60;

    fn model(device: &Device) -> AnyVlm {
        // a wide initialisation, so that answers vary
        crate::weights::init_random((DEF.empty)("tiny", device).unwrap().0, 11, 0.15)
    }

    fn prompts() -> Vec<Encoded> {
        let text = |id: &str, n: i32| Encoded {
            id: id.into(),
            input_ids: (0..n).map(|i| (i * 7 + n) % VOCAB).collect(),
            labels: vec![IGNORE; n as usize],
            spans: Vec::new(),
            pixels: Vec::new(),
        };
        let image = |id: &str, n: i32, value: f32| Encoded {
            spans: vec![ImageSpan { start: 2, len: 64 }],
            pixels: vec![Pixels {
                data: (0..3 * 64 * 64).map(|i| value * (i % 17) as f32).collect(),
                shape: [3, 64, 64],
            }],
            ..text(id, n)
        };
        vec![image("a", 80, 0.1), text("b", 5), image("c", 71, -0.05), text("d", 130), text("e", 64)]
    }

    /// Logits of the last position, without a cache.
    fn recomputed(model: &AnyVlm, row: &Encoded, device: &Device) -> Vec<f32> {
        let batch = Batch::collate(std::slice::from_ref(row), 0, PaddingSide::Right, 1);
        let context = model.context(&batch, device);
        let mut x = model.embed(&batch, model.features(&batch, device), device);
        for layer in 0..model.num_layers() {
            x = model.layer(layer, x, &context, None);
        }
        let [_, length, width] = x.dims();
        let last = model.final_norm(x.narrow(1, length - 1, 1)).reshape([1, width]);
        model.logits(last).into_data().as_slice::<f32>().unwrap().to_vec()
    }

    fn assert_close(found: &[f32], expected: &[f32], what: &str) {
        let worst = found.iter().zip(expected).map(|(a, b)| (a - b).abs()).fold(0f32, f32::max);
        let size = expected.iter().map(|v| v.abs()).fold(0f32, f32::max);
        assert!(worst <= 1e-4 * size.max(1.0), "{what}: differs by {worst} of {size}");
    }

    #[test]
    fn a_padded_cached_batch_gives_the_logits_of_each_row_alone_recomputed() {
        let device = Device::flex();
        let model = model(&device);
        let mut rows = prompts();
        let (mut session, mut logits) = Session::start(&model, &rows, 0, 6, &device).unwrap();
        let mut kept = vec![0, 1, 2, 3, 4];
        for step in 0..6 {
            let tokens: Vec<i32> = logits.iter().map(|l| argmax(l) as i32).collect();
            for (i, row) in kept.iter().enumerate() {
                assert_close(&logits[i], &recomputed(&model, &rows[*row], &device), &format!("step {step} row {row}"));
                rows[*row].input_ids.push(tokens[i]);
                rows[*row].labels.push(IGNORE);
            }
            let mut tokens = tokens;
            if step == 2 {
                // rows leave and change places
                session.select(&[3, 0, 4]);
                kept = vec![3, 0, 4];
                tokens = vec![tokens[3], tokens[0], tokens[4]];
            }
            logits = session.step(&tokens).unwrap();
        }
    }

    #[test]
    fn answers_do_not_depend_on_the_batch() {
        let device = Device::flex();
        let model = model(&device);
        let rows = prompts();
        let stop: Vec<i32> = (0..1536).filter(|i| i % 9 == 0).collect();
        for (temperature, num_beams) in [(0.0, 1), (1.2, 1), (0.0, 3)] {
            let config = GenerateConfig { max_new_tokens: 12, temperature, num_beams, ..GenerateConfig::default() };
            let run = |rows: &[Encoded], batch_size: usize| {
                let config = GenerateConfig { batch_size, ..config.clone() };
                generate(&model, rows, 0, &stop, &config, 7, &device, &mut |_, _| {}).unwrap()
            };
            let together = run(&rows, 8);
            assert!(together.iter().any(|a| a.len() < 12) && together.iter().all(|a| !a.is_empty()), "{together:?}");
            assert_eq!(run(&rows, 2), together);
            let mut reversed: Vec<Encoded> = rows.clone();
            reversed.reverse();
            let mut found = run(&reversed, 3);
            found.reverse();
            assert_eq!(found, together);
            assert_eq!(run(&rows[1..2], 1), together[1..2]);
        }
    }

    #[test]
    fn the_seed_decides_the_draws() {
        let device = Device::flex();
        let model = model(&device);
        let config = GenerateConfig { max_new_tokens: 8, temperature: 1.5, ..GenerateConfig::default() };
        let run = |seed| generate(&model, &prompts(), 0, &[], &config, seed, &device, &mut |_, _| {}).unwrap();
        assert_eq!(run(1), run(1));
        assert_ne!(run(1), run(2));
    }

    #[test]
    fn damaged_weights_are_an_error_not_an_answer() {
        let device = Device::flex();
        let AnyVlm::LlavaMed(mut model) = model(&device) else { panic!("the family it was made from") };
        model.lm_head.weight = model.lm_head.weight.map(|w| w.mul_scalar(f32::NAN));
        let model = AnyVlm::LlavaMed(model);
        let config = GenerateConfig::default();
        let error = generate(&model, &prompts(), 0, &[2], &config, 0, &device, &mut |_, _| {}).unwrap_err();
        assert!(error.to_string().contains("not finite"), "{error}");
        let empty = Encoded { input_ids: Vec::new(), ..prompts()[1].clone() };
        let error = generate(&model, &[empty], 0, &[2], &config, 0, &device, &mut |_, _| {}).unwrap_err();
        assert!(error.to_string().contains("answered at b"), "{error}");
    }
}
