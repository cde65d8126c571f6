//! Timing that is right on devices that compute later than they are asked, on the device that `MEDTUNE_DEVICE` names.

use std::{hint::black_box, time::Instant};

use burn::tensor::{Device, Tensor};
use criterion::Bencher;
use medtune::device::DeviceSpec;

/// The device of the benchmarks; the CPU unless `MEDTUNE_DEVICE` says otherwise.
pub(crate) fn device() -> Device {
    let opened = DeviceSpec::from_env().and_then(|spec| spec.open());
    opened.unwrap_or_else(|error| panic!("{error}"))
}

/// Reads one number of `x`: a device may leave out what nobody reads.
pub(crate) fn read<const D: usize>(x: Tensor<D>) {
    let count = x.dims().iter().product::<usize>();
    black_box(x.reshape([count]).narrow(0, 0, 1).into_data());
}

/// Times `work`, which ends with a [`read`]. Once before, so that shaders are compiled and allocators warm.
pub(crate) fn timed(bencher: &mut Bencher<'_>, device: &Device, mut work: impl FnMut()) {
    work();
    bencher.iter_custom(|times| {
        device.sync().expect("the device is there");
        let started = Instant::now();
        for _ in 0..times {
            work();
        }
        device.sync().expect("the device is there");
        started.elapsed()
    });
}

/// Says how much memory the process had at most until now; 0 where the system does not tell.
pub(crate) fn print_memory(after: &str) {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let kib = line.and_then(|line| line.split_whitespace().next()?.parse::<u64>().ok()).unwrap_or_default();
    println!("peak memory of the process after {after}: {} MB", kib * 1024 / 1_000_000);
}
