#include "worker/cli/cli_bench.h"

#include "common/base/alloc.h"
#include "common/base/assert.h"
#include "common/base/clock.h"
#include "worker/cli/cli_memory.h"
#include "worker/engine/kv_cache.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

/* Ids of the byte tokens of a SentencePiece vocabulary: every model has at least those. */
#define PROMPT_ID_FIRST 3u
#define PROMPT_ID_COUNT 256u
#define WARM_UP_TOKENS  8u
/* Of a prompt in one batch beside answers, as workers cut it (worker/hop/executor.c). */
#define PIECE_TOKENS 64u

static int compare_doubles(const void *left, const void *right)
{
    const double a = *(const double *)left, b = *(const double *)right;
    return (a > b) - (a < b);
}

double cli_bench_percentile(double *values, size_t count, double share)
{
    ODSI_ASSERT(count > 0);
    qsort(values, count, sizeof *values, compare_doubles);
    const double rank = ceil(share * (double)count);
    const size_t index = rank < 1 ? 0 : (size_t)rank - 1;
    return values[index < count ? index : count - 1];
}

static void fill_prompt(uint32_t *tokens, uint32_t count, uint32_t session, uint32_t vocab_size)
{
    for (uint32_t i = 0; i < count; i++)
        tokens[i] = (PROMPT_ID_FIRST + (i * 31 + session * 17) % PROMPT_ID_COUNT) % vocab_size;
}

/* ---- the engine alone ------------------------------------------------------------------------ */

struct engine_run {
    struct cli_engine *engine;
    const struct cli_bench_config *config;
    const struct model_params *params;
    struct engine_session **sessions; /* [batch] */
    uint32_t *prompt;                 /* [prompt_token_count] */
    uint32_t *next;                   /* [batch]: the token each sequence runs next */
    float *logits;                    /* [batch][vocab_size] */
    struct engine_step *steps;        /* [batch] */
    double *step_ms;                  /* [gen_token_count] */
};

static uint32_t argmax(const float *logits, uint32_t count)
{
    uint32_t best = 0;
    for (uint32_t i = 1; i < count; i++)
        if (logits[i] > logits[best])
            best = i;
    return best;
}

static enum odsi_err open_sequences(struct engine_run *self)
{
    const struct cli_bench_config *config = self->config;
    enum odsi_err err =
        alloc_zeroed(&self->sessions, config->batch, sizeof(struct engine_session *));
    if (err == ODSI_OK)
        err = alloc_zeroed(&self->prompt, config->prompt_token_count, sizeof *self->prompt);
    if (err == ODSI_OK)
        err = alloc_zeroed(&self->next, config->batch, sizeof *self->next);
    if (err == ODSI_OK)
        err = alloc_zeroed(&self->logits, (size_t)config->batch * self->params->vocab_size,
                           sizeof *self->logits);
    if (err == ODSI_OK)
        err = alloc_zeroed(&self->steps, config->batch, sizeof *self->steps);
    if (err == ODSI_OK)
        err = alloc_zeroed(&self->step_ms, config->gen_token_count, sizeof *self->step_ms);
    for (uint32_t i = 0; err == ODSI_OK && i < config->batch; i++)
        err = engine_session_open(&self->sessions[i], self->engine->startup.engine, 0,
                                  self->params->layer_count,
                                  config->prompt_token_count + config->gen_token_count);
    return err;
}

static void close_sequences(struct engine_run *self)
{
    for (uint32_t i = 0; self->sessions && i < self->config->batch; i++)
        engine_session_close(&self->sessions[i]);
    alloc_free(self->sessions);
    alloc_free(self->prompt);
    alloc_free(self->next);
    alloc_free(self->logits);
    alloc_free(self->steps);
    alloc_free(self->step_ms);
}

static enum odsi_err prefill(struct engine_run *self, uint32_t sequence, uint32_t count)
{
    const uint32_t chunk = engine_batch_tokens_max(self->engine->startup.engine);
    float *logits = self->logits + (size_t)sequence * self->params->vocab_size;
    enum odsi_err err = ODSI_OK;
    fill_prompt(self->prompt, count, sequence, self->params->vocab_size);
    for (uint32_t at = 0; err == ODSI_OK && at < count; at += chunk) {
        const uint32_t left = count - at;
        struct engine_step step = {
            .session = self->sessions[sequence],
            .token_count = left < chunk ? left : chunk,
            .tokens = self->prompt + at,
            .logits = left <= chunk ? logits : NULL,
        };
        err = cli_engine_step(self->engine, &step);
    }
    self->next[sequence] = argmax(logits, self->params->vocab_size);
    return err;
}

