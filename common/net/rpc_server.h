/* A gRPC server on a loop. grpc.health.v1.Health and server reflection are built in, and a method
 * that nobody serves is answered UNIMPLEMENTED at once. Loop thread only, but for open, which may
 * come before the loop runs. */
#ifndef ODSI_COMMON_NET_RPC_SERVER_H
#define ODSI_COMMON_NET_RPC_SERVER_H
#include "common/base/err.h"
#include "common/crypto/identity.h"
#include "common/net/rpc_call.h"
#include "common/net/rpc_loop.h"

#include <stddef.h>
#include <stdint.h>

struct rpc_server;

/* One row of a service's static table. */
struct rpc_method {
    const char *path; /* "/odsi.v1.Inference/Generate" */
    /* A new call: returns its user pointer and sets *handler (static storage), or finishes the
     * call itself (rpc_call_finish or rpc_call_fail) and leaves *handler NULL. */
    void *(*on_open)(void *service, struct rpc_call *call, const struct rpc_handler **handler);
    uint32_t receive_size_max; /* bytes of one message; larger: RESOURCE_EXHAUSTED */
};

struct rpc_service {
    const char *name; /* "odsi.v1.Inference"; listed by reflection and health */
    const struct rpc_method *methods;
    size_t method_count;
    void *context; /* `service` of on_open */
};

struct rpc_server_config {
    const char *listen;              /* "host:port", ":port" (all interfaces), port 0: any free */
    const struct identity *identity; /* NULL: plaintext, allowed on loopback addresses only */
    const struct rpc_service *services;
    size_t service_count;
    /* Whether a peer may connect; NULL: every valid identity may (draft 5.3, open membership).
     * Runs during the handshake on the loop's thread: short, no locks. */
    int (*admit)(void *context, const struct digest *peer_id);
    void *admit_context;
};

/* Binds and starts. Errors: ODSI_ERR_INVALID (address), ODSI_ERR_EXISTS (port in use, with the
 * address and what to do), ODSI_ERR_DENIED (plaintext outside loopback), ODSI_ERR_NO_MEMORY. */
ODSI_MUST_USE enum odsi_err rpc_server_open(struct rpc_server **out, struct rpc_loop *loop,
                                            const struct rpc_server_config *config);
/* The port it listens on. */
uint16_t rpc_server_port(const struct rpc_server *self);
/* What health answers: SERVING when set (the state after open), else NOT_SERVING. */
void rpc_server_set_serving(struct rpc_server *self, int serving);
/* Stops accepting, cancels every call (their on_done run), then calls on_closed on the loop's
 * thread and frees itself. on_closed may be NULL. The loop must be running, or be run by the
 * caller afterwards until on_closed. */
void rpc_server_close(struct rpc_server *self, void (*on_closed)(void *context), void *context);
#endif
