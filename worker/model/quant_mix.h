/* Which type each tensor of a quantized model gets: the mixes that people know from llama.cpp
 * ("q4_k_m"), chosen tensor by tensor by the same rules, and pure ones.
 *
 * Vectors, norms, routers and whatever is no weight of a matrix product stay F32. Where rows are
 * no multiple of a type's block: Q2_K and Q3_K give way to Q4_0, Q4_K to Q5_0, Q5_K to Q5_1,
 * Q6_K to Q8_0, and those to F16. Pure; any thread. */
#ifndef ODSI_WORKER_MODEL_QUANT_MIX_H
#define ODSI_WORKER_MODEL_QUANT_MIX_H
#include "kernels/ops.h"

#include <stdint.h>

struct quant_mix {
    const char *name;      /* "q4_k_m" */
    uint32_t file_type;    /* GGUF's general.file_type */
    enum tensor_type type; /* of the tensors that no rule of the mix names */
    int is_pure;           /* every matrix is of type */
};

/* What the rules ask of a model. */
struct quant_mix_model {
    uint32_t layer_count;
    uint32_t head_count;
    uint32_t kv_head_count;
    uint32_t expert_count; /* 0: none */
    int is_tied;           /* no tensor of its own for the output */
};

/* All mixes, ended by a NULL name. */
const struct quant_mix *quant_mix_table(void);
/* By name, upper or lower case; "q3_k", "q4_k" and "q5_k" mean their _m. NULL: there is none. */
const struct quant_mix *quant_mix_find(const char *name);
/* Every matrix of type. */
struct quant_mix quant_mix_pure(enum tensor_type type);

/* The type of a tensor. name: canonical ("blk.3.attn_v.weight"); dims: fastest first. */
enum tensor_type quant_mix_type(const struct quant_mix *self, const struct quant_mix_model *model,
                                const char *name, uint32_t dim_count, const uint64_t *dims);
#endif
