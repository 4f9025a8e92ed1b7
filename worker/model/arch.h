/* The llama architecture: which metadata describe it, which tensors it has, and what this build
 * does not do and therefore refuses by name. Pure; any thread. */
#ifndef ODSI_WORKER_MODEL_ARCH_H
#define ODSI_WORKER_MODEL_ARCH_H
#include "common/base/err.h"
#include "worker/model/gguf.h"
#include "worker/model/model.h"

#include <stdint.h>

/* The tensors of a model: first those that it has once, then those of each layer. */
enum arch_role {
    ARCH_EMBED,
    ARCH_OUTPUT_NORM,
    ARCH_OUTPUT, /* may be missing: then the embedding is used */
    ARCH_ATTN_NORM,
    ARCH_Q,
    ARCH_K,
    ARCH_V,
    ARCH_O,
    ARCH_FFN_NORM,
    ARCH_GATE,
    ARCH_UP,
    ARCH_DOWN,
};
#define ARCH_ROLE_COUNT       12u
#define ARCH_ROLE_LAYER_FIRST ARCH_ATTN_NORM

struct arch_tensor {
    char name[64];
    uint32_t rows; /* 1 for a norm */
    uint32_t cols;
    int is_norm; /* a vector of f32 */
};

/* Reads the hyper-parameters but name, vocab_size and weight_size.
 * Errors: ODSI_ERR_UNSUPPORTED (another architecture, a key that would change the arithmetic),
 * ODSI_ERR_CORRUPT (missing or of another type). Limits: see arch_check. */
ODSI_MUST_USE enum odsi_err arch_read(const struct gguf *gguf, struct model_params *out);

/* Whether the numbers are within limits.h and fit together. Errors: ODSI_ERR_CORRUPT. */
ODSI_MUST_USE enum odsi_err arch_check(const struct model_params *params);

/* What the tensor of this role must look like; layer only matters from ARCH_ROLE_LAYER_FIRST. */
void arch_tensor_of(const struct model_params *params, enum arch_role role, uint32_t layer,
                    struct arch_tensor *out);

/* Whether the file has exactly the tensors of params, each of its shape and a supported type.
 * Errors: ODSI_ERR_CORRUPT, ODSI_ERR_UNSUPPORTED (the text names the tensor),
 * ODSI_ERR_NO_MEMORY. */
ODSI_MUST_USE enum odsi_err arch_check_tensors(const struct gguf *gguf,
                                               const struct model_params *params);
#endif
