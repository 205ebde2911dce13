/* Preloaded into the program under test: what its system calls about one place are answered with.
 *
 * A seccomp filter sends the calls below to a handler of SIGSYS in the process itself, whoever makes them, libc or not. The
 * handler finds out which file a call is about, counts the calls of the kind that is asked for, and for the chosen ones
 * returns an error without making the call, makes it late, or makes it for fewer bytes. All others are made as they are.
 *
 * SWEEP_COUNTS  a file of 16 bytes: calls of the kind, faults
 * SWEEP_TRACE   a file: a line for each call of any kind (kind, thread, path); optional
 * SWEEP_KIND    open, read, ...; without it nothing is counted
 * SWEEP_PATH    the file or folder; with * at its end, whatever begins so
 * SWEEP_THREAD  the name of the thread, or with ! before it any other; optional
 * SWEEP_FAULT   error=N, delay=MILLISECONDS, short=half, short=least
 * SWEEP_WHEN    FIRST-LAST: which of the calls, from 1 on
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/audit.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <signal.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <time.h>
#include <ucontext.h>
#include <unistd.h>

#if defined __x86_64__
#define ARCH AUDIT_ARCH_X86_64
#define ARGUMENT(c, n) ((c)->uc_mcontext.gregs[(const int[]){REG_RDI, REG_RSI, REG_RDX, REG_R10, REG_R8}[n]])
#define RESULT(c) ((c)->uc_mcontext.gregs[REG_RAX])
#elif defined __aarch64__
#define ARCH AUDIT_ARCH_AARCH64
#define ARGUMENT(c, n) ((c)->uc_mcontext.regs[n])
#define RESULT(c) ((c)->uc_mcontext.regs[0])
#else
#error "which registers are the arguments of a system call?"
#endif

/* In the sixth argument, which none of these calls has: the handler's own. So mmap, preadv2, pwritev2 and
 * copy_file_range, which have six, can't be trapped. Not trapped either: what reads flags of a descriptor, names, or
 * what a file system can (F_GETFD, F_GETFL, F_SETFL, readlink, statfs, fstatfs), and fchown, which no run here calls. */
#define MAGIC_LOW 0x5eed0d1fu
#define MAGIC_HIGH 0x0ddba11eu
#define MAGIC ((long)((uint64_t)MAGIC_HIGH << 32 | MAGIC_LOW))

enum shape { BYTES, VECTORS, DESCRIPTOR, PATH_AT, PATH, NAME, CLOSE, LOCK };

static const struct call {
	int number;
	enum shape shape;
	const char *kind;
	/* Where the second argument chooses. */
	long command;
} calls[] = {
	{SYS_pread64, BYTES, "read"},
	{SYS_preadv, VECTORS, "read"},
	{SYS_pwrite64, BYTES, "write"},
	{SYS_pwritev, VECTORS, "write"},
	{SYS_write, BYTES, "write"},
	{SYS_ftruncate, DESCRIPTOR, "resize"},
	{SYS_fallocate, DESCRIPTOR, "fallocate"},
	{SYS_fsync, DESCRIPTOR, "sync"},
	{SYS_fdatasync, DESCRIPTOR, "flush"},
	{SYS_sync_file_range, DESCRIPTOR, "write-back"},
	{SYS_lseek, DESCRIPTOR, "seek"},
	{SYS_fcntl, LOCK, "lock", F_OFD_SETLK},
	{SYS_fcntl, DESCRIPTOR, "lock-look", F_OFD_GETLK},
	{SYS_fcntl, DESCRIPTOR, "duplicate", F_DUPFD_CLOEXEC},
	{SYS_fcntl, DESCRIPTOR, "seal", F_ADD_SEALS},
	{SYS_ioctl, DESCRIPTOR, "clone", 0x40049409}, /* FICLONE */
	{SYS_fadvise64, DESCRIPTOR, "advice"},
	{SYS_fchmod, DESCRIPTOR, "mode"},
	{SYS_flistxattr, DESCRIPTOR, "attribute"},
	{SYS_fgetxattr, DESCRIPTOR, "attribute"},
	{SYS_fsetxattr, DESCRIPTOR, "attribute"},
	{SYS_fremovexattr, DESCRIPTOR, "attribute"},
	{SYS_fstat, DESCRIPTOR, "look"},
	{SYS_newfstatat, PATH_AT, "look"},
	{SYS_statx, PATH_AT, "look"},
	{SYS_close, CLOSE, "close"},
	{SYS_openat, PATH_AT, "open"},
	{SYS_renameat, PATH_AT, "rename"},
	{SYS_renameat2, PATH_AT, "rename"},
	{SYS_unlinkat, PATH_AT, "unlink"},
#ifdef SYS_open
	{SYS_open, PATH, "open"},
#endif
	{SYS_memfd_create, NAME, "create"},
};
#define CALLS (sizeof calls / sizeof *calls)

