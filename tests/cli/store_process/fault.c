/* Preloaded into a process, this makes a file's sync fail, and does to the file what a kernel does then: it drops the pages that
 * were written since the last good sync, so that the file has its old contents again, and the next sync succeeds.
 *
 * The file named by AEGIS_TEST_ORDER, where there is one, has an order and the end of a path:
 *     drop   fails one sync, and removes the order
 *     stuck  fails every sync for as long as the order is there
 *     kill   as drop, and kills the process in the middle of it
 *     late   fails one sync, but leaves the pages in memory, clean, so that no later sync writes them
 *     evict  takes such pages out of memory, as far as they were not written again
 *     clock  makes the clock of the thread with the name that follows fail, which Rust answers with a panic
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <time.h>
#include <unistd.h>

struct kept {
    struct kept *next;
    dev_t dev;
    ino_t ino;
    off_t at;
    size_t length;
    int lost;
    char old[];
};

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static struct kept *newest;

static int order(char verb[16], char suffix[128]) {
    const char *path = getenv("AEGIS_TEST_ORDER");
    FILE *file = path ? fopen(path, "re") : NULL;
    if (!file) return 0;
    int found = fscanf(file, "%15s %127s", verb, suffix) == 2;
    fclose(file);
    return found;
}

static int is_database(int fd) {
    char link[64], path[4096];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length < 0) return 0;
    path[length] = 0;
    return strstr(path, "aegis.db") != NULL && strstr(path, "-shm") == NULL;
}

static int ends_with(int fd, const char *suffix) {
    char link[64], path[4096];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, path, sizeof path - 1);
    size_t end = strlen(suffix);
    return length >= (ssize_t)end && memcmp(path + length - end, suffix, end) == 0;
}

static void keep(int fd, off_t at, size_t length) {
    struct stat stat;
    if (!is_database(fd) || fstat(fd, &stat)) return;
    /* What is written again is dirty again. */
    for (struct kept **at_kept = &newest; *at_kept;) {
        struct kept *kept = *at_kept;
        off_t begin = at, end = at + (off_t)length, last = kept->at + (off_t)kept->length;
        if (kept->lost && kept->dev == stat.st_dev && kept->ino == stat.st_ino && begin < last && end > kept->at) {
            if (begin <= kept->at && end < last) {
                memmove(kept->old, kept->old + (end - kept->at), last - end);
                kept->length = last - end, kept->at = end;
            } else {
                kept->length = begin > kept->at ? begin - kept->at : 0;
            }
        }
        if (kept->length == 0) {
            *at_kept = kept->next;
            free(kept);
        } else {
            at_kept = &kept->next;
        }
    }
    struct kept *kept = calloc(1, sizeof *kept + length);
    kept->dev = stat.st_dev, kept->ino = stat.st_ino, kept->at = at, kept->length = length;
    /* Behind the end of the file there were zeros, as far as a reader of a hole can tell. */
    if (syscall(SYS_pread64, fd, kept->old, length, at) < 0) memset(kept->old, 0, length);
    kept->next = newest;
    newest = kept;
}

/* Forgets what was kept of a file, lost or not, newest first, and puts it back before. */
static void settle(int fd, int put_back, int lost) {
    struct stat stat;
    if (fstat(fd, &stat)) return;
    for (struct kept **at = &newest; *at;) {
        struct kept *kept = *at;
        if (kept->dev != stat.st_dev || kept->ino != stat.st_ino || kept->lost != lost) {
            at = &kept->next;
            continue;
        }
        if (put_back && kept->at < stat.st_size)
            if (syscall(SYS_pwrite64, fd, kept->old, kept->length, kept->at) < 0) abort();
        *at = kept->next;
        free(kept);
    }
}

ssize_t pwrite64(int fd, const void *bytes, size_t length, off64_t at) {
    pthread_mutex_lock(&lock);
    keep(fd, at, length);
    ssize_t done = syscall(SYS_pwrite64, fd, bytes, length, at);
    pthread_mutex_unlock(&lock);
    return done;
}

ssize_t pwrite(int fd, const void *bytes, size_t length, off_t at) {
    return pwrite64(fd, bytes, length, at);
}

ssize_t write(int fd, const void *bytes, size_t length) {
    pthread_mutex_lock(&lock);
    off_t at = lseek(fd, 0, SEEK_CUR);
    if (at >= 0) keep(fd, at, length);
    pthread_mutex_unlock(&lock);
    return syscall(SYS_write, fd, bytes, length);
}

static int of(int fd, const struct kept *kept) {
    struct stat stat;
    return !fstat(fd, &stat) && kept->dev == stat.st_dev && kept->ino == stat.st_ino;
}

static int sync_by(long call, int fd) {
    char verb[16], suffix[128];
    pthread_mutex_lock(&lock);
    int fails = is_database(fd) && order(verb, suffix) && strcmp(verb, "clock") && ends_with(fd, suffix);
    int evicts = fails && !strcmp(verb, "evict");
    if (evicts) {
        settle(fd, 1, 1);
        unlink(getenv("AEGIS_TEST_ORDER"));
        fails = 0;
    }
    if (fails) {
        if (!strcmp(verb, "late")) {
            for (struct kept *kept = newest; kept; kept = kept->next) kept->lost |= of(fd, kept);
        } else {
            settle(fd, 1, 0);
        }
        if (strcmp(verb, "stuck")) unlink(getenv("AEGIS_TEST_ORDER"));
        if (!strcmp(verb, "kill")) kill(getpid(), SIGKILL);
    } else {
        settle(fd, 0, 0);
    }
    pthread_mutex_unlock(&lock);
    if (fails) {
        errno = EIO;
        return -1;
    }
    return syscall(call, fd);
}

int fsync(int fd) { return sync_by(SYS_fsync, fd); }

int fdatasync(int fd) { return sync_by(SYS_fdatasync, fd); }

int clock_gettime(clockid_t clock, struct timespec *time) {
    char verb[16], suffix[128], name[32] = "";
    if (clock == CLOCK_REALTIME && getenv("AEGIS_TEST_ORDER") && !pthread_getname_np(pthread_self(), name, sizeof name)
        && !strcmp(name, "aegis-writer") && order(verb, suffix) && !strcmp(verb, "clock")) {
        unlink(getenv("AEGIS_TEST_ORDER"));
        errno = EINVAL;
        return -1;
    }
    return syscall(SYS_clock_gettime, clock, time);
}
