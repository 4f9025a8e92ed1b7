#include "worker/gateway/deadline.h"

#include "tests/unit/gateway/gateway_fixture.h"

#include <criterion/criterion.h>

static const struct deadline_stage stages[] = {
    {.token_ns = 50000, .step_us = 300, .network_us = 100},
    {.token_ns = 100000, .step_us = 600, .network_us = 100},
    {.token_ns = 50000, .step_us = 300, .network_us = 600},
};

Test(deadline, smooths_like_tcp)
{
    struct deadline_estimate estimate = {0};
    cr_expect_eq(deadline_estimate_bound_us(&estimate, 77), 77);
    deadline_estimate_add(&estimate, 1000);
    cr_expect_eq(estimate.mean_us, 1000);
    cr_expect_eq(deadline_estimate_bound_us(&estimate, 77), 3000);
    deadline_estimate_add(&estimate, 1800);
    cr_expect_eq(estimate.mean_us, 1100);
    cr_expect_eq(estimate.deviation_us, 575);
    for (int i = 0; i < 200; i++)
        deadline_estimate_add(&estimate, 5000);
    cr_expect(estimate.mean_us > 4900 && estimate.mean_us <= 5000, "%u", estimate.mean_us);
    cr_expect_lt(estimate.deviation_us, 100);
    deadline_estimate_add(&estimate, UINT32_MAX);
    cr_expect_gt(estimate.mean_us, 5000);
}

Test(deadline, expects_stages_to_work_side_by_side)
{
    cr_expect_eq(deadline_step_us(stages, 3), 2000);
    /* One chunk of 100: 5 ms, 10 ms, 5 ms, and the network. */
    cr_expect_eq(deadline_prefill_us(stages, 3, 100, 128), 20800);
    /* Four chunks: each further one waits for the slowest stage only. */
    cr_expect_eq(deadline_prefill_us(stages, 3, 400, 100), 20800 + 3 * 10100);
    cr_expect_eq(deadline_prefill_us(stages, 3, 1, 512), 2000);
}

/* Goal: shares never add up to more than there is, and grow with what is expected. */
Test(deadline, cuts_in_proportion_and_never_hands_out_more)
{
    struct fixture_random random = {3};
    for (int round = 0; round < 1000; round++) {
        const uint64_t left_us = 3 + fixture_random_below(&random, 100000000);
        const uint32_t steps = 1 + fixture_random_below(&random, 500);
        uint64_t prefill_us = 0;
        uint64_t step_us = 0;
        deadline_cut_answer(left_us, 20800, 2000, steps, &prefill_us, &step_us);
        if (left_us > 10 * steps)
            cr_assert_leq(prefill_us + step_us * (steps - 1), left_us + steps);
        uint64_t sum_us = 0;
        uint64_t shares_us[3];
        for (uint32_t i = 0; i < 3; i++) {
            shares_us[i] = deadline_stage_budget_us(left_us, stages, 3, i, 1);
            sum_us += shares_us[i];
            cr_assert_gt(shares_us[i], 0);
        }
        cr_assert_leq(sum_us, left_us + 3);
        cr_assert_leq(shares_us[0], shares_us[1]);
        cr_assert_leq(shares_us[1], shares_us[2]);
    }
}

Test(deadline, never_hands_out_zero_which_would_mean_none)
{
    uint64_t prefill_us = 0;
    uint64_t step_us = 0;
    deadline_cut_answer(1, 20800, 2000, 500, &prefill_us, &step_us);
    cr_expect_eq(prefill_us, 1);
    cr_expect_eq(step_us, 1);
    cr_expect_eq(deadline_stage_budget_us(0, stages, 3, 0, 1), 1);
    deadline_cut_answer(UINT64_MAX / 2, UINT64_MAX / 4, 1, 1, &prefill_us, &step_us);
    cr_expect_gt(prefill_us, UINT64_MAX / 4);
}
