//! Qwen-VL's tokenizer: a tiktoken vocabulary with ChatML, grounding and image tokens.
//!
//! Reference: `tokenization_qwen.py` of Qwen/Qwen-VL-Chat. The text between `<img>` and `</img>` is not tokenised: its
//! UTF-8 bytes are written as ids equal to the byte values, filled up with `<imgpad>`.

use std::path::Path;

use super::tiktoken::{AllowedSpecial, InvalidUtf8, Tiktoken, utf8};
use crate::error::{Error, Kind, Result};

/// Ids between `<img>` and `</img>`, one for each feature of an image.
pub const IMAGE_SPAN: usize = 256;

/// Longest image path in bytes that the model accepts; one pad must remain, and the original reads one byte less.
pub const LONGEST_PATH: usize = 254;

const ENDOFTEXT: &str = "<|endoftext|>";
/// Special tokens behind the ranks.
pub const SPECIALS: usize = 3 + EXTRAS + VISION.len();

/// Special tokens in front of `<img>`.
pub const IMAGE_START: usize = 3 + EXTRAS + 6;

const EXTRAS: usize = 205;
const VISION: [&str; 9] = ["<ref>", "</ref>", "<box>", "</box>", "<quad>", "</quad>", "<img>", "</img>", "<imgpad>"];

/// The special strings that count inside a chat, where ChatML markers typed by a user stay text.
pub const CHAT_SPECIALS: AllowedSpecial<'static> = AllowedSpecial::Only(&VISION);

/// How [`QwenTokenizer::decode`] treats special tokens and broken text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DecodeOptions {
    /// Leave special tokens out.
    pub skip_special_tokens: bool,
    /// With `skip_special_tokens`, keep the ref, box and quad tags all the same.
    pub keep_grounding: bool,
    /// What becomes of bytes that are not UTF-8.
    pub invalid: InvalidUtf8,
}

impl Default for DecodeOptions {
    fn default() -> Self {
        Self { skip_special_tokens: false, keep_grounding: false, invalid: InvalidUtf8::Replace }
    }
}

/// The tokenizer of the Qwen-VL family.
#[derive(Debug)]
pub struct QwenTokenizer {
    vocabulary: Tiktoken,
    image_span: usize,
    /// `<|endoftext|>`: end of text and padding.
    pub eod: i32,
    /// `<|im_start|>`.
    pub im_start: i32,
    /// `<|im_end|>`.
    pub im_end: i32,
    /// `<img>`.
    pub img_start: i32,
    /// `</img>`.
    pub img_end: i32,
    /// `<imgpad>`.
    pub img_pad: i32,
}

/// A part of a text with image or grounding tags.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Element {
    /// Text without tags.
    Text(String),
    /// Path or address of an image.
    Image(String),
    /// Phrase that a box grounds.
    Ref(String),
    /// Inside of a box tag, as written.
    Box(String),
    /// Inside of a quadrilateral tag, as written.
    Quad(String),
}

impl QwenTokenizer {
    /// Reads `qwen.tiktoken`.
    ///
    /// # Errors
    /// A file that is no tiktoken vocabulary.
    pub fn from_file(path: &Path) -> Result<Self> {
        Tiktoken::from_file(path, specials()).map(Self::new)
    }

    /// Parses the text of a `qwen.tiktoken` file.
    ///
    /// # Errors
    /// As [`Tiktoken::parse`].
    pub fn parse(text: &str) -> Result<Self> {
        Tiktoken::parse(text, specials()).map(Self::new)
    }

    fn new(vocabulary: Tiktoken) -> Self {
        // The names come from `specials`, so they are all present.
        let id = |text| vocabulary.special(text).map_or(-1, |id| id as i32);
        Self {
            eod: id(ENDOFTEXT),
            im_start: id("<|im_start|>"),
            im_end: id("<|im_end|>"),
            img_start: id("<img>"),
            img_end: id("</img>"),
            img_pad: id("<imgpad>"),
            vocabulary,
            image_span: IMAGE_SPAN,
        }
    }

    /// The same tokenizer for a model with another number of features an image.
    #[must_use]
    pub fn with_image_span(mut self, image_span: usize) -> Self {
        self.image_span = image_span;
        self
    }

    /// Number of ids, specials included.
    #[must_use]
    pub fn vocab_size(&self) -> usize {
        self.vocabulary.len()
    }

    /// Id of a special string.
    #[must_use]
    pub fn special(&self, text: &str) -> Option<i32> {
        self.vocabulary.special(text).map(|id| id as i32)
    }

    /// Ids of `text`, images written as bytes.
    ///
    /// # Errors
    /// An `<img>` without `</img>`, another special token between them, or more bytes than an image has features.
    pub fn encode(&self, text: &str, allowed: AllowedSpecial<'_>) -> Result<Vec<i32>> {
        let ids: Vec<i32> = self.vocabulary.encode(text, allowed).into_iter().map(|id| id as i32).collect();
        self.replace_images(&ids, |inner| self.image_bytes(inner))
    }

