//! Tokenizers of text encoders, as bert_score calls transformers' slow ones: byte-level pairs for RoBERTa, word pieces
//! for BERT; special tokens inside a text are recognised.

use std::{
    fs,
    path::{Path, PathBuf},
};

use serde::Deserialize;
use tokenizers::{
    AddedToken, ModelWrapper,
    models::{bpe::BPE, wordpiece::WordPiece},
    normalizers::bert::BertNormalizer,
    pre_tokenizers::{bert::BertPreTokenizer, byte_level::ByteLevel},
};

use crate::{
    error::{Error, Kind, Result},
    nn::bert::BertConfig,
};

/// The keys of `tokenizer_config.json` that decide something here.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct TokenizerConfig {
    model_max_length: Option<f64>,
    do_lower_case: Option<bool>,
    strip_accents: Option<bool>,
    tokenize_chinese_chars: Option<bool>,
}

/// Text to the ids of an encoder.
pub(super) struct TextTokenizer {
    inner: tokenizers::Tokenizer,
    /// A blank goes before a text that has none, as RoBERTa learned words.
    prefix_space: bool,
    begin: i32,
    end: i32,
    /// Most ids of a text, both ends included.
    max_length: usize,
    /// Files it was read from.
    pub(super) files: Vec<PathBuf>,
}

impl TextTokenizer {
    /// Reads the tokenizer of a checkpoint directory: `vocab.json` and `merges.txt`, or `vocab.txt`, else
    /// `tokenizer.json`.
    pub(super) fn load(dir: &Path, model: &BertConfig) -> Result<Self> {
        let config = read_config(&dir.join("tokenizer_config.json"))?;
        let roberta = model.model_type == "roberta";
        let (mut inner, files) = if roberta { byte_level(dir)? } else { word_pieces(dir, &config)? };
        let special: &[&str] = if roberta {
            &["<s>", "</s>", "<pad>", "<unk>", "<mask>"]
        } else {
            &["[CLS]", "[SEP]", "[PAD]", "[UNK]", "[MASK]"]
        };
        let known = special.iter().filter(|t| inner.token_to_id(t).is_some());
        let tokens = known.map(|t| AddedToken::from(*t, true).lstrip(*t == "<mask>")).collect::<Vec<_>>();
        inner.add_special_tokens(&tokens);
        let id = |token: &str| {
            inner.token_to_id(token).map(|id| id as i32).ok_or_else(|| {
                Error::new(Kind::Text, "a tokenizer lacks a special token").at(dir.display()).expected(token)
            })
        };
        let (begin, end) = (id(special[0])?, id(special[1])?);
        // Absent or astronomical means that only the positions limit a text.
        let limit = config.model_max_length.filter(|n| *n >= 2.0).map_or(usize::MAX, |n| n as usize);
        let max_length = limit.min(model.max_length());
        Ok(Self { inner, prefix_space: roberta, begin, end, max_length, files })
    }

    /// Ids of a text between the begin and the end token, cut to the longest length.
    pub(super) fn encode(&self, text: &str) -> Result<Vec<i32>> {
        let text = text.trim_matches(crate::metric::text::is_white_space);
        let mut ids = vec![self.begin];
        if !text.is_empty() {
            let padded = if self.prefix_space { format!(" {text}") } else { text.to_string() };
            let encoded = self
                .inner
                .encode(padded, false)
                .map_err(|e| Error::new(Kind::Text, "a text cannot be tokenised").at(text).source(e))?;
            ids.extend(encoded.get_ids().iter().map(|id| *id as i32).take(self.max_length.saturating_sub(2)));
        }
        ids.push(self.end);
        Ok(ids)
    }

    /// Whether an id marks the beginning or the end.
    pub(super) fn is_mark(&self, id: i32) -> bool {
        id == self.begin || id == self.end
    }
}

fn read_config(path: &Path) -> Result<TokenizerConfig> {
    if !path.is_file() {
        return Ok(TokenizerConfig::default());
    }
    let text = fs::read_to_string(path).map_err(|e| Error::io(path, e))?;
    serde_json::from_str(&text)
        .map_err(|e| Error::new(Kind::Text, "cannot read a tokenizer's settings").at(path.display()).source(e))
}

fn damaged(path: &Path) -> impl Fn(tokenizers::Error) -> Error {
    move |e| Error::new(Kind::Text, "cannot read a tokenizer").at(path.display()).source(e)
}

