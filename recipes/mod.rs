//! Recipe plug-ins.

use crate::recipe::Recipe;

pub mod phantom;

/// All recipes.
pub const RECIPES: &[&dyn Recipe] = &[&phantom::Phantom];
