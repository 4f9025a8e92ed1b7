/* Prefix reuse on the demo model: what was computed before is the same bits as computing it again.
 * Run from the root of the tree. */
#include "common/base/alloc.h"
#include "worker/engine/prefix_key.h"
#include "worker/engine/startup.h"

#include <criterion/criterion.h>
#include <math.h>
#include <string.h>

#define MODEL    "deploy/demo/odsi-tiny-q8_0.gguf"
#define TEXT_MAX 400u

struct fixture {
    struct model *model;
    const struct model_params *params;
    struct startup part; /* a span of layers */
    float *logits, *expected;
};

static void set_up(struct fixture *f, const char *backend, uint32_t layer_first, uint32_t layer_end)
{
    memset(f, 0, sizeof *f);
    cr_assert_eq(model_open(&f->model, MODEL, NULL, NULL, NULL), ODSI_OK, "%s", odsi_err_text());
    f->params = model_params_view(f->model);
    const struct startup_config config = {.backend = {.name = backend, .thread_count = 1},
                                          .layer_first = layer_first,
                                          .layer_end = layer_end,
                                          .kv_size = 4u << 20};
    cr_assert_eq(startup_open(&f->part, f->model, &config), ODSI_OK, "%s", odsi_err_text());
    cr_assert_eq(alloc_zeroed(&f->logits, f->params->vocab_size, sizeof(float)), ODSI_OK);
    cr_assert_eq(alloc_zeroed(&f->expected, f->params->vocab_size, sizeof(float)), ODSI_OK);
}

static void tear_down(struct fixture *f)
{
    alloc_free(f->logits);
    alloc_free(f->expected);
    startup_close(&f->part);
    model_close(&f->model);
}

/* A pseudo-random text; the first `common` tokens are those of every other one. */
static void fill_tokens(const struct fixture *f, uint32_t *tokens, uint32_t count, uint32_t common,
                        uint32_t leaf)
{
    for (uint32_t i = 0; i < count; i++)
        tokens[i] = (i * 7919u + i * i + (i < common ? 0 : 31 + leaf)) % f->params->vocab_size;
}

/* Opens a session for this prompt, which shares with those of that scope. */
static struct engine_session *open_prompt(const struct fixture *f, const uint32_t *tokens,
                                          uint32_t count, uint32_t limit, uint8_t scope)
{
    struct engine_session *session = NULL;
    struct digest seed = {{0}}, keys[TEXT_MAX / KV_PAGE_TOKENS];
    struct engine_prefix prefix = {
        .keys = keys, .key_count = count / KV_PAGE_TOKENS, .prompt_count = count};
    prefix_key_chain(keys, &seed, tokens, prefix.key_count);
    memset(prefix.scope.bytes, scope, sizeof prefix.scope.bytes);
    cr_assert_eq(engine_session_open_prefix(&session, f->part.engine, f->part.span->layer_first,
                                            f->part.span->layer_end, limit, &prefix),
                 ODSI_OK, "%s", odsi_err_text());
    return session;
}

/* Runs the tokens that the session has not; logits of the last one. */
static void run_rest(const struct fixture *f, struct engine_session *session,
                     const uint32_t *tokens, uint32_t count, uint32_t chunk, float *logits)
{
    while (engine_session_length(session) < count) {
        const uint32_t at = engine_session_length(session);
        const uint32_t now = count - at < chunk ? count - at : chunk;
        struct engine_step step = {.session = session,
                                   .token_count = now,
                                   .tokens = tokens + at,
                                   .logits = at + now == count ? logits : NULL};
        cr_assert_eq(engine_run(f->part.engine, &step, 1), ODSI_OK, "%s", odsi_err_text());
        cr_assert_eq(step.status, ODSI_OK);
    }
}

static void expect_logits(const struct fixture *f, const char *what)
{
    cr_expect_arr_eq(f->logits, f->expected, f->params->vocab_size * sizeof(float), "%s", what);
}

