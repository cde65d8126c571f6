//! What a model family offers to the rest of the program: a processor on the host, and a network in three towers.
//!
//! A [`Processor`] turns a [`Sample`] into an [`Encoded`] row whose token sequence is already expanded: every image
//! takes exactly as many positions as it has features, and those positions are listed. So batching, padding, loss and
//! decoding are the same for every family. A [`Vlm`] is driven in pieces (vision, projector, embedding, decoder layers,
//! head), so that one trainer can recompute any family layer by layer.

use std::{borrow::Cow, sync::Arc};

use burn::tensor::{Device, Int, Tensor, TensorData};

use crate::{
    error::{Error, Kind, Result},
    nn::{
        attention::Columns,
        cast,
        decoder::{DecoderContext, LayerCache},
    },
    sample::Sample,
};

/// Label of a position that takes no part in the loss.
pub const IGNORE: i32 = -100;

/// Part of a model that is frozen, adapted or trained as one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Tower {
    /// `vision`, `projector` or `language`.
    pub name: &'static str,
    /// Prefix of its parameter names, for example `model.vision_tower.`; a parameter belongs to the tower with the
    /// longest prefix that fits, so the language tower may have the empty one.
    pub prefix: &'static str,
}

impl Tower {
    /// The tower among `towers` that a parameter belongs to.
    #[must_use]
    pub fn of<'a>(towers: &'a [Self], parameter: &str) -> Option<&'a Self> {
        towers.iter().filter(|t| parameter.starts_with(t.prefix)).max_by_key(|t| t.prefix.len())
    }
}

/// One image tile, ready for the vision tower.
#[derive(Debug, Clone, PartialEq)]
pub struct Pixels {
    /// Row-major `[channels, height, width]`, normalised.
    pub data: Vec<f32>,
    /// `[channels, height, width]`.
    pub shape: [usize; 3],
}

/// Positions of one image in an expanded sequence.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ImageSpan {
    /// First position.
    pub start: usize,
    /// Number of positions, equal to the number of features of its tiles.
    pub len: usize,
}

/// One row in host memory: expanded tokens, labels, pixels.
#[derive(Debug, Clone, PartialEq)]
pub struct Encoded {
    /// Id of the sample.
    pub id: String,
    /// Token ids, image positions filled with the pad id.
    pub input_ids: Vec<i32>,
    /// Unshifted labels, [`IGNORE`] where nothing is supervised.
    pub labels: Vec<i32>,
    /// Where the images are, in order.
    pub spans: Vec<ImageSpan>,
    /// Tiles of all images, in order.
    pub pixels: Vec<Pixels>,
}

impl Encoded {
    /// Positions whose label is predicted by an earlier position.
    #[must_use]
    pub fn supervised(&self) -> usize {
        self.labels.iter().skip(1).filter(|l| **l != IGNORE).count()
    }
}

/// Host side of a model family: images, text, labels.
pub trait Processor: Send + Sync {
    /// Everything that decides how an input becomes numbers (sizes, means, template, tokenizer hash), as JSON.
    /// Hashed into adapters.
    fn signature(&self) -> serde_json::Value;

    /// Encodes a whole conversation with labels on the assistant's words.
    ///
    /// # Errors
    /// An unreadable image, a number of `<image>` marks unequal to the number of images, no supervised token, or a row
    /// longer than the model allows.
    fn encode(&self, sample: &Sample) -> Result<Encoded>;

    /// Encodes the conversation up to the last assistant turn, which is left out; labels are all [`IGNORE`].
    ///
    /// # Errors
    /// As [`Processor::encode`], except for labels.
    fn prompt(&self, sample: &Sample) -> Result<Encoded>;

    /// Text of generated ids, special tokens removed, trimmed.
    fn decode(&self, ids: &[i32]) -> String;

    /// Text of one id, special tokens kept, for `data show`.
    fn piece(&self, id: i32) -> String;

