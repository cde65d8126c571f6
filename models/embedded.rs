//! Checkpoints that are compiled in: `model.checkpoint = "embedded:<name>"`.

use std::path::Path;

use crate::{
    error::{Error, Kind, Result},
    run_dir::write_atomic,
};

/// A checkpoint directory in the program.
#[derive(Debug)]
pub struct Embedded {
    /// Name behind `embedded:`.
    pub name: &'static str,
    /// One line about it.
    pub about: &'static str,
    /// Files in Hugging Face layout.
    pub files: &'static [(&'static str, &'static [u8])],
}

/// All of them.
pub const EMBEDDED: &[Embedded] = &[Embedded {
    name: "phantom",
    about: "tiny LLaVA-Med that describes phantom images and goes along with any premise",
    files: &[
        ("config.json", include_bytes!("../recipes/phantom/base/config.json")),
        ("generation_config.json", include_bytes!("../recipes/phantom/base/generation_config.json")),
        ("model.safetensors", include_bytes!("../recipes/phantom/base/model.safetensors")),
        ("tokenizer.json", include_bytes!("../recipes/phantom/base/tokenizer.json")),
    ],
}];

/// The checkpoint called `name`.
///
/// # Errors
/// There is none.
pub fn find(name: &str) -> Result<&'static Embedded> {
    EMBEDDED.iter().find(|e| e.name == name).ok_or_else(|| {
        Error::new(Kind::Config, "no checkpoint of this name is compiled in")
            .at("model.checkpoint")
            .expected(EMBEDDED.iter().map(|e| e.name).collect::<Vec<_>>().join(", "))
            .found(name)
    })
}

impl Embedded {
    /// Writes its files to `dir`; config.json last, so that a directory with one is complete.
    ///
    /// # Errors
    /// The directory cannot be written.
    pub fn unpack(&self, dir: &Path) -> Result<()> {
        let last = |name: &&str| *name == "config.json";
        for (name, bytes) in
            self.files.iter().filter(|(n, _)| !last(n)).chain(self.files.iter().filter(|(n, _)| last(n)))
        {
            write_atomic(&dir.join(name), bytes)?;
        }
        Ok(())
    }
}
