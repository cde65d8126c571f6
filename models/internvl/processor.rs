//! Host side of InternVL: tiles, prompts, label masks.
//!
//! Text-only rows of the original carry a white image whose features are thrown away; here they carry none.

use std::path::Path;

use serde_json::{Value, json};

use super::config::{InternVlConfig, LlmConfig, LlmKind};
use crate::{
    error::{Error, Kind, Result},
    image::{
        self, Rgb8,
        pad::{normalize, to_square},
        resize::{Filter, resize},
        tiling::Tiling,
    },
    models::TokenizerFiles,
    run_dir::json_file,
    sample::Sample,
    text::{
        bpe::{filled_sentencepiece, train_sentencepiece},
        mpt_chat::{IMAGE_CONTEXT, IMAGE_MARK, MptChat, expand_images},
        sentencepiece::SentencePiece,
        slow_tokenizer::SlowTokenizer,
        turns::{check_marks, turns},
    },
    vlm::{Encoded, IGNORE, ImageSpan, Pixels, Processor},
};

/// ImageNet's mean, which the original uses whatever preprocessor_config.json says.
const MEAN: [f32; 3] = [0.485, 0.456, 0.406];
/// ImageNet's standard deviation.
const STD: [f32; 3] = [0.229, 0.224, 0.225];
/// Colour of the padding when images are padded to squares.
const PADDING: [u8; 3] = [123, 116, 103];

/// The tokens that `phi3-chat` needs; the first ends and fills texts.
const ROLE_TOKENS: [&str; 5] = ["<|endoftext|>", "<|assistant|>", "<|system|>", "<|end|>", "<|user|>"];
/// The tokens that InternLM2 has behind its pieces.
const CHAT_TOKENS: [&str; 6] =
    ["<|plugin|>", "<|interpreter|>", "<|action_end|>", "<|action_start|>", "<|im_end|>", "<|im_start|>"];
/// The tokens that InternVL adds to every language model.
const IMAGE_TOKENS: [&str; 9] =
    ["<img>", "</img>", "<IMG_CONTEXT>", "<quad>", "</quad>", "<ref>", "</ref>", "<box>", "</box>"];

/// Turns samples into rows for InternVL.
#[derive(Debug)]
pub struct InternVlProcessor {
    tokenizer: SlowTokenizer,
    chat: MptChat,
    config: InternVlConfig,
    context_id: i32,
    pad_id: i32,
    stop_ids: Vec<i32>,
}

impl InternVlProcessor {
    /// Reads config and tokenizer of a checkpoint directory.
    ///
    /// # Errors
    /// A missing or unreadable file, an unknown template, or a tokenizer that does not fit the model.
    pub fn load(dir: &Path) -> Result<Self> {
        Self::new(SlowTokenizer::load(dir)?, InternVlConfig::open(dir)?).map_err(|e| e.at(dir.display()))
    }

    /// Puts the parts together.
    ///
    /// # Errors
    /// An unknown template, a tokenizer without the tokens that the template and the images need, or one with more ids
    /// than the model has embeddings.
    pub fn new(tokenizer: SlowTokenizer, config: InternVlConfig) -> Result<Self> {
        let chat = MptChat::named(&config.template, config.system_message.as_deref())?;
        let embeddings = config.llm_config.vocab_size;
        if tokenizer.vocab_size() > embeddings {
            return Err(Error::new(Kind::Checkpoint, "the tokenizer has more tokens than the model")
                .expected(format!("at most {embeddings}, the vocab_size of llm_config"))
                .found(tokenizer.vocab_size())
                .help("use the tokenizer that belongs to the checkpoint"));
        }
        let id = |token: &str| {
            tokenizer.token_to_id(token).ok_or_else(|| {
                Error::new(Kind::Checkpoint, "the tokenizer lacks a token of this family")
                    .expected(token)
                    .help("use the tokenizer that belongs to the checkpoint")
            })
        };
        let (context_id, stop) = (id(IMAGE_CONTEXT)?, id(chat.separator)?);
        let pad_id = config.llm_config.pad_token_id.or(tokenizer.pad_id()).unwrap_or(0);
        Ok(Self { tokenizer, chat, config, context_id, pad_id, stop_ids: vec![stop] })
    }