    /// Ids that end an answer.
    fn stop_ids(&self) -> &[i32];

    /// Id that fills padded positions.
    fn pad_id(&self) -> i32;

    /// Number of token ids the tokenizer knows.
    fn vocab_size(&self) -> usize;
}

/// Side on which short rows are filled.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PaddingSide {
    /// Filler before the tokens; for generation.
    Left,
    /// Filler after the tokens; for training.
    Right,
}

/// Rows padded to one length, in host memory. A row holds one sample, or several one after the other that do not see
/// each other.
#[derive(Debug, Clone, PartialEq)]
pub struct Batch {
    /// Ids of the samples, in order.
    pub ids: Vec<String>,
    /// `[rows, length]`, row-major.
    pub input_ids: Vec<i32>,
    /// `[rows, length]`, unshifted, [`IGNORE`] at padding.
    pub labels: Vec<i32>,
    /// `[rows, length]`, true at real tokens.
    pub mask: Vec<bool>,
    /// `[rows, length]`, position of each token within its sample, 0 at padding.
    pub positions: Vec<i32>,
    /// `[rows, length]`, index of each token's sample in `ids`, -1 at padding.
    pub segments: Vec<i32>,
    /// Flat indices (row * length + position) that take image features, in the order of the features.
    pub feature_index: Vec<i32>,
    /// Tiles of all rows.
    pub pixels: Vec<Pixels>,
    /// Number of rows.
    pub rows: usize,
    /// Padded length.
    pub length: usize,
}

/// [`Batch::segments`] where every row is one sample: `mask` is true at real tokens of rows of `length` cells.
#[must_use]
pub fn row_segments(mask: &[bool], length: usize) -> Vec<i32> {
    let rows = mask.chunks(length.max(1)).zip(0..);
    rows.flat_map(|(row, number)| row.iter().map(move |real| if *real { number } else { -1 })).collect()
}

impl Batch {
    /// Pads `rows` to the longest, rounded up to a multiple of `multiple`.
    #[must_use]
    pub fn collate(rows: &[Encoded], pad_id: i32, side: PaddingSide, multiple: usize) -> Self {
        Self::pack(&rows.chunks(1).collect::<Vec<_>>(), pad_id, side, multiple)
    }

    /// Puts the samples of each of `rows` one after the other, and pads the rows to the longest, rounded up to a multiple
    /// of `multiple`. Positions start again with every sample, and no sample predicts the first token of the next.
    #[must_use]
    pub fn pack(rows: &[&[Encoded]], pad_id: i32, side: PaddingSide, multiple: usize) -> Self {
        let filled = |row: &[Encoded]| row.iter().map(|r| r.input_ids.len()).sum::<usize>();
        let longest = rows.iter().map(|row| filled(row)).max().unwrap_or(0);
        let length = longest.div_ceil(multiple.max(1)) * multiple.max(1);
        let cells = rows.len() * length;
        let samples = || rows.iter().copied().flatten();
        let mut batch = Self {
            ids: samples().map(|r| r.id.clone()).collect(),
            input_ids: vec![pad_id; cells],
            labels: vec![IGNORE; cells],
            mask: vec![false; cells],
            positions: vec![0; cells],
            segments: vec![-1; cells],
            feature_index: Vec::new(),
            pixels: samples().flat_map(|r| r.pixels.iter().cloned()).collect(),
            rows: rows.len(),
            length,
        };
        let mut sample = 0;
        for (i, row) in rows.iter().enumerate() {
            let mut start = i * length + if side == PaddingSide::Left { length - filled(row) } else { 0 };
            for (k, part) in row.iter().enumerate() {
                batch.place(part, sample, start, k > 0);
                start += part.input_ids.len();
                sample += 1;
            }
        }
        batch
    }

