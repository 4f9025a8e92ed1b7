#include "worker/model/quant_mix.h"

#include "common/base/assert.h"
#include "kernels/quant.h"

#include <inttypes.h>
#include <stdio.h>
#include <string.h>
#include <strings.h>

/* GGUF's general.file_type, as far as it names a mix; the other numbers are those of their type. */
enum file_type {
    FILE_F32 = 0,
    FILE_F16 = 1,
    FILE_Q4_0 = 2,
    FILE_Q4_1 = 3,
    FILE_Q8_0 = 7,
    FILE_Q5_0 = 8,
    FILE_Q5_1 = 9,
    FILE_Q2_K = 10,
    FILE_Q3_K_S = 11,
    FILE_Q3_K_M = 12,
    FILE_Q3_K_L = 13,
    FILE_Q4_K_S = 14,
    FILE_Q4_K_M = 15,
    FILE_Q5_K_S = 16,
    FILE_Q5_K_M = 17,
    FILE_Q6_K = 18,
    FILE_BF16 = 32,
};

static const struct quant_mix mixes[] = {
    {"f32", FILE_F32, TENSOR_F32, 1},        {"f16", FILE_F16, TENSOR_F16, 1},
    {"bf16", FILE_BF16, TENSOR_BF16, 1},     {"q8_0", FILE_Q8_0, TENSOR_Q8_0, 0},
    {"q6_k", FILE_Q6_K, TENSOR_Q6_K, 0},     {"q5_k_m", FILE_Q5_K_M, TENSOR_Q5_K, 0},
    {"q5_k_s", FILE_Q5_K_S, TENSOR_Q5_K, 0}, {"q5_1", FILE_Q5_1, TENSOR_Q5_1, 0},
    {"q5_0", FILE_Q5_0, TENSOR_Q5_0, 0},     {"q4_k_m", FILE_Q4_K_M, TENSOR_Q4_K, 0},
    {"q4_k_s", FILE_Q4_K_S, TENSOR_Q4_K, 0}, {"q4_1", FILE_Q4_1, TENSOR_Q4_1, 0},
    {"q4_0", FILE_Q4_0, TENSOR_Q4_0, 0},     {"q3_k_l", FILE_Q3_K_L, TENSOR_Q3_K, 0},
    {"q3_k_m", FILE_Q3_K_M, TENSOR_Q3_K, 0}, {"q3_k_s", FILE_Q3_K_S, TENSOR_Q3_K, 0},
    {"q2_k", FILE_Q2_K, TENSOR_Q2_K, 0},     {NULL, 0, TENSOR_F32, 0},
};

const struct quant_mix *quant_mix_table(void)
{
    return mixes;
}

const struct quant_mix *quant_mix_find(const char *name)
{
    static const char *const others[][2] = {
        {"q3_k", "q3_k_m"}, {"q4_k", "q4_k_m"}, {"q5_k", "q5_k_m"}};
    for (size_t i = 0; i < sizeof others / sizeof others[0]; i++)
        if (strcasecmp(name, others[i][0]) == 0)
            name = others[i][1];
    for (const struct quant_mix *mix = mixes; mix->name; mix++)
        if (strcasecmp(name, mix->name) == 0)
            return mix;
    return NULL;
}

struct quant_mix quant_mix_pure(enum tensor_type type)
{
    struct quant_mix out = {.name = quant_name((uint32_t)type), .type = type, .is_pure = 1};
    ODSI_ASSERT(out.name);
    for (const struct quant_mix *mix = mixes; mix->name; mix++)
        if (mix->type == type)
            out.file_type = mix->file_type; /* of several the last, which is the smallest */
    return out;
}

/* ---- the rules ------------------------------------------------------------------------------- */

static int ends_with(const char *text, const char *end)
{
    const size_t size = strlen(text), end_size = strlen(end);
    return size >= end_size && strcmp(text + size - end_size, end) == 0;
}

static int is_matrix(const char *name, uint32_t dim_count)
{
    return dim_count >= 2 && ends_with(name, ".weight") && !ends_with(name, "_norm.weight") &&
           !strstr(name, "ffn_gate_inp");
}

static enum tensor_type output_type(const struct quant_mix *self)
{
    return self->type == TENSOR_Q8_0 ? TENSOR_Q8_0 : TENSOR_Q6_K;
}

/* Every third layer, and those at both ends. */
static int wants_more(uint32_t layer, uint32_t count)
{
    return layer < count / 8 || layer >= 7 * count / 8 || (layer - count / 8) % 3 == 2;
}

