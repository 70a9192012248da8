//! The `wilco` command: the library's public API, for hands and scripts.

mod cli;

fn main() -> std::process::ExitCode {
    cli::main()
}
