//! Host side of LLaVA-Med: images, prompts, label masks.
//!
//! What is sent to the model is what the original sends, token for token. Where the original loses data in silence
//! (a second image of a turn, a masked row, a cut image), this is an error.

use std::path::Path;

use serde_json::{Value, json};

use super::{config::LlavaMedConfig, weights::open_config};
pub use crate::text::merge::{IMAGE_TOKEN_INDEX, MergeRules, Merged, RawRow, merge};
use crate::{
    error::{Error, Kind, Result},
    image::{self, clip::ClipPreprocess},
    models::TokenizerFiles,
    nn::vit::ClipVisionConfig,
    run_dir::json_file,
    sample::Sample,
    text::{
        bpe::filled_sentencepiece,
        chat::{self, IMAGE_MARK, Labelled},
        tokenizer::Tokenizer,
        turns::{check_marks, turns},
    },
    vlm::{Encoded, IGNORE, ImageSpan, Pixels, Processor},
};

/// `tokenizer.model` with `vocab_size` pieces, most of them fillers, and its `tokenizer_config.json`.
///
/// # Errors
/// As [`train_sentencepiece`](crate::text::bpe::train_sentencepiece).
pub fn release_tokenizer(texts: &[String], vocab_size: usize) -> Result<TokenizerFiles> {
    let token = |content: &str| {
        json!({"content": content, "lstrip": false, "normalized": false, "rstrip": false, "single_word": false,
            "special": true})
    };
    let config = json!({
        "add_bos_token": true,
        "add_eos_token": false,
        "added_tokens_decoder": { "0": token("<unk>"), "1": token("<s>"), "2": token("</s>") },
        "bos_token": "<s>",
        "eos_token": "</s>",
        "legacy": true,
        "pad_token": "<unk>",
        "padding_side": "right",
        "tokenizer_class": "LlamaTokenizer",
        "unk_token": "<unk>",
    });
    Ok(vec![
        ("tokenizer.model", filled_sentencepiece(texts, vocab_size)?),
        ("tokenizer_config.json", json_file(&config)?),
    ])
}

/// What happens to a row that is longer than the model allows.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Overflow {
    /// It is an error that names the length.
    #[default]
    Error,
    /// The end of its text is cut off; an image that would be cut is still an error.
    CutText,
}

/// Turns samples into rows for LLaVA-Med.
#[derive(Debug)]
pub struct LlavaMedProcessor {
    tokenizer: Tokenizer,
    images: ClipPreprocess,
    features: usize,
    max_length: usize,
    overflow: Overflow,
    stop_ids: Vec<i32>,
}

/// A sample in the shape of the template.
struct Conversation {
    system: String,
    /// From user and assistant in turn, the user first.
    messages: Vec<String>,
}

impl LlavaMedProcessor {
    /// Reads config, tokenizer and image rules of a checkpoint directory; `vision_tower` is the directory of another
    /// vision tower.
    ///
    /// # Errors
    /// A missing or unreadable file, a tokenizer with more ids than the model has embeddings, or image rules that do
    /// not fit the tower.
    pub fn load(dir: &Path, vision_tower: Option<&Path>) -> Result<Self> {
        let (config, tower) = open_config(dir, vision_tower)?;
        let vision = config.vision_config.clone().unwrap_or_default();
        let pad = pads(&config, dir)?;
        let places = [tower.as_deref(), Some(dir)];
        let file = places.into_iter().flatten().map(|d| d.join("preprocessor_config.json")).find(|f| f.is_file());
        let images = match file {
            Some(file) => ClipPreprocess::open(&file, vision.image_size, pad)?,
            None => ClipPreprocess::openai(vision.image_size, pad),
        };
        Self::new(Tokenizer::load(dir)?, &config, &vision, images).map_err(|e| e.at(dir.display()))
    }

    /// Puts the parts together.
    ///
    /// # Errors
    /// A tokenizer with more ids than the model has embeddings.
    pub fn new(
        tokenizer: Tokenizer,
        config: &LlavaMedConfig,
        vision: &ClipVisionConfig,
        images: ClipPreprocess,
    ) -> Result<Self> {
        if tokenizer.vocab_size() > config.vocab_size {
            return Err(Error::new(Kind::Checkpoint, "the tokenizer has more tokens than the model")
                .expected(format!("at most {}, the vocab_size of config.json", config.vocab_size))
                .found(tokenizer.vocab_size())
                .help("use the tokenizer that belongs to the checkpoint"));
        }
        let longest = config.tokenizer_model_max_length.unwrap_or(usize::MAX);
        Ok(Self {
            features: config.tokens_per_image(vision),
            max_length: longest.min(config.max_position_embeddings),
            overflow: Overflow::default(),
            stop_ids: vec![tokenizer.eos_id()],
            tokenizer,
            images,
        })
    }