    /// Text of `ids`; inverse of [`QwenTokenizer::encode`] up to normalisation.
    ///
    /// # Errors
    /// An id beyond the vocabulary, an `<img>` without `</img>` or without a pad, an image text that is not UTF-8, or
    /// other text that is not under [`InvalidUtf8::Strict`].
    pub fn decode(&self, ids: &[i32], options: DecodeOptions) -> Result<String> {
        let ids = self.replace_images(ids, |inner| {
            let text = self.image_text(inner)?;
            Ok(self.vocabulary.encode(&text, AllowedSpecial::None).into_iter().map(|id| id as i32).collect())
        })?;
        let grounding = self.special("<ref>").unwrap_or(self.img_start)..self.img_start;
        let kept = |id: &i32| {
            !options.skip_special_tokens || *id < self.eod || (options.keep_grounding && grounding.contains(id))
        };
        let ids = ids.iter().filter(|id| kept(id)).map(|id| checked(*id)).collect::<Result<Vec<_>>>()?;
        self.vocabulary.decode(&ids, options.invalid)
    }

    /// Text of one id, special tokens kept, broken bytes replaced; empty beyond the vocabulary.
    #[must_use]
    pub fn piece(&self, id: i32) -> String {
        let bytes = u32::try_from(id).ok().and_then(|id| self.vocabulary.bytes(id)).unwrap_or_default();
        String::from_utf8_lossy(bytes).into_owned()
    }

    /// Text of generated ids, special tokens left out; where the tokens make no text (an image tag that is never
    /// closed, a padding row of the vocabulary), the offending tokens are left out too.
    #[must_use]
    pub fn decode_lossy(&self, ids: &[i32]) -> String {
        let options = DecodeOptions { skip_special_tokens: true, keep_grounding: true, ..DecodeOptions::default() };
        self.decode(ids, options).unwrap_or_else(|_| {
            let known: Vec<u32> = ids
                .iter()
                .filter(|id| **id < self.img_start && (**id < self.eod || **id > self.im_end))
                .filter_map(|id| u32::try_from(*id).ok())
                .collect();
            self.vocabulary.decode(&known, InvalidUtf8::Replace).unwrap_or_default()
        })
    }

    /// Splits a text of the model at its image and grounding tags.
    ///
    /// # Errors
    /// A tag that is never closed, or another special string of the vocabulary in the text.
    pub fn elements(&self, text: &str) -> Result<Vec<Element>> {
        let text = super::tiktoken::nfc(text);
        if let Some(found) =
            specials().iter().find(|s| *s != ENDOFTEXT && !VISION.contains(&s.as_str()) && text.contains(s.as_str()))
        {
            return Err(Error::new(Kind::Text, "a special token inside plain text").found(found));
        }
        tags(&text)
    }

    /// Applies `replace` to what stands between each `<img>` and the next `</img>`.
    fn replace_images(&self, ids: &[i32], replace: impl Fn(&[i32]) -> Result<Vec<i32>>) -> Result<Vec<i32>> {
        let mut out = Vec::with_capacity(ids.len());
        let mut rest = ids;
        while let Some(start) = rest.iter().position(|id| *id == self.img_start) {
            let length =
                rest[start + 1..].iter().position(|id| *id == self.img_end).ok_or_else(|| unclosed("<img>"))?;
            let inner = &rest[start + 1..start + 1 + length];
            out.extend_from_slice(&rest[..=start]);
            out.extend(replace(inner)?);
            out.push(self.img_end);
            rest = &rest[start + length + 2..];
        }
        out.extend_from_slice(rest);
        Ok(out)
    }

    fn image_bytes(&self, inner: &[i32]) -> Result<Vec<i32>> {
        let mut out = Vec::with_capacity(self.image_span);
        for id in inner {
            if *id >= self.eod {
                return Err(Error::new(Kind::Text, "a special token inside an image tag").found(self.piece(*id)));
            }
            let bytes = self.vocabulary.bytes(*id as u32).unwrap_or_default();
            out.extend(bytes.iter().map(|b| i32::from(*b)));
        }
        if out.len() > self.image_span {
            return Err(Error::new(Kind::Text, "the text of an image tag is too long")
                .expected(format!("at most {} bytes", self.image_span))
                .found(format!("{} bytes", out.len()))
                .help("use a shorter path, for example a relative one"));
        }
        out.resize(self.image_span, self.img_pad);
        Ok(out)
    }

    /// Path that an image span holds: its bytes up to the first pad.
    ///
    /// # Errors
    /// No pad, an id that is no byte, or bytes that are not UTF-8.
    pub fn image_text(&self, inner: &[i32]) -> Result<String> {
        let end = inner.iter().position(|id| *id == self.img_pad).ok_or_else(|| {
            Error::new(Kind::Text, "an image span has no padding").expected("at least one <imgpad> before </img>")
        })?;
        let byte = |id: &i32| {
            u8::try_from(*id).map_err(|_| {
                Error::new(Kind::Text, "an image span holds an id that is no byte").expected("0..=255").found(id)
            })
        };
        utf8(inner[..end].iter().map(byte).collect::<Result<_>>()?, InvalidUtf8::Strict)
    }
}

