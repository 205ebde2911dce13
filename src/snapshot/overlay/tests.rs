use super::*;
use crate::image::fixture::Mount;
use std::os::unix::fs::MetadataExt;
use std::sync::Barrier;
use std::thread;

const MIB: u64 = 1 << 20;
const CLUSTER: usize = 4096;

fn allocated(overlay: &Overlay) -> u64 {
    overlay.file.metadata().unwrap().blocks() * 512
}

fn enospc() -> Option<i32> {
    Some(Errno::NOSPC.raw_os_error())
}

#[test]
fn what_was_saved_is_read_back() {
    let dir = tempfile::tempdir().unwrap();
    for overlay in [Overlay::in_folder(dir.path(), 3 * MIB, None), Overlay::in_memory(3 * MIB, None)] {
        let overlay = overlay.unwrap();
        overlay.save(&[7; CLUSTER], MIB).unwrap();
        overlay.save(&[9; CLUSTER], MIB + CLUSTER as u64).unwrap();
        let mut both = [0; 2 * CLUSTER];
        overlay.read_at(&mut both, MIB).unwrap();
        assert!(both[..CLUSTER].iter().all(|&b| b == 7) && both[CLUSTER..].iter().all(|&b| b == 9));
        assert_eq!(overlay.usage(), OverlayUsage { used: 8192, peak: 8192, limit: None });
    }
}

#[test]
fn overlay_has_no_name() {
    let dir = tempfile::tempdir().unwrap();
    let overlay = Overlay::in_folder(dir.path(), MIB, None).unwrap();
    let other = created_and_unlinked(dir.path()).unwrap();
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
    assert_eq!((overlay.file.metadata().unwrap().nlink(), other.metadata().unwrap().nlink()), (0, 0));
    assert_eq!(overlay.file.metadata().unwrap().mode() & 0o777, 0o600);
}

#[test]
fn names_that_are_taken_are_passed_over() {
    let dir = tempfile::tempdir().unwrap();
    let taken = dir.path().join(format!(".drive-backup-overlay.{}.0", std::process::id()));
    std::fs::write(&taken, "kept").unwrap();
    created_and_unlinked(dir.path()).unwrap();
    assert_eq!(std::fs::read(&taken).unwrap(), b"kept");
}

#[test]
fn dropped_space_is_freed() {
    let dir = tempfile::tempdir().unwrap();
    for overlay in [Overlay::in_folder(dir.path(), 8 * MIB, None), Overlay::in_memory(8 * MIB, None)] {
        let overlay = overlay.unwrap();
        assert_eq!(allocated(&overlay), 0);
        overlay.save(&vec![1; 4 * MIB as usize], MIB).unwrap();
        // Allocated at write-back on some file systems.
        overlay.file.sync_all().unwrap();
        assert!(allocated(&overlay) >= 4 * MIB);
        overlay.drop_range(ByteRange::new(2 * MIB, 3 * MIB));
        assert!(allocated(&overlay) < 2 * MIB);
        assert_eq!(overlay.usage(), OverlayUsage { used: MIB, peak: 4 * MIB, limit: None });
        overlay.drop_range(ByteRange::new(MIB, MIB));
        assert_eq!((allocated(&overlay), overlay.usage().used), (0, 0));
    }
}

#[test]
fn zeroes_count_but_take_no_space() {
    let overlay = Overlay::in_memory(MIB, Some(8192)).unwrap();
    overlay.save_zeroes(ByteRange::new(0, 8192)).unwrap();
    assert_eq!((allocated(&overlay), overlay.usage().used), (0, 8192));
    assert_eq!(overlay.save_zeroes(ByteRange::new(8192, 1)).unwrap_err().errno(), enospc());
    let mut bytes = [1; 8192];
    overlay.read_at(&mut bytes, 0).unwrap();
    assert_eq!(bytes, [0; 8192]);
    overlay.drop_range(ByteRange::new(0, 8192));
    assert_eq!(overlay.usage().used, 0);
}

#[test]
fn last_block_of_a_disk_that_no_block_divides_is_freed() {
    let length = MIB + 1;
    let overlay = Overlay::in_memory(length, None).unwrap();
    overlay.save(&[5], MIB).unwrap();
    assert!(allocated(&overlay) > 0);
    overlay.drop_range(ByteRange::new(MIB, 1));
    assert_eq!((allocated(&overlay), overlay.usage().used), (0, 0));
}

