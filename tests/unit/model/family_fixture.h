/* GGUF files of every family, made by hand: metadata as the converters of llama.cpp write them, and
 * tensors as the hyper-parameters ask for, in any of the ways that files cut them. A row of a
 * weight holds the same random numbers, from 1 to 2, however the file is cut. Failing calls fail
 * the test. */
#ifndef ODSI_TESTS_UNIT_MODEL_FAMILY_FIXTURE_H
#define ODSI_TESTS_UNIT_MODEL_FAMILY_FIXTURE_H
#include "common/base/buf.h"
#include "kernels/ops.h"
#include "worker/model/model.h"

#include <stdint.h>

/* A key of the architecture; the value is used that the type says. */
struct family_key {
    const char *key; /* without "llama."; NULL ends a list */
    uint32_t type;   /* GGUF_U32, GGUF_F32 or GGUF_TEXT */
    double number;
    const char *text;
};

struct family_recipe {
    const char *arch;           /* general.architecture */
    struct model_params params; /* counts and features; where 0, those of family_params */
    struct family_key keys[12]; /* besides those of the counts */
    const char *skip_key;       /* a base key that is left out, whole */
    int fuses_qkv;
    int fuses_gate_up;
    int splits_experts; /* a tensor for each */
    const char *skip_tensor;
    const char *other_tensor; /* this one is of other_type */
    enum tensor_type other_type;
    const char *extra_tensors[4]; /* vectors of extra_cols */
    uint32_t extra_cols;
    float extra_value; /* of all their numbers; 0: random ones */
};

/* 2 layers, dim 32, 4 heads of 8 that turn whole, 2 for keys and values, ffn 64, context 64. */
extern const struct model_params family_params;
/* Fills in what is 0. */
void family_complete(struct model_params *params);

/* Appends part index of part_count parts; tensors go to the parts in turn. */
void family_part(struct buf *out, const struct family_recipe *recipe, uint32_t index,
                 uint32_t part_count);
/* Writes the file, or with part_count > 1 all parts, to folder. Returns the path of the first. */
const char *family_write(const char *folder, const struct family_recipe *recipe,
                         uint32_t part_count);
#endif
