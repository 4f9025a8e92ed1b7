#include "worker/gateway/worker_book.h"

#include "tests/unit/gateway/gateway_fixture.h"

#include <criterion/criterion.h>
#include <stdio.h>
#include <string.h>

static struct directory_member worker(uint8_t id)
{
    struct directory_member member = {.layer_count = 10,
                                      .context_length = 512,
                                      .layer_end = 10,
                                      .decode_tokens_per_s = 50.0f,
                                      .prefill_tokens_per_s = 1000.0f,
                                      .address = "host:1"};
    memset(member.worker_id.bytes, id, DIGEST_SIZE);
    return member;
}

static struct worker_book *open_book(void)
{
    struct worker_book *book = NULL;
    cr_assert_eq(worker_book_open(&book), ODSI_OK);
    return book;
}

Test(worker_book, believes_a_worker_until_it_has_seen_it)
{
    struct worker_book *book = open_book();
    const struct directory_member member = worker(1);
    struct path_member seen;
    struct deadline_stage expected;
    worker_book_member(book, &member, 0, &seen);
    cr_expect_eq(seen.layer_us, 2000, "50 tokens per second through 10 layers");
    cr_expect_eq(seen.wait_us, 0);
    worker_book_expect(book, &member, 5, &expected);
    cr_expect_eq(expected.step_us, 10000);
    cr_expect_eq(expected.token_ns, 500000);
    worker_book_add_step(book, &member.worker_id, 5, 50000, 123);
    worker_book_member(book, &member, 0, &seen);
    cr_expect_eq(seen.layer_us, 10000);
    cr_expect_eq(seen.hop_us, 123);
    worker_book_expect(book, &member, 5, &expected);
    cr_expect_eq(expected.step_us, 50000);
    cr_expect_eq(expected.network_us, 123);
    worker_book_close(&book);
}

Test(worker_book, assumes_something_of_workers_that_say_nothing)
{
    struct worker_book *book = open_book();
    struct directory_member member = worker(1);
    struct path_member seen;
    struct deadline_stage expected;
    member.decode_tokens_per_s = 0.0f;
    member.prefill_tokens_per_s = 0.0f;
    worker_book_member(book, &member, 0, &seen);
    worker_book_expect(book, &member, 10, &expected);
    cr_expect_gt(seen.layer_us, 0);
    cr_expect_gt(seen.hop_us, 0);
    cr_expect_gt(expected.token_ns, 0);
    member.decode_tokens_per_s = 1e-30f;
    worker_book_member(book, &member, 0, &seen);
    cr_expect_leq(seen.layer_us, 10000000);
    member.decode_tokens_per_s = 1e30f;
    worker_book_member(book, &member, 0, &seen);
    cr_expect_eq(seen.layer_us, 1);
    worker_book_close(&book);
}

Test(worker_book, waits_longer_behind_more_load_whoever_saw_it)
{
    struct worker_book *book = open_book();
    struct directory_member member = worker(1);
    struct path_member idle;
    struct path_member busy;
    worker_book_member(book, &member, 0, &idle);
    for (int i = 0; i < 3; i++)
        worker_book_count_session(book, &member.worker_id, 1);
    worker_book_member(book, &member, 0, &busy);
    cr_expect_gt(busy.wait_us, idle.wait_us, "our own sessions");
    const uint32_t ours = busy.wait_us;
    member.session_count = 7;
    worker_book_member(book, &member, 0, &busy);
    cr_expect_gt(busy.wait_us, ours, "those of others");
    member.session_count = UINT32_MAX;
    member.queued_step_count = UINT32_MAX;
    worker_book_member(book, &member, 0, &busy);
    cr_expect_lt(busy.wait_us, UINT32_MAX / 2, "bounded");
    member.session_count = 0;
    member.queued_step_count = 0;
    for (int i = 0; i < 5; i++)
        worker_book_count_session(book, &member.worker_id, -1);
    worker_book_member(book, &member, 0, &busy);
    cr_expect_eq(busy.wait_us, 0);
    worker_book_close(&book);
}

Test(worker_book, avoids_a_worker_for_a_while_after_a_failure)
{
    struct worker_book *book = open_book();
    const struct directory_member member = worker(1);
    struct path_member seen;
    worker_book_add_failure(book, &member.worker_id, 1000);
    worker_book_member(book, &member, 2000, &seen);
    cr_expect_gt(seen.wait_us, 1000000);
    worker_book_member(book, &member, 1000 + WORKER_BOOK_AVOID_US, &seen);
    cr_expect_eq(seen.wait_us, 0);
    worker_book_close(&book);
}

Test(worker_book, forgets_workers_that_left_and_have_none_of_our_sessions)
{
    struct worker_book *book = open_book();
    struct directory *directory = NULL;
    struct path_member seen;
    cr_assert_eq(directory_open(&directory), ODSI_OK);
    directory_begin(directory, 1);
    for (uint8_t id = 1; id <= 40; id++) {
        const struct directory_member member = worker(id);
        worker_book_add_step(book, &member.worker_id, 10, 70000, 1);
        if (id % 4 == 0)
            worker_book_count_session(book, &member.worker_id, 1);
        if (id % 4 == 1)
            cr_assert_eq(directory_add(directory, &member), ODSI_OK);
    }
    directory_commit(directory);
    worker_book_prune(book, directory);
    for (uint8_t id = 1; id <= 40; id++) {
        const struct directory_member member = worker(id);
        worker_book_member(book, &member, 0, &seen);
        cr_expect_eq(seen.layer_us, id % 4 < 2 ? 7000 : 2000, "worker %u", id);
    }
    directory_close(&directory);
    worker_book_close(&book);
}
