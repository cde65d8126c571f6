//! Roles that are out of order.

use super::{QcContext, QcRule, Verdict, reject};
use crate::{
    error::Result,
    sample::{Role, Sample},
};

/// The rule.
pub struct Roles;

impl QcRule for Roles {
    fn code(&self) -> &'static str {
        "roles"
    }

    fn doc(&self) -> &'static str {
        "User and assistant must take turns, the user first and the assistant last; a system message may only come first.\n\
         A chat template would otherwise train on the wrong side of the conversation.\n\
         Example: a row whose first message is an answer."
    }

    fn check(&self, sample: &Sample, _context: &QcContext) -> Result<Verdict> {
        let turns = match sample.turns.as_slice() {
            [first, rest @ ..] if first.role == Role::System => rest,
            all => all,
        };
        let ordered = turns.iter().enumerate().all(|(i, t)| t.role == [Role::User, Role::Assistant][i % 2]);
        if ordered && turns.len() % 2 == 0 && !turns.is_empty() {
            return Ok(Verdict::Keep);
        }
        let roles: Vec<String> = sample.turns.iter().map(|t| format!("{:?}", t.role).to_lowercase()).collect();
        reject(self, format!("roles are {}", if roles.is_empty() { "none".into() } else { roles.join(", ") }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::qc::tests::{rejects, row};

    #[test]
    fn order_of_roles() {
        let mut sample = row("Q?", "A.");
        assert!(!rejects(&Roles, &sample));
        sample.turns.swap(0, 1);
        assert!(rejects(&Roles, &sample));
        sample.turns.clear();
        assert!(rejects(&Roles, &sample));
    }
}
