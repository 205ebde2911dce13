//! A process with some of the disk's writing threads. It ends when its standard input does, or is killed.

use super::proof::{Layout, Scribe, contents};
use crate::kit::{Random, SECTOR};
use crate::support::{Running, wait_for};
use drive_backup::ground::range::ByteRange;
use drive_backup::image::Image;
use drive_backup::image::qcow2::ExistingQcow2;
use drive_backup::image::raw::Raw;
use drive_backup::writer::Writer;
use nix::sys::signal::Signal;
use rustix::fs::{FallocateFlags, fallocate};
use std::fs::{File, OpenOptions};
use std::io::Read as _;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::time::Duration;

const ORDERS: &str = "DRIVE_BACKUP_TEST_CROWD";

/// What a process is to do.
#[derive(Clone, Copy, Debug)]
pub struct Orders {
    pub layout: Layout,
    pub is_qcow2: bool,
    /// Writes may be refused: the backup runs with `break-guest-write`.
    pub may_fail: bool,
    /// Its threads: so many, from this one on.
    pub first: u64,
    pub threads: u64,
}

impl Orders {
    fn text(&self) -> String {
        let Layout { seed, length, stripe, threads } = self.layout;
        let flags = [u64::from(self.is_qcow2), u64::from(self.may_fail)];
        let words = [&[seed, length, stripe, threads][..], &flags, &[self.first, self.threads]].concat();
        words.iter().map(ToString::to_string).collect::<Vec<_>>().join(" ")
    }

    fn parse(text: &str) -> Self {
        let words: Vec<u64> = text.split(' ').map(|word| word.parse().unwrap()).collect();
        let [seed, length, stripe, all, is_qcow2, may_fail, first, threads] = words[..] else { panic!("{text}") };
        let layout = Layout { seed, length, stripe, threads: all };
        Self { layout, is_qcow2: is_qcow2 == 1, may_fail: may_fail == 1, first, threads }
    }

    pub fn journal(&self, folder: &Path, thread: u64) -> std::path::PathBuf {
        folder.join(format!("journal-{thread}"))
    }

    fn start(&self, folder: &Path) -> Running {
        let mut writers = Command::new(std::env::current_exe().unwrap());
        writers.args(["--exact", "crowd::writers::a_process_of_writers", "--nocapture"]).env(ORDERS, self.text());
        Running::start(writers.current_dir(folder).stdin(Stdio::piped()).stdout(Stdio::null()))
    }
}

/// A process of writers, seen from outside.
pub struct Process {
    orders: Orders,
    running: Option<Running>,
}

impl Process {
    pub fn new(orders: Orders) -> Self {
        Self { orders, running: None }
    }

    pub fn is_running(&self) -> bool {
        self.running.is_some()
    }

    pub fn start(&mut self, folder: &Path) {
        self.running = Some(self.orders.start(folder));
    }

    /// Bytes in its journals.
    fn progress(&self, folder: &Path) -> u64 {
        let length = |thread| std::fs::metadata(self.orders.journal(folder, thread)).map_or(0, |file| file.len());
        (self.orders.first..self.orders.first + self.orders.threads).map(length).sum()
    }

    /// Waits for more writes.
    #[track_caller]
    pub fn goes_on(&mut self, folder: &Path) {
        let (orders, from) = (self.orders, self.progress(folder));
        let layout = orders.layout;
        let writes =
            (0..layout.sectors()).any(|at| (orders.first..orders.first + orders.threads).contains(&layout.owner(at)));
        let Some(running) = self.running.as_mut().filter(|_| writes) else { return };
        let progress = || Self { orders, running: None }.progress(folder);
        wait_for("a process's next writes", || {
            assert!(!running.has_ended(), "a process of writers has ended: {orders:?}");
            (progress() > from + 2 * 64 * orders.threads).then_some(())
        });
    }

    /// In the midst of whatever it does.
    pub fn kill(&mut self) {
        if let Some(mut running) = self.running.take() {
            running.signal(Signal::SIGKILL);
            running.child().wait().unwrap();
        }
    }

