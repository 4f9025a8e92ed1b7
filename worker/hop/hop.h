/* The rules of the hop protocol, without sockets: what a session may be, and which steps a stage
 * takes (protocol.md, "Session"; draft 3.1, 5.2).
 *
 * Plain structs stand for the messages of proto/odsi/v1/hop.proto; hop_wire converts. Pure
 * functions; any thread.
 *
 * Prefix reuse. A gateway names the whole pages of its prompt by prefix keys
 * (worker/engine/prefix_key.h), which it makes with a seed of its own: a worker that sees no tokens
 * cannot test a guess at the text against them. Each stage answers how many positions it holds;
 * the gateway takes the least of them and sends its first step from there. Stages that hold more
 * go back to that position.
 *
 * Who may share. A worker computes pages from what the stage before it sent, and what a page holds
 * is no better than that: a stage that lies once would be believed in every session that reuses the
 * page. And only who made a key knows what it stands for: a gateway that lies about its keys spoils
 * what is kept under them. So pages are shared only among sessions of the same gateway over the
 * same stages before this one (hop_prefix_scope): both could have told each of those sessions the
 * same lie directly, and nobody else is reached by it. The gateway is known by the certificate of
 * its connection and the stage before by that of the connection its steps come on; stages further
 * up are those that the gateway named, and whether the stage before listens to them is one of the
 * things it could lie about. A gateway without a certificate shares nothing. Only pages of the
 * prompt are kept: what an answer's tokens are is the last stage's word, so the first stage takes
 * tokens of the prompt from the gateway alone, and keeps nothing of those that come around the
 * ring.
 *
 * What it gives away. The time to the first token tells whether a prefix was computed here before,
 * so a user of a gateway can find out, by asking, whether somebody behind the same gateway asked
 * something that begins so. Who cannot accept that between its users gives them gateways of their
 * own.
 *
 * What it costs a proof. The outputs of a session that reused positions follow from the inputs of
 * the sessions that computed them: who recomputes them has to be given the prefix from its
 * beginning. Where a page was computed twice the two are compared, and when they differ each
 * session keeps its own. */
#ifndef ODSI_WORKER_HOP_HOP_H
#define ODSI_WORKER_HOP_HOP_H
#include "common/base/err.h"
#include "common/base/limits.h"
#include "common/crypto/digest.h"
#include "worker/engine/sampler.h"
#include "worker/engine/stop.h"

#include <stdint.h>

#define HOP_SESSION_ID_SIZE 16u

struct hop_session_id {
    uint8_t bytes[HOP_SESSION_ID_SIZE];
};

struct hop_stage {
    struct digest worker_id;
    char address[LIMIT_ADDRESS_SIZE];
    uint32_t layer_first;
    uint32_t layer_end;
    int64_t budget_us; /* of a decode step on this stage; 0: no deadline */
};

/* A session as one stage is asked to open it. */
struct hop_spec {
    struct hop_session_id id;
    uint32_t epoch;
    struct digest model_id;
    uint32_t numerics_version;
    struct hop_stage *stages; /* [stage_count], owned; ended with hop_spec_free */
    uint32_t stage_count;
    uint32_t stage; /* which of them this is */
    uint32_t token_limit;
    int64_t step_budget_us;     /* of a whole decode step; 0: no deadline */
    uint32_t prompt_count;      /* tokens it begins with; 0: not told */
    struct digest *prefix_keys; /* [prefix_count] of their whole pages, owned */
    uint32_t prefix_count;
    struct digest prefix_scope; /* hop_prefix_scope, when there are keys */
    /* For the last stage: */
    struct sampler_params sampling;
    uint32_t *penalty_tokens; /* [penalty_count], owned */
    uint32_t penalty_count;
    struct stop stop;
    int ignore_end;
    uint32_t new_tokens_max; /* 0: no limit but token_limit */
};

