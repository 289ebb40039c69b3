/* Counts the calls that reach the disk, and at a chosen one fails or ends the process; preloaded by publishing.py. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <unistd.h>

static long count = 0;

/* Returns 1 where this call is to fail, with errno set; does not return where it is to end the process. */
static int struck(void) {
    const char *at = getenv("FAULT_AT"), *kind = getenv("FAULT_KIND"), *log = getenv("FAULT_COUNT");
    if (!at && !log) return 0;
    count++;
    if (log) {
        char text[32];
        int length = snprintf(text, sizeof text, "%ld\n", count);
        long file = syscall(SYS_openat, AT_FDCWD, log, O_WRONLY | O_CREAT | O_TRUNC, 0644);
        if (file >= 0) { syscall(SYS_write, file, text, length); syscall(SYS_close, file); }
    }
    if (!at || count < atol(at)) return 0;
    if (!strcmp(kind, "kill")) { syscall(SYS_kill, getpid(), SIGKILL); for (;;) syscall(SYS_pause); }
    if (!strcmp(kind, "once") && count > atol(at)) return 0;
    errno = !strcmp(kind, "full") ? ENOSPC : EIO;
    return 1;
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))
static int ours(const char *path) { const char *root = getenv("FAULT_ROOT"); return root && path && strstr(path, root) != NULL; }
static int ours_fd(int fd) {
    char link[64], path[4096];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length < 0) return 0;
    path[length] = 0;
    return ours(path);
}

ssize_t write(int fd, const void *data, size_t size) { return ours_fd(fd) && struck() ? -1 : REAL(write)(fd, data, size); }
int fsync(int fd) { return ours_fd(fd) && struck() ? -1 : REAL(fsync)(fd); }
int mkdir(const char *path, mode_t mode) { return ours(path) && struck() ? -1 : REAL(mkdir)(path, mode); }
int rename(const char *from, const char *to) { return ours(to) && struck() ? -1 : REAL(rename)(from, to); }
int renameat2(int a, const char *from, int b, const char *to, unsigned flags) {
    return ours(to) && struck() ? -1 : REAL(renameat2)(a, from, b, to, flags);
}
static int opened(const char *path, int flags) { return (flags & (O_CREAT | O_DIRECTORY)) && ours(path) && struck(); }
int open64(const char *path, int flags, ...) {
    va_list list; va_start(list, flags); mode_t mode = va_arg(list, mode_t); va_end(list);
    return opened(path, flags) ? -1 : REAL(open64)(path, flags, mode);
}
int open(const char *path, int flags, ...) {
    va_list list; va_start(list, flags); mode_t mode = va_arg(list, mode_t); va_end(list);
    return opened(path, flags) ? -1 : REAL(open)(path, flags, mode);
}
