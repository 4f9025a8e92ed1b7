/* One answer: the state machine between a client and the workers of its path (protocol.md,
 * "Session"). No sockets, no clock, no threads of its own: events go in, actions come out.
 *
 *     no path -> opening -> prefill -> decoding -> done
 *        ^          |          |          |
 *        +--------- a stage failed -------+-----> failed
 *
 * After every input the caller takes actions with generate_next until there is none. When a stage
 * fails the machine closes the path and asks for another one without that worker; the text so far
 * is then computed again on the new path, and since sampling depends on seed and position alone
 * the answer goes on as if nothing had happened (draft 6.4). When there is no other path the
 * answer fails with one typed error that names peer, layers, step and cause.
 *
 * Time: now_us is any monotonic clock, the same in all calls. Threads: one owner. */
#ifndef ODSI_WORKER_GATEWAY_GENERATE_H
#define ODSI_WORKER_GATEWAY_GENERATE_H
#include "common/base/err.h"
#include "common/base/limits.h"
#include "common/crypto/digest.h"
#include "worker/engine/stop.h"
#include "worker/gateway/deadline.h"
#include "worker/hop/hop.h"
#include "worker/model/tokenizer.h"

#include <stddef.h>
#include <stdint.h>

#define GENERATE_LABEL_SIZE     384u
#define GENERATE_EMIT_TOKENS    4096u       /* in one message to the client */
#define GENERATE_EMIT_TEXT_SIZE (64u << 10) /* bytes, likewise */

struct generate;

/* The numbers of odsi.v1.FinishReason. */
enum generate_finish {
    GENERATE_GO_ON = 0,
    GENERATE_END = 1,
    GENERATE_STOP = 2,
    GENERATE_LENGTH = 3,
    GENERATE_CANCELLED = 4,
};

struct generate_config {
    const struct tokenizer *tokenizer; /* outlives the machine */
    uint32_t vocab_size;
    const uint32_t *prompt;  /* [prompt_count], copied; ids within the vocabulary */
    uint32_t prompt_count;   /* at least 1 */
    uint32_t new_tokens_max; /* at least 1; with prompt_count within the model's context */
    int ignore_end;
    const struct stop_string *stops; /* [stop_count], copied */
    uint32_t stop_count;
    uint32_t penalty_window;   /* tokens of the text so far that the last stage is told */
    struct digest prefix_seed; /* of the prefix keys (worker/engine/prefix_key.h): this gateway's */
    uint64_t start_us;         /* when the request came */
    uint64_t deadline_us;      /* UINT64_MAX: none */
    uint64_t open_timeout_us;  /* for a stage to open the session */
    uint64_t stall_timeout_us; /* without any token, beside what is expected of the path */
    uint32_t reroute_max;      /* new paths in a row without a new token in between */
};

struct generate_stage {
    char label[GENERATE_LABEL_SIZE]; /* "worker 1a2b3c4d5e6f7a8b at host:port, layers 0-11" */
    struct deadline_stage expected;
};

/* Errors: ODSI_ERR_NO_MEMORY. */
ODSI_MUST_USE enum odsi_err generate_open(struct generate **out,
                                          const struct generate_config *config);
void generate_close(struct generate **self);

/* The keys of the whole pages of the text so far (worker/engine/prefix_key.h), for choosing a path
 * that holds them; valid until the next call. Errors: ODSI_ERR_NO_MEMORY. */
ODSI_MUST_USE enum odsi_err generate_prefix(struct generate *self, const struct digest **keys,
                                            uint32_t *key_count);
/* The first path, or the answer to GENERATE_REROUTE. stages[stage_count] are copied; 1 to
 * LIMIT_STAGES_MAX of them. */
void generate_set_path(struct generate *self, const struct generate_stage *stages,
                       uint32_t stage_count, uint64_t now_us);
/* There is no (other) path: fails with the failure that ended the last one, or with err and this
 * thread's error text when there was none. */
void generate_give_up(struct generate *self, enum odsi_err err, uint64_t now_us);

/* A stage is ready to take steps, and holds held_count positions of the text already. When all are,
 * the text is sent from where the one with the fewest begins.
 * Errors: ODSI_ERR_STATE (another epoch, or not expected): refused, nothing changes;
 * ODSI_ERR_CORRUPT (it cannot hold so many) ends this path. */
enum odsi_err generate_opened(struct generate *self, uint32_t stage, uint32_t epoch,
                              uint32_t held_count, uint64_t now_us);

struct generate_token {
    uint32_t epoch;
    uint32_t position;
    uint32_t token;
    float logprob;
    enum generate_finish finish; /* the worker's opinion; the machine has its own */
    const struct hop_timing *timings;
    uint32_t timing_count;
};

