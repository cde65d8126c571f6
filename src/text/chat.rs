//! LLaVA-Med's `mistral_instruct` prompts, `<image>` splitting, and label masks (LLaVA's `preprocess_llama_2`).

use super::{merge::IMAGE_TOKEN_INDEX, tokenizer::Tokenizer};
use crate::{
    error::{Error, Kind, Result},
    vlm::IGNORE,
};

/// Stands for one image in text.
pub const IMAGE_MARK: &str = "<image>";

/// Ends an answer in the template.
const END: &str = "</s>";

/// Ends a question in the template, with the space before the answer.
const ASK_END: &str = "[/INST] ";

/// The prompt of alternating messages, the first from the user: `[INST] {user} [/INST]`, ` {assistant} </s>`, with
/// nothing between turns. An empty message contributes nothing, as in the original.
///
/// `system` goes into the first message between `<<SYS>>` marks; LLaVA-Med itself uses none.
#[must_use]
pub fn mistral_instruct<S: AsRef<str>>(system: &str, messages: &[S]) -> String {
    let mut out = String::new();
    for (i, message) in messages.iter().map(AsRef::as_ref).enumerate() {
        if message.is_empty() {
            continue;
        }
        if !i.is_multiple_of(2) {
            out.push_str(&format!(" {message} {END}"));
        } else if i == 0 && !system.is_empty() {
            out.push_str(&format!("[INST] <<SYS>>\n{system}\n<</SYS>>\n\n{message} [/INST]"));
        } else {
            out.push_str(&format!("[INST] {message} [/INST]"));
        }
    }
    out
}

/// LLaVA's clean-up of a turn with an image: all marks removed, the text trimmed, one mark and a line break in front.
#[must_use]
pub fn image_first(text: &str) -> String {
    let rest = text.replace(IMAGE_MARK, "");
    strip(&format!("{IMAGE_MARK}\n{}", strip(&rest))).to_string()
}

/// Python's `str.strip`.
fn strip(text: &str) -> &str {
    text.trim_matches(|c: char| c.is_whitespace() || ('\x1c'..='\x1f').contains(&c))
}

/// Ids of a prompt in which every `<image>` becomes [`IMAGE_TOKEN_INDEX`]. The text between marks is tokenised chunk by
/// chunk, so each chunk has its own leading space; `<s>` is kept once.
///
/// # Errors
/// As [`Tokenizer::encode`].
pub fn tokenize_with_images(tokenizer: &Tokenizer, prompt: &str) -> Result<Vec<i32>> {
    let mut ids = Vec::new();
    for (i, chunk) in prompt.split(IMAGE_MARK).enumerate() {
        let chunk = tokenizer.encode(chunk)?;
        if i == 0 {
            ids = chunk;
        } else {
            let bos = usize::from(chunk.first() == Some(&tokenizer.bos_id()));
            ids.push(IMAGE_TOKEN_INDEX);
            ids.extend_from_slice(&chunk[bos..]);
        }
    }
    Ok(ids)
}

/// A conversation as ids and labels.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Labelled {
    /// Ids, [`IMAGE_TOKEN_INDEX`] at images.
    pub input_ids: Vec<i32>,
    /// Unshifted labels, [`IGNORE`] outside answers.
    pub labels: Vec<i32>,
    /// When the rounds do not add up to the whole: tokens accounted for, and tokens there are. Everything is masked.
    pub mismatch: Option<(usize, usize)>,
}

