//! A writer that owns a qcow2 image and brackets guest ranges. While it is copied, clusters are allocated, compressed ones
//! overwritten, others discarded, their places used again, and tables written: the copy is what the guest saw at the instant.

use crate::kit::{self, Ear, HANGS, Random, contents};
use crate::support::{bytes, qemu_img, qemu_io, text};
use drive_backup::backup::{self, OverlayPlace};
use drive_backup::ground::range::ByteRange;
use drive_backup::image::Image;
use drive_backup::image::format::Format;
use drive_backup::image::qcow2::ExistingQcow2;
use drive_backup::image::raw::Raw;
use drive_backup::job::Job;
use drive_backup::writer::Writer;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, Mutex};
use std::time::Instant;

/// Images that runs begin with: a cluster size, a disk's length, the compression.
const KINDS: &[(u64, u64, &str)] = &[
    (512, 150 << 10, "zlib"),
    (4096, 300 << 10, "zlib"),
    (4096, (300 << 10) + 512, "zstd"),
    (16 << 10, (400 << 10) + 1024, "zlib"),
    (64 << 10, 2 << 20, "zstd"),
];

/// Plain, compressed, zero and unallocated clusters.
fn create(folder: &Path, at: usize) -> PathBuf {
    let (cluster, length, compression) = KINDS[at];
    let path = folder.join(format!("{at}.qcow2"));
    let how = format!("create -q -f qcow2 -o cluster_size={cluster},compression_type={compression}");
    crate::support::run(
        "qemu-img",
        &[&how.split(' ').collect::<Vec<_>>()[..], &[text(&path), &length.to_string()]].concat(),
    );
    let fifth = length / 5 / cluster * cluster;
    let write = |kind: &str, at: u64, length: u64| format!("write {kind} {at} {length}");
    let mut commands = vec![write("-P 17", 0, fifth), write("-z", 2 * fifth, fifth)];
    // Compressed to about half, so that few share a host cluster and it is soon free.
    let noise = folder.join("noise");
    std::fs::write(&noise, bytes::noise(at as u64, fifth as usize)).unwrap();
    let kind = format!("-c -s {}", text(&noise));
    (0..fifth / cluster).for_each(|n| commands.push(write(&kind, fifth + n * cluster, cluster)));
    commands.push(write("-P 18", 3 * fifth, cluster));
    qemu_io(&["-f", "qcow2"], &path, &commands.iter().map(String::as_str).collect::<Vec<_>>());
    path
}

/// The guest's disk: the image, and what it must read as.
struct Guest {
    image: Arc<ExistingQcow2>,
    model: Arc<Mutex<Vec<u8>>>,
    cluster: u64,
    stop: AtomicBool,
    written: AtomicU64,
}

impl Guest {
    fn range(&self, random: &mut Random) -> (u64, u64) {
        let (end, cluster) = (self.image.length(), self.cluster);
        let offset = random.below(end);
        let length = match random.below(6) {
            0 => 1 + random.below(cluster * 6),
            1 | 2 => cluster * (1 + random.below(4)),
            _ => 1 + random.below(cluster.min(5000)),
        };
        // Mostly whole clusters, so that some are released.
        let offset = if random.once_in(2) { offset / cluster * cluster } else { offset };
        (offset, length.min(end - offset))
    }

    fn write(&self, writer: &Writer, mut random: Random) {
        while !self.stop.load(SeqCst) {
            let (offset, length) = self.range(&mut random);
            let bracket = writer.begin(offset, length).unwrap();
            self.change(offset, length, &mut random);
            drop(bracket);
            self.written.fetch_add(1, SeqCst);
        }
    }

    /// One at a time, so that the model knows the order.
    fn change(&self, offset: u64, length: u64, random: &mut Random) {
        let range = ByteRange::new(offset, length);
        let mut model = self.model.lock().unwrap();
        let bytes = &mut model[offset as usize..(offset + length) as usize];
        match random.below(8) {
            0 => {
                self.image.write_zeroes(range).unwrap();
                bytes.fill(0);
            }
            1 | 2 => {
                // What a discard does to a part of a cluster is up to the image: whole ones only.
                let first = offset.next_multiple_of(self.cluster);
                let last = (offset + length) / self.cluster * self.cluster;
                if first < last {
                    self.image.discard(ByteRange::between(first, last)).unwrap();
                    bytes[(first - offset) as usize..(last - offset) as usize].fill(0);
                }
            }
            3 if random.once_in(2) => self.image.flush().unwrap(),
            _ => {
                let new = contents(self.written.load(SeqCst) + 1, offset, length);
                self.image.write_at(&new, offset).unwrap();
                bytes.copy_from_slice(&new);
            }
        }
    }

    fn goes_on(&self, writes: u64) {
        let (from, since) = (self.written.load(SeqCst), Instant::now());
        while self.written.load(SeqCst) < from + writes {
            assert!(since.elapsed() < HANGS, "the guest does not go on");
            std::thread::yield_now();
        }
    }
}

struct StopAtEnd<'a>(&'a Guest);

impl Drop for StopAtEnd<'_> {
    fn drop(&mut self) {
        self.0.stop.store(true, SeqCst);
    }
}

fn open(path: &Path) -> Arc<ExistingQcow2> {
    let file = Arc::new(Raw::of(File::options().read(true).write(true).open(path).unwrap()).unwrap().without_flush());
    Arc::new(ExistingQcow2::open(path, file, None).unwrap())
}

fn read(image: &ExistingQcow2) -> Vec<u8> {
    let mut bytes = vec![0; image.length() as usize];
    image.read_at(&mut bytes, 0).unwrap();
    bytes
}