    /// As a program ends that wants to.
    #[track_caller]
    pub fn end(&mut self) {
        if let Some(mut running) = self.running.take() {
            drop(running.child().stdin.take());
            let ended = running.ended();
            assert_eq!(ended.code, 0, "{:?}: {ended:?}", self.orders);
        }
    }
}

/// The disk, as its writers change it.
enum Medium {
    Raw(File),
    /// Flushed after each write, so that what has ended is in the file when the process is killed.
    Qcow2(Arc<ExistingQcow2>),
}

impl Medium {
    fn open(is_qcow2: bool) -> Self {
        let file = OpenOptions::new().read(true).write(true).open("disk").unwrap();
        if !is_qcow2 {
            return Self::Raw(file);
        }
        let file = Arc::new(Raw::of(file).unwrap().without_flush());
        Self::Qcow2(Arc::new(ExistingQcow2::open(Path::new("disk"), file, None).unwrap()))
    }

    fn write(&self, bytes: &[u8], offset: u64) {
        match self {
            Self::Raw(file) => file.write_all_at(bytes, offset).unwrap(),
            Self::Qcow2(image) => {
                image.write_at(bytes, offset).unwrap();
                image.flush().unwrap();
            }
        }
    }

    fn zero(&self, range: ByteRange, punch: bool) {
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        match self {
            Self::Raw(file) if punch => fallocate(file, flags, range.offset, range.length).unwrap(),
            Self::Raw(file) => file.write_all_at(&vec![0; range.length as usize], range.offset).unwrap(),
            Self::Qcow2(image) => {
                image.write_zeroes(range).unwrap();
                image.flush().unwrap();
            }
        }
    }
}

/// A thread: until `stop`.
fn write(orders: &Orders, me: u64, writer: &Writer, medium: &Medium, stop: &AtomicBool) {
    let layout = &orders.layout;
    let mut scribe = Scribe::open(&orders.journal(Path::new("."), me));
    let mut random = Random::new(layout.seed ^ me.wrapping_shl(32) ^ scribe.sequence);
    let mine: Vec<u64> = (0..layout.sectors()).filter(|&sector| layout.owner(sector) == me).collect();
    while !stop.load(SeqCst) && !mine.is_empty() {
        let first = random.pick(&mine);
        let most = [1, 1 + random.below(8), 1 + random.below(64)][random.below(3) as usize];
        let count =
            (0..most).take_while(|n| first + n < layout.sectors() && layout.owner(first + n) == me).count() as u64;
        let range = ByteRange::new(first * SECTOR, count * SECTOR);
        let is_zero = random.once_in(6);
        scribe.asks(first, count, is_zero);
        match writer.begin(range.offset, range.length) {
            Ok(bracket) => {
                match is_zero {
                    true => medium.zero(range, random.once_in(2)),
                    false => medium.write(&contents(first, count, scribe.sequence, me), range.offset),
                }
                drop(bracket);
                scribe.ended();
            }
            Err(error) => {
                assert!(orders.may_fail && matches!(error.raw_os_error(), Some(5 | 28)), "write {range}: {error}");
                scribe.failed();
            }
        }
        // So that the journals stay short; nothing waits for it.
        std::thread::sleep(Duration::from_micros(random.below(200)));
    }
}

fn run(orders: &Orders) {
    let writer = Writer::open_in("disk", "meet").unwrap();
    let medium = Medium::open(orders.is_qcow2);
    if let Medium::Qcow2(image) = &medium {
        let image = image.clone();
        writer.on_freeze(move || image.flush());
    }
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for me in orders.first..orders.first + orders.threads {
            let (writer, medium, stop) = (&writer, &medium, &stop);
            scope.spawn(move || write(orders, me, writer, medium, stop));
        }
        // Until it is closed.
        let _ = std::io::stdin().read(&mut [0]);
        stop.store(true, SeqCst);
    });
}

/// Does nothing unless it is told to be such a process.
#[test]
fn a_process_of_writers() {
    if let Ok(orders) = std::env::var(ORDERS) {
        run(&Orders::parse(&orders));
    }
}
