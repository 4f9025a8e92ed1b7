/* What computes in a worker: owns the engine, takes steps from the network thread, batches them,
 * and on the last stage samples.
 *
 * Jobs of one session are handled in the order they were given. Whoever computes also reports, by
 * callbacks, so that an output can be sent to the next worker without waking another thread first.
 * That is the executor's own thread, or, when nothing else runs and the step is expected to be
 * short, the thread that submits it: waking a sleeping thread costs tens of microseconds. Never two
 * at once: the one that computes holds the role.
 *
 * Threads: every function may be called from any thread, callbacks included; a session's user
 * pointer must stay valid until its closed callback. */
#ifndef ODSI_WORKER_HOP_EXECUTOR_H
#define ODSI_WORKER_HOP_EXECUTOR_H
#include "common/base/clock.h"
#include "common/base/err.h"
#include "worker/engine/engine.h"
#include "worker/hop/hop.h"
#include "worker/model/tokenizer.h"

#include <stdint.h>

struct executor;
struct executor_session;

/* Numbers are those of odsi.v1.FinishReason. */
enum hop_finish {
    HOP_FINISH_NONE = 0,
    HOP_FINISH_END = 1,
    HOP_FINISH_STOP = 2,
    HOP_FINISH_LENGTH = 3
};

/* A link of the executor's lists; embedded, so that handing over a job cannot fail. */
struct executor_job {
    struct executor_job *next;
    struct executor_session *session;
    int kind;
};

/* One step on its way through the worker. */
struct executor_step {
    /* The executor's: */
    struct executor_job job;
    uint32_t done_count; /* positions that ran: a long step may run in pieces */
    uint64_t compute_us; /* that those took */
    float *output;       /* [header.token_count][dim], when the next stage wants it */
    /* The caller's: */
    struct hop_header header;
    uint64_t arrival_us;
    uint32_t row_size; /* bytes of one row of data */
    uint32_t data[];   /* ids or f32 activations, [token_count][row_size] */
};

/* Room for header.token_count rows of row_size bytes. Errors: ODSI_ERR_NO_MEMORY. */
ODSI_MUST_USE enum odsi_err executor_step_make(struct executor_step **out,
                                               const struct hop_header *header, uint32_t row_size);
void executor_step_free(struct executor_step *step);

/* All by the thread that holds the role, one at a time. header has this stage's timing added. */
struct executor_events {
    /* The session has its memory (ODSI_OK) and held_count positions of its prompt in it already, or
     * could not be opened: then closed follows when the session is closed, as always. */
    void (*opened)(void *user, enum odsi_err err, uint32_t held_count);
    /* The residual stream after this stage; activations, [token_count][dim] f32 in data_size bytes,
     * is the callee's to alloc_free. */
    void (*output)(void *user, const struct hop_header *header, float *activations,
                   size_t data_size);
    /* A token was sampled for position header->position + header->token_count. */
    void (*token)(void *user, const struct hop_header *header, uint32_t token, float logprob,
                  enum hop_finish finish);
    /* A step failed; the session takes no further ones. Text as odsi_err_text. */
    void (*failed)(void *user, const struct hop_header *header, enum odsi_err err);
    /* Nothing more will come; the session is gone. */
    void (*closed)(void *user);
};

struct executor_config {
    struct engine *engine; /* from now on used by the compute thread only */
    const struct hop_worker *worker;
    const struct tokenizer *tokenizer; /* for stop strings and end tokens; may be NULL when the
                                        * worker does not hold the last layer */
    struct clock clock;
    const struct executor_events *events;
};

/* Starts the thread. engine, worker and tokenizer must outlive it. Errors: ODSI_ERR_NO_MEMORY,
 * ODSI_ERR_IO (no thread). */
ODSI_MUST_USE enum odsi_err executor_open(struct executor **out,
                                          const struct executor_config *config);
/* Closes what is open (closed is called for each session), waits for the thread. No other call may
 * be under way or follow. *self may be NULL. */
void executor_close(struct executor **self);

/* Begins a session; spec must stay valid until closed. opened follows.
 * Errors: ODSI_ERR_NO_MEMORY. */
ODSI_MUST_USE enum odsi_err executor_session_open(struct executor_session **out,
                                                  struct executor *executor,
                                                  const struct hop_spec *spec, void *user);
/* Drops what the session still has waiting and ends it; closed follows. Call once. */
void executor_session_close(struct executor_session *session);
/* Takes the step, and perhaps runs it before returning (see above): hold no lock that a callback
 * takes. The session's first step may begin at any position up to held_count, the others where the
 * one before ended.
 * Errors: ODSI_ERR_BUSY (LIMIT_STEP_QUEUE steps wait): step stays the caller's. */
ODSI_MUST_USE enum odsi_err executor_submit(struct executor_session *session,
                                            struct executor_step *step);

struct executor_load {
    uint32_t session_count;
    uint32_t queued_count; /* steps waiting or running */
    uint64_t kv_tokens_free;
    uint64_t kv_tokens_total;
};
void executor_load(const struct executor *self, struct executor_load *out);
#endif
