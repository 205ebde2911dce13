//! Copies of one disk, ours beside qemu-img's, cp's and nbdcopy's: one command that prints ratios.
//!
//! ```text
//! cargo bench --bench offline -- [--mib N] [--runs N] [--folder DIR] [--only WORD]
//! ```
//!
//! Whole processes, in alternation, page cache warm, a sync between them, no fsync in them (the peers do none): the median of each tool, and the
//! ratio to the quickest peer. What our fsync adds is measured apart. Sources are made afresh, the same ones each time.

mod kit;

use drive_backup::image::Image;
use drive_backup::image::qcow2::{CreateOptions, NewQcow2};
use drive_backup::image::raw::Raw;
use kit::{MIB, OURS, Random, Settings, median};
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Instant;

/// Words of a vocabulary, the frequent ones more often, as compressible as prose.
fn prose(random: &mut Random, bytes: &mut [u8], vocabulary: &[Vec<u8>]) {
    let mut at = 0;
    while at < bytes.len() {
        let rank = random.number() % vocabulary.len() as u64 * (random.number() % 1000) / 1000;
        let word = &vocabulary[rank as usize];
        let length = word.len().min(bytes.len() - at);
        bytes[at..at + length].copy_from_slice(&word[..length]);
        at += length;
    }
}

fn vocabulary(random: &mut Random) -> Vec<Vec<u8>> {
    let word = |random: &mut Random| {
        let length = 2 + random.number() % 9;
        let mut word: Vec<u8> = (0..length).map(|_| b"etaoinshrdlucmfw"[(random.number() % 16) as usize]).collect();
        word.push(b' ');
        word
    };
    (0..20_000).map(|_| word(random)).collect()
}

fn raw_full(path: &Path, bytes: u64) {
    let (file, mut random, mut buffer) = (File::create(path).unwrap(), Random(1), vec![0; MIB as usize]);
    for offset in (0..bytes).step_by(MIB as usize) {
        random.noise(&mut buffer);
        file.write_all_at(&buffer, offset).unwrap();
    }
}

/// A quarter of it allocated, in extents of 64 KiB to 16 MiB.
fn raw_sparse(path: &Path, bytes: u64) {
    let (file, mut random, mut buffer) = (File::create(path).unwrap(), Random(2), vec![0; 16 * MIB as usize]);
    file.set_len(bytes).unwrap();
    let mut allocated = 0;
    while allocated < bytes / 4 {
        let length = (64 << 10) << (random.number() % 9);
        let offset = (random.number() % ((bytes - length) >> 16)) << 16;
        random.noise(&mut buffer[..length as usize]);
        file.write_all_at(&buffer[..length as usize], offset).unwrap();
        allocated += length;
    }
}

/// Half of it allocated, in pieces of 64 KiB to 1 MiB that lie in the file in another order; text and noise in turn.
fn qcow2_fragmented(path: &Path, bytes: u64) {
    let mut random = Random(3);
    let vocabulary = vocabulary(&mut random);
    let file = File::create_new(path).unwrap();
    let options = CreateOptions { cluster_size: CreateOptions::DEFAULT_CLUSTER_SIZE, compression: None };
    let image = NewQcow2::create(Arc::new(Raw::fresh(file, 0).unwrap()), bytes, options).unwrap();
    let mut pieces = Vec::new();
    let mut offset = 0;
    while offset < bytes {
        let length = ((64 << 10) << (random.number() % 5)).min(bytes - offset);
        pieces.push((offset, length));
        offset += length;
    }
    for at in (1..pieces.len()).rev() {
        pieces.swap(at, (random.number() % (at as u64 + 1)) as usize);
    }
    let mut buffer = vec![0; MIB as usize];
    for (number, &(offset, length)) in pieces[..pieces.len() / 2].iter().enumerate() {
        let buffer = &mut buffer[..length as usize];
        if number % 2 == 0 {
            random.noise(buffer)
        } else {
            prose(&mut random, buffer, &vocabulary)
        }
        image.write_at(buffer, offset).unwrap();
    }
    image.flush().unwrap();
}

fn sh(command: &str) {
    let status = Command::new("sh").args(["-ec", command]).status().unwrap();
    assert!(status.success(), "{command}");
}

fn exists(program: &str) -> bool {
    Command::new("sh").args(["-c", &format!("command -v {program}")]).stdout(Stdio::null()).status().unwrap().success()
}

/// Seconds of one run, from start to exit.
fn seconds(command: &str, target: &Path) -> f64 {
    let _ = fs::remove_file(target);
    // What the tool before has left to be written must not slow this one.
    rustix::fs::sync();
    let mut words = command.split_whitespace();
    let mut command = Command::new(words.next().unwrap());
    command.args(words).stdout(Stdio::null()).stderr(Stdio::piped());
    let begin = Instant::now();
    let output = command.output().unwrap();
    let seconds = begin.elapsed().as_secs_f64();
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
    seconds
}

struct Cell {
    name: &'static str,
    source: &'static str,
    ours: &'static str,
    peers: &'static [&'static str],
}

const RAW_PEERS: &[&str] = &[
    "qemu-img convert -f raw -O raw {src} {dst}",
    "qemu-img convert -m 16 -W -f raw -O raw {src} {dst}",
    "cp {src} {dst}",
    "cp --reflink=never {src} {dst}",
    "nbdcopy {src} {dst}",
];
const TO_RAW: &[&str] =
    &["qemu-img convert -f qcow2 -O raw {src} {dst}", "qemu-img convert -m 16 -W -f qcow2 -O raw {src} {dst}"];
