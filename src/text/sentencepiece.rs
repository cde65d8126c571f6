//! Sentencepiece BPE models (`tokenizer.model`): encoding and decoding exactly as the C++ library does it.
//!
//! Only what the supported models use: model type BPE, the identity normaliser, byte fallback, user-defined and unused
//! pieces. Anything else is refused when the file is read, so that no text is silently split otherwise.

use std::{
    cmp::Ordering,
    collections::{BinaryHeap, HashMap},
    path::Path,
};

use prost::Message as _;

use crate::error::{Error, Kind, Result};

/// U+2581, which stands for a space inside pieces.
pub const SPACE: char = '\u{2581}';

/// The protobuf messages of `tokenizer.model`, reduced to the fields that matter here.
pub mod proto {
    /// Whole model.
    #[derive(Clone, PartialEq, prost::Message)]
    pub struct ModelProto {
        /// Vocabulary in id order.
        #[prost(message, repeated, tag = "1")]
        pub pieces: Vec<Piece>,
        /// How it was trained; holds the model type and byte fallback.
        #[prost(message, optional, tag = "2")]
        pub trainer_spec: Option<TrainerSpec>,
        /// What happens to text first.
        #[prost(message, optional, tag = "3")]
        pub normalizer_spec: Option<NormalizerSpec>,
    }

    /// One vocabulary entry.
    #[derive(Clone, PartialEq, prost::Message)]
    pub struct Piece {
        /// Text, spaces written as U+2581.
        #[prost(string, optional, tag = "1")]
        pub piece: Option<String>,
        /// Merge priority, larger first.
        #[prost(float, optional, tag = "2")]
        pub score: Option<f32>,
        /// One of the constants of [`super::kind`].
        #[prost(int32, optional, tag = "3", default = "1")]
        pub r#type: Option<i32>,
    }

    /// Training options that encoding depends on.
    #[derive(Clone, PartialEq, prost::Message)]
    pub struct TrainerSpec {
        /// 2 is BPE.
        #[prost(int32, optional, tag = "3", default = "1")]
        pub model_type: Option<i32>,
        /// Number of pieces.
        #[prost(int32, optional, tag = "4", default = "8000")]
        pub vocab_size: Option<i32>,
        /// Puts the space at the end of a word instead of its front.
        #[prost(bool, optional, tag = "24")]
        pub treat_whitespace_as_suffix: Option<bool>,
        /// Unknown characters become their UTF-8 bytes.
        #[prost(bool, optional, tag = "35")]
        pub byte_fallback: Option<bool>,
        /// Id of the unknown piece.
        #[prost(int32, optional, tag = "40", default = "0")]
        pub unk_id: Option<i32>,
        /// Id of the beginning-of-sequence piece.
        #[prost(int32, optional, tag = "41", default = "1")]
        pub bos_id: Option<i32>,
        /// Id of the end-of-sequence piece.
        #[prost(int32, optional, tag = "42", default = "2")]
        pub eos_id: Option<i32>,
        /// Id of the padding piece, -1 for none.
        #[prost(int32, optional, tag = "43", default = "-1")]
        pub pad_id: Option<i32>,
    }

    /// Normalisation options.
    #[derive(Clone, PartialEq, prost::Message)]
    pub struct NormalizerSpec {
        /// `identity` for all supported models.
        #[prost(string, optional, tag = "1")]
        pub name: Option<String>,
        /// Compiled replacement table; empty for `identity`.
        #[prost(bytes = "vec", optional, tag = "2")]
        pub precompiled_charsmap: Option<Vec<u8>>,
        /// Puts a space in front of the text.
        #[prost(bool, optional, tag = "3", default = "true")]
        pub add_dummy_prefix: Option<bool>,
        /// Trims, and joins runs of spaces.
        #[prost(bool, optional, tag = "4", default = "true")]
        pub remove_extra_whitespaces: Option<bool>,
        /// Writes spaces as U+2581.
        #[prost(bool, optional, tag = "5", default = "true")]
        pub escape_whitespaces: Option<bool>,
    }
}

/// Values of [`proto::Piece`]'s `type`.
pub mod kind {
    /// Ordinary piece.
    pub const NORMAL: i32 = 1;
    /// Stands for what the vocabulary cannot express.
    pub const UNKNOWN: i32 = 2;
    /// Never produced from text, decoded to nothing.
    pub const CONTROL: i32 = 3;
    /// Matched before any merge.
    pub const USER_DEFINED: i32 = 4;
    /// May appear between merges, never in the result.
    pub const UNUSED: i32 = 5;
    /// One byte, `<0x0A>`.
    pub const BYTE: i32 = 6;
}

