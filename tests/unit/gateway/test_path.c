#include "worker/gateway/path.h"

#include "tests/unit/gateway/gateway_fixture.h"

#include <criterion/criterion.h>
#include <string.h>

#define ROUNDS 3000u

static uint64_t cost_of(const struct path_stage *stages, uint32_t count,
                        const struct path_member *members)
{
    uint64_t cost = 0;
    for (uint32_t i = 0; i < count; i++)
        cost += path_stage_cost(&members[stages[i].member_index],
                                stages[i].layer_end - stages[i].layer_first);
    return cost;
}

/* The least cost of [layer, layer_count) by trying every member and every end; UINT64_MAX when
 * there is no way. Members of the set `used` may not come again; with once 0 all may. */
static uint64_t least_cost(const struct path_member *members, uint32_t count, uint32_t layer,
                           uint32_t layer_count, int once, uint32_t used)
{
    uint64_t best = layer == layer_count ? 0 : UINT64_MAX;
    for (uint32_t i = 0; i < count; i++) {
        if (members[i].layer_first > layer || members[i].layer_end <= layer || (used >> i & 1u))
            continue;
        for (uint32_t end = layer + 1; end <= members[i].layer_end && end <= layer_count; end++) {
            const uint64_t rest =
                least_cost(members, count, end, layer_count, once, once ? used | 1u << i : used);
            if (rest == UINT64_MAX)
                continue;
            const uint64_t cost = rest + path_stage_cost(&members[i], end - layer);
            best = cost < best ? cost : best;
        }
    }
    return best;
}

static int comes_twice(const struct path_stage *stages, uint32_t count)
{
    for (uint32_t i = 0; i < count; i++)
        for (uint32_t j = i + 1; j < count; j++)
            if (stages[i].member_index == stages[j].member_index)
                return 1;
    return 0;
}

static void expect_covers(const struct path_stage *stages, uint32_t count,
                          const struct path_member *members, uint32_t layer_count)
{
    uint32_t layer = 0;
    for (uint32_t i = 0; i < count; i++) {
        const struct path_member *member = &members[stages[i].member_index];
        cr_assert_eq(stages[i].layer_first, layer);
        cr_assert_gt(stages[i].layer_end, layer);
        cr_assert_leq(member->layer_first, stages[i].layer_first);
        cr_assert_geq(member->layer_end, stages[i].layer_end);
        layer = stages[i].layer_end;
    }
    cr_assert_eq(layer, layer_count);
    cr_assert_not(comes_twice(stages, count));
}

static uint32_t random_members(struct fixture_random *random, struct path_member *members,
                               uint32_t layer_count)
{
    const uint32_t count = 1 + fixture_random_below(random, 5);
    for (uint32_t i = 0; i < count; i++) {
        const uint32_t first = fixture_random_below(random, layer_count);
        members[i] = (struct path_member){
            .layer_first = first,
            .layer_end = first + 1 + fixture_random_below(random, layer_count - first),
            .layer_us = 1 + fixture_random_below(random, 1000000),
            .hop_us = 1 + fixture_random_below(random, 500000),
            .wait_us = fixture_random_below(random, 2) * fixture_random_below(random, 1000000),
        };
    }
    return count;
}

/* Goal: the path is the cheapest one, whatever the ranges. How: random small swarms against trying
 * everything. Costs are drawn from so many values that there are no ties; where the cheapest way
 * would use a worker twice (it then serves all in between itself), only the rules are checked. */
Test(path, is_as_cheap_as_trying_every_path)
{
    struct fixture_random random = {0x9E3779B97F4A7C15u};
    uint32_t cheapest = 0;
    uint32_t joined = 0;
    uint32_t missing = 0;
    for (uint32_t round = 0; round < ROUNDS; round++) {
        struct path_member members[5];
        struct path_stage stages[LIMIT_STAGES_MAX];
        uint32_t count = 0;
        const uint32_t layer_count = 1 + fixture_random_below(&random, 6);
        const uint32_t member_count = random_members(&random, members, layer_count);
        const uint64_t best = least_cost(members, member_count, 0, layer_count, 0, 0);
        const uint64_t once = least_cost(members, member_count, 0, layer_count, 1, 0);
        const enum odsi_err err =
            path_choose(stages, &count, members, member_count, layer_count, NULL);
        cr_assert_eq(err, best == UINT64_MAX ? ODSI_ERR_UNAVAILABLE : ODSI_OK, "round %u", round);
        missing += err != ODSI_OK;
        if (err != ODSI_OK)
            continue;
        expect_covers(stages, count, members, layer_count);
        const uint64_t cost = cost_of(stages, count, members);
        cheapest += best == once;
        joined += best != once;
        cr_assert(best == once ? cost == best : cost >= once, "round %u: %llu instead of %llu",
                  round, (unsigned long long)cost, (unsigned long long)best);
    }
    cr_expect_gt(cheapest, ROUNDS / 4);
    cr_expect_gt(joined, 0);
    cr_expect_gt(missing, ROUNDS / 10);
}

