/* Faults at the n-th call that changes files below a folder, whoever makes it: Python, libstdc++ or Rust.

Some libraries make their system calls themselves, so a shim between them and libc misses some of their calls. This one
is told by the kernel: a seccomp filter sends SIGSYS at each such call of the process, and the handler counts it, does
to it what was asked for, writes it into a journal, and returns its result. Linux on x86-64 alone.

    cc -shared -fPIC -O1 -o shim.so shim.c
*/
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <signal.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/file.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <ucontext.h>
#include <unistd.h>

/* shim_syscall(number, six arguments) returns the result or -errno. The filter lets through calls from here alone. */
long shim_syscall(long number, long a, long b, long c, long d, long e, long f);
extern char shim_after[];
__asm__(".text\n.globl shim_syscall\nshim_syscall:\n"
        "mov %rdi,%rax\nmov %rsi,%rdi\nmov %rdx,%rsi\nmov %rcx,%rdx\nmov %r8,%r10\nmov %r9,%r8\nmov 8(%rsp),%r9\n"
        "syscall\n.globl shim_after\nshim_after:\nret\n");

enum { NONE, KILL, HALF, FAIL, FULL };

static char root[PATH_MAX];
static size_t root_length;
static int active, action, error, journal = -1, rank;
static long count, chosen;

static int beneath(const char *path) {
    return !strncmp(path, root, root_length) && (path[root_length] == '/' || !path[root_length]);
}

static int path_of(int fd, char *path) {
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, path, PATH_MAX - 1);
    if (length < 0) return 0;
    path[length] = 0;
    return beneath(path);
}

/* The path without links in its folder; whether it is the root or below it. */
static int resolve(int folder, const char *given, char *path) {
    char parent[PATH_MAX], name[NAME_MAX + 1];
    size_t length = strnlen(given, PATH_MAX - 1);
    while (length > 1 && given[length - 1] == '/') length--;
    size_t slash = length;
    while (slash && given[slash - 1] != '/') slash--;
    if (!length || length - slash > NAME_MAX) return 0;
    memcpy(name, given + slash, length - slash);
    name[length - slash] = 0;
    if (slash) memcpy(parent, given, slash), parent[slash] = 0;
    else strcpy(parent, ".");
    int fd = shim_syscall(SYS_openat, folder, (long)parent, O_PATH | O_DIRECTORY | O_CLOEXEC, 0, 0, 0);
    if (fd < 0) return 0;
    path_of(fd, path);
    shim_syscall(SYS_close, fd, 0, 0, 0, 0, 0);
    if (strlen(path) + strlen(name) + 2 > PATH_MAX) return 0;
    strcat(path, "/");
    strcat(path, name);
    return beneath(path);
}

static void put(const void *data, size_t length) {
    while (length) {
        long done = shim_syscall(SYS_write, journal, (long)data, length, 0, 0, 0);
        if (done <= 0) shim_syscall(SYS_exit_group, 98, 0, 0, 0, 0, 0);
        data = (const char *)data + done;
        length -= done;
    }
}

static void note(char kind, const char *path, const char *other, long offset, long length, int flags) {
    char head[160];
    int size = snprintf(head, sizeof head, "%c %d %zu %zu %ld %ld %d\n", kind, rank, strlen(path), strlen(other), offset,
                        length, flags);
    put(head, size);
    put(path, strlen(path));
    put(other, strlen(other));
}

static void note_contents(int fd, const char *path, long offset, long length) {
    char link[64], piece[65536];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    note('w', path, "", offset, length, 0);
    int copy = shim_syscall(SYS_openat, AT_FDCWD, (long)link, O_RDONLY | O_CLOEXEC, 0, 0, 0);
    while (length > 0) {
        long wanted = length < (long)sizeof piece ? length : (long)sizeof piece;
        long got = pread(copy, piece, wanted, offset);
        if (got <= 0) shim_syscall(SYS_exit_group, 98, 0, 0, 0, 0, 0);
        put(piece, got);
        offset += got;
        length -= got;
    }
    shim_syscall(SYS_close, copy, 0, 0, 0, 0, 0);
}

static long perform(long number, const long *a) {
    return shim_syscall(number, a[0], a[1], a[2], a[3], a[4], a[5]);
}

static void die(void) {
    shim_syscall(SYS_kill, getpid(), SIGKILL, 0, 0, 0, 0);
}

static long write_half(long number, const long *a) {
    long part[6] = {a[0], a[1], a[2], a[3], a[4], a[5]};
    struct iovec pieces[64];
    if (number == SYS_write || number == SYS_pwrite64) part[2] /= 2;
    if (number == SYS_sendfile || number == SYS_fallocate) part[3] /= 2;
    if (number == SYS_copy_file_range) part[4] /= 2;
    if (number == SYS_ftruncate || number == SYS_truncate) part[1] /= 2;
    if (number == SYS_writev || number == SYS_pwritev) {
        long total = 0, left, used = 0;
        const struct iovec *given = (const struct iovec *)a[1];
        for (long i = 0; i < a[2]; i++) total += given[i].iov_len;
        for (left = total / 2; left > 0 && used < a[2] && used < 64; used++) {
            pieces[used] = given[used];
            if ((long)pieces[used].iov_len > left) pieces[used].iov_len = left;
            left -= pieces[used].iov_len;
        }
        part[1] = (long)pieces;
        part[2] = used;
    }
    return perform(number, part);
}

