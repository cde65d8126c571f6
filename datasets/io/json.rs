//! JSON arrays, objects of arrays and JSON lines, one value at a time.

use std::{
    fs::File,
    io::{BufRead, BufReader},
    path::Path,
};

use serde_json::Value;

use super::{Record, Records, open_file, place, record};
use crate::error::{Error, Kind, Result};

/// Bytes read at once.
const BUFFER: usize = 1 << 18;

/// Reads the file once: brackets, commas and encoding must be right; what is between the commas is looked at row by row.
pub(super) fn check(path: &Path) -> Result<()> {
    let mut values = Values::open(path)?;
    let mut rows = 0;
    loop {
        let start = values.scanner.line;
        match values.next_raw() {
            Ok(None) => break,
            Ok(Some(_)) => rows += 1,
            Err(problem) => return Err(problem.error(path, &values.scanner)),
        }
        if let Err(e) = std::str::from_utf8(&values.raw) {
            let before = values.raw[..e.valid_up_to()].iter().filter(|b| **b == b'\n').count();
            return Err(Error::new(Kind::Data, "the data file is not UTF-8")
                .at(format!("{}:{}", path.display(), start.max(values.start) + before))
                .help("convert it, for example with iconv -t UTF-8"));
        }
    }
    match rows {
        0 => Err(Error::new(Kind::Data, "the data file has no rows").at(path.display())),
        _ => Ok(()),
    }
}

/// Rows of a file.
pub(super) fn open(path: &Path) -> Result<Records> {
    let mut values = Values::open(path)?;
    let path = path.to_path_buf();
    let mut row = 0;
    let mut ended = false;
    Ok(Box::new(std::iter::from_fn(move || {
        if ended {
            return None;
        }
        let next = match values.next_raw() {
            Ok(None) => return None,
            Ok(Some(())) => {
                // Lines are numbered as an editor numbers them.
                row = if values.layout == Layout::Lines { values.start - 1 } else { row };
                values.parse(&path, row)
            }
            // Behind a misplaced bracket nothing can be told apart.
            Err(problem) => {
                ended = true;
                Err(problem.error(&path, &values.scanner))
            }
        };
        row += 1;
        Some(next)
    })))
}

/// How values stand in the file.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Layout {
    /// `[a, b]`
    Array,
    /// `{"key": [a, b], ...}`
    Lists,
    /// One a line.
    Lines,
}

/// Values of a file in order.
struct Values {
    scanner: Scanner,
    layout: Layout,
    /// Bytes of the current value.
    raw: Vec<u8>,
    /// Line it begins on.
    start: usize,
    /// Key of the current list.
    key: Option<String>,
    /// Whether a list is open, and whether a value has been read from it.
    open: bool,
    some: bool,
}

/// What is wrong with the file as a whole.
enum Problem {
    /// It ends before its brackets do.
    Cut,
    /// Something else was expected here.
    Unexpected(u8),
    /// It is not a list of rows.
    Form(&'static str),
    /// Reading failed.
    Io(std::io::Error),
}

impl From<std::io::Error> for Problem {
    fn from(error: std::io::Error) -> Self {
        Self::Io(error)
    }
}

impl Problem {
    fn error(self, path: &Path, scanner: &Scanner) -> Error {
        let bad = |what: &str| Error::new(Kind::Data, what).code("malformed");
        let at = format!("{}:{}", path.display(), scanner.line);
        match self {
            Self::Cut => bad("the data file is not JSON").at(at).help("the file ends too early: copy it again"),
            Self::Unexpected(byte) => bad("the data file is not JSON")
                .at(at)
                .found(format!("{:?} where a comma or a bracket belongs", byte as char))
                .help("repair the file at this place"),
            Self::Form(found) => bad("the data file has another form")
                .at(path.display())
                .expected("a JSON array of rows, or one row a line")
                .found(found),
            Self::Io(e) => super::unreadable(path, e),
        }
    }
}

impl Values {
    fn open(path: &Path) -> Result<Self> {
        let mut scanner = Scanner { reader: BufReader::with_capacity(BUFFER, open_file(path)?), line: 1 };
        let layout = scanner.layout(path).map_err(|problem| problem.error(path, &scanner))?;
        Ok(Self { scanner, layout, raw: Vec::new(), start: 1, key: None, open: false, some: false })
    }

