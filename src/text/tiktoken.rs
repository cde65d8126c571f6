//! Byte-level BPE from tiktoken rank files (`base64 rank` lines), with special tokens recognised by policy.
//!
//! Text is NFC-normalised, cut at the special strings that the policy allows, split by Qwen's pattern, and every piece
//! is merged by lowest rank. Ids beyond the ranks are the special tokens, in the order they are given.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, BinaryHeap, HashMap, HashSet},
    path::Path,
};

use base64::Engine as _;
use regex::Regex;
use unicode_normalization::UnicodeNormalization as _;

use crate::error::{Error, Kind, Result};

/// Qwen's split pattern without its look-ahead (`\s+(?!\S)`), which [`split`] supplies: contractions, words with one
/// leading mark, single digits, marks, line ends, spaces.
const PATTERN: &str =
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+";

/// Which special strings in a text become special tokens; the others are ordinary text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AllowedSpecial<'a> {
    /// Every special string.
    All,
    /// None.
    None,
    /// Those listed.
    Only(&'a [&'a str]),
}

/// What to do with bytes that are not UTF-8 when decoding.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum InvalidUtf8 {
    /// Write U+FFFD for every maximal invalid part.
    Replace,
    /// Leave them out.
    Ignore,
    /// Fail.
    Strict,
}

/// A vocabulary of byte strings and special tokens.
pub struct Tiktoken {
    ranks: HashMap<Vec<u8>, u32>,
    pieces: Vec<Vec<u8>>,
    specials: Vec<String>,
    pattern: Regex,
}

impl std::fmt::Debug for Tiktoken {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Tiktoken({} ranks, {} specials)", self.pieces.len(), self.specials.len())
    }
}

/// NFC form of `text`.
#[must_use]
pub fn nfc(text: &str) -> String {
    text.nfc().collect()
}

impl Tiktoken {
    /// Reads a rank file; special tokens take the ids after the ranks.
    ///
    /// # Errors
    /// An unreadable file, or one that [`Tiktoken::parse`] refuses.
    pub fn from_file(path: &Path, specials: Vec<String>) -> Result<Self> {
        let text = std::fs::read_to_string(path).map_err(|e| Error::io(path, e))?;
        Self::parse(&text, specials).map_err(|e| {
            Error::new(Kind::Text, "not a tiktoken vocabulary")
                .at(path.display())
                .help("the file holds one `base64 rank` pair a line")
                .source(e)
        })
    }

    /// Parses the lines of a rank file.
    ///
    /// # Errors
    /// A line that is not `base64 rank`, ranks with gaps or repeats, a missing single byte.
    pub fn parse(text: &str, specials: Vec<String>) -> Result<Self> {
        let mut ranks = HashMap::new();
        for (number, line) in text.lines().enumerate().filter(|(_, l)| !l.is_empty()) {
            let (piece, rank) = parse_line(line)
                .ok_or_else(|| Error::new(Kind::Text, "bad line").at(format!("line {}", number + 1)).found(line))?;
            if ranks.insert(piece, rank).is_some() {
                return Err(Error::new(Kind::Text, "a piece occurs twice").at(format!("line {}", number + 1)));
            }
        }
        Self::new(ranks, specials)
    }

    fn new(ranks: HashMap<Vec<u8>, u32>, specials: Vec<String>) -> Result<Self> {
        let mut pieces = vec![Vec::new(); ranks.len()];
        for (piece, rank) in &ranks {
            match pieces.get_mut(*rank as usize) {
                Some(slot) if slot.is_empty() && !piece.is_empty() => slot.clone_from(piece),
                _ => {
                    return Err(Error::new(Kind::Text, "ranks are not 0, 1, 2, .. without gaps")
                        .found(format!("rank {rank} among {} pieces", ranks.len())));
                }
            }
        }
        if let Some(byte) = (0..=255u8).find(|b| !ranks.contains_key([*b].as_slice())) {
            return Err(Error::new(Kind::Text, "a byte has no token of its own").found(format!("0x{byte:02x}")));
        }
        Ok(Self { ranks, pieces, specials, pattern: pattern()? })
    }

