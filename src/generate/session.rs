//! A batch in the middle of being answered: caches, masks, positions.

use burn::tensor::{DType, Device, Int, Tensor, TensorData};

use crate::{
    error::{Error, Kind, Result},
    models::AnyVlm,
    nn::{attention::Columns, cast, decoder::LayerCache},
    vlm::{Batch, Encoded, PaddingSide, Vlm},
};

/// Key columns are read in multiples of this, so that shapes repeat.
const COLUMNS: usize = 64;

/// Rows that are being answered together. Prompts end in the same column, so padding is on the left.
pub struct Session<'a> {
    model: &'a AnyVlm,
    device: &'a Device,
    caches: Vec<LayerCache>,
    /// Decoder input of the prompts, and the tokens after them, for models whose caches expire.
    prompts: Tensor<3>,
    /// `[rows][..]`
    tokens: Vec<Vec<i32>>,
    capacity: usize,
    /// `[rows][capacity]`, true at real tokens.
    mask: Vec<Vec<bool>>,
    /// Position of the next token of each row.
    positions: Vec<i32>,
    /// Columns filled.
    len: usize,
    /// Columns of the prompts.
    prefill: usize,
}

impl<'a> Session<'a> {
    /// Reads the prompts `rows` and returns the logits of the next token of each; room for `max_new_tokens` more is
    /// reserved. `model` and `device` are without autodiff.
    ///
    /// # Shapes
    /// logits `[rows][vocab_size]`
    ///
    /// # Errors
    /// An empty prompt, or logits that are not finite.
    pub fn start(
        model: &'a AnyVlm,
        rows: &[Encoded],
        pad_id: i32,
        max_new_tokens: usize,
        device: &'a Device,
    ) -> Result<(Self, Vec<Vec<f32>>)> {
        if let Some(empty) = rows.iter().find(|r| r.input_ids.is_empty()) {
            return Err(Error::new(Kind::Data, "a prompt without tokens cannot be answered").at(&empty.id));
        }
        let batch = Batch::collate(rows, pad_id, PaddingSide::Left, 1);
        let capacity = (batch.length + max_new_tokens).next_multiple_of(COLUMNS);
        let mask = batch.mask.chunks(batch.length).map(|row| {
            let mut row = row.to_vec();
            row.resize(capacity, false);
            row
        });
        let x = model.embed(&batch, model.features(&batch, device), device);
        let mut session = Self {
            prompts: x.clone(),
            tokens: vec![Vec::new(); rows.len()],
            capacity,
            model,
            device,
            caches: (0..model.num_layers()).map(|_| LayerCache::new(capacity)).collect(),
            mask: mask.collect(),
            positions: rows.iter().map(|r| r.input_ids.len() as i32).collect(),
            len: batch.length,
            prefill: batch.length,
        };
        let logits = session.run(x, &batch.columns())?;
        Ok((session, logits))
    }

    /// Appends one token to every row and returns the logits of the next.
    ///
    /// # Shapes
    /// `[rows]` -> `[rows][vocab_size]`
    ///
    /// # Errors
    /// Logits that are not finite.
    pub fn step(&mut self, tokens: &[i32]) -> Result<Vec<Vec<f32>>> {
        let rows = self.mask.len();
        let keys = (self.len + 1).next_multiple_of(COLUMNS);
        for row in &mut self.mask {
            row[self.len] = true;
        }
        let columns = Columns {
            rows,
            length: 1,
            positions: self.positions.clone(),
            keys,
            start: self.len,
            prefill: self.prefill,
            mask: self.mask.iter().flat_map(|row| row[..keys].to_vec()).collect(),
            segments: None,
        };
        self.len += 1;
        self.positions.iter_mut().for_each(|p| *p += 1);
        for (all, token) in self.tokens.iter_mut().zip(tokens) {
            all.push(*token);
        }
        if self.model.cache_expires(&columns) {
            return self.read_again();
        }
        let tokens = Tensor::<2, Int>::from_data(TensorData::new(tokens.to_vec(), [rows, 1]), self.device);
        self.run(self.model.embed_tokens(tokens), &columns)
    }

    /// Logits after all tokens so far, computed without what was cached, which is replaced.
    fn read_again(&mut self) -> Result<Vec<Vec<f32>>> {
        let (rows, length) = (self.mask.len(), self.len);
        let mask: Vec<bool> = self.mask.iter().flat_map(|row| row[..length].to_vec()).collect();
        let mut positions = Vec::with_capacity(rows * length);
        for row in mask.chunks(length) {
            let mut next = 0;
            for real in row {
                positions.push(if *real { next } else { 0 });
                next += i32::from(*real);
            }
        }
        let data = TensorData::new(self.tokens.concat(), [rows, length - self.prefill]);
        let tokens = self.model.embed_tokens(Tensor::<2, Int>::from_data(data, self.device));
        let x = Tensor::cat(vec![self.prompts.clone(), tokens], 1);
        self.caches.iter_mut().for_each(|cache| *cache = LayerCache::new(self.capacity));
        let prefill = self.prefill;
        self.run(x, &Columns { rows, length, positions, keys: length, start: 0, prefill, mask, segments: None })
    }

    /// Goes on with the given rows, in the given order; rows may repeat.
    pub fn select(&mut self, rows: &[usize]) {
        self.mask = rows.iter().map(|r| self.mask[*r].clone()).collect();
        self.positions = rows.iter().map(|r| self.positions[*r]).collect();
        let index: Vec<i32> = rows.iter().map(|r| *r as i32).collect();
        let index = Tensor::<1, Int>::from_data(TensorData::new(index, [rows.len()]), self.device);
        self.tokens = rows.iter().map(|r| self.tokens[*r].clone()).collect();
        self.prompts = self.prompts.clone().select(0, index.clone());
        for cache in &mut self.caches {
            cache.select_rows(index.clone());
        }
    }

    /// Logits of the last column only.
    fn run(&mut self, mut x: Tensor<3>, columns: &Columns) -> Result<Vec<Vec<f32>>> {
        let context = self.model.columns_context(columns, self.device);
        for (index, cache) in self.caches.iter_mut().enumerate() {
            x = self.model.layer(index, x, &context, Some(cache));
        }
        let [rows, length, width] = x.dims();
        let last = self.model.final_norm(x.narrow(1, length - 1, 1)).reshape([rows, width]);
        let logits = cast(self.model.logits(last), DType::F32);
        let vocab_size = logits.dims()[1];
        let values = logits.into_data();
        let values = values.as_slice::<f32>().expect("cast to f32 above");
        if values.iter().any(|v| !v.is_finite()) {
            return Err(Error::new(Kind::Numeric, "the model's logits are not finite")
                .at(format!("generated token {}", columns.start.saturating_sub(1)))
                .help("the weights are damaged or do not fit this type; try f32"));
        }
        Ok(values.chunks(vocab_size).map(<[f32]>::to_vec).collect())
    }
}