#[derive(Clone)]
struct Piece {
    text: String,
    score: f32,
    kind: i32,
}

/// A sentencepiece BPE model in memory.
#[derive(Clone)]
pub struct SentencePiece {
    pieces: Vec<Piece>,
    /// Pieces that text can turn into.
    normal: HashMap<String, i32>,
    /// Control, unknown and byte pieces.
    reserved: HashMap<String, i32>,
    /// User-defined pieces, longest first.
    user_defined: Vec<String>,
    bytes: Option<[i32; 256]>,
    unk_id: i32,
    bos_id: i32,
    eos_id: i32,
    add_dummy_prefix: bool,
    remove_extra_whitespaces: bool,
}

impl std::fmt::Debug for SentencePiece {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "SentencePiece({} pieces)", self.pieces.len())
    }
}

impl SentencePiece {
    /// Reads `tokenizer.model`.
    ///
    /// # Errors
    /// An unreadable file, or as [`SentencePiece::from_bytes`].
    pub fn load(path: &Path) -> Result<Self> {
        let bytes = std::fs::read(path).map_err(|e| Error::io(path, e))?;
        Self::from_bytes(&bytes).map_err(|e| e.at(path.display()))
    }

    /// Reads the bytes of a `tokenizer.model`.
    ///
    /// # Errors
    /// Not a sentencepiece protobuf, a model type other than BPE, a normaliser other than identity, or byte fallback
    /// without the 256 byte pieces.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self> {
        let model = proto::ModelProto::decode(bytes).map_err(|e| {
            Error::new(Kind::Text, "not a sentencepiece model").source(e).help("give a tokenizer.model")
        })?;
        Self::from_proto(&model)
    }

    /// Builds the model from its protobuf message.
    ///
    /// # Errors
    /// As [`SentencePiece::from_bytes`].
    pub fn from_proto(model: &proto::ModelProto) -> Result<Self> {
        let trainer = model.trainer_spec.clone().unwrap_or_default();
        let normalizer = model.normalizer_spec.clone().unwrap_or_default();
        check_supported(model, &trainer, &normalizer)?;
        let (mut normal, mut reserved, mut user_defined) = (HashMap::new(), HashMap::new(), Vec::new());
        let mut pieces = Vec::with_capacity(model.pieces.len());
        for (id, p) in model.pieces.iter().enumerate() {
            let (text, kind) = (p.piece().to_string(), p.r#type());
            let table = match kind {
                kind::NORMAL | kind::USER_DEFINED | kind::UNUSED => &mut normal,
                _ => &mut reserved,
            };
            table.entry(text.clone()).or_insert(id as i32);
            if kind == kind::USER_DEFINED {
                user_defined.push(text.clone());
            }
            pieces.push(Piece { text, score: p.score(), kind });
        }
        user_defined.sort_by_key(|t| std::cmp::Reverse(t.len()));
        let unk_id = pieces.iter().position(|p| p.kind == kind::UNKNOWN).map_or(0, |i| i as i32);
        let bytes = if trainer.byte_fallback() { Some(byte_ids(&reserved)?) } else { None };
        Ok(Self {
            pieces,
            normal,
            reserved,
            user_defined,
            bytes,
            unk_id,
            bos_id: trainer.bos_id(),
            eos_id: trainer.eos_id(),
            add_dummy_prefix: normalizer.add_dummy_prefix(),
            remove_extra_whitespaces: normalizer.remove_extra_whitespaces(),
        })
    }

    /// The same model with the space in front of a text turned on or off.
    #[must_use]
    pub fn with_dummy_prefix(mut self, add: bool) -> Self {
        self.add_dummy_prefix = add;
        self
    }

    /// Number of pieces.
    #[must_use]
    pub fn len(&self) -> usize {
        self.pieces.len()
    }

    /// Whether there is no piece at all.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.pieces.is_empty()
    }

    /// Id of `<unk>`.
    #[must_use]
    pub fn unk_id(&self) -> i32 {
        self.unk_id
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

    /// Text of a piece; none outside the vocabulary.
    #[must_use]
    pub fn piece(&self, id: i32) -> Option<&str> {
        self.get(id).map(|p| p.text.as_str())
    }

    /// Whether `id` is a control piece such as `<s>`.
    #[must_use]
    pub fn is_control(&self, id: i32) -> bool {
        self.get(id).is_some_and(|p| p.kind == kind::CONTROL)
    }

    /// Id of a piece; the unknown id if there is no such piece.
    #[must_use]
    pub fn piece_to_id(&self, piece: &str) -> i32 {
        self.reserved.get(piece).or_else(|| self.normal.get(piece)).copied().unwrap_or(self.unk_id)
    }

    fn get(&self, id: i32) -> Option<&Piece> {
        usize::try_from(id).ok().and_then(|i| self.pieces.get(i))
    }

    fn kind(&self, id: i32) -> i32 {
        self.get(id).map_or(kind::UNKNOWN, |p| p.kind)
    }

    /// Ids of `text`, without begin and end marks.
    #[must_use]
    pub fn encode(&self, text: &str) -> Vec<i32> {
        let text = self.normalize(text);
        let mut ids = Vec::new();
        for (piece, id) in self.segment(&text) {
            if id != self.unk_id {
                ids.push(id);
            } else if let Some(bytes) = &self.bytes {
                ids.extend(piece.bytes().map(|b| bytes[usize::from(b)]));
            } else if ids.last() != Some(&self.unk_id) {
                ids.push(self.unk_id);
            }
        }
        ids
    }

    fn normalize(&self, text: &str) -> String {
        let mut out = String::with_capacity(text.len() + 8);
        if self.remove_extra_whitespaces {
            let words: Vec<&str> = text.split(' ').filter(|w| !w.is_empty()).collect();
            out.push_str(&words.join("\u{2581}"));
        } else {
            out.extend(text.chars().map(|c| if c == ' ' { SPACE } else { c }));
        }
        if self.add_dummy_prefix && !out.is_empty() {
            out.insert(0, SPACE);
        }
        out
    }

    /// Merges the best pair, then the leftmost, until none is in the vocabulary.
    fn segment<'t>(&self, text: &'t str) -> Vec<(&'t str, i32)> {
        let mut merger = Merger::new(self, text);
        merger.run();
        let mut out = Vec::new();
        let mut index = merger.symbols.first().map(|_| 0);
        while let Some(i) = index {
            let s = &merger.symbols[i];
            merger.resegment(s.start, s.end, &mut out);
            index = s.next;
        }
        out
    }

    /// Text of pieces. Byte pieces are joined to characters, an invalid byte becomes U+FFFD, control pieces vanish, and
    /// what is no piece stays as it is.
    #[must_use]
    pub fn decode_pieces<S: AsRef<str>>(&self, pieces: &[S]) -> String {
        let mut out = String::new();
        let (mut bytes, mut at_start, mut space_seen) = (Vec::new(), true, false);
        for piece in pieces {
            let piece = piece.as_ref();
            let id = self.piece_to_id(piece);
            if self.kind(id) == kind::BYTE {
                bytes.extend(byte_of(piece));
                continue;
            }
            flush_bytes(&mut bytes, &mut out);
            at_start &= !space_seen && out.is_empty();
            let (text, space) = self.surface(piece, id, at_start);
            space_seen = space;
            out.push_str(&text);
        }
        flush_bytes(&mut bytes, &mut out);
        out
    }

    /// Text of ids; see [`SentencePiece::decode_pieces`].
    #[must_use]
    pub fn decode(&self, ids: &[i32]) -> String {
        let pieces: Vec<&str> = ids.iter().filter_map(|id| self.piece(*id)).collect();
        self.decode_pieces(&pieces)
    }

    fn surface(&self, piece: &str, id: i32, at_start: bool) -> (String, bool) {
        match self.kind(id) {
            kind::CONTROL => return (String::new(), false),
            kind::UNKNOWN if self.piece(id) == Some(piece) => return (" \u{2047} ".into(), false),
            kind::UNKNOWN => return (piece.into(), false),
            _ => {}
        }
        let strips = at_start && (self.add_dummy_prefix || self.remove_extra_whitespaces);
        match piece.strip_prefix(SPACE) {
            Some(rest) if strips => (rest.replace(SPACE, " "), !self.remove_extra_whitespaces),
            _ => (piece.replace(SPACE, " "), false),
        }
    }
}

