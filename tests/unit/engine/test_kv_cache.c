/* The paged KV cache: what is shared, copied, evicted and counted. Pages hold one number for each
 * position, which says which text it was computed for. */
#include "worker/engine/kv_cache.h"

#include "common/base/clock.h"
#include "worker/engine/prefix_key.h"

#include <criterion/criterion.h>
#include <stdlib.h>
#include <string.h>

#define TEXT_MAX (8u * KV_PAGE_TOKENS)
#define SESSIONS 12u

struct fixture {
    struct backend *backend;
    struct kv_cache *cache;
};

static void set_up(struct fixture *f, uint32_t page_count)
{
    const struct backend_config config = {.name = "scalar", .thread_count = 1};
    cr_assert_eq(backend_open(&f->backend, &config), ODSI_OK);
    cr_assert_eq(kv_cache_open(&f->cache, f->backend, page_count, 2, 1, 2), ODSI_OK);
}

static void tear_down(struct fixture *f)
{
    kv_cache_close(&f->cache);
    backend_close(&f->backend);
}

/* A text by its tokens, and the keys of its whole pages. */
struct text {
    uint32_t tokens[TEXT_MAX];
    uint32_t count;
    struct digest keys[TEXT_MAX / KV_PAGE_TOKENS];
    uint32_t key_count;
};

static void make_keys(struct text *text)
{
    struct digest seed = {{0}}, keys[TEXT_MAX / KV_PAGE_TOKENS];
    text->key_count = text->count / KV_PAGE_TOKENS;
    prefix_key_chain(keys, &seed, text->tokens, text->key_count);
    prefix_key_pages(text->keys, &seed, 0, 2, keys, text->key_count);
}

/* Texts of the same branch begin alike: with so many tokens from one source. */
static void make_text(struct text *text, uint32_t count, uint32_t common, uint32_t branch,
                      uint32_t leaf)
{
    text->count = count;
    for (uint32_t i = 0; i < count; i++)
        text->tokens[i] = i < common ? 1000 * branch + i : 100000 * (leaf + 1) + i;
    make_keys(text);
}

struct session {
    struct kv_table table;
    struct text text;
    uint32_t length;
    uint32_t publish_max; /* keys still true of what it computes */
};

static uint16_t *slot(const struct fixture *f, const struct session *session, uint32_t position,
                      uint32_t plane)
{
    const uint32_t page = session->table.pages[position / KV_PAGE_TOKENS];
    return kv_cache_pool(f->cache)->pages_dev +
           (((size_t)page * 4 + plane) * KV_PAGE_TOKENS + position % KV_PAGE_TOKENS) * 2;
}

/* What stands for the keys and values of a position: depends on all tokens up to it. */
static uint16_t value_of(const struct text *text, uint32_t position)
{
    uint32_t sum = 2166136261u;
    for (uint32_t i = 0; i <= position; i++)
        sum = (sum ^ text->tokens[i]) * 16777619u;
    return (uint16_t)(sum >> 11);
}

static void run_to(struct fixture *f, struct session *session, uint32_t length)
{
    for (; session->length < length; session->length++)
        for (uint32_t plane = 0; plane < 4; plane++)
            slot(f, session, session->length, plane)[1] =
                (uint16_t)(value_of(&session->text, session->length) + plane);
    while (session->table.shared_count < session->publish_max &&
           (session->table.shared_count + 1) * KV_PAGE_TOKENS <= session->length)
        cr_assert(kv_cache_publish(f->cache, &session->table,
                                   &session->text.keys[session->table.shared_count]));
}

static void expect_own_text(const struct fixture *f, const struct session *session)
{
    for (uint32_t i = 0; i < session->length; i++)
        for (uint32_t plane = 0; plane < 4; plane++)
            cr_assert_eq(*(slot(f, session, i, plane) + 1),
                         (uint16_t)(value_of(&session->text, i) + plane), "position %u", i);
}

static enum odsi_err open_session(struct fixture *f, struct session *session, uint32_t limit)
{
    session->publish_max = session->text.key_count;
    return kv_cache_take(f->cache, &session->table, limit, session->text.keys,
                         session->text.key_count, session->text.count ? session->text.count - 1 : 0,
                         &session->length);
}

