//! Host side: SigLIP's pixels, ChatML, labels on the assistant's words.

use std::path::Path;

use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use tokenizers::{
    AddedToken, Tokenizer,
    decoders::byte_level::ByteLevel,
    models::{
        TrainerWrapper,
        bpe::{BPE, BpeTrainer},
    },
};

use super::SiglipQwen2Config;
use crate::{
    error::{Error, Kind, Result},
    image::{self, Rgb8, pad, resize},
    models::TokenizerFiles,
    sample::Sample,
    text::turns::{Turns, check_marks, turns},
    vlm::{Encoded, IGNORE, ImageSpan, Pixels, Processor},
};

const IMAGE: &str = "<image>";
const SPECIALS: [&str; 4] = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", IMAGE];

/// Turns samples into rows.
#[derive(Debug)]
pub struct SiglipQwen2Processor {
    tokenizer: Tokenizer,
    sha256: String,
    image_size: usize,
    features: usize,
    max_length: usize,
    image_id: i32,
    stop_ids: Vec<i32>,
    pad_id: i32,
}

impl SiglipQwen2Processor {
    /// Reads config and tokenizer of a checkpoint directory.
    ///
    /// # Errors
    /// A missing or unreadable file, or a tokenizer that does not fit the model.
    pub fn load(dir: &Path) -> Result<Self> {
        let config = SiglipQwen2Config::open(dir)?;
        let path = dir.join("tokenizer.json");
        let bytes = std::fs::read(&path).map_err(|e| Error::io(&path, e))?;
        let unreadable = |e| Error::new(Kind::Text, "cannot read the tokenizer").at(path.display()).found(e);
        let tokenizer = Tokenizer::from_bytes(&bytes).map_err(|e| unreadable(e.to_string()))?;
        let id = |text: &str| {
            let id = tokenizer.token_to_id(text).map(|id| id as i32);
            id.ok_or_else(|| Error::new(Kind::Text, "the tokenizer lacks a token").at(path.display()).expected(text))
        };
        let (image_id, vocab_size) = (id(IMAGE)?, tokenizer.get_vocab_size(true));
        if vocab_size > config.text_config.vocab_size || image_id != config.image_token_index {
            return Err(Error::new(Kind::Checkpoint, "the tokenizer does not fit the model")
                .at(path.display())
                .expected(format!(
                    "at most {} tokens, {IMAGE} at {}",
                    config.text_config.vocab_size, config.image_token_index
                ))
                .found(format!("{vocab_size} tokens, {IMAGE} at {image_id}"))
                .help("use the tokenizer.json that belongs to the checkpoint"));
        }
        Ok(Self {
            image_id,
            stop_ids: vec![id("<|im_end|>")?, id("<|endoftext|>")?],
            pad_id: id("<|endoftext|>")?,
            sha256: Sha256::digest(&bytes).iter().map(|b| format!("{b:02x}")).collect(),
            tokenizer,
            image_size: config.vision_config.image_size,
            features: config.tokens_per_image(),
            max_length: config.text_config.max_position_embeddings,
        })
    }

    fn ids(&self, text: &str) -> Result<Vec<i32>> {
        let encoding = self.tokenizer.encode(text, false).map_err(|e| Error::new(Kind::Text, e.to_string()))?;
        Ok(encoding.get_ids().iter().map(|id| *id as i32).collect())
    }

    /// ChatML of the turns: text before each answer and the answers, in turn, as ids with a flag "supervised".
    fn segments(&self, turns: &Turns<'_>) -> Result<Vec<(Vec<i32>, bool)>> {
        let mut out = Vec::new();
        let mut text = String::new();
        if let Some(system) = &turns.system {
            text.push_str(&format!("<|im_start|>system\n{system}<|im_end|>\n"));
        }
        for (i, message) in turns.messages.iter().enumerate() {
            if i.is_multiple_of(2) {
                let message = message.replace(IMAGE, &IMAGE.repeat(self.features));
                text.push_str(&format!("<|im_start|>user\n{message}<|im_end|>\n<|im_start|>assistant\n"));
                out.push((self.ids(&text)?, false));
            } else {
                out.push((self.ids(&format!("{message}<|im_end|>"))?, true));
                text = "\n".into();
            }
        }
        if turns.messages.len().is_multiple_of(2) {
            out.push((self.ids(&text)?, false));
        }
        Ok(out)
    }