    /// The same processor with another largest number of tiles.
    #[must_use]
    pub fn with_max_tiles(mut self, max_dynamic_patch: usize) -> Self {
        self.config.max_dynamic_patch = max_dynamic_patch.max(1);
        self
    }

    /// Longest row, image positions included.
    #[must_use]
    pub fn max_length(&self) -> usize {
        self.config.llm_config.max_position_embeddings
    }

    /// The tokenizer.
    #[must_use]
    pub fn tokenizer(&self) -> &SlowTokenizer {
        &self.tokenizer
    }

    /// What the processor was built from.
    #[must_use]
    pub fn config(&self) -> &InternVlConfig {
        &self.config
    }

    /// The chat template.
    #[must_use]
    pub fn chat(&self) -> &MptChat {
        &self.chat
    }

    /// How each of `images` images of one row is cut.
    #[must_use]
    pub fn tiling(&self, images: usize) -> Tiling {
        let max_num = (self.config.max_dynamic_patch / images.max(1)).max(1);
        Tiling {
            image_size: self.config.image_size(),
            min_num: self.config.min_dynamic_patch.min(max_num),
            max_num,
            use_thumbnail: self.config.use_thumbnail,
        }
    }

    /// Tiles of one of `images` images.
    #[must_use]
    pub fn tiles(&self, image: &Rgb8, images: usize) -> Vec<Rgb8> {
        if self.config.dynamic_image_size {
            return self.tiling(images).tiles(image);
        }
        let side = self.config.image_size();
        let square = self.config.pad2square.then(|| to_square(image, PADDING, false));
        vec![resize(square.as_ref().unwrap_or(image), side, side, Filter::Bicubic)]
    }

    /// A tile as the vision tower takes it.
    #[must_use]
    pub fn pixels(&self, tile: &Rgb8) -> Pixels {
        Pixels { data: normalize(tile, 1.0 / 255.0, MEAN, STD), shape: [3, tile.height, tile.width] }
    }

    /// Text that the template or the tokenizer would take for something else.
    fn check_text(&self, text: &str) -> Result<()> {
        match self.tokenizer.added_in(text).next() {
            None => Ok(()),
            Some(token) => Err(Error::new(Kind::Data, "a turn holds a special token of the tokenizer")
                .code("special_token")
                .found(format!("{token:?}"))
                .help("rewrite it in the data, for example with spaces between its characters")),
        }
    }

    /// The row's text with its images expanded, and its pixels.
    fn text(&self, sample: &Sample, answered: bool) -> Result<(String, Vec<usize>, Vec<Pixels>)> {
        let turns = turns(sample, answered)?;
        check_marks(sample, &turns, IMAGE_MARK)?;
        for (i, text) in turns.messages.iter().copied().chain(turns.system.as_deref()).enumerate() {
            self.check_text(text).map_err(|e| e.at(format!("{}, turn {i}", sample.id)))?;
        }
        let mut chat = self.chat.clone();
        if let Some(system) = &turns.system {
            chat.system_message.clone_from(system);
        }
        let mut messages: Vec<&str> = turns.messages.iter().map(|m| chat.training_message(m)).collect();
        if !answered {
            messages.push("");
        }
        let (mut counts, mut pixels) = (Vec::new(), Vec::new());
        for reference in &sample.images {
            let tiles = self.tiles(&image::open(&reference.path)?, sample.images.len());
            counts.push(tiles.len() * self.config.tokens_per_tile());
            pixels.extend(tiles.iter().map(|t| self.pixels(t)));
        }
        Ok((expand_images(&chat.text(messages), &counts), counts, pixels))
    }

