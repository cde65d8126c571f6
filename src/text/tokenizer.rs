//! Llama-style tokenizers of a checkpoint directory: sentencepiece `tokenizer.model`, or `tokenizer.json`.
//!
//! Both behave as transformers' `LlamaTokenizer` with `legacy = true`: special tokens are recognised anywhere in a text,
//! and every stretch between them is tokenised on its own, with its own leading space.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

use serde::Deserialize;
use sha2::{Digest, Sha256};

use super::sentencepiece::{SPACE, SentencePiece};
use crate::error::{Error, Kind, Result};

/// Text to ids and back.
#[derive(Debug)]
pub struct Tokenizer {
    backend: Backend,
    /// Recognised anywhere in a text, longest first.
    added: Vec<Added>,
    vocab_size: usize,
    bos_id: i32,
    eos_id: i32,
    unk_id: i32,
    add_bos: bool,
    sha256: String,
}

enum Backend {
    Pieces(Box<SentencePiece>),
    Json(Box<tokenizers::Tokenizer>),
}

impl std::fmt::Debug for Backend {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Pieces(_) => "tokenizer.model",
            Self::Json(_) => "tokenizer.json",
        })
    }
}

#[derive(Debug, Clone)]
struct Added {
    text: String,
    id: i32,
    special: bool,
    lstrip: bool,
    rstrip: bool,
}

/// The keys of `tokenizer_config.json` that decide something here.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct TokenizerConfig {
    add_bos_token: Option<bool>,
    added_tokens_decoder: BTreeMap<String, AddedConfig>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct AddedConfig {
    content: String,
    lstrip: bool,
    rstrip: bool,
    special: bool,
}

impl Tokenizer {
    /// Reads the tokenizer of a checkpoint directory: `tokenizer.model` if it is there, else `tokenizer.json`.
    ///
    /// # Errors
    /// Neither file, or one that cannot be read.
    pub fn load(dir: &Path) -> Result<Self> {
        let (model, json) = (dir.join("tokenizer.model"), dir.join("tokenizer.json"));
        let config = read_config(&dir.join("tokenizer_config.json"))?;
        if model.is_file() {
            let bytes = fs::read(&model).map_err(|e| Error::io(&model, e))?;
            Self::from_model(&bytes, &config).map_err(|e| located(e, &model))
        } else if json.is_file() {
            let bytes = fs::read(&json).map_err(|e| Error::io(&json, e))?;
            Self::from_json(&bytes, &config).map_err(|e| located(e, &json))
        } else {
            Err(Error::new(Kind::Text, "a checkpoint has no tokenizer")
                .at(dir.display())
                .expected("tokenizer.model or tokenizer.json")
                .help("copy the tokenizer files of the original checkpoint into the directory"))
        }
    }

    /// A tokenizer from the bytes of `tokenizer.json` alone.
    ///
    /// # Errors
    /// Not a tokenizer, or one without `<s>` and `</s>`.
    pub fn from_json_bytes(bytes: &[u8]) -> Result<Self> {
        Self::from_json(bytes, &TokenizerConfig::default())
    }

    fn from_model(bytes: &[u8], config: &TokenizerConfig) -> Result<Self> {
        let pieces = SentencePiece::from_bytes(bytes)?;
        let (bos_id, eos_id, unk_id) = (pieces.bos_id(), pieces.eos_id(), pieces.unk_id());
        let special = |id: i32| {
            let text = pieces.piece(id).map(str::to_string)?;
            Some(Added { text, id, special: true, lstrip: false, rstrip: false })
        };
        let mut added: Vec<Added> = [unk_id, bos_id, eos_id].into_iter().filter_map(special).collect();
        for (id, token) in &config.added_tokens_decoder {
            let id: i32 = id.parse().map_err(|_| {
                Error::new(Kind::Text, "tokenizer_config.json has an added token without a number").found(id)
            })?;
            added.retain(|a| a.id != id);
            let AddedConfig { content: text, lstrip, rstrip, special } = token;
            added.push(Added { text: text.clone(), id, special: *special, lstrip: *lstrip, rstrip: *rstrip });
        }
        added.retain(|a| !a.text.is_empty());
        added.sort_by(|a, b| b.text.len().cmp(&a.text.len()).then(a.id.cmp(&b.id)));
        let vocab_size = added.iter().map(|a| a.id as usize + 1).max().unwrap_or(0).max(pieces.len());
        Ok(Self {
            backend: Backend::Pieces(Box::new(pieces)),
            added,
            vocab_size,
            bos_id,
            eos_id,
            unk_id,
            add_bos: config.add_bos_token.unwrap_or(true),
            sha256: hash(bytes),
        })
    }

