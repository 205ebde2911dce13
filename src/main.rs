//! The command. It only turns a result into an exit code.

fn main() {}
