//! Training a small byte-fallback BPE tokenizer, for models that are initialised at random.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use prost::Message as _;
use serde_json::{Value, json};

use super::sentencepiece::{SPACE, kind, proto};
use crate::error::{Error, Kind, Result};

/// The `tokenizer_config.json` that belongs beside a trained `tokenizer.json`.
pub const TOKENIZER_CONFIG: &str = r#"{
  "add_bos_token": true,
  "add_eos_token": false,
  "bos_token": "<s>",
  "clean_up_tokenization_spaces": false,
  "eos_token": "</s>",
  "legacy": true,
  "pad_token": "<unk>",
  "padding_side": "right",
  "tokenizer_class": "LlamaTokenizerFast",
  "unk_token": "<unk>"
}
"#;

const SPECIALS: [&str; 3] = ["<unk>", "<s>", "</s>"];

/// Trains on `texts` and returns the bytes of a `tokenizer.json` that behaves like Llama's: `<unk>` 0, `<s>` 1, `</s>`
/// 2, the 256 bytes, then characters and merges. Digits stay single; punctuation is never joined with letters.
///
/// The result depends on the texts alone, not on their order or on threads, and has fewer than `vocab_size` entries
/// when no pair occurs twice any more.
///
/// # Errors
/// A `vocab_size` with no room for bytes and printable ASCII.
pub fn train_bpe<S: AsRef<str>>(texts: impl IntoIterator<Item = S>, vocab_size: usize) -> Result<Vec<u8>> {
    let (vocab, merges) = train(texts, vocab_size)?;
    Ok(serde_json::to_vec(&document(&vocab, &merges)).expect("a JSON value of strings and numbers"))
}

/// As [`train_bpe`], but returns the bytes of a sentencepiece `tokenizer.model`.
///
/// # Errors
/// As [`train_bpe`].
pub fn train_sentencepiece<S: AsRef<str>>(texts: impl IntoIterator<Item = S>, vocab_size: usize) -> Result<Vec<u8>> {
    let (vocab, _) = train(texts, vocab_size)?;
    Ok(sentencepiece(&vocab))
}

/// As [`train_sentencepiece`], for a vocabulary of exactly `vocab_size` pieces: what the texts do not give is filled up
/// with pieces that no text contains.
///
/// # Errors
/// As [`train_bpe`].
pub fn filled_sentencepiece<S: AsRef<str>>(texts: impl IntoIterator<Item = S>, vocab_size: usize) -> Result<Vec<u8>> {
    let (mut vocab, _) = train(texts, vocab_size)?;
    vocab.extend((vocab.len()..vocab_size).map(|id| format!("{FILLER}{id}]")));
    Ok(sentencepiece(&vocab))
}

/// Beginning of pieces that fill a vocabulary up.
const FILLER: &str = "[UNUSED_TOKEN_";

fn sentencepiece(vocab: &[String]) -> Vec<u8> {
    let kind = |text: &str| match text {
        _ if text.starts_with(FILLER) => kind::UNUSED,
        "<unk>" => kind::UNKNOWN,
        "<s>" | "</s>" => kind::CONTROL,
        _ if text.len() == 6 && text.starts_with("<0x") => kind::BYTE,
        _ => kind::NORMAL,
    };
    // Merges come in the order of the vocabulary, so an earlier piece has the larger score.
    let pieces = vocab.iter().zip(0i32..).map(|(text, i)| proto::Piece {
        piece: Some(text.clone()),
        score: Some(-i as f32),
        r#type: Some(kind(text)),
    });
    let model = proto::ModelProto {
        pieces: pieces.collect(),
        trainer_spec: Some(proto::TrainerSpec {
            model_type: Some(2),
            vocab_size: Some(vocab.len() as i32),
            byte_fallback: Some(true),
            ..Default::default()
        }),
        normalizer_spec: Some(proto::NormalizerSpec {
            name: Some("identity".into()),
            add_dummy_prefix: Some(true),
            remove_extra_whitespaces: Some(false),
            ..Default::default()
        }),
    };
    model.encode_to_vec()
}

/// Vocabulary in id order, and the merges that are in it.
#[expect(clippy::type_complexity, reason = "two lists that belong together once")]
fn train<S: AsRef<str>>(
    texts: impl IntoIterator<Item = S>,
    vocab_size: usize,
) -> Result<(Vec<String>, Vec<(String, String)>)> {
    let mut words = BTreeMap::<String, u64>::new();
    for text in texts {
        for word in split(text.as_ref()) {
            *words.entry(word).or_default() += 1;
        }
    }
    let alphabet = alphabet(&words, vocab_size)?;
    let mut vocab: Vec<String> = SPECIALS.map(str::to_string).to_vec();
    vocab.extend((0..256).map(|b| format!("<0x{b:02X}>")));
    vocab.extend(alphabet.iter().map(char::to_string));
    let merges = merge_pairs(&words, &alphabet, &mut vocab, vocab_size);
    Ok((vocab, merges))
}

