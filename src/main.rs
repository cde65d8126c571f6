//! The `medtune` program: parse, run, print what went wrong, exit code.

use std::process::ExitCode;

use clap::Parser;
use medtune::{cli::Cli, commands};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    let cli = Cli::parse();
    let json = cli.global.json;
    match commands::run(cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            commands::print_error(&error, json);
            ExitCode::from(error.kind().exit_code())
        }
    }
}
