/* The engine on the demo model: right against the reference, and the same bits however the work is
 * cut. Run from the root of the tree. */
#include "common/base/alloc.h"
#include "worker/engine/sampler.h"
#include "worker/engine/startup.h"

#include <criterion/criterion.h>
#include <jansson.h>
#include <math.h>
#include <string.h>

#define MODEL_F32 "deploy/demo/odsi-tiny-f32.gguf"
#define MODEL_Q8  "deploy/demo/odsi-tiny-q8_0.gguf"
#define REFERENCE "tests/vectors/odsi-tiny/reference.json"

struct fixture {
    struct model *model;
    const struct model_params *params;
    struct startup whole;
};

static void set_up_span(struct startup *out, const struct model *model, const char *backend,
                        uint32_t layer_first, uint32_t layer_end)
{
    const struct startup_config config = {.backend = {.name = backend, .thread_count = 1},
                                          .layer_first = layer_first,
                                          .layer_end = layer_end,
                                          .kv_size = 8u << 20};
    cr_assert_eq(startup_open(out, model, &config), ODSI_OK, "%s", odsi_err_text());
}

static void set_up(struct fixture *f, const char *path, const char *backend)
{
    memset(f, 0, sizeof *f);
    cr_assert_eq(model_open(&f->model, path, NULL, NULL, NULL), ODSI_OK, "%s", odsi_err_text());
    f->params = model_params_view(f->model);
    set_up_span(&f->whole, f->model, backend, 0, f->params->layer_count);
}

static void tear_down(struct fixture *f)
{
    startup_close(&f->whole);
    model_close(&f->model);
}

/* Runs tokens in chunks through an engine with all layers; logits of the last position. */
static void run_tokens(const struct fixture *f, struct engine_session *session,
                       const uint32_t *tokens, uint32_t count, uint32_t chunk, float *logits)
{
    for (uint32_t at = 0; at < count; at += chunk) {
        const uint32_t now = count - at < chunk ? count - at : chunk;
        struct engine_step step = {.session = session,
                                   .token_count = now,
                                   .tokens = tokens + at,
                                   .logits = at + now == count ? logits : NULL};
        cr_assert_eq(engine_run(f->whole.engine, &step, 1), ODSI_OK, "%s", odsi_err_text());
    }
}

static struct engine_session *new_session(const struct fixture *f, uint32_t limit)
{
    struct engine_session *session = NULL;
    cr_assert_eq(engine_session_open(&session, f->whole.engine, 0, f->params->layer_count, limit),
                 ODSI_OK, "%s", odsi_err_text());
    return session;
}

static uint32_t *tokens_of(const json_t *array, uint32_t *count)
{
    uint32_t *tokens = NULL;
    *count = (uint32_t)json_array_size(array);
    cr_assert_eq(alloc_zeroed(&tokens, *count, sizeof *tokens), ODSI_OK);
    for (uint32_t i = 0; i < *count; i++)
        tokens[i] = (uint32_t)json_integer_value(json_array_get(array, i));
    return tokens;
}

static float *new_logits(const struct fixture *f)
{
    float *logits = NULL;
    cr_assert_eq(alloc_zeroed(&logits, f->params->vocab_size, sizeof *logits), ODSI_OK);
    return logits;
}

/* Goal: the F32 file's logits are those of a binary64 forward, but for the binary16 KV cache.
 * Method: relative L2 distance to the reference's logits, at most 1e-3. */
Test(engine, gives_the_reference_logits)
{
    struct fixture f;
    set_up(&f, MODEL_F32, "auto");
    json_t *reference = json_load_file(REFERENCE, 0, NULL);
    cr_assert_not_null(reference);
    float *logits = new_logits(&f);
    size_t index;
    json_t *entry;
    uint32_t compared = 0;
    json_array_foreach(json_object_get(reference, "cases"), index, entry)
    {
        const json_t *expected = json_object_get(entry, "last_logits");
        uint32_t count;
        if (!expected)
            continue;
        uint32_t *tokens = tokens_of(json_object_get(entry, "prompt_tokens"), &count);
        struct engine_session *session = new_session(&f, count);
        run_tokens(&f, session, tokens, count, 64, logits);
        double error = 0, size = 0;
        for (uint32_t i = 0; i < f.params->vocab_size; i++) {
            const double want = json_real_value(json_array_get(expected, i));
            error += (want - (double)logits[i]) * (want - (double)logits[i]);
            size += want * want;
        }
        cr_expect(sqrt(error / size) <= 1e-3, "case %zu: %g", index, sqrt(error / size));
        engine_session_close(&session);
        alloc_free(tokens);
        compared++;
    }
    cr_expect_eq(compared, 3);
    alloc_free(logits);
    json_decref(reference);
    tear_down(&f);
}