/* One call: `kind` as in the journal, on `path`, and `other` of two; `fd` is that of a write, or -1. */
static long act(char kind, long number, const long *a, int fd, const char *path, const char *other, int flags) {
    long n = __atomic_add_fetch(&count, 1, __ATOMIC_SEQ_CST);
    int grows = kind == 'o' ? flags & 1 : strchr("wtldy", kind) != NULL;
    if (n == chosen && action == KILL) die();
    if (n == chosen && action == HALF) {
        if (kind == 'w' || kind == 't') write_half(number, a);
        else perform(number, a);
        die();
    }
    if ((n == chosen && action == FAIL) || (n >= chosen && action == FULL && grows)) return -error;
    if (journal < 0) return perform(number, a);
    flock(journal, LOCK_EX);
    long result = perform(number, a);
    if (result < 0) {
        note(kind, path, other, 0, 0, (int)result);
    } else if (kind == 'w') {
        int positioned = number == SYS_pwrite64 || number == SYS_pwritev;
        int target = number == SYS_copy_file_range ? (int)a[2] : fd;
        note_contents(target, path, positioned ? a[3] : lseek(target, 0, SEEK_CUR) - result, result);
    } else {
        struct stat found;
        note(kind, path, other, kind == 't' && !stat(path, &found) ? found.st_size : 0, 0, flags);
    }
    flock(journal, LOCK_UN);
    return result;
}

static long opened(long number, const long *a, int folder, const char *given, int flags) {
    char path[PATH_MAX];
    if (!(flags & (O_WRONLY | O_RDWR | O_CREAT | O_TRUNC)) || !resolve(folder, given, path)) return perform(number, a);
    int created = flags & O_CREAT && access(path, F_OK);
    return act('o', number, a, -1, path, "", created | (flags & O_TRUNC ? 2 : 0));
}

static long on_descriptor(char kind, long number, const long *a, int fd) {
    char path[PATH_MAX];
    return path_of(fd, path) ? act(kind, number, a, fd, path, "", 0) : perform(number, a);
}

static long on_path(char kind, long number, const long *a, int folder, long given) {
    char path[PATH_MAX];
    if (!resolve(folder, (const char *)given, path)) return perform(number, a);
    return act(kind, number, a, -1, path, "", 0);
}

static long on_paths(char kind, long number, const long *a, int from, long old, int to, long new) {
    char path[PATH_MAX], other[PATH_MAX];
    int below = resolve(from, (const char *)old, path);
    if (!resolve(to, (const char *)new, other) && !below) return perform(number, a);
    return act(kind, number, a, -1, path, other, 0);
}

static long handle(long number, const long *a) {
    if (!active) return perform(number, a);
    switch (number) {
    case SYS_open: return opened(number, a, AT_FDCWD, (const char *)a[0], a[1]);
    case SYS_creat: return opened(number, a, AT_FDCWD, (const char *)a[0], O_WRONLY | O_CREAT | O_TRUNC);
    case SYS_openat: return opened(number, a, a[0], (const char *)a[1], a[2]);
    case SYS_write:
    case SYS_pwrite64:
    case SYS_writev:
    case SYS_pwritev:
    case SYS_sendfile: return on_descriptor('w', number, a, a[0]);
    case SYS_copy_file_range: return on_descriptor('w', number, a, a[2]);
    case SYS_fallocate:
    case SYS_ftruncate: return on_descriptor('t', number, a, a[0]);
    case SYS_fsync:
    case SYS_fdatasync: return on_descriptor('s', number, a, a[0]);
    case SYS_rename: return on_paths('r', number, a, AT_FDCWD, a[0], AT_FDCWD, a[1]);
    case SYS_renameat:
    case SYS_renameat2: return on_paths('r', number, a, a[0], a[1], a[2], a[3]);
    case SYS_link: return on_paths('l', number, a, AT_FDCWD, a[0], AT_FDCWD, a[1]);
    case SYS_linkat: return on_paths('l', number, a, a[0], a[1], a[2], a[3]);
    case SYS_unlink: return on_path('u', number, a, AT_FDCWD, a[0]);
    case SYS_unlinkat: return on_path(a[2] & AT_REMOVEDIR ? 'x' : 'u', number, a, a[0], a[1]);
    case SYS_rmdir: return on_path('x', number, a, AT_FDCWD, a[0]);
    case SYS_mkdir: return on_path('d', number, a, AT_FDCWD, a[0]);
    case SYS_mkdirat: return on_path('d', number, a, a[0], a[1]);
    case SYS_mmap:
    default: { /* what this file does not model: shared writable mappings, truncate by path, and rarer calls */
        char path[PATH_MAX];
        int known = number == SYS_mmap      ? path_of(a[4], path)
                    : number == SYS_openat2 ? resolve(a[0], (const char *)a[1], path)
                    : number == SYS_symlinkat ? resolve(a[1], (const char *)a[2], path)
                    : number == SYS_pwritev2 ? path_of(a[0], path)
                                             : resolve(AT_FDCWD, (const char *)(number == SYS_truncate ? a[0] : a[1]), path);
        if (known) {
            char text[PATH_MAX + 64];
            int size = snprintf(text, sizeof text, "faults: system call %ld on %s is not modelled\n", number, path);
            shim_syscall(SYS_write, 2, (long)text, size, 0, 0, 0);
            shim_syscall(SYS_exit_group, 97, 0, 0, 0, 0, 0);
        }
        return perform(number, a);
    }
    }
}