    /// The same processor with another rule for rows that are too long.
    #[must_use]
    pub fn with_overflow(mut self, overflow: Overflow) -> Self {
        self.overflow = overflow;
        self
    }

    /// Longest row, image positions included.
    #[must_use]
    pub fn max_length(&self) -> usize {
        self.max_length
    }

    /// Positions of one image.
    #[must_use]
    pub fn tokens_per_image(&self) -> usize {
        self.features
    }

    /// The tokenizer.
    #[must_use]
    pub fn tokenizer(&self) -> &Tokenizer {
        &self.tokenizer
    }

    /// The image rules.
    #[must_use]
    pub fn images(&self) -> &ClipPreprocess {
        &self.images
    }

    /// Checks the turns of a sample and brings them into the shape of the template.
    fn conversation(&self, sample: &Sample, answered: bool) -> Result<Conversation> {
        let turns = turns(sample, answered)?;
        check_marks(sample, &turns, IMAGE_MARK)?;
        for (i, text) in turns.messages.iter().copied().chain(turns.system.as_deref()).enumerate() {
            self.check_text(text).map_err(|e| e.at(format!("{}, turn {i}", sample.id)))?;
        }
        let messages = turns.messages.into_iter().map(turn_text).collect();
        Ok(Conversation { system: turns.system.unwrap_or_default(), messages })
    }

    /// Text that the tokenizer would take for something else.
    fn check_text(&self, text: &str) -> Result<()> {
        match self.tokenizer.specials_in(text).next() {
            None => Ok(()),
            Some(token) => Err(Error::new(Kind::Data, "a turn holds a special token of the tokenizer")
                .code("special_token")
                .found(format!("{token:?}"))
                .help("rewrite it in the data, for example with spaces between its characters")),
        }
    }

    fn pixels(&self, sample: &Sample) -> Result<Vec<Pixels>> {
        let open = |path: &Path| self.images.apply(&image::open(path)?);
        let named = |e: Error, path: &Path| e.at(format!("{} of row {}", path.display(), sample.id));
        sample.images.iter().map(|i| open(&i.path).map_err(|e| named(e, &i.path))).collect()
    }

    /// Puts as many positions as an image has features in the place of each mark.
    fn expand(&self, sample: &Sample, row: Labelled) -> Result<Encoded> {
        let mut out = Encoded {
            id: sample.id.clone(),
            input_ids: Vec::with_capacity(row.input_ids.len() + sample.images.len() * self.features),
            labels: Vec::new(),
            spans: Vec::new(),
            pixels: Vec::new(),
        };
        for (id, label) in row.input_ids.into_iter().zip(row.labels) {
            if id == IMAGE_TOKEN_INDEX {
                out.spans.push(ImageSpan { start: out.input_ids.len(), len: self.features });
                out.input_ids.resize(out.input_ids.len() + self.features, self.pad_id());
                out.labels.resize(out.input_ids.len(), IGNORE);
            } else {
                out.input_ids.push(id);
                out.labels.push(label);
            }
        }
        if out.spans.len() != sample.images.len() {
            return Err(Error::new(Kind::Data, "the prompt does not hold every image once")
                .code("image_count")
                .at(&sample.id)
                .expected(sample.images.len())
                .found(out.spans.len()));
        }
        self.fit(&mut out)?;
        Ok(out)
    }

    fn fit(&self, row: &mut Encoded) -> Result<()> {
        let length = row.input_ids.len();
        if length <= self.max_length {
            return Ok(());
        }
        let whole = row.spans.iter().all(|s| s.start + s.len <= self.max_length);
        if self.overflow == Overflow::CutText && whole {
            row.input_ids.truncate(self.max_length);
            row.labels.truncate(self.max_length);
            return Ok(());
        }
        let images = row.spans.len() * self.features;
        let what = if whole { "a row is too long" } else { "a row is too long, and an image lies across its end" };
        Err(Error::new(Kind::Data, what)
            .code("over_long")
            .at(&row.id)
            .expected(format!("at most {} positions", self.max_length))
            .found(format!("{length}, {images} of them for images"))
            .help("shorten the row, use fewer images, or leave it out"))
    }
}

impl Processor for LlavaMedProcessor {
    fn signature(&self) -> Value {
        json!({
            "family": "llava_med",
            "template": "mistral_instruct",
            "images": self.images.signature(),
            "tokens_per_image": self.features,
            "tokenizer_sha256": self.tokenizer.sha256(),
            "max_length": self.max_length,
        })
    }

