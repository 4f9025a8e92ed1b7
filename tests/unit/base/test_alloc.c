#include "common/base/alloc.h"

#include <criterion/criterion.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <string.h>

static int is_zero(const uint8_t *bytes, size_t size)
{
    for (size_t i = 0; i < size; i++)
        if (bytes[i] != 0)
            return 0;
    return 1;
}

Test(alloc, zeroed_and_aligned_memory_is_zero_to_its_last_byte)
{
    for (size_t size = 0; size < 200; size++) {
        uint8_t *bytes = NULL;
        cr_assert_eq(alloc_zeroed(&bytes, size, 1), ODSI_OK);
        cr_assert_not_null(bytes);
        cr_expect(is_zero(bytes, size));
        memset(bytes, 255, size);
        alloc_free(bytes);
        cr_assert_eq(alloc_aligned(&bytes, size, 3), ODSI_OK);
        cr_assert_not_null(bytes);
        cr_expect_eq((uintptr_t)bytes % ALLOC_ALIGNMENT, 0);
        cr_expect(is_zero(bytes, 3 * size));
        memset(bytes, 255, 3 * size);
        alloc_free(bytes);
    }
}

Test(alloc, a_size_that_overflows_is_refused)
{
    const size_t counts[] = {SIZE_MAX, SIZE_MAX / 2 + 1, SIZE_MAX / 8 + 1, SIZE_MAX / 16 + 1};
    for (size_t i = 0; i < sizeof counts / sizeof *counts; i++) {
        uint64_t *numbers = (uint64_t *)&numbers;
        cr_expect_eq(alloc_zeroed(&numbers, counts[i], sizeof *numbers), ODSI_ERR_NO_MEMORY);
        cr_expect_null(numbers);
        numbers = (uint64_t *)&numbers;
        cr_expect_eq(alloc_aligned(&numbers, counts[i], sizeof *numbers), ODSI_ERR_NO_MEMORY);
        cr_expect_null(numbers);
    }
    uint8_t *bytes = (uint8_t *)&bytes;
    cr_expect_eq(alloc_aligned(&bytes, SIZE_MAX - 63, 1), ODSI_ERR_NO_MEMORY);
    cr_expect_null(bytes);
    cr_expect(strstr(odsi_err_text(), "no memory for"));
}

Test(alloc, resize_keeps_the_content_and_a_refusal_changes_nothing)
{
    uint32_t *numbers = NULL;
    cr_assert_eq(alloc_resize(&numbers, 4, sizeof *numbers), ODSI_OK);
    for (uint32_t i = 0; i < 4; i++)
        numbers[i] = i;
    cr_assert_eq(alloc_resize(&numbers, 4096, sizeof *numbers), ODSI_OK);
    cr_expect_eq(numbers[3], 3);
    uint32_t *const before = numbers;
    cr_expect_eq(alloc_resize(&numbers, SIZE_MAX / 2, sizeof *numbers), ODSI_ERR_NO_MEMORY);
    cr_expect_eq(numbers, before);
    alloc_fail_after(0);
    cr_expect_eq(alloc_resize(&numbers, 8, sizeof *numbers), ODSI_ERR_NO_MEMORY);
    cr_expect_eq(numbers, before);
    cr_expect_eq(numbers[2], 2);
    cr_assert_eq(alloc_resize(&numbers, 0, sizeof *numbers), ODSI_OK);
    cr_expect_not_null(numbers);
    alloc_free(numbers);
}

Test(alloc, text_copies_a_part_and_ends_it)
{
    char *text = NULL;
    cr_assert_eq(alloc_text(&text, "layers", 5), ODSI_OK);
    cr_expect_str_eq(text, "layer");
    alloc_free(text);
    cr_assert_eq(alloc_text(&text, NULL, 0), ODSI_OK);
    cr_expect_str_eq(text, "");
    alloc_free(text);
}

/* Goal: the byte for the end must not wrap the size round to 0. */
Test(alloc, text_of_the_largest_size_is_refused)
{
    char *text = (char *)&text;
    cr_expect_eq(alloc_text(&text, "a", SIZE_MAX), ODSI_ERR_NO_MEMORY);
    cr_expect_null(text);
}

Test(alloc, the_test_hook_fails_exactly_the_chosen_call)
{
    void *memory[4];
    alloc_fail_after(2);
    for (size_t i = 0; i < 4; i++)
        cr_expect_eq(alloc_zeroed(&memory[i], 1, 1), i == 2 ? ODSI_ERR_NO_MEMORY : ODSI_OK);
    for (size_t i = 0; i < 4; i++)
        alloc_free(memory[i]);
    alloc_fail_after(0);
    alloc_fail_after(-1);
    cr_assert_eq(alloc_zeroed(&memory[0], 1, 1), ODSI_OK);
    alloc_free(memory[0]);
}

static void *allocate_often(void *context)
{
    atomic_int *refused = context;
    for (int i = 0; i < 1000; i++) {
        void *memory = NULL;
        if (alloc_aligned(&memory, 1, 1) != ODSI_OK)
            atomic_fetch_add(refused, 1);
        alloc_free(memory);
    }
    return NULL;
}

Test(alloc, the_test_hook_fails_one_call_of_all_threads_together)
{
    atomic_int refused = 0;
    pthread_t threads[4];
    alloc_fail_after(1500);
    for (int i = 0; i < 4; i++)
        cr_assert_eq(pthread_create(&threads[i], NULL, allocate_often, &refused), 0);
    for (int i = 0; i < 4; i++)
        pthread_join(threads[i], NULL);
    cr_expect_eq(atomic_load(&refused), 1);
}