Test(kv_cache, a_second_session_of_the_same_prompt_computes_one_position)
{
    struct fixture f;
    struct session first = {0}, second = {0}, longer = {0}, other = {0};
    set_up(&f, 16);
    make_text(&first.text, 3 * 64, 3 * 64, 1, 0);
    cr_assert_eq(open_session(&f, &first, 4 * 64), ODSI_OK);
    cr_expect_eq(first.length, 0);
    run_to(&f, &first, 3 * 64);
    cr_expect_eq(kv_cache_free_pages(f.cache), 12);

    make_text(&second.text, 3 * 64, 3 * 64, 1, 0);
    cr_assert_eq(open_session(&f, &second, 4 * 64), ODSI_OK);
    cr_expect_eq(second.length, 3 * 64 - 1, "the last one is left to compute");
    cr_expect_eq(second.table.shared_count, 2, "the third page is a copy");
    cr_expect_eq(kv_cache_free_pages(f.cache), 10, "two of its four pages are shared");
    expect_own_text(&f, &second);
    run_to(&f, &second, 3 * 64);
    cr_expect_eq(second.table.pages[2], first.table.pages[2], "equal again, so one goes");
    cr_expect_eq(kv_cache_free_pages(f.cache), 11);

    make_text(&longer.text, 3 * 64 + 10, 3 * 64, 1, 5);
    cr_assert_eq(open_session(&f, &longer, 4 * 64), ODSI_OK);
    cr_expect_eq(longer.length, 3 * 64);
    make_text(&other.text, 3 * 64, 100, 1, 7);
    cr_assert_eq(open_session(&f, &other, 3 * 64), ODSI_OK);
    cr_expect_eq(other.length, 64, "whole pages only");
    kv_cache_give(f.cache, &first.table);
    kv_cache_give(f.cache, &second.table);
    kv_cache_give(f.cache, &longer.table);
    kv_cache_give(f.cache, &other.table);
    cr_expect_eq(kv_cache_free_pages(f.cache), 16, "cached pages count as free");
    cr_expect_eq(kv_cache_cached_pages(f.cache), 3);
    tear_down(&f);
}

/* Goal: what is kept is given up from the end and the oldest first, and never a running session's.
 * Method: room for six pages; two texts of two pages are kept, a third session needs five. */
Test(kv_cache, evicts_the_oldest_leaf_first_and_nothing_that_runs)
{
    struct fixture f;
    struct session old = {0}, young = {0}, big = {0}, again = {0};
    set_up(&f, 6);
    make_text(&old.text, 128, 128, 1, 0);
    make_text(&young.text, 128, 128, 2, 0);
    cr_assert_eq(open_session(&f, &old, 128), ODSI_OK);
    cr_assert_eq(open_session(&f, &young, 128), ODSI_OK);
    run_to(&f, &old, 128);
    run_to(&f, &young, 128);
    kv_cache_give(f.cache, &old.table);
    kv_cache_give(f.cache, &young.table);
    cr_expect_eq(kv_cache_cached_pages(f.cache), 4);
    make_text(&big.text, 10, 10, 3, 0);
    cr_assert_eq(open_session(&f, &big, 3 * 64), ODSI_OK);
    cr_expect_eq(kv_cache_cached_pages(f.cache), 3, "one leaf of the old text is gone");
    again = old;
    cr_assert_eq(open_session(&f, &again, 128), ODSI_OK);
    cr_expect_eq(again.length, 64, "its first page is still there");
    cr_expect_eq(open_session(&f, &old, 4 * 64), ODSI_ERR_BUSY);
    cr_expect_eq(old.table.page_count, 0);
    expect_own_text(&f, &again);
    kv_cache_give(f.cache, &again.table);
    again = young;
    cr_assert_eq(open_session(&f, &again, 128), ODSI_OK);
    cr_expect_eq(again.length, 64, "its leaf was the next oldest");
    expect_own_text(&f, &again);
    kv_cache_give(f.cache, &again.table);
    kv_cache_give(f.cache, &big.table);
    cr_expect_eq(kv_cache_take(f.cache, &big.table, 7 * 64, NULL, 0, 0, &big.length),
                 ODSI_ERR_RANGE);
    tear_down(&f);
}