    /// Finds the image positions and puts the pad id there.
    fn row(&self, sample: &Sample, ids: Vec<i32>, labels: Vec<i32>, counts: &[usize]) -> Result<Encoded> {
        let positions: Vec<usize> = (0..ids.len()).filter(|i| ids[*i] == self.context_id).collect();
        let mut row = Encoded { id: sample.id.clone(), input_ids: ids, labels, spans: Vec::new(), pixels: Vec::new() };
        let mut rest = positions.as_slice();
        for count in counts {
            let whole = rest.get(count - 1).is_some_and(|last| *last == rest[0] + count - 1);
            if !whole {
                break;
            }
            row.spans.push(ImageSpan { start: rest[0], len: *count });
            rest = &rest[*count..];
        }
        if row.spans.len() != counts.len() || !rest.is_empty() {
            return Err(Error::new(Kind::Data, "the prompt does not hold every image once")
                .code("image_count")
                .at(&row.id)
                .expected(counts.len())
                .found(row.spans.len()));
        }
        for position in positions {
            row.input_ids[position] = self.pad_id;
            row.labels[position] = IGNORE;
        }
        let (length, longest) = (row.input_ids.len(), self.max_length());
        if length > longest {
            return Err(Error::new(Kind::Data, "a row is too long")
                .code("over_long")
                .at(&row.id)
                .expected(format!("at most {longest} positions"))
                .found(format!("{length}, {} of them for images", counts.iter().sum::<usize>()))
                .help("shorten the row, use fewer images, or leave it out"));
        }
        Ok(row)
    }
}

/// The files of a new tokenizer of Phi-3's kind: pieces trained on `texts`, then role and image tokens.
///
/// # Errors
/// As [`train_sentencepiece`].
pub fn train_tokenizer(texts: &[String], vocab_size: usize) -> Result<TokenizerFiles> {
    let added = ROLE_TOKENS.len() + IMAGE_TOKENS.len();
    tokenizer_files(train_sentencepiece(texts, vocab_size.saturating_sub(added))?, &ROLE_TOKENS)
}

/// The files of a tokenizer with as many ids as `llm` has embeddings, most of them fillers.
///
/// # Errors
/// As [`train_sentencepiece`].
pub fn release_tokenizer(llm: &LlmConfig, texts: &[String]) -> Result<TokenizerFiles> {
    let roles: &[&str] = if llm.kind() == Some(LlmKind::InternLm2) { &CHAT_TOKENS } else { &ROLE_TOKENS };
    let pieces = llm.vocab_size.saturating_sub(roles.len() + IMAGE_TOKENS.len());
    tokenizer_files(filled_sentencepiece(texts, pieces)?, roles)
}

fn tokenizer_files(model: Vec<u8>, roles: &[&str]) -> Result<TokenizerFiles> {
    let pieces = SentencePiece::from_bytes(&model)?.len();
    let phi3 = roles == ROLE_TOKENS;
    let end = if phi3 { ROLE_TOKENS[0] } else { "</s>" };
    let token = |content: &str, rstrip: bool| {
        json!({"content": content, "lstrip": false, "normalized": false, "rstrip": rstrip, "single_word": false,
            "special": true})
    };
    let mut decoder = serde_json::Map::new();
    for (id, content) in ["<unk>", "<s>", "</s>"].iter().enumerate() {
        decoder.insert(id.to_string(), token(content, false));
    }
    let rows = roles.iter().map(|t| (t, phi3 && *t != end));
    for (i, (content, rstrip)) in rows.chain(IMAGE_TOKENS.iter().map(|t| (t, false))).enumerate() {
        decoder.insert((pieces + i).to_string(), token(content, rstrip));
    }
    let special = [if phi3 { &[] } else { roles }, &IMAGE_TOKENS].concat();
    let config = json!({
        "add_bos_token": true,
        "add_eos_token": false,
        "added_tokens_decoder": decoder,
        "additional_special_tokens": special,
        "bos_token": "<s>",
        "clean_up_tokenization_spaces": false,
        "eos_token": end,
        "legacy": false,
        "pad_token": end,
        "tokenizer_class": if phi3 { "LlamaTokenizer" } else { "InternLM2Tokenizer" },
        "unk_token": "<unk>",
    });
    Ok(vec![("tokenizer.model", model), ("tokenizer_config.json", json_file(&config)?)])
}

