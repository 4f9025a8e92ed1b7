#include "worker/engine/engine.h"

#include "common/base/alloc.h"
#include "common/base/assert.h"
#include "common/base/limits.h"
#include "worker/engine/forward.h"
#include "worker/engine/kv_cache.h"
#include "worker/engine/prefix_key.h"

#include <string.h>

#define BATCH_STEPS_DEFAULT 64u
/* Rows of one product for logits: of a large vocabulary those of a whole batch would be most of
 * what the engine works in, and so many share one reading of the output layer well enough. */
#define LOGIT_ROWS 16u

struct engine {
    const struct model_span *span;
    const struct model_params *params;
    struct backend *backend;
    struct kv_cache *cache;
    struct forward *forward;
    uint32_t batch_tokens_max;
    uint32_t batch_steps_max;
    uint32_t logit_rows;
    uint32_t *tokens;             /* [batch_tokens_max] */
    uint32_t *positions;          /* [batch_tokens_max] */
    const uint32_t **page_tables; /* [batch_tokens_max] */
    float *host;                  /* [batch_tokens_max][dim]; only with a tap */
    void (*tap)(void *context, uint32_t layer, const float *x, uint32_t rows);
    void *tap_context;
    uint32_t session_count;
};

struct engine_session {
    struct engine *engine;
    struct kv_table table;
    uint32_t layer_first;
    uint32_t layer_end;
    uint32_t token_limit;
    uint32_t length;
    struct digest *page_keys; /* [key_count] of the pages that it shares or will offer */
    uint32_t key_count;
};

/* ---- opening and closing -------------------------------------------------------------------- */

static enum odsi_err take_cache(struct engine *self, uint64_t kv_size)
{
    const struct model_params *p = self->params;
    const uint32_t layers = self->span->layer_end - self->span->layer_first;
    uint64_t pages = kv_size / kv_cache_page_size(layers, p->kv_head_count, p->head_dim);
    if (pages == 0)
        pages = 1;
    if (pages > UINT32_MAX)
        pages = UINT32_MAX;
    return kv_cache_open(&self->cache, self->backend, (uint32_t)pages, layers, p->kv_head_count,
                         p->head_dim);
}

enum odsi_err engine_open(struct engine **out, const struct model_span *span,
                          const struct engine_config *config)
{
    struct engine *self = NULL;
    *out = NULL;
    enum odsi_err err = alloc_zeroed(&self, 1, sizeof *self);
    if (err != ODSI_OK)
        return err;
    self->span = span;
    self->params = model_params_view(span->model);
    self->backend = span->backend;
    self->batch_tokens_max =
        config->batch_tokens_max ? config->batch_tokens_max : LIMIT_STEP_TOKENS;
    self->batch_steps_max = config->batch_steps_max ? config->batch_steps_max : BATCH_STEPS_DEFAULT;
    self->logit_rows = self->batch_steps_max < LOGIT_ROWS ? self->batch_steps_max : LOGIT_ROWS;
    err = alloc_zeroed(&self->tokens, self->batch_tokens_max, sizeof *self->tokens);
    if (err == ODSI_OK)
        err = alloc_zeroed(&self->positions, self->batch_tokens_max, sizeof *self->positions);
    if (err == ODSI_OK)
        err = alloc_zeroed(&self->page_tables, self->batch_tokens_max, sizeof *self->page_tables);
    if (err == ODSI_OK)
        err = forward_open(&self->forward, span, self->batch_tokens_max, self->logit_rows);
    if (err == ODSI_OK)
        err = take_cache(self, config->kv_size);
    if (err != ODSI_OK) {
        engine_close(&self);
        return err;
    }
    *out = self;
    return ODSI_OK;
}

void engine_close(struct engine **self_pointer)
{
    struct engine *self = *self_pointer;
    if (!self)
        return;
    ODSI_ASSERT(self->session_count == 0);
    forward_close(&self->forward);
    kv_cache_close(&self->cache);
    alloc_free(self->tokens);
    alloc_free(self->positions);
    alloc_free(self->page_tables);
    alloc_free(self->host);
    alloc_free(self);
    *self_pointer = NULL;
}

/* ---- sessions ------------------------------------------------------------------------------- */

