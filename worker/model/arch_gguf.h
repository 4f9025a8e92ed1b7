/* From the metadata of a GGUF file to struct model_params: which architectures this build knows,
 * which keys say what, and what it does not do and therefore refuses by name. Pure; any thread. */
#ifndef ODSI_WORKER_MODEL_ARCH_GGUF_H
#define ODSI_WORKER_MODEL_ARCH_GGUF_H
#include "common/base/err.h"
#include "worker/model/gguf.h"
#include "worker/model/model.h"

#include <stdint.h>

struct arch_gguf_facts {
    uint32_t vocab_size;              /* that the metadata state; 0: nothing */
    uint32_t original_context_length; /* before the context was extended; 0: nothing */
};

/* Reads the hyper-parameters but name, vocab_size, weight_size and those features that the tensors
 * tell (MODEL_QKV_BIAS of llama, MODEL_ROPE_FACTORS).
 * Errors: ODSI_ERR_UNSUPPORTED (an architecture or a value that this build does not do, or a key
 * that it does not know: such a key may change what the model computes), ODSI_ERR_CORRUPT (missing
 * or of another type). Limits: see arch_check. */
ODSI_MUST_USE enum odsi_err arch_gguf_read(const struct gguf *gguf, struct model_params *out,
                                           struct arch_gguf_facts *facts);
#endif