static enum tensor_type value_type(const struct quant_mix *self,
                                   const struct quant_mix_model *model, uint32_t layer)
{
    const int shares = model->kv_head_count > 0 && model->head_count / model->kv_head_count >= 4;
    if (model->expert_count == 8)
        return TENSOR_Q8_0; /* next to the experts it is nothing */
    switch ((enum file_type)self->file_type) {
    case FILE_Q2_K:
        return shares ? TENSOR_Q4_K : TENSOR_Q3_K;
    case FILE_Q3_K_M:
        return layer < 2 ? TENSOR_Q5_K : TENSOR_Q4_K;
    case FILE_Q3_K_L:
        return TENSOR_Q5_K;
    case FILE_Q4_K_S:
        return layer < 4 ? TENSOR_Q5_K : self->type;
    case FILE_Q4_K_M:
    case FILE_Q5_K_M:
        return wants_more(layer, model->layer_count) ? TENSOR_Q6_K : self->type;
    default:
        return self->type;
    }
}

static enum tensor_type down_type(const struct quant_mix *self, const struct quant_mix_model *model,
                                  uint32_t layer)
{
    const uint32_t count = model->layer_count;
    switch ((enum file_type)self->file_type) {
    case FILE_Q2_K:
        return TENSOR_Q3_K;
    case FILE_Q3_K_M:
        return layer < count / 16 ? TENSOR_Q5_K : TENSOR_Q4_K;
    case FILE_Q3_K_L:
        return TENSOR_Q5_K;
    case FILE_Q4_K_S:
        return layer < count / 8 ? TENSOR_Q5_K : self->type;
    case FILE_Q4_K_M:
    case FILE_Q5_K_M:
        return wants_more(layer, count) ? TENSOR_Q6_K : self->type;
    default:
        return self->type;
    }
}

static enum tensor_type attention_output_type(const struct quant_mix *self,
                                              const struct quant_mix_model *model)
{
    const int has_8 = model->expert_count == 8;
    switch ((enum file_type)self->file_type) {
    case FILE_Q2_K:
        return has_8 ? TENSOR_Q5_K : TENSOR_Q3_K;
    case FILE_Q3_K_M:
        return has_8 ? TENSOR_Q5_K : TENSOR_Q4_K;
    case FILE_Q3_K_L:
        return has_8 ? self->type : TENSOR_Q5_K;
    case FILE_Q3_K_S:
    case FILE_Q4_K_S:
    case FILE_Q4_K_M:
        return has_8 ? TENSOR_Q5_K : self->type;
    default:
        return self->type;
    }
}

static enum tensor_type mixed_type(const struct quant_mix *self,
                                   const struct quant_mix_model *model, const char *name)
{
    uint32_t layer = 0;
    if (strcmp(name, "output.weight") == 0 ||
        (model->is_tied && strcmp(name, "token_embd.weight") == 0))
        return output_type(self);
    if (sscanf(name, "blk.%" SCNu32 ".", &layer) != 1)
        return self->type;
    if (strstr(name, ".attn_v.weight") || strstr(name, ".attn_qkv.weight"))
        return value_type(self, model, layer);
    if (strstr(name, ".attn_k.weight"))
        return model->expert_count == 8 ? TENSOR_Q8_0 : self->type;
    if (strstr(name, ".ffn_down"))
        return down_type(self, model, layer);
    if (strstr(name, ".attn_output.weight"))
        return attention_output_type(self, model);
    return self->type;
}

/* The type that takes rows of cols in place of one that does not. */
static enum tensor_type fitting_type(enum tensor_type type, uint64_t cols)
{
    if (cols % quant_block_cols(type) == 0)
        return type;
    switch (type) {
    case TENSOR_Q2_K:
    case TENSOR_Q3_K:
        return fitting_type(TENSOR_Q4_0, cols);
    case TENSOR_Q4_K:
        return fitting_type(TENSOR_Q5_0, cols);
    case TENSOR_Q5_K:
        return fitting_type(TENSOR_Q5_1, cols);
    case TENSOR_Q6_K:
        return fitting_type(TENSOR_Q8_0, cols);
    default:
        return TENSOR_F16;
    }
}

enum tensor_type quant_mix_type(const struct quant_mix *self, const struct quant_mix_model *model,
                                const char *name, uint32_t dim_count, const uint64_t *dims)
{
    if (!is_matrix(name, dim_count))
        return TENSOR_F32;
    return fitting_type(self->is_pure ? self->type : mixed_type(self, model, name), dims[0]);
}
