//! A fault of every kind, in every kind of call, on source, target, overlay, folder and shared memory, at the first, later and
//! last calls. What is promised for it (`rule.rs`) is what happens, and docs/TESTING.md has the table.
//!
//! `DRIVE_BACKUP_SWEEP=all` tries every k-th call in every setup, otherwise each fault is tried once or twice.
//! `DRIVE_BACKUP_SWEEP_ONLY=WORDS` tries the faults of whose names all the words are a part. `UPDATE=1` writes the table.
#![cfg(all(feature = "cli", target_os = "linux"))]

mod inject;
#[allow(dead_code)]
#[path = "../live/kit.rs"]
mod kit;
mod lines;
mod rule;
mod stage;
#[path = "../support/mod.rs"]
mod support;
mod table;
#[path = "../live/trail.rs"]
mod trail;

use inject::{Fault, Library, When};
use lines::{EXEMPTIONS, KINDS, LINES, Line};
use rule::{Place, Policy, promised};
use stage::{Case, Setup, Stage};
use std::collections::{BTreeMap, BTreeSet};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use table::{Row, Table};

fn is_wide() -> bool {
    std::env::var("DRIVE_BACKUP_SWEEP").is_ok_and(|width| width == "all")
}

/// So many positions are tried of calls that are made often.
const POSITIONS: u64 = 6;

/// From the first to the last, every k-th, and where that makes sense all of them.
fn positions(count: u64, place: Place, call: &str, fault: Fault, policy: Policy) -> Vec<When> {
    let is_failing = !matches!(fault, Fault::Eintr | Fault::Late);
    // Which of them tells of lost writes, or decides something, is the command's business.
    let is_any = match call {
        "close" => true,
        "look" => place != Place::Target,
        // The last is made when the copy has its name.
        "duplicate" => place == Place::Manifest,
        _ => place == Place::ReadBack && call == "open",
    };
    if is_any && is_failing {
        return vec![(1, u64::MAX)];
    }
    let step = count.div_ceil(POSITIONS).max(1);
    let mut firsts: Vec<u64> = (1..=count).step_by(step as usize).chain([count]).collect();
    firsts.dedup();
    match policy {
        // What fails once is tried again, sector by sector: it must go on to fail.
        Policy::SourceIgnore | Policy::TargetIgnore => return firsts.into_iter().map(|n| (n, u64::MAX)).collect(),
        // Who lets go in time was not in the way.
        _ if fault == Fault::Eagain => return firsts.into_iter().map(|n| (n, u64::MAX)).collect(),
        // If none shows what the partial file is, it is not removed: it may be another backup's.
        _ if call == "look" => {}
        // Each time it stops anew.
        Policy::SourceStop | Policy::TargetStop | Policy::TargetEnospc => {}
        // What is tried again, or falls short, for ever is not done each time; nor are all ways closed that there are.
        _ if matches!(fault, Fault::Eio | Fault::Enospc | Fault::Half)
            || call == "fallocate" && fault == Fault::Eopnotsupp =>
        {
            return firsts.into_iter().map(|n| (n, n)).chain([(1, u64::MAX)]).collect();
        }
        _ => {}
    }
    firsts.into_iter().map(|n| (n, n)).collect()
}

/// What a row is tried with: its setups, and of each the positions.
fn cases(line: &Line, fault: Fault, policy: Policy, turn: usize, counts: &Counts) -> Vec<Case> {
    let of = |&setup: &Setup| {
        let count = counts.count(setup, line);
        assert!(count > 0, "{setup:?}: no {} of {:?} in a good run", line.call, line.place);
        positions(count, line.place, line.call, fault, policy).into_iter().map(|when| (setup, when)).collect::<Vec<_>>()
    };
    let all: Vec<Vec<(Setup, When)>> = line.setups.iter().map(of).collect();
    let few = || {
        let of = &all[turn % all.len()];
        vec![of[turn / all.len() % of.len()]]
    };
    let chosen = if is_wide() { all.concat() } else { few() };
    let case = |(at, (setup, when)): (usize, (Setup, When))| Case {
        setup,
        place: line.place,
        call: line.call,
        fault,
        policy,
        when,
        // Ranges that are missing are listed in JSON, and so are stops.
        json: policy != Policy::Default || (at + turn).is_multiple_of(2),
    };
    chosen.into_iter().enumerate().map(case).collect()
}

/// So often a run is tried beside a writer who may be late for it.
const TRIES: usize = 20;

/// What good runs call.
struct Counts(BTreeMap<Setup, (Stage, String)>);

impl Counts {
    fn of(library: &Library, setups: &[Setup]) -> Self {
        let good = |&setup: &Setup| {
            let stage = Stage::new(setup);
            let lines = LINES.iter().filter(|line| line.setups.contains(&setup));
            let has_all = |trace: &str| lines.clone().all(|line| stage.count(trace, line.place, line.call) > 0);
            let mut trace = stage.trace(library);
            for _ in 1..TRIES {
                if has_all(&trace) {
                    break;
                }
                trace = stage.trace(library);
            }
            (setup, (stage, trace))
        };
        Self(setups.iter().map(good).collect())
    }

    fn count(&self, setup: Setup, line: &Line) -> u64 {
        let (stage, trace) = &self.0[&setup];
        stage.count(trace, line.place, line.call)
    }
}

