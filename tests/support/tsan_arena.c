/* Lets Criterion run under ThreadSanitizer; linked into test programs of SAN=thread only.
 *
 * Criterion keeps what it shares with the process of a test in an arena that it maps at a random
 * address, the same in both processes. Under ThreadSanitizer nearly all of these addresses are
 * shadow memory: mincore says that they are taken, mmap that they are forbidden, and Criterion
 * gives up before the first test. Here both calls, for such addresses only, use a window instead
 * that is below every position independent program (0x5555...) and that ThreadSanitizer treats as
 * the program's. A moved address is not moved again, so the second process finds the arena. */
#include <errno.h>
#include <stdint.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <unistd.h>

/* Where Criterion looks: 2^22 places from 2^45 on, 2^24 bytes apart. */
#define ARENA_FIRST 0x200000000000u
#define ARENA_LAST  0x600000000000u
#define ARENA_STEP  0x1000000u
/* Where the arenas go: 2^14 places. */
#define WINDOW_FIRST 0x550000000000u
#define WINDOW_LAST  0x554000000000u
/* The whole range of the program's own image, which is left alone. */
#define IMAGE_LAST 0x568000000000u

/* ThreadSanitizer's mmap64, which the one below hides. */
void *__interceptor_mmap64(void *address, size_t size, int protection, int flags, int fd,
                           off_t offset);
void *mmap64(void *address, size_t size, int protection, int flags, int fd, off_t offset);

static int is_arena(const void *address)
{
    const uintptr_t at = (uintptr_t)address;
    const int is_image = at >= WINDOW_FIRST && at < IMAGE_LAST;
    return at >= ARENA_FIRST && at < ARENA_LAST && !is_image;
}

int mincore(void *address, size_t size, unsigned char *out)
{
    if (is_arena(address)) {
        errno = ENOMEM; /* free; the mmap that follows finds out whether it is */
        return -1;
    }
    return (int)syscall(SYS_mincore, address, size, out);
}

void *mmap64(void *address, size_t size, int protection, int flags, int fd, off_t offset)
{
    if ((flags & MAP_FIXED) && fd >= 0 && is_arena(address)) {
        const uintptr_t place = (uintptr_t)address % (WINDOW_LAST - WINDOW_FIRST);
        address = (void *)(WINDOW_FIRST + place / ARENA_STEP * ARENA_STEP);
        flags = (flags & ~MAP_FIXED) | MAP_FIXED_NOREPLACE;
    }
    return __interceptor_mmap64(address, size, protection, flags, fd, offset);
}