/* Goal: a session that goes back into what it shares changes nothing for the others. */
Test(kv_cache, going_back_into_a_shared_page_writes_to_a_copy)
{
    struct fixture f;
    struct session first = {0}, second = {0};
    set_up(&f, 8);
    make_text(&first.text, 200, 200, 1, 0);
    cr_assert_eq(open_session(&f, &first, 200), ODSI_OK);
    run_to(&f, &first, 200);
    make_text(&second.text, 200, 200, 1, 0);
    cr_assert_eq(open_session(&f, &second, 200), ODSI_OK);
    cr_expect_eq(second.length, 192);
    cr_assert_eq(kv_cache_truncate(f.cache, &second.table, 100), ODSI_OK);
    second.length = 100;
    second.publish_max = 1;
    cr_expect_eq(second.table.shared_count, 1);
    expect_own_text(&f, &second);
    make_text(&second.text, 200, 100, 1, 9);
    run_to(&f, &second, 200);
    expect_own_text(&f, &second);
    expect_own_text(&f, &first);
    kv_cache_give(f.cache, &second.table);
    kv_cache_give(f.cache, &first.table);
    tear_down(&f);
}

/* Goal: going back needs memory of its own, and without it nothing changes. */
Test(kv_cache, going_back_without_room_is_refused_and_changes_nothing)
{
    struct fixture f;
    struct session first = {0}, second = {0};
    set_up(&f, 5);
    make_text(&first.text, 200, 200, 1, 0);
    cr_assert_eq(open_session(&f, &first, 200), ODSI_OK);
    run_to(&f, &first, 200);
    second = first;
    memset(&second.table, 0, sizeof second.table);
    cr_assert_eq(open_session(&f, &second, 200), ODSI_OK);
    cr_expect_eq(kv_cache_free_pages(f.cache), 0);
    cr_expect_eq(kv_cache_truncate(f.cache, &second.table, 70), ODSI_ERR_BUSY);
    cr_expect_eq(second.table.shared_count, 3);
    expect_own_text(&f, &second);
    kv_cache_give(f.cache, &first.table);
    cr_expect_eq(kv_cache_truncate(f.cache, &second.table, 70), ODSI_OK);
    second.length = 70;
    expect_own_text(&f, &second);
    kv_cache_give(f.cache, &second.table);
    tear_down(&f);
}

/* Goal: content that is not what the key says it is does not spread. */
Test(kv_cache, a_page_of_other_content_is_not_taken_for_the_kept_one)
{
    struct fixture f;
    struct session first = {0}, second = {0};
    set_up(&f, 8);
    make_text(&first.text, 128, 128, 1, 0);
    second.text = first.text;
    cr_assert_eq(open_session(&f, &first, 128), ODSI_OK);
    cr_assert_eq(open_session(&f, &second, 128), ODSI_OK);
    run_to(&f, &first, 128);
    second.publish_max = 0;
    run_to(&f, &second, 128);
    slot(&f, &second, 17, 2)[0] ^= 1;
    cr_expect_eq(kv_cache_publish(f.cache, &second.table, &second.text.keys[0]), 0);
    cr_expect_eq(second.table.shared_count, 0);
    cr_expect_neq(second.table.pages[0], first.table.pages[0]);
    slot(&f, &second, 17, 2)[0] ^= 1;
    cr_expect_eq(kv_cache_publish(f.cache, &second.table, &second.text.keys[0]), 1);
    cr_expect_eq(second.table.pages[0], first.table.pages[0]);
    kv_cache_give(f.cache, &first.table);
    kv_cache_give(f.cache, &second.table);
    tear_down(&f);
}

/* ---- against a simple model ------------------------------------------------------------------ */

static uint32_t next_random(uint64_t *state)
{
    *state = *state * 6364136223846793005u + 1442695040888963407u;
    return (uint32_t)(*state >> 33);
}

/* Pages that are in some table. */
static uint32_t count_used(const struct session *sessions, uint32_t page_count)
{
    uint8_t used[256] = {0};
    uint32_t count = 0;
    for (uint32_t s = 0; s < SESSIONS; s++)
        for (uint32_t i = 0; i < sessions[s].table.page_count; i++)
            used[sessions[s].table.pages[i]] = 1;
    for (uint32_t i = 0; i < page_count; i++)
        count += used[i];
    return count;
}

/* Positions that a running session has computed of this prompt, in whole shared pages. */
static uint32_t running_prefix(const struct session *sessions, const struct session *opened)
{
    uint32_t best = 0;
    for (uint32_t s = 0; s < SESSIONS; s++) {
        const struct session *at = &sessions[s];
        uint32_t pages = 0;
        while (at != opened && pages < at->table.shared_count && pages < opened->text.key_count &&
               digest_equal(&at->text.keys[pages], &opened->text.keys[pages]))
            pages++;
        if (pages > best)
            best = pages;
    }
    const uint32_t most = (opened->text.count - 1) / KV_PAGE_TOKENS;
    return (best < most ? best : most) * KV_PAGE_TOKENS;
}

