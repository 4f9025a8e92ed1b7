#include "common/base/alloc.h"
#include "kernels/cpu/cpu_memory.h"

#include <criterion/criterion.h>
#include <pthread.h>
#include <stdint.h>
#include <string.h>

#define PIECE_COUNT 40u

static int is_zero(const uint8_t *bytes, size_t size)
{
    for (size_t i = 0; i < size; i++)
        if (bytes[i])
            return 0;
    return 1;
}

/* Goal: pieces are zeroed, aligned and apart, whatever their size and in whatever order they come
 * and go. How: sizes around the limits, each piece filled with its number and checked at its end;
 * every third one given back early. */
Test(memory, pieces_are_zeroed_and_apart)
{
    static const size_t sizes[] = {
        0,        1,        100, CPU_MEMORY_LARGE - 1, CPU_MEMORY_LARGE, CPU_MEMORY_LARGE + 1,
        3u << 20, 70u << 20};
    struct cpu_memory memory;
    uint8_t *pieces[PIECE_COUNT];
    cpu_memory_init(&memory);
    for (uint32_t i = 0; i < PIECE_COUNT; i++) {
        const size_t size = sizes[i % 8];
        cr_assert_eq(cpu_memory_take(&memory, &pieces[i], size, i % 5 != 0), ODSI_OK);
        cr_assert_eq((uintptr_t)pieces[i] % ALLOC_ALIGNMENT, 0);
        cr_assert(is_zero(pieces[i], size), "piece %u", i);
        memset(pieces[i], (int)i + 1, size);
        if (i % 3 == 2) {
            cpu_memory_give_back(&memory, pieces[i - 1]);
            pieces[i - 1] = NULL;
        }
    }
    for (uint32_t i = 0; i < PIECE_COUNT; i++) {
        for (size_t at = 0; pieces[i] && at < sizes[i % 8]; at += 4096)
            cr_assert_eq(pieces[i][at], i + 1, "piece %u, byte %zu", i, at);
        cpu_memory_give_back(&memory, pieces[i]);
    }
    cr_expect_null(memory.regions, "the last piece of a region takes it along");
    cpu_memory_close(&memory);
}

Test(memory, says_when_there_is_none)
{
    struct cpu_memory memory;
    void *piece = &memory;
    cpu_memory_init(&memory);
    cr_expect_eq(cpu_memory_take(&memory, &piece, SIZE_MAX - 10, 1), ODSI_ERR_NO_MEMORY);
    cr_expect_null(piece);
    cr_expect_eq(cpu_memory_take(&memory, &piece, SIZE_MAX / 4, 0), ODSI_ERR_NO_MEMORY);
    for (long failing = 0; failing < 2; failing++) {
        alloc_fail_after(failing);
        cr_expect_eq(cpu_memory_take(&memory, &piece, 1u << 20, 1), ODSI_ERR_NO_MEMORY);
        alloc_fail_after(-1);
        cr_expect_null(piece);
    }
    cpu_memory_give_back(&memory, NULL);
    cpu_memory_close(&memory);
}

static void *take_and_give(void *context)
{
    struct cpu_memory *memory = context;
    for (uint32_t i = 0; i < 200; i++) {
        uint8_t *piece = NULL;
        if (cpu_memory_take(memory, &piece, CPU_MEMORY_LARGE + i, i % 2) != ODSI_OK || piece[i])
            return memory;
        piece[i] = 1;
        cpu_memory_give_back(memory, piece);
    }
    return NULL;
}

Test(memory, threads_take_and_give_back_at_once)
{
    struct cpu_memory memory;
    pthread_t threads[4];
    cpu_memory_init(&memory);
    for (uint32_t i = 0; i < 4; i++)
        cr_assert_eq(pthread_create(&threads[i], NULL, take_and_give, &memory), 0);
    for (uint32_t i = 0; i < 4; i++) {
        void *failed = NULL;
        pthread_join(threads[i], &failed);
        cr_expect_null(failed);
    }
    cr_expect_null(memory.regions);
    cpu_memory_close(&memory);
}