    fn from_json(bytes: &[u8], config: &TokenizerConfig) -> Result<Self> {
        let mut inner = tokenizers::Tokenizer::from_bytes(bytes)
            .map_err(|e| Error::new(Kind::Text, "cannot read a tokenizer.json").source(e))?;
        // Padding and truncation of the file are no business of a tokenizer that is called row by row.
        inner.with_padding(None);
        inner.with_truncation(None).map_err(|e| Error::new(Kind::Text, "cannot read a tokenizer.json").source(e))?;
        let id = |token: &str| {
            inner.token_to_id(token).map(|id| id as i32).ok_or_else(|| {
                Error::new(Kind::Text, "a tokenizer.json lacks a special token")
                    .expected(token)
                    .help("only Llama-style tokenizers are supported here")
            })
        };
        let (bos_id, eos_id, unk_id) = (id("<s>")?, id("</s>")?, id("<unk>")?);
        let added = inner
            .get_added_tokens_decoder()
            .into_iter()
            .map(|(id, t)| Added {
                text: t.content,
                id: id as i32,
                special: t.special,
                lstrip: t.lstrip,
                rstrip: t.rstrip,
            })
            .collect();
        let vocab_size = inner.get_vocab(true).into_values().max().map_or(0, |id| id as usize + 1);
        Ok(Self {
            backend: Backend::Json(Box::new(inner)),
            added,
            vocab_size,
            bos_id,
            eos_id,
            unk_id,
            add_bos: config.add_bos_token.unwrap_or(true),
            sha256: hash(bytes),
        })
    }

    /// Ids of `text` with `<s>` in front; special tokens in the text are recognised.
    ///
    /// # Errors
    /// A `tokenizer.json` whose parts contradict each other.
    pub fn encode(&self, text: &str) -> Result<Vec<i32>> {
        let mut ids = if self.add_bos { vec![self.bos_id] } else { Vec::new() };
        match &self.backend {
            Backend::Pieces(pieces) => self.encode_segments(pieces, text, &mut ids),
            Backend::Json(inner) => ids.extend(json_ids(inner, text)?),
        }
        Ok(ids)
    }

    /// Ids of `text` alone; special tokens in it are ordinary text.
    ///
    /// # Errors
    /// As [`Tokenizer::encode`].
    pub fn encode_ordinary(&self, text: &str) -> Result<Vec<i32>> {
        match &self.backend {
            Backend::Pieces(pieces) => Ok(pieces.encode(text)),
            Backend::Json(inner) => {
                let mut plain = (**inner).clone();
                plain.set_encode_special_tokens(true);
                json_ids(&plain, text)
            }
        }
    }

    fn encode_segments(&self, pieces: &SentencePiece, text: &str, ids: &mut Vec<i32>) {
        let mut rest = text;
        while let Some((at, token)) = self.next_added(rest) {
            let before = if token.lstrip { rest[..at].trim_end() } else { &rest[..at] };
            ids.extend(pieces.encode(before));
            ids.push(token.id);
            rest = &rest[at + token.text.len()..];
            if token.rstrip {
                rest = rest.trim_start();
            }
        }
        ids.extend(pieces.encode(rest));
    }

    /// The leftmost added token, the longest of those that start there.
    fn next_added(&self, text: &str) -> Option<(usize, &Added)> {
        let found = self.added.iter().filter_map(|a| text.find(&a.text).map(|at| (at, a)));
        found.min_by(|(i, a), (k, b)| i.cmp(k).then(b.text.len().cmp(&a.text.len())))
    }

    /// Text of ids, as transformers' fast tokenizer gives it, special tokens kept or left out.
    ///
    /// Ids outside the vocabulary give no text.
    #[must_use]
    pub fn decode(&self, ids: &[i32], skip_special: bool) -> String {
        match &self.backend {
            Backend::Pieces(pieces) => self.decode_pieces(pieces, ids, skip_special),
            Backend::Json(inner) => {
                let ids: Vec<u32> = ids.iter().filter_map(|id| u32::try_from(*id).ok()).collect();
                // Fails only for ids that do not exist, which are left out.
                inner.decode(&ids, skip_special).unwrap_or_default()
            }
        }
    }