fn check_supported(
    model: &proto::ModelProto,
    trainer: &proto::TrainerSpec,
    normalizer: &proto::NormalizerSpec,
) -> Result<()> {
    if model.pieces.is_empty() {
        return Err(Error::new(Kind::Text, "a sentencepiece model without pieces").help("give a whole tokenizer.model"));
    }
    if trainer.model_type() != 2 {
        return Err(Error::new(Kind::Text, "unsupported sentencepiece model type")
            .expected("2 (BPE)")
            .found(trainer.model_type()));
    }
    if !normalizer.precompiled_charsmap().is_empty() {
        return Err(Error::new(Kind::Text, "unsupported sentencepiece normaliser")
            .expected("identity")
            .found(normalizer.name()));
    }
    if trainer.treat_whitespace_as_suffix() || !normalizer.escape_whitespaces() {
        return Err(Error::new(Kind::Text, "unsupported treatment of spaces in a sentencepiece model"));
    }
    Ok(())
}

fn byte_ids(reserved: &HashMap<String, i32>) -> Result<[i32; 256]> {
    let mut ids = [0; 256];
    for (byte, id) in ids.iter_mut().enumerate() {
        let piece = format!("<0x{byte:02X}>");
        *id = *reserved.get(&piece).ok_or_else(|| {
            Error::new(Kind::Text, "a sentencepiece model with byte fallback lacks a byte piece").expected(&piece)
        })?;
    }
    Ok(ids)
}