static enum odsi_err check_session(const struct engine *engine, uint32_t layer_first,
                                   uint32_t layer_end, uint32_t token_limit,
                                   const struct engine_prefix *prefix)
{
    const struct model_span *span = engine->span;
    if (layer_first >= layer_end || layer_first < span->layer_first || layer_end > span->layer_end)
        return odsi_fail(ODSI_ERR_RANGE, "layers %u-%u: this worker holds %u-%u", layer_first,
                         layer_end - 1, span->layer_first, span->layer_end - 1);
    if (token_limit == 0 || token_limit > span->position_count)
        return odsi_fail(ODSI_ERR_RANGE, "a session of %u positions: this model has 1 to %u",
                         token_limit, span->position_count);
    if (prefix->prompt_count > token_limit ||
        prefix->key_count > prefix->prompt_count / KV_PAGE_TOKENS)
        return odsi_fail(ODSI_ERR_INVALID,
                         "%u prefix keys for a prompt of %u tokens in a session of %u positions",
                         prefix->key_count, prefix->prompt_count, token_limit);
    return ODSI_OK;
}

static enum odsi_err take_pages(struct engine_session *self, const struct engine_prefix *prefix)
{
    const uint32_t held_max = prefix->prompt_count > 0 ? prefix->prompt_count - 1 : 0;
    const enum odsi_err err =
        alloc_zeroed(&self->page_keys, prefix->key_count, sizeof *self->page_keys);
    if (err != ODSI_OK)
        return err;
    self->key_count = prefix->key_count;
    prefix_key_pages(self->page_keys, &prefix->scope, self->layer_first, self->layer_end,
                     prefix->keys, prefix->key_count);
    return kv_cache_take(self->engine->cache, &self->table, self->token_limit, self->page_keys,
                         self->key_count, held_max, &self->length);
}

enum odsi_err engine_session_open_prefix(struct engine_session **out, struct engine *engine,
                                         uint32_t layer_first, uint32_t layer_end,
                                         uint32_t token_limit, const struct engine_prefix *prefix)
{
    struct engine_session *self = NULL;
    *out = NULL;
    enum odsi_err err = check_session(engine, layer_first, layer_end, token_limit, prefix);
    if (err == ODSI_OK)
        err = alloc_zeroed(&self, 1, sizeof *self);
    if (err != ODSI_OK)
        return err;
    self->engine = engine;
    self->layer_first = layer_first;
    self->layer_end = layer_end;
    self->token_limit = token_limit;
    engine->session_count++;
    err = take_pages(self, prefix);
    if (err != ODSI_OK)
        engine_session_close(&self);
    *out = self;
    return err;
}

enum odsi_err engine_session_open(struct engine_session **out, struct engine *engine,
                                  uint32_t layer_first, uint32_t layer_end, uint32_t token_limit)
{
    static const struct engine_prefix none = {0};
    return engine_session_open_prefix(out, engine, layer_first, layer_end, token_limit, &none);
}

void engine_session_close(struct engine_session **self)
{
    if (!*self)
        return;
    kv_cache_give((*self)->engine->cache, &(*self)->table);
    (*self)->engine->session_count--;
    alloc_free((*self)->page_keys);
    alloc_free(*self);
    *self = NULL;
}

uint32_t engine_session_length(const struct engine_session *self)
{
    return self->length;
}

enum odsi_err engine_session_begin_at(struct engine_session *self, uint32_t length)
{
    if (length > self->length)
        return odsi_fail(ODSI_ERR_RANGE, "position %u: the session holds %u so far", length,
                         self->length);
    const enum odsi_err err = kv_cache_truncate(self->engine->cache, &self->table, length);
    if (err == ODSI_OK)
        self->length = length;
    return err;
}

enum odsi_err engine_session_truncate(struct engine_session *self, uint32_t length)
{
    ODSI_ASSERT(length <= self->length);
    const enum odsi_err err = engine_session_begin_at(self, length);
    if (err == ODSI_OK && self->key_count > length / KV_PAGE_TOKENS)
        self->key_count = length / KV_PAGE_TOKENS;
    return err;
}

/* Offers the pages that have become whole. */
static void publish_pages(struct engine_session *self)
{
    struct kv_table *table = &self->table;
    while (table->shared_count < self->key_count &&
           self->length / KV_PAGE_TOKENS > table->shared_count)
        if (!kv_cache_publish(self->engine->cache, table, &self->page_keys[table->shared_count]))
            self->key_count = table->shared_count; /* nor any page behind it */
}

/* ---- one batch ------------------------------------------------------------------------------ */

