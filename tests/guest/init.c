/*
 * The only program of the guest: loads the modules, does the job that the kernel's command line names on the disk,
 * says on the console how it went, and switches the machine off. The host says "stop" on the console.
 *
 *   job=trail   threads write numbered blocks, each thread its own part of a disk; at the end every block is read again.
 *               disks=N: so many disks at once. "WROTE A B": each thread has written A blocks of the first disk, B of the next
 *   job=scrap   discards and writes zeroes, and reads what that left
 *   job=ext4    mounts the disk and writes files, each synced before its name is told
 *   job=bench   reads and writes, and tells how many a second
 *   job=script  runs /script by bash, which `pack` brings with what it needs
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/aio_abi.h>
#include <linux/fs.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define BLOCK 4096
#define THREADS 4
/* Of each thread. */
#define BLOCKS 1024
#define DISKS 2
#define MOST (1 << 20)

static const char *disk = "/dev/vda";

static void off(void)
{
	fflush(stdout);
	sync();
	reboot(RB_POWER_OFF);
	for (;;)
		pause();
}

static void fail(const char *format, ...)
{
	va_list list;

	va_start(list, format);
	printf("FAILED ");
	vprintf(format, list);
	printf(" (errno %d: %s)\n", errno, strerror(errno));
	va_end(list);
	off();
}

static void load(const char *name)
{
	char path[128];
	int fd;

	snprintf(path, sizeof path, "/modules/%s.ko", name);
	fd = open(path, O_RDONLY);
	/* A kernel that has it built in brings no file. */
	if (fd >= 0 && syscall(SYS_finit_module, fd, "", 0) && errno != EEXIST)
		fail("module %s", name);
	close(fd);
}

/* The value of NAME=VALUE on the kernel's command line. */
static const char *argument(const char *name, const char *otherwise)
{
	static char line[4096];
	static char value[256];
	char *at, key[64];
	int fd = open("/proc/cmdline", O_RDONLY);
	ssize_t got = read(fd, line + 1, sizeof line - 2);

	close(fd);
	line[0] = ' ';
	line[got > 0 ? got + 1 : 1] = 0;
	snprintf(key, sizeof key, " %s=", name);
	at = strstr(line, key);
	if (!at || sscanf(at + strlen(key), "%255s", value) != 1)
		return otherwise;
	return strdup(value);
}

static uint64_t scramble(uint64_t seed)
{
	uint64_t z = seed + 0x9E3779B97F4A7C15u;

	z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
	z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
	return z ^ (z >> 31);
}

static volatile int stopped;

static void *listen_for_stop(void *unused)
{
	char line[64];

	while (fgets(line, sizeof line, stdin))
		if (!strncmp(line, "stop", 4))
			break;
	stopped = 1;
	return unused;
}

static void *aligned(size_t size)
{
	void *memory;

	if (posix_memalign(&memory, BLOCK, size))
		fail("memory");
	memset(memory, 0, size);
	return memory;
}

static int open_path(const char *path, int flags)
{
	int fd = open(path, flags | O_CLOEXEC);

	if (fd < 0)
		fail("open %s", path);
	return fd;
}

static int open_disk(int flags)
{
	return open_path(disk, flags);
}

static uint64_t disk_size(int fd)
{
	uint64_t size;

	if (ioctl(fd, BLKGETSIZE64, &size))
		fail("size of %s", disk);
	return size;
}

/* ---- job=trail. tests/guest/trail.rs is the checker, and says what is where. ---- */

/* A disk, and the writes of each of its threads that it has acknowledged. */
static struct trail {
	char path[16];
	volatile uint64_t acknowledged[THREADS];
} trails[DISKS];

struct writer {
	struct trail *trail;
	uint64_t me;
};

static int zeroes(uint64_t me, uint64_t number)
{
	return scramble(scramble(number) ^ (me + 1)) % 16 == 0;
}

static uint64_t place(uint64_t me, uint64_t number)
{
	return me * BLOCKS + scramble(number * THREADS + me) % BLOCKS;
}

