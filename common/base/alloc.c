#include "common/base/alloc.h"

#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

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

enum odsi_err alloc_zeroed(void *out_pointer, size_t count, size_t element_size)
{
    void *memory = NULL;
    if (!refused_by_test())
        memory = calloc(count ? count : 1, element_size ? element_size : 1);
    memcpy(out_pointer, &memory, sizeof memory);
    return memory ? ODSI_OK : no_memory(count, element_size);
}

enum odsi_err alloc_aligned(void *out_pointer, size_t count, size_t element_size)
{
    void *memory = NULL;
    size_t size = 0;
    if (!refused_by_test() && !__builtin_mul_overflow(count, element_size, &size) &&
        size <= SIZE_MAX - 2 * ALLOC_ALIGNMENT) {
        size = (size + ALLOC_ALIGNMENT) / ALLOC_ALIGNMENT * ALLOC_ALIGNMENT;
        memory = aligned_alloc(ALLOC_ALIGNMENT, size);
        if (memory)
            memset(memory, 0, size);
    }
    memcpy(out_pointer, &memory, sizeof memory);
    return memory ? ODSI_OK : no_memory(count, element_size);
}

enum odsi_err alloc_resize(void *pointer, size_t count, size_t element_size)
{
    void *memory = NULL;
    size_t size = 0;
    memcpy(&memory, pointer, sizeof memory);
    if (refused_by_test() || __builtin_mul_overflow(count, element_size, &size))
        return no_memory(count, element_size);
    memory = realloc(memory, size ? size : 1);
    if (!memory)
        return no_memory(count, element_size);
    memcpy(pointer, &memory, sizeof memory);
    return ODSI_OK;
}

enum odsi_err alloc_text(char **out, const char *text, size_t size)
{
    enum odsi_err err = alloc_zeroed(out, size + 1, 1);
    if (err == ODSI_OK && size > 0)
        memcpy(*out, text, size);
    return err;
}

void alloc_free(void *memory)
{
    free(memory);
}
