//! Tables in the Hugging Face image convention: a column `image` of struct{bytes, path}, and the features as JSON under
//! `huggingface` in the file's metadata, so that `datasets.load_dataset` shows images without being told.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    path::{Path, PathBuf},
    sync::Arc,
};

use parquet::{
    basic::{Compression, ZstdLevel},
    data_type::{ByteArray, ByteArrayType},
    errors::ParquetError,
    file::{metadata::KeyValue, properties::WriterProperties, writer::SerializedFileWriter},
    schema::{parser::parse_message_type, types::Type},
};
use serde_json::{Map, Value, json};

use super::rows::{Names, extras};
use crate::{
    error::{Error, Kind, Result},
    sample::Sample,
};

/// Bytes of images after which a row group ends, and memory is free again.
const GROUP_BYTES: usize = 48 << 20;

/// Rows after which a row group ends.
const GROUP_ROWS: usize = 1000;

/// Bytes of images after which the next file begins.
const FILE_BYTES: usize = 480 << 20;

/// Columns of text beside id, images and messages, in order; `meta` holds the rest as JSON.
const TEXTS: [&str; 10] =
    ["question", "answer", "split", "group", "polarity", "category", "answer_type", "annotation", "source", "meta"];

/// The files of one split while they are written.
pub(super) struct Tables {
    dir: PathBuf,
    split: &'static str,
    /// Whether rows may have several images, in a column `images` then.
    several: bool,
    open: Option<SerializedFileWriter<File>>,
    parts: Vec<(PathBuf, usize)>,
    file_bytes: usize,
    group: Group,
}

/// Rows that are not written yet.
#[derive(Default)]
struct Group {
    rows: usize,
    bytes: usize,
    ids: Vec<ByteArray>,
    images: Vec<Vec<(ByteArray, ByteArray)>>,
    messages: Vec<Vec<(ByteArray, ByteArray)>>,
    texts: [Vec<Option<ByteArray>>; TEXTS.len()],
}

impl Tables {
    pub(super) fn new(dir: PathBuf, split: &'static str, several: bool) -> Self {
        Self { dir, split, several, open: None, parts: Vec::new(), file_bytes: 0, group: Group::default() }
    }

    /// Adds a row with the bytes of its images.
    pub(super) fn push(&mut self, sample: &Sample, names: &Names) -> Result<()> {
        let text = |s: &str| ByteArray::from(s.as_bytes().to_vec());
        let mut images = Vec::new();
        for image in &sample.images {
            let bytes = fs::read(&image.path).map_err(|e| {
                Error::new(Kind::Image, "cannot read an image")
                    .at(image.path.display())
                    .help("check the file")
                    .source(e)
            })?;
            self.group.bytes += bytes.len();
            images.push((ByteArray::from(bytes), text(&names.name(&image.path))));
        }
        self.group.rows += 1;
        self.group.ids.push(text(&sample.id));
        self.group.images.push(images);
        let role = |turn: &crate::sample::Turn| format!("{:?}", turn.role).to_lowercase();
        self.group.messages.push(sample.turns.iter().map(|t| (text(&role(t)), text(&t.text))).collect());
        let mut all = extras(sample);
        all.insert("question".into(), json!(sample.question()));
        all.insert("answer".into(), json!(sample.answer()));
        for (i, column) in TEXTS[..TEXTS.len() - 1].iter().enumerate() {
            let value = all.remove(*column);
            self.group.texts[i].push(value.as_ref().and_then(Value::as_str).map(text));
        }
        let rest = (!all.is_empty()).then(|| text(&Value::Object(all).to_string()));
        self.group.texts[TEXTS.len() - 1].push(rest);
        if self.group.rows >= GROUP_ROWS || self.group.bytes >= GROUP_BYTES {
            self.flush()?;
        }
        Ok(())
    }

    /// Writes the row group, and begins a new file when this one is large.
    fn flush(&mut self) -> Result<()> {
        let group = std::mem::take(&mut self.group);
        if group.rows == 0 {
            return Ok(());
        }
        if self.open.is_none() {
            let path = self.dir.join(format!(".part-{}-{:05}", self.split, self.parts.len()));
            fs::create_dir_all(&self.dir).map_err(|e| Error::io(&self.dir, e))?;
            let file = File::create(&path).map_err(|e| Error::io(&path, e))?;
            let schema = schema(self.several).map_err(|e| failed(&path, e))?;
            let writer = SerializedFileWriter::new(file, schema, properties(self.several));
            self.open = Some(writer.map_err(|e| failed(&path, e))?);
            self.parts.push((path, 0));
        }
        if let (Some(writer), Some((path, rows))) = (&mut self.open, self.parts.last_mut()) {
            *rows += group.rows;
            self.file_bytes += group.bytes;
            write(writer, &group, self.several).map_err(|e| failed(path, e))?;
        }
        if self.file_bytes >= FILE_BYTES { self.close() } else { Ok(()) }
    }

    fn close(&mut self) -> Result<()> {
        self.file_bytes = 0;
        match (self.open.take(), self.parts.last()) {
            (Some(writer), Some((path, _))) => writer.close().map(drop).map_err(|e| failed(path, e)),
            _ => Ok(()),
        }
    }

