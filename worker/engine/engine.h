/* The engine: runs a span of layers for a batch of steps of any sessions.
 *
 * A step is a run of positions of one session, a prompt chunk or a single decode step alike. A
 * batch may mix them; each row's result depends on its own session only, so the bits of a step do
 * not depend on its neighbours, on how a prompt was cut, or on where layers were cut
 * (kernels/NUMERICS.md).
 *
 * Threads: one owner thread makes all calls. The span and its backend must outlive the engine. */
#ifndef ODSI_WORKER_ENGINE_ENGINE_H
#define ODSI_WORKER_ENGINE_ENGINE_H
#include "common/base/err.h"
#include "worker/model/model.h"

#include <stdint.h>

struct engine;
struct engine_session;

struct engine_config {
    uint32_t batch_tokens_max; /* rows of one batch, all steps together; 0: LIMIT_STEP_TOKENS */
    uint32_t batch_steps_max;  /* steps of one batch; 0: 64 */
    uint64_t kv_size;          /* bytes for the KV cache; at least one page is taken */
};

/* Takes all memory it will need. Errors: ODSI_ERR_NO_MEMORY, ODSI_ERR_INVALID. */
ODSI_MUST_USE enum odsi_err engine_open(struct engine **out, const struct model_span *span,
                                        const struct engine_config *config);
/* All sessions must be closed. *self may be NULL. */
void engine_close(struct engine **self);

/* A session on layers [layer_first, layer_end) of the engine's span, for at most token_limit
 * positions; its KV memory is reserved now. Errors: ODSI_ERR_RANGE (layers outside the span, limit
 * above the model's context or the cache), ODSI_ERR_BUSY (cache full now), ODSI_ERR_NO_MEMORY. */
ODSI_MUST_USE enum odsi_err engine_session_open(struct engine_session **out, struct engine *engine,
                                                uint32_t layer_first, uint32_t layer_end,
                                                uint32_t token_limit);
void engine_session_close(struct engine_session **self);
/* Positions computed so far: the next step starts here. */
uint32_t engine_session_length(const struct engine_session *self);
/* Forgets positions from length on. length <= engine_session_length. */
void engine_session_truncate(struct engine_session *self, uint32_t length);

struct engine_step {
    struct engine_session *session; /* each at most once in a batch */
    uint32_t token_count;           /* >= 1; positions session length ... + token_count - 1 */
    const uint32_t *tokens;         /* [token_count], each < vocab_size; when the session has layer
                                     * 0, else NULL */
    const float *input;             /* [token_count][dim], when it has not */
    float *output;                  /* [token_count][dim]: residual stream after the session's last
                                     * layer; NULL: not wanted */
    float *logits;                  /* [vocab_size] of the last position; NULL: not wanted; only
                                     * for sessions with the model's last layer */
    enum odsi_err status;           /* out: ODSI_OK, or ODSI_ERR_NUMERIC (a NaN or infinity): the
                                     * session's length is then unchanged */
};

/* Runs one batch; all sessions of it have the same layers. token ids and shapes were checked by
 * the caller (asserted here).
 * Errors: ODSI_ERR_RANGE (a step passes its session's limit, or the batch is too large: nothing
 * was run), and those of the backend (every step of the batch has failed). */
ODSI_MUST_USE enum odsi_err engine_run(struct engine *self, struct engine_step *steps,
                                       uint32_t step_count);

/* For traces: after each layer of a run, called with the residual stream of all rows of the batch
 * in step order. NULL switches it off. */
void engine_set_tap(struct engine *self,
                    void (*tap)(void *context, uint32_t layer, const float *x /* [rows][dim] */,
                                uint32_t rows),
                    void *context);

/* Positions that new sessions could reserve now, and in all. */
uint64_t engine_kv_tokens_free(const struct engine *self);
uint64_t engine_kv_tokens_total(const struct engine *self);
uint32_t engine_batch_tokens_max(const struct engine *self);
#endif