/// Words with the space in front of them: runs of letters, single other characters.
fn split(text: &str) -> Vec<String> {
    let text = format!("{SPACE}{}", text.replace(' ', &SPACE.to_string()));
    let mut words: Vec<String> = Vec::new();
    let mut last = None;
    for c in text.chars() {
        let joins = match last {
            Some(SPACE) => c != SPACE && !c.is_numeric(),
            Some(last) => char::is_alphabetic(last) && c.is_alphabetic(),
            None => false,
        };
        match words.last_mut() {
            Some(word) if joins => word.push(c),
            _ => words.push(c.to_string()),
        }
        last = Some(c);
    }
    words
}

/// Printable ASCII and the space mark, then the commonest other characters that occur twice and for which there is
/// room beside as many merges.
fn alphabet(words: &BTreeMap<String, u64>, vocab_size: usize) -> Result<BTreeSet<char>> {
    let mut alphabet: BTreeSet<char> = ('!'..='~').chain([SPACE]).collect();
    let fixed = SPECIALS.len() + 256 + alphabet.len();
    let Some(room) = vocab_size.checked_sub(fixed) else {
        return Err(Error::new(Kind::Config, "vocab_size is too small for a tokenizer")
            .expected(format!("at least {fixed}"))
            .found(vocab_size)
            .help("raise the vocab_size of the preset"));
    };
    let mut counts = BTreeMap::<char, u64>::new();
    for (word, n) in words {
        for c in word.chars().filter(|c| !c.is_control() && !alphabet.contains(c)) {
            *counts.entry(c).or_default() += n;
        }
    }
    let mut others: Vec<(char, u64)> = counts.into_iter().filter(|(_, n)| *n > 1).collect();
    others.sort_by(|a, b| b.1.cmp(&a.1).then(a.0.cmp(&b.0)));
    alphabet.extend(others.into_iter().take(room / 2).map(|(c, _)| c));
    Ok(alphabet)
}

struct Word {
    symbols: Vec<usize>,
    count: u64,
}

/// Joins the commonest pair, ties by the text of its parts, until the vocabulary is full or no pair occurs twice.
fn merge_pairs(
    words: &BTreeMap<String, u64>,
    alphabet: &BTreeSet<char>,
    vocab: &mut Vec<String>,
    vocab_size: usize,
) -> Vec<(String, String)> {
    let mut ids: HashMap<String, usize> = vocab.iter().cloned().zip(0..).collect();
    let mut words: Vec<Word> = words
        .iter()
        .flat_map(|(word, &count)| {
            // A character outside the alphabet is written in bytes and takes no part.
            let known = word.split(|c| !alphabet.contains(&c)).filter(|w| !w.is_empty());
            known.map(|w| Word { symbols: w.chars().map(|c| ids[&c.to_string()]).collect(), count }).collect::<Vec<_>>()
        })
        .collect();
    let (mut counts, mut places) = (HashMap::<(usize, usize), u64>::new(), HashMap::<_, BTreeSet<usize>>::new());
    for (i, word) in words.iter().enumerate() {
        for pair in pairs(&word.symbols) {
            *counts.entry(pair).or_default() += word.count;
            places.entry(pair).or_default().insert(i);
        }
    }
    let mut merges = Vec::new();
    while vocab.len() < vocab_size {
        let text = |pair: &(usize, usize)| (&vocab[pair.0], &vocab[pair.1]);
        let best = counts.iter().max_by(|a, b| a.1.cmp(b.1).then_with(|| text(b.0).cmp(&text(a.0))));
        let Some((&pair, 2..)) = best else { break };
        let joined = format!("{}{}", vocab[pair.0], vocab[pair.1]);
        merges.push((vocab[pair.0].clone(), vocab[pair.1].clone()));
        let id = *ids.entry(joined.clone()).or_insert_with(|| {
            vocab.push(joined);
            vocab.len() - 1
        });
        for i in places.remove(&pair).unwrap_or_default() {
            let word = &mut words[i];
            for old in pairs(&word.symbols) {
                if let Some(n) = counts.get_mut(&old) {
                    *n -= word.count;
                }
            }
            join(&mut word.symbols, pair, id);
            for new in pairs(&word.symbols) {
                *counts.entry(new).or_default() += word.count;
                places.entry(new).or_default().insert(i);
            }
        }
        counts.retain(|_, n| *n > 0);
    }
    merges
}

