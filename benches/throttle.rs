//! How exact `--speed` is: `cargo bench --bench throttle` copies ten seconds' worth at each rate and prints the error.
//!
//! Needs 5 GB in the folder for temporary files (TMPDIR); the copies go to /dev/null.

use std::fs::File;
use std::io::Write;
use std::process::{Command, Stdio};
use std::time::Instant;

const MIB: u64 = 1 << 20;
const SECONDS: u64 = 10;
const RATES: [u64; 3] = [MIB, 50 * MIB, 500 * MIB];

fn main() {
    let folder = tempfile::tempdir().expect("a folder for temporary files");
    let source = folder.path().join("disk.raw");
    println!("| --speed | bytes | seconds | MiB/s | error |\n|---|---|---|---|---|");
    for rate in RATES {
        let length = rate * SECONDS;
        fill(&source, length);
        let started = Instant::now();
        let status = Command::new(env!("CARGO_BIN_EXE_drive-backup"))
            .args(["--target", "-", "--speed", &rate.to_string(), "--source-format", "raw", "--device"])
            .arg(&source)
            .stdout(File::options().write(true).open("/dev/null").map(Stdio::from).expect("/dev/null"))
            .status()
            .expect("the binary runs");
        assert!(status.success(), "{status}");
        let seconds = started.elapsed().as_secs_f64();
        let reached = length as f64 / seconds;
        let error = (reached / rate as f64 - 1.0) * 100.0;
        println!("| {}M | {length} | {seconds:.3} | {:.2} | {error:+.1} % |", rate / MIB, reached / MIB as f64);
    }
}

/// Data everywhere: holes and zeroes are not charged.
fn fill(path: &std::path::Path, length: u64) {
    let block: Vec<u8> = (0..MIB).map(|at| (at % 251) as u8 | 1).collect();
    let mut file = File::create(path).expect("a file");
    (0..length / MIB).for_each(|_| file.write_all(&block).expect("room for the source"));
}
