//! medtune
fn main() {}
