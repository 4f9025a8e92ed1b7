/* The directory as others see it: packed once per change, sent to everyone who watches.
 *
 * A watcher gets the directory at once, and again after every change of its version. Changes that
 * come close together go out as one. While a watcher has not taken what it was sent, nothing more
 * is queued for it; then it gets the newest, so that a slow one misses steps but never the end. One
 * that takes nothing for DIRECTORY_STALL_US is dropped.
 * Bounded: DIRECTORY_WATCHERS_MAX watchers, DIRECTORY_QUEUE_SIZE_MAX bytes under way to all of
 * them, one message each of at most LIMIT_CONTROL_MESSAGE_SIZE; and packing takes at most about a
 * tenth of the loop's time, however fast the directory changes.
 * Threads: the loop's. */
#ifndef ODSI_COORDINATOR_DIRECTORY_SERVICE_H
#define ODSI_COORDINATOR_DIRECTORY_SERVICE_H
#include "common/base/clock.h"
#include "common/base/err.h"
#include "common/net/rpc_call.h"
#include "common/net/rpc_loop.h"
#include "coordinator/store.h"

#define DIRECTORY_WATCHERS_MAX   4096u
#define DIRECTORY_QUEUE_SIZE_MAX (256u << 20)
#define DIRECTORY_STALL_US       30000000u

struct directory_service;

/* clock shows microseconds since 1970. All three must outlive the object.
 * Errors: ODSI_ERR_NO_MEMORY. */
ODSI_MUST_USE enum odsi_err directory_service_open(struct directory_service **out,
                                                   struct rpc_loop *loop, struct store *store,
                                                   const struct clock *clock);
/* Every watching call must have ended (rpc_server_close does that). *self may be NULL. */
void directory_service_close(struct directory_service **self);
/* Ends every watch; on the way to a stop, so that clients turn to another coordinator at once. */
void directory_service_stop(struct directory_service *self);

/* Asks the store for its version and publishes if it is a new one. Cheap; after a change of our
 * own. Errors: those of store_version. */
enum odsi_err directory_service_notice(struct directory_service *self);
/* The same for changes of other instances, and drops watchers that stall; every now and then. */
enum odsi_err directory_service_tick(struct directory_service *self);

/* Answers GetDirectory. */
void directory_service_get(struct directory_service *self, struct rpc_call *call);
/* on_open of WatchDirectory. */
void *directory_service_watch(struct directory_service *self, struct rpc_call *call,
                              const struct rpc_handler **handler);
#endif
