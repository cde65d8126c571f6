//! Reads what an answer asserts: findings, attributes, meanings, kinds of image, and yes or no.
//!
//! The reader knows the closed vocabulary of [`super::words`] and the usual ways to negate in English. Negation starts
//! at a cue ("no", "without", "rather than") and ends at a conjunction that opens a new statement ("but", "and the").
//! A value belongs to the finding whose noun phrase it stands in, else to the finding before it in its clause.

use super::{
    lex::{Item, Organ, items, sentences, tokens},
    truth::{Assertion, Attr, AttrName, Claim, Kind, Side, Subject},
    words::info,
};

/// What was read from an answer.
#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct Reading {
    /// Everything asserted, in order, without repetition.
    pub(super) assertions: Vec<Assertion>,
    /// An opening or explicit yes or no.
    pub(super) leading: Option<bool>,
    /// Findings that are named, whatever is said of them.
    pub(super) mentioned: Vec<Kind>,
    /// Findings denied only in combination with two or more attributes.
    pub(super) denied: Vec<Kind>,
}

/// Reads `text` as an answer to a question about `claim`.
pub(super) fn read(text: &str, claim: &Claim) -> Reading {
    let all = tokens(text);
    let (leading, skip) = leading(&all);
    let mut reading = Reading { leading, ..Reading::default() };
    let mut current = claim.kind();
    for (i, sentence) in sentences(&all[skip..]).enumerate() {
        let mut reader = Sentence::new(claim, current);
        reader.walk(&items(sentence));
        // The verdict on the premise ("that is wrong") says nothing of the findings.
        current = reader.close(&mut reading, i).or(current);
    }
    reading
}

/// An explicit yes or no, and how many tokens the opening word takes.
fn leading(all: &[String]) -> (Option<bool>, usize) {
    let word = |i: usize| all.get(i).map_or("", String::as_str);
    let stop = |i: usize| matches!(word(i), "" | "," | "." | ";" | "!" | ":" | "?");
    let opens = matches!(
        word(1),
        "the" | "there" | "it" | "this" | "that" | "i" | "they" | "these" | "a" | "an" | "actually" | "you" | "in"
    );
    match word(0) {
        "yes" | "yeah" | "indeed" | "certainly" | "agreed" | "exactly" => return (Some(true), 1),
        "correct" | "true" | "right" | "absolutely" if stop(1) => return (Some(true), 1),
        "nope" => return (Some(false), 1),
        "incorrect" | "wrong" | "false" | "untrue" if stop(1) => return (Some(false), 1),
        "no" if stop(1) || opens => return (Some(false), 1),
        "not" if matches!(word(1), "quite" | "exactly" | "correct" | "right" | "true" | "really") => {
            return (Some(false), 2);
        }
        "not" if word(1) == "at" && word(2) == "all" => return (Some(false), 3),
        _ => {}
    }
    (explicit(all), 0)
}

/// "That is right", "you are mistaken", "I disagree", anywhere.
fn explicit(all: &[String]) -> Option<bool> {
    let word = |i: usize| all.get(i).map_or("", String::as_str);
    for i in 0..all.len() {
        let negated = i > 0 && word(i - 1) == "not";
        let verb = i.saturating_sub(if negated { 2 } else { 1 });
        let about = verb > 0
            && matches!(word(verb), "is" | "are")
            && matches!(word(verb - 1), "that" | "this" | "you" | "statement" | "premise" | "idea" | "claim" | "it");
        match word(i) {
            "wrong" | "incorrect" | "mistaken" | "untrue" | "mistake" | "inaccurate" | "misunderstanding" => {
                return Some(negated);
            }
            "false" if about => return Some(negated),
            "correct" | "true" if about => return Some(!negated),
            "right" if about && matches!(word(i + 1), "" | "." | "," | ";" | "!") && word(verb - 1) != "it" => {
                return Some(!negated);
            }
            "agree" if i > 0 && matches!(word(i - 1), "i" | "not") => return Some(!negated),
            "disagree" => return Some(false),
            _ => {}
        }
    }
    None
}

