//! The published rows that a report sets beside its own: MedHallTune (Yan et al., arXiv 2502.20780) and the table of its
//! repository (github.com/russellyq/MedHallTune, README).
//!
//! Nothing here was computed by this program. The paper prints no interval for any of these numbers.

use serde::Serialize;

/// A value for the positive and one for the negative part.
pub type Both = [Option<f64>; 2];

/// A published row in the layout of the paper's Table 2.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Published {
    /// The model.
    pub model: &'static str,
    /// Whether it was tuned on MedHallTune.
    pub tuned: bool,
    /// Where the numbers stand.
    pub source: &'static str,
    /// Clinical accuracy, relevance, detail level, risk level; 1 to 10.
    pub clinical: [Both; 4],
    /// BERTScore F1.
    pub bertscore: Both,
    /// METEOR.
    pub meteor: Both,
}

/// A published row in the layout of Table 3: closed accuracy or multiple-choice accuracy in per cent.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct PublishedVqa {
    /// The model.
    pub model: &'static str,
    /// Whether it was tuned on MedHallTune.
    pub tuned: bool,
    /// VQA-RAD closed, SLAKE closed, PMC-VQA, OmniMedVQA, in the order of [`VQA_COLUMNS`].
    pub values: [f64; 4],
}

const README: &str = "repository README";
const PAPER: &str = "paper, Table 2";

const fn both(positive: f64, negative: f64) -> Both {
    [Some(positive), Some(negative)]
}

const NONE: Both = [None, None];

/// Rows in the layout of Table 2. Of the tuned models only the columns that this program's sources quote are given.
#[expect(clippy::approx_constant, reason = "a published score happens to look like one")]
pub const TABLE_2: [Published; 7] = [
    Published {
        model: "GPT-4o",
        tuned: false,
        source: README,
        clinical: [both(6.52, 5.01), both(7.08, 5.66), both(6.44, 5.43), both(7.68, 6.23)],
        bertscore: both(0.88, 0.87),
        meteor: both(0.34, 0.26),
    },
    Published {
        model: "LLaVA-Med-v1.5-7B",
        tuned: false,
        source: README,
        clinical: [both(6.28, 5.03), both(6.78, 5.39), both(5.48, 4.84), both(7.39, 5.89)],
        bertscore: both(0.91, 0.89),
        meteor: both(0.38, 0.23),
    },
    Published {
        model: "LLaVA-Med-v1.5-7B",
        tuned: true,
        source: PAPER,
        clinical: [both(6.67, 5.91), NONE, NONE, both(7.79, 7.22)],
        bertscore: both(0.92, 0.90),
        meteor: both(0.44, 0.31),
    },
    Published {
        model: "Qwen-VL-Chat",
        tuned: false,
        source: README,
        clinical: [both(5.95, 4.21), both(6.45, 4.57), both(5.54, 4.60), both(7.17, 5.42)],
        bertscore: both(0.90, 0.88),
        meteor: both(0.35, 0.19),
    },
    Published {
        model: "Qwen-VL-Chat",
        tuned: true,
        source: PAPER,
        clinical: [both(6.54, 4.68), NONE, NONE, both(7.69, 5.85)],
        bertscore: both(0.93, 0.89),
        meteor: both(0.44, 0.24),
    },
    Published {
        model: "InternVL-v1.5-4B",
        tuned: false,
        source: README,
        clinical: [both(6.02, 4.25), both(6.59, 4.68), both(5.29, 4.56), both(7.28, 5.31)],
        bertscore: both(0.90, 0.87),
        meteor: both(0.30, 0.23),
    },
    Published {
        model: "InternVL-v1.5-4B",
        tuned: true,
        source: PAPER,
        clinical: [both(6.01, 4.99), NONE, NONE, both(7.26, 5.76)],
        bertscore: both(0.89, 0.89),
        meteor: both(0.29, 0.18),
    },
];

