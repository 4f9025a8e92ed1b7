/* A model file with smaller weights: reads a GGUF model (of a split one any part), gives each
 * tensor the type that a mix chooses, and writes one GGUF file. Metadata are copied, but for what
 * they say of types, parts and alignment. */
#ifndef ODSI_WORKER_MODEL_QUANTIZE_H
#define ODSI_WORKER_MODEL_QUANTIZE_H
#include "common/base/err.h"
#include "worker/model/quant_mix.h"

#include <stdint.h>

struct quantize_config {
    const struct quant_mix *mix;
    uint32_t thread_count;
    int may_requantize; /* weights that are quantized already may lose once more */
    /* Called on this thread with bytes written; NULL: not. */
    void (*progress)(void *context, uint64_t done, uint64_t total);
    void *context;
};

/* What went in and what came out. */
struct quantize_result {
    uint32_t tensor_count;
    uint64_t weight_count;
    uint64_t size_before, size_after; /* bytes of tensors */
};

/* Writes to (and to.part while writing).
 * Errors: those of source_open; ODSI_ERR_EXISTS (to is there), ODSI_ERR_UNSUPPORTED (a Hugging Face
 * folder), ODSI_ERR_INVALID (from is quantized and may_requantize is not set), ODSI_ERR_NUMERIC (a
 * weight that is not finite; the text names the tensor), ODSI_ERR_IO, ODSI_ERR_NO_MEMORY. No file
 * is left then. */
ODSI_MUST_USE enum odsi_err quantize_run(const char *from, const char *to,
                                         const struct quantize_config *config,
                                         struct quantize_result *result);
#endif
