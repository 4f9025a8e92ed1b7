/* The worker's side of odsi.v1.Coordinator: joins, sends heartbeats, joins again when it is not
 * known any more or the coordinator was away, and leaves.
 *
 *   joining --reply--> joined
 *   joining --no answer, busy, address taken--> waiting --backoff--> joining, at the next address
 *   joining --refused for good (a bad field, no identity)--> given up
 *   joined  --heartbeat not known--> joining
 *   joined  --heartbeat not answered--> joined, at the next address; lost after three in a row
 *   any     --coordinator_client_leave--> left
 *
 * Heartbeats start with the join, saying "not ready", so that a worker which loads for minutes
 * stays a member; the loop must run meanwhile. Whoever has been given layers asks for the same ones
 * when it joins again, because they are loaded. The token path never waits for any of this.
 * Threads: the loop's, for every function and callback. */
#ifndef ODSI_WORKER_HOP_COORDINATOR_CLIENT_H
#define ODSI_WORKER_HOP_COORDINATOR_CLIENT_H
#include "common/base/err.h"
#include "common/crypto/digest.h"
#include "common/crypto/identity.h"
#include "common/net/rpc_loop.h"

#include <stdint.h>

#define COORDINATOR_ADDRESSES_MAX 16u

struct coordinator_client;

/* Measured by the worker itself; zero means unknown. */
struct coordinator_capability {
    uint64_t memory_size; /* bytes for weights and KV cache */
    uint64_t kv_token_capacity;
    float prefill_tokens_per_s; /* through the layers held */
    float decode_tokens_per_s;
    const char *backend; /* copied; at most 31 characters; NULL: unknown */
    uint32_t thread_count;
};

struct coordinator_load {
    uint32_t session_count;
    uint32_t queued_step_count;
    uint64_t kv_tokens_free;
};

struct coordinator_client_config {
    struct rpc_loop *loop;
    const char *addresses;           /* "[ID@]host:port", several with commas, tried in turn */
    const struct identity *identity; /* must outlive the object */

    const char *address; /* where others reach this worker, host:port; copied */
    struct digest model_id;
    const char *model_name; /* copied */
    uint32_t layer_count;   /* of the model */
    uint32_t context_length;
    uint32_t numerics_version;
    uint32_t layer_first; /* layers [layer_first, layer_end); equal: the coordinator chooses */
    uint32_t layer_end;
    uint32_t layer_capacity; /* how many fit, when the coordinator chooses */
    struct coordinator_capability capability;

    /* The layers to hold: after the first join, and after a later one only if they differ. */
    void (*on_assigned)(void *context, uint32_t layer_first, uint32_t layer_end);
    /* Not a member at the moment, and why; told once until it is one again. retrying is 0 when the
     * client has given up. May be NULL. */
    void (*on_lost)(void *context, const struct odsi_failure *failure, int retrying);
    void *context;
};

/* Starts joining. Callbacks come later, from the loop.
 * Errors: ODSI_ERR_INVALID (an address, too many of them, a text too long), ODSI_ERR_DENIED,
 * ODSI_ERR_NO_MEMORY. Owned: by the caller, ended with coordinator_client_close. */
ODSI_MUST_USE enum odsi_err coordinator_client_open(struct coordinator_client **out,
                                                    const struct coordinator_client_config *config);
/* Nothing is called back afterwards. Says nothing to the coordinator. *self may be NULL. May be
 * called in a callback. */
void coordinator_client_close(struct coordinator_client **self);

/* From now on heartbeats say "ready", with the load that fill_load(load_context, out) fills in
 * (NULL: none); one is sent at once. capability: as measured with the layers loaded; NULL: as it
 * was. */
void coordinator_client_set_ready(
    struct coordinator_client *self, const struct coordinator_capability *capability,
    void (*fill_load)(void *load_context, struct coordinator_load *out), void *load_context);

/* Stops heartbeats and tells the coordinator, for at most a second; then on_done(done_context),
 * always once and never before this returns. Afterwards only close is of use. */
void coordinator_client_leave(struct coordinator_client *self, void (*on_done)(void *done_context),
                              void *done_context);
#endif
