//! Whether a model looks: what its answers do without the image or with another one, and whether it tells a false
//! premise from a true one about the same image.

use std::collections::{BTreeMap, HashMap};

use serde::{Deserialize, Serialize};

use super::numbers::{Judged, cluster, correct};
use crate::{
    judge::{Outcome, Stance},
    metric::{Unit, vqa_text::normalise},
    sample::{Polarity, Sample},
    stage::{
        controls::{Control, ControlAnswer},
        eval::Which,
    },
    statistics::{self, Difference, Estimate, Observation, Pair},
};

/// One control of one model.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ControlRow {
    /// What was done to the image.
    pub control: Control,
    /// Whose answers.
    pub model: Which,
    /// Share of answers whose words differ from those with the image.
    pub changed: Estimate,
    /// Share of right answers under the control; none where the judge asks a language model, which controls are spared.
    pub right: Option<Estimate>,
    /// Right answers with the image minus right answers under the control.
    pub gain: Option<Difference>,
}

/// Outcomes of control answers, in their order; none where they were not judged.
pub type ControlOutcomes = Vec<Option<Outcome>>;

/// The controls in numbers.
pub(super) fn controls(
    rows: &[Judged<'_>],
    answers: &[ControlAnswer],
    outcomes: &ControlOutcomes,
    seed: u64,
) -> Vec<ControlRow> {
    let by_id: HashMap<&str, &Judged<'_>> = rows.iter().map(|r| (r.sample.id.as_str(), r)).collect();
    type Asked<'a> = (&'a Judged<'a>, &'a ControlAnswer, Option<&'a Outcome>);
    let mut groups: BTreeMap<(Control, Which), Vec<Asked<'_>>> = BTreeMap::new();
    for (i, answer) in answers.iter().enumerate() {
        if let Some(row) = by_id.get(answer.id.as_str()) {
            let outcome = outcomes.get(i).and_then(Option::as_ref);
            groups.entry((answer.control, answer.model)).or_default().push((row, answer, outcome));
        }
    }
    let mut found: Vec<ControlRow> = groups
        .into_iter()
        .map(|((control, model), answers)| {
            let which = usize::from(model == Which::Tuned);
            let purpose = format!("control {} {which}", control.name());
            let changed: Vec<Observation<'_>> = answers
                .iter()
                .map(|(row, answer, _)| {
                    let same = normalise(row.answers[which]) == normalise(&answer.answer);
                    Observation { cluster: cluster(row.sample), value: f64::from(u8::from(!same)) }
                })
                .collect();
            let pairs: Vec<Pair<'_>> = answers
                .iter()
                .filter_map(|(row, _, outcome)| {
                    let (with, without) = (correct(row.outcomes[which])?, correct((*outcome)?)?);
                    let value = |right: bool| f64::from(u8::from(right));
                    Some(Pair { cluster: cluster(row.sample), base: value(without), tuned: value(with) })
                })
                .collect();
            let right: Vec<Observation<'_>> =
                pairs.iter().map(|p| Observation { cluster: p.cluster, value: p.base }).collect();
            let judged = !pairs.is_empty();
            ControlRow {
                control,
                model,
                changed: statistics::estimate(&changed, Unit::Share, seed, &format!("{purpose} changed")),
                right: judged.then(|| statistics::estimate(&right, Unit::Share, seed, &format!("{purpose} right"))),
                gain: judged.then(|| statistics::difference(&pairs, seed, &purpose)),
            }
        })
        .collect();
    statistics::correct(found.iter_mut().filter_map(|r| r.gain.as_mut()));
    found
}

/// Pairs of questions about one image, one with a false premise and one with a true one, by what the answers do.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct Probes {
    /// Pairs.
    pub pairs: usize,
    /// Refutes the false premise and affirms the true one.
    pub tells_apart: Estimate,
    /// Affirms both.
    pub goes_along: Estimate,
    /// Denies both.
    pub denies_both: Estimate,
    /// Affirms the false premise and denies the true one.
    pub reversed: Estimate,
    /// Takes no stance in at least one of them.
    pub unclear: Estimate,
}

