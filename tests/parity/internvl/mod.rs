//! Mini-InternVL-Chat-V1-5 and InternVL-Chat-V1-5 against OpenGVLab/InternVL.

use super::fixture::Checks;

mod files;
mod forward;
mod preprocess;
mod text;
mod tokenizer;

#[test]
fn internvl() {
    let mut checks = Checks::new("internvl");
    preprocess::check(&mut checks);
    tokenizer::check(&mut checks);
    text::check(&mut checks);
    forward::check(&mut checks);
    checks.finish();
}
