//! Copies from and to an NBD server, ours beside nbdcopy's and qemu-img's against the same one: one command that prints ratios.
//!
//! ```text
//! cargo bench --bench nbd -- [--mib N] [--runs N] [--folder DIR] [--only WORD]
//! ```
//!
//! Whole processes, in alternation, page cache warm, no fsync in any of them: the median of each tool, and the ratio to the quickest
//! peer (above 1: ours is quicker). One image is full of data, one has a MiB of it in every 16.

mod kit;

use kit::{MIB, OURS, Random, Settings, median};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

const TOOLS: [&str; 3] = ["drive-backup", "nbdcopy", "qemu-img"];

/// Ended, by its own id, when dropped.
struct Server(Child);

impl Server {
    fn start(program: &str, socket: &Path, image: &Path, read_only: bool) -> Self {
        let _ = std::fs::remove_file(socket);
        let mut command = Command::new(program);
        match program {
            "nbdkit" => command.args(["-f", "-U"]).arg(socket),
            _ => command.args(["-t", "-e", "16", "-f", "raw", "-k"]).arg(socket),
        };
        if read_only {
            command.arg("-r");
        }
        if program == "nbdkit" {
            command.arg("file");
        }
        let child = command.arg(image).stdin(Stdio::null()).stderr(Stdio::null()).spawn().expect(program);
        let began = Instant::now();
        while UnixStream::connect(socket).is_err() {
            assert!(began.elapsed() < Duration::from_secs(10), "{program} does not listen");
            std::thread::yield_now();
        }
        Self(child)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// An image with data in `dense` of every 16 MiB.
fn image(path: &Path, mib: u64, dense: u64) {
    let file = File::create(path).expect("an image");
    file.set_len(mib * MIB).expect("its length");
    let (mut random, mut bytes) = (Random(1), vec![0; MIB as usize]);
    for at in (0..mib).filter(|at| at % 16 < dense) {
        random.noise(&mut bytes);
        file.write_all_at(&bytes, at * MIB).expect("data");
    }
}

fn seconds(tool: &str, from: &str, to: &str) -> f64 {
    let mut command = Command::new(if tool == "drive-backup" { OURS } else { tool });
    match tool {
        "drive-backup" => command.args(["--device", from, "--target", to, "--no-fsync", "--writer", "none"]),
        "nbdcopy" => command.args([from, to]),
        _ => command.args(["convert", "-n", "-f", "raw", "-O", "raw", "-W", "-m", "16", from, to]),
    };
    let began = Instant::now();
    let status = command.stdout(Stdio::null()).status().expect(tool);
    assert!(status.success(), "{tool} from {from} to {to}: {status}");
    began.elapsed().as_secs_f64()
}

fn main() {
    let settings = Settings::from_arguments();
    let (mib, runs, folder) = (settings.mib, settings.runs, settings.new_folder());
    let (source, copy, socket) = (folder.join("source"), folder.join("copy"), folder.join("socket"));
    let uri = format!("nbd+unix:///?socket={}", socket.display());
    let (source_name, copy_name) = (source.display().to_string(), copy.display().to_string());
    println!("{mib} MiB, median of {runs} runs, seconds; ratio to the quicker peer (above 1: ours is quicker)");
    for (shape, dense) in [("full", 16), ("sparse", 1)] {
        image(&source, mib, dense);
        for server in ["qemu-nbd", "nbdkit"] {
            for is_reading in [true, false] {
                let what = if is_reading { "nbd -> raw" } else { "raw -> nbd" };
                let name = format!("{shape:6} {server:8} {what}");
                if !name.contains(&settings.only) {
                    continue;
                }
                let mut times = TOOLS.map(|_| Vec::new());
                for _ in 0..runs {
                    for (tool, times) in TOOLS.iter().zip(&mut times) {
                        let _ = std::fs::remove_file(&copy);
                        // qemu-img -n and servers want it to be there.
                        if !is_reading || *tool == "qemu-img" {
                            File::create(&copy).and_then(|file| file.set_len(mib * MIB)).expect("a target");
                        }
                        let (image, from, to) =
                            if is_reading { (&source, &uri, &copy_name) } else { (&copy, &source_name, &uri) };
                        let _server = Server::start(server, &socket, image, is_reading);
                        times.push(seconds(tool, from, to));
                    }
                }
                let [ours, nbdcopy, qemu] = times.map(median);
                let ratio = nbdcopy.min(qemu) / ours;
                println!("{name}  ours {ours:.3}  nbdcopy {nbdcopy:.3}  qemu-img {qemu:.3}  ratio {ratio:.2}");
            }
        }
    }
    std::fs::remove_dir_all(&folder).expect("to clean up");
}
