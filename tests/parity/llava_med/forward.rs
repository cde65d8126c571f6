//! Vision tower, projector, merge, decoder.

use crate::parity::fixture::Checks;

pub(super) fn check(_checks: &mut Checks) {}
