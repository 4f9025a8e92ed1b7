/* Keeps a directory up to date from the coordinators (draft 10.3).
 *
 * One of them is watched at a time, since all speak for the same store; when it ends, fails or
 * says nothing, the next one in the list is tried, with a growing pause. While none answers the
 * directory stays as it was. Loop thread only. */
#ifndef ODSI_WORKER_GATEWAY_DIRECTORY_CLIENT_H
#define ODSI_WORKER_GATEWAY_DIRECTORY_CLIENT_H
#include "common/base/err.h"
#include "common/crypto/identity.h"
#include "common/net/rpc_loop.h"
#include "worker/gateway/directory.h"

#define DIRECTORY_CLIENT_COORDINATORS_MAX 16u

struct directory_client;

struct directory_client_config {
    const char *coordinators;        /* "[ID@]host:port[,...]" */
    const struct identity *identity; /* outlives the client */
    const char *known_peers_path;    /* trust on first use for those without an ID */
    const char *cache_path;          /* where the directory is kept */
    struct directory *directory;     /* outlives the client */
    /* A directory came; members_changed: not only load. */
    void (*on_update)(void *context, int members_changed);
    void *context;
};

/* Errors: ODSI_ERR_INVALID (the list), ODSI_ERR_NO_MEMORY. */
ODSI_MUST_USE enum odsi_err directory_client_open(struct directory_client **out,
                                                  struct rpc_loop *loop,
                                                  const struct directory_client_config *config);
/* Stops watching; on_closed(context) follows, perhaps before this returns, and nothing after it. */
void directory_client_close(struct directory_client **self, void (*on_closed)(void *context),
                            void *context);

/* Why there is no connection now; "" while there is one. Valid until the loop goes on. */
const char *directory_client_trouble_view(const struct directory_client *self);
#endif