void hop_spec_free(struct hop_spec *self);
static inline int hop_is_first(const struct hop_spec *self)
{
    return self->stage == 0;
}
static inline int hop_is_last(const struct hop_spec *self)
{
    return self->stage + 1 == self->stage_count;
}

/* What a worker is, for checking a session against it. */
struct hop_worker {
    struct digest id;
    struct digest model_id;
    uint32_t layer_count;
    uint32_t layer_first;
    uint32_t layer_end;
    uint32_t dim;
    uint32_t vocab_size;
};

/* Whether this worker can be that stage of that session: model, numerics, a path without gaps over
 * all layers, its own place in it, limits.
 * prefix keys are for whole pages of the prompt, and the prompt fits into the session.
 * Errors: ODSI_ERR_NOT_FOUND (another model), ODSI_ERR_UNSUPPORTED (numerics), ODSI_ERR_RANGE
 * (layers this worker does not hold), ODSI_ERR_DENIED (the stage names another worker),
 * ODSI_ERR_INVALID (anything else, named). */
ODSI_MUST_USE enum odsi_err hop_check_spec(const struct hop_spec *spec,
                                           const struct hop_worker *worker);

/* Who may share pages with this session: SHA-256 over
 *     "odsi hop scope 1" || gateway id || u32 stage || for each stage before this one: worker id,
 *     u32 layer_first, u32 layer_end
 * (integers little-endian, the tag without a NUL), with ids of 32 bytes. */
void hop_prefix_scope(struct digest *out, const struct hop_spec *spec,
                      const struct digest *gateway_id);

enum hop_kind { HOP_TOKENS = 0, HOP_ACTIVATIONS = 1 };

struct hop_timing {
    uint32_t stage;
    uint32_t queue_us;
    uint32_t compute_us;
    uint32_t network_us;
    int64_t slack_us;
};

struct hop_header {
    struct hop_session_id id;
    uint32_t epoch;
    uint32_t stage;
    uint32_t position;
    uint32_t token_count;
    enum hop_kind kind;
    int sample;
    int64_t budget_us;       /* 0: no deadline; else left on arrival, at least 1 */
    int64_t stage_budget_us; /* the same for this stage */
    uint32_t network_us;
    struct hop_timing timings[LIMIT_STAGES_MAX]; /* of the stages before */
    uint32_t timing_count;
};

/* What a stage remembers about the order of its steps. Zero-initialize. */
struct hop_order {
    uint32_t next_position; /* the first position not taken yet */
    uint32_t held_count;    /* positions held from the beginning on (SessionOpened) */
    int started;            /* a step was taken */
};

enum hop_verdict {
    HOP_TAKE,      /* in order: run it; next_position has moved */
    HOP_DUPLICATE, /* taken before: acknowledge it again, run nothing */
    HOP_REFUSE,    /* an error, see *err */
};

/* Decides about one step that sender (NULL: the gateway, on its Control stream) sent to a stage of
 * spec; payload_size is that of the frame. The first step begins at any position up to held_count;
 * from there on a position is taken once and in order (draft 3.1): duplicates are known again, gaps
 * are refused.
 * Errors in *err: ODSI_ERR_DENIED (sender is not the stage before; a token of the prompt that does
 * not come from the gateway), ODSI_ERR_STATE (stale epoch, or
 * a gap), ODSI_ERR_RANGE (beyond token_limit or LIMIT_STEP_TOKENS), ODSI_ERR_INVALID (kind, stage
 * or size do not fit). */
enum hop_verdict hop_accept(const struct hop_spec *spec, const struct hop_worker *worker,
                            struct hop_order *order, const struct hop_header *header,
                            const struct digest *sender, uint64_t payload_size, enum odsi_err *err);

/* Smoothed round-trip time as TCP has it (RFC 6298): mean and mean deviation. Zero-initialize. */
struct hop_rtt {
    uint32_t mean_us;
    uint32_t deviation_us;
};
void hop_rtt_add(struct hop_rtt *self, uint32_t sample_us);
#endif
