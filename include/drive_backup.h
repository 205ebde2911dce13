/*
 * drive-backup: let backups attach to a program that writes a disk.
 *
 * Every change to the disk (write, discard, write-zeroes) stands between drive_backup_writer_begin and
 * drive_backup_writer_end. All functions may be called from any thread. Link with -ldrive_backup, built by
 *   cargo rustc --release --lib --crate-type cdylib --no-default-features --features capi
 *
 * Made from src/writer/capi.rs and src/ring/layout.rs; a test compares them. SPDX: MIT OR Apache-2.0
 */
#ifndef DRIVE_BACKUP_H
#define DRIVE_BACKUP_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef struct drive_backup_writer drive_backup_writer;

/* Version of the protocol that this library speaks, see docs/RING.md. */
#define DRIVE_BACKUP_PROTOCOL 1
/* Bytes of a packet and of the ring, and its slots: writes that may wait at once. */
#define DRIVE_BACKUP_PACKET_BYTES 64
#define DRIVE_BACKUP_RING_BYTES 8192
#define DRIVE_BACKUP_RING_SLOTS 32

/*
 * Lets backups of device, a file or a block device, attach to this process. Call it before the first write; if a
 * backup of it runs right now, this waits until that one has attached, some seconds, 60 at most. socket_dir is the
 * folder in which writers and backups meet, NULL for the default one. On success *out is the writer, of this process:
 * fork only to exec, or before. Returns 0 or a negative errno.
 *
 * Promise:
 * out and device are not NULL; device and socket_dir end with a zero byte.
 */
int drive_backup_writer_open(drive_backup_writer **out, const char *device, const char *socket_dir);

/*
 * Begins a write of length bytes at offset; a discard or write-zeroes is one too. Blocks a bounded time while the
 * writer is frozen, and until a backup has saved what the write is about to overwrite. Returns 0: write now, then
 * call drive_backup_writer_end. Or a negative errno: do not write, and do not call it.
 *
 * Promise:
 * writer comes from drive_backup_writer_open and is not closed.
 */
int drive_backup_writer_begin(drive_backup_writer *writer, uint64_t offset, uint64_t length);

/*
 * Ends a write that drive_backup_writer_begin allowed, after its system call has returned. May be called from another
 * thread than the beginning was.
 *
 * Promise:
 * writer comes from drive_backup_writer_open and is not closed.
 */
void drive_backup_writer_end(drive_backup_writer *writer, uint64_t offset, uint64_t length);

/*
 * During a freeze, when no write is in flight, quiesce(argument) is called on a thread of its own to bring what the
 * program has buffered to the disk. It returns 0, or a negative errno, which makes the backup fail. It may begin and
 * end writes on its own thread. NULL: no callback any more; waits for one that is running.
 *
 * Promise:
 * writer comes from drive_backup_writer_open and is not closed. quiesce may be called with argument from another
 * thread until it is replaced or the writer is closed.
 */
void drive_backup_writer_on_freeze(drive_backup_writer *writer, int (*quiesce)(void *), void *argument);

/*
 * The end: no backup may attach any more, and an attached one goes on with what it has. No other call on this writer
 * may be running, no write may be in flight, and none may follow. Waits for a quiesce callback that is running.
 *
 * Promise:
 * writer comes from drive_backup_writer_open or is NULL, and is not used again.
 */
void drive_backup_writer_close(drive_backup_writer *writer);

#ifdef __cplusplus
}
#endif

#endif
