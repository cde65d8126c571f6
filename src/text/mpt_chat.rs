//! InternVL's chat templates `phi3-chat` and `internlm2-chat`, and which words of a conversation are learnt.
//!
//! Both are of MPT style: system and separator, then role, message and separator for each turn; an open turn ends with
//! its role. Reference: `conversation.py`, `preprocess_phi3` and `preprocess_internlm` of InternVL 1.5. The originals
//! find the answers by tokenising parts of the text again and counting; so does this module, since the counts depend
//! on how a tokenizer treats the beginning of a text.

use std::ops::Range;

use super::slow_tokenizer::{SlowTokenizer, is_space};
use crate::{
    error::{Error, Kind, Result},
    vlm::IGNORE,
};

/// Stands for one image in a message.
pub const IMAGE_MARK: &str = "<image>";
/// In front of the positions of an image.
pub const IMAGE_START: &str = "<img>";
/// One position of an image.
pub const IMAGE_CONTEXT: &str = "<IMG_CONTEXT>";
/// Behind the positions of an image.
pub const IMAGE_END: &str = "</img>";

/// System message of the originals where the config names none.
const SYSTEM_MESSAGE: &str = "你是由上海人工智能实验室联合商汤科技开发的书生多模态大模型，英文名叫InternVL, \
                              是一个有用无害的人工智能助手。";

/// How answers are found in tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Masking {
    /// `preprocess_phi3`: text is cut at separators.
    Turns,
    /// `preprocess_internlm`: text is cut at assistant tags, messages are stripped.
    AssistantTags,
}

/// A chat template.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MptChat {
    /// Name in config.json.
    pub name: &'static str,
    /// In front of the system message.
    pub system_prefix: &'static str,
    /// Tag of the user and of the assistant.
    pub roles: [&'static str; 2],
    /// Behind every message; its id ends an answer.
    pub separator: &'static str,
    /// System message.
    pub system_message: String,
    masking: Masking,
}

impl MptChat {
    /// The template called `name`; `system_message` replaces the original's.
    ///
    /// # Errors
    /// There is none.
    pub fn named(name: &str, system_message: Option<&str>) -> Result<Self> {
        let (name, system_prefix, roles, separator, masking) = match name {
            "phi3-chat" => ("phi3-chat", "<|system|>\n", ["<|user|>\n", "<|assistant|>\n"], "<|end|>", Masking::Turns),
            "internlm2-chat" => (
                "internlm2-chat",
                "<|im_start|>system\n",
                ["<|im_start|>user\n", "<|im_start|>assistant\n"],
                "<|im_end|>",
                Masking::AssistantTags,
            ),
            _ => {
                return Err(Error::new(Kind::Text, "unknown chat template")
                    .expected("phi3-chat or internlm2-chat")
                    .found(name));
            }
        };
        let system_message = system_message.unwrap_or(SYSTEM_MESSAGE).to_string();
        Ok(Self { name, system_prefix, roles, separator, system_message, masking })
    }

