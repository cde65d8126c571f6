//! Hallucination categories and ordinary tasks, under every name a model may give them.

use crate::sample::Polarity;

/// Categories of questions with a false premise.
pub const NEGATIVE: [&str; 3] = ["nonexistent_object", "existent_manipulation", "knowledge_distortion"];

/// Tasks of ordinary questions.
pub const POSITIVE: [&str; 7] =
    ["caption", "detection", "attribute", "modality", "recognition", "reasoning", "impression"];

/// The categories of a polarity.
#[must_use]
pub fn of(polarity: Polarity) -> &'static [&'static str] {
    match polarity {
        Polarity::Hallucination => &NEGATIVE,
        Polarity::NonHallucination => &POSITIVE,
    }
}

/// The category that a model means by `name`; none if it is no category of this polarity.
#[must_use]
pub fn find(name: &str, polarity: Polarity) -> Option<&'static str> {
    let letters: String = name.chars().filter(char::is_ascii_alphabetic).collect::<String>().to_lowercase();
    let known = of(polarity);
    if let Some(exact) = known.iter().find(|k| k.replace('_', "") == letters) {
        return Some(exact);
    }
    // In this order: "nonexistent" holds "existent".
    let hints: &[(&str, &str)] = match polarity {
        Polarity::Hallucination => &[
            ("nonexist", "nonexistent_object"),
            ("notexist", "nonexistent_object"),
            ("fictitious", "nonexistent_object"),
            ("knowledge", "knowledge_distortion"),
            ("existent", "existent_manipulation"),
            ("existing", "existent_manipulation"),
            ("manipulation", "existent_manipulation"),
        ],
        Polarity::NonHallucination => &[
            ("caption", "caption"),
            ("description", "caption"),
            ("sentiment", "impression"),
            ("impression", "impression"),
            ("detection", "detection"),
            ("presence", "detection"),
            ("attribute", "attribute"),
            ("location", "attribute"),
            ("counting", "attribute"),
            ("modality", "modality"),
            ("recognition", "recognition"),
            ("diagnosis", "recognition"),
            ("reasoning", "reasoning"),
            ("interpretation", "reasoning"),
        ],
    };
    hints.iter().find(|(hint, _)| letters.contains(hint)).map(|(_, category)| *category)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn categories_are_found_under_other_names() {
        let negative = |name| find(name, Polarity::Hallucination);
        for name in ["nonexistent_object", "Non-existent object", "Nonexistent Medical Object Introduction"] {
            assert_eq!(negative(name), Some("nonexistent_object"), "{name}");
        }
        assert_eq!(negative("Existent Object Manipulation"), Some("existent_manipulation"));
        assert_eq!(negative("2. Medical Knowledge Manipulation"), Some("knowledge_distortion"));
        assert_eq!(negative("caption"), None);
        assert_eq!(find("Image Sentiment Analysis", Polarity::NonHallucination), Some("impression"));
        assert_eq!(find("", Polarity::NonHallucination), None);
    }
}