fn pairs(symbols: &[usize]) -> Vec<(usize, usize)> {
    symbols.windows(2).map(|w| (w[0], w[1])).collect()
}

fn join(symbols: &mut Vec<usize>, pair: (usize, usize), id: usize) {
    let mut out = Vec::with_capacity(symbols.len());
    let mut i = 0;
    while i < symbols.len() {
        if symbols.get(i + 1) == Some(&pair.1) && symbols[i] == pair.0 {
            out.push(id);
            i += 2;
        } else {
            out.push(symbols[i]);
            i += 1;
        }
    }
    *symbols = out;
}

fn document(vocab: &[String], merges: &[(String, String)]) -> Value {
    let special = |(id, content): (usize, &&str)| {
        json!({"id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
            "normalized": false, "special": true})
    };
    let entries: serde_json::Map<String, Value> = vocab.iter().cloned().zip((0..).map(|id: usize| json!(id))).collect();
    let space = SPACE.to_string();
    json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": SPECIALS.iter().enumerate().map(special).collect::<Vec<_>>(),
        "normalizer": {"type": "Sequence", "normalizers": [
            {"type": "Prepend", "prepend": &space},
            {"type": "Replace", "pattern": {"String": " "}, "content": &space},
        ]},
        "pre_tokenizer": null,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [
                {"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}},
                {"SpecialToken": {"id": "<s>", "type_id": 1}}, {"Sequence": {"id": "B", "type_id": 1}},
            ],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
        },
        "decoder": {"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": &space}, "content": " "},
            {"type": "ByteFallback"},
            {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0},
        ]},
        "model": {
            "type": "BPE",
            "dropout": null,
            "unk_token": "<unk>",
            "continuing_subword_prefix": null,
            "end_of_word_suffix": null,
            "fuse_unk": true,
            "byte_fallback": true,
            "vocab": entries,
            "merges": merges.iter().map(|(a, b)| json!([a, b])).collect::<Vec<_>>(),
        },
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::text::{sentencepiece::SentencePiece, tokenizer::Tokenizer};

    const TEXTS: [&str; 4] = [
        "[INST] <image>\nIs there a nodule in the left lung? [/INST] There is no nodule in the left lung.",
        "The liver shows a cyst of 12 mm. The cyst is benign.",
        "Is the cyst in the liver? The cyst is in the liver.",
        "There is a nodule of 3 mm in the right lung.",
    ];

    #[test]
    fn text_comes_back_and_frequent_words_become_one_token() {
        let tokenizer = Tokenizer::from_json_bytes(&train_bpe(TEXTS, 480).unwrap()).unwrap();
        assert_eq!((tokenizer.unk_id(), tokenizer.bos_id(), tokenizer.eos_id()), (0, 1, 2));
        assert!(tokenizer.vocab_size() <= 480);
        let ids = tokenizer.encode("the cyst").unwrap();
        assert_eq!(ids.iter().map(|i| tokenizer.piece(*i)).collect::<Vec<_>>(), ["<s>", "▁the", "▁cyst"]);
        for text in ["The nodule of 345 mm?\n\tβ 肝臓", "  a  ", "x</s> y", ""] {
            let ids = tokenizer.encode(text).unwrap();
            assert_eq!(tokenizer.decode(&ids[1..], false), text.replace("</s> y", "</s>  y"), "{text:?}");
            assert!(!ids[1..].contains(&0));
        }
        let digits = tokenizer.encode("12 345").unwrap();
        assert_eq!(digits.len(), 1 + 1 + 2 + 1 + 3, "a space mark and single digits");
    }

    #[test]
    fn both_forms_of_a_vocabulary_split_alike() {
        let json = Tokenizer::from_json_bytes(&train_bpe(TEXTS, 480).unwrap()).unwrap();
        let model = SentencePiece::from_bytes(&train_sentencepiece(TEXTS, 480).unwrap()).unwrap();
        for text in TEXTS.iter().copied().chain(["12 cysts, 3.5 mm; naïve", "liver?liver"]) {
            assert_eq!(model.encode(text), json.encode(text).unwrap()[1..], "{text}");
        }
    }

    #[test]
    fn the_order_of_texts_and_the_run_do_not_matter() {
        let once = train_bpe(TEXTS, 500).unwrap();
        let mut reversed = TEXTS;
        reversed.reverse();
        assert_eq!(once, train_bpe(reversed, 500).unwrap());
        assert!(train_bpe(TEXTS, 300).unwrap_err().to_string().contains("at least 354"));
    }
}