/// Panics unless each kind of call at each place is tried, or exempt for a reason that still holds.
fn assert_all_are_tried(counts: &Counts) {
    let mut untried: BTreeMap<(Place, &str), Vec<Setup>> = BTreeMap::new();
    for (&setup, (stage, trace)) in &counts.0 {
        for line in trace.lines() {
            let kind = KINDS.iter().find(|&&kind| line.split(' ').next() == Some(kind));
            let kind = kind.unwrap_or_else(|| panic!("a call of no known kind: {line}"));
            let places = stage.places(kind, line);
            let is_tried = |&place: &Place| LINES.iter().any(|line| (line.place, line.call) == (place, *kind));
            if let Some(&place) = places.first()
                && !places.iter().any(is_tried)
            {
                untried.entry((place, kind)).or_default().push(setup);
            }
        }
    }
    let exempt: BTreeSet<(Place, &str)> =
        EXEMPTIONS.iter().flat_map(|exempt| exempt.places.iter().map(|&place| (place, exempt.call))).collect();
    assert!(EXEMPTIONS.iter().all(|exempt| !exempt.why.is_empty()));
    let seen: BTreeSet<_> = untried.keys().copied().collect();
    untried.retain(|call, _| !exempt.contains(call));
    untried.values_mut().for_each(|setups| setups.dedup());
    assert!(untried.is_empty(), "seen, and neither in LINES nor in EXEMPTIONS: {untried:?}");
    let stale: Vec<_> = exempt.difference(&seen).collect();
    assert!(stale.is_empty(), "exempt, and tried or never seen: {stale:?}");
}

/// Tries `case`; where the run did not come so far this time, at an earlier call, or again. How often the fault happened.
fn tried(library: &Library, stage: &Stage, case: &Case) -> u32 {
    let promise = promised(case.place, case.call, case.fault, case.policy);
    let mut case = case.clone();
    for _ in 0..TRIES {
        if stage.judge(library, &case, promise) {
            return 1;
        }
        let earlier = (case.when.0 / 2).max(1);
        case.when = (earlier, if case.when.1 == u64::MAX { u64::MAX } else { earlier });
    }
    0
}

/// Every row with its cases, in the order of the table.
fn rows(counts: &Counts) -> Vec<(Row, Vec<Case>)> {
    let only = std::env::var("DRIVE_BACKUP_SWEEP_ONLY").unwrap_or_default();
    let mut rows = Vec::new();
    for line in LINES {
        for &policy in line.policies {
            for &fault in line.faults {
                let row = Row { place: line.place, call: line.call, policy, fault };
                let cases = cases(line, fault, policy, rows.len(), counts);
                let name = format!("{row:?}");
                if only.split_whitespace().all(|word| name.contains(word)) {
                    rows.push((row, cases));
                }
            }
        }
    }
    rows
}

/// Runs wait more than they work.
const THREADS: usize = 4;

/// What the threads share.
struct Sweep<'a> {
    library: Library,
    /// Each with the number of its row.
    runs: Vec<(usize, &'a Case)>,
    next: AtomicUsize,
    /// How often the fault of each row happened.
    happened: Mutex<Vec<u32>>,
    failed: Mutex<Vec<&'a Case>>,
}

impl Sweep<'_> {
    fn work(&self) {
        let mut stages = BTreeMap::new();
        loop {
            let number = self.next.fetch_add(1, Relaxed);
            let Some(&(row, case)) = self.runs.get(number) else { return };
            let stage = stages.remove(&case.setup).unwrap_or_else(|| Stage::new(case.setup));
            match catch_unwind(AssertUnwindSafe(|| tried(&self.library, &stage, case))) {
                Ok(times) => {
                    self.happened.lock().unwrap()[row] += times;
                    stages.insert(case.setup, stage);
                }
                // It has said what it was about.
                Err(_) => self.failed.lock().unwrap().push(case),
            }
            if number.is_multiple_of(200) {
                eprintln!("run {number} of {}", self.runs.len());
            }
        }
    }
}

#[test]
fn each_fault_at_each_place_ends_as_promised() {
    let library = Library::compile();
    let mut setups: Vec<Setup> = LINES.iter().flat_map(|line| line.setups).copied().collect();
    setups.sort();
    setups.dedup();
    let counts = Counts::of(&library, &setups);
    assert_all_are_tried(&counts);
    let rows = rows(&counts);
    let runs: Vec<(usize, &Case)> =
        rows.iter().enumerate().flat_map(|(at, (_, cases))| cases.iter().map(move |case| (at, case))).collect();
    let sweep = Sweep {
        library,
        runs,
        next: AtomicUsize::new(0),
        happened: Mutex::new(vec![0; rows.len()]),
        failed: Mutex::default(),
    };
    std::thread::scope(|scope| (0..THREADS).for_each(|_| drop(scope.spawn(|| sweep.work()))));
    let failed = sweep.failed.into_inner().unwrap();
    assert!(failed.is_empty(), "{} of {} runs: {failed:#?}", failed.len(), sweep.runs.len());
    let happened = sweep.happened.into_inner().unwrap();
    let mut table = Table::default();
    for ((row, _), times) in rows.iter().zip(happened) {
        assert!(times > 0, "{row:?} never happened");
        table.add(*row, times);
    }
    eprintln!("{} faults in {} runs", rows.len(), sweep.runs.len());
    if std::env::var_os("DRIVE_BACKUP_SWEEP_ONLY").is_none() {
        table.check();
    }
}

#[test]
fn a_storm_of_signals_changes_nothing() {
    for setup in [Setup::LiveRaw, Setup::LiveQcow2] {
        let sent = Stage::new(setup).endures(nix::sys::signal::Signal::SIGUSR1);
        assert!(sent > 20, "{sent}");
    }
}