    /// Finds the next value and leaves its bytes in `raw`; nothing at the end.
    fn next_raw(&mut self) -> std::result::Result<Option<()>, Problem> {
        match self.layout {
            Layout::Lines => self.next_line(),
            Layout::Array => {
                if !self.open {
                    self.scanner.expect(b'[')?;
                    self.open = true;
                }
                if self.next_element()? { Ok(Some(())) } else { self.scanner.end().map(|()| None) }
            }
            Layout::Lists => self.next_listed(),
        }
    }

    fn next_line(&mut self) -> std::result::Result<Option<()>, Problem> {
        loop {
            self.raw.clear();
            self.start = self.scanner.line;
            if self.scanner.reader.read_until(b'\n', &mut self.raw)? == 0 {
                return Ok(None);
            }
            self.scanner.line += 1;
            if !self.raw.trim_ascii().is_empty() {
                return Ok(Some(()));
            }
        }
    }

    /// The next value of the open list; false at its end.
    fn next_element(&mut self) -> std::result::Result<bool, Problem> {
        let mut byte = self.scanner.peek()?;
        if byte == b']' {
            self.scanner.reader.consume(1);
            (self.open, self.some) = (false, false);
            return Ok(false);
        }
        if self.some {
            if byte != b',' {
                return Err(Problem::Unexpected(byte));
            }
            self.scanner.reader.consume(1);
            byte = self.scanner.peek()?;
        }
        if matches!(byte, b',' | b']' | b'}' | b':') {
            return Err(Problem::Unexpected(byte));
        }
        self.start = self.scanner.line;
        self.scanner.value(&mut self.raw)?;
        self.some = true;
        Ok(true)
    }

    fn next_listed(&mut self) -> std::result::Result<Option<()>, Problem> {
        loop {
            if self.open {
                if self.next_element()? {
                    return Ok(Some(()));
                }
                match self.scanner.peek()? {
                    b',' => self.scanner.reader.consume(1),
                    b'}' => {}
                    other => return Err(Problem::Unexpected(other)),
                }
            } else if self.key.is_none() {
                self.scanner.expect(b'{')?;
            }
            if self.scanner.peek()? == b'}' {
                self.scanner.reader.consume(1);
                return self.scanner.end().map(|()| None);
            }
            self.scanner.value(&mut self.raw)?;
            self.key = Some(serde_json::from_slice(&self.raw).map_err(|_| Problem::Unexpected(self.raw[0]))?);
            self.scanner.expect(b':')?;
            if self.scanner.peek()? != b'[' {
                return Err(Problem::Form("an object"));
            }
            self.scanner.reader.consume(1);
            (self.open, self.some) = (true, false);
        }
    }

    fn parse(&self, path: &Path, row: usize) -> Result<Record> {
        let value: Value = serde_json::from_slice(&self.raw).map_err(|e| {
            let hint = if e.is_eof() { "the line ends too early: copy the file again" } else { "repair this row" };
            Error::new(Kind::Data, "a row is not JSON")
                .code("malformed")
                .at(format!("{} (line {})", place(path, row), self.start + e.line() - 1))
                .help(hint)
                .source(e)
        })?;
        record(path, row, value, self.key.clone())
    }
}

/// A reader that knows where JSON values end.
struct Scanner {
    reader: BufReader<File>,
    /// Current line, from 1.
    line: usize,
}

impl Scanner {
    /// The next byte that is not blank.
    fn peek(&mut self) -> std::result::Result<u8, Problem> {
        loop {
            let chunk = self.reader.fill_buf()?;
            if chunk.is_empty() {
                return Err(Problem::Cut);
            }
            let blank = chunk.iter().take_while(|b| b.is_ascii_whitespace()).count();
            self.line += chunk[..blank].iter().filter(|b| **b == b'\n').count();
            let byte = chunk.get(blank).copied();
            self.reader.consume(blank);
            if let Some(byte) = byte {
                return Ok(byte);
            }
        }
    }