/// The pairs of a model: the false premises of an image in file order with its true ones in file order, as many as both
/// have. A true one is a question that a right answer affirms.
pub(super) fn probes(rows: &[Judged<'_>], which: usize, seed: u64) -> Option<Probes> {
    let mut images: BTreeMap<&str, [Vec<Stance>; 2]> = BTreeMap::new();
    for row in rows {
        let Outcome::Scored { stance, expected, .. } = row.outcomes[which] else { continue };
        let side = match (row.sample.polarity, expected) {
            (Some(Polarity::Hallucination), Stance::Denies) => 0,
            (Some(Polarity::NonHallucination), Stance::Affirms) => 1,
            _ => continue,
        };
        images.entry(cluster(row.sample)).or_default()[side].push(*stance);
    }
    let pairs: Vec<(&str, Stance, Stance)> =
        images.iter().flat_map(|(image, [no, yes])| no.iter().zip(yes).map(|(n, y)| (*image, *n, *y))).collect();
    if pairs.is_empty() {
        return None;
    }
    let share = |name: &str, fits: &dyn Fn(Stance, Stance) -> bool| {
        let values: Vec<Observation<'_>> = pairs
            .iter()
            .map(|(image, n, y)| Observation { cluster: image, value: f64::from(u8::from(fits(*n, *y))) })
            .collect();
        statistics::estimate(&values, Unit::Share, seed, &format!("probes {which} {name}"))
    };
    use Stance::{Affirms, Denies, Unclear};
    Some(Probes {
        pairs: pairs.len(),
        tells_apart: share("tells apart", &|n, y| n == Denies && y == Affirms),
        goes_along: share("goes along", &|n, y| n == Affirms && y == Affirms),
        denies_both: share("denies both", &|n, y| n == Denies && y == Denies),
        reversed: share("reversed", &|n, y| n == Affirms && y == Denies),
        unclear: share("unclear", &|n, y| n == Unclear || y == Unclear),
    })
}

/// Judges control answers by `judge`, beside the rows they belong to; rows that were not answered with their image stay
/// out.
pub(super) fn judge_controls(
    samples: &[Sample],
    answers: &[ControlAnswer],
    mut judge: impl FnMut(&Sample, &str) -> crate::Result<Outcome>,
) -> crate::Result<ControlOutcomes> {
    let by_id: HashMap<&str, &Sample> = samples.iter().map(|s| (s.id.as_str(), s)).collect();
    answers.iter().map(|a| by_id.get(a.id.as_str()).map(|sample| judge(sample, &a.answer)).transpose()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::metric::clinical::tests::{row, scored};

    fn sample(id: &str, image: &str, polarity: Polarity) -> Sample {
        Sample { id: id.into(), group: image.into(), ..row(Some(polarity)) }
    }

    #[test]
    fn probes_are_pairs_of_one_image() {
        use {Polarity::*, Stance::*};
        let samples = [
            sample("a1", "a", Hallucination),
            sample("a2", "a", NonHallucination),
            sample("a3", "a", NonHallucination),
            sample("b1", "b", Hallucination),
            sample("b2", "b", NonHallucination),
            sample("c1", "c", Hallucination),
        ];
        let outcomes = [
            scored(Denies, Denies, true, None),
            scored(Affirms, Affirms, true, None),
            scored(Denies, Affirms, false, None),
            scored(Affirms, Denies, false, None),
            scored(Affirms, Affirms, true, None),
            scored(Denies, Denies, true, None),
        ];
        let rows: Vec<Judged<'_>> = samples
            .iter()
            .zip(&outcomes)
            .map(|(sample, o)| Judged { sample, outcomes: [o, o], answers: ["", ""] })
            .collect();
        let found = probes(&rows, 1, 1).unwrap();
        assert_eq!(found.pairs, 2, "a third question of image a and the lone one of c have no partner");
        assert_eq!((found.tells_apart.sum, found.goes_along.sum, found.denies_both.sum), (1.0, 1.0, 0.0));
        assert_eq!(probes(&rows[..1], 1, 1), None);
    }

    #[test]
    fn a_control_counts_changed_words_and_what_the_image_adds() {
        let samples: Vec<Sample> =
            (0..6).map(|i| sample(&format!("r{i}"), &format!("g{i}"), Polarity::NonHallucination)).collect();
        let (right, wrong) = (
            scored(Stance::Affirms, Stance::Affirms, true, None),
            scored(Stance::Denies, Stance::Affirms, false, None),
        );
        let rows: Vec<Judged<'_>> = samples
            .iter()
            .map(|sample| Judged { sample, outcomes: [&wrong, &right], answers: ["No.", "Yes."] })
            .collect();
        let answers: Vec<ControlAnswer> = (0..6)
            .flat_map(|i| {
                [(Which::Base, "no"), (Which::Tuned, if i < 3 { "Yes" } else { "No." })].map(|(model, text)| {
                    ControlAnswer { id: format!("r{i}"), model, control: Control::Blind, answer: text.into() }
                })
            })
            .collect();
        let judged = |_: &Sample, answer: &str| Ok(if answer == "Yes" { right.clone() } else { wrong.clone() });
        let outcomes = judge_controls(&samples, &answers, judged).unwrap();
        let found = controls(&rows, &answers, &outcomes, 1);
        assert_eq!(found.len(), 2);
        assert_eq!(found[0].changed.value, Some(0.0), "case and stops are no change");
        assert_eq!(found[1].changed.value, Some(0.5));
        assert_eq!(found[1].right.unwrap().value, Some(0.5));
        assert_eq!(found[1].gain.unwrap().value, Some(0.5));
        assert_eq!(found[0].gain.unwrap().value, Some(0.0));
        let unjudged = controls(&rows, &answers, &vec![None; answers.len()], 1);
        assert!(unjudged.iter().all(|r| r.right.is_none() && r.gain.is_none()));
    }
}