    /// Number of ordinary tokens; the first special id.
    #[must_use]
    pub fn n_ranks(&self) -> usize {
        self.pieces.len()
    }

    /// Number of ids, specials included.
    #[must_use]
    pub fn len(&self) -> usize {
        self.pieces.len() + self.specials.len()
    }

    /// Whether there is no token; never true for a parsed vocabulary.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Id of a special string.
    #[must_use]
    pub fn special(&self, text: &str) -> Option<u32> {
        let index = self.specials.iter().position(|s| s == text)?;
        Some((self.pieces.len() + index) as u32)
    }

    /// Bytes of one id; `None` beyond the vocabulary.
    #[must_use]
    pub fn bytes(&self, id: u32) -> Option<&[u8]> {
        let id = id as usize;
        match self.pieces.get(id) {
            Some(piece) => Some(piece),
            None => self.specials.get(id - self.pieces.len()).map(String::as_bytes),
        }
    }

    /// Ids of `text`. Special strings that `allowed` does not name are ordinary text.
    #[must_use]
    pub fn encode(&self, text: &str, allowed: AllowedSpecial<'_>) -> Vec<u32> {
        let text = nfc(text);
        let mut ids = Vec::with_capacity(text.len() / 3);
        let mut rest = text.as_str();
        while let Some((at, index)) = self.first_special(rest, allowed) {
            self.encode_ordinary(&rest[..at], &mut ids);
            ids.push((self.pieces.len() + index) as u32);
            rest = &rest[at + self.specials[index].len()..];
        }
        self.encode_ordinary(rest, &mut ids);
        ids
    }

    /// Start and index of the first allowed special string; all of them begin with `<`.
    fn first_special(&self, text: &str, allowed: AllowedSpecial<'_>) -> Option<(usize, usize)> {
        if allowed == AllowedSpecial::None {
            return None;
        }
        text.match_indices('<').find_map(|(at, _)| {
            let index = self.specials.iter().position(|s| text[at..].starts_with(s.as_str()))?;
            let permitted = match allowed {
                AllowedSpecial::All => true,
                AllowedSpecial::None => false,
                AllowedSpecial::Only(list) => list.contains(&self.specials[index].as_str()),
            };
            permitted.then_some((at, index))
        })
    }

    fn encode_ordinary(&self, text: &str, ids: &mut Vec<u32>) {
        for piece in split(&self.pattern, text) {
            self.merge(piece.as_bytes(), ids);
        }
    }

    /// Byte-pair merge of one piece: always the pair of lowest rank, leftmost first.
    fn merge(&self, piece: &[u8], ids: &mut Vec<u32>) {
        if piece.is_empty() {
            return;
        }
        if let Some(rank) = self.ranks.get(piece) {
            ids.push(*rank);
            return;
        }
        let mut parts = Parts::new(piece.len());
        let mut heap: BinaryHeap<Reverse<(u32, usize, usize)>> = BinaryHeap::new();
        let candidate = |parts: &Parts, left: usize| {
            let end = parts.pair_end(left)?;
            self.ranks.get(&piece[left..end]).map(|rank| Reverse((*rank, left, end)))
        };
        heap.extend((0..piece.len()).filter_map(|left| candidate(&parts, left)));
        while let Some(Reverse((_, left, end))) = heap.pop() {
            if parts.pair_end(left) != Some(end) {
                continue;
            }
            let previous = parts.join(left);
            heap.extend(candidate(&parts, left));
            heap.extend(previous.and_then(|p| candidate(&parts, p)));
        }
        let mut at = 0;
        while at < piece.len() {
            let end = parts.end[at];
            // A part is a single byte or was joined because its bytes have a rank.
            ids.push(self.ranks[&piece[at..end]]);
            at = end;
        }
    }

