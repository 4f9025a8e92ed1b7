/* Connections to workers: one channel and one Control stream for each, shared by all sessions,
 * opened when a session needs it and again after it broke (draft 10.2).
 *
 * A worker is known by its identity; the connection is refused unless it proves that key. When a
 * stream breaks, every session on it is told at once. Loop thread only. */
#ifndef ODSI_WORKER_GATEWAY_WORKER_LINK_CLIENT_H
#define ODSI_WORKER_GATEWAY_WORKER_LINK_CLIENT_H
#include "common/base/err.h"
#include "common/crypto/digest.h"
#include "common/crypto/identity.h"
#include "common/net/rpc_loop.h"
#include "worker/engine/sampler.h"
#include "worker/engine/stop.h"
#include "worker/gateway/worker_link.h"
#include "worker/hop/hop.h"

#include <stddef.h>
#include <stdint.h>

#define WORKER_LINK_CLIENT_MAX 1024u /* connections at a time */

struct worker_link_client; /* all of them */
struct worker_link;        /* one worker; owned by the above, valid while a session has joined */

/* identity must outlive it. Errors: ODSI_ERR_NO_MEMORY. */
ODSI_MUST_USE enum odsi_err worker_link_client_open(struct worker_link_client **out,
                                                    struct rpc_loop *loop,
                                                    const struct identity *identity);
/* All sessions must have left. on_closed(context) follows when the last stream has ended, perhaps
 * before this returns. */
void worker_link_client_close(struct worker_link_client **self, void (*on_closed)(void *context),
                              void *context);

/* Connects session to the worker, over the stream there is or a new one; trouble comes later, by
 * handler->on_broken. Errors: as worker_link_join and rpc_channel_open; ODSI_ERR_BUSY (all
 * WORKER_LINK_CLIENT_MAX connections are in use). */
ODSI_MUST_USE enum odsi_err
worker_link_client_join(struct worker_link_client *self, struct worker_link **out,
                        const struct digest *worker_id, const char *address,
                        const struct hop_session_id *session_id,
                        const struct worker_link_handler *handler, void *user);
/* Closes the session on the worker and leaves. */
void worker_link_client_leave(struct worker_link *link, const struct hop_session_id *session_id);

/* What a session opens with (OpenSession of hop.proto). */
struct worker_link_spec {
    struct hop_session_id session_id;
    uint32_t epoch;
    struct digest model_id;
    uint32_t numerics_version;
    const struct hop_stage *stages; /* [stage_count], with their budgets */
    uint32_t stage_count;
    uint32_t stage; /* which of them the receiver is */
    uint32_t token_limit;
    uint64_t step_budget_us; /* 0: no deadline */
    uint32_t prompt_count;
    const struct digest *prefix_keys; /* [prefix_count] */
    uint32_t prefix_count;
    /* For the last stage: */
    struct sampler_params sampling;
    const uint32_t *penalty_tokens;
    uint32_t penalty_count;
    const struct stop_string *stops;
    uint32_t stop_count;
    int ignore_end;
    uint32_t new_tokens_max;
};

/* Errors: ODSI_ERR_UNAVAILABLE (the stream is gone), ODSI_ERR_BUSY (too much is queued),
 * ODSI_ERR_NO_MEMORY. */
ODSI_MUST_USE enum odsi_err worker_link_client_send_open(struct worker_link *link,
                                                         const struct worker_link_spec *spec);
/* tokens for the first stage; header->timing_count must be 0. Errors: as above. */
ODSI_MUST_USE enum odsi_err worker_link_client_send_step(struct worker_link *link,
                                                         const struct hop_header *header,
                                                         const uint32_t *tokens);

/* Asks a worker what a model is; the bytes are unchecked and valid during on_reply, which comes
 * exactly once, later. err is ODSI_OK or tells, with text, what went wrong.
 * Errors: as worker_link_client_join; on_reply does not come then. */
ODSI_MUST_USE enum odsi_err worker_link_client_get_model(
    struct worker_link_client *self, const struct digest *worker_id, const char *address,
    const struct digest *model_id, uint64_t timeout_us,
    void (*on_reply)(void *context, enum odsi_err err, const char *text, const uint8_t *manifest,
                     size_t manifest_size, const uint8_t *tokenizer, size_t tokenizer_size),
    void *context);
#endif
