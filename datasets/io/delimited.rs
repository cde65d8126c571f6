//! CSV and TSV with a heading; fields may hold the delimiter, quotes and line breaks.

use std::path::Path;

use serde_json::{Map, Value};

use super::{Record, Records, open_file, place};
use crate::error::{Error, Kind, Result};

pub(super) fn check(path: &Path, delimiter: u8) -> Result<()> {
    let mut reader = reader(path, delimiter)?;
    heading(path, &mut reader)?;
    match reader.byte_records().next() {
        None => Err(Error::new(Kind::Data, "the data file has no rows").at(path.display())),
        Some(_) => Ok(()),
    }
}

pub(super) fn open(path: &Path, delimiter: u8) -> Result<Records> {
    let mut reader = reader(path, delimiter)?;
    let heading = heading(path, &mut reader)?;
    let path = path.to_path_buf();
    let rows = reader.into_byte_records().enumerate();
    Ok(Box::new(rows.map(move |(row, cells)| {
        let at = place(&path, row);
        let cells = cells.map_err(|e| unreadable(&at, e))?;
        if cells.len() != heading.len() {
            return Err(Error::new(Kind::Data, "a row has another number of fields than the heading")
                .code("malformed")
                .at(at)
                .expected(heading.len())
                .found(cells.len())
                .help("a quote that is not closed, or a delimiter outside quotes, does this"));
        }
        let mut fields = Map::new();
        for (name, cell) in heading.iter().zip(&cells) {
            fields.insert(name.clone(), Value::String(utf8(cell, &at)?.to_string()));
        }
        Ok(Record { row, at, fields, images: Vec::new(), key: None })
    })))
}

fn reader(path: &Path, delimiter: u8) -> Result<csv::Reader<std::fs::File>> {
    Ok(csv::ReaderBuilder::new().delimiter(delimiter).flexible(true).from_reader(open_file(path)?))
}

fn heading(path: &Path, reader: &mut csv::Reader<std::fs::File>) -> Result<Vec<String>> {
    let at = path.display().to_string();
    let names = reader.byte_headers().map_err(|e| unreadable(&at, e))?;
    names.iter().map(|name| Ok(utf8(name, &at)?.trim().trim_start_matches('\u{feff}').to_string())).collect()
}

fn utf8<'a>(bytes: &'a [u8], at: &str) -> Result<&'a str> {
    std::str::from_utf8(bytes).map_err(|e| {
        Error::new(Kind::Data, "a field of a row is not UTF-8")
            .code("malformed")
            .at(at)
            .help("convert the file, for example with iconv -t UTF-8")
            .source(e)
    })
}

fn unreadable(at: &str, error: csv::Error) -> Error {
    Error::new(Kind::Data, "a row cannot be read").code("malformed").at(at).source(error)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quotes_breaks_and_bad_rows() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.csv");
        let text = b"\xef\xbb\xbfid, text\n1,\"a, \"\"b\"\"\nc\"\n2\n3,\xff\n4,d\n";
        std::fs::write(&path, text).unwrap();
        check(&path, b',').unwrap();
        let rows: Vec<Result<Record>> = open(&path, b',').unwrap().collect();
        assert_eq!(rows[0].as_ref().unwrap().fields["id"], "1");
        assert_eq!(rows[0].as_ref().unwrap().fields["text"], "a, \"b\"\nc");
        assert!(rows[1].as_ref().unwrap_err().to_string().contains("expected 2, found 1"));
        assert!(rows[2].as_ref().unwrap_err().to_string().contains("row 3"));
        assert_eq!((rows[3].as_ref().unwrap().text("text"), rows.len()), (Some("d"), 4));
        std::fs::write(&path, "id,text\n").unwrap();
        assert!(check(&path, b',').is_err());
    }
}
