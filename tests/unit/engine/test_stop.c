#include "worker/engine/stop.h"

#include <criterion/criterion.h>
#include <stdlib.h>
#include <string.h>

Test(stop, finds_a_string_across_pieces)
{
    struct stop stop = {0};
    cr_assert_eq(stop_add(&stop, "the end", 7), ODSI_OK);
    cr_assert_eq(stop_feed(&stop, "this is th", 10), 0);
    cr_assert_eq(stop_feed(&stop, "e e", 3), 0);
    cr_assert_eq(stop_feed(&stop, "nd.", 3), 1);
}

Test(stop, knows_nothing_without_strings)
{
    struct stop stop = {0};
    cr_assert_eq(stop_feed(&stop, "anything", 8), 0);
}

Test(stop, refuses_empty_long_and_too_many_strings)
{
    struct stop stop = {0};
    char text[LIMIT_STOP_SIZE + 1];
    memset(text, 'a', sizeof text);
    cr_expect_eq(stop_add(&stop, "", 0), ODSI_ERR_INVALID);
    cr_expect_eq(stop_add(&stop, text, sizeof text), ODSI_ERR_INVALID);
    for (uint32_t i = 0; i < LIMIT_STOP_COUNT; i++)
        cr_expect_eq(stop_add(&stop, text, LIMIT_STOP_SIZE), ODSI_OK);
    cr_expect_eq(stop_add(&stop, text, 1), ODSI_ERR_INVALID);
}

/* Goal: a match is found exactly when the text so far contains the string, however it is cut.
 * Method: random texts of two letters in random pieces against memmem. */
Test(stop, agrees_with_a_plain_search_however_the_text_is_cut)
{
    const unsigned seed = 20240611;
    srandom(seed);
    for (int round = 0; round < 3000; round++) {
        struct stop stop = {0};
        char text[40], needle[6];
        const size_t size = (size_t)(random() % 40), needle_size = 1 + (size_t)(random() % 5);
        for (size_t i = 0; i < size; i++)
            text[i] = (char)('a' + random() % 2);
        for (size_t i = 0; i < needle_size; i++)
            needle[i] = (char)('a' + random() % 2);
        cr_assert_eq(stop_add(&stop, needle, needle_size), ODSI_OK);
        int found = 0;
        for (size_t at = 0; at < size && !found;) {
            size_t piece = 1 + (size_t)(random() % 4);
            if (piece > size - at)
                piece = size - at;
            found = stop_feed(&stop, text + at, piece);
            at += piece;
            cr_assert_eq(found, memmem(text, at, needle, needle_size) != NULL, "seed %u round %d",
                         seed, round);
        }
    }
}
