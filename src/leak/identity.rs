//! Names that tell which image or article a row is about, in whatever data set it is found.

use std::path::Path;

use serde_json::Value;

use crate::sample::{Sample, meta};

/// Keys of `meta` in which data sets name the article an image was published in.
const ARTICLE_KEYS: [&str; 5] = [meta::ARTICLE, "pmcid", "pmc_id", "PMC_ID", "pmid"];

/// Keys of `meta` in which data sets name an image.
const IMAGE_KEYS: [&str; 3] = ["pair_id", "image_id", "ROCO_ID"];

/// Digits that make a name more than a running number within a data set.
const TELLING_DIGITS: usize = 5;

/// Article that a row's image was published in, if the row says so or its file is named after it: `pmc_5012345_2.jpg`,
/// `PMC1064097_F3.jpg`, `27840123_F1.jpg`.
#[must_use]
pub fn article(sample: &Sample) -> Option<String> {
    let stated = ARTICLE_KEYS.iter().find_map(|key| text(sample.meta.get(*key)?));
    stated.or_else(|| sample.images.iter().find_map(|i| article_of_file(&i.path)))
}

fn article_of_file(path: &Path) -> Option<String> {
    let stem = path.file_stem()?.to_str()?.to_lowercase();
    let (first, rest) = stem.split_once('_')?;
    let digits = |s: &str, least: usize| s.len() >= least && s.bytes().all(|b| b.is_ascii_digit());
    if first == "pmc" {
        let (number, _) = rest.split_once('_')?;
        return digits(number, 1).then(|| format!("pmc_{number}"));
    }
    let published = first.strip_prefix("pmc").is_some_and(|n| digits(n, TELLING_DIGITS));
    (published || digits(first, 7) && !first.starts_with('0')).then(|| first.to_string())
}

/// Names of a row's images that mean the same image elsewhere: stated ones, and file names with a number that is no
/// running number.
#[must_use]
pub fn image_names(sample: &Sample) -> Vec<String> {
    let stated = IMAGE_KEYS.iter().filter_map(|key| text(sample.meta.get(*key)?));
    let files = sample.images.iter().filter_map(|i| i.path.file_stem()?.to_str().map(str::to_lowercase));
    let mut names: Vec<String> = stated.map(|s| s.to_lowercase()).chain(files).filter(|n| is_telling(n)).collect();
    names.sort_unstable();
    names.dedup();
    names
}

/// Whether a name has a long number that does not begin with a zero, or is one of ROCO's.
fn is_telling(name: &str) -> bool {
    let numbers = name.split(|c: char| !c.is_ascii_digit());
    let long = numbers.clone().any(|n| n.len() >= TELLING_DIGITS && !n.starts_with('0'));
    long || name.starts_with("roco") && numbers.into_iter().any(|n| n.len() >= TELLING_DIGITS)
}

fn text(value: &Value) -> Option<String> {
    match value {
        Value::String(text) if !text.trim().is_empty() => Some(text.trim().to_string()),
        Value::Number(number) => Some(number.to_string()),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{qc::tests::row, sample::ImageRef};

    fn about(file: &str) -> Sample {
        Sample { images: vec![ImageRef { path: file.into() }], ..row("Q?", "A.") }
    }

    #[test]
    fn articles_come_from_meta_or_from_file_names() {
        let of = |file: &str| article(&about(file));
        assert_eq!(of("a/pmc_5012345_2.jpg").as_deref(), Some("pmc_5012345"));
        assert_eq!(of("PMC1064097_F3.jpg").as_deref(), Some("pmc1064097"));
        assert_eq!(of("27840123_F1.jpg").as_deref(), Some("27840123"));
        for file in ["source.jpg", "img_001.png", "0000001_a.png", "synpic54610.jpg", "phantom-000001.png"] {
            assert_eq!(of(file), None, "{file}");
        }
        let mut stated = about("x.jpg");
        stated.meta.insert("pmid".into(), 123.into());
        assert_eq!(article(&stated).as_deref(), Some("123"));
    }

    #[test]
    fn running_numbers_name_no_image() {
        assert_eq!(image_names(&about("d/synpic54610.JPG")), ["synpic54610"]);
        assert_eq!(image_names(&about("ROCO_00017.jpg")), ["roco_00017"]);
        for file in ["source.jpg", "img_0001.png", "IM000012.png", "phantom-000001.png"] {
            assert!(image_names(&about(file)).is_empty(), "{file}");
        }
    }
}