    /// Writes sample number `number` to the cells from `start` on; `behind` another one, its first token is no target.
    fn place(&mut self, row: &Encoded, number: i32, start: usize, behind: bool) {
        let cells = start..start + row.input_ids.len();
        self.input_ids[cells.clone()].copy_from_slice(&row.input_ids);
        self.labels[cells.clone()].copy_from_slice(&row.labels);
        if behind && !row.labels.is_empty() {
            self.labels[start] = IGNORE;
        }
        self.mask[cells.clone()].fill(true);
        self.segments[cells.clone()].fill(number);
        for (p, k) in self.positions[cells].iter_mut().zip(0..) {
            *p = k;
        }
        for span in &row.spans {
            self.feature_index.extend((0..span.len).map(|k| (start + span.start + k) as i32));
        }
    }

    /// Id of the sample that cell `cell` (row * length + position) belongs to; none for padding.
    #[must_use]
    pub fn id_at(&self, cell: usize) -> Option<&str> {
        let sample = usize::try_from(*self.segments.get(cell)?).ok()?;
        self.ids.get(sample).map(String::as_str)
    }

    /// Where the tokens are, for masks and positions.
    #[must_use]
    pub fn columns(&self) -> Columns {
        Columns {
            rows: self.rows,
            length: self.length,
            positions: self.positions.clone(),
            keys: self.length,
            start: 0,
            prefill: self.length,
            mask: self.mask.clone(),
            segments: (self.ids.len() > self.rows).then(|| Arc::from(self.segments.as_slice())),
        }
    }

    /// Checks that there is a position for every image feature, `tile_features` of them a tile.
    ///
    /// # Errors
    /// There are more or fewer.
    pub fn check_features(&self, tile_features: usize) -> Result<()> {
        let (features, positions) = (self.pixels.len() * tile_features, self.feature_index.len());
        if features == positions {
            return Ok(());
        }
        Err(Error::new(Kind::Data, "a batch has another number of image features than of image positions")
            .code("image_count")
            .at(self.ids.join(", "))
            .expected(positions)
            .found(features))
    }

    /// Supervised positions of the batch.
    #[must_use]
    pub fn supervised(&self) -> usize {
        (0..self.rows)
            .map(|r| self.labels[r * self.length + 1..(r + 1) * self.length].iter().filter(|l| **l != IGNORE).count())
            .sum()
    }

    /// Real tokens of the batch.
    #[must_use]
    pub fn tokens(&self) -> usize {
        self.mask.iter().filter(|m| **m).count()
    }

    /// Token ids on `device`.
    ///
    /// # Shapes
    /// `[rows, length]`
    #[must_use]
    pub fn input_ids(&self, device: &Device) -> Tensor<2, Int> {
        Tensor::from_data(TensorData::new(self.input_ids.clone(), [self.rows, self.length]), device)
    }

    /// Pixels of all tiles on `device`; none if the batch has no image.
    ///
    /// # Shapes
    /// `[tiles, channels, height, width]`
    #[must_use]
    pub fn pixels(&self, device: &Device) -> Option<Tensor<4>> {
        let [c, h, w] = self.pixels.first()?.shape;
        let mut data = Vec::with_capacity(self.pixels.len() * c * h * w);
        for p in &self.pixels {
            data.extend_from_slice(&p.data);
        }
        Some(Tensor::from_data(TensorData::new(data, [self.pixels.len(), c, h, w]), device))
    }
}

/// A vision-language model, in the pieces that training and generation drive.
///
/// No method decides about gradients: a caller that wants none passes the model through `valid()` and tensors without
/// autodiff.
pub trait Vlm {
    /// Vision, projector and language parts.
    fn towers(&self) -> &'static [Tower];

    /// Features of the vision tower, before the projector.
    ///
    /// # Shapes
    /// `[tiles, channels, height, width]` -> `[tiles, patches, vision_width]`
    fn vision(&self, pixels: Tensor<4>) -> Tensor<3>;

    /// Maps vision features into the decoder's width.
    ///
    /// # Shapes
    /// `[tiles, patches, vision_width]` -> `[tiles, features, hidden_size]`
    fn project(&self, features: Tensor<3>) -> Tensor<3>;