/// A finding where it is named, with the values that belong to it.
struct Mention {
    kind: Kind,
    negated: bool,
    clause: usize,
    values: Vec<(Attr, bool)>,
    /// Whether existence is stated and not only a name used.
    stated: bool,
}

/// A value whose finding is not known yet.
struct Loose {
    attr: Attr,
    negated: bool,
    clause: usize,
    /// Whether only words that may stand inside a noun phrase have followed.
    in_phrase: bool,
}

/// State of reading one sentence.
struct Sentence<'a> {
    claim: &'a Claim,
    /// Finding that pronouns refer to.
    current: Option<Kind>,
    mentions: Vec<Mention>,
    loose: Vec<Loose>,
    out: Vec<Assertion>,
    subject: Option<Subject>,
    organ: Option<(Organ, Option<Side>)>,
    fine_before: Option<bool>,
    negated: bool,
    strong: bool,
    clause: usize,
    exists: bool,
    other: bool,
    has_meaning: bool,
    bare_no: bool,
}

impl<'a> Sentence<'a> {
    fn new(claim: &'a Claim, current: Option<Kind>) -> Self {
        Self {
            claim,
            current,
            mentions: Vec::new(),
            loose: Vec::new(),
            out: Vec::new(),
            subject: None,
            organ: None,
            fine_before: None,
            negated: false,
            strong: false,
            clause: 0,
            exists: false,
            other: false,
            has_meaning: false,
            bare_no: false,
        }
    }

    fn walk(&mut self, items: &[Item]) {
        for (i, item) in items.iter().enumerate() {
            let next = items.get(i + 1);
            match *item {
                Item::Finding(kind) => self.finding(kind),
                Item::Value(attr) => self.value(attr, next),
                Item::Meaning(meaning) => {
                    self.has_meaning = true;
                    let subject = self.subject.or(self.claimed_subject());
                    if let Some(subject) = subject {
                        self.out.push(Assertion::Meaning { subject, meaning, holds: !self.negated });
                    }
                }
                Item::Modality(value) => {
                    self.subject = Some(Subject::Modality(value));
                    self.out.push(Assertion::Modality { value, holds: !self.negated });
                }
                Item::Organ(organ) => self.organ(organ),
                Item::Fine => self.fine(next),
                Item::Enlarged => self.enlarged(),
                Item::Abnormal | Item::Anything => self.abnormal(*item),
                Item::Not => {
                    self.negated = true;
                    self.bare_no = true;
                }
                Item::NotThat => (self.negated, self.strong) = (true, true),
                Item::Break => self.end_scope(),
                Item::ThereIs => {
                    self.end_scope();
                    self.exists = true;
                }
                Item::One => {
                    self.end_scope();
                    self.exists = true;
                    // "There is one small nodule", or "there is one on the left".
                    if matches!(next, Some(Item::Finding(_) | Item::Value(_))) {
                        self.value(Attr::Count(1), next);
                    } else if let Some(kind) = self.mentions.last().map(|m| m.kind).or(self.current) {
                        self.finding(kind);
                    }
                }
                Item::Seen | Item::Absent => self.seen(*item == Item::Absent),
                Item::Comma => self.clause += 1,
                Item::And => {
                    if !self.negated {
                        self.clause += 1;
                    }
                }
                Item::Other => self.other = true,
                Item::Pronoun | Item::Filler | Item::Word => {}
            }
            if !matches!(item, Item::Value(_) | Item::Filler) {
                self.loose.iter_mut().for_each(|l| l.in_phrase = false);
            }
        }
    }

    fn end_scope(&mut self) {
        self.clause += 1;
        if !self.strong {
            self.negated = false;
        }
        self.exists = false;
        self.organ = None;
    }

