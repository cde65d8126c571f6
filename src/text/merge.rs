//! Splicing image features into token rows, as LLaVA's `prepare_inputs_labels_for_multimodal` does it.
//!
//! Only indices are computed here; the embeddings are gathered on the device. Training uses
//! a model's `Processor`, whose rows are expanded one by one and more strictly; this function exists for
//! batches of raw ids, and reproduces the original's padding, truncation and dummy images.

use crate::{
    error::{Error, Kind, Result},
    vlm::{IGNORE, PaddingSide},
};

/// Stands for one image in raw token ids. Not a vocabulary id.
pub const IMAGE_TOKEN_INDEX: i32 = -200;

/// One row of raw ids.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct RawRow {
    /// Token ids with [`IMAGE_TOKEN_INDEX`] where an image belongs.
    pub input_ids: Vec<i32>,
    /// Unshifted labels; absent means none.
    pub labels: Option<Vec<i32>>,
    /// Positions to keep; absent means all, filler included.
    pub mask: Option<Vec<bool>>,
}

/// What decides the shape of a merged batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MergeRules {
    /// Longest expanded row; longer ones are cut, images included.
    pub max_length: Option<usize>,
    /// Side on which short rows are filled.
    pub side: PaddingSide,
    /// Id under image positions and padding.
    pub pad_id: i32,
}

/// Expanded rows, padded to one length. All vectors but the feature ones are `[rows, length]`, row-major.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Merged {
    /// Number of rows.
    pub rows: usize,
    /// Padded length.
    pub length: usize,
    /// Token ids; the pad id at image positions and padding.
    pub input_ids: Vec<i32>,
    /// Labels; [`IGNORE`] at image positions, padding, and where none were given.
    pub labels: Vec<i32>,
    /// True at tokens and image positions, false at padding (whose embedding is the zero vector).
    pub valid: Vec<bool>,
    /// Position within the row; 0 at padding.
    pub positions: Vec<i32>,
    /// Flat indices (row * length + position) that take image features.
    pub feature_index: Vec<i32>,
    /// For each of them, the row of the concatenated features of all images that goes there.
    pub feature_rows: Vec<i32>,
}

struct Expanded {
    input_ids: Vec<i32>,
    labels: Vec<i32>,
    /// (position in the row, feature row)
    features: Vec<(usize, usize)>,
}

/// Expands and pads `rows`; `images` holds the number of features of each image (or group of images that one mark
/// stands for), in order across the batch.
///
/// A row without a mark uses up one image and none of its features.
///
/// # Errors
/// Labels or mask of another length than the ids, or more marks than images.
pub fn merge(rows: &[RawRow], images: &[usize], rules: &MergeRules) -> Result<Merged> {
    let mut starts = vec![0usize];
    starts.extend(images.iter().scan(0, |sum, n| {
        *sum += n;
        Some(*sum)
    }));
    let mut next = 0;
    let expanded = rows
        .iter()
        .enumerate()
        .map(|(i, row)| expand(i, row, images, &starts, &mut next, rules))
        .collect::<Result<Vec<_>>>()?;
    Ok(pad(&expanded, rules))
}

fn expand(
    index: usize,
    row: &RawRow,
    images: &[usize],
    starts: &[usize],
    next: &mut usize,
    rules: &MergeRules,
) -> Result<Expanded> {
    let n = row.input_ids.len();
    check_length(index, "labels", n, row.labels.as_ref().map(Vec::len))?;
    check_length(index, "mask", n, row.mask.as_ref().map(Vec::len))?;
    let mut out = Expanded { input_ids: Vec::new(), labels: Vec::new(), features: Vec::new() };
    let mut marks = 0;
    for (k, &id) in row.input_ids.iter().enumerate() {
        if row.mask.as_ref().is_some_and(|m| !m[k]) {
            continue;
        }
        if id != IMAGE_TOKEN_INDEX {
            out.input_ids.push(id);
            out.labels.push(row.labels.as_ref().map_or(IGNORE, |l| l[k]));
            continue;
        }
        let Some(&features) = images.get(*next) else {
            return Err(Error::new(Kind::Data, "a batch has more image marks than images")
                .at(format!("row {index}"))
                .found(format!("{} images", images.len()))
                .help("give one image for every <image>, and one dummy for every row without"));
        };
        let start = starts[*next];
        out.features.extend((0..features).map(|f| (out.input_ids.len() + f, start + f)));
        out.input_ids.resize(out.input_ids.len() + features, rules.pad_id);
        out.labels.resize(out.input_ids.len(), IGNORE);
        marks += 1;
        *next += 1;
    }
    if marks == 0 {
        *next += 1;
    }
    if let Some(longest) = rules.max_length {
        out.input_ids.truncate(longest);
        out.labels.truncate(longest);
        out.features.retain(|(position, _)| *position < longest);
    }
    Ok(out)
}

