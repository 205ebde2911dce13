//! How runs ended, in Prometheus's text format, for node_exporter's textfile collector.

use super::file;
use crate::ground::status::Snapshot;
use std::fmt::Write;
use std::fs;
use std::path::Path;
use std::time::{Duration, SystemTime};

const LAST_SUCCESS: &str = "drive_backup_last_success_timestamp_seconds";

/// How one disk's run ended.
#[derive(Clone, Debug)]
pub struct Run {
    /// As given; empty where it was not read.
    pub device: String,
    /// As given.
    pub target: String,
    /// Of this disk.
    pub exit_code: u8,
    /// Its exit code stands for a copy.
    pub is_success: bool,
    /// From the command's start.
    pub duration: Duration,
    /// Its end.
    pub ended: SystemTime,
    /// The last look at its job.
    pub job: Snapshot,
}

impl Run {
    fn labels(&self) -> String {
        format!("{{device=\"{}\",target=\"{}\"}}", escaped(&self.device), escaped(&self.target))
    }
}

/// Replaces the file at `path`. The time of the last success is kept from the file that is there for the same device and
/// target, where this run was none. Refused, it can't tell of which disks it would have been: then for all.
pub fn write(path: &Path, runs: &[Run], is_refused: bool) -> Result<(), String> {
    // Missing, or not ours: then there was no success.
    let before = fs::read_to_string(path).unwrap_or_default();
    file::replace(path, text(runs, &before, is_refused).as_bytes())
}

/// A metric: name, help, and its value of a run, if it has one.
type Metric = (&'static str, &'static str, fn(&Run) -> Option<f64>);

const METRICS: &[Metric] = &[
    ("drive_backup_last_run_timestamp_seconds", "When the last run ended, in Unix time.", |run| Some(unix(run.ended))),
    ("drive_backup_last_exit_code", "Exit status of the last run; 0 and 3 made a copy.", |run| {
        Some(run.exit_code.into())
    }),
    ("drive_backup_last_duration_seconds", "How long the last run took.", |run| Some(run.duration.as_secs_f64())),
    ("drive_backup_disk_size_bytes", "Size of the disk, or 0 if it was not opened.", |run| Some(run.job.total as f64)),
    ("drive_backup_copied_bytes", "Data that the last run wrote to the target.", |run| Some(run.job.data as f64)),
    ("drive_backup_zero_bytes", "Zeroes that the last run did not need to write.", |run| Some(run.job.zero as f64)),
    ("drive_backup_io_errors", "I/O errors of the last run.", |run| Some(run.job.errors as f64)),
    ("drive_backup_overlay_peak_bytes", "The most that the overlay held.", |run| Some(run.job.overlay?.peak as f64)),
    ("drive_backup_writer_writes", "Writes of cooperating writers during the last run.", |run| {
        Some(run.job.writers?.writes as f64)
    }),
    ("drive_backup_writer_stall_p99_seconds", "How long trapped writes waited: 99th percentile.", |run| {
        Some(run.job.writers?.stall_ms[1] / 1e3)
    }),
    ("drive_backup_writer_stall_max_seconds", "How long the longest trapped write waited.", |run| {
        Some(run.job.writers?.stall_ms[2] / 1e3)
    }),
];

fn text(runs: &[Run], before: &str, is_refused: bool) -> String {
    let mut text = String::new();
    let mut metric = |name: &str, help: &str, values: &[(String, f64)]| {
        if !values.is_empty() {
            let _ = writeln!(text, "# HELP {name} {help}\n# TYPE {name} gauge");
            for (labels, value) in values {
                let _ = writeln!(text, "{name}{labels} {value}");
            }
        }
    };
    let success = |run: &Run| if run.is_success { Some(unix(run.ended)) } else { last_success(before, &run.labels()) };
    let of = |value: &dyn Fn(&Run) -> Option<f64>| -> Vec<(String, f64)> {
        runs.iter().filter_map(|run| Some((run.labels(), value(run)?))).collect()
    };
    let mut successes = of(&success);
    if is_refused {
        let is_other = |(labels, _): &(String, f64)| runs.iter().all(|run| run.labels() != *labels);
        successes.extend(successes_in(before).filter(is_other));
    }
    metric(LAST_SUCCESS, "When the last complete copy was published, in Unix time.", &successes);
    METRICS.iter().for_each(|(name, help, value)| metric(name, help, &of(value)));
    text
}

fn last_success(before: &str, labels: &str) -> Option<f64> {
    successes_in(before).find(|(of, _)| of == labels).map(|(_, time)| time)
}

/// Labels and times of an earlier file.
fn successes_in(before: &str) -> impl Iterator<Item = (String, f64)> {
    before.lines().filter_map(|line| {
        // A blank is in labels too.
        let (labels, time) = line.strip_prefix(LAST_SUCCESS)?.rsplit_once(' ')?;
        let time: f64 = time.parse().ok()?;
        (labels.starts_with('{') && labels.ends_with('}') && time.is_finite()).then(|| (labels.to_owned(), time))
    })
}