/* With random draws too, a path covers all layers, each worker once. */
Test(path, covers_all_layers_with_random_draws)
{
    struct fixture_random random = {7};
    const struct path_random chance = {fixture_random_next, &random};
    for (uint32_t round = 0; round < ROUNDS; round++) {
        struct path_member members[5];
        struct path_stage stages[LIMIT_STAGES_MAX];
        uint32_t count = 0;
        const uint32_t layer_count = 1 + fixture_random_below(&random, 6);
        const uint32_t member_count = random_members(&random, members, layer_count);
        if (path_choose(stages, &count, members, member_count, layer_count, &chance) == ODSI_OK)
            expect_covers(stages, count, members, layer_count);
    }
}

Test(path, uses_a_worker_once_even_when_a_cheaper_one_lies_inside_its_range)
{
    const struct path_member members[] = {
        {.layer_first = 0, .layer_end = 9, .layer_us = 1000, .hop_us = 1},
        {.layer_first = 3, .layer_end = 6, .layer_us = 1, .hop_us = 1},
    };
    struct path_stage stages[LIMIT_STAGES_MAX];
    uint32_t count = 0;
    cr_assert_eq(path_choose(stages, &count, members, 2, 9, NULL), ODSI_OK);
    cr_assert_eq(count, 1);
    cr_expect_eq(stages[0].member_index, 0);
    cr_expect_eq(stages[0].layer_end, 9);
}

Test(path, prefers_few_stages_and_idle_workers)
{
    const struct path_member members[] = {
        {.layer_first = 0, .layer_end = 4, .layer_us = 10, .hop_us = 50},
        {.layer_first = 4, .layer_end = 8, .layer_us = 10, .hop_us = 50},
        {.layer_first = 0, .layer_end = 8, .layer_us = 10, .hop_us = 50},
        {.layer_first = 0, .layer_end = 8, .layer_us = 10, .hop_us = 50, .wait_us = 500},
    };
    struct path_stage stages[LIMIT_STAGES_MAX];
    uint32_t count = 0;
    cr_assert_eq(path_choose(stages, &count, members, 4, 8, NULL), ODSI_OK);
    cr_assert_eq(count, 1);
    cr_expect_eq(stages[0].member_index, 2);
}

Test(path, takes_the_lower_index_on_a_tie_without_chance)
{
    const struct path_member members[] = {
        {.layer_first = 0, .layer_end = 8, .layer_us = 10, .hop_us = 50},
        {.layer_first = 0, .layer_end = 8, .layer_us = 10, .hop_us = 50},
    };
    struct path_stage stages[LIMIT_STAGES_MAX];
    uint32_t count = 0;
    cr_assert_eq(path_choose(stages, &count, members, 2, 8, NULL), ODSI_OK);
    cr_expect_eq(stages[0].member_index, 0);
}

/* Goal: equal replicas share the load. How: 4000 paths over 4 idle equals; a fair share is 1000. */
Test(path, spreads_sessions_over_equal_replicas)
{
    struct path_member members[4];
    struct fixture_random random = {99};
    const struct path_random chance = {fixture_random_next, &random};
    uint32_t chosen[4] = {0};
    for (uint32_t i = 0; i < 4; i++)
        members[i] = (struct path_member){.layer_end = 8, .layer_us = 100, .hop_us = 50};
    for (uint32_t round = 0; round < 4000; round++) {
        struct path_stage stages[LIMIT_STAGES_MAX];
        uint32_t count = 0;
        cr_assert_eq(path_choose(stages, &count, members, 4, 8, &chance), ODSI_OK);
        chosen[stages[0].member_index]++;
    }
    for (uint32_t i = 0; i < 4; i++)
        cr_expect(chosen[i] > 850 && chosen[i] < 1150, "replica %u: %u of 4000", i, chosen[i]);
}

