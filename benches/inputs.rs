//! What runs on the host before a batch: decoding and resizing images, splitting text into tokens, whole rows.
//!
//! ```sh
//! MEDTUNE_BENCH_IMAGES=DIR RAYON_NUM_THREADS=1 cargo bench --bench inputs
//! python benches/peers/images.py DIR            # in turns with Pillow
//! ```
//!
//! Without a directory the images are made up: 512 x 512, noise over a gradient, JPEG. With `--in-turns` the program waits
//! for the names of passes over all images on its standard input and answers each with the seconds it took.

use std::{
    fs,
    hint::black_box,
    io::{Write, stdin, stdout},
    path::{Path, PathBuf},
    sync::LazyLock,
    thread,
    time::{Duration, Instant},
};

use criterion::{Criterion, Throughput, criterion_group};
use medtune::{
    image::{
        Rgb8,
        clip::ClipPreprocess,
        decode,
        resize::{Filter, resize},
    },
    models::llava_med::{LlavaMedConfig, processor::LlavaMedProcessor},
    sample::{ImageRef, Role, Sample, Turn},
    text::{bpe::train_bpe, tokenizer::Tokenizer},
    vlm::{Batch, PaddingSide, Processor},
};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Side that images are resized to.
const SIDE: usize = 336;
/// Positions of a row, at least.
const POSITIONS: usize = 640;
/// Rows of a batch.
const ROWS: usize = 4;
/// Threads that make batches.
const WORKERS: usize = 2;
const SENTENCE: &str = "Is there a nodule in the left lung? No, the lungs are clear and the heart is of normal size. ";

/// The directory of the images; `own` gets made-up ones if none is named.
fn directory(own: &Path) -> PathBuf {
    if let Some(dir) = std::env::var_os("MEDTUNE_BENCH_IMAGES") {
        return dir.into();
    }
    for key in 0..16 {
        fs::write(own.join(format!("{key}.jpg")), made_up(key)).expect("room for a file");
    }
    own.to_path_buf()
}

/// The images in a directory, in the order of their names.
fn paths(dir: &Path) -> Vec<PathBuf> {
    let mut paths: Vec<_> = fs::read_dir(dir).expect("a directory").map(|e| e.expect("an entry").path()).collect();
    paths.retain(|path| path.extension().is_some_and(|x| x == "jpg" || x == "jpeg" || x == "png"));
    paths.sort();
    assert!(!paths.is_empty(), "no images in {}", dir.display());
    paths
}

fn made_up(key: u32) -> Vec<u8> {
    let image = image::RgbImage::from_fn(512, 512, |x, y| {
        let noise = (x * 7919 + y * 104_729 + key).wrapping_mul(2_654_435_761) >> 28;
        image::Rgb([(x / 2 + noise) as u8, (y / 2 + noise) as u8, ((x + y) / 4) as u8])
    });
    let mut bytes = std::io::Cursor::new(Vec::new());
    image.write_to(&mut bytes, image::ImageFormat::Jpeg).expect("memory is writable");
    bytes.into_inner()
}

/// The images, encoded and decoded, and what is measured of them.
struct Images {
    files: Vec<Vec<u8>>,
    decoded: Vec<Rgb8>,
}

impl Images {
    const PASSES: [&str; 3] = ["decode_resize", "decode", "resize"];

    fn read(dir: &Path) -> Self {
        let files: Vec<_> = paths(dir).iter().map(|path| fs::read(path).expect("a file")).collect();
        let decoded = files.iter().map(|bytes| decode(bytes, "file").expect("an image")).collect();
        Self { files, decoded }
    }

    fn pass(&self, name: &str) {
        let small = |image: &Rgb8| resize(image, SIDE, SIDE, Filter::Bicubic);
        let open = |bytes: &Vec<u8>| decode(bytes, "file").expect("an image");
        match name {
            "decode_resize" => self.files.iter().for_each(|bytes| drop(black_box(small(&open(bytes))))),
            "decode" => self.files.iter().for_each(|bytes| drop(black_box(open(bytes)))),
            "resize" => self.decoded.iter().for_each(|image| drop(black_box(small(image)))),
            other => panic!("no pass is called {other}"),
        }
    }
}

