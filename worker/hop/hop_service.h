/* odsi.v1.Hop as a worker serves it: sessions opened by gateways on Control streams, steps from
 * other workers on Steps streams, and what the model is.
 *
 * The service exists before the worker has loaded its layers (its port is advertised while
 * loading); until hop_service_start it answers UNAVAILABLE.
 *
 * Life of a session: a Control stream opens it; the executor reserves its memory and "opened" goes
 * back; steps arrive in order, run, and leave to the next stage, the last one's token to the first
 * stage and to the gateway; it ends with CloseSession, with its Control stream, or when the worker
 * stops. After a failure it takes no further steps and waits for one of these.
 *
 * Threads: the loop's thread; results are sent from the compute thread. */
#ifndef ODSI_WORKER_HOP_HOP_SERVICE_H
#define ODSI_WORKER_HOP_HOP_SERVICE_H
#include "common/base/err.h"
#include "common/crypto/identity.h"
#include "common/net/rpc_loop.h"
#include "common/net/rpc_server.h"
#include "worker/hop/executor.h"
#include "worker/model/model.h"

struct hop_service;

/* dim: of the model that will be served; it bounds the messages that are received at all. identity
 * must outlive the service. Errors: ODSI_ERR_NO_MEMORY. */
ODSI_MUST_USE enum odsi_err hop_service_open(struct hop_service **out, struct rpc_loop *loop,
                                             const struct identity *identity, uint32_t dim);
/* For rpc_server_config; valid until the service is closed. */
const struct rpc_service *hop_service_rpc_view(const struct hop_service *self);

/* Serves layers [layer_first, layer_end) of model with this engine from now on. All must outlive
 * the service; the engine belongs to the compute thread. Errors: those of executor_open and
 * tokenizer_open. */
ODSI_MUST_USE enum odsi_err hop_service_start(struct hop_service *self, const struct model *model,
                                              struct engine *engine, uint32_t layer_first,
                                              uint32_t layer_end);
/* All zero before hop_service_start. */
void hop_service_load(const struct hop_service *self, struct executor_load *out);

/* Ends every session (the gateways are told UNAVAILABLE), then frees itself and calls on_closed on
 * the loop's thread. The server that serves it must be closed before. */
void hop_service_close(struct hop_service *self, void (*on_closed)(void *context), void *context);
#endif
