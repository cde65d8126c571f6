//! The slow (sentencepiece) tokenizers of `transformers` 4.37: `LlamaTokenizer` and InternLM2's own.
//!
//! Their ids differ from those of the fast tokenizers around added tokens, and the models were trained with these.
//! A text is first cut at added tokens (leftmost, then longest), tokens with `rstrip` swallow the white space behind
//! them, and every remaining piece goes through sentencepiece on its own.

use std::{
    collections::{HashMap, HashSet},
    path::Path,
};

use serde::Deserialize;
use serde_json::Value;
use sha2::{Digest, Sha256};

use crate::{
    error::{Error, Kind, Result},
    text::sentencepiece::{SPACE, SentencePiece},
};

/// Which class of `transformers` is followed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Flavor {
    /// `LlamaTokenizer` with `legacy` false: one space in front of the whole text, none in front of later pieces.
    Llama,
    /// `InternLM2Tokenizer`: no space in front at all.
    InternLm2,
}

/// One entry of `added_tokens_decoder`.
#[derive(Debug, Clone, Default, Deserialize)]
struct AddedToken {
    content: String,
    #[serde(default)]
    lstrip: bool,
    #[serde(default)]
    rstrip: bool,
}

/// The keys of `tokenizer_config.json` that decide ids.
#[derive(Debug, Default, Deserialize)]
struct TokenizerConfig {
    tokenizer_class: Option<String>,
    legacy: Option<bool>,
    add_bos_token: Option<bool>,
    add_eos_token: Option<bool>,
    #[serde(default)]
    added_tokens_decoder: HashMap<String, AddedToken>,
    #[serde(default)]
    additional_special_tokens: Vec<Value>,
    bos_token: Option<Value>,
    eos_token: Option<Value>,
    unk_token: Option<Value>,
    pad_token: Option<Value>,
    #[serde(default)]
    clean_up_tokenization_spaces: bool,
}

/// A slow tokenizer read from a checkpoint directory.
#[derive(Debug, Clone)]
pub struct SlowTokenizer {
    model: SentencePiece,
    flavor: Flavor,
    added: HashMap<String, (i32, AddedToken)>,
    added_by_id: HashMap<i32, String>,
    /// Contents of the added tokens, longest first.
    longest_first: Vec<String>,
    /// `all_special_tokens` of the original.
    special: HashSet<String>,
    special_ids: HashSet<i32>,
    /// Added tokens that decoding sets apart with spaces.
    apart: HashSet<String>,
    bos_id: Option<i32>,
    eos_id: Option<i32>,
    pad_id: Option<i32>,
    add_bos: bool,
    add_eos: bool,
    unk_token: String,
    unk_token_length: usize,
    clean_up: bool,
    sha256: String,
}

