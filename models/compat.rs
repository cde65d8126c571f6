//! `[model.compat]`: behaviour of the originals that harms. Each switch is off unless a recipe asks for it, and exists
//! so that numbers of the original programs can be reproduced. `docs/compat.md` has the same table for users.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Quirks of the originals that are switched on.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Compat {
    /// qwen_vl: count positions and lengths in columns of the padded batch, so that a row changes with the rows beside
    /// it. Off, a row's rotary base and query factors depend on its own tokens.
    pub padded_columns: bool,
    /// qwen_vl: train without query factors and with this rotary alpha, which the original's last evaluation left
    /// behind (1 in a fresh model). Off, training and evaluation of a row agree.
    #[schemars(range(min = 1.0))]
    pub training_alpha: Option<f64>,
    /// internvl: rotate all rows by the longest length of the call, padding included, keep cached keys as they were
    /// rotated, and never shrink InternLM2's tables again. Off, each row follows its own length, and a cached step
    /// equals a recomputation.
    pub mixed_rotations: bool,
    /// internvl: a batch with more image features than positions has a loss of zero. Off, it is an error, because its
    /// rows would silently not be learnt.
    pub surplus_zeroes_loss: bool,
    /// llava_med: cut the end of rows that are longer than the model allows. Off, such a row is refused by name.
    pub cut_long_rows: bool,
}

/// What is known about a switch.
#[derive(Debug)]
pub struct Switch {
    /// Key below `model.compat`.
    pub name: &'static str,
    /// The family it belongs to.
    pub family: &'static str,
    /// What the original does.
    pub original: &'static str,
    /// What happens here when it is off.
    pub here: &'static str,
}

/// All switches, in the order of [`Compat`].
pub const SWITCHES: &[Switch] = &[
    Switch {
        name: "padded_columns",
        family: "qwen_vl",
        original: "rotary base, positions and query factors follow the columns of the padded batch",
        here: "they follow the row's own tokens",
    },
    Switch {
        name: "training_alpha",
        family: "qwen_vl",
        original: "training has no query factors and keeps the rotary base of the last evaluation",
        here: "training computes a row as evaluation does",
    },
    Switch {
        name: "mixed_rotations",
        family: "internvl",
        original: "the longest row of a call rotates all rows, cached keys keep an old rotation, InternLM2's tables \
                   never shrink",
        here: "each row follows its own length; what was cached is read again when its rotation changes",
    },
    Switch {
        name: "surplus_zeroes_loss",
        family: "internvl",
        original: "more image features than positions make the loss of a batch zero",
        here: "an error that names the rows",
    },
    Switch {
        name: "cut_long_rows",
        family: "llava_med",
        original: "rows lose what lies beyond the longest length",
        here: "the row is refused by name",
    },
];

impl Compat {
    /// Names of the switches that are on.
    #[must_use]
    pub fn on(&self) -> Vec<&'static str> {
        let flags = [
            self.padded_columns,
            self.training_alpha.is_some(),
            self.mixed_rotations,
            self.surplus_zeroes_loss,
            self.cut_long_rows,
        ];
        SWITCHES.iter().zip(flags).filter(|(_, on)| *on).map(|(s, _)| s.name).collect()
    }

    /// Key and problem of every switch that is on and does not belong to `family`.
    #[must_use]
    pub fn problems(&self, family: &str) -> Vec<(String, String)> {
        let on = self.on();
        let foreign = SWITCHES.iter().filter(|s| on.contains(&s.name) && s.family != family);
        foreign
            .map(|s| (format!("model.compat.{}", s.name), format!("is a switch of {}, not of {family}", s.family)))
            .collect()
    }

    /// The switches for answering questions: without what the originals do in training mode alone.
    #[must_use]
    pub fn evaluating(self) -> Self {
        Self { training_alpha: None, ..self }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::models::MODELS;

    fn all() -> Compat {
        Compat {
            padded_columns: true,
            training_alpha: Some(3.0),
            mixed_rotations: true,
            surplus_zeroes_loss: true,
            cut_long_rows: true,
        }
    }

    #[test]
    fn the_table_is_the_struct_and_the_document() {
        let names: Vec<&str> = SWITCHES.iter().map(|s| s.name).collect();
        let value = serde_json::to_value(all()).unwrap();
        let mut keys: Vec<&str> = value.as_object().unwrap().keys().map(String::as_str).collect();
        keys.sort_unstable();
        let mut sorted = names.clone();
        sorted.sort_unstable();
        assert_eq!(sorted, keys);
        assert_eq!(all().on(), names);
        assert!(Compat::default().on().is_empty());
        let document = include_str!("../docs/compat.md");
        let rows: Vec<String> =
            SWITCHES.iter().map(|s| format!("| `{}` | {} | {} | {} |", s.name, s.family, s.original, s.here)).collect();
        let found: Vec<&str> = document.lines().filter(|l| l.starts_with("| `")).collect();
        assert_eq!(found, rows, "docs/compat.md");
    }

    #[test]
    fn switches_of_other_families_are_refused() {
        for switch in SWITCHES {
            assert!(MODELS.iter().any(|m| m.name == switch.family), "{}", switch.family);
        }
        let problems = all().problems("qwen_vl");
        let keys: Vec<&str> = problems.iter().map(|(key, _)| key.as_str()).collect();
        assert_eq!(
            keys,
            ["model.compat.mixed_rotations", "model.compat.surplus_zeroes_loss", "model.compat.cut_long_rows"]
        );
        assert_eq!(all().evaluating().on().len(), SWITCHES.len() - 1);
    }
}