/// A guest of the image "disk", its writer, and what it saw at the freeze.
fn set_up(folder: &Path, cluster: u64) -> (Guest, Writer, Arc<Mutex<Option<Vec<u8>>>>) {
    let image = open(&folder.join("disk"));
    let guest = Guest {
        model: Arc::new(Mutex::new(read(&image))),
        image,
        cluster,
        stop: AtomicBool::new(false),
        written: AtomicU64::new(0),
    };
    let writer = Writer::open_in(folder.join("disk"), folder.join("meet")).unwrap();
    let seen = Arc::new(Mutex::new(None));
    let (image, model, at_freeze) = (guest.image.clone(), guest.model.clone(), seen.clone());
    writer.on_freeze(move || {
        image.flush()?;
        *at_freeze.lock().unwrap() = Some(model.lock().unwrap().clone());
        Ok(())
    });
    (guest, writer, seen)
}

fn run(seed: u64, images: &[PathBuf]) {
    let mut random = Random::new(seed);
    let folder = kit::memory_folder();
    let path = |name: &str| folder.path().join(name);
    let kind = random.below(KINDS.len() as u64) as usize;
    std::fs::copy(&images[kind], path("disk")).unwrap();
    let (guest, writer, seen) = set_up(folder.path(), KINDS[kind].0);
    let mut options = kit::options(&path("disk"), &path("copy"), &path("meet"));
    options.source_format = Some(Format::Qcow2);
    options.format = Some(random.pick(&[Format::Raw, Format::Raw, Format::Qcow2]));
    options.workers = 1 + random.below(3) as usize;
    if random.once_in(2) {
        options.overlay = OverlayPlace::Folder(folder.path().to_owned());
    }
    let length = guest.image.length();
    let rate = (!random.once_in(5)).then(|| (length * 50) << random.below(3));
    std::thread::scope(|scope| {
        for _ in 0..1 + random.below(3) {
            let (guest, writer, random) = (&guest, &writer, Random::new(random.next()));
            scope.spawn(move || guest.write(writer, random));
        }
        let _stop = StopAtEnd(&guest);
        guest.goes_on(random.below(40));
        let ear = Ear::default();
        backup::run(&options, &Arc::new(Job::new(rate)), &ear).unwrap();
        assert_eq!(ear.started().unwrap().writers, 1);
        guest.goes_on(20);
    });
    let seen = seen.lock().unwrap().take().expect("it was frozen");
    kit::same("the copy", &kit::disk_of(&path("copy"), options.format.unwrap(), length), &seen);
    let model = guest.model.lock().unwrap();
    kit::same("the source", &read(&guest.image), &model);
    if seed.is_multiple_of(16) {
        guest.image.flush().unwrap();
        qemu_img("check -q -f qcow2", &[&path("disk")]);
    }
}

#[test]
fn a_copy_of_an_image_is_what_its_guest_saw_at_the_instant() {
    let folder = kit::memory_folder();
    let images: Vec<_> = (0..KINDS.len()).map(|at| create(folder.path(), at)).collect();
    kit::each_seed(60, 1, |seed| run(seed, &images));
}

/// An image whose first `compressed` bytes are clusters of 64 KiB, each compressed to about half; the rest is unallocated.
fn create_compressed(folder: &Path, compressed: u64, length: u64) {
    let plain = folder.join("plain");
    let noise = |n: u64| [bytes::noise(n, 32 << 10), vec![n as u8 | 1; 32 << 10]].concat();
    std::fs::write(&plain, (0..compressed >> 16).flat_map(noise).collect::<Vec<_>>()).unwrap();
    std::fs::File::options().write(true).open(&plain).unwrap().set_len(length).unwrap();
    qemu_img("convert -c -f raw -O qcow2", &[&plain, &folder.join("disk")]);
}

/// More of them than the reader keeps inflated, so that it has to look again at where each cluster was.
#[test]
fn a_compressed_cluster_that_is_partly_overwritten_is_saved_whole() {
    const CLUSTER: u64 = 64 << 10;
    let folder = kit::memory_folder();
    let path = |name: &str| folder.path().join(name);
    let (compressed, length) = (16 << 20, 24 << 20);
    create_compressed(folder.path(), compressed, length);
    let (guest, writer, seen) = set_up(folder.path(), CLUSTER);
    let mut options = kit::options(&path("disk"), &path("copy"), &path("meet"));
    options.source_format = Some(Format::Qcow2);
    let job = Arc::new(Job::new(None));
    let ear = Ear::pausing(Some(job.clone()));
    std::thread::scope(|scope| {
        let backup = scope.spawn(|| backup::run(&options, &job, &ear).map(drop));
        ear.wait_for_start();
        let write = |offset: u64, length: u64| {
            let _bracket = writer.begin(offset, length).unwrap();
            guest.image.write_at(&contents(1, offset, length), offset).unwrap();
        };
        // Each moves, and frees its old place.
        (0..compressed).step_by(CLUSTER as usize).for_each(|at| write(at + 5000, 100));
        guest.image.flush().unwrap();
        // Which is used again.
        (compressed..length).step_by(CLUSTER as usize).for_each(|at| write(at, CLUSTER));
        guest.image.flush().unwrap();
        job.resume();
        backup.join().unwrap().unwrap();
    });
    let seen = seen.lock().unwrap().take().expect("it was frozen");
    kit::same("the copy", &kit::disk_of(&path("copy"), Format::Raw, length), &seen);
    qemu_img("check -q -f qcow2", &[&path("disk")]);
}
