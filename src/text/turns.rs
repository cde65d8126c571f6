//! The turns of a sample in the order that chat templates want: the user first, user and assistant in turn.

use crate::{
    error::{Error, Kind, Result},
    sample::{Role, Sample, Turn},
};

/// A sample in the shape of a template.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Turns<'s> {
    /// System messages, joined by line ends; none if there is none.
    pub system: Option<String>,
    /// From user and assistant in turn, the user first.
    pub messages: Vec<&'s str>,
}

/// Takes a sample apart. With `answered`, the last message is an answer; without, a last answer is left out, so that the
/// last message is a question.
///
/// An opening line of the assistant, which answers nothing, is dropped, as the originals do.
///
/// # Errors
/// Turns out of order or without text, no question, or a last question without an answer.
pub fn turns(sample: &Sample, answered: bool) -> Result<Turns<'_>> {
    let all = &sample.turns;
    let start = all.iter().take_while(|t| t.role == Role::System).count();
    let system: Vec<&str> = all[..start].iter().map(|t| t.text.as_str()).collect();
    let opening = usize::from(all.get(start).is_some_and(|t| t.role == Role::Assistant));
    let mut rest: &[Turn] = &all[start + opening..];
    if !answered
        && let Some((last, before)) = rest.split_last()
        && last.role == Role::Assistant
    {
        rest = before;
    }
    let wrong = |what: &str, help: &str| Error::new(Kind::Data, what).at(&sample.id).help(help);
    for (i, turn) in rest.iter().enumerate() {
        let expected = if i.is_multiple_of(2) { Role::User } else { Role::Assistant };
        if turn.role != expected {
            return Err(wrong("user and assistant do not take turns", "merge or remove turns of the row")
                .code("turn_order")
                .expected(format!("{expected:?} in turn {i}"))
                .found(format!("{:?}", turn.role)));
        }
        if turn.text.trim().is_empty() {
            return Err(wrong("a turn has no text", "complete the row or leave it out")
                .code("empty_turn")
                .found(format!("turn {i}")));
        }
    }
    if rest.is_empty() {
        return Err(wrong("a row has no question", "complete the row or leave it out").code("no_question"));
    }
    if answered && !rest.len().is_multiple_of(2) {
        return Err(
            wrong("the last question of a row has no answer", "complete the row or leave it out").code("no_answer")
        );
    }
    Ok(Turns {
        system: (!system.is_empty()).then(|| system.join("\n")),
        messages: rest.iter().map(|t| t.text.as_str()).collect(),
    })
}

/// Whether the user's messages, and only they, hold `mark` once for every image.
///
/// # Errors
/// Another number of marks, or one in an answer or a system message.
pub fn check_marks(sample: &Sample, turns: &Turns<'_>, mark: &str) -> Result<()> {
    let mut others = turns.messages.iter().skip(1).step_by(2).copied().chain(turns.system.as_deref());
    if others.any(|text| text.contains(mark)) {
        return Err(Error::new(Kind::Data, format!("{mark} outside the user's words"))
            .code("image_count")
            .at(&sample.id)
            .help("only a user's turn can hold an image; remove the mark from the text"));
    }
    let marks: usize = turns.messages.iter().map(|m| m.matches(mark).count()).sum();
    if marks == sample.images.len() {
        return Ok(());
    }
    Err(Error::new(Kind::Data, format!("the number of {mark} marks is not the number of images"))
        .code("image_count")
        .at(&sample.id)
        .expected(format!("{} marks, one for each image", sample.images.len()))
        .found(marks)
        .help(format!("write {mark} once for every image in the user's turns")))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(turns: &[(Role, &str)]) -> Sample {
        let turns: Vec<_> = turns.iter().map(|(r, t)| serde_json::json!({"role": r, "text": t})).collect();
        serde_json::from_value(serde_json::json!({"id": "row-1", "turns": turns})).unwrap()
    }

    #[test]
    fn turns_are_put_in_the_order_of_templates() {
        use Role::{Assistant, System, User};
        let row = sample(&[(System, "s"), (Assistant, "hello"), (User, "q"), (Assistant, "a")]);
        let found = turns(&row, true).unwrap();
        assert_eq!((found.system.as_deref(), found.messages), (Some("s"), vec!["q", "a"]));
        assert_eq!(turns(&row, false).unwrap().messages, ["q"]);
        for (bad, code) in [
            (vec![(User, "q")], "no_answer"),
            (vec![(User, "q"), (User, "q")], "turn_order"),
            (vec![(User, " "), (Assistant, "a")], "empty_turn"),
            (vec![(Assistant, "a")], "no_question"),
        ] {
            assert_eq!(turns(&sample(&bad), true).unwrap_err().reason(), code);
        }
    }

    #[test]
    fn marks_are_counted_in_the_users_words() {
        use Role::{Assistant, User};
        let marked = sample(&[(User, "<image> q"), (Assistant, "a")]);
        let error = check_marks(&marked, &turns(&marked, true).unwrap(), "<image>").unwrap_err();
        assert!(error.to_string().contains("expected 0 marks"), "{error}");
        for row in [[(User, "q"), (Assistant, "<image>")], [(Role::System, "<image>"), (User, "q")]] {
            let row = sample(&row);
            let found = turns(&row, row.turns[0].role == User).unwrap();
            assert!(check_marks(&row, &found, "<image>").is_err());
        }
    }
}