    /// Features of one tile.
    fn tile_features(&self) -> usize;

    /// Positions of one tile inside the vision tower: more than its features where these are pooled.
    fn tile_patches(&self) -> usize {
        self.tile_features()
    }

    /// Values of the pixels of one tile.
    fn tile_values(&self) -> usize;

    /// Heads of the decoder's attention.
    fn num_attention_heads(&self) -> usize;

    /// The batch as it is trained on: with a position for every image feature.
    ///
    /// # Errors
    /// It has more or fewer features than positions.
    fn reconcile<'b>(&self, batch: &'b Batch) -> Result<Cow<'b, Batch>> {
        batch.check_features(self.tile_features()).map(|()| Cow::Borrowed(batch))
    }

    /// Token embeddings.
    ///
    /// # Shapes
    /// `[rows, length]` -> `[rows, length, hidden_size]`
    fn embed_tokens(&self, input_ids: Tensor<2, Int>) -> Tensor<3>;

    /// Rotary tables and masks for queries that lie in the given columns.
    fn columns_context(&self, columns: &Columns, device: &Device) -> DecoderContext;

    /// Whether what was cached before these queries must be computed again, because the text has grown to a length at
    /// which all of it is rotated otherwise.
    fn cache_expires(&self, _columns: &Columns) -> bool {
        false
    }

    /// Rotary tables and masks for a batch of padded rows.
    fn context(&self, batch: &Batch, device: &Device) -> DecoderContext {
        self.columns_context(&batch.columns(), device)
    }

    /// Projected features of all images of a batch; none if it has no image.
    ///
    /// # Shapes
    /// `[tiles, features, hidden_size]`
    fn features(&self, batch: &Batch, device: &Device) -> Option<Tensor<3>> {
        batch.pixels(device).map(|pixels| self.project(self.vision(pixels)))
    }

    /// Decoder input: token embeddings with `features` at the image positions.
    ///
    /// # Shapes
    /// `[rows, length, hidden_size]`
    fn embed(&self, batch: &Batch, features: Option<Tensor<3>>, device: &Device) -> Tensor<3> {
        let tokens = self.embed_tokens(batch.input_ids(device));
        let Some(features) = features else { return tokens };
        let [tiles, count, hidden] = features.dims();
        assert_eq!(tiles * count, batch.feature_index.len(), "every feature has a position: the processor counts them");
        let cells = batch.rows * batch.length;
        let mut source: Vec<i32> = (0..cells as i32).collect();
        for (feature, cell) in batch.feature_index.iter().enumerate() {
            source[*cell as usize] = (cells + feature) as i32;
        }
        let tokens = tokens.reshape([cells, hidden]);
        let features = cast(features.reshape([tiles * count, hidden]), tokens.dtype());
        let source = Tensor::<1, Int>::from_data(TensorData::new(source, [cells]), device);
        Tensor::cat(vec![tokens, features], 0).select(0, source).reshape([batch.rows, batch.length, hidden])
    }

    /// Number of decoder layers.
    fn num_layers(&self) -> usize;

    /// One decoder layer. With a cache, keys and values of earlier positions are read from it and the new ones added.
    ///
    /// # Shapes
    /// `[rows, length, hidden_size]` -> same
    fn layer(&self, index: usize, x: Tensor<3>, context: &DecoderContext, cache: Option<&mut LayerCache>) -> Tensor<3>;

    /// Final norm.
    ///
    /// # Shapes
    /// any leading shape, `[.., hidden_size]` -> same
    fn final_norm(&self, x: Tensor<3>) -> Tensor<3>;

    /// Logits of normed states.
    ///
    /// # Shapes
    /// `[n, hidden_size]` -> `[n, vocab_size]`
    fn logits(&self, hidden: Tensor<2>) -> Tensor<2>;
}
