//! fio on a served file beside qemu-storage-daemon's FUSE export of the same image, in alternation; medians, and ours by theirs.
//!
//! `cargo bench --bench fuse -- [--folder DIR] [--mib N] [--runs N] [--seconds N]`. Root only.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

const CASES: [(&str, &str); 6] = [
    ("random 4 KiB reads, one at a time", "--rw=randread --bs=4k --ioengine=psync"),
    ("random 4 KiB writes, one at a time", "--rw=randwrite --bs=4k --ioengine=psync"),
    ("random 4 KiB reads, 16 at a time", "--rw=randread --bs=4k --ioengine=libaio --direct=1 --iodepth=16"),
    ("random 4 KiB writes, 16 at a time", "--rw=randwrite --bs=4k --ioengine=libaio --direct=1 --iodepth=16"),
    ("sequential 1 MiB reads", "--rw=read --bs=1M --ioengine=libaio --direct=1 --iodepth=4"),
    ("sequential 1 MiB writes", "--rw=write --bs=1M --ioengine=libaio --direct=1 --iodepth=4"),
];

/// A server of a mounted file; ended, and waited for, when dropped.
struct Server(Child);

impl Server {
    fn start(program: &str, arguments: &[String], mount: &Path) -> Self {
        let mut command = Command::new(program);
        command.args(arguments).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        let server = Self(command.spawn().unwrap_or_else(|e| panic!("{program}: {e}")));
        let began = Instant::now();
        while std::fs::metadata(mount).map_or(0, |found| found.len()) == 0 {
            assert!(began.elapsed() < Duration::from_secs(10), "{program} shows nothing");
            sleep(Duration::from_millis(10));
        }
        server
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let pid = nix::unistd::Pid::from_raw(self.0.id() as i32);
        let _ = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM);
        let _ = self.0.wait();
    }
}

/// Bytes a second.
fn fio(file: &Path, job: &str, size: u64, seconds: u64) -> f64 {
    let common = format!("--name=b --output-format=json --size={size} --time_based --runtime={seconds} --norandommap");
    let output = Command::new("fio")
        .args(common.split(' ').chain(job.split(' ')))
        .arg(format!("--filename={}", file.display()))
        .output()
        .expect("fio runs");
    let found: serde_json::Value = serde_json::from_slice(&output.stdout).expect("fio answers in JSON");
    let job = &found["jobs"][0];
    assert_eq!(job["error"], 0, "{job}");
    ["read", "write"].iter().map(|way| job[*way]["bw_bytes"].as_f64().expect("a rate")).sum()
}

fn median(mut rates: Vec<f64>) -> f64 {
    rates.sort_by(f64::total_cmp);
    rates[rates.len() / 2]
}

fn main() {
    let arguments: Vec<String> = std::env::args().collect();
    let of = |flag: &str| arguments.iter().position(|found| found == flag).map(|at| arguments[at + 1].clone());
    let number = |flag: &str, default: u64| of(flag).map_or(default, |text| text.parse().expect("a number"));
    let (mib, runs, seconds) = (number("--mib", 256), number("--runs", 3), number("--seconds", 2));
    let folder = of("--folder").map_or_else(std::env::temp_dir, PathBuf::from);
    let home = tempfile::tempdir_in(folder).unwrap();
    let (image, mount) = (home.path().join("disk.raw"), home.path().join("shown"));
    std::fs::write(&image, vec![0x5a; (mib << 20) as usize]).unwrap();
    std::fs::write(&mount, "").unwrap();
    let text = |path: &Path| path.to_str().unwrap().to_owned();
    let ours = [
        "serve",
        "--format=raw",
        "--device",
        &text(&image),
        "--fuse",
        &text(&mount),
        "--writer-dir",
        &text(&home.path().join("writers")),
    ];
    let theirs = [
        "--blockdev".to_owned(),
        format!("driver=file,node-name=f,filename={}", text(&image)),
        "--export".to_owned(),
        format!("type=fuse,id=e,node-name=f,writable=on,allow-other=off,mountpoint={}", text(&mount)),
    ];
    let ours = ours.map(str::to_owned);
    println!("| on the file | ours MiB/s | qemu-storage-daemon MiB/s | ours by theirs |\n|---|---|---|---|");
    for (name, job) in CASES {
        let (mut mine, mut its) = (Vec::new(), Vec::new());
        for _ in 0..runs {
            let server = Server::start(env!("CARGO_BIN_EXE_drive-backup"), &ours, &mount);
            mine.push(fio(&mount, job, mib << 20, seconds));
            drop(server);
            let server = Server::start("qemu-storage-daemon", &theirs, &mount);
            its.push(fio(&mount, job, mib << 20, seconds));
            drop(server);
        }
        let (mine, its) = (median(mine) / 1_048_576.0, median(its) / 1_048_576.0);
        println!("| {name} | {mine:.1} | {its:.1} | {:.2} |", mine / its);
    }
}
