//! Parquet files. A column of structures with `bytes` and `path`, which is how the Hugging Face hub stores images, and a
//! column of plain bytes become images of the record.

use std::path::Path;

use parquet::{
    file::reader::{FileReader, SerializedFileReader},
    record::{Field, List, Row, reader::RowIter},
};
use serde_json::{Map, Value};

use super::{Record, Records, open_file, place};
use crate::error::{Error, Kind, Result};

/// Rows decoded at once; images are large.
const BATCH: usize = 16;

pub(super) fn check(path: &Path) -> Result<()> {
    let reader = reader(path)?;
    match reader.metadata().file_metadata().num_rows() {
        0 => Err(Error::new(Kind::Data, "the data file has no rows").at(path.display())),
        _ => Ok(()),
    }
}

pub(super) fn open(path: &Path) -> Result<Records> {
    let rows = RowIter::from_file_into(Box::new(reader(path)?)).with_batch_size(BATCH);
    let path = path.to_path_buf();
    let mut rows = rows.enumerate();
    let mut ended = false;
    Ok(Box::new(std::iter::from_fn(move || {
        if ended {
            return None;
        }
        let (row, columns) = rows.next()?;
        let at = place(&path, row);
        Some(match columns {
            Ok(columns) => Ok(record(columns, row, at)),
            // Columns have lost step with each other: what follows cannot be trusted.
            Err(e) => {
                ended = true;
                Err(Error::new(Kind::Data, "a parquet file cannot be read from here on")
                    .code("malformed")
                    .at(at)
                    .help("fetch the file again")
                    .source(e))
            }
        })
    })))
}

fn reader(path: &Path) -> Result<SerializedFileReader<std::fs::File>> {
    SerializedFileReader::new(open_file(path)?).map_err(|e| {
        Error::new(Kind::Data, "the data file is not parquet, or is cut off")
            .at(path.display())
            .help("fetch the file again")
            .source(e)
    })
}

fn record(columns: Row, row: usize, at: String) -> Record {
    let mut record = Record { row, at, ..Record::default() };
    for (name, field) in columns.into_columns() {
        let value = value(&name, field, &mut record.images);
        record.fields.insert(name, value);
    }
    record
}

/// A field as JSON; bytes of images go to `images`.
fn value(name: &str, field: Field, images: &mut Vec<(String, Vec<u8>)>) -> Value {
    match field {
        Field::Bytes(bytes) => match String::from_utf8(bytes.data().to_vec()) {
            Ok(text) if ::image::guess_format(text.as_bytes()).is_err() => Value::String(text),
            Ok(text) => image(name, text.into_bytes(), images),
            Err(e) => image(name, e.into_bytes(), images),
        },
        Field::Group(group) => structure(name, group, images),
        Field::ListInternal(list) => Value::Array(elements(list).map(|e| value(name, e, images)).collect()),
        Field::MapInternal(map) => {
            let key = |key: &Field| if let Field::Str(text) = key { text.clone() } else { key.to_string() };
            let pairs = map.entries().iter().map(|(k, v)| (key(k), value(name, v.clone(), images)));
            Value::Object(pairs.collect())
        }
        plain => scalar(plain),
    }
}

fn scalar(field: Field) -> Value {
    match field {
        Field::Null => Value::Null,
        Field::Str(text) => Value::String(text),
        Field::Bool(v) => v.into(),
        Field::Byte(v) => v.into(),
        Field::Short(v) => v.into(),
        Field::Int(v) => v.into(),
        Field::Long(v) => v.into(),
        Field::UByte(v) => v.into(),
        Field::UShort(v) => v.into(),
        Field::UInt(v) => v.into(),
        Field::ULong(v) => v.into(),
        Field::Float(v) => v.into(),
        Field::Double(v) => v.into(),
        // Dates and decimals as they are written.
        other => Value::String(other.to_string()),
    }
}

fn image(name: &str, bytes: Vec<u8>, images: &mut Vec<(String, Vec<u8>)>) -> Value {
    images.push((name.to_string(), bytes));
    Value::Null
}

fn structure(name: &str, group: Row, images: &mut Vec<(String, Vec<u8>)>) -> Value {
    let mut fields = Map::new();
    for (key, field) in group.into_columns() {
        match field {
            Field::Bytes(bytes) if key == "bytes" => images.push((name.to_string(), bytes.data().to_vec())),
            field => {
                let value = value(name, field, images);
                fields.insert(key, value);
            }
        }
    }
    Value::Object(fields)
}

fn elements(list: List) -> impl Iterator<Item = Field> {
    list.elements().to_vec().into_iter()
}
