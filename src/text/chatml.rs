//! ChatML prompts and label masks.
//!
//! Reference: `make_context` of Qwen-VL-Chat (prompts, history window) and `preprocess` of its `finetune.py` (masks).

use super::{
    qwen::{CHAT_SPECIALS, QwenTokenizer},
    tiktoken::AllowedSpecial,
};
use crate::{
    error::{Error, Kind, Result},
    sample::{Role, Turn},
    vlm::IGNORE,
};

/// System message of the original where none is given.
pub const DEFAULT_SYSTEM: &str = "You are a helpful assistant.";

/// A prompt, as text and as ids.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Prompt {
    /// What the ids say.
    pub text: String,
    /// Token ids, images expanded to their spans.
    pub ids: Vec<i32>,
}

impl Prompt {
    /// `<|im_start|>role\ncontent<|im_end|>`; role, line end and content are tokenised one by one.
    fn push_turn(&mut self, t: &QwenTokenizer, role: &str, content: &str) -> Result<()> {
        self.push_header(t, role)?;
        self.ids.extend(t.encode(content, CHAT_SPECIALS)?);
        self.ids.push(t.im_end);
        self.text.push_str(content);
        self.text.push_str("<|im_end|>");
        Ok(())
    }

    fn push_header(&mut self, t: &QwenTokenizer, role: &str) -> Result<()> {
        self.ids.push(t.im_start);
        self.ids.extend(t.encode(role, CHAT_SPECIALS)?);
        self.text.push_str("<|im_start|>");
        self.text.push_str(role);
        self.push_newline(t)
    }

    fn push_newline(&mut self, t: &QwenTokenizer) -> Result<()> {
        self.ids.extend(t.encode("\n", AllowedSpecial::None)?);
        self.text.push('\n');
        Ok(())
    }

    fn append(&mut self, other: Self) {
        self.text.push_str(&other.text);
        self.ids.extend(other.ids);
    }
}

/// The prompt that asks `query` after `history` (pairs of question and answer; no answer if a turn was interrupted).
///
/// The newest turns are kept as long as system, turn and the turns kept so far stay below `max_window_size` ids; the
/// first that does not fit ends the search. The new query is not counted.
///
/// # Errors
/// Image tags that do not encode (see [`QwenTokenizer::encode`]).
pub fn prompt(
    t: &QwenTokenizer,
    system: &str,
    history: &[(String, Option<String>)],
    query: &str,
    max_window_size: usize,
) -> Result<Prompt> {
    let mut out = Prompt::default();
    out.push_turn(t, "system", system)?;
    let (mut kept, mut size) = (Vec::new(), out.ids.len());
    for (question, answer) in history.iter().rev() {
        let turn = past_turn(t, question, answer.as_deref())?;
        size += turn.ids.len();
        if size >= max_window_size {
            break;
        }
        kept.push(turn);
    }
    kept.into_iter().rev().for_each(|turn| out.append(turn));
    out.push_newline(t)?;
    out.push_turn(t, "user", query)?;
    out.push_newline(t)?;
    out.push_header(t, "assistant")?;
    Ok(out)
}

fn past_turn(t: &QwenTokenizer, question: &str, answer: Option<&str>) -> Result<Prompt> {
    let mut turn = Prompt::default();
    turn.push_newline(t)?;
    turn.push_turn(t, "user", question)?;
    turn.push_newline(t)?;
    if let Some(answer) = answer {
        turn.push_turn(t, "assistant", answer)?;
    }
    Ok(turn)
}

/// A conversation with labels.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Labelled {
    /// Token ids, images expanded to their spans.
    pub ids: Vec<i32>,
    /// Unshifted labels, [`IGNORE`] where nothing is supervised.
    pub labels: Vec<i32>,
}

impl Labelled {
    /// One block `<|im_start|>role\ntext<|im_end|>\n`. As in the original, the markers and the last line end of every
    /// block are targets, whoever speaks; the text only when the assistant does.
    fn push_block(&mut self, t: &QwenTokenizer, role: &str, text: &[i32], supervised: bool) -> Result<()> {
        let newline = t.encode("\n", AllowedSpecial::None)?;
        self.push(&[t.im_start], true);
        self.push(&t.encode(role, AllowedSpecial::None)?, false);
        self.push(&newline, false);
        self.push(text, supervised);
        self.push(&[t.im_end], true);
        self.push(&newline, true);
        Ok(())
    }

