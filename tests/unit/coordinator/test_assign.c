#include "coordinator/assign.h"

#include "common/base/alloc.h"
#include "common/base/limits.h"
#include "tests/unit/coordinator/coordinator_fixture.h"

#include <criterion/criterion.h>

#define RANGES_MAX 256u

static void expect_choice(const struct assign_range *ranges, size_t count, uint32_t layer_count,
                          uint32_t capacity, uint32_t first, uint32_t end)
{
    uint32_t got_first = 0;
    uint32_t got_end = 0;
    cr_assert_eq(assign_choose(&got_first, &got_end, ranges, count, layer_count, capacity),
                 ODSI_OK);
    cr_expect(got_first == first && got_end == end, "[%u, %u) instead of [%u, %u)", got_first,
              got_end, first, end);
}

static uint32_t unserved_in(const struct assign_range *ranges, size_t count, uint32_t first,
                            uint32_t end)
{
    uint32_t unserved = 0;
    for (uint32_t layer = first; layer < end; layer++) {
        int served = 0;
        for (size_t i = 0; i < count; i++)
            served |= ranges[i].first <= layer && layer < ranges[i].end;
        unserved += !served;
    }
    return unserved;
}

Test(assign, gives_everything_to_who_can_hold_everything)
{
    expect_choice(NULL, 0, 12, 12, 0, 12);
    expect_choice(NULL, 0, 12, 99, 0, 12);
    expect_choice((struct assign_range[]){{0, 12, 5.0f}}, 1, 12, 4000000000u, 0, 12);
}

Test(assign, fills_the_layers_nobody_serves_from_the_lowest)
{
    expect_choice(NULL, 0, 12, 5, 0, 5);
    expect_choice((struct assign_range[]){{0, 5, 1}}, 1, 12, 5, 5, 10);
    expect_choice((struct assign_range[]){{0, 5, 1}, {5, 10, 1}}, 2, 12, 5, 7, 12);
}

Test(assign, leaves_a_long_gap_whole_when_a_short_one_is_enough)
{
    const struct assign_range middle = {5, 7, 1};
    expect_choice(&middle, 1, 10, 3, 7, 10);
    expect_choice((struct assign_range[]){middle, {7, 10, 1}}, 2, 10, 5, 0, 5);
}

Test(assign, overlaps_served_layers_as_little_as_it_can)
{
    /* Only layer 6 is unserved; of the windows of 3 around it, [4, 7) meets the fewest holders. */
    const struct assign_range ranges[] = {{0, 6, 1}, {7, 12, 1}, {7, 12, 1}};
    expect_choice(ranges, 3, 12, 3, 4, 7);
}

Test(assign, strengthens_the_slowest_layers_once_all_are_served)
{
    const struct assign_range ranges[] = {{0, 4, 50.0f}, {4, 8, 10.0f}, {8, 12, 50.0f}};
    expect_choice(ranges, 3, 12, 4, 4, 8);
    /* Speeds of replicas add up, so now the slow stage is the first. */
    const struct assign_range more[] = {{0, 4, 50.0f},  {4, 8, 10.0f},  {4, 8, 60.0f},
                                        {8, 12, 20.0f}, {8, 12, 31.0f}, {0, 4, 0.0f}};
    expect_choice(more, 6, 12, 2, 0, 2);
}

Test(assign, adds_a_second_replica_where_there_is_only_one)
{
    const struct assign_range ranges[] = {{0, 6, 1.0f}, {0, 6, 1.0f}, {6, 12, 99.0f}};
    expect_choice(ranges, 3, 12, 6, 6, 12);
}

/* Goal: however workers of whatever capacity come, if together they can hold the model then all
 * of it is served, and nobody comes who serves less than he could have.
 * Method: random models and capacities, members joining one by one until the sum is enough. */
Test(assign, serves_every_layer_whenever_capacities_sum_to_the_model)
{
    const uint64_t seed = 0x0d51a551;
    struct fixture_random random = {seed};
    for (int round = 0; round < 3000; round++) {
        const uint32_t layer_count = 1 + fixture_below(&random, 128);
        const uint32_t capacity_max = 1 + fixture_below(&random, layer_count);
        struct assign_range ranges[RANGES_MAX];
        uint32_t sum = 0;
        size_t count = 0;
        while (sum < layer_count) {
            const uint32_t capacity = 1 + fixture_below(&random, capacity_max);
            struct assign_range *range = &ranges[count];
            cr_assert_eq(
                assign_choose(&range->first, &range->end, ranges, count, layer_count, capacity),
                ODSI_OK);
            cr_assert_eq(range->end - range->first, capacity, "seed %#llx round %d",
                         (unsigned long long)seed, round);
            range->speed = (float)fixture_below(&random, 100);
            count++;
            sum += capacity;
        }
        cr_assert_eq(unserved_in(ranges, count, 0, layer_count), 0, "seed %#llx round %d",
                     (unsigned long long)seed, round);
    }
}

/* Goal: between ranges that members chose themselves, each one that joins serves as many unserved
 * layers as any window of its capacity could.
 * Method: random ranges; the choice compared with every window. */
Test(assign, serves_as_many_new_layers_as_any_window_could)
{
    const uint64_t seed = 0x5eedba5e;
    struct fixture_random random = {seed};
    for (int round = 0; round < 5000; round++) {
        const uint32_t layer_count = 2 + fixture_below(&random, 40);
        const size_t count = fixture_below(&random, 6);
        struct assign_range ranges[8];
        for (size_t i = 0; i < count; i++) {
            ranges[i].first = fixture_below(&random, layer_count);
            ranges[i].end =
                ranges[i].first + 1 + fixture_below(&random, layer_count - ranges[i].first);
            ranges[i].speed = (float)fixture_below(&random, 3);
        }
        const uint32_t capacity = 1 + fixture_below(&random, layer_count);
        uint32_t first = 0;
        uint32_t end = 0;
        cr_assert_eq(assign_choose(&first, &end, ranges, count, layer_count, capacity), ODSI_OK);
        cr_assert(first < end && end <= layer_count && end - first == capacity);
        const uint32_t got = unserved_in(ranges, count, first, end);
        for (uint32_t at = 0; at + capacity <= layer_count; at++)
            cr_assert_geq(got, unserved_in(ranges, count, at, at + capacity),
                          "seed %#llx round %d: [%u, %u)", (unsigned long long)seed, round, first,
                          end);
    }
}

Test(assign, refuses_what_makes_no_sense)
{
    uint32_t first = 0;
    uint32_t end = 0;
    const struct assign_range outside[] = {{3, 13, 1}, {5, 5, 1}, {6, 5, 1}, {0, 4000000000u, 1}};
    cr_expect_eq(assign_choose(&first, &end, NULL, 0, 0, 1), ODSI_ERR_INVALID);
    cr_expect_eq(assign_choose(&first, &end, NULL, 0, 12, 0), ODSI_ERR_INVALID);
    cr_expect_eq(assign_choose(&first, &end, NULL, 0, LIMIT_LAYERS_MAX + 1, 1), ODSI_ERR_INVALID);
    for (size_t i = 0; i < 4; i++)
        cr_expect_eq(assign_choose(&first, &end, &outside[i], 1, 12, 1), ODSI_ERR_INVALID);
}

Test(assign, says_when_there_is_no_memory)
{
    uint32_t first = 0;
    uint32_t end = 0;
    alloc_fail_after(0);
    cr_expect_eq(assign_choose(&first, &end, NULL, 0, 12, 1), ODSI_ERR_NO_MEMORY);
    alloc_fail_after(-1);
}