/// Tokenises a whole conversation and masks everything but the answers and their `</s>`.
///
/// Text-only conversations are cut to `max_length` tokens, those with images are not. A round without exactly one
/// `[/INST] `, because the answer quotes it or is empty, or the user wrote `</s>`, is a mismatch.
///
/// # Errors
/// As [`Tokenizer::encode`].
pub fn label(tokenizer: &Tokenizer, prompt: &str, has_image: bool, max_length: usize) -> Result<Labelled> {
    let encode = |text: &str| {
        if has_image { tokenize_with_images(tokenizer, text) } else { tokenizer.encode(text) }
    };
    let mut input_ids = encode(prompt)?;
    if !has_image {
        input_ids.truncate(max_length);
    }
    let total = input_ids.iter().filter(|id| **id != tokenizer.unk_id()).count();
    let mut labels = input_ids.clone();
    let mut mask = |range: std::ops::Range<usize>| {
        let end = range.end.min(labels.len());
        labels[range.start.min(end)..end].fill(IGNORE);
    };
    mask(0..1);
    let mut done = 1;
    for round in prompt.split(END).take_while(|round| !round.is_empty()) {
        let Some((question, answer)) = round.split_once(ASK_END) else { break };
        if answer.contains(ASK_END) {
            break;
        }
        // The space that ends the question is a token of its own there, but part of the answer's first token here, and
        // the `<s>` that every call adds stands for the `</s>` that splitting removed.
        let asked = encode(&format!("{question}{ASK_END}"))?.len().saturating_sub(2);
        mask(done..done + asked);
        done += encode(round)?.len();
    }
    mask(done..usize::MAX);
    let mismatch = (done < max_length && done != total).then_some((done, total));
    if mismatch.is_some() {
        labels.fill(IGNORE);
    }
    Ok(Labelled { input_ids, labels, mismatch })
}

/// Explains a mismatch of [`label`] by what is in the prompt.
#[must_use]
pub fn mismatch_error(prompt: &str, (done, total): (usize, usize)) -> Error {
    let rounds: Vec<&str> = prompt.split(END).filter(|r| !r.is_empty()).collect();
    let help = match rounds.iter().find(|r| r.matches(ASK_END).count() != 1) {
        Some(r) if r.matches(ASK_END).count() > 1 => "a message quotes \"[/INST] \", or an answer is empty; rewrite it",
        Some(_) => "an answer is missing or empty; complete the row or leave it out",
        None => "a message holds text that the tokenizer joins with the template; rewrite it",
    };
    Error::new(Kind::Data, "the labels of a row would all be masked, because its turns cannot be told apart")
        .expected(format!("{total} tokens in rounds of question and answer"))
        .found(done)
        .help(help)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::text::bpe::train_bpe;

    fn tokenizer() -> Tokenizer {
        Tokenizer::from_json_bytes(&train_bpe(["[INST] is it a cyst? [/INST] it is a cyst. "; 9], 420).unwrap())
            .unwrap()
    }

    #[test]
    fn turns_follow_each_other_without_separators() {
        assert_eq!(mistral_instruct("", &["a", "b", "c"]), "[INST] a [/INST] b </s>[INST] c [/INST]");
        assert_eq!(mistral_instruct("", &["a", "", "c"]), "[INST] a [/INST][INST] c [/INST]");
        assert_eq!(mistral_instruct("s", &["a"]), "[INST] <<SYS>>\ns\n<</SYS>>\n\na [/INST]");
        assert_eq!(image_first(" x <image>\n<image> "), "<image>\nx");
    }

    #[test]
    fn only_answers_and_their_ends_are_supervised() {
        let tokenizer = tokenizer();
        let prompt = mistral_instruct("", &["<image>\nis it?", "it is a cyst.", "a cyst?", "it is."]);
        let row = label(&tokenizer, &prompt, true, 100).unwrap();
        assert_eq!(row.mismatch, None);
        let supervised: Vec<i32> = row.labels.iter().copied().filter(|l| *l != IGNORE).collect();
        assert_eq!(tokenizer.decode(&supervised, false), "it is a cyst. </s> it is. </s>");
        assert_eq!(row.input_ids.iter().filter(|id| **id == IMAGE_TOKEN_INDEX).count(), 1);
        assert_eq!(row.input_ids.iter().filter(|id| **id == tokenizer.bos_id()).count(), 1);
    }

    #[test]
    fn a_round_that_cannot_be_split_masks_the_whole_row() {
        let tokenizer = tokenizer();
        for messages in [["say </s> x", "it"], ["a", "it [/INST] is"], ["a", ""]] {
            let prompt = mistral_instruct("", &messages);
            let row = label(&tokenizer, &prompt, false, 100).unwrap();
            let mismatch = row.mismatch.unwrap_or_else(|| panic!("{messages:?}"));
            assert!(row.labels.iter().all(|l| *l == IGNORE), "{messages:?}");
            assert!(mismatch_error(&prompt, mismatch).to_string().contains("masked"));
        }
    }
}