fn specials() -> Vec<String> {
    let chat = [ENDOFTEXT, "<|im_start|>", "<|im_end|>"].into_iter().map(String::from);
    let extras = (0..EXTRAS).map(|i| format!("<|extra_{i}|>"));
    chat.chain(extras).chain(VISION.into_iter().map(String::from)).collect()
}

fn checked(id: i32) -> Result<u32> {
    u32::try_from(id).map_err(|_| Error::new(Kind::Text, "no such token").at(format!("id {id}")))
}

fn unclosed(tag: &str) -> Error {
    Error::new(Kind::Text, "a tag is never closed").found(tag)
}

struct Tag {
    open: &'static str,
    close: &'static str,
    element: fn(String) -> Element,
}

const TAGS: [Tag; 4] = [
    Tag { open: "<img>", close: "</img>", element: Element::Image },
    Tag { open: "<ref>", close: "</ref>", element: Element::Ref },
    Tag { open: "<box>", close: "</box>", element: Element::Box },
    Tag { open: "<quad>", close: "</quad>", element: Element::Quad },
];

fn first_tag(text: &str) -> Option<(usize, &'static Tag)> {
    TAGS.iter().filter_map(|tag| Some((text.find(tag.open)?, tag))).min_by_key(|(at, _)| *at)
}

/// Splits `text` at its image and grounding tags; everything else is text.
///
/// # Errors
/// A tag that is never closed.
pub fn tags(text: &str) -> Result<Vec<Element>> {
    let mut elements = Vec::new();
    let mut rest = text;
    while let Some((at, tag)) = first_tag(rest) {
        let inner = at + tag.open.len();
        let length = rest[inner..].find(tag.close).ok_or_else(|| unclosed(tag.open))?;
        if at > 0 {
            elements.push(Element::Text(rest[..at].into()));
        }
        elements.push((tag.element)(rest[inner..inner + length].into()));
        rest = &rest[inner + length + tag.close.len()..];
    }
    if !rest.is_empty() {
        elements.push(Element::Text(rest.into()));
    }
    Ok(elements)
}

/// Image with its number in a conversation, counted from 1, as it is written before the text it belongs to.
#[must_use]
pub fn picture(number: usize, path: &str) -> String {
    format!("Picture {number}: <img>{path}</img>\n")
}

#[cfg(test)]
pub(crate) mod tests {
    use base64::Engine as _;

    use super::*;

    /// A vocabulary of the 256 bytes in order 33.., 0..33, so that ids are not byte values.
    pub(crate) fn bytes_only() -> QwenTokenizer {
        let lines: String = (0..256u32)
            .map(|rank| {
                let piece = [((rank + 33) % 256) as u8];
                format!("{} {rank}\n", base64::engine::general_purpose::STANDARD.encode(piece))
            })
            .collect();
        QwenTokenizer::parse(&lines).unwrap()
    }

    #[test]
    fn an_image_is_written_as_byte_values_and_read_back() {
        let t = bytes_only();
        let text = "<img>x/é.png</img>!";
        let ids = t.encode(text, AllowedSpecial::All).unwrap();
        assert_eq!(ids.len(), IMAGE_SPAN + 3);
        assert_eq!(ids[..4], [t.img_start, i32::from(b'x'), i32::from(b'/'), 0xc3]);
        assert_eq!(ids[IMAGE_SPAN..], [t.img_pad, t.img_end, 0]);
        assert_eq!(t.decode(&ids, DecodeOptions::default()).unwrap(), text);
    }

    #[test]
    fn image_tags_are_checked() {
        let t = bytes_only();
        let error = |text: &str| t.encode(text, AllowedSpecial::All).unwrap_err().to_string();
        assert!(error("<img>x").contains("never closed"));
        assert!(error("<img>a<ref>b</img>").contains("special token inside"));
        assert!(error(&format!("<img>{}</img>", "x".repeat(257))).contains("257 bytes"));
        assert!(t.encode(&format!("<img>{}</img>", "x".repeat(256)), AllowedSpecial::All).is_ok());
        let full = [vec![t.img_start], vec![97; 256], vec![t.img_end]].concat();
        assert!(t.decode(&full, DecodeOptions::default()).unwrap_err().to_string().contains("no padding"));
    }

    #[test]
    fn generated_nonsense_still_gives_text() {
        let t = bytes_only();
        let a = t.encode("a", AllowedSpecial::None).unwrap()[0];
        assert_eq!(t.decode_lossy(&[a, t.img_start, a, 5000]), "aa");
        let tagged = t.encode("<box>a</box>", AllowedSpecial::All).unwrap();
        assert_eq!(t.decode_lossy(&[tagged, vec![t.im_end, t.eod]].concat()), "<box>a</box>");
    }

    #[test]
    fn tags_split_a_text() {
        let t = bytes_only();
        let elements = t.elements("a<ref>b</ref><box>(1,2),(3,4)</box>").unwrap();
        let expected = [Element::Text("a".into()), Element::Ref("b".into()), Element::Box("(1,2),(3,4)".into())];
        assert_eq!(elements, expected);
        assert!(t.elements("<ref>b").is_err());
        assert!(t.elements("<|im_start|>").is_err());
    }
}
