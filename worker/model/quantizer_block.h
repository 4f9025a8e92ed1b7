/* One block of 32 or 256 weights into each quantized type: what worker/model/quantizer.h is made
 * of. x: the weights, finite and at most QUANTIZER_WEIGHT_MAX in magnitude; out: one block. Pure;
 * any thread. */
#ifndef ODSI_WORKER_MODEL_QUANTIZER_BLOCK_H
#define ODSI_WORKER_MODEL_QUANTIZER_BLOCK_H
#include "kernels/ops.h"

#include <stdint.h>

void quantizer_block_small(enum tensor_type type, const float *x, uint8_t *out);
void quantizer_block_k(enum tensor_type type, const float *x, uint8_t *out);
#endif