#[test]
fn limit_is_exact_and_reported_as_no_space() {
    let overlay = Overlay::in_memory(MIB, Some(8192)).unwrap();
    overlay.save(&[1; CLUSTER], 0).unwrap();
    assert!(!overlay.usage().past_half());
    overlay.save(&[1; CLUSTER], 8192).unwrap();
    assert!(overlay.usage().past_half());
    let error = overlay.save(&[1], 4096).unwrap_err();
    assert_eq!(error.to_string(), "write overlay at 0x1000+1: overlay limit of 8192 bytes reached (8192 used)");
    assert_eq!((error.kind(), error.errno()), (Kind::InstantLost, enospc()));
    assert_eq!(overlay.usage(), OverlayUsage { used: 8192, peak: 8192, limit: Some(8192) });
    overlay.drop_range(ByteRange::new(0, 4096));
    overlay.save(&[1; CLUSTER], 4096).unwrap();
}

#[test]
fn racing_threads_never_exceed_the_limit_together() {
    const THREADS: u64 = 8;
    const SAVES: u64 = 50;
    let limit = THREADS * SAVES / 3 * CLUSTER as u64 + 100;
    let overlay = Overlay::in_memory(THREADS * SAVES * CLUSTER as u64, Some(limit)).unwrap();
    let start = Barrier::new(THREADS as usize);
    let saved: u64 = thread::scope(|scope| {
        let save = |thread| {
            start.wait();
            let offset = |save| (thread * SAVES + save) * CLUSTER as u64;
            (0..SAVES).filter(|&save| overlay.save(&[1; CLUSTER], offset(save)).is_ok()).count() as u64
        };
        let threads: Vec<_> = (0..THREADS).map(|thread| scope.spawn(move || save(thread))).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).sum()
    });
    let used = saved * CLUSTER as u64;
    assert_eq!(saved, limit / CLUSTER as u64, "all that fits");
    assert_eq!(overlay.usage(), OverlayUsage { used, peak: used, limit: Some(limit) });
    assert_eq!(allocated(&overlay), used);
}

#[test]
fn full_file_system_is_reported_and_nothing_of_the_save_is_kept() {
    let tmpfs = Mount::tmpfs(MIB);
    let overlay = Overlay::in_folder(tmpfs.path(), 16 * MIB, None).unwrap();
    overlay.save(&vec![1; MIB as usize / 2], 0).unwrap();
    let error = overlay.save(&vec![2; MIB as usize], 4 * MIB).unwrap_err();
    assert_eq!(error.to_string(), "write overlay at 0x400000+1048576: No space left on device");
    assert_eq!((error.kind(), error.errno()), (Kind::InstantLost, enospc()));
    assert_eq!(overlay.usage().used, MIB / 2);
    assert!(allocated(&overlay) <= MIB / 2, "what had been written of it is punched");
    overlay.save(&vec![3; MIB as usize / 4], 8 * MIB).unwrap();
    let mut back = vec![0; MIB as usize / 4];
    overlay.read_at(&mut back, 8 * MIB).unwrap();
    assert!(back.iter().all(|&b| b == 3));
}

#[test]
fn folder_that_is_not_there_is_named() {
    let error = Overlay::in_folder(Path::new("/nonexistent/overlay"), MIB, None).unwrap_err();
    assert_eq!(error.to_string(), "create overlay '/nonexistent/overlay': No such file or directory");
    assert_eq!(error.kind(), Kind::Usage);
}

#[test]
fn disk_too_long_for_the_file_system_is_refused_at_once() {
    let dir = tempfile::tempdir().unwrap();
    let error = Overlay::in_folder(dir.path(), 1 << 62, None).unwrap_err();
    assert_eq!(error.errno(), Some(Errno::FBIG.raw_os_error()));
}

#[test]
fn empty_disk_has_an_empty_overlay() {
    let overlay = Overlay::in_memory(0, Some(0)).unwrap();
    overlay.save(&[], 0).unwrap();
    overlay.drop_range(ByteRange::new(0, 0));
    assert_eq!(overlay.usage(), OverlayUsage { used: 0, peak: 0, limit: Some(0) });
}
