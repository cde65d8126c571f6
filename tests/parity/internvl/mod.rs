//! Mini-InternVL-Chat-V1-5 and InternVL-Chat-V1-5 against OpenGVLab/InternVL.

use super::fixture::Checks;

mod files;
mod forward;
mod generation;
mod lora;
mod preprocess;
mod rope;
mod text;
mod tokenizer;

#[test]
fn internvl() {
    let mut checks = Checks::new("internvl");
    preprocess::check(&mut checks);
    tokenizer::check(&mut checks);
    text::check(&mut checks);
    forward::check(&mut checks);
    rope::check(&mut checks);
    generation::check(&mut checks);
    lora::check(&mut checks);
    checks.finish();
}