    /// Gives the files their names: rows by name.
    pub(super) fn finish(mut self) -> Result<BTreeMap<String, usize>> {
        self.flush()?;
        self.close()?;
        let mut done = BTreeMap::new();
        for (i, (path, rows)) in self.parts.iter().enumerate() {
            let name = format!("{}-{i:05}-of-{:05}.parquet", self.split, self.parts.len());
            fs::rename(path, self.dir.join(&name)).map_err(|e| Error::io(path, e))?;
            done.insert(format!("data/{name}"), *rows);
        }
        Ok(done)
    }
}

fn failed(path: &Path, source: ParquetError) -> Error {
    Error::new(Kind::Run, "cannot write a parquet file")
        .at(path.display())
        .help("check the disk and the path")
        .source(source)
}

fn schema(several: bool) -> Result<Arc<Type>, ParquetError> {
    let picture = "OPTIONAL BINARY bytes; OPTIONAL BINARY path (UTF8);";
    let images = if several {
        format!("REQUIRED group images (LIST) {{ REPEATED group list {{ REQUIRED group element {{ {picture} }} }} }}")
    } else {
        format!("OPTIONAL group image {{ {picture} }}")
    };
    let texts: String = TEXTS.iter().map(|name| format!("OPTIONAL BINARY {name} (UTF8);")).collect();
    let message = "REQUIRED BINARY role (UTF8); REQUIRED BINARY content (UTF8);";
    parse_message_type(&format!(
        "message schema {{ REQUIRED BINARY id (UTF8); {images} REQUIRED group messages (LIST) {{ REPEATED group list {{ \
         REQUIRED group element {{ {message} }} }} }} {texts} }}"
    ))
    .map(Arc::new)
}

fn properties(several: bool) -> Arc<WriterProperties> {
    let text = json!({ "dtype": "string", "_type": "Value" });
    let mut features = Map::new();
    features.insert("id".into(), text.clone());
    match several {
        true => features.insert("images".into(), json!([{ "_type": "Image" }])),
        false => features.insert("image".into(), json!({ "_type": "Image" })),
    };
    features.insert("messages".into(), json!([{ "role": text, "content": text }]));
    features.extend(TEXTS.iter().map(|name| ((*name).to_string(), text.clone())));
    let info = json!({ "info": { "features": features } }).to_string();
    let properties = WriterProperties::builder()
        .set_compression(Compression::ZSTD(ZstdLevel::default()))
        .set_created_by(format!("medtune {}", env!("CARGO_PKG_VERSION")))
        .set_key_value_metadata(Some(vec![KeyValue::new("huggingface".to_string(), info)]));
    Arc::new(properties.build())
}

/// Writes one row group. Levels follow from the schema: a definition level counts the optional and repeated fields on
/// the way to a value that are there, a repetition level is 0 at the start of a row.
fn write(writer: &mut SerializedFileWriter<File>, group: &Group, several: bool) -> Result<(), ParquetError> {
    let mut row_group = writer.next_row_group()?;
    let mut column = |values: &[ByteArray], levels: Option<&[i16]>, starts: Option<&[i16]>| {
        let mut column = row_group
            .next_column()?
            .ok_or_else(|| ParquetError::General("the schema has fewer columns than the rows".into()))?;
        column.typed::<ByteArrayType>().write_batch(values, levels, starts)?;
        column.close()
    };
    column(&group.ids, None, None)?;
    for part in [|p: &(ByteArray, ByteArray)| p.0.clone(), |p: &(ByteArray, ByteArray)| p.1.clone()] {
        let values: Vec<ByteArray> = group.images.iter().flatten().map(part).collect();
        if several {
            let (levels, starts) = list_levels(&group.images, 2);
            column(&values, Some(&levels), Some(&starts))?;
        } else {
            let levels: Vec<i16> = group.images.iter().map(|i| if i.is_empty() { 0 } else { 2 }).collect();
            column(&values, Some(&levels), None)?;
        }
    }
    for part in [|p: &(ByteArray, ByteArray)| p.0.clone(), |p: &(ByteArray, ByteArray)| p.1.clone()] {
        let values: Vec<ByteArray> = group.messages.iter().flatten().map(part).collect();
        let (levels, starts) = list_levels(&group.messages, 1);
        column(&values, Some(&levels), Some(&starts))?;
    }
    for texts in &group.texts {
        let values: Vec<ByteArray> = texts.iter().flatten().cloned().collect();
        let levels: Vec<i16> = texts.iter().map(|t| i16::from(t.is_some())).collect();
        column(&values, Some(&levels), None)?;
    }
    row_group.close().map(drop)
}

/// Definition and repetition levels of lists whose items are defined at level `full`.
fn list_levels<T>(lists: &[Vec<T>], full: i16) -> (Vec<i16>, Vec<i16>) {
    let (mut levels, mut starts) = (Vec::new(), Vec::new());
    for list in lists {
        if list.is_empty() {
            levels.push(0);
            starts.push(0);
        }
        for i in 0..list.len() {
            levels.push(full);
            starts.push(i16::from(i > 0));
        }
    }
    (levels, starts)
}