fn byte_of(piece: &str) -> Option<u8> {
    u8::from_str_radix(piece.strip_prefix("<0x")?.strip_suffix('>')?, 16).ok()
}

/// Appends the characters of `bytes`; every byte that starts no character becomes U+FFFD on its own.
fn flush_bytes(bytes: &mut Vec<u8>, out: &mut String) {
    let mut rest = bytes.as_slice();
    while !rest.is_empty() {
        let len = (1..=rest.len().min(4)).find(|n| std::str::from_utf8(&rest[..*n]).is_ok());
        match len {
            Some(n) => out.push_str(std::str::from_utf8(&rest[..n]).unwrap_or_default()),
            None => out.push(char::REPLACEMENT_CHARACTER),
        }
        rest = &rest[len.unwrap_or(1)..];
    }
    bytes.clear();
}

/// A run of text that is one symbol so far. Empty after it was merged into its left neighbour.
#[derive(Clone, Copy)]
struct Symbol {
    start: usize,
    end: usize,
    previous: Option<usize>,
    next: Option<usize>,
    frozen: bool,
}

struct Pair {
    score: f32,
    left: usize,
    right: usize,
    len: usize,
}

impl PartialEq for Pair {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other) == Ordering::Equal
    }
}

impl Eq for Pair {}

impl PartialOrd for Pair {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Pair {
    fn cmp(&self, other: &Self) -> Ordering {
        self.score.total_cmp(&other.score).then(other.left.cmp(&self.left))
    }
}

struct Merger<'a, 't> {
    model: &'a SentencePiece,
    text: &'t str,
    symbols: Vec<Symbol>,
    agenda: BinaryHeap<Pair>,
    /// End of the left half of merged pieces that must not appear in the result.
    splits: HashMap<&'t str, usize>,
}

impl<'a, 't> Merger<'a, 't> {
    fn new(model: &'a SentencePiece, text: &'t str) -> Self {
        let mut symbols: Vec<Symbol> = Vec::with_capacity(text.len());
        let mut start = 0;
        while let Some(c) = text[start..].chars().next() {
            let defined = model.user_defined.iter().find(|p| !p.is_empty() && text[start..].starts_with(p.as_str()));
            let end = start + defined.map_or(c.len_utf8(), String::len);
            let i = symbols.len();
            if let Some(last) = symbols.last_mut() {
                last.next = Some(i);
            }
            symbols.push(Symbol { start, end, previous: i.checked_sub(1), next: None, frozen: defined.is_some() });
            start = end;
        }
        Self { model, text, symbols, agenda: BinaryHeap::new(), splits: HashMap::new() }
    }

    fn run(&mut self) {
        for i in 1..self.symbols.len() {
            self.offer(Some(i - 1), Some(i));
        }
        while let Some(best) = self.agenda.pop() {
            let (left, right) = (self.symbols[best.left], self.symbols[best.right]);
            // One of the two has been merged since the pair was offered.
            if left.start == left.end || right.start == right.end || right.end - left.start != best.len {
                continue;
            }
            self.symbols[best.left].end = right.end;
            self.symbols[best.left].next = right.next;
            if let Some(next) = right.next {
                self.symbols[next].previous = Some(best.left);
            }
            self.symbols[best.right].end = right.start;
            self.offer(left.previous, Some(best.left));
            self.offer(Some(best.left), right.next);
        }
    }

