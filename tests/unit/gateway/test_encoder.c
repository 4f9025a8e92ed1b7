#include "worker/gateway/encoder.h"

#include "common/base/alloc.h"
#include "common/base/buf.h"
#include "common/crypto/digest.h"
#include "tests/unit/gateway/gateway_fixture.h"

#include <criterion/criterion.h>
#include <string.h>

#define JOBS 20u

struct result {
    struct rpc_loop *loop;
    uint32_t *left; /* results still to come */
    enum odsi_err err;
    uint32_t count;
    uint32_t first;
    uint32_t calls;
};

struct set_up {
    struct rpc_loop *loop;
    struct model_store *store;
    struct model_card *card;
    struct encoder *encoder;
};

static void set_up_open(struct set_up *self)
{
    struct buf manifest;
    struct buf tokenizer;
    cr_assert_eq(rpc_loop_open(&self->loop), ODSI_OK);
    cr_assert_eq(model_store_open(&self->store, NULL), ODSI_OK);
    fixture_model(&manifest, &tokenizer, 0, FIXTURE_VOCAB);
    struct digest id;
    digest_of(&id, manifest.data, manifest.size);
    cr_assert_eq(model_store_put(self->store, &id, manifest.data, manifest.size, tokenizer.data,
                                 tokenizer.size, &self->card),
                 ODSI_OK, "%s", odsi_err_text());
    buf_free(&manifest);
    buf_free(&tokenizer);
    cr_assert_eq(encoder_open(&self->encoder, self->loop), ODSI_OK);
}

static void stop(void *context)
{
    rpc_loop_stop(context);
}

static void set_up_close(struct set_up *self)
{
    encoder_close(&self->encoder);
    /* What the thread posted before runs first. */
    cr_assert_eq(rpc_loop_post(self->loop, stop, self->loop), ODSI_OK);
    rpc_loop_run(self->loop);
    model_store_release(&self->card);
    model_store_close(&self->store); /* asserts that no job holds the model */
    rpc_loop_close(&self->loop);
}

static void on_encoded(void *user, enum odsi_err err, uint32_t *tokens, uint32_t count)
{
    struct result *result = user;
    result->err = err;
    result->count = count;
    result->first = tokens && count > 0 && err == ODSI_OK ? tokens[0] : 0;
    result->calls++;
    alloc_free(tokens);
    if (--*result->left == 0)
        rpc_loop_stop(result->loop);
}

Test(encoder, tokenizes_beside_the_loop)
{
    struct set_up set_up;
    struct result results[JOBS];
    struct encoder_job *jobs[JOBS];
    uint32_t left = JOBS;
    set_up_open(&set_up);
    for (uint32_t i = 0; i < JOBS; i++) {
        char text[JOBS + 1];
        memset(text, 'q', sizeof text);
        results[i] = (struct result){.loop = set_up.loop, .left = &left};
        cr_assert_eq(encoder_start(set_up.encoder, &jobs[i], set_up.card, text, i + 1, 1000,
                                   on_encoded, &results[i]),
                     ODSI_OK);
    }
    rpc_loop_run(set_up.loop);
    for (uint32_t i = 0; i < JOBS; i++) {
        cr_expect_eq(results[i].err, ODSI_OK);
        cr_expect_eq(results[i].calls, 1);
        cr_expect_eq(results[i].first, FIXTURE_BOS);
        /* bos, the tokenizer's space, and a byte token for each letter */
        cr_expect_eq(results[i].count, i + 3, "%u tokens for %u letters", results[i].count, i + 1);
    }
    set_up_close(&set_up);
}

