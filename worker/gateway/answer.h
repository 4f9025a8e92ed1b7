/* One answer from request to end: finds the model, tokenizes, chooses the path, and runs the state
 * machine of generate.h over the connections to the workers. Loop thread only. */
#ifndef ODSI_WORKER_GATEWAY_ANSWER_H
#define ODSI_WORKER_GATEWAY_ANSWER_H
#include "common/base/err.h"
#include "common/net/rpc_loop.h"
#include "worker/gateway/directory.h"
#include "worker/gateway/encoder.h"
#include "worker/gateway/generate.h"
#include "worker/gateway/model_fetch.h"
#include "worker/gateway/path.h"
#include "worker/gateway/prefix_book.h"
#include "worker/gateway/request.h"
#include "worker/gateway/worker_book.h"
#include "worker/gateway/worker_link_client.h"
#include "worker/hop/hop.h"

#include <stddef.h>
#include <stdint.h>

struct answer;

/* What answers share; all of it outlives them. */
struct answer_context {
    struct rpc_loop *loop;
    const struct directory *directory;
    struct worker_book *book;
    struct prefix_book *prefixes;
    struct worker_link_client *links;
    struct model_fetch *models;
    struct encoder *encoder;
    struct path_random random;
    struct digest
        prefix_seed; /* random: only this gateway can tell what its prefix keys stand for */
    uint64_t open_timeout_us;
    uint64_t stall_timeout_us;
    uint32_t reroute_max;
    struct answer *first; /* those that run */
    uint32_t count;
    uint32_t count_max;
};

/* Tokens and text for the client; valid during the callback. */
struct answer_piece {
    const struct hop_session_id *session_id;
    const uint32_t *tokens;
    const float *logprobs;
    uint32_t token_count;
    const char *text; /* valid UTF-8 without NUL, not NUL-terminated */
    size_t text_size;
};

/* How it ended. With err other than ODSI_OK only text counts. */
struct answer_end {
    enum odsi_err err;
    const char *text;
    const struct hop_session_id *session_id;
    const struct digest *model_id;
    uint32_t numerics_version;
    uint64_t seed;
    const struct generate_summary *summary;
    const struct hop_stage *stages; /* [summary->hop_count] */
};

struct answer_handler {
    /* The next piece waits for answer_client_ready. */
    void (*on_piece)(void *user, const struct answer_piece *piece);
    /* Comes once; the answer is dead afterwards. */
    void (*on_end)(void *user, const struct answer_end *end);
};

/* Takes *request over, also on error. Errors: what is wrong with the request, or the swarm, as far
 * as it shows at once; on_end does not come then. */
ODSI_MUST_USE enum odsi_err answer_start(struct answer **out, struct answer_context *context,
                                         struct request *request,
                                         const struct answer_handler *handler, void *user);
void answer_client_ready(struct answer *self);
/* The client went away: frees everything on all workers at once; on_end does not come. */
void answer_cancel(struct answer **self);
/* Ends all answers of a context with err and text (on_end comes for each). */
void answer_abort_all(struct answer_context *context, enum odsi_err err, const char *text);
#endif
