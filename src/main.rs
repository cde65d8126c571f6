//! The `medtune` program: parse, run, print what went wrong, exit code.

use std::process::ExitCode;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    medtune::Registry::default().main()
}