/// A run of text or an added token.
enum Part<'t> {
    Text(&'t str),
    Added(&'t str),
}

impl SlowTokenizer {
    /// Reads `tokenizer.model`, `tokenizer_config.json`, and, where the config lists no added tokens,
    /// `added_tokens.json` and `special_tokens_map.json` of `dir`.
    ///
    /// # Errors
    /// A missing or malformed file, or a tokenizer class other than the two this module follows.
    pub fn load(dir: &Path) -> Result<Self> {
        let config_path = dir.join("tokenizer_config.json");
        let mut config: TokenizerConfig = read_json(&config_path)?;
        let flavor = flavor(&config).map_err(|e| e.at(config_path.display()))?;
        let model = SentencePiece::load(&dir.join("tokenizer.model"))?;
        if config.added_tokens_decoder.is_empty() {
            add_from_older_files(dir, &mut config)?;
        }
        let mut tokenizer = Self::new(model, flavor, config).map_err(|e| e.at(config_path.display()))?;
        tokenizer.sha256 = hash(dir)?;
        Ok(tokenizer)
    }

    fn new(model: SentencePiece, flavor: Flavor, config: TokenizerConfig) -> Result<Self> {
        let model = if flavor == Flavor::Llama { model.with_dummy_prefix(false) } else { model };
        let mut added = HashMap::new();
        for (id, token) in config.added_tokens_decoder {
            let id = id
                .parse::<i32>()
                .map_err(|e| Error::new(Kind::Text, "an added token has no numeric id").found(&id).source(e))?;
            added.insert(token.content.clone(), (id, token));
        }
        let text = |v: &Option<Value>| v.as_ref().and_then(content);
        let (bos, eos, pad) = (text(&config.bos_token), text(&config.eos_token), text(&config.pad_token));
        let unk = text(&config.unk_token).unwrap_or_else(|| "<unk>".into());
        let listed = config.additional_special_tokens.iter().filter_map(content);
        let special: HashSet<String> = listed
            .clone()
            .chain([bos.clone(), eos.clone(), pad.clone(), Some(unk.clone())].into_iter().flatten())
            .collect();
        for token in &special {
            added.entry(token.clone()).or_insert_with(|| {
                (model.piece_to_id(token), AddedToken { content: token.clone(), ..AddedToken::default() })
            });
        }
        let id = |token: &Option<String>| token.as_ref().and_then(|t| added.get(t)).map(|(id, _)| *id);
        let outside: HashSet<String> =
            listed.filter(|t| added.get(t).is_some_and(|(id, _)| *id >= model.len() as i32)).collect();
        let apart = added.keys().filter(|t| !special.contains(*t) || outside.contains(*t)).cloned().collect();
        let mut longest_first: Vec<String> = added.keys().filter(|t| !t.is_empty()).cloned().collect();
        longest_first.sort_by(|a, b| b.len().cmp(&a.len()).then(a.cmp(b)));
        Ok(Self {
            unk_token_length: model.encode(&unk).len(),
            flavor,
            longest_first,
            special_ids: special.iter().filter_map(|t| added.get(t)).map(|(id, _)| *id).collect(),
            added_by_id: added.iter().map(|(text, (id, _))| (*id, text.clone())).collect(),
            apart,
            bos_id: id(&bos),
            eos_id: id(&eos),
            pad_id: id(&pad),
            add_bos: config.add_bos_token.unwrap_or(true),
            add_eos: config.add_eos_token.unwrap_or(false),
            unk_token: unk,
            clean_up: config.clean_up_tokenization_spaces,
            sha256: String::new(),
            special,
            added,
            model,
        })
    }

    /// Id of the beginning-of-sequence token.
    #[must_use]
    pub fn bos_id(&self) -> Option<i32> {
        self.bos_id
    }

    /// Id of the end-of-sequence token.
    #[must_use]
    pub fn eos_id(&self) -> Option<i32> {
        self.eos_id
    }

    /// Id of the padding token.
    #[must_use]
    pub fn pad_id(&self) -> Option<i32> {
        self.pad_id
    }

    /// Number of ids: one more than the largest.
    #[must_use]
    pub fn vocab_size(&self) -> usize {
        let added = self.added_by_id.keys().max().map_or(0, |id| *id as usize + 1);
        self.model.len().max(added)
    }

    /// Id of an added token or a piece; none if there is neither.
    #[must_use]
    pub fn token_to_id(&self, token: &str) -> Option<i32> {
        if let Some((id, _)) = self.added.get(token) {
            return Some(*id);
        }
        let id = self.model.piece_to_id(token);
        (self.model.piece(id) == Some(token)).then_some(id)
    }

    /// Added token or piece of an id.
    #[must_use]
    pub fn id_to_token(&self, id: i32) -> Option<&str> {
        self.added_by_id.get(&id).map(String::as_str).or_else(|| self.model.piece(id))
    }

    /// Hash of the files that the tokenizer was read from.
    #[must_use]
    pub fn sha256(&self) -> &str {
        &self.sha256
    }

    /// Added tokens that stand in a text.
    pub fn added_in<'t>(&self, text: &'t str) -> impl Iterator<Item = &'t str> {
        self.split(text).into_iter().filter_map(|part| match part {
            Part::Added(token) => Some(token),
            Part::Text(_) => None,
        })
    }

    /// Ids of a text; with `special`, the beginning (and end) mark that the config asks for is added.
    #[must_use]
    pub fn encode(&self, text: &str, special: bool) -> Vec<i32> {
        let mut ids = Vec::new();
        if special && self.add_bos {
            ids.extend(self.bos_id);
        }
        match self.flavor {
            Flavor::InternLm2 => self.split_encode(text, &mut ids),
            Flavor::Llama if text.is_empty() => {}
            Flavor::Llama => {
                let start = ids.len();
                let spaced: String =
                    std::iter::once(SPACE).chain(text.chars().map(|c| if c == SPACE { ' ' } else { c })).collect();
                self.split_encode(&spaced, &mut ids);
                let lone_space = ids.get(start).is_some_and(|id| self.model.piece(*id) == Some("\u{2581}"));
                if lone_space && ids.get(start + 1).is_some_and(|id| self.special_ids.contains(id)) {
                    ids.remove(start);
                }
            }
        }
        if special && self.add_eos {
            ids.extend(self.eos_id);
        }
        ids
    }

    fn split_encode(&self, text: &str, ids: &mut Vec<i32>) {
        let parts = self.split(text);
        for (i, part) in parts.iter().enumerate() {
            let text = match part {
                Part::Added(token) => {
                    ids.push(self.added[*token].0);
                    continue;
                }
                Part::Text(text) => *text,
            };
            let strips = |j: Option<usize>, f: fn(&AddedToken) -> bool| match j.and_then(|j| parts.get(j)) {
                Some(Part::Added(token)) => f(&self.added[*token].1),
                _ => false,
            };
            let text = if strips(i.checked_sub(1), |t| t.rstrip) { text.trim_start_matches(is_space) } else { text };
            let text = if strips(Some(i + 1), |t| t.lstrip) { text.trim_end_matches(is_space) } else { text };
            self.encode_text(text, ids);
        }
    }

    /// Cuts at added tokens, leftmost first, longest first.
    fn split<'t>(&self, text: &'t str) -> Vec<Part<'t>> {
        let (mut parts, mut start, mut at) = (Vec::new(), 0, 0);
        while let Some(c) = text[at..].chars().next() {
            match self.longest_first.iter().find(|t| text[at..].starts_with(t.as_str())) {
                Some(token) => {
                    if start < at {
                        parts.push(Part::Text(&text[start..at]));
                    }
                    parts.push(Part::Added(&text[at..at + token.len()]));
                    at += token.len();
                    start = at;
                }
                None => at += c.len_utf8(),
            }
        }
        if start < text.len() {
            parts.push(Part::Text(&text[start..]));
        }
        parts
    }

    fn encode_text(&self, text: &str, ids: &mut Vec<i32>) {
        if self.flavor == Flavor::Llama && text.starts_with([SPACE, ' ']) {
            // Leading spaces survive only behind something else; the original puts the unknown token there.
            let found = self.model.encode(&format!("{}{text}", self.unk_token));
            ids.extend(found.get(self.unk_token_length..).unwrap_or(&found));
        } else {
            ids.extend(self.model.encode(text));
        }
    }

    /// Text of ids; unknown ids are left out.
    #[must_use]
    pub fn decode(&self, ids: &[i32], skip_special: bool) -> String {
        let (mut texts, mut current): (Vec<String>, Vec<&str>) = (Vec::new(), Vec::new());
        for id in ids {
            if skip_special && self.special_ids.contains(id) {
                continue;
            }
            let Some(token) = self.id_to_token(*id) else { continue };
            if !self.apart.contains(token) {
                current.push(token);
                continue;
            }
            if !current.is_empty() {
                let text = self.join(&std::mem::take(&mut current));
                texts.extend((!text.is_empty()).then_some(text));
            }
            texts.push(token.to_string());
        }
        if !current.is_empty() {
            texts.push(self.join(&current));
        }
        let text = texts.join(" ");
        if self.clean_up { clean_up(&text) } else { text }
    }

    /// Pieces and special tokens as text: `convert_tokens_to_string`.
    fn join(&self, tokens: &[&str]) -> String {
        let (mut out, mut current, mut after_special) = (String::new(), Vec::new(), false);
        for (i, token) in tokens.iter().enumerate() {
            let strip = i == 0 && self.flavor == Flavor::Llama;
            let token = if strip { token.strip_prefix(SPACE).unwrap_or(token) } else { token };
            if !self.special.contains(token) {
                current.push(token);
                after_special = false;
                continue;
            }
            if self.flavor == Flavor::InternLm2 && !after_special {
                out.push(' ');
            }
            out.push_str(&self.model.decode_pieces(&std::mem::take(&mut current)));
            out.push_str(token);
            after_special = true;
        }
        out.push_str(&self.model.decode_pieces(&current));
        if self.flavor == Flavor::InternLm2 { clean_up(&out) } else { out }
    }
}

