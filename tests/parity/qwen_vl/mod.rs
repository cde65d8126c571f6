//! Qwen-VL-Chat against its original code.

use super::fixture::Checks;

mod text;

#[test]
fn qwen_vl() {
    let mut checks = Checks::new("qwen_vl");
    text::check(&mut checks);
    checks.finish();
}
