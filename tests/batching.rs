//! However the rows of a step are split into batches, padded or packed, the gradient is the same, for every family with a
//! checkpoint that is compiled in.

use std::path::Path;

use burn::tensor::{Tensor, TensorData};
use medtune::{
    adapter::AdapterConfig,
    device::DeviceSpec,
    loader::Rows,
    models::{
        self, AnyVlm, LoadOptions,
        embedded::{EMBEDDED, Embedded},
    },
    progress::Progress,
    run_dir::RunDir,
    sample::{ImageRef, Role, Sample, Split, Turn},
    stage::Ctx,
    train::{
        TrainConfig,
        params::{self, GradientSum},
        trainer::{Job, Session},
    },
    vlm::{Batch, Processor},
};
use proptest::{
    prelude::*,
    test_runner::{Config, TestRunner},
};

/// A family's checkpoint with its processor.
pub(crate) struct Family {
    _dir: tempfile::TempDir,
    pub(crate) processor: Box<dyn Processor>,
    pub(crate) model: AnyVlm,
}

impl Family {
    pub(crate) fn open(embedded: &Embedded) -> Self {
        let dir = tempfile::tempdir().unwrap();
        embedded.unpack(dir.path()).unwrap();
        let options = LoadOptions::default();
        let processor = models::processor(dir.path(), &options).unwrap();
        let device = DeviceSpec::Cpu.open().unwrap();
        let model = (models::detect(dir.path()).unwrap().load)(dir.path(), &options, &device).unwrap();
        Self { _dir: dir, processor, model }
    }
}

/// A row about a picture of its own, with as many words as asked for; every third is without a picture.
pub(crate) fn row(dir: &Path, id: usize, question: usize, answer: usize) -> Sample {
    let words = |n: usize, from: usize| {
        let all = ["left", "lung", "heart", "clear", "large", "no", "small", "right", "film", "opacity"];
        (0..n).map(|i| all[(i * 3 + from) % all.len()]).collect::<Vec<_>>().join(" ")
    };
    let picture = !id.is_multiple_of(3);
    let path = dir.join(format!("{id}.png"));
    if picture {
        let pixel = |x: u32, y: u32| image::Luma([((x * (3 + id as u32) + y * 5) % 251) as u8]);
        image::GrayImage::from_fn(64, 64, pixel).save(&path).unwrap();
    }
    let mark = if picture { "<image>\n" } else { "" };
    let turn = |role, text: String| Turn { role, text };
    Sample {
        id: format!("row-{id}"),
        images: if picture { vec![ImageRef { path }] } else { Vec::new() },
        turns: vec![
            turn(Role::User, format!("{mark}{}?", words(question, id))),
            turn(Role::Assistant, format!("{}.", words(answer, id + 1))),
        ],
        split: Split::Train,
        ..Sample::default()
    }
}

/// Updates start at zero, where half of the gradients are zero as well.
pub(crate) fn stirred(model: AnyVlm) -> AnyVlm {
    params::update(model, |i, t| {
        let values: Vec<f32> = t.clone().into_data().try_to_vec().unwrap();
        let moved: Vec<f32> =
            values.iter().enumerate().map(|(k, v)| v + 0.02 * ((k * 7 + i * 13) as f32 * 0.61).sin()).collect();
        let n = moved.len();
        Tensor::from_data(TensorData::new(moved, [n]), &t.device())
    })
}

pub(crate) fn gradient(session: &mut Session<'_, AnyVlm>, micro: &[Batch]) -> (f64, Vec<Vec<f32>>) {
    let mut sum = GradientSum::new(&session.model);
    let loss = session.accumulate(micro, &mut sum).unwrap().loss;
    let host = |g: Option<Tensor<1>>| g.map_or(Vec::new(), |g| g.into_data().try_to_vec().unwrap());
    (loss, sum.sums.into_iter().map(host).collect())
}

