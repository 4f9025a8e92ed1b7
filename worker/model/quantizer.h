/* Weights from f32 into the block formats of kernels/quant.h.
 *
 * The integers, scales and minimums of a block are those with the least weighted squared error
 * among some candidates; large weights count more. Plain f32 operations in a written order and
 * nothing of a maths library: the same bytes on every machine. */
#ifndef ODSI_WORKER_MODEL_QUANTIZER_H
#define ODSI_WORKER_MODEL_QUANTIZER_H
#include "common/base/err.h"
#include "kernels/ops.h"

#include <stdint.h>

/* A larger weight, like one that is not finite, is refused where the type has scales in f16, and in
 * F16 itself: it is more likely a damaged file than a weight. */
#define QUANTIZER_WEIGHT_MAX 65504.0f

struct quantizer;

/* thread_count: 1 to POOL_THREADS_MAX, the caller of quantizer_rows counted in.
 * Errors: ODSI_ERR_INVALID, ODSI_ERR_NO_MEMORY. Owned: by the caller, ended with quantizer_close.
 * Threads: one owner. */
ODSI_MUST_USE enum odsi_err quantizer_open(struct quantizer **out, uint32_t thread_count);
void quantizer_close(struct quantizer **self);

/* weights: [row_count][cols], cols a multiple of the type's block; out: row_count rows of type.
 * Errors: ODSI_ERR_NUMERIC (the text names the first row and column with such a weight). */
ODSI_MUST_USE enum odsi_err quantizer_rows(struct quantizer *self, enum tensor_type type,
                                           const float *weights, uint64_t row_count, uint32_t cols,
                                           void *out);

/* The same from rows of type `from`, which have cols columns too; in and out do not overlap.
 * Errors: also ODSI_ERR_NO_MEMORY. */
ODSI_MUST_USE enum odsi_err quantizer_convert(struct quantizer *self, enum tensor_type from,
                                              const void *in, enum tensor_type type,
                                              uint64_t row_count, uint32_t cols, void *out);

/* One row on this thread; any thread. Returns cols, or the first column with a weight that type
 * does not take; then out is not set. */
uint32_t quantizer_row(enum tensor_type type, const float *weights, uint32_t cols, void *out);

/* What a row of any type means, in f32: factor * q + min, each operation rounded. Any thread.
 * row: of F32, F16 and BF16 too it may lie anywhere. */
void quantizer_read_row(enum tensor_type type, const void *row, uint32_t cols, float *out);
#endif