fn check_length(row: usize, what: &str, expected: usize, found: Option<usize>) -> Result<()> {
    match found {
        Some(found) if found != expected => Err(Error::new(Kind::Data, format!("{what} and ids differ in length"))
            .at(format!("row {row}"))
            .expected(expected)
            .found(found)),
        _ => Ok(()),
    }
}

fn pad(rows: &[Expanded], rules: &MergeRules) -> Merged {
    let length = rows.iter().map(|r| r.input_ids.len()).max().unwrap_or(0);
    let cells = rows.len() * length;
    let mut out = Merged {
        rows: rows.len(),
        length,
        input_ids: vec![rules.pad_id; cells],
        labels: vec![IGNORE; cells],
        valid: vec![false; cells],
        positions: vec![0; cells],
        feature_index: Vec::new(),
        feature_rows: Vec::new(),
    };
    for (i, row) in rows.iter().enumerate() {
        let n = row.input_ids.len();
        let start = i * length + if rules.side == PaddingSide::Left { length - n } else { 0 };
        out.input_ids[start..start + n].copy_from_slice(&row.input_ids);
        out.labels[start..start + n].copy_from_slice(&row.labels);
        out.valid[start..start + n].fill(true);
        for (position, cell) in out.positions[start..start + n].iter_mut().enumerate() {
            *cell = position as i32;
        }
        for &(position, feature) in &row.features {
            out.feature_index.push((start + position) as i32);
            out.feature_rows.push(feature as i32);
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(ids: &[i32]) -> RawRow {
        RawRow {
            input_ids: ids.to_vec(),
            labels: Some(ids.to_vec()),
            mask: Some(ids.iter().map(|i| *i != 0).collect()),
        }
    }

    const RULES: MergeRules = MergeRules { max_length: None, side: PaddingSide::Right, pad_id: 0 };

    #[test]
    fn features_replace_marks_and_a_row_without_marks_uses_up_a_dummy() {
        let rows = [row(&[1, -200, 5]), row(&[1, 6, 0]), row(&[-200])];
        let merged = merge(&rows, &[2, 2, 2], &RULES).unwrap();
        assert_eq!((merged.rows, merged.length), (3, 4));
        assert_eq!(merged.input_ids, [1, 0, 0, 5, 1, 6, 0, 0, 0, 0, 0, 0]);
        assert_eq!(merged.labels[..4], [1, IGNORE, IGNORE, 5]);
        assert_eq!(merged.feature_index, [1, 2, 8, 9]);
        assert_eq!(merged.feature_rows, [0, 1, 4, 5]);
        assert_eq!(merged.valid.iter().filter(|v| **v).count(), 4 + 2 + 2);
    }

    #[test]
    fn left_padding_and_truncation_move_the_features_along() {
        let rules = MergeRules { max_length: Some(3), side: PaddingSide::Left, pad_id: 9 };
        let merged = merge(&[row(&[1, 2, -200]), row(&[7])], &[2, 1], &rules).unwrap();
        assert_eq!(merged.input_ids, [1, 2, 9, 9, 9, 7]);
        assert_eq!((merged.feature_index, merged.feature_rows), (vec![2], vec![0]));
        assert_eq!(merged.positions, [0, 1, 2, 0, 0, 0]);
    }

    #[test]
    fn a_mark_without_an_image_is_an_error() {
        let error = merge(&[row(&[-200, -200])], &[3], &RULES).unwrap_err();
        assert!(error.to_string().contains("more image marks than images"), "{error}");
        let uneven = RawRow { input_ids: vec![1], labels: Some(vec![]), mask: None };
        assert!(merge(&[uneven], &[], &RULES).unwrap_err().to_string().contains("labels"));
    }
}