/// Columns of Table 3 as this program's sources are called, with their titles.
pub const VQA_COLUMNS: [(&str, &str); 4] =
    [("vqa_rad", "VQA-RAD, closed"), ("slake", "SLAKE, closed"), ("pmc_vqa", "PMC-VQA"), ("omnimedvqa", "OmniMedVQA")];

/// Rows in the layout of Table 3.
pub const TABLE_3: [PublishedVqa; 6] = [
    PublishedVqa { model: "LLaVA-Med-v1.5-7B", tuned: false, values: [58.75, 58.41, 32.35, 49.81] },
    PublishedVqa { model: "LLaVA-Med-v1.5-7B", tuned: true, values: [82.49, 66.58, 39.15, 52.31] },
    PublishedVqa { model: "Qwen-VL-Chat", tuned: false, values: [62.64, 68.90, 34.25, 47.66] },
    PublishedVqa { model: "Qwen-VL-Chat", tuned: true, values: [78.21, 68.99, 36.45, 50.82] },
    PublishedVqa { model: "InternVL-v1.5-4B", tuned: false, values: [76.26, 59.13, 31.55, 49.49] },
    PublishedVqa { model: "InternVL-v1.5-4B", tuned: true, values: [76.87, 63.94, 36.55, 56.45] },
];

/// Why numbers here and there differ, or cannot be compared, for Table 2.
pub const WHY_2: [&str; 6] = [
    "The questions differ: the paper has 1,127 positive and 1,143 negative ones about 200 images; the released files have \
     1,110 and 1,128 about 198 images each, and share no image.",
    "The judge differs: the paper's is an unpinned gpt-4o at its default temperature; its prompt for the first stage is \
     not released, and the released prompt calls the fourth criterion Lethal Level.",
    "Rows whose reply could not be read were left out there without a count; here they are a column.",
    "For about half of the images the judge reads a caption that a language model wrote, not a report.",
    "In the paper the tuned InternVL row repeats all six positive values of the untuned one, which is probably a copying \
     error.",
    "The paper gives no intervals, so whether a difference from its numbers means anything is not known.",
];

/// Why numbers here and there differ, or cannot be compared, for Table 3.
pub const WHY_3: [&str; 3] = [
    "The split differs: the published VQA-RAD percentages fit 257 closed questions, while the public files give 251 (yes or \
     no) or 272 (LLaVA-Med); those of SLAKE fit the 416 closed English ones, those of PMC-VQA a set of 2,000.",
    "How answers were read is not published. LLaVA-Med's rule counts \u{201c}normal\u{201d} as \u{201c}no\u{201d}; here both rules are given.",
    "The published numbers are zero-shot. A model that was trained on the data set's own questions is not comparable.",
];

/// [`WHY_2`] for rows of a source, as `medtune datasets` calls it.
#[must_use]
pub fn why_2(source: &str) -> Vec<String> {
    let own = match source {
        "medhalltune" => None,
        "phantom" => Some(
            "The images of this run are drawn by a program, its model is tiny and its judge goes by rules: with the              published rows it shares the names of the columns and nothing else."
                .to_string(),
        ),
        other => Some(format!(
            "The rows of this run come from {other}, not from the paper's test set, so a difference from a published row \
             says nothing about either."
        )),
    };
    own.into_iter().chain(WHY_2.iter().map(|w| (*w).to_string())).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_of_other_sources_are_called_other_rows() {
        assert_eq!(why_2("medhalltune"), WHY_2);
        assert!(why_2("phantom")[0].contains("drawn by a program"));
        assert!(why_2("slake")[0].contains("come from slake"));
        assert_eq!(why_2("slake")[1..], WHY_2);
    }

    #[test]
    fn published_values_are_in_range() {
        for row in TABLE_2 {
            assert!(row.clinical.iter().flatten().flatten().all(|v| (1.0..=10.0).contains(v)), "{}", row.model);
            assert!(row.bertscore.iter().chain(&row.meteor).flatten().all(|v| (0.0..1.0).contains(v)), "{}", row.model);
        }
        assert!(TABLE_3.iter().flat_map(|r| r.values).all(|v| (0.0..=100.0).contains(&v)));
    }
}
