//! Nearly the same question and answer: about the same image, or at length anywhere.

use super::{Memory, QcRule, Row, Verdict, reject};
use crate::error::Result;

/// The rule.
pub struct NearDuplicate;

impl QcRule for NearDuplicate {
    fn code(&self) -> &'static str {
        "near_duplicate"
    }

    fn doc(&self) -> &'static str {
        "Two constructed pairs of one image must differ in more than a fifth of the words of question or answer, and in more \
         than their order (ROUGE-L below 0.85); pairs of `qc.long_text_words` words or more must also differ from those of \
         all other images (80 % of neighbouring words in common, found by MinHash).\n\
         Paraphrases of one pair add weight but no knowledge, and long texts do not agree by chance. Texts that differ in a \
         number, a side, a size or a negation say different things and are kept.\n\
         Example: \"Can you see a nodule here?\" and \"Can you see a nodule in here?\", answered alike."
    }

    fn compare(&self, row: &Row, memory: &Memory) -> Result<Verdict> {
        if !row.is_constructed() {
            return Ok(Verdict::Keep);
        }
        if memory.near_in_group(row) {
            return reject(self, "the image already has nearly this question and answer");
        }
        match memory.near_anywhere(row) {
            Some(share) => reject(
                self,
                format!(
                    "another image has nearly this question and answer: {:.0} % of neighbouring words",
                    100.0 * share
                ),
            ),
            None => Ok(Verdict::Keep),
        }
    }
}

#[cfg(test)]
mod tests {
    use rand::{RngExt, seq::IndexedRandom};

    use crate::{
        qc::{QcConfig, tests::codes, tests::row},
        random::stream,
        sample::Sample,
    };

    #[test]
    fn both_texts_must_be_alike() {
        let rows = [
            row("Can you see a nodule here?", "Yes, in the left lung."),
            row("Can you see a nodule in here?", "Yes, in the left lung!"),
            row("Can you see a nodule in here?", "There is a small nodule on the left."),
            row("Can you see a nodule in here?", "There is a small nodule on the right."),
        ];
        assert_eq!(codes(&rows, &QcConfig::default()), [None, Some("near_duplicate"), None, None]);
    }

    /// Rows of words drawn from a vocabulary as uneven as that of language, and copies of some of them in which up to
    /// one word of twenty is changed, left out or added.
    fn planted(seed: u64, originals: usize, copies: usize) -> (Vec<Sample>, usize) {
        let mut rng = stream(seed, "planted", 0);
        let rank = |rng: &mut rand_chacha::ChaCha8Rng| (3000f64.powf(rng.random::<f64>())) as usize;
        let text = |rng: &mut rand_chacha::ChaCha8Rng, words: usize| -> Vec<String> {
            let mut out: Vec<String> = (0..words).map(|_| format!("w{}x", letters(rank(rng)))).collect();
            // Every English text has one of these.
            out[0] = "the".into();
            out
        };
        let mut pairs: Vec<(Vec<String>, Vec<String>)> = (0..originals)
            .map(|_| {
                let (q, a) = (rng.random_range(9..20), rng.random_range(35..60));
                (text(&mut rng, q), text(&mut rng, a))
            })
            .collect();
        for _ in 0..copies {
            let source = rng.random_range(0..originals);
            let (mut question, mut answer) = pairs[source].clone();
            for _ in 0..rng.random_range(0..=(question.len() + answer.len()) / 20) {
                let part = *[true, false].choose(&mut rng).unwrap();
                let text = if part { &mut question } else { &mut answer };
                let at = rng.random_range(1..text.len());
                let new = format!("w{}x", letters(rank(&mut rng)));
                match rng.random_range(0..3) {
                    0 => text[at] = new,
                    1 => drop(text.remove(at)),
                    _ => text.insert(at, new),
                }
            }
            pairs.push((question, answer));
        }
        let rows = pairs.iter().enumerate().map(|(i, (q, a))| Sample {
            id: format!("r{i}"),
            group: format!("image {i}"),
            ..row(&q.join(" "), &a.join(" "))
        });
        (rows.collect(), originals)
    }

    /// A number in letters, so that no word has a digit.
    fn letters(mut n: usize) -> String {
        let mut out = String::new();
        loop {
            out.push((b'a' + (n % 26) as u8) as char);
            n /= 26;
            if n == 0 {
                return out;
            }
        }
    }

    #[test]
    fn planted_copies_are_found_across_images_and_nothing_else() {
        let config = QcConfig { max_template_share: 1.0, ..QcConfig::default() };
        let (rows, originals) = planted(7, 4000, 1000);
        let found = codes(&rows, &config);
        let near = |code: &Option<&str>| matches!(code, Some("near_duplicate" | "duplicate" | "repeated"));
        let (right, wrong) = (
            found[originals..].iter().filter(|c| near(c)).count(),
            found[..originals].iter().filter(|c| near(c)).count(),
        );
        let (recall, precision) = (right as f64 / 1000.0, right as f64 / (right + wrong).max(1) as f64);
        eprintln!("near duplicates: recall {recall:.3}, precision {precision:.3}");
        assert!(recall >= 0.97 && precision >= 0.99, "recall {recall}, precision {precision}");
        assert!(found.iter().flatten().all(|c| *c == "near_duplicate"), "{found:?}");
        let off = QcConfig { long_text_words: 0, ..config };
        assert!(codes(&rows, &off).iter().all(Option::is_none));
    }

    #[test]
    fn a_changed_side_makes_another_row() {
        let text = |side: &str| {
            format!(
                "The frontal chest radiograph shows a rounded opacity with well defined margins that projects over the \
                 {side} hemithorax beside the heart border, without any sign of pleural fluid or of a collapsed lung"
            )
        };
        let rows: Vec<Sample> = ["left", "right", "left"]
            .iter()
            .enumerate()
            .map(|(i, side)| Sample {
                group: format!("image {i}"),
                ..row("What does this radiograph of the chest show?", &text(side))
            })
            .collect();
        assert_eq!(codes(&rows, &QcConfig::default()), [None, None, Some("near_duplicate")]);
    }
}
