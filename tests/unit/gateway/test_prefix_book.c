#include "worker/gateway/prefix_book.h"

#include <criterion/criterion.h>
#include <string.h>

#define KEYS 20u

/* The keys of a text; texts of one branch begin with the same `common` keys. */
static void fill_keys(struct digest *keys, uint32_t common, uint32_t branch, uint32_t leaf)
{
    for (uint32_t i = 0; i < KEYS; i++) {
        const uint32_t name[3] = {branch, i, i < common ? 0 : leaf};
        digest_of(&keys[i], name, sizeof name);
    }
}

static void fill_path(struct prefix_book_stage *stages, uint32_t stage_count, uint8_t name)
{
    memset(stages, 0, stage_count * sizeof *stages);
    for (uint32_t i = 0; i < stage_count; i++) {
        stages[i].worker_id.bytes[0] = name;
        stages[i].worker_id.bytes[1] = (uint8_t)i;
        stages[i].layer_first = 2 * i;
        stages[i].layer_end = 2 * i + 2;
    }
}

static struct prefix_book *new_book(void)
{
    struct prefix_book *book = NULL;
    cr_assert_eq(prefix_book_open(&book), ODSI_OK);
    return book;
}

Test(prefix_book, finds_the_path_of_the_longest_beginning)
{
    struct prefix_book *book = new_book();
    struct prefix_book_stage stages[3];
    const struct prefix_book_stage *found = NULL;
    uint32_t count = 0;
    struct digest keys[KEYS];
    fill_keys(keys, 10, 1, 1);
    cr_expect_eq(prefix_book_find(book, keys, KEYS, &found, &count), 0);
    fill_path(stages, 3, 1);
    prefix_book_note(book, keys, 5, stages, 3);
    fill_path(stages, 2, 2);
    prefix_book_note(book, keys, 0, stages, 2);
    cr_expect_eq(prefix_book_find(book, keys, KEYS, &found, &count), 5);
    cr_expect_eq(count, 3);
    cr_expect_eq(found[2].worker_id.bytes[0], 1);
    cr_expect_eq(found[2].layer_end, 6);
    prefix_book_note(book, keys, KEYS, stages, 2);
    cr_expect_eq(prefix_book_find(book, keys, 12, &found, &count), 12);
    cr_expect_eq(count, 2, "the last one that was given it");
    fill_keys(keys, 10, 1, 2);
    cr_expect_eq(prefix_book_find(book, keys, KEYS, &found, &count), 10, "what is common");
    fill_keys(keys, 10, 2, 2);
    cr_expect_eq(prefix_book_find(book, keys, KEYS, &found, &count), 0);
    prefix_book_close(&book);
}

/* Goal: bounded, and no key ever leads to a path that was not its own. Method: many more paths and
 * keys than there is room for; what is found must be the path that was noted last for that text. */
Test(prefix_book, forgets_the_oldest_and_confuses_nothing)
{
    enum { TEXTS = 3000 };
    struct prefix_book *book = new_book();
    struct prefix_book_stage stages[2];
    const struct prefix_book_stage *found = NULL;
    struct digest keys[KEYS];
    uint32_t count = 0, known = 0;
    for (uint32_t i = 0; i < TEXTS; i++) {
        fill_keys(keys, KEYS, i, 0);
        fill_path(stages, 2, (uint8_t)(i % 100));
        prefix_book_note(book, keys, KEYS, stages, 2);
    }
    for (uint32_t i = 0; i < TEXTS; i++) {
        fill_keys(keys, KEYS, i, 0);
        if (prefix_book_find(book, keys, KEYS, &found, &count) == 0)
            continue;
        known++;
        cr_assert_eq(found[1].worker_id.bytes[0], i % 100, "text %u", i);
    }
    cr_expect_gt(known, PREFIX_BOOK_PATHS / 2);
    cr_expect_lt(known, TEXTS / 4);
    fill_keys(keys, KEYS, TEXTS - 1, 0);
    cr_expect_eq(prefix_book_find(book, keys, KEYS, &found, &count), KEYS, "the newest is there");
    prefix_book_close(&book);
}

Test(prefix_book, a_path_with_other_layers_is_another_path)
{
    struct prefix_book *book = new_book();
    struct prefix_book_stage stages[2];
    const struct prefix_book_stage *found = NULL;
    struct digest keys[KEYS];
    uint32_t count = 0;
    fill_keys(keys, KEYS, 1, 0);
    fill_path(stages, 2, 1);
    prefix_book_note(book, keys, KEYS, stages, 2);
    stages[0].layer_end = stages[1].layer_first = 1;
    prefix_book_note(book, keys, 3, stages, 2);
    cr_expect_eq(prefix_book_find(book, keys, 3, &found, &count), 3);
    cr_expect_eq(found[0].layer_end, 1);
    cr_expect_eq(prefix_book_find(book, keys, KEYS, &found, &count), KEYS);
    cr_expect_eq(found[0].layer_end, 2);
    prefix_book_close(&book);
}