/* Runs the first count of steps[] in one batch and takes the tokens that follow. */
static enum odsi_err run_steps(struct engine_run *self, uint32_t count)
{
    enum odsi_err err = engine_run(self->engine->startup.engine, self->steps, count);
    for (uint32_t i = 0; err == ODSI_OK && i < count; i++) {
        err = self->steps[i].status;
        if (err == ODSI_OK && self->steps[i].logits)
            self->next[i] = argmax(self->steps[i].logits, self->params->vocab_size);
    }
    return err;
}

static void set_decode(struct engine_run *self, uint32_t sequence)
{
    self->steps[sequence] = (struct engine_step){
        .session = self->sessions[sequence],
        .token_count = 1,
        .tokens = &self->next[sequence],
        .logits = self->logits + (size_t)sequence * self->params->vocab_size,
    };
}

/* One token of every sequence, in one batch. */
static enum odsi_err decode(struct engine_run *self)
{
    for (uint32_t i = 0; i < self->config->batch; i++)
        set_decode(self, i);
    return run_steps(self, self->config->batch);
}

/* A piece of the first sequence's prompt beside one token of every other, in one batch. */
static enum odsi_err run_mixed(struct engine_run *self)
{
    const uint32_t at = engine_session_length(self->sessions[0]);
    const uint32_t left = self->config->prompt_token_count - at;
    for (uint32_t i = 1; i < self->config->batch; i++)
        set_decode(self, i);
    self->steps[0] = (struct engine_step){
        .session = self->sessions[0],
        .token_count = left < PIECE_TOKENS ? left : PIECE_TOKENS,
        .tokens = self->prompt + at,
        .logits = left <= PIECE_TOKENS ? self->logits : NULL,
    };
    return run_steps(self, self->config->batch);
}

/* Bytes that one decode step reads: the weights once, and the keys and values (f16) of every
 * sequence at its mean length. */
static double step_size(const struct engine_run *self)
{
    const struct model_params *p = self->params;
    const double mean_length =
        self->config->prompt_token_count + (double)(self->config->gen_token_count + 1) / 2;
    const double kv_size = 2.0 * p->layer_count * p->kv_head_count * p->head_dim * 2.0;
    return (double)self->config->weight_size + kv_size * mean_length * self->config->batch;
}

static uint64_t work_size(const struct engine_run *self)
{
    const struct model_params *p = self->params;
    const uint64_t pages = engine_kv_tokens_total(self->engine->startup.engine) / KV_PAGE_TOKENS;
    const uint64_t kept = model_span_weight_size(self->engine->model, 0, p->layer_count) +
                          pages * kv_cache_page_size(p->layer_count, p->kv_head_count, p->head_dim);
    const uint64_t peak = cli_memory_peak();
    return peak > kept ? peak - kept : 0;
}

static enum odsi_err warm_up(struct engine_run *self)
{
    const uint32_t prompt_count = self->config->prompt_token_count;
    enum odsi_err err = ODSI_OK;
    for (uint32_t i = 0; err == ODSI_OK && i < self->config->batch; i++)
        err = prefill(self, i, prompt_count < WARM_UP_TOKENS ? prompt_count : WARM_UP_TOKENS);
    if (err == ODSI_OK)
        err = decode(self);
    for (uint32_t i = 0; err == ODSI_OK && i < self->config->batch; i++)
        err = engine_session_truncate(self->sessions[i], 0);
    return err;
}