/* Goal: of two drawn the less loaded serves: the most loaded of three is never taken. */
Test(path, never_takes_the_most_loaded_of_equals)
{
    struct path_member members[3];
    struct fixture_random random = {5};
    const struct path_random chance = {fixture_random_next, &random};
    uint32_t chosen[3] = {0};
    for (uint32_t i = 0; i < 3; i++)
        members[i] =
            (struct path_member){.layer_end = 8, .layer_us = 100, .hop_us = 50, .wait_us = 60 * i};
    for (uint32_t round = 0; round < 600; round++) {
        struct path_stage stages[LIMIT_STAGES_MAX];
        uint32_t count = 0;
        cr_assert_eq(path_choose(stages, &count, members, 3, 8, &chance), ODSI_OK);
        chosen[stages[0].member_index]++;
    }
    cr_expect_gt(chosen[0], 300);
    cr_expect_gt(chosen[1], 100);
    cr_expect_eq(chosen[2], 0);
}

Test(path, names_the_first_missing_layer)
{
    const struct path_member members[] = {
        {.layer_first = 0, .layer_end = 3, .layer_us = 1, .hop_us = 1},
        {.layer_first = 5, .layer_end = 6, .layer_us = 1, .hop_us = 1},
    };
    struct path_stage stages[LIMIT_STAGES_MAX];
    uint32_t count = 1;
    cr_assert_eq(path_choose(stages, &count, members, 2, 8, NULL), ODSI_ERR_UNAVAILABLE);
    cr_expect_eq(count, 0);
    cr_expect(strstr(odsi_err_text(), "layer 3 of 8"), "%s", odsi_err_text());
    cr_expect(strstr(odsi_err_text(), "3-4, 6-7"), "%s", odsi_err_text());
    cr_assert_eq(path_choose(stages, &count, NULL, 0, 1, NULL), ODSI_ERR_UNAVAILABLE);
}

Test(path, refuses_more_stages_than_the_protocol_has)
{
    struct path_member members[LIMIT_STAGES_MAX + 1];
    struct path_stage stages[LIMIT_STAGES_MAX];
    uint32_t count = 0;
    for (uint32_t i = 0; i <= LIMIT_STAGES_MAX; i++)
        members[i] = (struct path_member){.layer_first = i, .layer_end = i + 1, .layer_us = 1};
    cr_expect_eq(path_choose(stages, &count, members, LIMIT_STAGES_MAX, LIMIT_STAGES_MAX, NULL),
                 ODSI_OK);
    cr_expect_eq(count, LIMIT_STAGES_MAX);
    cr_expect_eq(
        path_choose(stages, &count, members, LIMIT_STAGES_MAX + 1, LIMIT_STAGES_MAX + 1, NULL),
        ODSI_ERR_RANGE);
    cr_expect_eq(path_choose(stages, &count, members, 1, 0, NULL), ODSI_ERR_RANGE);
    cr_expect_eq(path_choose(stages, &count, members, 1, LIMIT_LAYERS_MAX + 1, NULL),
                 ODSI_ERR_RANGE);
}

/* The largest costs of the largest model must not overflow. */
Test(path, adds_the_largest_costs_without_overflow)
{
    const struct path_member members[] = {{.layer_first = 0,
                                           .layer_end = LIMIT_LAYERS_MAX,
                                           .layer_us = UINT32_MAX,
                                           .hop_us = UINT32_MAX,
                                           .wait_us = UINT32_MAX},
                                          {.layer_first = 512,
                                           .layer_end = LIMIT_LAYERS_MAX,
                                           .layer_us = 1,
                                           .hop_us = UINT32_MAX,
                                           .wait_us = UINT32_MAX}};
    struct path_stage stages[LIMIT_STAGES_MAX];
    uint32_t count = 0;
    cr_assert_eq(path_choose(stages, &count, members, 2, LIMIT_LAYERS_MAX, NULL), ODSI_OK);
    cr_assert_eq(count, 2);
    cr_expect_eq(stages[1].member_index, 1);
    cr_expect_eq(stages[1].layer_first, 512);
}

Test(path, cuts_a_long_list_of_missing_layers)
{
    struct path_member members[20];
    char text[24];
    for (uint32_t i = 0; i < 20; i++)
        members[i] = (struct path_member){.layer_first = 2 * i, .layer_end = 2 * i + 1};
    cr_expect_eq(path_missing(text, sizeof text, members, 20, 40), 20);
    cr_expect_lt(strlen(text), sizeof text);
    cr_expect_str_eq(text, "1, 3, 5, 7, 9, 11...");
    cr_expect_eq(path_missing(text, sizeof text, members, 1, 1), 0);
    cr_expect_str_eq(text, "");
}