static enum odsi_err check_batch(const struct engine *self, const struct engine_step *steps,
                                 uint32_t step_count)
{
    uint64_t rows = 0;
    ODSI_ASSERT(step_count > 0);
    for (uint32_t i = 0; i < step_count; i++) {
        const struct engine_session *session = steps[i].session;
        ODSI_ASSERT(session->engine == self);
        ODSI_ASSERT(session->layer_first == steps[0].session->layer_first);
        ODSI_ASSERT(session->layer_end == steps[0].session->layer_end);
        ODSI_ASSERT(session->layer_first == 0 ? !!steps[i].tokens : !!steps[i].input);
        ODSI_ASSERT(session->table.shared_count <= session->length / KV_PAGE_TOKENS);
        if (steps[i].token_count == 0 ||
            steps[i].token_count > session->token_limit - session->length)
            return odsi_fail(ODSI_ERR_RANGE, "%u positions from %u on: the session ends at %u",
                             steps[i].token_count, session->length, session->token_limit);
        rows += steps[i].token_count;
    }
    if (rows > self->batch_tokens_max || step_count > self->batch_steps_max)
        return odsi_fail(ODSI_ERR_RANGE, "a batch of %llu positions in %u steps: at most %u in %u",
                         (unsigned long long)rows, step_count, self->batch_tokens_max,
                         self->batch_steps_max);
    return ODSI_OK;
}

/* Fills the batch's row arrays and puts its input into the residual stream. */
static enum odsi_err load_rows(struct engine *self, struct engine_step *steps, uint32_t step_count,
                               struct op_batch *batch)
{
    const struct backend_ops *ops = self->backend->ops;
    const uint32_t dim = self->params->dim;
    float *x = forward_x_dev(self->forward);
    uint32_t row = 0;
    for (uint32_t i = 0; i < step_count; i++) {
        const struct engine_session *session = steps[i].session;
        for (uint32_t t = 0; t < steps[i].token_count; t++) {
            self->positions[row + t] = session->length + t;
            self->page_tables[row + t] = session->table.pages;
        }
        if (session->layer_first == 0) {
            for (uint32_t t = 0; t < steps[i].token_count; t++) {
                ODSI_ASSERT(steps[i].tokens[t] < self->params->vocab_size);
                self->tokens[row + t] = steps[i].tokens[t];
            }
        } else {
            const enum odsi_err err =
                ops->upload(self->backend, x + (size_t)row * dim, steps[i].input,
                            (size_t)steps[i].token_count * dim * sizeof(float));
            if (err != ODSI_OK)
                return err;
        }
        row += steps[i].token_count;
    }
    batch->rows = row;
    batch->position = self->positions;
    batch->page_table = self->page_tables;
    if (steps[0].session->layer_first == 0)
        return forward_embed(self->forward, self->tokens, row);
    return ODSI_OK;
}

static enum odsi_err run_tap(struct engine *self, uint32_t layer, uint32_t rows)
{
    const size_t count = (size_t)rows * self->params->dim;
    enum odsi_err err = ODSI_OK;
    if (!self->tap)
        return ODSI_OK;
    if (!self->host)
        err = alloc_zeroed(&self->host, (size_t)self->batch_tokens_max * self->params->dim,
                           sizeof *self->host);
    if (err == ODSI_OK)
        err = self->backend->ops->download(self->backend, self->host, forward_x_dev(self->forward),
                                           count * sizeof(float));
    if (err == ODSI_OK)
        self->tap(self->tap_context, layer, self->host, rows);
    return err;
}

static enum odsi_err run_layers(struct engine *self, uint32_t layer_first, uint32_t layer_end,
                                const struct op_batch *batch)
{
    for (uint32_t layer = layer_first; layer < layer_end; layer++) {
        enum odsi_err err = forward_layer(self->forward, layer - self->span->layer_first,
                                          kv_cache_pool(self->cache), batch);
        if (err == ODSI_OK)
            err = run_tap(self, layer, batch->rows);
        if (err != ODSI_OK)
            return err;
    }
    return ODSI_OK;
}

/* Logits of the marked rows, which are those of steps[first], ... in order. */
static enum odsi_err run_logit_group(struct engine *self, const struct engine_step *steps,
                                     uint32_t step_count, uint32_t first, uint32_t group_count)
{
    const uint32_t vocab_size = self->params->vocab_size;
    const float *logits = NULL;
    enum odsi_err err = forward_logits(self->forward, group_count, &logits);
    for (uint32_t i = first, row = 0; err == ODSI_OK && i < step_count && row < group_count; i++) {
        if (!steps[i].logits)
            continue;
        err = self->backend->ops->download(self->backend, steps[i].logits,
                                           logits + (size_t)row++ * vocab_size,
                                           vocab_size * sizeof(float));
    }
    return err;
}

