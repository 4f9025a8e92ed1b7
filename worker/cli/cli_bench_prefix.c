#include "worker/cli/cli_bench_prefix.h"

#include "common/base/alloc.h"
#include "common/base/clock.h"
#include "worker/engine/prefix_key.h"

#include <string.h>

/* Byte tokens, which every model has (worker/cli/cli_bench.c). */
#define PROMPT_ID_FIRST 3u
#define PROMPT_ID_COUNT 256u
#define WARM_UP_TOKENS  64u

struct run {
    struct cli_engine *engine;
    const struct cli_bench_prefix_config *config;
    const struct model_params *params;
    uint32_t *tokens;    /* [prompt_token_count] */
    struct digest *keys; /* [prompt_token_count / KV_PAGE_TOKENS] */
    float *logits;       /* [vocab_size] of the second session */
    float *expected;     /* [vocab_size] of one that reuses nothing */
};

/* Two prompts are alike up to shared_token_count. */
static void fill_prompt(struct run *self, uint32_t session)
{
    for (uint32_t i = 0; i < self->config->prompt_token_count; i++) {
        const uint32_t own = i < self->config->shared_token_count ? 0 : 17 * (session + 1);
        self->tokens[i] =
            (PROMPT_ID_FIRST + (i * 31 + own) % PROMPT_ID_COUNT) % self->params->vocab_size;
    }
}

/* Runs the first count tokens of the prompt that the session does not hold yet. */
static enum odsi_err run_prompt(struct run *self, struct engine_session *session, uint32_t count,
                                float *logits)
{
    const uint32_t chunk = engine_batch_tokens_max(self->engine->startup.engine);
    enum odsi_err err = ODSI_OK;
    while (err == ODSI_OK && engine_session_length(session) < count) {
        const uint32_t at = engine_session_length(session);
        struct engine_step step = {
            .session = session,
            .token_count = count - at < chunk ? count - at : chunk,
            .tokens = self->tokens + at,
            .logits = count - at <= chunk ? logits : NULL,
        };
        err = cli_engine_step(self->engine, &step);
    }
    return err;
}

/* A whole prompt as a session that shares its pages; *ms counts from before it is opened. */
static enum odsi_err run_session(struct run *self, uint32_t index, struct engine_session **session,
                                 float *logits, double *ms, uint32_t *reused_count)
{
    static const struct digest seed = {{0}};
    const uint32_t count = self->config->prompt_token_count;
    struct engine_prefix prefix = {
        .keys = self->keys, .key_count = count / KV_PAGE_TOKENS, .prompt_count = count};
    fill_prompt(self, index);
    const uint64_t begin_us = clock_monotonic_us();
    prefix_key_chain(self->keys, &seed, self->tokens, prefix.key_count);
    enum odsi_err err = engine_session_open_prefix(session, self->engine->startup.engine, 0,
                                                   self->params->layer_count, count, &prefix);
    if (err != ODSI_OK)
        return err;
    *reused_count = engine_session_length(*session);
    err = run_prompt(self, *session, count, logits);
    *ms = (double)(clock_monotonic_us() - begin_us) / 1e3;
    return err;
}

/* The same tokens as the last session's, with all positions computed; count of them. */
static enum odsi_err run_alone(struct run *self, uint32_t count, float *logits)
{
    struct engine_session *session = NULL;
    enum odsi_err err = engine_session_open(&session, self->engine->startup.engine, 0,
                                            self->params->layer_count, count);
    if (err == ODSI_OK)
        err = run_prompt(self, session, count, logits);
    engine_session_close(&session);
    return err;
}

static enum odsi_err measure(struct run *self, struct cli_bench_prefix *out)
{
    const uint32_t count = self->config->prompt_token_count;
    struct engine_session *first = NULL, *second = NULL;
    uint32_t none = 0;
    fill_prompt(self, 0);
    enum odsi_err err = run_alone(self, count < WARM_UP_TOKENS ? count : WARM_UP_TOKENS, NULL);
    if (err == ODSI_OK)
        err = run_session(self, 0, &first, self->logits, &out->first_ms, &none);
    if (err == ODSI_OK)
        err = run_session(self, 1, &second, self->logits, &out->second_ms, &out->reused_count);
    engine_session_close(&second);
    engine_session_close(&first);
    if (err == ODSI_OK)
        err = run_alone(self, count, self->expected);
    const size_t size = self->params->vocab_size * sizeof *self->logits;
    if (err == ODSI_OK && memcmp(self->logits, self->expected, size) != 0)
        err = odsi_fail(ODSI_ERR_INTERNAL,
                        "the logits after %u reused positions are not those "
                        "of a session that computed them itself",
                        out->reused_count);
    return err;
}

enum odsi_err cli_bench_prefix_run(struct cli_bench_prefix *out, struct cli_engine *engine,
                                   const struct cli_bench_prefix_config *config)
{
    struct run self = {
        .engine = engine, .config = config, .params = model_params_view(engine->model)};
    memset(out, 0, sizeof *out);
    enum odsi_err err = alloc_zeroed(&self.tokens, config->prompt_token_count, sizeof *self.tokens);
    if (err == ODSI_OK)
        err = alloc_zeroed(&self.keys, config->prompt_token_count / KV_PAGE_TOKENS,
                           sizeof *self.keys);
    if (err == ODSI_OK)
        err = alloc_zeroed(&self.logits, self.params->vocab_size, sizeof *self.logits);
    if (err == ODSI_OK)
        err = alloc_zeroed(&self.expected, self.params->vocab_size, sizeof *self.expected);
    if (err == ODSI_OK)
        err = measure(&self, out);
    alloc_free(self.tokens);
    alloc_free(self.keys);
    alloc_free(self.logits);
    alloc_free(self.expected);
    return err;
}
