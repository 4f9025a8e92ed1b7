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
#include "common/crypto/digest.h"
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

/* What a session begins with, and with whom it may share what is computed for that. */
struct engine_prefix {
    const struct digest *keys; /* [key_count] of the prompt's whole pages (prefix_key.h) */
    uint32_t key_count;
    uint32_t prompt_count; /* tokens of the prompt; at least key_count * KV_PAGE_TOKENS */
    struct digest scope;   /* sessions of equal scopes trust each other's pages */
};

/* As engine_session_open; positions of the prompt that an earlier session of that scope and those
 * layers computed are there at once (engine_session_length), but for the last one at least, so that
 * there is something left to compute logits of. Memory that is shared is not reserved again. Pages
 * are offered to later sessions as steps fill them: the keys are the caller's word for what it will
 * feed. prefix is borrowed for the call. Errors: as above, ODSI_ERR_INVALID (more keys than the
 * prompt has pages, a prompt beyond token_limit), those of the backend. */
ODSI_MUST_USE enum odsi_err engine_session_open_prefix(struct engine_session **out,
                                                       struct engine *engine, uint32_t layer_first,
                                                       uint32_t layer_end, uint32_t token_limit,
                                                       const struct engine_prefix *prefix);
/* Before the first step: begins at an earlier position than it could, and computes the rest of the
 * prompt again. Errors: ODSI_ERR_RANGE (length is beyond engine_session_length), ODSI_ERR_BUSY (no
 * memory to compute it in now); the session is as it was. Those of the backend: the session is
 * lost. */
ODSI_MUST_USE enum odsi_err engine_session_begin_at(struct engine_session *self, uint32_t length);
void engine_session_close(struct engine_session **self);
/* Positions computed so far: the next step starts here. */
uint32_t engine_session_length(const struct engine_session *self);
/* Forgets positions from length on. length <= engine_session_length; other tokens may follow, so
 * nothing computed from there on is offered to others. Cannot fail but for pages that the session
 * shares; errors: as engine_session_begin_at. */
enum odsi_err engine_session_truncate(struct engine_session *self, uint32_t length);

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
/* Positions kept for sessions to come; they count as free. */
uint64_t engine_kv_tokens_cached(const struct engine *self);
uint32_t engine_batch_tokens_max(const struct engine *self);
#endif
