#include "worker/cli/cli_trace.h"

#include "common/base/alloc.h"
#include "worker/engine/sampler.h"
#include "worker/engine/stop.h"

#include <string.h>

#define TEXT_SIZE_MAX (64u << 20)

/* Hashes are over bytes as they lie in memory here. */
_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "residual streams hash little-endian");

/* A run under way. */
struct run {
    struct cli_trace *trace;
    struct cli_engine *engine;
    const struct cli_trace_config *config;
    const struct model_params *params;
    struct digest_stream **streams; /* [layer_count] */
    struct engine_session *session;
    struct sampler *sampler;
    struct stop stop;
    char *piece; /* [TOKENIZER_PIECE_SIZE_MAX] */
};

static void tap(void *context, uint32_t layer, const float *x, uint32_t rows)
{
    struct run *self = context;
    digest_stream_add(self->streams[layer], x, (size_t)rows * self->params->dim * sizeof *x);
}

static enum odsi_err check_tokens(const struct run *self)
{
    for (uint32_t i = 0; i < self->config->token_count; i++)
        if (self->config->tokens[i] >= self->params->vocab_size)
            return odsi_fail(ODSI_ERR_INVALID, "token %u: the vocabulary has 0 to %u",
                             self->config->tokens[i], self->params->vocab_size - 1);
    return ODSI_OK;
}

static enum odsi_err take_memory(struct run *self)
{
    struct cli_trace *trace = self->trace;
    const uint32_t layers = self->params->layer_count;
    enum odsi_err err = alloc_zeroed(&trace->layers, layers, sizeof *trace->layers);
    if (err == ODSI_OK)
        err = alloc_zeroed(&trace->logits, self->params->vocab_size, sizeof *trace->logits);
    if (err == ODSI_OK)
        err = alloc_zeroed(&trace->new_tokens, self->config->new_tokens_max,
                           sizeof *trace->new_tokens);
    if (err == ODSI_OK)
        err = alloc_zeroed(&self->piece, TOKENIZER_PIECE_SIZE_MAX, 1);
    if (err == ODSI_OK)
        err = alloc_zeroed(&self->streams, layers, sizeof(struct digest_stream *));
    for (uint32_t i = 0; err == ODSI_OK && i < layers; i++)
        err = digest_stream_open(&self->streams[i]);
    return err;
}

static enum odsi_err run_prompt(struct run *self)
{
    struct cli_trace *trace = self->trace;
    struct engine *engine = self->engine->startup.engine;
    const uint32_t count = self->config->token_count;
    const uint32_t chunk_max = engine_batch_tokens_max(engine);
    uint32_t chunk = self->config->chunk;
    enum odsi_err err = ODSI_OK;
    if (chunk == 0 || chunk > chunk_max)
        chunk = chunk_max;
    engine_set_tap(engine, tap, self);
    for (uint32_t at = 0; err == ODSI_OK && at < count; at += chunk) {
        const uint32_t left = count - at;
        struct engine_step step = {
            .session = self->session,
            .token_count = left < chunk ? left : chunk,
            .tokens = self->config->tokens + at,
            .logits = left <= chunk ? trace->logits : NULL,
        };
        err = cli_engine_step(self->engine, &step);
    }
    engine_set_tap(engine, NULL, NULL);
    if (err != ODSI_OK)
        return err;
    for (uint32_t i = 0; i < self->params->layer_count; i++)
        digest_stream_finish(self->streams[i], &trace->layers[i]);
    digest_of(&trace->logits_id, trace->logits, self->params->vocab_size * sizeof *trace->logits);
    return ODSI_OK;
}

/* Why the answer ends with this token, NULL when it goes on. The rules and their order are those
 * of a worker's last stage (worker/hop/executor.c). */
static const char *finish_reason(struct run *self, uint32_t token)
{
    const struct tokenizer *tokenizer = self->engine->tokenizer;
    if (!self->config->sampling->ignore_end && tokenizer_is_end(tokenizer, token))
        return "end";
    const size_t size = tokenizer_piece(tokenizer, token, self->piece);
    buf_append(&self->trace->text, self->piece, size);
    if (stop_feed(&self->stop, self->piece, size))
        return "stop";
    if (self->trace->new_token_count == self->config->new_tokens_max)
        return "length";
    return NULL;
}

static enum odsi_err generate(struct run *self, float *logits)
{
    struct cli_trace *trace = self->trace;
    struct sampler_params params;
    uint32_t position = self->config->token_count;
    cli_sampling_params(self->config->sampling, &params);
    enum odsi_err err = cli_sampling_stop(self->config->sampling, &self->stop);
    if (err == ODSI_OK)
        err = sampler_open(&self->sampler, &params, self->params->vocab_size);
    for (uint32_t i = 0; err == ODSI_OK && i < self->config->token_count; i++)
        sampler_accept(self->sampler, self->config->tokens[i]);
    while (err == ODSI_OK) {
        uint32_t token = 0;
        float logprob = 0.0f;
        sampler_pick(self->sampler, logits, position, &token, &logprob);
        sampler_accept(self->sampler, token);
        trace->new_tokens[trace->new_token_count++] = token;
        trace->finish_reason = finish_reason(self, token);
        if (trace->finish_reason)
            break;
        struct engine_step step = {
            .session = self->session,
            .token_count = 1,
            .tokens = &trace->new_tokens[trace->new_token_count - 1],
            .logits = logits,
        };
        err = cli_engine_step(self->engine, &step);
        position++;
    }
    return err == ODSI_OK ? buf_status(&trace->text) : err;
}

/* The trace's own logits must stay those of the last prompt token. */
static enum odsi_err generate_aside(struct run *self)
{
    float *logits = NULL;
    enum odsi_err err = alloc_zeroed(&logits, self->params->vocab_size, sizeof *logits);
    if (err == ODSI_OK) {
        memcpy(logits, self->trace->logits, self->params->vocab_size * sizeof *logits);
        err = generate(self, logits);
    }
    alloc_free(logits);
    return err;
}

enum odsi_err cli_trace_run(struct cli_trace *self, struct cli_engine *engine,
                            const struct cli_trace_config *config)
{
    struct run run = {.trace = self,
                      .engine = engine,
                      .config = config,
                      .params = model_params_view(engine->model)};
    memset(self, 0, sizeof *self);
    buf_init(&self->text, TEXT_SIZE_MAX);
    enum odsi_err err = check_tokens(&run);
    if (err == ODSI_OK)
        err = take_memory(&run);
    /* The last token is picked, never run. */
    if (err == ODSI_OK)
        err = engine_session_open(&run.session, engine->startup.engine, 0, run.params->layer_count,
                                  config->token_count +
                                      (config->new_tokens_max ? config->new_tokens_max - 1 : 0));
    if (err == ODSI_OK)
        err = run_prompt(&run);
    if (err == ODSI_OK && config->new_tokens_max > 0)
        err = generate_aside(&run);
    sampler_close(&run.sampler);
    engine_session_close(&run.session);
    for (uint32_t i = 0; run.streams && i < run.params->layer_count; i++)
        digest_stream_close(&run.streams[i]);
    alloc_free(run.streams);
    alloc_free(run.piece);
    return err;
}

void cli_trace_free(struct cli_trace *self)
{
    alloc_free(self->layers);
    alloc_free(self->logits);
    alloc_free(self->new_tokens);
    buf_free(&self->text);
    memset(self, 0, sizeof *self);
}
