/* Synthetic models: a GGUF file with random weights of a given shape and type, for benchmarks and
 * tests. The same shape, type and seed give the same bytes everywhere. */
#ifndef ODSI_WORKER_MODEL_SYNTH_H
#define ODSI_WORKER_MODEL_SYNTH_H
#include "common/base/err.h"
#include "kernels/ops.h"

#include <stdint.h>

struct synth_shape {
    const char *name; /* "llama-1.1b", "llama-tiny" */
    uint32_t dim, layer_count, head_count, kv_head_count, head_dim, ffn_dim, vocab_size;
    uint32_t context_length;
    float rms_eps, rope_base;
};

/* NULL when there is none of that name. */
const struct synth_shape *synth_shape_find(const char *name);
/* All of them, ended by a NULL name. */
const struct synth_shape *synth_shapes(void);

/* Writes path (and path.part while writing). The vocabulary is <unk>, <s>, </s>, 256 bytes and
 * then made-up pieces. Weights are drawn so that activations keep a size near 1.
 * Errors: ODSI_ERR_IO (the text names path and cause, e.g. a full disk; no file is left),
 * ODSI_ERR_EXISTS (path is there), ODSI_ERR_INVALID (type). */
ODSI_MUST_USE enum odsi_err
synth_write(const char *path, const struct synth_shape *shape, enum tensor_type type, uint64_t seed,
            void (*progress)(void *context, uint64_t done, uint64_t total), void *context);
#endif
