//! What a writer pays: begin and end without a backup, on free clusters, and trapped; and what a trapped write is made
//! of.
//!
//! ```text
//! cargo bench --bench ring -- [--writes N] [--pause MICROSECONDS]
//! ```
//!
//! Writer and backup are threads of one process here, over the same sockets, shared memory and futexes as between two.

use drive_backup::error::{Error, Result, Side};
use drive_backup::ground::cluster::ClusterSize;
use drive_backup::ground::range::ByteRange;
use drive_backup::image::Image;
use drive_backup::image::raw::Raw;
use drive_backup::ring::folder::Disk;
use drive_backup::ring::server::{OnCbwError, Options, Trap, Writers};
use drive_backup::snapshot::copy_state::{CopyState, Plan};
use drive_backup::snapshot::overlay::Overlay;
use drive_backup::snapshot::preserve::Preserver;
use drive_backup::snapshot::tracker::Tracker;
use drive_backup::writer::Writer;
use std::fs::File;
use std::hint::black_box;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

const CLUSTER: u64 = 4096;
/// Each write goes to a new cluster, 64 KiB from the last.
const STRIDE: u64 = 64 << 10;

struct Nothing;

impl Trap for Nothing {
    fn before_write(&self, _: ByteRange) -> Result<()> {
        Ok(())
    }
    fn lost(&self, why: &Error) {
        panic!("{why}");
    }
}

struct Capture(Preserver);

impl Trap for Capture {
    fn before_write(&self, range: ByteRange) -> Result<()> {
        self.0.before_write(range).map(drop)
    }
    fn lost(&self, why: &Error) {
        panic!("{why}");
    }
}

struct Scene {
    folder: tempfile::TempDir,
    disk: File,
    length: u64,
    pause: Duration,
}

impl Scene {
    fn writer(&self) -> Writer {
        Writer::open_in(self.folder.path().join("disk"), self.folder.path().join("meet")).unwrap()
    }

    fn attach(&self) -> Writers {
        let disk = Disk::at(&self.folder.path().join("disk")).unwrap();
        let options = Options {
            length: self.length,
            cluster_size: ClusterSize::new(CLUSTER),
            freeze_timeout: Duration::from_secs(5),
            cbw_timeout: Duration::from_secs(30),
            on_cbw_error: OnCbwError::BreakSnapshot,
            threads: 4,
        };
        Writers::attach(disk, &self.folder.path().join("meet"), options).unwrap()
    }

    /// One bracketed 4 KiB write to each stride: how long each took, the bracket alone and with the write.
    fn writes(&self, writer: Option<&Writer>) -> [Vec<Duration>; 2] {
        let block = [7; CLUSTER as usize];
        let mut times = [Vec::new(), Vec::new()];
        for offset in (0..self.length).step_by(STRIDE as usize) {
            let until = Instant::now() + self.pause;
            while Instant::now() < until {
                std::hint::spin_loop();
            }
            let began = Instant::now();
            let write = writer.map(|writer| writer.begin(offset, CLUSTER).unwrap());
            times[0].push(began.elapsed());
            self.disk.write_all_at(&block, offset).unwrap();
            drop(write);
            times[1].push(began.elapsed());
        }
        times
    }
}

fn report(name: &str, [bracket, whole]: [Vec<Duration>; 2]) {
    let quantiles = |mut times: Vec<Duration>| {
        times.sort_unstable();
        let at = |percent: usize| times[(times.len() - 1) * percent / 100].as_secs_f64() * 1e6;
        format!("p50 {:8.2}  p99 {:8.2}  max {:8.2}", at(50), at(99), at(100))
    };
    println!("{name:44} begin: {}   begin, pwrite, end: {}  [us]", quantiles(bracket), quantiles(whole));
}

fn nanoseconds(name: &str, threads: u32, writer: &Writer) {
    const PAIRS: u32 = 5_000_000;
    let began = Instant::now();
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                for at in 0..u64::from(PAIRS) {
                    drop(black_box(writer).begin(black_box(at % 1024 * CLUSTER), CLUSTER).unwrap());
                }
            });
        }
    });
    println!("{name:44} {:6.1} ns a pair on each of {threads}", began.elapsed().as_secs_f64() * 1e9 / f64::from(PAIRS));
}

fn main() {
    let mut arguments = std::env::args().skip(1).filter(|argument| argument != "--bench");
    let (mut writes, mut pause) = (10_000, 30);
    while let Some(flag) = arguments.next() {
        let value = arguments.next().and_then(|value| value.parse().ok()).expect("a number");
        match flag.as_str() {
            "--writes" => writes = value,
            "--pause" => pause = value,
            _ => panic!("unknown option {flag}"),
        }
    }
    let folder = tempfile::tempdir_in(Path::new(env!("CARGO_TARGET_TMPDIR"))).unwrap();
    let disk = File::options().read(true).write(true).create_new(true).open(folder.path().join("disk")).unwrap();
    let length = writes * STRIDE;
    let chunk = vec![1; 1 << 20];
    for offset in (0..length).step_by(chunk.len()) {
        disk.write_all_at(&chunk[..chunk.len().min((length - offset) as usize)], offset).unwrap();
    }
    let scene = Scene { folder, disk, length, pause: Duration::from_micros(pause) };
    let writer = scene.writer();

    nanoseconds("no backup", 1, &writer);
    nanoseconds("no backup", 2, &writer);
    {
        let writers = scene.attach();
        writers.freeze().unwrap().thaw(Arc::new(Nothing)).unwrap();
        writers.free_map().free(0..length / CLUSTER);
        nanoseconds("a backup runs, all clusters free", 1, &writer);
        nanoseconds("a backup runs, all clusters free", 2, &writer);
        writers.finish().unwrap();
    }
    report("no backup", scene.writes(None));
    report("no backup, bracketed", scene.writes(Some(&writer)));
    {
        let writers = scene.attach();
        let frozen = writers.freeze().unwrap().thaw(Arc::new(Nothing)).unwrap();
        println!("{:44} {frozen:?}", "frozen for");
        report("trapped, nothing to save: the ring alone", scene.writes(Some(&writer)));
        writers.finish().unwrap();
    }
    for name in ["memory", "a file"] {
        let writers = scene.attach();
        let size = ClusterSize::new(CLUSTER);
        let plan = Plan { granule: 1 << 20, ascending: false };
        let tracker = Arc::new(Tracker::new(CopyState::new(length, size, plan)));
        tracker.attach_free_map(writers.free_map());
        let source: Arc<dyn Image> = Arc::new(Raw::open(&scene.folder.path().join("disk"), Side::Source).unwrap());
        let overlay = match name {
            "memory" => Overlay::in_memory(length, None),
            _ => Overlay::in_folder(scene.folder.path(), length, None),
        };
        let overlay = Arc::new(overlay.unwrap());
        let trap = Arc::new(Capture(Preserver::new(tracker, source, overlay)));
        writers.freeze().unwrap().thaw(trap).unwrap();
        report(&format!("trapped, saved in an overlay in {name}"), scene.writes(Some(&writer)));
        report("the same clusters again, free now", scene.writes(Some(&writer)));
        writers.finish().unwrap();
        let stalls = writers.counts().stalls;
        println!(
            "{:44} p50 {:?} p99 {:?} max {:?}",
            "stalls as counted",
            stalls.quantile(50),
            stalls.quantile(99),
            stalls.max()
        );
    }
}
