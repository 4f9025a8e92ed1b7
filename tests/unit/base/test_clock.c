#include "common/base/clock.h"

#include <criterion/criterion.h>
#include <time.h>

Test(clock, monotonic_time_never_goes_back)
{
    uint64_t before = clock_monotonic_us();
    for (int i = 0; i < 10000; i++) {
        const uint64_t now = clock_monotonic_us();
        cr_assert_geq(now, before);
        before = now;
    }
}

Test(clock, the_system_clock_counts_microseconds)
{
    struct clock clock = clock_system();
    struct timespec now;
    const uint64_t before_us = clock_now_us(&clock);
    clock_gettime(CLOCK_MONOTONIC, &now);
    const uint64_t between_us = (uint64_t)now.tv_sec * 1000000u + (uint64_t)now.tv_nsec / 1000u;
    const uint64_t after_us = clock_now_us(&clock);
    cr_expect_leq(before_us, between_us);
    cr_expect_leq(between_us, after_us);
}

Test(clock, unix_time_is_that_of_the_calendar)
{
    const uint64_t before = (uint64_t)time(NULL);
    const uint64_t now_us = clock_unix_us();
    /* time() may lag the precise clock by one tick. */
    cr_expect_geq(now_us / 1000000u, before);
    cr_expect_leq(now_us / 1000000u, (uint64_t)time(NULL) + 1);
}

Test(clock, a_manual_clock_moves_only_by_hand)
{
    uint64_t now_us = 5;
    const struct clock clock = clock_manual(&now_us);
    cr_expect_eq(clock_now_us(&clock), 5);
    cr_expect_eq(clock_now_us(&clock), 5);
    now_us += 1000000;
    cr_expect_eq(clock_now_us(&clock), 1000005);
}