fn images(criterion: &mut Criterion) {
    let own = tempfile::tempdir().expect("a directory");
    let images = Images::read(&directory(own.path()));
    let mut group = criterion.benchmark_group("images");
    group.throughput(Throughput::Elements(images.files.len() as u64));
    for name in Images::PASSES {
        group.bench_function(name, |b| b.iter(|| images.pass(name)));
    }
    group.finish();
}

/// Names the directory, then answers the name of a pass with its seconds, until there are no more.
fn in_turns() {
    let own = tempfile::tempdir().expect("a directory");
    let dir = directory(own.path());
    let images = Images::read(&dir);
    writeln!(stdout(), "{}", dir.display()).expect("somebody listens");
    for name in stdin().lines() {
        let name = name.expect("text");
        let started = seconds();
        images.pass(&name);
        writeln!(stdout(), "{}", seconds() - started).expect("somebody listens");
    }
}

/// Processor time of the main thread where the system tells it, else time.
fn seconds() -> f64 {
    static STARTED: LazyLock<Instant> = LazyLock::new(Instant::now);
    // The system brings its account up to date when a thread rests.
    thread::sleep(Duration::from_micros(1));
    let told = fs::read_to_string("/proc/self/schedstat").ok();
    let nanoseconds = told.and_then(|text| text.split(' ').next()?.parse::<f64>().ok());
    nanoseconds.map_or_else(|| STARTED.elapsed().as_secs_f64(), |n| n / 1e9)
}

fn tokenizer(criterion: &mut Criterion) {
    let text = SENTENCE.repeat(40);
    let tokenizer = trained(&text);
    let mut group = criterion.benchmark_group("tokenizer");
    group.throughput(Throughput::Bytes(text.len() as u64));
    group.bench_function("encode", |b| b.iter(|| black_box(tokenizer.encode(&text).expect("text"))));
    group.finish();
}

fn trained(text: &str) -> Tokenizer {
    let trained = train_bpe([text], 1024).expect("room for bytes");
    Tokenizer::from_json_bytes(&trained).expect("as it was written")
}

/// A row of one image and an answer of some sentences.
fn row(image: &Path, sentences: usize) -> Sample {
    let turn = |role, text| Turn { role, text };
    Sample {
        id: image.display().to_string(),
        images: vec![ImageRef { path: image.to_path_buf() }],
        turns: vec![
            turn(Role::User, "<image>\nIs there a nodule in the left lung?".to_string()),
            turn(Role::Assistant, SENTENCE.repeat(sentences)),
        ],
        ..Sample::default()
    }
}

/// Rows from their files to batches on two threads, as the loader makes those that it has no room to keep.
fn rows(criterion: &mut Criterion) {
    let own = tempfile::tempdir().expect("a directory");
    let paths = paths(&directory(own.path()));
    let config = LlavaMedConfig::v1_5_7b();
    let vision = config.vision_config.clone().expect("the release has a tower");
    let rules = ClipPreprocess::openai(vision.image_size, true);
    let processor = LlavaMedProcessor::new(trained(&SENTENCE.repeat(40)), &config, &vision, rules).expect("few tokens");
    let length = |sentences| processor.encode(&row(&paths[0], sentences)).expect("a row").input_ids.len();
    let sentences = (1..).find(|n| length(*n) >= POSITIONS).expect("a longer answer is a longer row");
    let samples: Vec<Sample> = paths.iter().map(|path| row(path, sentences)).collect();

    let work = |worker: usize| {
        for samples in samples.chunks(ROWS).skip(worker).step_by(WORKERS) {
            let rows: Vec<_> = samples.iter().map(|s| processor.encode(s).expect("a row")).collect();
            black_box(Batch::collate(&rows, processor.pad_id(), PaddingSide::Right, 1));
        }
    };
    let mut group = criterion.benchmark_group("rows");
    group.throughput(Throughput::Elements(samples.len() as u64));
    group.bench_function(format!("of_{}_positions", length(sentences)), |b| {
        b.iter(|| {
            thread::scope(|scope| {
                for worker in 0..WORKERS {
                    scope.spawn(move || work(worker));
                }
            });
        });
    });
    group.finish();
}

criterion_group! {
    name = benches;
    config = Criterion::default().sample_size(10).measurement_time(Duration::from_secs(3)).configure_from_args();
    targets = images, tokenizer, rows
}

fn main() {
    if std::env::args().any(|argument| argument == "--in-turns") {
        return in_turns();
    }
    benches();
    Criterion::default().configure_from_args().final_summary();
}
