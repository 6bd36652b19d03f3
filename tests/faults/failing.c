// Preloaded: the N-th write to a file, or the N-th allocation of a tensor, fails (sweep.py).
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <unistd.h>

enum { WRITES, ALLOCATIONS, KINDS };
static int armed[KINDS];
static long seen[KINDS], at[KINDS];

// Counts from here on; call number n fails, none when n is 0.
void failing_arm(int kind, long n) {
  armed[kind] = 1;
  seen[kind] = 0;
  at[kind] = n;
}
long failing_seen(int kind) { return seen[kind]; }

static int fails(int kind) {
  return armed[kind] && __atomic_add_fetch(&seen[kind], 1, __ATOMIC_RELAXED) == at[kind];
}

static int is_file(int fd) {
  struct stat info;
  return fstat(fd, &info) == 0 && S_ISREG(info.st_mode);
}

#define NEXT(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

ssize_t write(int fd, const void* data, size_t size) {
  if (armed[WRITES] && is_file(fd) && fails(WRITES)) {
    errno = ENOSPC;
    return -1;
  }
  return NEXT(write)(fd, data, size);
}

int fsync(int fd) {
  if (armed[WRITES] && fails(WRITES)) {
    errno = EIO;
    return -1;
  }
  return NEXT(fsync)(fd);
}

int posix_memalign(void** out, size_t alignment, size_t size) {
  if (fails(ALLOCATIONS)) return ENOMEM;
  return NEXT(posix_memalign)(out, alignment, size);
}