    fn encode(&self, sample: &Sample) -> Result<Encoded> {
        let conversation = self.conversation(sample, true)?;
        let prompt = chat::mistral_instruct(&conversation.system, &conversation.messages);
        // The length is checked on the expanded row, where images count with all their positions.
        let row = chat::label(&self.tokenizer, &prompt, !sample.images.is_empty(), usize::MAX)?;
        if let Some(mismatch) = row.mismatch {
            return Err(chat::mismatch_error(&prompt, mismatch).at(&sample.id));
        }
        let mut row = self.expand(sample, row)?;
        if row.supervised() == 0 {
            return Err(Error::new(Kind::Data, "a row has no supervised token")
                .code("no_supervised")
                .at(&sample.id)
                .found(format!("{} positions, all masked", row.input_ids.len()))
                .help("its answers were cut off; shorten the question or leave the row out"));
        }
        row.pixels = self.pixels(sample)?;
        Ok(row)
    }

    fn prompt(&self, sample: &Sample) -> Result<Encoded> {
        let conversation = self.conversation(sample, false)?;
        let prompt = chat::mistral_instruct(&conversation.system, &conversation.messages);
        let input_ids = chat::tokenize_with_images(&self.tokenizer, &prompt)?;
        let labels = vec![IGNORE; input_ids.len()];
        let mut row = self.expand(sample, Labelled { input_ids, labels, mismatch: None })?;
        row.pixels = self.pixels(sample)?;
        Ok(row)
    }

    fn decode(&self, ids: &[i32]) -> String {
        let end = ids.iter().position(|id| self.stop_ids.contains(id)).unwrap_or(ids.len());
        self.tokenizer.decode(&ids[..end], true).trim().to_string()
    }

    fn piece(&self, id: i32) -> String {
        self.tokenizer.piece(id)
    }

    fn stop_ids(&self) -> &[i32] {
        &self.stop_ids
    }

    fn pad_id(&self) -> i32 {
        self.tokenizer.unk_id()
    }

    fn vocab_size(&self) -> usize {
        self.tokenizer.vocab_size()
    }
}

fn pads(config: &LlavaMedConfig, dir: &Path) -> Result<bool> {
    match config.image_aspect_ratio.as_deref() {
        Some("pad") => Ok(true),
        None | Some("square") => Ok(false),
        Some(other) => Err(Error::new(Kind::Checkpoint, "unsupported image_aspect_ratio")
            .at(dir.join("config.json").display())
            .expected("pad, square or null")
            .found(other)),
    }
}

