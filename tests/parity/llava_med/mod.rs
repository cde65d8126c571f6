//! LLaVA-Med v1.5 against microsoft/LLaVA-Med.

use super::fixture::Checks;

mod forward;
mod generation;
mod lora;
mod preprocess;
mod text;

#[test]
fn llava_med() {
    let mut checks = Checks::new("llava_med");
    preprocess::check(&mut checks);
    text::check(&mut checks);
    forward::check(&mut checks);
    generation::check(&mut checks);
    lora::check(&mut checks);
    checks.finish();
}