    fn claimed_subject(&self) -> Option<Subject> {
        match (*self.claim, self.current) {
            (Claim::Meaning { subject, .. }, _) => Some(subject),
            (_, Some(kind)) => Some(Subject::Finding(kind)),
            _ => None,
        }
    }

    fn finding(&mut self, kind: Kind) {
        let clause = self.clause;
        let mut mention = Mention { kind, negated: self.negated, clause, values: Vec::new(), stated: self.exists };
        self.loose.retain(|l| {
            // A value right before the noun, or earlier in the clause with no finding of its own.
            let mine = info(kind).attrs.contains(&l.attr.name())
                && (l.in_phrase || (l.clause == clause && !self.mentions.iter().any(|m| m.clause == clause)));
            if mine {
                mention.values.push((l.attr, l.negated && !mention.negated));
            }
            !mine
        });
        self.mentions.push(mention);
        self.subject = Some(Subject::Finding(kind));
        self.organ = None;
        self.bare_no = false;
    }

    fn value(&mut self, attr: Attr, next: Option<&Item>) {
        // "The heart is large" states the finding itself.
        if attr == Attr::Size(super::truth::Size::Large) && self.enlarge() {
            return;
        }
        if let (Attr::Side(side), Some(Item::Organ(Organ::Lungs | Organ::Kidneys))) = (attr, next) {
            self.organ = Some((Organ::Image, Some(side)));
        }
        self.loose.push(Loose { attr, negated: self.negated, clause: self.clause, in_phrase: true });
        let adjective = matches!(next, Some(Item::Finding(_) | Item::Value(_) | Item::Filler));
        if adjective {
            return;
        }
        let clause = self.clause;
        let mention = self.mentions.iter_mut().rev().find(|m| m.clause == clause);
        if let Some(mention) = mention.filter(|m| info(m.kind).attrs.contains(&attr.name())) {
            self.loose.pop();
            mention.values.push((attr, self.negated && !mention.negated));
        }
    }

    fn organ(&mut self, organ: Organ) {
        let side = match self.organ {
            Some((Organ::Image, side @ Some(_))) => side,
            _ => None,
        };
        if let Some(holds) = self.fine_before.take() {
            self.state(organ, side, holds);
        }
        self.organ = Some((organ, side));
    }

    /// "Normal", of the organ named before it, or of the one named next.
    fn fine(&mut self, next: Option<&Item>) {
        let holds = !self.negated;
        match (self.organ, next) {
            (_, Some(Item::Organ(_))) => self.fine_before = Some(holds),
            (Some((organ, side)), _) => self.state(organ, side, holds),
            (None, _) => match (*self.claim, self.current) {
                (Claim::Normal, _) => self.out.push(Assertion::Normal { holds }),
                (_, Some(kind @ (Kind::EnlargedHeart | Kind::Aneurysm))) => {
                    self.out.push(Assertion::Presence { kind, holds: !holds });
                }
                _ => {}
            },
        }
    }

    fn state(&mut self, organ: Organ, side: Option<Side>, fine: bool) {
        if organ == Organ::Image {
            self.out.push(Assertion::Normal { holds: fine });
            return;
        }
        if !fine {
            let whole = organ
                .enlarged()
                .map_or(Assertion::Normal { holds: false }, |kind| Assertion::Presence { kind, holds: true });
            self.out.push(whole);
            return;
        }
        self.loose.retain(|l| side.is_none_or(|s| l.attr != Attr::Side(s)));
        for &kind in organ.kinds() {
            self.out.push(match side {
                Some(side) => Assertion::Attribute { kind, attr: Attr::Side(side), holds: false },
                None => Assertion::Presence { kind, holds: false },
            });
        }
    }

    fn enlarge(&mut self) -> bool {
        let named = self.organ.and_then(|(organ, _)| organ.enlarged());
        let Some(kind) = named else { return false };
        self.out.push(Assertion::Presence { kind, holds: !self.negated });
        true
    }

