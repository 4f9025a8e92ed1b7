#include "worker/engine/scheduler.h"

#include <criterion/criterion.h>

static const struct scheduler_limits whole = {512, 64, 512};

static struct scheduler_item item(uint64_t arrival_us, uint64_t deadline_us, uint32_t token_count)
{
    return (struct scheduler_item){.arrival_us = arrival_us,
                                   .deadline_us = deadline_us,
                                   .token_count = token_count,
                                   .layer_first = 0,
                                   .layer_end = 4};
}

static void expect_choices(const struct scheduler_choice *picked, uint32_t count,
                           const uint32_t (*expected)[2])
{
    for (uint32_t i = 0; i < count; i++) {
        cr_expect_eq(picked[i].index, expected[i][0], "place %u: item %u", i, picked[i].index);
        cr_expect_eq(picked[i].token_count, expected[i][1], "place %u: %u positions", i,
                     picked[i].token_count);
    }
}

Test(scheduler, picks_nothing_from_nothing)
{
    struct scheduler_choice picked[64];
    uint32_t order[1];
    cr_assert_eq(scheduler_pick(NULL, 0, &whole, picked, order), 0);
}

Test(scheduler, runs_the_earliest_deadline_first_and_then_the_oldest)
{
    const struct scheduler_item items[] = {item(1, SCHEDULER_NO_DEADLINE, 1), item(5, 900, 1),
                                           item(0, SCHEDULER_NO_DEADLINE, 1), item(9, 300, 1)};
    struct scheduler_choice picked[64];
    uint32_t order[4];
    cr_assert_eq(scheduler_pick(items, 4, &whole, picked, order), 4);
    expect_choices(picked, 4, (const uint32_t[][2]){{3, 1}, {1, 1}, {2, 1}, {0, 1}});
}

Test(scheduler, fills_the_batch_with_short_steps_and_then_a_piece_of_what_is_long)
{
    const struct scheduler_item items[] = {
        item(0, SCHEDULER_NO_DEADLINE, 400), item(1, SCHEDULER_NO_DEADLINE, 300),
        item(2, SCHEDULER_NO_DEADLINE, 8), item(3, SCHEDULER_NO_DEADLINE, 100)};
    struct scheduler_choice picked[64];
    uint32_t order[4];
    cr_assert_eq(scheduler_pick(items, 4, &whole, picked, order), 3);
    expect_choices(picked, 3, (const uint32_t[][2]){{0, 400}, {2, 8}, {1, 104}});
}

/* Goal: while answers are being written a prompt gets a bounded piece of each batch, and answers
 * are in every batch. */
Test(scheduler, cuts_prompts_to_what_the_caller_allows)
{
    const struct scheduler_limits cut = {512, 64, 64};
    struct scheduler_item items[] = {item(0, SCHEDULER_NO_DEADLINE, 500),
                                     item(1, SCHEDULER_NO_DEADLINE, 500),
                                     item(2, SCHEDULER_NO_DEADLINE, 1)};
    struct scheduler_choice picked[64];
    uint32_t order[3];
    cr_assert_eq(scheduler_pick(items, 3, &cut, picked, order), 2);
    expect_choices(picked, 2, (const uint32_t[][2]){{0, 64}, {2, 1}});
    items[0].token_count = 20;
    cr_assert_eq(scheduler_pick(items, 3, &cut, picked, order), 3);
    expect_choices(picked, 3, (const uint32_t[][2]){{0, 20}, {2, 1}, {1, 44}});
}

/* Goal: answers without end keep no prompt out. Method: more short steps than a batch has room
 * for, by positions and by steps; the prompt came first. */
Test(scheduler, the_first_step_is_always_in_the_batch)
{
    const struct scheduler_limits narrow = {16, 64, 16}, few = {512, 3, 512};
    struct scheduler_item items[9];
    struct scheduler_choice picked[64];
    uint32_t order[9];
    items[0] = item(0, SCHEDULER_NO_DEADLINE, 100);
    for (uint32_t i = 1; i < 9; i++)
        items[i] = item(i, SCHEDULER_NO_DEADLINE, 5);
    cr_assert_eq(scheduler_pick(items, 9, &narrow, picked, order), 4);
    expect_choices(picked, 4, (const uint32_t[][2]){{0, 1}, {1, 5}, {2, 5}, {3, 5}});
    cr_assert_eq(scheduler_pick(items, 9, &few, picked, order), 3);
    expect_choices(picked, 3, (const uint32_t[][2]){{0, 100}, {1, 5}, {2, 5}});
}

Test(scheduler, a_short_step_runs_as_a_whole_or_not_at_all)
{
    const struct scheduler_limits narrow = {12, 64, 12};
    const struct scheduler_item items[] = {item(0, SCHEDULER_NO_DEADLINE, 8),
                                           item(1, SCHEDULER_NO_DEADLINE, 5),
                                           item(2, SCHEDULER_NO_DEADLINE, 4)};
    struct scheduler_choice picked[64];
    uint32_t order[3];
    cr_assert_eq(scheduler_pick(items, 3, &narrow, picked, order), 2);
    expect_choices(picked, 2, (const uint32_t[][2]){{0, 8}, {2, 4}});
}

Test(scheduler, never_mixes_layers_in_a_batch)
{
    struct scheduler_item items[] = {item(0, SCHEDULER_NO_DEADLINE, 1),
                                     item(1, SCHEDULER_NO_DEADLINE, 1),
                                     item(2, SCHEDULER_NO_DEADLINE, 100)};
    struct scheduler_choice picked[64];
    uint32_t order[3];
    items[1].layer_end = 3;
    cr_assert_eq(scheduler_pick(items, 3, &whole, picked, order), 2);
    expect_choices(picked, 2, (const uint32_t[][2]){{0, 1}, {2, 100}});
}

Test(scheduler, keeps_to_the_number_of_steps)
{
    const struct scheduler_limits few = {512, 4, 512};
    struct scheduler_item items[10];
    struct scheduler_choice picked[4];
    uint32_t order[10];
    for (uint32_t i = 0; i < 10; i++)
        items[i] = item(10 - i, SCHEDULER_NO_DEADLINE, 1);
    cr_assert_eq(scheduler_pick(items, 10, &few, picked, order), 4);
    expect_choices(picked, 4, (const uint32_t[][2]){{9, 1}, {8, 1}, {7, 1}, {6, 1}});
}
