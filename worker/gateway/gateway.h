/* The gateway's parts, put together: directory, connections, models and answers on one loop.
 * Loop thread only, but for open. */
#ifndef ODSI_WORKER_GATEWAY_GATEWAY_H
#define ODSI_WORKER_GATEWAY_GATEWAY_H
#include "common/base/err.h"
#include "common/crypto/identity.h"
#include "common/net/rpc_loop.h"
#include "worker/gateway/answer.h"
#include "worker/gateway/directory.h"

#include <stdint.h>

struct gateway;

struct gateway_config {
    struct rpc_loop *loop;
    const struct identity *identity; /* outlives the gateway */
    const char *coordinators;        /* "[ID@]host:port[,...]" */
    const char *state_dir;           /* exists */
    uint32_t answers_max;            /* at a time */
    uint64_t open_timeout_us;
    uint64_t stall_timeout_us;
    /* The first directory is there: from the coordinator, or kept from the last run. */
    void (*on_ready)(void *context);
    void *context;
};

/* Errors: ODSI_ERR_INVALID (coordinators), ODSI_ERR_IO, ODSI_ERR_NO_MEMORY. */
ODSI_MUST_USE enum odsi_err gateway_open(struct gateway **out, const struct gateway_config *config);
/* Ends all answers with ODSI_ERR_UNAVAILABLE, then the connections; on_closed(context) follows on
 * the loop when nothing is left. */
void gateway_close(struct gateway **self, void (*on_closed)(void *context), void *context);

struct answer_context *gateway_answers(struct gateway *self);
const struct directory *gateway_directory_view(const struct gateway *self);
/* Why no coordinator is being watched now; "" when one is. Valid until the loop goes on. */
const char *gateway_trouble_view(const struct gateway *self);
#endif
