#include "common/base/alloc.h"

#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

static atomic_long fail_after = -1; /* a test hook; see alloc_fail_after */

static int refused_by_test(void)
{
    if (atomic_load_explicit(&fail_after, memory_order_relaxed) < 0)
        return 0;
    return atomic_fetch_sub(&fail_after, 1) == 0;
}

void alloc_fail_after(long count)
{
    atomic_store(&fail_after, count);
}

static enum odsi_err no_memory(size_t count, size_t element_size)
{
    return odsi_fail(ODSI_ERR_NO_MEMORY, "no memory for %zu x %zu bytes", count, element_size);
}

/* count * element_size in *out_size, at least 1; 0 when no object can be that large. */
static int total_size(size_t *out_size, size_t count, size_t element_size)
{
    if (__builtin_mul_overflow(count, element_size, out_size) ||
        *out_size > (size_t)PTRDIFF_MAX - 2 * ALLOC_ALIGNMENT)
        return 0;
    if (*out_size == 0)
        *out_size = 1;
    return 1;
}

enum odsi_err alloc_zeroed(void *out_pointer, size_t count, size_t element_size)
{
    void *memory = NULL;
    size_t size = 0;
    if (!refused_by_test() && total_size(&size, count, element_size))
        memory = calloc(size, 1);
    memcpy(out_pointer, &memory, sizeof memory);
    return memory ? ODSI_OK : no_memory(count, element_size);
}

enum odsi_err alloc_aligned(void *out_pointer, size_t count, size_t element_size)
{
    void *memory = NULL;
    size_t size = 0;
    if (!refused_by_test() && total_size(&size, count, element_size)) {
        size = (size + ALLOC_ALIGNMENT - 1) / ALLOC_ALIGNMENT * ALLOC_ALIGNMENT;
        memory = aligned_alloc(ALLOC_ALIGNMENT, size);
        if (memory)
            memset(memory, 0, size);
    }
    memcpy(out_pointer, &memory, sizeof memory);
    return memory ? ODSI_OK : no_memory(count, element_size);
}

/* Large pages begin where addresses are multiples of their size; so much more is mapped, and given
 * back on both sides. */
static void *map_aligned(size_t size)
{
    const uintptr_t mask = ALLOC_LARGE_PAGE - 1;
    void *map = mmap(NULL, size + ALLOC_LARGE_PAGE, PROT_READ | PROT_WRITE,
                     MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (map == MAP_FAILED)
        return NULL;
    uint8_t *first = map;
    const size_t head = (size_t)(-(uintptr_t)map & mask);
    if (head > 0)
        munmap(first, head);
    munmap(first + head + size, ALLOC_LARGE_PAGE - head);
#ifdef MADV_HUGEPAGE
    (void)madvise(first + head, size, MADV_HUGEPAGE); /* only a wish */
#endif
    return first + head;
}

/* Whole large pages. */
static size_t pages_size(size_t size)
{
    return (size + ALLOC_LARGE_PAGE - 1) / ALLOC_LARGE_PAGE * ALLOC_LARGE_PAGE;
}

enum odsi_err alloc_pages(void *out_pointer, size_t size)
{
    void *memory = NULL;
    if (!refused_by_test() && size <= (size_t)PTRDIFF_MAX - 2 * ALLOC_LARGE_PAGE)
        memory = map_aligned(pages_size(size ? size : 1));
    memcpy(out_pointer, &memory, sizeof memory);
    return memory ? ODSI_OK : no_memory(size, 1);
}

void alloc_pages_free(void *memory, size_t size)
{
    if (memory)
        munmap(memory, pages_size(size ? size : 1));
}

enum odsi_err alloc_resize(void *pointer, size_t count, size_t element_size)
{
    void *memory = NULL;
    size_t size = 0;
    memcpy(&memory, pointer, sizeof memory);
    if (refused_by_test() || !total_size(&size, count, element_size))
        return no_memory(count, element_size);
    memory = realloc(memory, size);
    if (!memory)
        return no_memory(count, element_size);
    memcpy(pointer, &memory, sizeof memory);
    return ODSI_OK;
}

enum odsi_err alloc_text(char **out, const char *text, size_t size)
{
    *out = NULL;
    if (size == SIZE_MAX) /* no room for the end */
        return no_memory(size, 1);
    enum odsi_err err = alloc_zeroed(out, size + 1, 1);
    if (err == ODSI_OK && size > 0)
        memcpy(*out, text, size);
    return err;
}

void alloc_free(void *memory)
{
    free(memory);
}
