//! Checkpoints that are compiled in: `model.checkpoint = "embedded:<name>"`.

use std::path::Path;

use crate::{
    error::{Error, Kind, Result},
    run_dir::write_atomic,
};

/// A checkpoint directory in the program.
#[derive(Debug)]
pub struct Embedded {
    /// Name behind `embedded:`; every family may have one of it.
    pub name: &'static str,
    /// Family, as `model.name` has it.
    pub family: &'static str,
    /// One line about it.
    pub about: &'static str,
    /// Files in Hugging Face layout.
    pub files: &'static [(&'static str, &'static [u8])],
}

/// Name and bytes of files of `recipes/phantom/base/<family>/`.
macro_rules! phantom {
    ($family:literal, $about:literal, $($file:literal),+) => {
        Embedded {
            name: "phantom",
            family: $family,
            about: $about,
            files: &[$(($file, include_bytes!(concat!("../recipes/phantom/base/", $family, "/", $file)))),+],
        }
    };
}

/// All of them.
pub const EMBEDDED: &[Embedded] = &[
    phantom!(
        "llava_med",
        "tiny LLaVA-Med that describes phantom images and goes along with any premise",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json"
    ),
    phantom!(
        "qwen_vl",
        "tiny Qwen-VL of the same upbringing",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "qwen.tiktoken"
    ),
    phantom!(
        "internvl",
        "tiny InternVL of the same upbringing",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.model",
        "tokenizer_config.json"
    ),
];

/// The checkpoint called `name` of a family.
///
/// # Errors
/// There is none.
pub fn find(name: &str, family: &str) -> Result<&'static Embedded> {
    let found = EMBEDDED.iter().find(|e| e.name == name && e.family == family);
    found.ok_or_else(|| {
        let known: Vec<String> = EMBEDDED.iter().map(|e| format!("{} of {}", e.name, e.family)).collect();
        Error::new(Kind::Config, "no checkpoint of this name and family is compiled in")
            .at("model.checkpoint")
            .expected(known.join(", "))
            .found(format!("{name} of {family}"))
            .help("name a directory as model.checkpoint, or leave it out for random weights of model.preset")
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