    /// Text of `ids`.
    ///
    /// # Errors
    /// An id beyond the vocabulary; bytes that are not UTF-8 under [`InvalidUtf8::Strict`].
    pub fn decode(&self, ids: &[u32], invalid: InvalidUtf8) -> Result<String> {
        let mut bytes = Vec::with_capacity(ids.len() * 3);
        for id in ids {
            bytes.extend_from_slice(self.bytes(*id).ok_or_else(|| {
                Error::new(Kind::Text, "no such token")
                    .at(format!("id {id}"))
                    .expected(format!("an id below {}", self.len()))
                    .help("the model wrote a padding row of its vocabulary; its weights or tokenizer do not fit")
            })?);
        }
        utf8(bytes, invalid)
    }
}

/// Text of raw bytes.
///
/// # Errors
/// Bytes that are not UTF-8 under [`InvalidUtf8::Strict`].
pub fn utf8(bytes: Vec<u8>, invalid: InvalidUtf8) -> Result<String> {
    match String::from_utf8(bytes) {
        Ok(text) => Ok(text),
        Err(e) => match invalid {
            InvalidUtf8::Replace => Ok(String::from_utf8_lossy(e.as_bytes()).into_owned()),
            InvalidUtf8::Ignore => Ok(e.as_bytes().utf8_chunks().map(|c| c.valid()).collect()),
            InvalidUtf8::Strict => Err(Error::new(Kind::Text, "tokens are not valid UTF-8").source(e)),
        },
    }
}

/// Pieces of `text`. A run of spaces before a word leaves its last space to the word, as `\s+(?!\S)` does.
fn split<'t>(pattern: &Regex, text: &'t str) -> impl Iterator<Item = &'t str> {
    let mut at = 0;
    std::iter::from_fn(move || {
        let found = pattern.find_at(text, at)?;
        let mut end = found.end();
        let spaces = found.as_str();
        let last = spaces.chars().next_back().map_or(0, char::len_utf8);
        let run = end < text.len() && spaces.chars().all(char::is_whitespace) && !spaces.ends_with(['\r', '\n']);
        if run && last < spaces.len() {
            end -= last;
        }
        // Every character starts some alternative, so a match starts where the one before ended.
        let piece = &text[at..end];
        at = end;
        Some(piece)
    })
}

/// Trains a vocabulary on `texts`: the 256 bytes, then the commonest pairs of what is there, up to `ranks` pieces or
/// until no pair occurs twice. Returns the lines of a rank file.
///
/// The result depends on the texts alone, not on their order.
///
/// # Errors
/// Fewer than 256 ranks.
pub fn train<S: AsRef<str>>(texts: impl IntoIterator<Item = S>, ranks: usize) -> Result<String> {
    if ranks < 256 {
        return Err(Error::new(Kind::Config, "vocab_size is too small for a tokenizer")
            .expected("room for the 256 bytes and the special tokens")
            .found(format!("room for {ranks} pieces"))
            .help("raise the vocab_size of the preset"));
    }
    let pattern = pattern()?;
    let mut counts = BTreeMap::<String, u64>::new();
    for text in texts {
        for piece in split(&pattern, &nfc(text.as_ref())) {
            *counts.entry(piece.to_string()).or_default() += 1;
        }
    }
    let mut words: Vec<(Vec<Vec<u8>>, u64)> =
        counts.into_iter().map(|(word, n)| (word.bytes().map(|b| vec![b]).collect(), n)).collect();
    let mut pieces: Vec<Vec<u8>> = byte_order().map(|b| vec![b]).collect();
    let mut known: HashSet<Vec<u8>> = pieces.iter().cloned().collect();
    while pieces.len() < ranks {
        let Some(best) = commonest_pair(&words) else { break };
        for (parts, _) in &mut words {
            join_pair(parts, &best);
        }
        if known.insert(best.concat()) {
            pieces.push(best.concat());
        }
    }
    let line = |(rank, piece): (usize, &Vec<u8>)| {
        format!("{} {rank}\n", base64::engine::general_purpose::STANDARD.encode(piece))
    };
    Ok(pieces.iter().enumerate().map(line).collect())
}