static struct {
	struct { uint64_t seen, injected; } *counts;
	int trace;
	const char *kind, *path, *thread;
	int is_prefix, is_other_thread;
	enum { NOTHING, ERROR, DELAY, HALF, LEAST } fault;
	long amount;
	uint64_t first, last;
} wanted = {.trace = -1};

/* The kernel's own return value: negative is an errno. */
static long make(const struct call *call, const long *a)
{
	int kept = errno;
	long result = syscall(call->number, a[0], a[1], a[2], a[3], a[4], MAGIC);
	if (result == -1)
		result = -errno;
	errno = kept;
	return result;
}

static int path_of_descriptor(long descriptor, char *path, size_t size)
{
	char link[40];
	snprintf(link, sizeof link, "/proc/self/fd/%ld", descriptor);
	int kept = errno;
	ssize_t length = readlink(link, path, size - 1);
	errno = kept;
	path[length < 0 ? 0 : length] = 0;
	return length > 0;
}

/* Which file a call is about, or an empty string. */
static void path_of(const struct call *call, const long *a, char *path, size_t size)
{
	const char *name = (const char *)a[1];
	path[0] = 0;
	switch (call->shape) {
	case NAME:
		snprintf(path, size, "/memfd:%s", (const char *)a[0]);
		return;
	case PATH:
		snprintf(path, size, "%s", (const char *)a[0]);
		return;
	case PATH_AT:
		/* With an empty name it is the descriptor's own file. */
		if (!name || !name[0]) {
			path_of_descriptor((int)a[0], path, size);
		} else if (name[0] == '/' || (int)a[0] == AT_FDCWD) {
			snprintf(path, size, "%s", name);
		} else if (path_of_descriptor((int)a[0], path, size)) {
			size_t end = strlen(path);
			snprintf(path + end, size - end, "/%s", name);
		}
		return;
	case LOCK:
		if (((struct flock *)a[2])->l_type != F_UNLCK)
			path_of_descriptor((int)a[0], path, size);
		return;
	default:
		path_of_descriptor((int)a[0], path, size);
	}
}

static int is_about(const char *path, const char *thread)
{
	if (wanted.is_prefix ? strncmp(path, wanted.path, strlen(wanted.path)) : strcmp(path, wanted.path))
		return 0;
	return !wanted.thread || !strcmp(thread, wanted.thread) == !wanted.is_other_thread;
}

/* Is this call one of the chosen? */
static int is_chosen(const struct call *call, const char *path, const char *thread)
{
	if (!wanted.kind || strcmp(call->kind, wanted.kind) || !is_about(path, thread))
		return 0;
	uint64_t number = __atomic_add_fetch(&wanted.counts->seen, 1, __ATOMIC_SEQ_CST);
	if (wanted.fault == NOTHING || number < wanted.first || number > wanted.last)
		return 0;
	return 1;
}

static long fewer(long descriptor, long length)
{
	/* O_DIRECT moves nothing smaller than a sector. */
	long flags = syscall(SYS_fcntl, descriptor, F_GETFL, 0, 0, 0, MAGIC);
	long least = flags & O_DIRECT ? 512 : 1;
	if (wanted.fault == LEAST || length < 2)
		return length < least ? length : least;
	/* Whole sectors where there are some: so devices and O_DIRECT do it. */
	return length >= 1024 ? length / 2 / 512 * 512 : length / 2;
}

static long make_shortened(const struct call *call, long *a)
{
	if (call->shape == BYTES) {
		a[2] = fewer(a[0], a[2]);
		return make(call, a);
	}
	struct iovec first = *(struct iovec *)a[1];
	first.iov_len = fewer(a[0], first.iov_len);
	long vectors[] = {a[0], (long)&first, 1, a[3], a[4]};
	return make(call, vectors);
}

static long answer(const struct call *call, long *a)
{
	struct timespec delay = {wanted.amount / 1000, wanted.amount % 1000 * 1000000};
	__atomic_add_fetch(&wanted.counts->injected, 1, __ATOMIC_SEQ_CST);
	switch (wanted.fault) {
	case ERROR:
		/* A descriptor is closed whatever close() says. */
		if (call->shape == CLOSE)
			make(call, a);
		return -wanted.amount;
	case DELAY:
		while (nanosleep(&delay, &delay) && errno == EINTR)
			;
		return make(call, a);
	default:
		return make_shortened(call, a);
	}
}

static void note(const struct call *call, const char *path, const char *thread)
{
	char line[512];
	int length = snprintf(line, sizeof line, "%s %s %s\n", call->kind, thread[0] ? thread : "-", path);
	if (length >= (int)sizeof line)
		length = sizeof line - 1;
	if (syscall(SYS_write, wanted.trace, line, length, 0, 0, MAGIC) != length)
		abort();
}

