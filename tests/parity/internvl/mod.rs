//! Mini-InternVL-Chat-V1-5 and InternVL-Chat-V1-5 against OpenGVLab/InternVL.

use super::fixture::Checks;

mod files;
mod preprocess;
mod tokenizer;

#[test]
fn internvl() {
    let mut checks = Checks::new("internvl");
    preprocess::check(&mut checks);
    tokenizer::check(&mut checks);
    checks.finish();
}