static void fill(uint64_t *block, struct trail *trail, uint64_t me, uint64_t number)
{
	uint64_t sum = scramble(number ^ scramble(me)), word;

	block[0] = number;
	block[1] = me;
	block[2] = place(me, number);
	for (word = 0; word < THREADS; word++) {
		block[3 + word] = __atomic_load_n(&trail->acknowledged[word], __ATOMIC_SEQ_CST);
		sum = scramble(sum ^ block[3 + word]);
	}
	for (word = 3 + THREADS; word < BLOCK / 8; word++)
		block[word] = sum * (word * 2 + 1);
}

static void *write_trail(void *argument)
{
	const struct writer *writer = argument;
	struct trail *trail = writer->trail;
	uint64_t me = writer->me, number, at, range[2];
	unsigned char (*expected)[BLOCK] = aligned((size_t)BLOCKS * BLOCK);
	char *block = aligned(BLOCK);
	int fd = open_path(trail->path, O_RDWR | O_DIRECT);

	for (number = 1; number < MOST && !stopped; number++) {
		at = place(me, number);
		if (zeroes(me, number)) {
			range[0] = at * BLOCK;
			range[1] = BLOCK;
			memset(block, 0, BLOCK);
			if (ioctl(fd, BLKZEROOUT, range))
				fail("zero block %llu of %s", (unsigned long long)at, trail->path);
		} else {
			fill((uint64_t *)block, trail, me, number);
			if (pwrite(fd, block, BLOCK, at * BLOCK) != BLOCK)
				fail("write block %llu of %s", (unsigned long long)at, trail->path);
		}
		memcpy(expected[at - me * BLOCKS], block, BLOCK);
		__atomic_store_n(&trail->acknowledged[me], number, __ATOMIC_SEQ_CST);
		if (number % 64 == 0 && fdatasync(fd))
			fail("flush %s", trail->path);
	}
	for (at = 0; at < BLOCKS; at++) {
		if (pread(fd, block, BLOCK, (me * BLOCKS + at) * BLOCK) != BLOCK)
			fail("read block %llu of %s", (unsigned long long)at, trail->path);
		if (memcmp(block, expected[at], BLOCK))
			fail("thread %d's block %llu of %s is not what was written", (int)me, (unsigned long long)at, trail->path);
	}
	close(fd);
	return NULL;
}

/* Tells how many writes each thread of a disk has done at least, each time that it is more on every disk. */
static void tell_writes(int disks)
{
	uint64_t told[DISKS] = {0}, least[DISKS];
	int i, me, more;

	while (!stopped) {
		more = 1;
		for (i = 0; i < disks; i++) {
			least[i] = UINT64_MAX;
			for (me = 0; me < THREADS; me++)
				if (trails[i].acknowledged[me] < least[i])
					least[i] = trails[i].acknowledged[me];
			more = more && least[i] > told[i];
		}
		if (more) {
			printf("WROTE");
			for (i = 0; i < disks; i++)
				printf(" %llu", (unsigned long long)(told[i] = least[i]));
			printf("\n");
		}
		usleep(20000);
	}
}

static void trail(void)
{
	int disks = atoi(argument("disks", "1")), all = disks * THREADS, i;
	struct writer writers[DISKS * THREADS];
	pthread_t threads[DISKS * THREADS];

	if (disks < 1 || disks > DISKS)
		fail("%d disks", disks);
	for (i = 0; i < all; i++) {
		struct trail *trail = &trails[i / THREADS];

		snprintf(trail->path, sizeof trail->path, "/dev/vd%c", 'a' + i / THREADS);
		writers[i] = (struct writer){trail, i % THREADS};
		if (pthread_create(&threads[i], NULL, write_trail, &writers[i]))
			fail("thread");
	}
	tell_writes(disks);
	for (i = 0; i < all; i++)
		pthread_join(threads[i], NULL);
	printf("VERIFIED");
	for (i = 0; i < disks; i++) {
		uint64_t count = 0, me;

		for (me = 0; me < THREADS; me++)
			count += trails[i].acknowledged[me];
		printf(" %llu", (unsigned long long)count);
	}
	printf("\n");
}

/* ---- job=scrap ---- */

