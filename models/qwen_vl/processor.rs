//! Host side of Qwen-VL: images, ChatML, label masks.
//!
//! Prompts and masks are the original's, token for token. Where the original acts on marks that a user typed, cuts rows
//! in silence or drops old turns with their images, the marks stay text and the row is an error.

use std::{
    fmt::Write as _,
    path::{Path, PathBuf},
};

use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use super::config::QwenVlConfig;
use crate::{
    error::{Error, Kind, Result},
    image::{self, Rgb8, pad, resize},
    sample::{Role, Sample, Turn},
    text::{
        chat::IMAGE_MARK,
        chatml::{self, DEFAULT_SYSTEM, Labelled},
        grounding,
        qwen::{CHAT_SPECIALS, Element, IMAGE_SPAN, LONGEST_PATH, QwenTokenizer, picture, tags},
        turns::{check_marks, turns},
    },
    vlm::{Encoded, IGNORE, ImageSpan, Pixels, Processor},
};

/// OpenAI's constants, which `visual.py` spells out.
const MEAN: [f32; 3] = [0.481_454_66, 0.457_827_5, 0.408_210_73];
const STD: [f32; 3] = [0.268_629_54, 0.261_302_6, 0.275_777_1];

/// An image file as the input of the vision tower: squeezed to a square, aspect ratio not kept.
///
/// # Shapes
/// `[3, side, side]`
#[must_use]
pub fn pixels(image: &Rgb8, side: usize) -> Pixels {
    let square = resize::resize(image, side, side, resize::Filter::Bicubic);
    Pixels { data: pad::normalize(&square, 1.0 / 255.0, MEAN, STD), shape: [3, side, side] }
}

/// Turns samples into rows for Qwen-VL.
#[derive(Debug)]
pub struct QwenVlProcessor {
    tokenizer: QwenTokenizer,
    tokenizer_sha256: String,
    image_size: usize,
    features: usize,
    /// Longest row to train on: the length the positions were trained for.
    train_length: usize,
    /// Longest prompt.
    prompt_length: usize,
    stop_ids: Vec<i32>,
}

impl QwenVlProcessor {
    /// Reads config and tokenizer of a checkpoint directory.
    ///
    /// # Errors
    /// A missing or unreadable file, or a tokenizer that does not fit the model.
    pub fn load(dir: &Path) -> Result<Self> {
        let config = QwenVlConfig::open(dir)?;
        let path = dir.join("qwen.tiktoken");
        let text = std::fs::read_to_string(&path).map_err(|e| Error::io(&path, e))?;
        Self::new(&text, &config).map_err(|e| {
            Error::new(Kind::Text, "the tokenizer cannot be used with this checkpoint").at(path.display()).source(e)
        })
    }

    /// Puts the parts together; `vocabulary` is the text of `qwen.tiktoken`.
    ///
    /// # Errors
    /// A vocabulary that cannot be parsed, has more ids than the model has embeddings, or puts `<img>` elsewhere than
    /// the config says.
    pub fn new(vocabulary: &str, config: &QwenVlConfig) -> Result<Self> {
        let tokenizer = QwenTokenizer::parse(vocabulary)?.with_image_span(config.visual.n_queries);
        let misfit = |what: &str, expected: String, found: String| {
            Error::new(Kind::Checkpoint, what)
                .expected(expected)
                .found(found)
                .help("use the qwen.tiktoken that belongs to the checkpoint")
        };
        if tokenizer.vocab_size() > config.vocab_size {
            return Err(misfit(
                "the tokenizer has more tokens than the model",
                format!("at most {}, the vocab_size of config.json", config.vocab_size),
                tokenizer.vocab_size().to_string(),
            ));
        }
        if let Some(id) = config.visual.image_start_id.filter(|id| *id != tokenizer.img_start) {
            return Err(misfit(
                "the tokenizer puts <img> elsewhere than the model",
                format!("{id}, visual.image_start_id of config.json"),
                tokenizer.img_start.to_string(),
            ));
        }
        let sha256 = Sha256::digest(vocabulary.as_bytes()).iter().fold(String::new(), |mut hex, byte| {
            let _ = write!(hex, "{byte:02x}");
            hex
        });
        Ok(Self {
            image_size: config.visual.image_size,
            features: config.visual.n_queries,
            train_length: config.seq_length,
            prompt_length: config.max_position_embeddings,
            stop_ids: vec![tokenizer.im_end, tokenizer.eod, tokenizer.im_start],
            tokenizer,
            tokenizer_sha256: sha256,
        })
    }

