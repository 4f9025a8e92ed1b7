/* odsi.v1.Coordinator: membership and directory for whoever calls (draft 10.3). The caller of Join,
 * Heartbeat and Leave is the identity of its connection, so nobody acts for another; without mutual
 * TLS there is none, and they are refused.
 *
 * Keeps nothing that matters: members live in the store, which other instances may share. A timer
 * removes silent members and notices what others changed.
 * Threads: the loop's. Store calls run on it, see store.h. */
#ifndef ODSI_COORDINATOR_SERVICE_H
#define ODSI_COORDINATOR_SERVICE_H
#include "common/base/clock.h"
#include "common/base/err.h"
#include "common/net/rpc_loop.h"
#include "common/net/rpc_server.h"
#include "coordinator/store.h"

#include <stdint.h>

#define SERVICE_POLL_US 200000u /* how long another instance's change may go unnoticed */

struct service;

struct service_config {
    struct rpc_loop *loop;
    struct store *store;
    struct clock clock;    /* microseconds since 1970, shared by all instances on a store */
    uint32_t heartbeat_ms; /* MEMBERS_HEARTBEAT_MS_MIN to _MAX */
    /* Called when the store stops or starts answering; may be NULL. */
    void (*on_health)(void *context, int healthy);
    void *health_context;
};

/* Loop and store must outlive the object. Errors: ODSI_ERR_INVALID (heartbeat_ms),
 * ODSI_ERR_NO_MEMORY. */
ODSI_MUST_USE enum odsi_err service_open(struct service **out, const struct service_config *config);
/* The server must be closed. *self may be NULL. */
void service_close(struct service **self);
/* Starts the timer: on the loop's thread, or before the loop runs. Errors: ODSI_ERR_NO_MEMORY. */
ODSI_MUST_USE enum odsi_err service_start(struct service *self);
/* Ends timers and watches. Before rpc_server_close. */
void service_stop(struct service *self);
/* For rpc_server_config; valid until service_close. */
const struct rpc_service *service_rpc_view(const struct service *self);
#endif