/// Of the files that decide ids, as far as they are there.
fn hash(dir: &Path) -> Result<String> {
    let mut hash = Sha256::new();
    for name in ["tokenizer.model", "tokenizer_config.json", "added_tokens.json", "special_tokens_map.json"] {
        let path = dir.join(name);
        if path.is_file() {
            let bytes = std::fs::read(&path).map_err(|e| Error::io(&path, e))?;
            hash.update(name);
            hash.update((bytes.len() as u64).to_le_bytes());
            hash.update(&bytes);
        }
    }
    Ok(hash.finalize().iter().map(|b| format!("{b:02x}")).collect())
}

fn flavor(config: &TokenizerConfig) -> Result<Flavor> {
    match config.tokenizer_class.as_deref() {
        Some("InternLM2Tokenizer") => Ok(Flavor::InternLm2),
        Some("LlamaTokenizer") if config.legacy == Some(false) => Ok(Flavor::Llama),
        class => Err(Error::new(Kind::Text, "unsupported slow tokenizer")
            .expected("LlamaTokenizer with legacy false, or InternLM2Tokenizer")
            .found(format!("{} with legacy {:?}", class.unwrap_or("no class"), config.legacy))),
    }
}

fn add_from_older_files(dir: &Path, config: &mut TokenizerConfig) -> Result<()> {
    let path = dir.join("added_tokens.json");
    if path.is_file() {
        let tokens: HashMap<String, i64> = read_json(&path)?;
        for (content, id) in tokens {
            config.added_tokens_decoder.insert(id.to_string(), AddedToken { content, ..AddedToken::default() });
        }
    }
    let path = dir.join("special_tokens_map.json");
    if path.is_file() {
        let map: TokenizerConfig = read_json(&path)?;
        for (to, from) in [
            (&mut config.bos_token, map.bos_token),
            (&mut config.eos_token, map.eos_token),
            (&mut config.unk_token, map.unk_token),
            (&mut config.pad_token, map.pad_token),
        ] {
            *to = to.take().or(from);
        }
        if config.additional_special_tokens.is_empty() {
            config.additional_special_tokens = map.additional_special_tokens;
        }
    }
    Ok(())
}