/* Method: the same conversation, its texts changed as soon as the call returns, beside a prompt. */
Test(encoder, renders_a_conversation_beside_the_loop)
{
    struct set_up set_up;
    struct encoder_job *jobs[2];
    uint32_t left = 2;
    char text[] = "hello";
    struct chat_message talk[] = {{CHAT_SYSTEM, "", 0},
                                  {CHAT_USER, text, 5},
                                  {CHAT_ASSISTANT, "</s>", 4},
                                  {CHAT_USER, text, 5}};
    set_up_open(&set_up);
    struct result chat = {.loop = set_up.loop, .left = &left};
    struct result bad = {.loop = set_up.loop, .left = &left};
    cr_assert_eq(
        encoder_start_chat(set_up.encoder, &jobs[0], set_up.card, talk, 4, 1000, on_encoded, &chat),
        ODSI_OK);
    cr_assert_eq(
        encoder_start_chat(set_up.encoder, &jobs[1], set_up.card, talk, 3, 1000, on_encoded, &bad),
        ODSI_OK);
    memset(text, '!', sizeof text);
    rpc_loop_run(set_up.loop);
    cr_expect_eq(chat.err, ODSI_OK, "%s", odsi_err_text());
    cr_expect_eq(chat.first, FIXTURE_BOS);
    /* Control tokens: the bos and the four ends that the template writes, each with the tokenizer's
     * own space behind it; all else is bytes, the "</s>" that somebody said among them. */
    static const char written[] = "<|system|>\n"
                                  "\n<|user|>\nhello"
                                  "\n<|assistant|>\n</s>"
                                  "\n<|user|>\nhello"
                                  "\n<|assistant|>\n";
    cr_expect_eq(chat.count, 2 * 5 + strlen(written), "%u", chat.count);
    cr_expect_eq(bad.err, ODSI_ERR_INVALID);
    cr_expect_eq(bad.count, 0);
    set_up_close(&set_up);
}

Test(encoder, says_how_many_tokens_there_would_have_been)
{
    struct set_up set_up;
    struct encoder_job *job = NULL;
    uint32_t left = 1;
    set_up_open(&set_up);
    struct result result = {.loop = set_up.loop, .left = &left};
    cr_assert_eq(
        encoder_start(set_up.encoder, &job, set_up.card, "qqqqqqqqqq", 10, 7, on_encoded, &result),
        ODSI_OK);
    rpc_loop_run(set_up.loop);
    cr_expect_eq(result.err, ODSI_ERR_RANGE);
    cr_expect_eq(result.count, 12);
    set_up_close(&set_up);
}

/* Goal: neither a cancelled job nor one that was never begun calls back or keeps the model. */
Test(encoder, forgets_cancelled_and_unfinished_jobs)
{
    for (uint32_t round = 0; round < 20; round++) {
        struct set_up set_up;
        struct encoder_job *jobs[JOBS];
        uint32_t left = JOBS;
        set_up_open(&set_up);
        struct result result = {.loop = set_up.loop, .left = &left};
        for (uint32_t i = 0; i < JOBS; i++)
            cr_assert_eq(encoder_start(set_up.encoder, &jobs[i], set_up.card, "qq", 2, 100,
                                       on_encoded, &result),
                         ODSI_OK);
        for (uint32_t i = 0; i < JOBS; i++)
            encoder_cancel(&jobs[i]);
        cr_expect_null(jobs[0]);
        encoder_cancel(&jobs[0]);
        set_up_close(&set_up);
        cr_expect_eq(result.calls, 0);
    }
}

Test(encoder, bounds_the_prompts_that_wait)
{
    struct set_up set_up;
    struct encoder_job *jobs[100];
    const size_t size = 16u << 20;
    char *text = NULL;
    uint32_t left = 100;
    uint32_t taken = 0;
    set_up_open(&set_up);
    struct result result = {.loop = set_up.loop, .left = &left};
    cr_assert_eq(alloc_zeroed(&text, size, 1), ODSI_OK);
    enum odsi_err err = ODSI_OK;
    while (err == ODSI_OK && taken < 100) {
        err = encoder_start(set_up.encoder, &jobs[taken], set_up.card, text, size, 100, on_encoded,
                            &result);
        taken += err == ODSI_OK;
    }
    cr_expect_eq(err, ODSI_ERR_BUSY);
    cr_expect_geq(taken, ENCODER_QUEUE_SIZE / size);
    cr_expect_leq(taken, ENCODER_QUEUE_SIZE / size + 10, "some may be done meanwhile");
    for (uint32_t i = 0; i < taken; i++)
        encoder_cancel(&jobs[i]);
    alloc_free(text);
    set_up_close(&set_up);
}
