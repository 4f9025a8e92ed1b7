#include "worker/engine/measure.h"

#include "common/base/alloc.h"
#include "common/base/clock.h"

#include <string.h>

#define CHUNK_TOKENS 64u
#define TIME_US      100000u /* per kind of step */
#define STEPS_MAX    32u

struct probe {
    struct engine *engine;
    struct engine_session *session;
    uint32_t tokens[CHUNK_TOKENS];
    float *input;  /* [CHUNK_TOKENS][dim]; NULL for a span that embeds */
    float *output; /* [CHUNK_TOKENS][dim]; NULL for a span that ends in logits */
    float *logits; /* [vocab_size]; NULL for others */
};

/* Runs the same chunk from position 0 again and again. */
static enum odsi_err run_chunks(struct probe *probe, uint32_t token_count, float *tokens_per_s)
{
    struct engine_step step = {.session = probe->session,
                               .token_count = token_count,
                               .tokens = probe->input ? NULL : probe->tokens,
                               .input = probe->input,
                               .output = probe->output,
                               .logits = probe->logits};
    uint64_t start_us = 0;
    uint64_t used_us = 0;
    uint32_t count = 0;
    for (uint32_t i = 0; i <= STEPS_MAX && (i < 2 || used_us < TIME_US); i++) {
        enum odsi_err err = engine_session_truncate(probe->session, 0);
        if (err == ODSI_OK)
            err = engine_run(probe->engine, &step, 1);
        if (err != ODSI_OK || step.status != ODSI_OK)
            return err != ODSI_OK ? err : step.status;
        if (i == 0) /* the first one warms caches and pages up */
            start_us = clock_monotonic_us();
        else
            count++;
        used_us = clock_monotonic_us() - start_us;
    }
    *tokens_per_s = (float)((double)count * token_count * 1e6 / (double)(used_us ? used_us : 1));
    return ODSI_OK;
}

static enum odsi_err fill_probe(struct probe *probe, const struct model_span *span)
{
    const struct model_params *p = model_params_view(span->model);
    const size_t count = (size_t)CHUNK_TOKENS * p->dim;
    enum odsi_err err = ODSI_OK;
    for (uint32_t i = 0; i < CHUNK_TOKENS; i++)
        probe->tokens[i] = i % p->vocab_size;
    if (!span->embed) {
        err = alloc_zeroed(&probe->input, count, sizeof(float));
        for (size_t i = 0; err == ODSI_OK && i < count; i++)
            probe->input[i] = (float)((int)(i * 7919u % 2001u) - 1000) * 1e-3f;
    }
    if (err == ODSI_OK)
        err = span->output ? alloc_zeroed(&probe->logits, p->vocab_size, sizeof(float))
                           : alloc_zeroed(&probe->output, count, sizeof(float));
    return err;
}

enum odsi_err measure_engine(struct measure *out, struct engine *engine,
                             const struct model_span *span)
{
    struct probe probe = {.engine = engine};
    const uint32_t limit =
        span->position_count < CHUNK_TOKENS ? span->position_count : CHUNK_TOKENS;
    memset(out, 0, sizeof *out);
    enum odsi_err err =
        engine_session_open(&probe.session, engine, span->layer_first, span->layer_end, limit);
    if (err == ODSI_OK)
        err = fill_probe(&probe, span);
    if (err == ODSI_OK)
        err = run_chunks(&probe, limit, &out->prefill_tokens_per_s);
    if (err == ODSI_OK)
        err = run_chunks(&probe, 1, &out->decode_tokens_per_s);
    engine_session_close(&probe.session);
    alloc_free(probe.input);
    alloc_free(probe.output);
    alloc_free(probe.logits);
    return err;
}
