#include "worker/cli/cli_memory.h"

#include "common/base/alloc.h"

#include <criterion/criterion.h>

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

Test(cli_memory, tells_when_there_is_no_memory)
{
    for (long i = 0; i < 2; i++) {
        double gbps = 0;
        alloc_fail_after(i);
        cr_expect_eq(cli_memory_read_gbps(&gbps, 2, 1u << 20), ODSI_ERR_NO_MEMORY);
        alloc_fail_after(-1);
    }
}
