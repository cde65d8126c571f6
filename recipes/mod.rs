//! Recipe plug-ins.

use crate::recipe::Recipe;

/// All recipes.
pub const RECIPES: &[&dyn Recipe] = &[];