/* Logits of the last position of every step that wants them, LOGIT_ROWS in one product. */
static enum odsi_err run_logits(struct engine *self, struct engine_step *steps, uint32_t step_count)
{
    uint32_t row = 0;
    uint32_t first = 0; /* step of the group's first row */
    uint32_t wanted = 0;
    enum odsi_err err = ODSI_OK;
    for (uint32_t i = 0; i < step_count && err == ODSI_OK; i++) {
        row += steps[i].token_count;
        if (!steps[i].logits)
            continue;
        ODSI_ASSERT(steps[i].session->layer_end == self->params->layer_count);
        if (wanted == self->logit_rows) {
            err = run_logit_group(self, steps, step_count, first, wanted);
            wanted = 0;
        }
        if (wanted == 0)
            first = i;
        if (err == ODSI_OK)
            err = forward_want_logits(self->forward, wanted++, row - 1);
    }
    if (err == ODSI_OK && wanted > 0)
        err = run_logit_group(self, steps, step_count, first, wanted);
    return err;
}

/* NUMERICS.md, "Non-finite values": such a step ends with an error, never with a hash. */
static enum odsi_err check_step(struct engine *self, struct engine_step *step, uint32_t row)
{
    const struct model_params *p = self->params;
    int finite = 0;
    enum odsi_err err = self->backend->ops->all_finite(
        self->backend, &finite, forward_x_dev(self->forward) + (size_t)row * p->dim,
        (size_t)step->token_count * p->dim);
    if (err != ODSI_OK)
        return err;
    for (uint32_t i = 0; finite && step->logits && i < p->vocab_size; i++)
        finite = __builtin_isfinite(step->logits[i]) != 0;
    if (!finite)
        step->status =
            odsi_fail(ODSI_ERR_NUMERIC,
                      "layers %u-%u, positions %u-%u: the result is not finite; the "
                      "weights or the input of this step are damaged",
                      step->session->layer_first, step->session->layer_end - 1,
                      step->session->length, step->session->length + step->token_count - 1);
    return ODSI_OK;
}

static enum odsi_err store_rows(struct engine *self, struct engine_step *steps, uint32_t step_count)
{
    const uint32_t dim = self->params->dim;
    uint32_t row = 0;
    for (uint32_t i = 0; i < step_count; i++) {
        struct engine_step *step = &steps[i];
        enum odsi_err err = check_step(self, step, row);
        if (err == ODSI_OK && step->status == ODSI_OK && step->output)
            err = self->backend->ops->download(self->backend, step->output,
                                               forward_x_dev(self->forward) + (size_t)row * dim,
                                               (size_t)step->token_count * dim * sizeof(float));
        if (err != ODSI_OK)
            return err;
        row += step->token_count;
    }
    for (uint32_t i = 0; i < step_count; i++) {
        if (steps[i].status != ODSI_OK)
            continue;
        steps[i].session->length += steps[i].token_count;
        publish_pages(steps[i].session);
    }
    return ODSI_OK;
}

enum odsi_err engine_run(struct engine *self, struct engine_step *steps, uint32_t step_count)
{
    struct op_batch batch = {0};
    enum odsi_err err = check_batch(self, steps, step_count);
    for (uint32_t i = 0; i < step_count; i++)
        steps[i].status = err;
    if (err == ODSI_OK)
        err = load_rows(self, steps, step_count, &batch);
    if (err == ODSI_OK)
        err = run_layers(self, steps[0].session->layer_first, steps[0].session->layer_end, &batch);
    if (err == ODSI_OK)
        err = run_logits(self, steps, step_count);
    if (err == ODSI_OK)
        err = store_rows(self, steps, step_count);
    for (uint32_t i = 0; i < step_count && err != ODSI_OK; i++)
        steps[i].status = err;
    return err;
}

void engine_set_tap(struct engine *self,
                    void (*tap)(void *context, uint32_t layer, const float *x, uint32_t rows),
                    void *context)
{
    self->tap = tap;
    self->tap_context = context;
}

uint64_t engine_kv_tokens_free(const struct engine *self)
{
    return (uint64_t)kv_cache_free_pages(self->cache) * KV_PAGE_TOKENS;
}

uint64_t engine_kv_tokens_total(const struct engine *self)
{
    return (uint64_t)kv_cache_pool(self->cache)->page_count * KV_PAGE_TOKENS;
}

uint64_t engine_kv_tokens_cached(const struct engine *self)
{
    return (uint64_t)kv_cache_cached_pages(self->cache) * KV_PAGE_TOKENS;
}

uint32_t engine_batch_tokens_max(const struct engine *self)
{
    return self->batch_tokens_max;
}