    /// The tokenizer.
    #[must_use]
    pub fn tokenizer(&self) -> &QwenTokenizer {
        &self.tokenizer
    }

    /// Positions of one image.
    #[must_use]
    pub fn tokens_per_image(&self) -> usize {
        self.features
    }

    /// Checks the turns of a sample and writes its images as `Picture n: <img>path</img>`; the system message is first.
    fn turns(&self, sample: &Sample, answered: bool) -> Result<Vec<Turn>> {
        let found = turns(sample, answered)?;
        check_marks(sample, &found, IMAGE_MARK)?;
        let system = found.system.unwrap_or_else(|| DEFAULT_SYSTEM.to_string());
        let mut all = vec![Turn { role: Role::System, text: system }];
        let mut images = sample.images.iter().enumerate();
        for (i, message) in found.messages.into_iter().enumerate() {
            let at = |e: Error| e.at(format!("{}, turn {i}", sample.id));
            check_text(message).map_err(at)?;
            let mut parts = message.split(IMAGE_MARK);
            let mut text = parts.next().unwrap_or_default().to_string();
            for (part, (number, image)) in parts.zip(&mut images) {
                text.push_str(&picture(number + 1, &self.label(&image.path).map_err(at)?));
                text.push_str(part.strip_prefix('\n').unwrap_or(part));
            }
            let role = if i.is_multiple_of(2) { Role::User } else { Role::Assistant };
            all.push(Turn { role, text });
        }
        Ok(all)
    }

    /// What stands between the image tags. A model with fewer features than the released ones has no room for a path;
    /// the network never sees it anyway.
    fn label(&self, path: &Path) -> Result<String> {
        if self.features != IMAGE_SPAN {
            return Ok(String::new());
        }
        let text = path.to_str().ok_or_else(|| {
            Error::new(Kind::Image, "an image path that is not Unicode").found(path.display()).help("rename the file")
        })?;
        let bytes = crate::text::tiktoken::nfc(text).len();
        if bytes > LONGEST_PATH {
            return Err(Error::new(Kind::Image, "an image path is too long for Qwen-VL")
                .expected(format!("at most {LONGEST_PATH} bytes"))
                .found(format!("{bytes} bytes: {text}"))
                .help("use a shorter path, for example a relative one"));
        }
        Ok(text.to_string())
    }

    /// Finds the image positions of a row and checks its length.
    fn finish(&self, sample: &Sample, row: Labelled, longest: usize) -> Result<Encoded> {
        let starts = row.ids.iter().enumerate().filter(|(_, id)| **id == self.tokenizer.img_start);
        let spans: Vec<ImageSpan> = starts.map(|(i, _)| ImageSpan { start: i + 1, len: self.features }).collect();
        if spans.len() != sample.images.len() {
            return Err(Error::new(Kind::Data, "the prompt does not hold every image once")
                .code("image_count")
                .at(&sample.id)
                .expected(sample.images.len())
                .found(spans.len()));
        }
        if row.ids.len() > longest {
            return Err(Error::new(Kind::Data, "a row is too long")
                .code("over_long")
                .at(&sample.id)
                .expected(format!("at most {longest} positions"))
                .found(format!("{}, {} of them for images", row.ids.len(), spans.len() * self.features))
                .help("shorten the row, use fewer images, or leave it out"));
        }
        let mut labels = row.labels;
        for span in &spans {
            labels[span.start..span.start + span.len].fill(IGNORE);
        }
        let open = |path: &PathBuf| Ok(pixels(&image::open(path)?, self.image_size));
        Ok(Encoded {
            id: sample.id.clone(),
            input_ids: row.ids,
            labels,
            spans,
            pixels: sample.images.iter().map(|i| open(&i.path)).collect::<Result<_>>()?,
        })
    }
}