static void expect(int fd, char *block, uint64_t at, int byte)
{
	int i;

	if (pread(fd, block, BLOCK, at) != BLOCK)
		fail("read %llu", (unsigned long long)at);
	for (i = 0; i < BLOCK; i++)
		if (block[i] != (char)byte)
			fail("byte %llu is %d, not %d", (unsigned long long)at + i, block[i], byte);
}

static void scrap(void)
{
	int fd = open_disk(O_RDWR | O_DIRECT);
	uint64_t size = disk_size(fd), at, range[2];
	char *chunk = aligned(1 << 20), *block = aligned(BLOCK);

	memset(chunk, 0x5A, 1 << 20);
	for (at = 0; at < (16 << 20); at += 1 << 20)
		if (pwrite(fd, chunk, 1 << 20, at) != 1 << 20)
			fail("write");
	range[0] = 1 << 20;
	range[1] = 8 << 20;
	if (ioctl(fd, BLKDISCARD, range))
		fail("discard");
	range[0] = (12 << 20) + BLOCK;
	range[1] = (2 << 20) - 2 * BLOCK;
	if (ioctl(fd, BLKZEROOUT, range))
		fail("write zeroes");
	expect(fd, block, 0, 0x5A);
	expect(fd, block, (1 << 20) - BLOCK, 0x5A);
	expect(fd, block, 9 << 20, 0x5A);
	expect(fd, block, 12 << 20, 0x5A);
	for (at = (12 << 20) + BLOCK; at < (14 << 20) - BLOCK; at += BLOCK)
		expect(fd, block, at, 0);
	expect(fd, block, (14 << 20) - BLOCK, 0x5A);
	/* The last block, and not one further. */
	if (pwrite(fd, chunk, BLOCK, size - BLOCK) != BLOCK || pwrite(fd, chunk, BLOCK, size) >= 0)
		fail("the end of the disk");
	if (fsync(fd))
		fail("flush");
	close(fd);
	printf("VERIFIED %llu\n", (unsigned long long)size);
}

/* ---- job=ext4 ---- */

static void ext4(void)
{
	uint64_t number, word, content[1024];
	char path[64];
	int fd;

	mkdir("/mnt", 0755);
	if (mount(disk, "/mnt", "ext4", 0, ""))
		fail("mount");
	for (number = 1; !stopped; number++) {
		for (word = 0; word < 1024; word++)
			content[word] = scramble(number) * (word * 2 + 1);
		/* Old ones go, so that the file system is busy for as long as it is asked to. */
		snprintf(path, sizeof path, "/mnt/%llu", (unsigned long long)number - 2000);
		if (number > 2000)
			unlink(path);
		snprintf(path, sizeof path, "/mnt/%llu", (unsigned long long)number);
		fd = open(path, O_CREAT | O_WRONLY | O_TRUNC, 0644);
		if (fd < 0 || write(fd, content, sizeof content) != sizeof content || fsync(fd))
			fail("file %llu", (unsigned long long)number);
		close(fd);
		printf("SYNCED %llu\n", (unsigned long long)number);
	}
	if (umount("/mnt"))
		fail("umount");
	printf("VERIFIED %llu\n", (unsigned long long)number - 1);
}

/* ---- job=bench ---- */

static double now(void)
{
	struct timespec time;

	clock_gettime(CLOCK_MONOTONIC, &time);
	return time.tv_sec + time.tv_nsec / 1e9;
}

