/* odsi.v1.Inference: what clients call. Loop thread only. */
#ifndef ODSI_WORKER_GATEWAY_INFERENCE_SERVICE_H
#define ODSI_WORKER_GATEWAY_INFERENCE_SERVICE_H
#include "common/base/err.h"
#include "common/net/rpc_server.h"
#include "worker/gateway/gateway.h"

struct inference_service;

/* gateway must outlive all calls, which end no later than with gateway_close.
 * Errors: ODSI_ERR_NO_MEMORY. */
ODSI_MUST_USE enum odsi_err inference_service_open(struct inference_service **out,
                                                   struct gateway *gateway);
/* After the server is closed. */
void inference_service_close(struct inference_service **self);
/* From here on every new call is answered UNAVAILABLE. */
void inference_service_stop(struct inference_service *self);
/* For rpc_server_open; valid until close. */
const struct rpc_service *inference_service_rpc_view(const struct inference_service *self);
#endif
