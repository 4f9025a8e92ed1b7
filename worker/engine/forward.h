/* The forward pass of one span of layers over the rows of a batch: one path for all families,
 * driven by struct model_layer (worker/model/model.h). Holds the memory that a pass works in.
 *
 * Threads: those of the backend's owner. The span and its backend must outlive it. */
#ifndef ODSI_WORKER_ENGINE_FORWARD_H
#define ODSI_WORKER_ENGINE_FORWARD_H
#include "common/base/err.h"
#include "worker/model/model.h"

#include <stdint.h>

struct forward;

/* Room for row_max rows and, when the span has the output, logits of logit_row_max rows.
 * Errors: ODSI_ERR_NO_MEMORY. */
ODSI_MUST_USE enum odsi_err forward_open(struct forward **out, const struct model_span *span,
                                         uint32_t row_max, uint32_t logit_row_max);
void forward_close(struct forward **self);

/* The residual stream, [row_max][dim] on the backend. */
float *forward_x_dev(struct forward *self);

/* Fills the residual stream from tokens (host memory, each < vocab_size); the span has layer 0. */
ODSI_MUST_USE enum odsi_err forward_embed(struct forward *self, const uint32_t *tokens,
                                          uint32_t rows);

/* One layer, counted from the span's first, over the rows of batch; pool holds the keys and values
 * of the span's layers. */
ODSI_MUST_USE enum odsi_err forward_layer(struct forward *self, uint32_t layer_index,
                                          const struct kv_pool *pool, const struct op_batch *batch);

/* Marks row of the residual stream as the index-th whose logits are wanted. */
ODSI_MUST_USE enum odsi_err forward_want_logits(struct forward *self, uint32_t index, uint32_t row);

/* Logits of the first count rows that were marked, [count][vocab_size]; on the backend, valid
 * until the next call. */
ODSI_MUST_USE enum odsi_err forward_logits(struct forward *self, uint32_t count,
                                           const float **out_dev);
#endif