/* Requests of `size` bytes a second, `depth` of them in flight, in an area of `area` bytes. */
static double rate(int fd, int writing, int random, size_t size, int depth, uint64_t area, double seconds)
{
	struct iocb iocbs[64], *all[64];
	struct io_event events[64];
	aio_context_t context = 0;
	uint64_t count = 0, next = 0;
	double start, end;
	long got, i;

	if (syscall(SYS_io_setup, 64, &context))
		fail("io_setup");
	memset(iocbs, 0, sizeof iocbs);
	for (i = 0; i < depth; i++) {
		iocbs[i].aio_fildes = fd;
		iocbs[i].aio_lio_opcode = writing ? IOCB_CMD_PWRITE : IOCB_CMD_PREAD;
		iocbs[i].aio_buf = (uintptr_t)aligned(size);
		memset((void *)(uintptr_t)iocbs[i].aio_buf, (int)i + 1, size);
		iocbs[i].aio_nbytes = size;
		iocbs[i].aio_data = i;
		all[i] = &iocbs[i];
		iocbs[i].aio_offset = (random ? scramble(next) % (area / size) : next % (area / size)) * size;
		next++;
	}
	start = now();
	end = start + seconds;
	if (syscall(SYS_io_submit, context, depth, all) != depth)
		fail("io_submit");
	while (now() < end) {
		got = syscall(SYS_io_getevents, context, 1, depth, events, NULL);
		for (i = 0; i < got; i++) {
			struct iocb *iocb = &iocbs[events[i].data];

			if (events[i].res != (long long)size)
				fail("a request of the bench: %lld", (long long)events[i].res);
			iocb->aio_offset = (random ? scramble(next) % (area / size) : next % (area / size)) * size;
			next++;
			count++;
			all[i] = iocb;
		}
		if (got > 0 && syscall(SYS_io_submit, context, got, all) != got)
			fail("io_submit");
	}
	end = now();
	syscall(SYS_io_destroy, context);
	for (i = 0; i < depth; i++)
		free((void *)(uintptr_t)iocbs[i].aio_buf);
	return count / (end - start);
}

static void bench(void)
{
	double seconds = atof(argument("seconds", "1"));
	int fd = open_disk(O_RDWR | O_DIRECT), depth, writing, large;
	uint64_t size = disk_size(fd);

	for (large = 0; large < 2; large++)
		for (depth = 1; depth <= 16; depth *= 16)
			for (writing = 0; writing < 2; writing++)
				printf("RATE %s %s %d %.0f\n", large ? "sequential-1M" : "random-4k", writing ? "write" : "read", depth,
				       rate(fd, writing, !large, large ? 1 << 20 : BLOCK, depth, size, seconds));
	close(fd);
}

static void script(void)
{
	static const char *const modules[] = {"dm-mod", "dm-bufio", "dm-snapshot", "loop"};
	size_t i;
	int status;
	pid_t child;

	for (i = 0; i < sizeof modules / sizeof *modules; i++)
		load(modules[i]);
	mkdir("/sys", 0755);
	mkdir("/run", 0755);
	mount("sys", "/sys", "sysfs", 0, "");
	setenv("PATH", "/bin", 1);
	child = fork();
	if (!child) {
		dup2(1, 2);
		execl("/bin/bash", "bash", "/script", NULL);
		_exit(127);
	}
	if (child < 0 || waitpid(child, &status, 0) != child || status)
		fail("the script");
}

int main(void)
{
	static const char *const modules[] = {"virtio_ring",			 "virtio", "virtio_pci_legacy_dev", "virtio_pci_modern_dev",
					      "virtio_pci", "virtio_blk"};
	char last[] = "/dev/vda";
	const char *job;
	pthread_t listener;
	size_t i;

	mkdir("/proc", 0755);
	mkdir("/dev", 0755);
	mount("proc", "/proc", "proc", 0, "");
	mount("dev", "/dev", "devtmpfs", 0, "");
	setlinebuf(stdout);
	for (i = 0; i < sizeof modules / sizeof *modules; i++)
		load(modules[i]);
	/* The last of them comes last. */
	last[7] = 'a' + atoi(argument("disks", "1")) - 1;
	for (i = 0; access(last, F_OK) && i < 5000; i++)
		usleep(1000);
	job = argument("job", "none");
	pthread_create(&listener, NULL, listen_for_stop, NULL);
	printf("READY\n");
	if (!strcmp(job, "trail"))
		trail();
	else if (!strcmp(job, "scrap"))
		scrap();
	else if (!strcmp(job, "ext4"))
		ext4();
	else if (!strcmp(job, "bench"))
		bench();
	else if (!strcmp(job, "script"))
		script();
	else
		fail("job '%s'", job);
	printf("DONE\n");
	off();
}