    fn enlarged(&mut self) {
        if !self.enlarge()
            && let Some(kind @ (Kind::EnlargedHeart | Kind::Aneurysm)) = self.current
        {
            self.out.push(Assertion::Presence { kind, holds: !self.negated });
        }
    }

    fn abnormal(&mut self, item: Item) {
        if !self.other && (item == Item::Abnormal || self.negated) {
            self.out.push(Assertion::Normal { holds: self.negated });
        }
        self.bare_no = false;
    }

    /// "Is (not) seen", "is absent": existence of the findings of this clause, or of what a pronoun refers to.
    fn seen(&mut self, absent: bool) {
        let holds = self.negated == absent;
        let clause = self.clause;
        let mut any = false;
        for mention in self.mentions.iter_mut().filter(|m| m.clause == clause) {
            mention.stated = true;
            mention.negated |= !holds;
            any = true;
        }
        if !any
            && self.mentions.is_empty()
            && self.out.is_empty()
            && let Some(kind) = self.current
        {
            self.mentions.push(Mention { kind, negated: !holds, clause, values: Vec::new(), stated: true });
        }
        self.bare_no = false;
    }

    /// Turns the sentence into assertions; returns the finding that a following pronoun means.
    fn close(mut self, reading: &mut Reading, index: usize) -> Option<Kind> {
        self.settle_loose();
        let bare = self.bare_no && self.mentions.is_empty() && self.out.is_empty() && index == 0;
        if let (true, Some(kind), None) = (bare, self.current, reading.leading) {
            self.mentions.push(Mention { kind, negated: true, clause: 0, values: Vec::new(), stated: true });
        }
        let last = self.mentions.last().map(|m| m.kind);
        for mention in &self.mentions {
            push(&mut reading.mentioned, mention.kind);
            if self.has_meaning && !mention.stated && mention.values.is_empty() {
                continue;
            }
            mention_assertions(mention, &mut self.out, &mut reading.denied);
        }
        for assertion in self.out {
            if let Assertion::Presence { kind, .. } | Assertion::Attribute { kind, .. } = assertion {
                push(&mut reading.mentioned, kind);
            }
            push(&mut reading.assertions, assertion);
        }
        last
    }

    /// Gives values without a finding of their clause to the nearest finding that can have them.
    fn settle_loose(&mut self) {
        for loose in std::mem::take(&mut self.loose) {
            let name = loose.attr.name();
            if let Some(mention) = self.mentions.iter_mut().rev().find(|m| info(m.kind).attrs.contains(&name)) {
                mention.values.push((loose.attr, loose.negated && !mention.negated));
                continue;
            }
            let Some(kind) = self.current.filter(|k| info(*k).attrs.contains(&name)) else { continue };
            if name == AttrName::Count && !asks_count(self.claim) {
                continue;
            }
            let values = vec![(loose.attr, loose.negated)];
            self.mentions.push(Mention { kind, negated: false, clause: loose.clause, values, stated: true });
        }
    }
}

fn asks_count(claim: &Claim) -> bool {
    matches!(claim, Claim::Attribute { name: AttrName::Count, .. })
}

fn mention_assertions(mention: &Mention, out: &mut Vec<Assertion>, denied: &mut Vec<Kind>) {
    let kind = mention.kind;
    if mention.negated {
        match mention.values.as_slice() {
            [] => out.push(Assertion::Presence { kind, holds: false }),
            [(attr, _)] => out.push(Assertion::Attribute { kind, attr: *attr, holds: false }),
            _ => push(denied, kind),
        }
        return;
    }
    out.push(Assertion::Presence { kind, holds: true });
    for (attr, negated) in &mention.values {
        out.push(Assertion::Attribute { kind, attr: *attr, holds: !negated });
    }
}

fn push<T: PartialEq>(list: &mut Vec<T>, item: T) {
    if !list.contains(&item) {
        list.push(item);
    }
}
