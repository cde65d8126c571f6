//! BERTScore (arXiv 1904.09675): each token of one text is matched with the most similar token of the other, by the
//! cosine of their states in a text encoder; as `bert_score` 0.3.13 computes it for one pair at a time.
//!
//! In a batch the original takes a token whose best cosine is negative for 0; here no score depends on the batch.

use std::{
    collections::{BTreeSet, HashMap},
    path::Path,
};

use burn::tensor::{Device, FloatDType, Int, Tensor, TensorData};
use rayon::prelude::*;

use super::text::{Pair, TextMetric, TextMetricDef, TextMetricOptions};
use crate::{
    error::{Error, Kind, Result},
    nn::bert::{Bert, BertConfig, fit_names},
    progress::Progress,
    run_dir::{sha256, sha256_bytes},
    weights::{self, Checkpoint},
};

mod score;
mod source;
mod tokenizer;

pub use score::Match;
use score::{Encoded, Rarity, matched};
pub use source::Baseline;
use tokenizer::TextTokenizer;

/// BERTScore.
pub const BERTSCORE: TextMetricDef = TextMetricDef {
    key: "bertscore",
    name: "BERTScore",
    about: "Harmonic mean of precision and recall over tokens matched by the cosine of their states in a text encoder.",
    signature: "bertscore|v1|rule=bert_score 0.3.13 F1 of single pairs|model=roberta-large|layer=17|idf=no|rescale=no",
    open: |options| Ok(Box::new(BertScore::load(options)?)),
};

/// Pairs whose token vectors are held at once.
const PAIRS: usize = 512;

/// BERTScore with its encoder.
pub struct BertScore {
    model: Bert,
    config: BertConfig,
    tokenizer: TextTokenizer,
    device: Device,
    idf: bool,
    baseline: Option<Baseline>,
    batch_size: usize,
    signature: String,
}

impl BertScore {
    /// Reads the encoder, its tokenizer and the baseline.
    ///
    /// # Errors
    /// The encoder is not on this machine (and may not be downloaded), is of another family, is damaged, or has fewer
    /// layers than asked for; no layer is known for it and none was given; the baseline has no row for the layer.
    pub fn load(options: &TextMetricOptions) -> Result<Self> {
        let name = options.bertscore_model.as_deref().unwrap_or("roberta-large");
        let dir = source::directory(name, options.download)?;
        let config = read_config(&dir.join("config.json"))?;
        let layer = layer(name, &config, options.bertscore_layer)?;
        let mut checkpoint = Checkpoint::open(&dir)?;
        let tokenizer = TextTokenizer::load(&dir, &config)?;
        let hash = hash(&checkpoint, &tokenizer)?;
        fit_names(&mut checkpoint, layer);
        let device = options.device.clone().without_autodiff();
        let model = weights::load(Bert::new(&config, layer, &device), &checkpoint, FloatDType::F32, Progress::Silent)?;
        let baseline = options.bertscore_baseline.as_deref().map(|p| Baseline::read(p, layer)).transpose()?;
        let rescale = baseline.map_or("no".into(), |b| format!("{},{},{}", b.precision, b.recall, b.f1));
        let signature = format!(
            "bertscore|v1|rule=bert_score 0.3.13 F1 of single pairs|model={} {hash}|layer={layer}|idf={}|rescale={rescale}",
            config.model_type,
            if options.bertscore_idf { "over these references" } else { "no" },
        );
        let batch_size = options.bertscore_batch_size.max(1);
        Ok(Self { model, config, tokenizer, device, idf: options.bertscore_idf, baseline, batch_size, signature })
    }

    /// Token ids of a text, its begin and end marks included, as the encoder gets them.
    ///
    /// # Errors
    /// The tokenizer's parts contradict each other.
    pub fn token_ids(&self, text: &str) -> Result<Vec<i32>> {
        self.tokenizer.encode(text)
    }

