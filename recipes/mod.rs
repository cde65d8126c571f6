//! Recipe plug-ins.

use crate::recipe::Recipe;

pub mod medhalltune;
pub mod phantom;
pub mod vqa;

/// All recipes.
pub const RECIPES: &[&dyn Recipe] =
    &[&phantom::Phantom, &vqa::Vqa, &medhalltune::MedHallTune, &medhalltune::rehearsal::Rehearsal];