/// Text that the model would take for an image, and grounding that is not the model's.
fn check_text(text: &str) -> Result<()> {
    if ["<img>", "</img>", "<imgpad>"].iter().any(|tag| text.contains(tag))
        || tags(text)?.iter().any(|e| matches!(e, Element::Image(_)))
    {
        return Err(Error::new(Kind::Data, "a turn holds an image tag of Qwen-VL")
            .code("special_token")
            .help("write <image> where an image belongs and list its path in `images`"));
    }
    grounding::check(text)
}

impl Processor for QwenVlProcessor {
    fn signature(&self) -> Value {
        json!({
            "family": "qwen_vl",
            "template": "chatml",
            "image_size": self.image_size,
            "filter": "bicubic",
            "mean": MEAN,
            "std": STD,
            "tokens_per_image": self.features,
            "tokenizer_sha256": self.tokenizer_sha256,
            "max_length": self.train_length,
        })
    }

    fn encode(&self, sample: &Sample) -> Result<Encoded> {
        let turns = self.turns(sample, true)?;
        let row = chatml::conversation(&self.tokenizer, &turns, CHAT_SPECIALS).map_err(|e| e.at(&sample.id))?;
        self.finish(sample, row, self.train_length)
    }

    fn prompt(&self, sample: &Sample) -> Result<Encoded> {
        let mut turns = self.turns(sample, false)?;
        let query = turns.pop().map(|turn| turn.text).unwrap_or_default();
        let system = turns.remove(0).text;
        let history: Vec<(String, Option<String>)> =
            turns.chunks(2).map(|pair| (pair[0].text.clone(), pair.get(1).map(|a| a.text.clone()))).collect();
        let prompt =
            chatml::prompt(&self.tokenizer, &system, &history, &query, usize::MAX).map_err(|e| e.at(&sample.id))?;
        let labels = vec![IGNORE; prompt.ids.len()];
        self.finish(sample, Labelled { ids: prompt.ids, labels }, self.prompt_length)
    }

    fn decode(&self, ids: &[i32]) -> String {
        let end = ids.iter().position(|id| self.stop_ids.contains(id)).unwrap_or(ids.len());
        self.tokenizer.decode_lossy(&ids[..end]).trim().to_string()
    }

    fn piece(&self, id: i32) -> String {
        self.tokenizer.piece(id)
    }

    fn stop_ids(&self) -> &[i32] {
        &self.stop_ids
    }

    fn pad_id(&self) -> i32 {
        self.tokenizer.eod
    }