const RAW_TO_QCOW2: &[&str] =
    &["qemu-img convert -f raw -O qcow2 {src} {dst}", "qemu-img convert -m 16 -W -f raw -O qcow2 {src} {dst}"];
const QCOW2_TO_QCOW2: &[&str] =
    &["qemu-img convert -f qcow2 -O qcow2 {src} {dst}", "qemu-img convert -m 16 -W -f qcow2 -O qcow2 {src} {dst}"];
const TO_ZLIB: &[&str] =
    &["qemu-img convert -c -f raw -O qcow2 {src} {dst}", "qemu-img convert -c -m 16 -W -f raw -O qcow2 {src} {dst}"];
const TO_ZSTD: &[&str] = &[
    "qemu-img convert -c -o compression_type=zstd -f raw -O qcow2 {src} {dst}",
    "qemu-img convert -c -m 16 -W -o compression_type=zstd -f raw -O qcow2 {src} {dst}",
];

const CELLS: &[Cell] = &[
    Cell { name: "raw to raw, full", source: "full.raw", ours: "--format raw", peers: RAW_PEERS },
    Cell { name: "raw to raw, sparse", source: "sparse.raw", ours: "--format raw", peers: RAW_PEERS },
    Cell { name: "raw to raw, ext4", source: "ext4.raw", ours: "--format raw", peers: RAW_PEERS },
    Cell { name: "raw to qcow2, full", source: "full.raw", ours: "--format qcow2", peers: RAW_TO_QCOW2 },
    Cell { name: "raw to qcow2, sparse", source: "sparse.raw", ours: "--format qcow2", peers: RAW_TO_QCOW2 },
    Cell { name: "raw to qcow2, ext4", source: "ext4.raw", ours: "--format qcow2", peers: RAW_TO_QCOW2 },
    Cell { name: "qcow2 to raw", source: "plain.qcow2", ours: "--format raw", peers: TO_RAW },
    Cell { name: "qcow2 to qcow2", source: "plain.qcow2", ours: "--format qcow2", peers: QCOW2_TO_QCOW2 },
    Cell { name: "zlib to raw", source: "zlib.qcow2", ours: "--format raw", peers: TO_RAW },
    Cell { name: "zstd to raw", source: "zstd.qcow2", ours: "--format raw", peers: TO_RAW },
    Cell { name: "raw to zlib, ext4", source: "ext4.raw", ours: "--format qcow2 --compress zlib", peers: TO_ZLIB },
    Cell { name: "raw to zstd, ext4", source: "ext4.raw", ours: "--format qcow2 --compress zstd", peers: TO_ZSTD },
];

fn make_source(name: &str, folder: &Path, bytes: u64) {
    let path = folder.join(name);
    if path.exists() {
        return;
    }
    match name {
        "full.raw" => raw_full(&path, bytes),
        "sparse.raw" => raw_sparse(&path, 4 * bytes),
        "plain.qcow2" => qcow2_fragmented(&path, 2 * bytes),
        "ext4.raw" => sh(&format!(
            "truncate -s {bytes} {0}; /sbin/mkfs.ext4 -q -F -d /usr/share {0} 2>/dev/null || /sbin/mkfs.ext4 -q -F -d /usr/lib/git-core {0}",
            path.display()
        )),
        _ => {
            make_source("plain.qcow2", folder, bytes);
            let kind = name.trim_end_matches(".qcow2");
            let plain = folder.join("plain.qcow2");
            sh(&format!(
                "qemu-img convert -c -m 4 -W -O qcow2 -o compression_type={kind} {} {}",
                plain.display(),
                path.display()
            ));
        }
    }
}

fn measure(cell: &Cell, settings: &Settings, folder: &Path) {
    make_source(cell.source, folder, settings.mib * MIB);
    let (source, target) = (folder.join(cell.source), folder.join("target"));
    let fill = |line: &str| line.replace("{src}", source.to_str().unwrap()).replace("{dst}", target.to_str().unwrap());
    let ours = fill(&format!("{OURS} --quiet --device {{src}} --target {{dst}} {}", cell.ours));
    let mut rows = vec![format!("{ours} --no-fsync"), ours];
    rows.extend(cell.peers.iter().filter(|line| exists(line.split(' ').next().unwrap())).map(|line| fill(line)));

    let mut times = vec![Vec::new(); rows.len()];
    for run in 0..=settings.runs {
        for (row, times) in rows.iter().zip(&mut times) {
            let seconds = seconds(row, &target);
            // The first round warms the page cache.
            if run > 0 {
                times.push(seconds);
            }
        }
    }
    let medians: Vec<f64> = times.into_iter().map(median).collect();
    let (best, quickest) =
        medians[2..].iter().zip(&rows[2..]).min_by(|a, b| a.0.total_cmp(b.0)).expect("at least one peer");
    let peer: Vec<&str> = quickest.split(' ').filter(|word| !word.contains('/')).collect();
    println!(
        "| {} | {:.3} | {:.3} | {} | {:.2} | +{:.3} |",
        cell.name,
        medians[0],
        best,
        peer.join(" "),
        medians[0] / best,
        medians[1] - medians[0],
    );
}

fn main() {
    let settings = Settings::from_arguments();
    let folder = settings.new_folder();
    println!("{} MiB, {} runs, in {}\n", settings.mib, settings.runs, settings.folder.display());
    println!("| copy | ours s | quickest peer s | which | ratio | our fsync s |\n|---|---|---|---|---|---|");
    for cell in CELLS.iter().filter(|cell| cell.name.contains(&settings.only)) {
        measure(cell, &settings, &folder);
    }
    fs::remove_dir_all(&folder).unwrap();
}