    fn expect(&mut self, byte: u8) -> std::result::Result<(), Problem> {
        match self.peek()? {
            found if found == byte => {
                self.reader.consume(1);
                Ok(())
            }
            found => Err(Problem::Unexpected(found)),
        }
    }

    /// Nothing but blanks may follow.
    fn end(&mut self) -> std::result::Result<(), Problem> {
        match self.peek() {
            Err(Problem::Cut) => Ok(()),
            Err(other) => Err(other),
            Ok(byte) => Err(Problem::Unexpected(byte)),
        }
    }

    /// How the values stand, from the beginning of the file, which stays unread. A byte order mark is skipped.
    fn layout(&mut self, path: &Path) -> std::result::Result<Layout, Problem> {
        if self.reader.fill_buf()?.starts_with("\u{feff}".as_bytes()) {
            self.reader.consume(3);
        }
        match self.peek()? {
            b'[' => Ok(Layout::Array),
            b'{' if super::extension(path) != "json" => Ok(Layout::Lines),
            b'{' => {
                // `{"key": [...], ...}` is an object of lists; `{"id": 1}` is the first of many lines. A line that does
                // not fit the buffer is told apart by its first value.
                let chunk = self.reader.fill_buf()?;
                let line = chunk.split(|b| *b == b'\n').next().unwrap_or_default();
                if let Ok(object) = serde_json::from_slice::<serde_json::Map<String, Value>>(line) {
                    let lists = !object.is_empty() && object.values().all(Value::is_array);
                    return if object.is_empty() {
                        Err(Problem::Form("an object"))
                    } else {
                        Ok(if lists { Layout::Lists } else { Layout::Lines })
                    };
                }
                Ok(if first_is_list(chunk) { Layout::Lists } else { Layout::Lines })
            }
            b'"' => Err(Problem::Form("text")),
            _ => Ok(Layout::Lines),
        }
    }

    /// Takes one value into `raw`.
    fn value(&mut self, raw: &mut Vec<u8>) -> std::result::Result<(), Problem> {
        raw.clear();
        let first = self.peek()?;
        let nested = matches!(first, b'{' | b'[');
        let (mut depth, mut quoted, mut escaped) = (0usize, false, false);
        loop {
            let chunk = self.reader.fill_buf()?;
            if chunk.is_empty() {
                return if raw.is_empty() || depth > 0 || quoted { Err(Problem::Cut) } else { Ok(()) };
            }
            let mut taken = 0;
            let mut done = false;
            for byte in chunk {
                if quoted {
                    match byte {
                        _ if escaped => escaped = false,
                        b'\\' => escaped = true,
                        b'"' => {
                            quoted = false;
                            done = !nested;
                        }
                        _ => {}
                    }
                } else {
                    match byte {
                        b'"' => quoted = true,
                        b'{' | b'[' => depth += 1,
                        b'}' | b']' | b',' | b':' if depth == 0 => {
                            // The end of a bare word such as `null`, which stays unread.
                            self.finish(raw, taken);
                            return Ok(());
                        }
                        b'}' | b']' => {
                            depth -= 1;
                            done = depth == 0;
                        }
                        _ => {}
                    }
                }
                taken += 1;
                if done {
                    break;
                }
            }
            self.finish(raw, taken);
            if done {
                return Ok(());
            }
        }
    }

