//! What runs on the host before a batch: decoding and resizing images, splitting text into tokens.
//!
//! ```sh
//! MEDTUNE_BENCH_IMAGES=DIR RAYON_NUM_THREADS=1 cargo bench --bench inputs
//! python benches/peers/images.py DIR            # the same with Pillow
//! ```
//!
//! Without a directory the images are made up: 512 x 512, noise over a gradient, JPEG.

use std::{hint::black_box, time::Duration};

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use medtune::{
    image::{
        decode,
        resize::{Filter, resize},
    },
    text::{bpe::train_bpe, tokenizer::Tokenizer},
};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Most files that are read of a directory, in the order of their names; as in the peer.
const FILES: usize = 64;
/// Side that images are resized to.
const SIDE: usize = 336;

/// Files of images, encoded.
fn files() -> Vec<Vec<u8>> {
    let Some(dir) = std::env::var_os("MEDTUNE_BENCH_IMAGES") else {
        return (0..4).map(made_up).collect();
    };
    let mut paths: Vec<_> = std::fs::read_dir(dir).expect("a directory").map(|e| e.expect("an entry").path()).collect();
    paths.retain(|path| path.extension().is_some_and(|x| x == "jpg" || x == "jpeg" || x == "png"));
    paths.sort();
    paths.iter().take(FILES).map(|path| std::fs::read(path).expect("a file")).collect()
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

fn images(criterion: &mut Criterion) {
    let files = files();
    let decoded: Vec<_> = files.iter().map(|bytes| decode(bytes, "file").expect("an image")).collect();
    let mut group = criterion.benchmark_group("images");
    group.throughput(Throughput::Elements(files.len() as u64));
    let each = |bytes: &Vec<u8>| resize(&decode(bytes, "file").expect("an image"), SIDE, SIDE, Filter::Bicubic);
    group.bench_function("decode_resize", |b| {
        b.iter(|| files.iter().map(each).for_each(|image| drop(black_box(image))))
    });
    group.bench_function("decode", |b| {
        b.iter(|| files.iter().for_each(|bytes| drop(black_box(decode(bytes, "file")))));
    });
    group.bench_function("resize", |b| {
        b.iter(|| decoded.iter().for_each(|image| drop(black_box(resize(image, SIDE, SIDE, Filter::Bicubic)))));
    });
    group.finish();
}

fn tokenizer(criterion: &mut Criterion) {
    let text =
        "Is there a nodule in the left lung? No, the lungs are clear and the heart is of normal size. ".repeat(40);
    let trained = train_bpe([&text], 1024).expect("room for bytes");
    let tokenizer = Tokenizer::from_json_bytes(&trained).expect("as it was written");
    let mut group = criterion.benchmark_group("tokenizer");
    group.throughput(Throughput::Bytes(text.len() as u64));
    group.bench_function("encode", |b| b.iter(|| black_box(tokenizer.encode(&text).expect("text"))));
    group.finish();
}

criterion_group! {
    name = benches;
    config = Criterion::default().sample_size(10).measurement_time(Duration::from_secs(3));
    targets = images, tokenizer
}
criterion_main!(benches);