static void trapped(int number, siginfo_t *info, void *context) {
    (void)number;
    int before = errno;
    greg_t *registers = ((ucontext_t *)context)->uc_mcontext.gregs;
    long a[6] = {registers[REG_RDI], registers[REG_RSI], registers[REG_RDX],
                 registers[REG_R10], registers[REG_R8],  registers[REG_R9]};
    registers[REG_RAX] = handle(info->si_syscall, a);
    errno = before;
}

#define FIELD(name) BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, name))
#define LOW(i) BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, args[i]))
#define EQUAL(value, then, otherwise) BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, value, then, otherwise)
#define ANY(bits, then, otherwise) BPF_JUMP(BPF_JMP | BPF_JSET | BPF_K, bits, then, otherwise)
#define TRAP BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_TRAP)
#define ALLOW BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW)

static const int always[] = {
    SYS_creat,  SYS_write,    SYS_pwrite64, SYS_writev,    SYS_pwritev,   SYS_pwritev2, SYS_sendfile,
    SYS_copy_file_range,      SYS_fallocate, SYS_ftruncate, SYS_truncate, SYS_fsync,    SYS_fdatasync,
    SYS_rename, SYS_renameat, SYS_renameat2, SYS_link,      SYS_linkat,   SYS_symlink,  SYS_symlinkat,
    SYS_unlink, SYS_unlinkat, SYS_rmdir,     SYS_mkdir,     SYS_mkdirat,  SYS_openat2,
};

static int install(void) {
    struct sock_filter filter[32 + 2 * sizeof always / sizeof *always];
    size_t used = 0;
    uint64_t after = (uint64_t)shim_after;
    uint32_t writing = O_WRONLY | O_RDWR | O_CREAT | O_TRUNC;
    const struct sock_filter first[] = {
        FIELD(instruction_pointer), EQUAL((uint32_t)after, 0, 3),
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, instruction_pointer) + 4),
        EQUAL((uint32_t)(after >> 32), 0, 1), ALLOW,
        FIELD(nr), EQUAL(SYS_open, 0, 4), LOW(1), ANY(writing, 0, 1), TRAP, ALLOW,
        EQUAL(SYS_openat, 0, 4), LOW(2), ANY(writing, 0, 1), TRAP, ALLOW,
        EQUAL(SYS_mmap, 0, 6), LOW(2), ANY(2 /* PROT_WRITE */, 0, 3), LOW(3), ANY(1 /* MAP_SHARED */, 0, 1), TRAP, ALLOW,
    };
    memcpy(filter, first, sizeof first);
    used = sizeof first / sizeof *first;
    for (size_t i = 0; i < sizeof always / sizeof *always; i++) {
        filter[used++] = (struct sock_filter)EQUAL(always[i], 0, 1);
        filter[used++] = (struct sock_filter)TRAP;
    }
    filter[used++] = (struct sock_filter)ALLOW;
    struct sock_fprog program = {used, filter};
    struct sigaction on = {.sa_sigaction = trapped, .sa_flags = SA_SIGINFO | SA_NODEFER | SA_RESTART};
    if (sigaction(SIGSYS, &on, NULL) || prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)) return -errno;
    return prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program) ? -errno : 0;
}

/* From now on, in this process, until it ends. Below `folder` (without links in its path), at call number `n`, from 1:
KILL before it; HALF: kill after half of it, if it writes, or after it; FAIL: it fails with `code`; FULL: it and all
later ones that need space fail with `code`. Calls are appended to the file `record`, if there is one. */
int shim_arm(const char *folder, const char *record, int own_rank, long n, int what, int code) {
    if (strlen(folder) >= PATH_MAX) return -ENAMETOOLONG;
    strcpy(root, folder);
    root_length = strlen(root);
    rank = own_rank;
    chosen = n;
    action = what;
    error = code;
    count = 0;
    if (record && (journal = open(record, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600)) < 0) return -errno;
    active = 1;
    return install();
}

/* How many calls there have been; counts no more. */
long shim_disarm(void) {
    active = 0;
    return count;
}