/* What the tokens give without any reuse. */
static void compute_expected(struct fixture *f, const uint32_t *tokens, uint32_t count)
{
    struct engine_session *session = NULL;
    cr_assert_eq(engine_session_open(&session, f->part.engine, 0, f->params->layer_count, count),
                 ODSI_OK);
    run_rest(f, session, tokens, count, 512, f->expected);
    engine_session_close(&session);
}

#define CASES 10u

static const struct {
    uint32_t count, common, held;
} cases[CASES] = {
    {300, 300, 256}, {256, 300, 255}, {257, 300, 256}, {320, 300, 256}, {128, 300, 127},
    {64, 300, 63},   {63, 300, 0},    {380, 200, 192}, {300, 63, 0},    {300, 64, 64},
};

/* One backend: a first session leaves pages of 300 tokens, then come the cases, for each size of
 * chunk under a scope of its own. */
static void check_reuse(const char *backend)
{
    static const uint32_t chunks[] = {1, 5, 64, 512};
    struct fixture f;
    uint32_t first[TEXT_MAX], tokens[TEXT_MAX];
    float *expected[CASES] = {NULL};
    set_up(&f, backend, 0, 6);
    const size_t size = f.params->vocab_size * sizeof(float);
    fill_tokens(&f, first, 300, 300, 0);
    for (uint32_t c = 0; c < 4; c++) {
        struct engine_session *session = open_prompt(&f, first, 300, 300, (uint8_t)c);
        cr_expect_eq(engine_session_length(session), 0);
        run_rest(&f, session, first, 300, chunks[c], f.logits);
        engine_session_close(&session);
        for (uint32_t i = 0; i < CASES; i++) {
            fill_tokens(&f, tokens, cases[i].count, cases[i].common, 7 * i);
            if (!expected[i]) {
                cr_assert_eq(alloc_zeroed(&expected[i], size, 1), ODSI_OK);
                compute_expected(&f, tokens, cases[i].count);
                memcpy(expected[i], f.expected, size);
            }
            session = open_prompt(&f, tokens, cases[i].count, cases[i].count, (uint8_t)c);
            cr_expect_eq(engine_session_length(session), cases[i].held, "case %u", i);
            run_rest(&f, session, tokens, cases[i].count, chunks[3 - c], f.logits);
            cr_expect_arr_eq(f.logits, expected[i], size, "%s, case %u, chunks of %u", backend, i,
                             chunks[c]);
            engine_session_close(&session);
        }
    }
    for (uint32_t i = 0; i < CASES; i++)
        alloc_free(expected[i]);
    tear_down(&f);
}

/* Goal: logits after a reused prefix are those of a session that computed everything. Method: every
 * backend; prompts that share all, some or none of what is there, cut in other ways. */
Test(engine_prefix, reused_positions_are_the_bits_of_computed_ones, .timeout = 600)
{
    for (const char *const *name = backend_names(); *name; name++)
        check_reuse(*name);
}

/* Goal: as long as both run, too, and while the first goes on behind the shared pages. */
Test(engine_prefix, sessions_that_run_share_memory_and_not_their_answers)
{
    struct fixture f;
    uint32_t tokens[TEXT_MAX];
    struct engine_session *sessions[4];
    set_up(&f, "auto", 0, 6);
    fill_tokens(&f, tokens, 260, 250, 0);
    compute_expected(&f, tokens, 260);
    const uint64_t total = engine_kv_tokens_total(f.part.engine);
    for (uint32_t i = 0; i < 4; i++) {
        fill_tokens(&f, tokens, 200, 200, 0);
        sessions[i] = open_prompt(&f, tokens, 200, 260, 1);
        cr_expect_eq(engine_session_length(sessions[i]), i == 0 ? 0 : 192);
        run_rest(&f, sessions[i], tokens, 200, 64, f.logits);
    }
    cr_expect_eq(engine_kv_tokens_free(f.part.engine), total - (3 + 4 * 2) * KV_PAGE_TOKENS);
    for (uint32_t i = 0; i < 4; i++) { /* each goes its own way, the first one the expected */
        fill_tokens(&f, tokens, 260, 250, 5 * i);
        run_rest(&f, sessions[i], tokens, 260, 7, f.logits);
        if (i == 0)
            expect_logits(&f, "while others share its beginning");
    }
    for (uint32_t i = 0; i < 4; i++)
        engine_session_close(&sessions[i]);
    cr_expect_eq(engine_kv_tokens_free(f.part.engine), total);
    cr_expect_eq(engine_kv_tokens_cached(f.part.engine), 192);
    tear_down(&f);
}