/// Relative to the largest value of each tensor, and to a small share of the largest of all.
#[track_caller]
pub(crate) fn assert_same(what: &str, (loss, a): &(f64, Vec<Vec<f32>>), (other, b): &(f64, Vec<Vec<f32>>)) {
    assert!((loss - other).abs() < 1e-5 * loss.abs().max(1.0), "{what}: loss {loss} {other}");
    let largest = a.iter().flatten().fold(0f32, |m, v| m.max(v.abs()));
    assert!(largest > 0.0, "{what}: no gradient at all");
    for (i, (x, y)) in a.iter().zip(b).enumerate() {
        assert_eq!(x.len(), y.len(), "{what}: tensor {i}");
        let scale = x.iter().fold(1e-3 * largest, |m, v| m.max(v.abs()));
        let worst = x.iter().zip(y).fold(0f32, |m, (p, q)| m.max((p - q).abs()));
        assert!(worst <= 2e-4 * scale, "{what}: tensor {i} differs by {worst} of {scale}");
    }
}

pub(crate) fn with_session<T>(
    family: &Family,
    config: &TrainConfig,
    then: impl FnOnce(&mut Session<'_, AnyVlm>) -> T,
) -> T {
    let dir = tempfile::tempdir().unwrap();
    let dir = RunDir::open(dir.path()).unwrap();
    let ctx = Ctx::new(DeviceSpec::Cpu, Progress::Silent).unwrap();
    let adapter = AdapterConfig { r: 2, lora_dropout: 0.0, ..AdapterConfig::default() };
    let job = Job {
        config,
        adapter: &adapter,
        seed: 5,
        dir: &dir,
        ctx: &ctx,
        fingerprint: "f".into(),
        pages: None,
        log: Default::default(),
    };
    then(&mut Session::new(&job, family.model.clone()).unwrap())
}

/// Cuts `rows` into parts of the sizes that `cuts` says, in turn.
fn parts(rows: &[usize], cuts: &[usize]) -> Vec<Vec<usize>> {
    let (mut rest, mut out) = (rows, Vec::new());
    for n in cuts.iter().cycle() {
        if rest.is_empty() {
            break;
        }
        let (part, behind) = rest.split_at((*n).min(rest.len()));
        out.push(part.to_vec());
        rest = behind;
    }
    out
}

#[test]
fn any_split_of_a_step_has_the_same_gradient() {
    assert!(!EMBEDDED.is_empty());
    let pictures = tempfile::tempdir().unwrap();
    for embedded in EMBEDDED {
        let family = Family::open(embedded);
        with_session(&family, &TrainConfig::default(), |session| {
            session.model = stirred(session.model.clone());
            let session = std::cell::RefCell::new(session);
            let lengths = prop::collection::vec((1usize..6, 1usize..8), 3..6);
            let cuts = prop::collection::vec(1usize..4, 1..3);
            let mut runner = TestRunner::new_with_rng(
                Config { cases: 3, max_shrink_iters: 8, failure_persistence: None, ..Config::default() },
                proptest::test_runner::TestRng::deterministic_rng(proptest::test_runner::RngAlgorithm::ChaCha),
            );
            let outcome = runner.run(&(lengths, cuts, 1usize..40), |(lengths, cuts, multiple)| {
                let samples =
                    lengths.iter().enumerate().map(|(i, (q, a))| row(pictures.path(), i, *q, *a)).collect::<Vec<_>>();
                let (rows, rejected) = Rows::survey(samples, family.processor.as_ref(), 0, || {});
                assert!(rejected.is_empty(), "{rejected:?}");
                let all: Vec<usize> = (0..rows.lengths.len()).collect();
                let mut session = session.borrow_mut();
                let mut of = |micro: Vec<Batch>| gradient(&mut session, &micro);
                let whole = of(vec![rows.batch(&all, 1).unwrap()]);
                let name = |what: &str| format!("{}, {what}", embedded.family);
                let single = of(all.iter().map(|i| rows.batch(&[*i], 1).unwrap()).collect());
                assert_same(&name("one row at a time"), &whole, &single);
                assert_same(&name("padded"), &whole, &of(vec![rows.batch(&all, multiple).unwrap()]));
                assert_same(
                    &name("packed"),
                    &whole,
                    &of(vec![rows.micro_batch(&vec![all.clone()], multiple).unwrap()]),
                );
                let split = parts(&all, &cuts);
                let mixed = split.chunks(2).map(|c| rows.micro_batch(&c.to_vec(), multiple).unwrap()).collect();
                assert_same(&name("some packed, some not"), &whole, &of(mixed));
                Ok(())
            });
            if let Err(e) = outcome {
                panic!("{}: {e}", embedded.family);
            }
        });
    }
}