    fn row(&self, sample: &Sample, answered: bool) -> Result<Encoded> {
        let turns = turns(sample, answered)?;
        check_marks(sample, &turns, IMAGE)?;
        let (mut input_ids, mut labels) = (Vec::new(), Vec::new());
        for (ids, supervised) in self.segments(&turns)? {
            labels.extend(ids.iter().map(|id| if supervised && answered { *id } else { IGNORE }));
            input_ids.extend(ids);
        }
        if input_ids.len() > self.max_length {
            return Err(Error::new(Kind::Data, "a row is too long")
                .at(&sample.id)
                .expected(format!("at most {} positions", self.max_length))
                .found(input_ids.len())
                .help("shorten the row, or leave it out"));
        }
        let firsts = input_ids.iter().enumerate().filter(|(_, id)| **id == self.image_id).map(|(i, _)| i);
        let spans = firsts.step_by(self.features).map(|start| ImageSpan { start, len: self.features }).collect();
        let open = |image: &crate::sample::ImageRef| Ok(self.pixels(&image::open(&image.path)?));
        let pixels = sample.images.iter().map(open).collect::<Result<_>>()?;
        Ok(Encoded { id: sample.id.clone(), input_ids, labels, spans, pixels })
    }

    /// An image as the input of the tower: squeezed to a square.
    #[must_use]
    pub fn pixels(&self, image: &Rgb8) -> Pixels {
        let side = self.image_size;
        let square = resize::resize(image, side, side, resize::Filter::Bicubic);
        Pixels { data: pad::normalize(&square, 1.0 / 255.0, [0.5; 3], [0.5; 3]), shape: [3, side, side] }
    }
}

impl Processor for SiglipQwen2Processor {
    fn signature(&self) -> Value {
        json!({
            "family": "siglip_qwen2",
            "template": "chatml",
            "image_size": self.image_size,
            "filter": "bicubic",
            "tokens_per_image": self.features,
            "tokenizer_sha256": self.sha256,
        })
    }

    fn encode(&self, sample: &Sample) -> Result<Encoded> {
        self.row(sample, true)
    }

    fn prompt(&self, sample: &Sample) -> Result<Encoded> {
        self.row(sample, false)
    }

    fn decode(&self, ids: &[i32]) -> String {
        let ids: Vec<u32> = ids.iter().map(|id| *id as u32).collect();
        self.tokenizer.decode(&ids, true).unwrap_or_default().trim().to_string()
    }

    fn piece(&self, id: i32) -> String {
        self.tokenizer.decode(&[id as u32], false).unwrap_or_default()
    }

    fn stop_ids(&self) -> &[i32] {
        &self.stop_ids
    }

    fn pad_id(&self) -> i32 {
        self.pad_id
    }

    fn vocab_size(&self) -> usize {
        self.tokenizer.get_vocab_size(true)
    }
}

/// Trains a byte-level BPE tokenizer; the special tokens come first.
///
/// # Errors
/// The tokenizer library refuses the texts.
pub fn train_tokenizer(texts: &[String], vocab_size: usize) -> Result<TokenizerFiles> {
    let refused = |e: tokenizers::Error| Error::new(Kind::Text, "cannot train a tokenizer").found(e.to_string());
    let mut tokenizer = Tokenizer::new(BPE::default());
    tokenizer.with_pre_tokenizer(Some(ByteLevel::default().add_prefix_space(false)));
    tokenizer.with_decoder(Some(ByteLevel::default()));
    let specials = SPECIALS.map(|text| AddedToken::from(text, true));
    let trainer = BpeTrainer::builder()
        .vocab_size(vocab_size)
        .show_progress(false)
        .special_tokens(specials.to_vec())
        .initial_alphabet(ByteLevel::alphabet().into_iter().collect())
        .build();
    let mut trainer = TrainerWrapper::from(trainer);
    tokenizer.train(&mut trainer, texts.iter()).map_err(refused)?;
    let text = tokenizer.to_string(false).map_err(refused)?;
    Ok(vec![("tokenizer.json", text.into_bytes())])
}