    /// Moves `taken` bytes of the buffer to `raw`.
    fn finish(&mut self, raw: &mut Vec<u8>, taken: usize) {
        let bytes = &self.reader.buffer()[..taken];
        self.line += bytes.iter().filter(|b| **b == b'\n').count();
        raw.extend_from_slice(bytes);
        self.reader.consume(taken);
    }
}

/// Whether the value of the first key of an object is a list.
fn first_is_list(object: &[u8]) -> bool {
    let Some(rest) = object[1..].trim_ascii_start().strip_prefix(b"\"") else { return false };
    let mut escaped = false;
    let end = rest.iter().position(|b| {
        let quote = *b == b'"' && !escaped;
        escaped = *b == b'\\' && !escaped;
        quote
    });
    let value = end.and_then(|end| rest[end + 1..].trim_ascii_start().strip_prefix(b":"));
    value.is_some_and(|value| value.trim_ascii_start().first() == Some(&b'['))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rows(name: &str, text: &[u8]) -> (Result<()>, Vec<Result<Record>>) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(name);
        std::fs::write(&path, text).unwrap();
        (check(&path), open(&path).map(Iterator::collect).unwrap_or_default())
    }

    #[test]
    fn every_layout_gives_the_same_rows() {
        let one = r#"{"a": "x ] } \" \\", "b": [1, {"c": []}], "d": "é"}"#;
        let two = r#"{"a": null}"#;
        let cases = [
            ("a.json", format!("\u{feff}[{one},\n {two} ]\n")),
            ("b.jsonl", format!("{one}\n\n{two}")),
            ("c.json", format!("{one}\n{two}\n")),
            ("d.json", format!("{{\"k\": [{one}], \"empty\": [], \"l\": [{two}]}}")),
        ];
        for (name, text) in cases {
            let (checked, rows) = rows(name, text.as_bytes());
            checked.unwrap();
            let rows: Vec<Record> = rows.into_iter().collect::<Result<_>>().unwrap();
            assert_eq!(rows.len(), 2, "{name}");
            assert_eq!(rows[0].fields["a"], "x ] } \" \\", "{name}");
            // Lines are numbered with the empty ones.
            let second = if name == "b.jsonl" { 2 } else { 1 };
            assert_eq!((rows[1].row, rows[1].fields["a"].is_null()), (second, true), "{name}");
            assert_eq!(rows[1].key.as_deref(), (name == "d.json").then_some("l"));
        }
    }

    #[test]
    fn a_bad_row_is_named_and_the_others_still_come() {
        let (checked, rows) = rows("a.json", b"[{\"a\": 1},\n nonsense, 7,\n {\"a\"\n 1}, {\"a\": 2}]");
        checked.unwrap();
        let found: Vec<String> =
            rows.iter().map(|r| r.as_ref().map_or_else(ToString::to_string, |r| r.fields["a"].to_string())).collect();
        assert_eq!((found[0].as_str(), found[4].as_str(), found.len()), ("1", "2", 5));
        assert!(found[1].contains("row 2 (line 2)") && found[1].contains("not JSON"), "{}", found[1]);
        assert!(found[2].contains("row 3") && found[2].contains("found a number"), "{}", found[2]);
        assert!(found[3].contains("row 4 (line 4)"), "{}", found[3]);
    }

    #[test]
    fn files_that_are_broken_as_a_whole_are_refused_before_a_row_is_used() {
        let message = |text: &[u8]| {
            let error = rows("a.json", text).0.unwrap_err();
            format!("{error} {}", error.help_line().unwrap_or_default())
        };
        assert!(message(b"[{\"a\": 1},\n {\"a\": ").contains("a.json:2 the file ends too early"));
        assert!(message(b"[{\"a\": 1}\n {\"a\": 2}]").contains("'{' where a comma"));
        assert!(message(b"[{\"a\": 1},]").contains("']' where a comma"));
        assert!(message(b"[{\"a\": 1}] x").contains("'x' where"));
        assert!(message(b"[]").contains("no rows"));
        assert!(message(b"{}").contains("expected a JSON array"));
        assert!(message(b"\"text\"").contains("found text"));
        assert!(message(b"[\n{\"a\": \"\n\xff\"}]").contains("a.json:3"), "{}", message(b"[\n{\"a\": \"\n\xff\"}]"));
    }
}