    fn push(&mut self, ids: &[i32], supervised: bool) {
        self.ids.extend_from_slice(ids);
        self.labels.extend(ids.iter().map(|id| if supervised { *id } else { IGNORE }));
    }
}

/// Ids and labels of a whole conversation. A first turn that is not the user's is left out, as in the original.
///
/// `specials` says which special strings in system and turns are tokens: the original allows all of them, so that a
/// marker typed by a user acts as one; [`CHAT_SPECIALS`] keeps markers as text.
///
/// # Errors
/// A system turn after the start, or image tags that do not encode.
pub fn conversation(t: &QwenTokenizer, turns: &[Turn], specials: AllowedSpecial<'_>) -> Result<Labelled> {
    let (system, turns) = match turns {
        [first, rest @ ..] if first.role == Role::System => (first.text.as_str(), rest),
        _ => (DEFAULT_SYSTEM, turns),
    };
    let skipped = usize::from(turns.first().is_some_and(|first| first.role == Role::Assistant));
    let mut out = Labelled::default();
    out.push_block(t, "system", &t.encode(system, specials)?, false)?;
    for turn in &turns[skipped..] {
        let role = role_name(turn.role)?;
        out.push_block(t, role, &t.encode(&turn.text, specials)?, turn.role == Role::Assistant)?;
    }
    Ok(out)
}

fn role_name(role: Role) -> Result<&'static str> {
    match role {
        Role::User => Ok("user"),
        Role::Assistant => Ok("assistant"),
        Role::System => Err(Error::new(Kind::Data, "a system turn in the middle of a conversation")
            .help("only the first turn may be the system's")),
    }
}

#[cfg(test)]
mod tests {
    use super::{super::qwen::tests::bytes_only, *};

    fn turn(role: Role, text: &str) -> Turn {
        Turn { role, text: text.into() }
    }

    #[test]
    fn the_prompt_says_what_its_ids_say() {
        let t = bytes_only();
        let history = vec![("q".to_string(), Some("a".to_string())), ("r".to_string(), None)];
        let p = prompt(&t, "s", &history, "x<|im_end|>", 1000).unwrap();
        assert_eq!(t.decode(&p.ids, crate::text::qwen::DecodeOptions::default()).unwrap(), p.text);
        // Typed markers stay text: only the six real ones are ids.
        assert_eq!(p.ids.iter().filter(|id| **id == t.im_end).count(), 5);
        assert!(p.text.contains("<|im_start|>user\nr<|im_end|>\n\n<|im_start|>user\nx"));
    }

    #[test]
    fn the_window_drops_the_oldest_turns() {
        let t = bytes_only();
        let history: Vec<_> = (0..3).map(|i| (format!("{i}"), Some("a".repeat(20)))).collect();
        let all = prompt(&t, "s", &history, "x", 10_000).unwrap();
        let one = prompt(&t, "s", &history, "x", 75).unwrap();
        assert!(one.text.contains("user\n2<") && !one.text.contains("user\n1<"), "{}", one.text);
        assert!(all.text.contains("user\n0<"));
    }

    #[test]
    fn markers_line_ends_and_answers_are_targets() {
        let t = bytes_only();
        let turns = [turn(Role::Assistant, "dropped"), turn(Role::User, "q"), turn(Role::Assistant, "yes")];
        let row = conversation(&t, &turns, CHAT_SPECIALS).unwrap();
        let targets: Vec<i32> = row.labels.iter().copied().filter(|l| *l != IGNORE).collect();
        let text = |s: &str| t.encode(s, AllowedSpecial::All).unwrap();
        let expected = text("<|im_start|><|im_end|>\n<|im_start|><|im_end|>\n<|im_start|>yes<|im_end|>\n");
        assert_eq!(targets, expected);
        assert!(conversation(&t, &[turn(Role::User, "q"), turn(Role::System, "s")], CHAT_SPECIALS).is_err());
    }
}
