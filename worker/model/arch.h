/* What the model families have in common and what not: which weights a model of given
 * hyper-parameters has, of what shapes, and which tensors of a source make them up. Whatever the
 * format: the metadata of GGUF are read in arch_gguf.c. Pure; any thread.
 *
 * A role is a place in struct model_layer or struct model_span. What stands there, a matrix, a
 * vector or as many matrices as there are experts, is put together from pieces: rows of tensors. A
 * file may have one tensor for a role, a tensor that holds several roles one behind another (q, k
 * and v in attn_qkv; gate and up in ffn_up), or one for each expert. */
#ifndef ODSI_WORKER_MODEL_ARCH_H
#define ODSI_WORKER_MODEL_ARCH_H
#include "common/base/err.h"
#include "worker/model/model.h"
#include "worker/model/source.h"

#include <stdint.h>

/* First what a model has once, then what each layer has. */
enum arch_role {
    ARCH_EMBED,
    ARCH_OUTPUT_NORM,
    ARCH_OUTPUT,       /* may be missing: then the embedding is used */
    ARCH_ROPE_FACTORS, /* not in the span: the rotation tables are made of them */
    ARCH_ATTN_NORM,
    ARCH_Q,
    ARCH_K,
    ARCH_V,
    ARCH_Q_BIAS,
    ARCH_K_BIAS,
    ARCH_V_BIAS,
    ARCH_Q_NORM,
    ARCH_K_NORM,
    ARCH_O,
    ARCH_ATTN_POST_NORM,
    ARCH_FFN_NORM,
    ARCH_ROUTER,
    ARCH_GATE,
    ARCH_UP,
    ARCH_DOWN,
    ARCH_FFN_POST_NORM,
};
#define ARCH_ROLE_COUNT       21u
#define ARCH_ROLE_LAYER_FIRST ARCH_ATTN_NORM

/* A tensor as it is where nothing is fused or taken apart. */
struct arch_tensor {
    char name[64];
    uint32_t rows; /* 1 for a vector */
    uint32_t cols;
    uint32_t matrix_count; /* 1 but for experts */
    int is_vector;         /* a norm, a bias or the factors of the rotation */
};

/* Rows of one tensor that belong to a role. Rows are counted through all matrices. */
struct arch_piece {
    const struct source_tensor *tensor;
    uint64_t row_first; /* in the tensor */
    uint64_t row_count;
    uint64_t row_to; /* of the role, where they go */
};

/* "llama", "qwen3moe": what GGUF calls it. */
const char *arch_name(const struct model_params *params);

/* Whether the numbers are within limits.h, fit together and are such that the ops and the rotation
 * tables take them. Errors: ODSI_ERR_CORRUPT. */
ODSI_MUST_USE enum odsi_err arch_check(const struct model_params *params);

/* What the tensor of this role looks like; layer only matters from ARCH_ROLE_LAYER_FIRST. Returns
 * 0 when models of params have no such role. params passed arch_check. */
int arch_tensor_of(const struct model_params *params, enum arch_role role, uint32_t layer,
                   struct arch_tensor *out);

/* NULL when source has no tensor of that name. */
const struct source_tensor *arch_find(const struct source *source, const char *name);

/* The index-th piece of a role of a source that passed arch_check_tensors. Returns 0 behind the
 * last one, and at once when the model does not have the role or ties the output to the
 * embedding. */
int arch_piece_at(const struct source *source, enum arch_role role, uint32_t layer, uint32_t index,
                  struct arch_piece *out);

/* Whether the source has exactly the tensors of its params, each of its shape and a type that ops
 * take there. Errors: ODSI_ERR_CORRUPT, ODSI_ERR_UNSUPPORTED (the text names the tensor),
 * ODSI_ERR_NO_MEMORY. */
ODSI_MUST_USE enum odsi_err arch_check_tensors(const struct source *source);
#endif