/* A token from a stage. Each position is taken once and in order (draft 3.1).
 * Errors: ODSI_ERR_STATE (duplicate, or of another epoch) and ODSI_ERR_DENIED (not from the last
 * stage) change nothing; ODSI_ERR_CORRUPT (a gap, an id outside the vocabulary, an impossible
 * logprob, an answer ended early) ends this path. */
enum odsi_err generate_token(struct generate *self, uint32_t stage,
                             const struct generate_token *token, uint64_t now_us);

/* A stage reports that the session cannot go on. Stale epochs are ignored. A stage that finds a
 * peer unavailable speaks of the stage after it, or, while it is still being opened, perhaps of
 * itself; what is only suspected is not held against a worker that nobody else can replace. */
void generate_stage_failed(struct generate *self, uint32_t stage, uint32_t epoch, enum odsi_err err,
                           uint32_t position, const char *text, uint64_t now_us);
/* The connection to a stage is lost, or something could not be sent to it. */
void generate_link_broken(struct generate *self, uint32_t stage, const char *text, uint64_t now_us);

/* When generate_timer wants to be called; UINT64_MAX: never. */
uint64_t generate_wake_us(const struct generate *self);
void generate_timer(struct generate *self, uint64_t now_us);

/* The client can take another GENERATE_EMIT. Until then tokens are gathered. */
void generate_client_ready(struct generate *self);
/* The client went away: only GENERATE_CLOSE is left to do. */
void generate_cancel(struct generate *self, uint64_t now_us);
/* The answer ends with err and text for a reason outside (the gateway stops). */
void generate_abort(struct generate *self, enum odsi_err err, const char *text, uint64_t now_us);

/* The mean over the decode steps of one stage. */
struct generate_hop {
    uint32_t queue_us;
    uint32_t compute_us;
    uint32_t network_us;
    int64_t slack_us;
    uint32_t step_count;
};

struct generate_summary {
    enum generate_finish finish;
    uint32_t prompt_count;
    uint32_t reused_count; /* of the prompt: held by every stage before the first token */
    uint32_t new_count;
    uint64_t first_token_us; /* from start_us */
    uint64_t total_us;
    struct generate_hop hops[LIMIT_STAGES_MAX];
    uint32_t hop_count; /* stages of the last path */
};

enum generate_action_kind {
    GENERATE_OPEN,    /* ask stage to open the session */
    GENERATE_STEP,    /* send tokens to stage 0 */
    GENERATE_CLOSE,   /* tell stage that the session is over */
    GENERATE_EMIT,    /* give tokens and text to the client */
    GENERATE_REROUTE, /* call generate_set_path or generate_give_up */
    GENERATE_FINISH,  /* the last action of a good answer */
    GENERATE_FAIL,    /* the last action of a failed one */
};

/* Pointers are valid until the next call on the machine. */
struct generate_action {
    enum generate_action_kind kind;
    uint32_t stage; /* OPEN, CLOSE; REROUTE: the one to avoid */
    uint32_t other; /* REROUTE: another suspect, or stage again */
    int certain;    /* REROUTE: stage is to blame, beyond suspicion */
    uint32_t epoch; /* OPEN, STEP */
    /* STEP: token_count ids for positions from position. EMIT: token_count ids and logprobs.
     * OPEN: the last token_count tokens of the text so far, for the penalty. */
    uint32_t position;
    const uint32_t *tokens;
    uint32_t token_count;
    int sample;                       /* STEP */
    uint32_t new_tokens_max;          /* OPEN: how many are still wanted */
    uint32_t prompt_count;            /* OPEN: tokens of the text so far */
    const struct digest *prefix_keys; /* OPEN: [prefix_count] of their whole pages */
    uint32_t prefix_count;
    uint64_t budget_us;       /* STEP: of this step. OPEN: of each decode step. 0: no deadline */
    uint64_t stage_budget_us; /* STEP: of stage 0 */
    const uint64_t *stage_budgets_us; /* OPEN: one per stage, of each decode step */
    const float *logprobs;            /* EMIT */
    const char *text;                 /* EMIT; valid UTF-8, not NUL-terminated */
    size_t text_size;
    const struct generate_summary *summary; /* FINISH */
    const struct odsi_failure *failure;     /* REROUTE, FAIL */
};

/* 1 and the next action, or 0. */
int generate_next(struct generate *self, struct generate_action *out);

/* For the journal of what is going on: tokens made so far and the current epoch. */
uint32_t generate_new_count(const struct generate *self);
#endif