    /// The text of a conversation whose messages are those of user and assistant in turn. An empty message leaves the
    /// turn open: it ends with its role.
    #[must_use]
    pub fn text<'a>(&self, messages: impl IntoIterator<Item = &'a str>) -> String {
        let mut text = format!("{}{}{}", self.system_prefix, self.system_message, self.separator);
        for (i, message) in messages.into_iter().enumerate() {
            text.push_str(self.roles[i % 2]);
            if !message.is_empty() {
                text.push_str(message);
                text.push_str(self.separator);
            }
        }
        text
    }

    /// A message as training uses it: InternLM2's are stripped.
    #[must_use]
    pub fn training_message<'a>(&self, message: &'a str) -> &'a str {
        match self.masking {
            Masking::Turns => message,
            Masking::AssistantTags => message.trim_matches(is_space),
        }
    }

    /// Labels of `ids`, the tokens of `text` (perhaps cut at `max_length`, perhaps padded): answers and the separators
    /// that close them.
    ///
    /// As in the originals, everything is ignored when the counted length disagrees with the number of tokens that are
    /// not `pad_id`, which happens when a separator stands inside an answer or a turn is left open.
    #[must_use]
    pub fn labels(
        &self,
        text: &str,
        ids: &[i32],
        tokenizer: &SlowTokenizer,
        pad_id: i32,
        max_length: usize,
    ) -> Vec<i32> {
        let mut labels = ids.to_vec();
        let tokens = ids.iter().filter(|id| **id != pad_id).count();
        let cursor = match self.masking {
            Masking::Turns => self.mask_turns(text, tokenizer, &mut labels),
            Masking::AssistantTags => self.mask_tags(text, tokenizer, &mut labels),
        };
        ignore(&mut labels, cursor..usize::MAX);
        if cursor < max_length && cursor != tokens {
            labels.fill(IGNORE);
        }
        labels
    }

    /// Returns the counted length.
    fn mask_turns(&self, text: &str, tokenizer: &SlowTokenizer, labels: &mut [i32]) -> usize {
        let count = |text: &str| tokenizer.encode(text, true).len();
        let end_of_text = tokenizer.token_to_id("<|endoftext|>");
        labels.iter_mut().filter(|l| Some(**l) == end_of_text).for_each(|l| *l = IGNORE);
        ignore(labels, 0..1);
        let answer_tag = format!("{}{}", self.separator, self.roles[1]);
        let pieces: Vec<&str> = text.split(self.separator).collect();
        let first = 3.min(pieces.len());
        let turns = std::iter::once(&pieces[..first]).chain(pieces[first..].chunks(2));
        let mut cursor = 1;
        for (i, turn) in turns.enumerate() {
            let turn = turn.join(self.separator);
            let Some((question, answer)) = turn.split_once(&answer_tag) else { break };
            if answer.contains(&answer_tag) {
                break;
            }
            // The first turn is counted with the beginning mark at the cursor's start; the others also with the lone
            // space that the tokenizer puts in front of a role token.
            let extra = usize::from(i > 0);
            let instruction = count(&format!("{question}{answer_tag}")).saturating_sub(1 + extra);
            ignore(labels, cursor..cursor + instruction);
            cursor += count(&turn) - extra;
        }
        cursor
    }

    /// Returns the counted length.
    fn mask_tags(&self, text: &str, tokenizer: &SlowTokenizer, labels: &mut [i32]) -> usize {
        let count = |text: &str| tokenizer.encode(text, true).len() - 1;
        ignore(labels, 0..1);
        let pieces: Vec<&str> = text.split(self.roles[1]).collect();
        let mut cursor = 1;
        for (i, piece) in pieces.iter().enumerate() {
            let last = i + 1 == pieces.len();
            let (answer, question) = match piece.split_once(self.roles[0]) {
                _ if i == 0 => ("", Some(piece.to_string())),
                Some((answer, question)) if !last => (answer, Some(format!("{}{question}", self.roles[0]))),
                _ => (*piece, None),
            };
            cursor += count(answer);
            if let Some(question) = question {
                let instruction = count(&format!("{question}{}", self.roles[1]));
                ignore(labels, cursor..cursor + instruction);
                cursor += instruction;
            }
        }
        cursor
    }
}

fn ignore(labels: &mut [i32], range: Range<usize>) {
    let end = range.end.min(labels.len());
    if let Some(part) = labels.get_mut(range.start..end) {
        part.fill(IGNORE);
    }
}

/// Replaces the marks of `text` from the left by as many runs of image positions; later marks stay.
#[must_use]
pub fn expand_images(text: &str, positions: &[usize]) -> String {
    let mut out = text.to_string();
    let mut from = 0;
    for count in positions {
        let Some(at) = out[from..].find(IMAGE_MARK).map(|at| from + at) else { break };
        let run = format!("{IMAGE_START}{}{IMAGE_END}", IMAGE_CONTEXT.repeat(*count));
        out.replace_range(at..at + IMAGE_MARK.len(), &run);
        from = at + run.len();
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn templates_write_roles_and_separators() {
        let phi3 = MptChat::named("phi3-chat", Some("S")).unwrap();
        assert_eq!(
            phi3.text(["q", "a", "r", ""]),
            "<|system|>\nS<|end|><|user|>\nq<|end|><|assistant|>\na<|end|><|user|>\nr<|end|><|assistant|>\n"
        );
        let internlm2 = MptChat::named("internlm2-chat", None).unwrap();
        let text = internlm2.text(["q", "a"]);
        assert!(text.starts_with("<|im_start|>system\n你是由") && text.contains("InternVL, 是一个"), "{text}");
        assert!(text.ends_with("<|im_end|><|im_start|>user\nq<|im_end|><|im_start|>assistant\na<|im_end|>"), "{text}");
        assert_eq!((phi3.training_message(" x\n"), internlm2.training_message(" x\n")), (" x\n", "x"));
        assert!(MptChat::named("vicuna", None).unwrap_err().to_string().contains("vicuna"));
    }

    #[test]
    fn images_are_expanded_from_the_left() {
        assert_eq!(
            expand_images("a <image> b <image> c <image>", &[2, 1]),
            "a <img><IMG_CONTEXT><IMG_CONTEXT></img> b <img><IMG_CONTEXT></img> c <image>"
        );
        assert_eq!(expand_images("none", &[1]), "none");
    }
}
