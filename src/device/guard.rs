//! A device that fails in the middle of work.
//!
//! Burn has no way to hand back an error from most operations: when a driver is lost or memory runs out, the next read
//! panics. Around a stage, [`guard`] turns that panic into an error; every other panic goes on as it was.

use std::{
    any::Any,
    panic::{AssertUnwindSafe, catch_unwind, resume_unwind, set_hook, take_hook},
    sync::Once,
};

use super::DeviceSpec;
use crate::error::{Error, Kind, Result};

/// How a device fails.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Failure {
    OutOfMemory,
    TooLarge,
    Lost,
}

/// What the messages of Burn's runtimes, wgpu and CUDA have in common, most telling first.
const SIGNS: [(&str, Failure); 14] = [
    ("out of memory", Failure::OutOfMemory),
    ("out of device memory", Failure::OutOfMemory),
    ("every page size the memory tracks still holds", Failure::OutOfMemory),
    ("outofmemory", Failure::OutOfMemory),
    ("out_of_memory", Failure::OutOfMemory),
    ("out_of_device_memory", Failure::OutOfMemory),
    ("not enough memory", Failure::OutOfMemory),
    ("buffertoobig", Failure::TooLarge),
    ("can't allocate buffer of size", Failure::TooLarge),
    ("poisoned", Failure::Lost),
    ("device lost", Failure::Lost),
    ("device was lost", Failure::Lost),
    ("wgpu error", Failure::Lost),
    ("error while reading data", Failure::Lost),
];

fn classify(message: &str) -> Option<Failure> {
    let message = message.to_lowercase();
    let cuda = message.contains("cuda_error").then_some(Failure::Lost);
    SIGNS.iter().find(|(sign, _)| message.contains(sign)).map(|(_, failure)| *failure).or(cuda)
}

/// Runs `work` on a device. `needs` says, when memory has run out, how much the work was estimated to need.
///
/// # Errors
/// Those of `work`; the device was lost, or its memory ran out. Files that `work` had completed are complete.
pub fn guard<T>(
    spec: &DeviceSpec,
    needs: impl FnOnce() -> Option<String>,
    work: impl FnOnce() -> Result<T>,
) -> Result<T> {
    quiet();
    match catch_unwind(AssertUnwindSafe(work)) {
        Ok(outcome) => outcome,
        Err(panic) => {
            let Some((failure, message)) = message(panic.as_ref()).and_then(|m| Some((classify(m)?, m))) else {
                resume_unwind(panic);
            };
            Err(error(spec, failure, message, needs))
        }
    }
}

fn error(spec: &DeviceSpec, failure: Failure, message: &str, needs: impl FnOnce() -> Option<String>) -> Error {
    const LESS: &str = "`medtune plan` shows what the recipe needs and `--fit SIZE` what fits; lower train.per_device_train_batch_size, train.max_length or eval.batch_size, or take \
                        `--dtype` of half the size; the same command continues from the last checkpoint";
    let (what, help) = match failure {
        Failure::OutOfMemory => ("the device has run out of memory", LESS),
        Failure::TooLarge => ("a tensor is larger than the largest buffer of the device", LESS),
        Failure::Lost => (
            "the device was lost",
            "look at the system log for the driver's words; the same command continues from the last checkpoint",
        ),
    };
    let error = Error::new(Kind::Device, what).at(spec).found(first_words(message)).help(help);
    match needs().filter(|_| failure != Failure::Lost) {
        Some(needs) => error.expected(needs),
        None => error,
    }
}

/// The line of a long message that says what happened; backtraces are left out.
fn first_words(message: &str) -> String {
    let lines = message.lines().map(str::trim).take_while(|l| !l.starts_with("Backtrace")).filter(|l| !l.is_empty());
    let text = lines.collect::<Vec<_>>().join(" ");
    let end = text.char_indices().nth(300).map_or(text.len(), |(i, _)| i);
    text[..end].to_string()
}

fn message(panic: &(dyn Any + Send)) -> Option<&str> {
    panic.downcast_ref::<String>().map(String::as_str).or_else(|| panic.downcast_ref::<&str>().copied())
}

/// Device failures are reported as errors, so the message of their panic is not printed.
fn quiet() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let before = take_hook();
        set_hook(Box::new(move |info| {
            if message(info.payload()).and_then(classify).is_none() {
                before(info);
            }
        }));
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fails(message: &'static str) -> Error {
        guard(
            &DeviceSpec::Wgpu(0),
            || Some("about 14.2 GB, as planned".into()),
            || -> Result<()> { panic!("{message}") },
        )
        .unwrap_err()
    }

    #[test]
    fn a_failing_device_is_an_error_with_what_to_change() {
        let lost = fails(
            "Error while reading data: use `try_into_data` instead to catch the error at runtime: WithContext { reason: \
             \"The device is poisoned\"",
        );
        assert!(lost.to_string().starts_with("the device was lost at wgpu:0"), "{lost}");
        assert!(!lost.to_string().contains("14.2"));
        let memory = fails("wgpu error: Out of Memory\nBacktrace:\n  0: somewhere");
        assert_eq!(memory.kind(), Kind::Device);
        assert!(memory.to_string().contains("run out of memory") && memory.to_string().contains("14.2 GB"), "{memory}");
        assert!(!memory.to_string().contains("somewhere"), "{memory}");
        assert!(memory.help_line().unwrap().contains("per_device_train_batch_size"));
        let cuda = fails("DriverError(CUDA_ERROR_OUT_OF_MEMORY, \"out of memory\")");
        assert!(cuda.to_string().contains("run out of memory"), "{cuda}");
        assert!(fails("BufferTooBig { size: 9 }").to_string().contains("largest buffer"));
    }

    #[test]
    fn every_other_panic_goes_on_and_results_pass_through() {
        let spec = DeviceSpec::Cpu;
        let panic = catch_unwind(|| guard(&spec, || None, || -> Result<()> { panic!("index out of bounds") }));
        assert_eq!(message(panic.unwrap_err().as_ref()), Some("index out of bounds"));
        assert_eq!(guard(&spec, || None, || Ok(3)).unwrap(), 3);
        let own = guard(&spec, || None, || -> Result<()> { Err(Error::new(Kind::Data, "no row")) }).unwrap_err();
        assert_eq!(own.kind(), Kind::Data);
    }
}