fn unix(time: SystemTime) -> f64 {
    let since = time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    (since.as_secs_f64() * 1e3).round() / 1e3
}

fn escaped(value: &str) -> String {
    value.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ground::status::{OverlayUsage, Phase, WriterStats};

    fn run(device: &str, exit_code: u8, ended: u64) -> Run {
        let job = Snapshot {
            phase: Phase::Publish,
            paused: None,
            total: 4096,
            data: 1024,
            zero: 3072,
            verified: 0,
            errors: 0,
            speed_limit: None,
            overlay: None,
            writers: None,
        };
        let ended = SystemTime::UNIX_EPOCH + Duration::from_secs(ended);
        let (target, is_success) = ("t".to_owned(), exit_code == 0);
        Run {
            device: device.to_owned(),
            target,
            exit_code,
            is_success,
            duration: Duration::from_millis(1500),
            ended,
            job,
        }
    }

    #[test]
    fn each_metric_has_its_help_its_type_and_a_line_for_each_disk() {
        let text = text(&[run("a", 0, 100), run("b", 5, 200)], "", false);
        assert!(text.starts_with(&format!("# HELP {LAST_SUCCESS} When")), "{text}");
        assert!(text.contains(&format!("\n{LAST_SUCCESS}{{device=\"a\",target=\"t\"}} 100\n")), "{text}");
        assert!(!text.contains(&format!("{LAST_SUCCESS}{{device=\"b\"")), "it never succeeded: {text}");
        assert!(text.contains("\ndrive_backup_last_exit_code{device=\"b\",target=\"t\"} 5\n"), "{text}");
        assert!(text.contains("\ndrive_backup_last_duration_seconds{device=\"a\",target=\"t\"} 1.5\n"), "{text}");
        assert!(!text.contains("stall") && !text.contains("overlay"), "nobody wrote: {text}");
        for name in text.lines().filter(|line| !line.starts_with('#')).map(|line| line.split('{').next().unwrap()) {
            assert!(text.contains(&format!("# TYPE {name} gauge\n")), "{name}");
        }
    }

    #[test]
    fn a_failure_keeps_the_time_of_the_last_success_of_its_own_disk() {
        let first = text(&[run("a", 0, 100), run("b", 0, 101)], "", false);
        let second = text(&[run("a", 5, 200), run("b", 0, 201), run("c", 4, 202)], &first, false);
        assert_eq!(last_success(&second, &run("a", 0, 0).labels()), Some(100.0));
        assert_eq!(last_success(&second, &run("b", 0, 0).labels()), Some(201.0));
        assert_eq!(last_success(&second, &run("c", 0, 0).labels()), None);
    }

    #[test]
    fn a_refusal_keeps_the_last_success_of_every_disk() {
        let before = text(&[run("a b", 0, 100), run("c", 0, 101)], "", false);
        let refused = text(&[run("a b", 2, 200)], &before, true);
        for (device, time) in [("a b", 100.0), ("c", 101.0)] {
            assert_eq!(last_success(&refused, &run(device, 0, 0).labels()), Some(time), "{device}: {refused}");
            assert_eq!(refused.matches(&format!("{LAST_SUCCESS}{}", run(device, 0, 0).labels())).count(), 1);
        }
        // What is backed up no more is forgotten by the next run.
        let good = text(&[run("c", 0, 300)], &refused, false);
        assert_eq!(last_success(&good, &run("a b", 0, 0).labels()), None);
    }

    #[test]
    fn writers_and_overlay_are_told_where_there_were_some() {
        let mut live = run("a", 0, 1);
        live.job.overlay = Some(OverlayUsage { used: 0, peak: 8192, limit: None });
        live.job.writers = Some(WriterStats { writes: 7, stall_ms: [0.1, 2.0, 30.0], ..WriterStats::default() });
        let text = text(&[live], "", false);
        for line in ["overlay_peak_bytes", "writer_writes", "writer_stall_p99_seconds", "writer_stall_max_seconds"]
            .iter()
            .zip(["8192", "7", "0.002", "0.03"])
            .map(|(name, value)| format!("\ndrive_backup_{name}{{device=\"a\",target=\"t\"}} {value}\n"))
        {
            assert!(text.contains(&line), "{line} in {text}");
        }
    }

    #[test]
    fn names_can_not_break_the_format() {
        let text = text(&[run("a\"} 1\nx\\", 0, 1)], "", false);
        assert!(text.contains(r#"{device="a\"} 1\nx\\",target="t"}"#), "{text}");
        assert!(text.lines().all(|line| line.starts_with('#') || line.starts_with("drive_backup_")), "{text}");
    }

    #[test]
    fn a_file_that_is_not_ours_tells_of_no_success() {
        let labels = run("a", 0, 0).labels();
        for before in
            ["", "\0\0", LAST_SUCCESS, &format!("{LAST_SUCCESS}{labels} soon"), &format!("{LAST_SUCCESS}{labels} NaN")]
        {
            assert_eq!(last_success(before, &labels), None, "{before}");
        }
    }
}