impl Processor for InternVlProcessor {
    fn signature(&self) -> Value {
        let tiling = self.tiling(1);
        json!({
            "family": "internvl",
            "template": self.chat.name,
            "system_message": self.chat.system_message,
            "dynamic_image_size": self.config.dynamic_image_size,
            "image_size": tiling.image_size,
            "min_dynamic_patch": tiling.min_num,
            "max_dynamic_patch": tiling.max_num,
            "use_thumbnail": tiling.use_thumbnail,
            "pad2square": self.config.pad2square,
            "image_mean": MEAN,
            "image_std": STD,
            "tokens_per_tile": self.config.tokens_per_tile(),
            "tokenizer_sha256": self.tokenizer.sha256(),
            "max_length": self.max_length(),
        })
    }

    fn encode(&self, sample: &Sample) -> Result<Encoded> {
        let (text, counts, pixels) = self.text(sample, true)?;
        let ids = self.tokenizer.encode(&text, true);
        let labels = self.chat.labels(&text, &ids, &self.tokenizer, self.pad_id, usize::MAX);
        let mut row = self.row(sample, ids, labels, &counts)?;
        if row.supervised() == 0 {
            return Err(Error::new(Kind::Data, "a row has no supervised token")
                .code("no_supervised")
                .at(&sample.id)
                .found(format!("{} positions, all masked", row.input_ids.len()))
                .help("its turns do not add up to its text; rewrite the row or leave it out"));
        }
        row.pixels = pixels;
        Ok(row)
    }

    fn prompt(&self, sample: &Sample) -> Result<Encoded> {
        let (text, counts, pixels) = self.text(sample, false)?;
        let ids = self.tokenizer.encode(&text, true);
        let labels = vec![IGNORE; ids.len()];
        let mut row = self.row(sample, ids, labels, &counts)?;
        row.pixels = pixels;
        Ok(row)
    }

    fn decode(&self, ids: &[i32]) -> String {
        let end = ids.iter().position(|id| self.stop_ids.contains(id)).unwrap_or(ids.len());
        self.tokenizer.decode(&ids[..end], true).trim().to_string()
    }

    fn piece(&self, id: i32) -> String {
        self.tokenizer.id_to_token(id).map_or_else(|| format!("<{id}>"), |t| t.replace('\u{2581}', " "))
    }

    fn stop_ids(&self) -> &[i32] {
        &self.stop_ids
    }

    fn pad_id(&self) -> i32 {
        self.pad_id
    }