/* Other commands of calls that have a few are made as they are. */
static int is_trapped(const struct call *call, const siginfo_t *about, const long *a)
{
	return call->number == about->si_syscall && (!call->command || call->command == (a[1] & 0xffffffff));
}

static void on_trapped(int signal, siginfo_t *about, void *context)
{
	(void)signal;
	ucontext_t *at = context;
	const struct call *call = calls, other = {.number = about->si_syscall};
	long a[5];
	for (int n = 0; n < 5; n++)
		a[n] = ARGUMENT(at, n);
	while (call < calls + CALLS && !is_trapped(call, about, a))
		call++;
	if (call == calls + CALLS) {
		RESULT(at) = make(&other, a);
		return;
	}
	int kept = errno;
	char path[300], thread[17] = "";
	path_of(call, a, path, sizeof path);
	prctl(PR_GET_NAME, thread);
	for (char *letter = thread; *letter; letter++)
		if (*letter == ' ')
			*letter = '-';
	/* Only its own open files are named in there. */
	if (wanted.trace >= 0 && path[0] && (strncmp(path, "/proc", 5) || !strncmp(path, "/proc/self/fd/", 14)))
		note(call, path, thread);
	RESULT(at) = is_chosen(call, path, thread) ? answer(call, a) : make(call, a);
	errno = kept;
}

static void trap(void)
{
	struct sigaction action = {.sa_sigaction = on_trapped, .sa_flags = SA_SIGINFO | SA_NODEFER | SA_RESTART};
	struct sock_filter filter[CALLS * 2 + 9];
	size_t n = 0;
	filter[n++] = (struct sock_filter)BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, arch));
	filter[n++] = (struct sock_filter)BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, ARCH, 1, 0);
	filter[n++] = (struct sock_filter)BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW);
	filter[n++] = (struct sock_filter)BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr));
	for (size_t i = 0; i < CALLS; i++)
		filter[n++] = (struct sock_filter)BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, calls[i].number, CALLS - i, 0);
	filter[n++] = (struct sock_filter)BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW);
	/* Little-endian, as all machines here are. */
	size_t sixth = offsetof(struct seccomp_data, args[5]);
	filter[n++] = (struct sock_filter)BPF_STMT(BPF_LD | BPF_W | BPF_ABS, sixth);
	filter[n++] = (struct sock_filter)BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, MAGIC_LOW, 0, 2);
	filter[n++] = (struct sock_filter)BPF_STMT(BPF_LD | BPF_W | BPF_ABS, sixth + 4);
	filter[n++] = (struct sock_filter)BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, MAGIC_HIGH, 1, 0);
	filter[n++] = (struct sock_filter)BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_TRAP);
	filter[n++] = (struct sock_filter)BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW);
	struct sock_fprog program = {.len = n, .filter = filter};
	if (sigaction(SIGSYS, &action, NULL) || prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) ||
	    prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program))
		abort();
}

static void read_fault(const char *fault)
{
	if (!strncmp(fault, "error=", 6)) {
		wanted.fault = ERROR;
		wanted.amount = atol(fault + 6);
	} else if (!strncmp(fault, "delay=", 6)) {
		wanted.fault = DELAY;
		wanted.amount = atol(fault + 6);
	} else if (!strcmp(fault, "short=half")) {
		wanted.fault = HALF;
	} else if (!strcmp(fault, "short=least")) {
		wanted.fault = LEAST;
	} else {
		abort();
	}
}

__attribute__((constructor)) static void begin(void)
{
	const char *counts = getenv("SWEEP_COUNTS"), *trace = getenv("SWEEP_TRACE");
	const char *fault = getenv("SWEEP_FAULT"), *when = getenv("SWEEP_WHEN");
	int file = counts ? open(counts, O_RDWR | O_CLOEXEC) : -1;
	wanted.counts = file < 0 ? MAP_FAILED : mmap(NULL, 16, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
	if (wanted.counts == MAP_FAILED)
		abort();
	close(file);
	if (trace && (wanted.trace = open(trace, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600)) < 0)
		abort();
	wanted.kind = getenv("SWEEP_KIND");
	if (wanted.kind) {
		char *path = strdup(getenv("SWEEP_PATH"));
		size_t length = strlen(path);
		wanted.is_prefix = length && path[length - 1] == '*';
		path[length - wanted.is_prefix] = 0;
		wanted.path = path;
		wanted.thread = getenv("SWEEP_THREAD");
		wanted.is_other_thread = wanted.thread && wanted.thread[0] == '!';
		wanted.thread += wanted.is_other_thread;
	}
	if (fault) {
		read_fault(fault);
		if (!when || sscanf(when, "%lu-%lu", &wanted.first, &wanted.last) != 2)
			abort();
	}
	unsetenv("LD_PRELOAD");
	trap();
}
