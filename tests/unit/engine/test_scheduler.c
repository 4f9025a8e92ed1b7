#include "worker/engine/scheduler.h"

#include <criterion/criterion.h>

static struct scheduler_item item(uint64_t arrival_us, uint64_t deadline_us, uint32_t token_count)
{
    return (struct scheduler_item){.arrival_us = arrival_us,
                                   .deadline_us = deadline_us,
                                   .token_count = token_count,
                                   .layer_first = 0,
                                   .layer_end = 4};
}

Test(scheduler, picks_nothing_from_nothing)
{
    uint32_t picked[1], order[1];
    cr_assert_eq(scheduler_pick(NULL, 0, 512, 64, picked, order), 0);
}

Test(scheduler, runs_the_earliest_deadline_first_and_then_the_oldest)
{
    const struct scheduler_item items[] = {item(1, SCHEDULER_NO_DEADLINE, 1), item(5, 900, 1),
                                           item(0, SCHEDULER_NO_DEADLINE, 1), item(9, 300, 1)};
    uint32_t picked[4], order[4];
    cr_assert_eq(scheduler_pick(items, 4, 512, 64, picked, order), 4);
    const uint32_t expected[] = {3, 1, 2, 0};
    cr_assert_arr_eq(picked, expected, sizeof expected);
}

Test(scheduler, fills_the_batch_with_what_still_fits)
{
    const struct scheduler_item items[] = {item(0, SCHEDULER_NO_DEADLINE, 500),
                                           item(1, SCHEDULER_NO_DEADLINE, 100),
                                           item(2, SCHEDULER_NO_DEADLINE, 12)};
    uint32_t picked[3], order[3];
    cr_assert_eq(scheduler_pick(items, 3, 512, 64, picked, order), 2);
    cr_assert_eq(picked[0], 0);
    cr_assert_eq(picked[1], 2);
}

Test(scheduler, never_mixes_layers_in_a_batch)
{
    struct scheduler_item items[] = {item(0, SCHEDULER_NO_DEADLINE, 1),
                                     item(1, SCHEDULER_NO_DEADLINE, 1),
                                     item(2, SCHEDULER_NO_DEADLINE, 1)};
    uint32_t picked[3], order[3];
    items[1].layer_end = 3;
    cr_assert_eq(scheduler_pick(items, 3, 512, 64, picked, order), 2);
    cr_assert_eq(picked[0], 0);
    cr_assert_eq(picked[1], 2);
}

Test(scheduler, keeps_to_the_number_of_steps)
{
    struct scheduler_item items[10];
    uint32_t picked[4], order[10];
    for (uint32_t i = 0; i < 10; i++)
        items[i] = item(10 - i, SCHEDULER_NO_DEADLINE, 1);
    cr_assert_eq(scheduler_pick(items, 10, 512, 4, picked, order), 4);
    cr_assert_eq(picked[0], 9);
}
