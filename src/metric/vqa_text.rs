//! Text normalisation of LLaVA-Med's VQA evaluation (`llava/eval/eval_metrics/glossary.py`), quirks included, because
//! published numbers were made with them.

use std::sync::LazyLock;

use regex::Regex;

use super::text::words;

/// Marks that become a blank, or vanish when the text sets one beside a blank.
const MARKS: [char; 21] =
    [';', '/', '[', ']', '"', '{', '}', '(', ')', '=', '+', '\\', '_', '-', '>', '<', '@', '`', ',', '?', '!'];

/// Full stops that are deleted at most: the original passes `re.UNICODE` (32) where the count belongs.
const MOST_STOPS: usize = 32;

/// Contractions; each is recognised with exactly one of its apostrophes missing.
const CONTRACTIONS: &str = "ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've \
    hasn't haven't he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've \
    mustn't must've needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've \
    somebody'd've somebody'll somebody's someone'd someone'd've someone'll someone's something'd something'd've \
    something'll that's there'd there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't \
    we'd've we've weren't what'll what're what's what've when's where'd where's where've who'd who'd've who'll who's \
    who've why'll why're why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll \
    you're you've";

/// A comma between digits switches every mark of the text to deletion.
static DIGIT_COMMA: LazyLock<Regex> =
    LazyLock::new(|| Regex::new(r"\d,\d").unwrap_or_else(|e| unreachable!("constant pattern: {e}")));
static DIGIT: LazyLock<Regex> =
    LazyLock::new(|| Regex::new(r"^\d").unwrap_or_else(|e| unreachable!("constant pattern: {e}")));

/// Lower-cases and normalises as LLaVA-Med does before it compares.
///
/// ```
/// # use medtune::metric::vqa_text::normalise;
/// assert_eq!(normalise("The answer is: Two, nodules."), "answer is: 2 nodules");
/// ```
#[must_use]
pub fn normalise(text: &str) -> String {
    let text = without_stops(&without_marks(&text.to_lowercase()));
    let words: Vec<String> = words(&text.to_lowercase())
        .map(number)
        .filter(|w| !matches!(*w, "a" | "an" | "the"))
        .map(with_apostrophe)
        .collect();
    words.join(" ").replace(',', "")
}

fn without_marks(text: &str) -> String {
    let digits = DIGIT_COMMA.is_match(text);
    let mut out = text.to_string();
    for mark in MARKS {
        let delete = digits || text.contains(&format!("{mark} ")) || text.contains(&format!(" {mark}"));
        out = out.replace(mark, if delete { "" } else { " " });
    }
    out
}

/// Deletes full stops that no digit follows.
fn without_stops(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut deleted = 0;
    for (i, c) in text.char_indices() {
        if c == '.' && deleted < MOST_STOPS && !DIGIT.is_match(&text[i + 1..]) {
            deleted += 1;
        } else {
            out.push(c);
        }
    }
    out
}

fn number(word: &str) -> &str {
    const NUMBERS: [&str; 11] = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"];
    const DIGITS: [&str; 11] = ["0", "1", "2", "3", "4", "5", "6", "7", "8", "9", "10"];
    match NUMBERS.iter().position(|n| *n == word) {
        Some(i) => DIGITS[i],
        None if word == "none" => "0",
        None => word,
    }
}

fn with_apostrophe(word: &str) -> String {
    // The original maps this one the wrong way round.
    if word == "somebody'd" {
        return "somebodyd".into();
    }
    let lacks_one = |form: &str| {
        form.len() == word.len() + 1
            && form
                .match_indices('\'')
                .any(|(i, _)| form[..i] == word[..i.min(word.len())] && form[i + 1..] == word[i..])
    };
    if !word.is_ascii() {
        return word.to_string();
    }
    CONTRACTIONS.split_whitespace().find(|form| lacks_one(form)).unwrap_or(word).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn marks_are_replaced_or_deleted_for_the_whole_text() {
        assert_eq!(normalise("CT-like"), "ct like");
        // "- " deletes every dash.
        assert_eq!(normalise("well- defined x-ray"), "well defined xray");
        // One "1,000" deletes all marks.
        assert_eq!(normalise("x-ray of 1,000"), "xray of 1000");
    }

    #[test]
    fn numbers_articles_and_contractions() {
        assert_eq!(normalise("The None of a TEN"), "0 of 10");
        assert_eq!(normalise("dont couldn'tve couldnt've couldntve"), "don't couldn't've couldn't've couldntve");
        assert_eq!(normalise("lets shes somebody'd"), "lets shes somebodyd");
    }

    #[test]
    fn full_stops_stay_before_digits_and_after_thirty_two() {
        assert_eq!(normalise("3.5 cm. Done."), "3.5 cm done");
        assert_eq!(normalise(&"a.b ".repeat(40)).matches('.').count(), 8);
    }
}
