//! Mini-InternVL-Chat-V1-5 and InternVL-Chat-V1-5 against OpenGVLab/InternVL.

use super::fixture::Checks;

mod tokenizer;

#[test]
fn internvl() {
    let mut checks = Checks::new("internvl");
    tokenizer::check(&mut checks);
    checks.finish();
}