    fn vocab_size(&self) -> usize {
        self.tokenizer.vocab_size()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vlm::{Batch, PaddingSide};

    fn processor() -> InternVlProcessor {
        let dir = tempfile::tempdir().unwrap();
        let texts = vec!["which organ is this? compare the two. it is the liver.".to_string(); 5];
        for (name, bytes) in train_tokenizer(&texts, 600).unwrap() {
            std::fs::write(dir.path().join(name), bytes).unwrap();
        }
        InternVlProcessor::new(SlowTokenizer::load(dir.path()).unwrap(), InternVlConfig::tiny()).unwrap()
    }

    fn sample(sizes: &[(u32, u32)], turns: &[&str], dir: &Path) -> Sample {
        let images: Vec<Value> = sizes
            .iter()
            .enumerate()
            .map(|(i, (w, h))| {
                let path = dir.join(format!("{i}.png"));
                ::image::RgbImage::from_pixel(*w, *h, ::image::Rgb([9, 90, 200])).save(&path).unwrap();
                json!({ "path": path })
            })
            .collect();
        let turns: Vec<Value> = turns
            .iter()
            .enumerate()
            .map(|(i, text)| json!({"role": if i % 2 == 0 { "user" } else { "assistant" }, "text": text}))
            .collect();
        serde_json::from_value(json!({"id": "row-1", "images": images, "turns": turns})).unwrap()
    }

    #[test]
    fn images_become_tiles_and_every_tile_has_its_positions() {
        let (p, dir) = (processor(), tempfile::tempdir().unwrap());
        let tokens = p.config().tokens_per_tile();
        // a square fits one tile; twice as wide takes two and a thumbnail; two images share the largest number of tiles
        type Case<'a> = (&'a [(u32, u32)], &'a [&'a str], &'a [usize]);
        let cases: [Case; 4] = [
            (&[], &["which organ?", "the liver."], &[]),
            (&[(64, 64)], &["<image>\nwhich organ?", "the liver."], &[1]),
            (&[(128, 64)], &["which <image> organ?", "the liver.", "compare.", "it is."], &[3]),
            (&[(128, 64), (64, 256)], &["<image><image> compare", "it is."], &[3, 3]),
        ];
        for (sizes, turns, tiles) in cases {
            let sample = sample(sizes, turns, dir.path());
            let row = p.encode(&sample).unwrap();
            let found: Vec<usize> = row.spans.iter().map(|s| s.len / tokens).collect();
            assert_eq!((found.as_slice(), row.pixels.len()), (tiles, tiles.iter().sum()), "{sizes:?}");
            for span in &row.spans {
                let inside = span.start..span.start + span.len;
                assert!(row.input_ids[inside.clone()].iter().all(|id| *id == p.pad_id()));
                assert!(row.labels[inside].iter().all(|l| *l == IGNORE));
                assert_eq!(p.piece(row.input_ids[span.start - 1]), "<img>");
                assert_eq!(p.piece(row.input_ids[span.start + span.len]), "</img>");
            }
            let supervised: Vec<i32> = row.labels.iter().copied().filter(|l| *l != IGNORE).collect();
            let stops = supervised.iter().filter(|id| p.stop_ids().contains(id)).count();
            assert_eq!(stops, turns.len() / 2, "every answer ends in a stop id");
            let prompt = p.prompt(&sample).unwrap();
            assert!(row.input_ids.starts_with(&prompt.input_ids), "{turns:?}");
            assert_eq!(p.decode(&row.input_ids[prompt.input_ids.len()..]), *turns.last().unwrap());
            let batch = Batch::collate(&[row, prompt], p.pad_id(), PaddingSide::Right, 1);
            assert_eq!(batch.feature_index.len(), batch.pixels.len() * tokens);
        }
    }

    #[test]
    fn rows_that_would_be_misread_are_refused() {
        let (p, dir) = (processor(), tempfile::tempdir().unwrap());
        for (turns, code) in [
            (&["<image> q", "a"], "image_count"),
            (&["q <|end|>", "a"], "special_token"),
            (&["q <IMG_CONTEXT>", "a"], "special_token"),
            (&["q", "<image>"], "image_count"),
        ] {
            assert_eq!(p.encode(&sample(&[], turns, dir.path())).unwrap_err().reason(), code, "{turns:?}");
        }
        let long = "liver ".repeat(3000);
        assert_eq!(p.encode(&sample(&[], &["q", &long], dir.path())).unwrap_err().reason(), "over_long");
    }

    #[test]
    fn a_tokenizer_larger_than_the_model_is_refused() {
        let p = processor();
        let mut config = InternVlConfig::tiny();
        config.llm_config.vocab_size = 50;
        let error = InternVlProcessor::new(p.tokenizer.clone(), config).unwrap_err();
        assert!(error.to_string().contains("more tokens"), "{error}");
    }
}
