#include "worker/cli/cli_memory.h"

#include "common/base/alloc.h"

#include <criterion/criterion.h>
#include <string.h>

/* Goal: a plausible figure, with sizes that do not divide evenly among threads. */
Test(cli_memory, measures_with_any_number_of_threads)
{
    for (uint32_t threads = 1; threads <= 3; threads++) {
        double gbps = 0;
        cr_assert_eq(cli_memory_read_gbps(&gbps, threads, (8u << 20) + 13), ODSI_OK);
        cr_expect_gt(gbps, 0.05, "%u threads: %f GB/s", threads, gbps);
        cr_expect_lt(gbps, 20000.0, "%u threads: %f GB/s", threads, gbps);
    }
}

/* Goal: what is freed again counts, and what was before the reset does not. */
Test(cli_memory, knows_its_peak_since_the_last_reset)
{
    const uint64_t size = 64u << 20;
    for (int round = 0; round < 2; round++) {
        char *memory = NULL;
        if (!cli_memory_peak_reset())
            cr_skip_test("this system keeps no peak that can be reset");
        const uint64_t before = cli_memory_peak();
        cr_expect_gt(before, 0);
        cr_assert_eq(alloc_aligned(&memory, size, 1), ODSI_OK);
        memset(memory, 1, size);
        alloc_free(memory);
        const uint64_t after = cli_memory_peak();
        cr_expect(after > before + size / 2 && after < before + 2 * size, "%llu, then %llu",
                  (unsigned long long)before, (unsigned long long)after);
    }
}

Test(cli_memory, tells_when_there_is_no_memory)
{
    for (long i = 0; i < 2; i++) {
        double gbps = 0;
        alloc_fail_after(i);
        cr_expect_eq(cli_memory_read_gbps(&gbps, 2, 1u << 20), ODSI_ERR_NO_MEMORY);
        alloc_fail_after(-1);
    }
}
