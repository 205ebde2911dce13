//! What the proof of a copy costs: plain copies beside copies with `--manifest`, and with `--verify` too.
//!
//! ```text
//! cargo bench --bench verify -- [--mib N] [--runs N] [--folder DIR]
//! ```
//!
//! Whole processes, in alternation, page cache warm, a sync between them; medians of wall time and of processor time, and of what each
//! round added to them in percent: other work on the machine disturbs both runs of a round alike. `--manifest` hashes whatever is
//! copied, `--verify` needs the same hashes: what it adds is the read-back.

mod kit;

use kit::{MIB, OURS, Random, Settings};
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Instant;

/// Noise in the first of every `every` MiB.
fn source(path: &Path, mib: u64, every: u64) {
    let (file, mut random, mut buffer) = (File::create(path).unwrap(), Random(1), vec![0; MIB as usize]);
    file.set_len(mib * MIB).unwrap();
    for at in (0..mib).step_by(every as usize) {
        random.noise(&mut buffer);
        file.write_all_at(&buffer, at * MIB).unwrap();
    }
}

#[derive(Clone, Copy, Default)]
struct Cost {
    /// Seconds.
    wall: f64,
    /// Seconds of all cores, in the program and in the system.
    processor: f64,
}

fn processor() -> f64 {
    let usage = nix::sys::resource::getrusage(nix::sys::resource::UsageWho::RUSAGE_CHILDREN).unwrap();
    let seconds = |time: nix::sys::time::TimeVal| time.tv_sec() as f64 + time.tv_usec() as f64 / 1e6;
    seconds(usage.user_time()) + seconds(usage.system_time())
}

fn run(source: &Path, target: &Path, flags: &[&str]) -> Cost {
    let _ = fs::remove_file(target);
    // What the run before has left to be written must not slow this one.
    rustix::fs::sync();
    let (begin, before) = (Instant::now(), processor());
    let mut command = Command::new(OURS);
    command.args(["--quiet", "--device"]).arg(source).arg("--target").arg(target).args(flags).stdout(Stdio::null());
    assert!(command.status().unwrap().success(), "{command:?}");
    Cost { wall: begin.elapsed().as_secs_f64(), processor: processor() - before }
}

fn median(values: impl Iterator<Item = f64>) -> f64 {
    kit::median(values.collect())
}

/// In percent, the median of the rounds.
fn more(plain: &[Cost], hashed: &[Cost], of: impl Fn(&Cost) -> f64) -> f64 {
    100.0 * (median(plain.iter().zip(hashed).map(|(plain, hashed)| of(hashed) / of(plain))) - 1.0)
}

fn main() {
    let settings = Settings::from_arguments();
    let folder = settings.new_folder();
    println!("{} MiB, {} runs, in {}\n", settings.mib, settings.runs, settings.folder.display());
    println!("| copy | plain s | with --manifest s | | processor s | | read-back s |\n|---|---|---|---|---|---|---|");
    let manifest = folder.join("m.json");
    let manifest = manifest.to_str().unwrap();
    let kinds: [(&str, u64, &[&str]); 5] = [
        ("raw to raw, full", 1, &["--format", "raw"]),
        ("raw to raw, full, no flush", 1, &["--format", "raw", "--no-fsync"]),
        ("raw to raw, a quarter data", 4, &["--format", "raw"]),
        ("raw to qcow2, full", 1, &["--format", "qcow2"]),
        ("raw to zstd, full", 1, &["--format", "qcow2", "--compress", "zstd"]),
    ];
    for (name, every, flags) in kinds {
        let (disk, target) = (folder.join(format!("disk-{every}.raw")), folder.join("target"));
        if !disk.exists() {
            source(&disk, settings.mib * every, every);
        }
        let with = |more: &[&'static str]| -> Vec<&str> { [flags, more].concat() };
        let hashed = [&with(&["--manifest"])[..], &[manifest]].concat();
        let mut rows = vec![with(&[]), hashed.clone()];
        if !flags.contains(&"--no-fsync") {
            rows.push([&hashed[..], &["--verify"]].concat());
        }
        let mut costs = vec![Vec::new(); rows.len()];
        for round in 0..=settings.runs {
            for (row, costs) in rows.iter().zip(&mut costs) {
                let cost = run(&disk, &target, row);
                // The first round warms the page cache.
                if round > 0 {
                    costs.push(cost);
                }
            }
        }
        let wall: Vec<f64> = costs.iter().map(|costs| median(costs.iter().map(|cost| cost.wall))).collect();
        println!(
            "| {name} | {:.3} | {:.3} | {:+.0} % | {:.3} | {:+.0} % | {} |",
            wall[0],
            wall[1],
            more(&costs[0], &costs[1], |cost| cost.wall),
            median(costs[1].iter().map(|cost| cost.processor)),
            more(&costs[0], &costs[1], |cost| cost.processor),
            wall.get(2).map_or_else(String::new, |wall_all| format!("{:+.3}", wall_all - wall[1])),
        );
    }
    fs::remove_dir_all(&folder).unwrap();
}