/* Goal: a span that sees no tokens shares by key alone. Method: the middle layers, activations in
 * and out; the second session gives the outputs of the first from where it begins. */
Test(engine_prefix, a_span_in_the_middle_goes_by_the_key)
{
    enum { COUNT = 150 };
    struct fixture f;
    uint32_t tokens[COUNT];
    float *input = NULL, *output[2] = {NULL};
    set_up(&f, "auto", 2, 4);
    const uint32_t dim = f.params->dim;
    fill_tokens(&f, tokens, COUNT, COUNT, 0);
    cr_assert_eq(alloc_zeroed(&input, COUNT * dim, sizeof *input), ODSI_OK);
    for (uint32_t i = 0; i < COUNT * dim; i++)
        input[i] = (float)((int)(i * 2654435761u >> 20) - 2048) * 1e-3f;
    for (uint32_t s = 0; s < 2; s++) {
        cr_assert_eq(alloc_zeroed(&output[s], COUNT * dim, sizeof(float)), ODSI_OK);
        struct engine_session *session = open_prompt(&f, tokens, COUNT, COUNT, 1);
        const uint32_t at = engine_session_length(session);
        cr_expect_eq(at, s == 0 ? 0 : 128);
        struct engine_step step = {.session = session,
                                   .token_count = COUNT - at,
                                   .input = input + (size_t)at * dim,
                                   .output = output[s] + (size_t)at * dim};
        cr_assert_eq(engine_run(f.part.engine, &step, 1), ODSI_OK);
        engine_session_close(&session);
    }
    cr_expect_arr_eq(output[1] + 128 * dim, output[0] + 128 * dim, 22 * dim * sizeof(float));
    alloc_free(input);
    alloc_free(output[0]);
    alloc_free(output[1]);
    tear_down(&f);
}

Test(engine_prefix, scopes_do_not_share)
{
    struct fixture f;
    uint32_t tokens[TEXT_MAX];
    set_up(&f, "auto", 0, 6);
    fill_tokens(&f, tokens, 200, 200, 0);
    struct engine_session *session = open_prompt(&f, tokens, 200, 200, 1);
    run_rest(&f, session, tokens, 200, 64, f.logits);
    struct engine_session *other = open_prompt(&f, tokens, 200, 200, 2);
    cr_expect_eq(engine_session_length(other), 0);
    engine_session_close(&other);
    other = open_prompt(&f, tokens, 200, 200, 1);
    cr_expect_eq(engine_session_length(other), 192);
    engine_session_close(&other);
    engine_session_close(&session);
    tear_down(&f);
}

/* Goal: a stage may hold more than the others of its path; it then computes the rest again, and the
 * result and what it offers stay right. */
