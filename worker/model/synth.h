/* Synthetic models: a GGUF file with random weights of a given shape and type, for benchmarks and
 * tests. The same shape, types and seed give the same bytes everywhere.
 *
 * Weights are drawn so that activations keep a size near 1 and logits one near 4; norms are near 1
 * (larger in front of a tied output), biases are not zero. F32, F16, BF16 and Q8_0 files of one
 * shape and seed hold exactly the same numbers; the other types quantize those. */
#ifndef ODSI_WORKER_MODEL_SYNTH_H
#define ODSI_WORKER_MODEL_SYNTH_H
#include "common/base/err.h"
#include "kernels/ops.h"
#include "worker/model/quant_mix.h"
#include "worker/model/synth_shape.h"

#include <stdint.h>

/* Writes path (and path.part while writing) with matrices of type; what does not fit in it gets
 * another (quant_mix.h). progress may be NULL.
 * Errors: ODSI_ERR_IO (the text names path and cause, e.g. a full disk; no file is left),
 * ODSI_ERR_EXISTS (path is there), ODSI_ERR_INVALID (type or shape), ODSI_ERR_NO_MEMORY. */
ODSI_MUST_USE enum odsi_err
synth_write(const char *path, const struct synth_shape *shape, enum tensor_type type, uint64_t seed,
            void (*progress)(void *context, uint64_t done, uint64_t total), void *context);
/* The same with a type for each tensor, as the mix chooses. */
ODSI_MUST_USE enum odsi_err
synth_write_mix(const char *path, const struct synth_shape *shape, const struct quant_mix *mix,
                uint64_t seed, void (*progress)(void *context, uint64_t done, uint64_t total),
                void *context);
#endif