    fn decode_pieces(&self, pieces: &SentencePiece, ids: &[i32], skip_special: bool) -> String {
        let (mut out, mut bytes) = (String::new(), Vec::new());
        for &id in ids {
            let added = self.added.iter().find(|a| a.id == id);
            if skip_special && added.is_some_and(|a| a.special) {
                continue;
            }
            let Some(piece) = added.map(|a| a.text.as_str()).or_else(|| pieces.piece(id)) else { continue };
            match byte_of(piece) {
                Some(byte) => bytes.push(byte),
                None => {
                    flush(&mut bytes, &mut out);
                    out.push_str(&piece.replace(SPACE, " "));
                }
            }
        }
        flush(&mut bytes, &mut out);
        match out.strip_prefix(' ') {
            Some(rest) => rest.to_string(),
            None => out,
        }
    }

    /// One id as it stands in the vocabulary.
    #[must_use]
    pub fn piece(&self, id: i32) -> String {
        let known = match &self.backend {
            Backend::Pieces(pieces) => {
                let added = self.added.iter().find(|a| a.id == id).map(|a| a.text.as_str());
                added.or_else(|| pieces.piece(id)).map(str::to_string)
            }
            Backend::Json(inner) => u32::try_from(id).ok().and_then(|id| inner.id_to_token(id)),
        };
        known.unwrap_or_else(|| format!("<id {id}>"))
    }

    /// One more than the largest id.
    #[must_use]
    pub fn vocab_size(&self) -> usize {
        self.vocab_size
    }

    /// Id of `<s>`.
    #[must_use]
    pub fn bos_id(&self) -> i32 {
        self.bos_id
    }

    /// Id of `</s>`.
    #[must_use]
    pub fn eos_id(&self) -> i32 {
        self.eos_id
    }

    /// Id of `<unk>`, which also fills padded positions.
    #[must_use]
    pub fn unk_id(&self) -> i32 {
        self.unk_id
    }

    /// The special tokens, such as `</s>`, that occur in `text`.
    pub fn specials_in<'a>(&'a self, text: &'a str) -> impl Iterator<Item = &'a str> + 'a {
        self.added.iter().filter(|a| a.special && text.contains(&a.text)).map(|a| a.text.as_str())
    }

    /// SHA-256 of the file, in hexadecimal.
    #[must_use]
    pub fn sha256(&self) -> &str {
        &self.sha256
    }
}

fn read_config(path: &PathBuf) -> Result<TokenizerConfig> {
    if !path.is_file() {
        return Ok(TokenizerConfig::default());
    }
    let text = fs::read_to_string(path).map_err(|e| Error::io(path, e))?;
    serde_json::from_str(&text)
        .map_err(|e| Error::new(Kind::Text, "cannot read a tokenizer's config").at(path.display()).source(e))
}

fn located(error: Error, path: &Path) -> Error {
    error.at(path.display())
}

fn hash(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|b| format!("{b:02x}")).collect()
}

fn json_ids(inner: &tokenizers::Tokenizer, text: &str) -> Result<Vec<i32>> {
    let encoding = inner
        .encode_fast(text, false)
        .map_err(|e| Error::new(Kind::Text, "the tokenizer refuses a text").found(format!("{text:?}")).source(e))?;
    Ok(encoding.get_ids().iter().map(|id| *id as i32).collect())
}

fn byte_of(piece: &str) -> Option<u8> {
    let digits = piece.strip_prefix("<0x")?.strip_suffix('>')?;
    if digits.len() == 2 { u8::from_str_radix(digits, 16).ok() } else { None }
}

/// Appends a run of bytes: their text if they are UTF-8 as a whole, else one U+FFFD for each.
fn flush(bytes: &mut Vec<u8>, out: &mut String) {
    match std::str::from_utf8(bytes) {
        Ok(text) => out.push_str(text),
        Err(_) => out.extend(bytes.iter().map(|_| char::REPLACEMENT_CHARACTER)),
    }
    bytes.clear();
}