static float second_best(const float *logits, uint32_t count, uint32_t best)
{
    float second = -INFINITY;
    for (uint32_t i = 0; i < count; i++)
        if (i != best && logits[i] > second)
            second = logits[i];
    return second;
}

/* Goal: greedy tokens equal the reference's; where the reference itself has a near-tie (its
 * smallest gap is at most 0.01) they may part, but only at a step whose gap here is that small. */
static void check_greedy(const struct fixture *f, const json_t *entry, float *logits)
{
    uint32_t prompt_count, greedy_count;
    uint32_t *prompt = tokens_of(json_object_get(entry, "prompt_tokens"), &prompt_count);
    uint32_t *greedy = tokens_of(json_object_get(entry, "greedy_tokens"), &greedy_count);
    const double smallest = json_real_value(json_object_get(entry, "smallest_top2_gap"));
    struct engine_session *session = new_session(f, prompt_count + greedy_count);
    run_tokens(f, session, prompt, prompt_count, 7, logits);
    for (uint32_t i = 0; i < greedy_count; i++) {
        uint32_t best = 0;
        for (uint32_t id = 1; id < f->params->vocab_size; id++)
            if (logits[id] > logits[best])
                best = id;
        if (best != greedy[i]) {
            const float gap = logits[best] - second_best(logits, f->params->vocab_size, best);
            cr_expect(smallest <= 0.01 && gap <= 0.01f, "%s: token %u is %u, not %u (gap %g)",
                      json_string_value(json_object_get(entry, "name")), i, best, greedy[i],
                      (double)gap);
            break;
        }
        run_tokens(f, session, &best, 1, 1, logits);
    }
    engine_session_close(&session);
    alloc_free(prompt);
    alloc_free(greedy);
}

Test(engine, greedy_tokens_are_the_references)
{
    struct fixture f;
    set_up(&f, MODEL_F32, "auto");
    json_t *reference = json_load_file(REFERENCE, 0, NULL);
    cr_assert_not_null(reference);
    float *logits = new_logits(&f);
    size_t index;
    json_t *entry;
    json_array_foreach(json_object_get(reference, "cases"), index, entry)
        check_greedy(&f, entry, logits);
    cr_expect_eq(index, 12);
    alloc_free(logits);
    json_decref(reference);
    tear_down(&f);
}

/* A fixed pseudo-random text of token ids. */
static void fill_tokens(uint32_t *tokens, uint32_t count, uint32_t vocab_size, uint32_t seed)
{
    for (uint32_t i = 0; i < count; i++)
        tokens[i] = (seed + i * 7919u + i * i) % vocab_size;
}

Test(engine, bits_do_not_depend_on_how_a_prompt_is_cut)
{
    const char *const models[] = {MODEL_F32, MODEL_Q8};
    for (size_t m = 0; m < 2; m++) {
        struct fixture f;
        uint32_t tokens[200];
        set_up(&f, models[m], "auto");
        fill_tokens(tokens, 200, f.params->vocab_size, 3);
        float *expected = new_logits(&f), *logits = new_logits(&f);
        struct engine_session *session = new_session(&f, 200);
        run_tokens(&f, session, tokens, 200, 200, expected);
        engine_session_close(&session);
        const uint32_t chunks[] = {1, 7, 64, 65, 199};
        for (size_t i = 0; i < sizeof chunks / sizeof *chunks; i++) {
            session = new_session(&f, 200);
            run_tokens(&f, session, tokens, 200, chunks[i], logits);
            cr_expect_arr_eq(logits, expected, f.params->vocab_size * sizeof *logits,
                             "%s, chunk %u", models[m], chunks[i]);
            engine_session_close(&session);
        }
        alloc_free(expected);
        alloc_free(logits);
        tear_down(&f);
    }
}

/* Goal: neighbours in a batch change nothing. Method: forty sessions with different texts, run
 * alone and then together, prompt chunks and decodes mixed, with and without logits on the way;
 * more logits than one product gives. */