static void open_random(struct fixture *f, struct session *sessions, struct session *session,
                        uint64_t *random)
{
    const uint32_t count = 1 + next_random(random) % (TEXT_MAX - 70);
    const uint32_t limit = count + next_random(random) % 70;
    memset(session, 0, sizeof *session);
    make_text(&session->text, count, next_random(random) % TEXT_MAX, next_random(random) % 3,
              next_random(random) % 4);
    const uint32_t free_before = kv_cache_free_pages(f->cache);
    const enum odsi_err err = open_session(f, session, limit);
    if (err != ODSI_OK) {
        cr_assert_eq(err, ODSI_ERR_BUSY);
        cr_assert_eq(session->table.page_count, 0);
        cr_assert_eq(kv_cache_free_pages(f->cache), free_before);
        return;
    }
    cr_assert_lt(session->length, count);
    cr_assert_geq(session->length, running_prefix(sessions, session));
}

/* Goes back some way; the text behind it is another one half of the time. */
static void rewind_random(struct fixture *f, struct session *session, uint64_t *random)
{
    const uint32_t length = next_random(random) % (session->length + 1);
    const uint32_t shared = session->table.shared_count;
    const enum odsi_err err = kv_cache_truncate(f->cache, &session->table, length);
    if (err != ODSI_OK) {
        cr_assert_eq(err, ODSI_ERR_BUSY);
        cr_assert_eq(session->table.shared_count, shared);
        return;
    }
    session->length = length;
    if (next_random(random) % 2 == 0)
        return;
    if (session->publish_max > length / KV_PAGE_TOKENS)
        session->publish_max = length / KV_PAGE_TOKENS;
    for (uint32_t i = length; i < session->text.count; i++)
        session->text.tokens[i] += 7777777;
    make_keys(&session->text);
}

/* Goal: whatever sessions do, each reads what it computed itself, what runs is shared, and every
 * page is accounted for. Method: random opens, steps, rewinds and closes in a cache that is too
 * small for them, checked after each against the tables themselves. */
Test(kv_cache, random_sessions_each_keep_their_own_text)
{
    enum { ROUNDS = 6000, PAGES = 40 };
    static struct session sessions[SESSIONS];
    const char *given = getenv("ODSI_TEST_SEED");
    const uint64_t seed = given ? strtoull(given, NULL, 10) : clock_unix_us();
    uint64_t random = seed;
    struct fixture f;
    uint32_t reused = 0, evictions = 0;
    cr_log_info("seed %llu (ODSI_TEST_SEED)", (unsigned long long)seed);
    set_up(&f, PAGES);
    for (uint32_t round = 0; round < ROUNDS; round++) {
        struct session *session = &sessions[next_random(&random) % SESSIONS];
        const uint32_t cached = kv_cache_cached_pages(f.cache);
        const uint32_t what = next_random(&random) % 8;
        if (session->table.page_count == 0) {
            open_random(&f, sessions, session, &random);
            reused += session->length > 0;
            evictions += kv_cache_cached_pages(f.cache) < cached;
        } else if (what == 0) {
            kv_cache_give(f.cache, &session->table);
            session->length = 0;
        } else if (what == 1) {
            rewind_random(&f, session, &random);
        } else {
            const uint32_t left = session->text.count - session->length;
            run_to(&f, session, session->length + next_random(&random) % (left + 1));
        }
        if (session->table.page_count > 0)
            expect_own_text(&f, session);
        cr_assert_eq(PAGES - kv_cache_free_pages(f.cache), count_used(sessions, PAGES),
                     "seed %llu, round %u", (unsigned long long)seed, round);
    }
    cr_expect_gt(reused, 100, "seed %llu", (unsigned long long)seed);
    cr_expect_gt(evictions, 100, "seed %llu", (unsigned long long)seed);
    for (uint32_t s = 0; s < SESSIONS; s++) {
        expect_own_text(&f, &sessions[s]);
        kv_cache_give(f.cache, &sessions[s].table);
    }
    cr_expect_eq(kv_cache_free_pages(f.cache), PAGES);
    tear_down(&f);
}