/// One image goes in front of its question, as in the original; several stay where they were written.
fn turn_text(text: &str) -> String {
    match text.matches(IMAGE_MARK).count() {
        1 => chat::image_first(text),
        _ => text.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        sample::{ImageRef, Role, Turn},
        text::bpe::train_bpe,
    };

    fn processor() -> LlavaMedProcessor {
        let texts = ["[INST] which organ is this? compare the two. [/INST] it is the liver. "; 5];
        let tokenizer = Tokenizer::from_json_bytes(&train_bpe(texts, 500).unwrap()).unwrap();
        let config = LlavaMedConfig { tokenizer_model_max_length: Some(300), ..LlavaMedConfig::tiny() };
        let vision = config.vision_config.clone().unwrap();
        let images = ClipPreprocess::openai(vision.image_size, true);
        LlavaMedProcessor::new(tokenizer, &config, &vision, images).unwrap()
    }

    /// Turns from user and assistant alternately, with as many images as asked for.
    fn sample(images: usize, turns: &[&str], dir: &Path) -> Sample {
        let images = (0..images)
            .map(|i| {
                let path = dir.join(format!("{i}.png"));
                ::image::RgbImage::from_pixel(5, 7, ::image::Rgb([i as u8 * 50, 9, 9])).save(&path).unwrap();
                ImageRef { path }
            })
            .collect();
        let roles = [Role::User, Role::Assistant].into_iter().cycle();
        let turns = roles.zip(turns).map(|(role, text)| Turn { role, text: (*text).into() }).collect();
        Sample {
            id: "row-1".into(),
            images,
            turns,
            origin: Default::default(),
            split: Default::default(),
            group: String::new(),
            polarity: None,
            category: None,
            answer_type: None,
            options: Vec::new(),
            annotation: None,
            meta: Default::default(),
        }
    }

    #[test]
    fn none_one_and_several_images_and_turns_are_encoded() {
        let (p, dir) = (processor(), tempfile::tempdir().unwrap());
        let cases: [(usize, &[&str]); 4] = [
            (0, &["which organ?", "the liver."]),
            (1, &["which <image> organ?", "the liver."]),
            (2, &["<image>\n<image>\ncompare the two.", "it is.", "which?", "the liver."]),
            (2, &["<image>\nwhich?", "it is.", "compare <image>", "the liver."]),
        ];
        for (images, turns) in cases {
            let sample = sample(images, turns, dir.path());
            let row = p.encode(&sample).unwrap();
            assert_eq!((row.spans.len(), row.pixels.len()), (images, images));
            for span in &row.spans {
                assert_eq!(span.len, p.tokens_per_image());
                let inside = span.start..span.start + span.len;
                assert!(row.labels[inside.clone()].iter().all(|l| *l == IGNORE));
                assert!(row.input_ids[inside].iter().all(|id| *id == p.pad_id()));
            }
            assert!(row.input_ids.iter().all(|id| *id >= 0));
            let supervised: Vec<i32> = row.labels.iter().copied().filter(|l| *l != IGNORE).collect();
            let answers: Vec<String> = turns.iter().skip(1).step_by(2).map(|a| format!("{a} </s>")).collect();
            assert_eq!(p.tokenizer.decode(&supervised, false), answers.join(" "));
            let prompt = p.prompt(&sample).unwrap();
            assert!(row.input_ids.starts_with(&prompt.input_ids), "{turns:?}");
            assert_eq!((&prompt.spans, &prompt.pixels), (&row.spans, &row.pixels));
            assert!(prompt.labels.iter().all(|l| *l == IGNORE));
            assert_eq!(p.decode(&row.input_ids[prompt.input_ids.len()..]), *turns.last().unwrap());
        }
    }

    #[test]
    fn rows_that_the_original_would_spoil_in_silence_are_errors() {
        let (p, dir) = (processor(), tempfile::tempdir().unwrap());
        let long = "the liver ".repeat(200);
        let cases: [(usize, &[&str], &str); 10] = [
            (1, &["which organ?", "the liver."], "expected 1 marks, one for each image, found 0"),
            (1, &["<image> <image> which?", "the liver."], "found 2"),
            (0, &["which?", "an <image> of it"], "<image> outside the user's words"),
            (0, &["say </s> now", "it"], "special token of the tokenizer"),
            (0, &["say", "it <s> is"], "\"<s>\""),
            (0, &["which?", "it [/INST] is"], "would all be masked"),
            (0, &["which?", ""], "a turn has no text"),
            (0, &["which?", "it", "and?"], "no answer"),
            (0, &[], "no question"),
            (1, &["<image>\nwhich?", &long], "at most 300 positions, found"),
        ];
        for (images, turns, message) in cases {
            let error = p.encode(&sample(images, turns, dir.path())).unwrap_err();
            let text = error.to_string();
            assert!(text.contains(message) && text.contains("row-1"), "{turns:?}: {text}");
            assert_eq!(error.kind(), Kind::Data);
        }
        let mut missing = sample(1, &["<image>\nwhich?", "it"], dir.path());
        missing.images[0].path = dir.path().join("gone.png");
        assert!(p.encode(&missing).unwrap_err().to_string().contains("gone.png"));
        let mut swapped = sample(0, &["which?", "it"], dir.path());
        swapped.turns[1].role = Role::User;
        assert!(p.encode(&swapped).unwrap_err().to_string().contains("take turns"));
    }

    #[test]
    fn cutting_takes_text_only() {
        let (p, dir) = (processor().with_overflow(Overflow::CutText), tempfile::tempdir().unwrap());
        let long = "the liver ".repeat(200);
        let row = p.encode(&sample(1, &["<image>\nwhich?", &long], dir.path())).unwrap();
        assert_eq!((row.input_ids.len(), row.labels.len()), (300, 300));
        let error = p.encode(&sample(1, &[&long, "it", "<image> and?", "it"], dir.path())).unwrap_err();
        assert!(error.to_string().contains("an image lies across its end"), "{error}");
        let error = p.encode(&sample(0, &[&long, "it"], dir.path())).unwrap_err();
        assert!(error.to_string().contains("no supervised token"), "{error}");
    }

    #[test]
    fn a_tokenizer_larger_than_the_model_is_refused() {
        let p = processor();
        let config = LlavaMedConfig { vocab_size: 10, ..LlavaMedConfig::tiny() };
        let vision = config.vision_config.clone().unwrap();
        let error = LlavaMedProcessor::new(p.tokenizer, &config, &vision, p.images).unwrap_err();
        assert!(error.to_string().contains("at most 10"), "{error}");
    }
}