fn plain(model: impl Into<ModelWrapper>) -> tokenizers::Tokenizer {
    tokenizers::Tokenizer::new(model)
}

/// `tokenizer.json` without what changes the number of ids.
fn from_json(path: &Path) -> Result<tokenizers::Tokenizer> {
    let mut inner = tokenizers::Tokenizer::from_file(path).map_err(damaged(path))?;
    inner.with_padding(None);
    inner.with_truncation(None).map_err(damaged(path))?;
    Ok(inner)
}

fn absent(dir: &Path, expected: &str) -> Error {
    Error::new(Kind::Text, "a text encoder has no tokenizer")
        .at(dir.display())
        .expected(expected)
        .help("copy the tokenizer files of the original checkpoint into the directory")
}

fn byte_level(dir: &Path) -> Result<(tokenizers::Tokenizer, Vec<PathBuf>)> {
    let (vocab, merges, json) = (dir.join("vocab.json"), dir.join("merges.txt"), dir.join("tokenizer.json"));
    let (mut inner, files) = if vocab.is_file() && merges.is_file() {
        let bpe = BPE::from_file(&vocab.to_string_lossy(), &merges.to_string_lossy()).unk_token("<unk>".into());
        (plain(bpe.build().map_err(damaged(&vocab))?), vec![vocab, merges])
    } else if json.is_file() {
        (from_json(&json)?, vec![json])
    } else {
        return Err(absent(dir, "vocab.json and merges.txt, or tokenizer.json"));
    };
    // The blank in front is put there once, not behind every special token.
    inner.with_pre_tokenizer(Some(ByteLevel::new(false, true, true)));
    Ok((inner, files))
}

fn word_pieces(dir: &Path, config: &TokenizerConfig) -> Result<(tokenizers::Tokenizer, Vec<PathBuf>)> {
    let (vocab, json) = (dir.join("vocab.txt"), dir.join("tokenizer.json"));
    if vocab.is_file() {
        let pieces = WordPiece::from_file(&vocab.to_string_lossy()).unk_token("[UNK]".into());
        let mut inner = plain(pieces.build().map_err(damaged(&vocab))?);
        let chinese = config.tokenize_chinese_chars.unwrap_or(true);
        let lower = config.do_lower_case.unwrap_or(true);
        inner.with_normalizer(Some(BertNormalizer::new(true, chinese, config.strip_accents, lower)));
        inner.with_pre_tokenizer(Some(BertPreTokenizer));
        Ok((inner, vec![vocab]))
    } else if json.is_file() {
        Ok((from_json(&json)?, vec![json]))
    } else {
        Err(absent(dir, "vocab.txt or tokenizer.json"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bert(dir: &Path) -> TextTokenizer {
        TextTokenizer::load(dir, &BertConfig { max_position_embeddings: 8, ..BertConfig::default() }).unwrap()
    }

    #[test]
    fn word_pieces_are_lower_case_and_cut() {
        let dir = tempfile::tempdir().unwrap();
        let words = "[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\nno\nnodule\nab\n##normal\n.\nnaive\n";
        fs::write(dir.path().join("vocab.txt"), words).unwrap();
        let tokenizer = bert(dir.path());
        assert_eq!(tokenizer.encode(" No Nodule. ").unwrap(), [2, 5, 6, 9, 3]);
        assert_eq!(tokenizer.encode("abnormal naïve mass").unwrap(), [2, 7, 8, 10, 1, 3]);
        assert_eq!(tokenizer.encode("no [MASK]").unwrap(), [2, 5, 4, 3]);
        assert_eq!(tokenizer.encode("\u{1c}").unwrap(), [2, 3]);
        assert_eq!(tokenizer.encode(&"no ".repeat(20)).unwrap().len(), 8);
        fs::write(dir.path().join("tokenizer_config.json"), r#"{"do_lower_case": false, "model_max_length": 4}"#)
            .unwrap();
        assert_eq!(bert(dir.path()).encode("No no no no").unwrap(), [2, 1, 5, 3]);
    }

    #[test]
    fn what_is_missing_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let load = |kind: &str| {
            let config = BertConfig { model_type: kind.into(), ..BertConfig::default() };
            TextTokenizer::load(dir.path(), &config).err().unwrap().to_string()
        };
        assert!(load("bert").contains("vocab.txt"));
        assert!(load("roberta").contains("merges.txt"));
        fs::write(dir.path().join("vocab.txt"), "[UNK]\n[CLS]\n").unwrap();
        assert!(load("bert").contains("[SEP]"));
    }
}
