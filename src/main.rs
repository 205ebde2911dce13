//! The command. It only turns a result into an exit code.

fn main() {
    drive_backup::cli::run(drive_backup::backup::run_all).exit()
}
