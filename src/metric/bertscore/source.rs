//! Where an encoder comes from, which of its layers is compared, and what its scores are rescaled by.

use std::{
    fs,
    path::{Path, PathBuf},
};

use crate::error::{Error, Kind, Result};

/// The layer that bert_score 0.3.13 chooses (`model2layers`), for the BERT and RoBERTa models in its table.
const LAYERS: [(&str, usize); 22] = [
    ("bert-base-uncased", 9),
    ("bert-large-uncased", 18),
    ("bert-base-cased-finetuned-mrpc", 9),
    ("bert-base-multilingual-cased", 9),
    ("bert-base-chinese", 8),
    ("roberta-base", 10),
    ("roberta-large", 17),
    ("roberta-large-mnli", 19),
    ("roberta-base-openai-detector", 7),
    ("roberta-large-openai-detector", 15),
    ("distilroberta-base", 5),
    ("scibert_scivocab_uncased", 8),
    ("scibert_scivocab_cased", 9),
    ("spanbert-base-cased", 8),
    ("spanbert-large-cased", 17),
    ("finbert", 10),
    ("unsup-simcse-bert-base-uncased", 10),
    ("unsup-simcse-bert-large-uncased", 18),
    ("unsup-simcse-roberta-base", 8),
    ("unsup-simcse-roberta-large", 13),
    ("sup-simcse-bert-base-uncased", 10),
    ("sup-simcse-roberta-large", 16),
];

/// Files of an encoder on the hub, and whether it cannot do without.
const FILES: [(&str, bool); 6] = [
    ("config.json", true),
    ("tokenizer_config.json", false),
    ("vocab.json", false),
    ("merges.txt", false),
    ("vocab.txt", false),
    ("tokenizer.json", false),
];
/// Weights on the hub, best first.
const WEIGHTS: [&str; 2] = ["model.safetensors", "pytorch_model.bin"];

/// What scores are rescaled by: the mean scores of unrelated sentences.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Baseline {
    /// Of precision.
    pub precision: f64,
    /// Of recall.
    pub recall: f64,
    /// Of the harmonic mean.
    pub f1: f64,
}

/// The layer that bert_score chooses for a model, by the last part of its name.
pub(super) fn default_layer(model: &str) -> Option<usize> {
    let name = model.trim_end_matches('/').rsplit('/').next().unwrap_or_default().to_lowercase();
    LAYERS.iter().find(|(known, _)| *known == name).map(|(_, layer)| *layer)
}

impl Baseline {
    /// The row of `layer` in a baseline file of bert_score (`LAYER,P,R,F`).
    pub(super) fn read(path: &Path, layer: usize) -> Result<Self> {
        let text = fs::read_to_string(path).map_err(|e| Error::io(path, e))?;
        let numbers = |line: &str| -> Option<Vec<f64>> { line.split(',').map(|f| f.trim().parse().ok()).collect() };
        let row = text.lines().filter_map(numbers).find(|row| row.first() == Some(&(layer as f64)));
        match row.as_deref() {
            Some([_, precision, recall, f1]) => Ok(Self { precision: *precision, recall: *recall, f1: *f1 }),
            _ => Err(Error::new(Kind::Config, "a baseline file has no row for this layer")
                .at(path.display())
                .expected(format!("{layer},P,R,F"))
                .help("take the file of this model from bert_score/rescale_baseline")),
        }
    }
}

/// The directory of an encoder: `model` itself if it is one, else the hub's copy of it on this machine, which is
/// downloaded first if `download` says so.
pub(super) fn directory(model: &str, download: bool) -> Result<PathBuf> {
    if Path::new(model).is_dir() {
        return Ok(PathBuf::from(model));
    }
    let cached = hf_hub::Cache::from_env().model(model.to_string());
    let weights = WEIGHTS.iter().any(|file| cached.get(file).is_some());
    match cached.get("config.json").as_deref().and_then(Path::parent) {
        Some(dir) if weights => Ok(dir.to_path_buf()),
        _ if download => fetch(model),
        _ => Err(Error::new(Kind::Checkpoint, "the text encoder of BERTScore is not on this machine")
            .at(model)
            .expected("a directory in Hugging Face layout, or a model in the cache of the hub")
            .help("give --bertscore-model DIR, or allow the download with --download")),
    }
}

fn fetch(model: &str) -> Result<PathBuf> {
    let failed = |e: hf_hub::api::sync::ApiError| {
        Error::new(Kind::Checkpoint, "cannot download a text encoder")
            .at(model)
            .help("check the name and the network; HF_ENDPOINT and HF_TOKEN are read from the environment")
            .source(e)
    };
    let api = hf_hub::api::sync::ApiBuilder::from_env().build().map_err(failed)?.model(model.to_string());
    let mut dir = None;
    for (file, required) in FILES {
        match api.get(file) {
            Ok(path) => dir = dir.or(path.parent().map(Path::to_path_buf)),
            Err(e) if required => return Err(failed(e)),
            Err(_) => {}
        }
    }
    let dir =
        dir.ok_or_else(|| Error::new(Kind::Checkpoint, "the hub's copy of a model has no directory").at(model))?;
    api.get(WEIGHTS[0]).or_else(|_| api.get(WEIGHTS[1])).map_err(failed)?;
    Ok(dir)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layers_are_known_by_the_last_part_of_the_name() {
        assert_eq!(default_layer("roberta-large"), Some(17));
        assert_eq!(default_layer("FacebookAI/roberta-large"), Some(17));
        assert_eq!(default_layer("models/roberta-large/"), Some(17));
        assert_eq!(default_layer("tiny"), None);
    }

    #[test]
    fn baselines_are_read_by_layer() {
        let file = tempfile::NamedTempFile::new().unwrap();
        fs::write(file.path(), "LAYER,P,R,F\n0,0.1,0.2,0.3\n17,0.83150584,0.8314941,0.83122575\n").unwrap();
        let found = Baseline::read(file.path(), 17).unwrap();
        assert_eq!((found.precision, found.f1), (0.83150584, 0.83122575));
        assert!(Baseline::read(file.path(), 5).unwrap_err().to_string().contains("5,P,R,F"));
    }

    #[test]
    fn nothing_is_downloaded_unasked() {
        let error = directory("no/such-encoder", false).unwrap_err();
        assert!(error.help_line().unwrap().contains("--download"), "{error}");
    }
}