fn read_json<T: serde::de::DeserializeOwned>(path: &Path) -> Result<T> {
    let text = std::fs::read_to_string(path).map_err(|e| Error::io(path, e))?;
    serde_json::from_str(&text)
        .map_err(|e| Error::new(Kind::Text, "a tokenizer file is not what it should be").at(path.display()).source(e))
}

fn content(value: &Value) -> Option<String> {
    value.as_str().or_else(|| value.get("content")?.as_str()).map(str::to_string)
}

/// Python's `str.isspace` for one character, which knows four separators that Unicode's white space does not.
pub(crate) fn is_space(c: char) -> bool {
    c.is_whitespace() || matches!(c, '\u{1c}'..='\u{1f}')
}

/// `clean_up_tokenization` of the original.
fn clean_up(text: &str) -> String {
    let rules = [
        (" .", "."),
        (" ?", "?"),
        (" !", "!"),
        (" ,", ","),
        (" ' ", "'"),
        (" n't", "n't"),
        (" 'm", "'m"),
        (" 's", "'s"),
        (" 've", "'ve"),
        (" 're", "'re"),
    ];
    rules.iter().fold(text.to_string(), |text, (from, to)| text.replace(from, to))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::text::sentencepiece::{kind, proto};

    fn tokenizer(flavor: Flavor, config: Value) -> SlowTokenizer {
        let piece = |text: String, kind: i32| proto::Piece { piece: Some(text), score: Some(0.0), r#type: Some(kind) };
        let mut pieces = vec![
            piece("<unk>".into(), kind::UNKNOWN),
            piece("<s>".into(), kind::CONTROL),
            piece("</s>".into(), kind::CONTROL),
        ];
        pieces.extend((0..256).map(|b| piece(format!("<0x{b:02X}>"), kind::BYTE)));
        pieces.extend(["\u{2581}", "a", "b", "\u{2581}a"].map(|t| piece(t.into(), kind::NORMAL)));
        let model = SentencePiece::from_proto(&proto::ModelProto {
            pieces,
            trainer_spec: Some(proto::TrainerSpec {
                model_type: Some(2),
                byte_fallback: Some(true),
                ..Default::default()
            }),
            normalizer_spec: Some(proto::NormalizerSpec {
                add_dummy_prefix: Some(flavor == Flavor::Llama),
                remove_extra_whitespaces: Some(false),
                ..Default::default()
            }),
        })
        .unwrap();
        SlowTokenizer::new(model, flavor, serde_json::from_value(config).unwrap()).unwrap()
    }

    fn config() -> Value {
        serde_json::json!({
            "added_tokens_decoder": {
                "1": {"content": "<s>"},
                "263": {"content": "<|r|>", "rstrip": true},
                "264": {"content": "<i>"},
                "265": {"content": "<i>x"},
            },
            "additional_special_tokens": ["<i>"],
            "bos_token": "<s>",
        })
    }

    #[test]
    fn llama_puts_one_space_in_front_and_drops_it_before_a_special_token() {
        let t = tokenizer(Flavor::Llama, config());
        assert_eq!(t.encode("ab", true), [1, 262, 261]);
        assert_eq!(t.encode("<i>a", false), [264, 260], "the lone space in front of a special token goes");
        assert_eq!(t.encode("<|r|> \n a", false), [259, 263, 260], "the role token is not special, and swallows space");
        assert_eq!(t.encode("<i> a", false), [264, 262], "a later piece keeps its own space");
        assert_eq!(t.encode("a<i>xb", false), [262, 265, 261], "the longest added token wins");
        assert!(t.encode("", false).is_empty());
    }

    #[test]
    fn llama_decoding_sets_added_tokens_apart() {
        let t = tokenizer(Flavor::Llama, config());
        assert_eq!(t.decode(&[1, 262, 263, 261], false), "<s> a <|r|> b");
        assert_eq!(t.decode(&[1, 262, 263, 264], true), "a <|r|>");
    }

    #[test]
    fn internlm2_adds_no_space_and_spaces_out_special_tokens_when_decoding() {
        let t = tokenizer(Flavor::InternLm2, config());
        assert_eq!(t.encode("a b", true)[..3], [1, 260, 259]);
        assert_eq!(t.decode(&[1, 260], false), " <s>a");
        assert_eq!(t.decode(&[1, 260, 264], true), "a");
    }

    #[test]
    fn ids_and_tokens_convert_both_ways() {
        let t = tokenizer(Flavor::Llama, config());
        assert_eq!(t.token_to_id("<i>"), Some(264));
        assert_eq!(t.token_to_id("nowhere"), None);
        assert_eq!(t.id_to_token(260), Some("a"));
        assert_eq!((t.vocab_size(), t.bos_id(), t.pad_id()), (266, Some(1), None));
    }

    #[test]
    fn another_class_is_refused() {
        let config: TokenizerConfig = serde_json::from_str(r#"{"tokenizer_class": "GPT2Tokenizer"}"#).unwrap();
        assert!(flavor(&config).unwrap_err().to_string().contains("GPT2Tokenizer"));
    }
}
