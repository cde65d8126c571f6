//! Recipe plug-ins.

use crate::recipe::Recipe;

pub mod phantom;
pub mod vqa;

/// All recipes.
pub const RECIPES: &[&dyn Recipe] = &[&phantom::Phantom, &vqa::Vqa];