Test(engine_prefix, beginning_earlier_than_it_could_changes_nothing)
{
    static const uint32_t begins[] = {0, 1, 64, 100, 191, 192};
    struct fixture f;
    uint32_t tokens[TEXT_MAX];
    set_up(&f, "auto", 0, 6);
    fill_tokens(&f, tokens, 210, 210, 0);
    compute_expected(&f, tokens, 210);
    struct engine_session *session = open_prompt(&f, tokens, 210, 210, 1);
    cr_expect_eq(engine_session_begin_at(session, 1), ODSI_ERR_RANGE);
    run_rest(&f, session, tokens, 210, 512, f.logits);
    engine_session_close(&session);
    for (size_t i = 0; i < sizeof begins / sizeof *begins; i++) {
        session = open_prompt(&f, tokens, 210, 210, 1);
        cr_assert_eq(engine_session_length(session), 192);
        cr_assert_eq(engine_session_begin_at(session, begins[i]), ODSI_OK);
        cr_expect_eq(engine_session_length(session), begins[i]);
        run_rest(&f, session, tokens, 210, 33, f.logits);
        expect_logits(&f, "begun earlier");
        engine_session_close(&session);
        cr_expect_eq(engine_kv_tokens_cached(f.part.engine), 192, "nothing is kept twice");
    }
    tear_down(&f);
}

/* Goal: tokens other than those the keys were made of never get under them. Method: a session goes
 * back and computes another text; then one asks for the first text again. */
Test(engine_prefix, another_text_after_going_back_is_not_offered)
{
    struct fixture f;
    uint32_t tokens[TEXT_MAX], other[TEXT_MAX];
    set_up(&f, "auto", 0, 6);
    fill_tokens(&f, tokens, 200, 200, 0);
    fill_tokens(&f, other, 200, 80, 1);
    compute_expected(&f, tokens, 200);
    struct engine_session *session = open_prompt(&f, tokens, 200, 200, 1);
    run_rest(&f, session, tokens, 120, 64, f.logits);
    cr_assert_eq(engine_session_truncate(session, 80), ODSI_OK);
    run_rest(&f, session, other, 200, 64, f.logits);
    engine_session_close(&session);
    session = open_prompt(&f, tokens, 200, 200, 1);
    cr_expect_eq(engine_session_length(session), 64);
    run_rest(&f, session, tokens, 200, 64, f.logits);
    expect_logits(&f, "the first text again");
    engine_session_close(&session);
    tear_down(&f);
}

Test(engine_prefix, a_failed_step_offers_nothing)
{
    struct fixture f;
    uint32_t tokens[TEXT_MAX];
    float *input = NULL;
    set_up(&f, "auto", 2, 4);
    fill_tokens(&f, tokens, 100, 100, 0);
    cr_assert_eq(alloc_zeroed(&input, 100 * f.params->dim, sizeof *input), ODSI_OK);
    input[99 * f.params->dim] = NAN; /* of the last position: the first page itself is fine */
    struct engine_session *session = open_prompt(&f, tokens, 100, 100, 1);
    struct engine_step step = {.session = session, .token_count = 100, .input = input};
    cr_assert_eq(engine_run(f.part.engine, &step, 1), ODSI_OK);
    cr_expect_eq(step.status, ODSI_ERR_NUMERIC);
    engine_session_close(&session);
    cr_expect_eq(engine_kv_tokens_cached(f.part.engine), 0);
    alloc_free(input);
    tear_down(&f);
}

Test(engine_prefix, refuses_more_keys_than_pages_and_longer_prompts_than_sessions)
{
    struct fixture f;
    struct engine_session *session = NULL;
    const struct digest keys[4] = {{{0}}};
    set_up(&f, "auto", 0, 6);
    struct engine_prefix prefix = {.keys = keys, .key_count = 4, .prompt_count = 255};
    cr_expect_eq(engine_session_open_prefix(&session, f.part.engine, 0, 6, 300, &prefix),
                 ODSI_ERR_INVALID);
    prefix.prompt_count = 301;
    cr_expect_eq(engine_session_open_prefix(&session, f.part.engine, 0, 6, 300, &prefix),
                 ODSI_ERR_INVALID);
    cr_expect_null(session);
    prefix.prompt_count = 300;
    cr_expect_eq(engine_session_open_prefix(&session, f.part.engine, 0, 6, 300, &prefix), ODSI_OK);
    engine_session_close(&session);
    tear_down(&f);
}
