//! Kept rows in the forms that others read, and the views of them that ablations compare.

pub mod view;

pub use view::{Chosen, View};