/// As [`train`], for a vocabulary of exactly `ranks` pieces: what the texts do not give is filled up with pairs and
/// triples of bytes. The result encodes every text, if not as shortly as it could.
///
/// # Errors
/// As [`train`], or more ranks than there are triples.
pub fn train_filled<S: AsRef<str>>(texts: impl IntoIterator<Item = S>, ranks: usize) -> Result<String> {
    let mut file = train(texts, ranks)?;
    let mut known: HashSet<String> = file.lines().filter_map(|l| l.split(' ').next()).map(str::to_string).collect();
    let pairs = (0..=255u8).flat_map(|a| (0..=255u8).map(move |b| vec![a, b]));
    let triples = (0..=255u8).flat_map(|a| (0..=255u8).flat_map(move |b| (0..=255u8).map(move |c| vec![a, b, c])));
    for piece in pairs.chain(triples) {
        if known.len() == ranks {
            break;
        }
        let text = base64::engine::general_purpose::STANDARD.encode(piece);
        let line = format!("{text} {}\n", known.len());
        if known.insert(text) {
            file.push_str(&line);
        }
    }
    Ok(file)
}

/// Bytes as released vocabularies order them: printable ones first.
fn byte_order() -> impl Iterator<Item = u8> {
    let printable = |b: &u8| matches!(b, 33..=126 | 161..=172 | 174..=255);
    (0..=255u8).filter(printable).chain((0..=255u8).filter(move |b| !printable(b)))
}

/// The pair that occurs most often, at least twice; of equals the first by its bytes.
fn commonest_pair(words: &[(Vec<Vec<u8>>, u64)]) -> Option<[Vec<u8>; 2]> {
    let mut counts = HashMap::<&[Vec<u8>], u64>::new();
    for (parts, n) in words {
        for pair in parts.windows(2) {
            *counts.entry(pair).or_default() += n;
        }
    }
    let best = counts.into_iter().max_by(|a, b| a.1.cmp(&b.1).then_with(|| b.0.cmp(a.0)));
    best.filter(|(_, n)| *n > 1).map(|(pair, _)| [pair[0].clone(), pair[1].clone()])
}

fn join_pair(parts: &mut Vec<Vec<u8>>, pair: &[Vec<u8>; 2]) {
    let mut i = 0;
    while i + 1 < parts.len() {
        if parts[i] == pair[0] && parts[i + 1] == pair[1] {
            let right = parts.remove(i + 1);
            parts[i].extend(right);
        }
        i += 1;
    }
}

fn pattern() -> Result<Regex> {
    Regex::new(PATTERN).map_err(|e| Error::new(Kind::Text, "the split pattern does not compile").source(e))
}

fn parse_line(line: &str) -> Option<(Vec<u8>, u32)> {
    let (piece, rank) = line.split_once(' ')?;
    Some((base64::engine::general_purpose::STANDARD.decode(piece).ok()?, rank.trim_end().parse().ok()?))
}

/// Parts of a piece as a linked list over byte positions.
struct Parts {
    /// Where the part that starts here ends; 0 where none starts.
    end: Vec<usize>,
    /// Start of the part before the one that starts here.
    previous: Vec<Option<usize>>,
}

impl Parts {
    fn new(len: usize) -> Self {
        Self { end: (1..=len).collect(), previous: (0..len).map(|i| i.checked_sub(1)).collect() }
    }

    /// End of the pair whose left part starts at `left`; `None` if there is no such pair.
    fn pair_end(&self, left: usize) -> Option<usize> {
        let middle = self.end[left];
        (middle > 0).then(|| self.end.get(middle).copied()).flatten()
    }