Test(engine, bits_do_not_depend_on_the_batch)
{
    enum { SESSIONS = 40, TOKENS = 40 };
    struct fixture f;
    uint32_t tokens[SESSIONS][TOKENS];
    float *alone[SESSIONS], *together[SESSIONS];
    struct engine_session *sessions[SESSIONS];
    set_up(&f, MODEL_Q8, "auto");
    for (uint32_t s = 0; s < SESSIONS; s++) {
        fill_tokens(tokens[s], TOKENS, f.params->vocab_size, 100 * s);
        alone[s] = new_logits(&f);
        together[s] = new_logits(&f);
        struct engine_session *session = new_session(&f, TOKENS);
        run_tokens(&f, session, tokens[s], TOKENS, TOKENS, alone[s]);
        engine_session_close(&session);
        sessions[s] = new_session(&f, TOKENS);
    }
    uint32_t done[SESSIONS] = {0};
    for (uint32_t running = 1; running > 0;) {
        struct engine_step steps[SESSIONS];
        running = 0;
        for (uint32_t s = 0; s < SESSIONS; s++) {
            const uint32_t left = TOKENS - done[s];
            if (left == 0)
                continue;
            const uint32_t wish = s % 8 + 1;
            const uint32_t chunk = wish < left ? wish : left;
            const int wants_logits = s % 3 > 0 || chunk == left;
            steps[running++] = (struct engine_step){.session = sessions[s],
                                                    .token_count = chunk,
                                                    .tokens = tokens[s] + done[s],
                                                    .logits = wants_logits ? together[s] : NULL};
            done[s] += chunk;
        }
        if (running > 0)
            cr_assert_eq(engine_run(f.whole.engine, steps, running), ODSI_OK);
    }
    for (uint32_t s = 0; s < SESSIONS; s++) {
        cr_expect_arr_eq(together[s], alone[s], f.params->vocab_size * sizeof(float), "session %u",
                         s);
        engine_session_close(&sessions[s]);
        alloc_free(alone[s]);
        alloc_free(together[s]);
    }
    tear_down(&f);
}

/* Goal: where layers are cut changes nothing. Method: every cut of the six layers in two, and all
 * six apart, against the whole. */
Test(engine, bits_do_not_depend_on_where_layers_are_cut)
{
    enum { TOKENS = 33 };
    struct fixture f;
    uint32_t tokens[TOKENS];
    set_up(&f, MODEL_Q8, "auto");
    const uint32_t layers = f.params->layer_count;
    fill_tokens(tokens, TOKENS, f.params->vocab_size, 9);
    float *expected = new_logits(&f), *logits = new_logits(&f), *stream = NULL, *next = NULL;
    cr_assert_eq(alloc_zeroed(&stream, TOKENS * f.params->dim, sizeof *stream), ODSI_OK);
    cr_assert_eq(alloc_zeroed(&next, TOKENS * f.params->dim, sizeof *next), ODSI_OK);
    struct engine_session *session = new_session(&f, TOKENS);
    run_tokens(&f, session, tokens, TOKENS, TOKENS, expected);
    engine_session_close(&session);
    for (uint32_t cut = 1; cut <= layers; cut++) { /* the last round cuts everywhere */
        uint32_t first = 0;
        while (first < layers) {
            const uint32_t end = cut == layers ? first + 1 : first < cut ? cut : layers;
            struct startup part;
            set_up_span(&part, f.model, "auto", first, end);
            cr_assert_eq(engine_session_open(&session, part.engine, first, end, TOKENS), ODSI_OK);
            struct engine_step step = {.session = session,
                                       .token_count = TOKENS,
                                       .tokens = first == 0 ? tokens : NULL,
                                       .input = first == 0 ? NULL : stream,
                                       .output = next,
                                       .logits = end == layers ? logits : NULL};
            cr_assert_eq(engine_run(part.engine, &step, 1), ODSI_OK);
            memcpy(stream, next, TOKENS * f.params->dim * sizeof *stream);
            engine_session_close(&session);
            startup_close(&part);
            first = end;
        }
        cr_expect_arr_eq(logits, expected, f.params->vocab_size * sizeof *logits, "cut %u", cut);
    }
    alloc_free(stream);
    alloc_free(next);
    alloc_free(expected);
    alloc_free(logits);
    tear_down(&f);
}