    fn offer(&mut self, left: Option<usize>, right: Option<usize>) {
        let (Some(left), Some(right)) = (left, right) else { return };
        let (l, r) = (self.symbols[left], self.symbols[right]);
        if l.frozen || r.frozen {
            return;
        }
        let piece = &self.text[l.start..r.end];
        let Some(id) = self.model.normal.get(piece) else { return };
        let found = &self.model.pieces[*id as usize];
        self.agenda.push(Pair { score: found.score, left, right, len: piece.len() });
        if found.kind == kind::UNUSED {
            self.splits.insert(piece, l.end - l.start);
        }
    }

    fn resegment(&self, start: usize, end: usize, out: &mut Vec<(&'t str, i32)>) {
        let piece = &self.text[start..end];
        let id = self.model.piece_to_id(piece);
        match self.splits.get(piece) {
            Some(middle) if self.model.kind(id) == kind::UNUSED => {
                self.resegment(start, start + middle, out);
                self.resegment(start + middle, end, out);
            }
            _ => out.push((piece, id)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn model(dummy_prefix: bool) -> SentencePiece {
        let piece = |text: &str, score: f32, kind: i32| proto::Piece {
            piece: Some(text.into()),
            score: Some(score),
            r#type: Some(kind),
        };
        let mut pieces = vec![
            piece("<unk>", 0.0, kind::UNKNOWN),
            piece("<s>", 0.0, kind::CONTROL),
            piece("</s>", 0.0, kind::CONTROL),
        ];
        pieces.extend((0..256).map(|b| piece(&format!("<0x{b:02X}>"), 0.0, kind::BYTE)));
        for (i, text) in ["ab", "\u{2581}a", "\u{2581}ab", "bc", "a", "b", "c", "\u{2581}"].iter().enumerate() {
            pieces.push(piece(text, -(i as f32), kind::NORMAL));
        }
        pieces.push(piece("[X]", 0.0, kind::USER_DEFINED));
        pieces.push(piece("cc", -0.5, kind::UNUSED));
        SentencePiece::from_proto(&proto::ModelProto {
            pieces,
            trainer_spec: Some(proto::TrainerSpec {
                model_type: Some(2),
                byte_fallback: Some(true),
                ..Default::default()
            }),
            normalizer_spec: Some(proto::NormalizerSpec {
                add_dummy_prefix: Some(dummy_prefix),
                remove_extra_whitespaces: Some(false),
                ..Default::default()
            }),
        })
        .unwrap()
    }

    fn pieces(model: &SentencePiece, text: &str) -> Vec<String> {
        model.encode(text).iter().map(|id| model.piece(*id).unwrap().to_string()).collect()
    }

    #[test]
    fn the_best_pair_is_merged_first_then_the_leftmost() {
        let model = model(true);
        assert_eq!(pieces(&model, "abc"), ["\u{2581}ab", "c"]);
        assert_eq!(pieces(&model, "bcab"), ["\u{2581}", "bc", "ab"]);
        assert_eq!(pieces(&model, ""), [""; 0]);
    }

    #[test]
    fn unknown_characters_become_bytes_and_come_back() {
        let model = model(false);
        assert_eq!(pieces(&model, "aé"), ["a", "<0xC3>", "<0xA9>"]);
        assert_eq!(model.decode(&model.encode("aé\n b")), "aé\n b");
        assert_eq!(
            model.decode_pieces(&["<0xC3>", "a", "<0xFF>", "<0xE4>", "<0xBD>"]),
            "\u{FFFD}a\u{FFFD}\u{FFFD}\u{FFFD}"
        );
    }

    #[test]
    fn user_defined_pieces_are_never_merged_and_unused_ones_are_split_again() {
        let model = model(false);
        assert_eq!(pieces(&model, "a[X]b"), ["a", "[X]", "b"]);
        assert_eq!(pieces(&model, "cc"), ["c", "c"]);
        assert_eq!(model.encode("<s>").len(), 3, "control pieces cannot be typed");
    }

    #[test]
    fn decoding_drops_the_dummy_space_only_when_encoding_adds_one() {
        assert_eq!(model(true).decode_pieces(&["\u{2581}a", "\u{2581}a"]), "a a");
        assert_eq!(model(false).decode_pieces(&["\u{2581}a", "<s>", "zz"]), " azz");
    }

    #[test]
    fn other_model_types_are_refused() {
        let unigram = proto::ModelProto {
            pieces: vec![proto::Piece { piece: Some("a".into()), ..Default::default() }],
            trainer_spec: Some(proto::TrainerSpec { model_type: Some(1), ..Default::default() }),
            normalizer_spec: None,
        };
        assert!(SentencePiece::from_proto(&unigram).unwrap_err().to_string().contains("BPE"));
        assert!(SentencePiece::from_bytes(b"\xff\xff").is_err());
    }
}
