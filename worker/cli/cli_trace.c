#include "worker/cli/cli_trace.h"

#include "common/base/alloc.h"
#include "common/base/assert.h"
#include "worker/engine/sampler.h"
#include "worker/engine/stop.h"

#include <string.h>

#define TEXT_SIZE_MAX (64u << 20)
/* A neighbour's step has 1 to so many positions, and its text ends at some length above. */
#define NEIGHBOUR_STEP_MAX 13u
#define NEIGHBOUR_TEXT_MAX 100u

/* Hashes are over bytes as they lie in memory here. */
_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "residual streams hash little-endian");

/* A session whose only purpose is to be in the way. */
struct neighbour {
    struct engine_session *session;
    uint32_t text_count; /* where its text ends; then it begins again */
    uint32_t tokens[NEIGHBOUR_STEP_MAX];
    float *logits; /* [vocab_size]; NULL: it wants none */
};

/* A run under way. */
struct run {
    struct cli_trace *trace;
    struct cli_engine *engine;
    const struct cli_trace_config *config;
    const struct model_params *params;
    struct digest_stream **streams; /* [layer_count] */
    struct engine_session *session;
    struct neighbour *neighbours; /* [neighbour_count] */
    struct engine_step *steps;    /* [neighbour_count + 1] */
    uint32_t round;               /* batches so far */
    uint32_t row_first;           /* of the traced session's rows in the batch */
    uint32_t row_count;
    struct sampler *sampler;
    struct stop stop;
    char *piece; /* [TOKENIZER_PIECE_SIZE_MAX] */
};

static void tap(void *context, uint32_t layer, const float *x, uint32_t rows)
{
    struct run *self = context;
    const size_t dim = self->params->dim;
    ODSI_ASSERT(self->row_first + self->row_count <= rows);
    digest_stream_add(self->streams[layer], x + self->row_first * dim,
                      self->row_count * dim * sizeof *x);
}

/* ---- neighbours ------------------------------------------------------------------------------ */

static uint32_t neighbour_positions(const struct model_params *params)
{
    return params->context_length < NEIGHBOUR_TEXT_MAX ? params->context_length
                                                       : NEIGHBOUR_TEXT_MAX;
}

/* The last token is picked, never run. */
static uint32_t own_positions(const struct cli_trace_config *config)
{
    return config->token_count + (config->new_tokens_max ? config->new_tokens_max - 1 : 0);
}

uint32_t cli_trace_positions(const struct cli_trace_config *config,
                             const struct model_params *params)
{
    const uint32_t own = own_positions(config);
    const uint32_t others = neighbour_positions(params);
    return config->neighbour_count > 0 && others > own ? others : own;
}

static enum odsi_err open_neighbours(struct run *self)
{
    const uint32_t count = self->config->neighbour_count;
    const uint32_t text_max = neighbour_positions(self->params);
    ODSI_ASSERT(count <= CLI_TRACE_NEIGHBOURS_MAX);
    enum odsi_err err = alloc_zeroed(&self->neighbours, count, sizeof *self->neighbours);
    if (err == ODSI_OK)
        err = alloc_zeroed(&self->steps, count + 1, sizeof *self->steps);
    for (uint32_t i = 0; err == ODSI_OK && i < count; i++) {
        struct neighbour *neighbour = &self->neighbours[i];
        neighbour->text_count = text_max - i * (text_max / (count + 1));
        if (i % 2 == 0)
            err = alloc_zeroed(&neighbour->logits, self->params->vocab_size, sizeof(float));
        if (err == ODSI_OK)
            err = engine_session_open(&neighbour->session, self->engine->startup.engine, 0,
                                      self->params->layer_count, neighbour->text_count);
    }
    return err;
}

static void close_neighbours(struct run *self)
{
    for (uint32_t i = 0; self->neighbours && i < self->config->neighbour_count; i++) {
        engine_session_close(&self->neighbours[i].session);
        alloc_free(self->neighbours[i].logits);
    }
    alloc_free(self->neighbours);
    alloc_free(self->steps);
}

/* Its next step: of another length in every batch, from one position to a piece of a prompt. */
static enum odsi_err next_step(struct run *self, uint32_t index, struct engine_step *out)
{
    struct neighbour *neighbour = &self->neighbours[index];
    uint32_t count = 1 + (5 * index + 3 * self->round) % NEIGHBOUR_STEP_MAX;
    enum odsi_err err = ODSI_OK;
    if (count > neighbour->text_count)
        count = neighbour->text_count;
    if (count > neighbour->text_count - engine_session_length(neighbour->session))
        err = engine_session_truncate(neighbour->session, 0);
    const uint32_t at = engine_session_length(neighbour->session);
    for (uint32_t i = 0; i < count; i++)
        neighbour->tokens[i] =
            (uint32_t)(((uint64_t)(at + i + 1) * 7919u * (index + 1) + self->round) %
                       self->params->vocab_size);
    *out = (struct engine_step){.session = neighbour->session,
                                .token_count = count,
                                .tokens = neighbour->tokens,
                                .logits = neighbour->logits};
    return err;
}

/* Runs a step of the traced session in the middle of a batch with one of each neighbour. */
static enum odsi_err run_step(struct run *self, const struct engine_step *step)
{
    const uint32_t count = self->config->neighbour_count;
    const uint32_t own = count / 2;
    enum odsi_err err = ODSI_OK;
    self->row_first = 0;
    self->row_count = step->token_count;
    for (uint32_t i = 0; err == ODSI_OK && i < count; i++) {
        struct engine_step *next = &self->steps[i < own ? i : i + 1];
        err = next_step(self, i, next);
        self->row_first += i < own ? next->token_count : 0;
    }
    self->steps[own] = *step;
    self->round++;
    if (err == ODSI_OK)
        err = engine_run(self->engine->startup.engine, self->steps, count + 1);
    return err != ODSI_OK ? err : self->steps[own].status;
}

/* ---- the trace ------------------------------------------------------------------------------- */

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
    const uint32_t chunk_max =
        engine_batch_tokens_max(engine) - self->config->neighbour_count * NEIGHBOUR_STEP_MAX;
    uint32_t chunk = self->config->chunk;
    enum odsi_err err = ODSI_OK;
    if (chunk == 0 || chunk > chunk_max)
        chunk = chunk_max;
    if (self->config->each_position)
        chunk = 1;
    engine_set_tap(engine, tap, self);
    for (uint32_t at = 0; err == ODSI_OK && at < count; at += chunk) {
        const uint32_t left = count - at;
        struct engine_step step = {
            .session = self->session,
            .token_count = left < chunk ? left : chunk,
            .tokens = self->config->tokens + at,
            .logits = left <= chunk || self->config->each_position ? trace->logits : NULL,
        };
        err = run_step(self, &step);
        if (err == ODSI_OK && self->config->each_position)
            err = self->config->each_position(self->config->context, trace->logits);
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
        err = run_step(self, &step);
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
    if (err == ODSI_OK)
        err = engine_session_open(&run.session, engine->startup.engine, 0, run.params->layer_count,
                                  own_positions(config));
    if (err == ODSI_OK)
        err = open_neighbours(&run);
    if (err == ODSI_OK)
        err = run_prompt(&run);
    if (err == ODSI_OK && config->new_tokens_max > 0)
        err = generate_aside(&run);
    sampler_close(&run.sampler);
    engine_session_close(&run.session);
    close_neighbours(&run);
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
