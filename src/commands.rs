//! One function per verb; the only writer to stdout.