/* All sequences are at their end. The first one begins again, the others behind their prompts. */
static enum odsi_err measure_mixed(struct engine_run *self, struct cli_bench *out)
{
    const struct cli_bench_config *config = self->config;
    uint32_t count = 0;
    uint64_t positions = 0;
    if (config->batch == 1)
        return ODSI_OK;
    enum odsi_err err = engine_session_truncate(self->sessions[0], 0);
    for (uint32_t i = 1; err == ODSI_OK && i < config->batch; i++)
        err = engine_session_truncate(self->sessions[i], config->prompt_token_count);
    fill_prompt(self->prompt, config->prompt_token_count, 0, self->params->vocab_size);
    const uint64_t begin_us = clock_monotonic_us();
    while (err == ODSI_OK && count < config->gen_token_count &&
           engine_session_length(self->sessions[0]) < config->prompt_token_count) {
        const uint64_t step_us = clock_monotonic_us();
        err = run_mixed(self);
        positions += self->steps[0].token_count + config->batch - 1;
        self->step_ms[count++] = (double)(clock_monotonic_us() - step_us) / 1e3;
    }
    if (err != ODSI_OK)
        return err;
    out->mixed_tps = (double)positions * 1e6 / (double)(clock_monotonic_us() - begin_us);
    out->mixed_token_ms = cli_bench_percentile(self->step_ms, count, 0.5);
    return ODSI_OK;
}

static enum odsi_err measure(struct engine_run *self, struct cli_bench *out)
{
    const struct cli_bench_config *config = self->config;
    enum odsi_err err = ODSI_OK;
    uint64_t begin_us = clock_monotonic_us();
    for (uint32_t i = 0; err == ODSI_OK && i < config->batch; i++) {
        err = prefill(self, i, config->prompt_token_count);
        if (i == 0)
            out->ttft_ms = (double)(clock_monotonic_us() - begin_us) / 1e3;
    }
    const double prefill_s = (double)(clock_monotonic_us() - begin_us) / 1e6;
    begin_us = clock_monotonic_us();
    for (uint32_t i = 0; err == ODSI_OK && i < config->gen_token_count; i++) {
        const uint64_t step_us = clock_monotonic_us();
        err = decode(self);
        self->step_ms[i] = (double)(clock_monotonic_us() - step_us) / 1e3;
    }
    const double decode_s = (double)(clock_monotonic_us() - begin_us) / 1e6;
    if (err != ODSI_OK)
        return err;
    out->ttft_p99_ms = out->ttft_ms;
    out->prefill_tps = (double)config->prompt_token_count * config->batch / prefill_s;
    out->decode_tps = (double)config->gen_token_count * config->batch / decode_s;
    out->per_token_p50_ms = cli_bench_percentile(self->step_ms, config->gen_token_count, 0.5);
    out->per_token_p99_ms = cli_bench_percentile(self->step_ms, config->gen_token_count, 0.99);
    out->bytes_per_token = step_size(self) / config->batch;
    out->read_gbps = out->bytes_per_token * out->decode_tps / 1e9;
    return ODSI_OK;
}

enum odsi_err cli_bench_engine(struct cli_bench *out, struct cli_engine *engine,
                               const struct cli_bench_config *config)
{
    struct engine_run self = {
        .engine = engine, .config = config, .params = model_params_view(engine->model)};
    memset(out, 0, sizeof *out);
    enum odsi_err err = open_sequences(&self);
    if (err == ODSI_OK)
        err = warm_up(&self);
    const int has_peak = cli_memory_peak_reset();
    if (err == ODSI_OK)
        err = measure(&self, out);
    if (err == ODSI_OK)
        err = measure_mixed(&self, out);
    if (has_peak)
        out->work_size = work_size(&self);
    close_sequences(&self);
    return err;
}

/* ---- a swarm --------------------------------------------------------------------------------- */

/* One answer under way. */
struct session {
    struct swarm_run *run;
    struct cli_answer answer;
    uint32_t *prompt;        /* [prompt_token_count] */
    uint64_t first_token_us; /* 0 before */
    uint64_t last_token_us;
};

struct swarm_run {
    const struct cli_bench_config *config;
    struct session *sessions; /* [batch] */
    double *ttft_ms;          /* [batch] */
    double *gaps_ms;          /* [gap_max] */
    size_t gap_count;
    size_t gap_max;
    uint64_t begin_us;
};

static void session_piece(void *context, const struct cli_answer *answer, uint32_t token_count,
                          size_t text_size)
{
    struct session *self = context;
    struct swarm_run *run = self->run;
    const uint64_t now_us = clock_monotonic_us();
    (void)answer;
    (void)text_size;
    if (token_count == 0)
        return;
    uint32_t gaps = token_count;
    if (self->first_token_us == 0) {
        self->first_token_us = now_us;
        self->last_token_us = now_us;
        gaps--; /* tokens that came along have no gap of their own */
    }
    for (uint32_t i = 0; i < gaps && run->gap_count < run->gap_max; i++)
        run->gaps_ms[run->gap_count++] = (double)(now_us - self->last_token_us) / 1e3 / gaps;
    self->last_token_us = now_us;
}