    /// Precision, recall and F1 of each pair, the answer as candidate.
    ///
    /// # Errors
    /// The tokenizer's parts contradict each other, or the states are not finite.
    pub fn matches(&self, pairs: &[Pair<'_>]) -> Result<Vec<Match>> {
        let ids = |text| self.tokenizer.encode(text);
        let answers: Vec<Vec<i32>> = pairs.par_iter().map(|p| ids(p.answer)).collect::<Result<_>>()?;
        let references: Vec<Vec<i32>> = pairs.par_iter().map(|p| ids(p.reference)).collect::<Result<_>>()?;
        let rarity = self.idf.then(|| Rarity::new(references.iter().map(Vec::as_slice)));
        let mut found = Vec::with_capacity(pairs.len());
        for (answers, references) in answers.chunks(PAIRS).zip(references.chunks(PAIRS)) {
            let encoded = self.encode(answers.iter().chain(references), rarity.as_ref())?;
            let one = |(answer, reference)| {
                let found = matched(&encoded[answer], &encoded[reference]);
                self.baseline.as_ref().map_or(found, |b| found.rescaled(b))
            };
            found.par_extend(
                answers.par_iter().map(Vec::as_slice).zip(references.par_iter().map(Vec::as_slice)).map(one),
            );
        }
        Ok(found)
    }

    /// Unit vectors and weights of each text, each text once; texts of similar length are encoded together.
    fn encode<'a>(
        &self,
        texts: impl Iterator<Item = &'a Vec<i32>>,
        rarity: Option<&Rarity>,
    ) -> Result<HashMap<&'a [i32], Encoded>> {
        let mut texts: Vec<&[i32]> = texts.map(Vec::as_slice).collect::<BTreeSet<_>>().into_iter().collect();
        texts.sort_by_key(|ids| std::cmp::Reverse(ids.len()));
        let mut encoded = HashMap::with_capacity(texts.len());
        for batch in texts.chunks(self.batch_size) {
            for (ids, mut vectors) in batch.iter().zip(self.states(batch)?) {
                let width = vectors.len() / ids.len();
                vectors.chunks_exact_mut(width).for_each(normalise);
                let weights = ids.iter().map(|id| self.weight(*id, rarity)).collect();
                encoded.insert(*ids, Encoded { vectors, weights });
            }
        }
        Ok(encoded)
    }

    fn weight(&self, id: i32, rarity: Option<&Rarity>) -> f64 {
        match rarity {
            Some(rarity) => rarity.weight(id),
            None if self.tokenizer.is_mark(id) => 0.0,
            None => 1.0,
        }
    }

    /// States of each text after the chosen layer.
    ///
    /// # Shapes
    /// for each text `[tokens, hidden_size]`, row-major
    ///
    /// # Errors
    /// The states are not finite.
    pub fn states(&self, texts: &[&[i32]]) -> Result<Vec<Vec<f32>>> {
        let lengths: Vec<usize> = texts.iter().map(|ids| ids.len()).collect();
        let longest = lengths.iter().copied().max().unwrap_or(0);
        let padded = |of: &dyn Fn(&[i32]) -> Vec<i32>| {
            let mut cells = vec![0i32; texts.len() * longest];
            for (row, ids) in cells.chunks_mut(longest.max(1)).zip(texts) {
                row[..ids.len()].copy_from_slice(&of(ids));
            }
            Tensor::<2, Int>::from_data(TensorData::new(cells, [texts.len(), longest]), &self.device)
        };
        let input_ids = padded(&|ids| ids.to_vec());
        let positions = padded(&|ids| self.config.positions(ids));
        let states = self.model.forward(input_ids, positions, &lengths);
        let width = states.dims()[2];
        let not_f32 = |e| Error::new(Kind::Numeric, "states of the text encoder are not f32").found(format!("{e:?}"));
        let values: Vec<f32> = states.into_data().try_into_vec().map_err(not_f32)?;
        let rows = values.chunks(longest * width).zip(&lengths).map(|(row, n)| row[..n * width].to_vec());
        let rows: Vec<Vec<f32>> = rows.collect();
        if rows.iter().flatten().any(|v| !v.is_finite()) {
            return Err(Error::new(Kind::Numeric, "states of the text encoder are not finite")
                .help("the weights are damaged; download them again"));
        }
        Ok(rows)
    }
}

impl TextMetric for BertScore {
    fn signature(&self) -> String {
        self.signature.clone()
    }

    fn score_pairs(&self, pairs: &[Pair<'_>]) -> Result<Vec<f64>> {
        Ok(self.matches(pairs)?.into_iter().map(|m| m.f1).collect())
    }
}

fn read_config(path: &Path) -> Result<BertConfig> {
    let text = std::fs::read_to_string(path).map_err(|e| Error::io(path, e))?;
    let config: BertConfig = serde_json::from_str(&text).map_err(|e| {
        Error::new(Kind::Checkpoint, "cannot read a text encoder's settings").at(path.display()).source(e)
    })?;
    config.check()?;
    Ok(config)
}

/// The layer whose states are compared; 0 is the embeddings.
fn layer(name: &str, config: &BertConfig, asked: Option<usize>) -> Result<usize> {
    let wrong = |what: &str| {
        Error::new(Kind::Config, what).at("--bertscore-layer").expected(format!("0 to {}", config.num_hidden_layers))
    };
    match asked.or_else(|| source::default_layer(name)) {
        Some(layer) if layer <= config.num_hidden_layers => Ok(layer),
        Some(layer) => Err(wrong("the text encoder has fewer layers").found(layer)),
        None => Err(wrong("no layer is known for this text encoder").found(name).help("say which layer to compare")),
    }
}

/// One hash over the files of weights and tokenizer.
fn hash(checkpoint: &Checkpoint, tokenizer: &TextTokenizer) -> Result<String> {
    let weights = checkpoint.names().filter_map(|n| checkpoint.info(n)).map(|i| i.file.clone());
    let files: BTreeSet<_> = weights.chain(tokenizer.files.iter().cloned()).collect();
    let hashes = files.iter().map(|path| sha256(path)).collect::<Result<String>>()?;
    Ok(format!("sha256:{}", &sha256_bytes(hashes.as_bytes())[..16]))
}

/// To length 1.
fn normalise(vector: &mut [f32]) {
    let length = vector.iter().map(|v| v * v).sum::<f32>().sqrt();
    vector.iter_mut().for_each(|v| *v /= length);
}