    /// Joins the part at `left` with the next; returns the start of the part before.
    fn join(&mut self, left: usize) -> Option<usize> {
        let middle = self.end[left];
        let end = self.end[middle];
        self.end[middle] = 0;
        self.end[left] = end;
        if let Some(previous) = self.previous.get_mut(end) {
            *previous = Some(left);
        }
        self.previous[left]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Single bytes in reverse order, then the given pieces.
    fn vocabulary(pieces: &[&str]) -> String {
        let bytes = (0..=255u8).rev().map(|b| vec![b]);
        let all = bytes.chain(pieces.iter().map(|p| p.as_bytes().to_vec()));
        all.enumerate()
            .map(|(rank, piece)| format!("{} {rank}\n", base64::engine::general_purpose::STANDARD.encode(piece)))
            .collect()
    }

    fn toy() -> Tiktoken {
        Tiktoken::parse(&vocabulary(&["ab", "bc", "abc", "aa"]), vec!["<a>".into(), "<b>".into()]).unwrap()
    }

    const fn byte(b: u8) -> u32 {
        255 - b as u32
    }

    #[test]
    fn the_lowest_rank_merges_first_and_ties_go_left() {
        let t = toy();
        assert_eq!(t.encode("abc", AllowedSpecial::None), [258]);
        assert_eq!(t.encode("bcab", AllowedSpecial::None), [257, 256]);
        assert_eq!(t.encode("aaa", AllowedSpecial::None), [259, byte(b'a')]);
        assert_eq!(t.encode("xabcb", AllowedSpecial::None), [byte(b'x'), 258, byte(b'b')]);
    }

    #[test]
    fn a_special_string_is_a_token_only_where_it_is_allowed() {
        let t = toy();
        let text = |s: &str| s.bytes().map(byte).collect::<Vec<_>>();
        assert_eq!(t.encode("<a>-<b>", AllowedSpecial::All), [260, byte(b'-'), 261]);
        let only = t.encode("<a>-<b>", AllowedSpecial::Only(&["<b>"]));
        assert_eq!(only, [text("<a>-"), vec![261]].concat());
        assert_eq!(t.encode("<a>", AllowedSpecial::None), text("<a>"));
    }

    #[test]
    fn long_unbroken_text_is_not_quadratic_and_round_trips() {
        let t = toy();
        let text = "abca".repeat(50_000);
        let ids = t.encode(&text, AllowedSpecial::None);
        assert_eq!(t.decode(&ids, InvalidUtf8::Strict).unwrap(), text);
    }

    #[test]
    fn invalid_bytes_are_replaced_left_out_or_refused() {
        let t = toy();
        let ids = [byte(0xf0), byte(b'a')];
        assert_eq!(t.decode(&ids, InvalidUtf8::Replace).unwrap(), "\u{fffd}a");
        assert_eq!(t.decode(&ids, InvalidUtf8::Ignore).unwrap(), "a");
        assert!(t.decode(&ids, InvalidUtf8::Strict).unwrap_err().to_string().contains("UTF-8"));
        assert!(t.decode(&[262], InvalidUtf8::Replace).unwrap_err().to_string().contains("id 262"));
    }

    #[test]
    fn training_joins_what_is_common_and_the_result_encodes() {
        let texts = ["the nodule is there", "the nodule", "there is no nodule"];
        let file = train(texts, 300).unwrap();
        let t = Tiktoken::parse(&file, vec![]).unwrap();
        assert!(t.n_ranks() > 256 && t.n_ranks() <= 300);
        assert!(t.encode("the nodule", AllowedSpecial::None).len() < 5);
        let mut reversed = texts;
        reversed.reverse();
        assert_eq!(train(reversed, 300).unwrap(), file);
        assert!(train(texts, 255).is_err());
        let ids = t.encode("Überraschung 7", AllowedSpecial::None);
        assert_eq!(t.decode(&ids, InvalidUtf8::Strict).unwrap(), "Überraschung 7");
    }

    #[test]
    fn a_filled_vocabulary_has_its_size_and_encodes() {
        let file = train_filled(["the nodule", "the nodule"], 70_000).unwrap();
        let t = Tiktoken::parse(&file, vec![]).unwrap();
        assert_eq!(t.n_ranks(), 70_000);
        let ids = t.encode("Überraschung: the nodule", AllowedSpecial::None);
        assert_eq!(t.decode(&ids, InvalidUtf8::Strict).unwrap(), "Überraschung: the nodule");
    }

    #[test]
    fn a_broken_vocabulary_is_refused() {
        let error = |text: &str| Tiktoken::parse(text, vec![]).unwrap_err().to_string();
        assert!(error("?? 0\n").contains("bad line"));
        assert!(error("YQ== 0\nYg== 0\n").contains("gaps"));
        assert!(error("YQ== 0\nYQ== 1\n").contains("twice"));
        assert!(error("YQ== 0\n").contains("no token of its own"));
    }
}