static const struct cli_answer_events session_events = {.on_piece = session_piece};

static enum odsi_err start_sessions(struct swarm_run *run, struct cli_client *client,
                                    const char *model)
{
    const struct cli_bench_config *config = run->config;
    static const struct cli_sampling greedy = {.ignore_end = 1};
    enum odsi_err err = ODSI_OK;
    for (uint32_t i = 0; err == ODSI_OK && i < config->batch; i++) {
        struct session *session = &run->sessions[i];
        session->run = run;
        err = alloc_zeroed(&session->prompt, config->prompt_token_count, sizeof *session->prompt);
        if (err != ODSI_OK)
            break;
        fill_prompt(session->prompt, config->prompt_token_count, i, UINT32_MAX);
        const struct cli_request request = {
            .model = model,
            .prompt_tokens = session->prompt,
            .prompt_token_count = config->prompt_token_count,
            .max_tokens = config->gen_token_count,
            .sampling = &greedy,
        };
        err =
            cli_client_generate_start(client, &session->answer, &request, &session_events, session);
    }
    return err;
}

static enum odsi_err evaluate(struct swarm_run *run, struct cli_bench *out)
{
    const struct cli_bench_config *config = run->config;
    uint64_t last_first_us = run->begin_us, first_first_us = UINT64_MAX, last_us = run->begin_us;
    uint64_t new_tokens = 0;
    for (uint32_t i = 0; i < config->batch; i++) {
        const struct session *session = &run->sessions[i];
        const struct cli_answer *answer = &session->answer;
        if (answer->err != ODSI_OK)
            return odsi_fail(answer->err, "%s", answer->err_text);
        if (session->first_token_us == 0)
            return odsi_fail(ODSI_ERR_CORRUPT, "an answer came without a token");
        run->ttft_ms[i] = (double)(session->first_token_us - run->begin_us) / 1e3;
        new_tokens += answer->token_count;
        if (session->first_token_us > last_first_us)
            last_first_us = session->first_token_us;
        if (session->first_token_us < first_first_us)
            first_first_us = session->first_token_us;
        if (session->last_token_us > last_us)
            last_us = session->last_token_us;
    }
    out->prefill_tps = (double)config->prompt_token_count * config->batch * 1e6 /
                       (double)(last_first_us - run->begin_us);
    if (last_us > first_first_us)
        out->decode_tps =
            (double)(new_tokens - config->batch) * 1e6 / (double)(last_us - first_first_us);
    out->ttft_ms = cli_bench_percentile(run->ttft_ms, config->batch, 0.5);
    out->ttft_p99_ms = cli_bench_percentile(run->ttft_ms, config->batch, 0.99);
    if (run->gap_count > 0) {
        out->per_token_p50_ms = cli_bench_percentile(run->gaps_ms, run->gap_count, 0.5);
        out->per_token_p99_ms = cli_bench_percentile(run->gaps_ms, run->gap_count, 0.99);
    }
    return ODSI_OK;
}

enum odsi_err cli_bench_swarm(struct cli_bench *out, struct cli_client *client, const char *model,
                              const struct cli_bench_config *config)
{
    struct swarm_run run = {.config = config,
                            .gap_max = (size_t)config->batch * config->gen_token_count};
    memset(out, 0, sizeof *out);
    enum odsi_err err = alloc_zeroed(&run.sessions, config->batch, sizeof *run.sessions);
    if (err == ODSI_OK)
        err = alloc_zeroed(&run.ttft_ms, config->batch, sizeof *run.ttft_ms);
    if (err == ODSI_OK)
        err = alloc_zeroed(&run.gaps_ms, run.gap_max, sizeof *run.gaps_ms);
    run.begin_us = clock_monotonic_us();
    if (err == ODSI_OK)
        err = start_sessions(&run, client, model);
    cli_client_run(client); /* also what was started before an error */
    if (err == ODSI_OK)
        err = evaluate(&run, out);
    for (uint32_t i = 0; run.sessions && i < config->batch; i++) {
        cli_client_answer_free(&run.sessions[i].answer);
        alloc_free(run.sessions[i].prompt);
    }
    alloc_free(run.sessions);
    alloc_free(run.ttft_ms);
    alloc_free(run.gaps_ms);
    return err;
}
