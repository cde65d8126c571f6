//! TensorBoard event files: protobuf messages (`tensorboard/compat/proto/event.proto`) in TFRecord frames.
//!
//! Every session of a training writes a file of its own. One that continues after step `n` says so, and TensorBoard
//! drops what earlier files have of later steps, which are done again.

use std::{
    fs::{self, File, OpenOptions},
    io::Write,
    path::{Path, PathBuf},
    time::{SystemTime, UNIX_EPOCH},
};

use prost::Message as _;

use crate::error::{Error, Result};

/// Directory of the files in a run directory.
pub const DIR: &str = "tb";

/// `tensorboard.Event`
#[derive(Clone, PartialEq, prost::Message)]
struct Event {
    /// Seconds since 1970.
    #[prost(double, tag = "1")]
    wall_time: f64,
    #[prost(int64, tag = "2")]
    step: i64,
    #[prost(oneof = "What", tags = "3, 5, 7")]
    what: Option<What>,
}

#[derive(Clone, PartialEq, prost::Oneof)]
enum What {
    #[prost(string, tag = "3")]
    FileVersion(String),
    #[prost(message, tag = "5")]
    Summary(Summary),
    #[prost(message, tag = "7")]
    SessionLog(SessionLog),
}

/// `tensorboard.Summary`
#[derive(Clone, PartialEq, prost::Message)]
struct Summary {
    #[prost(message, repeated, tag = "1")]
    value: Vec<Value>,
}

/// `tensorboard.Summary.Value`
#[derive(Clone, PartialEq, prost::Message)]
struct Value {
    #[prost(string, tag = "1")]
    tag: String,
    /// In a oneof of the original, where zero is written too.
    #[prost(float, optional, tag = "2")]
    simple_value: Option<f32>,
}

/// `tensorboard.SessionLog`; status 1 is START.
#[derive(Clone, PartialEq, prost::Message)]
struct SessionLog {
    #[prost(int32, tag = "1")]
    status: i32,
}

/// Writes one event file.
#[derive(Debug)]
pub struct EventWriter {
    path: PathBuf,
    file: File,
}

impl EventWriter {
    /// Starts a file in `dir` for a session that continues after `step`.
    ///
    /// # Errors
    /// The directory cannot be written.
    pub fn create(dir: &Path, step: usize) -> Result<Self> {
        fs::create_dir_all(dir).map_err(|e| Error::io(dir, e))?;
        let (path, file) = new_file(dir, step)?;
        let mut writer = Self { path, file };
        writer.write(0, What::FileVersion("brain.Event:2".into()))?;
        if step > 0 {
            writer.write(step + 1, What::SessionLog(SessionLog { status: 1 }))?;
        }
        Ok(writer)
    }

    /// Adds the values of a step by tag.
    ///
    /// # Errors
    /// The disk is full.
    pub fn scalars(&mut self, step: usize, values: &[(String, f64)]) -> Result<()> {
        let value = |(tag, value): &(String, f64)| Value { tag: tag.clone(), simple_value: Some(*value as f32) };
        self.write(step, What::Summary(Summary { value: values.iter().map(value).collect() }))
    }

    fn write(&mut self, step: usize, what: What) -> Result<()> {
        let wall_time = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |d| d.as_secs_f64());
        let event = Event { wall_time, step: step as i64, what: Some(what) };
        // One write a frame, so that a killed process leaves at most one incomplete frame, at the end.
        self.file.write_all(&frame(&event.encode_to_vec())).map_err(|e| Error::io(&self.path, e))
    }
}

/// TensorBoard reads files in the order of their names: by second, then by step.
fn new_file(dir: &Path, step: usize) -> Result<(PathBuf, File)> {
    let seconds = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
    for attempt in 0.. {
        let path = dir.join(format!("events.out.tfevents.{seconds:010}.medtune.{step:09}.{attempt}"));
        match OpenOptions::new().write(true).create_new(true).open(&path) {
            Err(e) if e.kind() == std::io::ErrorKind::AlreadyExists => {}
            Err(e) => return Err(Error::io(&path, e)),
            Ok(file) => return Ok((path, file)),
        }
    }
    unreachable!("some number is free")
}

/// A TFRecord: length, its checksum, the data, its checksum; all little-endian.
fn frame(data: &[u8]) -> Vec<u8> {
    let length = (data.len() as u64).to_le_bytes();
    [&length[..], &masked_crc(&length).to_le_bytes(), data, &masked_crc(data).to_le_bytes()].concat()
}

/// CRC-32C, rotated and shifted so that the checksum of data that holds checksums is no trap.
fn masked_crc(data: &[u8]) -> u32 {
    crc32c::crc32c(data).rotate_right(15).wrapping_add(0xA282_EAD8)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn events(path: &Path) -> Vec<Event> {
        let bytes = fs::read(path).unwrap();
        let (mut rest, mut events) = (&bytes[..], Vec::new());
        while !rest.is_empty() {
            let n = u64::from_le_bytes(rest[..8].try_into().unwrap()) as usize;
            assert_eq!(frame(&rest[12..12 + n]), rest[..16 + n]);
            events.push(Event::decode(&rest[12..12 + n]).unwrap());
            rest = &rest[16 + n..];
        }
        events
    }

    #[test]
    fn checksums_are_those_of_tensorflow() {
        // tensorflow/core/lib/hash/crc32c_test.cc has the first; the second is of an empty TFRecord's length.
        assert_eq!(crc32c::crc32c(&[0; 32]), 0x8A91_36AA);
        assert_eq!(masked_crc(&0u64.to_le_bytes()), crc32c::crc32c(&[0; 8]).rotate_right(15).wrapping_add(0xA282_EAD8));
        assert_eq!(frame(b"").len(), 16);
    }

    #[test]
    fn a_session_that_continues_says_after_which_step() {
        let dir = tempfile::tempdir().unwrap();
        let mut first = EventWriter::create(dir.path(), 0).unwrap();
        first.scalars(1, &[("train/loss".into(), 0.0)]).unwrap();
        let second = EventWriter::create(dir.path(), 7).unwrap();
        let found = events(&first.path);
        assert_eq!(found[0].what, Some(What::FileVersion("brain.Event:2".into())));
        let value = vec![Value { tag: "train/loss".into(), simple_value: Some(0.0) }];
        assert_eq!((found[1].step, &found[1].what), (1, &Some(What::Summary(Summary { value }))));
        let found = events(&second.path);
        assert_eq!((found[1].step, &found[1].what), (8, &Some(What::SessionLog(SessionLog { status: 1 }))));
        assert!(first.path < second.path);
    }
}
