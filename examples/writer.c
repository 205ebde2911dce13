/*
 * A program in C that writes a disk at full speed and lets backups attach to it.
 *
 *   cargo rustc --release --lib --crate-type cdylib --no-default-features --features capi
 *   gcc -Wall -Werror -O2 -Iinclude examples/writer.c -Ltarget/release -ldrive_backup -Wl,-rpath,target/release -o writer
 *   ./writer disk.raw                 # until Ctrl-C; or ./writer disk.raw WRITES [FOLDER]
 *
 * It writes the same disk as examples/writer.rs, which proves of a copy that it is one instant:
 *   cargo run --release --example writer -- check copy.raw
 */
#define _GNU_SOURCE
#include "drive_backup.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

enum { BLOCK = 4096, WORDS = BLOCK / sizeof(uint64_t), DEFAULT_BLOCKS = 16 << 10 };

static uint64_t scramble(uint64_t seed)
{
    uint64_t z = seed * UINT64_C(0x9E3779B97F4A7C15);
    z = (z ^ (z >> 30)) * UINT64_C(0xBF58476D1CE4E5B9);
    z = (z ^ (z >> 27)) * UINT64_C(0x94D049BB133111EB);
    return z ^ (z >> 31);
}

/* On a machine whose least significant byte comes first, as writer.rs writes it. */
static void fill(uint64_t *block, uint64_t number)
{
    block[0] = number;
    for (uint64_t at = 1; at < WORDS; at++)
        block[at] = scramble(number ^ at << 48);
}

static int flush(void *argument)
{
    return fdatasync(*(int *)argument) == 0 ? 0 : -errno;
}

static int fail(const char *what, int error)
{
    fprintf(stderr, "writer: %s: %s\n", what, strerror(error));
    return EXIT_FAILURE;
}

int main(int argc, char **argv)
{
    if (argc < 2 || argc > 4) {
        fprintf(stderr, "usage: writer FILE [WRITES [FOLDER]]\n");
        return 2;
    }
    uint64_t writes = argc > 2 ? strtoull(argv[2], NULL, 10) : UINT64_MAX;
    static uint64_t block[WORDS];
    struct stat status;

    int disk = open(argv[1], O_RDWR | O_CREAT | O_CLOEXEC, 0600);
    if (disk < 0 || fstat(disk, &status) != 0)
        return fail("open the disk", errno);
    if (status.st_size == 0 && ftruncate(disk, status.st_size = (off_t)DEFAULT_BLOCKS * BLOCK) != 0)
        return fail("make the disk", errno);
    uint64_t blocks = (uint64_t)status.st_size / BLOCK, last = 0;
    for (uint64_t at = 0; at < blocks; at++) {
        if (pread(disk, block, BLOCK, (off_t)(at * BLOCK)) != BLOCK)
            return fail("read the disk", errno);
        last = block[0] > last ? block[0] : last;
    }

    drive_backup_writer *writer;
    int error = drive_backup_writer_open(&writer, argv[1], argc > 3 ? argv[3] : NULL);
    if (error != 0)
        return fail("let backups attach", -error);
    drive_backup_writer_on_freeze(writer, flush, &disk);

    for (uint64_t number = last + 1; number - last <= writes; number++) {
        uint64_t offset = scramble(number) % blocks * BLOCK;
        fill(block, number);
        error = drive_backup_writer_begin(writer, offset, BLOCK);
        if (error != 0)
            return fail("begin a write", -error);
        ssize_t written = pwrite(disk, block, BLOCK, (off_t)offset);
        error = errno;
        drive_backup_writer_end(writer, offset, BLOCK);
        if (written != BLOCK)
            return fail("write the disk", written < 0 ? error : EIO);
    }
    drive_backup_writer_close(writer);
    if (close(disk) != 0)
        return fail("close the disk", errno);
    return EXIT_SUCCESS;
}
