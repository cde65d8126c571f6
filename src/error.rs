//! The one error type: what went wrong, where, what was expected, what was found, and what to do about it.

use std::{
    error::Error as StdError,
    fmt,
    path::{Path, PathBuf},
};

/// Result of everything in this crate that can fail.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What a failure is about; decides the exit code.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A recipe, an override or a flag.
    Config,
    /// A data set row or file.
    Data,
    /// An image file.
    Image,
    /// A tokenizer or a chat template.
    Text,
    /// A checkpoint or an adapter.
    Checkpoint,
    /// A device that is absent, not compiled in, or out of memory.
    Device,
    /// A loss or gradient that is not finite.
    Numeric,
    /// A run directory or another file of this program's own.
    Run,
    /// A quality gate that said no: the program worked, the data or model did not pass.
    Gate,
    /// The user interrupted.
    Interrupted,
}

impl Kind {
    /// Process exit code: 1 when a gate failed, 2 when the work could not be done. Who interrupts gets what was asked for:
    /// everything is saved, and 0.
    #[must_use]
    pub fn exit_code(self) -> u8 {
        match self {
            Self::Interrupted => 0,
            Self::Gate => 1,
            _ => 2,
        }
    }
}

/// A failure with its operands. Built with [`Error::new`] and the setters.
pub struct Error(Box<Parts>);

struct Parts {
    kind: Kind,
    code: Option<&'static str>,
    what: String,
    at: Option<String>,
    file: Option<PathBuf>,
    expected: Option<String>,
    found: Option<String>,
    help: Option<String>,
    source: Option<Box<dyn StdError + Send + Sync>>,
}

impl Error {
    /// A failure of `kind`; `what` is a short sentence without a full stop.
    pub fn new(kind: Kind, what: impl Into<String>) -> Self {
        Self(Box::new(Parts {
            kind,
            code: None,
            what: what.into(),
            at: None,
            file: None,
            expected: None,
            found: None,
            help: None,
            source: None,
        }))
    }

    /// Reading or writing `path` failed.
    pub fn io(path: impl AsRef<Path>, source: std::io::Error) -> Self {
        let help = match source.kind() {
            std::io::ErrorKind::StorageFull => "free some space, then run the same command again; it continues",
            std::io::ErrorKind::PermissionDenied => "check the permissions of this path",
            std::io::ErrorKind::NotFound => "check the path",
            _ => "check the disk and the path",
        };
        Self::new(Kind::Run, "cannot read or write a file").at(path.as_ref().display()).help(help).source(source)
    }

    /// Stable snake_case name of the reason, where rows that fail with it are counted.
    #[must_use]
    pub fn code(mut self, code: &'static str) -> Self {
        self.0.code = Some(code);
        self
    }

    /// Where it happened: a path, a row id, a tensor name, a key.
    #[must_use]
    pub fn at(mut self, at: impl fmt::Display) -> Self {
        self.0.at = Some(at.to_string());
        self
    }

    /// File whose absence or content is the reason, where a change of it may mend things. Not part of the message.
    #[must_use]
    pub fn about(mut self, file: impl Into<PathBuf>) -> Self {
        self.0.file = Some(file.into());
        self
    }

    /// What should have been there.
    #[must_use]
    pub fn expected(mut self, expected: impl fmt::Display) -> Self {
        self.0.expected = Some(expected.to_string());
        self
    }

    /// What was there.
    #[must_use]
    pub fn found(mut self, found: impl fmt::Display) -> Self {
        self.0.found = Some(found.to_string());
        self
    }

    /// One line that says what to do.
    #[must_use]
    pub fn help(mut self, help: impl fmt::Display) -> Self {
        self.0.help = Some(help.to_string());
        self
    }

    /// The failure underneath.
    #[must_use]
    pub fn source(mut self, source: impl Into<Box<dyn StdError + Send + Sync>>) -> Self {
        self.0.source = Some(source.into());
        self
    }

    /// What the failure is about.
    #[must_use]
    pub fn kind(&self) -> Kind {
        self.0.kind
    }

    /// Stable name of the reason; by default one for its kind.
    #[must_use]
    pub fn reason(&self) -> &'static str {
        self.0.code.unwrap_or(match self.0.kind {
            Kind::Image => "image_error",
            Kind::Text => "text_error",
            _ => "row_error",
        })
    }

    /// The file that [`Error::about`] named.
    #[must_use]
    pub fn file(&self) -> Option<&Path> {
        self.0.file.as_deref()
    }

    /// The `help:` line, without its label.
    #[must_use]
    pub fn help_line(&self) -> Option<&str> {
        self.0.help.as_deref()
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let p = &*self.0;
        f.write_str(&p.what)?;
        if let Some(at) = &p.at {
            write!(f, " at {at}")?;
        }
        match (&p.expected, &p.found) {
            (Some(e), Some(x)) => write!(f, ": expected {e}, found {x}"),
            (Some(e), None) => write!(f, ": expected {e}"),
            (None, Some(x)) => write!(f, ": found {x}"),
            (None, None) => Ok(()),
        }
    }
}

impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}: {self}", self.0.kind)?;
        if let Some(help) = &self.0.help {
            write!(f, " (help: {help})")?;
        }
        if let Some(source) = &self.0.source {
            write!(f, " <- {source:?}")?;
        }
        Ok(())
    }
}

impl StdError for Error {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        self.0.source.as_deref().map(|s| s as _)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_names_all_its_operands() {
        let error = Error::new(Kind::Checkpoint, "tensor has the wrong shape")
            .at("model.norm.weight")
            .expected("[64]")
            .found("[32]")
            .help("use the checkpoint that belongs to this config.json");
        assert_eq!(error.to_string(), "tensor has the wrong shape at model.norm.weight: expected [64], found [32]");
        assert_eq!(error.help_line(), Some("use the checkpoint that belongs to this config.json"));
        assert_eq!(error.kind().exit_code(), 2);
        assert_eq!(Error::new(Kind::Gate, "drop rate too high").kind().exit_code(), 1);
    }
}
