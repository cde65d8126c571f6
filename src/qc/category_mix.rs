//! Objects that are called nonexistent and exist.

use super::{QcContext, QcRule, Verdict, claim::known, reject, words::normal};
use crate::{datasets::phantom::words::info, error::Result, metric::porter::stem, sample::Sample};

/// The rule.
pub struct CategoryMix;

impl QcRule for CategoryMix {
    fn code(&self) -> &'static str {
        "category_mix"
    }

    fn doc(&self) -> &'static str {
        "What a `nonexistent_object` question presupposes must not occur in the annotation; what an `existent_manipulation` \
         question changes must.\n\
         Otherwise the rates by category are rates of something else. Where the row states no claim in a known vocabulary, \
         a word counts that the question has, the answer denies, and the annotation states.\n\
         Example: category nonexistent_object, \"Is the nodule large?\", of an image with a small nodule."
    }

    fn check(&self, sample: &Sample, _context: &QcContext) -> Result<Verdict> {
        let Some((claim, truth)) = known(sample) else { return self.by_words(sample) };
        let Some(kind) = claim.kind() else { return Ok(Verdict::Keep) };
        let exists = truth.find(kind).is_some();
        match (sample.category.as_deref(), exists) {
            (Some("nonexistent_object"), true) => {
                reject(self, format!("the annotation states a {} that is called nonexistent", info(kind).noun))
            }
            (Some("existent_manipulation"), false) => {
                reject(self, format!("the annotation states no {} that could be manipulated", info(kind).noun))
            }
            _ => Ok(Verdict::Keep),
        }
    }
}

/// Words that deny what follows them.
const DENIALS: [&str; 5] = ["no", "not", "without", "absence", "never"];

/// Words behind a denial that it reaches.
const REACH: usize = 4;

/// Letters of a word that can name a finding; shorter ones are mostly grammar.
const LETTERS: usize = 5;

/// Words that name no finding.
const GENERAL: &str = "image images picture scan radiograph x-ray xray visible shown seen present evidence patient there \
    which where about other these those their finding findings appear appears noted noticed signs structure structures \
    region areas small large right lower upper clear normal abnormal abnormality abnormalities";

impl CategoryMix {
    /// Rows in words of their own: a word of the question that the answer denies and the annotation states.
    fn by_words(&self, sample: &Sample) -> Result<Verdict> {
        let Some(annotation) =
            sample.annotation.as_deref().filter(|_| sample.category.as_deref() == Some("nonexistent_object"))
        else {
            return Ok(Verdict::Keep);
        };
        let question = normal(&sample.question());
        let names = |word: &&str| word.len() >= LETTERS && !GENERAL.split_whitespace().any(|g| g == *word);
        let asked: Vec<String> = question.split(' ').filter(names).map(stem).collect();
        let (denied, _) = by_denial(&normal(sample.answer()));
        let (_, stated) = by_denial(&normal(annotation));
        match asked.iter().find(|word| denied.contains(word) && stated.contains(word)) {
            Some(word) => reject(self, format!("the annotation states \"{word}\", which is called nonexistent")),
            None => Ok(Verdict::Keep),
        }
    }
}

/// Stems of the words of a text that a denial reaches, and of all others.
fn by_denial(text: &str) -> (Vec<String>, Vec<String>) {
    let (mut denied, mut stated, mut left) = (Vec::new(), Vec::new(), 0);
    for word in text.split(' ') {
        if DENIALS.contains(&word) {
            left = REACH;
        } else if left > 0 {
            denied.push(stem(word));
            left -= 1;
        } else {
            stated.push(stem(word));
        }
    }
    (denied, stated)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::qc::tests::{rejects, row};

    #[test]
    fn categories_fit() {
        let mut sample = row("Is the nodule large?", "No, it is small.");
        sample.annotation = Some("Chest film. There is one small nodule in the left lung.".into());
        let claim =
            serde_json::json!({"ask": "attribute", "kind": "nodule", "name": "size", "value": {"size": "large"}});
        sample.meta.insert("claim".into(), claim);
        sample.category = Some("existent_manipulation".into());
        assert!(!rejects(&CategoryMix, &sample));
        sample.category = Some("nonexistent_object".into());
        assert!(rejects(&CategoryMix, &sample));
    }

    #[test]
    fn words_of_the_annotation_cannot_be_nonexistent() {
        let judged = |question: &str, answer: &str, annotation: &str| {
            let mut sample = row(question, answer);
            sample.category = Some("nonexistent_object".into());
            sample.annotation = Some(annotation.into());
            rejects(&CategoryMix, &sample)
        };
        let question = "I noticed pleural effusions on the left. Are they large?";
        let answer = "There is no pleural effusion in this radiograph, the lungs are clear.";
        assert!(judged(question, answer, "Chest film with a small left pleural effusion."));
        assert!(!judged(question, answer, "Chest film without pleural effusion or consolidation."));
        assert!(!judged(question, answer, "Chest film with a nodule."));
        assert!(!judged(
            "Is the pacemaker in place?",
            "No pacemaker is visible; there is an adenocarcinoma.",
            "Adenocarcinoma of the lung."
        ));
    }
}