Test(engine, a_damaged_input_fails_its_own_step_only)
{
    struct fixture f;
    struct startup part;
    struct engine_session *sessions[2];
    set_up(&f, MODEL_Q8, "auto");
    set_up_span(&part, f.model, "auto", 2, 4);
    float *input[2], *output[2];
    struct engine_step steps[2];
    for (uint32_t s = 0; s < 2; s++) {
        cr_assert_eq(engine_session_open(&sessions[s], part.engine, 2, 4, 10), ODSI_OK);
        cr_assert_eq(alloc_zeroed(&input[s], 3 * f.params->dim, sizeof(float)), ODSI_OK);
        cr_assert_eq(alloc_zeroed(&output[s], 3 * f.params->dim, sizeof(float)), ODSI_OK);
        for (uint32_t i = 0; i < 3 * f.params->dim; i++)
            input[s][i] = (float)(i % 17) * 0.1f;
        steps[s] = (struct engine_step){
            .session = sessions[s], .token_count = 3, .input = input[s], .output = output[s]};
    }
    const float bad[] = {NAN, INFINITY, -INFINITY, 3e38f};
    for (size_t i = 0; i < 4; i++) {
        input[1][f.params->dim + 5] = bad[i];
        cr_assert_eq(engine_run(part.engine, steps, 2), ODSI_OK);
        cr_expect_eq(steps[0].status, ODSI_OK);
        cr_expect_eq(steps[1].status, ODSI_ERR_NUMERIC, "%g", (double)bad[i]);
        cr_expect_eq(engine_session_length(sessions[0]), 3);
        cr_expect_eq(engine_session_length(sessions[1]), 0);
        engine_session_truncate(sessions[0], 0);
    }
    input[1][f.params->dim + 5] = 0.5f;
    cr_assert_eq(engine_run(part.engine, steps, 2), ODSI_OK);
    cr_expect_eq(steps[1].status, ODSI_OK, "the session itself is unharmed");
    for (uint32_t s = 0; s < 2; s++) {
        engine_session_close(&sessions[s]);
        alloc_free(input[s]);
        alloc_free(output[s]);
    }
    startup_close(&part);
    tear_down(&f);
}

Test(engine, reserves_memory_at_open_and_gives_it_back)
{
    struct fixture f;
    struct engine_session *session = NULL, *other = NULL;
    set_up(&f, MODEL_Q8, "auto");
    const uint64_t total = engine_kv_tokens_total(f.whole.engine);
    cr_assert_gt(total, 512);
    struct engine_session *taken[1024];
    uint32_t count = 0;
    while (engine_session_open(&taken[count], f.whole.engine, 0, f.params->layer_count, 512) ==
           ODSI_OK)
        cr_assert_lt(++count, 1024);
    cr_expect_eq(count, total / 512);
    cr_expect_eq(engine_session_open(&other, f.whole.engine, 0, f.params->layer_count, 512),
                 ODSI_ERR_BUSY);
    while (count > 0)
        engine_session_close(&taken[--count]);
    cr_expect_eq(engine_kv_tokens_free(f.whole.engine), total);
    cr_expect_eq(engine_session_open(&session, f.whole.engine, 0, f.params->layer_count, 513),
                 ODSI_ERR_RANGE, "above the context");
    cr_expect_eq(engine_session_open(&session, f.whole.engine, 0, f.params->layer_count + 1, 5),
                 ODSI_ERR_RANGE);
    cr_expect_eq(engine_session_open(&session, f.whole.engine, 2, 2, 5), ODSI_ERR_RANGE);
    tear_down(&f);
}

Test(engine, refuses_a_step_beyond_the_sessions_limit)
{
    struct fixture f;
    const uint32_t tokens[6] = {1, 2, 3, 4, 5, 6};
    set_up(&f, MODEL_Q8, "auto");
    struct engine_session *session = new_session(&f, 5);
    struct engine_step step = {.session = session, .token_count = 6, .tokens = tokens};
    cr_expect_eq(engine_run(f.whole.engine, &step, 1), ODSI_ERR_RANGE);
    cr_expect_eq(engine_session_length(session), 0);
    step.token_count = 5;
    cr_expect_eq(engine_run(f.whole.engine, &step, 1), ODSI_OK);
    step.token_count = 1;
    cr_expect_eq(engine_run(f.whole.engine, &step, 1), ODSI_ERR_RANGE);
    engine_session_close(&session);
    tear_down(&f);
}
