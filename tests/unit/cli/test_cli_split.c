#include "worker/cli/cli_split.h"

#include <criterion/criterion.h>
#include <stdio.h>
#include <string.h>

/* Goal: for every pair of counts the spans follow each other over all layers, differ by one at
 * most, and the longer ones come first. */
Test(cli_split, balanced_spans_cover_all_layers_evenly)
{
    struct cli_span spans[LIMIT_STAGES_MAX];
    for (uint32_t layers = 1; layers <= 140; layers++) {
        for (uint32_t shards = 1; shards <= layers && shards <= LIMIT_STAGES_MAX; shards++) {
            uint32_t next = 0;
            cr_assert_eq(cli_split_balanced(spans, layers, shards), ODSI_OK);
            for (uint32_t i = 0; i < shards; i++) {
                const uint32_t size = spans[i].layer_end - spans[i].layer_first;
                cr_assert_eq(spans[i].layer_first, next);
                cr_assert(size == layers / shards || size == layers / shards + 1);
                cr_assert(i == 0 || size <= spans[0].layer_end);
                next = spans[i].layer_end;
            }
            cr_assert_eq(next, layers, "%u layers in %u shards", layers, shards);
        }
    }
}

Test(cli_split, refuses_more_shards_than_layers)
{
    struct cli_span spans[LIMIT_STAGES_MAX];
    cr_expect_eq(cli_split_balanced(spans, 6, 7), ODSI_ERR_INVALID);
    cr_expect_eq(cli_split_balanced(spans, 6, 0), ODSI_ERR_INVALID);
    cr_expect_eq(cli_split_balanced(spans, LIMIT_LAYERS_MAX, LIMIT_STAGES_MAX + 1),
                 ODSI_ERR_INVALID);
}

Test(cli_split, reads_where_to_cut)
{
    struct cli_span spans[LIMIT_STAGES_MAX];
    uint32_t count = 0;
    cr_assert_eq(cli_split_read(spans, &count, 6, "0-2,3,4-5"), ODSI_OK);
    cr_assert_eq(count, 3);
    cr_expect_eq(spans[0].layer_first, 0);
    cr_expect_eq(spans[0].layer_end, 3);
    cr_expect_eq(spans[1].layer_first, 3);
    cr_expect_eq(spans[1].layer_end, 4);
    cr_expect_eq(spans[2].layer_first, 4);
    cr_expect_eq(spans[2].layer_end, 6);
}

Test(cli_split, refuses_gaps_overlaps_and_layers_that_are_not_there)
{
    const char *const bad[] = {"",        "0-2",  "0-1,3-5",  "0-3,3-5", "1-5",  "0-5,6-6",
                               "0-2;3-5", "0-2,", "0-2,3-5,", "3-5,0-2", "0-5 ", "0-2,3-5x"};
    struct cli_span spans[LIMIT_STAGES_MAX];
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        uint32_t count = 0;
        cr_expect_eq(cli_split_read(spans, &count, 6, bad[i]), ODSI_ERR_INVALID, "'%s'", bad[i]);
    }
}

/* Goal: the fixed array is never overrun, however many ranges a flag has. */
Test(cli_split, refuses_more_ranges_than_a_path_has_stages)
{
    struct cli_span spans[LIMIT_STAGES_MAX];
    char text[8 * (LIMIT_STAGES_MAX + 1)] = "";
    size_t size = 0;
    uint32_t count = 0;
    for (uint32_t i = 0; i <= LIMIT_STAGES_MAX; i++)
        size += (size_t)snprintf(text + size, sizeof text - size, "%s%u", i ? "," : "", i);
    cr_expect_eq(cli_split_read(spans, &count, LIMIT_STAGES_MAX + 1, text), ODSI_ERR_INVALID);
    *strrchr(text, ',') = '\0';
    cr_expect_eq(cli_split_read(spans, &count, LIMIT_STAGES_MAX, text), ODSI_OK);
    cr_expect_eq(count, LIMIT_STAGES_MAX);
}