    fn vocab_size(&self) -> usize {
        self.tokenizer.vocab_size()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{sample::ImageRef, text::tiktoken};

    fn processor(config: &QwenVlConfig) -> QwenVlProcessor {
        QwenVlProcessor::new(&tiktoken::train(["a normal chest"], 280).unwrap(), config).unwrap()
    }

    fn sample(turns: &[(Role, &str)], images: &[&Path]) -> Sample {
        let turns = turns.iter().map(|(role, text)| Turn { role: *role, text: (*text).to_string() }).collect();
        let images = images.iter().map(|p| ImageRef { path: p.to_path_buf() }).collect();
        Sample {
            id: "row".into(),
            images,
            turns,
            origin: crate::sample::Origin::default(),
            split: crate::sample::Split::Train,
            group: String::new(),
            polarity: None,
            category: None,
            answer_type: None,
            options: Vec::new(),
            annotation: None,
            meta: serde_json::Map::new(),
        }
    }

    fn picture_file(dir: &Path, name: &str) -> PathBuf {
        let path = dir.join(name);
        ::image::RgbImage::from_pixel(9, 5, ::image::Rgb([255, 0, 0])).save(&path).unwrap();
        path
    }

    fn wide() -> QwenVlConfig {
        let mut config = QwenVlConfig::tiny();
        config.visual.n_queries = IMAGE_SPAN;
        config
    }

    #[test]
    fn images_take_their_positions_and_nothing_of_them_is_supervised() {
        let dir = tempfile::tempdir().unwrap();
        let path = picture_file(dir.path(), "a.png");
        let turns = [(Role::User, "<image>\nIs it normal?"), (Role::Assistant, "No.")];
        for config in [QwenVlConfig::tiny(), wide()] {
            let p = processor(&config);
            let row = p.encode(&sample(&turns, &[&path])).unwrap();
            let span = row.spans[0];
            assert_eq!((row.spans.len(), span.len, row.pixels.len()), (1, config.visual.n_queries, 1));
            assert_eq!(row.input_ids[span.start - 1], p.tokenizer.img_start);
            assert_eq!(row.input_ids[span.start + span.len], p.tokenizer.img_end);
            assert!(row.labels[span.start..span.start + span.len].iter().all(|l| *l == IGNORE));
            let answer: Vec<i32> = row.labels.iter().copied().filter(|l| *l != IGNORE).collect();
            assert!(p.tokenizer.decode_lossy(&answer).contains("No."));
            let prompt = p.prompt(&sample(&turns, &[&path])).unwrap();
            assert_eq!(prompt.input_ids, row.input_ids[..prompt.input_ids.len()]);
            assert_eq!(prompt.supervised(), 0);
        }
    }

    #[test]
    fn what_cannot_be_encoded_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = picture_file(dir.path(), "a.png");
        let p = processor(&wide());
        let error =
            |turns: &[(Role, &str)], images: &[&Path]| p.encode(&sample(turns, images)).unwrap_err().to_string();
        let answer = (Role::Assistant, "x");
        assert!(error(&[(Role::User, "q")], &[]).contains("no answer"));
        assert!(error(&[(Role::User, "q"), answer], &[&path]).contains("found 0"));
        assert!(error(&[(Role::User, "<image>q"), answer], &[]).contains("expected 0 marks"));
        assert!(error(&[(Role::User, "<img>a</img>q"), answer], &[]).contains("image tag"));
        assert!(error(&[(Role::User, "<box>(0,0),(1000,9)</box>"), answer], &[]).contains("bad box"));
        assert!(error(&[(Role::User, "q"), (Role::User, "q"), answer], &[]).contains("take turns"));
        let long = PathBuf::from("x".repeat(255));
        assert!(error(&[(Role::User, "<image>q"), answer], &[&long]).contains("255 bytes"));
        let words = "a b ".repeat(600);
        assert!(error(&[(Role::User, &words), answer], &[]).contains("too long"));
    }

    #[test]
    fn a_vocabulary_that_does_not_fit_the_model_is_refused() {
        let file = tiktoken::train(["a"], 256).unwrap();
        let small = QwenVlConfig { vocab_size: 300, ..QwenVlConfig::tiny() };
        assert!(QwenVlProcessor::new(&file, &small).unwrap_err().to_string().contains("more tokens"));
        let mut moved = QwenVlConfig::tiny();
        moved.visual.image_start_id = Some(7);
        assert!(QwenVlProcessor::new(&file, &moved).unwrap_err().to_string().contains("<img>"));
    }

    #[test]
    fn markers_in_a_users_words_stay_text() {
        let p = processor(&QwenVlConfig::tiny());
        let row = p.encode(&sample(&[(Role::User, "<|im_end|>"), (Role::Assistant, "x")], &[])).unwrap();
        assert_eq!(row.input_ids.iter().filter(|id| **id == p.tokenizer.im_end).count(), 3);
        assert_eq!(p.decode(&[p.tokenizer.im_end]), "");
    }
}
